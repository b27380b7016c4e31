"""Methods without gradients beside Tent, on a small vision transformer and shifted MNIST.

    python tests/measure/forward_only.py --mnist mnist_uint8.npz
    python tests/measure/forward_only.py --smoke                     # tiny, on random images: shows only that it runs

One table: accuracy, passes, time, memory. The file has ``x_train``, ``y_train``, ``x_test`` and ``y_test``, images as
uint8 of 28 x 28. The net is trained first, on one core, from the seed (a few minutes). Each shift is a stream of its
own: shuffled test images, methods with their default options, fresh and prepared with the same source images. Methods
take each batch in turn. Times are this process's processor time, one thread; the ratio to ``source`` is the median over
all batches but the first of each stream, with its quartiles. ``state`` is what a method may change and what it keeps
of the stream and the source, in KiB; ``peak`` the most that a batch has in memory at a time beside weights and state,
by the tensors that operations return, in MiB.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from bn_statistics import peak
from lightning_tta import adapt
from lightning_tta.methods.base.state import size
from plumbing import arguments, header, row

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "source": ("source", {}),
    "tent": ("tent", {}),
    "lame": ("lame", {}),
    "t3a": ("t3a", {}),
    "neo": ("neo", {}),
    "neo, center: source": ("neo", {"center": "source"}),
    "output_shift": ("output_shift", {}),
    "pea, views: 1": ("pea", {"views": 1}),
    "foa": ("foa", {}),
}
SHIFTS = ["noise", "contrast", "brightness", "blur"]
NET = {"patch_size": 7, "embed_dim": 96, "depth": 6, "num_heads": 4}
SMOKE_NET = {"patch_size": 14, "embed_dim": 16, "depth": 2, "num_heads": 2}


class Result(NamedTuple):
    """Of a method: percent right by shift, passes of a batch, time over source's in each batch, bytes, MiB."""

    accuracy: dict[str, float]
    forward: float
    backward: float
    ratios: list[float]
    state: int
    peak: float


def shifts(images: Tensor, seed: int) -> dict[str, Tensor]:
    """The images as they are and under four shifts; (images, 1, height, width), 0 to 1."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return {
        "clean": images,
        "noise": (images + 0.4 * noise).clamp(0, 1),
        "contrast": 0.5 + 0.3 * (images - 0.5),
        "brightness": 0.4 + 0.6 * images,
        "blur": gaussian_blur(images, [9, 9], [1.7, 1.7]),
    }


def train(net: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch: int = 128) -> nn.Module:
    """AdamW with a warm-up and a cosine, images moved by up to two pixels."""
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05)
    steps = epochs * (len(images) // batch)
    for number in range(steps):
        if number % (steps // epochs) == 0:
            batches = torch.randperm(len(images)).split(batch)
        chosen = batches[number % (steps // epochs)]
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (number + 1) / 200) * 0.5 * (1 + math.cos(math.pi * number / steps))
        moved = torch.roll(images[chosen], torch.randint(-2, 3, (2,)).tolist(), (2, 3))
        loss = F.cross_entropy(net(moved), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (number + 1) % 100 == 0:
            print(f"step {number + 1} of {steps}: loss {loss.item():.2f}", file=sys.stderr, flush=True)
    return net.eval()


def load(path: str) -> dict[str, Tensor]:
    """Images (number, 1, 28, 28) from 0 to 1, and labels; random ones without a file."""
    if path:
        with np.load(path) as file:
            data = {name: torch.from_numpy(file[name]) for name in ("x_train", "y_train", "x_test", "y_test")}
    else:
        data = {f"x_{part}": torch.randint(256, (256, 28, 28), dtype=torch.uint8) for part in ("train", "test")}
        data |= {f"y_{part}": torch.randint(10, (256,)) for part in ("train", "test")}
    return {name: value[:, None] / 255 if name.startswith("x") else value.long() for name, value in data.items()}


def run(net: nn.Module, streams: dict[str, Tensor], labels: Tensor, source: Tensor, batch: int) -> dict[str, Result]:
    """All methods on all streams, in turn in each batch."""
    right = {name: dict.fromkeys(streams, 0) for name in METHODS}
    ratios: dict[str, list[float]] = {name: [] for name in METHODS}
    passes: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    for shift, stream in streams.items():
        methods = {name: adapt(net, method, **options) for name, (method, options) in METHODS.items()}
        for method in methods.values():
            if not method.prepared:
                method.prepare([{"image": images} for images in source.split(batch)])
        for number, (images, truth) in enumerate(zip(stream.split(batch), labels.split(batch), strict=True)):
            seconds = {}
            for name in methods if number % 2 else reversed(methods):
                start = time.process_time()
                logits = methods[name](images)
                seconds[name] = time.process_time() - start
                right[name][shift] += int((logits.argmax(1) == truth).sum())
            if number:
                for name, method in methods.items():
                    ratios[name].append(seconds[name] / seconds["source"])
                    passes[name].append((method.stats["forwards"], method.stats["backwards"]))
    results = {}
    for name, method in methods.items():
        accuracy = {shift: 100 * number / len(labels) for shift, number in right[name].items()}
        forward, backward = (statistics.fmean(counts) for counts in zip(*passes[name], strict=True))
        states = [*method.rest.values(), *method.adaptable.values(), *method.buffers(recurse=False)]
        state = size({id(tensor): tensor for tensor in states})  # each once
        results[name] = Result(accuracy, forward, backward, ratios[name], state, peak(method, stream[:batch]))
    return results


def main(args: list[str] | None = None) -> dict[str, Result]:
    """Print the table; returns its rows."""
    options = arguments(
        __doc__,
        args,
        mnist=("", "npz file with x_train, y_train, x_test, y_test"),
        smoke=(False, "a tiny net, random images"),
        seed=(0, "of weights, training, choice of images, noise"),
        epochs=4,
        shifts=SHIFTS,
        images=(1024, "of the test set, in each stream"),
        source_images=(512, "of the training set, for methods that need them"),
        batch=64,
    )
    if bool(options.mnist) == options.smoke:
        raise SystemExit("give the file with MNIST, --mnist FILE, or --smoke for random images")
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    data = load(options.mnist)
    shape = SMOKE_NET if options.smoke else NET
    net = VisionTransformer(img_size=28, in_chans=1, num_classes=10, mlp_ratio=2.0, **shape)
    train(net, data["x_train"], data["y_train"], options.epochs)
    source = data["x_train"][torch.randperm(len(data["x_train"]))[: options.source_images]]
    chosen = torch.randperm(len(data["x_test"]))[: options.images]
    shifted = shifts(data["x_test"][chosen], options.seed)
    streams = {name: shifted[name] for name in ("clean", *options.shifts)}
    results = run(net, streams, data["y_test"][chosen], source, options.batch)
    names = ("forward", "backward", "time", "quartiles", "state", "peak")
    header("method", *streams, "mean of the shifts", *names)
    for name, result in results.items():
        low, middle, high = statistics.quantiles(result.ratios, n=4)
        mean = statistics.fmean(value for shift, value in result.accuracy.items() if shift != "clean")
        row(
            name,
            *(f"{value:.1f}" for value in (*result.accuracy.values(), mean)),
            f"{result.forward:.0f}",
            f"{result.backward:.0f}",
            f"{middle:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{result.state / 1024:.1f}",
            f"{result.peak:.1f}",
        )
    return results


if __name__ == "__main__":
    main()
