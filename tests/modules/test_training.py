"""Trainings: continued as if uninterrupted, marked when finished; which of them a folder stands for."""

import json
import os
import warnings

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_tta import Backbone, DigitsData, MetaTTT, SourceClassifier, WeightsError
from lightning_tta.modules.training import RECORD, find_checkpoint

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*many workers", "ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode", "ignore:The number of training batches"),
]


def source():
    return SourceClassifier("cifar/resnet26_gn", backbone_options={"depth": 8})


def meta():
    layers = (
        nn.Conv2d(3, 4, 3, 4),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )
    return MetaTTT("none", Backbone(nn.Sequential(*layers), [0.5], [0.25], num_classes=10), synthesis_probability=0.5)


class Kill(Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            raise InterruptedError


def fit(make, folder, monitor, *callbacks, ckpt_path=None):
    seed_everything(3)
    model, data = make(), DigitsData(train_batch_size=32)
    keep = ModelCheckpoint(folder, "best", monitor=monitor, save_last=True)
    trainer = Trainer(
        max_epochs=3, limit_train_batches=2, limit_val_batches=1, accelerator="cpu", logger=False,
        callbacks=[keep, *callbacks], num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model, keep


@pytest.mark.parametrize(("make", "monitor"), [(source, "source/val_loss"), (meta, "meta/val_after")])
def test_a_continued_training_equals_the_uninterrupted_one(tmp_path, make, monitor):
    whole, _ = fit(make, tmp_path / "whole", monitor)
    with pytest.raises(InterruptedError):
        fit(make, tmp_path / "killed", monitor, Kill())
    assert json.loads((tmp_path / "killed" / RECORD).read_text()) == {"finished": False, "epochs": 1, "max_epochs": 3}
    continued, _ = fit(make, tmp_path / "continued", monitor, ckpt_path=tmp_path / "killed/last.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), continued.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    best = [torch.load(tmp_path / name / "best.ckpt", weights_only=True) for name in ("whole", "continued")]
    assert best[0]["epoch"] == best[1]["epoch"]
    record = json.loads((tmp_path / "continued" / RECORD).read_text())
    assert record == {"finished": True, "epochs": 3, "max_epochs": 3, "best": "best.ckpt"}


def test_the_best_so_far_is_taken_over(tmp_path):
    class Rising(SourceClassifier):  # the first epoch is the best one
        def on_validation_epoch_end(self):
            self.log("score", float(self.current_epoch))

    def make():
        return Rising("cifar/resnet26_gn", backbone_options={"depth": 8})

    with pytest.raises(InterruptedError):
        fit(make, tmp_path / "killed", "score", Kill())
    _, keep = fit(make, tmp_path / "continued", "score", ckpt_path=tmp_path / "killed/last.ckpt")
    assert keep.best_model_path == str(tmp_path / "continued/best.ckpt")
    assert torch.load(keep.best_model_path, weights_only=True)["epoch"] == 0


def training(folder, seconds, finished=None, files=("best.ckpt", "last.ckpt")):
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_bytes(b"x")
    if finished is not None:
        (folder / RECORD).write_text(json.dumps({"finished": finished, "epochs": 2, "max_epochs": 10}))
    for path in folder.iterdir():
        os.utime(path, (seconds, seconds))
    return folder / "best.ckpt"


def test_the_last_finished_training_is_taken(tmp_path):
    training(tmp_path / "version_0/checkpoints", 100)  # of an earlier version, without a record
    second = training(tmp_path / "version_1/checkpoints", 200, finished=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_checkpoint(tmp_path) == second
        assert find_checkpoint(tmp_path / "version_0").parts[-3:] == ("version_0", "checkpoints", "best.ckpt")
    cut = training(tmp_path / "version_2/checkpoints", 300, finished=False)
    words = r"version_2 was not finished: 2 of 10 epochs.*--ckpt_path \S*version_2/checkpoints/last.ckpt.*Taken instead"
    with pytest.warns(UserWarning, match=words):
        assert find_checkpoint(tmp_path) == second
    with pytest.warns(UserWarning, match="is of a training that was not finished: 2 of 10 epochs"):
        assert find_checkpoint(cut) == cut  # named: taken as it is
    for version in ("version_0", "version_1"):
        for path in (tmp_path / version / "checkpoints").iterdir():
            path.unlink()
    with pytest.raises(
        WeightsError, match=r"holds no finished training. The training in \S*version_2 was not finished"
    ):
        find_checkpoint(tmp_path)


def test_a_training_that_was_cut_off_before_its_first_checkpoint(tmp_path):
    training(tmp_path / "version_0/checkpoints", 100, finished=False, files=())
    with pytest.raises(WeightsError, match="no finished training"):
        find_checkpoint(tmp_path)


def test_the_record_names_the_best_checkpoint(tmp_path):
    """As of a fit without a configuration, where Lightning names the file."""
    folder = training(tmp_path / "version_0/checkpoints", 100, files=("epoch=3-step=8.ckpt",)).parent
    (folder / RECORD).write_text(json.dumps({"finished": True, "best": "epoch=3-step=8.ckpt"}))
    assert find_checkpoint(tmp_path) == folder / "epoch=3-step=8.ckpt"
    (folder / "epoch=3-step=8.ckpt").unlink()
    with pytest.raises(WeightsError, match=r"holds no best.ckpt"):
        find_checkpoint(tmp_path)


def test_checkpoints_of_other_names_are_listed(tmp_path):
    training(tmp_path / "mine", 100, files=("epoch=3.ckpt",))
    with pytest.raises(WeightsError, match=r"holds no best.ckpt \(there: mine/epoch=3.ckpt\)"):
        find_checkpoint(tmp_path)
