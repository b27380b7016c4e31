"""Experiments on COME's uncertainty mass m: which predictions its gradient makes surer, and what comes of the others.

    python tests/measure/come_mass.py --root ROOT --net cifar/resnet26_gn --source-ckpt resnet26_gn.safetensors

A row for each factor on the source's logits (which leaves its predictions, and moves them against m) and each m. Of the
source: ``sum exp u < m``, the share of images that are more uncertain than all classes together; ``surer``, the share
whose largest probability rises along the negative gradient. Of COME on a mixed stream, never reset: the error, and the
largest share of one class among the last quarter of the predictions. Then the same where only images count whose
prediction m makes surer, so without the others' gradient; and with that choice of images, but the objective of m = K.
Errors in percent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_tta.data import ShiftedDataModule
from lightning_tta.losses import come_entropy
from lightning_tta.methods import adapt
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components.filters import Filter
from plumbing import header, row
from reasons import batches, net_and_streams, softened


def made_surer(logits: Tensor, mass: float) -> Tensor:
    """Whether the largest probability of each row (B, K) rises along the negative gradient of COME's entropy: (B,)."""
    with torch.enable_grad():
        u = logits.detach().double().requires_grad_()
        (down,) = torch.autograd.grad(-come_entropy(u, mass).sum(), u)
        (up,) = torch.autograd.grad(u.softmax(-1).amax(-1).sum(), u)
    return (down * up).sum(-1) > 0


class Surer(Filter):
    """Keeps the samples that the step makes surer."""

    def __init__(self, mass: float) -> None:
        self.mass = mass

    def keep(self, method: TTAMethod, logits: Tensor, losses: Tensor) -> Tensor:
        """By the sign of the derivative."""
        return made_surer(logits, self.mass)


def stream(method: TTAMethod, data: ShiftedDataModule) -> tuple[float, float]:
    """Error, and share of the most predicted class in the last quarter; both in percent."""
    predicted, labels = (
        torch.cat(parts) for parts in zip(*((method(x).argmax(1), y) for x, y, _ in batches(data)), strict=True)
    )
    last = predicted[-max(1, len(predicted) // 4) :]
    return 100 * float((predicted != labels).double().mean()), 100 * float(last.bincount().amax() / len(last))


def main(args: list[str] | None = None) -> list[dict[str, float]]:
    """Print the table; returns its rows."""
    more: dict[str, Any] = {"factors": ["1", "0.5"], "masses": ["10", "100", "1000", "10000"]}
    options, net, (data,) = net_and_streams(__doc__, args, ["mixed"], domains=["held_out"], batch_size=64, **more)
    rows = []
    kinds = [f"{kind}{word}" for kind in ("", "surer alone: ", "surer alone, m = K: ") for word in ("error", "largest")]
    header("factor", "m", "sum exp u < m", "surer", *kinds)
    for factor in map(float, options.factors):
        soft = softened(net, factor)
        with torch.no_grad():
            logits = torch.cat([soft(images) for images, _, _ in batches(data)]).double()
        for mass in map(float, options.masses):
            figures = {
                "factor": factor,
                "mass": mass,
                "uncertain": 100 * float((logits.exp().sum(1) < mass).double().mean()),
                "surer": 100 * float(made_surer(logits, mass).double().mean()),
            }
            for kind, chosen, weighed in (
                ("", None, mass),
                ("_alone", mass, mass),
                ("_chosen", mass, data.num_classes),
            ):
                method = adapt(soft, "come", uncertainty=weighed)
                if chosen is not None:
                    method.add_filter(Surer(chosen))
                figures[f"error{kind}"], figures[f"largest{kind}"] = stream(method, data)
            rows.append(figures)
            row(*(f"{value:.4g}" for value in figures.values()))
    return rows


if __name__ == "__main__":
    main()
