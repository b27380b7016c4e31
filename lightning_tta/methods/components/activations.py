"""Outputs of layers as they run, and their moments over the images of the source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_tta.errors import DataError, UnsupportedModelError
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components.running_moments import RunningMoments
from lightning_tta.methods.components.source_images import see_source_images


class Moments(NamedTuple):
    """Of the outputs of a layer, over images: mean and unbiased variance, of the shape of one image's output."""

    mean: Tensor
    variance: Tensor


@contextmanager
def watched_outputs(model: nn.Module, names: Sequence[str], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While active, ``see`` gets number and output of each module at its first run, before what follows changes it."""
    seen: set[int] = set()

    def hook(number: int, module: nn.Module, inputs: Any, output: Any) -> None:
        if number not in seen and isinstance(output, Tensor):
            seen.add(number)
            see(number, output)

    handles = [
        model.get_submodule(name).register_forward_hook(partial(hook, number)) for number, name in enumerate(names)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def source_moments(
    method: TTAMethod,
    batches: Iterable[Mapping[str, Tensor]],
    names: Sequence[str],
    taken: Callable[[int, Tensor], Tensor] = lambda number, output: output,
) -> dict[int, Moments]:
    """Moments of the outputs of modules over all source images, at the source weights; asks the host.

    BatchNorm has its source statistics. They do not depend on how the images are put into batches.

    Args:
        method: Of it the net is taken.
        batches: Dicts with ``image`` (B, C, H, W) in [0, 1]; labels are not used.
        names: Of the modules; their outputs have the images first.
        taken: What the moments are of, from a module's number and output.

    Returns:
        By the module's number; those that do not run are left out.

    Raises:
        DataError: If there are fewer than two images, values are not finite, or images differ in size.
        UnsupportedModelError: If an output does not have the images first.
    """
    found: dict[int, RunningMoments] = {}

    @torch.no_grad()
    def see(images: Tensor) -> None:
        def merge(number: int, output: Tensor) -> None:
            if output.ndim < 2 or len(output) != len(images):
                raise UnsupportedModelError(
                    f"'{method.name}' takes moments over the images, which must come first in what a layer returns; "
                    f"'{names[number]}' returns {tuple(output.shape)} for {len(images)} images. Leave it out: use "
                    "layers=[...] with the names of others."
                )
            moments = found.setdefault(number, RunningMoments())
            if moments.count and moments.mean.shape != output.shape[1:]:
                raise DataError(
                    f"'{method.name}' compares positions, so that source images must have one size; got images of "
                    f"{tuple(images.shape[1:])} after others. Resize them."
                )
            moments.add(taken(number, output))

        with watched_outputs(method.model, names, merge):
            method.logits(images)

    with method.at_source():
        see_source_images(method, batches, see, running=nullcontext)
    problem = next((m.problem for m in found.values() if m.problem), "" if found else "0 images")
    if problem:
        raise DataError(
            f"'{method.name}' needs mean and variance of the activations of source images; found {problem}. Give "
            "batches {'image': (B, C, H, W) in [0, 1]} of the training set, 2,000 images or more."
        )
    return {number: Moments(moments.mean, moments.variance) for number, moments in found.items()}
