"""Token ids as a method's input: one packed tensor, and which positions count in the loss."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_tta.backbones.language import ATTENTION, COUNTS, IDS, TokenModel
from lightning_tta.errors import ConfigError, DataError, InputError, check_range
from lightning_tta.methods.base.task import found_in
from lightning_tta.metrics import row_measures

_ADVICE = (
    "Give a dict with 'input_ids' (B, T), whole numbers, 'attention_mask' (B, T), 1 for a token and 0 for padding, "
    "and, where it is known, 'generated' (B, T), true for the tokens that the net wrote itself."
)
PROMPTS_DIFFER = "prompts differ in length from one batch to the next"
"""Why no step over tokens is captured."""
EMPTY = "A row of attention_mask is all 0: a prompt without tokens. Leave the empty prompt out."
LOSS_ON = ("auto", "generated", "prompt", "all")


class Tokens:
    """Batches of token ids, as dicts; logits (B, T, V).

    Position t counts in the loss if token t + 1 is one that ``loss_on`` names, and neither is padding: the prediction
    at t is that of this token. The mean over a batch is the mean over all positions that count.

    Args:
        model: The wrapped language model.
        loss_on: ``generated``: tokens that the net wrote itself; ``prompt``: the others; ``all``; ``first:N``: the
            first N of those that ``auto`` names; ``auto``: ``generated`` where the batch says which these are, else
            ``all``.
        chunk: How many positions go through the head at once in the loss, which bounds the memory for large
            vocabularies.

    Raises:
        ConfigError: If an option is none of these.
    """

    kind = "tokens"
    in_chunks = True
    additions: frozenset[str] = frozenset()
    source_batch = "dicts with 'input_ids' and 'attention_mask' (B, T)"

    def __init__(self, model: TokenModel, loss_on: str = "auto", chunk: int = 64) -> None:
        check_range("chunk", chunk, 1, integer=True)
        first = re.fullmatch(r"first:([1-9]\d*)", loss_on) if isinstance(loss_on, str) else None
        if loss_on not in LOSS_ON and first is None:
            raise ConfigError(f"loss_on must be one of {', '.join(LOSS_ON)}, or 'first:N'; got {loss_on!r}.")
        self.loss_on, self.chunk = loss_on, chunk
        self._first = None if first is None else int(first[1])
        self._vocabulary = model.vocabulary

    def take_in(self, x: Any) -> Tensor:
        """A packed batch (B, 3, T) of a dict, see :class:`~lightning_tta.backbones.language.TokenModel`.

        Raises:
            InputError: If this is no batch of tokens, an id is not in the vocabulary, or ``loss_on`` needs to know
                which tokens were generated and the batch does not say.
        """
        if isinstance(x, Tensor) and x.ndim == 3 and x.shape[1] == 3 and x.dtype == torch.int64:
            return x  # packed already
        if not isinstance(x, Mapping) and hasattr(x, "keys"):  # a BatchEncoding
            x = dict(x)
        if not isinstance(x, Mapping) or not isinstance(x.get("input_ids"), Tensor):
            what = f"keys {', '.join(map(repr, x))}" if isinstance(x, Mapping) else type(x).__name__
            raise InputError(f"Not a batch of tokens: {what}. {_ADVICE}")
        ids = x["input_ids"]
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool or not ids.numel():
            raise InputError(f"Not a batch of tokens: input_ids are {ids.dtype} {tuple(ids.shape)}. {_ADVICE}")
        ids = ids.long()
        check_mask_names(x)
        attention = _mask(x, "attention_mask", ids, torch.ones_like(ids))
        low, high, shortest = torch.stack([ids.min(), ids.max(), attention.sum(1).min()]).tolist()
        if low < 0 or (self._vocabulary is not None and high >= self._vocabulary):
            raise InputError(
                f"Token ids must be in [0, {self._vocabulary - 1 if self._vocabulary else '...'}]; this batch has ids "
                f"from {low} to {high}. Is the tokenizer that of the net?"
            )
        if not shortest:
            raise InputError(EMPTY)
        given = "generated" in x
        if not given and self.loss_on == "generated":
            raise InputError(
                "loss_on='generated' needs batch['generated'], which tokens the net wrote itself: generate them first, "
                "method.generate(batch); or adapt on what is there: task={'kind': 'tokens', 'loss_on': 'all'}."
            )
        generated = _mask(x, "generated", ids, torch.zeros_like(ids)).bool()
        return torch.stack([ids, attention, self._counts(attention.bool(), generated, given).long()], 1)

    def take_in_source(self, batch: Any, device: torch.device) -> Tensor:
        """A packed batch of texts; ``answer_mask`` of training batches says what the net is to write: ``generated``.

        Raises:
            DataError: If it is no batch of tokens.
        """
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise DataError(f"Source batches must be {self.source_batch}; got {found_in(batch)}.")
        names = {"input_ids": "input_ids", "attention_mask": "attention_mask", "answer_mask": "generated"}
        names |= {"generated": "generated"}
        given = {new: batch[name] for name, new in names.items() if isinstance(batch.get(name), Tensor)}
        return self.take_in({name: value.to(device) for name, value in given.items()})

    def _counts(self, attention: Tensor, generated: Tensor, given: bool) -> Tensor:
        """Which positions count (B, T)."""
        kind = self.loss_on if self._first is None else "auto"
        if kind == "prompt":
            named = ~generated
        elif kind == "all" or not given:
            named = torch.ones_like(generated)
        else:
            named = generated
        targets = torch.zeros_like(attention)
        targets[:, :-1] = named[:, 1:] & attention[:, 1:] & attention[:, :-1]
        return targets if self._first is None else targets & (targets.long().cumsum(1) <= self._first)

    def usable(self, x: Tensor) -> Tensor:
        """All prompts: of one without a position that counts nothing is learned."""
        return torch.ones(len(x), dtype=torch.bool)

    def stand_in(self, x: Tensor) -> Tensor:
        """One prompt of the first token of the vocabulary, none of whose positions counts."""
        sample = x.new_zeros((1, *x.shape[1:]))
        sample[:, ATTENTION] = 1
        return sample

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Ids stay what they are."""
        return x

    def logits(self, output: object) -> Tensor:
        """What the wrapped net returns."""
        assert isinstance(output, Tensor)
        return output

    def answer(self, logits: Tensor) -> Tensor:
        """In the net's precision: in float32 a large vocabulary takes twice the memory."""
        return logits

    def measures(self, logits: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Those of the positions that count."""
        return row_measures(logits, self.rows(x), self.chunk)

    def rows(self, x: Tensor) -> Tensor:
        """Which positions count (B, T), bool."""
        return x[:, COUNTS].bool()

    def ids(self, x: Tensor) -> Tensor:
        """Token ids (B, T) of a packed batch."""
        return x[:, IDS]

    def attention(self, x: Tensor) -> Tensor:
        """Which tokens of a packed batch are no padding (B, T), 0 or 1."""
        return x[:, ATTENTION]


def check_mask_names(batch: Mapping[str, Any]) -> None:
    """Refuse a mask whose name is misspelled: padding would be read, or the prompt be learned from.

    Raises:
        InputError: If a name is nearly that of a mask that is not there.
    """
    for name in ("attention_mask", "generated"):
        close = difflib.get_close_matches(name, [key for key in batch if isinstance(key, str)], n=1, cutoff=0.85)
        if name not in batch and close:
            raise InputError(f"The batch has {close[0]!r}: did you mean {name!r}? {_ADVICE}")


def _mask(batch: Mapping[str, Any], name: str, ids: Tensor, default: Tensor) -> Tensor:
    """A mask of a batch (B, T), 0 or 1."""
    value = batch.get(name)
    if value is None:
        return default
    if not isinstance(value, Tensor) or value.shape != ids.shape:
        what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{name} must be a tensor like input_ids, {tuple(ids.shape)}; got {what}. {_ADVICE}")
    value = value.to(ids.device)
    if not bool(((value == 0) | (value == 1)).all()):
        raise InputError(f"{name} must hold 0 and 1 alone. {_ADVICE}")
    return value.long()
