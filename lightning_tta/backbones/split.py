"""The feature/head split of any classifier, by structure: features, then one last linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_tta.errors import ConfigError, UnsupportedModelError


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
            finite = bool(torch.isfinite(logits).all())
            same = head_output is logits or (head_output.shape == logits.shape and torch.equal(head_output, logits))
            if features.ndim != 2 or (finite and not same):
                raise UnsupportedModelError(
                    f"The net's output is not the output of its head '{self.name}' (softmax or another layer after "
                    "it, or not the last linear layer). Return the raw logits, or pass head='...' to name the right "
                    "layer."
                )
            self._checked = finite
        return features, logits


def keep_classes(model: nn.Module, classes: Sequence[int]) -> None:
    """Cut the last linear layer, in place, to some of its classes: logits (B, K) become (B, len(classes)).

    Raises:
        UnsupportedModelError: If the net does not end in a linear layer.
        ConfigError: If it has no such class.
    """
    name, head = find_head(model)
    if max(classes) >= head.out_features:
        raise ConfigError(f"classes go up to {max(classes)}, but the net has {head.out_features} logits, from 0.")
    chosen = torch.tensor(list(classes), device=head.weight.device)
    cut = nn.Linear(head.in_features, len(chosen), bias=head.bias is not None).to(head.weight)
    with torch.no_grad():
        cut.weight.copy_(head.weight[chosen])
        if head.bias is not None:
            cut.bias.copy_(head.bias[chosen])
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, cut)
