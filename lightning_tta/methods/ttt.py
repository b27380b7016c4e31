"""TTT: the net goes on learning to tell how images are turned."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_tta import collective
from lightning_tta.auxiliary.method import AuxiliaryMethod
from lightning_tta.auxiliary.rotation import Rotation, Turns, turn
from lightning_tta.errors import UnsupportedModelError, check_choice, check_range
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.optimizers import OptimizerName
from lightning_tta.views.crops import CROPS, Crops, crop_images


class TTT(AuxiliaryMethod[Rotation]):
    """Minimises the cross-entropy of telling by how many quarters each image was turned.

    The net f = h(e(x)) has an encoder e, up to a stage, and a head h. A branch b(e(x)) of four outputs was trained
    beside it on the source (:class:`~lightning_tta.auxiliary.rotation.Rotation`)::

        L = mean_i CE(r_i, b(e(turn_{r_i}(view_i))))        over ``views`` views of each image, r_i drawn from 0 to 3
        one step of e and b;   then f(x) is returned

    Parameters touched: those of e, norm layers and all others, and of b; h stays. BatchNorm has its source statistics,
    the branch's own layers those of its training. State: these parameters, the optimizers, the number of steps. Per
    batch and step one forward and one backward pass of the views, and one forward pass of the batch at the end. Returns
    the logits after the steps. ``stats["rotation_accuracy"]`` is the share of turns that the branch gets right.

    The net must have been trained with the branch: ``lightning-tta fit --config configs/digits/source_rotation.yaml``,
    or any other source with ``--model.auxiliary rotation``. For other nets :meth:`prepare` trains a branch on source
    images, with the net as it is; that is our addition.

    Args:
        model: A classifier that ends in a linear layer; images must be square.
        lr: Learning rate, >= 0; authors 1e-3.
        optimizer: ``sgd`` (authors), ``nesterov``, ``adam`` or ``adamw``.
        momentum: In [0, 0.9999]; authors 0.
        episodic: Every batch starts from the source (the authors' standard version). ``False``: from where the batch
            before ended (their online version).
        steps: Steps per batch, >= 1. Authors: 1 (online), 1, 3 or 10 (standard).
        views: Views of each image, >= 1. Authors, who adapt on one image at a time: 32.
        augment: How views differ, besides in their turn: see :data:`~lightning_tta.views.crops.CROPS`. Authors:
            ``crop_flip``. Not where a flip changes the class.
        turns: ``random``: each view once, as the authors; ``all``: in all four ways.
        fix_branch: Leave b as it is, an option of the authors too.
        at: Share of the depth that e has, in (0, 1], of a branch that :meth:`prepare` trains; a trained one has its
            own. Authors: two of three stages.
        **options: ``head_from``, ``head_epochs``, ``head_lr``, ``seed``: see
            :class:`~lightning_tta.auxiliary.method.AuxiliaryMethod`. ``weight_decay``, ``lr_batch_size``.

    Raises:
        UnsupportedModelError: If the net does not end in a linear layer, nothing of it comes before the branch, or it
            was not trained with one and ``head_from="trained"``.

    Source: Sun et al., ICML 2020, arXiv 1909.13231; formula from the authors' code. Differs from it: a batch of several
    images makes one step together; b shares all modules that end before its stage does; the authors' threshold, below
    which an image is adapted on, is left out: their default adapts on all; BatchNorm stays at the source's statistics
    (their ``fix_bn``; their main nets have GroupNorm).
    """

    about = About(
        does="cross-entropy of telling how images are turned, by a branch that was trained on the source",
        learns="encoder, branch",
        passes="2 / 1",
        needs="linear head, square images; a source trained with auxiliary rotation, else 2,000 source images",
        holds="a branch",
        suits="any; batches of one with views",
        formula="code and paper",
        paper="ICML 2020, arXiv 1909.13231",
    )

    returns = "after the step"

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        optimizer: OptimizerName = "sgd",
        momentum: float = 0.0,
        episodic: bool = False,
        steps: int = 1,
        views: int = 1,
        augment: Crops = "crop_flip",
        turns: Turns = "random",
        fix_branch: bool = False,
        at: float = 0.67,
        **options: Any,
    ) -> None:
        super().__init__(model, lr=lr, optimizer=optimizer, momentum=momentum, steps=1, **options)
        check_range("steps", steps, 1, integer=True)
        check_range("views", views, 1, integer=True)
        check_choice("augment", augment, CROPS)
        check_choice("turns", turns, ("random", "all"))
        self.episodic, self.steps_per_batch, self.views = episodic, steps, views
        self.augment: Crops = augment
        self.turns: Turns = turns
        self.take_auxiliary(Rotation, at=at)
        shared = {n: p for n, p in self.select("all").items() if self.auxiliary.branch.is_shared(n)}
        if not shared:
            raise UnsupportedModelError(
                f"Nothing of {type(self.model).__name__} that may learn comes before the branch at {at} of its depth. "
                "Use a larger at, thaw the first layers, or use method 'tent'."
            )
        self.learn(shared)
        if not fix_branch:
            self.learn(dict(self.auxiliary.named_parameters()), "auxiliary.", optimizer="branch")
        if episodic:
            self.no_plain_net = (
                "it adapts to each batch from the source anew, so that nothing learned remains in the net. Deploy the "
                "method itself, or adapt with episodic=False"
            )

    def step(self, x: Tensor) -> Tensor:
        """Steps on turned views, and the prediction after them."""
        taken = torch.zeros((), dtype=torch.bool, device=x.device)
        with self.lend(self.moving()) if self.episodic else nullcontext():
            for number in range(self.steps_per_batch):
                taken = taken | self._learn_turns(x, 2 * number)
            with torch.no_grad():
                logits = self.logits(x)
        self.count_step(taken)
        return logits

    def _learn_turns(self, x: Tensor, draw: int) -> Tensor:
        views = crop_images(x.repeat(self.views, 1, 1, 1), self.augment, self.draw_key(draw))
        turned, quarters = turn(views, self.turns, self.draw_key(draw + 1))
        with self.auxiliary.running(self.model):
            logits = at_least_float32(self.logits(turned))
        self.note(rotation_accuracy=collective.mean((logits.argmax(1) == quarters).to(logits.dtype)))
        return self.descend(cross_entropy(logits, quarters, reduction="none"))
