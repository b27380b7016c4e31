"""A memory of images of the stream, balanced by predicted class, and steps on it every so many images."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tta.draws import random_rows
from lightning_tta.errors import InputError, UnsupportedModelError, check_range
from lightning_tta.losses import at_least_float32, entropy
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import NOT_YET

PIXELS, LABELS, AGES, SCORES, SEEN = (f"images.{name}" for name in ("pixels", "labels", "ages", "scores", "seen"))
COUNTS = "images.counts"

Learn = Callable[..., Tensor]
"""Takes images (M, C, H, W), which of them are there (M,), their ages (M,) and a view, if there is one.

Says whether what came of it is to stay, with the images that led to it: 0-dimensional, bool."""


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
    :meth:`place`, and the images themselves are copied once a part of a batch. Nothing is asked of the host.

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
        there = held.occupied.view(-1, *(1,) * (held.pixels.ndim - 1))
        method.write(PIXELS, torch.where(there, held.pixels, method.value(PIXELS)), where)
        for name, value in zip((LABELS, AGES, SCORES, SEEN), held[1:5], strict=True):
            method.write(name, value, where)
        if self.counts_classes:
            method.write(COUNTS, held.counts, where)

    def step(
        self,
        method: TTAMethod,
        x: Tensor,
        every: int | None,
        learn: Learn,
        view: Callable[[Tensor, int], Tensor] | None = None,
        *,
        in_parts: bool = False,
        predict: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    ) -> Tensor:
        """Predict a batch, take it in, and step on the memory after each so many images of the stream.

        Of a method with ``step_on_host``: it asks the device once, how many images have come. If a prediction or a step
        gives values that are not finite, the rest of the batch, and the images that led to the step, leave no trace.

        Args:
            method: Has the memory.
            x: The batch (B, C, H, W).
            every: Images of the stream from one step to the next; ``None``: a step after each batch.
            learn: A step on the memory.
            view: Makes a view of the images in the memory, for ``learn``, of these and of the number of images seen;
                ``None``: it gets none.
            in_parts: Whether images after a step within the batch are predicted after it; else all before.
            predict: What predicts: logits (B, K) and further tensors, all of which ``learn`` gets too; ``None``:
                ``infer``.

        Returns:
            Logits (B, K).
        """
        seen = int(method.value(SEEN))
        every = every or len(x) + seen  # then the end of the batch is one
        ends = [*range(every - seen % every, len(x), every), len(x)]
        going, logits, start = torch.ones((), dtype=torch.bool, device=x.device), [], 0

        def look(images: Tensor, going: Tensor) -> tuple[Tensor, ...]:
            found = (method.infer(images),) if predict is None else predict(images)
            return (self._check(method, found[0], going), *found)

        def take_in(images: Tensor, predicted: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.with_images(method, images, predicted))

        def keep(going: Tensor, *held: Tensor) -> Tensor:
            self.write(method, Held(*held), going)
            return going

        def learn_and_keep(going: Tensor, *tensors: Tensor) -> Tensor:
            held, views = Held(*tensors[:6]), tensors[6:]
            going = going & learn(held.pixels, held.occupied & going, held.ages, *views)
            return keep(going, *held)

        for end in ends:
            images = x[start:end]
            if in_parts or not start:
                going, found, *more = method.replayed("prediction", look, images if in_parts else x, going)
                more = [] if predict is None else [found, *more]
                self._make_room(method, x, found.shape[1], seen)
                logits.append(found)
            if not method.known(~going):
                held = method.replayed("take in", take_in, images, found if in_parts else found[start:end])
                if (seen + end) % every:
                    going = method.replayed("keep", keep, going, *held)
                else:
                    views = () if view is None else (view(held[0], seen + end),)
                    going = method.replayed("learn", learn_and_keep, going, *held, *views, *more)
            start = end
        return torch.cat(logits)

    def _check(self, method: TTAMethod, logits: Tensor, going: Tensor) -> Tensor:
        if logits.ndim != 2:
            raise UnsupportedModelError(
                f"'{method.name}' keeps images by their predicted class, and this net gives logits "
                f"{tuple(logits.shape)}, several predictions an image. Use 'tent' or 'norm' for such a net."
            )
        finite = torch.isfinite(logits).all()
        method.count("skipped_steps", going & ~finite)
        return going & finite

    def _make_room(self, method: TTAMethod, x: Tensor, classes: int, seen: int) -> None:
        before = method.value(PIXELS)
        if seen and before.shape[1:] != x.shape[1:] and bool((method.value(LABELS) >= 0).any()):
            raise InputError(
                f"An image of {tuple(x.shape[1:])} (C, H, W) after others of {tuple(before.shape[1:])}: "
                f"'{method.name}' steps on images of several batches together, so all must have one size. Resize them, "
                "or reset()."
            )
        method.sized(PIXELS, x.new_empty(self.size, *x.shape[1:]))
        if self.counts_classes:
            method.sized(COUNTS, before.new_empty(classes))


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
