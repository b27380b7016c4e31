"""A memory of images of the stream, balanced by predicted class, and steps on it every so many images."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightning_tta.draws import random_rows
from lightning_tta.errors import UnsupportedModelError, check_range
from lightning_tta.losses import at_least_float32, entropy
from lightning_tta.methods.base.account import Statistics
from lightning_tta.methods.base.gradient import GradientMethod
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import NOT_YET
from lightning_tta.methods.components.memory_statistics import MemoryStatistics

PIXELS, LABELS, AGES, SCORES, SEEN = (f"images.{name}" for name in ("pixels", "labels", "ages", "scores", "seen"))
COUNTS = "images.counts"


class Held(NamedTuple):
    """What is in a memory of M slots.

    Attributes:
        pixels: (M, C, H, W); 0 in an empty slot.
        labels: Predicted class of each, (M,), int64; -1: the slot is empty.
        ages: Images that came since, itself included, (M,), int64.
        scores: Of each, (M,), float64.
        seen: Images that have come, 0-dimensional, int64.
        counts: Images of each class that have come, (K,), or (0,).
    """

    pixels: Tensor
    labels: Tensor
    ages: Tensor
    scores: Tensor
    seen: Tensor
    counts: Tensor

    @property
    def occupied(self) -> Tensor:
        """Which slots have an image, (M,)."""
        return self.labels >= 0


class ImageMemory(ABC):
    """Up to M images of a stream, as state of a method, of fixed shape.

    Images enter one after the other, whatever the batches; what they enter for is decided by a rule on small tensors,
    :meth:`place`, and the images themselves are copied once a part of a batch. Nothing is asked of the host. Where
    images of another size come, the memory starts anew with them.

    Args:
        method: Gets the state; the images' room is made at the first batch.
        size: M, at least 1.
        seed: Of the draws, each from the number of the image in the stream.
    """

    counts_classes = False
    draws = 0
    """Random numbers that an image needs."""

    def __init__(self, method: TTAMethod, size: int, seed: int = 0) -> None:
        check_range("capacity", size, 1, integer=True)
        check_range("seed", seed, 0, 2**63 - 1, integer=True)
        self.size, self.seed = size, seed
        device = next((p.device for p in method.model.parameters()), torch.device("cpu"))
        method.state(PIXELS, torch.full((0,), NOT_YET, device=device), source=NOT_YET)
        method.state(LABELS, torch.full((size,), -1, device=device), source=-1)
        method.state(AGES, torch.zeros(size, dtype=torch.int64, device=device), source=0)
        method.state(SCORES, torch.zeros(size, dtype=torch.float64, device=device), source=0.0, fixed_dtype=True)
        method.state(SEEN, torch.zeros((), dtype=torch.int64, device=device), source=0)
        if self.counts_classes:
            method.state(COUNTS, torch.full((0,), NOT_YET, device=device), source=NOT_YET)

    @abstractmethod
    def score(self, logits: Tensor) -> Tensor:
        """What is kept of the prediction of each image: logits (B, K) -> (B,)."""

    @abstractmethod
    def place(self, held: Held, label: Tensor, score: Tensor, draws: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Where an image goes.

        Args:
            held: What is there, without pixels; its counts have this image in them.
            label: Of the new image, 0-dimensional.
            score: Likewise.
            draws: Uniform in [0, 1), (:attr:`draws` + M,).
            classes: K.

        Returns:
            Rank of each slot, (M,), float64: the largest is taken, minus infinity: not to be taken. And whether the
            image enters at all, 0-dimensional, bool.
        """

    def held(self, method: TTAMethod) -> Held:
        """What is in the memory now."""
        labels, pixels = method.value(LABELS), method.value(PIXELS)
        there = (labels >= 0).view(-1, *(1,) * (pixels.ndim - 1))
        counts = method.value(COUNTS).nan_to_num() if self.counts_classes else labels[:0].double()
        ages, scores, seen = (method.value(name) for name in (AGES, SCORES, SEEN))
        return Held(torch.where(there, pixels, 0), labels, ages, scores, seen, counts)

    @torch.no_grad()
    def with_images(self, method: TTAMethod, x: Tensor, logits: Tensor) -> Held:
        """What would be in the memory with further images (B, C, H, W), predicted as ``logits`` (B, K) say."""
        held, slots = self.held(method), torch.arange(self.size, device=x.device)
        labels, scores = logits.argmax(1), self.score(logits).double()
        numbers = held.seen + torch.arange(len(x), device=x.device)
        draws = random_rows(self.seed, numbers, self.draws + self.size).double() * 2.0**-64 + 0.5
        places, pixels = slots, held.pixels
        for number in range(len(x)):
            label, score = labels[number], scores[number]
            counts = held.counts + (torch.arange(len(held.counts), device=x.device) == label)
            held = Held(*held[:5], counts)
            rank, enters = self.place(held, label, score, draws[number], logits.shape[1])
            youngest = torch.where(rank == rank.max(), torch.where(held.occupied, -held.ages, -slots), -(2**62))
            here = (slots == youngest.argmax()) & enters
            places = torch.where(here, self.size + number, places)
            new = torch.where(here, label, held.labels)
            ages = torch.where(here, 0, held.ages) + (new >= 0)
            held = Held(pixels, new, ages, torch.where(here, score, held.scores), held.seen + 1, counts)
        return Held(torch.cat([pixels, x.to(pixels)])[places], *held[1:])

    def write(self, method: TTAMethod, held: Held, where: Tensor) -> None:
        """Keep this, where a condition, 0-dimensional and bool, is true."""
        for name, value in zip((PIXELS, LABELS, AGES, SCORES, SEEN), held[:5], strict=True):
            method.write(name, value, where)
        if self.counts_classes:
            method.write(COUNTS, held.counts, where)

    def make_room(self, method: TTAMethod, x: Tensor, classes: int) -> None:
        """Allocate what images (B, C, H, W) need: at the first batch, and at another size, where it starts anew."""
        room = x.new_empty(self.size, *x.shape[1:])
        if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            room = room.contiguous(memory_format=torch.channels_last)
        if method.value(PIXELS).shape != room.shape:
            method.sized(PIXELS, room)
            method.value(LABELS).fill_(-1)
        if self.counts_classes:
            method.sized(COUNTS, x.new_empty(classes))


def _fullest(held: Held) -> tuple[Tensor, Tensor]:
    """Which slots are of the classes with most images, (M,), and how many these have."""
    number = torch.where(held.occupied, (held.labels[:, None] == held.labels).sum(1), 0)
    most = number.max()
    return held.occupied & (number == most), most


class TimelyMemory(ImageMemory):
    """Balanced by class; of a class the old and the uncertain go first: RoTTA's CSTU.

    With M slots, K classes, entropy H and age a, the score of an image is::

        lambda_t / (1 + exp(-a / M)) + lambda_u H / ln K

    An image whose class has M / K images or more competes with those; else it takes an empty slot; if there is none it
    competes with the images of the classes that have most. It takes the place of the one of highest score, if its own
    is lower. With more classes than slots each class has at most one.

    Args:
        method: As of :class:`ImageMemory`.
        size: M.
        lambda_t: >= 0.
        lambda_u: >= 0.

    Source: Yuan et al., RoTTA, CVPR 2023, arXiv 2303.13899, and the authors' code.
    """

    def __init__(self, method: TTAMethod, size: int, *, lambda_t: float = 1.0, lambda_u: float = 1.0) -> None:
        check_range("lambda_t", lambda_t, 0)
        check_range("lambda_u", lambda_u, 0)
        super().__init__(method, size)
        self.lambda_t, self.lambda_u = lambda_t, lambda_u

    def score(self, logits: Tensor) -> Tensor:
        """The entropy."""
        return entropy(logits)

    def place(self, held: Held, label: Tensor, score: Tensor, draws: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """By age and entropy."""
        unit = self.lambda_u / math.log(max(classes, 2))
        rank = self.lambda_t * torch.sigmoid(held.ages / self.size) + unit * held.scores
        same = held.labels == label
        has_share = same.sum() >= self.size / classes
        is_free = ~has_share & ~held.occupied.all()
        candidates = torch.where(has_share, same, torch.where(is_free, ~held.occupied, _fullest(held)[0]))
        rank = torch.where(candidates, torch.where(is_free, 0.0, rank), -math.inf)
        return rank, is_free | (rank.max() > self.lambda_t / 2 + unit * score)


class UniformMemory(ImageMemory):
    """Sure images only, of each class as many; a random one goes: SoTTA's HUS.

    An image enters whose largest probability is at least the threshold. In a full memory it takes the place of a random
    one of the classes that have most images, or of its own class if that is one of them.

    Args:
        method: As of :class:`ImageMemory`.
        size: M.
        threshold: In [0, 1].
        seed: Of the draws.

    Source: Gong et al., SoTTA, NeurIPS 2023, arXiv 2310.10074, and the authors' code.
    """

    def __init__(self, method: TTAMethod, size: int, *, threshold: float, seed: int = 0) -> None:
        check_range("threshold", threshold, 0, 1)
        super().__init__(method, size, seed)
        self.threshold = threshold

    def score(self, logits: Tensor) -> Tensor:
        """The largest probability."""
        return at_least_float32(logits).softmax(1).amax(1)

    def place(self, held: Held, label: Tensor, score: Tensor, draws: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """At random, if it is sure."""
        return _at_random(held, label, draws[-self.size :])[0], score >= self.threshold


class ReservoirMemory(ImageMemory):
    """Of each class as many, and of a class a uniform sample of all its images so far: NOTE's PBRS.

    In a full memory an image takes the place of a random one of the classes that have most images. If its own class is
    one of them, it takes a place there with probability (images of the class in the memory) / (that have come).

    Args:
        method: As of :class:`ImageMemory`.
        size: M.
        seed: Of the draws.

    Source: Gong et al., NOTE, NeurIPS 2022, arXiv 2208.05117, and the authors' code.
    """

    counts_classes = True
    draws = 1

    def score(self, logits: Tensor) -> Tensor:
        """Nothing."""
        return torch.zeros_like(logits[:, 0])

    def place(self, held: Held, label: Tensor, score: Tensor, draws: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """At random, and the later the less likely."""
        rank, number, among_most = _at_random(held, label, draws[1:])
        return rank, ~among_most | (draws[0] <= number / held.counts.gather(0, label[None])[0])


def _at_random(held: Held, label: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks; how many of the class there are; and whether the memory is full, and no class has more."""
    fullest, most = _fullest(held)
    same, is_full = held.labels == label, held.occupied.all()
    number = same.sum()
    among_most = is_full & (number == most)
    candidates = torch.where(is_full, torch.where(among_most, same, fullest), ~held.occupied)
    return torch.where(candidates, draws, -math.inf), number, among_most


class MemoryMethod(GradientMethod):
    """What the methods share that step on an :class:`ImageMemory`.

    To write one: set :attr:`images` and :attr:`statistics` in the constructor, and implement :meth:`learn_from`.

    If a prediction or a step gives values that are not finite, the rest of the batch, and the images that led to the
    step, leave no trace.

    Args:
        model: A classifier.
        update_every: Images of the stream from one step to the next, >= 1; ``None``: a step after each batch.
        **options: See :class:`~lightning_tta.methods.base.gradient.GradientMethod`.

    Attributes:
        images: The memory.
        statistics: BatchNorm statistics of the method's nets; the first are those that predict.
        in_parts: Whether images after a step within the batch are predicted after it; else all before.
    """

    images: ImageMemory
    statistics: tuple[MemoryStatistics, ...]
    in_parts: ClassVar[bool] = False
    step_on_host = "it asks how many images have come, which decides where it steps on its memory"
    fixed_options = frozenset({"steps", "lr_batch_size"})

    def __init__(self, model: nn.Module, *, update_every: int | None = 64, **options: Any) -> None:
        super().__init__(model, steps=1, lr_batch_size=None, **options)
        if update_every is not None:
            check_range("update_every", update_every, 1, integer=True)
        self.update_every = update_every

    @abstractmethod
    def learn_from(self, images: Tensor, there: Tensor, ages: Tensor, *more: Tensor) -> Tensor:
        """A step on the memory.

        Args:
            images: (M, C, H, W).
            there: Which of them are there, (M,), bool.
            ages: Images that have come since each, (M,).
            *more: What :meth:`views_of` returned; what :meth:`look` returned beside logits, and these, if it did.

        Returns:
            Whether what came of it is to stay, with the statistics and the images that led to it, 0-dimensional, bool.
        """

    def look(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, K); or a method's own: these and further tensors, all of which :meth:`learn_from` gets too."""
        return (self.infer(x),)

    def views_of(self, images: Tensor, seen: int) -> tuple[Tensor, ...]:
        """Views of the images in the memory (M, C, H, W), when so many have come; made on the host's word."""
        return ()

    def running(self) -> AbstractContextManager[None]:
        """With the statistics that predict."""
        for each in self.statistics:
            each.build()
        return self.statistics[0].as_kept()

    def stream_statistics(self) -> Statistics | None:
        """Those that predict."""
        return self.statistics[0].kept()

    def step(self, x: Tensor) -> Tensor:
        """Predict a batch, take it in, and step on the memory after each so many images of the stream."""
        seen = int(self.value(SEEN))
        every = self.update_every or len(x) + seen  # then the end of the batch is one
        ends = [*range(every - seen % every, len(x), every), len(x)]
        going, logits, start = torch.ones((), dtype=torch.bool, device=x.device), list[Tensor](), 0
        for end in ends:
            images = x if end - start == len(x) else x[start:end]
            if self.in_parts or not start:
                shown = images if self.in_parts else x
                going, found, *more = self.replayed("prediction", self.predict_part, going, shown)
                logits.append(found)
                more = [found, *more] if more else []
            if not self.known(~going):
                held = self.replayed("take in", self.take_in, images, found if self.in_parts else found[start:end])
                if (seen + end) % every:
                    going = self.replayed("keep", self.keep, going, *held)
                else:
                    views = self.views_of(held[0], seen + end)
                    going = self.replayed("learn", self.learn_and_keep, going, *held, *views, *more)
            start = end
        return torch.cat(logits)

    @torch.no_grad()
    def predict_part(self, going: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Whether to go on, if it was so until now, after the logits (B, K) of images, which come with it."""
        found = self.look(x)
        logits = found[0]
        if logits.ndim != 2:
            raise UnsupportedModelError(
                f"'{self.name}' keeps images by their predicted class, and this net gives logits "
                f"{tuple(logits.shape)}, several predictions an image. Use 'tent' or 'norm' for such a net."
            )
        finite = torch.isfinite(logits).all()
        self.count("skipped_steps", going & ~finite)
        return going & finite, *found

    def take_in(self, x: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        """What would be in the memory with these images."""
        self.images.make_room(self, x, logits.shape[1])
        return tuple(self.images.with_images(self, x, logits))

    def keep(self, going: Tensor, *held: Tensor) -> Tensor:
        """Write what is to be in the memory, if it goes on."""
        self.images.write(self, Held(*held), going)
        return going

    def learn_and_keep(self, going: Tensor, *tensors: Tensor) -> Tensor:
        """A step on what is to be in the memory, which is written then; whether it goes on."""
        held = Held(*tensors[:6])
        going = going & self.learn_from(held.pixels, held.occupied & going, held.ages, *tensors[6:])
        if not self.known(~going):
            for each in self.statistics:
                each.keep(going)
        return self.keep(going, *held)
