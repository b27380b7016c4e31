"""The files of finished runs, found and checked: they may be old, cut off, changed or somebody else's."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_tta.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAMES = ("benchmark.json", "report.json")
Report = Mapping[str, Any]
Predictions = dict[str, "NDArray[np.int64]"]
"""For each domain index, label (-1: not known) and prediction (-1: none) of its images (N, 3), by index."""

_NUMBERS = (
    *("images", "batches", "forwards", "backwards", "resets", "seconds", "seconds_per_batch", "window"),
    *("nll", "brier", "peak_memory_mb", "entropy"),
)
_SHARES = ("accuracy", "ece", "largest_class_share", "source_accuracy_after")
_DICTS = ("protocol", "net", "options", "domains", "visits", "environment", "guard")


def read_result(file: Path) -> dict[str, Any]:
    """The content of a ``report.json`` or ``benchmark.json``.

    Raises:
        DataError: With the file's name, if it is empty, cut off or holds something else.
    """
    try:
        text = file.read_bytes()
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        what = "is empty" if isinstance(error, ValueError) and not text.strip() else f"cannot be read ({error})"
        raise DataError(f"{file} {what}. Run once more, or leave it out.") from error
    if problem := _problem(content):
        raise DataError(f"{file} is no report of a run or benchmark: {problem}. Give a finished run's directory.")
    return dict(content)


def days_of(files: Sequence[Path]) -> str:
    """The day, UTC, on which files were written, or the first and the last: ``1 May 2026 to 3 May 2026``."""
    times = [datetime.fromtimestamp(file.stat().st_mtime, UTC) for file in files]
    first, last = (f"{day.day} {day:%B %Y}" for day in (min(times), max(times)))
    return first if first == last else f"{first} to {last}"


def read_choice(directory: Path) -> dict[str, Any]:
    """What the chooser has written beside a run as ``choice.json``; empty where there is none that can be read."""
    try:
        content = json.loads((directory / "choice.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    candidates = content.get("candidates") if isinstance(content, dict) else None
    if not isinstance(candidates, list) or not isinstance(content.get("choice"), str):
        return {}
    return {**content, "candidates": [each for each in candidates if isinstance(each, dict)]}


def find_results(path: Path) -> tuple[dict[Path, dict[str, Any]], list[str]]:
    """The results of a file, of a run's or benchmark's directory, or of all such directories below one, at any depth.

    Returns:
        The content of each file, and one line for each file below a directory that was left out.

    Raises:
        DataError: If there is no result, or the one that was named cannot be read.
    """
    if path.is_file():
        return {path: read_result(path)}, []
    named = [path / name for name in NAMES if (path / name).is_file()]
    results, left_out = {file: read_result(file) for file in named[:1]}, []
    for file in [] if results else _below(path, set()):
        try:
            results[file] = read_result(file)
        except DataError as error:
            left_out.append(f"Left out: {error}")
    if not results:
        raise DataError(
            " ".join(left_out)
            or f"{path} has no report.json or benchmark.json, nor has a directory below it. Give a finished run's "
            "directory; a run that was cut off has its predictions.csv, but no report."
        )
    return results, left_out


def _below(directory: Path, seen: set[Path]) -> Iterator[Path]:
    """The results at or below a directory; what is below a benchmark's belongs to it."""
    if directory.resolve() in seen:  # a link to a directory above
        return
    seen.add(directory.resolve())
    for name in NAMES:
        if (directory / name).is_file():
            yield directory / name
            return
    for child in sorted(directory.glob("*")):
        if child.is_dir():
            yield from _below(child, seen)


def _problem(content: Any) -> str:
    """What keeps a report or benchmark from being read as one; empty where nothing does."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}"
    if "rows" in content:
        rows, skipped = content["rows"], content.get("skipped", [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            return "its rows are no list of runs"
        if not isinstance(skipped, list) or not all(
            isinstance(each, dict) and {"cell", "reason"} <= each.keys() for each in skipped
        ):
            return "what was skipped has no cell and reason"
        missing = [f"row {n} has no {k}" for n, row in enumerate(rows) for k in _ROW if k not in row]
        return missing[0] if missing else next(filter(None, (_wrong_value(_without_net(row)) for row in rows)), "")
    return _wrong_value(content) if "protocol" in content else "it has neither protocol nor rows"


_ROW = ("method", "net", "stream", "seed")


def _without_net(row: Report) -> Report:
    return {name: value for name, value in row.items() if name != "net"}  # there a label


def _wrong_value(content: Report) -> str:
    """The first entry of the wrong kind."""
    if not isinstance(content.get("method", ""), str):
        return "method is no text"
    for name in _DICTS:
        if not isinstance(content.get(name) or {}, dict):
            return f"{name} is no mapping"
    parts = {**(content.get("domains") or {}), **(content.get("visits") or {})}
    for where, part in (("", content), *parts.items()):
        if not isinstance(part, dict):
            return f"domain {where} is no mapping"
        for name in (*_NUMBERS, *_SHARES):
            value, of = part.get(name), f" of {where}" * bool(where)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                return f"{name}{of} is {value!r}, no number"
            if name in _SHARES and not 0 <= value <= 1:  # NaN neither
                return f"{name}{of} is {value}, not within 0 to 1"
    events = (content.get("guard") or {}).get("events", [])
    return "" if isinstance(events, list) and all(isinstance(e, dict) for e in events) else "its guard has no events"


def read_batches(directory: Path) -> list[dict[str, Any]]:
    """The lines of ``batches.jsonl`` up to the first that is cut off; none where it is missing."""
    path = directory / "batches.jsonl"
    lines: list[dict[str, Any]] = []
    try:
        for line in path.read_text().splitlines():
            batch = json.loads(line)
            if not isinstance(batch, dict) or not {"domain", "images", "images_seen"} <= batch.keys():
                break
            lines.append(batch)
    except (OSError, ValueError):
        pass
    return lines


def read_predictions(directory: Path, report: Report) -> tuple[Predictions, str]:
    """The images of ``predictions.csv``, and why they are not those of the report; empty where they are.

    They are checked against the checksum in the report, where it has one, and against its accuracies. None where the
    file is missing or something is wrong.
    """
    path = directory / "predictions.csv"
    if not path.is_file():
        return {}, ""
    content = path.read_bytes()
    numbers: dict[str, array[int]] = {}
    try:
        lines = csv.reader(io.StringIO(content.decode(), newline=""))
        place = {name: number for number, name in enumerate(next(lines, []))}
        domain, index, label, guess = (place[name] for name in ("domain", "index", "label", "prediction"))
        for line in lines:
            here = numbers.setdefault(line[domain], array("q"))
            here.extend((int(line[index]), int(line[label] or -1), int(line[guess] or -1)))
    except (KeyError, IndexError, ValueError, OverflowError, csv.Error) as error:
        return {}, f"predictions.csv cannot be read ({type(error).__name__}: {error})"
    wanted = report.get("predictions_digest")
    if wanted is not None and wanted != predictions_digest(content):
        return {}, "predictions.csv was changed after the run: its checksum is not the report's"
    unsorted = {name: np.array(each, dtype=np.int64).reshape(-1, 3) for name, each in numbers.items()}
    images = {name: each[np.argsort(each[:, 0], kind="stable")] for name, each in unsorted.items()}
    for name, part in (report.get("domains") or {}).items():
        accuracy, (_, labels, guesses) = part.get("accuracy"), images.get(name, np.empty((0, 3))).T
        labelled = int((labels >= 0).sum())
        if accuracy is None or not labelled:
            continue
        right, predicted = int((labels == guesses)[labels >= 0].sum()), int((guesses[labels >= 0] >= 0).sum())
        # an image without a prediction is wrong or left out, by the version that wrote the report
        if not any(n and math.isclose(right / n, accuracy, abs_tol=1e-9) for n in (predicted, labelled)):
            return {}, (
                f"predictions.csv and report.json disagree: the accuracy of {name} is {100 * right / labelled:.2f} % "
                f"by the images, {100 * accuracy:.2f} % in the report"
            )
    return images, ""


def first_indices(report: Report, images: Predictions) -> dict[str, int]:
    """By domain the index of its first image; so far after it the same image comes in every domain.

    So it is under corruptions: a run numbers images through, one domain after the other. Empty where they are not
    numbered so, or domains have other numbers of images or other labels: then no image is known to come twice. Folders
    of different images that agree in both cannot be told from corruptions; they only make an interval wider.

    Args:
        report: The run's report.
        images: As :func:`read_predictions` gives them; domains that the protocol does not name are left out.
    """
    protocol = report.get("protocol") or {}
    names, counts = protocol.get("domains") or [], protocol.get("images_per_domain") or []
    found: dict[str, int] = {}
    first, labels = 0, np.full(max(counts, default=0), -1)
    for name, count in zip(names, counts, strict=False):
        if name in images:
            place, label = images[name][:, 0] - first, images[name][:, 1]
            if count != len(labels) or not ((0 <= place) & (place < count)).all():
                return {}
            if ((labels[place] >= 0) & (label >= 0) & (labels[place] != label)).any():
                return {}
            labels[place] = np.maximum(label, labels[place])
            found[name] = first
        first += count
    return found


def predictions_digest(content: bytes) -> str:
    """The checksum of a ``predictions.csv``."""
    return hashlib.sha256(content).hexdigest()[:16]
