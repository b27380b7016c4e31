"""Which run is continued, and what of it may be damaged."""

import json
import pickle
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from test_resume import TENT, make_data, results, run

from lightning_tta import ConfigError, DataError, Guard, TestTimeAdaptation
from lightning_tta.cli.main import main
from lightning_tta.errors import FinishedError
from lightning_tta.launch.lightning import run_lightning
from lightning_tta.methods import Source, Tent
from lightning_tta.run.directory import DirectoryLock, read_state
from lightning_tta.run.resume import StateKeeper
from nets import make_net
from runs import directory_of

pytestmark = pytest.mark.usefixtures("one_thread")


def files_of(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", [None, TensorBoardLogger, CSVLogger])
def test_the_directory_follows_from_the_configuration(tmp_path, kind):
    """The same command finds the same run: absent, unfinished, finished; another one has a directory of its own."""
    root = tmp_path if kind is None else tmp_path / "run"

    def logger():
        return False if kind is None else kind(tmp_path, name="run")

    def names():
        return sorted(path.name.partition("-")[0] for path in root.iterdir())

    tent = run(tmp_path, logger=logger(), crash=3).run.directory.path
    source = run(tmp_path, Source, logger=logger(), crash=3).run.directory.path
    assert tent.parent == source.parent == root
    assert names() == ["source", "tent"]
    run(tmp_path, logger=logger(), crash=5)
    trainers = [run(tmp_path, method, logger=logger()).trainer for method in (TENT, Source)]
    if kind is not None:
        assert [Path(trainer.log_dir) for trainer in trainers] == [tent, source]
    assert names() == ["source", "tent"]
    whole = run(tmp_path / "whole").run.directory.path
    assert whole.name == tent.name
    assert results(tent) == results(whole)
    assert results(source)[1]["method"] == "source"
    shutil.rmtree(tmp_path / "whole")
    before = files_of(tmp_path)
    with pytest.raises(FinishedError, match=f"{tent.name} is finished.*{tent.name}/report.json.*restart"):
        run(tmp_path, logger=logger())
    assert files_of(tmp_path) == before


def test_restart_replaces_the_run(tmp_path):
    def logger():
        return TensorBoardLogger(tmp_path, name="run")

    first = run(tmp_path, logger=logger()).run.directory.path
    expected = results(first)
    (first / "report.json").write_text("{}")
    (first / "final_state.pt").write_bytes(b"old")
    assert run(tmp_path, logger=logger(), resume="restart", save_every=None).run.directory.path == first
    assert results(first) == expected
    assert (first / "final_state.pt").read_bytes() != b"old"
    assert len(list(first.glob("events*"))) == len(list(first.glob("hparams.yaml"))) == 1
    run(tmp_path, logger=logger(), resume="restart", crash=5)
    before = (first / "batches.jsonl").read_text()
    run(tmp_path, logger=logger(), resume="restart", crash=1, save_every=None)
    assert len((first / "batches.jsonl").read_text()) < len(before)
    assert not (first / "state.pt").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"method": partial(Tent, lr=2e-2)},
        {"method": Source},
        {"reset_every": 5},
        {"reset": "never"},
        {"data": make_data(order_seed=3)},
        {"channels_last": True},
        {"source_images": 65},
        {"callbacks": [Guard()]},
        {"callbacks": [Guard(window=4)]},
        {"predict": "after"},
        {"precision": "bf16"},
    ],
)
def test_another_configuration_is_another_run(tmp_path, change):
    first = run(tmp_path, crash=3).run.directory
    before = files_of(first.path)
    second = run(tmp_path, crash=1, **change).run.directory
    assert second.path != first.path
    assert files_of(first.path) == before
    run(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"save_every": 1}, {"on_bad_batch": "skip"}, {"log_images": 0}, {"measure_forgetting": True}],
)
def test_what_changes_no_prediction_is_the_same_run(tmp_path, change):
    first = run(tmp_path, crash=3).run.directory.path
    assert run(tmp_path, **change).run.directory.path == first


def test_a_loop_over_methods_with_one_trainer(tmp_path):
    """The Trainer's loggers come back to where they count; its callbacks keep their options."""
    logger = TensorBoardLogger(tmp_path, name="run")
    trainer = Trainer(
        accelerator="cpu", logger=logger, enable_progress_bar=False, callbacks=[StateKeeper(save_every=2)]
    )
    places = []
    for method in (TENT, Source):
        module = TestTimeAdaptation(method, backbone=make_net("bn", num_classes=10))
        trainer.predict(module, datamodule=make_data())
        places.append(module.run.directory.path)
        assert (places[-1] / "final_state.pt").exists()
        assert list(places[-1].glob("events*"))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in places}
    assert len(set(places)) == 2


def test_in_a_named_directory_another_run_is_refused_and_named(tmp_path):
    def named():
        return TensorBoardLogger(tmp_path, name="run", version="x")

    run(tmp_path, logger=named(), crash=3)
    before = files_of(tmp_path)
    for change, words in (
        ({"method": partial(Tent, lr=2e-2)}, "an unfinished run that differs.*method.lr: 0.01 != 0.02"),
        ({"method": Source}, "method: 'tent' != 'source'"),
        ({"reset_every": 5}, "reset_every: None != 5"),
        ({"reset": "never"}, "protocol.reset: 'domain' != 'never'"),
        ({"data": make_data(order_seed=3)}, "protocol.order_seed: 0 != 3"),
        ({"channels_last": True}, "memory_format"),
        ({"callbacks": [Guard()]}, "guard: None != "),
    ):
        with pytest.raises(ConfigError, match=words):
            run(tmp_path, logger=named(), **change)
    assert files_of(tmp_path) == before
    run(tmp_path, logger=named())
    with pytest.raises(FinishedError, match="is finished"):
        run(tmp_path, logger=named())
    with pytest.raises(ConfigError, match=r"a finished run that differs.*method.lr: 0.01 != 0.02"):
        run(tmp_path, partial(Tent, lr=2e-2), logger=named())
    with pytest.raises(ConfigError, match=r"a finished run that differs.*digest"):
        run(tmp_path, logger=named(), reset_every=5)
    run(tmp_path, Source, logger=named(), resume="restart")
    assert json.loads((tmp_path / "run" / "x" / "report.json").read_text())["method"] == "source"


def test_directory_in_use_is_left_alone(tmp_path):
    directory = run(tmp_path, crash=3).run.directory.path
    other = DirectoryLock()
    assert other.take(directory)
    before = files_of(tmp_path)
    for resume in ("auto", "restart"):
        with pytest.raises(ConfigError, match="in use"):
            run(tmp_path, save_every=None, resume=resume)
    assert files_of(tmp_path) == before
    other.release()
    run(tmp_path)


def test_a_state_of_an_earlier_version_is_refused(tmp_path):
    path = run(tmp_path, crash=3).run.directory.path / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["format"]
    torch.save({**state, "version": "0.0.1"}, path)
    with pytest.raises(ConfigError, match=r"version 0\.0\.1 .* restart"):
        run(tmp_path)


def test_a_refused_command_leaves_the_configuration_of_a_finished_run(tmp_path, capsys):
    args = ["predict", "--model.source_ckpt=none", "--model.backbone=cifar/resnet20", "--model.method=Source"]
    args += ["--data=DigitsData", "--data.domains=[contrast]", "--data.num_images=8"]
    args += ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    args += [f"--trainer.default_root_dir={tmp_path}"]
    main(args)
    config = directory_of(tmp_path) / "config.yaml"
    config.write_text(config.read_text() + "# as it was\n")
    before = files_of(tmp_path)
    main([*args, "--board.images=0"])
    assert "is finished" in capsys.readouterr().out
    assert files_of(tmp_path) == before
    main([*args, "--state.resume=restart", "--board.images=0"])
    assert "as it was" not in config.read_text()
    assert yaml.safe_load(config.read_text())["board"]["images"] == 0


# Damage ------------------------------------------------------------------------------------------------------------


def test_without_a_save_it_starts_from_the_beginning(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "a", crash=3, save_every=None)
    assert not (directory_of(tmp_path / "a") / "state.pt").exists()
    run(tmp_path / "a")
    assert results(tmp_path / "a") == results(tmp_path / "whole")


def test_a_half_written_state_is_removed_and_a_damaged_one_refused(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "a", crash=3)
    state = directory_of(tmp_path / "a") / "state.pt"
    state.with_name(".state.pt.77.tmp").write_bytes(state.read_bytes()[:999])  # killed while it wrote
    run(tmp_path / "a", crash=5)
    assert not list(state.parent.glob(".state*"))
    content = state.read_bytes()
    for damaged in (content[:-999], b"", b"hello", content[:4000] + bytes([content[4000] ^ 1]) + content[4001:]):
        state.write_bytes(damaged)
        before = files_of(tmp_path)
        with pytest.raises(DataError, match=r"state\.pt is damaged.*--state.resume restart"):
            run(tmp_path / "a")
        assert files_of(tmp_path) == before
    run(tmp_path / "a", resume="restart")
    assert results(tmp_path / "a") == results(tmp_path / "whole")


def test_no_flipped_bit_of_a_state_goes_unnoticed(tmp_path):
    """It is refused, or it was in a place that holds nothing."""
    path = run(tmp_path, crash=3).run.directory.path / "state.pt"
    content, state, rng, refused = path.read_bytes(), read_state(path), random.Random(0), 0
    for _ in range(300):
        bit = rng.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert str(read_state(path)) == str(state)
        except DataError:
            refused += 1
    assert refused > 280


class Evil:
    def __reduce__(self):
        return print, ("code of a state file runs",)


def test_state_that_would_run_code_is_refused(tmp_path, capsys):
    state = run(tmp_path, crash=3).run.directory.path / "state.pt"
    torch.save({"identity": {}, "method": Evil()}, state)
    with pytest.raises(ConfigError, match="refused"):
        run(tmp_path)
    state.write_bytes(pickle.dumps({"identity": {}, "method": Evil()}))
    with pytest.raises(DataError, match="damaged"):
        run(tmp_path)
    assert "code of a state file runs" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["predictions.csv", "batches.jsonl"])
def test_other_predictions_than_those_saved_are_noticed(tmp_path, name):
    run(tmp_path / "whole")
    run(tmp_path / "a", crash=3)
    run(tmp_path / "a", crash=5)  # whose checksum goes on from that of the first part
    path = directory_of(tmp_path / "a") / name
    content = path.read_bytes()
    digit = content.index(b"0,") if name == "predictions.csv" else content.index(b"1")
    for damaged, words in (
        (b"index\n", "has 6 bytes, but .* when the state beside it was saved"),
        (content[:digit] + b"7" + content[digit + 1 :], "has changed since the state beside it was saved"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=words):
            run(tmp_path / "a")
    path.write_bytes(content)
    run(tmp_path / "a")
    assert results(tmp_path / "a") == results(tmp_path / "whole")


def test_a_damaged_report_is_no_finished_run(tmp_path):
    run(tmp_path)
    expected, path = results(tmp_path), directory_of(tmp_path) / "report.json"
    path.write_bytes(path.read_bytes()[:99])
    with pytest.warns(UserWarning, match="report.json cannot be read: the run is done again"):
        run(tmp_path)
    assert results(tmp_path) == expected


def test_wrong_options(tmp_path):
    with pytest.raises(ConfigError, match="save_every"):
        run(tmp_path, save_every=0)
    with pytest.raises(ConfigError, match="resume"):
        run(tmp_path, resume="yes")
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}

    def shortened(*callbacks):
        module = TestTimeAdaptation(TENT, backbone=make_net("bn", num_classes=10))
        trainer = Trainer(**options, limit_predict_batches=2, callbacks=list(callbacks))
        trainer.predict(module, datamodule=make_data())
        return module.run.directory.path

    with pytest.raises(ConfigError, match="limit_predict_batches"):
        shortened(StateKeeper(save_every=1))
    short = shortened()
    assert short != run(tmp_path).run.directory.path


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"save_every": 5}, r"--state\.save_every .*StateKeeper\(save_every=\.\.\.\)"),
        ({"resume": "auto"}, r"--state\.resume"),
        ({"on_bad_batch": "skip"}, r"--input\.on_bad_batch .*StreamInput"),
        ({"channels_last": True}, r"--input\.channels_last"),
        ({"source_images": 5}, r"--input\.source_images"),
        ({"measure_forgetting": True}, r"--report\.measure_forgetting"),
        ({"log_images": 0}, r"--board\.images"),
        ({"pretrained": True}, "--model.source_ckpt pretrained"),
        ({"lr": 1}, "has no option 'lr'"),
    ],
)
def test_former_options_are_refused_by_their_new_names(option, words):
    with pytest.raises(ConfigError, match=words):
        TestTimeAdaptation(TENT, backbone=make_net("bn", num_classes=10), **option)
    ((name, value),) = option.items()
    args = ["predict", "--model.source_ckpt=none", "--model.backbone=cifar/resnet20", "--model.method=Tent"]
    with pytest.raises(ConfigError, match=words):
        run_lightning([*args, "--data=DigitsData", f"--model.{name}={json.dumps(value)}"], parse_only=True)


def test_the_guard_goes_on_too(tmp_path):
    """A guard that alarms nearly always, cut off and continued, has the events of a run in one go."""

    def made():
        return make_data(batch_size=4, domains=["contrast"])

    def guarded(name, crash=None):
        guard = Guard(action="rollback", window=2, history=4, share_excess=0.01, norm_ratio=1.01, retries=None)
        run(tmp_path / name, partial(Tent, lr=0.5), crash=crash, data=made(), callbacks=[guard])

    guarded("whole")
    guarded("cut", crash=7)
    guarded("cut")
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    events = [(directory_of(tmp_path / name) / "guard.jsonl").read_text() for name in ("whole", "cut")]
    assert events[0] == events[1]
    assert events[0].count("batch") > 1
