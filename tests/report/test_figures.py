"""The report's figures: what they show, and that it fits."""

import re

import pytest
from PIL import Image

from lightning_tta.report.curves import caption, stream_figures, stream_picture
from lightning_tta.report.figures import _apart, front_of, pareto_figure
from lightning_tta.report.runs import Group, Run
from lightning_tta.report.style import COLOURS, KNOWN, drawing, looks
from lightning_tta.report.write import write_picture


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


def group(directory, methods, domains=("fog", "noise")):
    """A run of each method that has 60 batches in every domain."""
    runs = []
    for method in methods:
        run = Run(method, "0", {"domains": {}}, directory)
        shares = {"accuracy": 0.5, "recent_class_share": 0.3, "recent_label_share": 0.1}
        run.batches = [
            {"domain": domain, "images": 10, "images_seen": 600 * place + 10 * number + 10, **shares}
            for place, domain in enumerate(domains)
            for number in range(60)
        ]
        runs.append(run)
    return Group("net, iid", runs)


def sticking_out(figure):
    """How far, in inches, what is drawn goes beyond the figure's edges."""
    with drawing():
        box = figure.get_tightbbox()
    return max(-box.x0, -box.y0, box.x1 - figure.get_figwidth(), box.y1 - figure.get_figheight())


@pytest.mark.parametrize("count", [1, 6, 12])
@pytest.mark.parametrize("domains", [("fog",), ("fog", "a_domain_with_quite_a_long_name"), tuple("abcdefghijklmno")])
def test_names_stay_within_the_figure(tmp_path, count, domains):
    made = group(tmp_path, ["source", *[f"a_rather_long_method_{n}" for n in range(1, count)]], domains)
    with drawing():
        figures = stream_figures(made, looks(made.methods))
    assert len(figures) == (1 if count <= 6 else count)
    assert max(sticking_out(figure) for _, figure in figures) <= 0
    wide = figures[0][1]
    written = {text.get_text() for axes in wide.axes for text in axes.texts}
    assert written == ({*made.methods, *(domains if len(domains) > 1 else ())} if count <= 6 else set())


def test_the_picture_of_twelve_methods(tmp_path):
    made = group(tmp_path, KNOWN[:12])
    assert "Grey line: source" in caption(made)
    with drawing():
        figure = stream_picture(made, looks(KNOWN))
    parts = figure.subfigs
    assert [part.axes[0].get_title(loc="left") for part in parts] == list(KNOWN[:12])
    assert [part.axes[0].lines[1].get_color() for part in parts[1:]] == list(COLOURS[1:12])
    assert write_picture(made, looks(KNOWN), tmp_path / "picture.png") == caption(made)
    image = Image.open(tmp_path / "picture.png").convert("RGB")
    assert image.width > image.height / 2 > 500
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_no_picture_without_batches(tmp_path):
    assert (
        write_picture(Group("net, iid", [Run("tent", "0", {}, tmp_path)]), looks(["tent"]), tmp_path / "a.png") is None
    )
    assert not list(tmp_path.iterdir())


def test_drawing_leaves_the_users_backend_alone(tmp_path):
    import matplotlib

    matplotlib.use("svg")
    write_picture(group(tmp_path, ["source", "tent"]), looks(["source", "tent"]), tmp_path / "a.png")
    assert matplotlib.get_backend() == "svg"


def test_cost_with_long_names_makes_room(tmp_path):
    def width(name):
        with drawing():
            text = pareto_figure({"source": (1.0, 50.0), name: (9.0, 60.0)}, "ms", looks(["source", name]), "id")
        return float(re.search(r'width="([\d.]+)pt"', text)[1])

    assert width("a_rather_long_method_name") - width("source_2") > (25 - 8) * 0.6 * 8  # points of a font of 8
