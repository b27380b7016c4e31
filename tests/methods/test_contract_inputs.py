"""What every method must do with its input: broken images, steps that fail, precision, layout, wrong arguments."""

import inspect

import pytest
import torch
from torch import nn

from contract import build, every_mechanism, every_setting, run, state_of, tensors_of
from lightning_tta import ConfigError, available_methods
from nets import make_images, make_net, make_stream, same, without_prior

pytestmark = pytest.mark.usefixtures("one_thread")


class InfiniteGradient(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


class Faulty(nn.Module):
    """The wrapped net, until ``Faulty.fault`` is set: then values of the first image overflow, or all gradients do."""

    fault = None  # of the class: copies of the net have it, too

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        if self.fault == "overflow":
            x = x * 3e38
            x[0, 0, 8, 8] *= 1e3
        if self.fault != "gradient":
            return self.net.head(self.net.features(x))
        first = next(module for module in self.net.modules() if "Norm" in type(module).__name__)
        handle = first.register_forward_hook(lambda _, __, output: InfiniteGradient.apply(output))
        features = self.net.features(x)  # a loss of these, or of what runs behind the first layer
        handle.remove()
        return self.net.head(InfiniteGradient.apply(features))


@every_mechanism
def test_a_stream_with_faults(case, subtests, monkeypatch):
    """After each fault the method is where another one is that did not meet it."""
    name, options, kind = case
    method, expected = (build(name, options, kind, net=Faulty(make_net(kind))) for _ in range(2))
    before, between, after = make_stream(3)
    assert same(method(before), expected(before))

    with subtests.test("broken images are left out"):
        clean, images = make_images(4), make_images(7, seed=1)
        usable, broken = [0, 2, 3, 6], [1, 4, 5]
        images[usable] = clean
        images[1, 0, 3, 3] = float("nan")
        images[4] = float("inf")
        images[5, 2, 8, 8] = -float("inf")
        logits = method(images)
        assert torch.equal(logits[usable], expected(clean))
        assert torch.equal(logits[broken], torch.zeros(3, 5))
        assert method.stats == {**expected.stats, "nonfinite_images": 3.0}
        assert same(method.state_dict(), expected.state_dict())
        predicted = method.predict(images, statistics="batch")
        assert torch.equal(predicted[usable], expected.predict(clean, statistics="batch"))
        assert torch.equal(predicted[broken], torch.zeros(3, 5))

    for value in (float("nan"), float("inf"), -float("inf")):
        with subtests.test("a batch of broken images", value=value):
            assert torch.equal(method(torch.full((3, 3, 16, 16), value)), torch.zeros(3, 5))
            assert method.stats["nonfinite_images"] == 3
            assert same(method.state_dict(), expected.state_dict())

    with subtests.test("a net that overflows"):
        monkeypatch.setattr(Faulty, "fault", "overflow")
        method(make_images(4, seed=8))
        if method.stats["backwards"]:
            assert method.stats["skipped_steps"] >= 1
        assert same(method.state_dict(), expected.state_dict())

    monkeypatch.setattr(Faulty, "fault", None)
    assert same(method(between), expected(between))
    assert method.stats["skipped_steps"] == 0

    with subtests.test("infinite gradients"):
        monkeypatch.setattr(Faulty, "fault", "gradient")
        images = make_images(4)
        assert torch.isfinite(method(images)).all()
        if method.stats["backwards"]:
            assert method.stats["skipped_steps"] >= 1
        else:
            expected(images)
        assert same(without_prior(method.state_dict()), without_prior(expected.state_dict()))

    with subtests.test("and the stream goes on"):
        monkeypatch.setattr(Faulty, "fault", None)
        assert same(method(after), expected(after))
        assert method.stats == expected.stats
        assert method.stats["skipped_steps"] == 0
        assert same(method.state_dict(), expected.state_dict())


@every_setting
@pytest.mark.parametrize("num_classes", [2, 1000])
def test_number_of_classes(case, num_classes):
    name, options, kind = case
    method = build(name, options, kind, net=make_net(kind, num_classes))
    for images in make_stream(2):
        logits = method(images)
        assert logits.shape == (4, num_classes)
        assert torch.isfinite(logits).all()


@every_mechanism
def test_memory_layout_does_not_matter(case):
    method, stream = build(*case), make_stream(2)
    expected = run(method, stream)
    layouts = (
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack([x, 1 - x], dim=-1)[..., 0],
    )
    for layout in layouts:
        changed = [layout(x) for x in stream]
        assert not changed[0].is_contiguous()
        method.reset()
        for logits, reference in zip(run(method, changed), expected, strict=True):
            torch.testing.assert_close(logits, reference, rtol=1e-3, atol=1e-4)


def values_in(state):
    """Floating-point tensors anywhere in a state, but single numbers such as an optimizer's count of steps."""
    if isinstance(state, torch.Tensor):
        return [state] if state.is_floating_point() and state.dim() else []
    children = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [value for child in children for value in values_in(child)]


@every_mechanism
def test_double_precision(case, subtests):
    name, options, kind = case
    with subtests.test("a net in double precision"):
        method = build(name, options, kind, net=make_net(kind).double())
        for images in (make_images(4, dtype=torch.float64), make_images(4, seed=1)):
            assert method(images).dtype == torch.float64
            assert method.predict(images, statistics="batch").dtype == torch.float64
        assert all(t.dtype == torch.float64 for t in method.adaptable.values())

    with subtests.test("conversion in the middle of a stream"):
        method, stream = build(*case), make_stream(4)
        expected = run(method, stream)
        method.reset()
        run(method, stream[:2])
        method.double()
        for images, reference in zip(stream[2:], expected[2:], strict=True):
            logits = method(images)
            assert logits.dtype == torch.float64
            torch.testing.assert_close(logits.float(), reference, rtol=1e-3, atol=1e-4)
        assert {value.dtype for value in values_in(method.state_dict())} == {torch.float64}  # the optimizer's, too
        method.reset()
        fresh = build(*case).double()
        assert same(tensors_of(method.state_dict()), tensors_of(fresh.state_dict()))
        assert all(torch.equal(t, method.state_dict()[n]) for n, t in method.adaptable.items())


def learns_with_adam(name, options):
    defaults = inspect.signature(available_methods()[name]).parameters
    default = defaults["optimizer"].default if "optimizer" in defaults else ""
    return "adam" in options.get("optimizer", default)


@every_mechanism
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_nets_return_float32(case, dtype):
    name, options, kind = case
    net = make_net(kind).to(dtype)
    if dtype == torch.float16 and learns_with_adam(name, options):
        float32 = build(*case)
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


@every_mechanism
def test_autocast(case):
    """Within one context, too, the weights are those of the last step: autocast keeps copies that know of none."""
    method, stream, asked = build(*case), make_stream(2), make_images(4, seed=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [(method(images), method.predict(asked, statistics="batch")) for images in stream]
        method.reset()
        at_the_source = method.predict(asked, statistics="batch")
    assert all(t.dtype == torch.float32 for t in method.adaptable.values())
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        assert torch.equal(method.predict(asked, statistics="batch"), at_the_source)
    for images, (logits, predicted) in zip(stream, found, strict=True):
        assert logits.dtype == torch.float32
        assert torch.isfinite(logits).all()
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            assert torch.equal(method(images), logits)
            assert torch.equal(method.predict(asked, statistics="batch"), predicted)


WRONG = {
    "uint8": (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "uint8"),
    "3-D": (torch.zeros(3, 16, 16), r"\(3, 16, 16\)"),
    "no images": (torch.zeros(0, 3, 16, 16), r"\(0, 3, 16, 16\)"),
    "no pixels": (torch.zeros(2, 3, 0, 16), r"\(2, 3, 0, 16\)"),
    "0-255": (make_images(2) * 255, "normalised"),
    "standardised": ((make_images(2) - 0.5) * 8, "normalised"),
    "list": ([[1.0]], "list"),
}


@every_setting
def test_wrong_input_is_refused_with_advice(case, subtests):
    method = build(*case)
    before = state_of(method)
    for fault, (images, words) in WRONG.items():
        for call in (method, method.predict):
            with subtests.test(fault, call="predict" if call == method.predict else "forward"):
                with pytest.raises(ConfigError, match=words) as caught:
                    call(images)
                assert "[0, 1]" in str(caught.value)
    assert same(method.state_dict(), before)
