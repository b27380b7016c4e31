"""Nets whose blocks take tokens (B, N, D), by structure: the blocks, the class token, and further tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.backbones.norms import is_norm_layer
from lightning_tta.backbones.passes import outside_inference_mode, safe_checkpoints
from lightning_tta.backbones.split import as_logits, recorded_calls, try_pass
from lightning_tta.errors import UnsupportedModelError, in_one_line

_INSTEAD = "use a method that does not need tokens: 'output_shift', 'neo' or 't3a', which need no gradients either"


@dataclass(frozen=True)
class TokenNet:
    """Where the tokens of a net are; all modules by name.

    Attributes:
        blocks: Two or more, in the order in which they run, each (B, N, D) -> (B, N, D).
        norms: Of each block but the first: its norm layer that takes the block's input as it comes; empty where there
            is none.
        head: The layer that gives the logits, of features (B, Z).
        width: D.
        features: Z.
        prefix: Number of tokens in front that are the same for all images as they enter the first block: a class token,
            registers.
        patch_values: Number of pixel values in a patch; D where there is no convolution.
    """

    blocks: tuple[str, ...]
    norms: tuple[str, ...]
    head: str
    width: int
    features: int
    prefix: int
    patch_values: int

    @property
    def has_class_token(self) -> bool:
        """Whether the first token is no patch."""
        return self.prefix > 0

    @property
    def activations(self) -> int:
        """Number of values of an image in :attr:`Seen.activations`."""
        return self.width * (len(self.blocks) - 1) + self.features


@dataclass
class Seen:
    """What a pass shows of itself.

    Attributes:
        tokens: After each block but the last: the class token, or the mean of the tokens where there is none, behind
            the norm layer of the next block; (B, D).
        features: The head's input (B, Z).
    """

    tokens: list[Tensor] = field(default_factory=list)
    features: Tensor | None = None

    @property
    def activations(self) -> Tensor:
        """``tokens``, then ``features``, side by side: (B, A)."""
        assert self.features is not None
        return torch.cat([*self.tokens, self.features], 1)


@contextmanager
def watched_tokens(model: nn.Module, net: TokenNet, prompts: Tensor | None = None) -> Iterator[Seen]:
    """While active, a pass of the net shows its tokens, and its blocks take further ones.

    Args:
        model: The net.
        net: Of :func:`find_tokens`.
        prompts: Tokens (B, P, D) that stand behind the class token, or in front where there is none, from the first
            block on; behind the last one they are gone. ``None``: none.
    """
    seen, modules = Seen(), dict(model.named_modules())
    first = int(net.has_class_token)
    number = 0 if prompts is None else prompts.shape[1]

    def insert(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens = inputs[0]
        assert prompts is not None
        return torch.cat([tokens[:, :first], prompts.to(tokens.dtype), tokens[:, first:]], 1), *inputs[1:]

    def take_out(tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, :first], tokens[:, first + number :]], 1) if number else tokens

    def take_out_last(module: nn.Module, inputs: Any, output: Any) -> Any:
        return take_out(output) if isinstance(output, Tensor) else type(output)((take_out(output[0]), *output[1:]))

    def note(norm: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tokens = output if isinstance(output, Tensor) else output[0]
            token = tokens[:, 0] if net.has_class_token else take_out(tokens).mean(1)
            seen.tokens.append(modules[norm](token) if norm else token)

        return hook

    def note_features(module: nn.Module, inputs: Any) -> None:
        seen.features = inputs[0]

    with ExitStack() as stack:
        if prompts is not None:
            stack.callback(modules[net.blocks[0]].register_forward_pre_hook(insert).remove)
            stack.callback(modules[net.blocks[-1]].register_forward_hook(take_out_last).remove)
        for block, norm in zip(net.blocks[:-1], net.norms, strict=True):
            stack.callback(modules[block].register_forward_hook(note(norm)).remove)
        stack.callback(modules[net.head].register_forward_pre_hook(note_features).remove)
        yield seen


@torch.no_grad()
def find_tokens(model: nn.Module, prompts: int = 1, instead: str = _INSTEAD) -> TokenNet:
    """Find the blocks of a net that take tokens, by a pass of two images through a copy that shares its tensors.

    They are siblings, two or more; the output (B, N, D) of each is the input of the next. Of several such groups the
    one with the most parameters counts.

    Args:
        model: Any classifier, in eval mode.
        prompts: Number of further tokens that the blocks must take.
        instead: What else to do, for messages.

    Raises:
        UnsupportedModelError: If there are no such blocks, if they do not take further tokens, or if no image size was
            found that the net takes.
    """
    twin, images, calls = try_pass(model, 2, instead)
    modules = dict(twin.named_modules())
    with outside_inference_mode(), safe_checkpoints():
        net = _read(type(model).__name__, modules, calls, as_logits(calls[-1][2]), instead)
        tokens = next(inputs[0] for name, inputs, _ in calls if name == net.blocks[0])
        try:
            with (
                recorded_calls({net.blocks[-1]: modules[net.blocks[-1]]}) as last,
                watched_tokens(twin, net, torch.ones_like(tokens[:, :1]).expand(-1, prompts, -1)) as seen,
            ):
                logits = as_logits(twin(images))
            took = last[0][1][0].shape[1] == tokens.shape[1] + prompts and logits.shape[0] == len(images)
            reason = "" if took and seen.activations.shape[1] == net.activations else "they lose them on the way"
        except Exception as error:  # the net's own
            reason = in_one_line(error)
    if reason:
        raise UnsupportedModelError(
            f"The blocks of {type(model).__name__} ('{net.blocks[0]}' to '{net.blocks[-1]}') take {tokens.shape[1]} "
            f"tokens, and not {prompts} more (tables of relative positions, windows, layers over positions?): {reason}."
            f" Use a ViT with absolute positions; or {instead}."
        )
    return net


Calls = list[tuple[str, Any, Any]]


def _read(kind: str, modules: dict[str, nn.Module], calls: Calls, logits: Tensor, instead: str) -> TokenNet:
    heads = [
        (name, inputs[0])
        for name, inputs, output in calls
        if output is logits and inputs and isinstance(inputs[0], Tensor) and inputs[0].ndim == 2
        if hasattr(modules[name], "weight")  # a quantised layer has one too; a softmax at the end has none
    ]
    groups: dict[str, list[tuple[str, Tensor, Tensor]]] = {}
    for name, inputs, output in calls:
        output = output[0] if isinstance(output, tuple) and output else output
        if name and any(True for _ in modules[name].children()) and _are_tokens(inputs, output):
            groups.setdefault(name.rpartition(".")[0], []).append((name, inputs[0], output))
    chains = [group for group in groups.values() if _is_chain(group)]
    if not chains or not heads:
        blocks_missing = "sequence of two or more blocks that take tokens (B, N, D) (a convolutional net, or windows?)"
        head_missing = "single layer that gives the logits of features (B, Z) (two heads, or a layer behind the head?)"
        raise UnsupportedModelError(
            f"{kind} has no {head_missing if chains else blocks_missing}, as vision transformers have. Use a ViT; or "
            f"{instead}."
        )
    blocks = max(chains, key=lambda group: sum(_size(modules[name]) for name, *_ in group))
    tokens = blocks[0][1]
    filters = next((m.weight for m in modules.values() if isinstance(m, nn.Conv2d)), None)
    return TokenNet(
        blocks=tuple(name for name, *_ in blocks),
        norms=tuple(_first_norm(modules, calls, name, inputs) for name, inputs, _ in blocks[1:]),
        head=heads[0][0],
        width=tokens.shape[-1],
        features=heads[0][1].shape[-1],
        prefix=int((tokens[0] == tokens[1]).all(-1).long().cumprod(0).sum()),
        patch_values=tokens.shape[-1] if filters is None else math.prod(filters.shape[1:]),
    )


def _are_tokens(inputs: Any, output: Any) -> bool:
    if not inputs or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
        return False
    return inputs[0].ndim == 3 and len(inputs[0]) == 2 and inputs[0].shape == output.shape


def _is_chain(group: list[tuple[str, Tensor, Tensor]]) -> bool:
    names = [name for name, *_ in group]
    linked = all(torch.equal(before[2], after[1]) for before, after in pairwise(group))
    return len(group) > 1 and len(set(names)) == len(names) and linked


def _first_norm(modules: dict[str, nn.Module], calls: Calls, block: str, tokens: Tensor) -> str:
    for name, inputs, _ in calls:
        if name.startswith(f"{block}.") and is_norm_layer(modules[name]) and inputs:
            return name if inputs[0].shape == tokens.shape and torch.equal(inputs[0], tokens) else ""
    return ""


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
