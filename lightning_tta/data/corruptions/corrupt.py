"""Image corruptions with severities 1 to 5: every method sees the same pixels.

The set ``builtin`` follows the groups of ImageNet-C (noise, blur, weather, digital, and a geometric one) and needs
torchvision only. The set ``imagenet_c`` has the 15 + 4 functions of ImageNet-C itself (Hendrycks and Dietterich,
arXiv:1903.12261) and needs the extra ``corruptions``. The set ``published`` has their names too, for files such as
CIFAR-10-C that a data module reads. Each set has functions to report on, and held-out ones on which settings may be
chosen.

A domain is named after its corruption; ``fog@5`` is fog at severity 5, whatever the severity of the others.
"""

import difflib
import hashlib
from collections.abc import Iterable
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from lightning_tta.data.corruptions import builtin, imagenet_c, published
from lightning_tta.errors import ConfigError, check_choice, check_range

FunctionSet = Literal["builtin", "imagenet_c", "published"]
SETS: dict[str, ModuleType] = {"builtin": builtin, "imagenet_c": imagenet_c, "published": published}
MIN_SIZE = 32
CLEAN = "clean"
FALLING = "-falling"


def _get_set(function_set: str) -> ModuleType:
    check_choice("function_set", function_set, tuple(SETS))
    return SETS[function_set]


def corruption_names(function_set: str = "builtin", held_out: bool = False) -> list[str]:
    """Names of the corruptions to report on, or of the held-out ones for choosing settings.

    Raises:
        ConfigError: On an unknown function set.
    """
    functions = _get_set(function_set)
    return list(functions.HELD_OUT if held_out else functions.REPORTED)


def function_set_id(function_set: str = "builtin") -> str:
    """Name and version of a function set, for the protocol: ``builtin-1`` for example.

    Raises:
        ConfigError: On an unknown function set, or when its package is not installed.
    """
    return str(_get_set(function_set).version_id())


def check_computable(domains: Iterable[str], function_set: str) -> None:
    """Refuse, before data is read, domains that :func:`corrupt` cannot make.

    Raises:
        ConfigError: If there are some, and the function set is not installed, or has files only.
    """
    if set(domains) - {CLEAN}:
        if _get_set(function_set) is published:
            raise ConfigError(published.REFUSAL)
        function_set_id(function_set)  # is its package installed?


def check_name(name: str, known: list[str], what: str) -> None:
    """Raise :class:`ConfigError` with the closest matches unless ``name`` is one of ``known``."""
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"Unknown {what} {name!r}.{hint} Known: {', '.join(known)}.")


def expand_domains(domains: list[str] | None, natural: list[str], function_set: str) -> list[str]:
    """Names of domains, with the groups ``reported``, ``held_out`` and ``none`` written out.

    Args:
        domains: What the user named; ``None`` takes the natural domains where there are some, else ``reported``.
        natural: Names of the domains that are not made by a corruption.
        function_set: One of :data:`SETS`.

    Raises:
        ConfigError: On an unknown name, a severity out of range, a name given twice, or none at all.
    """
    reported, held_out = corruption_names(function_set), corruption_names(function_set, held_out=True)
    if domains is None:
        domains = natural or reported
    if isinstance(domains, str) or not domains:
        raise ConfigError(f"domains must be a list of at least one name; got {domains!r}.")
    groups = {"reported": reported, "held_out": held_out, "none": [CLEAN]}
    names: list[str] = []
    for name in domains:
        corruption, severity = split_severity(name) if name not in natural else (name, None)
        others = ["reported", "held_out"] if severity is not None else [CLEAN, *groups, *natural]
        check_name(corruption, [*others, *reported, *held_out], "domain")
        level = "" if severity is None else f"@{severity}"
        names += [f"{member}{level}" for member in groups.get(corruption, [corruption])]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError(f"Each domain may occur once; named more than once: {', '.join(twice)}.")
    return names


def split_severity(name: str) -> tuple[str, int | None]:
    """Corruption and severity of a domain's name: ``("fog", 5)`` of ``fog@5``, ``("fog", None)`` of ``fog``.

    Raises:
        ConfigError: If what follows ``@`` is not a severity from 1 to 5.
    """
    corruption, at, level = name.removesuffix(FALLING).partition("@")
    if not at:
        return name, None
    if level not in ("1", "2", "3", "4", "5"):
        raise ConfigError(f"Domain {name!r}: write NAME@S with a severity S from 1 to 5, such as {corruption}@5.")
    return corruption, int(level)


def gradual(names: list[str]) -> list[str]:
    """Each corruption at severities 1, 2, 3, 4, 5, 4, 3, 2, 1: its domains, one after the other.

    Raises:
        ConfigError: If a name has a severity already, or is no corruption.
    """
    known = {name for functions in SETS.values() for name in (*functions.REPORTED, *functions.HELD_OUT)}
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ConfigError(
            f"stream='gradual' moves corruptions through all severities; {', '.join(wrong)} cannot be. Name "
            "corruptions without a severity."
        )
    levels = [*(f"@{level}" for level in range(1, 6)), *(f"@{level}{FALLING}" for level in range(4, 0, -1))]
    return [f"{name}{level}" for name in names for level in levels]


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
    functions = _get_set(function_set)
    check_name(name, [*functions.REPORTED, *functions.HELD_OUT], f"corruption of the set {function_set!r}:")
    check_range("severity", severity, 1, 5, integer=True)
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ConfigError(f"corrupt wants a uint8 image (1 or 3, H, W); got {image.dtype} {tuple(image.shape)}.")
    if min(image.shape[1:]) < MIN_SIZE:
        raise ConfigError(
            f"Corruptions want images of at least {MIN_SIZE}x{MIN_SIZE} pixels; got "
            f"{image.shape[1]}x{image.shape[2]}. Resize them first (image_size={MIN_SIZE})."
        )
    result: Tensor = functions.apply(image, name, severity, image_seed(seed, function_set, name, severity, index))
    return result
