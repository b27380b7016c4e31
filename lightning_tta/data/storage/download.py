"""Downloads on request: resumed, compared with their checksum, unpacked inside their folder only."""

import hashlib
import http.client
import tarfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lightning_tta.errors import DataError

_BLOCK = 2**20
_ATTEMPTS = 5


@dataclass(frozen=True)
class Remote:
    """A file to download.

    Attributes:
        url: Where it is.
        name: What it is called here.
        size: Bytes; ``None`` where nobody published it.
        checksum: ``md5:...`` or ``sha256:...``.
    """

    url: str
    name: str
    size: int | None
    checksum: str


def fetch(remote: Remote, folder: Path, *, pause: float = 2.0) -> Path:
    """Download a file, or finish a download that was cut off; a file that is there and right is not fetched again.

    Args:
        remote: The file.
        folder: Where it goes; made if it does not exist.
        pause: Seconds before another attempt after a lost connection.

    Returns:
        The file's path.

    Raises:
        DataError: If the server sends something else, or the checksum does not fit.
    """
    path = folder / remote.name
    if path.is_file():
        _verify(path, remote, path)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{remote.name}.partial")
    problem: Exception | None = None
    columns = (TextColumn(remote.name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(remote.name, total=remote.size)
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(pause)
            try:
                done = _continue(remote, partial, lambda count: progress.update(task, completed=count))
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
                if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                    raise DataError(
                        f"{remote.url}: the server answers {error.code} {error.reason}. The file may have moved: fetch "
                        f"it by hand to {path}."
                    ) from error
                problem = error
                continue
            if done:
                break
        else:
            have = partial.stat().st_size if partial.exists() else 0
            raise DataError(
                f"{remote.url}: the connection was lost {_ATTEMPTS} times ({problem or 'it ended early'}); "
                f"{have:,} of {remote.size or 'unknown'} bytes are in {partial}. Run again to go on from there."
            )
    _verify(partial, remote, path)
    partial.replace(path)
    return path


def _continue(remote: Remote, partial: Path, advance: object) -> bool:
    """Append what is missing; whether the file is complete now."""
    have = partial.stat().st_size if partial.exists() else 0
    if remote.size is not None and have >= remote.size:
        return True
    request = urllib.request.Request(remote.url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        if have and answer.status != 206:  # the server starts anew
            have = 0
        length = answer.headers.get("Content-Length")
        expected = remote.size if remote.size is not None else (have + int(length) if length else None)
        with partial.open("ab" if have else "wb") as file:
            while block := answer.read(_BLOCK):
                if not have and _is_page(block):
                    file.close()
                    partial.unlink()
                    raise DataError(
                        f"{remote.url}: the server sends a web page instead of {remote.name} (a login, an error or a "
                        "confirmation). Open the address in a browser and fetch the file by hand."
                    )
                file.write(block)
                have += len(block)
                advance(have)  # type: ignore[operator]
    return expected is None or have >= expected


def _is_page(block: bytes) -> bool:
    return block.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html"))


def _verify(found: Path, remote: Remote, path: Path) -> None:
    size = found.stat().st_size
    if _is_page(found.open("rb").read(64)):
        raise DataError(f"{found} is a web page, not {remote.name}. Remove it and fetch {remote.url} again.")
    if remote.size is not None and size != remote.size:
        kind = "cut short" if size < remote.size else "too long"
        raise DataError(f"{found} is {kind}: {size:,} bytes, expected {remote.size:,}. Remove it and fetch it again.")
    kind, _, wanted = remote.checksum.partition(":")
    with found.open("rb") as file:
        given = hashlib.file_digest(file, kind).hexdigest()
    if given != wanted:
        if found != path:
            found.unlink()
        raise DataError(
            f"{remote.name} from {remote.url} has the {kind} {given}, expected {wanted}: it is damaged or another "
            f"version, and is not used.{' Remove ' + str(path) + ' to fetch it again.' if found == path else ''}"
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar file; members that would leave ``folder``, links out of it and devices are refused.

    Raises:
        DataError: If it is damaged, or tries to write elsewhere.
    """
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except tarfile.FilterError as error:
        raise DataError(f"{archive} tries to write outside {folder} ({error}) and is not unpacked.") from error
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive} cannot be unpacked ({error}). Remove it and fetch it again.") from error
