"""The figures of a part beside what its benchmark measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_tta.reproduce.claims import AT, EVERY, Published, figures_of
from lightning_tta.reproduce.planning import PartPlan
from lightning_tta.reproduce.verdict import (
    CHANGED,
    INCOMPLETE,
    NOT_RUN,
    Comparison,
    Row,
    judge,
    measure,
    reversed_pairs,
)


def compare(
    label: str, plan: PartPlan, rows: Sequence[Row], changed: bool, skipped: Mapping[str, str]
) -> tuple[list[Comparison], list[dict[str, Any]]]:
    """Figures of a part beside ours, and the orders of methods that are claimed."""
    part, comparisons, rankings = plan.part, list[Comparison](), list[dict[str, Any]]()
    domains = (part.data.get("init_args") or {}).get("domains")
    for published in part.published:
        entries = [*figures_of(published), *_unknown_figures(published)]
        for net, method, position, theirs, spread in entries:
            wanted = [(n, m) for n, m in plan.rows if m == method and net in (n, EVERY)]
            if not wanted or (net == EVERY and len(wanted) < len([n for n, m in part.rows() if m == method])):
                continue  # rows that were not asked for
            of_domains = [domains[position]] if position is not None and domains else domains
            cells = [
                row
                for row in rows
                if row["method"] == method
                and net in (row["net"], EVERY)
                and row["stream"] in (published.streams or part.streams)
            ]
            why = plan.why_not(net, of_domains)
            named = of_domains or list(dict.fromkeys(name for row in cells for name in row["domains"]))
            ours = None
            if not why and cells:
                ours = (
                    measure(cells, published.measure, named)
                    if of_domains
                    else measure([_one_domain(row) for row in cells], published.measure, ["all"])
                )
            if ours is None and not why:
                reasons = [text for cell, text in skipped.items() if _is_of(cell, net, method)]
                why = reasons[0] if reasons else ""
            tolerance, unlike = published.tolerance_of(method), plan.why_unjudged(of_domains)
            value = ours.value if ours else None
            comparisons.append(
                Comparison(
                    part=label,
                    net="mean of the nets" if net == EVERY else net,
                    method=method,
                    domain=None if position is None else named[0],
                    measure=published.measure,
                    theirs=theirs,
                    spread=spread,
                    ours=value,
                    half=ours.half if ours else None,
                    over=ours.over if ours else None,
                    difference=None if value is None or theirs is None else value - theirs,
                    tolerance=tolerance,
                    verdict=judge(theirs, value, tolerance, changed=changed, why=why, incomplete=unlike),
                    reason=why,
                )
            )
        if published.ranking:
            rankings += _rank(label, published, comparisons, changed, bool(plan.incomplete))
    return comparisons, rankings


def _is_of(cell: str, net: str, method: str) -> bool:
    """Whether a cell ``NET/STREAM/METHOD/seedN`` is of a figure's net and method."""
    of_net, _, of_method, _ = cell.split("/")
    return net in (of_net, EVERY) and of_method.partition(AT)[0] == method


def _one_domain(row: Row) -> dict[str, Any]:
    """A cell whose domains the claim does not name: its images taken together."""
    images = sum(each.get("images") or 0 for each in row["domains"].values())
    return {**row, "domains": {"all": {"accuracy": row["accuracy"], "images": images}}}


def _unknown_figures(published: Published) -> list[tuple[str, str, int | None, Any, float | None]]:
    return [
        (n, m, None, None, None) for n, ms in published.figures.items() for m, figure in ms.items() if figure is None
    ]


def _rank(
    label: str, published: Published, comparisons: Sequence[Comparison], changed: bool, incomplete: bool
) -> list[dict[str, Any]]:
    """Whether the order of the methods is theirs, on each net."""
    found = []
    for net, methods in published.figures.items():
        of_net = [c for c in comparisons if c.part == label and c.net == net and c.method in methods and not c.domain]
        theirs = {c.method: c.theirs for c in of_net if c.theirs is not None}
        ours = {c.method: c.ours for c in of_net if c.ours is not None}
        tolerance = max(published.tolerance_of(method) for method in methods)
        wrong, pairs = reversed_pairs(theirs, ours, tolerance)
        text = (
            CHANGED
            if changed and pairs
            else NOT_RUN
            if not pairs
            else INCOMPLETE
            if incomplete
            else "as theirs"
            if not wrong
            else "other"
        )
        found.append(
            {
                "part": label,
                "net": net,
                "measure": published.measure,
                "theirs": sorted(theirs, key=lambda m: theirs[m]),
                "ours": sorted(ours, key=lambda m: ours[m]),
                "pairs": pairs,
                "reversed": [list(pair) for pair in wrong],
                "verdict": text,
            }
        )
    return found
