"""The base of the data modules: source splits, shifted domains and the test stream."""

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_tta.data import samplers, streams
from lightning_tta.data.augmentations import Augmentation
from lightning_tta.data.corruptions.corrupt import (
    CLEAN,
    SETS,
    FunctionSetName,
    check_computable,
    corruption_names,
    function_set_id,
)
from lightning_tta.data.domain_names import (
    BLIND,
    POLLUTION,
    VISIT,
    check_domain_names,
    expand_domains,
    gradual,
    split_severity,
)
from lightning_tta.data.images import (
    Batch,
    CorruptedImages,
    Images,
    JoinedImages,
    KeptImages,
    LabelledBatches,
    SelectedImages,
    StreamBatches,
    StreamSampler,
    already_collated,
)
from lightning_tta.data.pollution import Polluters, shape_of
from lightning_tta.data.sharing import Sharing
from lightning_tta.data.splits import subset
from lightning_tta.data.storage.cache import CACHE, default_folder
from lightning_tta.data.streams import Stream, StreamKind
from lightning_tta.errors import ConfigError, DataError, check_choice, check_range

Split = Literal["train", "val", "test"]
Charge = Literal["none", "passes", "seconds"]


class ShiftedDataModule(LightningDataModule, ABC):
    """Source data for training, and a stream of shifted test data.

    A leaf sets ``name`` and implements :meth:`clean`, :attr:`class_names`, :meth:`digest_content`, and if it has them
    :meth:`augmentation`, :meth:`natural_names`, :meth:`natural_domain`, and :meth:`published` with ``has_published``.

    Train, val and test batches are {image, label, index}; the stream, from :meth:`predict_dataloader`, has {image,
    index, domain, label}: ``image`` float32 (B, C, H, W) in [0, 1]; ``index`` int64, unique in the whole stream;
    ``domain`` int64, a position in :attr:`stream_domains`; ``label`` int64, -1 where it is not known. The pixels of an
    image depend on neither the order nor the batch size nor the labels nor the number of workers.

    A stream is sequential and never dealt out sample by sample; ``sharing`` says how several processes share it.

    A file that cannot be read raises a :class:`~lightning_tta.errors.DataError` that names it. A predict run sets
    ``marks_damaged``: then its image is all NaN, and the batch has ``damaged``, bool (B,).

    Args:
        batch_size: Samples in a batch of the stream, at least 1.
        train_batch_size: Samples in a batch of the train, val and test loaders, at least 1.
        stream: ``iid``, ``continual``, ``gradual``, ``mixed``, ``label_shift``, ``correlated``, ``blind_spot``,
            ``ordered``, ``recurring``, ``markov`` or ``polluted``: see ``lightning-tta streams`` and
            :func:`~lightning_tta.data.streams.build_stream`. ``gradual`` takes each corruption through severities 1 to
            5 and back; ``blind_spot`` adapts on what the source gets wrong in a domain, then predicts all of the domain
            without adapting.
        order_seed: Seed of the order of the stream.
        dirichlet: Concentration of the labels over time, above 0, for ``label_shift`` (by default sorted by class),
            ``correlated`` (by default 0.1), ``recurring`` and ``polluted`` (by default shuffled).
        visits: How often a ``recurring`` stream goes through all domains, at least 1 (default 20, as PeTTA, arXiv
            2311.18193): each time the same images, in a new order. Visit 3 of fog is the domain ``fog:visit_3``.
        class_correlation: Of a ``markov`` stream (UniTTA, arXiv 2407.20080): the chance that the next image is of the
            same class, 0 to below 1 (default 0.95); of the most frequent class where they are imbalanced. Below
            1/classes it counts as that: independent draws.
        domain_correlation: The same of the domain, 0 to 1 (default 0.85). 1: one domain after the other.
        class_imbalance: How many times as often the first class comes as the last in a ``markov`` stream, at least 1
            (default 1; UniTTA 10); the others lie between, geometrically.
        domain_imbalance: The same of the domains, in the order of ``domains`` (default 1; UniTTA 5).
        pollution: Share of polluting images in a ``polluted`` stream, above 0, up to 0.95 (default 0.5, as many as real
            ones, as SoTTA, NeurIPS 2023). The method sees them; they have no label and count in no measure.
        polluters: What they are: ``uniform`` or ``gaussian`` noise, made anew for each domain, or a folder of images,
            which are resized. By default ``uniform``.
        pollution_first: Whether they all come before the real images of their domain (ZeroSiam's test after noise
            alone); by default at random places.
        charge: Whether a slow method misses samples (arXiv 2304.04795): a batch comes every ``interval``, counted in
            ``passes`` (a forward pass is 1, a backward pass 2) or in ``seconds``; while the method is at work on one,
            the others are predicted by the net as it is. ``none``: the stream waits.
        interval: Time between two batches, in forward passes or seconds, above 0.
        domains: The stream's domains: names of corruptions, natural domains, ``clean``, or the groups ``reported`` and
            ``held_out``; ``fog@5`` is fog at severity 5. By default the natural domains where the data has some, else
            the images as they are where they are a user's own (folders, arrays), else the reported corruptions.
        severity: Severity of the corruptions, 1 to 5.
        function_set: ``builtin``, ``imagenet_c``, or ``published`` where the data has files of corrupted images.
        corruption_seed: Seed of the corruptions.
        num_images: At most this many images of each domain, the same ones in each corruption; a fixed random subset,
            smaller ones inside larger ones. By default all.
        subset_seed: Another seed leaves another subset: with a net that is fixed, runs are independent where their
            images are.
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

    task: ClassVar[str] = "images"
    """What a net predicts of an image: ``images``, one class; ``pixels``, a mask; ``regression``, values."""
    has_published: ClassVar[bool] = False
    """Whether a leaf reads files of corrupted images: see :meth:`published`."""
    reads_ahead: ClassVar[bool] = True
    """Whether natural domains are read before the stream, and kept in memory where they fit."""
    has_labels: bool = True
    """Whether any image has a label: without, nothing is said of accuracy."""
    own_images: ClassVar[bool] = False
    """Whether the images are a user's own: without ``domains`` they come as they are, and nothing is corrupted."""

    def __init__(
        self,
        *,
        batch_size: int = 64,
        train_batch_size: int = 128,
        stream: StreamKind = "iid",
        order_seed: int = 0,
        dirichlet: float | None = None,
        visits: int | None = None,
        class_correlation: float | None = None,
        domain_correlation: float | None = None,
        class_imbalance: float | None = None,
        domain_imbalance: float | None = None,
        pollution: float | None = None,
        polluters: str | None = None,
        pollution_first: bool | None = None,
        charge: Charge = "none",
        interval: float = 1.0,
        domains: list[str] | None = None,
        severity: int = 3,
        function_set: FunctionSetName = "builtin",
        corruption_seed: int = 0,
        num_images: int | None = None,
        subset_seed: int = 0,
        num_workers: int = 0,
        augment: bool = True,
        val_domains: list[str] | None = None,
        cache_dir: str | None = None,
        cache_limit_gb: float = 20.0,
    ) -> None:
        super().__init__()
        check_range("batch_size", batch_size, 1, integer=True)
        check_range("train_batch_size", train_batch_size, 1, integer=True)
        if num_images is not None:
            check_range("num_images", num_images, 1, integer=True)
        check_range("order_seed", order_seed, 0, integer=True)
        check_range("corruption_seed", corruption_seed, 0, integer=True)
        check_range("subset_seed", subset_seed, 0, integer=True)
        check_range("num_workers", num_workers, 0, integer=True)
        check_range("severity", severity, 1, 5, integer=True)
        check_range("interval", interval, 0, low_open=True)
        check_range("cache_limit_gb", cache_limit_gb, 0)
        check_choice("stream", stream, streams.STREAM_KINDS)
        check_choice("charge", charge, ("none", "passes", "seconds"))
        check_choice("function_set", function_set, tuple(SETS))
        self.batch_size, self.train_batch_size, self.num_workers = batch_size, train_batch_size, num_workers
        self.augment, self.stream_kind, self.order_seed = augment, stream, order_seed
        given = {"dirichlet": dirichlet, "visits": visits, "pollution": pollution, "polluters": polluters}
        given |= {"class_correlation": class_correlation, "domain_correlation": domain_correlation}
        given |= {"pollution_first": pollution_first}
        given |= {"class_imbalance": class_imbalance, "domain_imbalance": domain_imbalance}
        self.stream_options = streams.options_of(stream, given)
        self.charge, self.interval = None if charge == "none" else charge, float(interval)
        self.num_images, self.severity, self.corruption_seed = num_images, severity, corruption_seed
        self.subset_seed = subset_seed if num_images is not None else 0
        self.function_set: str = function_set
        check_domain_names(self.natural_names())
        self.cache = None if cache_dir == "none" else Path(cache_dir) if cache_dir else default_folder()
        self.cache_limit = cache_limit_gb * 1e9
        natural = self.natural_names()
        default = natural or ([CLEAN] if self.own_images else corruption_names(function_set))
        names = expand_domains(default if domains is None else domains, natural, function_set)
        if default == [CLEAN] and domains is None and (severity, function_set) != (3, "builtin"):
            raise ConfigError(
                f"severity={severity} and function_set={function_set!r} have nothing to act on: by default the images "
                "come as they are. Name corruptions, such as --data.domains [reported] for all of the set."
            )
        self.domain_names = gradual(names) if stream == "gradual" else names
        self.polluters = Polluters(self.stream_options["polluters"]) if stream == "polluted" else None
        self.val_domain_names = expand_domains(val_domains, [], function_set) if val_domains is not None else []
        shifted = [name for name in self.domain_names if name != CLEAN and name not in self.natural_names()]
        is_published = function_set == "published" and self.has_published
        self.published_names, self.corrupted_names = (shifted, []) if is_published else ([], shifted)
        check_computable([*self.corrupted_names, *self.val_domain_names], function_set)
        self.sharing, self.first_batch = Sharing(), 0  # changed by `share` and `start_at` only
        self.marks_damaged = False
        self._blind_spots: list[Tensor] | None = None
        self._stream: Stream | None = None
        self._joined_images: JoinedImages | None = None

    @abstractmethod
    def clean(self, split: Split) -> Images:
        """The unshifted images of a split."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the labels; empty where they are not known."""

    @abstractmethod
    def digest_content(self) -> Iterable[bytes]:
        """What tells whether two data modules have the same test images; the digest is a hash of it."""

    def cache_key(self) -> str:
        """What tells the images of this data from any others in the cache: by default the class and the digest."""
        return f"{type(self).__name__}|{self.digest()}"

    def augmentation(self) -> Augmentation | None:
        """A random change of one training image uint8 (C, H, W), or ``None``."""
        return None

    def source_domain_of_train(self) -> Tensor | None:
        """The source domain of each training image, int64 (N,), where there are several; else ``None``."""
        return None

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where it is not known."""
        return len(self.class_names)

    @cached_property
    def _digest(self) -> str:
        content = hashlib.sha256()
        for piece in self.digest_content():
            content.update(piece)
        return content.hexdigest()[:12]

    def digest(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of :meth:`digest_content`, for the protocol."""
        return self._digest

    @property
    def resized_to(self) -> int | None:
        """Shorter side in pixels that images have before the middle is cut out; ``None`` where that cannot be set."""
        return None

    def natural_names(self) -> list[str]:
        """Names of the domains that are not made by a corruption."""
        return []

    def natural_domain(self, name: str) -> Images:
        """The images of a natural domain."""
        raise ConfigError(f"{type(self).__name__} has no natural domain {name!r}. Use corruptions, or 'clean'.")

    def published(self, corruption: str, severity: int) -> Images:
        """Test images under a corruption, as somebody published them, in the order of ``clean("test")``."""
        raise NotImplementedError

    @cached_property
    def domain_images(self) -> list[Images]:
        """The images of each of ``domain_names``."""
        return [self._domain(name) for name in self.domain_names]

    def _domain(self, name: str) -> Images:
        key = f"{self.cache_key()}|{self.num_images}" + (f"|{self.subset_seed}" if self.subset_seed else "")
        if name in self.natural_names():
            images: Images = self._subset(self.natural_domain(name))
            if not self.reads_ahead:
                return images
            return CACHE.in_memory(images, (key, "natural", name), f"Reading {name}", sets=len(self.domain_names))
        if name in self.published_names:
            corruption, severity = split_severity(name)
            return self._subset(self.published(corruption, severity or self.severity))
        images = CACHE.in_memory(self._clean_test, (key, CLEAN), "Reading test images")
        return self._shifted(images, self._clean_test.positions, name, key, self.corrupted_names)

    def _subset(self, images: Images) -> SelectedImages:
        """The images that ``num_images`` leaves."""
        return SelectedImages(images, subset(len(images), self.num_images, self.subset_seed))

    @cached_property
    def _clean_test(self) -> SelectedImages:
        return self._subset(self.clean("test"))

    def _shifted(self, base: Images, ids: Tensor, name: str, key: str, names: list[str]) -> Images:
        """One of the domains ``names`` of some images: on disk, in memory, or made when asked for."""
        if name == CLEAN:
            return base
        corruption, severity = split_severity(name)
        settings = (corruption, severity or self.severity, self.corruption_seed, self.function_set)
        images, text = CorruptedImages(base, ids, *settings), f"Corrupting images: {name}"
        needed = len(names) * base.estimated_bytes()
        if self.cache is not None and needed <= self.cache_limit:
            numbers = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
            file_key = f"{key}|{numbers}|{function_set_id(self.function_set)}|{settings}"
            stored = CACHE.on_disk(images, file_key, self.cache, text)
            if stored is not images:
                return stored
        elif self.cache is not None and name == names[0]:
            warnings.warn(
                f"{len(names)} corrupted domains take {needed / 1e9:.0f} GB, more than cache_limit_gb="
                f"{self.cache_limit / 1e9:.0f}: they are made anew in each run. Raise it, or lower num_images.",
                stacklevel=2,
            )
        return CACHE.in_memory(images, (key, *settings), text, sets=len(names))

    def set_blind_spots(self, wrong: Sequence[Tensor]) -> None:
        """Say which images of each of ``domain_names`` the source gets wrong, bool (N_d,): for ``blind_spot``."""
        self._blind_spots, self._stream = [mask.nonzero()[:, 0] for mask in wrong], None
        self._joined_images = None

    def forget(self) -> None:
        """Forget what was found out of the images, as something has changed."""
        self._stream = self._joined_images = None
        for name in ("_digest", "domain_images", "_clean_test", "_polluting_images"):
            self.__dict__.pop(name, None)

    def share(self, sharing: Sharing) -> None:
        """Share the stream with other processes: see :meth:`shard`.

        Raises:
            ConfigError: If the domains are too few, or the batches span domains.
        """
        if sharing.joined != self.sharing.joined:
            self._stream = None
        self.sharing = sharing
        self.shard()

    def start_at(self, batch: int) -> None:
        """Let :meth:`predict_dataloader` start at this batch of the shard: above 0 where a run is continued."""
        self.first_batch = batch

    @property
    def stream_images(self) -> list[tuple[str, Images]]:
        """Name and images of each domain of the stream, in the order of its ``domain`` numbers."""
        domains = list(zip(self.domain_names, self.domain_images, strict=True))
        if self.stream_kind == "recurring":
            visits = range(1, self.stream_options["visits"] + 1)
            return [(f"{name}{VISIT}{visit}", images) for visit in visits for name, images in domains]
        if self.stream_kind == "polluted":
            names = [f"{name}{POLLUTION}" for name in self.domain_names]
            return [*domains, *zip(names, self._polluting_images, strict=True)]
        if self.stream_kind != "blind_spot":
            return domains
        if self._blind_spots is None:
            raise ConfigError(
                "stream='blind_spot' needs to know what the source gets wrong: predict with TestTimeAdaptation, which "
                "finds it out, or call set_blind_spots."
            )
        return [
            domain
            for (name, images), wrong in zip(domains, self._blind_spots, strict=True)
            for domain in ((f"{name}{BLIND}", SelectedImages(images, wrong)), (name, images))
        ]

    @cached_property
    def _polluting_images(self) -> list[Images]:
        """The polluting images of each of ``domain_names``."""
        assert self.polluters is not None
        share = self.stream_options["pollution"]
        counts = [streams.count_polluting(len(images), share) for images in self.domain_images]
        return self.polluters.images(counts, shape_of(self.domain_images))

    @property
    def stream_domains(self) -> list[str]:
        """Names of the domains in the order of the stream's ``domain`` numbers."""
        return [name for name, _ in self.stream_images]

    def file_of(self, index: int) -> str:
        """Name of the file of an image of the stream; empty where it has none."""
        return self._joined.file(index)

    def problem_of(self, index: int) -> DataError:
        """Why an image of the stream cannot be read."""
        return self._joined.problem(index)

    def known_problem(self) -> DataError | None:
        """Why an image of the stream that was read already cannot be used; ``None`` where all can."""
        for _, images in self.stream_images:
            if isinstance(images, KeptImages) and images.readable is not None:
                return images.problem(int((~images.readable).nonzero()[0]))
        return None

    @property
    def _joined(self) -> JoinedImages:
        if self._joined_images is None:
            self._joined_images = JoinedImages([images for _, images in self.stream_images])
        return self._joined_images

    @property
    def frozen_domains(self) -> list[str]:
        """The domains on which nothing adapts: all but the blind spots of a ``blind_spot`` stream."""
        return list(self.domain_names) if self.stream_kind == "blind_spot" else []

    @property
    def counted_domains(self) -> list[str]:
        """The domains that make up the accuracy: neither blind spots nor polluting images."""
        return list(self.domain_names) if self.stream_kind in ("blind_spot", "polluted") else self.stream_domains

    @property
    def spans_domains(self) -> bool:
        """Whether batches may have images of several domains, so that no domain begins or ends."""
        return streams.spans_domains(self.stream_kind, self.stream_options)

    @property
    def stream(self) -> Stream:
        """The batches of the whole stream, as sample positions; synchronised processes share each batch."""
        if self._stream is None:
            size, kind, options = self.batch_size * self.sharing.joined, self.stream_kind, self.stream_options
            domains = [images for _, images in self.stream_images] if kind == "blind_spot" else self.domain_images
            labels = [images.labels for images in domains]
            by_labels = streams.orders_by_labels(kind, options["dirichlet"])
            if by_labels and any(bool((each < 0).any()) for each in labels):
                raise ConfigError(streams.needs_labels(kind))
            self._stream = streams.build_stream(labels, kind=kind, batch_size=size, seed=self.order_seed, **options)
        return self._stream

    def shard(self) -> list[list[int]]:
        """The stream's batches of this process; empty ones where a batch has fewer samples than processes."""
        frozen = {number for number, name in enumerate(self.stream_domains) if name in self.frozen_domains}
        return self.sharing.batches(self.stream, frozen)

    def setup(self, stage: str) -> None:
        """Read and corrupt what the stage needs; the loaders do it themselves when this was not called."""
        if stage == "predict":
            _ = self.domain_images if self.stream_kind == "blind_spot" else self.stream

    def _split(self, split: Split) -> Images:
        return CACHE.in_memory(self.clean(split), (self.cache_key(), split), f"Reading {split} images")

    def _loader(self, dataset: Any, **options: Any) -> DataLoader[Batch]:
        # pinned memory opens a CUDA context: a process without one may fork, and gains nothing by pinning
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        options |= {"num_workers": self.num_workers, "pin_memory": on_gpu}
        return DataLoader(dataset, collate_fn=already_collated, **options)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled and, with ``augment``, augmented; a smaller last batch is left out.

        With several source domains, batches have as many images of each, domain after domain, and carry ``domain``.
        """
        images, domains = self._split("train"), self.source_domain_of_train()
        dataset = LabelledBatches(images, self.augmentation() if self.augment else None, domains)
        options: dict[str, Any] = {"persistent_workers": self.num_workers > 0}
        if domains is not None:
            return self._loader(
                dataset, batch_sampler=samplers.DomainBatches(domains, self.train_batch_size), **options
            )
        size, sampler = self.train_batch_size, samplers.make_train_sampler(len(images))
        return self._loader(dataset, batch_size=size, sampler=sampler, drop_last=len(sampler) > size, **options)

    def _clean_loader(self, split: Split) -> DataLoader[Batch]:
        images, size = self._split(split), self.train_batch_size
        return self._loader(LabelledBatches(images), batch_size=size, sampler=samplers.take_shard(range(len(images))))

    def test_dataloader(self) -> DataLoader[Batch]:
        """Clean test images."""
        return self._clean_loader("test")

    def source_batches(
        self,
        num_images: int | None = None,
        batch_size: int = 128,
        seed: int = 0,
        split: Literal["train", "val"] = "train",
    ) -> DataLoader[Batch]:
        """Source images without augmentation, for a method's ``prepare``; can be iterated more than once.

        Args:
            num_images: At most this many, a random choice; by default all.
            batch_size: Samples in a batch.
            seed: Seed of the choice and the order.
            split: ``train``; or ``val``, which were held out of the training. These may be none.

        Returns:
            Batches {image, label, index}, the same in each iteration.
        """
        if num_images is not None:
            check_range("num_images", num_images, 1, integer=True)
        check_range("batch_size", batch_size, 1, integer=True)
        images = self._split(split) if num_images is None else self.clean(split)  # a few: read when asked for
        order = torch.from_numpy(streams.permutation(len(images), seed)[:num_images])
        batches = [batch.tolist() for batch in torch.split(order, batch_size)]
        return self._loader(LabelledBatches(images), batch_sampler=StreamSampler(batches))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation images: clean, or shifted with ``val_domains``."""
        names = self.val_domain_names
        if not names:
            return self._clean_loader("val")
        images = self._split("val")
        ids, key = torch.arange(len(images)), f"{self.cache_key()}|val"
        domains = [self._shifted(images, ids, name, key, names) for name in names]
        batches = samplers.validation_batches([images.labels for images in domains], self.train_batch_size)
        return self.stream_loader(domains, batches)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The batches of :meth:`shard`, with the whole batch's first sample in place of an empty one."""
        batches = self.shard()
        if not all(batches):
            batches = [batch or whole[:1] for batch, whole in zip(batches, self.stream.batches, strict=True)]
        return self.stream_loader([images for _, images in self.stream_images], batches[self.first_batch :])

    def stream_loader(self, domains: Sequence[Images], batches: list[list[int]]) -> DataLoader[Batch]:
        """Loads batches of positions in several domains, one after the other."""
        return self._loader(StreamBatches(domains, self.marks_damaged), batch_sampler=StreamSampler(batches))

    def describe(self) -> dict[str, Any]:
        """What the stream consists of, in primitives, for the protocol."""
        counts = [len(images) for _, images in self.stream_images]
        if self.stream_kind == "markov":  # the only kind that leaves images out
            present = self.stream.domain_of([position for batch in self.stream.batches for position in batch])
            counts = np.bincount(present, minlength=len(counts)).tolist()
        corrupted = self.corrupted_names + self.published_names
        has_default_severity = any(split_severity(name)[1] is None for name in corrupted)
        return {
            "data": self.name,
            "data_digest": self.digest(),
            "split": "test",
            "domains": self.stream_domains,
            "images": sum(counts),
            "images_per_domain": counts,
            "function_set": function_set_id(self.function_set) if corrupted else None,
            "severity": self.severity if has_default_severity else None,
            "corruption_seed": self.corruption_seed if corrupted else None,
            "subset_seed": self.subset_seed or None,
            "stream": self.stream_kind,
            "order_seed": self.order_seed,
            "batch_size": self.batch_size,
            "charge": self.charge,
            "interval": self.interval if self.charge else None,
            **self.stream_options,
            "polluters": None if self.polluters is None else self.polluters.identity(self.cache),
        }
