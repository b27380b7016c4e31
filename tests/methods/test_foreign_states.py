"""States and changes that are not the method's own: refused before anything is written, or told of."""

import copy
import gc
import warnings
from itertools import product

import pytest
import torch
from torch import nn

from contract import FIRST, REFUSED, VARIANTS, build, case_id, spread, state_of, tensors_of
from lightning_tta import ConfigError, adapt
from lightning_tta.methods import create_method
from lightning_tta.methods.base.state import put_back, take
from nets import make_images, make_net, make_stream, same

pytestmark = pytest.mark.usefixtures("one_thread")
ONCE = [case for case in FIRST if case[1] == VARIANTS.get(case[0], [{}])[0]]
ONCE += [(name, options, "gn") for name, options, _ in ONCE if case_id(name, options, "gn") not in REFUSED]
each = pytest.mark.parametrize("case", ONCE, ids=lambda case: case_id(*case))
MECHANISMS = [c for c in ONCE if c[0] in ("source", "norm", "tent", "cotta", "memo", "t3a", "lame", "meta_ttt")]
some = pytest.mark.parametrize("case", MECHANISMS, ids=lambda case: case_id(*case))


# States


def refused(method, state, match="does not fit"):
    """Whether it is refused, strict or not, alone or inside another module, and nothing is written."""
    before, revision = tensors_of(state_of(method)), method.stats
    outer = nn.ModuleDict({"method": method})
    for strict in (True, False):
        with pytest.raises(ConfigError, match=match):
            method.load_state_dict(state, strict=strict)
        with pytest.raises(ConfigError, match=match):
            outer.load_state_dict({f"method.{name}": value for name, value in state.items()}, strict=strict)
    return same(tensors_of(state_of(method)), before) and method.stats == revision


@each
def test_a_state_of_another_width(case):
    """Also of a net that differs in its head alone, of which no method declares every tensor."""
    method, wider = build(*case), build(*case, net=make_net(case[2], num_classes=7))
    assert refused(method, wider.state_dict())
    method(make_images(3))


@each
def test_a_part_of_a_state(case):
    method, state = build(*case), build(*case, seed=4).state_dict()
    tensor = next(name for name in state if name.startswith("model."))
    assert refused(method, {name: value for name, value in state.items() if name != tensor})
    assert refused(method, {name: value for name, value in state.items() if name != "_extra_state"}, "plain net")
    assert refused(method, {**state, "model.more": torch.zeros(1)})
    assert refused(method, {**state, tensor: None})
    assert refused(method, make_net(case[2]).state_dict(), "plain net")


def test_states_of_methods_that_hold_the_same_tensors():
    for one, other in (("tent", "come"), ("source", "lame"), ("lame", "t3a"), ("view_averaging", "source")):
        method = adapt(make_net("bn"), one)
        assert refused(method, adapt(make_net("bn"), other).state_dict(), f"of method '{other}', and this is '{one}'")
    state = adapt(make_net("bn"), "tent").state_dict()
    del state["_extra_state"]["method"]  # as it was saved before methods put their names there
    adapt(make_net("bn"), "tent").load_state_dict(state)


@pytest.mark.parametrize("name", ["rotta", "sotta", "note"])
def test_states_from_before_images_of_another_size(name):
    """As the guard brings back, and as are loaded."""
    method, other = (build(name, VARIANTS[name][0], "bn") for _ in range(2))
    method(make_images(6)), other(make_images(6))
    moment, state = take(method), method.state_dict()
    expected = other(make_images(6, seed=1))
    for bring_back in (lambda: put_back(method, moment), lambda: method.load_state_dict(state)):
        method(make_images(6, size=24))
        bring_back()
        assert same(method.state_dict(), state)
        assert torch.equal(method(make_images(6, seed=1)), expected)


@pytest.mark.parametrize(
    ("options", "others"), [({"window": 8}, {"window": 4}), ({"prior": "em"}, {"prior": {"kind": "em", "window": 6}})]
)
def test_states_with_room_for_another_number(options, others):
    method, other = adapt(make_net("bn"), "tent", **options), adapt(make_net("bn"), "tent", **others)
    method(make_images(6))
    with pytest.raises(ConfigError, match="only this method"):
        other.load_state_dict(method.state_dict())


def test_assigned_states():
    method = build("tent", {"lr": 1e-2}, "bn")
    state = copy.deepcopy(method.state_dict())
    weight = method.model.norm1.weight
    with pytest.raises(ConfigError, match="assign=True"):
        method.load_state_dict(state, assign=True)
    with pytest.raises(ConfigError, match="assign=True"):
        nn.Sequential(method).load_state_dict({f"0.{n}": v for n, v in state.items()}, assign=True)
    assert method.model.norm1.weight is weight
    method(make_images(4))


def test_a_state_through_a_module_around_the_method():
    method, twin = build("tent", {"lr": 1e-2}, "bn"), build("tent", {"lr": 1e-2}, "bn", seed=3)
    stream = make_stream(4)
    for images in stream[:2]:
        method(images)
        twin(images)
    nn.Sequential(twin).load_state_dict(nn.Sequential(method).state_dict())
    assert same([twin(images) for images in stream[2:]], [method(images) for images in stream[2:]])
    nn.Sequential(method).load_state_dict({}, strict=False)  # nothing for the method: nothing to refuse


# The net inside


HOW = ("state dict", "in place", "module", "parameter", "data", "assigned")


@pytest.mark.parametrize(
    ("case", "how"),
    [
        pytest.param(*each, id=f"{case_id(*each[0])}-{each[1]}")
        for each in spread(product(ONCE, HOW), 4, lambda p: p[0][0])
    ],
)
def test_other_weights_in_the_net_inside(case, how):
    method, other = build(*case), build(*case, seed=5, prepare=False).model  # with the same modules put in
    images = make_images(3)
    method(images)
    saved = state_of(method)
    net = method.model
    if how == "state dict":
        net.load_state_dict(other.state_dict())
    elif how == "in place":
        with torch.no_grad():
            next(net.parameters()).copy_(next(other.parameters()))
    elif how == "module":
        net.head = other.head
    elif how == "parameter":
        net.head.weight = nn.Parameter(other.head.weight.detach().clone())
    elif how == "data":
        net.head.weight.data = other.head.weight.detach().clone()
    else:
        net.load_state_dict(other.state_dict(), assign=True)
    is_replaced = how in ("module", "parameter", "assigned")
    for call in (method.reset, method.state_dict, lambda: method(images), lambda: method.predict(images)):
        with pytest.raises(ConfigError, match="was replaced" if is_replaced else "changed by somebody else"):
            call()
    if is_replaced:
        with pytest.raises(ConfigError, match="was replaced"):
            method.load_state_dict(saved)
    else:
        method.load_state_dict(saved)  # brings all of it back
        assert same(method.state_dict(), saved)
        method.reset()
        assert same(method.state_dict(), build(*case).state_dict())


def test_the_replaced_module_is_named():
    method = build("source", {}, "bn")
    method.model.norm2.running_mean = torch.zeros(12)
    with pytest.raises(ConfigError, match=r"norm2\.running_mean"):
        method(make_images(2))
    method = adapt(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), "source")
    method.model.append(nn.Softmax(1))
    with pytest.raises(ConfigError, match="replaced"):
        method(make_images(2))
    method = build("tent", {}, "bn")
    method.model.double()
    with pytest.raises(ConfigError, match=r"method\.to"):
        method(make_images(2))


def test_weights_before_the_first_call():
    method = adapt(make_net("gn"), "cotta")
    method.model.load_state_dict(make_net("gn", seed=5).state_dict())
    with pytest.raises(ConfigError, match=r"before adapt\(\)"):
        method(make_images(2))


def test_what_is_no_change(tmp_path):
    """The plain net may run, be read, moved with the method, and be asked by the base's own functions."""
    method, images = build("tent", {"lr": 1e-2}, "bn"), make_images(4)
    method(images)
    with torch.no_grad():
        method.model(images)
    method.model.state_dict()
    copy.deepcopy(method.model)
    moment = take(method)
    method(images)
    put_back(method, moment)
    method(images)
    method.double()
    method(images)
    method.to("cpu").float()
    with method.at_source():
        method.model(images)
    method(images)


def test_a_change_that_is_meant():
    method, images = build("tent", {"lr": 1e-2}, "bn"), make_images(4)
    start = method.state_dict()
    with method.hold(), torch.no_grad():
        method.adaptable["model.norm1.weight"].mul_(0.5)
    method(images)
    with torch.no_grad():
        method.adaptable["model.norm1.weight"].mul_(0.5)
    with method.hold(changed=True):
        method(images)
    method.reset()
    assert same(method.state_dict(), start)


@some
def test_train_mode_inside(case):
    method, twin = build(*case), build(*case)
    for images in make_stream(2):
        method.model.train()
        assert same(method(images), twin(images))
        for module in method.model.modules():
            module.training = True  # as model.head.train() sets it, in any module
        assert same(method.predict(images), twin.predict(images))
    assert same(method.state_dict(), twin.state_dict())


# Two methods on one net


def test_two_methods_on_one_net():
    net, images = make_net("bn"), make_images(4)
    first = adapt(net, "tent", in_place=True)
    with pytest.warns(UserWarning, match=r"another method, 'tent'.*Leave out in_place=True"):
        second = adapt(net, "come", in_place=True)
    assert second._custody.lock is first._custody.lock
    second(images)  # works; what it has changed, the other refuses
    for call in (first.reset, lambda: first(images)):
        with pytest.raises(ConfigError, match="adapted by another method too, 'come'"):
            call()
    second.reset()


def test_a_part_of_a_net_counts():
    net = make_net("bn")
    first = adapt(nn.Sequential(nn.Identity(), net), "source", in_place=True)
    with pytest.warns(UserWarning, match="another method, 'source'"):
        adapt(nn.Sequential(net, nn.Identity()), "lame", in_place=True)
    first.reset()


@each
def test_a_deleted_method_and_a_copy_do_not_block(case):
    net = make_net(case[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(*case, net=net)(make_images(8))
        method = build(*case, net=copy.deepcopy(net))  # not collected, but counted: no cycle keeps the first alive
        adapt(method.model, "source")
        twin = copy.deepcopy(method)
        gc.disable()
        try:
            build(*case, net=net)
            build(*case, net=net)
        finally:
            gc.enable()
        twin(make_images(8))
        twin.reset()
        method(make_images(8))
    with pytest.warns(UserWarning, match="another method"):
        create_method("source", twin.model)
