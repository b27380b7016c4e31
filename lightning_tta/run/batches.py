"""How the batches of a stream, and of the source, come to the method, and which are refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.images import Batch
from lightning_tta.data.text.prompt_data import PromptData
from lightning_tta.errors import ConfigError, DataError, InputError, NotPreparedError, check_choice, check_range
from lightning_tta.guard.watch import Watch
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.progress import with_progress
from lightning_tta.run import own_loader
from lightning_tta.run.stream_run import RunCallback, StreamRun
from lightning_tta.run.summary import BatchRecord

FEW_SOURCE_IMAGES = 32


class StreamInput(RunCallback):
    """How batches come to the method. On the command line ``--input.on_bad_batch skip`` and so on.

    Args:
        on_bad_batch: What a batch does that no method or not this net can take (empty, wrong channels or size, 0-255):
            ``raise`` the :class:`~lightning_tta.errors.InputError`, or ``skip`` it: no adaptation, -1 as predictions,
            counted in the report and left out of the accuracy. Of a file that cannot be read (damaged, missing, too
            large), ``raise`` the :class:`~lightning_tta.errors.DataError` that names it, or ``skip`` that one image:
            the others of its batch go on. Images with NaN are no bad batch: see the methods.
        channels_last: Lay images out in memory with their channels last: the same predictions up to rounding;
            convolutions are often faster, but a net that takes ``view`` of its activations refuses.
        source_images: How many training images, or prompts, a method that needs source data sees before the stream; and
            how many validation images, at most, the monitors of a guard.
    """

    def __init__(
        self, on_bad_batch: Literal["raise", "skip"] = "raise", channels_last: bool = False, source_images: int = 2000
    ) -> None:
        check_choice("on_bad_batch", on_bad_batch, ("raise", "skip"))
        check_range("source_images", source_images, 1, integer=True)
        self.skips = on_bad_batch == "skip"
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.source_images = source_images

    def identity(self) -> dict[str, Any]:
        """A run in another memory layout, or after other source images, predicts otherwise."""
        return {"source_images": self.source_images, "memory_format": str(self.memory_format)}


def images_of(batch: Any) -> Tensor:
    """The images of a stream's batch; the method checks their values.

    Raises:
        InputError: If there is no batch (B, C, H, W), B >= 1, of floating-point images under ``image``.
    """
    if not isinstance(batch, dict) or "image" not in batch:
        raise InputError(f"Batches must be dicts with an 'image' (B, C, H, W); got a {type(batch).__name__}.")
    images = batch["image"]
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point() or not images.numel():
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"Not a batch of images: {got}. Give (B, C, H, W), floating point, in [0, 1], B >= 1.")
    return images


@dataclass(frozen=True)
class Labels:
    """What a batch says of its images, one for each: numbers, domains, labels (B,) on the CPU, names of files."""

    index: Tensor
    domain: Tensor
    label: Tensor
    files: list[str]


def labels_of(batch: Mapping[str, Any], count: int, run: StreamRun, loader: int | None) -> Labels:
    """What a batch of ``count`` images says of them; of a user's own loader it is checked.

    Raises:
        DataError: If a value is of no allowed kind.
    """
    data = run.data
    index, files = own_loader.index_of(batch, count, run.seen)
    label = own_loader.labels_of(batch, count)
    if data is None:
        return Labels(index, own_loader.domain_of(batch, count, run.summary, loader), label, files)
    domain = batch["domain"].cpu() if "domain" in batch else torch.zeros(count, dtype=torch.int64)
    return Labels(index, domain, label, [data.file_of(number) for number in index.tolist()])


def refused_batch(batch: Any, error: InputError, run: StreamRun, loader: int | None) -> BatchRecord:
    """The record of a batch that cannot be used: as many images as ``index`` or else ``image`` has, or none."""
    batch = batch if isinstance(batch, dict) else {}
    image = batch.get("image")
    count = len(image) if isinstance(image, Tensor) and image.ndim == 4 else 0
    with suppress(TypeError):
        count = len(batch["index"]) if "index" in batch else count
    try:
        labels = labels_of(batch, count, run, loader)
    except (DataError, KeyError):  # nothing of the batch is right
        number = torch.zeros(count, dtype=torch.int64)
        labels = Labels(torch.arange(count) + run.seen, number, number - 1, [])
    unknown = torch.full((count,), -1)
    rows = (torch.zeros(count, 0), labels.index, labels.domain, unknown)
    return BatchRecord(*rows, adapted=False, error=str(error), files=labels.files)


def damage_of(
    batch: Mapping[str, Any], data: ShiftedDataModule | None, skips: bool
) -> tuple[Tensor, str] | tuple[None, str]:
    """Which images of a data module's batch could not be read, bool (B,) on the CPU, and why; ``None`` where all could.

    Raises:
        DataError: For the first of them, unless it is skipped.
        InputError: If they are all the batch.
    """
    if data is None or "damaged" not in batch:
        return None, ""
    damaged: Tensor = batch["damaged"].cpu()
    problem = data.problem_of(int(batch["index"].cpu()[damaged][0]))
    if not skips:
        raise or_skip(problem)
    if bool(damaged.all()):
        raise InputError(str(problem))
    return damaged, str(problem)


def or_skip(problem: DataError) -> DataError:
    """The error of a damaged file in a run, with the way to go on without it."""
    return DataError(f"{problem} To go on without such images: --input.on_bad_batch skip.")


def spread(logits: Tensor, damaged: Tensor | None) -> Tensor:
    """Logits (B, ...) of a whole batch from those of the images that could be read; zeros for the others."""
    if damaged is None:
        return logits
    whole = logits.new_zeros(len(damaged), *logits.shape[1:])
    whole[~damaged.to(logits.device)] = logits
    return whole


def labels_among(labels: Tensor, classes: Sequence[int] | None) -> Tensor:
    """Labels (B,) of the whole net as positions in ``classes``, those it was cut to; -1, not known, stays.

    Raises:
        DataError: If a label is not among them.
    """
    if classes is None:
        return labels
    table = torch.full((max(int(labels.max()), *classes) + 2,), -2)
    table[list(classes)] = torch.arange(len(classes))
    table[-1] = -1
    positions = table[labels]
    if bool((positions == -2).any()):
        raise DataError(
            f"An image has the label {int(labels[positions == -2][0])}, which is not among the {len(classes)} classes "
            "that the net was cut to. Choose classes that the data has, or leave model.classes out."
        )
    return positions


def warn_of_size(
    images: Tensor,
    preprocessing: Mapping[str, Any],
    net: Mapping[str, Any],
    resized: int | None = None,
    crop: tuple[int, int] | None = None,
) -> None:
    """Warn where images (B, C, H, W) are not of the size that published weights were trained on, or cut from another.

    A net of another family that was trained here may have been trained on any size: then there is no warning.

    Args:
        images: A batch.
        preprocessing: Of the net.
        net: What is known of it.
        resized: Shorter side of what the images are the middle of; ``None``: not known.
        crop: The same, and the side of the middle, where the method itself cuts it out.
    """
    expected, size = preprocessing.get("input_size"), list(images.shape[1:])
    published = net.get("pretrained") or str(net["name"]).startswith("cifar/")
    if expected is None or not published:
        return
    if crop is not None:
        resized, size = crop[0], [size[0], crop[1], crop[1]]
    if list(expected) != size:
        warnings.warn(
            f"Images are {size} (C, H, W), the weights' own preprocessing has {list(expected)} (crop "
            f"{preprocessing.get('crop_pct')}, {preprocessing.get('interpolation')}): accuracy may suffer. Set the "
            "data's image_size (or the method's crop) unless this is meant.",
            stacklevel=3,
        )
        return
    wanted = round(min(size[1:]) / (preprocessing.get("crop_pct") or 1.0))
    if resized is not None and abs(resized - wanted) > 1:  # some round down
        warnings.warn(
            f"Images are resized to {resized} pixels before the middle {size[1:]} is cut out, in the weights' own "
            f"preprocessing to {wanted}: accuracy may suffer. Set the data's resize (or the method's crop) "
            f"to {wanted} unless this is meant.",
            stacklevel=3,
        )


def show_source(method: TTAMethod, data: Any, count: int, device: torch.device) -> None:
    """Show ``count`` images of the source to a method that needs them, and as many to monitors.

    They are training images; validation images for monitors, and for a method that needs images on which the net was
    not trained. Where the data module has none of these, training images take their place, and a warning says so.

    Raises:
        NotPreparedError: If ``data`` has none to show.
    """
    watch: Any = method if isinstance(method, Watch) else None
    for_monitors = watch is not None and any(monitor.needs_source for monitor in watch.monitors.values())
    if not isinstance(data, ShiftedDataModule):
        who = type(method if watch is None else watch.method).__name__
        who += " with its monitors" * for_monitors
        raise NotPreparedError(
            f"{who} must see source data before the stream. Predict with a data module that has "
            "training images, or call method.prepare(source_batches) first."
        )
    held_out: _OnDevice | None = None
    if for_monitors or method.needs_held_out:
        held_out = _OnDevice(data.source_batches(count, batch_size=64, split="val"), device)
        if not len(held_out):
            held_out = None
            warnings.warn(
                "The data have no validation images, so what needs images that the net was not trained on (monitors, "
                "poem, gate) sees training images. The net is surer of those than of any others: an alarm of a shift "
                "may be false. Hold some out (num_val).",
                stacklevel=2,
            )
    if held_out is not None and method.needs_held_out:
        source = held_out
    else:
        try:
            source = _OnDevice(data.source_batches(count, batch_size=64), device)  # EATA's Fisher depends on the size
        except (DataError, ConfigError) as error:
            who = type(method if watch is None else watch.method).__name__
            raise NotPreparedError(
                f"{who} must see training images before the stream, and the data has none: {error} Or take a method, "
                "or options, that need none ('eta' in the place of 'eata')."
            ) from error
    if source.images < min(count, FEW_SOURCE_IMAGES):
        warnings.warn(
            f"The source has only {source.images} images to show, of the {count} that were asked for: what a method "
            "estimates from them (Fisher information, moments, prototypes) is mostly noise. Give more training images.",
            stacklevel=2,
        )
    more = (held_out,) if for_monitors and held_out is not None else ()
    with torch.inference_mode(False), torch.enable_grad():
        method.prepare(source, *more)


def show_source_prompts(method: TTAMethod, data: Any, count: int, device: torch.device) -> None:
    """Show ``count`` training prompts with their answers to a method over tokens that needs source data.

    Raises:
        NotPreparedError: If ``data`` has none to show.
    """
    who = f"{type(method).__name__} must see source data before the stream."
    advice = (
        "Or set the method's options so that it needs none (fisher_alpha=0), or call method.prepare(batches) first."
    )
    if not isinstance(data, PromptData):
        raise NotPreparedError(f"{who} Predict with PromptData that has training prompts. {advice}")
    try:
        batches = data.source_batches(count)
    except ConfigError as error:
        raise NotPreparedError(f"{who} {error} {advice}") from error
    with torch.inference_mode(False), torch.enable_grad():
        method.prepare(_OnDevice(batches, device, "prompts"))


class _OnDevice(Iterable[Batch]):
    """Batches that come to a device one at a time, with progress; can be iterated more than once."""

    def __init__(self, batches: DataLoader[Any], device: torch.device, what: str = "images") -> None:
        self.batches, self.device, self.what = batches, device, what

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def images(self) -> int:
        """How many."""
        assert self.batches.batch_sampler is not None
        return sum(len(batch) for batch in self.batches.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        numbers = with_progress(len(self), f"Looking at source {self.what}")
        for _, batch in zip(numbers, self.batches, strict=True):
            yield {name: value.to(self.device) for name, value in batch.items()}
