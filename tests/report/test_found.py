"""The page "What we found" is made of the studies' results: verdicts, intervals, tables, figures, what is missing."""

import importlib.util
import json
import math
from pathlib import Path
from statistics import fmean, stdev

import pytest
import yaml
from scipy.stats import ttest_1samp

from lightning_tta.benchmark.study import AskConfig, AxisConfig, Study, StudyConfig
from lightning_tta.errors import DataError

DOCS = Path(__file__).parents[2] / "docs"
spec = importlib.util.spec_from_file_location("found", DOCS / "found.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

ASKS = [
    {"say": "Tent gains at 1", "better": "tent", "than": "source", "at": 1},
    {"say": "Tent gains at 8", "better": "tent", "than": "source", "at": 8},
    {"say": "Tent at 8 gains on tent at 1", "better": "tent", "than": "tent", "at": 8, "than_at": 1, "claimed": False},
]
VARY = {"option": "streams.data.batch_size", "values": [1, 8]}
SECTION = {"title": "Batches", "claim": "Tent gains.", "paper": "(A paper.)", "axis": "batch size", "scale": "log"}
TENT = {1: (0.70, 0.74, 0.71), 8: (0.40, 0.43, 0.45)}
SOURCE = (0.6, 0.62, 0.61)


DATA = {"class_path": "lightning_tta.DigitsData", "init_args": {"root": "x", "severity": 5}}


def write_config(folder, name, data=DATA, **changes):
    section = {**SECTION, "vary": VARY, "asks": ASKS, **changes}
    content = {"study": section, "data": data, "streams": {"iid": {"kind": "iid"}}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def write_study(folder, skipped=()):
    entries = {"nets": {"bn": {}}, "streams": {"iid": {}}, "methods": {"source": {}, "tent": {}}}
    config = StudyConfig(**SECTION, vary=AxisConfig(**VARY), asks=[AskConfig(**ask) for ask in ASKS])
    rows = [
        {"net": "bn", "stream": f"iid@{x}", "method": method, "seed": seed, "accuracy": value, "protocol_hash": f"h{x}"}
        for x in (1, 8)
        for method, values in (("source", SOURCE), ("tent", TENT[x]))
        for seed, value in enumerate(values)
    ]
    result = {
        **Study(config, entries).result(rows, skipped),
        "command": "lightning-tta benchmark --config c.yaml --jobs 1 --data.root /a/b/c --nets.bn.source_ckpt=/a/b.pt",
        "data": 'DigitsData {"severity": 5}',
        "environment": {"device": "an abacus CPU", "torch": "2.0"},
    }
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(result))


@pytest.fixture
def configs(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    monkeypatch.setattr(script, "CONFIGS", folder)
    return folder


def test_each_number_is_that_of_the_runs(tmp_path, configs):
    write_config(configs, "zerosiam_batches")
    write_config(configs, "cifar10_all_batches")
    write_study(tmp_path / "runs/zerosiam_batches", [{"cell": "bn/iid@1/norm/seed0", "reason": "unsupported: no"}])
    out, images = tmp_path / "found.md", tmp_path / "images"
    images.mkdir()
    (images / "gone.png").touch()
    arguments = ["--hardware", "beads", "--out", str(out), "--images", str(images)]
    text = script.main([str(tmp_path / "runs"), *arguments])
    assert out.read_text() == text

    def expected(first, second):
        """Mean and half the 95 % interval of three differences."""
        differences = [100 * (a - b) for a, b in zip(first, second, strict=True)]
        return f"({fmean(differences):+.1f} ± {4.302653 * stdev(differences) / math.sqrt(3):.1f} points"

    assert f"- Tent gains at 1: holds here {expected(TENT[1], SOURCE)}" in text
    failed = f"- Tent gains at 8: does not hold here {expected(TENT[8], SOURCE)} of accuracy, 3 seeds)."
    assert text.count(failed) == 2
    assert f"{failed} [Batches (Digits)](#batches-digits)" in text.partition("## Claims that do not hold here")[2]
    assert f"- Asked: Tent at 8 gains on tent at 1: does not hold here {expected(TENT[8], TENT[1])}" in text
    assert "Of 2 claims 1 hold here, 1 do not hold here, 0 are unclear; 1 questions of our own" in text
    assert "| [Batches](#batches-digits) | Digits | 1 | 1 | 0 |" in text
    errors = [100 * (1 - fmean(TENT[x])) for x in (1, 8)]
    assert f"| tent | {errors[0]:.1f} | {errors[1]:.1f} | {fmean(errors):.1f} |" in text
    for words in (
        "an abacus CPU",
        "beads",
        "protocol `h1` and 1 more, all in",
        "- `cifar10_all_batches`: no result yet.",
        "(A paper.)",
    ):
        assert words in text
    held = text.partition("## Claims that hold here")[2].partition("##")[0]
    assert f"- Tent gains at 1: holds here {expected(TENT[1], SOURCE)}" in held
    assert text.index("## ZeroSiam, Digits") < text.index("### Batches (Digits)") < text.index("## Not run")
    assert "Error in percent, mean of 3 seeds" in text
    assert "DigitsData at severity 5, all test images." in text
    assert "- `zerosiam_batches`, bn/iid@1/norm/seed0: unsupported: no" in text
    assert "\nlightning-tta benchmark --config c.yaml --data.root ROOT --nets.bn.source_ckpt=b.pt\n" in text
    (figure,) = images.iterdir()
    assert figure.name == "zerosiam_batches.png"
    assert 1000 < figure.stat().st_size < script.LIMIT


def test_all_tests_are_corrected_together(tmp_path, configs):
    write_config(configs, "all_batches")
    write_study(tmp_path / "all_batches")
    answers = script.read_studies([tmp_path])["all_batches"]["answers"]
    differences = [
        [100 * (a - b) for a, b in zip(first, second, strict=True)]
        for first, second in ((TENT[1], SOURCE), (TENT[8], SOURCE), (TENT[8], TENT[1]))
    ]
    reference = [ttest_1samp(values, 0).pvalue for values in differences]
    assert [script.p_value(answer) for answer in answers] == pytest.approx(reference, rel=1e-4)
    smallest, middle, largest = sorted(reference)
    remaining = [
        smallest * 3 < 0.05,
        max(smallest * 3, middle * 2) < 0.05,
        max(smallest * 3, middle * 2, largest) < 0.05,
    ]
    text = script.page({"all_batches": script.read_studies([tmp_path])["all_batches"]}, "beads")
    assert f"Of the 3 differences that are clear, those asked by us among them, {sum(remaining)} remain at\n" in text
    assert "when all 3 tests are corrected together (Holm)" in text


def test_short_streams_are_said():
    def said(images, stream, **study):
        data = {"init_args": {"num_images": images} if images else {}}
        return script.few_batches({"study": study, "data": data, "streams": {"s": stream}})

    short = {"kind": "iid", "data": {"batch_size": 64}}
    assert "down to 3 batches between" in said(150, short)
    assert said(150, {**short, "data": {"batch_size": 15}}) == ""
    assert said(150, {**short, "reset": "never"}) == ""
    assert said(150, {"kind": "continual", "data": {"batch_size": 64}}) == ""
    assert said(None, short) == ""
    vary = {"option": "streams.data.batch_size", "values": [1, 128]}
    assert "down to 2 batches" in said(150, {"kind": "label_shift"}, vary=vary)


def test_data_in_words():
    options = {"domains": ["gaussian_noise", "haze"], "function_set": "imagenet_c", "severity": 1, "num_images": 1500}
    words = "gaussian noise, haze at severity 1, function set imagenet_c, 1,500 images a domain"
    assert script.described_data(f"FolderData {json.dumps(options)}") == words
    assert script.described_data("MyData") == "MyData, all test images"


def test_a_statement_where_no_claim_failed(configs):
    result = {"title": "T", "answers": [], "missing": [], "series": [], "values": [], "axis": "", "seeds": 3}
    more = {"claim": "", "paper": "", "data": "", "date": "", "environment": {}, "protocols": [], "command": "c"}
    write_config(configs, "all_x")
    text = script.page({"all_x": {**result, **more, "against": ""}}, "beads")
    assert "None of the 0 does; 0 are unclear." in text
    assert "Everything in `configs/studies` was run" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"asks": ASKS[:2]},
        {"asks": [*ASKS[:2], {**ASKS[2], "than_at": 8}]},
        {"vary": {**VARY, "values": [1, 8, 64]}},
        {"data": {**DATA, "init_args": {"severity": 3}}},
    ],
)
def test_results_of_an_older_file_are_refused(tmp_path, configs, changes):
    write_study(tmp_path / "runs/all_batches")
    write_config(configs, "all_batches")
    assert list(script.read_studies([tmp_path])) == ["all_batches"]
    write_config(configs, "all_batches", **changes)
    with pytest.raises(DataError, match=r"has changed since in all_batches.yaml"):
        script.read_studies([tmp_path])


def test_words_are_those_of_the_file_today(tmp_path, configs):
    write_study(tmp_path / "runs/all_batches")
    write_config(
        configs, "all_batches", claim="Tent wins.", axis="images", asks=[{**ASKS[0], "say": "More"}, *ASKS[1:]]
    )
    result = script.read_studies([tmp_path])["all_batches"]
    assert (result["claim"], result["axis"]) == ("Tent wins.", "images")
    assert [answer["say"] for answer in result["answers"]] == ["More", *(ask["say"] for ask in ASKS[1:])]
    assert result["answers"][0]["verdict"] == "holds"


def test_what_the_page_cannot_be_made_of(tmp_path, configs):
    with pytest.raises(DataError, match="No finished study"):
        script.read_studies([tmp_path])
    write_study(tmp_path / "a/all_batches")
    with pytest.raises(DataError, match="no study of configs/studies"):
        script.read_studies([tmp_path])
    write_config(configs, "all_batches")
    write_study(tmp_path / "b/all_batches")
    with pytest.raises(DataError, match="has two results"):
        script.read_studies([tmp_path])


def test_the_page_names_every_study():
    text = (DOCS / "results/found.md").read_text()
    for name in script.names():
        section = f"--config configs/studies/{name}.yaml"
        assert (section in text) != (f"- `{name}`: no result yet." in text), name
        study = yaml.safe_load((script.CONFIGS / f"{name}.yaml").read_text())["study"]
        if section in text:
            assert study["claim"] in text
            assert all(ask["say"] in text for ask in study["asks"])
            assert (DOCS / f"images/studies/{name}.png").stat().st_size < script.LIMIT


NET = {"source_ckpt": "a.pt", "backbone": "timm/test_resnet"}


@pytest.mark.parametrize(
    ("sections", "differs"),
    [
        ({}, ""),
        ({"methods": {"tent": {"class_path": "Tent", "init_args": {"lr": "1e-3"}}}}, ""),  # as YAML reads 1e-3
        ({"nets": {"bn": {**NET, "source_ckpt": "elsewhere/b.pt"}}}, ""),
        ({"nets": {"bn": {**NET, "backbone": "timm/test_vit"}}}, "nets"),
        ({"streams": {"iid": {"kind": "iid", "reset": "never"}}}, "streams"),
        ({"methods": {"tent": {"class_path": "Tent", "init_args": {"lr": 0.01}}}}, "methods"),
        ({"model": {"reset_every": 10}}, "model"),
    ],
)
def test_a_result_of_other_nets_streams_or_methods_is_an_old_one(sections, differs, tmp_path, configs):
    write_config(configs, "zerosiam_batches")
    write_study(tmp_path / "runs/zerosiam_batches")
    made_of = {"nets": {"bn": NET}, "streams": {"iid": {"kind": "iid"}}}
    made_of["methods"] = {"tent": {"class_path": "Tent", "init_args": {"lr": 0.001}}}
    nets = {label: script.NetConfig(**entry) for label, entry in made_of["nets"].items()}
    streams = {label: script.StreamConfig(**entry) for label, entry in made_of["streams"].items()}
    path = tmp_path / "runs/zerosiam_batches/study.json"
    result = json.loads(path.read_text())
    result["sections"] = script.section_digests(nets, streams, made_of["methods"])
    config = yaml.safe_load((configs / "zerosiam_batches.yaml").read_text())
    assert script.difference({**config, **made_of, **sections}, result) == differs
    assert script.difference({**config, **made_of, **sections}, {**result, "sections": {}}) == ""  # an earlier version
