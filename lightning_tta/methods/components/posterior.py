"""A Gaussian posterior of a net's weights with a diagonal covariance: fitted by SWAG, and its file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.backbones.weights import read_state_dict
from lightning_tta.errors import DataError, WeightsError
from lightning_tta.files import write_whole
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.gradient import GradientMethod
from lightning_tta.methods.base.optimizers import make_optimizer, masked_step
from lightning_tta.methods.base.task import with_gradients
from lightning_tta.methods.components.source_images import see_source_images

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # of the training; those of PETAL's authors


@dataclass
class Posterior:
    """Mean and variance of each weight, in the order of a method's ``learned``; variances are not negative."""

    means: Sequence[Tensor]
    variances: Sequence[Tensor]


def fit_posterior(method: GradientMethod, batches: Iterable[Mapping[str, Tensor]], epochs: int, lr: float) -> Posterior:
    """Train on the source, from the source weights; mean and variance of the weights at the ends of epochs.

    Of all epochs but the first; the sums are those of squared deviations. SGD on the cross-entropy with the labels,
    BatchNorm at its source statistics. The weights are as before afterwards. Source: SWAG, Maddox et al., NeurIPS 2019,
    arXiv 1902.02476, without its low-rank part.

    Args:
        method: Its ``learned`` weights are trained.
        batches: Dicts with ``image`` (B, C, H, W) in [0, 1] and ``label`` (B,); asked for once an epoch.
        epochs: At least 2.
        lr: Constant learning rate.

    Raises:
        DataError: If there is no image, a label is missing or no class of the net, the batches come once only, or the
            training ends in weights that are not finite.
    """
    if isinstance(batches, Iterator):
        raise DataError(
            f"'{method.name}' sees the source batches {epochs} times, and an iterator gives them once: got a "
            f"{type(batches).__name__}. Give a list of batches, or a DataLoader."
        )
    with outside_inference_mode():
        optimizer = make_optimizer("sgd", method.learned, lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        means = [torch.zeros_like(at_least_float32(tensor.detach())) for tensor in method.learned]
        squares = [torch.zeros_like(mean) for mean in means]
    seen = 0

    def see(images: Tensor, labels: Tensor) -> None:
        nonlocal seen
        with with_gradients(images, images.dtype) as images:
            loss = cross_entropy(at_least_float32(method.logits(images)), labels)
            gradients = method.differentiate(loss)
        masked_step(optimizer, gradients, torch.ones_like(loss, dtype=torch.bool))  # what is not finite is to show
        seen += len(images)

    with method.at_source():
        for epoch in range(epochs):
            see_source_images(method, batches, see, classes=method.split.num_classes, running=nullcontext)
            for mean, square, tensor in zip(means, squares, method.learned, strict=True) if epoch else ():
                apart = tensor.detach() - mean  # Welford's sums
                mean += apart / epoch
                square += apart * (tensor.detach() - mean)
    if not seen or not all(bool(square.isfinite().all()) for square in squares):
        problem = f"weights that are not finite, after training on {seen} images" if seen else "no image"
        raise DataError(
            f"'{method.name}' fits the posterior of the weights on source images; found {problem}. Give batches "
            "{'image': (B, C, H, W) in [0, 1], 'label': (B,)} of the training set, lower the learning rate of that "
            "training, or use method 'cotta', which needs none."
        )
    return Posterior(means, [square / (epochs - 1) for square in squares])


def save_posterior(posterior: Posterior, names: Sequence[str], path: str | Path) -> None:
    """Write ``mean.NAME`` and ``variance.NAME`` of each weight to a file, with torch.save."""
    content = {f"mean.{name}": tensor.cpu() for name, tensor in zip(names, posterior.means, strict=True)}
    content |= {f"variance.{name}": tensor.cpu() for name, tensor in zip(names, posterior.variances, strict=True)}
    write_whole(Path(path), lambda file: torch.save(content, file))


def read_posterior(path: str | Path, shapes: Mapping[str, torch.Size]) -> Posterior:
    """What :func:`save_posterior` has written.

    Args:
        path: Of the file.
        shapes: Of the weights, by name, in order.

    Raises:
        WeightsError: If it is not one of these weights.
    """
    content = read_state_dict(path)
    expected = {f"{kind}.{name}": shape for kind in ("mean", "variance") for name, shape in shapes.items()}
    found = {name: tensor.shape for name, tensor in content.items()}
    odd = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if odd:
        raise WeightsError(
            f"{path} is no posterior of this net's weights: '{odd[0]}' is {found.get(odd[0], 'missing')} in the file "
            f"and {expected.get(odd[0], 'none')} in the net. Give a file that save_posterior() has written for the "
            "same net, or leave the option out and call prepare()."
        )
    means, variances = ([content[f"{kind}.{name}"] for name in shapes] for kind in ("mean", "variance"))
    return Posterior(means, [variance.clamp_min(0) for variance in variances])
