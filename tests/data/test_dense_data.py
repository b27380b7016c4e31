"""Data with masks and values: what batches hold, which domains there are, and files that do not go together."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_tta import ConfigError, DataError, DigitAnglesData, SegmentationFolderData, ShapesData
from lightning_tta.data.dense.base import MOVING
from lightning_tta.data.dense.scenes import read_mask
from lightning_tta.data.dense.shapes import CLASSES, inside_of


def save(folder, count=3, size=(36, 40), masks=True, value=None):
    rng = np.random.default_rng(count)
    for kind in ("images", "masks")[: 1 + masks]:
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for n in range(count):
        Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8)).save(folder / f"images/{n}.jpg")
        if masks:
            mask = rng.integers(3, size=size, dtype=np.uint8)
            mask[0, :5] = 255
            if value is not None:
                mask[1, 1] = value
            Image.fromarray(mask).save(folder / f"masks/{n}.png")


def batches(data):
    return list(data.predict_dataloader())


def test_masks_come_with_their_images_whatever_the_domain(tmp_path):
    save(tmp_path / "test")
    data = SegmentationFolderData(str(tmp_path), classes=3, domains=["clean", "contrast"], batch_size=2)
    data.setup("predict")
    seen = {}
    for batch in batches(data):
        assert "label" not in batch
        for index, domain, target in zip(batch["index"], batch["domain"], batch["target"], strict=True):
            mask = torch.from_numpy(np.array(Image.open(tmp_path / f"test/masks/{int(index) % 3}.png")).astype(int))
            assert torch.equal(target, torch.where(mask == 255, -1, mask))
            seen[int(index)] = int(domain)
    assert seen == {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1}
    assert data.file_of(4) == "1.jpg"


def test_images_and_masks_are_resized_alike(tmp_path):
    save(tmp_path, size=(40, 40))
    half = np.zeros((40, 40), dtype=np.uint8)
    half[:, 20:] = 2
    Image.fromarray(half).save(tmp_path / "masks/0.png")
    data = SegmentationFolderData(str(tmp_path), 3, image_size=[32, 64], batch_size=3, stream="ordered")
    (batch,) = batches(data)
    assert batch["image"].shape == (3, 3, 32, 64)
    target = batch["target"][batch["index"] == 0][0]
    assert torch.equal(target, torch.tensor([0, 2]).repeat_interleave(32).expand(32, 64))


def test_a_domain_without_masks_beside_one_that_has(tmp_path):
    save(tmp_path / "a")
    save(tmp_path / "b", masks=False)
    roots = {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")}
    data = SegmentationFolderData(str(tmp_path), 3, target_roots=roots, stream="mixed", batch_size=6)
    (batch,) = batches(data)
    known = (batch["target"] >= 0).flatten(1).any(1)
    assert torch.equal(known, batch["domain"] == 0)
    assert "target" not in batches(SegmentationFolderData(str(tmp_path / "b"), 3))[0]


def test_files_of_a_palette_and_of_16_bits_are_numbers(tmp_path):
    numbers = np.arange(12, dtype=np.uint8).reshape(3, 4) % 5
    palette = Image.fromarray(numbers, mode="P")
    palette.putpalette([9, 8, 7] * 256)
    palette.save(tmp_path / "p.png")
    Image.fromarray(numbers.astype(np.uint16) + 300).save(tmp_path / "w.png")
    assert torch.equal(read_mask(tmp_path / "p.png"), torch.from_numpy(numbers).long())
    assert torch.equal(read_mask(tmp_path / "w.png"), torch.from_numpy(numbers).long() + 300)


def broken(tmp_path, what):
    """A folder with one mistake; the name of the file that is wrong."""
    save(tmp_path, value=7 if what == "value" else None)
    if what == "size":
        Image.fromarray(np.zeros((36, 41), dtype=np.uint8)).save(tmp_path / "masks/1.png")
    elif what == "color":
        Image.fromarray(np.zeros((36, 40, 3), dtype=np.uint8)).save(tmp_path / "masks/1.png")
    elif what == "damaged":
        (tmp_path / "masks/1.png").write_bytes(b"no image")
    elif what == "no mask":
        (tmp_path / "masks/1.png").unlink()
    elif what == "no image":
        (tmp_path / "images/1.jpg").unlink()
    elif what == "twice":
        Image.fromarray(np.zeros((36, 40), dtype=np.uint8)).save(tmp_path / "images/1.png")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("size", r"masks/1\.png has 41x36 pixels.*images/1\.jpg has 40x36"),
        ("value", r"masks/\d\.png has the value 7; with 3 classes 0 to 2 are allowed, and 255"),
        ("color", r"masks/1\.png has pixels of mode RGB; expected the number of a class"),
        ("damaged", r"Cannot read the mask .*masks/1\.png"),
        ("no mask", r"images/1\.jpg is without a mask of the same stem"),
        ("no image", r"masks/1\.png is without an image of the same stem"),
        ("twice", r"images/1\.jpg and .*images/1\.png have one stem"),
    ],
)
def test_files_that_do_not_go_together_are_named(tmp_path, what, says):
    broken(tmp_path, what)
    with pytest.raises(DataError, match=says):
        batches(SegmentationFolderData(str(tmp_path), 3))


def test_what_moves_pixels_is_left_out():
    data = ShapesData(domains=["reported", "held_out@5"], cache_dir="none")
    assert not {name.partition("@")[0] for name in data.domain_names} & MOVING
    assert "occlusion@5" in data.domain_names
    for domains in (["rotate"], ["clean", "elastic@2"]):
        with pytest.raises(ConfigError, match="moves pixels"):
            ShapesData(domains=domains)
    with pytest.raises(ConfigError, match="stream"):
        ShapesData(stream="label_shift")
    with pytest.raises(ConfigError, match="dirichlet"):
        DigitAnglesData(dirichlet=0.1)


def test_shapes_have_the_areas_of_geometry():
    grid = (np.arange(800) + 0.5) / 400 - 1
    areas = {kind: inside_of(kind, *np.meshgrid(grid, grid)).mean() * 4 for kind in CLASSES[1:]}
    known = {"disk": np.pi * 0.81, "square": 1.6**2, "triangle": 27**0.5 / 4, "ring": np.pi * 0.75}
    assert areas == pytest.approx(known, rel=1e-2)


def test_scenes_follow_from_their_seed():
    images, others = ShapesData().clean("test"), ShapesData(shapes_seed=1).clean("test")
    assert not torch.equal(images.pixels, others.pixels)
    assert torch.equal(images.pixels, ShapesData(num_images=3).clean("test").pixels)
    target = images.targets(torch.arange(len(images)))
    assert target.unique().tolist() == [0, 1, 2, 3, 4]
    assert ShapesData().digest() != ShapesData(shapes_seed=1).digest()


def test_angles_are_those_by_which_digits_were_turned():
    from torchvision.transforms.v2 import functional

    from lightning_tta import DigitsData

    turned, digits = DigitAnglesData().clean("val"), DigitsData(cache_dir="none").clean("val")
    angles = turned.targets(torch.arange(len(turned)))
    assert angles.shape == (len(digits), 1)
    assert 40 < float(angles.max()) <= 45
    for n in range(5):
        expected = functional.rotate(
            digits.image(n), float(angles[n]), interpolation=functional.InterpolationMode("bilinear")
        )
        assert int((expected.int() - turned.image(n).int()).abs().max()) <= 1  # an angle in float32
