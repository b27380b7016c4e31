"""The report's tables: wide ones come in parts that fit the page."""

from itertools import chain

import pytest

from lightning_tta.report.runs import Group, Run
from lightning_tta.report.tables import PAGE, all_groups, by_domain


def group(directory, methods, domains, title="net, iid", seeds=2):
    """Runs with accuracies 0.50, 0.51, ... by method, and a little more in each later domain."""
    runs = []
    for place, method in enumerate(methods):
        for seed in range(seeds):
            accuracy = 0.5 + 0.01 * place + 0.002 * seed
            parts = {name: {"accuracy": accuracy + 0.001 * number} for number, name in enumerate(domains)}
            report = {"accuracy": accuracy, "domains": parts, "protocol": {"hash": f"h{seed}"}}
            runs.append(Run(method, str(seed), report, directory))
    return Group(title, runs)


def widths(grid):
    return [max(map(len, column)) for column in zip(grid.header, *grid.rows, strict=True)]


@pytest.mark.parametrize("length", [6, 22, 200])
def test_many_methods_come_in_parts(tmp_path, length):
    methods = ["source", *[f"m{n}".ljust(length, "x") for n in range(12)]]
    domains = [f"a_domain_{n}" for n in range(15)]
    grids = by_domain(group(tmp_path, methods, domains), methods[1:])
    accuracy = [grid for grid in grids if grid.caption.startswith("Accuracy")]
    gains = [grid for grid in grids if grid.caption.startswith("Difference")]
    for parts, columns in ((accuracy, methods), (gains, methods[1:])):
        assert len(parts) > 1
        assert list(chain(*(grid.header[1:] for grid in parts))) == columns
        assert [grid.caption.split("Part ")[1] for grid in parts] == [
            f"{n} of {len(parts)}." for n in range(1, len(parts) + 1)
        ]
        sizes = [len(grid.header) - 1 for grid in parts]
        assert max(sizes) - sizes[0] == 0
        for grid in parts:
            assert [row[0] for row in grid.rows] == [*domains, "all"]
            assert sum(widths(grid)) + 3 * len(grid.header) <= PAGE or len(grid.header) == 2
    assert accuracy[-1].rows[1][-1] == "62.2 ± 1.3"  # 0.621 and 0.623; t(1) = 12.706
    assert gains[-1].rows[1][-1] == "+12.0 ± 0.0"


def test_few_methods_and_many_methods_of_few_domains_are_one_table(tmp_path):
    few = by_domain(group(tmp_path, ["source", "tent"], ["fog", "noise"]), ["tent"])
    assert [grid.header for grid in few] == [["domain", "source", "tent"], ["domain", "tent"]]
    assert "Part" not in few[0].caption
    many = by_domain(group(tmp_path, ["source", *"abcdef"], ["fog", "noise"]), "abcdef")
    assert [grid.header for grid in many] == [["method", "fog", "noise", "all"]] * 2
    assert many[0].rows[2] == ["b", "52.1 ± 1.3", "52.2 ± 1.3", "52.1 ± 1.3"]
    assert many[0].methods


def test_all_comparisons_beside_each_other(tmp_path):
    first = group(tmp_path, ["source", "tent"], ["fog"], "bn, iid", seeds=1)
    second = group(tmp_path, ["source", "norm"], ["fog"], "gn, iid", seeds=1)
    (grid,) = all_groups([first, second], ["source", "tent", "norm"])
    assert grid.header == ["method", "bn, iid", "gn, iid"]
    assert grid.rows == [["source", "50.0", "50.0"], ["tent", "51.0", "-"], ["norm", "-", "51.0"]]
