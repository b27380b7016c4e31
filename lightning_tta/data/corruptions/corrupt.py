"""Image corruptions with severities 1 to 5: every method sees the same pixels."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_tta.data.corruptions import builtin, imagenet_c
from lightning_tta.errors import ConfigError, check_choice, check_range, did_you_mean


@dataclass(frozen=True)
class FunctionSet:
    """Corruptions to report on, and held-out ones on which settings may be chosen, under one name in the protocol."""

    reported: tuple[str, ...]
    held_out: tuple[str, ...]
    version_id: Callable[[], str]  # raises ConfigError if a package is not installed
    apply: Callable[[Tensor, str, int, int], Tensor] | None = None  # image, name, severity, seed; None: files only

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return self.reported + self.held_out


FunctionSetName = Literal["builtin", "imagenet_c", "published"]
SETS: dict[str, FunctionSet] = {
    # the groups of ImageNet-C (noise, blur, weather, digital) and a geometric one; needs torchvision only
    "builtin": FunctionSet(builtin.REPORTED, builtin.HELD_OUT, lambda: f"builtin-{builtin.VERSION}", builtin.apply),
    # the 15 + 4 functions of ImageNet-C itself (Hendrycks and Dietterich, arXiv 1903.12261)
    "imagenet_c": FunctionSet(imagenet_c.REPORTED, imagenet_c.HELD_OUT, imagenet_c.version_id, imagenet_c.apply),
    # files with the same names, such as CIFAR-10-C, which a data module reads; its digest says which files
    "published": FunctionSet(imagenet_c.REPORTED, imagenet_c.HELD_OUT, lambda: "published"),
}
MIN_SIZE = 32
CLEAN = "clean"
NOT_COMPUTABLE = (
    'function_set="published" computes nothing: it is for the stream of a data module that has such files (CIFARData, '
    'ImageNetData). Here use "builtin" or "imagenet_c".'
)


def get_function_set(name: str) -> FunctionSet:
    """A function set by name."""
    check_choice("function_set", name, tuple(SETS))
    return SETS[name]


def corruption_names(function_set: str = "builtin", held_out: bool = False) -> list[str]:
    """Names of the corruptions to report on, or of the held-out ones for choosing settings.

    Raises:
        ConfigError: On an unknown function set.
    """
    functions = get_function_set(function_set)
    return list(functions.held_out if held_out else functions.reported)


def function_set_id(function_set: str = "builtin") -> str:
    """Name and version of a function set, for the protocol, such as ``builtin-1``."""
    return get_function_set(function_set).version_id()


def check_computable(domains: Iterable[str], function_set: str) -> None:
    """Refuse, before data is read, domains that :func:`corrupt` cannot compute."""
    if set(domains) - {CLEAN}:
        if get_function_set(function_set).apply is None:
            raise ConfigError(NOT_COMPUTABLE)
        function_set_id(function_set)  # is its package installed?


def check_name(name: str, known: Iterable[str], what: str) -> None:
    """Raise :class:`ConfigError` with the closest matches unless ``name`` is one of ``known``."""
    known = list(known)
    if name not in known:
        raise ConfigError(f"Unknown {what} {name!r}.{did_you_mean(name, known, 3)} Known: {', '.join(known)}.")


def image_seed(seed: int, function_set: str, name: str, severity: int, index: int) -> int:
    """Seed (63 bits) of one corrupted image: the same on every machine and in every process."""
    text = f"{function_set}|{name}|{severity}|{seed}|{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def corrupt(
    image: Tensor, name: str, severity: int, *, seed: int = 0, index: int = 0, function_set: str = "builtin"
) -> Tensor:
    """Corrupt one image.

    Random numbers depend on the seed, the function set, the name, the severity and the index only; the global random
    states of torch and NumPy are left as they were. The result is rounded to 8 bits, as a stored image is.

    Args:
        image: uint8, shape (C, H, W) with C 1 or 3 (``imagenet_c``: 3) and both sides at least 32.
        name: One of :func:`corruption_names`, reported or held out.
        severity: 1 (mild) to 5 (strong).
        seed: Seed of the whole set of corrupted images.
        index: Number of the image in its set.
        function_set: ``builtin`` or ``imagenet_c``.

    Returns:
        uint8, shape (C, H, W).

    Raises:
        ConfigError: On an unknown name or set, a severity out of range, an image of the wrong type or size, or when
            the package of ``imagenet_c`` is not installed.
    """
    functions = get_function_set(function_set)
    check_name(name, functions.names, f"corruption of the set {function_set!r}:")
    check_range("severity", severity, 1, 5, integer=True)
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ConfigError(f"corrupt wants a uint8 image (1 or 3, H, W); got {image.dtype} {tuple(image.shape)}.")
    if min(image.shape[1:]) < MIN_SIZE:
        least, size = f"{MIN_SIZE}x{MIN_SIZE}", f"{image.shape[1]}x{image.shape[2]}"
        raise ConfigError(f"Corruptions want images of at least {least} pixels; got {size}. Set image_size={MIN_SIZE}.")
    if functions.apply is None:
        raise ConfigError(NOT_COMPUTABLE)
    return functions.apply(image, name, severity, image_seed(seed, function_set, name, severity, index))
