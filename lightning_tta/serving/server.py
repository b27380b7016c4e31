"""An example server around a shadow: HTTP by the standard library alone.

::

    python -m lightning_tta.serving.server --source-ckpt runs/digits/source --method tent --directory runs/serving
    curl --data-binary @image.png http://127.0.0.1:8000/predict

``POST /predict``: a PNG or JPEG file, or an array by ``numpy.save``: (C, H, W) or (B, C, H, W), uint8 or floats in
[0, 1]. No image is resized: send the size of the net. ``POST /labels``: JSON ``{"ids": [...], "labels": [...]}``.
``GET /metrics``, ``GET /healthz``.
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_tta.backbones import Backbone
from lightning_tta.data.reading import read_image
from lightning_tta.errors import (
    AnswerTimeoutError,
    ClosedError,
    DataError,
    InputError,
    LightningTTAError,
    NotPreparedError,
    QueueFullError,
    in_one_line,
)
from lightning_tta.modules.loading import load_source
from lightning_tta.serving.prometheus import CONTENT_TYPE
from lightning_tta.serving.shadow import Shadow

STATUS: dict[type[Exception], int] = {
    **dict.fromkeys((QueueFullError, ClosedError, NotPreparedError), 503),
    AnswerTimeoutError: 504,
    LightningTTAError: 400,
}
"""By the first class that an error is of; any other is 500."""
MAX_BYTES = 64 * 2**20
"""Of a request's body."""
PATIENCE = 30.0
"""Seconds that a client may be silent in the middle of a request; and that the server waits for clients at its end."""


def decode(body: bytes, channels: int = 3) -> Tensor:
    """Images (B, C, H, W) in [0, 1] from the body of a request.

    Raises:
        InputError: If it is neither an array nor an image file, or is damaged.
    """
    if not body.startswith(b"\x93NUMPY"):
        with tempfile.NamedTemporaryFile(suffix=".image") as file:
            file.write(body)
            file.flush()
            try:
                return read_image(Path(file.name), channels)[None].float() / 255
            except DataError as error:
                raise InputError(str(error).replace(f" {file.name}", "").replace(file.name, "The image")) from None
    try:
        array = np.load(io.BytesIO(body), allow_pickle=False)
        images = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    except Exception as error:  # a damaged header makes NumPy raise what it likes
        raise InputError(f"The array cannot be read: {in_one_line(error)}. Send what numpy.save has written.") from None
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise InputError(f"An array of {array.dtype}: send uint8 from 0 to 255, or floats from 0 to 1.")
    images = images / 255 if images.dtype == torch.uint8 else images
    return images[None] if images.ndim == 3 else images


def source_batches(path: str, size: int = 32) -> list[dict[str, Tensor]]:
    """Batches from a file of ``numpy.savez(path, image=..., label=...)``.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with np.load(path) as file:
            images, labels = torch.from_numpy(file["image"]), torch.from_numpy(file["label"]).long()
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images and {len(labels)} labels")
    except Exception as error:
        raise DataError(
            f"{path}: {in_one_line(error)}. Write it by numpy.savez(path, image=images, label=labels), with images "
            "(N, C, H, W), uint8 or in [0, 1], and labels (N,)."
        ) from None
    images = images / 255 if images.dtype == torch.uint8 else images.float()
    return [{"image": x, "label": y} for x, y in zip(torch.split(images, size), torch.split(labels, size), strict=True)]


class Handler(BaseHTTPRequestHandler):
    """One request; each connection has a thread."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else small answers wait for the client's acknowledgement, 40 ms
    server: Server
    timeout = PATIENCE

    def do_GET(self) -> None:
        """``/metrics`` and ``/healthz``."""
        shadow, path = self.server.shadow, self.path.partition("?")[0]
        if path == "/metrics":
            self._send(200, shadow.metrics().encode(), CONTENT_TYPE)
        elif path == "/healthz":
            state = {"answering": shadow.answering, "stopped": shadow.stopped, "closed": shadow.closed}
            self._send_json(503 if shadow.closed else 200, state)
        else:
            self._send_json(404, {"error": f"{path} is not there. GET /metrics, /healthz; POST /predict, /labels."})

    def do_POST(self) -> None:
        """``/predict`` and ``/labels``."""
        act = {"/predict": self._predict, "/labels": self._tell}.get(self.path.partition("?")[0])
        length = self.headers.get("Content-Length", "")
        if act is None or not length.isdecimal() or int(length) > MAX_BYTES:
            self.close_connection = True  # the body was not read
            status = 404 if act is None else 413 if length.isdecimal() else 411
            self._send_json(status, {"error": f"POST /predict or /labels, with a Content-Length up to {MAX_BYTES}."})
            return
        with self.server.busy():
            body = self.rfile.read(int(length))
            if len(body) < int(length):
                raise ConnectionResetError("the client has gone in the middle of its request")
            try:
                status, content = 200, act(body)
            except Exception as error:
                status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
                content = {"error": str(error) if status != 500 else type(error).__name__}
            self._send_json(status, content)

    def _predict(self, body: bytes) -> dict[str, Any]:
        answer = self.server.shadow.answer(decode(body, self.server.channels))
        probabilities, classes = answer.logits.softmax(1), answer.logits.argmax(1).tolist()
        result = {"ids": answer.ids, "classes": classes, "by": answer.by, "probabilities": probabilities.tolist()}
        names = self.server.class_names
        return result | ({"names": [names[k] for k in classes]} if names else {})

    def _tell(self, body: bytes) -> dict[str, Any]:
        try:
            told = json.loads(body)
            ids, labels = told["ids"], told["labels"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError('Send JSON such as {"ids": ["..."], "labels": [3]}.') from None
        return {"known": self.server.shadow.tell(ids, labels)}

    def _send_json(self, status: int, content: dict[str, Any]) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status == 503:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: ``/metrics`` counts requests."""


class Server(ThreadingHTTPServer):
    """Serves a shadow, which stays the caller's to close.

    Args:
        shadow: The shadow.
        address: Host and port; port 0: any that is free, see ``server_port``.
        channels: Of image files: 3 for RGB, 1 for grey.
        class_names: Names of the K classes, for answers.
    """

    daemon_threads = True
    request_queue_size = 128  # connections that wait to be taken

    def __init__(
        self,
        shadow: Shadow,
        address: tuple[str, int] = ("127.0.0.1", 0),
        channels: int = 3,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(address, Handler)
        self.shadow, self.channels, self.class_names = shadow, channels, class_names
        self._requests, self._change = 0, threading.Condition()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While active, :meth:`finish` waits."""
        with self._change:
            self._requests += 1
        try:
            yield
        finally:
            with self._change:
                self._requests -= 1
                self._change.notify_all()

    def finish(self) -> None:
        """Answer what was asked, after ``shutdown``: a thread that is still sending would end with the process."""
        self.shadow.close()
        with self._change:
            self._change.wait_for(lambda: not self._requests, PATIENCE)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing for a client that has gone: its connection is closed."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def main(args: Sequence[str] | None = None, ready: Callable[[Server], object] = lambda server: None) -> None:
    """Serve until SIGTERM or Ctrl-C; what waits is answered, and the last state saved.

    Args:
        args: As on the command line.
        ready: Called with the server before it serves.
    """
    parser = argparse.ArgumentParser(prog="python -m lightning_tta.serving.server", description=__doc__.split("\n")[0])
    parser.add_argument("--source-ckpt", help="weights of the source, as of lightning-tta predict")
    parser.add_argument("--net", help="name of the net, such as timm/resnet50, where the weights do not say it")
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--method", default="zerosiam")
    parser.add_argument("--options", type=json.loads, default={}, help='of Shadow and the method, JSON: {"lr": 0.001}')
    parser.add_argument("--directory", help="for the log and snapshots; a new start goes on from there")
    parser.add_argument("--source-images", help="images and labels by numpy.savez, for methods that need some first")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: reachable from other machines")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args(args)
    if not isinstance(given.options, dict):
        parser.error(f"--options takes a JSON object, such as {{}}; got {given.options!r}")
    try:
        net = load_source(given.source_ckpt, given.net, given.num_classes).eval()
        channels, names = (net.mean.numel(), net.class_names) if isinstance(net, Backbone) else (3, None)
        shadow = Shadow(net, given.method, directory=given.directory, **given.options)
    except LightningTTAError as error:
        parser.error(str(error))
    with shadow:
        try:
            if given.source_images:
                shadow.prepare(source_batches(given.source_images))
            shadow.check_prepared()
            server = Server(shadow, (given.host, given.port), channels, names)
        except NotPreparedError as error:
            parser.error(f"{error} Here: --source-images FILE.npz.")
        except (LightningTTAError, OSError) as error:
            parser.error(
                f"--host {given.host} --port {given.port}: {error}" if isinstance(error, OSError) else str(error)
            )
        with server:
            signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
            print(f"http://{given.host}:{server.server_port}", flush=True)
            ready(server)
            with suppress(KeyboardInterrupt):
                server.serve_forever()
            server.finish()


if __name__ == "__main__":
    main()
