"""The feature/head split of any classifier, by structure: features, then one last linear layer; and its depth."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_tta.backbones.copying import copy_net
from lightning_tta.backbones.dense import TRIED, DenseModel, describe_output, image_examples
from lightning_tta.backbones.graphs import GraphHead
from lightning_tta.backbones.passes import outside_inference_mode, safe_checkpoints
from lightning_tta.backbones.quantized import dequantized, is_packed, is_quantized
from lightning_tta.backbones.values import PixelHead, PixelModel, gives, is_pixel_head, resized
from lightning_tta.errors import ConfigError, UnsupportedModelError, check_range, in_one_line


def as_logits(output: object) -> Tensor:
    """The logits (B, K) in what a classifier returns: a tensor, or an object with a tensor ``logits``; K is 2 or more.

    Raises:
        UnsupportedModelError: If there is no such tensor.
    """
    output = getattr(output, "logits", output)
    if isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] > 1:
        return output
    if isinstance(output, Tensor) and (output.ndim == 1 or output.shape[1:] == (1,)):
        raise UnsupportedModelError(
            f"The net must return logits (B, K) of K >= 2 classes; got one output an image, {tuple(output.shape)}, "
            "whose softmax is always 1. If it is the logit u of a class against its absence, wrap the net so that it "
            "returns two logits, (0, u): torch.cat([torch.zeros_like(u), u], 1). If it is a value, of a regression, "
            "say so: task='regression'."
        )
    if (isinstance(output, Tensor) and output.ndim == 4) or (isinstance(output, Mapping) and "out" in output):
        raise UnsupportedModelError(
            f"The net must return logits (B, K), one class an image; got {describe_output(output)}. If it gives a "
            "class for each pixel, say so: task='pixels'."
        )
    raise UnsupportedModelError(
        f"The net must return logits (B, K), as a tensor or as an attribute 'logits'; got {describe_output(output)}. "
        "Wrap it in a module whose forward returns the logits."
    )


def find_head(model: nn.Module, head: str | None = None) -> tuple[str, nn.Linear]:
    """The classifier's last linear layer and its name.

    Looked for in this order: the argument; what a ``get_classifier()`` (timm's convention) of the net or of a net
    inside it returns; the last :class:`torch.nn.Linear` in the net's own order. A quantised linear layer of
    ``torch.ao`` counts too, and, of a net without any, the last linear operation of an exported graph; they are no
    ``nn.Linear``, and :func:`plain_head` makes them one.

    Args:
        model: Any classifier.
        head: Name of the layer, as in ``model.named_modules()``, where the search would find another.

    Raises:
        UnsupportedModelError: If there is no such layer, or it is not linear.
    """
    if isinstance(model, PixelModel):
        return _find_pixel_head(model, head)  # type: ignore[return-value]
    modules = model.named_modules()
    linear: dict[str, Any] = {name: m for name, m in modules if isinstance(m, nn.Linear) or is_packed(m)}
    if head is not None:
        if not isinstance(head, str) or head not in linear:
            raise UnsupportedModelError(
                f"head={head!r} is not a linear layer of {type(model).__name__}. Linear layers of this net: "
                f"{', '.join(linear) or 'none'}."
            )
        return head, linear[head]
    graph = None if linear else GraphHead.find(model)
    if graph is not None:
        return graph  # type: ignore[return-value]
    if not linear:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear layer to split features from logits at. Allowed: classifiers that "
            "end in one torch.nn.Linear. Use a method that needs no features ('norm', 'tent') for this net; if it "
            "gives a class for each pixel, say so: task='pixels'."
        )
    names = ("get_output_embeddings", "get_classifier") if isinstance(model, DenseModel) else ("get_classifier",)
    getters = (getattr(module, name, None) for name in names for module in model.modules())
    getter = next(filter(callable, getters), None)
    classifier = getter() if getter else None
    return next((item for item in linear.items() if item[1] is classifier), next(reversed(linear.items())))


def _find_pixel_head(model: PixelModel, head: str | None) -> tuple[str, nn.Module]:
    """The last convolution over single pixels whose output, resized, is the net's: found by a pass."""
    found = {name: module for name, module in model.named_modules() if is_pixel_head(module)}
    if head is not None and head in found:
        return head, found[head]
    calls = try_pass(model, 2).calls
    logits = calls[-1][2]
    right = [name for name, _, output in calls if name in found and gives(output, logits)]
    if head is not None or not right:
        given = "" if head is None else f"head={head!r} is no convolution over single pixels. "
        raise UnsupportedModelError(
            f"{given}{type(model.net).__name__} does not end in such a convolution whose output is that of the net, "
            "resized bilinearly or not, so features cannot be split from logits. Use a method that needs none ('tent', "
            f"'eata', 'cotta'). Convolutions over single pixels: {_last(list(found))}."
        )
    return right[-1], found[right[-1]]


def _last(names: Sequence[str], most: int = 6) -> str:
    """The last ones of a list of names, where the head would be."""
    return f"{'..., ' * (len(names) > most)}{', '.join(names[-most:])}" if names else "none"


def plain_head(head: Any) -> nn.Linear:
    """A linear layer with a plain weight (K, D): ``head`` itself, or, if it is quantised, one with its values.

    The weight is what the quantised one stands for. Input and output of the plain layer are not quantised: their ranges
    were made for the features of the calibration, and would cut others.
    """
    if isinstance(head, nn.Linear) and not is_quantized(head.weight):
        return head
    weight, bias = (value() if callable(value) else value for value in (head.weight, head.bias))
    assert isinstance(weight, Tensor)
    weight = dequantized(weight).detach().clone()
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(weight, copy=True), requires_grad=False)
    return plain


class HeadSplit:
    """Features z (B, D) and logits u = g(z) (B, K) of a classifier in one pass, where g is its last linear layer.

    Of a quantised head, features and logits are dequantised, and :attr:`head` is a plain layer (:func:`plain_head`), so
    that ``head(z)`` and the logits of the pass differ by the quantisation of the head's output.

    Args:
        model: Any classifier that ends in its head; nothing may come after it.
        head: Name of the head, see :func:`find_head`.

    Attributes:
        layer: What runs in the net: :attr:`head`, or a quantised layer, or an operation of a graph.

    Raises:
        UnsupportedModelError: At construction if there is no head; at the first pass if the net's output is not
            what the head gives for the captured features.
    """

    def __init__(self, model: nn.Module, head: str | None = None) -> None:
        self.model = model
        layer: Any
        self.name, layer = find_head(model, head)
        self.layer = layer
        self._plain: nn.Linear | None = None  # of a quantised head
        self._pixels = PixelHead(self.layer) if isinstance(self.model, PixelModel) else None
        shape = self.layer if self._pixels is None else self._pixels
        self.num_features, self.num_classes = shape.in_features, shape.out_features
        self._checked = False

    @property
    def head(self) -> nn.Linear:
        """The last linear layer g, callable on any features (..., D), with a plain weight (K, D)."""
        if self._pixels is not None:
            return self._pixels  # type: ignore[return-value]
        if isinstance(self.layer, nn.Linear) and not is_quantized(self.layer.weight):
            return self.layer
        device = getattr(self.layer.weight, "device", None)  # packed weights stay where they are
        if self._plain is None or device not in (None, self._plain.weight.device):
            with outside_inference_mode():
                self._plain = plain_head(self.layer)
        return self._plain

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_plain": None}

    def __call__(self, images: Tensor, run: Callable[[Tensor], object] | None = None) -> tuple[Tensor, Tensor]:
        """One forward pass: features (B, D) with their graph, and logits (B, K).

        Args:
            images: (B, C, H, W).
            run: The pass, where it is one with other weights; ``None``: the net's.
        """
        graph = isinstance(self.layer, GraphHead)
        with self.layer.recorded() if graph else recorded_calls({self.name: self.layer}) as calls:
            output = (run or self.model)(images)
            logits: Tensor = output if isinstance(self.model, DenseModel) else as_logits(output)  # type: ignore[assignment]
        return self.check(calls, logits), logits

    def before_head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As a call, but the logits have no graph: that of the features alone is kept."""
        layer = self.layer

        def apart(features: Tensor) -> Tensor:
            with torch.no_grad():
                output: Tensor = own(features.detach())
                return output

        own, before = layer.forward, vars(layer).get("forward")
        vars(layer)["forward"] = apart
        try:
            with recorded_calls({self.name: layer}) as calls:
                logits = self.model(x)
        finally:
            vars(layer).pop("forward", None)
            if before is not None:
                vars(layer)["forward"] = before
        return self.check(calls, logits), logits

    def finished(self, logits: Tensor, shape: torch.Size) -> Tensor:
        """What the net makes of logits of its head: of pixels they are resized to those of this shape (B, H, W, K)."""
        return logits if self._pixels is None else resized(logits, (shape[1], shape[2]))

    @property
    def is_checked(self) -> bool:
        """Whether a pass has shown that the net's output is that of the head."""
        return self._checked

    def check(self, calls: Sequence[tuple[str, Any, Any]], logits: Tensor) -> Tensor:
        """The features (B, D) of a pass.

        Args:
            calls: Those of the head in the pass, as :func:`recorded_calls` lists them.
            logits: What the net returned.

        Raises:
            UnsupportedModelError: If the net's output is not what the head gave.
        """
        if len(calls) != 1:
            raise UnsupportedModelError(
                f"The head '{self.name}' ran {len(calls)} times in one pass; it must run once, as a module. Pass "
                "head='...' to name the last linear layer; or use a method that needs no features ('norm', 'tent')."
            )
        _, (features, *_), head_output = calls[0]
        if self._pixels is not None:
            if not self._checked and not gives(head_output, logits):
                raise UnsupportedModelError(
                    f"The net's output is not that of its head '{self.name}', resized. Pass head='...' to name the "
                    "right one; or use a method that needs no features ('tent')."
                )
            self._checked = True
            moved: Tensor = features.movedim(1, -1)
            return moved
        features, head_output = dequantized(features), dequantized(head_output)
        if not self._checked:  # a net that overflowed cannot be compared: look again at the next pass
            same = head_output is logits
            finite = same or bool(torch.isfinite(logits).all())
            same = same or (head_output.shape == logits.shape and torch.equal(head_output, logits))
            flat = features.ndim == 2 or isinstance(self.model, DenseModel)
            if not flat or (finite and not same):
                raise UnsupportedModelError(
                    f"The net's output is not the output of its head '{self.name}' (softmax or another layer after "
                    "it, two heads, or not the last linear layer). Return the raw logits, or pass head='...' to name "
                    "the right layer; or use a method that needs no features ('norm', 'tent')."
                )
            self._checked = finite
        checked: Tensor = features
        return checked


@contextmanager
def recorded_calls(modules: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Any, Any]]]:
    """While active, the calls of ``modules`` are listed in the order in which they end: (name, inputs, output)."""
    calls: list[tuple[str, Any, Any]] = []

    def record(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        calls.append((name, inputs, output))

    handles = [module.register_forward_hook(partial(record, name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


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


def is_idle(layer: str, called: Collection[str]) -> bool:
    """Whether nothing is called of the module that a layer is a part of, as of an auxiliary head in eval mode."""
    parent = layer.rpartition(".")[0]
    return bool(parent) and not any(is_inside(name, parent) for name in called)


def module_at(model: nn.Module, at: float) -> str:
    """Name of the stage or block (:func:`parts_by_depth`) at a share of the depth, in (0, 1], by execution order."""
    check_range("at", at, 0, 1, low_open=True)
    order = execution_order(model)
    layers = [name for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
    if order is not None:
        layers = [name for name in order if name in set(layers)]
    parts = parts_by_depth(model, layers) or [name for name in layers if name] or layers
    if order is not None:
        parts = [name for name in order if name in set(parts)]
    if not parts:
        raise UnsupportedModelError(f"{type(model).__name__} runs none of its stages or blocks as modules.")
    return parts[max(0, round(at * len(parts)) - 1)]


def features_at(model: nn.Module, x: Tensor, names: Sequence[str]) -> tuple[dict[str, Any], object]:
    """Outputs of the modules in ``names`` (of the first call of each), and that of the net, in one pass.

    Raises:
        UnsupportedModelError: If a named module does not exist or does not run.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise UnsupportedModelError(f"{type(model).__name__} has no module {name!r}.")
    with recorded_calls({name: modules[name] for name in names}) as calls:
        result = model(x)
    outputs: dict[str, Any] = {}
    for name, _, output in calls:
        outputs.setdefault(name, output)
    for name in names:
        if name not in outputs:
            raise UnsupportedModelError(f"Module {name!r} of {type(model).__name__} does not run.")
    return outputs, result


def execution_order(model: nn.Module) -> list[str] | None:
    """Names of the modules in the order in which they first end in a pass; ``None`` where no pass could be tried.

    The pass is that of :func:`try_pass`.
    """
    try:
        return list(dict.fromkeys(name for name, _, _ in try_pass(model).calls))
    except UnsupportedModelError:
        return None


class Trial(NamedTuple):
    """A pass that :func:`try_pass` made.

    Attributes:
        twin: The copy of the net that ran.
        images: What it took, (B, C, H, W).
        calls: Those of all modules as :func:`recorded_calls` lists them; the last is that of the net, named "".
    """

    twin: nn.Module
    images: Tensor
    calls: list[tuple[str, Any, Any]]


def try_pass(model: nn.Module, number: int = 1, instead: str = "use another net") -> Trial:
    """A pass of black images, the second of two with a gradient from black to white.

    It goes through a copy of the net's modules that shares its tensors: the net itself does not run. Tried are the
    channels of the net's convolutions, and the sizes :data:`~lightning_tta.backbones.dense.TRIED`.

    Args:
        model: Any net.
        number: Images, 1 or 2.
        instead: What else to do, for the message.

    Raises:
        UnsupportedModelError: If the net cannot be copied, or takes none of the images.
    """
    twin = copy_net(model, (*model.parameters(), *model.buffers())).eval()
    reason = ""
    for images in model.examples(number) if isinstance(model, DenseModel) else image_examples(model, number):
        try:
            called = recorded_calls(dict(twin.named_modules()))
            with torch.no_grad(), outside_inference_mode(), safe_checkpoints(), called as calls:
                twin(images)
        except Exception as error:  # not this net's size: the next
            reason = in_one_line(error)
            continue
        return Trial(twin, images, calls)
    raise UnsupportedModelError(
        f"{type(model).__name__} takes none of the images alone, squares of {', '.join(map(str, TRIED))} pixels, that "
        f"were tried to see what runs in it: {reason}. Wrap it in a module whose forward(images) takes them; or "
        f"{instead}."
    )


def keep_classes(model: nn.Module, classes: Sequence[int]) -> None:
    """Cut the last linear layer, in place, to some of its classes: logits (B, K) become (B, len(classes)).

    Raises:
        UnsupportedModelError: If the net does not end in a linear layer.
        ConfigError: If it has no such class.
    """
    name, head = find_head(model)
    if plain_head(head) is not head:
        raise UnsupportedModelError(
            f"The last linear layer '{name}' of {type(model).__name__} is quantised, and cannot be cut to some of its "
            "classes. Cut the net before it is quantised, or wrap it so that it returns these logits alone."
        )
    if max(classes) >= head.out_features:
        raise ConfigError(f"classes go up to {max(classes)}, but the net has {head.out_features} logits, from 0.")
    rows = torch.tensor(list(classes), device=head.weight.device)
    cut = nn.Linear(head.in_features, len(rows), bias=head.bias is not None).to(head.weight)
    with torch.no_grad():
        cut.weight.copy_(head.weight[rows])
        if head.bias is not None:
            cut.bias.copy_(head.bias[rows])
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, cut)
