"""The shipped configurations: ``configs/`` beside the package in a checkout, inside it in an installed wheel."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning_tta.errors import ConfigError

CONFIGS = "configs"


def configurations() -> Path:
    """The folder of the shipped configurations."""
    package = Path(__file__).parent
    inside = package / CONFIGS
    return inside if inside.is_dir() else package.parent / CONFIGS


def copy_configurations(folder: str | Path = ".") -> Path:
    """Copy the shipped configurations to ``folder/configs``, where commands that are run in ``folder`` find them.

    Args:
        folder: Made if it does not exist.

    Returns:
        The path of the copy.

    Raises:
        ConfigError: If ``folder/configs`` exists, of which nothing is changed, or cannot be written.
    """
    target = Path(folder) / CONFIGS
    if target.exists():
        raise ConfigError(
            f"{target} exists, and nothing was changed. Give another folder, or move {target} away first."
        )
    try:
        shutil.copytree(configurations(), target)
    except OSError as error:
        raise ConfigError(
            f"The configurations cannot be copied to {target}: {error}. Give a folder to write to."
        ) from error
    return target


def how_to_copy(path: str | Path) -> str:
    """A sentence, after a space, for a file that is not there but is among the shipped ones; else empty."""
    parts = Path(path).parts
    if CONFIGS not in parts:
        return ""
    inner = Path(*parts[parts.index(CONFIGS) + 1 :])
    if not (configurations() / inner).is_file():
        return ""
    return (
        f" The package brings it: lightning-tta init copies all configurations into the current folder, as {CONFIGS}/."
    )
