"""How much the source's predictions depend on each weight: the Fisher information, from images without labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import DataError
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.gradient import GradientMethod
from lightning_tta.methods.base.task import with_gradients
from lightning_tta.methods.components.source_images import see_source_images


def fisher_information(method: GradientMethod, batches: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    """Mean over batches of the squared gradient of the cross-entropy with the net's own arg-max, at the source.

    The gradient is that of a batch's mean, as in EATA (arXiv 2204.02610): larger batches give smaller values. Of
    several predictions a sample, pixels or tokens, the mean is over all of a batch that count.

    Args:
        method: Gradients are by what its optimizers hold.
        batches: Dicts with ``image`` (B, C, H, W) in [0, 1], or, over tokens, with ``input_ids`` and
            ``attention_mask`` (B, T); labels are not used.

    Raises:
        DataError: If there is no image, a batch is no such dict, or a gradient is not finite.
        InputError: If images are none, or the net refuses them.
        UnsupportedModelError: If no gradient reaches what is to learn.
    """
    with outside_inference_mode():
        sums = [torch.zeros_like(tensor, requires_grad=False) for tensor in method.learned]
    count = 0

    def see(images: Tensor) -> None:
        nonlocal count
        rows = method.task.rows(images)
        if rows is not None and not bool(rows.any()):
            return
        with with_gradients(images, images.dtype) as images:
            gradients = method.differentiate(_loss(method, images, rows))
        pairs = [(t, g) for t, g in zip(sums, gradients, strict=True) if g is not None]
        totals, present = [t for t, _ in pairs], [g for _, g in pairs]
        torch._foreach_add_(totals, torch._foreach_mul(present, present))
        count += 1

    with method.at_source():
        see_source_images(method, batches, see, running=method.normalizing)
    if not count or not bool(torch.cat([total.flatten() for total in sums]).isfinite().all()):
        what = "token whose prediction counts" if method.task.kind == "tokens" else "image"
        problem = f"gradients that are not finite, in {count} batches" if count else f"no {what}"
        raise DataError(
            f"{type(method).__name__}'s Fisher information needs finite gradients of source data; found {problem}. "
            f"Give {method.task.source_batch} of the training set, or use method 'eta', which needs none."
        )
    return list(torch._foreach_div(sums, count))


def _loss(method: GradientMethod, x: Tensor, rows: Tensor | None) -> Tensor:
    """Mean cross-entropy of a batch with the arg-max, of all predictions that count."""
    if rows is None:
        logits = at_least_float32(method.infer(x)).flatten(0, -2)
        return cross_entropy(logits, logits.argmax(-1))
    method.rows = rows
    try:
        _, losses = method.judged(x, _surprise)
    finally:
        method.rows = None
    return losses.sum() / rows.sum()


def _surprise(logits: Tensor) -> Tensor:
    """Cross-entropy (N,) of logits (N, K) with their arg-max."""
    logits = at_least_float32(logits)
    return cross_entropy(logits, logits.argmax(-1), reduction="none")


def quantile_bound(values: Sequence[Tensor], share: float) -> Tensor:
    """The entry, of all tensors together, that this share of them lies below; 0-dimensional, by a selection, no sort.

    With N entries, sorted from 0, it is the one at ``share * (N - 1)``, rounded up: those below it are those below the
    interpolated quantile, those above it those above.

    Args:
        values: Of one dtype, N >= 1 entries in all.
        share: In [0, 1].
    """
    entries = torch.cat([value.flatten() for value in values])
    place = math.ceil(share * (entries.numel() - 1))
    return entries.kthvalue(place + 1).values
