"""The base of the data modules: source splits, shifted domains and the test stream."""

import hashlib
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_tta.data import streams
from lightning_tta.data.corruptions.corrupt import (
    CLEAN,
    SETS,
    FunctionSet,
    check_computable,
    expand_domains,
    function_set_id,
    gradual,
    split_severity,
)
from lightning_tta.data.corruptions.published import REFUSAL
from lightning_tta.data.images import (
    Batch,
    CorruptedImages,
    Images,
    SelectedImages,
    StreamBatches,
    StreamSampler,
    estimated_bytes,
    keep_in_memory,
)
from lightning_tta.data.samplers import subset, validation_batches
from lightning_tta.data.sharing import Sharing, loaded_batches
from lightning_tta.data.source import SourceData
from lightning_tta.data.storage.cache import default_folder, on_disk
from lightning_tta.data.storage.memo import MEMO
from lightning_tta.data.streams import ResetPolicy, Stream, StreamKind
from lightning_tta.errors import ConfigError, check_choice, check_range

Charge = Literal["none", "passes", "seconds"]
BLIND = ":blind_spots"


class ShiftedDataModule(SourceData):
    """Source data for training, and a stream of shifted test data.

    A leaf sets ``name`` and implements :meth:`clean`, :attr:`class_names`, :meth:`digest`, and if it has them
    :meth:`augmentation`, :meth:`natural_names`, :meth:`natural_domain` and :meth:`published`.

    Train, val and test batches are {image, label, index}; the stream, from :meth:`predict_dataloader`, has {image,
    index, domain, label}: ``image`` float32 (B, C, H, W) in [0, 1]; ``index`` int64, unique in the whole stream;
    ``domain`` int64, a position in :attr:`stream_domains`; ``label`` int64, -1 where it is not known. The pixels of an
    image depend on neither the order nor the batch size nor the labels nor the number of workers.

    A stream is sequential and never dealt out sample by sample; ``sharing`` says how several processes share it.

    Args:
        batch_size: Samples in a batch of the stream, at least 1.
        train_batch_size: Samples in a batch of the train, val and test loaders, at least 1.
        stream: ``iid``, ``continual``, ``gradual``, ``mixed``, ``label_shift``, ``correlated`` or ``blind_spot``: see
            :func:`~lightning_tta.data.streams.build_stream`. ``gradual`` takes each corruption through severities
            1 to 5 and back; ``blind_spot`` adapts on what the source gets wrong in a domain, then predicts all of the
            domain without adapting.
        order_seed: Seed of the order of the stream.
        dirichlet: Concentration of the labels over time, above 0, for ``label_shift`` (by default sorted by class) and
            ``correlated`` (by default 0.1).
        charge: Whether a slow method misses samples (arXiv 2304.04795): a batch comes every ``interval``, counted in
            ``passes`` (a forward pass is 1, a backward pass 2) or in ``seconds``; while the method is at work on one,
            the others are predicted by the net as it is. ``none``: the stream waits.
        interval: Time between two batches, in forward passes or seconds, above 0.
        domains: The stream's domains: names of corruptions, natural domains, ``clean``, or the groups ``reported`` and
            ``held_out``; ``fog@5`` is fog at severity 5. By default the natural domains where the data has some, else
            the reported corruptions.
        severity: Severity of the corruptions, 1 to 5.
        function_set: ``builtin``, ``imagenet_c``, or ``published`` where the data has files of corrupted images.
        corruption_seed: Seed of the corruptions.
        num_images: At most this many images of each domain, the same ones in each corruption; a fixed random subset,
            smaller ones inside larger ones. By default all.
        num_workers: Worker processes of each loader.
        augment: Whether the training images are augmented.
        val_domains: Corruptions to validate under, named as in ``domains``: validation batches are then of one
            shifted domain each and carry ``domain``, a position in ``val_domain_names``. By default clean images.
        cache_dir: Folder that keeps corrupted images for later runs; by default ``$LIGHTNING_TTA_CACHE``, else
            ``~/.cache/lightning_tta``; ``none`` keeps them in memory.
        cache_limit_gb: If all corrupted domains together would take more than this, they are made when asked for.

    Raises:
        ConfigError: On any wrong value, before data is read.
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        train_batch_size: int = 128,
        stream: StreamKind = "iid",
        order_seed: int = 0,
        dirichlet: float | None = None,
        charge: Charge = "none",
        interval: float = 1.0,
        domains: list[str] | None = None,
        severity: int = 3,
        function_set: FunctionSet = "builtin",
        corruption_seed: int = 0,
        num_images: int | None = None,
        num_workers: int = 0,
        augment: bool = True,
        val_domains: list[str] | None = None,
        cache_dir: str | None = None,
        cache_limit_gb: float = 20.0,
    ) -> None:
        super().__init__(train_batch_size, num_workers, augment)
        check_range("batch_size", batch_size, 1, integer=True)
        check_range("order_seed", order_seed, 0, integer=True)
        check_range("corruption_seed", corruption_seed, 0, integer=True)
        if num_images is not None:
            check_range("num_images", num_images, 1, integer=True)
        check_range("severity", severity, 1, 5, integer=True)
        check_range("interval", interval, 0, low_open=True)
        check_range("cache_limit_gb", cache_limit_gb, 0)
        check_choice("stream", stream, streams.STREAM_KINDS)
        check_choice("charge", charge, ("none", "passes", "seconds"))
        check_choice("function_set", function_set, tuple(SETS))
        self.batch_size, self.stream_kind, self.order_seed = batch_size, stream, order_seed
        self.dirichlet = streams.concentration_of(stream, dirichlet)
        self.charge, self.interval = None if charge == "none" else charge, float(interval)
        self.num_images, self.severity, self.corruption_seed = num_images, severity, corruption_seed
        self.function_set: str = function_set
        self.cache = None if cache_dir == "none" else Path(cache_dir) if cache_dir else default_folder()
        self.cache_limit = cache_limit_gb * 1e9
        names = expand_domains(domains, self.natural_names(), function_set)
        self.domain_names = gradual(names) if stream == "gradual" else names
        self.val_domain_names = expand_domains(val_domains, [], function_set) if val_domains is not None else []
        self._corrupted = [n for n in self.domain_names if n != CLEAN and n not in self.natural_names()]
        own = function_set == "published" and type(self).published is not ShiftedDataModule.published
        check_computable([*([] if own else self._corrupted), *self.val_domain_names], function_set)
        self._blind_spots: list[Tensor] | None = None
        self.first_batch = 0  # where predict_dataloader starts: above 0 when a run is continued
        self.sharing = Sharing()

    # What a leaf provides.

    def natural_names(self) -> list[str]:
        """Names of the domains that are not made by a corruption."""
        return []

    def natural_domain(self, name: str) -> Images:
        """The images of a natural domain."""
        raise ConfigError(f"{type(self).__name__} has no natural domain {name!r}. Use corruptions, or 'clean'.")

    def published(self, corruption: str, severity: int) -> Images:
        """Test images under a corruption, as somebody published them, in the order of ``clean("test")``."""
        raise ConfigError(REFUSAL)

    # What the base makes of it.

    @property
    def default_reset(self) -> ResetPolicy:
        """When a method starts anew on this kind of stream, unless told otherwise."""
        return streams.default_reset(self.stream_kind)

    @cached_property
    def domain_images(self) -> list[Images]:
        """The images of each of ``domain_names``."""
        key = f"{self.memo_key()}|{self.num_images}"
        made = [name for name in self._corrupted if self.function_set != "published"]
        base: Images | None = None
        ids = torch.zeros(0)
        if made or CLEAN in self.domain_names:
            test = self.clean("test")
            ids = subset(len(test), self.num_images)
            chosen = SelectedImages(test, ids)
            fits = estimated_bytes(chosen) <= MEMO.limit
            base = keep_in_memory(chosen, (key, CLEAN), "Reading test images") if fits else chosen
        domains: list[Images] = []
        for name in self.domain_names:
            if name in self.natural_names():
                images = self.natural_domain(name)
                images = SelectedImages(images, subset(len(images), self.num_images))
                fits = estimated_bytes(images) * len(self.domain_names) <= MEMO.limit
                domains.append(keep_in_memory(images, (key, "natural", name), f"Reading {name}") if fits else images)
            elif name != CLEAN and self.function_set == "published":
                corruption, severity = split_severity(name)
                images = self.published(corruption, severity or self.severity)
                domains.append(SelectedImages(images, subset(len(images), self.num_images)))
            else:
                assert base is not None
                domains.append(self._shifted(base, ids, name, key, len(made)))
        return domains

    def _shifted(self, base: Images, ids: Tensor, name: str, key: str, count: int) -> Images:
        """One of ``count`` corruptions of some images: on disk, in memory, or made when asked for."""
        if name == CLEAN:
            return base
        corruption, severity = split_severity(name)
        how = (corruption, severity or self.severity, self.corruption_seed, self.function_set)
        images = CorruptedImages(base, ids, *how)
        needed, text = count * estimated_bytes(base), f"Corrupting images: {name}"
        if self.cache is not None and needed <= self.cache_limit:
            numbers = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
            return on_disk(images, f"{key}|{numbers}|{function_set_id(self.function_set)}|{how}", self.cache, text)
        if self.cache is not None and name == self._corrupted[0]:
            warnings.warn(
                f"{count} corrupted domains take {needed / 1e9:.0f} GB, more than cache_limit_gb="
                f"{self.cache_limit / 1e9:.0f}: they are made anew in each run. Raise it, or lower num_images.",
                stacklevel=2,
            )
        return keep_in_memory(images, (key, *how), text) if needed <= MEMO.limit else images

    def set_blind_spots(self, wrong: Sequence[Tensor]) -> None:
        """Say which images of each of ``domain_names`` the source gets wrong, bool (N_d,): for ``blind_spot``."""
        self._blind_spots = [mask.nonzero()[:, 0] for mask in wrong]
        self.__dict__.pop("stream_parts", None)
        self.__dict__.pop("stream", None)

    @cached_property
    def stream_parts(self) -> list[tuple[str, Images]]:
        """Name and images of each domain of the stream."""
        parts = list(zip(self.domain_names, self.domain_images, strict=True))
        if self.stream_kind != "blind_spot":
            return parts
        if self._blind_spots is None:
            raise ConfigError(
                "stream='blind_spot' needs to know what the source gets wrong: predict with TestTimeAdaptation, which "
                "finds it out, or call set_blind_spots."
            )
        both: list[tuple[str, Images]] = []
        for (name, images), wrong in zip(parts, self._blind_spots, strict=True):
            both += [(f"{name}{BLIND}", SelectedImages(images, wrong)), (name, images)]
        return both

    @property
    def stream_domains(self) -> list[str]:
        """Names of the domains in the order of the stream's ``domain`` numbers."""
        return [name for name, _ in self.stream_parts]

    @property
    def frozen_domains(self) -> list[str]:
        """The domains on which nothing adapts: all but the blind spots of a ``blind_spot`` stream."""
        return list(self.domain_names) if self.stream_kind == "blind_spot" else []

    @cached_property
    def stream(self) -> Stream:
        """The batches of the stream, as sample positions."""
        labels = [images.labels for _, images in self.stream_parts]
        size = self.batch_size * self.sharing.joined
        return streams.build_stream(
            labels, kind=self.stream_kind, batch_size=size, seed=self.order_seed, dirichlet=self.dirichlet
        )

    def setup(self, stage: str) -> None:
        """Read and corrupt what the stage needs; the loaders do it themselves when this was not called."""
        if stage == "predict":
            _ = self.domain_images if self.stream_kind == "blind_spot" else self.stream

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation images: clean, or shifted with ``val_domains``."""
        if not self.val_domain_names:
            return super().val_dataloader()
        images = self._split("val")
        ids, key = torch.arange(len(images)), f"{self.memo_key()}|val"
        domains = [self._shifted(images, ids, name, key, len(self.val_domain_names)) for name in self.val_domain_names]
        batches = validation_batches([part.labels for part in domains], self.train_batch_size)
        return self._stream_loader(domains, batches)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The stream, or this process's share."""
        return self._stream_loader([part for _, part in self.stream_parts], loaded_batches(self)[self.first_batch :])

    def _stream_loader(self, domains: list[Images], batches: Sequence[list[int]]) -> DataLoader[Batch]:
        return self._batches(StreamBatches(domains), batch_sampler=StreamSampler(list(batches)))

    def describe(self) -> dict[str, Any]:
        """What the stream consists of, in primitives, for the protocol."""
        counts = [len(images) for _, images in self.stream_parts]
        here = [name for name in self._corrupted if split_severity(name)[1] is None]
        return {
            "data": self.name,
            "data_digest": self.digest(),
            "split": "test",
            "domains": self.stream_domains,
            "images": sum(counts),
            "images_per_domain": counts,
            "function_set": function_set_id(self.function_set) if self._corrupted else None,
            "severity": self.severity if here else None,
            "corruption_seed": self.corruption_seed if self._corrupted else None,
            "stream": self.stream_kind,
            "order_seed": self.order_seed,
            "batch_size": self.batch_size,
            "dirichlet": self.dirichlet,
            "charge": self.charge,
            "interval": self.interval if self.charge else None,
        }
