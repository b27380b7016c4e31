"""What every method must do, on every net: state, modes, the user's model. A new method is picked up by itself."""

import contextlib
import copy
import io

import pytest
import torch

from contract import (
    REFUSED,
    SETTINGS,
    SUPPORTED,
    build,
    case_id,
    every_case,
    every_setting,
    options_of,
    run,
    state_of,
    tensors_of,
)
from lightning_tta import ConfigError, adapt, available_methods
from nets import KINDS, make_images, make_net, make_stream, same

pytestmark = pytest.mark.usefixtures("one_thread")

PASSES = {
    "source": (1, 0),
    "norm": (1, 0),
    "tent": (1, 1),
    "come": (1, 1),
    "zerosiam": (1, 1),
    "meta_ttt": (3, 2),
    "lame": (1, 0),
    "t3a": (1, 0),
}  # per step: forward, backward


def test_methods_are_found():
    assert {"source", "norm", "tent", "zerosiam"} <= set(available_methods())


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=[case_id(*s, "nets") for s in SETTINGS])
def test_supports_a_net_and_refuses_with_advice(name, options):
    messages = [REFUSED.get(case_id(name, options, kind)) for kind in KINDS]
    assert None in messages
    for message in filter(None, messages):
        assert "use " in message.lower()  # what to do instead


@every_case
def test_logits_and_declared_tensors(case):
    method = build(*case)
    before = state_of(method)
    for images in make_stream(3):
        given = images.clone()
        logits = method(images)
        assert torch.equal(images, given)
        assert logits.shape == (4, 5)
        assert logits.dtype == torch.float32
        assert torch.isfinite(logits).all()
        assert not logits.requires_grad
        assert logits.grad_fn is None
        assert not logits.is_inference()
        assert all(isinstance(v, float) for v in method.stats.values())
        assert {"forwards", "backwards", "skipped_steps", "nonfinite_images", "entropy"} <= set(method.stats)
        assert method.stats["forwards"] >= 1
        assert method.stats["skipped_steps"] == method.stats["nonfinite_images"] == 0
    before, after = tensors_of(before), tensors_of(method.state_dict())
    assert before.keys() == after.keys()
    assert set(method.adaptable) <= set(after)
    assert all(torch.equal(value, after[name]) for name, value in method.adaptable.items())
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved <= set(method.adaptable)


@pytest.mark.parametrize("case", [c for c in SUPPORTED if c[0] != "source"], ids=lambda c: case_id(*c))
def test_adapts(case):
    stream = make_stream(3)
    with torch.no_grad():
        plain = [make_net(case[2])(images) for images in stream]
    assert not same(run(build(*case), stream), plain)


@every_case
def test_reset_is_exact(case):
    method, stream = build(*case), make_stream(3)
    initial = state_of(method)
    first = run(method, stream)
    after = state_of(method)
    method.reset()
    assert same(method.state_dict(), initial)
    assert method.stats == {}
    assert same(run(method, stream), first)
    assert same(method.state_dict(), after)


@every_case
def test_save_and_resume_are_exact(case):
    method, stream = build(*case), make_stream(5)
    initial = state_of(method)
    run(method, stream[:2])
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    rest = run(method, stream[2:])
    file.seek(0)
    resumed = build(*case, seed=7, prepare=False)  # other source weights: all must come from the file
    state = torch.load(file, weights_only=True)
    kept = copy.deepcopy(state)
    resumed.load_state_dict(state)
    assert same(run(resumed, stream[2:]), rest)
    assert same(resumed.state_dict(), method.state_dict())
    assert same(state, kept)  # the caller's state is not aliased
    resumed.reset()
    assert same(resumed.state_dict(), initial)


@every_setting
def test_state_of_another_method_is_refused(case):
    method = build(*case)
    other = adapt(make_net(case[2]), "tent" if not method.adaptable else "source")
    before = tensors_of(state_of(method))
    with pytest.raises(ConfigError, match="does not fit"):
        method.load_state_dict(other.state_dict(), strict=False)
    assert same(tensors_of(method.state_dict()), before)


@every_case
def test_does_not_depend_on_the_global_seed(case):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(run(build(*case), make_stream(2)))
    assert same(*results)


def rates_of(name):
    return [p for p in options_of(name) if p == "lr" or p.endswith("_lr")]


@pytest.mark.parametrize("case", [c for c in SUPPORTED if rates_of(c[0])], ids=lambda c: case_id(*c))
def test_zero_learning_rate_changes_nothing(case):
    name, options, kind = case
    method = build(name, options, kind, **dict.fromkeys(rates_of(name), 0.0))
    before = tensors_of(state_of(method))
    run(method, make_stream(3))
    assert same(tensors_of(method.state_dict()), before)


@every_case
def test_every_gradient_mode_gives_the_same(case):
    expected_method = build(*case)
    expected = run(expected_method, make_stream(3))
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        method = build(*case)
        with mode():
            logits = run(method, make_stream(3))  # under inference_mode the images are inference tensors
        assert same(logits, expected)
        assert same(method.state_dict(), expected_method.state_dict())
        with mode():
            method.reset()
        assert same(method.state_dict(), build(*case).state_dict())
    method = build(*case)
    with torch.inference_mode():
        stream = make_stream(3)
    assert same(run(method, stream), expected)


@every_case
def test_built_and_restored_under_inference_mode(case):
    expected_method = build(*case)
    expected = run(expected_method, make_stream(2))
    for in_place in (False, True):
        net = make_net(case[2])
        with torch.inference_mode():
            method = build(*case, net=net, in_place=in_place)
        assert same(run(method, make_stream(2)), expected)
    with torch.inference_mode():
        method.load_state_dict(state_of(expected_method))
    following = make_images(4, seed=9)
    assert torch.equal(method(following), expected_method(following))


@every_case
def test_the_users_model_is_left_alone(case):
    name, options, kind = case
    net = make_net(kind).train()
    next(net.parameters()).requires_grad_(False)
    weights, flags = copy.deepcopy(net.state_dict()), [p.requires_grad for p in net.parameters()]
    method = adapt(net, name, **options)
    if method.needs_source:
        method.prepare([{"image": make_images(8), "label": torch.arange(8) % 5}])
    run(method, make_stream(3))
    assert same(net.state_dict(), weights)
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.grad is None for p in net.parameters())
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert method.model is not net


@every_case
def test_in_place_uses_the_model_and_leaves_no_trace(case):
    name, options, kind = case
    net = make_net(kind)
    method = build(name, options, kind, net=net)
    assert method.model is net
    run(method, make_stream(2))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert all(p.grad is None for p in method.parameters())
    method.reset()
    assert same(net.state_dict(), make_net(kind).state_dict())
    images = make_images(4)
    with torch.no_grad():
        assert torch.equal(net(images), make_net(kind)(images))  # BatchNorm is back at its source statistics


@every_case
def test_the_net_stays_in_eval_mode(case):
    stream = make_stream(2)
    expected = run(build(*case), stream)
    method = build(*case).train()
    assert method.training
    assert not any(module.training for module in method.model.modules())
    assert same(run(method, stream), expected)
    name, options, kind = case
    method = build(name, options, kind, net=make_net(kind).train())
    assert same(run(method, stream), expected)


@every_case
def test_deepcopy_is_independent(case):
    method, stream = build(*case), make_stream(4)
    initial = state_of(method)
    run(method, stream[:2])
    twin = copy.deepcopy(method)
    middle = state_of(method)
    rest = run(twin, stream[2:])
    assert same(method.state_dict(), middle)
    assert same(run(method, stream[2:]), rest)
    end = state_of(method)
    assert same(twin.state_dict(), end)
    twin.reset()
    assert same(twin.state_dict(), initial)
    assert same(method.state_dict(), end)


@pytest.mark.parametrize("case", [c for c in SUPPORTED if c[0] in PASSES], ids=lambda c: case_id(*c))
def test_passes_are_counted(case):
    method = build(*case)
    calls = []
    method.model.register_forward_hook(lambda *_: calls.append(1))
    for images in make_stream(2):
        calls.clear()
        method(images)
        forwards, backwards = PASSES[case[0]]
        forwards += bool(case[1].get("source_filter"))  # the source looks first
        assert method.stats["forwards"] == len(calls) == forwards * method.steps
        taken = method.stats["backwards"]
        assert taken == backwards * method.steps or (case[1].get("source_filter") and taken < backwards * method.steps)


@every_case
def test_predict_changes_nothing(case):
    method = build(*case)
    method(make_images(4))
    before, stats = state_of(method), dict(method.stats)
    images = make_images(3, seed=5)
    for mode in (contextlib.nullcontext, torch.inference_mode):
        with mode():
            logits = method.predict(images)
            assert torch.equal(logits, method.predict(images))
    assert logits.shape == (3, 5)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert same(method.state_dict(), before)
    assert method.stats == stats
