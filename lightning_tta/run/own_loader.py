"""A user's own loader: what its batches may hold beside images, what can be known of it, and whether it repeats."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_tta.errors import ConfigError, DataError
from lightning_tta.files import json_digest
from lightning_tta.run.summary import StreamSummary

KINDS = {
    "index": "whole numbers, or names of files",
    "domain": "whole numbers from 0, or names, or one for the whole batch",
    "label": "whole numbers from 0, -1 where it is not known",
}
"""What a batch may say of its images, one value for each."""


def index_of(batch: Mapping[str, Any], count: int, seen: int) -> tuple[Tensor, list[str]]:
    """Numbers (B,) of a batch's images, counted along the stream where there are none, and names of their files.

    ``seen``: so many images came before.

    Raises:
        DataError: If ``index`` is neither, or not of this length.
    """
    value = batch.get("index")
    numbers = None if value is None else _numbers("index", value, count)
    if numbers is not None:
        return numbers, []
    return torch.arange(seen, seen + count), [] if value is None else [str(name) for name in value]


def domain_of(batch: Mapping[str, Any], count: int, summary: StreamSummary, loader: int | None = None) -> Tensor:
    """Numbers (B,) of the images' domains in the account of the stream, which learns new ones as they come.

    Domains without a name are called ``domain N``; where batches have none, each of several loaders is one.

    Raises:
        DataError: If ``domain`` is neither numbers nor names, or not of this length.
    """
    value = batch.get("domain")
    if value is None:
        number = 0 if loader is None else summary.domain_number(f"loader {loader}")
        return torch.full((count,), number)
    if isinstance(value, (str, int)) or (isinstance(value, Tensor) and not value.ndim):
        value = [value.item() if isinstance(value, Tensor) else value] * count
    numbers = _numbers("domain", value, count)
    names = value if numbers is None else numbers.tolist()
    table = {
        name: summary.domain_number(name if numbers is None else f"domain {name}") for name in dict.fromkeys(names)
    }
    return torch.tensor([table[name] for name in names], dtype=torch.int64)


def labels_of(batch: Mapping[str, Any], count: int) -> Tensor:
    """Labels (B,), -1 where they are not known.

    Raises:
        DataError: If ``label`` is anything but whole numbers, one for each image.
    """
    if batch.get("label") is None:
        return torch.full((count,), -1)
    numbers = _numbers("label", batch["label"], count)
    if numbers is None:
        raise _refusal("label", batch["label"], count)
    return numbers


def _numbers(key: str, value: Any, count: int) -> Tensor | None:
    """Whole numbers int64 (B,) on the CPU, or ``None`` of names."""
    if isinstance(value, (list, tuple)) and len(value) == count:
        if all(isinstance(entry, str) for entry in value):
            return None
        if all(isinstance(entry, (int, Tensor)) and not isinstance(entry, bool) for entry in value):
            value = torch.as_tensor(value)
    whole = isinstance(value, Tensor) and not value.is_floating_point() and value.dtype not in (torch.bool,)
    if not whole or value.shape != (count,) or (key == "domain" and count and int(value.min()) < 0):
        raise _refusal(key, value, count)
    return value.detach().cpu().long()  # type: ignore[no-any-return]


def _refusal(key: str, value: Any, count: int) -> DataError:
    kind = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"
    return DataError(f"batch['{key}'] of {count} images must be {KINDS[key]}, one for each image; got {kind[:200]}.")


def describe_loaders(source: Any) -> str:
    """A digest of what can be known of a user's loaders without reading them: types, lengths, batch sizes, samplers."""
    if isinstance(source, LightningDataModule):
        return json_digest({"module": _type(source), "options": repr(dict(source.hparams))})
    loaders = source if isinstance(source, (list, tuple)) else [source]
    return json_digest({str(number): _describe(loader) for number, loader in enumerate(loaders)})


def _describe(loader: Any) -> dict[str, Any]:
    known: dict[str, Any] = {"type": _type(loader), "length": _length(loader)}
    if isinstance(loader, DataLoader):
        known |= {
            "data": _type(loader.dataset),
            "images": _length(loader.dataset),
            "batch_size": loader.batch_size,
            "sampler": _type(loader.sampler),
            "batch_sampler": _type(loader.batch_sampler),
            "drop_last": loader.drop_last,
        }
    return known


def _type(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except TypeError:
        return None


class BatchTrail:
    """A digest of the batches that came: a loader that is read again for a continued run must give the same ones."""

    def __init__(self) -> None:
        self.digest, self.batches = "", 0

    def add(self, batch: Any) -> None:
        """Take in a batch: what it says of its images, and without an index a few of their pixels."""
        values = batch if isinstance(batch, Mapping) else {}
        content = hashlib.sha256(self.digest.encode())
        image = values.get("image")
        for key in ("index", "domain", "label"):
            value = values.get(key)
            content.update(repr(value.tolist() if isinstance(value, Tensor) else value).encode())
        if isinstance(image, Tensor):
            content.update(repr(tuple(image.shape)).encode())
            if values.get("index") is None and image.ndim == 4:
                step = max(1, min(image.shape[-2:]) // 8)
                pixels = image[:, :, ::step, ::step].detach().double().cpu().contiguous()
                content.update(pixels.numpy().tobytes())
        self.digest, self.batches = content.hexdigest(), self.batches + 1

    def check(self, saved: Sequence[Any], *, ended: bool = False) -> None:
        """Compare with what was saved, once as many batches have come, or the loader has ``ended``.

        Raises:
            ConfigError: If they were others.
        """
        batches, digest = saved
        if (ended and self.batches < batches) or (self.batches == batches and self.digest != digest):
            how = f"ended after {self.batches}" if ended else "gave others now"
            raise ConfigError(
                f"The loader cannot be continued: {batches} batches were done before the run was cut off; it {how}. "
                "Give it a fixed order, size and batch size (shuffle=False), or start anew with --state.resume restart "
                "(in Python StateKeeper(resume='restart'))."
            )
