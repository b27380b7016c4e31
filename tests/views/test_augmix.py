"""Views against torchvision and PIL, one image at a time; and what their random numbers depend on."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torchvision.transforms.v2 import functional

from lightning_tta import ConfigError
from lightning_tta.views import augmix as views
from lightning_tta.views.augmix import AUGMENTATIONS, OPERATIONS, ViewPlan, make_views
from nets import make_images, max_difference

pytestmark = pytest.mark.usefixtures("one_thread")


def smooth_images(count, height=32, width=40):
    """Images of a photograph's kind: neighbouring pixels are alike."""
    noise = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_views_of_an_image_depend_on_its_seed_alone(augment):
    images = smooth_images(3)
    state = torch.get_rng_state()
    made = make_views(images, 4, augment, [5, 6, 7])
    assert torch.equal(torch.get_rng_state(), state)
    assert made.shape == (3, 4, 3, 32, 40)
    assert made.min() >= -1e-6
    assert made.max() <= 1 + 1e-6
    assert max_difference(make_views(images[1:2], 4, augment, [6])[0], made[1]) < 1e-6
    if augment != "none":
        assert not torch.equal(make_views(images[1:2], 4, augment, [8])[0], made[1])
        assert not torch.equal(made[0, 0], made[0, 1])


@pytest.mark.parametrize("augment", ["none", "rrc_flip", "augmix_crop"])
def test_views_keep_the_layout_of_the_images(augment):
    images = smooth_images(2)
    made = make_views(images.to(memory_format=torch.channels_last), 4, augment, [1, 2])
    assert all(views.is_contiguous(memory_format=torch.channels_last) for views in made)
    assert torch.equal(made, make_views(images, 4, augment, [1, 2]))


def test_identity_is_exact():
    images = smooth_images(2)
    assert torch.equal(make_views(images, 3, "none", [0, 1]), images[:, None].expand(-1, 3, -1, -1, -1))


@pytest.mark.parametrize("size", [(32, 40), (40, 32), (24, 96)])
def test_resized_crops_are_torchvisions(size):
    images = smooth_images(2, *size)
    made = make_views(images, 6, "rrc", [1, 2])
    for number, seed in enumerate((1, 2)):
        boxes = views.crop_boxes(views._uniform([seed], 6, 22), *size)
        for box, view in zip(boxes.astype(int).tolist(), made[number], strict=True):
            expected = functional.resized_crop(images[number], *box, list(size), antialias=False)
            steepest = max(expected.diff(dim=axis).abs().max().item() for axis in (1, 2))
            assert max_difference(view, expected) < 1e-4 + 2 * steepest / (2 * views.PIXEL)  # half a unit on each axis


def test_a_flip_mirrors_the_crop():
    images = smooth_images(1)
    drawn = views._uniform([3], 40, 23)
    mirrored = drawn[:, 22] < 0.5
    assert 10 < mirrored.sum() < 30
    boxes = views.crop_boxes(drawn[:, :22], 32, 40).astype(int).tolist()
    for box, view, mirror in zip(boxes, make_views(images, 40, "rrc_flip", [3])[0], mirrored, strict=True):
        expected = functional.resized_crop(images[0], *box, [32, 40], antialias=False)
        assert max_difference(view, expected.flip(-1) if mirror else expected) < 2e-3


def test_crop_boxes_are_distributed_as_torchvisions():
    from torchvision.transforms.v2 import RandomResizedCrop

    theirs = RandomResizedCrop(32)
    image = torch.zeros(3, 32, 40)
    drawn = [theirs.make_params([image]) for _ in range(2000)]
    expected = torch.tensor([[d["top"], d["left"], d["height"], d["width"]] for d in drawn]).float()
    ours = torch.from_numpy(views.crop_boxes(views._uniform([0], 2000, 22), 32, 40)).float()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= 32).all()
    assert (ours[:, 1] + ours[:, 3] <= 40).all()
    for column in range(4):
        a, b = ours[:, column].sort().values, expected[:, column].sort().values
        assert (a - b).abs().mean() < 0.6  # pixels: the distance between the two distributions
    area = ours[:, 2] * ours[:, 3] / (32 * 40)
    assert 0.06 < area.min() < 0.12
    assert 0.9 < area.max() <= 1


def test_padded_crops():
    images = smooth_images(1)
    padded = torch.nn.functional.pad(images, [4] * 4)[0]
    windows = torch.stack([padded[:, i : i + 32, j : j + 40] for i in range(9) for j in range(9)])
    flipped = windows.flip(-1)
    made = make_views(images, 600, "crop_flip", [3])[0]
    counts = torch.zeros(2, 81)
    for view in made:
        found = torch.stack([(candidates == view).flatten(1).all(1) for candidates in (windows, flipped)])
        assert found.any()
        counts += found.float()
    assert abs(counts.sum(1)[0] / 600 - 0.5) < 0.08
    assert (counts.sum(0) > 0).all()
    assert counts.sum(0).max() < 25


# AugMix, against PIL's operations on 8-bit images ------------------------------------------------------------------


def pil_operation(name, image, level, sign):
    """MEMO's operations at severity 1, in PIL."""
    width, height = image.size
    if name == "autocontrast":
        return ImageOps.autocontrast(image)
    if name == "equalize":
        return ImageOps.equalize(image)
    if name == "posterize":
        return ImageOps.posterize(image, 4 - int(level * 4 / 10))
    if name == "solarize":
        return ImageOps.solarize(image, 256 - int(level * 256 / 10))
    if name == "rotate":
        return image.rotate(sign * int(level * 30 / 10), resample=Image.Resampling.BILINEAR)
    shear, x, y = sign * level * 0.3 / 10, sign * int(level * width / 30), sign * int(level * height / 30)
    matrix = {
        "shear_x": (1, shear, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, shear, 1, 0),
        "translate_x": (1, 0, x, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, y),
    }[name]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)


def to_pil(image):
    return functional.to_pil_image((image * 255).round().to(torch.uint8))


def from_pil(image):
    return functional.pil_to_tensor(image).float() / 255


def operation(name, pixels, level, sign):
    """Ours, on 8-bit pixels in floats; level and sign for all images."""
    levels, signs = np.full(len(pixels), level), np.full(len(pixels), sign)
    if name in views._MOVES:
        which = np.full(len(pixels), OPERATIONS.index(name))
        found = views.positions(which, levels, signs, *pixels.shape[-2:])
        return views._moved(pixels, torch.from_numpy(found).long())
    arguments = [torch.from_numpy(views.solarize_threshold(levels))] if name == "solarize" else []
    return views._APPLIED[name](pixels, *arguments)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("level", [0.15, 0.6, 0.99])
def test_operations_are_those_of_pil(name, sign, level):
    pixels = (smooth_images(2, 64, 80) * 255).round()
    ours = operation(name, pixels, level, sign)
    assert torch.equal(ours, ours.round())
    for image, made in zip(pixels, ours, strict=True):
        expected = from_pil(pil_operation(name, to_pil(image / 255), level, sign)) * 255
        inside = (slice(None), slice(4, -4), slice(4, -4))  # PIL and torch differ on what lies beyond the border
        difference = (made - expected)[inside].abs()
        if name in ("equalize", "solarize", "posterize"):
            assert torch.equal(made, expected)
        elif name == "autocontrast":
            assert difference.max() <= 1  # PIL's quotient is rounded
        else:
            assert difference.mean() < 1
            assert difference.quantile(0.99) < 5


@pytest.mark.parametrize("name", ["equalize", "autocontrast"])
@pytest.mark.parametrize("pixels", [[7.0], [0.0, 255.0], [100.0, 101.0], [float(v) for v in range(256)]])
def test_histograms_at_their_edges(name, pixels):
    image = torch.tensor(pixels).repeat(600 // len(pixels) + 1)[:600].view(1, 1, 20, 30).expand(1, 3, -1, -1)
    expected = from_pil(pil_operation(name, to_pil(image[0] / 255), 0.5, 1)) * 255
    assert torch.equal(operation(name, image.contiguous(), 0.5, 1)[0], expected)


# The same bits on every device --------------------------------------------------------------------------------------


class InFloat64(TorchFunctionMode):
    """What is made float32 becomes float64, which has bits to spare."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0].double() if function is torch.Tensor.float else function(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [(32, 32), (40, 56), (70, 33)])
@pytest.mark.parametrize("augment", [augment for augment in AUGMENTATIONS if augment.startswith("augmix")])
def test_no_sum_of_augmix_is_rounded(augment, size):
    """In float32 it is what it is in float64: so the order of sums, and fused multiply-adds, change nothing."""
    images = torch.randint(256, (6, 3, *size), generator=torch.Generator().manual_seed(0)) / 255
    found = make_views(images, 12, augment, range(6))
    with InFloat64():
        made = ViewPlan(12, augment, size, range(6))._made(images)
    assert made.dtype == torch.float64
    units = made * 255 * views.FINE
    assert (units - units.round()).abs().max() < 1e-6
    assert torch.equal(found, units.round().float() * (1 / (255 * views.FINE)))


@pytest.mark.parametrize("augment", [augment for augment in AUGMENTATIONS if augment.startswith("augmix")])
@pytest.mark.parametrize("upwards", [0.0, 1.0])
def test_the_last_bit_of_an_8_bit_pixel_changes_no_view(augment, upwards):
    images = (smooth_images(8) * 255).round() / 255
    other = torch.nextafter(images, torch.full_like(images, upwards))
    assert not torch.equal(images, other)
    assert torch.equal(make_views(images, 32, augment, range(8)), make_views(other, 32, augment, range(8)))


@pytest.mark.parametrize("augment", AUGMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_device_is_asked_nothing(augment, dtype, monkeypatch):
    """Tensors that have a device and no values: whatever mixes devices or reads a value raises."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # fake memory cannot be pinned
    plan = ViewPlan(8, augment, (30, 40), range(5))
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = plan(torch.empty(5, 3, 30, 40, dtype=dtype, device="cuda"))
    assert (made.shape, made.dtype, made.device.type) == ((5, 8, 3, 30, 40), dtype, "cuda")


def test_one_transfer(monkeypatch):
    """All that was drawn goes over in one piece, and comes apart again as it was."""
    tensors = ViewPlan(8, "augmix", (30, 40), range(3))._tensors
    carried = views._carried(tensors, torch.device("meta"))
    assert [tensor.shape for tensor in carried] == [tensor.shape for tensor in tensors]
    assert len({tensor.untyped_storage()._cdata for tensor in carried}) == 1
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def test_autocast_changes_no_view():
    images = smooth_images(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = make_views(images, 8, "augmix", [0, 1])
    assert torch.equal(found, make_views(images, 8, "augmix", [0, 1]))


# Distributions ------------------------------------------------------------------------------------------------------


def pil_augmix(image, random):
    """AugMix as in MEMO's public description: Dirichlet and Beta mixtures of chains of one to three operations."""
    weights, share = random.dirichlet([1.0] * 3), random.beta(1.0, 1.0)
    mixed = np.zeros((3, *image.size[::-1]), dtype=np.float64)
    for weight in weights:
        chain = image
        for _ in range(random.integers(1, 4)):
            name, level = OPERATIONS[random.integers(len(OPERATIONS))], random.uniform(0.1, 1)
            chain = pil_operation(name, chain, level, random.choice([-1, 1]))
        mixed += weight * from_pil(chain).numpy()
    return share * from_pil(image).numpy() + (1 - share) * mixed


def test_augmix_agrees_in_distribution_with_a_per_image_reference():
    (image,) = (smooth_images(1) * 255).round() / 255
    random = np.random.default_rng(0)
    theirs = torch.from_numpy(np.stack([pil_augmix(to_pil(image), random) for _ in range(1500)])).float()
    ours = make_views(image[None], 1500, "augmix_only", [0])[0]
    assert (ours.mean(0) - theirs.mean(0)).abs().mean() < 0.006
    assert (ours.std(0) - theirs.std(0)).abs().mean() < 0.006
    change = [(x - image).flatten(1).norm(dim=1).sort().values for x in (ours, theirs)]
    assert (change[0] - change[1]).abs().mean() < 0.08 * change[1].mean()


def test_dtype_and_wrong_arguments():
    images = make_images(2, dtype=torch.float64)
    for augment in AUGMENTATIONS:
        assert make_views(images, 2, augment, [0, 1]).dtype == torch.float64
    for wrong in ({"views": 0}, {"augment": "cutout"}):
        with pytest.raises(ConfigError, match="must be"):
            make_views(images, **{"views": 2, "augment": "none", "seeds": [0, 1], **wrong})


@pytest.mark.parametrize("augment", AUGMENTATIONS)
@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_each_channel_on_its_own(augment, channels):
    """Any number of channels: each is changed as if it were one of a grey image."""
    images = make_images(2)[:, [number % 3 for number in range(channels)]]
    found = make_views(images, 6, augment, [3, 4])
    for channel in range(channels):
        grey = images[:, channel : channel + 1].expand(-1, 3, -1, -1)
        expected = make_views(grey, 6, augment, [3, 4])[:, :, :1]
        torch.testing.assert_close(found[:, :, channel : channel + 1], expected, rtol=0, atol=1e-6)
