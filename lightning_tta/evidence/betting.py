"""Bets against "the stream is like the source": ranks of entropies, and martingales that grow where ranks are not fair.

Entropies of the source net on held-out source images (the calibration) give a distribution. A sample of the stream has
a rank u in [0, 1] in it. While the stream is like the source, u is uniform, and the wealth of whoever bets on u > 1/2
or u < 1/2 is a martingale that starts at 1. Ville's inequality: the probability that it ever reaches 1/alpha is at most
alpha, however long one looks. So the wealth is an alarm that may be looked at after each sample.

The bound needs ranks that are uniform given all earlier ones. A calibration of n images is not the source's
distribution: its mean rank is wrong by 1 / sqrt(12 n), and a bettor finds that out on streams longer than n. So there
are three kinds of ranks, :data:`RANKS`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import NormalDist
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightning_tta.draws import random_rows
from lightning_tta.errors import DataError, InputError, check_choice, check_range

Ranks = Literal["conformal", "margin", "fixed"]
RANKS: dict[str, str] = {
    "conformal": "among the calibration and all earlier samples; exact, whatever the stream's length",
    "margin": "in the calibration alone; bets pay for how wrong the calibration may be",
    "fixed": "in the calibration alone, taken for the truth; the paper's, for streams shorter than the calibration",
}
Bets = Literal["mixture", "sf_ogd"]
LEAST = 10
"""Calibration images below which there is no distribution."""
_LIMIT = 1.8


def uniforms(seed: int, start: int, number: int) -> Tensor:
    """Draws in [0, 1), (number,), float64: each depends on the seed and its own position alone."""
    words = random_rows(seed, torch.arange(start, start + number), 1)[:, 0]
    return ((words >> 11).double() + 2.0**52) / 2.0**53


def _on_host(entropies: Tensor) -> Tensor:
    if not isinstance(entropies, Tensor) or entropies.ndim != 1:
        given = tuple(entropies.shape) if isinstance(entropies, Tensor) else type(entropies).__name__
        raise InputError(
            f"Entropies must be a tensor (B,), one number a sample; got {given}. Of logits (B, K): "
            "lightning_tta.losses.entropy(logits)."
        )
    return entropies.detach().double().cpu()


class SourceCDF:
    """Empirical distribution F of the source's entropies on n held-out images.

    Args:
        entropies: (n,), in nats; at least 10 finite ones.
        largest: Upper end of the distribution, log K; ``None``: the largest of the entropies.

    Raises:
        DataError: If there are too few finite ones.
    """

    def __init__(self, entropies: Tensor, largest: float | None = None) -> None:
        entropies = entropies.detach().flatten()
        self.values = entropies[entropies.isfinite()].sort().values
        self.size = len(self.values)
        if self.size < LEAST:
            raise DataError(
                f"The entropies of at least {LEAST} held-out source images are needed, 1,000 or more are better; got "
                f"{self.size} finite ones."
            )
        top = self.values[-1:] if largest is None else self.values[-1:].clamp_min(largest)
        self.knots = torch.cat([torch.zeros_like(top), self.values.clamp_min(0), top])

    @classmethod
    def from_knots(cls, knots: Tensor) -> SourceCDF:
        """The distribution whose :attr:`knots` (n + 2,) these are: 0, the n values, sorted, and the largest."""
        cdf = cls.__new__(cls)
        cdf.knots, cdf.values, cdf.size = knots, knots[1:-1], len(knots) - 2
        return cdf

    def ranks(self, entropies: Tensor, draws: Tensor | None = None) -> Tensor:
        """Ranks u = F(H), (B,), in [0, 1].

        Args:
            entropies: (B,), in nats.
            draws: (B,), uniform in [0, 1): u is ``(#{X < H} + draw (#{X = H} + 1)) / (n + 1)``, uniform for a sample
                that is like the calibration, with equal entropies too. ``None``: F is interpolated between the n
                values, 0 and the largest; of equal values their middle rank.
        """
        if draws is not None:
            below = torch.searchsorted(self.values, entropies)
            equal = torch.searchsorted(self.values, entropies, right=True) - below
            return (below + draws * (equal + 1)) / (self.size + 1)
        knots, entropies = self.knots, entropies.clamp(0, None)
        left, right = (torch.searchsorted(knots, entropies, right=side) for side in (False, True))
        lower = (left - 1).clamp(0, self.size)
        start, end = knots[lower], knots[lower + 1]
        between = lower + (entropies - start) / (end - start).clamp_min(torch.finfo(knots.dtype).tiny)
        places = torch.where(right > left, (left + right - 1) / 2, between)
        return (places / (self.size + 1)).clamp(0, 1)

    def entropies(self, ranks: Tensor) -> Tensor:
        """The inverse of :meth:`ranks` without draws: H = F^-1(u), (B,), for u in [0, 1]."""
        places = ranks.clamp(0, 1) * (self.size + 1)
        lower = places.floor().long().clamp(0, self.size)
        start, end = self.knots[lower], self.knots[lower + 1]
        return torch.lerp(start, end, (places - lower).to(start))


class ConformalRanks:
    """Ranks among the calibration and all earlier samples: exactly uniform and independent for exchangeable samples.

    The rank of the t-th sample is ``(#{X < H} + draw (#{X = H} + 1)) / (n + t)``, X over the n entropies of the
    calibration and the t - 1 samples before. Entropies are compared in steps of 1/256 of an octave, from 2^-30 to 2^4
    nats, so that memory is bounded: 8,704 counts. A monotone step function that depends on no data keeps the ranks
    exact; equal ones are told apart by the draw.

    Once samples that differ are many, as against n, they are the measure themselves, and evidence no longer grows.

    Source: Vovk et al., "Algorithmic Learning in a Random World", 2005 (smoothed conformal transducers).
    """

    STEPS, LOWEST = 34 * 256, (127 - 30) * 256

    def __init__(self, entropies: Tensor) -> None:
        self.calibration = torch.bincount(self._steps(entropies), minlength=self.STEPS)
        self.counts = self.calibration.clone()

    def _steps(self, entropies: Tensor) -> Tensor:
        bits = entropies.to(torch.float32).clamp_min(0).contiguous().view(torch.int32)
        return ((bits >> 15).long() - self.LOWEST).clamp(0, self.STEPS - 1)

    def ranks(self, entropies: Tensor, draws: Tensor) -> Tensor:
        """Ranks (B,) of samples in their order, float64; they belong to the earlier ones from then on."""
        parts = zip(torch.split(self._steps(entropies), 256), torch.split(draws, 256), strict=True)
        return torch.cat([self._ranks(steps, part) for steps, part in parts])

    def _ranks(self, steps: Tensor, draws: Tensor) -> Tensor:
        sums = self.counts.cumsum(0)
        seen = torch.arange(len(steps)) + sums[-1]
        earlier = torch.ones(len(steps), len(steps), dtype=torch.bool).tril(-1)
        below = sums[steps] - self.counts[steps] + ((steps < steps[:, None]) & earlier).sum(1)
        equal = self.counts[steps] + ((steps == steps[:, None]) & earlier).sum(1)
        self.counts.index_add_(0, steps, torch.ones_like(steps))
        return (below + draws * (equal + 1)) / (seen + 1)

    def forget(self) -> None:
        """Forget all but the calibration."""
        self.counts = self.calibration.clone()


class Bettor(Protocol):
    """Bets on ranks; its wealth starts at 1."""

    @property
    def log_wealth(self) -> float:
        """Logarithm of the wealth by now."""

    @property
    def largest(self) -> float:
        """The largest log wealth so far, the start included."""

    @property
    def epsilon(self) -> float:
        """The next bet, in [-1.8, 1.8]: by what the wealth grows for u - 1/2; above 0 for larger entropies."""

    def bet(self, u: Tensor | Iterable[float]) -> None:
        """Take samples one after another, (B,) in [0, 1]."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""


class Martingale:
    """POEM's martingale: ``M <- M (1 + epsilon v - margin |epsilon|)``, ``v = u - 1/2``, by online gradients.

    ::

        g = (v - margin sign(epsilon)) / (1 + epsilon v - margin |epsilon|)      the gradient of the log wealth
        epsilon <- clip(epsilon + gamma g / sqrt(sum g^2))                        scale-free online gradient descent

    g is left out where epsilon is at its limit and g points outward. Only the sum of squares is kept. On a stream
    without a shift epsilon wanders by about ``(2 / sqrt(t))^(1/2)``, which costs ``sqrt(t) / 6`` of log wealth, so that
    an alarm comes later the longer there was no shift; :class:`MixtureMartingale` does better.

    Args:
        margin: By how much the mean of u may differ from 1/2 without a shift, in [0, 0.4].
        gamma: Step; the paper's 2 / sqrt(3).

    Source: POEM, NeurIPS 2024, arXiv 2408.07511; its margin is 0, and its code keeps all gradients.
    """

    def __init__(self, margin: float = 0.0, gamma: float = 2 / math.sqrt(3)) -> None:
        check_range("margin", margin, 0, 0.4)
        check_range("gamma", gamma, 0, low_open=True)
        self.margin, self.gamma = float(margin), float(gamma)
        self.limit = min(_LIMIT, 0.9 / (0.5 + margin))  # the wealth stays above 0
        self.log_wealth = self.largest = self.epsilon = self.squares = 0.0

    def bet(self, u: Tensor | Iterable[float]) -> None:
        """Take samples one after another, (B,) in [0, 1]."""
        margin, gamma, limit = self.margin, self.gamma, self.limit
        wealth, largest, epsilon, squares = self.log_wealth, self.largest, self.epsilon, self.squares
        for rank in u.tolist() if isinstance(u, Tensor) else u:
            value = rank - 0.5
            factor = 1 + epsilon * value - margin * abs(epsilon)
            wealth += math.log(factor)
            largest = max(largest, wealth)
            if epsilon:
                gradient = (value - math.copysign(margin, epsilon)) / factor
            else:  # the margin has a kink here
                gradient = math.copysign(max(abs(value) - margin, 0.0), value)
            if abs(epsilon) >= limit and gradient * epsilon > 0:
                continue
            squares += gradient * gradient
            if squares:
                epsilon = min(max(epsilon + gamma * gradient / math.sqrt(squares), -limit), limit)
        self.log_wealth, self.largest, self.epsilon, self.squares = wealth, largest, epsilon, squares

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in ("log_wealth", "largest", "epsilon", "squares")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        for name in self.state_dict():
            setattr(self, name, float(state[name]))


def wagers(like: Tensor, margin: float = 0.0, idle: float = 0.25) -> tuple[Tensor, Tensor]:
    """The fixed bets that a mixture is of, (J,), and the logarithms of their shares at the start.

    0, with a share ``idle`` of the wealth, and 0.05, 0.1, 0.2, 0.4, 0.8, 1.6 of both signs, without those that could
    lose all.
    """
    sizes = [size for size in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6) if size * (0.5 + margin) < 1]
    bets = [0.0, *sizes, *(-size for size in sizes)]
    shares = [idle, *((1 - idle) / (len(bets) - 1) for _ in bets[1:])]
    grid, start = (torch.stack([torch.full_like(like, each) for each in values]) for values in (bets, shares))
    return grid, start.log()


def mix(log_wealths: Tensor, u: Tensor, grid: Tensor, margin: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Bet on samples with each fixed bet of a mixture; tensors only.

    Args:
        log_wealths: Of each bet, (J,).
        u: Ranks (B,); one that is not finite is not bet on.
        grid: The bets, (J,).
        margin: As of :class:`Martingale`.

    Returns:
        Log wealths (J,) after them, of the mixture after each of them (B,), and the mixture's bet on each (B,).
    """
    gains = torch.log1p((u[:, None] - 0.5) * grid - margin * grid.abs())
    after = log_wealths + torch.where(u.isfinite()[:, None], gains, 0.0).cumsum(0)
    before = torch.cat([log_wealths[None], after[:-1]])
    return after[-1], after.logsumexp(1), before.softmax(1) @ grid


def share(log_wealths: Tensor, rate: Tensor | float, start: Tensor) -> Tensor:
    """Let a share ``rate`` of the mixture's wealth be dealt out anew as at the start; the sum stays."""
    rate = torch.as_tensor(rate, dtype=start.dtype, device=start.device)
    return torch.logaddexp(log_wealths + torch.log1p(-rate), log_wealths.logsumexp(0) + rate.log() + start)


class MixtureMartingale:
    """A mixture of fixed bets: ``m_j <- m_j (1 + e_j v - margin |e_j|)``, M their sum, part of it dealt out anew.

    The bets e_j are those of :func:`wagers`, a quarter of the wealth idle. After each 50 samples a share 1 / (k + 1) of
    the wealth, k the number of such blocks so far, goes back to the shares of the start: a shift that begins after t
    samples costs ``log(t / 50)`` of log wealth, and not what bets have lost in the time before it. The bet epsilon is
    the mean of the e_j, weighted by m_j.

    Args:
        margin: As of :class:`Martingale`.

    Source: the method of mixtures (Cover, 1991) with a fixed share (Herbster and Warmuth, 1998), in the place of POEM's
    online gradients. Ours.
    """

    BLOCK = 50

    def __init__(self, margin: float = 0.0) -> None:
        check_range("margin", margin, 0, 0.4)
        self.margin = float(margin)
        self.grid, self._start = wagers(torch.zeros((), dtype=torch.float64), self.margin)
        self.log_wealths = self._start.clone()
        self.seen, self.largest = 0, 0.0

    @property
    def log_wealth(self) -> float:  # noqa: D102
        return float(self.log_wealths.logsumexp(0))

    @property
    def epsilon(self) -> float:  # noqa: D102
        return float(self.log_wealths.softmax(0) @ self.grid)

    def bet(self, u: Tensor | Iterable[float]) -> None:
        """Take samples one after another, (B,) in [0, 1]."""
        u = _on_host(u) if isinstance(u, Tensor) else torch.tensor(list(u), dtype=torch.float64)
        while len(u):
            room = self.BLOCK - self.seen % self.BLOCK
            block, u = u[:room], u[room:]
            self.log_wealths, wealths, _ = mix(self.log_wealths, block, self.grid, self.margin)
            self.largest = max(self.largest, float(wealths.max()))
            self.seen += len(block)
            if self.seen % self.BLOCK == 0:
                self.log_wealths = share(self.log_wealths, 1 / (self.seen // self.BLOCK + 1), self._start)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and a tensor."""
        return {"log_wealths": self.log_wealths.clone(), "seen": self.seen, "largest": self.largest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`state_dict`."""
        self.log_wealths = state["log_wealths"].detach().clone().cpu()
        self.seen, self.largest = int(state["seen"]), float(state["largest"])


BETTORS: dict[str, type[Martingale] | type[MixtureMartingale]] = {"mixture": MixtureMartingale, "sf_ogd": Martingale}


class ShiftTest:
    """Whether the source's entropies on a stream are distributed as on the calibration; may be asked after each sample.

    The probability that :attr:`alarmed` ever becomes true on a stream that is like the calibration is at most
    ``alpha``:

    - with ``conformal`` ranks, if calibration and stream are exchangeable, in particular independent draws of one
      distribution. For every length of the stream, and every size of the calibration.
    - with ``margin``, if they are independent draws of one distribution. With probability 1 - d, d = alpha / 2 but at
      most 0.05, the mean rank of a sample is within ``c = z(1 - d/2) / sqrt(12 n)`` of 1/2: over calibrations it is the
      mean of n uniform numbers, whose tails beyond 1.8 standard deviations are lighter than the normal ones. Bets pay
      c, and the alarm is at ``1 / (alpha - d)``. Evidence of a shift that lasts grows without end, but a shift of the
      mean rank by less than c is never seen.
    - with ``fixed``, the paper's, only as long as the stream is shorter than the calibration.

    A stream sorted by class, or whose domains take turns, is not exchangeable: an alarm is right there, though each
    class by itself may be as in the source.

    Args:
        entropies: Of the source net on held-out source images (n,), in nats; images that the net was trained on have
            smaller ones.
        alpha: Probability of a false alarm, in (0, 0.5].
        ranks: One of :data:`RANKS`.
        bets: ``mixture``, :class:`MixtureMartingale`, or ``sf_ogd``, the paper's, :class:`Martingale`.
        seed: Of the draws.

    Raises:
        ConfigError: If a value is out of range.
        DataError: If there are too few entropies.
        InputError: If they are no tensor (n,).
    """

    def __init__(
        self, entropies: Tensor, alpha: float = 0.05, ranks: Ranks = "conformal", bets: Bets = "mixture", seed: int = 0
    ) -> None:
        check_settings(alpha, ranks, bets, seed)
        self.alpha, self.kind, self.bets, self.seed = alpha, ranks, bets, seed
        self.cdf = SourceCDF(_on_host(entropies))
        self._past = ConformalRanks(self.cdf.values) if ranks == "conformal" else None
        level, self.margin = alpha, 0.0
        if ranks == "margin":
            wrong = min(alpha / 2, 0.05)
            level, self.margin = alpha - wrong, NormalDist().inv_cdf(1 - wrong / 2) / math.sqrt(12 * self.cdf.size)
        self.threshold = -math.log(level)
        self.drawn = 0
        self.bettor: Bettor = BETTORS[bets](self.margin)

    def see(self, entropies: Tensor) -> None:
        """Take in the source's entropies (B,) of samples of the stream; those that are not finite are left out.

        Raises:
            InputError: If they are of another shape, as logits are.
        """
        entropies = _on_host(entropies)
        entropies = entropies[entropies.isfinite()]
        draws = uniforms(self.seed, self.drawn, len(entropies))
        self.drawn += len(entropies)
        self.bettor.bet((self.cdf if self._past is None else self._past).ranks(entropies, draws))

    @property
    def log_wealth(self) -> float:
        """Logarithm of the wealth by now."""
        return self.bettor.log_wealth

    @property
    def alarmed(self) -> bool:
        """Whether the wealth has reached its threshold since the last :meth:`restart`."""
        return self.bettor.largest >= self.threshold

    def restart(self) -> None:
        """Begin anew with a wealth of 1 and the calibration alone."""
        self.bettor = BETTORS[self.bets](self.margin)
        if self._past is not None:
            self._past.forget()

    def pack(self) -> Tensor:
        """All that it has seen of the stream as one tensor of fixed length, float64."""
        bettor = [torch.as_tensor(value, dtype=torch.float64).view(-1) for value in self.bettor.state_dict().values()]
        counts = [] if self._past is None else [self._past.counts.double()]
        return torch.cat([torch.tensor([self.drawn], dtype=torch.float64), *bettor, *counts])

    def unpack(self, packed: Tensor) -> None:
        """Counterpart of :meth:`pack`."""
        sizes = {name: torch.as_tensor(value).numel() for name, value in self.bettor.state_dict().items()}
        lengths = [1, *sizes.values(), len(packed) - 1 - sum(sizes.values())]
        drawn, *parts = torch.split(packed.detach().cpu(), lengths)
        self.drawn = int(drawn)
        if self._past is not None:
            self._past.counts = parts.pop().long()
        values = zip(sizes.items(), parts, strict=False)
        self.bettor.load_state_dict({name: part if size > 1 else part.item() for (name, size), part in values})

    def state_dict(self) -> dict[str, Any]:
        """All that it has seen, the calibration too; plain values and tensors."""
        settings = [self.alpha, self.kind, self.bets, self.seed]
        return {"calibration": self.cdf.values.clone(), "settings": settings, "seen": self.pack()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ShiftTest:
        """Counterpart of :meth:`state_dict`."""
        test = cls(state["calibration"], *state["settings"])
        test.unpack(state["seen"])
        return test


def check_settings(alpha: float, ranks: str, bets: str, seed: int) -> None:
    """Refuse options of :class:`ShiftTest` that are out of range, before there is a calibration.

    Raises:
        ConfigError: With what is allowed.
    """
    check_range("alpha", alpha, 0, 0.5, low_open=True)
    check_choice("ranks", ranks, tuple(RANKS))
    check_choice("bets", bets, tuple(BETTORS))
    check_range("seed", seed, 0, 2**62, integer=True)
