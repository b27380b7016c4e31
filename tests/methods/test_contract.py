"""What every method must do, on every net: one life of a method, from its construction to its reset.

A new method is picked up by itself.
"""

import copy
import io
import re

import pytest
import torch

from contract import (
    FIRST,
    REFUSED,
    SETTINGS,
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
from lightning_tta.methods.components import adapters
from nets import kinds_of, make_images, make_net, make_stream, same

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (4, 4, 1, 3, 4)
SAID = {name: re.fullmatch(r"(\d+) / (\d+)", kind.about.passes) for name, kind in available_methods().items()}
PASSES = {name: (int(said[1]), int(said[2])) for name, said in SAID.items() if said}  # of a batch: forward, backward


def test_methods_are_found():
    assert {"source", "norm", "tent", "zerosiam"} <= set(available_methods())


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=[case_id(*s, "nets") for s in SETTINGS])
def test_supports_a_net_and_refuses_with_advice(name, options):
    messages = [REFUSED.get(case_id(name, options, kind)) for kind in kinds_of(name)]
    assert None in messages
    for message in filter(None, messages):
        assert "use " in message.lower()  # what to do instead


def stored_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_case
def test_one_life(case, subtests):
    """Five batches; after two of them the state is saved, the method copied, and asked for predictions."""
    name, _, kind = case
    stream = [make_images(size, seed=number) for number, size in enumerate(SIZES)]
    stream_before = copy.deepcopy(stream)
    torch.manual_seed(1)
    net = make_net(kind)
    method = build(*case, net=net)
    initial, logits, stats = state_of(method), [], []
    for number, images in enumerate(stream):
        if number == 2:
            middle, saved = state_of(method), stored_and_loaded(method.state_dict())
            twin = copy.deepcopy(method)
            stats_before = dict(method.stats)
            predicted = [method.predict(images) for images in (stream[4], stream[3], stream[4])]
            with torch.inference_mode():
                predicted.append(method.predict(stream[4]))
            after_predictions = state_of(method), dict(method.stats)
        logits.append(method(images))
        stats.append(dict(method.stats))
    end = state_of(method)

    with subtests.test("logits are float32, finite and without a gradient, and the images are not written to"):
        assert same(stream, stream_before)
        for images, values in zip((*stream, stream[4], stream[3]), (*logits, *predicted[:2]), strict=True):
            assert values.shape == (len(images), 5)
            assert values.dtype == torch.float32
            assert torch.isfinite(values).all()
            assert not values.requires_grad
            assert values.grad_fn is None
            assert not values.is_inference()

    with subtests.test("statistics are numbers"):
        for row in stats:
            assert all(isinstance(value, float) for value in row.values())
            assert {"forwards", "backwards", "skipped_steps", "nonfinite_images", "entropy"} <= set(row)
            assert row["forwards"] >= 1
            assert row["skipped_steps"] == row["nonfinite_images"] == 0

    with subtests.test("only declared tensors move, and they stay finite"):
        before, after = tensors_of(initial), tensors_of(end)
        assert before.keys() == after.keys()
        assert set(method.adaptable) <= set(after)
        assert all(torch.equal(value, after[key]) for key, value in method.adaptable.items())
        assert {key for key in after if not torch.equal(before[key], after[key])} <= set(method.adaptable)
        assert all(torch.isfinite(value).all() for value in after.values() if value.is_floating_point())

    with subtests.test("it adapts"), torch.no_grad():
        plain = [make_net(kind)(images) for images in stream]
        assert same(logits, plain) == (name == "source")

    with subtests.test("predict changes nothing"):
        assert same(after_predictions, (middle, stats_before))
        assert same(predicted[0], predicted[2])
        assert same(predicted[0], predicted[3])

    with subtests.test("save and resume are exact"):
        torch.manual_seed(2)
        resumed = build(*case, seed=7, prepare=False)  # other source weights: all must come from the file
        saved_before = copy.deepcopy(saved)
        resumed.load_state_dict(saved)
        assert same(resumed.state_dict(), middle)
        assert same(run(resumed, stream[2:]), logits[2:])
        assert same(resumed.state_dict(), end)
        assert same(saved, saved_before)  # the caller's state is not aliased
        resumed.reset()
        assert same(resumed.state_dict(), initial)

    with subtests.test("a copy is independent"):
        assert same(twin.state_dict(), middle)  # though the method has gone on
        assert same(run(twin, stream[2:]), logits[2:])
        assert same(twin.state_dict(), end)
        twin.reset()
        assert same(twin.state_dict(), initial)
        assert same(method.state_dict(), end)

    with subtests.test("the global seed does not matter"):
        torch.manual_seed(3)
        other = build(*case)
        torch.manual_seed(4)
        assert same(run(other, stream[:2]), logits[:2])
        assert same(other.state_dict(), middle)

    with subtests.test("reset is exact"):
        method.reset()
        assert same(method.state_dict(), initial)
        assert method.stats == {}
        assert same(run(method, stream), logits)
        assert same(method.state_dict(), end)

    with subtests.test("the model used in place is as it was, and has no trace"):
        assert method.model is net
        assert all(parameter.grad is None for parameter in method.parameters())
        method.reset()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
        plain = copy.deepcopy(net)
        adapters.merge(plain)  # those that a method brings add nothing at the source
        assert same(plain.state_dict(), make_net(kind).state_dict())
        with torch.no_grad():
            assert torch.equal(net(stream[0]), make_net(kind)(stream[0]))  # BatchNorm is at its source statistics

    with subtests.test("the first batch may have one image"):
        for images in (stream[2], stream[0], stream[2]):
            values = method(images)
            assert values.shape == (len(images), 5)
            assert torch.isfinite(values).all()
        after = tensors_of(method.state_dict())
        assert all(torch.isfinite(value).all() for value in after.values() if value.is_floating_point())


@every_setting
def test_state_of_another_method_is_refused(case):
    method = build(*case)
    other = adapt(make_net(case[2]), "tent" if not method.adaptable else "source")
    before = tensors_of(state_of(method))
    with pytest.raises(ConfigError, match="does not fit"):
        method.load_state_dict(other.state_dict(), strict=False)
    assert same(tensors_of(method.state_dict()), before)


def rates_of(name):
    return [p for p in options_of(name) if p == "lr" or p.endswith("_lr")]


@pytest.mark.parametrize("case", [c for c in FIRST if rates_of(c[0])], ids=lambda c: case_id(*c))
def test_zero_learning_rate_changes_nothing(case):
    name, options, kind = case
    method = build(name, options, kind, **dict.fromkeys(rates_of(name), 0.0))
    before = tensors_of(state_of(method))
    run(method, make_stream(3))
    after = tensors_of(method.state_dict())
    free = (".scales", ".running_mean", ".running_var")  # of modules of its own, which may move without a rate
    held = {name for name in before if name.startswith("model.") and not name.endswith(".scales")}
    assert before.keys() == after.keys()
    assert all(same(after[name], value) for name, value in before.items() if name in held or not name.endswith(free))


@pytest.mark.parametrize("case", [c for c in FIRST if c[0] in PASSES], ids=lambda c: case_id(*c))
def test_passes_are_counted(case):
    name, options, _ = case
    method = build(*case)
    calls = []
    method.model.register_forward_hook(lambda *_: calls.append(1))
    steps, source_filter = options.get("steps", 1), options.get("source_filter", False)
    forwards, backwards = PASSES[name]
    for images in make_stream(2):
        calls.clear()
        method(images)
        assert method.stats["forwards"] == len(calls) == (forwards + source_filter) * steps  # the source looks first
        taken = method.stats["backwards"]
        assert taken == backwards * steps or (source_filter and taken < backwards * steps)
