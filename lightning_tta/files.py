"""What every run writes the same way: whole JSON files, versions and hardware."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Trainer

from lightning_tta._version import __version__

_MARK = b"CRC-32: "


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions and hardware of this run; ``device``: the CPU by default."""
    import lightning
    import torch
    import torchvision

    gpu = torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else None
    return {
        "lightning_tta": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
    }


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all, also when the process or the machine stops: ``write`` gets a temporary one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file that holds a mapping; ``None`` if there is none, or it is damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


class _Summed:
    """A file that takes what is written to it one after the other, and its CRC-32."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.value = file, 0

    def write(self, block: bytes) -> int:
        self.value = zlib.crc32(block, self.value)
        return self.file.write(block)

    def flush(self) -> None:
        self.file.flush()


def save_summed(value: Any, file: IO[bytes]) -> None:
    """``torch.save``, with the checksum of the whole file behind the archive: readers of archives do not mind.

    The checksums inside an archive are of its entries; where they begin is not covered.
    """
    import torch

    summed = _Summed(file)
    torch.save(value, summed)  # type: ignore[arg-type]  # it needs no more than to write
    file.write(_MARK + f"{summed.value:08x}".encode())


def is_whole_archive(path: Path) -> bool:
    """Whether what ``torch.save`` has written is as it was written.

    By the checksum at its end (:func:`save_summed`), else by those (CRC-32) of the archive's entries.
    """
    try:
        size, value, tail = path.stat().st_size, 0, len(_MARK) + 8
        with path.open("rb") as file:
            file.seek(max(size - tail, 0))
            mark = file.read()
            if mark.startswith(_MARK):
                file.seek(0)
                while block := file.read(min(2**20, size - tail - file.tell())):
                    value = zlib.crc32(block, value)
                return mark == _MARK + f"{value:08x}".encode()
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return False


def json_digest(values: Mapping[str, Any]) -> str:
    """First 12 hexadecimal digits of the SHA-256 of the values as canonical JSON."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def own_file(trainer: Trainer, path: Path) -> Path:
    """Where this process writes what others write too: ``name.rank0.csv``; alone ``name.csv``."""
    return path if trainer.world_size == 1 else of_process(path, trainer.global_rank)


def of_process(path: Path, rank: int) -> Path:
    """The same of one of several processes."""
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def of_all(path: Path) -> list[Path]:
    """What is there under this name: of a process alone, then of each of several."""
    several = path.parent.glob(f"{path.stem}.rank*{path.suffix}")
    return [path] * path.exists() + sorted(several, key=lambda file: (len(file.name), file.name))
