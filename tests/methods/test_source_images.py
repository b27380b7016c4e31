"""What methods see of the source before the stream: the same checks, whatever method it is."""

from contextlib import suppress

import pytest
import torch

from contract import build
from lightning_tta import ConfigError, DataError, InputError
from nets import kind_for, make_images, same

NEEDING = {
    "actmad": {},
    "santa": {"projector": 6},
    "adanpc": {},
    "cafa": {},
    "eata": {},
    "neo": {"center": "source"},
    "label_shift_adapter": {"epochs": 1},
    "output_shift": {},
    "ttt": {"head_from": "prepare", "head_epochs": 1},
    "pea": {},
    "petta": {},
    "rmt": {"projector": 6},
    "foa": {"population": 4},
    "tent": {"reservoir": 3},
}
every_method = pytest.mark.parametrize("name", NEEDING)


def make(name):
    return build(name, NEEDING[name], kind_for(name, "bn"), prepare=False)


def labelled(images):
    """A batch in which an image has the same label wherever it stands."""
    return {"image": images, "label": (images.flatten(1).nan_to_num(0).sum(1) * 1e4).long().abs() % 5}


def tensors(method):
    return {name: t.clone() for name, t in {**dict(method.named_buffers()), **method.rest}.items()}


@every_method
def test_images_that_are_not_finite_are_left_out(name):
    one, other = make(name), make(name)
    clean = [make_images(8, seed=seed) for seed in (1, 2)]
    bad = torch.cat([clean[0][:3], torch.full_like(clean[0][:1], torch.nan), clean[0][3:]])
    one.prepare([labelled(bad), labelled(torch.full_like(bad, torch.inf)), labelled(clean[1])])
    other.prepare(labelled(images) for images in clean)
    for key, value in tensors(other).items():
        assert torch.equal(tensors(one)[key].nan_to_num(9), value.nan_to_num(9)), key


@every_method
def test_batches_that_are_none(name):
    for batch, message in (({"pixels": 1}, "keys"), (make_images(2), "Tensor")):
        with pytest.raises(DataError, match=f"must be dicts with 'image'.*{message}"):
            make(name).prepare([batch])


@every_method
def test_nothing_to_go_through(name):
    """What is no collection of batches is refused as such, by any method."""
    for batches in (None, labelled(make_images(2))):
        with pytest.raises(DataError, match="must be several"):
            make(name).prepare(batches)


@every_method
def test_images_that_the_net_refuses(name):
    """The error says so, and the method goes on with others."""
    method, other = make(name), make(name)
    good = [labelled(make_images(8, seed=seed)) for seed in (1, 2)]
    with pytest.raises(InputError, match="cannot take"):
        method.prepare([*good, labelled(make_images(4)[:, :1])])
    method.prepare(good), other.prepare(good)
    assert torch.equal(method(make_images(4)), other(make_images(4)))


@every_method
def test_in_inference_mode(name):
    """Images made there too; the net begins with a BatchNorm layer, which saves its input for a backward pass."""
    method, other = (build(name, NEEDING[name], kind_for(name, "user"), prepare=False) for _ in range(2))
    good = [labelled(make_images(8, seed=seed)) for seed in (1, 2)]
    with torch.inference_mode():
        method.prepare([{key: tensor.clone() for key, tensor in batch.items()} for batch in good])
    other.prepare(good)
    assert torch.equal(method(make_images(4)), other(make_images(4)))


@every_method
def test_once_more_is_the_same_or_refused(name):
    method, other = make(name), make(name)
    good = [labelled(make_images(8, seed=seed)) for seed in (1, 2)]
    method.prepare(good), other.prepare(good)
    method(make_images(4)), method.reset()
    with suppress(ConfigError):  # of a method that trains on them
        method.prepare(good)
    assert same(method.state_dict(), other.state_dict())


@pytest.mark.parametrize(("name", "options"), [("petal", {"swag_epochs": 2}), ("rmt", {"warmup": 8})])
def test_what_trains_on_them_does_so_once(name, options):
    method = build(name, options, "gn", prepare=False)
    good = [labelled(make_images(8, seed=seed)) for seed in (1, 2)]
    method.prepare(good)
    before = method.state_dict()
    with pytest.raises(ConfigError, match="train on from that"):
        method.prepare(good)
    assert same(method.state_dict(), before)
