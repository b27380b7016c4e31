"""The blocks or stages of any net, by structure, and the vectors in what they return: tokens, or channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_tta.backbones.norms import is_norm_layer
from lightning_tta.backbones.split import find_head, is_inside, recorded_calls, try_pass
from lightning_tta.errors import UnsupportedModelError, check_choice

Tokens = Literal["auto", "cls", "all"]
Kind = Literal["vector", "tokens", "channels_first", "channels_last"]


@dataclass(frozen=True)
class Block:
    """A module whose output holds vectors of one width.

    Attributes:
        name: Of the module.
        kind: How its output, or the first tensor of it, lies: ``vector`` (B, D), ``tokens`` (B, N, D),
            ``channels_first`` (B, D, H, W) or ``channels_last`` (B, H, W, D).
        width: D.
        first_only: Whether only the first token of each image counts.
    """

    name: str
    kind: Kind
    width: int
    first_only: bool = False

    def read(self, output: Any) -> Tensor:
        """The vectors (M, D) in what the module returned."""
        tensor: Tensor = _tensor_in(output)
        if self.first_only:
            return tensor[:, 0]
        tensor = tensor.movedim(1, -1) if self.kind == "channels_first" else tensor
        return tensor.reshape(-1, self.width)

    def written(self, output: Any, vectors: Tensor) -> Any:
        """What the module returned, with other vectors (M, D)."""
        tensor, vectors = _tensor_in(output), vectors.to(_tensor_in(output).dtype)
        if self.first_only:
            new = torch.cat([vectors[:, None], tensor[:, 1:]], 1)
        elif self.kind == "channels_first":
            new = vectors.view(tensor.shape[0], *tensor.shape[2:], self.width).movedim(-1, 1)
        else:
            new = vectors.view(tensor.shape)
        return new if isinstance(output, Tensor) else type(output)([new, *output[1:]])


@contextmanager
def changed_blocks(
    model: nn.Module, blocks: Sequence[Block], change: Callable[[int, Tensor], Tensor | None]
) -> Iterator[None]:
    """While active, ``change(number, vectors)`` sees what each block returns, in the first call of each after another.

    Args:
        model: The net.
        blocks: Of it.
        change: Gets the number of the block and the vectors (M, D), and returns others in their place, or ``None``.
    """
    called: set[int] = set()

    def hook(number: int, module: nn.Module, inputs: Any, output: Any) -> Any:
        if number in called:  # a module that runs twice in a pass
            return None
        called.add(number)
        vectors = change(number, blocks[number].read(output))
        return None if vectors is None else blocks[number].written(output, vectors)

    modules = [model.get_submodule(block.name) for block in blocks]
    handles = [module.register_forward_hook(partial(hook, number)) for number, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_blocks(model: nn.Module, names: Sequence[str] | None = None, tokens: Tokens = "auto") -> list[Block]:
    """The blocks of a net, in the order in which they run.

    From the net inwards, into the child with most layers, until a module has three children or more that hold several
    layers and return vectors: so a ResNet, a Swin or a ConvNeXt has its stages, a ViT its blocks. What the head is in
    is none. A net without such parts has its normalisation layers instead. One pass of zeros through a copy shows what
    runs, and another one whether the head depends on the first token alone.

    Args:
        model: Any classifier.
        names: Of the modules to take instead.
        tokens: Of transformers: ``cls``: the class token of each image; ``all``; ``auto``: the class token if nothing
            else of the last block's output reaches the head, else all.

    Raises:
        UnsupportedModelError: If there are fewer than two, a named one does not fit, or there is no class token.
    """
    check_choice("tokens", tokens, ("auto", "cls", "all"))
    twin, image, calls = try_pass(model, instead="use method 't3a' or 'lame'")
    outputs: dict[str, Any] = {}
    for name, _, output in calls:
        outputs.setdefault(name, output)
    fitting = {name: block for name, output in outputs.items() if (block := _as_block(model, name, output))}
    names = _search(model, list(outputs), fitting) if names is None else names
    for name in names:
        if name not in fitting:
            kind = "returns no (B, D), (B, N, D), (B, C, H, W)" if name in outputs else "does not run as a module"
            raise UnsupportedModelError(f"blocks: '{name}' of {type(model).__name__} {kind}. Leave it out.")
    if len(names) < 2:
        raise UnsupportedModelError(
            "Two blocks or more are needed: modules, or else normalisation layers, that run one after another and "
            f"return (B, D), (B, N, D) or (B, C, H, W). {type(model).__name__} has {len(names) or 'none'}. Name them "
            "by blocks=[...]; or use method 't3a' or 'lame'."
        )
    blocks = [fitting[name] for name in outputs if name in set(names)]
    lengths = {block.name: _tensor_in(outputs[block.name]).shape[1] for block in blocks if block.kind == "tokens"}
    last = next((name for name in reversed(lengths)), None)
    if tokens == "all" or last is None or not _reads_first_only(twin, image, fitting[last]):
        if tokens == "cls":
            raise UnsupportedModelError(
                f"{type(model).__name__} has no class token that its head alone reads. Use tokens='all'."
            )
        return blocks
    return [
        Block(block.name, block.kind, block.width, True) if lengths.get(block.name) == lengths[last] else block
        for block in blocks
    ]


def _tensor_in(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _as_block(model: nn.Module, name: str, output: Any) -> Block | None:
    """How the output of a module for one image lies; ``None`` where it is nothing that has vectors."""
    tensor = _tensor_in(output)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim not in (2, 3, 4):
        return None
    if len(tensor) != 1 or not name:
        return None
    if tensor.ndim < 4:
        return Block(name, "vector" if tensor.ndim == 2 else "tokens", tensor.shape[-1])
    widths = _widths(model.get_submodule(name))
    last = tensor.shape[-1] in widths and tensor.shape[1] not in widths
    return Block(name, "channels_last" if last else "channels_first", tensor.shape[-1 if last else 1])


def _widths(module: nn.Module) -> set[int]:
    """Of what the layers in a module return."""
    attributes = ("out_features", "out_channels", "num_features", "num_channels")
    widths = {getattr(layer, attribute, None) for layer in module.modules() for attribute in attributes}
    shapes = {layer.normalized_shape[-1] for layer in module.modules() if isinstance(layer, nn.LayerNorm)}
    return {int(width) for width in widths | shapes if isinstance(width, int)}


def _search(model: nn.Module, order: list[str], fitting: Mapping[str, Block]) -> list[str]:
    modules = dict(model.named_modules())
    layers = [name for name in order if any(True for _ in modules[name].parameters(recurse=False))]
    try:
        head = find_head(model)[0]
    except UnsupportedModelError:
        head = None
    prefix: str | None = ""
    best: list[str] = []
    while prefix is not None and len(best) < 3:
        inside = [f"{prefix}.{name}".lstrip(".") for name, _ in modules[prefix].named_children()]
        inside = [name for name in inside if head is None or not is_inside(head, name)]
        sizes = {name: sum(is_inside(layer, name) for layer in layers) for name in inside}
        parts = [name for name, size in sizes.items() if size > 1 and name in fitting]
        best = parts if len(parts) > max(1, len(best)) else best
        prefix = max((name for name, size in sizes.items() if size > 1), key=sizes.__getitem__, default=None)
    return best or [name for name in order if name in fitting and is_norm_layer(modules[name])]


def _reads_first_only(twin: nn.Module, image: Tensor, last: Block) -> bool:
    """Whether the head sees nothing of the tokens after the first one of the last block."""

    def disturb(module: nn.Module, inputs: Any, output: Any) -> Any:
        tensor = _tensor_in(output)
        rest = tensor[:, 1:]
        waves = torch.arange(rest.numel(), device=rest.device).cos().view(rest.shape)  # a constant is nothing to a norm
        new = torch.cat([tensor[:, :1], waves.to(rest) - rest], 1)
        return new if isinstance(output, Tensor) else type(output)([new, *output[1:]])

    try:
        head = {"head": twin.get_submodule(find_head(twin)[0])}
    except UnsupportedModelError:
        head = {}
    seen = []
    for disturbs in (False, True):
        hook = twin.get_submodule(last.name).register_forward_hook(disturb) if disturbs else None
        with torch.no_grad(), recorded_calls(head) as calls:
            output = twin(image)
        if hook is not None:
            hook.remove()
        seen.append(calls[0][1][0] if calls else getattr(output, "logits", output))
    before, after = seen
    return bool(before.shape == after.shape and torch.allclose(before, after, rtol=1e-4, atol=1e-6))
