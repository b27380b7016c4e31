"""How a method computes: what changes its speed, its memory and the last bits of its results, not what it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from lightning_tta.errors import ConfigError, check_choice

Capture = Literal["auto"] | bool
Precision = Literal["exact", "tf32", "bf16"]


@dataclass(frozen=True)
class Execution:
    """How a method computes, the same for every method.

    Args:
        capture: Whether steps on batches of a shape that comes again are recorded once and replayed, as one CUDA graph:
            ``auto``: on CUDA, where the method can be; ``True``: refuse to run where it cannot be; ``False``: never.
        compile: Whether the net is compiled for recorded steps (``torch.compile``).
        deterministic: Whether only operations are used that give the same bits each time.
        precision: ``exact``: float32 as it is; ``tf32``: TF32 in matrix products and convolutions on CUDA; ``bf16``:
            autocast to bfloat16; ``None``: as the process is set.
        lean: Whether the backward pass keeps no more activations than what learns needs, with the same gradients:
            about half of them where norm layers alone learn. ``True``: everywhere, which costs up to a tenth of the
            time in a net with ReLUs; ``auto``: where it adds no operation, see
            :func:`~lightning_tta.backbones.lean.lean_backward`; ``False``: nowhere.

    Raises:
        ConfigError: If a value is none of these.
    """

    capture: Capture = "auto"
    compile: bool = False
    deterministic: bool = False
    precision: Precision | None = None
    lean: Literal["auto"] | bool = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            value, word = getattr(self, field.name), "auto" in str(field.type) or field.name == "capture"
            if field.name != "precision" and not isinstance(value, bool) and not (word and value == "auto"):
                allowed = "True, False or 'auto'" if word else "True or False"
                raise ConfigError(f"{field.name} must be {allowed}; got {value!r}.")
        if self.precision is not None:
            check_choice("precision", self.precision, ("exact", "tf32", "bf16"))

    @contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """While active, this process computes on ``device`` as it is said here."""
        yield


NAMES = tuple(field.name for field in fields(Execution))


def split_options(options: dict[str, Any]) -> tuple[Execution, dict[str, Any]]:
    """An :class:`Execution` of those options that are of one, and the others."""
    mine = {name: value for name, value in options.items() if name in NAMES}
    return Execution(**mine), {name: value for name, value in options.items() if name not in NAMES}
