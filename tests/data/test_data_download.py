"""Downloads from a small server on this machine: whole, cut off, refused, pages in place of files; unsafe archives."""

import hashlib
import io
import tarfile
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lightning_tta import DataError, ImageNetData
from lightning_tta.data.storage import download
from lightning_tta.data.storage.download import Remote, fetch, unpack
from lightning_tta.imagenet_classes import imagenet_synsets

CONTENT = bytes(range(256)) * 5000


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.content``; drops connections after ``server.limits`` bytes each, as long as there are limits."""

    def do_GET(self):
        server = self.server
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        server.starts.append(start)
        if server.down or self.path.startswith("/gone"):
            self.send_error(503 if server.down else 404)
            return
        start = start if server.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        end = start + server.limits.pop(0) if server.limits else len(server.content)
        self.wfile.write(server.content[start:end])
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.limits, server.starts, server.ranges = CONTENT, [], [], True
    server.down = False
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def remote(server, path="/file.tar?download=1", content=CONTENT, size=True, checksum=None):
    checksum = checksum or f"md5:{hashlib.md5(content).hexdigest()}"
    url = f"http://127.0.0.1:{server.server_address[1]}{path}"
    return Remote(url, len(content) if size else None, checksum)


@pytest.mark.parametrize("size", [True, False])
@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_a_file_comes_once(server, tmp_path, size, kind):
    wanted = remote(server, size=size, checksum=f"{kind}:{hashlib.new(kind, CONTENT).hexdigest()}")
    for _ in range(2):
        assert fetch(wanted, tmp_path / "new").read_bytes() == CONTENT
    assert server.starts == [0]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.tar"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_lost_connection_is_taken_up_again(server, tmp_path, ranges):
    server.limits, server.ranges = [300_000, 400_000], ranges
    for count in (300_000, 700_000 if ranges else 400_000):
        with pytest.raises(DataError, match=rf"{count:,} of 1280000 bytes are in .*partial\. Run again"):
            fetch(remote(server), tmp_path)
        assert (tmp_path / "file.tar.partial").read_bytes() == CONTENT[:count]
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.starts == ([0, 300_000, 700_000] if ranges else [0, 300_000, 400_000])
    assert [path.name for path in tmp_path.iterdir()] == ["file.tar"]


def test_a_server_that_is_down(server, tmp_path):
    server.down = True
    with pytest.raises(DataError, match=r"connection was lost \(HTTP Error 503.*0 of 1280000 bytes"):
        fetch(remote(server), tmp_path)


def test_a_page_in_place_of_an_archive(server, tmp_path):
    server.content = b"\n <!DOCTYPE html><html>please log in</html>"
    with pytest.raises(DataError, match="web page instead of file"):
        fetch(remote(server), tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file.tar").write_bytes(server.content)
    with pytest.raises(DataError, match="web page instead of file"):
        fetch(remote(server), tmp_path)


def test_another_checksum_or_size(server, tmp_path):
    with pytest.raises(DataError, match=r"has the md5 .*, expected 0000"):
        fetch(remote(server, checksum="md5:0000"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file.tar").write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match=r"1,279,999 bytes, expected 1,280,000\): it is damaged"):
        fetch(remote(server), tmp_path)


def test_a_file_that_moved(server, tmp_path):
    with pytest.raises(DataError, match=r"404.*by hand"):
        fetch(remote(server, "/gone/file.tar"), tmp_path)
    assert len(server.starts) == 1


def make_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
            else:
                entry.type, entry.linkname = tarfile.SYMTYPE, content
                tar.addfile(entry)
    return path


@pytest.mark.parametrize("members", [{"../evil": b"x"}, {"link": "/etc"}, {"up": "../.."}], ids=str)
def test_archives_stay_in_their_folder(tmp_path, members):
    archive = make_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match="write outside"):
        unpack(archive, tmp_path / "inside")
    assert not (tmp_path / "evil").exists()


def test_what_has_its_own_name_is_whole(tmp_path, monkeypatch):
    """Killed while it unpacks, the same command unpacks again, and no half of a set is taken for all of it."""
    archive = make_tar(tmp_path / "a.tar", {f"set/{n}.txt": b"new" for n in range(6)})
    extract = tarfile.TarFile.extractall

    def killed(tar, path, **options):
        extract(tar, path, members=tar.getmembers()[:2], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(tarfile.TarFile, "extractall", killed)
    with pytest.raises(KeyboardInterrupt):
        unpack(archive, tmp_path / "data")
    assert not (tmp_path / "data" / "set").exists()
    monkeypatch.undo()
    (tmp_path / "data" / "set").mkdir()
    (tmp_path / "data" / "set" / "0.txt").write_text("old")  # a half from elsewhere is completed
    unpack(archive, tmp_path / "data")
    assert [path.read_text() for path in sorted((tmp_path / "data").rglob("*.txt"))] == ["new"] * 6
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["set"]


def test_two_that_fetch_at_once_fetch_once(tmp_path, monkeypatch):
    fetched, wanted = [], remote_of_nothing()

    def slow(remote, folder):
        fetched.append(remote)
        time.sleep(0.2)
        return make_tar(folder / "a.tar", {"set/0.txt": b"x"})

    monkeypatch.setattr(download, "fetch", slow)
    folder = tmp_path / "data"
    done = (folder / "set").is_dir
    threads = [threading.Thread(target=download.fetch_and_unpack, args=(wanted, folder, done)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        download.fetch_and_unpack(wanted, tmp_path / "file" / "below", lambda: False)


def remote_of_nothing():
    return Remote("http://localhost/a.tar", 1, "md5:0")


def test_a_damaged_archive(tmp_path):
    archive = tmp_path / "a.tar"
    archive.write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(archive, tmp_path / "inside")


def png():
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (40, 40), (9, 9, 9)).save(file, "png")
    return file.getvalue()


def test_imagenet_sets_on_request(server, tmp_path, monkeypatch):
    synset = imagenet_synsets()[6]
    server.content = make_tar(tmp_path / "a.tar", {f"imagenet-a/{synset}/x.png": png()}).read_bytes()
    monkeypatch.setitem(download.IMAGENET, "imagenet_a", remote(server, content=server.content))
    folder = tmp_path / "data" / "mine"
    with pytest.raises(DataError, match="does not exist"):
        ImageNetData({"imagenet_a": str(folder)})
    data = ImageNetData({"imagenet_a": str(folder)}, download=True, resize=40, image_size=32)
    assert not server.starts
    data.prepare_data()
    data.prepare_data()
    assert len(server.starts) == 1
    (batch,) = data.predict_dataloader()
    assert batch["label"].tolist() == [6]


def test_imagenet_c_on_request(server, tmp_path, monkeypatch):
    synset = imagenet_synsets()[3]
    members = {f"fog/{level}/{synset}/x.png": png() for level in (1, 5)}
    server.content = make_tar(tmp_path / "weather.tar", members).read_bytes()
    monkeypatch.setitem(download.IMAGENET_C, "fog", remote(server, content=server.content))
    options = {"corrupted": str(tmp_path / "c"), "function_set": "published", "image_size": 32}
    data = ImageNetData(domains=["fog"], severity=5, download=True, **options)
    data.prepare_data()
    (batch,) = data.predict_dataloader()
    assert batch["label"].tolist() == [3]
    with pytest.raises(DataError, match=r"fog.3 does not exist"):
        ImageNetData(domains=["fog"], severity=3, **options)
