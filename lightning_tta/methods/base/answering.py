"""Prompts are answered and adapted on, in either order, as one batch or one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_tta.errors import InputError, check_choice
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.tokens import EMPTY

When = Literal["before", "after"]
PROMPT = ("input_ids", "attention_mask")


def answer(
    method: TTAMethod,
    prompts: Mapping[str, Tensor],
    *,
    when: When = "before",
    reset: Literal["never", "batch", "prompt"] = "never",
    **generation: Any,
) -> dict[str, Tensor]:
    """Answer prompts and adapt on them.

    Args:
        method: Over tokens.
        prompts: ``input_ids`` and ``attention_mask`` (B, T); anything else in it is left out.
        when: ``before``: answer, then a step on prompt and answer, or on what the task's ``loss_on`` names of them.
            ``after``: a step on the prompts, then answer; with ``loss_on: generated`` on prompts with a first answer,
            which is thrown away. Of a method that keeps nothing for the next batch, as SLOT, both are the same.
        reset: When the method returns to the source: ``never`` (online); before the ``batch`` (in chunks); or before
            each ``prompt``, which is then adapted on and answered alone (episodic).
        **generation: Of :class:`~lightning_tta.methods.base.generation.Generation`: ``max_new_tokens``, ``stop``,
            ``temperature``, ``seed`` (of prompt i, one by one, ``seed + i``), ``pad``.

    Returns:
        ``input_ids``, ``attention_mask`` and ``generated`` (B, T + N), as of
        :meth:`~lightning_tta.methods.base.method.TTAMethod.generate`, padding on the left of the prompts.

    Raises:
        ConfigError: If the net is no language model, or an option is wrong.
        InputError: If the batch is none of prompts.
    """
    check_choice("reset", reset, ("never", "batch", "prompt"))
    if reset != "prompt":
        if reset == "batch":
            method.reset()
        return answer_once(method, prompts, when=when, **generation)[0]
    rows, seed = [], generation.pop("seed", 0)
    for number, row in enumerate(one_by_one(prompts)):
        method.reset()
        rows.append(answer_once(method, row, when=when, seed=seed + number, **generation)[0])
    return _stacked(rows, generation.get("pad", 0))


def answer_once(
    method: TTAMethod, prompts: Mapping[str, Tensor], *, when: When, **generation: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """:func:`answer` of one batch, without a reset; and the logits (B, T + N, V) of the net that wrote the answers."""
    check_choice("when", when, ("before", "after"))
    plain = {name: prompts[name] for name in PROMPT if name in prompts}
    if when == "before":
        answered = method.generate(plain, **generation)
        return answered, method(answered)
    on_draft = getattr(method.task, "loss_on", "") == "generated"
    method(method.generate(plain, **generation) if on_draft else plain)
    answered = method.generate(plain, **generation)
    return answered, method.predict(answered)  # type: ignore[arg-type]  # of tokens, a dict


def one_by_one(prompts: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Each prompt alone, without padding.

    Raises:
        InputError: If there are no ``input_ids`` (B, T), the mask has another shape, or a prompt has no tokens.
    """
    ids = prompts.get("input_ids")
    attention = prompts.get("attention_mask", None if ids is None else torch.ones_like(ids))
    if (
        not isinstance(ids, Tensor)
        or ids.ndim != 2
        or not isinstance(attention, Tensor)
        or attention.shape != ids.shape
    ):
        raise InputError("Not a batch of prompts: give a dict with 'input_ids' and 'attention_mask', both (B, T).")
    if not bool(attention.bool().any(1).all()):
        raise InputError(EMPTY)
    for row, there in zip(ids, attention.bool(), strict=True):
        yield {"input_ids": row[there][None], "attention_mask": torch.ones_like(row[there])[None]}


def _stacked(rows: Sequence[Mapping[str, Tensor]], pad: int) -> dict[str, Tensor]:
    """Batches of one row as one batch, filled up on the left."""
    length = max(row["input_ids"].shape[1] for row in rows)
    fill = {"input_ids": pad, "attention_mask": 0, "generated": 0}
    return {
        name: torch.cat(
            [torch.nn.functional.pad(row[name], (length - row[name].shape[1], 0), value=value) for row in rows]
        )
        for name, value in fill.items()
    }
