"""What the base does for every method: gradient modes, train mode, and the user's model, which is left alone."""

import copy

import pytest
import torch

from contract import build, every_mechanism, run, state_of
from lightning_tta import adapt
from nets import make_images, make_net, make_stream, same

pytestmark = pytest.mark.usefixtures("one_thread")


@every_mechanism
def test_modes(case, subtests):
    name, options, kind = case
    method, stream = build(*case), make_stream(3)
    initial, expected, end = state_of(method), run(method, stream), state_of(method)
    predicted = method.predict(stream[0])

    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with subtests.test("gradient mode", mode=mode.__name__):
            with mode():
                method.reset()
            assert same(method.state_dict(), initial)
            with mode():
                logits = run(method, make_stream(3))  # under inference_mode the images are inference tensors
            assert same(logits, expected)
            assert same(method.state_dict(), end)

    with subtests.test("images made in inference mode"):
        method.reset()
        with torch.inference_mode():
            images = make_stream(3)
        assert same(run(method, images), expected)

    with subtests.test("images that need a gradient"):
        method.reset()
        images = make_images(4).requires_grad_()
        logits = method(images)
        assert not logits.requires_grad
        assert images.grad is None
        assert same(logits, expected[0])

    for in_place in (False, True):
        with subtests.test("built in inference mode", in_place=in_place):
            net = make_net(kind)
            with torch.inference_mode():
                built = build(*case, net=net, in_place=in_place)
            assert same(run(built, stream), expected)

    with subtests.test("restored in inference mode"):
        method.reset()
        with torch.inference_mode():
            method.load_state_dict(copy.deepcopy(end))
        assert same(method.state_dict(), end)
        assert torch.equal(method.predict(stream[0]), predicted)

    with subtests.test("the net stays in eval mode"):
        method.reset()
        method.train()
        assert method.training
        assert not any(module.training for module in method.model.modules())
        assert same(run(method, stream), expected)

    with subtests.test("a net in train mode, and the copy of it"):
        net = make_net(kind).train()
        copied = build(*case, net=net, in_place=False)
        assert same(run(copied, stream), expected)
        assert all(module.training for module in net.modules())

    with subtests.test("the user's model is left alone"):
        net = make_net(kind).train()
        next(net.parameters()).requires_grad_(False)
        weights, flags = copy.deepcopy(net.state_dict()), [p.requires_grad for p in net.parameters()]
        copied = adapt(net, name, **options)
        if copied.needs_source:
            copied.prepare([{"image": make_images(10), "label": torch.arange(10) % 5}])
        run(copied, stream)
        assert same(net.state_dict(), weights)
        assert [p.requires_grad for p in net.parameters()] == flags
        assert all(p.grad is None for p in net.parameters())
        assert all(module.training for module in net.modules())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
        assert copied.model is not net
