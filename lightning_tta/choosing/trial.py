"""Candidates side by side on the same batches: what each answers, and what its net says at the end."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.backbones.split import HeadSplit, recorded_calls
from lightning_tta.choosing.candidates import SOURCE, Candidate
from lightning_tta.errors import ConfigError, InputError, LightningTTAError, UnsupportedModelError, in_one_line
from lightning_tta.methods import adapt
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.views.crops import crop_images

LEAST = 4
"""Batches that every candidate must see: of fewer nothing is said."""
PER_BATCH = 2
"""Passes of a batch after the trial: over the images, and over a view of them."""


@dataclass
class Record:
    """What is known of a candidate after a trial of n images; tensors are float32, on the host.

    Attributes:
        answers: Logits (n, K) that it gave along the stream.
        features: Inputs (n, D) of the last linear layer in the same passes; ``None`` where there is no such layer.
        final: Logits (n, K) of the net at the end, for the same images in other batches, without adapting.
        view: The same for a view of each image: shifted by up to 4 pixels.
        final_features: As ``features``, of the passes that gave ``final``.
        weight: Weight (K, D) of the last linear layer.
        bias: Its bias (K,), or ``None``.
        sizes: Images of each batch; ``None``: one batch.
    """

    answers: Tensor
    final: Tensor
    view: Tensor
    features: Tensor | None = None
    final_features: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    sizes: list[int] | None = None


class Runner:
    """A candidate at work on its own copy of the net.

    Args:
        candidate: What it is.
        net: Is copied.

    Raises:
        ConfigError: If the method has no such option, or an option is out of range.

    Attributes:
        problem: Why it cannot go on; empty while it can.
        passes: Forward and backward passes so far.
        batch_passes: Those of the last batch.
    """

    def __init__(self, candidate: Candidate, net: nn.Module) -> None:
        self.candidate, self.problem = candidate, ""
        self.passes = self.batch_passes = self.batches = 0
        self.answers: list[Tensor] = []
        self.features: list[Tensor | None] = []
        self.method: TTAMethod | None = None
        self._head: tuple[str, nn.Module] | None = None
        with self._noting(is_made=False):
            self.method = adapt(net, candidate.method, **candidate.options)
            with suppress(UnsupportedModelError):
                split = HeadSplit(self.method.model)
                self._head = split.name, self.method.model.get_submodule(split.name)

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]] | None) -> None:
        """Show it source images, if it needs some."""
        if self.method is None or not self.method.needs_source or self.method.prepared:
            return
        if source_batches is None:
            self.problem = "needs source images: give source_batches, or a data module that has training images"
            return
        with self._noting():
            self.method.prepare(source_batches)

    def __call__(self, images: Tensor) -> Tensor | None:
        """Adapt on a batch (B, C, H, W); returns logits (B, K), or ``None`` if it cannot go on."""
        if self.problem or self.method is None:
            return None
        every = self.candidate.reset_every
        with self._noting():
            if every and self.batches and not self.batches % every:
                self.method.reset()
            self.batches += 1
            with self._calls() as calls:
                logits: Tensor = self.method(images)
            stats = self.method.stats
            self.batch_passes = round(stats["forwards"] + stats["backwards"])
            self.passes += self.batch_passes
            if not bool(logits.isfinite().all()):
                self.problem = f"gave logits that are not finite at batch {self.batches - 1}"
                return None
            self.answers.append(logits.detach().float().cpu())
            self.features.append(_last_features(calls, logits))
            return logits
        return None

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Logits (B, K) and features (B, D) without adapting, as it predicts a batch now."""
        if self.problem or self.method is None:
            return None
        with self._noting():
            with self._calls() as calls:
                logits = self.method.predict(images, statistics="batch")
            self.passes += max(1, len(calls))
            if bool(logits.isfinite().all()):
                return logits.float().cpu(), _last_features(calls, logits)
            self.problem = "predicts logits that are not finite at the end of the trial"
        return None

    @property
    def passes_at_end(self) -> int:
        """Passes of a batch that :func:`finish` takes, as far as is known before."""
        return 1 if self.candidate.method == SOURCE else PER_BATCH

    def release(self) -> None:
        """Forget the net."""
        self.method = self._head = None

    @property
    def head(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of the last linear layer by now."""
        layer = None if self._head is None else self._head[1]
        if not isinstance(layer, nn.Linear):
            return None, None
        weight, bias = (None if t is None else t.detach().float().cpu().clone() for t in (layer.weight, layer.bias))
        return weight, bias

    @contextmanager
    def _noting(self, is_made: bool = True) -> Iterator[None]:
        """What goes wrong here is this candidate's problem alone; but wrong options are of whoever gave them."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of small batches and the like: they show in the scores
                yield
        except LightningTTAError as error:
            if not is_made and isinstance(error, ConfigError) and not isinstance(error, InputError):
                raise ConfigError(f"Candidate '{self.candidate.name}': {error}") from None
            self.problem = str(error)
        except Exception as error:  # the other candidates may run
            self.problem = in_one_line(error)

    @contextmanager
    def _calls(self) -> Iterator[list[tuple[str, Any, Any]]]:
        with recorded_calls({} if self._head is None else dict([self._head])) as calls:
            yield calls


def _last_features(calls: Sequence[tuple[str, Any, Any]], logits: Tensor) -> Tensor | None:
    """Inputs of the head in the last pass over the batch, (B, D); zeros for images that were left out."""
    usable = answered(logits)
    for _, inputs, _ in reversed(calls):
        if isinstance(inputs[0], Tensor) and inputs[0].ndim == 2 and len(inputs[0]) == int(usable.sum()):
            features = inputs[0].detach().float()
            return features.new_zeros(len(logits), features.shape[1]).index_put((usable,), features).cpu()
    return None


def answered(logits: Tensor) -> Tensor:
    """Which images have an answer, bool (B,): a row of zeros is none."""
    return (logits != 0).any(-1)


def finish(runners: Sequence[Runner], batches: Sequence[Tensor], seed: int = 0) -> dict[str, Record]:
    """What each that could run says of all images at the end, in other company; by the candidate's name.

    Two neighboring batches are shuffled and cut again. A batch sorted by class spoils its own statistics: with others
    beside them the same images get other predictions then, and the difference shows it. No more than two, so that
    what was seen one after the other, as a domain is, stays together.

    Args:
        runners: After the same batches, the source's among them.
        batches: Those, (B, C, H, W) each.
        seed: Of the order and the views.
    """
    images = torch.cat(list(batches))
    chunks = list(_company([len(batch) for batch in batches], seed))
    back = torch.cat(chunks).argsort()
    records = {}
    for runner in runners:
        if runner.problem:
            continue
        passes: list[list[tuple[Tensor, Tensor | None]]] = [[], []]
        for number, chosen in enumerate(chunks):
            key = torch.tensor([seed, number], device=images.device)
            batch = images[chosen.to(images.device)]
            for place, shown in enumerate((batch, crop_images(batch, "crop", key))):
                if not place and runner.candidate.method == SOURCE:
                    continue  # each image by itself: its answers
                predicted = runner.predict(shown)
                if predicted is not None:
                    passes[place].append(predicted)
        if runner.problem:
            continue
        answers, features = torch.cat(runner.answers), _joined(runner.features)
        final, final_features = answers, features
        if passes[0]:
            final = torch.cat([logits for logits, _ in passes[0]])[back]
            shuffled = _joined([each for _, each in passes[0]])
            final_features = None if shuffled is None else shuffled[back]
        weight, bias = runner.head
        records[runner.candidate.name] = Record(
            answers,
            final,
            torch.cat([logits for logits, _ in passes[1]])[back],
            features,
            final_features,
            weight,
            bias,
            [len(batch) for batch in batches],
        )
    return records


def _company(sizes: Sequence[int], seed: int) -> Iterator[Tensor]:
    """Positions of images, batch by batch: those of two neighboring batches shuffled; of the last three, if odd."""
    generator = torch.Generator().manual_seed(seed)
    last, start = max(2, len(sizes) // 2 * 2) - 2, 0
    for first in range(0, last + 1, 2):
        group = sizes[first:] if first == last else sizes[first : first + 2]
        shuffled = start + torch.randperm(sum(group), generator=generator)
        start += sum(group)
        yield from torch.split(shuffled, max(group))


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors and len(tensors) == len(parts) else None
