"""``window=N``: adapt on the last N images, predict each at once."""

import pytest
import torch

from lightning_tta import ConfigError, InputError, adapt
from nets import make_images, make_net
from replay import use_tape

N = 6
OPTIONS = {
    "tent": {"lr": 1e-2, "steps": 2},
    "sar": {"lr": 0.1, "optimizer": "sgd", "entropy_margin": 0.9, "reset_threshold": 10.0},
    "zerosiam": {"lr": 0.5, "predictor_lr": 0.5},
    "cotta": {"lr": 1e-2, "ema_decay": 0.7, "anchor_threshold": 1.0, "views": 2, "restore": 0.0},
    "norm": {"momentum": 0.3},
    "t3a": {"filter_k": 2},
    "lame": {},
}


def make(name, *, window=N, kind="bn", **more):
    options = {**OPTIONS[name], **more}
    return adapt(make_net(kind, seed=0), name, **({} if window is None else {"window": window}), **options)


def states(method):
    tensors = {**method.adaptable, **method.rest}
    return {name: t.clone() for name, t in tensors.items() if not name.startswith("window.")}


@pytest.mark.parametrize("sizes", [[1] * 12, [4, 4, 4], [1, 5, 6], [7, 5], [12]], ids=str)
@pytest.mark.parametrize("name", [*OPTIONS])
def test_after_each_window_the_method_is_where_batches_of_that_size_bring_it(name, sizes):
    images = make_images(12, seed=3)
    method, plain = make(name), make(name, window=None)
    for part in torch.split(images, sizes):
        method(part)
    for part in torch.split(images, N):
        plain(part)
    for key, value in states(plain).items():
        assert torch.equal(states(method)[key].nan_to_num(9), value.nan_to_num(9)), key


def test_an_image_is_predicted_among_the_last_ones_before_the_step():
    images = make_images(2 * N, seed=3)
    method = make("tent", steps=1)
    logits = torch.cat([method(image[None]) for image in images])
    net = make_net("bn", seed=0).train()
    with torch.no_grad():  # of the first window: no step yet, so the plain net on the images so far
        expected = [net(images[: 1 + number])[-1] for number in range(1, N)]
    assert torch.allclose(logits[1:N], torch.stack(expected), atol=1e-5)
    after = make("tent", steps=1, window=None)
    after(images[:N])  # the second window: the adapted net, with the rest of the first one beside the new images
    for number in range(N - 1):
        context = torch.cat([images[N : N + 1 + number], images[1 + number : N]])
        assert torch.allclose(logits[N + number], after.predict(context, statistics="batch")[number], atol=1e-5)
    assert torch.allclose(logits[-1], after(images[N:])[-1], atol=1e-5)


def test_statistics_of_the_stream_predict_an_image_alone():
    method = make("tent", statistics="ema")
    images = make_images(N + 1, seed=3)
    method(images[:N])
    assert torch.equal(method(images[N:]), method.predict(images[N:]))
    assert method.stats["forwards"] == 1


def test_passes_are_counted():
    method = make("tent", steps=1)
    images = make_images(N, seed=3)
    counts = []
    for image in images:
        method(image[None])
        counts.append((method.stats["forwards"], method.stats["backwards"], method.stats["images_in_passes"]))
    assert counts == [(1, 0, number) for number in range(1, N)] + [(1, 1, N)]


def test_reset_save_and_load_in_the_middle_of_a_window():
    images = make_images(2 * N, seed=3)
    method, other = make("tent"), make("tent")
    first = [method(image[None]) for image in images[:8]]
    other.load_state_dict(method.state_dict())
    for image in images[8:]:
        assert torch.equal(method(image[None]), other(image[None]))
    method.reset()
    again = [method(image[None]) for image in images[:8]]
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


def test_a_method_that_resets_itself_keeps_the_window():
    method = make("sar", window=2)  # whose threshold makes every step a collapse
    for image in make_images(5, seed=3):
        logits = method(image[None])
        assert torch.isfinite(logits).all()
    source = make("sar", window=None)
    assert all(torch.equal(states(method)[key], value) for key, value in states(source).items() if "model" in key)


def test_images_that_are_not_finite_do_not_enter():
    method, clean = make("tent"), make("tent")
    images = make_images(N, seed=3)
    broken = torch.cat([images[:2], torch.full_like(images[:1], torch.nan), images[2:]])
    logits = method(broken)
    assert torch.equal(logits[2], torch.zeros_like(logits[2]))
    assert torch.equal(logits[[0, 1, 3, 4, 5, 6]], clean(images))


def test_captured(monkeypatch):
    use_tape(monkeypatch)
    method = make("tent")
    images = make_images(6 * N, seed=3)
    logits = [method(part) for part in torch.split(images, 2)]
    plain = make("tent", capture=False)
    for part, seen in zip(torch.split(images, 2), logits, strict=True):
        assert torch.allclose(plain(part), seen, atol=1e-4)
    assert "recorded" in method.capture_report().values()


def test_what_has_no_window():
    with pytest.raises(ConfigError, match="each image on its own"):
        adapt(make_net("bn", seed=0), "memo", window=4)
    with pytest.raises(ConfigError, match="window"):
        adapt(make_net("bn", seed=0), "tent", window=1)
    method = make("tent")
    method(make_images(2, seed=0))
    with pytest.raises(InputError, match="among others of"):
        method(torch.rand(1, 3, 40, 40))
    assert torch.isfinite(method(make_images(1, seed=1))).all()


@pytest.mark.parametrize("name", ["tent", "norm"])
def test_a_state_from_before_the_first_image(name):
    method, images = make(name), make_images(2 * N, seed=3)
    start = method.state_dict()
    first = [method(part) for part in torch.split(images, 4)]
    method.load_state_dict(start)
    assert all(torch.equal(method(part), logits) for part, logits in zip(torch.split(images, 4), first, strict=True))
