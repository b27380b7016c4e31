"""Files that are not as they were published are found before anything runs; what has no effect is refused."""

import numpy as np
import pytest
import torch
import yaml
from rich.cells import cell_len
from rich.console import Console

import published
from lightning_tta.errors import ConfigError
from lightning_tta.report.terminal import print_table
from lightning_tta.reproduce import page
from lightning_tta.reproduce.claims import FOLDER, load
from lightning_tta.reproduce.comparing import compare
from lightning_tta.reproduce.planning import Settings
from lightning_tta.reproduce.rerun import Reproduction

ONE_NET = {"net": "timm/test_resnet"}


def planned(name, root, *parts, **settings):
    reproduction = Reproduction(load(name), Settings(root=root, only=list(parts), **{**ONE_NET, **settings}))
    return reproduction, [reproduction.plans[label] for label in parts]


def cut_off(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def as_float(path):
    np.lib.format.open_memmap(path, "w+", np.float32, (50_000, 32, 32, 3)).flush()


@pytest.mark.parametrize(("damage", "words"), [(cut_off, "not a readable .npy file"), (as_float, "holds float32")])
def test_a_damaged_file_leaves_the_other_domains(damage, words, tmp_path):
    published.cifar10_c(tmp_path, ["fog", "snow"], 8)
    damage(tmp_path / "CIFAR-10-C" / "snow.npy")
    reproduction, (alone, continual) = planned("tent", tmp_path, "cifar10_c", "continual_cifar10_c")
    assert len(alone.runnable) == 3
    assert words in alone.absent["snow"]
    assert "fog" not in alone.absent
    assert alone.why_not("wrn_28_10", ["snow"]) == "snow damaged"
    assert alone.why_not("wrn_28_10", ["frost"]) == "frost missing"
    assert reproduction.benchmark("cifar10_c").data_options["domains"] == ["fog"]
    assert continual.runnable == []  # one domain after the other: nothing without all
    text = page.describe(reproduction.claim, reproduction.plans)
    assert text.count("56bf5dcef84df0e2308c6dcbcbbd8499") == 1  # how to get it is said once
    assert f"damaged: snow: {tmp_path}" in text


def test_labels_of_another_length_leave_nothing(tmp_path):
    published.cifar10_c(tmp_path, ["fog", "snow"], 8)
    np.save(tmp_path / "CIFAR-10-C" / "labels.npy", np.zeros(10_000, np.uint8))
    _, (plan,) = planned("tent", tmp_path, "cifar10_c")
    assert plan.runnable == []
    assert any("labels.npy holds uint8 (10000,)" in text for text in plan.missing.values())


def test_folders_of_fewer_images_run_and_are_not_judged(tmp_path):
    published.imagenet_c(tmp_path, ["fog", "snow"], classes=2)
    _, (plan,) = planned("tent", tmp_path, "imagenet_c", net=None)
    assert plan.incomplete == dict.fromkeys(["snow", "fog"], "4 images; the figures are of 50,000")
    plan.weights.clear()
    domains = {name: {"accuracy": 0.5, "images": 4} for name in ("fog", "snow")}
    row = {"net": "resnet50", "stream": "iid", "method": "tent", "seed": 0, "accuracy": 0.5, "domains": domains}
    comparisons, _ = compare("imagenet_c", plan, [row], False, {})
    verdicts = {each.domain: each.verdict for each in comparisons if each.method == "tent"}
    assert verdicts["fog"] == "not judged: fog: 4 images; the figures are of 50,000"
    assert verdicts["frost"] == "not run: frost missing"


def test_a_class_that_is_missing_is_counted(tmp_path):
    published.pacs(tmp_path)
    for path in (tmp_path / "pacs/kfold/sketch/person").iterdir():
        path.unlink()
    _, (plan,) = planned("meta_ttt", tmp_path, "pacs")
    assert plan.incomplete["sketch"] == "24 images; the figures are of 3,929"
    assert plan.why_unjudged(None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": ["tent", "tnet"]}, "is like 'tnet'. Did you mean tent"),
        ({"seeds": 2, "only": ["cifar10_c"]}, "seeds=2: tent has 1 here"),
        ({"weights": {"vit_base": "x"}}, r"weights.vit_base is not used .* Its nets with weights: wrn_28_10, resnet50"),
        ({"paths": {"pacs": "x"}}, r"paths.pacs is not used .* Its data sets: cifar, imagenet_c"),
        ({"weights": {"resnet50": "x"}, "only": ["cifar10_c"]}, "Its nets with weights: wrn_28_10. Leave"),
        ({"training": {"trainer.max_epochs": 1}}, "no net is trained"),
        ({"net": "timm/test_resnet", "weights": {"resnet50": "x"}}, "exclude each other"),
    ],
)
def test_an_option_without_effect_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Reproduction(load("tent"), Settings(**options))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"needs": ["cifar"]}, "needs must be one of"),
        ({"nets": {"wrn_28_10": "wrn"}}, r"nets.wrn_28_10 must be one of"),
        ({"nets": {"wrn_28_10": {"fit": "nothing.yaml"}}}, "must name a net, or have fit"),
        ({"data": {"class_path": "Cifar"}}, r"data.class_path must be one of"),
        ({"data": {"class_path": "CIFARData", "init_args": {"root": "$cifer"}}}, r"\$cifer must be one of"),
        ({"streams": {"ordered": {"kid": "iid"}}}, "unknown kid. Did you mean kind"),
        ({"methods": {"tent": {"lr": 1}}}, r"methods.tent needs a class_path"),
        ({"methods": []}, "methods must be a mapping"),
    ],
)
def test_a_file_of_ones_own_names_what_exists(change, words, tmp_path):
    content = yaml.safe_load((FOLDER / "tent.yaml").read_text())
    content["parts"]["cifar10_c"] |= change
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=words):
        load(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "is no YAML file"),
        ("- a\n- b", "must be a mapping"),
        ("title: x", "parts must be a mapping"),
        ("parts: {a: {title: x}}", "lacks needs, data, nets"),
    ],
)
def test_what_is_no_claim_is_said(text, words, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load(str(tmp_path / "mine.yaml"))


def entry(method, verdict, ours=None, domain="jpeg_compression"):
    numbers = {"theirs": 43.5, "spread": 0.6, "ours": ours, "half": 1.25, "over": "images", "difference": -12.25}
    return {"net": "n", "method": method, "domain": domain, "measure": "error", "tolerance": 0.1, **numbers} | {
        "verdict": verdict
    }


def test_a_terminal_of_80_columns_holds_the_table_and_the_plan(tmp_path, capsys):
    part = {
        "comparisons": [
            entry("zerosiam", "within tolerance", 31.25),
            entry("zerosiam", "not judged: fog: 4 images; the figures are of 50,000", 3.0, "fog"),
            *[entry("tent", f"not run: {name} missing", None, name) for name in ("snow", "frost", "fog", "contrast")],
        ]
    }
    console = Console(width=80)
    for table in page.narrow_tables(part):
        print_table(console, table)
    text = capsys.readouterr().out
    assert max(map(cell_len, text.splitlines())) <= 80
    assert "snow" not in text  # which was not run
    assert "within 0.1" in text
    assert "not judged" in text
    assert "95 %: over images" in " ".join(text.split())
    lines = list(page.left_out(part))
    assert lines[0].startswith("4 figures not run: snow missing; frost missing; fog missing; ...")
    assert lines[1] == "1 figure not judged: fog: 4 images; the figures are of 50,000."
    reproduction = Reproduction(load("tent"), Settings(root=tmp_path))
    plan = page.describe(reproduction.claim, reproduction.plans, 80)
    assert all(len(line) <= 80 for line in plan.splitlines() if "http" not in line and str(tmp_path) not in line)
    assert plan.split() == page.describe(reproduction.claim, reproduction.plans).split()


def test_a_given_weights_file_of_this_claim_is_taken(tmp_path):
    published.cifar10_c(tmp_path, ["fog"], 8)
    torch.save({}, tmp_path / "mine.pt")
    given = {"wrn_28_10": str(tmp_path / "mine.pt")}
    _, (plan,) = planned("tent", tmp_path, "cifar10_c", net=None, weights=given)
    assert plan.nets["wrn_28_10"].source_ckpt == given["wrn_28_10"]
