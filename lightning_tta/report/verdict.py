"""What a group's numbers come to, in one sentence: which method, how much, how sure, on which stream, at what cost."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_tta.report.runs import ACCURACY, Group
from lightning_tta.report.statistics import Estimate, holm, interval
from lightning_tta.report.tables import accuracy_of, class_share, costs, difference, differences, known, ranked

ALPHA = 0.05
COLLAPSE = 0.3
"""A method whose largest class share is so much above the source's is named where no label tells."""


@dataclass(frozen=True)
class Verdict:
    """The sentence, and the label of the row that it calls best."""

    text: str
    best: str | None = None


def verdict(group: Group) -> Verdict:
    """The verdict on a group.

    A method is better than the source where the interval of their difference leaves out zero. Without an interval (one
    or two seeds, and no predictions to pair by image) the sentence says that it is not known how sure this is.
    """
    where = _where(group)
    if not group.labelled:
        return Verdict(_without_labels(group, where))
    top, *_ = order = ranked(group)
    if group.source is None:
        level = len([method for method in order if _mean(group, method) == _mean(group, top)]) - 1
        highest = group.measure.best
        which = (
            "alone" if len(order) == 1 else f"and {level} more are level, and {highest}," if level else f"is {highest}"
        )
        return Verdict(
            f"{top} {which} {where}: {_accuracy(group, top)}. There is no run of source under the same protocol, so it "
            "is not known whether adapting helps.",
            top if len(order) > 1 and not level else None,
        )
    gains, source = differences(group), f"source {_accuracy(group, group.source)}"
    if not gains:
        return Verdict(
            f"source alone {where}: {_accuracy(group, group.source)}. There is no method to compare it with."
        )
    sign, highest = group.measure.sign, group.measure.best
    best = next((m for m in order if m in gains and gains[m].clear and sign * gains[m].mean > 0), None)
    if best is not None:
        return Verdict(_better(group, best, gains, where), best)
    top = next(method for method in order if method in gains)
    gain = gains[top]
    if gain.half is None and min(sign * gain.low, sign * gain.high) > 0:  # nothing to test it by
        return Verdict(f"{top} is {highest} {where}: {_what_it_gives(group, top, gain)}.", top)
    unsure = "" if gain.half is None or gain.clear else ", not distinguishable from it"
    which = f"the {highest} of the others, {top}," if len(gains) > 1 else top
    apart = f"{_points(group, gain)}{unsure} {_how_sure(group, gain)}"
    return Verdict(
        f"None is better than the source {where}: {source}; {which} is {apart}.",
        group.source if order[0] == group.source else None,  # else one is higher, though nobody knows how sure
    )


def _better(group: Group, best: str, gains: dict[str, Estimate], where: str) -> str:
    gain = gains[best]
    text = f"{best} is best {where}: {_what_it_gives(group, best, gain)}."
    others = {m: difference(group, best, base=m) for m in gains if m != best}
    level = [method for method, apart in others.items() if apart and apart.half is not None and not apart.clear]
    if level:
        text += f" Not distinguishable from it: {', '.join(level)}."
    corrected = dict(zip(gains, holm([each.p for each in gains.values()]), strict=True))[best]
    if corrected is not None and corrected >= ALPHA:
        text += f" Corrected for the {len(gains)} methods here, p is {corrected:.2f}: weak evidence."
    return text


def _what_it_gives(group: Group, method: str, gain: Estimate) -> str:
    return f"{_accuracy(group, method)}, {_points(group, gain)} {_how_sure(group, gain)}{_cost(group, method)}"


def _where(group: Group) -> str:
    run = group.runs[0]
    data, stream = run.protocol.get("data"), group.stream or run.protocol.get("stream")
    targets = f" ({group.domains[0]})" if len(group.domains) == 1 and group.domains[0] != "stream" else ""
    net = f" with net {group.net or run.short_net}" if group.net or run.report.get("net") else ""
    if stream in (None, "", "custom"):
        return f"on {data or 'these data'}{targets}{net}"
    return f"on the {stream} stream of {data or 'these data'}{targets}{net}"


def _mean(group: Group, method: str) -> float | None:
    accuracy = accuracy_of(group.methods[method])
    return None if accuracy is None else accuracy.mean


def _accuracy(group: Group, method: str) -> str:
    mean = _mean(group, method)
    words = "" if group.measure is ACCURACY else f"{group.measure.words.removesuffix(' %')} "
    unit = " %" if group.measure.in_percent else ""
    return "accuracy not known" if mean is None else f"{words}{_shown(group, mean)}{unit}"


def _points(group: Group, gain: Estimate) -> str:
    """The difference without its sign, which the words have."""
    half = "" if gain.half is None else f" ± {_shown(group, gain.half)}"
    points = " points" if group.measure.in_percent else ""
    return f"{_shown(group, abs(gain.mean))}{half}{points} {'over' if gain.mean >= 0 else 'below'} the source"


def _shown(group: Group, value: float, sign: str = "") -> str:
    return f"{group.measure.scale * value:{sign}.{group.measure.digits}f}"


def _how_sure(group: Group, gain: Estimate) -> str:
    if gain.over == "samples":
        return f"(one seed; ± over {gain.count:,} {group.kind.samples}, and not over seeds)"
    if gain.half is not None:
        return f"({gain.count} seeds)"
    if gain.count == 2:
        low, high = (_shown(group, value, "+") for value in (gain.low, gain.high))
        return f"(two seeds, {low} and {high}: how sure is not known)"
    return "(one seed: how sure is not known)"


def _cost(group: Group, method: str) -> str:
    """Passes are exact. Times are of runs that may have been made on other days and beside other work."""
    own, base = costs(group.methods[method]), costs(group.methods[group.source or method])
    if own.get("passes") and base.get("passes"):
        return f", at {own['passes'] / base['passes']:.1f} times the passes of the source{group.kind.uncounted}"
    if own.get("ms / batch") and base.get("ms / batch"):
        return f", at {own['ms / batch'] / base['ms / batch']:.1f} times the time of the source"
    return ""


def _without_labels(group: Group, where: str) -> str:
    kind, words = group.kind, group.measure.words.removesuffix(" %")
    text = f"No {kind.truth} {where}: {words} is not known, and no method is called best."
    source = class_share(group.methods[group.source]) if group.source is not None else None
    shares = {method: class_share(runs) for method, runs in group.methods.items()}
    for method, share in shares.items():
        if share is not None and share > (COLLAPSE if source is None else source) + COLLAPSE:
            usual = "" if source is None else f" (source: {100 * source:.0f} %)"
            to = f"{100 * share:.0f} % of a domain's {kind.voter}s one {kind.choice}"
            text += f" {method} gives {to}{usual}: it may have collapsed."
    skipped = interval(known(run.report.get("skipped_images") for run in group.runs))
    return text + (f" Some {kind.samples} were skipped." if skipped and skipped.high else "")
