"""Files and folders that must be there: the message names what is expected where."""

from pathlib import Path

from lightning_tta.errors import DataError


def check_file(path: Path, expected: str) -> None:
    """Raise :class:`DataError` unless ``path`` is a file."""
    if not path.is_file():
        raise DataError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}. Expected {expected}.")


def check_folder(path: Path, layout: str = "<class>/<image files>") -> None:
    """Raise :class:`DataError` unless ``path`` is a folder; ``layout`` says what is expected in it."""
    if not path.is_dir():
        state = "is a file" if path.is_file() else "does not exist"
        raise DataError(f"The folder {path} {state}. Expected {path}/{layout}.")
