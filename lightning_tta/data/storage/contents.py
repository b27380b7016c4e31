"""What is in files, for the digest of a data set: read once, then known as long as a file does not change."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_tta.files import write_whole
from lightning_tta.progress import with_progress

LIMIT = 100_000
"""Of more files in one domain, only so many, evenly spaced, are read; of the others the name and the size count."""
UNREADABLE = "unreadable"
_FRESH = 2.0  # seconds: a file changed so shortly ago may change again without showing it


def content_lines(domain: str, paths: Sequence[Path], root: Path, cache: Path | None) -> Iterator[bytes]:
    """What a digest says of files: the domain, the name below ``root``, the size in bytes and the contents of each.

    ``cache`` is a folder that keeps the hashes of files by place, size, times and inode.
    """
    every = -(-len(paths) // LIMIT)
    hashes = dict(zip(paths[::every], content_hashes(paths[::every], root, cache), strict=True)) if paths else {}
    for path in paths:
        try:
            size = path.stat().st_size
        except OSError:
            size = -1
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        yield os.fsencode(f"{domain}|{name}|{size}|{hashes.get(path, '')}\n")


def content_hashes(paths: Sequence[Path], root: Path, cache: Path | None) -> list[str]:
    """SHA-256, 32 hexadecimal digits, of the bytes of each file; :data:`UNREADABLE` where there are none to read."""
    place = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:24]
    store = None if cache is None else cache / f"contents-{place}.json"
    known = {} if store is None else _load(store)
    stamps = [_stamp(path) for path in paths]
    names = [os.fsencode(path).hex() if not str(path).isascii() else str(path) for path in paths]
    hashes = [
        known[name][1] if name in known and known[name][0] == stamp else None
        for name, stamp in zip(names, stamps, strict=True)
    ]
    missing = [number for number, value in enumerate(hashes) if value is None]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        results = pool.map(_hash, (paths[number] for number in missing))
        for n, value in zip(with_progress(len(missing), "Reading files for the digest"), results, strict=True):
            hashes[missing[n]] = value
    now = time.time()
    fresh = [n for n in missing if (stamp := stamps[n]) and max(stamp[1:3]) / 1e9 < now - _FRESH]
    if store is not None and fresh:
        known |= {names[n]: [stamps[n], hashes[n]] for n in fresh}
        with suppress(OSError):  # it only saves time
            store.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(known).encode()
            write_whole(store, lambda file: file.write(text))
    return [str(value) for value in hashes]


def _stamp(path: Path) -> list[int] | None:
    """Size, times and inode of a file: others after any change to it."""
    try:
        state = path.stat()
    except OSError:
        return None
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def _load(store: Path) -> dict[str, Any]:
    try:
        content = json.loads(store.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and all(map(_is_entry, content.values())) else {}


def _is_entry(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)


def _hash(path: Path) -> str:
    if not path.is_file():  # a folder, a broken link, or a pipe, which would never end
        return UNREADABLE
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError:
        return UNREADABLE
