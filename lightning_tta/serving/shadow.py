"""Shadow mode: the source answers, a method adapts unseen on the same requests, and answers once evidence favors it."""

from __future__ import annotations

import atexit
import copy
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from lightning_tta._version import __version__
from lightning_tta.backbones.weights import state_digest
from lightning_tta.errors import (
    AnswerTimeoutError,
    ClosedError,
    ConfigError,
    InputError,
    NotPreparedError,
    check_choice,
    check_range,
    in_one_line,
)
from lightning_tta.guard.gathering import GATHER, Gathering
from lightning_tta.guard.monitors.base import Monitor, TakesLabels
from lightning_tta.guard.monitors.kinds import make_monitors
from lightning_tta.guard.seeing import HeadCall, Sight
from lightning_tta.methods import adapt
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import put_back, take
from lightning_tta.methods.base.task import Images, float_dtype
from lightning_tta.methods.components.wanted import Wanted, check_options, listed
from lightning_tta.serving.events import EventLog
from lightning_tta.serving.labels import PairedLabels
from lightning_tta.serving.policy import Answering, Decision, Evidence, Patience, Policy, Restore
from lightning_tta.serving.prometheus import Metrics
from lightning_tta.serving.requests import Request, Requests, joined
from lightning_tta.serving.snapshots import Snapshots

WhenBehind = Literal["skip", "wait"]
DEFAULT_MONITORS = ("collapse", "aetta")
FAILURES = 3
"""Failures of the method or of a monitor in a row, after which the source answers alone."""
_ENDED = "The thread that answers has ended; its log says why. Make a new shadow."
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        logits: (B, K), on the host.
        ids: One for each image, by which :meth:`Shadow.tell` takes its label; unique over restarts.
        by: Who answered.
        batch: Number of the micro-batch, from 1, since the process started.
    """

    logits: Tensor
    ids: list[str]
    by: Answering
    batch: int


@dataclass
class _Batch:
    """A micro-batch that was answered, and what is known of it."""

    images: Tensor
    ids: list[str]
    by: Answering
    source: Tensor | None = None
    source_calls: list[HeadCall] = field(default_factory=list)
    method: Tensor | None = None
    method_calls: list[HeadCall] = field(default_factory=list)


class Shadow:
    """Answers requests from many threads: the source does until a policy favors the method, which adapts unseen.

    ::

        with lightning_tta.Shadow(net, "zerosiam", directory="runs/serving") as shadow:
            logits = shadow.predict(images)            # from any thread
            answer = shadow.answer(images)             # with its ids
            shadow.tell(answer.ids, labels)            # labels, if they ever come
            print(shadow.metrics())                    # for Prometheus

    **Requests** of the same size that come within ``max_wait_ms`` are answered together, as a micro-batch, by the one
    thread that works. Each gets its own rows. A request that cannot be answered fails alone.

    **Order of work.** While the source answers: the source's pass, the answers, then the method's step on the same
    images, the monitors and the policy. Requests that wait, or come within ``max_wait_ms``, are answered before these
    steps, up to ``max_lag`` micro-batches; then ``when_behind`` says whether steps are left out or answers wait. While
    the method answers: its step, whose logits are the answers, then the source's pass, the monitors and the policy,
    before the next micro-batch. So an alarm changes the answers from the next micro-batch on. Logits that are not
    finite never go out: the source answers in their place.

    **Failures.** Where the method, a monitor or the policy raises an error, the source goes on answering, and the
    method begins anew at the source. After three such micro-batches in a row the source answers alone
    (:attr:`stopped`). Images that the source takes and the method refuses (:class:`~lightning_tta.InputError`), as of
    another size than those before, are answered by the source and left out by the method, which stays as it was.

    **Files**, in ``directory``: ``shadow.jsonl`` has starts, decisions, alarms, estimates, failures; ``snapshot-*.pt``
    all that is known: the method's state, its last healthy one, monitors, policy, answers that wait for labels. A new
    Shadow with the same net and method goes on from the latest; what came after it is lost. They are written by
    another thread, whole or not at all.

    Args:
        net: The source: any classifier, pixels (B, C, H, W) in [0, 1] -> logits (B, K). It is copied.
        method: Name of a method, as of :func:`lightning_tta.adapt`; or a method that was made of a copy of ``net``.
        policy: Who answers: a :class:`~lightning_tta.serving.policy.Policy`, or options of
            :class:`~lightning_tta.serving.policy.Patience`.
        monitors: Words, dicts of ``kind`` and options, or objects, of
            :class:`~lightning_tta.guard.monitors.base.Monitor`. Those that estimate accuracy have a twin that looks at
            the source.
        directory: For the log and snapshots; ``None``: nothing is written, nothing is gone on from.
        snapshot_every: Micro-batches from snapshot to snapshot, at least 1. A state is healthy after as many without
            alarm.
        keep_snapshots: Files, at least 1.
        max_batch: Images of a micro-batch, and of a request, at most.
        max_wait_ms: Milliseconds that a request waits for others. 0: it takes along what is there.
        max_queue: Images that may wait, at most.
        max_lag: Micro-batches that are answered before the method has adapted on them, at least 1.
        when_behind: ``skip``: where ``max_lag`` are reached the method adapts on the latest and leaves out the others,
            which are counted. ``wait``: on all of them, and answers wait.
        timeout: Seconds that :meth:`predict` and :meth:`answer` wait; ``None``: as long as it takes.
        log_every: Micro-batches from one line of estimates to the next, at least 1.
        keep_answers: Images whose label may still come, at most.
        gather: Images, at least 1, that monitors which need several look at together, however few a micro-batch has
            (:class:`~lightning_tta.guard.gathering.Gathering`). A state is healthy only where they have looked at all
            that led to it; so what an alarm undoes goes back to before the first of the gathered images.
        options: Of :func:`lightning_tta.adapt`, such as ``lr``. Micro-batches may hold one image: to methods that take
            BatchNorm statistics of the batch give ``window=64`` or ``statistics="auto"``.

    Attributes:
        method: The method. Leave it to the shadow.
        answering: Who answers now.
        stopped: Whether the source answers alone, after failures.
        batches: Micro-batches that both have predicted, those before a restart included.

    Raises:
        ConfigError: If an option is out of range, or the directory is in use, or has a state of another net or method.
        DataError: If all its snapshots are damaged.
    """

    def __init__(
        self,
        net: nn.Module,
        method: str | TTAMethod = "zerosiam",
        *,
        policy: Policy | Mapping[str, Any] | None = None,
        monitors: Wanted | Monitor | Sequence[Wanted | Monitor] = DEFAULT_MONITORS,
        directory: str | Path | None = None,
        snapshot_every: int = 100,
        keep_snapshots: int = 3,
        max_batch: int = 32,
        max_wait_ms: float = 5.0,
        max_queue: int = 1024,
        max_lag: int = 8,
        when_behind: WhenBehind = "skip",
        timeout: float | None = 30.0,
        log_every: int = 50,
        keep_answers: int = 10_000,
        gather: int = GATHER,
        **options: Any,
    ) -> None:
        for name, value in (("snapshot_every", snapshot_every), ("max_lag", max_lag), ("log_every", log_every)):
            check_range(name, value, 1, integer=True)
        check_range("max_wait_ms", max_wait_ms, 0)
        check_range("keep_snapshots", keep_snapshots, 1, integer=True)
        if timeout is not None:
            check_range("timeout", timeout, 0, low_open=True)
        if directory is not None and not isinstance(directory, (str, os.PathLike)):
            raise ConfigError(f"directory must be a path, or None, to keep nothing; got {directory!r}.")
        check_choice("when_behind", when_behind, get_args(WhenBehind))
        self.policy = _policy(policy)
        self._requests: Requests[Answer] = Requests(max_batch, max_wait_ms / 1000, max_queue)
        self.snapshot_every, self.max_lag, self.when_behind = snapshot_every, max_lag, when_behind
        self.timeout, self.log_every = timeout, log_every
        self._source = adapt(net, "source")
        self.method = _method(net, method, options)
        self.monitors = _monitors(monitors)
        if isinstance(self.policy, Patience):
            for name in self.policy.estimates or ():
                check_choice("estimates", name, tuple(each.name for each in self.monitors if each.is_estimator))
        estimating = [monitor for monitor in self.monitors if monitor.is_estimator]
        self._twins: list[Monitor] = copy.deepcopy(estimating)
        self._sight, self._source_sight = Sight(self.method, self.monitors), Sight(self._source, self._twins)
        self._gathering, self._source_gathering = (Gathering(s, gather) for s in (self._sight, self._source_sight))
        self._prepared = not any(monitor.needs_source for monitor in self.monitors)
        self._labels = PairedLabels(keep_answers)
        self._told: deque[tuple[str, int]] = deque(maxlen=keep_answers)  # labels for monitors, by the answers' ids
        like = next(self._source.parameters(), torch.zeros(()))
        self._device, self._dtype, self._task = like.device, float_dtype(self._source.model), Images()

        self.answering: Answering = "source"
        self.stopped = False
        self.batches = 0
        self._answered = 0  # micro-batches of this process
        self._failures = 0  # in a row
        self._lagging: deque[_Batch] = deque()
        self._lock = threading.RLock()
        self._session, self._next_id = os.urandom(4).hex(), 0
        self._metrics = _declared(self.method.name)
        self._healthy = self._candidate = take(self.method)
        self._since = 0  # micro-batches since the candidate was taken
        self._rolled_back_to: Any = None

        path = None if directory is None else Path(directory)
        self._process = os.getpid()
        self._snapshots: Snapshots | None = None
        try:
            if path is not None:
                self._snapshots = Snapshots(path, keep_snapshots, self._note_written, self._note_failure)
            self._log = EventLog(None if path is None else path / "shadow.jsonl")
            self._identity = {"method": self.method.name, "net": state_digest(self._source.model)}
            saved = None if self._snapshots is None else self._snapshots.read()
            if saved is not None:
                self._load(saved[1])
        except BaseException as error:
            if self._snapshots is not None:
                self._snapshots.close()
            if isinstance(error, OSError):
                raise ConfigError(
                    f"directory={str(path)!r} cannot be used: {in_one_line(error)}. Give a directory that this process "
                    "may make, read and write; or None, to keep nothing."
                ) from None
            raise
        self._note_answering()
        self._metrics.set("micro_batches", self.batches)
        self._log(
            "start", session=self._session, batch=self.batches, answering=self.answering, resumed=saved is not None
        )
        self._worker = threading.Thread(target=self._work, name="lightning_tta shadow", daemon=True)
        self._worker.start()
        atexit.register(self.close)

    # For callers

    def predict(self, images: Tensor, timeout: float | None = None) -> Tensor:
        """Logits (B, K) on the host, for images (B, C, H, W) or one image (C, H, W), pixels in [0, 1].

        Args:
            images: At most ``max_batch``.
            timeout: Seconds to wait; ``None``: those of the shadow.

        Raises:
            ConfigError: If ``timeout`` is below 0.
            InputError: If these are no images in [0, 1], or not of a size that the net takes, or too many.
            QueueFullError: If too many wait already.
            ClosedError: If the shadow is closed.
            AnswerTimeoutError: If there is no answer in time.
            NotPreparedError: If the method or a monitor needs source images first.
        """
        return self.answer(images, timeout).logits

    def answer(self, images: Tensor, timeout: float | None = None) -> Answer:
        """As :meth:`predict`, with the ids of the images and who answered."""
        if threading.current_thread() is self._worker:
            raise ConfigError(
                "predict() or answer() was called by the thread that answers, as from a callback of a future: it would "
                "wait for itself. Use submit() there."
            )
        if timeout is not None:
            check_range("timeout", timeout, 0)
        future = self.submit(images)
        timeout = self.timeout if timeout is None else timeout
        try:
            return future.result(timeout)
        except TimeoutError:
            if not future.cancel() and future.done():  # it has come just now, or the error is that of the pass itself
                return future.result()
            self._metrics.add("requests_total", result="timeout")
            raise AnswerTimeoutError(
                f"No answer within {timeout:g} s; {self._requests.images} images wait. Try again later, or give a "
                "longer timeout."
            ) from None

    def submit(self, images: Tensor) -> Future[Answer]:
        """As :meth:`answer`, without waiting. The images must stay as they are until there is an answer."""
        self._check_process()
        self.check_prepared()
        try:
            if isinstance(images, Tensor) and images.ndim == 3:
                images = images[None]
            usable = self._task.usable(images)
            if not usable.all():
                numbers = (~usable).nonzero().flatten().tolist()
                raise InputError(
                    f"Pixels of image {', '.join(map(str, numbers[:3]))} of the request are not finite. "
                    "Look at how they are read, and send the others again."
                )
            future = self._requests.put(images.detach().to(self._dtype))
        except Exception as error:
            self._metrics.add("requests_total", result="invalid" if isinstance(error, InputError) else "refused")
            raise
        self._metrics.set("queue_images", self._requests.images)
        return future

    def tell(self, ids: Sequence[str], labels: Tensor | Iterable[int]) -> int:
        """Take labels that came late.

        Args:
            ids: Of answers.
            labels: Class numbers, one for each id.

        Returns:
            Of how many the answer is still known; a label counts once.

        Raises:
            InputError: If they are not as many, or no class numbers. Then none of them counts.
        """
        self._check_process()
        numbers = self._labels.checked(ids, labels)
        known = self._labels.tell(ids, numbers)
        if known:
            self._told.extend(zip(ids, numbers, strict=True))
        self._metrics.add("labels_total", known)
        return known

    def prepare(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Show source images to the method and to the monitors that need some, before the first request.

        After a restart from a snapshot there is no need to.

        Args:
            batches: ``{"image": (B, C, H, W), "label": (B,)}`` of held-out source images.
        """
        with self._lock:
            if hasattr(batches, "__next__"):  # what gives them once is asked twice here
                batches = list(batches)
            if not self.method.prepared:
                self.method.prepare(batches)
                self._healthy = self._candidate = take(self.method)
            if not self._prepared:
                for sight, monitors in ((self._sight, self.monitors), (self._source_sight, self._twins)):
                    seen = sight.prepared(batches)
                    seen = [replace(each, source=each.logits) for each in seen]
                    for monitor in monitors:
                        monitor.prepare(seen)
                self._prepared = True

    def check_prepared(self) -> None:
        """Whether requests can come.

        Raises:
            NotPreparedError: If the method or a monitor needs source images first: :meth:`prepare`.
        """
        if not (self._prepared and self.method.prepared):
            names = [self.method.name] * (not self.method.prepared)
            names += [monitor.name for monitor in self.monitors if monitor.needs_source and not self._prepared]
            raise NotPreparedError(
                f"{', '.join(map(repr, names))} must see source images before the first request: call "
                "shadow.prepare(source_batches) with batches {'image': (B, C, H, W) in [0, 1], 'label': (B,)}."
            )

    def metrics(self) -> str:
        """Numbers for Prometheus, to be sent as :data:`~lightning_tta.serving.prometheus.CONTENT_TYPE`."""
        self._metrics.set("queue_images", self._requests.images)
        return self._metrics.text()

    @property
    def events(self) -> list[dict[str, Any]]:
        """The latest 256 lines of the log."""
        return list(self._log.events)

    @property
    def closed(self) -> bool:
        """Whether no more requests are taken."""
        return self._requests.closed or os.getpid() != self._process

    def reset(self) -> None:
        """Return the method to the source, and let the source answer; also after :attr:`stopped`."""
        with self._lock:
            self.stopped, self._failures = False, 0
            self._carry_out(Decision("source", "reset", "asked for"))

    def rollback(self) -> None:
        """Return the method to its last healthy state; who answers stays."""
        with self._lock:
            self._carry_out(Decision(self.answering, "rollback", "asked for"))

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, answer those that wait, and write a last snapshot.

        Args:
            timeout: Seconds for that; what still waits then gets a ClosedError. ``None``: as long as it takes.

        Warns:
            UserWarning: If the last snapshot could not be written.
        """
        if os.getpid() != self._process:  # in a fork: all of it is the parent's
            return
        if threading.current_thread() is self._worker:
            raise ConfigError(
                "close() was called by the thread that answers, as from a callback of a future: it would wait for its "
                "own end. Call it from another thread."
            )
        atexit.unregister(self.close)
        self._requests.close()
        self._worker.join(timeout)
        if self._worker.is_alive():
            self._requests.refuse(ClosedError("This shadow was closed before it came to this request. Send it again."))
            self._worker.join()
        if self._snapshots is not None:
            first = not self._snapshots.ended
            self._snapshots.close()
            if first and self._snapshots.error is not None:
                warnings.warn(
                    f"The last snapshot could not be written to {self._snapshots.directory}: "
                    f"{in_one_line(self._snapshots.error)}. A new shadow goes on from an earlier one, if there is one.",
                    stacklevel=2,
                )

    def __getstate__(self) -> Any:
        """No copy and no pickle: threads, locks and the directory belong to one object.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "A Shadow cannot be copied or pickled: it has threads, and its directory for itself. Make another one, in "
            "the process that needs it; with the same directory it goes on from the last snapshot once this is closed."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # The thread that works

    def _work(self) -> None:
        try:
            self._work_on()
        except BaseException as error:  # such as SystemExit of a net
            self._note_failure(error)
            raise
        finally:  # nobody waits for a thread that has ended
            self._requests.close()
            self._requests.refuse(ClosedError(_ENDED))

    def _work_on(self) -> None:
        while True:
            late = self.answering == "method" or len(self._lagging) >= self.max_lag
            if self._lagging and (late or not self._requests.wait()):
                self._catch_up()
            elif requests := self._requests.take():
                with self._lock:
                    self._answer_surely(requests)
            elif not self._lagging:
                break
        with self._lock:
            self._snapshot()

    def _catch_up(self) -> None:
        """Let the method adapt on a micro-batch that was answered."""
        if self.when_behind == "skip" and len(self._lagging) >= self.max_lag:
            for batch in list(self._lagging)[:-1]:
                self._metrics.add("skipped_images_total", len(batch.ids))
            self._lagging = deque([self._lagging[-1]])
        with self._lock:
            try:
                self._shadow(self._lagging.popleft())
            except Exception as error:  # even of what is done on failures, such as a warning that is made an error
                self._note_failure(error)

    def _answer_surely(self, requests: list[Request[Answer]]) -> None:
        """Answer a micro-batch; whatever happens, nobody waits for ever."""
        try:
            self._answer(requests)
        except BaseException as error:
            ends = not isinstance(error, Exception)  # such as SystemExit: the end of this thread, not of the caller's
            for request in requests:
                if not request.future.done():
                    request.future.set_exception(ClosedError(_ENDED) if ends else error)
            if ends:
                raise
            self._note_failure(error)

    def _answer(self, requests: list[Request[Answer]]) -> None:
        """Answer a micro-batch, and let the method adapt on it now or later."""
        try:
            batch, error = self._predict(joined(requests).to(self._device))
        except Exception as refusal:
            if len(requests) > 1:  # one of them may be at fault
                for request in requests:
                    self._answer([request])
                return
            result = "invalid" if isinstance(refusal, InputError) else "failed"
            self._metrics.add("requests_total", result=result)
            if result == "failed":
                self._log("failed_request", error=in_one_line(refusal))
            requests[0].future.set_exception(refusal)
            return
        logits = batch.source if batch.by == "source" else batch.method
        assert logits is not None
        self._deliver(requests, logits.cpu(), batch)
        if isinstance(error, InputError):
            self._leave_out(batch, error)
        elif error is not None:
            self._recover(error)
        elif self.answering == "method":  # what it has just changed is looked at before it answers again
            self._shadow(batch)
        elif not self.stopped:
            self._lagging.append(batch)

    def _predict(self, images: Tensor) -> tuple[_Batch, Exception | None]:
        """A micro-batch with the logits that go out, and why the method gave none although it was asked.

        Raises:
            Exception: Of the source, whatever it is.
        """
        batch, error = _Batch(images, [], "source"), None
        if self.answering == "method":
            try:
                self._ask_method(batch)
                if self._is_finite(batch):
                    batch.by = "method"
                    return batch, None
            except Exception as caught:
                error = caught
        self._ask_source(batch)
        assert batch.source is not None
        if not bool(batch.source.isfinite().all()):
            raise InputError(
                "The net's logits for these images are not finite, so they are no answer. Look at the images, and at "
                "the net's weights and precision."
            )
        return batch, error

    def _ask_source(self, batch: _Batch) -> None:
        start = time.perf_counter()
        batch.source, batch.source_calls = self._source_sight.answer(batch.images, self._source)
        self._metrics.observe("pass_seconds", time.perf_counter() - start, part="source")

    def _ask_method(self, batch: _Batch) -> None:
        start = time.perf_counter()
        batch.method, batch.method_calls = self._sight.answer(batch.images, self.method)
        self._metrics.observe("pass_seconds", time.perf_counter() - start, part="method")

    def _is_finite(self, batch: _Batch) -> bool:
        """Whether the method's logits, and what it may change, are."""
        assert batch.method is not None
        tensors = (batch.method, *self.method.adaptable.values())
        return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())

    def _deliver(self, requests: list[Request[Answer]], logits: Tensor, batch: _Batch) -> None:
        self._answered += 1
        batch.ids = [f"{self._session}-{number}" for number in range(self._next_id, self._next_id + len(logits))]
        self._next_id += len(logits)
        self._labels.answer(batch.ids, logits.argmax(1).tolist(), logits.shape[1])
        first, now = 0, time.monotonic()
        # Counted first: who has an answer finds it in the numbers
        for request in requests:
            self._metrics.observe("latency_seconds", now - request.since)
        self._metrics.add("requests_total", len(requests), result="answered")
        self._metrics.add("images_total", len(logits), by=batch.by)
        self._metrics.observe("batch_images", len(logits))
        self._metrics.set("queue_images", self._requests.images)
        for request in requests:
            last = first + len(request.images)
            rows = logits[first:last].clone()  # what a caller writes to it stays there
            request.future.set_result(Answer(rows, batch.ids[first:last], batch.by, self._answered))
            first = last

    # What is not seen from outside

    def _shadow(self, batch: _Batch) -> None:
        """Let both predict what one has answered, look at it, decide; in all failures the source goes on."""
        if self.stopped:
            return
        before = self.batches
        try:
            if batch.source is None:
                self._ask_source(batch)
            if batch.method is None:
                self._ask_method(batch)
            start = time.perf_counter()
            evidence = self._look(batch)
            decision = self.policy.decide(evidence)
            if not isinstance(decision, Decision):
                raise ConfigError(
                    f"decide() of a policy must return a Decision; {type(self.policy).__name__} returned "
                    f"a {type(decision).__name__}."
                )
            self._metrics.observe("pass_seconds", time.perf_counter() - start, part="monitors")
            self._note(evidence)
            self._carry_out(decision)
            self._failures = 0
        except InputError as error:
            self._leave_out(batch, error)
        except Exception as error:
            self._recover(error)
        if self.batches > before and self.batches % self.snapshot_every == 0:
            self._snapshot()

    def _look(self, batch: _Batch) -> Evidence:
        """Show a micro-batch to the monitors."""
        source, logits = batch.source, batch.method
        assert source is not None
        assert logits is not None
        self.batches += 1
        alarms: list[str] = []
        if self._is_finite(batch):
            same = source if self._sight.is_alike else None
            shown = self._gathering.show(
                batch.images, logits, batch.method_calls, batch.ids, source=source, same_source=same
            )
            alarms = [alarm for monitor in shown if (alarm := monitor.alarm())]
            same_predictions = (logits.argmax(1) == source.argmax(1)).float().mean()
            self._metrics.set("agreement", float(same_predictions))
            self._labels.predict(batch.ids, source.argmax(1).tolist(), logits.argmax(1).tolist())
        else:
            alarms = ["non_finite"]
        if self._twins:
            self._source_gathering.show(
                batch.images, source, batch.source_calls, batch.ids, source=source, same_source=source
            )
        self._tell_monitors()
        counts = self._labels.known()
        return Evidence(
            self.batches,
            len(logits),
            self.answering,
            _estimates(self._twins),
            _estimates(self.monitors),
            alarms,
            counts,
            counts.better(self._labels.alpha),
        )

    def _tell_monitors(self) -> None:
        """Give the labels that came to monitors; those of answers that these have still to look at wait for it."""
        unseen = {id for batch in self._lagging for id in batch.ids}
        told = [self._told.popleft() for _ in range(len(self._told))]
        self._told.extend(pair for pair in told if pair[0] in unseen)
        known = [pair for pair in told if pair[0] not in unseen]
        for monitor in (*self.monitors, *self._twins) if known else ():
            if isinstance(monitor, TakesLabels):
                monitor.tell([id for id, _ in known], [label for _, label in known])

    def _note(self, evidence: Evidence) -> None:
        """For the log and Prometheus."""
        for of, estimates in (("source", evidence.source), ("method", evidence.method)):
            for name, estimate in estimates.items():
                self._metrics.set("estimated_accuracy", estimate, of=of, monitor=name)
        for monitor in self.monitors:
            for name, value in monitor.values().items():
                self._metrics.set("monitor", value, value=name)
        counts = evidence.counts
        if counts.labels:
            self._metrics.set("labelled_accuracy", counts.source_right / counts.labels, of="source")
            self._metrics.set("labelled_accuracy", counts.method_right / counts.labels, of="method")
        if counts.answers:
            self._metrics.set("labelled_accuracy", counts.answers_right / counts.answers, of="answers")
        for alarm in evidence.alarms:
            self._metrics.add("alarms_total", reason=alarm)
            self._log("alarm", batch=evidence.batch, reason=alarm, answering=evidence.answering)
        if evidence.batch % self.log_every == 0:
            self._log(
                "estimates",
                batch=evidence.batch,
                answering=self.answering,
                source=dict(evidence.source),
                method=dict(evidence.method),
                values={name: value for monitor in self.monitors for name, value in monitor.values().items()},
                labels=vars(counts),
            )
        self._metrics.set("micro_batches", self.batches)

    def _carry_out(self, decision: Decision) -> None:
        before = self.answering
        self.answering = decision.answering
        if decision.restore:
            self._restore(decision.restore)
        else:
            self._since += 1
            if self._since >= self.snapshot_every and not self._gathering.waiting:
                self._healthy, self._candidate, self._since = self._candidate, take(self.method), 0
        if before != self.answering or decision.restore:
            self._log(
                "decision",
                batch=self.batches,
                answering=self.answering,
                before=before,
                restore=decision.restore,
                reason=decision.reason,
            )
        if before != self.answering:
            self._metrics.add("switches_total", to=self.answering)
            self._note_answering()

    def _restore(self, how: Restore) -> None:
        """Bring the method back; to the source where the last healthy state has not kept it healthy."""
        if how == "rollback" and self._healthy is not self._rolled_back_to:
            put_back(self.method, self._healthy)
            self._rolled_back_to = self._healthy
        else:
            how = "reset"
            self.method.reset()
            self._healthy = take(self.method)
            self._rolled_back_to = None
        self._candidate, self._since = self._healthy, 0
        self._metrics.add("restores_total", how=how)
        self._labels.forget()
        self._gathering.forget()
        for monitor in self.monitors:
            monitor.forget()

    def _leave_out(self, batch: _Batch, error: InputError) -> None:
        """Images that the source answers and the method refuses, as of another size: it stays as it was."""
        self._metrics.add("skipped_images_total", len(batch.ids))
        self._log("left_out", batch=self.batches, images=len(batch.ids), error=in_one_line(error))

    def _recover(self, error: Exception) -> None:
        """After a failure of the method, a monitor or the policy: the source answers, the method begins anew."""
        self._failures += 1
        self._note_failure(error, in_a_row=self._failures)
        try:
            self._carry_out(Decision("source", "reset", f"failure: {in_one_line(error)}"))
        except Exception as second:
            self._failures = FAILURES
            self._note_failure(second, in_a_row=self._failures)
        if self._failures >= FAILURES:
            self.stopped, self.answering = True, "source"
            self._lagging.clear()
            self._note_answering()
            self._log("stopped", batch=self.batches, error=in_one_line(error))
            warnings.warn(
                f"The method of this shadow failed {FAILURES} times in a row, the last time with {in_one_line(error)}. "
                "The source answers alone from here on. Mend it, then call shadow.reset().",
                stacklevel=2,
            )

    def _note_answering(self) -> None:
        for by in get_args(Answering):
            self._metrics.set("answering", self.answering == by, by=by)
        self._metrics.set("stopped", self.stopped)

    # State

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise ClosedError(
                f"This shadow belongs to process {self._process}, of which this one is a fork: here it has no thread "
                "that answers. Make a shadow in each process, after the fork."
            )

    def _snapshot(self) -> None:
        """Have all that is known written, as it is now; a failure is noted, and the next one is tried."""
        if self._snapshots is None:
            return
        try:
            self._tell_monitors()
            self._snapshots.write(self.batches, self._state())
        except Exception as error:  # of a monitor or policy whose state cannot be had
            self._snapshots.error = error
            self._note_failure(error)

    def _state(self) -> dict[str, Any]:
        """What may change later is copied."""
        full = self.method.state_dict()
        kept = {name: value for name, value in full.items() if not self._is_of_source(name)}
        return {
            "version": __version__,
            "identity": self._identity,
            "batches": self.batches,
            "answering": self.answering,
            "stopped": self.stopped,
            "prepared": self._prepared,
            "method": kept,
            "healthy": self._healthy,
            "candidate": self._candidate,
            "since": self._since,
            "rolled_back": self._rolled_back_to is self._healthy,
            "monitors": {monitor.name: copy.deepcopy(monitor.state_dict()) for monitor in self.monitors},
            "twins": {monitor.name: copy.deepcopy(monitor.state_dict()) for monitor in self._twins},
            "gathered": [gathering.state_dict() for gathering in (self._gathering, self._source_gathering)],
            "policy": {"kind": type(self.policy).__name__, "state": copy.deepcopy(self.policy.state_dict())},
            "labels": self._labels.state_dict(),
        }

    def _is_of_source(self, name: str) -> bool:
        """Whether a tensor of the method's state is one of the net's that it never changes."""
        return name.startswith("model.") and name not in self.method.adaptable and name in self._net_names

    @cached_property
    def _net_names(self) -> set[str]:
        return {f"model.{name}" for name in self._source.model.state_dict()}

    def _load(self, state: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`_snapshot`."""
        for name, value in self._identity.items():
            if state["identity"][name] != value:
                raise ConfigError(
                    f"The snapshots in the directory are of another {name}: {state['identity'][name]}; here it is "
                    f"{value}. Give another directory, or the {name} that they are of."
                )
        rest = {name: value for name, value in self.method.state_dict().items() if self._is_of_source(name)}
        self.method.load_state_dict({**rest, **state["method"]})
        self.batches, self.answering, self.stopped = state["batches"], state["answering"], state["stopped"]
        self._healthy, self._candidate, self._since = state["healthy"], state["candidate"], state["since"]
        self._rolled_back_to = self._healthy if state["rolled_back"] else None
        for monitors, states in ((self.monitors, state["monitors"]), (self._twins, state["twins"])):
            for monitor in monitors:
                if monitor.name in states:
                    monitor.load_state_dict(states[monitor.name])
        gatherings = (self._gathering, self._source_gathering)
        for gathering, gathered in zip(
            gatherings, state.get("gathered", ()), strict=False
        ):  # earlier versions had none
            gathering.load_state_dict(gathered)
        unprepared = [m for m in self.monitors if m.needs_source and m.name not in state["monitors"]]
        self._prepared = self._prepared or (state["prepared"] and not unprepared)
        if state["policy"]["kind"] == type(self.policy).__name__:
            self.policy.load_state_dict(state["policy"]["state"])
        self._labels.load_state_dict(state["labels"])

    def _note_written(self, number: int) -> None:
        self._metrics.add("snapshots_total")
        self._metrics.set("last_snapshot_seconds", time.time())

    def _note_failure(self, error: BaseException, **values: Any) -> None:
        self._metrics.add("failures_total")
        self._log("failure", batch=self.batches, error=in_one_line(error), **values)


def _policy(policy: Policy | Mapping[str, Any] | None) -> Policy:
    if isinstance(policy, Policy):
        return policy
    if policy is not None and not isinstance(policy, Mapping):
        raise ConfigError(f"policy must be a Policy, or a dict of options of Patience; got a {type(policy).__name__}.")
    options = dict(policy or {})
    check_options(options, "policy", Patience)
    return Patience(**options)


def _method(net: nn.Module, method: str | TTAMethod, options: Mapping[str, Any]) -> TTAMethod:
    if isinstance(method, str):
        return adapt(net, method, **options)
    if not isinstance(method, TTAMethod):
        raise ConfigError(
            "method must be the name of a method, or a method such as lightning_tta.adapt(net, 'tent'); got a "
            f"{type(method).__name__}. A shadow has monitors of its own, and needs no Watch."
        )
    if options:
        raise ConfigError(f"{', '.join(map(repr, options))}: options go with the name of a method, not with a method.")
    if method.model is net:
        raise ConfigError(
            "The method adapts the net itself, so nothing is left of the source. Leave out in_place=True."
        )
    return method


def _monitors(monitors: Wanted | Monitor | Sequence[Wanted | Monitor]) -> list[Monitor]:
    single = isinstance(monitors, (str, Mapping, Monitor))
    if not single and not isinstance(monitors, Iterable):
        raise ConfigError(
            f"monitors must be words, dicts of 'kind' and options, or Monitor objects, a list of them; got "
            f"{monitors!r}. For none: monitors=[]."
        )
    items: list[Any] = [monitors] if single else list(monitors)  # type: ignore[arg-type]
    made = [item if isinstance(item, Monitor) else make_monitors(listed(item))[0] for item in items]
    names = [monitor.name for monitor in made]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two monitors have the same name: {', '.join(names)}. Leave one of them out.")
    return made


def _estimates(monitors: Sequence[Monitor]) -> dict[str, float]:
    return {m.name: estimate for m in monitors if (estimate := m.estimate()) is not None}


def _declared(method: str) -> Metrics:
    metrics = Metrics()
    metrics.declare("info", "gauge", "Always 1; says what runs.", ["version", "method"])
    metrics.set("info", 1, version=__version__, method=method)
    metrics.declare(
        "requests_total", "counter", "Requests by result: answered, invalid, refused, failed, timeout.", ["result"]
    )
    metrics.declare("images_total", "counter", "Images answered, by who answered.", ["by"])
    metrics.declare("latency_seconds", "histogram", "From the request to its answer.", bounds=_SECONDS)
    metrics.declare("batch_images", "histogram", "Images of a micro-batch.", bounds=_SIZES)
    metrics.declare("queue_images", "gauge", "Images that wait for an answer.")
    metrics.declare(
        "pass_seconds", "histogram", "Per micro-batch: source, method, monitors.", ["part"], bounds=_SECONDS
    )
    metrics.declare("micro_batches", "gauge", "Micro-batches that both have predicted, restarts included.")
    metrics.declare(
        "skipped_images_total", "counter", "Images that the method has not adapted on: it was behind, or refused them."
    )
    metrics.declare("answering", "gauge", "1 for who answers now.", ["by"])
    metrics.declare("stopped", "gauge", "1 if the source answers alone after failures.")
    metrics.declare("estimated_accuracy", "gauge", "Estimated without labels, in [0, 1].", ["of", "monitor"])
    metrics.declare("labelled_accuracy", "gauge", "Of answers whose label is known, in [0, 1].", ["of"])
    metrics.declare("labels_total", "counter", "Labels that came for known answers.")
    metrics.declare("agreement", "gauge", "Share of the last micro-batch that both predict alike.")
    metrics.declare("monitor", "gauge", "What the monitors measure, by name.", ["value"])
    metrics.declare("alarms_total", "counter", "Alarms of the monitors.", ["reason"])
    metrics.declare("switches_total", "counter", "How often who answers has changed.", ["to"])
    metrics.declare("restores_total", "counter", "How often the method was brought back.", ["how"])
    metrics.declare("failures_total", "counter", "Errors of method, monitors, policy or snapshots.")
    metrics.declare("snapshots_total", "counter", "Snapshots written.")
    metrics.declare("last_snapshot_seconds", "gauge", "When the last one was written, in seconds since 1970.")
    return metrics
