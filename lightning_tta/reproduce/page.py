"""What a reader gets: the plan, the tables of ours beside theirs, ``reproduce.md``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_tta.reproduce.claims import EVERY, KINDS, Claim
from lightning_tta.reproduce.planning import PartPlan

HEADER = ("net", "method", "on", "theirs", "ours", "95 %", "difference", "tolerance", "verdict")


def table(part: Mapping[str, Any]) -> list[list[str]]:
    """The comparisons of a part of ``reproduce.json`` as text, with the columns of :data:`HEADER`."""
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
        for each in part["comparisons"]
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


def describe(claim: Claim, plans: Mapping[str, PartPlan]) -> str:
    """What would run, what is missing, and how to get it."""
    return "\n".join(_describe(claim, plans))


def _describe(claim: Claim, plans: Mapping[str, PartPlan]) -> Iterator[str]:
    told = set[str]()
    yield f"{claim.title}\n{claim.paper}. Code: {claim.code or 'none known'}."
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
        missing = {**plan.missing, **plan.weights, **plan.absent}
        if again := [what for what, how in missing.items() if how in told]:
            yield f"  missing, as above: {', '.join(again)}"
        for what, how in missing.items():
            if how not in told:
                told.add(how)
                yield f"  missing: {what}: {how}"
        for what in plan.part.unknown:
            yield f"  not published: {what}"


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
            ("Missing", [f"{name}: {how}" for name, how in part["missing"].items()]),
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
