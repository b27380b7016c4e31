"""Downloads on request: resumed, compared with their checksum, unpacked inside their folder only."""

import hashlib
import http.client
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lightning_tta.errors import DataError

_BLOCK = 2**20  # bytes


@dataclass(frozen=True)
class Remote:
    """A file to download.

    Attributes:
        url: Where it is.
        size: Bytes; ``None`` where nobody published it.
        checksum: ``md5:...`` or ``sha256:...``.
    """

    url: str
    size: int | None
    checksum: str

    @property
    def name(self) -> str:
        """The file's name in the address."""
        return self.url.rpartition("/")[2].partition("?")[0]


def fetch(remote: Remote, folder: Path) -> Path:
    """Download a file, or finish a download that was cut off; a file that is there and right is not fetched again.

    Raises:
        DataError: If the connection is lost, the server sends something else, or the checksum does not fit.
    """
    path = folder / remote.name
    if path.is_file():
        _verify(path, remote)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{remote.name}.partial")
    columns = (TextColumn(remote.name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(remote.name, total=remote.size)
        problem: object = "it ended early"
        try:
            complete = _resume(remote, partial, lambda count: progress.update(task, completed=count))
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                raise DataError(
                    f"{remote.url}: the server answers {error.code} {error.reason}. The file may have moved: fetch it "
                    f"by hand to {path}."
                ) from error
            complete, problem = False, error
    if not complete:
        raise DataError(
            f"{remote.url}: the connection was lost ({problem}); {_bytes_of(partial):,} of {remote.size or 'unknown'} "
            f"bytes are in {partial}. Run again to go on from there."
        )
    try:
        _verify(partial, remote)
    except DataError:
        partial.unlink()
        raise
    return partial.replace(path)


def _bytes_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _resume(remote: Remote, partial: Path, show: Callable[[int], None]) -> bool:
    """Append what is missing; whether the file is complete now."""
    start = _bytes_of(partial)
    if remote.size is not None and start >= remote.size:
        return True
    request = urllib.request.Request(remote.url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        if answer.status != 206:  # the server sends the whole file
            start = 0
        length = answer.headers.get("Content-Length")
        expected = remote.size or (start + int(length) if length else None)
        end, block = start, answer.read(_BLOCK)
        if not start:
            _refuse_page(block, remote)
        with partial.open("ab" if start else "wb") as file:
            while block:
                file.write(block)
                end += len(block)
                show(end)
                block = answer.read(_BLOCK)
    return expected is None or end >= expected


def _refuse_page(beginning: bytes, remote: Remote) -> None:
    if beginning.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        raise DataError(
            f"{remote.url} is a web page instead of {remote.name} (a login, an error or a confirmation). Open the "
            "address in a browser and fetch the file by hand; remove the page if it was saved under that name."
        )


def _verify(file: Path, remote: Remote) -> None:
    kind, _, wanted = remote.checksum.partition(":")
    with file.open("rb") as content:
        _refuse_page(content.read(64), remote)
        content.seek(0)
        checksum = hashlib.file_digest(content, kind).hexdigest()
    if checksum != wanted:
        size = f"{_bytes_of(file):,} bytes" + (f", expected {remote.size:,}" if remote.size else "")
        raise DataError(
            f"{file} from {remote.url} has the {kind} {checksum}, expected {wanted} ({size}): it is damaged or another "
            "version, and is not used. Remove it if it is still there, and run again."
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar file; members that would leave ``folder``, links out of it and devices are refused."""
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except tarfile.FilterError as error:
        raise DataError(f"{archive} tries to write outside {folder} ({error}) and is not unpacked.") from error
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive} cannot be unpacked ({error}). Remove it and fetch it again.") from error
