"""The verdict: one sentence that says no more than the numbers do, in the terminal, in Markdown and on the page."""

import re

import pytest

from lightning_tta.report import write_report
from lightning_tta.report.runs import Group, Run, read
from lightning_tta.report.tables import overview, ranked
from lightning_tta.report.terminal import report
from lightning_tta.report.verdict import verdict
from runs import hits, page_of, row_of, unlabelled, write_benchmark, write_run


def group(tmp_path, accuracies, *, milliseconds=None):
    """A group of runs; ``accuracies``: method -> accuracy of each seed in percent."""
    runs = []
    for method, values in accuracies.items():
        for seed, value in enumerate(values):
            content = {"accuracy": value / 100, "domains": {"fog": {"accuracy": value / 100}, "haze": {}}}
            content["protocol"] = {"data": "digits", "stream": "label_shift", "hash": f"h{seed}"}
            content["net"] = {"name": "gn"}
            if milliseconds:
                content["seconds_per_batch"] = milliseconds[method] / 1000
            runs.append(Run(method, str(seed), {"method": method, **content}, tmp_path))
    return Group("gn, label_shift", runs)


WHERE = "on the label_shift stream of digits with net gn"


def test_the_best_with_how_much_how_sure_and_at_what_cost(tmp_path):
    accuracies = {"source": [75.0, 76.0, 77.0], "tent": [73.0, 76.0, 75.0], "zerosiam": [76.2, 77.5, 78.8]}
    made = group(tmp_path, accuracies, milliseconds={"source": 10, "tent": 30, "zerosiam": 21})
    # 1.2, 1.5, 1.8: mean 1.5, deviation 0.3, half 4.3027 * 0.3 / sqrt(3) = 0.745; tent: 2.8 +- 3.0 below
    assert verdict(made).text == (
        f"zerosiam is best {WHERE}: 77.5 %, 1.5 ± 0.7 points over the source (3 seeds), at 2.1 times the time of the "
        "source. Not distinguishable from it: tent."
    )
    assert verdict(made).best == "zerosiam"
    assert ranked(made) == ["zerosiam", "source", "tent"]


def test_passes_are_the_cost_where_they_are_known(tmp_path):
    """They are exact; times are of runs that may have been made beside other work."""
    passes = {"source": (20, 0), "tent": (10, 10), "sar": (20, 15)}
    made = group(
        tmp_path,
        {"source": [75.0] * 3, "tent": [74, 74, 75], "sar": [77, 78, 79]},
        milliseconds=dict.fromkeys(passes, 9),
    )
    for run in made.runs:
        run.report.update(batches=10, forwards=passes[run.method][0], backwards=passes[run.method][1])
    assert ", at 2.5 times the passes of the source." in verdict(made).text  # (2 + 2 * 1.5) / 2


def test_none_is_better_where_all_are_below_or_the_interval_holds_zero(tmp_path):
    below = verdict(group(tmp_path, {"source": [75, 76, 77], "tent": [70, 71.5, 72], "norm": [60, 61, 63]}))
    assert below.text == (
        f"None is better than the source {WHERE}: source 76.0 %; the highest of the others, tent, is 4.8 ± 0.7 points "
        "below the source (3 seeds)."
    )
    assert below.best == "source"
    unsure = verdict(group(tmp_path, {"source": [75, 76, 77], "tent": [74, 78, 77.6]}))
    assert unsure.text.startswith(
        f"None is better than the source {WHERE}: source 76.0 %; tent is 0.5 ± 3.7 points over"
    )
    assert unsure.text.endswith("the source, not distinguishable from it (3 seeds).")
    assert unsure.best is None  # tent stands above it


@pytest.mark.parametrize(
    ("tent", "best", "words"),
    [
        ([78.0], "tent", "tent is highest .* 78.0 %, 3.0 points over the source .one seed: how sure is not known."),
        (
            [78.0, 80.0],
            "tent",
            "tent is highest .*3.5 points over the source .two seeds, .3.0 and .4.0: how sure is not",
        ),
        (
            [78.0, 75.0],
            None,
            "None is better .*; tent is 1.0 points over the source .two seeds, -1.0 and .3.0: how",
        ),
        ([70.0], "source", "None is better .*; tent is 5.0 points below the source .one seed: how sure is not known."),
    ],
)
def test_one_and_two_seeds_have_no_interval(tmp_path, tent, best, words):
    found = verdict(group(tmp_path, {"source": [75.0, 76.0][: len(tent)], "tent": tent}))
    assert re.match(words, found.text)
    assert "±" not in found.text
    assert found.best == best


def test_one_seed_with_predictions_says_what_its_interval_is_over(tmp_path):
    runs = [write_run(tmp_path / m, m, hits(seed, share)) for m, seed, share in (("source", 0, 0.5), ("tent", 1, 0.8))]
    (made,) = read(runs).groups
    assert "(one seed; ± over 80 images, and not over seeds)" in verdict(made).text
    assert verdict(made).best == "tent"


def test_a_handful_of_images_decides_nothing(tmp_path):
    right = [1] * 40 + [0] * 40
    better = [1] * 44 + [0] * 36  # four images of 80, all in one direction: the sign test gives 0.125
    runs = [write_run(tmp_path / m, m, r) for m, r in (("source", right), ("tent", better))]
    (made,) = read(runs).groups
    assert "not distinguishable from it (one seed" in verdict(made).text
    assert overview(made).rows[0][4] == "0.12"


def test_many_methods_make_one_result_weaker(tmp_path):
    accuracies = {"source": [75, 76, 77], "good": [76.0, 77.5, 77.9]}  # 1.0, 1.5, 0.9: t = 6.1, p = 0.026
    accuracies |= {f"m{n}": [70 + 9 * (n % 2), 71, 79] for n in range(4)}
    text = verdict(group(tmp_path, accuracies)).text
    assert text.startswith("good is best")
    assert "Corrected for the 5 methods here, p is 0.13: weak evidence." in text


def test_without_a_source_or_without_anything_else(tmp_path):
    alone = verdict(group(tmp_path, {"tent": [78.0]}))
    assert alone.text.startswith(f"tent alone {WHERE}: 78.0 %. There is no run of source")
    assert alone.best is None
    two = verdict(group(tmp_path, {"tent": [78.0], "norm": [79.0]}))
    assert two.text.startswith("norm is highest")
    assert two.best == "norm"
    assert verdict(group(tmp_path, {"source": [78.0]})).text == (
        f"source alone {WHERE}: 78.0 %. There is no method to compare it with."
    )


def test_a_method_is_compared_with_the_source_on_the_same_seeds(tmp_path):
    made = group(tmp_path, {"source": [50.0, 90.0], "tent": [60.0, 91.0], "norm": [70.0]})
    assert ranked(made) == ["norm", "tent", "source"]  # 20 above the source on its one seed


def test_the_same_verdict_in_all_three_places(tmp_path, capsys):
    cells = {
        (m, s): hits(10 * s + (m == "tent"), 0.5 + 0.3 * (m == "tent")) for m in ("source", "tent") for s in range(3)
    }
    report([write_benchmark(tmp_path, cells)])
    (made,) = read([tmp_path]).groups
    text = verdict(made).text
    assert text.startswith("tent is best on the iid stream of toy with net net: ")
    page, markdown = page_of([tmp_path / "report.html"]), (tmp_path / "report.md").read_text()
    assert text in page.paragraphs
    assert f"> {text}" in markdown
    assert text in " ".join(capsys.readouterr().out.split())
    marked = [value for tag, name, value in page.attributes if (tag, name, value) == ("tr", "class", "best")]
    assert len(marked) == 1
    assert markdown.count("(best)") == 1


def test_without_labels_no_accuracy_is_shown_anywhere(tmp_path, capsys):
    runs = [unlabelled(write_run(tmp_path / m, m, hits(seed, 0.5))) for seed, m in enumerate(("source", "tent"))]
    report(runs, output=tmp_path)
    page, markdown = page_of([tmp_path / "report.html"]), (tmp_path / "report.md").read_text()
    printed = " ".join(capsys.readouterr().out.split())
    for text in (" ".join(page.paragraphs), markdown, printed):
        assert "No labels on the iid stream of toy with net net: accuracy is not known" in text
    for text in ((tmp_path / "report.html").read_text(), markdown, printed):
        assert not re.search("accuracy(?! is not known)|Accurac", text)
        assert "best)" not in text
    assert row_of(page, "source", 5)[2:] == ["0.750", "-", "30.0"]
    equal = (hits(0, 0.5) == hits(1, 0.5)).mean()
    assert row_of(page, "tent", 5)[3] == f"{100 * equal:.1f}"


def test_a_collapse_is_named_without_labels(tmp_path):
    runs = [unlabelled(write_run(tmp_path / m, m, hits(0, 0.5)), share=s) for m, s in (("source", 0.2), ("tent", 0.95))]
    (made,) = read(runs).groups
    assert "tent gives 95 % of a domain's images one class (source: 20 %): it may have collapsed." in verdict(made).text


def test_title_names_data_and_net(tmp_path):
    page = write_report([write_run(tmp_path / "run", "tent", hits(0, 0.5))])[0].read_text()
    assert "<title>Test-time adaptation: toy, net net</title>" in page


def test_equal_ones_without_a_source_are_level(tmp_path):
    made = verdict(group(tmp_path, {"tent": [70.0], "eta": [70.0], "norm": [60.0]}))
    assert made.text.startswith(f"tent and 1 more are level, and highest, {WHERE}: 70.0 %. There is no run of source")
    assert made.best is None
