"""The contract of every method: a plain module that wraps a classifier and adapts it while it predicts."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tta import collective
from lightning_tta.backbones.norms import batch_statistics
from lightning_tta.backbones.split import as_logits
from lightning_tta.errors import NotPreparedError, UnsupportedModelError, check_range
from lightning_tta.methods.base.description import Described
from lightning_tta.methods.base.inputs import (
    adapting,
    at_least_float32,
    check_images,
    explained,
    float_dtype,
    fresh_casts,
    plain_model,
    zero_rows,
)
from lightning_tta.methods.base.optimizers import OptimizerName, check_precision, make_optimizer
from lightning_tta.methods.base.state import CheckedState
from lightning_tta.metrics import collapse_measures


class TTAMethod(Described, CheckedState, ABC):
    """Wraps a classifier; ``forward(images) -> logits`` adapts it on the way.

    A method writes only the tensors it declared (:meth:`declare`), and a snapshot of these alone makes
    :meth:`reset` exact. ``state_dict()`` is complete: net, snapshot, optimizers. The net stays in eval mode,
    whatever mode the method is put in. A method sees images only: no labels, domains, trainer or device names.

    To write one: call ``super().__init__(model)``, declare what it may change, and implement :meth:`adapt`.

    Args:
        model: Pixels (B, C, H, W) in [0, 1] -> logits (B, K). Used and changed in place;
            :func:`lightning_tta.adapt` makes a copy first.
        steps: Adaptation steps per batch, at least 1. The logits are those of the last step.

    Attributes:
        stats: Floats that describe the last batch (loss, entropy, passes, collapse measures, skipped steps).
        returns: Whether the logits come from before or after the batch's own update.
        needs_source: Whether :meth:`prepare` must run before the stream; may depend on the options.
        memory: What :meth:`remember` registered, as it is now.
    """

    returns: ClassVar[Literal["before the step", "after the step"]] = "before the step"
    needs_source: bool = False

    def __init__(self, model: nn.Module, *, steps: int = 1) -> None:
        super().__init__()
        check_range("steps", steps, 1, integer=True)
        self.model = plain_model(model).eval().requires_grad_(False)
        self.steps = steps
        self.stats: dict[str, float] = {}
        self.optimizers: dict[str, Optimizer] = {}
        self.prepared = not self.needs_source
        self.memory: dict[str, Tensor | None] = {}
        self._first_memory: dict[str, Tensor | None] = {}
        self._snapshot: dict[str, Tensor] = {}
        self._declared: dict[str, Tensor] = {}
        self._reference_batch: int | None = None
        self._batch_size = 0
        self._counts: dict[str, int] = {}
        self._record: dict[str, Tensor] = {}

    # What a method implements ----------------------------------------------------------------------------------------

    @abstractmethod
    def adapt(self, images: Tensor) -> Tensor:
        """One adaptation step on finite images (B, C, H, W); returns logits (B, K). Gradients are enabled."""

    def infer(self, images: Tensor) -> Tensor:
        """The net's logits as this method predicts, without adapting. Override where that is not a plain pass."""
        with batch_statistics(self.model) if self.uses_batch_statistics else nullcontext():
            return as_logits(self.model(images))

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Collect what the method needs from source data, once, before the stream. Most need nothing."""
        self.prepared = True

    # What a method uses ----------------------------------------------------------------------------------------------

    def declare(self, tensors: Mapping[str, Tensor], prefix: str = "model.") -> list[Tensor]:
        """Register tensors (by name under ``prefix``) that the method may change, and keep their source values."""
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(True)
            self._declared[prefix + name] = tensor
            self._snapshot[prefix + name] = tensor.detach().clone()
        return list(tensors.values())

    def remember(self, **initial: Tensor | None) -> None:
        """Register entries of :attr:`memory`, of any shape, ``None`` for nothing yet: saved, loaded, reset to this.

        A method replaces an entry and never writes into it.
        """
        self.memory.update(initial)
        self._first_memory.update(initial)

    def add_optimizer(
        self,
        name: str,
        parameters: Iterable[Tensor],
        kind: OptimizerName,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        """Add an optimizer over declared parameters. ``momentum`` is SGD's, or Adam's first beta (second: 0.999)."""
        optimizer = make_optimizer(kind, parameters, lr, momentum=momentum, weight_decay=weight_decay)
        self.optimizers[name] = optimizer

    def scale_lr_by_batch(self, reference: int | None) -> None:
        """Multiply every learning rate by (images in the batch) / ``reference``; ``None`` leaves them as given."""
        if reference is not None:
            check_range("lr_batch_size", reference, 1, integer=True)
        self._reference_batch = reference

    def record(self, **values: Tensor) -> None:
        """Put scalars of this step into :attr:`stats`."""
        self._record.update({name: value.detach() for name, value in values.items()})

    @property
    def trained(self) -> list[Tensor]:
        """What the optimizers hold, in order."""
        groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        return [parameter for group in groups for parameter in group["params"]]

    def step(self, loss: Tensor) -> bool:
        """Differentiate ``loss`` and step every optimizer, unless the loss or a gradient is not finite.

        Returns:
            Whether the step was taken. A skipped step changes nothing and is counted in ``stats``.
        """
        gradients = self.gradients(loss)
        if gradients is not None:
            self.apply_gradients(gradients)
        return gradients is not None

    def gradients(self, loss: Tensor) -> tuple[Tensor | None, ...] | None:
        """Gradients of ``loss`` by :attr:`trained`, or ``None``, a skipped step, if one or the loss is not finite."""
        self.record(loss=loss)
        if not loss.requires_grad:
            net = type(self.model).__name__
            raise UnsupportedModelError(
                f"The logits of {net} have no gradients (torch.no_grad, detach in its forward?): take that out."
            )
        gradients = collective.average(torch.autograd.grad(loss, self.trained, allow_unused=True))
        self._counts["backwards"] += 1
        norm = nn.utils.get_total_norm([g for g in gradients if g is not None], error_if_nonfinite=False)
        if not bool(torch.isfinite(norm) & torch.isfinite(loss)):
            self._counts["skipped_steps"] += 1
            return None
        return gradients

    def apply_gradients(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Step every optimizer with these gradients of :attr:`trained`."""
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameter.grad = gradient
        scale = 1.0 if self._reference_batch is None else self._batch_size / self._reference_batch
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    # What users call -------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Adapt on a batch and predict it.

        Images with non-finite pixels are left out of the adaptation and get zero logits (the uniform distribution);
        ``stats["nonfinite_images"]`` counts them. Works under ``no_grad`` and ``inference_mode`` too.

        Args:
            images: (B, C, H, W), floating point, pixels in [0, 1], B >= 1.

        Returns:
            Logits (B, K), at least float32, detached.

        Raises:
            InputError: If the input is no batch of images in [0, 1], or the net refuses it. Nothing has changed.
            NotPreparedError: If the method needs source data and has not seen any.
        """
        if not self.prepared:
            raise NotPreparedError(
                f"{type(self).__name__} must see source data before the stream: call prepare(source_batches) with "
                "batches {'image': (B, C, H, W) in [0, 1], 'label': (B,)} from the training set."
            )
        finite = check_images(images)
        self._counts = dict.fromkeys(("forwards", "backwards", "skipped_steps"), 0)
        self._counts["nonfinite_images"] = int((~finite).sum())
        self._record = {}
        with adapting(self.model, images, self._counts) as images:
            usable = images if self._counts["nonfinite_images"] == 0 else images[finite]
            with collective.with_stand_in(usable) as (given, self._batch_size):
                for _ in range(self.steps if self._batch_size else 0):
                    self._record = {}
                    logits = self.adapt(given).detach()
            logits = at_least_float32(logits[: len(usable)] if self._batch_size else self._no_logits(images))
        self._update_stats(logits)
        return zero_rows(logits, finite)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, K) of the net as adapted so far; changes nothing. Same input and errors as :meth:`forward`."""
        finite = check_images(images)
        usable = images.to(float_dtype(self.model))[finite]
        with explained(self.model, images), fresh_casts():
            logits = self.infer(usable) if len(usable) else self._no_logits(images)
        return zero_rows(at_least_float32(logits), finite)

    def reset(self) -> None:
        """Back to the source: declared tensors, optimizers and memory, exactly as at construction."""
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in self._declared.items():
                tensor.copy_(self._snapshot[name])
            for optimizer in self.optimizers.values():
                optimizer.state.clear()
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"]
        self.memory = dict(self._first_memory)
        self.stats = {}

    @property
    def adaptable(self) -> dict[str, Tensor]:
        """The tensors this method may change, by their name in ``state_dict()``."""
        return dict(self._declared)

    def train(self, mode: bool = True) -> TTAMethod:
        """Record ``mode`` on the method; the net inside stays in eval mode (no dropout, no drop path)."""
        super().train(mode)
        self.model.eval()
        return self

    # State -----------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """What is neither parameter nor buffer: snapshot, optimizers, memory. Safe for ``weights_only`` loading."""
        return {
            "snapshot": dict(self._snapshot),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "memory": dict(self.memory),
            "prepared": self.prepared,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Counterpart of :meth:`get_extra_state`. Learning rates, momenta and weight decay are the saved ones."""
        with torch.inference_mode(False), torch.no_grad():  # else the optimizers could not step afterwards
            for name, value in state["snapshot"].items():
                self._snapshot[name].copy_(value)
            for name, value in state["optimizers"].items():
                self.optimizers[name].load_state_dict(copy.deepcopy(value))  # it would share the tensors
            self.memory = {name: None if v is None else v.clone() for name, v in state["memory"].items()}
        self.prepared = state["prepared"]

    def _apply(self, fn: Any, recurse: bool = True) -> TTAMethod:
        for optimizer in self.optimizers.values():
            check_precision(optimizer, fn(torch.empty(0)).dtype)
        # Parameters are moved in place, so optimizers keep them; buffers are replaced.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._snapshot = {name: fn(value) for name, value in self._snapshot.items()}
        self.memory = {name: None if value is None else fn(value) for name, value in self.memory.items()}
        modules = dict(self.named_modules())
        for name in self._declared:
            owner, _, leaf = name.rpartition(".")
            self._declared[name] = getattr(modules[owner], leaf)
        for optimizer in self.optimizers.values():
            optimizer.load_state_dict(optimizer.state_dict())  # brings momentum to the parameters' device and dtype
        return self

    # Internals -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _no_logits(self, images: Tensor) -> Tensor:
        """Logits (0, K): what is left when every image is left out."""
        with collective.absent():
            logits = self.infer(torch.zeros_like(images[:1], dtype=float_dtype(self.model)))[:0]
        self._record = {}  # of an image that nobody gave
        return logits

    def _update_stats(self, logits: Tensor) -> None:
        values = {**self._record, **(collapse_measures(logits) if len(logits) else {})}
        floats = torch.stack([v.double() for v in values.values()]).tolist() if values else []  # one device sync
        self.stats = {**dict(zip(values, floats, strict=True)), **{k: float(v) for k, v in self._counts.items()}}
