"""The example server: concurrent clients on the loopback, all its pages, its errors, and its command."""

import io
import json
import os
import signal
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from threading import Thread
from threading import enumerate as enumerate_threads

import numpy as np
import pytest
import torch
from PIL import Image
from test_prometheus import parse

from lightning_tta import Backbone, DataError, Shadow
from lightning_tta.serving import server as module
from lightning_tta.serving.server import Handler, Server, decode
from nets import make_images, make_net

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def serving(**options):
    with Shadow(make_net("gn"), "tent", monitors=[], **{"max_wait_ms": 1, **options}) as shadow:
        with Server(shadow, class_names=[*"abcde"]) as server:
            thread = Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield server
            finally:
                server.shutdown()
                thread.join()


def ask(server, path, body=None, connection=None, **headers):
    """Status, type and content of an answer."""
    connection = connection or HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("GET" if body is None else "POST", path, body, headers)
    response = connection.getresponse()
    content, kind = response.read(), response.getheader("Content-Type")
    return response.status, json.loads(content) if kind == "application/json" else content.decode()


def as_array(images):
    body = io.BytesIO()
    np.save(body, np.asarray(images))
    return body.getvalue()


def as_file(image, kind="PNG"):
    body = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(body, kind)
    return body.getvalue()


def that_claims(side):
    """A PNG file of few bytes whose header says that it is large."""
    body = as_file(torch.zeros(3, 1, 1, dtype=torch.uint8))
    header = b"IHDR" + struct.pack(">II", side, side) + body[24:29]
    return body[:12] + header + struct.pack(">I", zlib.crc32(header)) + body[33:]


def test_concurrent_clients_each_get_their_own_answer():
    net, images = make_net("gn"), make_images(64)
    expected = net(images).softmax(1)
    with serving() as server:

        def client(first):
            connection = HTTPConnection("127.0.0.1", server.server_port, timeout=60)  # kept open
            return [ask(server, "/predict", as_array(images[n]), connection) for n in range(first, 64, 8)]

        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(client, range(8)))
        ids = set()
        for first, of_client in enumerate(answers):
            for (status, content), n in zip(of_client, range(first, 64, 8), strict=True):
                assert status == 200
                assert torch.allclose(torch.tensor(content["probabilities"]), expected[n : n + 1], atol=1e-5)
                assert content["classes"] == [int(expected[n].argmax())]
                assert content["names"] == ["abcde"[int(expected[n].argmax())]]
                assert content["by"] == "source"
                ids.update(content["ids"])
        assert len(ids) == 64
        status, told = ask(server, "/labels", json.dumps({"ids": [*ids][:5], "labels": [0] * 5}))
        assert (status, told) == (200, {"known": 5})
        status, text = ask(server, "/metrics")
        families = parse(text)
        assert families["lightning_tta_images_total"][2]["lightning_tta_images_total", (("by", "source"),)] == 64
        assert families["lightning_tta_labels_total"][2]["lightning_tta_labels_total", ()] == 5
        healthy = {"answering": "source", "stopped": False, "closed": False}
        assert ask(server, "/healthz") == (200, healthy)


def test_images_come_as_files_and_arrays():
    pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    expected = make_net("gn")(pixels[None] / 255).softmax(1)
    with serving() as server:
        big_endian = as_array((pixels / 255).numpy().astype(">f4"))
        arrays = as_array(pixels), as_array(pixels[None] / 255), as_array(pixels / 255), big_endian
        for body in (as_file(pixels), *arrays):
            status, content = ask(server, "/predict?from=here", body)
            assert status == 200
            assert torch.allclose(torch.tensor(content["probabilities"]), expected, atol=1e-5)
        assert ask(server, "/predict", as_file(pixels, "JPEG"))[0] == 200
    assert decode(as_file(pixels), channels=1).shape == (1, 1, 16, 16)


def test_errors():
    with serving(max_batch=4) as server:
        for body, words in (
            (b"no image", "Cannot read the image"),
            (as_file(torch.zeros(3, 16, 16, dtype=torch.uint8))[:45], "Cannot read the image"),
            (as_array(np.array([{}], dtype=object)), "The array cannot be read"),
            (as_array(np.array(["text"])), "The array cannot be read"),
            (as_array(make_images(1))[:90], "The array cannot be read"),
            (b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr'".ljust(118), "The array cannot be read"),
            (as_array(np.zeros((3, 16, 16), np.uint16)), "An array of uint16"),
            (as_array(np.zeros((3, 16, 16), np.int64)), "An array of int64"),
            (that_claims(9500), "The image has 9500x9500 pixels"),
            (as_array(np.full((3, 16, 16), np.nan, dtype=np.float32)), "not finite"),
            (as_array(np.full((3, 16, 16), 200.0, dtype=np.float32)), "must be in [0, 1]"),
            (as_array(make_images(5)), "max_batch=4"),
            (as_array(make_images(1)[:, :1]), "cannot take"),
            (b"", "Cannot read the image"),
        ):
            status, content = ask(server, "/predict", body)
            assert status == 400, content
            assert words in content["error"]
            assert "/tmp" not in content["error"]
        for body in (b"{", b"[]", b'{"ids": ["a"]}', b'{"ids": ["a"], "labels": [0.5]}', b'{"ids": 3, "labels": [0]}'):
            assert ask(server, "/labels", body)[0] == 400
        for body in (b"[" * 100_000, b'{"ids": "a", "labels": [0]}', b'{"ids": ["a"], "labels": [5]}'):
            ask(server, "/predict", as_array(make_images(1)))  # so that it knows how many classes there are
            assert ask(server, "/labels", body)[0] == 400
        assert ask(server, "/none")[0] == ask(server, "/none", b"")[0] == 404
        assert ask(server, "/predict", b"", **{"Content-Length": str(2**40)})[0] == 413
        assert ask(server, "/predict", b"", **{"Content-Length": "-3"})[0] == 411
        assert ask(server, "/predict", as_array(make_images(1)))[0] == 200
        server.shadow.close()
        assert ask(server, "/healthz")[0] == ask(server, "/predict", as_array(make_images(1)))[0] == 503


def test_clients_that_go_away_or_say_nothing(capfd):
    """In the request's line, its head or its body, with and without a reset: no word on stderr, and others go on."""
    head = b"POST /predict HTTP/1.1\r\nContent-Length: 1000\r\n\r\n"
    with serving() as server:
        for sent in (b"", b"PO", head[:30], head, head + b"abc"):
            for reset in (False, True):
                with socket.create_connection(("127.0.0.1", server.server_port)) as client:
                    client.send(sent)
                    if reset:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Handler, "timeout", 0.1)
            with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as silent:
                with suppress(ConnectionError):  # the server has ended it, after all or before
                    silent.send(head + b"abc")
                    assert silent.recv(10) == b""
        assert ask(server, "/predict", as_array(make_images(1)))[0] == 200
        assert server.shadow._metrics.value("requests_total", result="answered") == 1
    assert capfd.readouterr().err == ""


def test_at_the_end_all_answers_are_sent(monkeypatch):
    """Also where sending takes longer than the shadow needs to close."""
    send, sent, statuses = Handler._send, [], []

    def slowly(self, status, *rest):
        time.sleep(0.2)
        send(self, status, *rest)
        sent.append(status)

    monkeypatch.setattr(Handler, "_send", slowly)
    with serving(max_wait_ms=60_000, max_batch=8) as server:  # until it is closed
        clients = [
            Thread(target=lambda: statuses.append(ask(server, "/predict", as_array(make_images(1)))[0]))
            for _ in range(4)
        ]
        for client in clients:
            client.start()
        while server.shadow._requests.images < 4:
            time.sleep(0.001)
        server.finish()
        assert sent == [200] * 4
        for client in clients:
            client.join()
    assert statuses == [200] * 4


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--method=tnet"], "mean tent?"),
        (["--directory=FILE"], "cannot be used"),
        (["--options={"], "invalid loads value"),
        (["--options=[1]"], "a JSON object"),
        (["--method=eata"], "must see source images before the first request"),
        (["--method=eata", "--source-images=FILE"], "numpy.savez"),
        (["--port=PORT"], "--port"),
    ],
)
def test_the_command_says_what_is_wrong(args, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(module, "load_source", lambda *given: make_net("gn"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, file = str(taken.getsockname()[1]), str(tmp_path / "file")
        with pytest.raises(SystemExit, match="2"):
            module.main(["--port=0", *(arg.replace("FILE", file).replace("PORT", port) for arg in args)])
    assert words in capsys.readouterr().err
    assert not [thread for thread in enumerate_threads() if thread.name.startswith("lightning_tta")]


def test_source_images_from_a_file(tmp_path):
    pixels, labels = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8), torch.arange(40) % 5
    np.savez(tmp_path / "source.npz", image=pixels.numpy(), label=labels.numpy())
    first, second = module.source_batches(str(tmp_path / "source.npz"))
    assert torch.equal(torch.cat([first["image"], second["image"]]), pixels / 255)
    assert torch.equal(torch.cat([first["label"], second["label"]]), labels)
    np.savez(tmp_path / "short.npz", image=pixels.numpy(), label=labels[:39].numpy())
    with pytest.raises(DataError, match="40 images and 39 labels"):
        module.source_batches(str(tmp_path / "short.npz"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_command(tmp_path, monkeypatch, capfd):
    """It serves until SIGTERM, then writes its state."""
    net = Backbone(make_net("gn"), [0.0], [1.0], in_chans=3, class_names=[*"abcde"])
    monkeypatch.setattr(module, "load_source", lambda *given: (print(given), net)[1])
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            args = ["--net=tiny", "--num-classes=5", "--method=tent", f"--directory={tmp_path}", "--port=0"]
            options = ["--options", '{"lr": 0.5, "monitors": []}']
            module.main([*args, *options], ready=lambda server: os.write(write, f"{server.server_port}\n".encode()))
        finally:
            os._exit(0)
    port = int(os.read(read, 20))
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    status, content = ask(None, "/predict", as_array(make_images(2)), connection)
    assert (status, len(content["names"])) == (200, 2)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert capfd.readouterr().out.startswith("(None, 'tiny', 5)\nhttp://127.0.0.1:")
    assert (tmp_path / "snapshot-000000001.pt").exists()
    with Shadow(make_net("gn"), "tent", monitors=[]) as fresh:  # no directory: nothing of it
        assert fresh.batches == 0
