"""What a reader gets: the plan, the tables of ours beside theirs, ``reproduce.md``."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_tta.report.tables import Table
from lightning_tta.reproduce.claims import EVERY, KINDS, Claim
from lightning_tta.reproduce.planning import NOT_THERE, PartPlan
from lightning_tta.reproduce.verdict import CHANGED, NOT_RUN, OUTSIDE, WITHIN

NARROW = ("method", "on", "theirs", "ours", "95 %", "differ- ence", "verdict")
HEADER = ("net", "method", "on", "theirs", "ours", "95 %", "difference", "tolerance", "verdict")


def table(part: Mapping[str, Any]) -> list[list[str]]:
    """The comparisons of a part of ``reproduce.json`` as text, with the columns of :data:`HEADER`."""
    return _cells(part["comparisons"])


def narrow_tables(part: Mapping[str, Any]) -> Iterator[Table]:
    """The same for a terminal of 80 columns: a table for each net, of the figures that have ours beside them."""
    ran = [each for each in part["comparisons"] if each["ours"] is not None]
    for net in dict.fromkeys(each["net"] for each in ran):
        of_net = [each for each in ran if each["net"] == net]
        over = list(dict.fromkeys(each["over"] for each in of_net if each["over"]))
        rows = [
            [method, domain, theirs, ours, half.partition(" (")[0], difference, _short(verdict, tolerance)]
            for _, method, domain, theirs, ours, half, difference, tolerance, verdict in _cells(of_net)
        ]
        notes = [
            f"{of_net[0]['measure'].capitalize()} in %",
            "difference: ours less theirs, in points",
            *([f"95 %: over {' or '.join(over)}"] if over else []),
            "verdict: with the tolerance in points",
        ]
        yield Table(net, NARROW, rows, f"{'; '.join(notes)}.", left=2)


def _short(verdict: str, tolerance: str) -> str:
    """A verdict in a few letters: ``within 0.3``."""
    if verdict in (WITHIN, OUTSIDE):
        return f"{verdict.split()[0]} {tolerance}"
    return "-" if verdict == CHANGED else verdict.partition(":")[0]  # that it is none stands below


def left_out(part: Mapping[str, Any]) -> Iterator[str]:
    """A line for each reason why figures have none of ours beside them, or are not judged."""
    counts = Counter(each["verdict"] for each in part["comparisons"] if each["ours"] is None or ":" in each["verdict"])
    single = {verdict: count for verdict, count in counts.items() if verdict.startswith(NOT_RUN)}
    if single:
        reasons = list(dict.fromkeys(name for verdict in single for name in [verdict.partition(": ")[2]] if name))
        shown = f": {'; '.join(reasons[:3])}{'; ...' * (len(reasons) > 3)}" if reasons else ""
        yield f"{_figures(sum(single.values()))} {NOT_RUN}{shown}. The table with all stands in reproduce.md."
    for verdict, count in counts.items():
        if verdict not in single:
            yield f"{_figures(count)} {verdict}."


def _figures(count: int) -> str:
    return f"{count} figure{'s' * (count != 1)}"


def _cells(comparisons: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            each["net"],
            each["method"],
            each["domain"] or "mean",
            _number(each["theirs"]) + (f" ± {each['spread']:g}" if each["spread"] is not None else ""),
            _number(each["ours"]),
            "-" if each["half"] is None or math.isnan(each["half"]) else f"± {each['half']:.2f} ({each['over']})",
            _number(each["difference"], "+.2f"),
            f"{each['tolerance']:g}",
            each["verdict"],
        ]
        for each in comparisons
    ]


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else f"{value:{form}}"


def ranking(rank: Mapping[str, Any]) -> str:
    """A sentence about the order of the methods."""
    return (
        f"Order of the methods on {rank['net']}, {rank['measure']}, from the lowest: {rank['verdict']}. Theirs: "
        f"{', '.join(rank['theirs'])}; ours: {', '.join(rank['ours']) or '-'}; {len(rank['reversed'])} of "
        f"{rank['pairs']} pairs that count are reversed."
    )


def describe(claim: Claim, plans: Mapping[str, PartPlan], width: int | None = None) -> str:
    """What would run, what is missing, and how to get it.

    Args:
        claim: The claim.
        plans: Of its parts.
        width: Of a line, which is then broken between words; ``None``: lines are as long as they are.
    """
    lines = _describe(claim, plans)
    return "\n".join(lines if width is None else (hanging(line, width) for line in lines))


def hanging(text: str, width: int) -> str:
    """A text whose lines are broken between words, never in an address or a path, and go on further to the right."""
    left = len(text) - len(text.lstrip(" "))
    return textwrap.fill(
        text, width, subsequent_indent=" " * (left + 4), break_long_words=False, break_on_hyphens=False
    )


def _describe(claim: Claim, plans: Mapping[str, PartPlan]) -> Iterator[str]:
    told = set[Any]()
    yield claim.title
    yield f"{claim.paper}. Code: {claim.code or 'none known'}."
    for note in claim.notes:
        yield f"  note: {note}"
    for label, plan in plans.items():
        yield f"{label}: {plan.part.title}"
        runnable = plan.runnable
        yield f"  {len(runnable)} of {len(plan.rows)} rows can run" + (
            f": {', '.join(f'{net}/{method}' for net, method in runnable)}" if runnable else ""
        )
        if runnable and plan.absent:
            yield f"  without {', '.join(plan.absent)}, so without means"
        for what, how in plan.incomplete.items():
            yield f"  not judged, as images are missing or too many: {what}: {how}"
        missing = {**plan.missing, **plan.weights, **_together(plan.absent)}
        if again := [what for what, how in missing.items() if how in told]:
            yield f"  missing, as above: {', '.join(again)}"
        for what, how in missing.items():
            if how not in told:
                told.add(how)
                damaged = what not in plan.weights and NOT_THERE not in how
                yield f"  {'damaged' if damaged else 'missing'}: {what}: {how}"
        for what, how in plan.ways.items():
            if (what, how) not in told:
                told.add((what, how))
                yield f"  to get {what}: {how}"
        for what in plan.part.unknown:
            yield f"  not published: {what}"


def _together(absent: Mapping[str, str]) -> dict[str, str]:
    """Domains that are not there in one entry, with the first path; what else is wrong stands for itself."""
    simple = [name for name, text in absent.items() if NOT_THERE in text]
    rest = {name: text for name, text in absent.items() if NOT_THERE not in text}
    if not simple:
        return rest
    more = f" Nor are files of the other {len(simple) - 1}." if len(simple) > 1 else ""
    return {", ".join(simple): absent[simple[0]] + more, **rest}


def summary(result: Mapping[str, Any]) -> str:
    """How many figures have which verdict."""
    counts: dict[str, int] = {}
    for part in result["parts"].values():
        for each in part["comparisons"]:
            verdict = each["verdict"].partition(":")[0]
            counts[verdict] = counts.get(verdict, 0) + 1
    return ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items(), key=lambda pair: -pair[1]))


def nothing_ran(label: str, part: Mapping[str, Any]) -> str:
    """A line in place of the table of a part of which nothing ran: why, and how many figures it has."""
    reasons = list(dict.fromkeys(each["reason"] for each in part["comparisons"] if each["reason"]))
    count = sum(each["theirs"] is not None for each in part["comparisons"])
    known = f"its {count} published figures stand" if count > 1 else "what is known of it stands"
    return f"{label}: nothing ran: {'; '.join(reasons) or 'see above'}; {known} in reproduce.md."


def warning(result: Mapping[str, Any]) -> str:
    """A sentence that says that a run is no reproduction; empty: it is one."""
    if result["reproduction"]:
        return ""
    changed = ", ".join(f"{name} {value}" for name, value in result["changed"].items())
    return f"This is no reproduction: the run differs from the paper by option ({changed}). Its numbers say nothing."


def to_markdown(result: Mapping[str, Any]) -> str:
    """``reproduce.md``."""
    lines = [f"# {result['title']}", "", f"{result['paper']}. Code: {result['code'] or 'none known'}.", ""]
    if text := warning(result):
        lines += [f"**{text}**", ""]
    lines += [f"Figures: {summary(result)}. All in percent; a difference is ours less theirs.", ""]
    lines += [f"- {note}" for note in result["notes"]]
    lines += [f"- Weights that were given: {net}, {file}." for net, file in result["weights"].items()]
    for label, part in result["parts"].items():
        lines += ["", f"## {label}: {part['title']}", ""]
        lines += _markdown_table([HEADER, *table(part)])
        lines += ["", *map(ranking, part["rankings"])] if part["rankings"] else []
        for title, entries in (
            (
                "Where the figures stand",
                [
                    f"{each['stands']} (read in: {KINDS[each['kind']]}). Tolerance {_tolerance(each['tolerance'])}: "
                    f"{each['why']}"
                    for each in part["stands"]
                ],
            ),
            ("Missing or damaged", [f"{name}: {how}" for name, how in part["missing"].items()]),
            ("How to get it", [f"{name}: {how}" for name, how in part["ways"].items()]),
            ("Other images than the published figures are of", [f"{k}: {v}." for k, v in part["incomplete"].items()]),
            ("Not published, and what is taken", part["unknown"]),
            ("Known differences from their run", part["differs"]),
            ("Cells that did not run", [f"{each['cell']}: {each['reason']}" for each in part["skipped"]]),
        ):
            lines += ["", f"**{title}**", "", *[f"- {entry}" for entry in entries]] if entries else []
        if part["cells"]:
            hashes = list(dict.fromkeys(cell["protocol_hash"] for cell in part["cells"]))
            lines += ["", f"Protocols: {', '.join(hashes)}. Ran on: {part['devices']}."]
    lines += [
        "",
        f"Command: `{result['command']}`. {result['date']}; {result['environment']['device']}; torch "
        f"{result['environment']['torch']}, lightning_tta {result['environment']['lightning_tta']}.",
        "",
    ]
    return "\n".join(lines)


def _tolerance(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{number:g} ({'others' if name == EVERY else name})" for name, number in value.items())
    return f"{value:g}"


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *rest = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return [head, "|---" * len(rows[0]) + "|", *rest]
