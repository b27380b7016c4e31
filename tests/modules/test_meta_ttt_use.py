"""Meta-TTT's module in use: what is logged, saved and refused."""

import copy
import dataclasses

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_meta_ttt import INNER, batches, fit, module
from torch.nn.functional import cross_entropy

from lightning_tta import ConfigError, MetaTTT, TestTimeAdaptation, UnsupportedModelError, adapt
from lightning_tta.meta.mixed_bn import convert_mixed_bn
from lightning_tta.methods import MetaTTT as Method
from lightning_tta.modules.loading import load_source
from nets import make_images, make_net, norm_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_is_logged(tmp_path):
    model = module(schedule="chained", synthesis_probability=0)
    val = [{**batch, "domain": torch.full((8,), i % 2)} for i, batch in enumerate(batches(4))]
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    trainer = fit(model, batches(2), val, logger=logger, log_every_n_steps=1, num_sanity_val_steps=0)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    names = {"train_loss", "inner_max_loss", "inner_min_loss", "alignment", "val_before", "val_after"}
    names |= {f"val_{when}/{domain}" for when in ("before", "after") for domain in ("clean", "noise")}
    names |= {f"source_weight/{what}" for what in ("mean", "lowest", "highest")}
    assert {f"meta/{name}" for name in names} <= set(events.Tags()["scalars"])
    assert "meta/source_weight" in events.Tags()["histograms"]
    assert -1 <= events.Scalars("meta/alignment")[0].value <= 1

    method = Method(copy.deepcopy(model.backbone), **{k: getattr(model.settings, k) for k in INNER})
    for when, predict in (("before", method.predict), ("after", method)):
        right = [float((predict(batch["image"]).argmax(1) == batch["label"]).float().mean()) for batch in val]
        assert trainer.callback_metrics[f"meta/val_{when}"] == pytest.approx(sum(right) / 4, abs=1e-6)
        noisy = (right[1] + right[3]) / 2
        assert trainer.callback_metrics[f"meta/val_{when}/noise"] == pytest.approx(noisy, abs=1e-6)


def test_alignment_is_the_cosine():
    model = module(max_steps=0, synthesis_probability=0).double()
    (batch,) = batches(1)
    batch["image"] = batch["image"].double()
    logged = {}
    model.log = lambda name, value, **_: logged.update({name: value})
    model._trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", log_every_n_steps=1)
    model.training_step(batch, 0)
    logits = model.backbone(batch["image"])
    parameters = list(norm_weights_of_mixed(model.backbone).values())
    inner = torch.autograd.grad(model.settings.loss(logits, "min"), parameters, retain_graph=True)
    main = torch.autograd.grad(cross_entropy(logits, batch["label"]), parameters)
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (inner, main))
    assert abs(logged["meta/alignment"] - a @ b / (a.norm() * b.norm())) < 1e-10


def norm_weights_of_mixed(net):
    return {name: net.get_parameter(name) for name in norm_weights(make_net("bn"))}


def test_checkpoint_adapts_as_the_module_does(tmp_path):
    model = module(source_weight_kind="sigmoid", temperature="gem_t")
    fit(model, batches(2)).save_checkpoint(tmp_path / "best.ckpt")
    images = make_images(6)
    loaded = load_source(str(tmp_path / "best.ckpt"), make_net("bn"))
    assert torch.equal(loaded(images), model.backbone(images))
    method = TestTimeAdaptation(Method, source_ckpt=str(tmp_path), backbone=make_net("bn")).method
    assert method.settings == model.settings
    assert torch.equal(method(images), adapt(model.backbone, "meta_ttt", **INNER, temperature="gem_t")(images))


def test_settings_by_name_change_those_that_were_trained(tmp_path):
    model = module(source_weight_kind="sigmoid", temperature="gem_t")
    fit(model, batches(1)).save_checkpoint(tmp_path / "best.ckpt")
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)["lightning_tta"]  # the format of earlier files
    assert saved["mixed_bn"] == {"parametrisation": "sigmoid"}
    assert saved["meta_ttt"] == dataclasses.asdict(model.settings)
    net = load_source(str(tmp_path), make_net("bn"))
    method = adapt(net, "meta_ttt", scale_lr=0.5, max_lr=None)
    assert method.settings == dataclasses.replace(model.settings, scale_lr=0.5)
    unchanged = dict.fromkeys(saved["meta_ttt"])
    assert method.options == {"episodic": True, "source_weight": 0.75, **unchanged, "scale_lr": 0.5}
    with pytest.raises(ConfigError, match="no option 'max_lrr'"):
        adapt(net, "meta_ttt", max_lrr=0.1)


def test_net_by_name_comes_back_by_itself(tmp_path):
    model = module(source_ckpt="none", backbone="cifar/resnet20", num_classes=5)
    data = [{**batch, "image": make_images(8, size=32)} for batch in batches(1)]
    fit(model, data).save_checkpoint(tmp_path / "best.ckpt")
    loaded = load_source(str(tmp_path))
    assert torch.equal(loaded(data[0]["image"]), model.backbone(data[0]["image"]))
    assert loaded.info["weights"] == "best.ckpt"
    again = MetaTTT(source_ckpt=str(tmp_path))  # training can go on from it
    assert torch.equal(again(data[0]["image"]), loaded(data[0]["image"]))


def test_bf16(tmp_path):
    model = module(schedule="chained", pseudo_domains=2)
    before = copy.deepcopy(model.backbone.state_dict())
    trainer = fit(model, batches(3), batches(1), precision="bf16-mixed")
    after = model.backbone.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values() if value.is_floating_point())
    assert not torch.equal(before["conv1.weight"], after["conv1.weight"])
    assert after["conv1.weight"].dtype == torch.float32
    assert torch.isfinite(trainer.callback_metrics["meta/train_loss"])


@pytest.mark.parametrize(
    ("batch", "options", "words"),
    [
        ({"domain": torch.tensor([0, 1, 0, 1])}, {}, "one after the other"),
        ({"domain": torch.tensor([0, 0, 0, 1])}, {}, "equal numbers"),
        ({}, {"pseudo_domains": 3}, "cannot be split"),
    ],
    ids=["mixed up", "unequal", "too small"],
)
def test_batches_that_do_not_divide(batch, options, words):
    given = {"image": make_images(4), "label": torch.arange(4), **batch}
    with pytest.raises(ConfigError, match=words):
        fit(module(**options), [given])


def test_sync_batchnorm_and_compile_are_refused():
    model = module()
    model._trainer = Trainer(accelerator="cpu", strategy="ddp", devices=1, sync_batchnorm=True, logger=False)
    with pytest.raises(ConfigError, match="sync_batchnorm"):
        model.setup("fit")
    with pytest.raises(ConfigError, match=r"torch\.compile"):
        fit(torch.compile(module()), batches(1))
    compiled = module()
    compiled.backbone.conv1 = torch.compile(compiled.backbone.conv1)
    with pytest.raises(ConfigError, match=r"torch\.compile"):
        fit(compiled, batches(1))


def test_predict_says_where_to_go():
    with pytest.raises(ConfigError, match="TestTimeAdaptation"):
        module().predict_step({}, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "both"},
        {"synthesis_probability": 2.0},
        {"pseudo_domains": 0},
        {"threshold": -1.0},
        {"max_lr": -1.0},
    ],
    ids=str,
)
def test_wrong_options(options):
    with pytest.raises(ConfigError, match="must be"):
        module(**options)


def test_nets_without_batch_norm_are_refused():
    with pytest.raises(UnsupportedModelError, match="no BatchNorm"):
        module("gn")


def test_method_on_a_plain_net_mixes_with_the_given_weight():
    net, images = make_net("bn"), make_images(6)
    plain = adapt(net, "meta_ttt", source_weight=0.6, **INNER)
    mixed = adapt(convert_mixed_bn(copy.deepcopy(net), 0.6), "meta_ttt", **INNER)
    assert torch.equal(plain(images), mixed(images))
    assert plain.stats["max_loss"] == mixed.stats["max_loss"]
