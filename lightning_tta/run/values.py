"""Values in a run: the record of a batch, its account with mean absolute error and R2, and its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_tta.errors import DataError
from lightning_tta.run.outcomes import Outcome
from lightning_tta.run.outputs import PredictionWriter, printable
from lightning_tta.run.stream_run import Outputs, StreamRun
from lightning_tta.run.summary import BatchRecord, StreamSummary


class ValueMeasures:
    """What is known of a batch of values without the right ones."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def means(self) -> dict[str, Tensor]:
        """``mean_value``, and ``value_spread``, the standard deviation; over the images that have values."""
        values = self.values[self.values.isfinite().all(1)].double()
        return {"mean_value": values.mean(), "value_spread": (values - values.mean(0)).square().mean().sqrt()}


@dataclass
class ValueRecord(BatchRecord):
    """One batch of values. ``logits`` are (B, 0) and labels -1."""

    values: Tensor | None = None  # (B, D), NaN where an image has none
    target: Tensor | None = None  # (B, D), NaN where it is not known; None: none is

    rows: ClassVar[tuple[str, ...]] = (*BatchRecord.rows, "values", "target")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values is not None:
            self.measures = ValueMeasures(self.values)  # type: ignore[assignment]

    def outputs(self) -> dict[str, Tensor]:
        """What a predict step returns: ``prediction`` (B, D), NaN for none, and ``index`` and ``domain`` (B,)."""
        names = {"index": self.index, "domain": self.domain}
        if self.values is None:
            return {**names, "prediction": torch.full((len(self), 1), torch.nan)}
        lost = torch.zeros(len(self), dtype=torch.bool) if self.damaged is None else self.damaged
        return {**names, "prediction": self.values.masked_fill(lost[:, None], torch.nan)}


class ValueSummary(StreamSummary):
    """The account of a stream of values: mean absolute error and R2 of the images that have both value and target.

    ``R2 = 1 - sum (y - f)^2 / sum (y - mean y)^2``, of several values the mean of each one's; ``None`` where the
    targets do not vary. Over all domains the mean is that of all.
    """

    means: ClassVar[Sequence[str]] = ("mean_value", "value_spread")

    def __init__(self, domain_names: list[str], counted: list[str] | None = None) -> None:
        super().__init__(domain_names, counted)
        self._sums: list[Tensor | None] = [None] * len(domain_names)  # (5, D) of each domain, see _sums_of

    def domain_number(self, name: str) -> int:
        """As of images."""
        number = super().domain_number(name)
        self._sums += [None] * (len(self.domain_names) - len(self._sums))
        return number

    def _add(self, batch: BatchRecord) -> dict[str, Any]:
        assert isinstance(batch, ValueRecord)
        assert batch.values is not None
        for number in set(batch.domain.tolist()):
            here = batch.domain == number
            self._images[number] += int(here.sum())
            if batch.target is not None:
                sums = _sums_of(batch.values[here], batch.target[here])
                self._labelled[number] += int(sums[0, 0])
                before = self._sums[number]
                self._sums[number] = sums if before is None else merged(before, sums)
        if batch.target is None:
            return {}
        sums = _sums_of(batch.values, batch.target)
        error = errors_of(sums)[0]
        if error is not None:
            self.last["labelled_images"] = int(sums[0, 0])
        said = {"mean_absolute_error": error, "mean_absolute_error_so_far": self.error}
        return {name: value for name, value in said.items() if value is not None}

    @property
    def accuracy(self) -> None:
        """None: values are neither right nor wrong."""

    def domain_accuracy(self, name: str) -> None:
        """None, too."""

    @property
    def error(self) -> float | None:
        """Mean absolute error so far, of the domains that count; ``None`` without targets."""
        return errors_of(self._all([n for n, counted in enumerate(self._counted) if counted]))[0]

    def _all(self, numbers: Sequence[int]) -> Tensor | None:
        total: Tensor | None = None
        for number in numbers:
            sums = self._sums[number]
            if sums is not None:
                total = sums if total is None else merged(total, sums)
        return total

    def _part(self, numbers: Sequence[int]) -> dict[str, Any]:
        error, r2 = errors_of(self._all(numbers))
        return {"images": sum(self._images[number] for number in numbers), "mean_absolute_error": error, "r2": r2}

    def result(self, visits: int | None = None) -> dict[str, Any]:
        """The numbers of ``report.json``: those of images without what is of classes, and the errors."""
        counted = [n for n, each in enumerate(self._counted) if each]
        error, r2 = errors_of(self._all(counted))
        labelled = sum(compress(self._labelled, self._counted))
        values = {"labelled_images": labelled, "mean_absolute_error": error, "r2": r2}
        return {**super().result(visits), **values}


def _sums_of(values: Tensor, target: Tensor) -> Tensor:
    """Of images with value and target, float64 (5, D): count, mean of y, sums of (y - mean)^2, |y - f|, (y - f)^2."""
    known = values.isfinite().all(1) & target.isfinite().all(1)
    f, y = values[known].double(), target[known].double()
    if not len(y):
        return torch.zeros(5, target.shape[1], dtype=torch.float64)
    mean = y.mean(0)
    count = torch.full_like(mean, float(len(y)))
    return torch.stack([count, mean, (y - mean).square().sum(0), (y - f).abs().sum(0), (y - f).square().sum(0)])


def merged(a: Tensor, b: Tensor) -> Tensor:
    """Sums of two sets together (Chan, Golub and LeVeque)."""
    count = a[0] + b[0]
    share, apart = b[0] / count.clamp_min(1), b[1] - a[1]
    spread = a[2] + b[2] + apart.square() * a[0] * share
    return torch.stack([count, a[1] + apart * share, spread, a[3] + b[3], a[4] + b[4]])


def errors_of(sums: Tensor | None) -> tuple[float | None, float | None]:
    """Mean absolute error, over images and values, and R2."""
    if sums is None or not bool(sums[0, 0]):
        return None, None
    r2 = float((1 - sums[4] / sums[2]).mean()) if bool((sums[2] > 0).all()) else None
    return float((sums[3] / sums[0]).mean()), r2


class ValueWriter(PredictionWriter):
    """Appends every batch to ``predictions.csv``: one line per image, with the ``value`` predicted and the ``target``.

    Several values of an image stand in one column, with a space between; a value that is not known is ``nan``.
    """

    columns: ClassVar[tuple[str, ...]] = ("index", "domain")
    names: ClassVar[tuple[str, ...]] = ("value", "target", "file")

    def _begin(self, run: StreamRun) -> None: ...

    def texts(self, run: StreamRun, output: Outputs) -> dict[str, list[str]]:
        """The columns of :attr:`names`."""
        batch, none = run.batch, [""] * len(output["index"])
        if not isinstance(batch, ValueRecord):
            return dict.fromkeys(self.names, none)
        return {
            "value": _written(output["prediction"]),
            "target": none if batch.target is None else _written(batch.target),
            "file": [printable(name) for name in batch.files] or none,
        }


def _written(values: Tensor) -> list[str]:
    return [" ".join(f"{value:.6g}" for value in row) for row in values.tolist()]


def make_value_record(**fields: Any) -> ValueRecord:
    """A record of what :meth:`Values.read` gives."""
    return ValueRecord(torch.zeros(len(fields["index"]), 0), **fields)


class Values(Outcome):
    """Values, of no classes."""

    account = ValueSummary
    record = staticmethod(make_value_record)
    writer = ValueWriter

    def read(self, output: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Values (B, D), NaN where the pixels of an image are not finite: there is no zero that says so."""
        finite = images.isfinite().flatten(1).all(1)
        return {"values": torch.where(finite[:, None], output.detach(), torch.nan)}

    def truth(
        self, batch: Mapping[str, Any], output: Tensor, label: Tensor, classes: Sequence[int] | None
    ) -> dict[str, Any]:
        """The values to predict."""
        known = {"label": torch.full((len(label),), -1)}
        target = batch.get("target")
        if target is None:
            return known
        shape = (len(label), output.shape[1])
        fits = isinstance(target, Tensor) and tuple(target.shape) in (shape, shape[:1] if shape[1] == 1 else shape)
        if not fits:
            got = f"{target.dtype} {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
            raise DataError(
                f"batch['target'] must be values {shape} (B, D), as many as the net gives; got {got}. Take a net with "
                "an output for each value."
            )
        return {**known, "target": target.cpu().float().view(shape)}
