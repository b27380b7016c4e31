"""Answers of a language model, one token after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_tta.backbones.language import TokenModel
from lightning_tta.backbones.norms import replaced_forwards
from lightning_tta.errors import ConfigError, InputError, check_range, did_you_mean, in_one_line


@dataclass(frozen=True)
class Generation:
    """How tokens are chosen, and when it ends.

    Args:
        max_new_tokens: At most so many a prompt, at least 1.
        stop: Ids that end an answer; they belong to it.
        temperature: Of the draw, >= 0; 0: the likeliest token (greedy).
        seed: Of the draw.
        pad: The id that stands after the end of an answer, with ``attention_mask`` 0.

    Raises:
        ConfigError: If a value is out of range.
    """

    max_new_tokens: int = 64
    stop: Collection[int] = ()
    temperature: float = 0.0
    seed: int = 0
    pad: int = 0

    def __post_init__(self) -> None:
        check_range("max_new_tokens", self.max_new_tokens, 1, integer=True)
        check_range("temperature", self.temperature, 0)
        check_range("seed", self.seed, 0, 2**63 - 1, integer=True)
        check_range("pad", self.pad, 0, integer=True)
        if isinstance(self.stop, (str, bytes)) or not isinstance(self.stop, Collection):
            raise ConfigError(f"stop must be a list of token ids; got {self.stop!r}.")
        for token in self.stop:
            check_range("stop", token, 0, integer=True)


def read_generation(options: dict[str, Any]) -> Generation:
    """Options by name.

    Raises:
        ConfigError: If there is no such option, or a value is out of range.
    """
    known = [field.name for field in fields(Generation)]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"generate() has no option {name!r}.{did_you_mean(name, known)} Its options: {', '.join(known)}."
            )
    return Generation(**options)


def left_padded(ids: Tensor, attention: Tensor, *others: Tensor) -> list[Tensor]:
    """Rows (B, T) with their padding moved to the left, the tokens in their order."""
    order = attention.sort(dim=1, stable=True).indices
    return [tensor.gather(1, order) for tensor in (ids, attention, *others)]


def computed_once(model: nn.Module) -> AbstractContextManager[None]:
    """While active, weights that are computed from others, as LoRA adds to them, are computed at their first use alone.

    For passes between which nothing changes: else each new token computes all of these weights anew. They are held
    until the end, which takes the memory of the layers' weights once more. Torch's own cache for this is global: it
    would also hold the weights of nets in other threads.
    """
    return replaced_forwards(
        {each: _once(each.forward) for each in model.modules() if isinstance(each, ParametrizationList)}
    )


def _once(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    held: list[Tensor] = []

    def forward() -> Tensor:
        if not held:
            held.append(compute())
        return held[0]

    return forward


@torch.no_grad()
def generate(
    model: TokenModel, ids: Tensor, attention: Tensor, how: Generation, decode: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Continue prompts whose padding is on the left.

    Args:
        model: The language model.
        ids: (B, T).
        attention: (B, T), 0 or 1.
        how: How tokens are chosen.
        decode: Logits (B, V) of the next token -> those that the choice is made by.

    Returns:
        The ids, the attention and which tokens are new (bool), each (B, T + N), N at most ``max_new_tokens``.
    """
    generator = torch.Generator(ids.device).manual_seed(how.seed) if how.temperature else None
    stop = torch.tensor(sorted(how.stop), dtype=torch.int64, device=ids.device)
    going = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    new, cache = torch.zeros_like(ids, dtype=torch.bool), None
    for _ in range(how.max_new_tokens):
        given = ids if cache is None else ids[:, -1:]
        try:
            logits, cache = model.run(given, attention, cache, caches=model.can_cache)
        except (IndexError, RuntimeError, ValueError) as error:
            written = int(new.sum(1).max())
            if not written or isinstance(error, torch.OutOfMemoryError):  # the prompts, or the machine
                raise
            prompt = int(attention.sum(1).max()) - written
            raise InputError(
                f"The net cannot go on after {prompt} tokens and {written} new ones: {in_one_line(error)}. Has it "
                f"positions for so many tokens? Give shorter prompts, or max_new_tokens={written} at most."
            ) from error
        logits = decode(logits[:, -1])
        if generator is None:
            token = logits.argmax(-1)
        else:
            p = (logits.float() / how.temperature).softmax(-1)
            token = p.multinomial(1, generator=generator)[:, 0]
        token = torch.where(going, token, how.pad)
        ids = torch.cat([ids, token[:, None]], 1)
        attention = torch.cat([attention, going[:, None].to(attention)], 1)
        new = torch.cat([new, going[:, None]], 1)
        going = going & ~torch.isin(token, stop)
        if not bool(going.any()):
            break
    return ids, attention, new
