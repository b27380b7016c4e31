"""What each method costs a batch, in passes and in time against the source.

    python tests/measure/cost.py --root ROOT --net cifar/resnet20 --source-ckpt resnet20.safetensors
    python tests/measure/cost.py                                     # embedded digits, random weights

Methods take each batch in turn, so that a busy machine slows all alike; the table gives medians and ratios. Each method
has its default options. The stream is one corruption (gaussian_noise, severity 1 in a folder, 5 on digits), shuffled,
never reset; the first batch is not timed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from lightning_tta.backbones import create_backbone
from lightning_tta.data import DigitsData, FolderData
from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.errors import UnsupportedModelError
from lightning_tta.methods import TTAMethod, adapt, available_methods
from lightning_tta.run.source import show_source

EPISODIC = ("memo", "meta_ttt", "single_image_bn", "view_averaging", "zero")  # image by image, or weights of their own


def main(args: list[str] | None = None) -> dict[str, tuple[float, float, float]]:
    """Measure, and print a table; returns milliseconds, forward and backward passes a batch by method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--net", default="cifar/resnet20")
    parser.add_argument("--source-ckpt", default=None)
    parser.add_argument("--root", default=None, help="folder of images, ROOT/test/<class>/*")
    usual = [name for name in available_methods() if name not in (*EPISODIC, "source")]
    parser.add_argument("--methods", nargs="+", default=usual, help="beside source")
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--batches", type=int, default=10, help="timed")
    parser.add_argument("--source-images", type=int, default=200, help="shown to methods that need them; not timed")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(args)
    torch.manual_seed(0)
    net = create_backbone(given.net, 10, weights=given.source_ckpt).eval()
    count, device = (given.batches + 1) * given.batch_size, torch.device(given.device)
    data: ShiftedDataModule
    if given.root is None:
        data = DigitsData(domains=["gaussian_noise"], severity=5, batch_size=given.batch_size)
    else:
        data = FolderData(
            root=given.root,
            domains=["gaussian_noise"],
            function_set="imagenet_c",
            severity=1,
            num_images=count,
            batch_size=given.batch_size,
        )
    data.setup("predict")
    methods: dict[str, TTAMethod] = {}
    for name in ("source", *given.methods):
        try:
            methods[name] = adapt(net, name).to(device)
        except UnsupportedModelError as error:
            print(f"{name}: left out: {error}")
            continue
        if not methods[name].prepared:
            show_source(methods[name], data, given.source_images, device)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    passes: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for number, batch in enumerate(data.predict_dataloader()):
        for name, method in methods.items():
            start = time.perf_counter()
            logits = method(batch["image"].to(device))
            float(logits.sum())  # waits for the device
            if number:
                seconds[name].append(time.perf_counter() - start)
                passes[name].append((method.stats["forwards"], method.stats["backwards"]))
        if number == given.batches:
            break
    found = {}
    print("\n| method | ms a batch | x source | forward | backward |\n|---|---:|---:|---:|---:|")
    for name in methods:
        milliseconds = 1000 * statistics.median(seconds[name])
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["source"], strict=True))
        forward, backward = (statistics.fmean(counts) for counts in zip(*passes[name], strict=True))
        found[name] = (milliseconds, forward, backward)
        print(f"| {name} | {milliseconds:.0f} | {ratio:.2f} | {forward:.1f} | {backward:.1f} |")
    return found


if __name__ == "__main__":
    main()
