"""What is tried: methods with their options, of a user or from a small grid that suits the net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_tta.backbones.norms import batch_norm_layers, norm_layers
from lightning_tta.errors import ConfigError, check_range
from lightning_tta.methods import find
from lightning_tta.methods.components.wanted import listed

FEW = 16
"""Images in a batch: of fewer, no candidate of the grid takes statistics or steps of the batch alone."""
SOURCE = "source"
Wanted = str | Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A method with its options.

    Attributes:
        method: Its name.
        options: As of :func:`lightning_tta.adapt`.
        reset_every: Return to the source after so many batches; ``None``: never.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    reset_every: int | None = None

    @property
    def all_options(self) -> dict[str, Any]:
        """The options, with ``reset_every`` among them where there is one."""
        return self.options if self.reset_every is None else {**self.options, "reset_every": self.reset_every}

    @property
    def name(self) -> str:
        """Method and options in words; no two candidates have the same."""
        options = ", ".join(f"{name} {value}" for name, value in self.all_options.items())
        return f"{self.method} ({options})" if options else self.method


def read_candidates(wanted: Wanted | Sequence[Wanted], net: nn.Module, batch_size: int) -> list[Candidate]:
    """The candidates, each once, the source first.

    Args:
        wanted: ``default``: :func:`default_candidates`; names of methods; or dicts of ``method`` and options of
            :func:`lightning_tta.adapt`, and ``reset_every``, batches.
        net: What is to be adapted.
        batch_size: Images in a batch of the stream.

    Raises:
        ConfigError: If one is neither, or names no method.
    """
    found = [Candidate(SOURCE)]
    all_wanted = listed(wanted)
    if not all_wanted:
        raise ConfigError("candidates is empty. Give 'default', or names of methods, or dicts; source is there anyway.")
    for each in all_wanted:
        new = default_candidates(net, batch_size) if each == "default" else [_read(each)]
        found += [candidate for candidate in new if candidate not in found]
    return found


def _read(wanted: Wanted) -> Candidate:
    given: Mapping[str, Any] = {"method": wanted} if isinstance(wanted, str) else wanted
    if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
        raise ConfigError(
            "A candidate is the name of a method, or a dict of 'method' and its options such as {'method': 'tent', "
            f"'lr': 1e-3, 'statistics': 'auto', 'reset_every': 50}}; or 'default' for all of the grid; got {wanted!r}."
        )
    options = {name: value for name, value in given.items() if name not in ("method", "reset_every")}
    every = given.get("reset_every")
    if every is not None:
        check_range("reset_every", every, 1, integer=True)
    kind = find(given["method"])
    return Candidate(kind.__module__.rpartition(".")[2], options, every)


def default_candidates(net: nn.Module, batch_size: int) -> list[Candidate]:
    """A small grid of method, rate, statistics and reset; the first ones are those to keep where passes are few.

    With BatchNorm: the batch's statistics and ``auto``, alone and under entropy methods. Of batches below :data:`FEW`
    images only what does not depend on the batch. With other norm layers: entropy methods. Tent, at its published rate,
    is reset every 50 batches. Without norm layers: what corrects features or predictions.
    """
    if batch_norm_layers(net):
        auto = {"statistics": "auto"}
        careful = [Candidate("norm", auto), Candidate("t3a")]
        if batch_size < FEW:
            return [*careful, Candidate("norm", {"statistics": "ema"}), Candidate("zerosiam", {**auto, "window": 64})]
        return [
            Candidate("norm", auto),
            Candidate("norm"),
            Candidate("zerosiam", auto),
            Candidate("zerosiam"),
            Candidate("eta", auto),
            Candidate("tent", {"lr": 1e-3, **auto}, 50),
            Candidate("lame"),
        ]
    if any(True for layer in norm_layers(net).values() for _ in layer.parameters()):
        return [
            Candidate("zerosiam"),
            Candidate("ostta"),
            Candidate("eta"),
            Candidate("tent", {"lr": 1e-3}, 50),
            Candidate("lame"),
            Candidate("t3a"),
        ]
    return [Candidate("t3a"), Candidate("lame"), Candidate("neo")]
