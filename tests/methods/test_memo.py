"""MEMO and CR-MEMO against a plain loop over images, and the baselines they must beat against their formulas."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_tta import ConfigError, UnsupportedModelError, adapt
from lightning_tta.views.augmix import make_views
from nets import make_images, make_net, max_difference, norm_weights, same

pytestmark = pytest.mark.usefixtures("one_thread")
VIEWS = 6


def use_prior(net, batch, prior):
    """A copy of the net whose BatchNorm layers, met in order, mix in the statistics of ``batch``."""
    net = copy.deepcopy(net)

    def mix(layer, inputs):
        x = inputs[0].detach()
        dims = [0, *range(2, x.ndim)]
        layer.running_mean, layer.running_var = layer.source_mean, layer.source_var
        if x.numel() > x.shape[1]:  # one value a channel has no variance
            keep = prior / (prior + 1)
            layer.running_mean = keep * layer.source_mean + (1 - keep) * x.mean(dims)
            layer.running_var = keep * layer.source_var + (1 - keep) * x.var(dims, correction=1)

    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.source_mean, layer.source_var = layer.running_mean.clone(), layer.running_var.clone()
            layer.register_forward_pre_hook(mix)
    return net


def plain_memo(
    net, images, seeds, *, optimizer="sgd", lr, kl_weight=0.0, prior=None, params="all", steps=1, augment, fit=None
):
    """One image after the other, each with a copy of the net and a new optimizer."""
    fit = fit or (lambda x: x)
    results = []
    for image, seed in zip(images, seeds, strict=True):
        own = use_prior(net, image, prior) if prior else copy.deepcopy(net)
        views = fit(make_views(image[None], VIEWS, augment, [seed])[0])
        weights = list(norm_weights(own).values() if params == "norm" else own.parameters())
        make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
        step = make(weights, lr=lr, weight_decay=0.1)
        for _ in range(steps):
            p = own(views).softmax(1)
            mean = p.mean(0)
            loss = -(mean * mean.log()).sum() + kl_weight * (p * (p / mean).log()).sum(1).mean()
            gradients = torch.autograd.grad(loss, weights)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            step.step()
        with torch.no_grad():
            results.append(own(fit(image[None]))[0])
    return torch.stack(results)


@pytest.mark.parametrize("kind", ["bn", "gn", "ln", "user"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
@pytest.mark.parametrize("prior", [None, 16])
@pytest.mark.parametrize("params", ["all", "norm"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_batch_is_its_images_one_by_one(kind, kl_weight, prior, params, optimizer):
    net, images = make_net(kind).double(), make_images(5, dtype=torch.float64)
    options = {"optimizer": optimizer, "lr": 0.1 if optimizer == "sgd" else 0.02, "kl_weight": kl_weight}
    options |= {"params": params, "augment": "crop_flip"}
    options |= {"together": True} if params == "norm" else {}
    method = adapt(net, "memo", views=VIEWS, bn_prior=prior, weight_decay=0.1, **options)
    options.pop("together", None)
    expected = plain_memo(net, images, method.seeds(images), prior=prior, **options)
    logits = method(images)
    assert max_difference(logits, expected) < 1e-9
    with torch.no_grad():
        assert max_difference(expected, net(images)) > 1e-3
    single = torch.cat([method(image[None]) for image in images.flip(0)]).flip(0)
    assert max_difference(single, expected) < 1e-9
    assert (
        max_difference(
            adapt(net.float(), "memo", views=VIEWS, bn_prior=prior, weight_decay=0.1, **options)(images.float()),
            expected.float(),
        )
        < 1e-4
    )


@pytest.mark.parametrize("params", ["all", "norm"])
def test_several_steps(params):
    net, images = make_net("bn").double(), make_images(3, dtype=torch.float64)
    options = {"optimizer": "adam", "lr": 0.02, "params": params, "steps": 3, "augment": "augmix"}
    method = adapt(net, "memo", views=VIEWS, weight_decay=0.1, together=params == "norm", **options)
    expected = plain_memo(net, images, method.seeds(images), **options)
    assert max_difference(method(images), expected) < 1e-9
    assert method.stats["backwards"] == (3 if params == "norm" else 9)


@pytest.mark.parametrize("params", ["all", "norm"])
@pytest.mark.parametrize("chunk", [1, 4, 12, 100])
def test_chunks_change_no_number(params, chunk):
    net, images = make_net("gn").double(), make_images(4, dtype=torch.float64)
    options = {"views": VIEWS, "lr": 0.1, "params": params, "kl_weight": 0.3}
    sizes = []
    together = params == "norm" and chunk >= VIEWS
    method = adapt(net, "memo", chunk_views=chunk, together=together, **options)
    method.model.register_forward_hook(lambda layer, inputs, output: sizes.append(len(output)))
    assert max_difference(method(images), adapt(net, "memo", **options)(images)) < 1e-10
    assert max(sizes) <= chunk
    assert max(sizes) == (min(chunk // VIEWS, 4) * VIEWS if together else min(chunk, VIEWS))


@pytest.mark.parametrize("params", ["all", "norm"])
def test_nothing_is_left_behind(params):
    net = make_net("bn")
    method = adapt(net, "memo", views=VIEWS, optimizer="adam", lr=0.05, params=params)
    before = copy.deepcopy(method.state_dict())
    first = method(make_images(3))
    assert same(method.state_dict(), before)
    method(make_images(3, seed=1))
    assert torch.equal(method(make_images(3)), first)


def test_stale_moments_leak_and_fresh_ones_do_not():
    net, images = make_net("bn").double(), make_images(4, dtype=torch.float64)
    options = {"views": VIEWS, "optimizer": "adam", "lr": 0.02}
    fresh, stale = (adapt(net, "memo", optimizer_state=kind, **options) for kind in ("fresh", "stale"))
    assert torch.equal(fresh(images[:1]), stale(images[:1]))  # nothing to leak yet
    assert torch.equal(fresh(images[1:2]), adapt(net, "memo", **options)(images[1:2]))
    assert max_difference(fresh(images[2:3]), stale(images[2:3])) > 1e-4
    state = copy.deepcopy(stale.state_dict())
    assert same(fresh.model.state_dict(), stale.model.state_dict())  # the weights come back all the same
    moments = {n: m for n, m in state["_extra_state"]["memory"].items() if n.startswith("optimizers.model.")}
    assert any(moment.any() for moment in moments.values())


def test_class_subsets():
    net, images = make_net("gn", 8).double(), make_images(3, dtype=torch.float64)
    seen = [1, 4, 6]
    method = adapt(net, "memo", views=VIEWS, lr=0.1, loss_classes=seen, predict_classes=seen, augment="crop_flip")
    logits = method(images)
    assert logits.shape == (3, 8)
    assert set(logits.argmax(1).tolist()) <= set(seen)
    assert torch.isfinite(logits).all()

    class Cut(nn.Module):
        def __init__(self, whole):
            super().__init__()
            self.whole = whole

        def forward(self, x):
            return self.whole(x)[:, seen]

    expected = plain_memo(Cut(net), images, method.seeds(images), lr=0.1, augment="crop_flip")
    without_decay = adapt(net, "memo", views=VIEWS, lr=0.1, weight_decay=0.1, loss_classes=seen, augment="crop_flip")
    assert max_difference(without_decay(images)[:, seen], expected) < 1e-9
    free = adapt(net, "memo", views=VIEWS, lr=0.1, loss_classes=seen, augment="crop_flip")(images)
    assert max_difference(free[:, seen], logits[:, seen]) < 1e-12
    assert set(adapt(net, "memo", views=2, predict_classes=[3]).predict(images).argmax(1).tolist()) == {3}


@pytest.mark.parametrize("params", ["all", "norm"])
@pytest.mark.parametrize("together", [False, True])
def test_views_of_images_before_they_are_cut(params, together):
    """CR-MEMO's: a random crop of the original image, then what the weights' own preprocessing does."""
    from torchvision.transforms.v2 import functional as V

    def fit(x):
        return V.center_crop(V.resize(x, [20], antialias=True), [16, 16])

    net, images = make_net("bn").double(), torch.nn.functional.pad(make_images(3, dtype=torch.float64, size=31), (0, 9))
    options = {"lr": 0.1, "augment": "rrc", "params": params, "together": together and params == "norm", "views": VIEWS}
    method = adapt(net, "memo", crop=[20, 16], **options, weight_decay=0.1)
    expected = plain_memo(net, images, method.seeds(images), lr=0.1, params=params, augment="rrc", fit=fit)
    torch.testing.assert_close(method(images), expected, rtol=1e-5, atol=1e-6)  # torchvision resizes in float32
    torch.testing.assert_close(method.predict(images), net(fit(images)).detach(), rtol=1e-5, atol=1e-6)
    assert max_difference(adapt(net, "memo", **options)(fit(images)), expected) > 1e-3  # views of what is cut
    average = adapt(net, "view_averaging", views=VIEWS, augment="rrc", crop=[20, 16])
    assert max_difference(average(images), adapt(net, "view_averaging", views=VIEWS, augment="rrc")(fit(images))) > 1e-3


def test_options_that_contradict():
    for wrong in ([232], [16, 20], [20, 0]):
        with pytest.raises(ConfigError, match="crop"):
            adapt(make_net("bn"), "memo", crop=wrong)
    for other in ({"statistics": "ema"}, {"refine": "lame"}):
        with pytest.raises(ConfigError, match="exclude each other"):
            adapt(make_net("bn"), "memo", crop=[20, 16], **other)
    adapt(make_net("bn"), "memo", crop=[20, 16], prior="em")
    with pytest.raises(ConfigError, match="chunk_views=4"):
        adapt(make_net("bn"), "memo", bn_prior=16, views=8, chunk_views=4)
    adapt(make_net("gn"), "memo", bn_prior=16, views=8, chunk_views=4)  # no BatchNorm, no common statistics
    for wrong in ({"loss_classes": [1]}, {"predict_classes": []}, {"bn_prior": 0}, {"kl_weight": -1.0}):
        with pytest.raises(ConfigError):
            adapt(make_net("bn"), "memo", **wrong)


def test_seeds_come_from_the_pixels():
    method = adapt(make_net("bn"), "memo")
    images = make_images(4)
    seeds = method.seeds(images)
    assert len(set(seeds)) == 4
    assert method.seeds(images.flip(0)) == seeds[::-1]
    assert method.seeds(images.to(memory_format=torch.channels_last)) == seeds
    assert adapt(make_net("bn"), "memo", seed=1).seeds(images) != seeds
    changed = images.clone()
    changed[2, 1, 3, 3] += 1e-3
    assert [a == b for a, b in zip(method.seeds(changed), seeds, strict=True)] == [True, True, False, True]


# Baselines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bn", "ln"])
@pytest.mark.parametrize("prior", [None, 16])
@pytest.mark.parametrize("chunk", [None, 6])
def test_view_averaging(kind, prior, chunk):
    net, images = make_net(kind).double(), make_images(4, dtype=torch.float64)
    method = adapt(net, "view_averaging", views=VIEWS, bn_prior=prior, chunk_views=chunk)
    expected = []
    for image, seed in zip(images, method.seeds(images), strict=True):
        views = make_views(image[None], VIEWS, "crop_flip", [seed])[0]
        own = use_prior(net, views, prior) if prior else net
        expected.append(own(views).softmax(1).mean(0))
    assert max_difference(method(images).softmax(1), torch.stack(expected).detach()) < 1e-10


def test_single_image_bn():
    net, images = make_net("bn").double(), make_images(4, dtype=torch.float64)
    expected = torch.cat([use_prior(net, image, 16)(image[None]) for image in images]).detach()
    assert max_difference(adapt(net, "single_image_bn")(images), expected) < 1e-10
    with pytest.raises(UnsupportedModelError, match="no BatchNorm"):
        adapt(make_net("gn"), "single_image_bn")


def test_zero_is_a_vote_of_the_sure_views():
    net, images = make_net("gn").double(), make_images(6, dtype=torch.float64)
    method = adapt(net, "zero", views=20, keep=0.3)
    logits = method(images)
    for image, seed, found in zip(images, method.seeds(images), logits, strict=True):
        p = net(make_views(image[None], 20, "rrc_flip", [seed])[0]).softmax(1)
        sure = p[(-(p * p.log()).sum(1)).argsort()[:6]]
        votes = F.one_hot(sure.argmax(1), 5).double().mean(0)
        score = votes + 1e-3 * sure.mean(0)
        assert found.argmax() == score.argmax()
        assert max_difference(found.exp(), score.detach()) < 1e-9


def test_fused_and_odd_norm_layers_fall_back_to_the_loop():
    from timm.layers import BatchNormAct2d

    net = make_net("bn").double()
    fused = BatchNormAct2d(8, act_layer=nn.SiLU).double().eval()
    fused.load_state_dict(net.norm1.state_dict())
    other = copy.deepcopy(net)
    other.norm1 = fused
    images = make_images(3, dtype=torch.float64)
    method = adapt(other, "memo", views=VIEWS, params="norm", lr=0.1, bn_prior=16)
    assert not method.can_together
    with pytest.raises(ConfigError, match="together=True"):
        adapt(other, "memo", views=VIEWS, params="norm", together=True)
    singles = torch.cat([method(image[None]) for image in images])
    assert max_difference(method(images), singles) < 1e-12
    assert max_difference(method.predict(images), torch.cat([method.predict(x[None]) for x in images])) < 1e-12
