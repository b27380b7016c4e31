"""Which run is continued, and what of it may be damaged."""

import pickle
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from test_resume import TENT, make_data, results, run

from lightning_tta import ConfigError, Guard, TestTimeAdaptation
from lightning_tta.errors import FinishedError
from lightning_tta.methods import Source, Tent
from lightning_tta.run.state_files import DirectoryLock
from nets import make_net

pytestmark = pytest.mark.usefixtures("one_thread")


def tensorboard(root, version=None):
    return TensorBoardLogger(root, name="run", version=version)


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_newest_unfinished_version_is_continued(tmp_path, kind):
    def logger():
        return kind(tmp_path, name="run")

    run(tmp_path, logger=logger(), crash=3)
    run(tmp_path, Source, logger=logger(), crash=3)  # another method: a run of its own
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"version_0", "version_1"}
    run(tmp_path, logger=logger(), crash=5)
    run(tmp_path, logger=logger())
    run(tmp_path, Source, logger=logger())
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"version_0", "version_1"}
    run(tmp_path / "whole", resume="never")
    assert results(tmp_path / "run" / "version_0") == results(tmp_path / "whole")
    assert results(tmp_path / "run" / "version_1")[1]["method"] == "source"
    with pytest.raises(FinishedError, match="version_0 is finished"):
        run(tmp_path, logger=logger())
    run(tmp_path, logger=logger(), resume="never")
    assert results(tmp_path / "run" / "version_2") == results(tmp_path / "whole")


def test_finished_run_is_left_alone(tmp_path):
    run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in before} == {
        *("predictions.csv", "batches.jsonl", "report.json", "final_state.pt", "state.lock")
    }
    with pytest.raises(FinishedError, match="nothing to continue"):
        run(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(ConfigError, match=r"finished run that differs.*method.lr: 0.01 != 0.02"):
        run(tmp_path, partial(Tent, lr=2e-2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": partial(Tent, lr=2e-2)}, "method.lr: 0.01 != 0.02"),
        ({"method": Source}, "method: 'tent' != 'source'"),
        ({"reset_every": 5}, "reset_every: None != 5"),
        ({"reset": "never"}, "protocol.reset: 'domain' != 'never'"),
        ({"data": make_data(order_seed=3)}, "protocol.order_seed: 0 != 3"),
        ({"channels_last": True}, "memory_format"),
    ],
)
def test_another_run_is_refused_and_named(tmp_path, change, words):
    run(tmp_path, crash=3)
    before = (tmp_path / "predictions.csv").read_bytes()
    with pytest.raises(ConfigError, match=words):
        run(tmp_path, **change)
    assert (tmp_path / "predictions.csv").read_bytes() == before
    run(tmp_path)


def test_directory_in_use_is_left_alone(tmp_path):
    run(tmp_path, crash=3)
    run(tmp_path, logger=tensorboard(tmp_path), crash=3)
    other, second = DirectoryLock(), DirectoryLock()
    assert other.take(tmp_path)
    assert second.take(tmp_path / "run" / "version_0")
    with pytest.raises(ConfigError, match="in use"):
        run(tmp_path)
    run(tmp_path, logger=tensorboard(tmp_path))
    assert (tmp_path / "run" / "version_1" / "report.json").exists()
    other.release()
    run(tmp_path)


# Damage ------------------------------------------------------------------------------------------------------------


def test_without_a_save_it_starts_from_the_beginning(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "a", crash=3, save_every=None)
    assert not (tmp_path / "a" / "state.pt").exists()
    run(tmp_path / "a")
    assert results(tmp_path / "a") == results(tmp_path / "whole")


def test_half_written_state_is_ignored(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "a", crash=3)
    state = tmp_path / "a" / "state.pt"
    (tmp_path / "a" / ".state.pt.77.tmp").write_bytes(state.read_bytes()[:999])  # killed while it wrote
    run(tmp_path / "a", crash=5)
    assert not list((tmp_path / "a").glob(".state*"))
    state.write_bytes(state.read_bytes()[:-999])
    with pytest.warns(UserWarning, match="cannot be read"):
        run(tmp_path / "a")
    assert results(tmp_path / "a") == results(tmp_path / "whole")


class Evil:
    def __reduce__(self):
        return print, ("code of a state file runs",)


def test_state_that_would_run_code_is_refused(tmp_path, capsys):
    run(tmp_path, crash=3)
    torch.save({"identity": {}, "method": Evil()}, tmp_path / "state.pt")
    with pytest.raises(ConfigError, match="refused"):
        run(tmp_path)
    (tmp_path / "state.pt").write_bytes(pickle.dumps({"identity": {}, "method": Evil()}))
    with pytest.warns(UserWarning, match="ignored"):
        run(tmp_path)
    assert "code of a state file runs" not in capsys.readouterr().out


def test_shorter_predictions_are_noticed(tmp_path):
    run(tmp_path, crash=3)
    (tmp_path / "predictions.csv").write_text("index\n")
    with pytest.raises(ConfigError, match="when the state beside it was saved"):
        run(tmp_path)


def test_a_run_that_starts_anew_leaves_no_old_state(tmp_path):
    run(tmp_path, crash=5)
    run(tmp_path, crash=1, resume="never", save_every=None)
    assert not (tmp_path / "state.pt").exists()


def test_wrong_options(tmp_path):
    with pytest.raises(ConfigError, match="save_every"):
        run(tmp_path, save_every=0)
    with pytest.raises(ConfigError, match="resume"):
        run(tmp_path, resume="yes")
    module = TestTimeAdaptation(TENT, backbone=make_net("bn", num_classes=10), resume="auto")
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path, limit_predict_batches=2
    )
    with pytest.raises(ConfigError, match="limit_predict_batches"):
        trainer.predict(module, datamodule=make_data())


def test_the_guard_goes_on_too(tmp_path):
    """A guard that alarms nearly always, cut off and continued, has the events of a run in one go."""

    def made():
        return make_data(batch_size=4, domains=["contrast"])

    def guarded(name, crash=None):
        guard = Guard(action="rollback", window=2, history=4, share_excess=0.01, norm_ratio=1.01, retries=None)
        run(tmp_path / name, partial(Tent, lr=0.5), crash=crash, data=made(), callbacks=[guard])

    guarded("whole")
    guarded("cut", crash=7)
    for others in ([], [Guard()]):
        with pytest.raises(ConfigError, match=r"unfinished run that differs.*guard: "):
            run(tmp_path / "cut", partial(Tent, lr=0.5), data=made(), callbacks=others)
    guarded("cut")
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    events = [(tmp_path / name / "guard.jsonl").read_text() for name in ("whole", "cut")]
    assert events[0] == events[1]
    assert events[0].count("batch") > 1
