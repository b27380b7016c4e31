"""Corrections of a method's predictions, which come after its step and leave the net alone."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lightning_tta.errors import UnsupportedModelError
from lightning_tta.methods.base.state import State


class Correction(ABC):
    """Takes the logits of a batch, and returns others. Its state is declared on the method, and so reset and saved.

    What it computes is part of the method's step: tensors only.

    Attributes:
        wants_features: Whether it needs the features, the input of the net's last linear layer.
        synchronized: Whether several processes can adapt as one with it.
        acts_apart: Whether it changes the prediction of an image on its own, as ``predict`` and a plain net give it.
        no_plain_net: Why no plain net predicts with it, and what to do; empty where :meth:`fold` makes one.
    """

    wants_features: bool = False
    synchronized: bool = True
    acts_apart: bool = True
    no_plain_net: str = ""

    @abstractmethod
    def correct(self, method: State, logits: Tensor, features: Tensor | None, *, learn: bool) -> Tensor:
        """Other logits for a batch.

        Args:
            method: Has the state.
            logits: Of the usable samples, (B, K), at least float32, detached; they may be not finite.
            features: (B, D), detached, where :attr:`wants_features`; they may be not finite.
            learn: Whether to write to the state; else it stays as it is.

        Returns:
            Logits (B, K).
        """

    def fold(self, method: State, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (K, D) and bias (K,) of a last linear layer that gives what the correction makes of its output.

        As it is after the stream so far, without learning. The same objects where nothing changes.
        """
        raise UnsupportedModelError(f"No plain net predicts as {type(self).__name__} does. Deploy the method itself.")
