"""MEMO, CR-MEMO and what they must beat, on CIFAR-10 images in folders: errors, and paired differences to the source.

    python tests/measure/memo_cifar.py --root ROOT --weights resnet26_gn.safetensors

ROOT/test/<class>/*; corruptions are the ImageNet-C functions (extra ``corruptions``) at one severity, which at 32
pixels are far stronger than CIFAR-10-C's own. All methods see the same images; a difference is the mean over images of
(wrong with the method) - (wrong with the source), with its standard error.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tta.backbones import create_backbone
from lightning_tta.methods import adapt
from plumbing import CUDA_OR_CPU, arguments, digits_or_folder, row

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "source": ("source", {}),
    "view averaging (crop, flip)": ("view_averaging", {"augment": "crop_flip"}),
    "view averaging (AugMix)": ("view_averaging", {"augment": "augmix_crop"}),
    "ZERO (crop, flip)": ("zero", {"views": 32, "augment": "crop_flip"}),
    "MEMO": ("memo", {"lr": 5e-3}),
    "MEMO, norm only": ("memo", {"lr": 5e-3, "params": "norm"}),
    "CR-MEMO (crop, flip; AdamW)": (
        "memo",
        {"kl_weight": 0.5, "augment": "crop_flip", "optimizer": "adamw", "lr": 2.5e-4, "weight_decay": 0.01},
    ),
}


def main(args: list[str] | None = None) -> None:
    """Run every method on every domain and print the table."""
    options = arguments(
        __doc__,
        args,
        root=str,
        weights=str,
        net="cifar/resnet26_gn",
        domains=["clean", "gaussian_noise", "defocus_blur"],
        function_set=("imagenet_c", "or builtin"),
        severity=1,
        images=500,
        batch=20,
        device=CUDA_OR_CPU,
        output=("", "JSON file for the figures"),
    )
    stream = {name: getattr(options, name) for name in ("domains", "function_set", "severity")}
    data = digits_or_folder(options.root, {}, {}, num_images=options.images, batch_size=options.batch, **stream)
    net = create_backbone(options.net, data.num_classes, weights=options.weights).to(options.device)
    protocol = data.describe()
    functions = f"{options.function_set} {options.severity}"
    print(f"{protocol['data']} ({protocol['data_digest']}), {options.images} images, {functions}")

    source: dict[str, Tensor] = {}
    rows = []
    for name, (method_name, settings) in METHODS.items():
        method = adapt(net, method_name, **settings)
        wrong: dict[str, list[Tensor]] = {domain: [] for domain in options.domains}
        start = time.perf_counter()
        for batch in data.predict_dataloader():
            prediction = method(batch["image"].to(options.device)).argmax(1).cpu()
            wrong[options.domains[int(batch["domain"][0])]].append((prediction != batch["label"]).double())
        seconds = (time.perf_counter() - start) / (options.images * len(options.domains))
        cells = []
        for domain, batches in wrong.items():
            errors = torch.cat(batches)
            difference = errors - source.setdefault(domain, errors)
            figures = {
                "error": float(errors.mean()),
                "difference": float(difference.mean()),
                "standard_error": float(difference.std() / len(difference) ** 0.5),
            }
            rows.append({"method": name, "domain": domain, **figures, "seconds_per_image": seconds})
            error, change, spread = (100 * figure for figure in figures.values())
            cells.append(f"{error:.1f}" + ("" if name == "source" else f" ({change:+.1f} ± {spread:.1f})"))
        row(name, *cells, f"{1000 * seconds:.0f} ms")
    if options.output:
        Path(options.output).write_text(json.dumps({"protocol": protocol, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
