"""Source training: one step by hand, what is saved, what is refused."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_tta import ConfigError, SourceClassifier
from lightning_tta.modules.loading import load_source
from nets import make_images, max_difference

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
