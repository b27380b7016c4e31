"""Meta-training through a real Trainer: the steps against a plain loop, and what they change."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.nn.functional import cross_entropy

from lightning_tta import MetaTTT
from lightning_tta.meta.inner_loop import inner_loop_of
from lightning_tta.meta.mixed_bn import mixed_batch_norm_layers
from lightning_tta.modules.loading import load_source
from meta_reference import plain_outer_loss
from nets import make_images, make_net, max_difference

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
    assert inner_loop_of(loaded).scale_lr == after["scale"]


def test_head_has_its_own_rate():
    model = module(head_lr_factor=10.0)
    rest, head = model.configure_optimizers().param_groups
    assert head["lr"] == 10 * rest["lr"] == 1.0
    assert {id(p) for p in head["params"]} == {id(p) for p in model.backbone.head.parameters()}
    assert len(rest["params"]) + len(head["params"]) == len(list(model.parameters()))
