"""Accuracy of an exported net beside that of its method: adapted on one half of a stream, asked for the other half.

    python tests/measure/export.py --source-ckpt runs/digits/source
    python tests/measure/export.py --root ROOT --net cifar/resnet20 --source-ckpt resnet20.safetensors

ROOT/test/<class>/* under an ImageNet-C function (extra ``corruptions``) at severity 1; without a root the digits at
severity 5. Columns, in percent: the source, on both halves; the method while it adapts, on the first half; on the
second half ``method.predict`` with the statistics of the stream, the same with those of the batch, image by image, and
``method.export()``. Refusals are printed as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_tta import UnsupportedModelError, adapt
from lightning_tta.modules.loading import load_source
from plumbing import CUDA_OR_CPU, arguments, digits_or_folder, header, row

METHODS = ["norm", "tent", "zerosiam", "eata", "cotta", "t3a", "memo", "lame"]
FEW = {"memo": {"views": 8}, "cotta": {"views": 8}}  # so that it ends


def accuracy(predict: Callable[[Tensor], Tensor], batches: list[dict[str, Tensor]], device: str) -> float:
    """In percent."""
    right = [predict(batch["image"].to(device)).argmax(1).cpu() == batch["label"] for batch in batches]
    return 100 * float(torch.cat(right).double().mean())


def main(args: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Print the table; returns the figures by method."""
    options = arguments(
        __doc__,
        args,
        root=("", "folder of images; without: the digits"),
        source_ckpt=str,
        net=("", "where the weights do not say it"),
        domain="gaussian_noise",
        images=1000,
        batch=50,
        source_images=512,
        methods=METHODS,
        device=CUDA_OR_CPU,
    )
    data = digits_or_folder(
        options.root, {}, {}, domains=[options.domain], num_images=options.images, batch_size=options.batch
    )
    batches = list(data.predict_dataloader())
    first, second = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    net = load_source(options.source_ckpt, options.net or None, data.num_classes if options.net else None).eval()
    net = net.to(options.device)
    found: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        source = [f"{accuracy(net, half, options.device):.1f}" for half in (first, second)]
    print(f"source: {source[0]} on the first {sum(len(b['label']) for b in first)} images, {source[1]} on the second")
    header("method", "online", "predict", "predict, batch", "predict, one by one", "exported")
    for name in options.methods:
        try:
            method = adapt(net, name, **FEW.get(name, {}))
        except UnsupportedModelError as error:
            row(name, error)
            continue
        if not method.prepared:
            with torch.enable_grad():
                method.prepare(data.source_batches(options.source_images, batch_size=64))
        figures: dict[str, Any] = {"online": accuracy(method, first, options.device)}
        figures["predict"] = accuracy(method.predict, second, options.device)
        figures["batch"] = accuracy(lambda x, m=method: m.predict(x, statistics="batch"), second, options.device)
        one_by_one = lambda x, m=method: torch.cat([m.predict(image[None]) for image in x])  # noqa: E731
        figures["single"] = accuracy(one_by_one, second, options.device)
        try:
            with torch.no_grad():
                figures["exported"] = accuracy(method.export(), second, options.device)
        except UnsupportedModelError as error:
            figures["exported"] = str(error)
        found[name] = figures
        row(name, *(f"{value:.1f}" if isinstance(value, float) else value for value in figures.values()))
    return found


if __name__ == "__main__":
    main()
