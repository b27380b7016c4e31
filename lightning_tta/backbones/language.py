"""Causal language models: token ids in, logits of the next token out, whoever wrote the net."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.backbones.copying import copy_net
from lightning_tta.backbones.dense import DenseModel
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import UnsupportedModelError

IDS, ATTENTION, COUNTS = 0, 1, 2
"""Rows of a packed batch (B, 3, T): token ids, which of them are no padding, which positions count in the loss."""


def takes_tokens(net: nn.Module) -> bool:
    """Whether a net is a language model: its forward has an argument ``input_ids``."""
    return isinstance(net, TokenModel) or "input_ids" in _arguments(net)


def _arguments(net: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments of a net's forward; of a net in a wrapper of peft, those of the net."""
    while callable(getattr(net, "get_base_model", None)):
        inner = net.get_base_model()  # type: ignore[operator]
        if inner is net:
            break
        net = inner
    try:
        return inspect.signature(net.forward).parameters
    except ValueError:
        return {}


class TokenModel(DenseModel):
    """A causal language model that takes one packed tensor, for methods.

    The net is any module whose ``forward(input_ids, attention_mask)`` returns logits (B, T, V), as a tensor, as the
    first of a tuple, or as the attribute ``logits``: transformers' causal models among them. Where it takes
    ``position_ids``, it is given positions that do not count padding, so that padding on the left changes nothing.

    Args:
        net: The language model.
        **settings: See :class:`~lightning_tta.methods.base.tokens.Tokens`.

    Raises:
        UnsupportedModelError: If the net takes no ``input_ids``.
    """

    kind = "tokens"

    def __init__(self, net: nn.Module, **settings: Any) -> None:
        super().__init__(net, **settings)
        self._takes = frozenset(_arguments(net))
        if "input_ids" not in self._takes:
            raise UnsupportedModelError(
                f"{type(net).__name__} takes no argument 'input_ids', so it is no language model. Wrap it in a module "
                "whose forward(input_ids, attention_mask) returns logits (B, T, V); or leave task='tokens' out."
            )

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens that the net has embeddings for; ``None``: not known."""
        getter = getattr(self.net, "get_input_embeddings", None)
        layer = getter() if callable(getter) else None
        if not isinstance(layer, nn.Embedding):
            layer = next((module for module in self.net.modules() if isinstance(module, nn.Embedding)), None)
        return None if layer is None else layer.num_embeddings

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, T, V) of a packed batch (B, 3, T), int64."""
        logits, _ = self.run(x[:, IDS], x[:, ATTENTION])
        return logits

    def run(self, ids: Tensor, attention: Tensor, cache: Any = None, *, caches: bool = False) -> tuple[Tensor, Any]:
        """Logits, and what the net keeps of its keys and values.

        Args:
            ids: Token ids (B, T); with a cache the new ones alone.
            attention: Which tokens are no padding (B, S), those in the cache included.
            cache: What an earlier pass has returned.
            caches: Whether to ask the net for its keys and values; ``None`` comes back from a net that has none.

        Raises:
            UnsupportedModelError: If no logits (B, T, V) come back.
        """
        options: dict[str, Any] = {}
        if "attention_mask" in self._takes:
            options["attention_mask"] = attention
        if "position_ids" in self._takes:
            options["position_ids"] = (attention.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        if "use_cache" in self._takes:
            options["use_cache"] = caches
        if cache is not None:
            options["past_key_values"] = cache
        output = self.net(input_ids=ids, **options)
        logits = getattr(output, "logits", output)
        logits = logits[0] if isinstance(logits, (tuple, list)) and logits else logits
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
            what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UnsupportedModelError(
                f"A language model must return logits (B, T, V), one row a token; {type(self.net).__name__} returned "
                f"{what} for ids {tuple(ids.shape)}. Give a causal language model, with its head."
            )
        return logits, getattr(output, "past_key_values", None) if caches else None

    @property
    def can_cache(self) -> bool:
        """Whether the net keeps keys and values for the tokens that follow."""
        return {"use_cache", "past_key_values"} <= self._takes

    @torch.no_grad()
    def sees_later_tokens(self) -> bool:
        """Whether logits depend on tokens that come later, as of a masked language model: seen in a pass of a copy.

        ``False`` too where the net cannot take the four tokens that are tried; then its first batch says why.
        """
        try:
            twin = copy_net(self, (*self.parameters(), *self.buffers())).eval()
            x = self.examples(2)[0][:, :, :4].clone()
            x[1, IDS, -1] = max((self.vocabulary or 2) - 1, 0)
            with outside_inference_mode():
                one, other = twin(x)[:, :-1].double()
        except Exception:
            return False
        rounding = 1e-2 if next(self.parameters()).dtype in (torch.float16, torch.bfloat16) else 1e-5
        return bool((one - other).abs().max() > rounding * one.abs().max())

    def examples(self, number: int) -> list[Tensor]:
        """Eight tokens each, the first of the vocabulary."""
        like = next(self.net.parameters())
        x = torch.zeros(number, 3, 8, dtype=torch.int64, device=like.device)
        x[:, ATTENTION:] = 1
        return [x]
