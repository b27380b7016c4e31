"""Images that pollute a stream: noise, or images of other data."""

import hashlib
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from lightning_tta.data.file_images import DecodedImages, natural_order, walk_images
from lightning_tta.data.images import Images
from lightning_tta.data.reading import read_image
from lightning_tta.data.storage.contents import content_lines
from lightning_tta.data.streams import NOISE, permutation
from lightning_tta.errors import ConfigError, DataError, did_you_mean

SPREAD = 1 / 11
"""Standard deviation of Gaussian noise around 1/2: normal numbers, some ten million, scaled to 0 to 1 as in SoTTA."""
_CHOICE = 20230701  # fixed: the same files in each run


@cache
def _levels(kind: str) -> npt.NDArray[np.uint8]:
    """The pixel (65536,) of each 16-bit number: a table, so that noise is the same on every machine."""
    if kind == "uniform":
        return (np.arange(65536) >> 8).astype(np.uint8)
    normal = NormalDist(0.5, SPREAD)
    values = np.array([normal.inv_cdf((number + 0.5) / 65536) for number in range(65536)])
    return np.asarray(np.clip(np.rint(255 * values), 0, 255), dtype=np.uint8)


class NoiseImages(Images):
    """Images of independent pixels, made when asked for, without labels.

    Args:
        kind: ``uniform`` in 0 to 1, or ``gaussian`` around 1/2.
        count: How many.
        shape: Of each, (C, H, W).
        number: Of the set: each has other images.
    """

    def __init__(self, kind: str, count: int, shape: tuple[int, ...], number: int) -> None:
        self.kind, self.shape, self.number = kind, shape, number
        self.labels = torch.full((count,), -1)

    def image(self, position: int) -> Tensor:
        """One image."""
        size = int(np.prod(self.shape))
        words = np.random.PCG64([position, self.number]).random_raw(-(-size // 4))
        numbers = np.asarray(words).astype("<u8").view("<u2")[:size]
        return torch.from_numpy(_levels(self.kind)[numbers]).view(self.shape)


class OtherImages(DecodedImages):
    """Files, resized and cut to a size, without labels.

    Args:
        files: All files there are.
        root: The folder, left out of the files' names.
        chosen: Which of the files, (N,); one may come several times.
        shape: Of each image, (C, H, W).
    """

    def __init__(
        self, files: Sequence[Path], root: Path, chosen: npt.NDArray[np.int64], shape: tuple[int, ...]
    ) -> None:
        self.files, self.root, self.chosen, self._shape = files, root, chosen, shape
        self.labels = torch.full((len(chosen),), -1)
        self._warned: set[str] = set()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an image."""
        return self._shape

    def image(self, position: int) -> Tensor:
        """One image: its shorter side is resized, and the middle cut out."""
        channels, height, width = self._shape
        pixels = read_image(self.files[self.chosen[position]], channels, warned=self._warned)
        scale = max(height / pixels.shape[1], width / pixels.shape[2])
        size = [max(height, round(scale * pixels.shape[1])), max(width, round(scale * pixels.shape[2]))]
        resized = functional.resize(pixels, size, antialias=True)
        return functional.center_crop(resized, [height, width])  # type: ignore[no-any-return]

    def file(self, position: int) -> str:
        """Name of an image's file, below the folder."""
        return Path(self.files[self.chosen[position]]).relative_to(self.root).as_posix()


class Polluters:
    """What pollutes a stream.

    Args:
        name: ``uniform``, ``gaussian``, or a folder of images, which may be in folders below.

    Raises:
        ConfigError: If it is neither kind of noise nor a folder.
    """

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, Path(name).expanduser()
        if name not in NOISE and not self.folder.is_dir():
            raise ConfigError(
                f"polluters={name!r} is no kind of noise ({', '.join(NOISE)}), and there is no such folder."
                f"{did_you_mean(name, NOISE)}"
            )

    @cached_property
    def _files(self) -> list[Path]:
        files = sorted(walk_images(self.folder), key=lambda file: natural_order(file.relative_to(self.folder)))
        if not files:
            raise DataError(f"polluters: {self.folder} has no images. Name a folder that has some, or {NOISE[0]}.")
        return files

    def identity(self, cache_dir: Path | None) -> str:
        """What tells them from others: the kind of noise, or a hash of names and contents of the files."""
        if self.name in NOISE:
            return self.name
        content = b"".join(content_lines("polluters", self._files, self.folder, cache_dir))
        return f"folder:{hashlib.sha256(content).hexdigest()[:12]}"

    def images(self, counts: Sequence[int], shape: tuple[int, ...]) -> list[Images]:
        """A set of images of this ``shape`` (C, H, W) for each of the ``counts``; the same in each run.

        Files are taken in random order, each again only when all were taken.
        """
        if self.name in NOISE:
            return [NoiseImages(self.name, count, shape, number) for number, count in enumerate(counts)]
        total, size = sum(counts), len(self._files)
        rounds = [permutation(size, _CHOICE, turn) for turn in range(-(-total // size))]
        chosen = np.concatenate([np.zeros(0, dtype=np.int64), *rounds])[:total]
        return [OtherImages(self._files, self.folder, part, shape) for part in np.split(chosen, np.cumsum(counts)[:-1])]


def shape_of(domains: Sequence[Images]) -> tuple[int, ...]:
    """Shape (C, H, W) of the first image that can be read.

    Raises:
        DataError: If none can.
    """
    problem = DataError("There are no images.")
    for images in domains:
        for position in range(len(images)):
            try:
                return tuple(images.image(position).shape)
            except DataError as error:
                problem = error
    raise problem
