"""What a guard saves: Tent at twenty times its rate on a class-sorted stream, with and without one; healthy runs too.

    python tests/measure/guard.py --source-ckpt runs/digits/source_gn
    python tests/measure/guard.py --root ROOT --source-ckpt resnet26_gn.safetensors --net cifar/resnet26_gn

Digits: 12 corruptions at severity 5, batches of 16; a folder of CIFAR-10 images: six of ImageNet-C's functions at
severity 1, 1,000 images each, batches of 50. Reset at each domain.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from lightning_tta.data import DigitsData, FolderData
from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.guard.callback import Guard
from lightning_tta.methods import Source, Tent, TTAMethod, ZeroSiam  # type: ignore[attr-defined]
from lightning_tta.modules import TestTimeAdaptation
from tiny import quiet_trainer

SIX = ["gaussian_noise", "defocus_blur", "fog", "contrast", "pixelate", "jpeg_compression"]
GUARDS: dict[str, dict[str, Any]] = {
    f"{action}, {compare}, window {window}": {"action": action, "compare": compare, "window": window}
    for action, compare, window in (
        ("stop", "source", 8),
        ("rollback", "source", 8),
        ("stop", "history", 8),
        ("rollback", "history", 8),
    )
}


def make_data(root: str | None, images: int | None) -> ShiftedDataModule:
    """The stream."""
    if root is None:
        return DigitsData(domains=["reported"], severity=5, num_images=images, batch_size=16, stream="label_shift")
    return FolderData(
        root=root,
        domains=SIX,
        function_set="imagenet_c",
        severity=1,
        num_images=images or 1000,
        batch_size=50,
        stream="label_shift",
    )


def main(args: list[str] | None = None) -> dict[str, tuple[float, int | None]]:
    """Run all and print accuracy (percent) and alarms."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--source-ckpt", required=True)
    parser.add_argument("--net", default=None)
    parser.add_argument("--root", default=None)
    parser.add_argument("--images", type=int, default=None, help="of each domain")
    given = parser.parse_args(args)
    fast: Callable[[nn.Module], TTAMethod]
    if given.root is None:  # the rates of configs/digits/benchmark.yaml
        fast = partial(Tent, optimizer="sgd", lr=20 * 2e-2)
        healthy = partial(ZeroSiam, lr=2e-2, predictor_lr=3e-3, lr_batch_size=None)
    else:
        fast, healthy = partial(Tent, lr=20 * 1e-3), ZeroSiam
    runs: dict[str, tuple[Any, dict[str, Any] | None]] = {
        "source": (Source, None),
        "tent at 20x": (fast, None),
        **{f"tent at 20x, {name}": (fast, guard) for name, guard in GUARDS.items()},
        "zerosiam": (healthy, None),
        **{f"zerosiam, {name}": (healthy, guard) for name, guard in GUARDS.items() if name.startswith("stop")},
    }
    found: dict[str, tuple[float, int | None]] = {}
    with tempfile.TemporaryDirectory() as place:
        for number, (name, (method, guard)) in enumerate(runs.items()):
            module = TestTimeAdaptation(method, source_ckpt=given.source_ckpt, backbone=given.net, num_classes=10)
            trainer = quiet_trainer(f"{place}/{number}", *([Guard(**guard)] if guard is not None else []))
            trainer.predict(module, datamodule=make_data(given.root, given.images), return_predictions=False)
            assert module.run is not None
            alarms = None if guard is None else int(module.run.summary.last["guard_alarms"])
            found[name] = (100 * (module.run.summary.accuracy or 0.0), alarms)
            print(f"{name:40} {found[name][0]:6.2f}  {'' if alarms is None else f'{alarms} alarms'}", flush=True)
    return found


if __name__ == "__main__":
    main()
