"""Writes ``results/dense.md`` from the reports of finished runs; no number of the page is typed by hand.

    python docs/dense.py runs --hardware "two x86-64 cores"

Folders hold ``shapes/benchmark`` and ``angles/benchmark``, the outputs of ``configs/shapes/benchmark.yaml`` and
``configs/angles/benchmark.yaml``, finished or not: what is missing is named. A seed is a training of the source net and
an order of the stream; a difference is that of one net on one stream.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from lightning_tta import DigitAnglesData, ShapesData
from lightning_tta.errors import DataError
from lightning_tta.report.files import days_of, read_result
from lightning_tta.report.runs import ERROR, MEAN_IOU, Measure
from lightning_tta.report.statistics import over_seeds

DOCS = Path(__file__).parent
CONFIGS = DOCS.parent / "configs"
CELL = re.compile(r"(?P<method>.+)-seed(?P<seed>\d+)-[0-9a-f]{8}")
"""The directory of a run in a benchmark."""
SHIFTED, CLEAN = "iid", "clean"
"""The streams of both configurations."""
UNKNOWN = 0.01
"""A class of a smaller IoU on clean images is not known to the net."""

PAGE = """\
# Pixels and values

<!-- Written by docs/dense.py from the reports of runs. Do not edit it here. -->

What adaptation gives a small segmentation net and a small regression under corruptions of severity {severity}.

- A seed is a training of the source net and an order of the stream. After ±: the standard deviation over the seeds; of
  a difference, which is that of the same net on the same stream, half the 95 % interval of its mean (Student's t).
  Bold: the interval leaves out zero, of each alone. The tables by domain are means over the seeds.
- Default options, nothing tuned; back to the source at each domain. Clean: a stream of clean images, where there is
  nothing to gain.
- Hardware: {hardware}, other jobs beside it, so no times are given.
  {date}, torch {torch}.

{sections}
{missing}
```bash
python docs/dense.py runs --hardware "{hardware}"
```
"""

SECTION = """\
## {title}

{about}

<!-- not run: minutes -->
```bash
lightning-tta benchmark --config configs/{name}/benchmark.yaml
```

{seeds}{missing}

{by_method}

{findings}

{by_domain}
"""


@dataclass
class Study:
    """One benchmark's finished runs.

    Attributes:
        name: The folder of its configuration.
        measure: By what runs are judged.
        second: Another number beside it: title, key of the report, factor.
        runs: Reports by stream, method and seed.
        files: Of the reports.
    """

    name: str
    title: str
    measure: Measure
    second: tuple[str, str, float]
    runs: dict[tuple[str, str, int], dict[str, Any]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """Its configuration file."""
        content: dict[str, Any] = yaml.safe_load((CONFIGS / self.name / "benchmark.yaml").read_text())
        return content

    @property
    def methods(self) -> list[str]:
        """Labels of the methods that were run, in the order of the file."""
        ran = {method for _, method, _ in self.runs}
        return [label for label in self.config["methods"] if label in ran]

    @property
    def seeds(self) -> list[int]:
        """All seeds of which there is a run."""
        return sorted({seed for _, _, seed in self.runs})

    @property
    def domains(self) -> list[str]:
        """Of the shifted stream."""
        return list(next(report for (stream, _, _), report in self.runs.items() if stream == SHIFTED)["domains"])

    def values(self, stream: str, method: str, domain: str | None = None, key: str = "") -> dict[int, float]:
        """A number of the reports by seed, as the page shows it; those that are not known are left out."""
        values = {}
        for (of_stream, label, seed), report in self.runs.items():
            if (of_stream, label) == (stream, method):
                value = (report if domain is None else report["domains"].get(domain, {})).get(key or self.measure.key)
                if value is not None:
                    values[seed] = value * (self.measure.scale if not key else 1.0)
        return dict(sorted(values.items()))

    def mean(self, stream: str, method: str, domain: str | None = None) -> float | None:
        """Mean over the seeds."""
        values = self.values(stream, method, domain).values()
        return fmean(values) if values else None

    def of(self, stream: str, method: str) -> list[dict[str, Any]]:
        """The reports of a method on a stream."""
        return [report for key, report in self.runs.items() if key[:2] == (stream, method)]

    def differences(self, method: str, base: str, stream: str = SHIFTED, domain: str | None = None) -> list[float]:
        """From another method, of each seed that both have."""
        ours, theirs = self.values(stream, method, domain), self.values(stream, base, domain)
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]

    def is_better(self, method: str, base: str, stream: str = SHIFTED) -> bool | None:
        """Whether a method is clearly better, or clearly worse; ``None``: neither."""
        estimate = over_seeds(self.differences(method, base, stream))
        return None if estimate is None or not estimate.clear else (estimate.mean * self.measure.sign > 0)


def studies() -> list[Study]:
    """Both, without runs."""
    return [
        Study("shapes", "Shapes, mean IoU in percent", MEAN_IOU, ("pixel accuracy", "accuracy", 100.0)),
        Study("angles", "Angles of digits, mean absolute error in degrees", ERROR, ("R2", "r2", 1.0)),
    ]


def main(args: Sequence[str] | None = None) -> str:
    """Write the page; returns its text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--hardware", required=True, help='such as "two x86-64 cores"')
    parser.add_argument("--out", type=Path, default=DOCS / "results/dense.md")
    options = parser.parse_args(args)
    text = page(read_runs(options.folders), options.hardware)
    options.out.write_text(text)
    return text


def read_runs(folders: Sequence[Path]) -> list[Study]:
    """The finished runs below some folders.

    Raises:
        DataError: If there is none, a run is of no method of its configuration, one was made twice, or runs of one seed
            are not of one protocol.
    """
    found = studies()
    for file in sorted(path for folder in folders for path in folder.rglob("report.json")):
        cell, report = CELL.fullmatch(file.parent.name), read_result(file)
        study = next((each for each in found if each.measure.key in report), None)
        if cell is None or study is None:
            raise DataError(f"{file} is no cell of configs/shapes or configs/angles/benchmark.yaml. Leave it out.")
        key = (file.parent.parent.name, cell["method"], int(cell["seed"]))
        if cell["method"] not in study.config["methods"] or key[0] not in study.config["streams"]:
            raise DataError(f"{file}: configs/{study.name}/benchmark.yaml has no such method or stream. Leave it out.")
        if key in study.runs:
            raise DataError(f"{file}: {' '.join(map(str, key))} has two results. Leave out that of the older options.")
        same = [r for (stream, _, seed), r in study.runs.items() if (stream, seed) == (key[0], key[2])]
        if same and same[0]["protocol"]["hash"] != report["protocol"]["hash"]:
            raise DataError(f"{file} is of another protocol than the other runs of its seed. Leave one out.")
        study.runs[key] = report
        study.files.append(file)
    found = [study for study in found if any(stream == SHIFTED for stream, _, _ in study.runs)]
    if not found:
        raise DataError(f"No finished run below {', '.join(map(str, folders))}. Run the benchmarks first.")
    return found


def page(found: Sequence[Study], hardware: str) -> str:
    """The text of the page."""
    reports = [report for study in found for report in study.runs.values()]
    abouts = {"shapes": about_shapes, "angles": about_angles}
    missing = [
        f"`configs/{each.name}/benchmark.yaml`" for each in studies() if each.name not in {s.name for s in found}
    ]
    return PAGE.format(
        severity=_only(report["protocol"].get("severity") for report in reports if report["protocol"].get("severity")),
        hardware=hardware,
        date=days_of([file for study in found for file in study.files]),
        torch=_only(report["environment"]["torch"] for report in reports),
        sections="\n".join(section(study, abouts[study.name]) for study in found),
        missing=f"No result yet: {', '.join(missing)}.\n" if missing else "",
    )


def section(study: Study, about: Callable[[Study], str]) -> str:
    """A benchmark: what it is, its tables, and what they say."""
    streams, labels, seeds = study.config["streams"], study.config["methods"], study.config["seeds"]
    lacking = [
        f"`{label}` ({stream}, seed {seed})"
        for stream in streams
        for label in labels
        for seed in seeds
        if (stream, label, seed) not in study.runs
    ]
    missing = f" Not run yet, and the command goes on with them: {', '.join(lacking)}." if lacking else ""
    return SECTION.format(
        title=study.title,
        about=about(study),
        name=study.name,
        seeds=f"{len(study.seeds)} seed{'s' * (len(study.seeds) > 1)}.",
        missing=missing,
        by_method=by_method(study),
        findings="\n".join(f"- {sentence}" for sentence in findings(study)),
        by_domain=by_domain(study),
    )


def about_shapes(study: Study) -> str:
    """Net, training and stream, as the configuration says."""
    source = yaml.safe_load((CONFIGS / "shapes/source.yaml").read_text())
    options, protocol = source["model"]["init_args"]["backbone_options"], _protocol(study)
    return (
        f"A U-Net of {options['width']} channels with BatchNorm, trained for {source['trainer']['max_epochs']} epochs "
        f"on clean scenes; {protocol['images_per_domain'][0]} scenes of each domain in batches of "
        f"{protocol['batch_size']}."
    )


def about_angles(study: Study) -> str:
    """The same of the regression."""
    source, protocol = yaml.safe_load((CONFIGS / "angles/source.yaml").read_text()), _protocol(study)
    largest = study.config["data"]["init_args"].get("max_angle", DigitAnglesData().max_angle)
    return (
        f"A small ResNet with BatchNorm, trained for {source['trainer']['max_epochs']} epochs to predict by how many "
        f"degrees a clean digit was turned. Angles are uniform within {largest:g} either way, so that the mean angle "
        f"alone would be wrong by {largest / 2:g}. {protocol['images_per_domain'][0]} digits of each domain in batches "
        f"of {protocol['batch_size']}. Lower is better; of R2 higher."
    )


def by_method(study: Study) -> str:
    """A line a method: all domains together, differences, the second number, clean images."""
    title, key, factor = study.second
    head = ["method", "all domains", "against source", "against norm", title, CLEAN, "clean against source"]
    lines = []
    for label in study.methods:
        second = [factor * value for value in study.values(SHIFTED, label, key=key).values()]
        lines.append(
            [
                f"`{label}`",
                spread(list(study.values(SHIFTED, label).values()), study.measure.digits),
                difference(study, label, "source"),
                difference(study, label, "norm"),
                spread(second, 1 if factor > 1 else 2),
                spread(list(study.values(CLEAN, label).values()), study.measure.digits),
                difference(study, label, "source", CLEAN),
            ]
        )
    return table(head, lines)


def by_domain(study: Study) -> str:
    """A line a domain, means over the seeds."""
    digits = study.measure.digits
    lines = [
        [name, *(_number(study.mean(SHIFTED, label, name), digits) for label in study.methods)]
        for name in study.domains
    ]
    return table(["domain", *(f"`{label}`" for label in study.methods)], lines)


def findings(study: Study) -> list[str]:
    """What the tables say, in sentences."""
    others = [label for label in study.methods if label != "source"]
    verdicts = {True: [], False: [], None: []}  # type: dict[bool | None, list[str]]
    for label in others:
        verdicts[study.is_better(label, "source")].append(f"`{label}`")
    words = {True: "clearly better than the source", False: "clearly worse", None: "not clear"}
    texts = [f"{words[key]}: {', '.join(names)}" for key, names in verdicts.items() if names]
    sentences = [f"All domains: {'; '.join(texts)}."] if texts else []
    if "norm" in study.methods:
        gains = [f"`{x}`" for x in others if x != "norm" and study.is_better(x, "norm")]
        sentences.append(f"Clearly better than statistics of the batch alone (`norm`): {', '.join(gains) or 'none'}.")
        differences = {name: study.differences("norm", "source", domain=name) for name in study.domains}
        worse = [name for name, each in differences.items() if each and fmean(each) * study.measure.sign < 0]
        sentences.append(
            f"`norm` is worse than the source, in the mean over seeds, under: {', '.join(worse) or 'none'}."
        )
    return [*sentences, *_never_predicted(study), *_about_neo(study)]


def _never_predicted(study: Study) -> list[str]:
    """Source nets that know a class of clean images not at all."""
    named = []
    for (stream, label, seed), report in sorted(study.runs.items()):
        if (stream, label) == (CLEAN, "source"):
            pairs = zip(report.get("class_names") or (), report.get("class_iou") or (), strict=False)
            named += [f"`{name}` (seed {seed})" for name, iou in pairs if iou is not None and iou < UNKNOWN]
    if not named:
        return []
    return [
        f"Classes that a source net never predicts on clean images, for its training had not found them: "
        f"{', '.join(named)}. Such a seed widens every ± here."
    ]


def _about_neo(study: Study) -> list[str]:
    """What NEO's raw form does to clean images, where there is no shift to correct: the reason for ``neo``'s."""
    raw, source = ({r["protocol"]["hash"]: r for r in study.of(CLEAN, label)} for label in ("neo_raw", "source"))
    both = [(source[key], raw[key]) for key in raw if key in source and raw[key].get("class_iou")]
    if not both or any(after["class_iou"][0] >= before["class_iou"][0] for before, after in both):
        return []
    background = "; ".join(f"{100 * a['class_iou'][0]:.1f} to {100 * b['class_iou'][0]:.1f}" for a, b in both)
    share = 100 * _background_share()
    changes = study.differences("neo", "source", CLEAN)
    mended = f": clean scenes then change by {max(map(abs, changes)):.1f} points at most" if changes else ""
    return [
        f"NEO's raw form presumes classes of about equal size. Here {share:.0f} % of the pixels are background, so the "
        "mean feature that it takes out is nearly that of the background: on clean scenes, where there is no shift to "
        f"correct, the IoU of the background falls in every seed ({background}), and pixels go to the other classes. "
        "So this is the method, and no fault of the code, which a test compares with a float64 reference. `neo` over "
        f"pixels moves the mean to that of the source instead{mended}."
    ]


def _background_share() -> float:
    return float((ShapesData().clean("test").values == 0).float().mean())


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "-"
    after = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{after}"


def difference(study: Study, label: str, base: str, stream: str = SHIFTED) -> str:
    """Mean difference and half its interval, bold where that leaves out zero."""
    estimate = over_seeds(study.differences(label, base, stream)) if label != base else None
    if estimate is None:
        return "" if label == base else "-"
    digits = study.measure.digits
    after = "" if estimate.half is None else f" ± {estimate.half:.{digits}f}"
    bold = "**" * estimate.clear
    return f"{bold}{estimate.mean:+.{digits}f}{after}{bold}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _protocol(study: Study) -> dict[str, Any]:
    reports = [report for (stream, _, _), report in study.runs.items() if stream == SHIFTED]
    return dict(reports[0]["protocol"])


def _only(values: Any) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))


if __name__ == "__main__":
    main()
