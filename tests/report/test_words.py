"""A report calls things by the names of its task: prompts and answers, images and pixels; in text and figures."""

import base64
import itertools
import json
import re

import pytest

from lightning_tta.report import write_report
from lightning_tta.report.figures import TOGETHER, curves_figure, looks
from lightning_tta.report.runs import IMAGES, PIXELS, PROMPTS, VALUES, read
from lightning_tta.report.terminal import print_report, report
from lightning_tta.report.verdict import verdict
from runs import hits, unlabelled, write_benchmark, write_run

OF = {
    "prompts": {"prompts": 80, "generated_tokens": 240, "entropy": 0.1, "logit_norm": 3.0, "largest_class_share": 0.3},
    "pixels": {"mean_iou": 0.5, "class_iou": [0.4, 0.6]},
    "values": {"mean_absolute_error": 0.5, "r2": 0.1},
    "images": {},
}
KINDS = {"prompts": PROMPTS, "pixels": PIXELS, "values": VALUES, "images": IMAGES}
SIZES = {"protocol_changes": {"images": 80, "images_per_domain": (40, 40), "corruption_seed": 0}}


def everything_of(root, cells, **more):
    """All that a reader sees of a benchmark: page, Markdown, the words in the figures."""
    files = write_report([write_benchmark(root, cells, **more)])
    page = files[0].read_text()
    figures = re.findall(r"base64,([A-Za-z0-9+/=]+)", page)
    drawn = [re.findall(r"<!-- (.*?) -->", base64.b64decode(each).decode(), re.DOTALL) for each in figures]
    text = re.sub(r"base64,[A-Za-z0-9+/=]+|<style>.*?</style>|<img|/image|as_image|data:image\S*", "", page, flags=re.S)
    return " ".join([text, files[1].read_text(), *itertools.chain(*drawn)])


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_report_of_prompts_speaks_of_prompts(tmp_path, seeds, capsys):
    cells = {(m, s): hits(10 * s + n, 0.5) for n, m in enumerate(("source", "tent")) for s in range(seeds)}
    more = {method: {**OF["prompts"], **SIZES} for method in ("source", "tent")}
    text = everything_of(tmp_path, cells, **more)
    report([tmp_path])
    for shown in (text, capsys.readouterr().out):
        assert not re.search("image|class(?!=)|corruption", shown.replace("First class", ""), re.IGNORECASE)
    for words in ("prompts seen", "% of prompts", "ms per prompt", "prompts per domain", "most frequent answer %"):
        assert words in text
    assert "forward + 2 x backward per batch, without generation" in text
    if seeds == 1:
        assert "tested over the prompts of this one run" in text
        assert "paired by prompt; ± and p take prompts as independent" in text
        assert "± over 40 prompts" in text  # each in two dialects
    print_report(json.loads(next(tmp_path.rglob("report.json")).read_text()), tmp_path / "x")
    assert "image" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["pixels", "values"])
def test_dense_outputs_are_not_paired_by_image(tmp_path, name):
    """An image is neither right nor wrong there, so that nothing is tested with one seed."""
    cells = {(m, 0): hits(n, 0.5) for n, m in enumerate(("source", "tent"))}
    text = everything_of(tmp_path, cells, **{m: OF[name] for m in ("source", "tent")})
    assert "Differences to the source are not tested." in text
    assert "over the images of this one run" not in text
    assert "images seen" in text
    assert ("most predicted class among the pixels" in text) == (name == "pixels")


@pytest.mark.parametrize(
    ("name", "missing", "collapsed"),
    [
        ("images", "No labels", "95 % of a domain's images one class"),
        ("prompts", "No right answers", "95 % of a domain's prompts one answer"),
        ("pixels", "No masks", "95 % of a domain's pixels one class"),
    ],
)
def test_a_collapse_without_labels_is_said_in_the_tasks_words(tmp_path, name, missing, collapsed):
    more = {**OF[name], **({"mean_iou": None} if name == "pixels" else {}), "skipped_images": 2}
    runs = [
        unlabelled(write_run(tmp_path / m, m, hits(0, 0.5), **more), share=s)
        for m, s in (("source", 0.2), ("tent", 0.95))
    ]
    (group,) = read(runs).groups
    text = verdict(group).text
    assert text.startswith(missing)
    assert collapsed in text
    assert f"Some {group.kind.samples} were skipped." in text
    assert group.kind is KINDS[name]


def test_labels_of_small_panels_do_not_overlap(tmp_path):
    """With more methods than fit into one figure each has two low panels, one over the other."""
    methods = ["source", *(f"tent{n}" for n in range(TOGETHER))]
    write_benchmark(tmp_path, {(m, 0): hits(0, 0.5) for m in methods}, **{m: OF["prompts"] for m in methods})
    (group,) = read([tmp_path]).groups
    drawn = curves_figure(group, looks(methods))
    drawn.draw_without_rendering()
    upper, lower = (axes.yaxis.label.get_window_extent() for axes in drawn.axes[:2])
    assert not upper.overlaps(lower)
