"""Batches of token ids: padded on the left to be continued, on the right to be learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_tta.backbones.tokenizer import Tokenizer
from lightning_tta.data.text.prompts import Prompt
from lightning_tta.errors import ConfigError

TokenBatch = dict[str, Any]


class Encoder:
    """Makes token ids of prompts.

    Args:
        tokenizer: See :class:`~lightning_tta.backbones.tokenizer.Tokenizer`. Without a padding token the token that
            ends a text is taken: padding is masked, whatever it is.
        template: What the net reads, with ``{prompt}`` in it.
        chat: Whether the tokenizer's chat template goes around that.

    Raises:
        ConfigError: If the template lacks ``{prompt}``, or the tokenizer what is needed of it.
    """

    def __init__(self, tokenizer: Tokenizer, template: str = "{prompt}", chat: bool = False) -> None:
        if not isinstance(template, str) or "{prompt}" not in template:
            raise ConfigError(f"template must be a text with {{prompt}} in it; got {template!r}.")
        if not isinstance(tokenizer, Tokenizer):
            raise ConfigError(
                "tokenizer must be the folder of one of transformers, or have encode, decode, pad_token_id, "
                f"bos_token_id and eos_token_id as those have; got {type(tokenizer).__name__}."
            )
        if chat and not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"chat=True needs a tokenizer with a chat template, and {type(tokenizer).__name__} has none. Leave "
                "chat out; template can frame a prompt, such as 'Question: {prompt} Answer:'."
            )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise ConfigError("The tokenizer has neither pad_token_id nor eos_token_id. Set one of them.")
        self.tokenizer, self.template, self.chat, self.pad = tokenizer, template, chat, int(pad)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a prompt in its template, with what begins a text."""
        text = self.template.replace("{prompt}", prompt)
        if not self.chat:
            return list(self.tokenizer.encode(text))
        messages = [{"role": "user", "content": text}]
        framed = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)  # type: ignore[attr-defined]
        return list(self.tokenizer.encode(framed, add_special_tokens=False))

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of an answer and of the end; none where there is no answer."""
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        return [*self.tokenizer.encode(answer, add_special_tokens=False), *end] if answer else []


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (B, T) int64, with padding before each row."""
    ids, mask = pad_right([row[::-1] for row in rows], pad)
    return ids.flip(1), mask.flip(1)


def pad_right(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (B, T) int64, with padding behind each row."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(length) < lengths[:, None]).long()


class AnsweredBatches(Dataset[TokenBatch]):
    """To learn from: {input_ids, attention_mask, answer_mask (B, T), index, domain (B,)}, padded on the right.

    A row is prompt, answer and the token that ends a text; ``answer_mask``, bool, has the last two. ``index`` is a
    position in ``prompts``, ``domain`` the number of a domain.
    """

    def __init__(self, prompts: Sequence[Prompt], domains: Sequence[int], encoder: Encoder) -> None:
        self.prompts, self.domains, self.encoder = prompts, domains, encoder

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitems__(self, positions: Sequence[int]) -> TokenBatch:
        """One batch, already collated."""
        chosen = [self.prompts[position] for position in positions]
        questions = [self.encoder.prompt_ids(prompt.prompt) for prompt in chosen]
        answers = [self.encoder.answer_ids(prompt.answer) for prompt in chosen]
        ids, mask = pad_right([[*q, *a] for q, a in zip(questions, answers, strict=True)], self.encoder.pad)
        starts = torch.tensor([len(question) for question in questions])[:, None]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "answer_mask": mask.bool() & (torch.arange(ids.shape[1]) >= starts),
            **self._labels(positions),
        }

    def _labels(self, positions: Sequence[int]) -> dict[str, Tensor]:
        numbers = [self.domains[position] for position in positions]
        return {"index": torch.tensor(positions), "domain": torch.tensor(numbers)}

    def __getitem__(self, position: int) -> TokenBatch:
        return {name: values[0] for name, values in self.__getitems__([position]).items()}


class PromptBatches(AnsweredBatches):
    """To be answered: {input_ids, attention_mask (B, T), index, domain (B,)}, padded on the left.

    For whoever checks the answers there are, as lists of text, ``prompt``, ``answer`` and ``checker``.
    """

    def __getitems__(self, positions: Sequence[int]) -> TokenBatch:
        """One batch, already collated."""
        chosen = [self.prompts[position] for position in positions]
        ids, mask = pad_left([self.encoder.prompt_ids(prompt.prompt) for prompt in chosen], self.encoder.pad)
        texts = {name: [getattr(prompt, name) for prompt in chosen] for name in ("prompt", "answer", "checker")}
        return {"input_ids": ids, "attention_mask": mask, **self._labels(positions), **texts}
