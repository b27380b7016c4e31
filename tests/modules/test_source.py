"""Source training: one step by hand, what is saved, what is refused."""

import subprocess
import sys
from functools import partial

import pytest
import torch
import train_source_on_processes
from lightning.pytorch import Trainer
from nets import make_images, max_difference

from lightning_tta import ConfigError, SourceClassifier
from lightning_tta.modules.loading import load_source

pytestmark = pytest.mark.usefixtures("one_thread")


def module(**options):
    return SourceClassifier("cifar/resnet20", 5, optimizer=partial(torch.optim.SGD, lr=0.1), **options)


def fit(model, batches, precision="64-true"):
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, precision=precision, **quiet)
    trainer.fit(model, loader)
    return trainer


def test_one_step_by_hand():
    model = module(label_smoothing=0.2).double()
    image, label = make_images(6, size=32, dtype=torch.float64), torch.arange(6) % 5
    weights = dict(model.backbone.named_parameters())
    log_p = model.backbone.train()(image).log_softmax(1)
    target = torch.full((6, 5), 0.2 / 5, dtype=torch.float64)
    target[torch.arange(6), label] += 0.8
    loss = -(target * log_p).sum(1).mean()
    gradients = torch.autograd.grad(loss, list(weights.values()))
    expected = {name: p - 0.1 * g for (name, p), g in zip(weights.items(), gradients, strict=True)}
    expected = {name: value.detach().clone() for name, value in expected.items()}
    trainer = fit(model, [{"image": image, "label": label}])
    assert abs(trainer.callback_metrics["source/train_loss"] - loss) < 1e-10
    for name, value in expected.items():
        assert max_difference(model.backbone.get_parameter(name).detach(), value) < 1e-10


def test_checkpoint_rebuilds_the_net(tmp_path):
    model = module(backbone_options={"in_chans": 1, "mean": [0.5], "std": [0.25]})
    batch = {"image": make_images(4, size=32)[:, :1], "label": torch.arange(4)}
    fit(model, [batch], "32-true").save_checkpoint(tmp_path / "best.ckpt")
    loaded = load_source(str(tmp_path)).eval()
    assert torch.equal(loaded(batch["image"]), model.eval()(batch["image"]))


def test_predict_says_where_to_go():
    with pytest.raises(ConfigError, match="TestTimeAdaptation"):
        module().predict_step({}, 0)


@pytest.mark.parametrize("options", [{"label_smoothing": 1.0}, {"backbone": "cifar/resnet21"}, {"num_classes": 1}])
def test_wrong_options(options):
    with pytest.raises(ConfigError):
        SourceClassifier(**{"backbone": "cifar/resnet20", "num_classes": 5, **options})


@pytest.mark.slow
def test_two_processes_are_one_with_the_joined_batch(tmp_path):
    """Weights, measures over shares of unequal size, and a run that goes on from its checkpoint."""
    train_source_on_processes.main(1, tmp_path / "1")
    command = [sys.executable, train_source_on_processes.__file__, "2", str(tmp_path / "2")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    one, two = results = [torch.load(tmp_path / processes / "result.pt") for processes in ("1", "2")]
    assert one["steps"] == two["steps"] == 6
    assert one["measures"].keys() == two["measures"].keys() >= {"source/val_loss", "source/val_ece", "meta/val_after"}
    for name, value in one["measures"].items():
        if not name.startswith("meta/val"):  # its adaptation depends on the batch: see the counts below
            assert abs(two["measures"][name] - value) < 1e-6, name
    for result in results:
        for name, value in result["whole"].items():
            assert max_difference(value, one["whole"][name]) < 1e-12
            assert max_difference(value, result["weights"][name]) < 1e-12
    start = module().backbone.state_dict()
    assert start.keys() != one["whole"].keys() or not all(torch.equal(start[n], v) for n, v in one["whole"].items())
    for when in ("before", "after"):  # eleven samples in all: the mean is a whole number of elevenths
        elevenths = two["measures"][f"meta/val_{when}"] * 11
        assert abs(elevenths - round(elevenths)) < 1e-5
