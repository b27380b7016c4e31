"""Streams whose best method changes midway: error of ``auto`` in each part beside its candidates and the source.

    python tests/measure/auto_switch.py --source-ckpt runs/digits/source
    python tests/measure/auto_switch.py --root ROOT --source-ckpt resnet20.safetensors --net cifar/resnet20

A stream is a corruption shuffled, then the same corruption with correlated labels (Dirichlet), then clean images; other
``--parts`` make others. No method is reset between the parts; each corruption is a stream of its own, and errors are
means over them; stderr has each. Digits: severity 5, batches of 16; a folder of CIFAR-10 images: ImageNet-C's functions
at severity 1, batches of 64. ``time`` is this thread's processor time over that of the source; ``passes`` are forward
and backward passes a batch; ``answered`` says of each method of ``auto`` for how many percent of the batches it
answered.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta import adapt
from lightning_tta.methods import Source
from lightning_tta.methods.auto import Auto
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components.candidates import make_candidates
from lightning_tta.modules import TestTimeAdaptation
from plumbing import arguments, digits_or_folder, header, row

FOUR = {"digits": ["gaussian_noise", "defocus_blur", "haze", "jpeg"]}
FOUR["folder"] = ["gaussian_noise", "defocus_blur", "fog", "jpeg_compression"]
Batches = list[tuple[int, Tensor, Tensor]]


def stream(options: Any, domain: str) -> Batches:
    """Batches of all parts: the number of the part, images and labels."""
    found: Batches = []
    for number, part in enumerate(options.parts):
        kind = {"iid": "iid", "correlated": "correlated", "clean": "iid"}[part]
        both = {"domains": ["clean" if part == "clean" else domain], "num_images": options.images or None}
        data = digits_or_folder(
            options.root,
            {"batch_size": options.batch or 16},
            {"batch_size": options.batch or 64, "function_set": options.function_set},
            **{**both, "stream": kind, "order_seed": number},
        )
        found += [(number, batch["image"], batch["label"]) for batch in data.predict_dataloader()]
    return found


def run(method: TTAMethod, batches: Batches) -> tuple[list[float], float, list[float], Counter[str]]:
    """Error of each part in percent, seconds, forward and backward passes a batch, and who answered how often."""
    wrong, seen, passes, answered = Counter[int](), Counter[int](), torch.zeros(2), Counter[str]()
    seconds = 0.0
    for number, images, labels in batches:
        start = time.thread_time()
        logits = method(images)
        seconds += time.thread_time() - start
        wrong[number] += int((logits.argmax(-1) != labels).sum())
        seen[number] += len(labels)
        passes += torch.tensor([method.stats["forwards"], method.stats["backwards"]])
        answered[method.answering if isinstance(method, Auto) else ""] += 1
    return [100 * wrong[part] / seen[part] for part in seen], seconds, (passes / len(batches)).tolist(), answered


def main(args: list[str] | None = None) -> dict[str, list[float]]:
    """Print the table; returns the errors of the parts and of the whole, in percent, by method."""
    options = arguments(
        __doc__,
        args,
        source_ckpt=str,
        net="",
        root="",
        domains=([""], f"corruptions, each a stream of its own; by default {FOUR['digits']}, or {FOUR['folder']}"),
        parts=["iid", "correlated", "clean"],
        every=["1", "2", "4"],
        images=(0, "of each part; 0: all digits, or all images of the folder"),
        batch=(0, "images; 0: 16 of digits, 64 of a folder"),
        function_set=("imagenet_c", "of a folder; or builtin"),
    )
    domains = list(filter(None, options.domains)) or FOUR["folder" if options.root else "digits"]
    torch.set_num_threads(1)
    module = TestTimeAdaptation(
        partial(Source), source_ckpt=options.source_ckpt, backbone=options.net or None, num_classes=10
    )
    net: nn.Module = module.method.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = ["source", *(name for name, _ in make_candidates(net, "default", adapt))]
        names += [f"auto, every={every}" for every in options.every]
        sums: dict[str, list[float]] = {name: [] for name in names}
        times, passes = Counter[str](), {name: torch.zeros(2) for name in names}
        answered = {name: Counter[str]() for name in names}
        for domain in domains:
            batches = stream(options, domain)
            for name in names:
                method = made(net, name)
                errors, seconds, counts, who = run(method, batches)
                shown = " ".join(f"{error:.1f}" for error in errors)
                print(f"{domain}, {name}: {shown}; {seconds:.1f} s", file=sys.stderr, flush=True)
                sums[name] = [a + b for a, b in zip(sums[name] or [0.0] * len(errors), errors, strict=True)]
                times[name] += seconds
                passes[name] += torch.tensor(counts) / len(domains)
                answered[name] += who
    results: dict[str, list[float]] = {}
    header("method", *options.parts, "mean", "time", "passes", "answered")
    for name, errors in sums.items():
        parts = [error / len(domains) for error in errors]
        results[name] = [*parts, sum(parts) / len(parts)]
        total = answered[name].total()
        who = "; ".join(f"{key} {100 * count / total:.0f}" for key, count in answered[name].most_common() if key)
        counts = " / ".join(f"{count:.1f}" for count in passes[name].tolist())
        shown = (f"{error:.1f}" for error in results[name])
        row(name, *shown, f"{times[name] / times['source']:.1f}", counts, who)
    return results


def made(net: nn.Module, name: str) -> TTAMethod:
    """The method of a row."""
    if name == "source":
        return adapt(net, "source")
    if name.startswith("auto"):
        return adapt(net, "auto", every=int(name.rpartition("=")[2]))
    return dict(make_candidates(net, "default", adapt))[name]


if __name__ == "__main__":
    main()
