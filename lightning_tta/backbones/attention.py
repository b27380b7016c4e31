"""What the first token of a transformer attends to, and passes of fewer tokens: by what the net computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_tta.backbones.passes import outside_inference_mode, safe_checkpoints
from lightning_tta.backbones.split import as_logits, recorded_calls, try_pass
from lightning_tta.backbones.tokens import TokenNet, find_tokens
from lightning_tta.errors import UnsupportedModelError, in_one_line
from lightning_tta.losses import at_least_float32

_INSTEAD = "use a method for any net with norm layers, such as 'sar' or 'deyo'"
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class _Watch(TorchFunctionMode):
    """Notes the first row of each attention while ``active``; changes nothing.

    A fused attention has no weights to look at: its first row is computed again, from queries and keys.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Tensor] = []
        self.active = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.active:
            row = _first_row(func, args, kwargs, result)
            if row is not None:
                self.rows.append(row)
        return result


@torch.no_grad()
def _first_row(func: Any, args: Any, kwargs: Any, result: Any) -> Tensor | None:
    """The first row (B, N) of the attention that a function has computed; ``None``: it is no attention."""
    if func is F.scaled_dot_product_attention:
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        return _row(given["query"], given["key"], given.get("attn_mask"), given.get("scale"))
    if func in _SOFTMAX and result.ndim in (3, 4) and result.shape[-1] == result.shape[-2]:
        return _mean_over_heads(result[..., 0, :])
    if func is F.multi_head_attention_forward:
        names = ("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias")
        given = dict(zip(names, args, strict=False)) | kwargs
        weight, bias, heads = given["in_proj_weight"], given["in_proj_bias"], given["num_heads"]
        if weight is None or given["query"].ndim != 3:
            return None
        inputs = [given[name].transpose(0, 1) for name in names[:2]]  # (B, N, D)
        biases = (None, None) if bias is None else bias.chunk(3)
        projected = (F.linear(x, w, b) for x, w, b in zip(inputs, weight.chunk(3), biases, strict=False))
        query, key = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in projected)
        return _row(query, key, None, None)
    return None


def _row(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor | None:
    """The first row (B, N) of the attention of queries and keys (B, [heads,] N, D)."""
    if query.ndim not in (3, 4) or query.shape[:-1] != key.shape[:-1] or mask is not None:
        return None
    with torch.autocast(query.device.type, enabled=False):
        first, key = at_least_float32(query[..., :1, :]), at_least_float32(key)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        return _mean_over_heads((first @ key.transpose(-1, -2) * scale).softmax(-1).squeeze(-2))


def _mean_over_heads(row: Tensor) -> Tensor:
    row = at_least_float32(row.detach())
    return row.mean(1) if row.ndim == 3 else row


@contextmanager
def watched_attention(model: nn.Module, net: TokenNet) -> Iterator[list[Tensor]]:
    """While active, a pass of the net shows the attention of the first token in its last block.

    In the list is of each attention there the first row, the mean over its heads, (B, N), without gradient.
    """
    watch = _Watch()

    def begin(module: nn.Module, inputs: Any) -> None:
        watch.active = True

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        watch.active = False

    last = model.get_submodule(net.blocks[-1])
    with ExitStack() as stack:
        stack.callback(last.register_forward_pre_hook(begin).remove)
        stack.callback(last.register_forward_hook(end).remove)
        stack.enter_context(watch)
        yield watch.rows


@contextmanager
def chosen_tokens(model: nn.Module, net: TokenNet, patches: Tensor) -> Iterator[None]:
    """While active, the blocks get the tokens before those of patches, and some of these.

    Args:
        model: The net.
        net: Of :func:`find_attention`.
        patches: Which, (B, M), positions among the patches of each image.
    """

    def choose(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens, rest = inputs[0][:, : net.prefix], inputs[0][:, net.prefix :]
        chosen = rest.gather(1, patches[..., None].expand(-1, -1, rest.shape[-1]))
        return torch.cat([tokens, chosen], 1), *inputs[1:]

    handle = model.get_submodule(net.blocks[0]).register_forward_pre_hook(choose)
    try:
        with safe_checkpoints(recompute=False):  # once the hook is gone, a block would get all tokens
            yield
    finally:
        handle.remove()


@torch.no_grad()
def find_attention(model: nn.Module) -> TokenNet:
    """Find the blocks of a net whose class token's attention shows and that take any number of patches.

    Raises:
        UnsupportedModelError: If there are no such blocks, no class token, or no attention is seen.
    """
    net = find_tokens(model, prompts=0, instead=_INSTEAD)
    kind = type(model).__name__
    if not net.has_class_token:
        raise UnsupportedModelError(
            f"{kind} has no class token, whose attention says which patches count: all tokens come from the image. Use "
            f"a ViT with a class token; or {_INSTEAD}."
        )
    twin, images, calls = try_pass(model, 2, _INSTEAD)
    number = next(inputs[0].shape[1] for name, inputs, _ in calls if name == net.blocks[0])
    patches = number - net.prefix
    with outside_inference_mode(), safe_checkpoints():
        with watched_attention(twin, net) as rows:
            twin(images)
        if not rows or rows[0].shape != (2, number):
            raise UnsupportedModelError(
                f"The last block of {kind}, '{net.blocks[-1]}', shows no attention over its {number} tokens: it calls "
                "neither scaled_dot_product_attention without a mask, nor a softmax over (B, heads, N, N), nor "
                f"torch's MultiheadAttention. Use a ViT with plain attention; or {_INSTEAD}."
            )
        fewer = max(1, patches // 2)
        places = torch.arange(fewer, device=images.device).expand(2, -1)
        reason = ""
        try:
            last = {net.blocks[-1]: twin.get_submodule(net.blocks[-1])}
            with chosen_tokens(twin, net, places), recorded_calls(last) as ends:
                as_logits(twin(images))
            if ends[0][1][0].shape[1] != net.prefix + fewer:
                reason = "they get them back on the way"
        except Exception as error:  # the net's own
            reason = in_one_line(error)
    if reason:
        raise UnsupportedModelError(
            f"The blocks of {kind} ('{net.blocks[0]}' to '{net.blocks[-1]}') take {number} tokens, and not fewer "
            f"(relative or rotary positions, windows?): {reason}. Use a ViT with absolute positions; or {_INSTEAD}."
        )
    return net
