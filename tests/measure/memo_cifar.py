"""MEMO, CR-MEMO and what they must beat, on CIFAR-10 images in folders: errors, and paired differences to the source.

    python tests/measure/memo_cifar.py --root ROOT --weights resnet26_gn.safetensors

ROOT/test/<class>/*; corruptions are the ImageNet-C functions (extra ``corruptions``) at one severity, which at 32
pixels are far stronger than CIFAR-10-C's own. All methods see the same images; a difference is the mean over images of
(wrong with the method) - (wrong with the source), with its standard error.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tta.backbones import create_backbone
from lightning_tta.data import FolderData
from lightning_tta.methods import adapt

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


def main() -> None:
    """Run every method on every domain and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--root", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--net", default="cifar/resnet26_gn")
    parser.add_argument("--domains", nargs="+", default=["clean", "gaussian_noise", "defocus_blur"])
    parser.add_argument("--function-set", default="imagenet_c", choices=("imagenet_c", "builtin"))
    parser.add_argument("--severity", type=int, default=1)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args()
    data = FolderData(
        args.root,
        domains=args.domains,
        function_set=args.function_set,
        severity=args.severity,
        num_images=args.images,
        batch_size=args.batch,
    )
    data.setup("predict")
    net = create_backbone(args.net, data.num_classes, weights=args.weights).to(args.device)
    protocol = data.describe()
    print(f"{protocol['data']} ({protocol['data_digest']}), {args.images} images, {args.function_set} {args.severity}")

    wrong: dict[str, dict[str, Tensor]] = {}
    rows = []
    for name, (method_name, options) in METHODS.items():
        method = adapt(net, method_name, **options)
        found: dict[str, list[Tensor]] = {domain: [] for domain in args.domains}
        start = time.perf_counter()
        for batch in data.predict_dataloader():
            domain = args.domains[int(batch["domain"][0])]
            prediction = method(batch["image"].to(args.device)).argmax(1).cpu()
            found[domain].append((prediction != batch["label"]).double())
        seconds = (time.perf_counter() - start) / (args.images * len(args.domains))
        wrong[name] = {domain: torch.cat(parts) for domain, parts in found.items()}
        cells = []
        for domain, errors in wrong[name].items():
            difference = errors - wrong["source"][domain]
            row: dict[str, Any] = {
                "method": name,
                "domain": domain,
                "error": float(errors.mean()),
                "difference": float(difference.mean()),
                "standard_error": float(difference.std() / len(difference) ** 0.5),
                "seconds_per_image": seconds,
            }
            rows.append(row)
            paired = (
                "" if name == "source" else f" ({100 * row['difference']:+.1f} ± {100 * row['standard_error']:.1f})"
            )
            cells.append(f"{100 * row['error']:.1f}{paired}")
        print(f"| {name} | {' | '.join(cells)} | {1000 * seconds:.0f} ms |", flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps({"protocol": protocol, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
