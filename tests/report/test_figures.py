"""The report's figures: what they show, and that it fits."""

import matplotlib
import pytest
from PIL import Image

from lightning_tta.methods import names
from lightning_tta.report.document import sections
from lightning_tta.report.figures import (
    curves_caption,
    curves_figure,
    domain_spans,
    drawing,
    front_of,
    looks,
    pareto_figure,
    rolling_mean,
)
from lightning_tta.report.runs import Group, Results, Run

NAMES = ["source", *(f"a_rather_long_method_{n:02}" for n in range(1, 18))]


def test_methods_of_a_report_never_look_alike():
    twelve = looks(NAMES[:12])
    assert len({look.color for look in twelve.values()}) == 12
    assert len({(look.line, look.marker) for look in twelve.values()}) == 12  # in greyscale too
    forty = looks(map(str, range(40)))
    assert len({look.color for look in forty.values()}) == len({(look.line, look.marker) for look in forty.values()})
    assert len({look.color for look in forty.values()}) == 41  # and the source
    many = looks([*NAMES, *map(str, range(100))])
    assert len({look.color for look in many.values()}) == len(many)
    assert [name for name, look in many.items() if look.color == "#000000"] == ["source"]
    assert looks(["tent", "norm", "source"]) == looks(["source", "norm", "tent"])  # whatever the order of the runs


def test_a_method_looks_the_same_in_every_report():
    alone, together = looks(["tent"]), looks([*names(), "tent (lr=0.1)", "my_method"])
    assert all(together[name] == looks([name])[name] for name in names())
    assert alone["tent"] == together["tent"] != together["tent (lr=0.1)"]
    assert len({look.color for look in together.values()}) == len(together)


def test_pareto_front_by_hand():
    points = {"slow": (3.0, 90.0), "fast": (1.0, 70.0), "beaten": (2.0, 65.0), "level": (4.0, 90.0)}
    assert front_of(points) == ["fast", "slow"]


def test_rolling_mean_by_hand():
    batches = [
        {"domain": d, "images": n, "accuracy": a} for d, n, a in [("a", 10, 1.0), ("a", 30, 0.0), ("a", 10, 0.5)]
    ]
    batches += [{"domain": "b", "images": 10, "accuracy": None}, {"domain": "b", "images": 10, "accuracy": 0.2}]
    assert rolling_mean(batches, 2) == pytest.approx([100.0, 25.0, 12.5, None, 20.0])
    batches[0]["mean_iou"], batches[1]["mean_iou"] = 0.8, 0.4
    assert rolling_mean(batches, 2, "mean_iou") == pytest.approx([80.0, 50.0, 40.0, None, None])
    assert domain_spans(batches) == [("a", 0, 3), ("b", 3, 5)]
    turns = [{"domain": "ab"[n % 2]} for n in range(100)]
    assert domain_spans(turns) == [("", 0, 100)]


def group(directory, methods, domains=("fog", "noise")):
    """A run of each method that has 60 batches in every domain."""
    runs = []
    for method in methods:
        run = Run(method, "0", {"accuracy": 0.5, "domains": {}}, directory)
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
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    return max(-box.x0, -box.y0, box.x1 - figure.get_figwidth(), box.y1 - figure.get_figheight())


def legend_of(figure):
    return {text.get_text() for legend in figure.legends for text in legend.get_texts()}


@pytest.mark.parametrize("count", [1, 6, 12])
@pytest.mark.parametrize("domains", [("fog",), ("fog", "a_domain_with_quite_a_long_name"), tuple("abcdefghijklmno")])
def test_names_stay_within_the_figure(tmp_path, count, domains):
    made = group(tmp_path, NAMES[:count], domains)
    with drawing():
        figure = curves_figure(made, looks(made.methods))
        assert sticking_out(figure) <= 0.01
    names = {text.get_text() for axes in figure.axes for text in axes.texts}
    if count <= 6:
        assert names == (set(domains) if len(domains) > 1 else set())
        assert legend_of(figure) == (set(made.methods) if count > 1 else set())
    else:
        assert names == set()
        panels = sorted(figure.subfigs, key=lambda panel: (-round(panel.bbox.y0), panel.bbox.x0))  # as they are read
        assert [panel.axes[0].get_title(loc="left") for panel in panels] == list(made.methods)
        lines = [panel.axes[0].lines[1].get_color() for panel in panels[1:]]
        assert lines == [looks(made.methods)[method].color for method in NAMES[1:count]]
        assert len(set(lines)) == count - 1


def test_caption_names_what_a_figure_of_many_methods_cannot(tmp_path):
    said = curves_caption(group(tmp_path, NAMES[:12]))
    assert "Grey line: source. The domains, in turn: fog, noise." in said
    assert "Grey line" not in curves_caption(group(tmp_path, NAMES[1:12]))
    assert "in turn" not in curves_caption(group(tmp_path, NAMES[:6]))


def test_cost_of_many_methods_has_a_legend_within_the_figure():
    points = {name: (1.0 + place, 50.0 + place) for place, name in enumerate(NAMES)}
    with drawing():
        figure = pareto_figure("ms per image", points, looks(NAMES))
        assert sticking_out(figure) <= 0.01
    assert legend_of(figure) == set(NAMES)


def test_curves_as_a_picture(tmp_path):
    made = Results([group(tmp_path, NAMES[:2])])
    backend = matplotlib.get_backend()
    with drawing():
        found = sections(made, looks(made.methods))
        ((gallery,),) = [section.galleries for section in found if section.galleries]
        gallery.figures[0][1].savefig(tmp_path / gallery.file)
    assert gallery.file == "net-iid.png"
    image = Image.open(tmp_path / gallery.file).convert("RGB")
    assert image.width > image.height > 400
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert matplotlib.get_backend() == backend
    empty = sections(Results([Group("net, iid", [Run("tent", "0", {}, tmp_path)])]), looks(["tent"]))
    assert not [section for section in empty if section.galleries]
