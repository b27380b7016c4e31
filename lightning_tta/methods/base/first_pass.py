"""What the first pass of a net tells about it, and what every pass needs: images as given."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_tta.backbones.norms import is_norm_layer
from lightning_tta.backbones.split import is_idle
from lightning_tta.backbones.values import PixelModel
from lightning_tta.errors import UnsupportedModelError
from lightning_tta.losses import at_least_float32

_LOGITS = {
    "probabilities": (
        "The net's outputs are probabilities already (a softmax at its end?). A method takes the softmax of logits: of "
        "probabilities it is nearly uniform, entropies are wrong, and filters by entropy keep nothing. Return the "
        "logits from before the softmax, or wrap the net: torch.log(net(x).clamp_min(1e-12))."
    ),
    "independent probabilities": (
        "All outputs of the net lie in [0, 1] (a sigmoid at its end, of several labels an image?). A method takes them "
        "for logits of classes of which each image has one, and every prediction looks unsure. Return the logits from "
        "before the sigmoid."
    ),
    "log-probabilities": (
        "The net's outputs are log-probabilities (a log-softmax at its end?). Predictions and entropies are those of "
        "logits; what looks at the length of logits (COME, the guard) sees other lengths. Return the logits instead."
    ),
    "not finite": (
        "The net's outputs are not all finite numbers, for images that are: weights that are infinite, or values too "
        "large for the net's precision? Such images have no prediction, and no step is taken on them. Look at the "
        "weights; or run the net in float32 or bfloat16."
    ),
    "ruled out": (
        "Some of the net's outputs are -inf (classes that are ruled out?). Their entropy has no finite gradient, so "
        "that steps are skipped and nothing adapts. Return a large negative number there, such as -1e4, or leave the "
        "classes out."
    ),
    "features": (
        "The net has as many outputs as its last normalisation layer has channels, and no layer with weights behind "
        "it: does it return features, without a classifier? A method takes them for logits of classes. Give it its "
        "head."
    ),
}


class FirstPass:
    """Watches the passes of one net.

    A net that writes into its input gets a copy in each pass, so that no pass sees what another one wrote, nor does the
    caller. The first pass shows whether it does, and what its outputs look like: the only one that asks the device. A
    net that begins to write later is warned of, and gets copies from then on.

    Attributes:
        has_run: Whether the net has taken a batch.
        ran: Names of the modules with parameters of their own that run in a pass; ``None`` before the first one with
            gradients.
    """

    def __init__(self) -> None:
        self.has_run = False
        self.ran: frozenset[str] | None = None
        self._writes = True  # until it is known
        self._through: Callable[..., Any] | None = None  # what calls the net in its place

    @contextmanager
    def watch(self, model: nn.Module, count: Callable[[], None], *, statistics: bool) -> Iterator[None]:
        """While active, ``count`` is called before each pass of ``model``, and its input stays as it is.

        Args:
            model: The net as it runs.
            count: Called before a pass.
            statistics: Whether the method replaces the statistics of BatchNorm layers, which then must run as modules.

        Raises:
            UnsupportedModelError: If none of the BatchNorm layers runs.
        """
        own, before = model.forward, vars(model).get("forward")
        inside = False

        def forward(*inputs: Any, **options: Any) -> Any:
            nonlocal inside
            if inside:  # a net that calls its own forward
                return own(*inputs, **options)
            inside = True
            try:
                return one_pass(*inputs, **options)
            finally:
                inside = False

        def one_pass(*inputs: Any, **options: Any) -> Any:
            nonlocal own
            count()
            if before is None and getattr(own, "__func__", None) is not type(model).forward:
                # that of a graph has become one that shows its features
                with self.aside(model):
                    own = model.forward
            run = own if self._through is None else functools.partial(self._through, own)
            if not self.has_run or (self.ran is None and torch.is_grad_enabled()):
                return self._look(model, run, statistics, inputs, options)
            if self._writes and inputs:
                return run(inputs[0].clone(), *inputs[1:], **options)
            version = inputs[0]._version if inputs and not inputs[0].is_inference() else None
            output = run(*inputs, **options)
            if version is not None and inputs[0]._version != version:
                self._writes = True
                warnings.warn(
                    f"{type(model).__name__} wrote into its input, which it had not done before. The images of this "
                    "batch are others now, for the caller too, and what was computed from them since is not to be "
                    "trusted. From here on the net gets copies. Let its forward write to a copy: x = x.clone().",
                    stacklevel=2,
                )
            return output

        forward.__wrapped__ = own  # type: ignore[attr-defined]  # its signature is that of the net's own
        try:
            vars(model)["forward"] = forward
            yield
        finally:
            vars(model).pop("forward", None)
            if before is not None:
                vars(model)["forward"] = before

    @contextmanager
    def aside(self, model: nn.Module) -> Iterator[None]:
        """While active, the net's forward is its own again."""
        watched = vars(model).pop("forward", None)
        try:
            yield
        finally:
            if watched is not None:
                vars(model)["forward"] = watched

    @contextmanager
    def through(self, call: Callable[..., Any]) -> Iterator[None]:
        """While active, ``call(forward, *inputs)`` takes the place of ``forward(*inputs)``."""
        before, self._through = self._through, call
        try:
            yield
        finally:
            self._through = before

    def _look(
        self,
        model: nn.Module,
        run: Callable[..., Any],
        statistics: bool,
        inputs: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Any:
        """A first pass, with or without gradients."""
        buffers = {} if self.has_run else {name: buffer.clone() for name, buffer in model.named_buffers()}
        called: set[str] = set()
        copied = (inputs[0].clone(), *inputs[1:]) if self._writes and inputs else inputs
        with ExitStack() as stack:
            for name, layer in _watched(model, torch.is_grad_enabled()).items():
                if layer is not model:
                    hook = layer.register_forward_hook(lambda m, i, o, name=name: called.add(name))
                    stack.callback(hook.remove)
            output = run(*copied, **options)
        called.add("")
        if torch.is_grad_enabled() and self.ran is None:
            self.ran = frozenset(called)
        if self.has_run:
            return output
        self._writes = bool(inputs) and not torch.equal(copied[0], inputs[0])
        now = dict(model.named_buffers())
        written = [name for name, b in buffers.items() if name in now and not _equal(b, now[name])]
        if written:
            warnings.warn(
                f"{type(model).__name__} writes to its own buffers while it runs in eval mode ({_some(written)}): "
                "observers of quantisation, counters, statistics of its own? They are no state of the method, so "
                "that reset() does not bring them back. Switch that off, or expect streams that do not repeat.",
                stacklevel=2,
            )
        _look_at_logits(model, getattr(output, "logits", output))
        if statistics:
            _look_at_statistics(model, called)
        self.has_run = True
        return output


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a != a)).all())  # NaN has not changed


def _watched(model: nn.Module, everywhere: bool) -> dict[str, nn.Module]:
    """BatchNorm layers, and modules with parameters: all, or those beside a BatchNorm layer.

    Without gradients torch's attention runs otherwise where it has hooks.
    """
    norms = _batch_norms(model)
    parents = {name.rpartition(".")[0] for name in norms}
    return norms | {
        name: module
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False)) and (everywhere or name.rpartition(".")[0] in parents)
    }


def _batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _NormBase)}


def _look_at_statistics(model: nn.Module, called: set[str]) -> None:
    """Refuse a net whose BatchNorm layers do not run as modules; warn of some."""
    layers = _batch_norms(model)
    missed = [name for name in layers if name not in called and not is_idle(name, called)]
    how = "(does its forward call torch.nn.functional.batch_norm, or was it replaced by one of another net?)"
    if missed and len(missed) == len(layers):
        raise UnsupportedModelError(
            f"None of the {len(layers)} BatchNorm layers of {type(model).__name__} runs as a module {how}, so that "
            "their statistics cannot be replaced. Call the layers themselves, or use method 'source'."
        )
    elif missed:
        warnings.warn(
            f"Of the {len(layers)} BatchNorm layers of {type(model).__name__}, {len(missed)} do not run as modules "
            f"{how}: {', '.join(missed[:4])}{', ...' if len(missed) > 4 else ''}. Their statistics stay those of the "
            "source. That is no harm if they do not run at all.",
            stacklevel=2,
        )


def _look_at_logits(model: nn.Module, logits: object) -> None:
    """Warn of what is no logits, as far as values and structure tell; over pixels of each pixel's."""
    if isinstance(model, PixelModel) and isinstance(logits, Tensor) and logits.ndim == 4:
        logits = logits.flatten(0, 2)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        return
    u = at_least_float32(logits.detach())
    one = ((u.sum(1) - 1).abs() < 1e-2).all() & (u >= 0).all()
    log_one = (u.logsumexp(1).abs() < 1e-2).all()
    unit = (u >= 0).all() & (u < 0.1).any() & (u > 0.9).any() & (u <= 1).all()
    broken = (u.isnan() | (u == torch.inf)).any()  # -inf is the logit of a class that is ruled out
    ruled_out = (u == -torch.inf).any()
    is_one, is_log_one, is_unit, is_broken, is_ruled_out = torch.stack([one, log_one, unit, broken, ruled_out]).tolist()
    last = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))][-1:]
    features = any(is_norm_layer(m) and any(p.shape == u.shape[1:] for p in m.parameters(recurse=False)) for m in last)
    found = {
        "not finite": is_broken,
        "ruled out": is_ruled_out and logits.requires_grad,
        "probabilities": is_one,
        "log-probabilities": is_log_one,
        "independent probabilities": not is_one and (_ends_in_sigmoid(model, logits) or (is_unit and u.numel() >= 32)),
        "features": features,
    }
    for what, is_so in found.items():
        if is_so:
            warnings.warn(_LOGITS[what], stacklevel=2)


def _ends_in_sigmoid(model: nn.Module, logits: Tensor) -> bool:
    last = list(model.modules())[-1]
    return isinstance(last, nn.Sigmoid) or (logits.grad_fn is not None and "Sigmoid" in logits.grad_fn.name())
