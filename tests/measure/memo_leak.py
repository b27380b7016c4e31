"""Does Adam's state, kept from image to image as in the public codes of MEMO and CR-MEMO, explain their gains?

    lightning-tta fit --config configs/digits/source.yaml
    python tests/measure/memo_leak.py --source-ckpt runs/digits/source

{fresh, stale} optimizer state x {class-sorted, shuffled} images of shifted digits: accuracy, and the paired difference
of stale to fresh with its standard error. Only the order and the leak differ between the cells of a table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_tta.data import DigitsData
from lightning_tta.methods import adapt
from lightning_tta.modules.loading import load_source
from plumbing import arguments, header, row


def main(args: list[str] | None = None) -> None:
    """Run the four cells, and the source."""
    options = arguments(
        __doc__,
        args,
        source_ckpt=str,
        domains=["gaussian_noise", "haze", "motion_blur"],
        severity=4,
        images=200,
        views=16,
        lr=2.5e-4,
        kl_weight=0.5,
        augment=("rrc", "as in CR-MEMO's table"),
    )
    net = load_source(options.source_ckpt).eval()

    def run(stream: Any, name: str, **settings: Any) -> Tensor:
        """Whether each image is right, in the order of the images' numbers."""
        images = {"num_images": options.images, "batch_size": 10, "severity": options.severity}
        data = DigitsData(domains=options.domains, stream=stream, **images)
        method = adapt(net, name, **settings)
        right = torch.zeros(options.images * len(options.domains), dtype=torch.float64)
        last = -1
        for batch in data.predict_dataloader():
            if int(batch["domain"][0]) != last:  # the leak is within a domain
                method.reset()
                last = int(batch["domain"][0])
            right[batch["index"]] = (method(batch["image"]).argmax(1) == batch["label"]).double()
        return right

    memo: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.01}
    memo |= {name: getattr(options, name) for name in ("lr", "kl_weight", "views", "augment")}
    print(f"source {100 * run('iid', 'source').mean():.1f}")
    header("order", "fresh", "stale", "stale - fresh")
    for stream, order in (("label_shift", "class-sorted"), ("iid", "shuffled")):
        fresh, stale = (run(stream, "memo", optimizer_state=state, **memo) for state in ("fresh", "stale"))
        change = 100 * (stale - fresh)
        error = change.std() / len(change) ** 0.5
        row(order, *(f"{100 * x.mean():.1f}" for x in (fresh, stale)), f"{change.mean():+.1f} ± {error:.1f}")


if __name__ == "__main__":
    main()
