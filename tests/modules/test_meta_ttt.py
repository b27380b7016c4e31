"""Meta-training through a real Trainer: the steps against a plain loop, what is logged, saved and refused."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from meta_reference import plain_outer_loss
from nets import make_images, make_net, max_difference, norm_weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy

from lightning_tta import ConfigError, MetaTTT, TestTimeAdaptation, UnsupportedModelError, adapt
from lightning_tta.backbones.mixed_bn import convert_mixed_bn, mixed_batch_norm_layers
from lightning_tta.methods import MetaTTT as Method
from lightning_tta.modules.loading import load_source

pytestmark = pytest.mark.usefixtures("one_thread")
INNER = {"threshold": 0.4, "max_lr": 0.05, "scale_lr": 0.07, "shift_lr": 0.03, "max_layers": 0.5}
SGD = partial(torch.optim.SGD, lr=0.1)


def module(kind="bn", **options):
    given = {"backbone": make_net(kind), "source_weight_std": 0.0, "optimizer": SGD, "head_lr_factor": 1.0, **INNER}
    return MetaTTT(**{**given, **options})


def batches(count, size=8, domains=None):
    made = []
    for i in range(count):
        batch = {"image": make_images(size, seed=i), "label": torch.arange(size) % 5}
        if domains:
            batch["domain"] = torch.arange(domains).repeat_interleave(size // domains)
        made.append(batch)
    return made


class Data(LightningDataModule):
    val_domain_names = ("clean", "noise")

    def __init__(self, train, val=()):
        super().__init__()
        self.train, self.val = train, val

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.train, batch_size=None)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.val, batch_size=None)


def fit(model, train, val=(), **options):
    given = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(**{**given, **options})
    trainer.fit(model, datamodule=Data(train, list(val)))
    return trainer


def plain_training(model, train, phases_of, domains=1, accumulate=1, clip=None):
    """SGD on the plain outer loss; phases_of: number of the outer step -> phases."""
    net = copy.deepcopy(model.backbone)
    inner = model.settings
    rates_of = {
        "max": {"norm2.bias": inner.max_lr},
        "min": {"norm1.weight": inner.scale_lr, "norm2.weight": inner.scale_lr, "norm1.bias": inner.shift_lr},
    }
    for step in range(len(train) // accumulate):
        gradients = [torch.zeros_like(p) for p in net.parameters()]
        for batch in train[step * accumulate : (step + 1) * accumulate]:
            image = batch["image"].to(next(net.parameters()))
            loss = plain_outer_loss(net, image, batch["label"], inner, phases_of(step), rates_of, domains=domains)
            found = torch.autograd.grad(loss, list(net.parameters()))
            gradients = [a + b / accumulate for a, b in zip(gradients, found, strict=True)]
        if clip is not None:
            norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
            gradients = [g * min(1, clip / (norm + 1e-6)) for g in gradients]
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients, strict=True):
                p -= 0.1 * g
    return net


def assert_same_weights(net, expected, tolerance=1e-10):
    for (name, ours), theirs in zip(net.named_parameters(), expected.parameters(), strict=True):
        assert max_difference(ours, theirs) < tolerance, name


@pytest.mark.parametrize("domains", [None, 2])
@pytest.mark.parametrize("pseudo_domains", [1, 2])
@pytest.mark.parametrize("schedule", ["alternating", "chained"])
def test_outer_steps_are_those_of_a_plain_loop(schedule, pseudo_domains, domains):
    model = module(schedule=schedule, pseudo_domains=pseudo_domains, synthesis_probability=0)
    train = batches(4, domains=domains)
    phases_of = (lambda step: ("max", "min")) if schedule == "chained" else (lambda step: (("max", "min")[step % 2],))
    model.double()
    expected = plain_training(model, train, phases_of, domains=(domains or 1) * pseudo_domains)
    fit(model, train, precision="64-true")
    assert_same_weights(model.backbone, expected)


def test_clipping_and_accumulation():
    model = module(schedule="chained", synthesis_probability=0).double()
    train = batches(4)
    expected = plain_training(model, train, lambda step: ("max", "min"), accumulate=2, clip=0.1)
    fit(model, train, precision="64-true", accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert_same_weights(model.backbone, expected)


def test_first_order_differs():
    nets = []
    for second_order in (True, False):
        model = module(second_order=second_order, synthesis_probability=0)
        fit(model, batches(2))
        nets.append(model.backbone)
    assert max(max_difference(a, b) for a, b in zip(*(net.parameters() for net in nets), strict=True)) > 1e-5


def test_without_meta_it_is_plain_cross_entropy():
    model = module(meta=False, synthesis_probability=0).double()
    net = copy.deepcopy(model.backbone)
    (batch,) = batches(1)
    gradients = torch.autograd.grad(cross_entropy(net(batch["image"].double()), batch["label"]), list(net.parameters()))
    with torch.no_grad():
        for p, g in zip(net.parameters(), gradients, strict=True):
            p -= 0.1 * g
    fit(model, [batch], precision="64-true")
    assert_same_weights(model.backbone, net)


def test_what_learns_and_what_stays():
    for learn in (True, False):
        model = module(learn_source_weight=learn)
        before = copy.deepcopy(model.backbone.state_dict())
        fit(model, batches(2))
        after = model.backbone.state_dict()
        still = {name for name in before if torch.equal(before[name], after[name])}
        layers = mixed_batch_norm_layers(model.backbone)
        statistics = {f"{n}.{b}" for n in layers for b in ("running_mean", "running_var", "num_batches_tracked")}
        assert still == statistics | (set() if learn else {f"{n}.source_weight" for n in layers})
        assert not any(layer.training for layer in model.backbone.modules())


def test_synthesis_depends_on_epoch_batch_domain_and_seed_alone():
    def run(seed, **options):
        torch.manual_seed(seed)
        model = module(synthesis_probability=0.5, pseudo_domains=2, **options)
        fit(model, batches(2))
        return model.backbone

    a, b, c = run(0), run(0), run(1)
    assert_same_weights(a, b, 1e-12)
    assert max(max_difference(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True)) > 1e-4


def test_learned_rates_move_and_are_saved(tmp_path):
    model = module(learn_inner_lr=True, schedule="chained")
    before = {kind: float(torch.as_tensor(rate).detach()) for kind, rate in model.rates.items()}
    trainer = fit(model, batches(3))
    after = {kind: float(torch.as_tensor(rate).detach()) for kind, rate in model.rates.items()}
    assert after["source_weight"] == before["source_weight"] == 0
    assert all(after[kind] != before[kind] for kind in ("max", "scale", "shift"))
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    loaded = load_source(str(tmp_path), make_net("bn"))
    assert loaded.meta_ttt["scale_lr"] == after["scale"]


def test_head_has_its_own_rate():
    model = module(head_lr_factor=10.0)
    rest, head = model.configure_optimizers().param_groups
    assert head["lr"] == 10 * rest["lr"] == 1.0
    assert {id(p) for p in head["params"]} == {id(p) for p in model.backbone.head.parameters()}
    assert len(rest["params"]) + len(head["params"]) == len(list(model.parameters()))


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
