"""Downloads on request: what is where; resumed, compared with its checksum, unpacked inside its folder only."""

import errno
import hashlib
import http.client
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from rich.progress import wrap_file

from lightning_tta.errors import ConfigError, DataError

_BLOCK = 2**20  # bytes
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


@dataclass(frozen=True)
class Remote:
    """A file to download."""

    url: str
    size: int | None  # bytes; None where nobody published it
    checksum: str  # md5:... or sha256:...

    @property
    def name(self) -> str:
        """The file's name in the address."""
        return self.url.rpartition("/")[2].partition("?")[0]


_ZENODO, _BERKELEY = "https://zenodo.org/records", "https://people.eecs.berkeley.edu/~hendrycks"
CIFAR_C = {
    "cifar10": Remote(
        f"{_ZENODO}/2535967/files/CIFAR-10-C.tar?download=1", 2_918_471_680, "md5:56bf5dcef84df0e2308c6dcbcbbd8499"
    ),
    "cifar100": Remote(
        f"{_ZENODO}/3555552/files/CIFAR-100-C.tar?download=1", 2_918_473_216, "md5:11f0ed0f1191edbf9fa23466ae6021d3"
    ),
}
IMAGENET = {
    "imagenet_a": Remote(f"{_BERKELEY}/imagenet-a.tar", 687_552_512, "md5:c3e55429088dc681f30d81f4726b6595"),
    "imagenet_r": Remote(f"{_BERKELEY}/imagenet-r.tar", 2_191_079_936, "md5:a61312130a589d0ca1a8fca1f2bd3337"),
    "imagenet_v2": Remote(
        "https://huggingface.co/datasets/vaishaal/ImageNetV2/resolve/main/imagenetv2-matched-frequency.tar.gz",
        1_264_079_360,
        "sha256:f0c37fdf925916b19ea1323cd9a2208cdb6959ba2c32eef2a7fc393835c9ca7c",
    ),
}
_GROUPS = {
    "blur": (("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"), "2d8e81fdd8e07fef67b9334fa635e45c"),
    "digital": (("contrast", "elastic_transform", "pixelate", "jpeg_compression"), "89157860d7b10d5797849337ca2e5c03"),
    "extra": (("speckle_noise", "gaussian_blur", "spatter", "saturate"), "d492dfba5fc162d8ec2c3cd8ee672984"),
    "noise": (("gaussian_noise", "shot_noise", "impulse_noise"), "e80562d7f6c3f8834afb1ecf27252745"),
    "weather": (("snow", "frost", "fog", "brightness"), "33ffea4db4d93fe4a428c40a6ce0c25d"),
}
IMAGENET_C = {
    corruption: Remote(f"{_ZENODO}/2235448/files/{group}.tar?download=1", None, f"md5:{checksum}")
    for group, (corruptions, checksum) in _GROUPS.items()
    for corruption in corruptions
}


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
    problem: object = "it ended early"
    try:
        complete = _resume(remote, partial)
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        if isinstance(error, urllib.error.HTTPError) and error.code < 500:
            message = f"{remote.url}: the server answers {error.code} {error.reason}. Fetch the file by hand to {path}."
            raise DataError(message) from error
        complete, problem = False, error
    if not complete and not _is_page(partial):
        raise DataError(
            f"{remote.url}: the connection was lost ({problem}); {_size(partial):,} of {remote.size or 'unknown'} "
            f"bytes are in {partial}. Run again to go on from there."
        )
    try:
        _verify(partial, remote)
    except DataError:
        partial.unlink()
        raise
    return partial.replace(path)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_page(path: Path) -> bool:
    """Whether a file begins as a web page does."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return file.read(64).lstrip().lower().startswith((b"<!doctype html", b"<html"))


def _resume(remote: Remote, partial: Path) -> bool:
    """Append what is missing; whether the file is complete now."""
    start = _size(partial)
    if remote.size is not None and start >= remote.size:
        return True
    request = urllib.request.Request(remote.url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        start = start if answer.status == 206 else 0  # else the server sends the whole file
        length = int(answer.headers.get("Content-Length") or 0)
        expected = remote.size or (start + length)
        rest = max(0, expected - start)
        shown = wrap_file(answer, rest, description=remote.name, console=Console(stderr=True))
        with shown as content, partial.open("ab" if start else "wb") as file:
            shutil.copyfileobj(content, file, _BLOCK)
    return _size(partial) >= expected


def _verify(file: Path, remote: Remote) -> None:
    if _is_page(file):
        raise DataError(
            f"{remote.url} is a web page instead of {remote.name} (a login, an error or a confirmation). Open the "
            "address in a browser and fetch the file by hand; remove the page if it was saved under that name."
        )
    kind, _, wanted = remote.checksum.partition(":")
    with file.open("rb") as content:
        checksum = hashlib.file_digest(content, kind).hexdigest()
    if checksum != wanted:
        size = f"{_size(file):,} bytes" + (f", expected {remote.size:,}" if remote.size else "")
        raise DataError(
            f"{file} from {remote.url} has the {kind} {checksum}, expected {wanted} ({size}): it is damaged or another "
            "version, and is not used. Remove it if it is still there, and run again."
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar file, aside first: what is in ``folder`` under its own name is whole.

    Members that would leave ``folder``, links out of it and devices are refused.

    Raises:
        DataError: If it cannot be unpacked, or there is no room.
    """
    aside = folder / f".{archive.name}.unpacking"
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
        with tarfile.open(archive) as tar:
            tar.extractall(aside, filter="data")
        for entry in sorted(aside.iterdir()):
            _move(entry, folder / entry.name)
    except tarfile.FilterError as error:
        raise DataError(f"{archive} tries to write outside {folder} ({error}) and is not unpacked.") from error
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise DataError(
                f"{archive} cannot be unpacked into {folder}: {error.strerror}. Make room there."
            ) from error
        raise DataError(f"{archive} cannot be unpacked ({error}). Remove it and fetch it again.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _move(entry: Path, target: Path) -> None:
    """Put a file or folder in its place; folders that are there already are completed."""
    if entry.is_dir() and not entry.is_symlink() and target.is_dir():
        for inner in sorted(entry.iterdir()):
            _move(inner, target / inner.name)
    else:
        entry.replace(target)


@contextmanager
def alone(folder: Path, name: str) -> Iterator[None]:
    """Let one process at a time fetch into a folder; the others wait.

    Raises:
        DataError: If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f".{name}.lock")
        lock.acquire()
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror}). Name another folder for the data.") from error
    try:
        yield
    finally:
        lock.release()


def fetch_and_unpack(remote: Remote, folder: Path, done: Callable[[], bool]) -> None:
    """Download an archive and unpack it into ``folder``, unless ``done``; one process at a time."""
    if done():
        return
    with alone(folder, remote.name):
        if not done():
            unpack(fetch(remote, folder), folder)


def fetch_imagenet(name: str, folder: Path) -> None:
    """Put ImageNet-A, -R or -V2 into ``folder``, unless that is there."""
    if folder.is_dir():
        return
    if name not in IMAGENET:
        raise ConfigError(f"--data.download knows {', '.join(IMAGENET)}; fetch {name!r} by hand into {folder}.")
    with alone(folder.parent, IMAGENET[name].name):
        if folder.is_dir():  # another process was faster
            return
        archive = fetch(IMAGENET[name], folder.parent)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        unpack(archive, partial)
        inner = [entry for entry in partial.iterdir() if entry.is_dir()]
        if len(inner) != 1:
            raise DataError(f"{archive} unpacks to {len(inner)} folders, expected one of class folders. See {partial}.")
        inner[0].replace(folder)
        shutil.rmtree(partial)
