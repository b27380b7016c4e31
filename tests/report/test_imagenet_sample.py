"""The page of the ImageNet sample is made of the runs' files: errors, standard errors, what is missing."""

import importlib.util
import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from lightning_tta.errors import DataError
from lightning_tta.methods import find, names
from runs import write_run

DOCS = Path(__file__).parents[2] / "docs"
spec = importlib.util.spec_from_file_location("imagenet_sample", DOCS / "imagenet_sample.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
STREAM = {"images_per_domain": (20, 20), "images": 40, "severity": 3, "batch_size": 10}


def write(root, method, right, name="", data=(), **changes):
    directory = write_run(root / f"{method}{name}", method, right, protocol_changes={**STREAM, **changes})
    settings = {"already_cut": True, "num_source": 200, "num_images": 20, **dict(data)}
    (directory / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": settings}}))
    return directory


def test_each_number_is_that_of_the_images(tmp_path):
    draw = np.random.default_rng(0)
    source, tent, mixed = (draw.random(40) < share for share in (0.5, 0.8, 0.6))
    write(tmp_path, "source", source)
    write(tmp_path, "tent", tent)
    write(tmp_path, "tent", mixed, "-mixed", stream="mixed", reset="never")
    whole = {"num_source": 0, "num_images": None, "already_cut": False}
    write(tmp_path, "source", source, "-whole", whole, domains=("clean",), batch_size=64)
    (tmp_path / "benchmark.json").write_text(
        '{"rows": []}'
    )  # of a benchmark that has ended: its cells count all the same
    text = script.main([str(tmp_path), "--hardware", "an abacus", "--out", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text() == text

    def expected(right, minus=None):
        """By hand: of 20 images in two domains, the mean of both, and its standard error."""
        values = [100 * (1 - (int(right[i]) + int(right[i + 20])) / 2) for i in range(20)]
        if minus is not None:
            values = [v - 100 * (1 - (int(minus[i]) + int(minus[i + 20])) / 2) for i, v in enumerate(values)]
        mean = sum(values) / 20
        return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / 19 / 20)

    rows = {
        line.split(" | ")[0]: line.split(" | ")[1:]
        for line in text.partition("## Clean")[0].splitlines()
        if line.startswith("| `")
    }
    assert rows["| `source`"] == ["1 / 0.5", "{:.1f} ± {:.1f}".format(*expected(source)), "", "-", "- |"]
    change, error = expected(tent, source)
    assert abs(change) > 2 * error  # so that it is bold
    assert rows["| `tent`"][1:3] == ["{:.1f} ± {:.1f}".format(*expected(tent)), f"**{change:+.1f} ± {error:.1f}**"]
    assert rows["| `tent`"][3] == "{:.1f} ± {:.1f}".format(*expected(mixed))
    assert "- A, B: fewer than 10 batches between resets" in text  # of each 4
    for words in ("an abacus", "probably training images", "see 200 others", "20 images", "--data.num_images 20 "):
        assert words in text
    domains = '--data.domains "[fog, noise]"'
    commands = [each.split() for each in text.replace("\\\n", "").split("lightning-tta benchmark ")[1:]]
    iid, mixed, bigger = (" ".join(each) for each in commands)
    both, ten = f"--data.num_images 20 {domains}", "data: {batch_size: 10}"
    assert f'{both} --only "[source, tent]" --streams "{{iid_batch_10: {{kind: iid, {ten}}}}}"' in iid
    assert f'{both} --only "[tent]" --streams "{{mixed_batch_10: {{kind: mixed, {ten}}}}}"' in mixed
    at = "clean: {kind: iid, data: {domains: [clean]}}"
    assert f'--data.num_source 0 --data.already_cut false --only "[source]" --streams "{{{at}}}"' in bigger
    assert "- `norm`, `eata`, `sar`," in text.partition("## Not in the tables")[2]
    assert "mixed, never reset; 20 images, as they are; fog, noise at severity 3; batches of 10; protocol `" in text


def test_what_the_page_cannot_be_made_of(tmp_path):
    with pytest.raises(DataError):
        script.read_runs([tmp_path])
    right = np.arange(40) % 2
    directory = write(tmp_path, "source", right)
    lines = (directory / "predictions.csv").read_text().splitlines(keepends=True)
    (directory / "predictions.csv").write_text("".join(lines[:-2]))
    with pytest.raises(DataError, match="lacks predictions of some images"):
        script.page(script.read_runs([tmp_path]), "none")
    write(tmp_path, "source", right * 0, "-again")
    with pytest.raises(DataError, match="one experiment with two results"):
        script.read_runs([tmp_path])
    write(tmp_path / "clean", "source", right, domains=("clean",))
    with pytest.raises(DataError, match="None of the runs has a corruption"):
        script.page(script.read_runs([tmp_path / "clean"]), "none")


def test_the_methods_settings_are_those_of_their_files():
    configs = DOCS.parent / "configs"
    shipped = yaml.safe_load((configs / "imagenet/sample_benchmark.yaml").read_text())["methods"]
    for name, entry in shipped.items():
        file = configs / f"methods/{name}_imagenet.yaml"
        published = yaml.safe_load(file.read_text())["init_args"] if file.exists() else {}
        usual = {option.name: option.default for option in inspect.signature(find(name)).parameters.values()}
        options = {**usual, **entry.get("init_args", {})}
        assert {option: options[option] for option in published} == published, name


def test_each_method_that_is_missing_has_a_reason():
    lines = script.missing({"source", "memo"}).splitlines()
    reasons = {
        name.strip("`"): why for line in lines for name in line[2:].partition(": ")[0].split(", ") for why in [line]
    }
    shipped = yaml.safe_load(script.CONFIG.read_text())["methods"]
    assert {"source", "memo"} == ({*shipped, *names()} - set(reasons)) & {*shipped, *names()}
    assert "not run yet" in reasons["tent"]
    assert "unless `--only` names it" in reasons["zero"]
    assert "refuses such a net" in reasons["foa"]
    assert "tokens" in reasons["tlm"]
    assert "second task" in reasons["ttt_pp"]
