"""The report's tables: what a cell says, and the rule for pairing."""

import pytest

from lightning_tta.report.runs import Group, Results, Run
from lightning_tta.report.statistics import Estimate
from lightning_tta.report.tables import all_groups, by_domain, cell, cost, overview, p_cell, said, spread_note


def group(directory, methods, domains, title="net, iid", seeds=3):
    """Runs with accuracies 0.50, 0.51, ... by method, 0.002 more a seed, and a little more in each later domain."""
    runs = []
    for place, method in enumerate(methods):
        for seed in range(seeds):
            accuracy = 0.5 + 0.01 * place + 0.002 * seed
            parts = {name: {"accuracy": accuracy + 0.001 * number} for number, name in enumerate(domains)}
            report = {"accuracy": accuracy, "domains": parts, "protocol": {"hash": f"h{seed}"}}
            runs.append(Run(method, str(seed), report, directory))
    return Group(title, runs)


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (None, "-"),
        (Estimate(0.768, 0.768, 0.768, 1), "76.8"),
        (Estimate(0.768, 0.695, 0.841, 2), "76.8 [69.5, 84.1]"),
        (Estimate(0.768, 0.7, 0.8, 3, 0.012), "76.8 ± 1.2"),
        (Estimate(0.625, 0.127, 0.935, 3, 1.075), "62.5 [12.7, 93.5]"),  # half an interval beyond what is possible
        (Estimate(0.1, 0.05, 0.2, 3, 0.11), "10.0 [5.0, 20.0]"),
    ],
)
def test_what_a_mean_of_shares_says(estimate, text):
    assert cell(estimate) == text


def test_what_a_difference_says():
    assert cell(Estimate(0.0123, 0, 0.02, 3, 0.01, 0.03), sign="+") == "+1.2 ± 1.0*"
    assert cell(Estimate(-0.5, -1.0, 0, 3, 0.6, 0.1), sign="+") == "-50.0 ± 60.0"
    assert cell(Estimate(0.15, 0.1, 0.2, 2), sign="+") == "+15.0 [+10.0, +20.0]"
    assert [p_cell(p) for p in (None, 0.0001, 0.0123, 0.456)] == ["-", "< 0.001", "0.012", "0.46"]


def test_plus_minus_is_explained_beside_each_table(tmp_path):
    for seeds, words in ((1, "One seed."), (2, "[lowest, highest]"), (3, "n = 3 seeds ± half its 95 %")):
        made = group(tmp_path, ["source", "tent"], ["fog", "noise"], seeds=seeds)
        assert words in spread_note(made)
        for table in (overview(made), by_domain(made)[0]):
            assert spread_note(made) in table.note
            assert any("±" in text for row in table.rows for text in row) == (seeds == 3)


def test_overview_by_hand(tmp_path):
    made = group(tmp_path, ["tent", "source"], ["fog", "noise"])
    for run in made.runs:  # 0.50, 0.502, 0.504 and 0.51, 0.513, 0.518 (+0.000, +0.001, +0.004)
        run.report["accuracy"] += {"0": 0, "1": 0.001, "2": 0.004}[run.seed] * (run.method == "source")
    (source, tent) = overview(made).rows
    # 0.510, 0.513, 0.518: mean 0.51367, deviation 0.0040415, t(2) = 4.3027
    assert source == ["source", "3", "51.4 ± 1.0", "-", "-", "-", "-"]
    # -0.010, -0.011, -0.014: mean -0.011667, deviation 0.0020817, t = -9.7073
    assert tent == ["tent", "3", "50.2 ± 0.5", "-1.2 ± 0.5*", "0.010", "0.010", "-"]


def test_only_runs_of_one_protocol_are_paired(tmp_path):
    made = group(tmp_path, ["source", "tent"], ["fog"])
    made.runs[-1].report["protocol"]["hash"] = "other"
    made.runs[-1].report["accuracy"] = 0.9
    assert overview(made).rows[0][3] == "+1.0 [+1.0, +1.0]"  # two pairs: nothing is tested


def test_methods_in_columns_unless_they_are_many(tmp_path):
    few = by_domain(group(tmp_path, ["source", "tent"], ["fog", "noise"]))
    assert [table.header for table in few] == [["domain", "source", "tent"], ["domain", "tent"]]
    assert few[0].rows[1] == ["noise", "50.3 ± 0.5", "51.3 ± 0.5"]  # 0.503 +- 4.3027 * 0.002 / sqrt(3)
    assert few[1].rows[1] == ["noise", "+1.0 ± 0.0"]
    many = by_domain(group(tmp_path, ["source", *"abcdef"], ["fog", "noise"]))
    assert [table.header for table in many] == [["method", "fog", "noise", "all"]] * 2
    assert many[0].rows[2] == ["b", "52.2 ± 0.5", "52.3 ± 0.5", "52.2 ± 0.5"]
    assert many[0].methods


def test_all_groups_beside_each_other(tmp_path):
    first = group(tmp_path, ["source", "tent"], ["fog"], "bn, iid", seeds=1)
    second = group(tmp_path, ["source", "norm"], ["fog"], "gn, iid", seeds=1)
    table = all_groups(Results([first, second]))
    assert table.header == ["method", "bn, iid", "gn, iid"]
    assert table.rows == [["source", "50.0", "50.0"], ["tent", "51.0", "-"], ["norm", "-", "51.0"]]


def test_cost_by_hand(tmp_path):
    made = group(tmp_path, ["source", "tent"], ["fog"], seeds=2)
    for run in made.runs:
        slow = 1 + 2 * (run.method == "tent")
        run.report |= {"images": 80, "batches": 8, "forwards": 8 * slow, "backwards": 2, "peak_memory_mb": 1234.0}
        run.report |= {"seconds": 0.4 * slow, "seconds_per_batch": 0.05 * slow}
    assert cost(made).rows == [
        ["source", "1", "0.25", "50.0", "1.00", "5.00", "1,234"],
        ["tent", "3", "0.25", "150.0", "3.00", "15.00", "1,234"],
    ]


def test_values_of_json_in_words():
    assert (
        said({"mean": [0.5] * 4, "std": [0.25, 0.5], "size": {"crop": 32}})
        == "mean 4 x 0.5, std 0.25, 0.5, size (crop 32)"
    )
    assert said(None) == said("") == said([]) == "-"
