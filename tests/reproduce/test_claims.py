"""Claims as data: each loads, names what exists, and its figures agree with each other; what is missing is said."""

import inspect
from dataclasses import fields
from statistics import fmean

import pytest
import yaml
from torch import nn

from lightning_tta import data as data_modules
from lightning_tta.benchmark.config import StreamConfig
from lightning_tta.data.streams import STREAM_KINDS
from lightning_tta.errors import ConfigError, UnsupportedModelError
from lightning_tta.launch.help import class_options
from lightning_tta.methods import create_method
from lightning_tta.reproduce import page
from lightning_tta.reproduce.claims import EVERY, FOLDER, KINDS, load, matches, names
from lightning_tta.reproduce.needs import PLACES, SETS, nets
from lightning_tta.reproduce.planning import Settings
from lightning_tta.reproduce.rerun import Reproduction
from lightning_tta.shipped import configurations

WANTED = "tent eata sar deyo come cotta rotta roid zerosiam memo cr_memo meta_ttt online".split()
ROUNDED = 0.051  # figures have one digit


def parts():
    return [pytest.param(part, id=f"{name}-{label}") for name in names() for label, part in load(name).parts.items()]


def probe():
    """A net with all that a method may ask for."""
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    return nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def test_all_claims_are_there():
    assert names() == sorted(WANTED)
    for name in names():
        claim = load(name)
        assert "arXiv" in claim.paper or name == "cr_memo"
        assert claim.figures() > 0 or name == "meta_ttt"  # whose tables could not be read
        texts = [*claim.notes, *(text for part in claim.parts.values() for text in (*part.unknown, *part.differs))]
        assert all(text[0].isupper() or text.startswith(("kl_weight", "vit_")) for text in texts)
        assert all(text.endswith(".") for text in texts)  # none is cut at a comma


def placeholders(value):
    if isinstance(value, dict):
        return {found for item in value.values() for found in placeholders(item)}
    if isinstance(value, list):
        return {found for item in value for found in placeholders(item)}
    return {value} if isinstance(value, str) and value.startswith("$") else set()


@pytest.mark.parametrize("part", parts())
def test_a_part_names_what_exists(part):
    kind = getattr(data_modules, part.data["class_path"])
    assert set(part.data["init_args"]) <= set(class_options(kind))
    assert {place[1:] for place in placeholders([part.data, part.nets, part.streams])} <= set(PLACES)
    assert set(part.needs) <= set(SETS)
    for entry in part.nets.values():
        if isinstance(entry, str):
            assert entry in nets()
        else:
            assert (configurations() / entry["fit"]).is_file()
            assert entry.get("start") in (None, *part.nets)
    for stream in part.streams.values():
        assert set(stream) <= {field.name for field in fields(StreamConfig)}
        assert stream["kind"] in STREAM_KINDS
        assert stream["reset"] in ("auto", "domain", "never")
    assert all(set(published.figures) | set(published.domains) for published in part.published)
    assert all(published.stands and published.why for published in part.published)


@pytest.mark.parametrize("part", parts())
def test_methods_take_their_options(part):
    for entry in part.methods.values():
        assert set(entry) <= {"class_path", "init_args", "by_net", "nets", "streams", "model"}
        for options in (entry.get("by_net") or {"": {}}).values():
            try:
                create_method(entry["class_path"], probe(), **{**entry.get("init_args", {}), **options})
            except UnsupportedModelError:
                pass
        if "by_net" in entry:
            assert set(entry["by_net"]) == set(entry.get("nets") or part.nets)


@pytest.mark.parametrize("part", parts())
def test_means_are_those_of_the_figures_that_they_are_of(part):
    """What was copied wrongly would show."""
    for published in part.published:
        for net, methods in published.figures.items():
            for method, mean in methods.items():
                if (values := published.domains.get(net, {}).get(method)) and mean is not None:
                    assert fmean(values) == pytest.approx(mean, abs=2 * ROUNDED), (net, method)
        for method, mean in published.figures.get(EVERY, {}).items():
            values = [by[method] for net, by in published.figures.items() if net != EVERY and method in by]
            assert not values or fmean(values) == pytest.approx(mean, abs=2 * ROUNDED), method


def test_a_wrong_mean_would_be_found():
    part = load("tent").parts["cifar10_c"]
    assert fmean(part.published[0].domains["wrn_28_10"]["tent"]) != pytest.approx(18.8, abs=2 * ROUNDED)


@pytest.mark.parametrize("name", WANTED)
def test_what_is_missing_is_said_with_how_to_get_it(name, tmp_path):
    reproduction = Reproduction(load(name), Settings(root=tmp_path / "nothing"))
    text = page.describe(reproduction.claim, reproduction.plans)
    for label, plan in reproduction.plans.items():
        assert plan.runnable == []
        assert set(plan.missing) == {SETS[need].title for need in plan.part.needs}
        assert f"{label}: {plan.part.title}\n  0 of {len(plan.rows)} rows can run" in text
        for need in plan.part.needs:
            assert SETS[need].layout in text
            for remote in SETS[need].archives.values():
                assert remote.checksum.partition(":")[2] in text or need == "imagenet_c"  # of its five, those in use


def test_rates_are_those_of_the_authors_tables():
    """ZeroSiam's base rates times its two scales, as its README has them, at batch 64 and at batch 1."""
    base = {"resnet50_gn": 2.5e-4, "vit_base": 1e-3, "vit_small": 1e-4, "convnext_tiny": 2.5e-5, "swin_tiny": 5e-5}
    scale = {"resnet50_gn": 10, "vit_base": 5, "vit_small": 10, "convnext_tiny": 10, "swin_tiny": 10}
    predictor = {"resnet50_gn": 100, "vit_base": 5, "vit_small": 100, "convnext_tiny": 100, "swin_tiny": 50}
    parts = load("zerosiam").parts
    for label in ("label_shift", "mixed", "batch_size_1"):
        for net, rate in base.items():
            one = label == "batch_size_1"
            alone = rate / 64 * (2 if net == "resnet50_gn" else 1) if one else rate
            rate = 2 * alone if one else rate  # of SAR, DeYO, COME and ZeroSiam
            methods = parts[label].methods
            assert methods["zerosiam"]["by_net"][net]["lr"] == pytest.approx(rate * scale[net])
            assert methods["zerosiam"]["by_net"][net]["predictor_lr"] == pytest.approx(rate * predictor[net])
            assert methods["sar"]["by_net"][net]["lr"] == pytest.approx(rate)
            assert methods["tent"]["by_net"][net]["lr"] == pytest.approx(alone)
            assert parts[f"{label}_eata"].methods["eata"]["by_net"][net]["lr"] == pytest.approx(alone)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "hearsay"}, "kind must be one of"),
        ({"measure": "loss"}, "measure must be one of"),
        ({"figures": {"wrn_28_10": {"nobody": 3}}}, "figure is of wrn_28_10/nobody"),
        ({"tolerance": {"source": 1}}, "no tolerance for"),
        ({"streams": ["sideways"]}, "streams \\['sideways'\\]"),
        ({"tolerence": 3}, "Did you mean tolerance"),
        ({"domains": {"wrn_28_10": {"tent": [1, 2]}}}, "2 figures for 15 domains"),
    ],
)
def test_a_file_of_ones_own_is_checked(change, words, tmp_path):
    content = yaml.safe_load((FOLDER / "tent.yaml").read_text())
    content["parts"]["cifar10_c"]["published"][0] |= change
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=words):
        load(str(tmp_path / "mine.yaml"))


def test_rows_are_found_by_patterns():
    assert matches(None, "part", "net", "tent")
    assert matches(["tent"], "part", "net", "tent")
    assert matches(["*/net/*"], "part", "net", "tent")
    assert not matches(["part/other/*"], "part", "net", "tent")
    with pytest.raises(ConfigError, match="Did you mean zerosiam"):
        load("zerosima")
    with pytest.raises(ConfigError, match=r"has no part 'cifar'.*Parts: cifar10_c"):
        Reproduction(load("tent"), Settings(only=["cifar"]))
    with pytest.raises(ConfigError, match=r"No row of tent is like 'eata'. Rows: cifar10_c/wrn_28_10/source"):
        Reproduction(load("tent"), Settings(rows=["eata"]))
    with pytest.raises(ConfigError, match=r"paths.imagenet-c: there is no such place. Places: .*imagenet_c"):
        Settings(paths={"imagenet-c": "x"})
    with pytest.raises(ConfigError, match=r"weights.resnet_50.*Did you mean resnet50"):
        Settings(weights={"resnet_50": "x"})


def test_kinds_of_places_are_all_used():
    used = {published.kind for name in names() for part in load(name).parts.values() for published in part.published}
    assert used <= set(KINDS)
    assert inspect.getdoc(Reproduction)
