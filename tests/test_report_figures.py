"""The report's figures: what they show, and that it fits."""

from lightning_tta.reporting.figures import _apart, front_of
from lightning_tta.reporting.style import COLOURS, KNOWN, looks


def test_a_method_keeps_its_look():
    everyone = looks(KNOWN)
    assert len(set(everyone.values())) == len(KNOWN) == 18
    assert len({(look.line, look.marker) for look in everyone.values()}) == 18  # in greyscale too
    first = list(everyone.values())[:12]
    assert len({look.colour for look in first}) == 12
    assert looks(["tent"])["tent"] == looks(["mine", "tent", "source"])["tent"]
    assert looks(["mine"])["mine"] == looks(["other", "mine", "tent"])["mine"]
    many = looks([*KNOWN, *map(str, range(100))])
    assert len(set(many.values())) == len(many)
    assert [name for name, look in many.items() if look.colour == COLOURS[0]] == ["source"]


def test_pareto_front_by_hand():
    points = {"slow": (3.0, 90.0), "fast": (1.0, 70.0), "beaten": (2.0, 65.0), "level": (4.0, 90.0)}
    assert front_of(points) == ["fast", "slow"]


def test_labels_are_moved_apart_within_the_axes():
    assert _apart([1.0, 5.0, 5.0, 5.0, 20.0], 2.0, 0.0, 20.0) == [1.0, 3.0, 5.0, 7.0, 20.0]
    assert _apart([0.0, 0.0, 9.5, 10.0], 1.0, 0.0, 10.0) == [0.0, 1.0, 9.0, 10.0]
    assert _apart([], 1.0, 0.0, 1.0) == []
