"""What each method costs a batch, in passes and in time against the source.

    python tests/measure/cost.py --root ROOT --net cifar/resnet20 --source-ckpt resnet20.safetensors
    python tests/measure/cost.py                                     # embedded digits, random weights

Methods take each batch in turn, so that a busy machine slows all alike; the table gives medians and ratios. Each method
has its default options. The stream is one corruption (gaussian_noise, severity 1 in a folder, 5 on digits), shuffled,
never reset; the first batch is not timed.
"""

from __future__ import annotations

import statistics
import time
from itertools import islice

import torch

from lightning_tta.backbones import create_backbone
from lightning_tta.errors import UnsupportedModelError
from lightning_tta.methods import adapt, available_methods
from plumbing import arguments, digits_or_folder, header, on_device, row

EPISODIC = ("memo", "meta_ttt", "single_image_bn", "view_averaging", "zero")  # image by image, or weights of their own


def main(args: list[str] | None = None) -> dict[str, tuple[float, float, float]]:
    """Print the table; returns milliseconds, forward and backward passes a batch by method."""
    options = arguments(
        __doc__,
        args,
        net="cifar/resnet20",
        source_ckpt="",
        root=("", "folder of images, ROOT/test/<class>/*"),
        methods=([name for name in available_methods() if name not in (*EPISODIC, "source")], "beside source"),
        batch_size=200,
        batches=(10, "timed"),
        source_images=(200, "shown to methods that need them; not timed"),
        device="cpu",
    )
    torch.manual_seed(0)
    net = create_backbone(options.net, 10, weights=options.source_ckpt or None).eval()
    images = {"num_images": (options.batches + 1) * options.batch_size}
    stream = {"domains": ["gaussian_noise"], "batch_size": options.batch_size}
    data = digits_or_folder(options.root, {}, images, **stream)
    methods = {}
    for name in ("source", *options.methods):
        try:
            methods[name] = adapt(net, name).to(options.device)
        except UnsupportedModelError as error:
            print(f"{name}: left out: {error}")
            continue
        if not methods[name].prepared:
            methods[name].prepare(on_device(data.source_batches(options.source_images, batch_size=64), options.device))
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    passes: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for number, batch in enumerate(islice(data.predict_dataloader(), options.batches + 1)):
        for name, method in methods.items():
            start = time.perf_counter()
            float(method(batch["image"].to(options.device)).sum())  # waits for the device
            if number:
                seconds[name].append(time.perf_counter() - start)
                passes[name].append((method.stats["forwards"], method.stats["backwards"]))
    costs = {}
    print()
    header("method", "ms a batch", "x source", "forward", "backward")
    for name in methods:
        milliseconds = 1000 * statistics.median(seconds[name])
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["source"], strict=True))
        forward, backward = (statistics.fmean(counts) for counts in zip(*passes[name], strict=True))
        costs[name] = (milliseconds, forward, backward)
        row(name, f"{milliseconds:.0f}", f"{ratio:.2f}", f"{forward:.1f}", f"{backward:.1f}")
    return costs


if __name__ == "__main__":
    main()
