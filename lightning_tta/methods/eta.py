"""ETA: EATA without its Fisher penalty, so without source data."""

from __future__ import annotations

from torch import nn

from lightning_tta.methods.base.optimizers import OptimizerName
from lightning_tta.methods.components.filters import EntropyName
from lightning_tta.methods.eata import EATA


class ETA(EATA):
    """Minimises the weighted entropy of reliable, non-redundant samples.

    This is :class:`~lightning_tta.methods.eata.EATA` with ``fisher_alpha=0``; see there for the formula, the state,
    the passes and the arguments. It needs nothing before the stream.

    With a reset every 1000 batches it is RDumb (Press et al., NeurIPS 2023, arXiv 2306.05401).

    Source: Niu et al., EATA, ICML 2022, arXiv 2204.02610, where it is an ablation.
    """

    parallel = frozenset({"replicas", "synchronised"})

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 5e-3,
        optimizer: OptimizerName = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        steps: int = 1,
        lr_batch_size: int | None = None,
        entropy_margin: float | None = 0.4,
        diversity_margin: float | None = 0.4,
        entropy: EntropyName = "softmax",
        source_filter: bool = False,
    ) -> None:
        super().__init__(
            model,
            lr=lr,
            optimizer=optimizer,
            momentum=momentum,
            weight_decay=weight_decay,
            steps=steps,
            lr_batch_size=lr_batch_size,
            entropy_margin=entropy_margin,
            diversity_margin=diversity_margin,
            fisher_alpha=0.0,
            entropy=entropy,
            source_filter=source_filter,
        )
