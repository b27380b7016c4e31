"""POEM: entropies matched to those of the source, only as far as bets against the source win: no shift, no update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta import collective
from lightning_tta.errors import check_range
from lightning_tta.evidence.betting import SourceCDF, mix, share, wagers
from lightning_tta.methods.base.description import About
from lightning_tta.methods.components.source_images import see_source_images
from lightning_tta.methods.eta import ETA

KNOTS = "source_entropies"


class POEM(ETA):
    """Minimises the distance of each entropy from its protected entropy, on reliable, non-redundant samples.

    F is the distribution of the source's entropies on held-out source images, from :meth:`prepare`. A sample of entropy
    H has the rank u = F(H). A martingale bets ``epsilon`` on ``u - 1/2``, see
    :class:`~lightning_tta.evidence.betting.MixtureMartingale`; each bet is made before its sample is seen. Its margin
    is ``1.96 / sqrt(12 n)``, n the number of held-out images: what their mean rank may be wrong by is no evidence.
    Nine tenths of its wealth are idle until the others have won. ::

        u' = epsilon u^2 / 2 + (1 - epsilon / 2) u
        H' = H + F^-1(u') - F^-1(u)
        L  = mean [ exp(E0 - H) (H - stopgrad(H'))^2 / 2 ]     over samples kept by ETA's two filters

    Where entropies are larger than the source's, epsilon is above 0, and H' below H. Where the stream is like the
    source, epsilon stays near 0, so that H' is near H and hardly anything is learned. The first ``watched`` samples
    are bet on only.

    BatchNorm runs with the source's statistics: a net that takes the batch's is another net than the source, and its
    entropies differ without any shift. With ``statistics="batch"`` F is taken with the statistics of the batches that
    :meth:`prepare` gets, which then must be shuffled and as large as those of the stream.

    Parameters touched: weight and bias of every normalisation layer. State: these, the optimizer, ETA's mean
    probability, the wealth of each bet. Per batch: one forward and one backward pass. Returns the logits before the
    step. ``stats["epsilon"]`` is the batch's mean bet, ``stats["log_wealth"]`` the martingale's: of the net's
    entropies as it is adapted, so it falls again where they have come back to the source's.

    Args:
        model: A classifier with normalisation layers (BatchNorm, GroupNorm, LayerNorm, ...).
        lr: Learning rate, >= 0.
        watched: Samples that are only watched at first, >= 0; authors 100.
        **options: Those of ETA but ``steps``: each sample is bet on once.

    Raises:
        ConfigError: If a value is out of range.
        UnsupportedModelError: If the net has no affine normalisation layer.

    Source: Bar et al., POEM, NeurIPS 2024, arXiv 2408.07511. Differs from the authors': a mixture of bets in the place
    of online gradients (SF-OGD), whose bets wander on streams without a shift, and a margin; H'
    differs from H by a difference of quantiles, which is exactly 0 for a bet of 0; :meth:`reset` forgets the bets.
    """

    about = About(
        does="matches entropies to the source's, as far as a bet on a shift wins",
        learns="norm layers",
        passes="1 / 1",
        needs="norm layers; held-out source images",
        holds="source entropies, bets, a mean probability",
        suits="partly shifted",
        formula="paper",
        paper="NeurIPS 2024, arXiv 2408.07511",
    )

    uses_batch_statistics = False
    synchronized = False  # a bet is on one sample after another
    needs_source = True
    needs_held_out = True
    fixed_options = frozenset({"steps"})  # each sample is bet on once

    def __init__(self, model: nn.Module, *, lr: float = 5e-3, watched: int = 100, **options: Any) -> None:
        super().__init__(model, lr=lr, steps=1, **options)
        check_range("watched", watched, 0, integer=True)
        self.watched = watched
        zero = next(model.parameters()).detach().new_zeros((), dtype=torch.float64)
        for name, tensor in zip(("wagers", "bets"), wagers(zero, idle=0.9), strict=True):
            self.state(name, tensor, fixed_dtype=True)
        self.state("samples", torch.zeros((), dtype=torch.int64, device=zero.device))
        self.collect(KNOTS, torch.empty(0, dtype=torch.int64, device=zero.device))

    @torch.no_grad()
    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Take F from held-out source images, with the source weights.

        Args:
            source_batches: Dicts with ``image`` (B, C, H, W) in [0, 1]; labels are not used.

        Raises:
            DataError: If there are fewer than 10.
        """
        rows: list[Tensor] = []
        with self.at_source():
            see = lambda images: rows.append(self.entropy(self.logits(images)))  # noqa: E731
            see_source_images(self, source_batches, see, running=self.normalizing)
        knots = SourceCDF(torch.cat(rows).double() if rows else torch.empty(0)).knots
        self.collect(KNOTS, knots.view(torch.int64))  # as integers they stay exact in half precision
        super().prepare(source_batches)

    def step(self, x: Tensor) -> Tensor:
        """Bet on the batch, and one step on the samples that are kept."""
        self.look(x)
        logits = self.logits(x)
        entropies = self.entropy(logits)
        target, ready, bet = self.protect(entropies.detach())
        kept = self.keep(logits, entropies)
        assert kept is not None
        kept = kept & ready
        losses = self.reliable.weights(logits, entropies) * (entropies - target) ** 2 / 2
        taken = self.descend(losses, kept)
        self.accept(logits, kept, taken)
        counted = (taken | ~kept.any()) & entropies.isfinite().all()  # a step that failed leaves no bet, either
        self.write("samples", self.value("samples") + len(entropies), counted)
        self.write("bets", bet, counted)
        return logits

    @torch.no_grad()
    def protect(self, entropies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bet on samples in their order; writes nothing.

        Args:
            entropies: (B,); one that is not finite is not bet on.

        Returns:
            Protected entropies (B,); which samples come after those that are only watched, (B,), bool; and the bets
            after the batch, as state.
        """
        cdf = SourceCDF.from_knots(self.get_buffer(KNOTS).view(torch.float64))
        wide, seen = entropies.double(), self.value("samples")
        ranks = cdf.ranks(wide)
        grid, start = self.value("wagers"), self.source_value("bets")
        margin = min(1.96 / math.sqrt(12 * cdf.size), 0.12)
        bets, wealths, epsilon = mix(self.value("bets"), ranks, grid, margin)
        ready = seen + torch.arange(len(ranks), device=ranks.device) >= self.watched
        bets = share(bets, len(ranks) / ((seen + len(ranks)).double() + 50), start)
        protected = epsilon * ranks**2 / 2 + (1 - epsilon / 2) * ranks
        target = wide + cdf.entropies(protected) - cdf.entropies(ranks)
        self.note(epsilon=collective.mean(epsilon), log_wealth=wealths[-1])
        return target.to(entropies), ready, bets
