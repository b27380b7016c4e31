"""``lightning_tta.choose``: which method suits a stream, and how sure that is."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_tta.choosing.candidates import SOURCE, Candidate, Wanted, read_candidates
from lightning_tta.choosing.rule import decide
from lightning_tta.choosing.scores import score
from lightning_tta.choosing.trial import LEAST, Runner, answered, finish
from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.errors import ConfigError, DataError, InputError, check_range
from lightning_tta.files import write_json, write_whole
from lightning_tta.methods import adapt
from lightning_tta.methods.base.method import TTAMethod

Labels = Mapping[int, int] | Mapping[str, int]
SOURCE_IMAGES = 2000
"""Training images that are shown to a candidate that needs some, where a data module has them."""


@dataclass(frozen=True)
class Choice:
    """What :func:`choose` found.

    Attributes:
        name: The candidate's name: method and options in words; ``source``: adapt nothing.
        method: Name of its method.
        options: Options of :func:`lightning_tta.adapt`, and ``reset_every`` where the candidate has it.
        confidence: In [0, 1]: estimated probability that it is more accurate than the source; of ``source``, that none
            of the others is, as far as the rule can tell. Compared with what came true on few small nets only
            (docs/results/choices.md): a hint, no guarantee.
        why: One sentence.
        candidates: One dict a candidate: ``name``, ``method``, ``options``, ``scores`` by name (empty where it could
            not run), ``problem`` (empty where it could), ``passes``.
        images: How many were seen.
        passes: Forward and backward passes over a batch, all candidates together.
        left_out: What the budget had no room for, in words.
    """

    name: str
    method: str
    options: dict[str, Any]
    confidence: float
    why: str
    candidates: list[dict[str, Any]]
    images: int
    passes: int
    left_out: list[str]

    def adapt(self, net: nn.Module) -> TTAMethod:
        """The chosen method on a copy of a net, as :func:`lightning_tta.adapt` makes it.

        With ``reset_every`` it returns to the source before every so many calls; ``state_dict()`` has the count. One
        that needs source images is still to be prepared.
        """
        options = {name: value for name, value in self.options.items() if name != "reset_every"}
        method = adapt(net, self.method, **options)
        every = self.options.get("reset_every")
        if every:
            _ResetEvery(every, method)
        return method

    def as_dict(self) -> dict[str, Any]:
        """The same in primitives; the choice's name is under ``choice``."""
        content = asdict(self)
        return {"choice": content.pop("name"), **content}

    def write(self, directory: str | Path) -> Path:
        """Write ``choice.json`` and ``choice.md`` into a directory, which is made; returns it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "choice.json", self.as_dict())
        write_whole(directory / "choice.md", lambda file: file.write(f"# Choice\n\n{self.table()}\n".encode()))
        return directory

    def table(self) -> str:
        """The sentence and a Markdown table of all candidates and scores."""
        columns = list(dict.fromkeys(name for each in self.candidates for name in each["scores"]))
        lines = [
            self.why,
            "",
            f"| candidate | passes | {' | '.join(columns)} |",
            f"|---|{'---:|' * (len(columns) + 1)}",
        ]
        for each in self.candidates:
            cells = [f"{each['scores'][name]:.3f}" if name in each["scores"] else "" for name in columns]
            chosen = f"**{each['name']}**" if each["name"] == self.name else each["name"]
            lines.append(f"| {chosen} | {each['passes']} | {' | '.join(cells)} |")
        notes = [f"{each['name']}: {each['problem']}" for each in self.candidates if each["problem"]]
        notes += self.left_out
        lines += ["", "Not judged:", "", *(f"- {note}" for note in notes)] if notes else []
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


class _ResetEvery:
    """Before every so many calls of a method, back to the source; the count of calls is in the method's state."""

    def __init__(self, every: int, method: TTAMethod) -> None:
        self.every, self.calls, self.loaded = every, 0, 0
        method.register_forward_pre_hook(self.count)
        method.register_state_dict_post_hook(partial(self.save))  # type: ignore[no-untyped-call]  # torch marks it
        method.register_load_state_dict_pre_hook(self.look)  # type: ignore[no-untyped-call]
        method.register_load_state_dict_post_hook(self.load)  # type: ignore[no-untyped-call]

    def count(self, method: nn.Module, args: Any) -> None:
        assert isinstance(method, TTAMethod)
        if self.calls and not self.calls % self.every:
            method.reset()
        self.calls += 1

    def save(self, method: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state[f"{prefix}_extra_state"]["calls"] = self.calls

    def look(self, method: nn.Module, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        extra = state.get(f"{prefix}_extra_state")
        self.loaded = extra.get("calls", 0) if isinstance(extra, Mapping) else 0

    def load(self, method: nn.Module, keys: Any) -> None:
        self.calls = self.loaded  # only now it is sure that the state fits


def choose(
    net: nn.Module,
    data: Tensor | ShiftedDataModule | Iterable[Any],
    candidates: Wanted | Sequence[Wanted] = "default",
    budget: int | None = None,
    labels: Labels | int | None = None,
    *,
    batches: int = 8,
    batch_size: int = 64,
    source_batches: Iterable[Mapping[str, Tensor]] | None = None,
    seed: int = 0,
) -> Choice:
    """Find out which method, rate, statistics and resets suit a stream, on its first batches, without labels.

    All candidates adapt side by side, each on its own copy of the net, and the source beside them, whose pass all
    share. Then each predicts the same images once more, in shuffled batches, and a shifted view of each. From that come
    the scores (:func:`~lightning_tta.choosing.scores.score`), and from the scores the decision
    (:func:`~lightning_tta.choosing.rule.decide`): the source stays unless the evidence is clear.

    Args:
        net: Pixels (B, C, H, W) in [0, 1] -> logits (B, K); is left alone.
        data: Images (N, C, H, W) in [0, 1], which are cut into batches; or batches: tensors, tuples of images and
            labels, or dicts with ``image`` and perhaps ``index`` and ``label``; or a data module. The batches in the
            order and of the size in which they will come.
        candidates: ``default``: a grid that suits the net
            (:func:`~lightning_tta.choosing.candidates.default_candidates`); or names of methods, or dicts of ``method``
            and options, such as ``{"method": "tent", "lr": 1e-3, "statistics": "auto", "reset_every": 50}``; one, or a
            list. ``source`` is always among them.
        budget: Forward and backward passes over a batch, of all together, at least 1; ``None``: as many as ``batches``
            take. A smaller one first costs batches, down to 4, then candidates, from the last one.
        labels: Labels by index of the image: a few help much. A number: so many of the labels that the batches bring,
            evenly over the trial.
        batches: Of the stream, that are looked at, at least 4.
        batch_size: Of images that come as one tensor.
        source_batches: For candidates that need source images; by default those of a data module.
        seed: Of the views, and of the order in which images are shuffled; at least 0.

    Raises:
        ConfigError: If an option is out of range, a candidate is no method or has a wrong option, labels are of images
            that did not come, or the budget is too small for any candidate.
        DataError: If there are fewer than 4 batches.
        InputError: If the net refuses the images of a batch, or none of them can be used.
    """
    if not isinstance(net, nn.Module):
        raise ConfigError(f"net must be a torch.nn.Module, the trained net itself; got a {type(net).__name__}.")
    check_range("batches", batches, LEAST, integer=True)
    check_range("batch_size", batch_size, 1, integer=True)
    check_range("seed", seed, 0, 2**63 - 1, integer=True)
    if budget is not None:
        check_range("budget", budget, 1, integer=True)
    device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
    if isinstance(data, ShiftedDataModule):
        data.prepare_data()
        data.setup("predict")
        data.marks_damaged = True  # an image that cannot be read is left out
        source_batches = _TrainingImages(data, device) if source_batches is None else source_batches
    taken = _take(data, batches, batch_size, device)
    runners = [Runner(each, net) for each in read_candidates(candidates, net, len(taken[0].images))]
    source, *others = runners
    logits = _predict_surely(source, taken[0], 0)
    known = _known(labels, taken, logits.shape[1])
    if hasattr(source_batches, "__next__"):  # an iterator gives them once, and several may need them
        assert source_batches is not None
        source_batches = list(source_batches)
    for runner in others:
        runner.prepare(source_batches)
        runner(taken[0].images)
    number, left_out = _plan(runners, len(taken), budget)
    going = [runner for runner in runners if runner not in left_out]
    for place, batch in enumerate(taken[1:number], 1):
        _predict_surely(source, batch, place)
        for runner in going[1:]:
            runner(batch.images)
    return _judge(going, left_out, taken[:number], len(taken), known, seed)


def _predict_surely(source: Runner, batch: _Batch, place: int) -> Tensor:
    """Logits of the source, which all else is compared with."""
    logits = source(batch.images)
    if logits is None:
        raise InputError(f"The source cannot predict the images of batch {place}: {source.problem}")
    return logits


@dataclass(frozen=True)
class _Batch:
    images: Tensor
    index: list[int] | list[str]
    labels: list[int]


class _TrainingImages(Iterable[Mapping[str, Tensor]]):
    """Of a data module, read when a candidate asks for them."""

    def __init__(self, data: ShiftedDataModule, device: torch.device) -> None:
        self.data, self.device = data, device

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        for batch in self.data.source_batches(SOURCE_IMAGES, batch_size=64):
            yield {name: value.to(self.device) for name, value in batch.items()}


def _take(data: Any, number: int, size: int, device: torch.device) -> list[_Batch]:
    """The first batches."""
    if isinstance(data, Tensor):
        data = torch.split(data, size) if data.ndim == 4 else [data]
    loader = data.predict_dataloader() if isinstance(data, ShiftedDataModule) else data
    if not isinstance(loader, Iterable) or isinstance(loader, (str, Mapping)):
        raise ConfigError(
            "data must be images (N, C, H, W), batches of them, or a data module; got a "
            f"{type(data).__name__}. For a folder: lightning_tta.ImageFolderData(path)."
        )
    taken: list[_Batch] = []
    seen = 0
    for batch in itertools.islice(loader, number):
        given = batch if isinstance(batch, Mapping) else _named(batch)
        images, index, truth = (given.get(name) for name in ("image", "index", "label"))
        if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
            raise InputError(
                "A batch must be images, a tensor (B, C, H, W) with B >= 1, or a dict with them under 'image'; got "
                f"{tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__}."
            )
        if taken and images.shape[1:] != taken[0].images.shape[1:]:
            raise InputError(
                f"All batches must have images of one size; batch 0 has {tuple(taken[0].images.shape[1:])} (C, H, W), "
                f"batch {len(taken)} {tuple(images.shape[1:])}. Resize them to the size that the net was trained on."
            )
        for name, values in (("index", index), ("label", truth)):
            if values is not None and len(values) != len(images):
                raise InputError(
                    f"A batch of {len(images)} images has {len(values)} values of '{name}'; give one each."
                )
        taken.append(
            _Batch(
                images.to(device),
                list(range(seen, seen + len(images))) if index is None else _plain(index),
                [-1] * len(images) if truth is None else _plain(truth),
            )
        )
        seen += len(images)
    if len(taken) < LEAST:
        raise DataError(
            f"The stream has {len(taken)} batches; a choice needs {LEAST}, as many as the stream may change in. Give "
            "more images, or smaller batches."
        )
    return taken


def _named(batch: Any) -> dict[str, Any]:
    """A batch that is no dict: images, or a tuple of images and perhaps their labels."""
    if not isinstance(batch, (list, tuple)) or not batch:
        return {"image": batch}
    label = batch[1] if len(batch) > 1 and isinstance(batch[1], Tensor) and batch[1].ndim == 1 else None
    whole = label is not None and not label.is_floating_point()
    return {"image": batch[0], "label": label if whole else None}


def _plain(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def _plan(runners: list[Runner], batches: int, budget: int | None) -> tuple[int, list[Runner]]:
    """For how many batches the budget lasts, and who is left out, after the first batch."""
    if budget is None:
        return batches, []
    going = [runner for runner in runners if not runner.problem]
    left_out: list[Runner] = []
    while True:
        spent = sum(runner.passes for runner in left_out)  # on the first batch
        cost = sum(runner.batch_passes + runner.passes_at_end for runner in going)
        number = max(budget - spent, 0) // cost
        if number >= LEAST or len(going) == 1:
            return max(min(number, batches), LEAST), left_out
        if len(going) == 2:
            raise ConfigError(
                f"budget={budget} is too small for any candidate: {LEAST} batches of the source and of "
                f"'{going[1].candidate.name}' take {LEAST * cost} passes, and the first batch of the others {spent}. "
                f"Give at least {LEAST * cost + spent}, or fewer candidates, those that matter first."
            )
        left_out.insert(0, going.pop())


def _judge(
    runners: list[Runner],
    left_out: list[Runner],
    taken: list[_Batch],
    wanted: int,
    known: dict[int, int],
    seed: int,
) -> Choice:
    records = finish(runners, [batch.images for batch in taken], seed)
    if SOURCE not in records:
        raise InputError(f"The source cannot predict the images in other company: {runners[0].problem}")
    source = records[SOURCE]
    usable = answered(source.answers)
    if not usable.any():
        raise InputError(
            f"None of the {len(usable)} images can be used: their pixels are not finite. Look at how they are read."
        )
    known = {place: label for place, label in known.items() if place < len(usable) and usable[place]}
    scores = {name: score(record, source, known) for name, record in records.items()}
    decision = decide(scores, len(known))
    chosen = next(runner.candidate for runner in runners if runner.candidate.name == decision.name)
    notes = [f"{runner.candidate.name}: the budget is too small for it" for runner in left_out]
    if len(taken) < wanted:
        notes.append(f"the budget lasts for {len(taken)} of {wanted} batches")
    return Choice(
        chosen.name,
        chosen.method,
        chosen.all_options,
        decision.confidence,
        decision.why,
        [_entry(runner, scores) for runner in runners],
        sum(len(batch.images) for batch in taken),
        sum(runner.passes for runner in [*runners, *left_out]),
        notes,
    )


def _entry(runner: Runner, scores: Mapping[str, dict[str, float]]) -> dict[str, Any]:
    candidate: Candidate = runner.candidate
    return {
        "name": candidate.name,
        "method": candidate.method,
        "options": candidate.all_options,
        "scores": scores.get(candidate.name, {}),
        "problem": runner.problem,
        "passes": runner.passes,
    }


def _known(labels: Labels | int | None, taken: list[_Batch], classes: int) -> dict[int, int]:
    """Labels by position among the images of the trial."""
    known = _placed(labels, taken)
    for place, label in known.items():
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label < classes:
            raise ConfigError(
                f"Labels must be whole numbers of the net's {classes} classes, 0 to {classes - 1}; image {place} of "
                f"the trial has {label!r}."
            )
    return known


def _placed(labels: Labels | int | None, taken: list[_Batch]) -> dict[int, int]:
    if labels is None:
        return {}
    if not isinstance(labels, (Mapping, int)):
        raise ConfigError(
            "labels must be a dict of the label by the image's index, such as {17: 3, 80: 0}, or a number of labels "
            f"that the batches bring; got a {type(labels).__name__}. Of a list over the first images: "
            "dict(enumerate(labels))."
        )
    index = [each for batch in taken for each in batch.index]
    if not isinstance(labels, Mapping):
        check_range("labels", labels, 0, integer=True)
        brought = [
            (place, label) for place, label in enumerate(each for batch in taken for each in batch.labels) if label >= 0
        ]
        if labels and not brought:
            raise ConfigError("labels is a number, but the batches bring no 'label'. Give labels by index.")
        step = max(1.0, len(brought) / max(labels, 1))
        return dict(brought[int(number * step)] for number in range(min(labels, len(brought))))
    places = {each: place for place, each in enumerate(index)}
    if len(places) < len(index):
        twice = next(each for each, count in Counter(index).items() if count > 1)
        raise ConfigError(
            f"Labels by index need an index for each image of the stream; {twice!r} names {index.count(twice)} of the "
            f"first {len(index)} images. Number them over all batches, not in each one."
        )
    known = {places[each]: label for each, label in labels.items() if each in places}
    if labels and not known:
        raise ConfigError(
            f"None of the {len(labels)} labels is of an image of the trial, whose indices are such as "
            f"{index[:3]}. Give labels by index of the first {len(index)} images."
        )
    return known
