"""The one reader of image files: every kind of file becomes 8-bit grey or RGB, or is refused by its name."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lightning_tta.errors import DataError

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded: a small file can claim a size that fills the memory."""

_NO_RASTER = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}  # PIL cannot decode these by itself
_OTHER_IMAGES = {"MPO", "PSD"}  # first pictures of these are the photograph, not the first of an animation
_PHOTOMETRIC = 262  # tag of TIFF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # of the EXIF orientation
_LOCK = threading.Lock()


def formats() -> list[str]:
    """PIL's names of the formats that are read."""
    Image.init()
    return [name for name in Image.OPEN if name not in _NO_RASTER]


def endings() -> set[str]:
    """Endings of the names of image files, in lower case, with the dot."""
    read = set(formats())
    return {ending for ending, name in Image.registered_extensions().items() if name in read}


def read_image(path: Path, channels: int = 3, max_pixels: int = MAX_PIXELS, warned: set[str] | None = None) -> Tensor:
    """Read an image file.

    - The orientation in the EXIF data is applied.
    - 16-bit grey is scaled by its bit depth: 65535 becomes 255. (A file with 12 bits in 16 is then dark: a warning.)
    - Float pixels in [0, 1] are scaled by 255; others are refused, and so are 32-bit integers.
    - Transparent pixels are laid over white.
    - CMYK, palettes and other color spaces become RGB as PIL converts them, without color profiles.
    - Of an animation or a file of several pages the first is taken, with a warning.

    Args:
        path: The file.
        channels: 3 for RGB (grey is repeated), 1 for grey (ITU-R 601 luma of colors).
        max_pixels: Images with more pixels are refused before they are decoded.
        warned: The kinds of warning that were given already, of which each is given once; added to.

    Returns:
        uint8, shape (``channels``, H, W).

    Raises:
        DataError: If the file is missing, empty, damaged, no image, too large, or of a kind without a known scale.
    """
    warned = set() if warned is None else warned
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "is a broken link" if path.is_symlink() else "does not exist"
        raise DataError(f"Cannot read the image {path}: it {state}. Replace or remove it.")
    try:
        if not path.stat().st_size:
            raise DataError(f"Cannot read the image {path}: the file is empty. Replace or remove it.")
        with _opened(path) as file:
            width, height = file.size
            if width * height > max_pixels:
                raise DataError(
                    f"{path} has {width}x{height} pixels, more than max_pixels={max_pixels:,}: it is not decoded. "
                    "Remove the file, make it smaller, or raise --data.max_pixels."
                )
            if getattr(file, "is_animated", False) and file.format not in _OTHER_IMAGES:
                _warn(
                    f"{path} has several pictures (an animation, or pages): the first is taken, as of all such files.",
                    "pictures",
                    warned,
                )
            file.load()
            if file.mode == "F":
                image = Image.fromarray(_from_floats(np.asarray(file), path))
            elif file.mode.startswith("I"):
                image = Image.fromarray(_from_integers(file, path, warned))
            else:
                image = file
            return _to_bytes(_upright(image, file), channels)
    except DataError:
        raise
    except Exception as error:  # damaged bytes can provoke any in PIL's plugins
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "it is no image of a format that PIL reads"
        raise DataError(f"Cannot read the image {path}: {reason}. Replace or remove the file.") from error


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The file with its head read; PIL's own limit of pixels is put aside, as ours is checked next."""
    with path.open("rb") as stream:  # of a path, PIL maps the file, and garbles TIFFs that are to be turned
        with _LOCK:
            before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                file = Image.open(stream, formats=formats())
            finally:
                Image.MAX_IMAGE_PIXELS = before
        with file:
            yield file


def _upright(image: Image.Image, file: Image.Image) -> Image.Image:
    """The image as the EXIF orientation of its file says; where the EXIF data are damaged, as it is."""
    try:
        orientation = file.getexif().get(0x0112, 1)
    except Exception:  # PIL raises whatever the damaged bytes lead to
        orientation = 1
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _to_bytes(image: Image.Image, channels: int) -> Tensor:
    """Pixels uint8 (``channels``, H, W)."""
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels).view(*pixels.shape[:2], channels).permute(2, 0, 1).contiguous()


def _warn(text: str, kind: str, warned: set[str]) -> None:
    if kind not in warned:
        warned.add(kind)
        warnings.warn(text, stacklevel=4)


def _from_floats(values: npt.NDArray[Any], path: Path) -> npt.NDArray[np.uint8]:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # also where a value is NaN
        raise DataError(
            f"{path} has float pixels from {low:g} to {high:g}, whose scale is not known; floats must be in [0, 1]. "
            "Save it with 8 or 16 bits, or scale it."
        )
    levels: npt.NDArray[np.uint8] = np.rint(values * 255).astype(np.uint8)
    return levels


def _from_integers(file: Image.Image, path: Path, warned: set[str]) -> npt.NDArray[np.uint8]:
    values = np.asarray(file).astype(np.int64)
    if file.mode == "I" and file.format not in ("PNG", "PPM"):  # those two are of 16 bits
        raise DataError(
            f"{path} has 32-bit integer pixels from {values.min()} to {values.max()}, whose scale is not known. Save "
            "it with 8 or 16 bits."
        )
    if getattr(file, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # a TIFF in which 0 is white
        values = 65535 - values
    highest = int(values.max())
    if 0 < highest < 4096:
        _warn(
            f"{path} has 16 bits, but no pixel above {highest} of 65535: it is read as it says, nearly black. If its "
            "camera has fewer bits, scale the files first. The same holds for others like it.",
            "dark",
            warned,
        )
    levels: npt.NDArray[np.uint8] = np.rint(values * (255 / 65535)).astype(np.uint8)
    return levels
