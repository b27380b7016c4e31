"""Corrupted images that the makers of a data set have published: nothing is computed here, a data module reads them."""

from typing import NoReturn

from torch import Tensor

from lightning_tta.data.corruptions import imagenet_c
from lightning_tta.errors import ConfigError

REPORTED = imagenet_c.REPORTED
HELD_OUT = imagenet_c.HELD_OUT
REFUSAL = (
    'function_set="published" computes nothing: it is for the stream of a data module that has such files (CIFARData, '
    'ImageNetData). Here use "builtin" or "imagenet_c".'
)


def version_id() -> str:
    """The data module's digest says which files they are."""
    return "published"


def apply(image: Tensor, name: str, severity: int, seed: int) -> NoReturn:
    """There is nothing to compute.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError(REFUSAL)
