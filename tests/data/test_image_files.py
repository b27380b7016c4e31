"""Every kind of image file is read right, or refused by its name; and what a digest says of files."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_tta import DataError
from lightning_tta.data.file_images import FileImages, natural_order, walk_images
from lightning_tta.data.reading import read_image
from lightning_tta.data.storage import contents
from lightning_tta.data.storage.contents import content_lines

RAMP = (np.arange(1024, dtype=np.uint16) * 64).reshape(32, 32)
RED = np.zeros((8, 6, 3), np.uint8)
RED[:, :3] = (255, 0, 0)  # the left half


def save(path, pixels, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_by_their_depth(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    if ending == "pgm":
        path.write_bytes(b"P5 32 32 65535\n" + RAMP.astype(">u2").tobytes())
    else:
        save(path, RAMP)
    expected = torch.from_numpy(np.rint(RAMP / 257).astype(np.uint8)).expand(3, -1, -1)
    assert torch.equal(read_image(path), expected)
    assert len(read_image(path).unique()) == 256
    assert torch.equal(read_image(path, channels=1), expected[:1])


def test_big_endian_and_white_is_zero(tmp_path):
    big = Image.frombytes("I;16B", (32, 32), RAMP.astype(">u2").tobytes())
    assert torch.equal(read_image(save(tmp_path / "b.tif", big)), read_image(save(tmp_path / "l.tif", RAMP)))
    inverted = read_image(save(tmp_path / "w.tif", RAMP, tiffinfo={262: 0}))
    with Image.open(tmp_path / "w.tif") as file:
        assert file.tag_v2[262] == 0
    assert torch.equal(inverted, torch.from_numpy(np.rint((65535 - RAMP.astype(int)) / 257)).byte().expand(3, -1, -1))


def test_12_bits_in_16_are_dark_with_a_warning(tmp_path):
    path = save(tmp_path / "a.png", RAMP // 16)
    with pytest.warns(UserWarning, match="no pixel above 4092 of 65535"):
        assert int(read_image(path).max()) == 16


def test_floats_in_0_1_are_scaled_and_others_refused(tmp_path):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert torch.equal(read_image(save(tmp_path / "a.tif", values))[0], torch.from_numpy(np.rint(values * 255)).byte())
    for name, wrong in (("b", values * 255), ("c", values - 0.5), ("d", np.where(values > 0.5, np.nan, values))):
        with pytest.raises(DataError, match=rf"{name}\.tif has float pixels.*must be in \[0, 1\]"):
            read_image(save(tmp_path / f"{name}.tif", wrong.astype(np.float32)))
    with pytest.raises(DataError, match=r"e\.tif has 32-bit integer pixels from 0 to 65472, whose scale is not known"):
        read_image(save(tmp_path / "e.tif", RAMP.astype(np.int32)))


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, ending, orientation):
    shown = np.zeros((16, 32), np.uint8)
    shown[:8, :16] = 250  # bright upper left quarter, as one should see it
    shown[8:, :16] = 120
    undo = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose}
    undo |= {6: np.rot90, 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, -1)}
    stored = np.ascontiguousarray(undo[orientation](shown))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if ending == "jpg" else {"lossless": True} if ending == "webp" else {}
    image = read_image(save(tmp_path / f"a.{ending}", stored, exif=exif, **options))[0].numpy().astype(int)
    assert image.shape == shown.shape
    assert abs(image - shown).max() <= 8


def test_damaged_exif_leaves_the_image_as_it_is(tmp_path):
    warnings.simplefilter("ignore")
    path = save(tmp_path / "a.jpg", RED, exif=b"Exif\0\0" + b"II*\0\xff\xff\xff\xff" + bytes(20))
    assert read_image(path).shape == (3, 8, 6)


def colors(image):
    """The middle of the left and of the right half."""
    return [tuple(image[:, 4, x].tolist()) for x in (1, 4)]


def near(given, *expected):
    return all(abs(a - b) <= 6 for x, y in zip(given, expected, strict=True) for a, b in zip(x, y, strict=True))


RED_BLACK = ((255, 0, 0), (0, 0, 0))
RED_WHITE = ((255, 0, 0), (255, 255, 255))


def test_color_spaces_and_transparency(tmp_path):
    red = Image.fromarray(RED)
    for name, image in (("c.jpg", red.convert("CMYK")), ("c.tif", red.convert("CMYK")), ("p.png", red.convert("P"))):
        assert near(colors(read_image(save(tmp_path / name, image))), *RED_BLACK)
    clear = np.dstack([RED, RED[..., 0]])  # the black half is transparent
    palette = red.convert("P")
    index = palette.getpixel((5, 0))
    for name, image, options in (
        ("a.png", Image.fromarray(clear), {}),
        ("a.webp", Image.fromarray(clear), {"lossless": True}),
        ("a.tif", Image.fromarray(clear), {}),
        ("t.png", palette, {"transparency": index}),
        ("t.gif", palette, {"transparency": index}),
        ("k.png", red, {"transparency": (0, 0, 0)}),
    ):
        assert near(colors(read_image(save(tmp_path / name, image, **options))), *RED_WHITE), name
    half = Image.fromarray(np.dstack([np.full((8, 6), 100, np.uint8), np.full((8, 6), 51, np.uint8)]))  # LA, a fifth
    assert read_image(save(tmp_path / "la.png", half)).unique().tolist() == [round(0.2 * 100 + 0.8 * 255)]


def test_grey_and_color_for_nets_of_one_and_three_channels(tmp_path):
    grey, red = save(tmp_path / "g.bmp", RED[..., 0]), save(tmp_path / "r.png", RED)
    assert torch.equal(read_image(grey), torch.from_numpy(RED[..., 0]).expand(3, -1, -1))
    assert read_image(red, channels=1).shape == (1, 8, 6)
    assert read_image(red, channels=1).unique().tolist() == [0, 76]  # 0.299 of 255
    assert read_image(save(tmp_path / "1.png", Image.fromarray(RED[..., 0]).convert("1"))).unique().tolist() == [0, 255]


@pytest.mark.parametrize("ending", ["gif", "webp", "tif", "png"])
def test_of_animations_and_pages_the_first_is_taken_with_a_warning(tmp_path, ending):
    more = {"save_all": True, "append_images": [Image.fromarray(RED[:, ::-1].copy())]}
    more |= {"lossless": True} if ending == "webp" else {}
    path = save(tmp_path / f"a.{ending}", RED, **more)
    with pytest.warns(UserWarning, match="has several pictures"):
        assert near(colors(read_image(path)), *RED_BLACK)
    images = FileImages([path] * 3, torch.zeros(3), None, None)
    with pytest.warns(UserWarning, match="has several pictures") as given:
        images.images(torch.arange(3))
    assert len(given) == 1


def test_a_photograph_with_a_preview_is_no_animation(tmp_path):
    save(tmp_path / "a.mpo", RED, save_all=True, append_images=[Image.fromarray(RED)])
    assert read_image((tmp_path / "a.mpo").rename(tmp_path / "a.jpg")).shape == (3, 8, 6)


def broken_files(folder):
    """Files with an image's name that are none, and what the error says of them."""
    folder.mkdir(exist_ok=True)
    for name in ("cut.png", "cut.jpg", "cut.tif"):
        content = save(folder / name, np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
        content.write_bytes(content.read_bytes()[: content.stat().st_size // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    (folder / "postscript.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "folder.png").mkdir()
    (folder / "link.jpg").symlink_to(folder / "nowhere.jpg")
    Image.new("1", (13_000, 13_000)).save(folder / "bomb.png")
    return {
        **dict.fromkeys(["cut.png", "cut.jpg", "cut.tif"], "Cannot read"),
        "empty.png": "is empty",
        "text.jpg": "no image of a format that PIL reads",
        "postscript.png": "no image of a format that PIL reads",
        "folder.png": "is a folder",
        "link.jpg": "is a broken link",
        "gone.webp": "does not exist",
        "bomb.png": r"13000x13000 pixels, more than max_pixels=89,478,485: it is not decoded.*--data.max_pixels",
    }


def test_what_cannot_be_read_is_named(tmp_path):
    expected = broken_files(tmp_path / "a")
    for name, why in expected.items():
        with pytest.raises(DataError, match=why) as error:
            read_image(tmp_path / "a" / name)
        assert str(tmp_path / "a" / name) in str(error.value)


def test_the_limit_of_pixels_can_be_raised_and_lowered(tmp_path):
    path = save(tmp_path / "a.png", np.zeros((20, 30), np.uint8))
    assert read_image(path, max_pixels=600).shape == (3, 20, 30)
    with pytest.raises(DataError, match="30x20 pixels, more than max_pixels=599"):
        read_image(path, max_pixels=599)
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 100
    try:
        assert read_image(path).shape == (3, 20, 30)  # PIL's own limit does not count
        assert Image.MAX_IMAGE_PIXELS == 100
    finally:
        Image.MAX_IMAGE_PIXELS = before


def test_files_are_listed_in_any_case_and_depth_without_the_systems_own(tmp_path):
    names = ["b.JPG", "a.jpeg", "c/z.webp", "c/d/e.bmp", "f.TIF", "g.gif"]
    for name in [*names, ".hidden.jpg", "._b.jpg", "__MACOSX/b.jpg", ".git/x.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / name, RED)
    for name in ("Thumbs.db", "notes.txt", "desktop.ini"):
        (tmp_path / name).write_text("x")
    (tmp_path / "c" / "loop").symlink_to(tmp_path)
    (tmp_path / "pipe.png").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in walk_images(tmp_path)]
    assert sorted(found) == sorted([*names, "pipe.png"])  # a folder with an image's name is no silent loss
    (tmp_path / "IMG_1.HEIC").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"1 files are left out.*IMG_1.HEIC.*Convert"):
        assert len(walk_images(tmp_path)) == 7


def test_natural_order():
    names = ["b1/2.png", "10.png", "9.png", "frame 1b.png", "frame 1a.png", "b01/1.png", "a.png"]
    paths = sorted(map(Path, names), key=natural_order)
    assert [path.as_posix() for path in paths] == [
        *("9.png", "10.png", "a.png", "b01/1.png", "b1/2.png", "frame 1a.png", "frame 1b.png"),
    ]


def digest(root, cache):
    return list(content_lines("test", sorted(root.rglob("*.png")), root, cache))


def test_contents_count_and_are_read_once(tmp_path, monkeypatch):
    root, cache = tmp_path / "data", tmp_path / "cache"
    for number, name in enumerate(("a/0.png", "b/0.png")):
        (root / name).parent.mkdir(parents=True)
        save((root / name).with_suffix(".bmp"), np.full((8, 8), number, np.uint8)).rename(root / name)
    assert (root / "a/0.png").stat().st_size == (root / "b/0.png").stat().st_size
    before = digest(root, cache)
    (root / "a/0.png").rename(root / "swap")
    (root / "b/0.png").rename(root / "a/0.png")
    (root / "swap").rename(root / "b/0.png")
    assert digest(root, cache) != before  # the same names and sizes
    monkeypatch.setattr(contents, "_FRESH", -1.0)
    now, read = digest(root, cache), contents._hash
    calls = []
    monkeypatch.setattr(contents, "_hash", lambda path: calls.append(path) or read(path))
    assert digest(root, cache) == now
    assert not calls
    for store in cache.iterdir():
        store.write_text('{"x": 1')
    assert digest(root, cache) == now
    assert len(calls) == 2
    assert digest(root, None) == now
    (root / "a/0.png").unlink()
    (root / "a/0.png").mkdir()
    assert contents.UNREADABLE.encode() in digest(root, cache)[0]


def test_of_very_many_files_some_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "LIMIT", 3)
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(bytes([number]))
    lines = digest(tmp_path, None)
    assert len(lines) == 10
    assert [number for number, line in enumerate(lines) if not line.endswith(b"|\n")] == [0, 4, 8]
