"""What a guard saves: Tent at twenty times its rate on a class-sorted stream, with and without one; healthy runs too.

    python tests/measure/guard.py --source-ckpt runs/digits/source_gn
    python tests/measure/guard.py --root ROOT --source-ckpt resnet26_gn.safetensors --net cifar/resnet26_gn

    python tests/measure/guard.py --source-ckpt runs/digits/source_gn --healthy 10 [--gather 1] [--earlier-windows 0]

Digits: 12 corruptions at severity 5, batches of 16; a folder of CIFAR-10 images: six of ImageNet-C's functions at
severity 1, 1,000 images each, batches of 50. Reset at each domain. ``--healthy N``: only the runs of ZeroSiam with a
guard that warns, on N orders of the stream; of each alarm, how many of all the domain's images the method predicts
rightly then, without adapting, and the source. An alarm is false where the method is not worse.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_tta.guard.callback import Guard
from lightning_tta.guard.gathering import GATHER
from lightning_tta.methods import Source, Tent, ZeroSiam
from lightning_tta.run.stream_run import Outputs, StreamRun
from plumbing import arguments, digits_or_folder, predict

SIX = ["gaussian_noise", "defocus_blur", "fog", "contrast", "pixelate", "jpeg_compression"]
GUARDS: dict[str, dict[str, Any]] = {
    f"{action}, {compare}, window 8": {"action": action, "compare": compare, "window": 8}
    for compare in ("source", "history")
    for action in ("stop", "rollback")
}


class JudgedGuard(Guard):
    """A guard that warns; at each alarm the method and its source are judged by labels on all images of the domain.

    Attributes:
        domains: Images (N, C, H, W) and labels (N,) of each domain, shuffled.
        judged: Accuracy in percent of the method and of the source at each alarm, in the order of the alarms.
    """

    def __init__(self, domains: dict[int, tuple[Tensor, Tensor]], **settings: Any) -> None:
        super().__init__(action="warn", **settings)
        self.domains, self.judged = domains, list[tuple[float, float]]()

    def on_batch(self, run: StreamRun, output: Outputs) -> None:
        """Judge each new alarm."""
        super().on_batch(run, output)
        assert self.watch is not None
        if len(self.watch.events) > len(self.judged):
            method = self.watch.method
            images, labels = self.domains[run.last_domain or 0]
            now = torch.cat([method.predict(each, statistics="batch") for each in images.split(100)])
            with method.at_source():
                source = torch.cat([method.predict(each, statistics="batch") for each in images.split(100)])
            mine, its = (100 * float((each.argmax(-1) == labels).double().mean()) for each in (now, source))
            self.judged += [(mine, its)] * (len(self.watch.events) - len(self.judged))


def by_domain(data: Any) -> dict[int, tuple[Tensor, Tensor]]:
    """All images and labels of a stream, shuffled, by the number of their domain."""
    batches = list(data.predict_dataloader())
    images, labels, domains = (torch.cat([batch[name] for batch in batches]) for name in ("image", "label", "domain"))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels, domains = images[order], labels[order], domains[order]
    return {number: (images[domains == number], labels[domains == number]) for number in domains.unique().tolist()}


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
        earlier_windows=(2, "windows back from which images are kept to check an alarm; 0: no check"),
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
    monitors = [{"kind": "collapse", "earlier_windows": options.earlier_windows}]
    digits = {"domains": ["reported"], "num_images": options.images or None, "batch_size": 16}
    folder = {"domains": SIX, "num_images": options.images or 1000, "batch_size": 50}
    net = {"source_ckpt": options.source_ckpt, "backbone": options.net or None, "num_classes": 10}
    results: dict[str, tuple[float, int | None]] = {}
    if options.healthy:
        return watch_healthy(options, healthy, monitors, digits, folder, net)
    for name, (method, guard) in runs.items():
        data = digits_or_folder(options.root, digits, folder, stream="label_shift")
        callbacks = [] if guard is None else [Guard(**guard, monitors=monitors)]
        report = predict(method, data, *callbacks, **net)
        events = None if guard is None else report["guard"]["events"]
        results[name] = (100 * report["accuracy"], None if events is None else len(events))
        shown = "" if events is None else f"{len(events)} alarms, at batches {[event['batch'] for event in events]}"
        print(f"{name:40} {results[name][0]:6.2f}  {shown}", flush=True)
    return results


def watch_healthy(
    options: Any, method: Any, monitors: Any, digits: dict[str, Any], folder: dict[str, Any], net: dict[str, Any]
) -> dict[str, tuple[float, int | None]]:
    """Run other orders of the stream; print accuracy, alarms, and what each alarm is worth."""
    results: dict[str, tuple[float, int | None]] = {}
    for seed in range(options.healthy):
        data = digits_or_folder(options.root, digits, folder, stream="label_shift", order_seed=seed)
        guard = JudgedGuard(by_domain(data), monitors=monitors, gather=options.gather)
        report = predict(method, data, guard, **net)
        events, name = report["guard"]["events"], f"zerosiam, order {seed}"
        results[name] = (100 * report["accuracy"], len(events))
        false = sum(mine >= its for mine, its in guard.judged)
        forwards, batches = report["guard"]["forwards"], report["batches"]
        print(
            f"{name:24} {results[name][0]:6.2f}  {len(events)} alarms, {false} false; {forwards} passes of "
            f"the guard for {batches} batches",
            flush=True,
        )
        for event, (mine, its) in zip(events, guard.judged, strict=True):
            print(
                f"    batch {event['batch']}: {event['reason']}, on the domain {mine:.1f}, source {its:.1f}; "
                f"{event['values']}, usual {event['reference']}, earlier {event.get('earlier')}"
            )
    return results


if __name__ == "__main__":
    main()
