"""The teachers' views: each operation by hand with the others switched off, ranges, seeds."""

import colorsys

import pytest
import torch

from lightning_tta.views import jitter as _jitter
from nets import make_images, max_difference

pytestmark = pytest.mark.usefixtures("one_thread")
NEUTRAL = {
    "BRIGHTNESS": (1.0, 1.0),
    "CONTRAST": (1.0, 1.0),
    "SATURATION": (1.0, 1.0),
    "HUE": (0.0, 0.0),
    "GAMMA": (1.0, 1.0),
    "DEGREES": (0.0, 0.0),
    "SHIFT": (0.0, 0.0),
    "SCALE": (1.0, 1.0),
    "BLUR": (0.001, 0.001),
    "FLIP": 0.0,
    "NOISE": 0.0,
}


def jitter(images, seed):
    return _jitter.jitter(images, torch.tensor([seed, 3]))


@pytest.fixture
def only(monkeypatch):
    """Switches all off but what is given."""

    def switch(**changed):
        for name, value in {**NEUTRAL, **changed}.items():
            monkeypatch.setattr(_jitter, name, value)

    return switch


def grey(x):
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def turned(x, hue):
    out = x.clone()
    for i, j, k in torch.cartesian_prod(*(torch.arange(n) for n in (len(x), *x.shape[2:]))).tolist():
        h, s, v = colorsys.rgb_to_hsv(*x[i, :, j, k].tolist())
        out[i, :, j, k] = torch.tensor(colorsys.hsv_to_rgb((h + hue) % 1, s, v))
    return out


def blurred(x, sigma):
    offsets = torch.arange(-2.0, 3.0, dtype=x.dtype)
    weights = (-(offsets**2) / (2 * sigma**2)).exp()
    weights = weights / weights.sum()
    rows = sum(w * x.roll(int(o), 2) for w, o in zip(weights, offsets, strict=True))
    return sum(w * rows.roll(int(o), 3) for w, o in zip(weights, offsets, strict=True))


def shifted(x, right, down):
    rows = (torch.arange(x.shape[2]) - down).clamp(0, x.shape[2] - 1)
    columns = (torch.arange(x.shape[3]) - right).clamp(0, x.shape[3] - 1)
    return x[:, :, rows][:, :, :, columns]  # the border repeated


def test_nothing_left_is_the_image(only):
    only()
    images = make_images(3, dtype=torch.float64)
    assert max_difference(jitter(images, 3), images) < 1e-6


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"BRIGHTNESS": (1.3, 1.3)}, lambda x: (1.3 * x).clamp(0, 1)),
        (
            {"CONTRAST": (0.7, 0.7)},
            lambda x: 0.7 * x + 0.3 * grey(x).mean((1, 2, 3), keepdim=True),
        ),
        ({"SATURATION": (1.5, 1.5)}, lambda x: (1.5 * x - 0.5 * grey(x)).clamp(0, 1)),
        ({"HUE": (0.06, 0.06)}, lambda x: turned(x, 0.06)),
        ({"GAMMA": (1.3, 1.3)}, lambda x: x**1.3),
        ({"SHIFT": (1 / 8, 1 / 8)}, lambda x: shifted(x, 2, 2)),
        ({"SHIFT": (-1 / 8, -1 / 8)}, lambda x: shifted(x, -2, -2)),
        ({"DEGREES": (90.0, 90.0)}, lambda x: x.rot90(-1, (2, 3))),
        ({"FLIP": 1.1}, lambda x: x.flip(3)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_one_operation(only, changed, expected):
    only(**changed)
    images = make_images(2, dtype=torch.float64)
    view = jitter(images, 5)
    assert max_difference(view, expected(images)) < 1e-5
    assert max_difference(view, images) > 1e-2


def test_blur_and_scale(only):
    images = make_images(2, dtype=torch.float64)
    only(BLUR=(0.5, 0.5))
    around = torch.nn.functional.pad(images, (4, 4, 4, 4), mode="replicate")  # the blur sees the border repeated
    assert max_difference(jitter(images, 5), blurred(around, 0.5)[..., 4:-4, 4:-4]) < 1e-6
    only(SCALE=(2.0, 2.0))
    point = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    point[..., 4:12, 4:12] = 1  # twice as large: the whole image
    assert jitter(point, 5).min() > 0.2
    assert jitter(point, 5).mean() > 0.9


def test_noise(only):
    only(NOISE=0.005)
    images = torch.full((20, 3, 16, 16), 0.5, dtype=torch.float64)
    noise = jitter(images, 5) - images
    assert abs(noise.std().item() - 0.005) < 2e-4
    assert abs(noise.mean().item()) < 3e-4
    assert noise[0].sub(noise[1]).abs().max() > 1e-3  # each image its own


def test_without_blur_and_noise_and_mirrored(only):
    only(SHIFT=(1 / 8, 1 / 8), BLUR=_jitter.BLUR, NOISE=0.1)
    images = make_images(2, dtype=torch.float64)
    view = _jitter.jitter(images, torch.tensor([5, 3]), padding="reflect", blur=False, noise=False)
    rows = (torch.arange(16) - 2).abs()  # the row at the border is not repeated
    assert max_difference(view, images[:, :, rows][:, :, :, rows]) < 1e-5


def test_draws_fill_their_ranges(only):
    only(BRIGHTNESS=_jitter.BRIGHTNESS)
    image = torch.full((1, 3, 8, 8), 0.5)
    factors = torch.stack([jitter(image, seed).mean() / 0.5 for seed in range(200)])
    assert 0.6 <= factors.min() < 0.63
    assert 1.37 < factors.max() <= 1.4
    assert abs(factors.mean().item() - 1) < 0.06


def test_half_of_the_views_are_flipped(only):
    only(FLIP=_jitter.FLIP)
    image = make_images(1)
    flipped = sum(bool((jitter(image, seed) - image).abs().max() > 1e-3) for seed in range(200))
    assert 70 < flipped < 130


def test_order_of_colours_changes(only):
    """Gamma before brightness is another view than after it."""
    only(BRIGHTNESS=(0.6, 0.6), GAMMA=(1.3, 1.3))
    image = torch.full((1, 3, 8, 8), 0.5)
    values = {round(jitter(image, seed).mean().item(), 4) for seed in range(30)}
    assert values == {round(0.6 * 0.5**1.3, 4), round((0.6 * 0.5) ** 1.3, 4)}


def test_the_batch_shares_a_draw_that_the_seed_decides():
    image = make_images(1)
    views = jitter(image.repeat(3, 1, 1, 1), 7)
    assert (views[0] - views[1]).abs().max() < 0.05  # but for the noise
    assert torch.equal(jitter(image, 7), jitter(image, 7))
    assert (jitter(image, 7) - jitter(image, 8)).abs().max() > 0.05


def test_autocast_changes_nothing():
    images = make_images(4)
    for seed in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            view = jitter(images, seed)
        assert torch.equal(view, jitter(images, seed))


def test_shift_of_an_oblong_image(only):
    only(SHIFT=(1 / 8, 1 / 8))
    images = make_images(2, dtype=torch.float64, size=32)[..., :16, :]
    assert max_difference(jitter(images, 5), shifted(images, 4, 2)) < 1e-5


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 16, 16), (4, 16, 16), (3, 15, 9), (3, 32, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_shapes_and_types(shape, dtype):
    images = torch.rand(2, *shape).mul(1.4).sub(0.2).to(dtype)  # resampled images overshoot
    for seed in range(5):
        view = jitter(images, seed)
        assert (view.shape, view.dtype) == (images.shape, dtype)
        assert view.min() >= 0
        assert view.max() <= 1
        assert torch.isfinite(view).all()
