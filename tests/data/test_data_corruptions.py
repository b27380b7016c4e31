import hashlib
import importlib.metadata

import numpy as np
import pytest
import torch

from lightning_tta.data.corruptions import builtin
from lightning_tta.data.corruptions.corrupt import SETS, corrupt, corruption_names, function_set_id, image_seed
from lightning_tta.errors import ConfigError

BUILTIN = corruption_names() + corruption_names(held_out=True)


def photo(number: int, size: int = 32) -> torch.Tensor:
    """A smooth colourful image with an edge: uint8 (3, size, size)."""
    generator = torch.Generator().manual_seed(number)
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")[0].clamp(0, 1)
    image[:, 5 * size // 32 : 19 * size // 32, 11 * size // 32 :] *= 0.3
    return (image * 255).to(torch.uint8)


def needs_imagenet_c():
    pytest.importorskip("imagecorruptions", reason='the optional package of "imagenet_c" is not installed')


def test_names():
    assert len(corruption_names()) >= 10
    assert len(corruption_names(held_out=True)) >= 4
    assert not set(corruption_names()) & set(corruption_names(held_out=True))
    assert len(corruption_names("imagenet_c")) == 15
    assert len(corruption_names("imagenet_c", held_out=True)) == 4
    assert function_set_id("builtin") == f"builtin-{builtin.VERSION}"
    assert function_set_id("published") == "published"
    assert corruption_names("published") == corruption_names("imagenet_c")
    assert {name: functions.apply is not None for name, functions in SETS.items()} == {
        "builtin": True,
        "imagenet_c": True,
        "published": False,
    }


@pytest.mark.parametrize("name", BUILTIN)
def test_harder_with_each_severity_and_repeatable(name):
    images = [photo(n) for n in range(12)]
    distances = []
    for severity in range(1, 6):
        total = 0.0
        for n, image in enumerate(images):
            result = corrupt(image, name, severity, index=n)
            assert result.dtype == torch.uint8
            assert result.shape == image.shape
            total += (result.float() - image.float()).pow(2).mean().sqrt().item()
        distances.append(total / len(images))
    assert distances[0] > 0.5  # even severity 1 changes pixels
    assert distances == sorted(distances)
    assert distances[4] > 1.2 * distances[0]
    assert torch.equal(images[0], photo(0))  # the input is left alone
    assert torch.equal(corrupt(images[0], name, 3, seed=1), corrupt(images[0], name, 3, seed=1))


RANDOM = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "speckle_noise",
    "haze",
    "elastic",
    "motion_blur",
    "occlusion",
)


@pytest.mark.parametrize("name", RANDOM)
def test_seed_and_index_decide_the_random_numbers(name):
    image = photo(0)
    one = corrupt(image, name, 3, seed=1, index=4)
    assert not torch.equal(one, corrupt(image, name, 3, seed=2, index=4))
    assert not torch.equal(one, corrupt(image, name, 3, seed=1, index=5))


@pytest.mark.parametrize("name", BUILTIN)
def test_global_random_state_neither_matters_nor_moves(name):
    torch.manual_seed(1)
    first = corrupt(photo(0), name, 4)
    torch.manual_seed(2)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert torch.equal(corrupt(photo(0), name, 4), first)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_image_seed_is_a_stable_hash_of_all_its_parts():
    parts = (7, "builtin", "haze", 3, 12)
    text = "builtin|haze|3|7|12"
    assert image_seed(*parts) == int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) // 2
    others = [(8, *parts[1:]), (7, "imagenet_c", *parts[2:]), (7, "builtin", "jpeg", 3, 12), (*parts[:3], 4, 12)]
    assert len({image_seed(*p) for p in [parts, *others, (*parts[:4], 13)]}) == 6


def test_noise_has_the_strength_it_says():
    grey = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    noisy = corrupt(grey, "gaussian_noise", 2).float() / 255 - 128 / 255
    assert noisy.std().item() == pytest.approx(0.12, rel=0.03)
    photons = corrupt(grey, "shot_noise", 1).float() / 255 - 128 / 255
    assert photons.std().item() == pytest.approx((128 / 255 / 60) ** 0.5, rel=0.03)
    hit = corrupt(grey, "impulse_noise", 5) != 128
    assert hit.float().mean().item() == pytest.approx(0.27, abs=0.02)


def test_pointwise_corruptions_against_the_formula():
    image = photo(1)
    assert torch.equal(corrupt(image, "brightness", 2), (image.float() + 0.2 * 255).round().clamp(0, 255).byte())
    gamma = ((image.double() / 255) ** 2.75 * 255).round()
    assert (corrupt(image, "gamma", 3).double() - gamma).abs().max() <= 1
    grey = image.float().mul(torch.tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(0).mean()
    contrast = image.float() * 0.2 + grey * 0.8
    assert (corrupt(image, "contrast", 3).float() - contrast).abs().max() <= 1


def test_blurs_keep_the_mean_and_average_a_disk():
    point = torch.zeros(1, 33, 33)
    point[0, 16, 16] = 1
    blurred = builtin._defocus_blur(point, 2.0)[0]
    assert blurred.sum().item() == pytest.approx(1, abs=1e-5)
    reach = 2.0 * 33 / 32 + 0.5
    y, x = torch.meshgrid(torch.arange(33) - 16, torch.arange(33) - 16, indexing="ij")
    disk = (reach - (x**2 + y**2).sqrt()).clamp(0, 1)
    assert torch.allclose(blurred, disk / disk.sum(), atol=1e-6)
    wide = builtin._gaussian_blur(point, 1.6 * 32 / 33)[0]
    normal = torch.exp(-(x**2 + y**2) / (2 * 1.6**2))
    assert torch.allclose(wide, normal / normal.sum(), atol=2e-4)  # the kernel ends at three standard deviations


def test_strength_follows_the_size_of_the_image():
    small, large = photo(2, 32).float(), photo(2, 96).float()
    for name in ("defocus_blur", "gaussian_blur", "rotate"):
        a = (corrupt(small.byte(), name, 3).float() - small).pow(2).mean().sqrt()
        b = (corrupt(large.byte(), name, 3).float() - large).pow(2).mean().sqrt()
        assert 0.6 < (a / b).item() < 1.6, name


def test_errors_say_what_to_do():
    with pytest.raises(ConfigError, match="Did you mean gaussian_noise"):
        corrupt(photo(0), "gausian_noise", 3)
    with pytest.raises(ConfigError, match=r"'builtin', 'imagenet_c', 'published'; got 'cifar_c'"):
        corrupt(photo(0), "haze", 3, function_set="cifar_c")
    with pytest.raises(ConfigError, match="severity"):
        corrupt(photo(0), "haze", 6)
    with pytest.raises(ConfigError, match="at least 32x32"):
        corrupt(photo(0, 28), "haze", 3)
    with pytest.raises(ConfigError, match=r'computes nothing.*"builtin" or "imagenet_c"'):
        corrupt(photo(0), "fog", 3, function_set="published")
    with pytest.raises(ConfigError, match="uint8"):
        corrupt(photo(0).float(), "haze", 3)


def test_grey_and_oblong_images():
    grey = photo(3)[:1]
    oblong = torch.cat([photo(3), photo(4)], dim=2)
    for name in BUILTIN:
        assert corrupt(grey, name, 2).shape == (1, 32, 32)
        assert corrupt(oblong, name, 2).shape == (3, 32, 64)


def test_imagenet_c_without_its_package(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    for call in (lambda: function_set_id("imagenet_c"), lambda: corrupt(photo(0), "fog", 1, function_set="imagenet_c")):
        with pytest.raises(ConfigError, match=r'pip install "lightning-tta\[corruptions\]"'):
            call()


def test_imagenet_c_names_are_those_of_the_package():
    needs_imagenet_c()
    import imagecorruptions

    assert corruption_names("imagenet_c") == imagecorruptions.get_corruption_names("common")
    assert corruption_names("imagenet_c", held_out=True) == imagecorruptions.get_corruption_names("validation")
    assert function_set_id("imagenet_c").startswith("imagenet_c/imagecorruptions-imaug-")


@pytest.mark.parametrize("name", corruption_names("imagenet_c") + corruption_names("imagenet_c", held_out=True))
def test_imagenet_c_gives_the_pixels_of_the_package_and_leaves_the_global_state(name):
    needs_imagenet_c()
    import imagecorruptions

    image = photo(0)
    seed = image_seed(5, "imagenet_c", name, 4, 1) % 2**32
    own = {"seed": seed} if name in ("impulse_noise", "glass_blur") else {}
    np.random.seed(seed)  # noqa: NPY002
    expected = imagecorruptions.corrupt(image.permute(1, 2, 0).contiguous().numpy(), 4, name, **own)
    np.random.seed(2)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    result = corrupt(image, name, 4, seed=5, index=1, function_set="imagenet_c")
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert torch.equal(result, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    assert not torch.equal(result, image)


def test_imagenet_c_spatter_without_a_drop_leaves_the_image():
    needs_imagenet_c()
    darkest = min(
        corrupt(photo(n), "spatter", 1, index=n, function_set="imagenet_c").float().mean() / photo(n).float().mean()
        for n in range(8)  # one of them has no drop: the package divides by zero and would return black
    )
    assert darkest >= 1


def test_imagenet_c_noise_is_drawn_anew_for_each_image_and_wants_colour():
    needs_imagenet_c()
    for name in ("gaussian_noise", "impulse_noise", "glass_blur", "fog"):
        one, two = (corrupt(photo(0), name, 2, index=n, function_set="imagenet_c") for n in (0, 1))
        assert not torch.equal(one, two), name
    with pytest.raises(ConfigError, match="3 channels"):
        corrupt(photo(0)[:1], "fog", 2, function_set="imagenet_c")
