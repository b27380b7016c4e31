"""The text of the metrics against the rules of the format, by a parser written from them alone."""

import math
import re

import pytest

from lightning_tta import ConfigError
from lightning_tta.serving.prometheus import Metrics

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (NaN|[+-]Inf|[-+0-9.e]+)")


def parse(text):
    """{name: (kind, help, {(sample's name, labels): value})}; AssertionError where a rule of the format is broken."""
    assert text.endswith("\n")
    families = {}
    current = None
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name, _, words = line[7:].partition(" ")
            assert name not in families, "HELP once"
            current = families[name] = [None, words.replace(r"\n", "\n").replace(r"\\", "\\"), {}]
        elif line.startswith("# TYPE "):
            name, kind = line[7:].split(" ")
            assert families[name] is current
            assert current[0] is None, "TYPE once"
            assert not current[2], "before the samples"
            assert kind in ("counter", "gauge", "histogram")
            current[0] = kind
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            labels = tuple(
                (key, re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), value))
                for key, value in re.findall(LABEL, match[2] or "")
            )
            sample = match[1], labels
            assert re.sub("_(bucket|sum|count)$", "", match[1]) == name or match[1] == name
            assert sample not in current[2], "a sample once"
            current[2][sample] = float(match[match.lastindex].replace("Inf", "inf"))
    return families


def test_counters_gauges_and_histograms():
    metrics = Metrics("x_")
    metrics.declare("seen_total", "counter", "a \\ b\nc", ["by"])
    metrics.declare("rate", "gauge", "no labels")
    metrics.declare("seconds", "histogram", "latency", bounds=[0.1, 1])
    odd = 'quote " backslash \\ line\nend n\\n'
    metrics.add("seen_total", 2, by=odd)
    metrics.add("seen_total", by=odd)
    metrics.add("seen_total", 0.5, by="name")
    metrics.set("rate", math.nan)
    for value in (0.05, 0.1, 0.2, 7):
        metrics.observe("seconds", value)
    families = parse(metrics.text())
    assert families["x_seen_total"] == [
        "counter",
        "a \\ b\nc",
        {("x_seen_total", (("by", odd),)): 3.0, ("x_seen_total", (("by", "name"),)): 0.5},
    ]
    assert math.isnan(families["x_rate"][2]["x_rate", ()])
    assert families["x_seconds"][2] == {
        ("x_seconds_bucket", (("le", "0.1"),)): 2,
        ("x_seconds_bucket", (("le", "1"),)): 3,
        ("x_seconds_bucket", (("le", "+Inf"),)): 4,
        ("x_seconds_sum", ()): pytest.approx(7.35),
        ("x_seconds_count", ()): 4,
    }
    for value, text in ((math.inf, "+Inf"), (-math.inf, "-Inf"), (1e300, "1e+300"), (2.0, "2"), (0.1, "0.1")):
        metrics.set("rate", value)
        assert f"\nx_rate {text}\n" in metrics.text()


@pytest.mark.parametrize(
    "declaration",
    [
        ("with-dash", "gauge", "", ()),
        ("seen", "counter", "", ()),
        ("seen_total", "gauge", "", ()),
        ("rate", "gauge", "", ["le"]),
        ("rate", "gauge", "", ["__reserved"]),
        ("rate", "histogram", "", (), [1, 1]),
    ],
)
def test_what_the_format_does_not_allow(declaration):
    with pytest.raises(ConfigError):
        Metrics().declare(*declaration)


def test_wrong_use():
    metrics = Metrics()
    metrics.declare("seen_total", "counter", "", ["by"])
    with pytest.raises(ConfigError, match="once"):
        metrics.declare("seen_total", "counter", "", ["by"])
    with pytest.raises(ConfigError, match="does not go down"):
        metrics.add("seen_total", -1, by="a")
    with pytest.raises(ConfigError, match="labels"):
        metrics.add("seen_total", of="a")
