"""How much the source's predictions depend on each weight: the Fisher information, from images without labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_tta.errors import DataError
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.gradient import GradientMethod
from lightning_tta.methods.base.task import explained, float_dtype, with_gradients


def fisher_information(method: GradientMethod, batches: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    """Mean over batches of the squared gradient of the cross-entropy with the net's own arg-max, at the source.

    The gradient is that of a batch's mean, as in EATA (arXiv 2204.02610): larger batches give smaller values.

    Args:
        method: Gradients are by what its optimizers hold, of its ``infer``.
        batches: Dicts with ``image`` (B, C, H, W) in [0, 1]; labels are not used.

    Raises:
        DataError: If there is no image, a batch is no such dict, or a gradient is not finite.
        InputError: If images are none, or the net refuses them.
        UnsupportedModelError: If no gradient reaches what is to learn.
    """
    sums = [torch.zeros_like(tensor, requires_grad=False) for tensor in method.learned]
    count = 0
    with method.computing(sums[0].device), method.at_source(), method.normalizing(), method.passes():
        for batch in batches:
            if not isinstance(batch, Mapping) or not isinstance(batch.get("image"), Tensor):
                kind = f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
                raise DataError(f"Source batches must be dicts with 'image' (B, C, H, W) in [0, 1]; got {kind}.")
            images = batch["image"].to(sums[0].device)
            usable = method.task.usable(images)
            images = images if bool(usable.all()) else images[usable.to(images.device)]
            if len(images):
                with (
                    explained(method.model, images, has_run=method.has_run),
                    with_gradients(images, float_dtype(method.model)) as images,
                ):
                    logits = at_least_float32(method.infer(images))
                    loss = cross_entropy(logits, logits.argmax(-1))
                    gradients = method.differentiate(loss)
                pairs = [(t, g) for t, g in zip(sums, gradients, strict=True) if g is not None]
                totals, present = [t for t, _ in pairs], [g for _, g in pairs]
                torch._foreach_add_(totals, torch._foreach_mul(present, present))
                count += 1
    if not count or not bool(torch.cat([total.flatten() for total in sums]).isfinite().all()):
        problem = f"gradients that are not finite, in {count} batches" if count else "no image"
        raise DataError(
            f"{type(method).__name__}'s Fisher information needs finite gradients of source images; found {problem}. "
            "Give batches {'image': (B, C, H, W) in [0, 1]} of the training set, or use method 'eta', which needs none."
        )
    return list(torch._foreach_div(sums, count))
