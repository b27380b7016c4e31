"""The feature/head split of any classifier, by structure: features, then one last linear layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.errors import UnsupportedModelError, check_range


def as_logits(output: object) -> Tensor:
    """The logits (B, K) in what a classifier returns: a tensor, or an object with a tensor ``logits``.

    Raises:
        UnsupportedModelError: If there is no such tensor.
    """
    output = getattr(output, "logits", output)
    if isinstance(output, Tensor) and output.ndim == 2:
        return output
    given = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    raise UnsupportedModelError(
        f"The net must return logits (B, K), as a tensor or as an attribute 'logits'; got {given}. Wrap it in a module "
        "whose forward returns the logits."
    )


def find_head(model: nn.Module, head: str | None = None) -> tuple[str, nn.Linear]:
    """The classifier's last linear layer and its name.

    Looked for in this order: the argument; what a ``get_classifier()`` (timm's convention) of the net or of a net
    inside it returns; the last :class:`torch.nn.Linear` in the net's own order.

    Args:
        model: Any classifier.
        head: Name of the layer, as in ``model.named_modules()``, where the search would find another.

    Raises:
        UnsupportedModelError: If there is no such layer, or it is not linear.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    choices = f"Linear layers of this net: {', '.join(linear) or 'none'}."
    if head is not None:
        if head not in linear:
            raise UnsupportedModelError(f"head={head!r} is not a linear layer of {type(model).__name__}. {choices}")
        return head, linear[head]
    for module in model.modules():
        get_classifier = getattr(module, "get_classifier", None)
        if callable(get_classifier):
            found = get_classifier()
            for name, layer in linear.items():
                if layer is found:
                    return name, layer
            break
    if not linear:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear layer to split features from logits at. Allowed: classifiers that "
            "end in one torch.nn.Linear. Use a method that needs no features ('norm', 'tent') for this net."
        )
    return next(reversed(linear.items()))


class HeadSplit:
    """Features z (B, D) and logits u = g(z) (B, K) of a classifier in one pass, where g is its last linear layer.

    Args:
        model: Any classifier that ends in its head; nothing may come after it.
        head: Name of the head, see :func:`find_head`.

    Raises:
        UnsupportedModelError: At construction if there is no head; at the first pass if the net's output is not
            what the head gives for the captured features.
    """

    def __init__(self, model: nn.Module, head: str | None = None) -> None:
        self.model = model
        self.name, self.head = find_head(model, head)
        self.num_features = self.head.in_features
        self.num_classes = self.head.out_features
        self._checked = False

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """One forward pass: features (B, D) with their graph, and logits (B, K)."""
        captured: list[tuple[Tensor, Tensor]] = []

        def capture(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            captured.append((inputs[0], output))

        handle = self.head.register_forward_hook(capture)
        try:
            logits = as_logits(self.model(images))
        finally:
            handle.remove()
        if len(captured) != 1:
            raise UnsupportedModelError(
                f"The head '{self.name}' ran {len(captured)} times in one pass; it must run once. Pass head='...' to "
                "name the last linear layer."
            )
        features, head_output = captured[0]
        if not self._checked:  # a net that overflowed cannot be compared: look again at the next pass
            same = head_output is logits
            finite = same or bool(torch.isfinite(logits).all())
            same = same or (head_output.shape == logits.shape and torch.equal(head_output, logits))
            if features.ndim != 2 or (finite and not same):
                raise UnsupportedModelError(
                    f"The net's output is not the output of its head '{self.name}' (softmax or another layer after "
                    "it, or not the last linear layer). Return the raw logits, or pass head='...' to name the right "
                    "layer."
                )
            self._checked = finite
        return features, logits


def parts_by_depth(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The stages or blocks of a net, by name, in the net's own order.

    From the net inwards: while one child alone holds several of ``layers``, the parts are its children; those that hold
    several count. So a ResNet has its four stages, a ViT its blocks. Empty if there are none.
    """
    layers = list(layers)
    prefix, parts = "", [""]
    while len(parts) == 1:
        prefix = parts[0]
        children = [f"{prefix}.{name}".lstrip(".") for name, _ in model.get_submodule(prefix).named_children()]
        parts = [child for child in children if sum(is_inside(layer, child) for layer in layers) > 1]
    return parts


def is_inside(layer: str, module: str) -> bool:
    """Whether a layer is a module, or a descendant of it, by their names."""
    return layer == module or layer.startswith(f"{module}.")


def features_at(model: nn.Module, x: Tensor, at: float | Sequence[str]) -> tuple[Any, object]:
    """Outputs of modules, and that of the net, in one pass.

    Args:
        model: Any net.
        x: Its input.
        at: A share of the depth in (0, 1]: the output of that stage or block (:func:`parts_by_depth`), in the order of
            execution. Or names of modules: a dict of their outputs.

    Raises:
        UnsupportedModelError: If a named module does not exist or does not run, or no stage or block runs.
    """
    if isinstance(at, (int, float)):
        check_range("at", at, 0, 1, low_open=True)
        owners = [name for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
        names = parts_by_depth(model, owners) or owners
    else:
        names = list(at)
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise UnsupportedModelError(f"{type(model).__name__} has no module {unknown[0]!r}.")
    outputs: dict[str, Any] = {}
    handles = [modules[name].register_forward_hook(_put(outputs, name)) for name in names]
    try:
        result = model(x)
    finally:
        for handle in handles:
            handle.remove()
    if isinstance(at, (int, float)):
        if not outputs:
            raise UnsupportedModelError(f"{type(model).__name__} runs none of its stages or blocks as modules.")
        return list(outputs.values())[max(0, round(at * len(outputs)) - 1)], result
    idle = [name for name in names if name not in outputs]
    if idle:
        raise UnsupportedModelError(f"Module {idle[0]!r} of {type(model).__name__} does not run.")
    return outputs, result


def _put(outputs: dict[str, Any], name: str) -> Callable[..., None]:
    def put(module: nn.Module, inputs: object, output: Any) -> None:
        outputs.setdefault(name, output)

    return put


def execution_order(model: nn.Module) -> list[str] | None:
    """Names of the modules in the order in which they first end in a pass; ``None`` where no pass could be tried.

    The pass is one of an image of zeros, through a copy of the net's modules that shares its tensors: the net itself
    does not run. Tried are the channels of the net's convolutions, and usual sizes.
    """
    try:
        shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
        twin = copy.deepcopy(model, dict(shared)).eval()
    except Exception:  # a net that cannot be copied: its own order must do
        return None
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    channels = list(dict.fromkeys([m.in_channels for m in convolutions if m.in_channels in (1, 3)])) or [3]
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    ended: dict[str, Any] = {}
    for name, module in twin.named_modules():
        module.register_forward_hook(_put(ended, name))
    for size in (32, 64, 224, 16, 28, 96, 128, 256, 384):
        for channel in channels:
            ended.clear()
            try:
                with torch.no_grad(), torch.inference_mode(False):
                    twin(torch.zeros(1, channel, size, size, dtype=like.dtype, device=like.device))
            except Exception:  # not this net's size: the next
                continue
            return list(ended)
    return None
