"""``reservoir=M``: a state for each domain."""

import pytest
import torch

from lightning_tta import ConfigError, DataError, UnsupportedModelError, adapt
from nets import make_images, make_net

OPTIONS = {
    "tent": {"lr": 1e-2},
    "zerosiam": {"lr": 0.5, "predictor_lr": 0.5},
    "eta": {"lr": 1e-2, "entropy_margin": 0.9, "diversity_margin": 0.95},
    "norm": {"momentum": 0.3},
    "t3a": {"filter_k": 2},
}
SOURCE = [{"image": make_images(16, seed=70 + number)} for number in range(3)]


def domain(number, seed):
    """Images whose pixels lie in another range for each domain."""
    return make_images(8, seed=seed) * (1.0, 0.15, 0.4)[number] + (0.0, 0.8, 0.0)[number]


def make(name="tent", kind="bn", prepare=True, reservoir=4, **more):
    method = adapt(make_net(kind, seed=0), name, reservoir=reservoir, **{**OPTIONS[name], **more})
    if prepare:
        method.prepare(SOURCE)
    return method


def value(method, name):
    return method.value(f"memory.{name}")


def variances(net, x, count=3):
    """Over the positions of each image, of the inputs of the first norm layers, in eval mode: (B, D)."""
    seen = []
    layers = [m for m in net.modules() if isinstance(m, (torch.nn.BatchNorm2d, torch.nn.GroupNorm))][:count]
    handles = [m.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].double())) for m in layers]
    with torch.no_grad():
        net.eval()(x)
    for handle in handles:
        handle.remove()
    return torch.cat([s.var((2, 3), unbiased=False) for s in seen], 1)


@pytest.mark.parametrize("kind", ["bn", "gn"])
def test_style_distances_and_threshold_against_a_plain_computation(kind):
    method, net = make(kind=kind), make_net(kind, seed=0)
    source = torch.cat([batch["image"] for batch in SOURCE])
    floor = 1e-3 * variances(net, source).mean(0)

    def style_of(images):
        return (variances(net, images) + floor).log().mean(0)

    styles = [style_of(source)]
    assert torch.allclose(value(method, "styles")[0].double(), styles[0], atol=1e-4)
    generator = torch.Generator().manual_seed(0)
    groups = [style_of(source[torch.randperm(48, generator=generator)[:8]]) for _ in range(32)]
    pairs = torch.stack([(a - b).norm() for n, a in enumerate(groups) for b in groups[:n]])
    limit = pairs.quantile(0.999)
    batch = domain(1, 5)
    method(batch)
    style = style_of(batch)
    assert (styles[0] - style).norm() > limit  # so it is new
    assert value(method, "number") == 2
    assert value(method, "current") == 1
    assert torch.allclose(value(method, "styles")[1].double(), style, atol=1e-4)


def test_domains_that_come_again_find_their_state():
    method, plain = make(), {}
    for seed, number in enumerate([0, 1, 2, 0, 1, 2, 1]):
        images = domain(number, seed)
        if number not in plain:
            plain[number] = adapt(make_net("bn", seed=0), "tent", **OPTIONS["tent"])
            if number:  # a new state is a copy of the one whose predictions tell most
                mutual = []
                for one in plain.values():
                    p = one.predict(images, statistics="batch").softmax(1)
                    mutual.append(float(-(p.mean(0) * p.mean(0).log()).sum() + (p * p.log()).sum(1).mean()))
                best = list(plain.values())[max(range(len(plain) - 1), key=mutual.__getitem__)]
                plain[number].load_state_dict(best.state_dict())
        assert torch.equal(method(images), plain[number](images))
        assert method.stats["forwards"] <= 2 + value(method, "number")  # style, the step's own; of each for a new one
        assert value(method, "current") == list(plain).index(number)
        for name, tensor in plain[number].adaptable.items():
            assert torch.equal(method.adaptable[name], tensor)
    assert value(method, "number") == 3


def test_no_more_states_than_there_is_room_for():
    method = make(reservoir={"members": 2})
    for seed, number in enumerate([1, 2, 0]):
        method(domain(number, seed))
    assert value(method, "number") == 2


@pytest.mark.parametrize("name", [*OPTIONS])
def test_reset_save_and_load(name):
    method, other = make(name), make(name, prepare=False)
    first = [method(domain(number, seed)) for seed, number in enumerate([0, 1, 0, 2])]
    other.load_state_dict(method.state_dict())
    for seed, number in enumerate([1, 0], 20):
        assert torch.equal(method(domain(number, seed)), other(domain(number, seed)))
    method.reset()
    again = [method(domain(number, seed)) for seed, number in enumerate([0, 1, 0, 2])]
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


def test_statistics_belong_to_a_state():
    method = make("tent", statistics={"kind": "ema", "momentum": 0.5})
    method(domain(1, 0))
    before = method.value("statistics.moments").clone()
    method(domain(0, 1))
    assert not torch.equal(method.value("statistics.moments"), before)
    assert torch.equal(value(method, "bank.statistics.moments")[1], before)


def test_images_that_are_not_finite_open_nothing():
    method = make()
    method(domain(0, 0))
    images = domain(0, 1)
    images[3] = torch.nan
    logits = method(images)
    assert value(method, "number") == 1
    assert torch.equal(logits[3], torch.zeros(5))


def test_what_it_is_not_for():
    with pytest.raises(UnsupportedModelError, match="norm parameters"):
        adapt(make_net("bn", seed=0), "cotta", reservoir=4)
    with pytest.raises(UnsupportedModelError, match="each image anew"):
        adapt(make_net("bn", seed=0), "memo", reservoir=4)
    with pytest.raises(ConfigError, match="has none"):
        adapt(make_net("bn", seed=0), "source", reservoir=4)
    with pytest.raises(ConfigError, match="no option 'member'"):
        adapt(make_net("bn", seed=0), "tent", reservoir={"member": 4})
    with pytest.raises(ConfigError, match="window"):
        adapt(make_net("bn", seed=0), "tent", reservoir=4, window=8)
    with pytest.raises(DataError, match="at least 4 source images"):
        make(prepare=False).prepare([{"image": make_images(2, seed=0)}])


def test_layers_that_see_vectors_have_no_style():
    method = adapt(make_net("user"), "tent", lr=1e-2, reservoir=3)  # a later one of its first three does
    method.prepare(SOURCE)
    assert method(domain(1, 3)).isfinite().all()
    nn = torch.nn
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)).eval()
    with pytest.raises(UnsupportedModelError, match="one value per channel: 2"):
        adapt(net, "tent", reservoir=3).prepare(SOURCE)


def shares_after(logits, momentum=0.5):
    """The factors of prior='moving' on a uniform source, by its formula, batch by batch."""
    q, out = torch.full((5,), 0.2, dtype=torch.float64), []
    for batch in logits:
        q = (1 - momentum) * q + momentum * batch.double().softmax(1).mean(0)
        s = max(momentum / len(batch), 0.2) / q.max()
        out.append((q + s) / (1 + s * 5))
    return out


@pytest.mark.parametrize("name", ["tent", "norm", "t3a"])
def test_a_prior_is_of_the_whole_stream(name):
    """Learned from the logits of all domains; no state of a domain takes it back."""
    plain, method = make(name), make(name, prior={"kind": "moving", "momentum": 0.5})
    stream = [domain(number, seed) for seed, number in enumerate([0, 1, 0, 2, 1])]
    logits = [plain(x) for x in stream]
    for x, before, factors in zip(stream, logits, shares_after(logits), strict=True):
        assert torch.allclose(method(x).double(), before.double() + factors.log(), atol=1e-4)
    method.reset()
    assert torch.allclose(method(stream[0]).double(), logits[0].double() + shares_after(logits[:1])[0].log(), atol=1e-4)


def test_states_that_are_allocated_at_their_first_use():
    """A net without a linear layer at its end does not say how many classes the filters' mean has."""
    nn = torch.nn
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1))
    method = adapt(nn.Sequential(net, nn.Flatten()), "eta", reservoir=3, **OPTIONS["eta"])
    method.prepare(SOURCE)
    stream = [domain(number, seed) for seed, number in enumerate([0, 1, 0, 1])]
    first = [method(x) for x in stream]
    assert value(method, "bank.mean_probability").shape == (3, 5)
    assert not value(method, "bank.mean_probability")[:2].isnan().any()
    method.reset()
    assert all(torch.equal(method(x), logits) for x, logits in zip(stream, first, strict=True))


@pytest.mark.parametrize(("name", "options"), [("neo", {}), ("eata", {"fisher_alpha": 0.0})])
def test_methods_that_need_no_source_themselves(name, options):
    method = adapt(make_net("bn"), name, reservoir=3, **options)
    method.prepare(SOURCE)
    assert method(domain(1, 3)).isfinite().all()


@pytest.mark.parametrize(("name", "options"), [("eata", {}), ("neo", {"center": "source"})])
def test_batches_that_two_look_at(name, options):
    method = adapt(make_net("bn"), name, reservoir=3, **options)
    with pytest.raises(DataError, match="Give a list"):
        method.prepare(iter(SOURCE))
    method.prepare(SOURCE)
    assert method.prepared


def test_what_a_method_has_prepared_is_in_its_states():
    method = adapt(make_net("bn"), "petta", reservoir=3, lr=1e-2)
    method.prepare(SOURCE)
    stream = [domain(number, seed) for seed, number in enumerate([0, 1, 0])]
    first = [method(images) for images in stream]
    method.reset()
    assert all(torch.equal(method(x), logits) for x, logits in zip(stream, first, strict=True))


def test_limits_are_of_the_source_images_that_were_loaded():
    method, other = make(), make(prepare=False)
    other.prepare([{"image": domain(1, seed)} for seed in range(3)])
    for each in (method, other):
        each(domain(0, 0))
    other.load_state_dict(method.state_dict())
    for seed, number in enumerate([1, 2, 0], 30):
        assert torch.equal(method(domain(number, seed)), other(domain(number, seed)))


@pytest.mark.parametrize("statistics", ["batch", "source", "ema", "balanced", "domains", "auto"])
def test_of_one_domain_it_predicts_as_without(statistics):
    """One state is the average of one; each kind has the batch in its statistics before it is predicted."""
    options = {"statistics": statistics, "reservoir": {"members": 2, "threshold": 1e6}}
    method, plain = make(**options), adapt(make_net("bn", seed=0), "tent", **OPTIONS["tent"], statistics=statistics)
    for seed in range(4):
        images = domain(0, seed)
        assert torch.allclose(method(images), plain(images), atol=1e-5)
    assert value(method, "number") == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_leaves_the_source_images_as_they_are(dtype):
    """A variance is a small difference of moments, which half precision would round away."""
    method = make(optimizer="sgd")
    before = method.value("memory.source").clone()
    method(domain(0, 1))
    method.to(dtype)
    assert torch.equal(method.value("memory.source")[:48], before[:48])
    method(domain(0, 2)), method.reset()
    assert torch.equal(method.value("memory.source")[:48], before[:48])
    assert value(method, "number") == 1
