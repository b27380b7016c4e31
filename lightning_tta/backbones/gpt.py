"""A small causal language model: token ids in, logits of the next token out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_tta.errors import ConfigError, InputError, check_range

_BASE = 10_000.0  # of the angles; RoFormer's


class KeyValueCache:
    """Keys and values of the tokens that a :class:`CharGPT` has read, (B, H, T, D/H) for each layer; grows in place."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    @property
    def length(self) -> int:
        """Number of tokens T in it."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H, T', D/H) of a layer; returns those of all tokens so far."""
        if layer == len(self.layers):
            self.layers.append((keys, values))
        else:
            old_keys, old_values = self.layers[layer]
            self.layers[layer] = (torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2))
        return self.layers[layer]


class CachedOutput(NamedTuple):
    """What a :class:`CharGPT` returns where it keeps keys and values."""

    logits: Tensor
    past_key_values: KeyValueCache


class CausalAttention(nn.Module):
    """Multi-head attention to the present and earlier tokens, with rotary positions.

    Args:
        width: Number of features D.
        heads: Number of heads H; D / H must be even.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], visible: Tensor | None, layer: int, past: KeyValueCache | None
    ) -> Tensor:
        """Features (B, T, D) of features (B, T, D); ``visible``, bool (B, 1, T, S), is causal where it is ``None``."""
        q, k, v = (
            proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        if past is not None:
            k, v = past.extend(layer, k, v)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and an MLP, each added to its input, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), CausalAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], visible: Tensor | None, layer: int, past: KeyValueCache | None
    ) -> Tensor:
        """Features (B, T, D) of features (B, T, D)."""
        x = x + self.attention(self.attention_norm(x), rotation, visible, layer, past)
        out: Tensor = x + self.down_proj(functional.gelu(self.up_proj(self.mlp_norm(x))))
        return out


class CharGPT(nn.Module):
    """A pre-norm Transformer decoder: token ids (B, T) to logits (B, T, V) of the token that comes next.

    Layers have the names of transformers' Llama (``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, ``norm``,
    ``lm_head``), so that options which name layers fit both. Positions are rotary (RoFormer, arXiv 2104.09864): what a
    token sees of another one depends on their distance alone. So a prompt that becomes longer, by spaces or by words in
    place of digits, moves tokens to no position that was never trained, and there is no largest length. With a learned
    vector for each position there would be one.

    Padding may stand on either side. Positions are counted over the tokens that ``attention_mask`` keeps, and padding
    is seen by no other token: a prompt has the same logits alone and padded. The logits of padding mean nothing.

    Args:
        vocab_size: Number of tokens V.
        layers: Number of blocks.
        width: Number of features D.
        heads: Number of heads; each has an even number of features.
        tie_weights: Whether ``lm_head`` has the weights of the embedding. By default it has weights of its own, so that
            an adapted head leaves the embedding alone.

    Attributes:
        config: Arguments that build this architecture again.

    Raises:
        ConfigError: On a number out of range, or heads that do not divide the width.
    """

    def __init__(
        self, vocab_size: int, layers: int = 4, width: int = 128, heads: int = 4, tie_weights: bool = False
    ) -> None:
        super().__init__()
        for name, value in {"vocab_size": vocab_size, "layers": layers, "width": width, "heads": heads}.items():
            check_range(name, value, 1, integer=True)
        if width % (2 * heads):
            raise ConfigError(
                f"width must be a multiple of 2 x heads = {2 * heads}, for rotary positions; got {width}."
            )
        self.vocab_size, self.head_width = vocab_size, width // heads
        self.config: dict[str, Any] = {"vocab_size": vocab_size, "layers": layers, "width": width, "heads": heads}
        self.config["tie_weights"] = tie_weights
        self.embed_tokens = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # GPT-2's: what is added to the stream is smaller, the more is added
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if into_stream else 0.02)
        if tie_weights:
            self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of tokens."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """The head that makes logits of the last features."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        use_cache: bool = False,
    ) -> Tensor | CachedOutput:
        """Logits (B, T, V); with ``use_cache`` also what the next call may start from.

        Args:
            input_ids: Token ids (B, T), int64.
            attention_mask: 1 for tokens, 0 for padding: (B, T), or (B, S + T) after S tokens of earlier calls. By
                default all are tokens.
            past_key_values: What an earlier call has returned: the tokens that it has read come before these. It is
                extended in place.
            use_cache: Whether to return keys and values too.

        Raises:
            InputError: If the shapes do not fit.
        """
        past = KeyValueCache() if use_cache and past_key_values is None else past_key_values
        logits: Tensor = self.lm_head(self.hidden_states(input_ids, attention_mask, past))
        return CachedOutput(logits, past) if use_cache and past is not None else logits

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past: KeyValueCache | None = None
    ) -> Tensor:
        """What ``lm_head`` makes logits of: features (B, T, D) behind the last norm. Arguments as of a call."""
        seen = past.length if past is not None else 0
        if input_ids.ndim != 2 or input_ids.is_floating_point() or not input_ids.numel():
            got = f"{input_ids.dtype} {tuple(input_ids.shape)}"
            raise InputError(f"input_ids must be token ids, int64 (B, T) with B, T >= 1; got {got}.")
        batch, length = input_ids.shape
        if attention_mask is not None and attention_mask.shape != (batch, seen + length):
            raise InputError(
                f"attention_mask must be {(batch, seen + length)}, one for each token"
                f"{' of past and input_ids' if seen else ''}; got {tuple(attention_mask.shape)}."
            )
        x: Tensor = self.embed_tokens(input_ids)
        mask = attention_mask
        if mask is None and seen:
            mask = torch.ones(batch, seen + length, dtype=torch.int64, device=x.device)
        if mask is None:
            positions, visible = torch.arange(length, device=x.device)[None], None
        else:
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, seen:]
            here = torch.arange(seen, seen + length, device=x.device)[:, None]
            there = torch.arange(seen + length, device=x.device)[None]
            # padding sees itself, else its row would have no key, and be NaN
            visible = ((there <= here) & mask.bool()[:, None] | (there == here))[:, None]
        rotation = self._rotation(positions, x.dtype)
        for number, block in enumerate(self.layers):
            x = block(x, rotation, visible, number, past)
        out: Tensor = self.norm(x)
        return out

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B or 1, 1, T, D/2H) of the angles at positions (B or 1, T)."""
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        steps = torch.arange(self.head_width // 2, device=positions.device, dtype=precise)
        angles = positions[:, None, :, None] * _BASE ** (-steps / len(steps))
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair of features (the n-th of the first half, the n-th of the second) by its angle."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
