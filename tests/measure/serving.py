"""What a shadow costs and keeps: latency beside the bare net, a kill in the middle of a load, monitors per micro-batch.

    python tests/measure/serving.py --net cifar/resnet26_gn --method zerosiam
    python tests/measure/serving.py --corruptions reported --source runs/digits/source
    python tests/measure/serving.py --corruptions gaussian_noise --root ROOT --source resnet20.safetensors \
        --net cifar/resnet20 --together 1

Random weights and images of noise: neither changes the time. Each client sends one image, waits for the answer, sends
the next. The bare net is served the same way: by the same queue and one thread. ``off by`` is the largest difference
from the logits of the bare net, image by image; that of a method that answers is what it has learned.

With ``--corruptions``: who answers, and how well. Clean digits, corrupted ones twice, clean ones again, each image a
request of its own; the error of what was answered beside those of the source and of the method alone on the same
micro-batches.
"""

from __future__ import annotations

import io
import json
import os
import signal
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_tta import adapt
from lightning_tta.backbones import create_backbone
from lightning_tta.modules.loading import load_source
from lightning_tta.serving.policy import Answering, Decision, Evidence, Policy
from lightning_tta.serving.requests import Requests, joined
from lightning_tta.serving.server import Server
from lightning_tta.serving.shadow import Shadow
from plumbing import arguments, digits_or_folder, header, make_images, make_net, row

LOOKED = 'pass_seconds_count{part="monitors"}'
"""How many micro-batches the monitors and the policy have seen."""


class Fixed(Policy):
    """The same answers for ever."""

    def __init__(self, answering: Answering) -> None:
        self.answering = answering

    def decide(self, evidence: Evidence) -> Decision:
        """Whatever the evidence is."""
        return Decision(self.answering)


class Bare:
    """The net alone, served by the same queue and one thread."""

    def __init__(self, net: nn.Module, max_batch: int, max_wait_ms: float) -> None:
        self.net, self.requests = net, Requests[Tensor](max_batch, max_wait_ms / 1000, 1024)
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    @torch.no_grad()
    def _work(self) -> None:
        while taken := self.requests.take():
            logits, first = self.net(joined(taken)), 0
            for request in taken:
                request.future.set_result(logits[first : first + len(request.images)])
                first += len(request.images)

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, K)."""
        future: Future[Tensor] = self.requests.put(images)
        return future.result()

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *error: object) -> None:
        self.requests.close()
        self.thread.join()


def load(ask: Callable[[Tensor], Tensor], images: Tensor, clients: int) -> tuple[list[float], Tensor, float]:
    """Milliseconds of each request, the logits of all images in their order, and requests a second."""
    times, logits = [0.0] * len(images), [torch.empty(0)] * len(images)

    def client(first: int) -> None:
        for number in range(first, len(images), clients):
            start = time.perf_counter()
            logits[number] = ask(images[number : number + 1])
            times[number] = 1000 * (time.perf_counter() - start)

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(client, range(clients)))
    return times, torch.cat(logits), len(images) / (time.perf_counter() - start)


def percentile(times: Sequence[float], share: float) -> float:
    """The smallest time that this share of the requests does not exceed."""
    return sorted(times)[max(0, int(np.ceil(share * len(times))) - 1)]


def metrics(shadow: Shadow) -> dict[str, float]:
    """The shadow's own numbers, by name and labels."""
    lines = [line.rsplit(" ", 1) for line in shadow.metrics().splitlines() if not line.startswith("#")]
    return {name.removeprefix("lightning_tta_"): float(value) for name, value in lines}


def passes(shadow: Shadow) -> dict[str, float]:
    """Milliseconds per micro-batch by part."""
    values, names = metrics(shadow), {part: f'{{part="{part}"}}' for part in ("source", "method", "monitors")}
    return {
        part: 1000 * values[f"pass_seconds_sum{name}"] / values[f"pass_seconds_count{name}"]
        for part, name in names.items()
    }


# A kill in the middle


def serve_in_a_child(make: Callable[[], Shadow], port: int) -> tuple[int, int]:
    """A process that waits for a byte, then serves; its number, and where the byte goes."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(read)
        return child, write
    try:
        os.close(write)
        if os.read(read, 1):
            shadow = make()
            with Server(shadow, ("127.0.0.1", port)) as server:
                signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
                server.serve_forever()
            shadow.close()
    finally:
        os._exit(0)


def post(port: int, image: Tensor, patience: float = 60.0) -> tuple[dict[str, Any], int]:
    """The answer to an image (1, C, H, W), sent again until there is one, and how often it was sent again."""
    body = io.BytesIO()
    np.save(body, image.numpy())
    end, again = time.monotonic() + patience, 0
    while True:
        connection = HTTPConnection("127.0.0.1", port, timeout=patience)
        try:
            connection.request("POST", "/predict", body.getvalue())
            response = connection.getresponse()
            content = json.loads(response.read())
            if response.status == 200:
                return content, again
            raise HTTPException(content)
        except (OSError, HTTPException, ValueError):
            if time.monotonic() > end:
                raise
            again += 1
            time.sleep(0.03)
        finally:
            connection.close()


def kill_in_the_middle(
    make: Callable[[str], Shadow], images: Tensor, clients: int, expected: Tensor
) -> dict[str, float]:
    """Send images by HTTP from many clients, kill the process after half of them, start another on its snapshots."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        import socket

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [serve_in_a_child(lambda: make(directory), port) for _ in range(2)]  # before any thread is there
        stack.callback(lambda: [os.kill(child, signal.SIGKILL) for child, _ in children[1:]])
        os.write(children[0][1], b"1")
        answers: list[tuple[dict[str, Any], int]] = [({}, 0)] * len(images)
        done, saved = threading.Semaphore(0), threading.Event()

        def client(first: int) -> None:
            for number in range(first, len(images), clients):
                if number >= len(images) // 2:
                    saved.wait()
                answers[number] = post(port, images[number : number + 1])
                done.release()

        with ThreadPoolExecutor(clients) as threads:
            work = [threads.submit(client, first) for first in range(clients)]
            for _ in range(len(images) // 2):
                done.acquire()
            end = time.monotonic() + 30  # a fast server has answered before it has adapted
            while not any(Path(directory).glob("snapshot-*.pt")) and time.monotonic() < end:
                time.sleep(0.01)
            saved.set()
            done.acquire()
            os.kill(children[0][0], signal.SIGKILL)
            os.waitpid(children[0][0], 0)
            os.write(children[1][1], b"1")
            for each in work:
                each.result()
        stack.pop_all()
        os.kill(children[1][0], signal.SIGTERM)
        os.waitpid(children[1][0], 0)
        for _, pipe in children:
            os.close(pipe)
        lines = [json.loads(line) for line in (Path(directory) / "shadow.jsonl").read_text().splitlines()]
        started = [line for line in lines if line["event"] == "start"]
    ids = {answer["ids"][0] for answer, _ in answers}
    right = sum(answer["classes"][0] == int(label) for (answer, _), label in zip(answers, expected, strict=True))
    return {
        "requests": len(images),
        "answered": sum(bool(answer) for answer, _ in answers),
        "ids": len(ids),
        "right": right,
        "sent again": sum(again > 0 for _, again in answers),
        "gone on from micro-batch": started[-1]["batch"],
    }


# Who answers

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "tent": ("tent", {"window": 64}),
    "zerosiam": ("zerosiam", {"window": 64}),
    "tent x300": ("tent", {"window": 64, "lr": 0.3}),  # collapses
}


def phases(root: str, domain: str, images: int, severity: int) -> list[tuple[Tensor, Tensor]]:
    """Images and labels: clean, corrupted, the same in another order, clean in another order."""
    parts = {}
    for name in ("clean", domain):
        data = digits_or_folder(root, {}, {}, severity=severity, domains=[name], num_images=images)
        batches = list(data.predict_dataloader())
        x, y = (torch.cat([batch[key] for batch in batches]) for key in ("image", "label"))
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        parts[name] = x[order], y[order]
    again = {name: (x.flip(0), y.flip(0)) for name, (x, y) in parts.items()}
    return [parts["clean"], parts[domain], again[domain], again["clean"]]


def who_answers(
    net: nn.Module, method: str, stream: list[tuple[Tensor, Tensor]], together: int, policy: dict[str, Any]
) -> dict[str, Any]:
    """Errors in % by phase of source, method alone and answers, and where who answers changed, in images."""
    name, kwargs = METHODS[method]
    x, y = torch.cat([part[0] for part in stream]), torch.cat([part[1] for part in stream])
    torch.manual_seed(0)
    alone = adapt(net, name, **kwargs)
    with torch.no_grad():
        logits = {"source": torch.cat([net(part) for part in x.split(together)])}
    logits["method alone"] = torch.cat([alone(part) for part in x.split(together)])
    torch.manual_seed(0)
    answers = []
    queue = {"max_batch": together, "max_wait_ms": 1000, "when_behind": "wait", "max_lag": 1}
    with Shadow(net, name, policy=policy, timeout=None, **queue, **kwargs) as shadow:
        for part in x.split(together):
            asked = [shadow.submit(image[None]) for image in part]
            if len(asked) < together:  # else they wait for others
                shadow._requests.max_wait = 0.0
            answers += [future.result() for future in asked]
    logits["answers"] = torch.cat([answer.logits for answer in answers])
    wrong = {
        who: (each.argmax(1) != y).double().split([len(part[1]) for part in stream]) for who, each in logits.items()
    }
    by = [answer.by for answer in answers]
    return {
        **{who: [100 * float(part.mean()) for part in parts] for who, parts in wrong.items()},
        "method answered": by.count("method"),
        "switched": [f"{by[n]} from {n}" for n in range(1, len(by)) if by[n] != by[n - 1]],
        "restores": sum(event["event"] == "decision" and bool(event["restore"]) for event in shadow.events),
    }


def measure_who_answers(options: Any) -> dict[str, dict[str, Any]]:
    """Print a table, a row for each corruption and method."""
    weights = (options.source, options.net, 10) if options.root else (options.source,)
    net = make_net("bn", 10) if options.net == "tiny" else load_source(*weights).eval()
    domains = digits_or_folder(options.root, {}, {}, severity=options.severity, domains=options.corruptions)
    results = {}
    header(
        "corruption, method",
        *(f"{who}, % wrong" for who in ("source", "method alone", "answers")),
        "switched",
        "restores",
    )
    for domain in [name.split("@")[0] for name in domains.domain_names if not name.startswith("clean")]:
        stream = phases(options.root, domain, options.images, options.severity)
        for method in options.methods:
            found = results[f"{domain}, {method}"] = who_answers(
                net, method, stream, options.together, json.loads(options.policy)
            )
            errors = (" / ".join(f"{e:.1f}" for e in found[who]) for who in ("source", "method alone", "answers"))
            row(f"{domain}, {method}", *errors, "; ".join(found["switched"]) or "-", found["restores"])
    return results


def main(args: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure all and print the tables."""
    options = arguments(
        __doc__,
        args,
        net=("cifar/resnet26_gn", "tiny: that of the tests"),
        method="zerosiam",
        monitors=["collapse"],
        requests=1000,
        clients=16,
        idle=(50, "single requests to an idle server"),
        pixels=32,
        snapshot_every=10,
        max_batch=16,
        max_wait_ms=5.0,
        corruptions=([], "measure who answers instead: names of corruptions, or reported, or held_out"),
        methods=list(METHODS),
        root=("", "a folder of images in the place of the digits; then --source and --net are of its source"),
        source=("runs/digits/source", "weights of the digits' source"),
        severity=5,
        images=540,
        together=(16, "single requests that come at a time"),
        policy=("{}", "options of Patience, as JSON"),
    )
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Guard|.*of each batch")
    if options.corruptions:
        return measure_who_answers(options)
    net = make_net("gn", 10) if options.net == "tiny" else create_backbone(options.net, 10).eval()
    images = make_images(options.requests, size=options.pixels)
    with torch.no_grad():
        expected = net(images)

    def make(answering: Answering = "source", monitors: Sequence[str] = (), directory: str | None = None) -> Shadow:
        return Shadow(
            net,
            options.method,
            policy=Fixed(answering),
            monitors=list(monitors),
            directory=directory,
            snapshot_every=options.snapshot_every,
            max_batch=options.max_batch,
            max_wait_ms=options.max_wait_ms,
        )

    results: dict[str, dict[str, Any]] = {}
    killed = kill_in_the_middle(
        lambda directory: make("source", options.monitors, directory), images, options.clients, expected.argmax(1)
    )
    results["kill"] = killed
    print(f"killed in the middle: {', '.join(f'{name} {value}' for name, value in killed.items())}\n")

    servers: dict[str, Callable[[], Any]] = {
        "bare net": lambda: Bare(net, options.max_batch, options.max_wait_ms),
        "shadow, no monitors": make,
        "shadow": lambda: make("source", options.monitors),
        "shadow, when_behind=wait": lambda: _waiting(make("source", options.monitors)),
        "the method answers": lambda: make("method", options.monitors),
    }
    with torch.no_grad():
        bare = [_timed(lambda n=n: net(images[n : n + 1])) for n in range(min(options.idle, len(images)))]
    print(f"one pass of the net on one image: {statistics.median(bare):.2f} ms; max_wait_ms {options.max_wait_ms}\n")
    header("served", "idle p50 ms", "p50 ms", "p99 ms", "requests/s", "off by", "skipped images")
    for name, start in servers.items():
        with start() as server:
            idle = []
            for number in range(options.idle):
                idle.append(_timed(lambda n=number: server.predict(images[n % len(images)][None])))
                while name != "bare net" and metrics(server).get(LOOKED, 0) <= number:  # until it is idle again
                    time.sleep(0.005)
            times, logits, rate = load(server.predict, images, options.clients)
        error = float((logits - expected).abs().max())
        skipped = 0.0 if name == "bare net" else metrics(server)["skipped_images_total"]
        results[name] = {
            "idle": statistics.median(idle),
            "p50": percentile(times, 0.5),
            "p99": percentile(times, 0.99),
            "rate": rate,
            "error": error,
            "answered": len(logits),
            "skipped": skipped,
        }
        row(
            name, *(f"{results[name][key]:.1f}" for key in ("idle", "p50", "p99", "rate")), f"{error:.1e}", int(skipped)
        )
    print()
    header("monitors", "source ms", "method ms", "monitors ms", "per micro-batch of images")
    for monitors in ([], *([each] for each in options.monitors), options.monitors):
        with _waiting(make("source", monitors)) as shadow:
            for number in range(0, len(images), options.max_batch):
                shadow.predict(images[number : number + options.max_batch])
        parts = results[f"monitors {'+'.join(monitors)}"] = passes(shadow)
        row(", ".join(monitors) or "none", *(f"{value:.2f}" for value in parts.values()), options.max_batch)
    return results


def _waiting(shadow: Shadow) -> Shadow:
    shadow.when_behind = "wait"
    return shadow


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
