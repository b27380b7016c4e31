"""Does Adam's state, kept from image to image as in the public codes of MEMO and CR-MEMO, explain their gains?

    lightning-tta fit --config configs/digits/source.yaml
    python tests/measure/memo_leak.py --source-ckpt runs/digits/source

{fresh, stale} optimizer state x {class-sorted, shuffled} images of shifted digits: accuracy, and the paired difference
of stale to fresh with its standard error. Only the order and the leak differ between the cells of a table.
"""

from __future__ import annotations

import argparse
from typing import Any, cast

import torch
from torch import Tensor

from lightning_tta.data import DigitsData
from lightning_tta.data.streams import StreamKind
from lightning_tta.methods import adapt
from lightning_tta.modules.loading import load_source


def main() -> None:
    """Run the four cells, and the source."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--source-ckpt", required=True)
    parser.add_argument("--domains", nargs="+", default=["gaussian_noise", "haze", "motion_blur"])
    parser.add_argument("--severity", type=int, default=4)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--views", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2.5e-4)
    parser.add_argument("--kl-weight", type=float, default=0.5)
    parser.add_argument("--augment", default="rrc", help="as in CR-MEMO's table")
    args = parser.parse_args()
    net = load_source(args.source_ckpt).eval()

    def run(kind: str, method: str, **options: Any) -> Tensor:
        """Whether each image is right, in the order of the images' numbers."""
        data = DigitsData(
            domains=args.domains,
            severity=args.severity,
            num_images=args.images,
            batch_size=10,
            stream=cast(StreamKind, kind),
        )
        adapted = adapt(net, method, **options)
        right = torch.zeros(args.images * len(args.domains), dtype=torch.float64)
        last = -1
        for batch in data.predict_dataloader():
            if int(batch["domain"][0]) != last:  # the leak is within a domain
                adapted.reset()
                last = int(batch["domain"][0])
            right[batch["index"]] = (adapted(batch["image"]).argmax(1) == batch["label"]).double()
        return right

    memo: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.01, "lr": args.lr, "kl_weight": args.kl_weight}
    memo |= {"views": args.views, "augment": args.augment}
    print(f"source {100 * run('iid', 'source').mean():.1f}")
    print("| order | fresh | stale | stale - fresh |")
    print("|---|---:|---:|---:|")
    for kind, label in (("label_shift", "class-sorted"), ("iid", "shuffled")):
        fresh, stale = (run(kind, "memo", optimizer_state=state, **memo) for state in ("fresh", "stale"))
        change = stale - fresh
        error = change.std() / len(change) ** 0.5
        row = f"{100 * fresh.mean():.1f} | {100 * stale.mean():.1f} | {100 * change.mean():+.1f} ± {100 * error:.1f}"
        print(f"| {label} | {row} |", flush=True)


if __name__ == "__main__":
    main()
