"""Writes ``results/found.md`` and its figures from finished studies; no number of the page is typed by hand.

    python docs/found.py runs/studies --hardware "two x86-64 cores"

Folders hold runs of ``configs/studies/*.yaml``, each in a folder with its file's name; what is missing is named. A
study whose values, questions or data have since changed in its file is refused: its command, given again, runs what is
new and keeps the rest. Titles, claims and the words of questions are those of the file today. (Nets, streams and
methods are not compared: a result does not hold them.)
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from scipy.special import stdtr, stdtrit

from lightning_tta.benchmark.config import NetConfig, StreamConfig
from lightning_tta.benchmark.study import section_digests
from lightning_tta.data.streams import RESET_BY_DOMAIN
from lightning_tta.errors import DataError
from lightning_tta.files import read_json
from lightning_tta.report.figures import drawing
from lightning_tta.report.statistics import UPPER, holm
from lightning_tta.report.studies import SPREAD, sentence, study_figure, study_table, verdict

DOCS = Path(__file__).parent
CONFIGS = DOCS.parent / "configs/studies"
FEW = 10
"""So many batches between two resets are few."""
LIMIT = 60_000
"""Bytes of a figure."""
GROUPS = {"zerosiam": "ZeroSiam", "cr_memo": "CR-MEMO", "meta_ttt": "Meta-TTT", "all": "All methods"}
SETS = {"": "Digits", "cifar10_": "CIFAR-10"}
WORDS = {"holds": "hold here", "fails": "do not hold here", "unclear": "are unclear"}

PAGE = """\
# What we found

<!-- Written by docs/found.py from the studies' results. Do not edit it here. -->

Claims of papers, and questions of our own, each rerun by one command: [how a study works](../guides/studies.md).
{counts}

- A difference is that of the accuracies in points, one a seed; after ± half the 95 % interval of its mean (Student's
  t). *Holds here*: the interval lies above zero. *Does not hold here*: below. *Unclear*: it has zero in it.
- Each claim has its own interval: of twenty true differences of zero one would look like a finding.
  {corrected}
- Studies have five seeds; three of Meta-TTT (inner steps, parts, ZeroSiam's objective), which train many nets, have
  three, and its others five by `--seeds`, for with three they stay within five minutes. Most were given five after
  three had been looked at, whatever these had shown; robustness to a wrong rate on digits got smaller batches too. Five
  from the start: six of ZeroSiam on digits (all but the rate), and on CIFAR-10 the views, all methods' batch sizes and
  rates.
- In the figures bands and whiskers reach from the lowest to the highest seed. Nets of different seeds differ much, and
  a difference is taken within a seed: the intervals below the curves are what the verdicts come from.
- *Digits* are the 1,797 images of scikit-learn, with small nets that the study trains itself, one a seed: everything
  runs in minutes, and says how an objective behaves, not what it reaches on ImageNet. On *CIFAR-10* the nets are fixed,
  and each seed takes images of its own.
- Hardware: {hardware}; other jobs ran beside it, so times are compared within one study only.

{overview}

## Claims that do not hold here

{failed}

## Claims that hold here

{held}

{sections}
## Not run

{missing}

```bash
python docs/found.py runs/studies --hardware "{hardware}"
```
"""


def main(args: Sequence[str] | None = None) -> str:
    """Write the page and the figures; returns the page's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--hardware", required=True, help='such as "two x86-64 cores"')
    parser.add_argument("--out", type=Path, default=DOCS / "results/found.md")
    parser.add_argument("--images", type=Path, default=DOCS / "images/studies")
    options = parser.parse_args(args)
    studies = read_studies(options.folders)
    figures = {name: thumbnail(result) for name, result in studies.items()}  # all, before the old ones go
    text = page(studies, options.hardware)
    options.images.mkdir(parents=True, exist_ok=True)
    for old in options.images.glob("*.png"):
        old.unlink()
    for name, figure in figures.items():
        (options.images / f"{name}.png").write_bytes(figure)
    options.out.write_text(text)
    return text


def read_studies(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The results of all finished studies below some folders, by the name of their file.

    Raises:
        DataError: If there is none, or one has been run twice, or is of no file, or of an older version of it.
    """
    studies: dict[str, dict[str, Any]] = {}
    for file in sorted(path for folder in folders for path in folder.rglob("study.json")):
        name, result = file.parent.name, read_json(file)
        config = CONFIGS / f"{name}.yaml"
        if result is None or not config.exists():
            raise DataError(f"{file} is damaged, or no study of configs/studies. Run it again, or leave it out.")
        if name in studies:
            raise DataError(f"{file}: '{name}' has two results. Leave one out.")
        wanted = yaml.safe_load(config.read_text())
        if differs := difference(wanted, result):
            raise DataError(f"{file}: {differs} has changed since in {config.name}. Run the study again.")
        studies[name] = reworded(wanted["study"], result)
    if not studies:
        raise DataError(f"No finished study below {', '.join(map(str, folders))}. Run one of configs/studies first.")
    return {name: studies[name] for name in names() if name in studies}


def names() -> list[str]:
    """All shipped studies, in the order of the page."""
    wanted = [f"{data}{group}_" for data in SETS for group in GROUPS]

    def place(name: str) -> tuple[int, str]:
        return next((n for n, start in enumerate(wanted) if name.startswith(start)), len(wanted)), name

    return sorted((path.stem for path in CONFIGS.glob("*.yaml")), key=place)


def difference(config: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """What of a study's file is not what its result was made of; empty if nothing is."""
    section, data = config["study"], config["data"]
    options = {name: value for name, value in data["init_args"].items() if name != "root"}
    if result["data"] != f"{data['class_path'].rpartition('.')[2]} {json.dumps(options)}":
        return "data"
    of_file = section_digests(
        {label: NetConfig(**entry) for label, entry in config.get("nets", {}).items()},
        {label: StreamConfig(**entry) for label, entry in config["streams"].items()},
        config.get("methods", {}),
        config.get("model"),
        config.get("run"),
    )
    for name, digest in (result.get("sections") or {}).items():  # results of earlier versions have none
        if of_file.get(name) != digest:
            return str(name)
    for name in ("measure", "against"):
        if name in section and section[name] != result.get(name):
            return name
    varied = section.get("vary", {}).get("values", [])
    if list(varied) != result["values"]:
        return "vary.values"
    asks, answers = section.get("asks", []), result["answers"]
    if len(asks) != len(answers) or any(
        answer.get(name) != value
        for ask, answer in zip(asks, answers, strict=True)
        for name, value in ask.items()
        if name != "say"
    ):
        return "asks"
    return ""


def reworded(section: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """The result with the words that its file has today, and its verdicts by the rule of today."""
    words = {name: section[name] for name in ("title", "claim", "paper", "axis") if name in section}
    asks = section.get("asks", [])
    answers = [
        {**answer, "say": ask["say"], "verdict": _verdict(answer)}
        for ask, answer in zip(asks, result["answers"], strict=True)
    ]
    return {**result, **words, "answers": answers}


def _verdict(answer: Mapping[str, Any]) -> str:
    """By the rule of today, of a result that may be older."""
    return "unclear" if answer["mean"] is None else verdict(answer["mean"], answer["half"], answer["margin"])


def thumbnail(result: Mapping[str, Any]) -> bytes:
    """The study's figure as a small PNG.

    Raises:
        DataError: If it is larger than :data:`LIMIT`.
    """
    drawn, small = io.BytesIO(), io.BytesIO()
    with drawing():
        study_figure(result).savefig(drawn, format="png", dpi=100)
    picture = Image.open(drawn).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    if small.tell() > LIMIT:
        raise DataError(f"The figure of '{result['title']}' has {small.tell()} bytes, more than {LIMIT}.")
    return small.getvalue()


def page(studies: Mapping[str, Mapping[str, Any]], hardware: str) -> str:
    """The text of the page."""
    claimed = [a for result in studies.values() for a in result["answers"] if a["claimed"]]
    asked = [a for result in studies.values() for a in result["answers"] if not a["claimed"]]
    counts = ", ".join(f"{_count(claimed, kind)} {words}" for kind, words in WORDS.items())
    missing = [f"- `{name}`: no result yet." for name in names() if name not in studies]
    missing += [f"- `{name}`, {entry}" for name, result in studies.items() for entry in result["missing"]]
    return PAGE.format(
        counts=f"Of {len(claimed)} claims {counts}; {len(asked)} questions of our own stand beside them.",
        hardware=hardware,
        corrected=_corrected(studies),
        overview=_overview(studies),
        failed=_listed(studies, "fails")
        or f"None of the {len(claimed)} does; {_count(claimed, 'unclear')} are unclear.",
        held=_listed(studies, "holds") or f"None of the {len(claimed)} does.",
        sections="\n".join(_sections(studies)),
        missing="\n".join(missing) or "Everything in `configs/studies` was run, and no cell is missing.",
    )


def _listed(studies: Mapping[str, Mapping[str, Any]], kind: str) -> str:
    """The claims with a verdict, a line each."""
    return "\n".join(
        f"- {sentence(answer)} [{_heading(name, result)}]({_anchor(name, result)})"
        for name, result in studies.items()
        for answer in result["answers"]
        if answer["claimed"] and answer["verdict"] == kind
    )


def _corrected(studies: Mapping[str, Mapping[str, Any]]) -> str:
    """How many differences remain when the number of tests is taken into account."""
    answers = [(_heading(name, result), each) for name, result in studies.items() for each in result["answers"]]
    tested = [(of, each) for of, each in answers if each["half"] is not None and each["half"] >= SPREAD]
    clear = [each for _, each in tested if each["verdict"] != "unclear"]
    remaining = [
        f"{of}: {each['say']}"
        for (of, each), p in zip(tested, holm([p_value(each) for _, each in tested]), strict=True)
        if p is not None and p < 0.05
    ]
    which = f": {'; '.join(remaining)}" if 0 < len(remaining) <= 5 else ""
    return (
        f"Of the {len(clear)} differences that are clear, those asked by us among them, {len(remaining)} remain at\n"
        f"  the 5 % level when all {len(tested)} tests are corrected together (Holm){which}."
    )


def p_value(answer: Mapping[str, Any]) -> float:
    """Two-sided, of "the difference is the margin", by Student's t: from the mean and half the 95 % interval."""
    freedom = answer["seeds"] - 1
    error = answer["half"] / stdtrit(freedom, UPPER)
    return float(2 * stdtr(freedom, -abs(answer["mean"] - answer["margin"]) / error))


def _count(answers: Sequence[Mapping[str, Any]], kind: str) -> int:
    return sum(answer["verdict"] == kind for answer in answers)


def _data_of(name: str) -> str:
    return next(title for start, title in reversed(SETS.items()) if name.startswith(start))


def _heading(name: str, result: Mapping[str, Any]) -> str:
    return f"{result['title']} ({_data_of(name)})"


def _anchor(name: str, result: Mapping[str, Any]) -> str:
    """Of the heading, as GitHub and MyST make it."""
    return "#" + re.sub(r"[^\w\- ]", "", _heading(name, result).lower()).replace(" ", "-")


def _overview(studies: Mapping[str, Mapping[str, Any]]) -> str:
    """Studies by rows: claims that hold, fail, are unclear."""
    lines = ["| study | data | holds | does not | unclear |", "|---|---|---:|---:|---:|"]
    for name, result in studies.items():
        claimed = [answer for answer in result["answers"] if answer["claimed"]]
        cells = " | ".join(str(_count(claimed, kind)) for kind in WORDS)
        lines.append(f"| [{result['title']}]({_anchor(name, result)}) | {_data_of(name)} | {cells} |")
    return "\n".join(lines)


def _sections(studies: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The studies, those of a method and a data set below one heading."""
    last = ""
    for name, result in studies.items():
        group = f"{next(title for start, title in GROUPS.items() if f'{start}_' in name)}, {_data_of(name)}"
        if group != last:
            yield f"## {group}\n"
        last = group
        yield section(name, result)


def section(name: str, result: Mapping[str, Any]) -> str:
    """A study: claim, answers, figure, table, and where the numbers come from."""
    claimed = [f"- {sentence(answer)}" for answer in result["answers"] if answer["claimed"]]
    asked = [f"- Asked: {sentence(answer)}" for answer in result["answers"] if not answer["claimed"]]
    environment = result["environment"]
    device = environment.get("device", "").replace(" 1 threads", " 1 thread")
    described = "; ".join(
        [
            f"Error in percent, mean of {result['seeds']} seeds",
            *(["in brackets: " + result["against"].replace("_", " ")] if result["against"] else []),
            *(["mean: over the axis as drawn"] if any("area" in line for line in result["series"]) else []),
            described_data(result["data"]),
        ]
    )
    return f"""### {_heading(name, result)}

{result["claim"]} {result["paper"]}{few_batches(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))}

{chr(10).join([*claimed, *asked])}

![{result["title"]}](../images/studies/{name}.png)

{study_table(result)}

{described}. {result["date"]}, {device}, torch {environment.get("torch", "")};
{_protocols(result["protocols"])}:

```bash
{command_of(result["command"])}
```
"""


def few_batches(config: Mapping[str, Any]) -> str:
    """A warning where a stream has few batches between resets; empty where it has enough, or their number is open."""
    images = config["data"]["init_args"].get("num_images")
    vary = config["study"].get("vary", {})
    varied = vary.get("values", []) if vary.get("option") == "streams.data.batch_size" else []
    batches = [
        -(-images // size)
        for stream in config["streams"].values()
        if images and stream.get("kind", "iid") in RESET_BY_DOMAIN and stream.get("reset", "auto") in ("auto", "domain")
        for size in (varied or [stream.get("data", {}).get("batch_size", 64)])
    ]
    if not batches or min(batches) >= FEW:
        return ""
    return (
        f"\n\n**Short streams**: down to {min(batches)} batches between two resets. A method that predicts before its\n"
        "step, or whose statistics move slowly, has hardly moved by then."
    )


def _protocols(hashes: Sequence[str]) -> str:
    """The first hash, and how many more there are: a study has one for each seed, stream and value."""
    first = f"protocol `{hashes[0]}`" if hashes else "no protocol"
    return f"{first} and {len(hashes) - 1} more, all in the run's `study.json`" if len(hashes) > 1 else first


def described_data(text: str) -> str:
    """The data in words: ``gaussian noise, haze at severity 5, 120 images a domain``."""
    name, _, rest = text.partition(" ")
    options: dict[str, Any] = json.loads(rest or "{}")
    domains, severity, count = (options.pop(key, None) for key in ("domains", "severity", "num_images"))
    words = [name if not domains else ", ".join(map(str, domains)).replace("_", " ")]
    words[0] += f" at severity {severity}" if severity is not None else ""
    words += [f"{key.replace('_', ' ')} {value}" for key, value in options.items()]
    return ", ".join([*words, f"{count:,} images a domain" if count else "all test images"])


def command_of(command: str) -> str:
    """The command of a run without what is of one machine: processes, folders."""
    words = iter(shlex.split(command))
    kept: list[str] = []
    for word in words:
        name, _, value = word.partition("=")
        if name in ("--jobs", "--output"):
            if not value:
                next(words, None)
            continue
        kept.append(f"{name}={_portable(value)}" if value else _portable(word))
    return shlex.join(kept)


def _portable(word: str) -> str:
    path = Path(word)
    if not path.is_absolute():
        return word
    return path.name if path.suffix else "ROOT"


if __name__ == "__main__":
    main()
