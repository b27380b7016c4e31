"""Scenes of simple shapes with their masks, drawn by a seed: segmentation without a download."""

from __future__ import annotations

from collections.abc import Iterator
from colorsys import hsv_to_rgb
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_tta.data.base import Split
from lightning_tta.data.corruptions.corrupt import MIN_SIZE
from lightning_tta.data.dense.base import DenseData, TargetImages
from lightning_tta.errors import check_range

CLASSES = ("background", "disk", "square", "triangle", "ring")
VERSION = 1  # raise it whenever a pixel changes
COUNTS = {"train": 800, "val": 100, "test": 300}
_SPLITS = {"train": 0, "val": 1, "test": 2}


class ShapesData(DenseData):
    """1,200 scenes of disks, squares, triangles and rings before a pale gradient: five classes of pixels.

    800 to train on, 100 to validate, 300 to test; the same for a seed on every machine. A scene has one to four shapes,
    which may overlap. Each class has hues of its own, so that a small net learns it in a minute: form and color tell.

    Args:
        image_size: Side of the images in pixels, at least 32.
        shapes_seed: Seed of the scenes.
        **kwargs: Stream, domains, batch sizes: the arguments of :class:`DenseData`.
    """

    name = "shapes"
    task = "pixels"

    def __init__(self, image_size: int = 48, shapes_seed: int = 0, **kwargs: object) -> None:
        check_range("image_size", image_size, MIN_SIZE, integer=True)
        check_range("shapes_seed", shapes_seed, 0, integer=True)
        self.image_size, self.shapes_seed = image_size, shapes_seed
        super().__init__(**kwargs)  # type: ignore[arg-type]

    @property
    def class_names(self) -> list[str]:
        """``background``, ``disk``, ``square``, ``triangle``, ``ring``."""
        return list(CLASSES)

    def clean(self, split: Split) -> TargetImages:
        """The scenes of a split."""
        return TargetImages(*_scenes(split, self.image_size, self.shapes_seed))

    def digest_content(self) -> Iterator[bytes]:
        """The test scenes and masks."""
        for tensor in _scenes("test", self.image_size, self.shapes_seed):
            yield tensor.numpy().tobytes()


@lru_cache(maxsize=6)
def _scenes(split: Split, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pixels uint8 (N, 3, size, size) and masks int64 (N, size, size)."""
    drawn = [_draw(np.random.default_rng([VERSION, seed, _SPLITS[split], n]), size) for n in range(COUNTS[split])]
    pixels, masks = zip(*drawn, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(masks))


def _draw(rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """One scene (3, size, size) and its mask (size, size)."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size  # in [0, 1]
    turn = rng.uniform(0, 2 * np.pi)
    along = 0.5 + 0.5 * ((x - 0.5) * np.cos(turn) + (y - 0.5) * np.sin(turn))
    pale = [hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.25), rng.uniform(0.15, 0.95)) for _ in range(2)]
    ends = np.array(pale)[:, :, None, None]
    scene = ends[0] * (1 - along) + ends[1] * along
    mask = np.zeros((size, size), dtype=np.int64)
    for _ in range(rng.integers(1, 5)):
        kind = int(rng.integers(1, len(CLASSES)))
        center, radius, angle = rng.uniform(0.15, 0.85, 2), rng.uniform(0.12, 0.24), rng.uniform(0, 2 * np.pi)
        dx, dy = (x - center[0]) / radius, (y - center[1]) / radius
        u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        inside = inside_of(CLASSES[kind], u, v)
        hue = (kind - 1) / (len(CLASSES) - 1) + rng.uniform(-0.08, 0.08)
        color = np.array(hsv_to_rgb(hue % 1, rng.uniform(0.5, 1), rng.uniform(0.4, 1)))[:, None, None]
        scene, mask = np.where(inside, color, scene), np.where(inside, kind, mask)
    scene = scene + rng.normal(0, 0.03, scene.shape)
    return (scene * 255).round().clip(0, 255).astype(np.uint8), mask


def inside_of(kind: str, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points, in units of the radius around the center, a shape has."""
    distance = np.hypot(u, v)
    inside: NDArray[np.bool_]
    if kind == "disk":
        inside = distance < 0.9
    elif kind == "ring":
        inside = (distance < 1) & (distance > 0.5)
    elif kind == "square":
        inside = np.maximum(np.abs(u), np.abs(v)) < 0.8
    else:
        inside = (v < 0.5) & (np.abs(u) * 3**0.5 < v + 1)  # the corners on the unit circle
    return inside
