"""What a guard saves: Tent at twenty times its rate on a class-sorted stream, with and without one; healthy runs too.

    python tests/measure/guard.py --source-ckpt runs/digits/source_gn
    python tests/measure/guard.py --root ROOT --source-ckpt resnet26_gn.safetensors --net cifar/resnet26_gn

    python tests/measure/guard.py --source-ckpt runs/digits/source_gn --healthy 10 [--gather 1]

Digits: 12 corruptions at severity 5, batches of 16; a folder of CIFAR-10 images: six of ImageNet-C's functions at
severity 1, 1,000 images each, batches of 50. Reset at each domain. ``--healthy N``: only the runs of ZeroSiam with a
guard that warns, on N orders of the stream, and what each false alarm went by.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning_tta.guard.callback import Guard
from lightning_tta.guard.gathering import GATHER
from lightning_tta.methods import Source, Tent, ZeroSiam
from plumbing import arguments, digits_or_folder, predict

SIX = ["gaussian_noise", "defocus_blur", "fog", "contrast", "pixelate", "jpeg_compression"]
GUARDS: dict[str, dict[str, Any]] = {
    f"{action}, {compare}, window 8": {"action": action, "compare": compare, "window": 8}
    for compare in ("source", "history")
    for action in ("stop", "rollback")
}


def main(args: list[str] | None = None) -> dict[str, tuple[float, int | None]]:
    """Run all and print accuracy (percent) and alarms."""
    options = arguments(
        __doc__,
        args,
        source_ckpt=str,
        net="",
        root="",
        images=(0, "of each domain; 0: all digits, 1000 of a folder"),
        healthy=(0, "orders of the stream on which healthy runs alone are watched"),
        gather=(GATHER, "images that the monitor looks at together, at least"),
    )
    if options.root:
        fast, healthy = partial(Tent, lr=20 * 1e-3), partial(ZeroSiam)
    else:  # the rates of configs/digits/benchmark.yaml
        fast = partial(Tent, optimizer="sgd", lr=20 * 2e-2)
        healthy = partial(ZeroSiam, lr=2e-2, predictor_lr=3e-3, lr_batch_size=None)
    runs: dict[str, tuple[Any, dict[str, Any] | None]] = {
        "source": (Source, None),
        "tent at 20x": (fast, None),
        **{f"tent at 20x, {name}": (fast, guard) for name, guard in GUARDS.items()},
        "zerosiam": (healthy, None),
        **{f"zerosiam, {name}": (healthy, guard) for name, guard in GUARDS.items() if name.startswith("stop")},
    }
    digits = {"domains": ["reported"], "num_images": options.images or None, "batch_size": 16}
    folder = {"domains": SIX, "num_images": options.images or 1000, "batch_size": 50}
    net = {"source_ckpt": options.source_ckpt, "backbone": options.net or None, "num_classes": 10}
    results: dict[str, tuple[float, int | None]] = {}
    if options.healthy:
        runs = {
            f"zerosiam, order {seed}": (healthy, {"action": "warn", "gather": options.gather})
            for seed in range(options.healthy)
        }
    for name, (method, guard) in runs.items():
        seed = {"order_seed": int(name.split()[-1])} if options.healthy else {}
        data = digits_or_folder(options.root, digits, folder, stream="label_shift", **seed)
        report = predict(method, data, *([] if guard is None else [Guard(**guard)]), **net)
        alarms = None if guard is None else len(report["guard"]["events"])
        results[name] = (100 * report["accuracy"], alarms)
        print(f"{name:40} {results[name][0]:6.2f}  {'' if guard is None else f'{alarms} alarms'}", flush=True)
        for event in (report["guard"] or {}).get("events", ()) if options.healthy else ():
            print(f"    batch {event['batch']}: {event['reason']}, {event['values']}, usual {event['reference']}")
    return results


if __name__ == "__main__":
    main()
