"""``lightning-tta init``, what errors say where the configurations are not, and that a wheel has them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_tta.cli.main import main
from lightning_tta.errors import ConfigError
from lightning_tta.launch.lightning import run_lightning
from lightning_tta.shipped import how_to_copy

ROOT = Path(__file__).parents[2]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.yaml")}


@pytest.mark.parametrize(("args", "folder"), [([], "."), (["new/place"], "new/place")])
def test_init_copies_all_and_tells_what_is_next(args, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["init", *args])
    assert files(tmp_path / folder / "configs") == files(ROOT / "configs")
    out = capsys.readouterr().out
    assert "lightning-tta benchmark --config configs/digits/benchmark.yaml" in out
    assert (f"cd {folder}" in out) == bool(args)


def test_init_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("seed_everything: 3\n")
    with pytest.raises(SystemExit):
        main(["init"])
    assert "configs exists, and nothing was changed. Give another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["configs", "mine.yaml"]


def test_init_says_where_it_cannot_write(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["init", str(tmp_path / "file")])
    assert "cannot be copied to" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["predict", "--config", "configs/digits/predict.yaml"],
        ["predict", "--data", "DigitsData", "--model.method", "configs/methods/tent.yaml"],
    ],
)
def test_a_missing_shipped_file_names_init(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="lightning-tta init copies all configurations"):
        run_lightning(args, parse_only=True)
    with pytest.raises(ConfigError) as caught:
        run_lightning([args[0], "--config", "configs/digits/none.yaml"], parse_only=True)
    assert "init" not in str(caught.value)


def test_a_benchmark_from_another_folder_names_init(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["benchmark", "--config", str(ROOT / "configs/digits/benchmark.yaml")])
    assert "lightning-tta init" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["elsewhere", "project"])
def test_help_names_init_where_there_are_no_configurations(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "project" / "configs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / folder)
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert ("lightning-tta init" in capsys.readouterr().out) == (folder == "elsewhere")


def test_it_is_for_shipped_files_only():
    assert "lightning-tta init" in how_to_copy("configs/digits/source.yaml")
    assert "lightning-tta init" in how_to_copy("/elsewhere/configs/methods/tent.yaml")
    assert how_to_copy("configs/digits/sauce.yaml") == how_to_copy("digits/source.yaml") == how_to_copy("configs") == ""


def test_the_wheel_has_the_configurations(tmp_path):
    """What setuptools puts into a wheel, from a copy: building leaves files beside pyproject.toml."""
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("lightning_tta", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    package = tmp_path / "built" / "lightning_tta"
    assert files(package / "configs") == files(ROOT / "configs")
    assert files(package / "reproduce") == files(ROOT / "lightning_tta/reproduce")  # the claims of papers
    code = f"import sys; sys.path.insert(0, {str(package.parent)!r}); from lightning_tta.shipped import *"
    code += "; print(configurations()); copy_configurations('mine')"
    printed = subprocess.run([sys.executable, "-Ic", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert Path(printed.stdout.strip()) == package / "configs"
    assert files(tmp_path / "mine" / "configs") == files(ROOT / "configs")
