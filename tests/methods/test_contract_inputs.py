"""What every method must do with its input and options: odd batches, bad numbers, precision, wrong arguments."""

import pytest
import torch
from torch import nn

from contract import build, every_case, every_setting, run, state_of, tensors_of
from lightning_tta import ConfigError
from nets import make_images, make_net, make_stream, same

pytestmark = pytest.mark.usefixtures("one_thread")


class Switchable(nn.Module):
    """Overflows inside on a batch that has a pixel above 1.5, is the wrapped net otherwise."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(torch.where(x.amax() > 1.5, x * 3e38, x))


@every_case
def test_batch_of_one(case):
    method = build(*case)
    for i, size in enumerate((1, 4, 1, 3, 1)):
        logits = method(make_images(size, seed=i))
        assert logits.shape == (size, 5)
        assert torch.isfinite(logits).all()
        assert all(torch.isfinite(t).all() for t in tensors_of(method.state_dict()).values() if t.is_floating_point())


@every_case
def test_input_gradients_are_left_alone(case):
    images = make_images(4).requires_grad_()
    logits = build(*case)(images)
    assert not logits.requires_grad
    assert images.grad is None


@every_case
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_images_are_left_out(case, bad):
    clean, images = make_images(4), make_images(6, seed=1)
    images[[0, 2, 3, 5]] = clean
    images[1, 0, 3, 3] = bad
    images[4] = bad
    method, expected = build(*case), build(*case)
    logits = method(images)
    assert torch.equal(logits[[0, 2, 3, 5]], expected(clean))
    assert torch.equal(logits[[1, 4]], torch.zeros(2, 5))
    assert method.stats == {**expected.stats, "nonfinite_images": 2.0}
    assert same(method.state_dict(), expected.state_dict())
    assert torch.equal(method.predict(images)[[0, 2, 3, 5]], expected.predict(clean))


@every_case
def test_all_images_nonfinite(case):
    method = build(*case)
    method(make_images(4))
    before = state_of(method)
    logits = method(torch.full((3, 3, 16, 16), float("nan")))
    assert torch.equal(logits, torch.zeros(3, 5))
    assert method.stats["nonfinite_images"] == 3
    assert same(method.state_dict(), before)


@every_case
def test_overflow_skips_the_step(case):
    name, options, kind = case
    stream = make_stream(3)
    overflowing = make_images(4, seed=8)
    overflowing[0, 0, 8, 8] = 1.75  # the middle: no view may lose it
    method = build(name, options, kind, net=Switchable(make_net(kind)))
    expected = build(name, options, kind, net=Switchable(make_net(kind)))
    method(stream[0])
    expected(stream[0])
    method(overflowing)
    if method.stats["backwards"]:
        assert method.stats["skipped_steps"] >= 1
    assert same(method.state_dict(), expected.state_dict())
    assert same(run(method, stream[1:]), run(expected, stream[1:]))
    assert method.stats["skipped_steps"] == 0


class InfiniteGradient(torch.autograd.Function):
    """The identity, whose gradient is infinite where the input is the batch's marked one."""

    @staticmethod
    def forward(ctx, x, marked):
        ctx.marked = bool(marked)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return (gradient * float("inf") if ctx.marked else gradient), None


class BadGradient(nn.Module):
    """Finite logits, infinite gradients on a batch that has a pixel above 1.5."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.head = net.head

    def forward(self, x):
        marked = x.amax() > 1.5
        return self.head(InfiniteGradient.apply(self.net.features(x), marked))


@every_case
def test_nonfinite_gradient_skips_the_step(case):
    name, options, kind = case
    images = make_images(4)
    images[0, 0, 8, 8] = 1.75
    method = build(name, options, kind, net=BadGradient(make_net(kind)))
    before = state_of(method)
    assert torch.isfinite(method(images)).all()
    if method.stats["backwards"]:
        assert method.stats["skipped_steps"] >= 1
        assert same(method.state_dict(), before)
    method(make_images(4))
    assert method.stats["skipped_steps"] == 0


@every_case
@pytest.mark.parametrize("num_classes", [2, 1000])
def test_number_of_classes(case, num_classes):
    name, options, kind = case
    method = build(name, options, kind, net=make_net(kind, num_classes))
    for images in make_stream(3):
        logits = method(images)
        assert logits.shape == (4, num_classes)
        assert torch.isfinite(logits).all()


@every_case
def test_memory_layout_does_not_matter(case):
    stream = make_stream(2)
    expected = run(build(*case), stream)
    layouts = (
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack([x, 1 - x], dim=-1)[..., 0],
    )
    for layout in layouts:
        changed = [layout(x) for x in stream]
        assert not changed[0].is_contiguous()
        for logits, reference in zip(run(build(*case), changed), expected, strict=True):
            torch.testing.assert_close(logits, reference, rtol=1e-3, atol=1e-4)


@every_case
def test_double_precision(case):
    name, options, kind = case
    method = build(name, options, kind, net=make_net(kind).double())
    for images in (make_images(4, dtype=torch.float64), make_images(4, seed=1)):
        assert method(images).dtype == torch.float64
        assert method.predict(images).dtype == torch.float64
    assert all(t.dtype == torch.float64 for t in method.adaptable.values())


@every_case
def test_conversion_in_the_middle_of_a_stream(case):
    method, stream = build(*case), make_stream(4)
    reference = build(*case)
    run(method, stream[:2])
    run(reference, stream[:2])
    method.double()
    for images in stream[2:]:
        logits = method(images)
        assert logits.dtype == torch.float64
        torch.testing.assert_close(logits.float(), reference(images), rtol=1e-3, atol=1e-4)
    states = [
        s
        for o in method.optimizers.values()
        for state in o.state.values()
        for k, s in state.items()
        if k != "step" and isinstance(s, torch.Tensor)
    ]
    assert all(s.dtype == torch.float64 for s in states)
    method.reset()
    fresh = build(*case).double()
    assert same(tensors_of(method.state_dict()), tensors_of(fresh.state_dict()))
    assert all(torch.equal(t, method.state_dict()[n]) for n, t in method.adaptable.items())


def learns_with_adam(method):
    return any("betas" in optimizer.defaults for optimizer in method.optimizers.values())


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_nets_return_float32(case, dtype):
    name, options, kind = case
    net = make_net(kind).to(dtype)
    if dtype == torch.float16 and learns_with_adam(float32 := build(*case)):
        with pytest.raises(ConfigError, match=r"float16.*optimizer='sgd'"):
            build(name, options, kind, net=net)
        before = state_of(float32)
        with pytest.raises(ConfigError, match=r"float16.*optimizer='sgd'"):
            float32.half()
        assert same(float32.state_dict(), before)
        return
    method = build(name, options, kind, net=net)
    for images in make_stream(2):
        logits = method(images)
        assert logits.dtype == torch.float32
        assert torch.isfinite(logits).all()


@every_case
def test_autocast(case):
    """Within one context, too, the weights are those of the last step: autocast keeps copies that know of none."""
    method, alike = build(*case), build(*case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [method(images) for images in make_stream(2)]
        predicted = method.predict(make_images(4))
    for images, logits in zip(make_stream(2), found, strict=True):
        assert logits.dtype == torch.float32
        assert torch.isfinite(logits).all()
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            assert torch.equal(alike(images), logits)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        assert torch.equal(alike.predict(make_images(4)), predicted)
    assert all(t.dtype == torch.float32 for t in method.adaptable.values())


@every_setting
@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "uint8"),
        (torch.zeros(3, 16, 16), r"\(3, 16, 16\)"),
        (torch.zeros(0, 3, 16, 16), r"\(0, 3, 16, 16\)"),
        (torch.zeros(2, 3, 0, 16), r"\(2, 3, 0, 16\)"),
        (make_images(2) * 255, "normalised"),
        ((make_images(2) - 0.5) * 8, "normalised"),
        ([[1.0]], "list"),
    ],
    ids=["uint8", "3-D", "no images", "no pixels", "0-255", "standardised", "list"],
)
def test_wrong_input_is_refused_with_advice(case, images, words):
    method = build(*case)
    before = state_of(method)
    for call in (method, method.predict):
        with pytest.raises(ConfigError, match=words) as caught:
            call(images)
        assert "[0, 1]" in str(caught.value)
    assert same(method.state_dict(), before)
