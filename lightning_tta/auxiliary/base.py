"""A loss beside the cross-entropy, with a head of its own, and how a net says which of them it was trained with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor, nn

from lightning_tta.backbones.norms import replaced_forwards
from lightning_tta.backbones.passes import safe_checkpoints
from lightning_tta.errors import WeightsError, check_range

_NOTED = "_tta_auxiliary"
"""The attribute of a net in which it stands; a net may have an ``auxiliary`` of its own."""


class Auxiliary(nn.Module, ABC):
    """A loss that needs more than the classes' logits, and the modules that it needs beside the net.

    It holds no part of the net: its state dict has its own tensors alone.

    Args:
        net: The classifier beside which it is trained, or with which it was.
        weight: What its loss is multiplied by in the training, >= 0.

    Attributes:
        kind: The word that names it.
        trains: Whether ``train()`` puts its modules into training mode; off in a method, whose net stays in eval mode.
    """

    kind: ClassVar[str]

    def __init__(self, net: nn.Module, weight: float = 1.0) -> None:
        super().__init__()
        check_range("weight", weight, 0)
        self.weight, self.trains = weight, True

    @abstractmethod
    def loss(self, net: nn.Module, images: Tensor, labels: Tensor, key: Tensor) -> Tensor:
        """The loss of a training batch, 0-dimensional.

        Args:
            net: As at construction.
            images: (B, C, H, W) in [0, 1].
            labels: (B,).
            key: (2,), int64, on the images' device, of the step's random draws.
        """

    def train(self, mode: bool = True) -> Self:
        """As torch's; eval mode where :attr:`trains` is off."""
        return super().train(mode and self.trains)


A = TypeVar("A", bound=Auxiliary)


@dataclass(frozen=True)
class Trained:
    """What a checkpoint has of an auxiliary: the options that it was made with, and its tensors by name."""

    options: dict[str, Any]
    tensors: dict[str, Tensor]


def note_trained(net: nn.Module, trained: Mapping[str, Trained]) -> None:
    """Note on a net what it was trained with, by kind; copies of the net keep it."""
    net.__dict__[_NOTED] = dict(trained)


def find_trained(net: nn.Module, auxiliary: type[A]) -> A | None:
    """The auxiliary that a net was trained with, see :func:`note_trained`, in eval mode and where the net is.

    Raises:
        WeightsError: If its tensors do not fit the net.
    """
    trained = net.__dict__.get(_NOTED, {}).get(auxiliary.kind)
    if trained is None:
        return None
    try:
        made = auxiliary(net, **trained.options)
        made.load_state_dict(trained.tensors)
    except (RuntimeError, TypeError) as error:  # other tensors, or other options
        raise WeightsError(
            f"The auxiliary {auxiliary.kind!r} in the checkpoint does not fit the net: {error}. Train the net again."
        ) from error
    return settle(made, net)


@contextmanager
def other_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While active, modules of a net run otherwise; checkpointed ones keep their activations.

    They would be computed again in the backward pass, which may come when the forwards are the modules' own again.
    """
    with safe_checkpoints(recompute=False), replaced_forwards(forwards):
        yield


def settle(auxiliary: A, net: nn.Module) -> A:
    """Let an auxiliary be part of a method on a net: where the net is, frozen, and always in eval mode."""
    auxiliary.trains = False
    return place(auxiliary, net).eval().requires_grad_(False)


def place(auxiliary: A, net: nn.Module) -> A:
    """Move an auxiliary to where a net's parameters are, and to their dtype."""
    like = next((p for p in net.parameters() if p.is_floating_point()), None)
    return auxiliary if like is None else auxiliary.to(like)
