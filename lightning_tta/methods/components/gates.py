"""Gates that every method can have before it: no update while the stream looks like the source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import ConfigError, check_range
from lightning_tta.evidence.betting import Bets, Ranks, ShiftTest, check_settings
from lightning_tta.losses import entropy
from lightning_tta.methods.base.gate import Gate
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import GATES, State
from lightning_tta.methods.components.source_images import see_source_images
from lightning_tta.methods.components.wanted import Wanted, read

STATE, CALIBRATION = f"{GATES}state", "gate_calibration"
_OPEN = 0


class PoemGate(Gate):
    """Opens when a martingale of the source's entropies alarms, and closes when the evidence has gone.

    Closed, the source net answers, with its own BatchNorm statistics, and nothing is learned. Each batch goes to a
    :class:`~lightning_tta.evidence.betting.ShiftTest` against the entropies of held-out source images. In the batch
    that brings its wealth to ``1 / alpha`` the gate opens: the method adapts on this batch already, from its source
    weights, and answers it. So on a stream that is like the held-out images, the probability that the gate ever opens
    is at most ``alpha``.

    Open, the test starts anew with a wealth of 1, and again after each further alarm. As long as the stream is
    another, alarms keep coming. Once ``patience`` samples have gone by without one, the gate closes, and the method
    goes back to its source; the next closed time has a wealth of 1 again. Where the stream is as the source again,
    the gate closes ``patience`` samples later with a probability of at least ``1 - alpha``.

    Per batch: closed, the source's pass is the only one; open, it is one more forward pass than the method's, which
    ``stats["forwards"]`` counts. ``stats["gate_open"]`` is 1 or 0, and ``stats["gate_log_wealth"]`` that of the test.

    Args:
        method: Any.
        alpha: Probability that it opens on a stream like the source, in (0, 0.5].
        patience: Samples without an alarm after which it closes, >= 1.
        ranks: As of the test, as are ``bets`` and ``seed``.
        bets: ``mixture`` or ``sf_ogd``.
        seed: Of the draws that tell equal ranks apart.

    Raises:
        ConfigError: If a value is out of range, or there is a memory of domains.

    Source: ours, of the martingale of POEM, NeurIPS 2024, arXiv 2408.07511.
    """

    def __init__(
        self,
        method: TTAMethod,
        *,
        alpha: float = 0.05,
        patience: int = 1000,
        ranks: Ranks = "conformal",
        bets: Bets = "mixture",
        seed: int = 0,
    ) -> None:
        check_settings(alpha, ranks, bets, seed)
        check_range("patience", patience, 1, integer=True)
        self.patience = patience
        self.settings = (alpha, ranks, bets, seed)
        like = next(iter(method.model.parameters()), torch.empty(0)).detach()
        method.collect(CALIBRATION, torch.empty(0, dtype=torch.int64, device=like.device))
        length = 2 + len(ShiftTest(torch.zeros(20), *self.settings).pack())
        method.state(STATE, torch.zeros(length, dtype=torch.float64, device=like.device), fixed_dtype=True)
        self._test: ShiftTest | None = None
        self._values: list[float] = []

    @torch.no_grad()
    def prepare(self, method: State, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Take the source's entropies of all images.

        Raises:
            DataError: If there are fewer than 10.
        """
        assert isinstance(method, TTAMethod)
        entropies: list[Tensor] = []

        def see(images: Tensor) -> None:
            with method.at_source():
                entropies.append(entropy(method.task.logits(method.model(images)).double()).cpu())

        see_source_images(method, source_batches, see, running=nullcontext)
        with outside_inference_mode():
            test = ShiftTest(torch.cat(entropies) if entropies else torch.empty(0), *self.settings)
            bits = test.cdf.values.view(torch.int64)  # as integers they stay exact where the net goes to half precision
            method.collect(CALIBRATION, bits.to(method.value(STATE).device))
            method.write(STATE, torch.cat([torch.zeros(2, dtype=torch.float64), test.pack()]))
            method.renew_source(STATE)
        self.look_again()

    def admits(self, method: State, logits: Tensor) -> bool:
        """See :class:`~lightning_tta.methods.base.gate.Gate`."""
        test = self._look(method)
        is_open, since = self._values
        entropies = entropy(logits.double())
        test.see(entropies)
        since += len(entropies)
        if test.alarmed:
            is_open, since = 1.0, 0.0
            test.restart()
        elif is_open and since >= self.patience:
            is_open, since = 0.0, 0.0
            test.restart()
            method.reset_where(torch.ones((), dtype=torch.bool, device=logits.device))
        self._values = [is_open, since]
        method.write(STATE, torch.cat([torch.tensor(self._values, dtype=torch.float64), test.pack()]))
        return bool(is_open)

    def is_open(self, method: State) -> bool:
        """Whether it is open now."""
        assert isinstance(method, TTAMethod)
        if not len(method.get_buffer(CALIBRATION)):
            return False
        self._look(method)
        return bool(self._values[_OPEN])

    def notes(self, method: State) -> dict[str, Tensor]:
        """``gate_open`` and ``gate_log_wealth``."""
        numbers = {"gate_open": self._values[_OPEN], "gate_log_wealth": self._look(method).log_wealth}
        return {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}

    def look_again(self) -> None:
        """Read the state at the next use."""
        self._test = None

    def _look(self, method: State) -> ShiftTest:
        if self._test is None:
            assert isinstance(method, TTAMethod)
            state = method.value(STATE).cpu()
            self._test = ShiftTest(method.get_buffer(CALIBRATION).view(torch.float64), *self.settings)
            self._test.unpack(state[2:])
            self._values = state[:2].tolist()
        return self._test


KINDS: dict[str, Callable[..., Gate]] = {"poem": PoemGate}
"""The kinds, by the word that ``gate=`` takes."""


def choose(method: TTAMethod, wanted: Wanted) -> None:
    """Put a gate before a method.

    Args:
        method: Before its first batch.
        wanted: One of :data:`KINDS`, or a dict of ``kind`` and the options of its class.

    Raises:
        ConfigError: If the kind or an option is unknown or out of range, or there is a memory of domains.
    """
    kind, options = read(wanted, "gate", KINDS)
    if method.has_memory:
        raise ConfigError("gate= and reservoir= exclude each other: both say which state a batch meets. Leave one out.")
    method.put_behind(KINDS[kind](method, **options))
