"""Adaptation at test time: a stream goes through a method, predictions and a report come out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from lightning_tta import collective
from lightning_tta.backbones import Backbone, state_digest
from lightning_tta.backbones.split import keep_classes
from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.protocol import CUSTOM_DATA, Protocol
from lightning_tta.data.streams import STREAM_KINDS, default_reset
from lightning_tta.errors import ConfigError, InputError, check_choice, check_range
from lightning_tta.guard.watch import Watch
from lightning_tta.imagenet_classes import class_subset
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.modules.loading import load_source
from lightning_tta.run.batches import images_of, outputs, skipped
from lightning_tta.run.matching import compare_size, labels_among, show_source, source_errors
from lightning_tta.run.measures import PeakMemory, check_forgetting
from lightning_tta.run.pace import Pace
from lightning_tta.run.pictures import StreamPictures
from lightning_tta.run.processes import Gathering, ProcessMode, share_stream
from lightning_tta.run.resume import ResumePolicy, StateKeeper
from lightning_tta.run.summary import StreamSummary

ResetPolicy = Literal["auto", "never", "domain", "batch"]
PredictPolicy = Literal["method", "after"]


class TestTimeAdaptation(LightningModule):
    """Applies a method to a stream in ``predict``.

    Batches are dicts with ``image`` (B, C, H, W) in [0, 1] and optionally ``index``, ``domain``, ``label`` (B,). The
    method gets the images, nothing else. Works under any Trainer, ``inference_mode`` included. A run directory gets
    ``predictions.csv``, ``batches.jsonl``, ``report.json`` and TensorBoard curves (see
    :mod:`lightning_tta.run.outputs`).

    Args:
        method: Called with the source model; returns the method, such as ``functools.partial(Tent, lr=1e-3)``. On the
            command line: a name (``tent``), a class (``Tent``) or a file (``configs/methods/tent.yaml``).
        source_ckpt: Source weights: a checkpoint of ``SourceClassifier`` or ``MetaTTT``, which knows its net, or a
            directory that holds one, or a weights file for ``backbone``; ``"none"`` for random weights.
        backbone: Name for :func:`lightning_tta.create_backbone`, or a module (used as it is, adapted in place).
        num_classes: Number of classes of ``backbone``.
        pretrained: Use the library's pretrained weights (downloads them).
        backbone_options: Further arguments of the backbone.
        reset: When the method returns to the source: ``never``, at each new ``domain``, before each ``batch``, or
            ``auto``: as usual for the stream's kind (domain for iid and label_shift, never for continual and mixed).
        predict: ``method``: the logits that the method returns; ``after``: those of a further forward pass after
            the step.
        reset_every: Also return to the source after this many batches (RDumb, arXiv 2306.05401). It needs to know
            nothing of the stream, so it counts as part of the method, not of the protocol.
        classes: Cut the net to these of its logits, before anything adapts: ``imagenet_a`` or ``imagenet_r`` (their
            200 of 1000), or positions. Labels are still those of the whole net.
        processes: How several processes (``--trainer.devices 2 --trainer.strategy ddp``) share the stream.
            ``replicas``: each has whole domains, which a reset policy of domain or batch must part; equals one
            process. ``synchronised``: each has a part of every batch, of W times the batch size, and gradients and
            statistics are those of all; equals one process with that batch size, up to summation order. Only replicas
            save, resume and skip batches.
        source_images: How many training images a method that needs source data sees before the stream.
        channels_last: Lay images out in memory with their channels last: the same predictions up to rounding;
            convolutions are often faster, but a net that takes ``view`` of its activations refuses.
        save_every: Save the whole state after every so many batches, so that a run that was killed can go on, and at
            the end, so that ``lightning-tta export`` finds the adapted weights. Of several processes each saves its
            own.
        resume: ``auto`` goes on from the last save in the run's directory, see :mod:`lightning_tta.run.resume`;
            ``never`` starts a new run.
        on_bad_batch: What a batch does that no method or not this net can take (empty, wrong channels or size, 0-255):
            ``raise`` the :class:`~lightning_tta.errors.InputError`, or ``skip`` it: no adaptation, -1 as predictions,
            counted in the report and left out of the accuracy. Images with NaN are no bad batch: see the methods.
        measure_forgetting: After the stream also predict clean source test images: ``source_accuracy_after``.
        log_images: How many images of each of the first batches TensorBoard shows, with the source's prediction and
            the adapted one, for which the net is put back to the source for one pass; 0: none.

    Raises:
        ConfigError: If an option is wrong, before any data is read.
        WeightsError: If the weights are missing or do not fit.
        UnsupportedModelError: If the method cannot run on the net.
    """

    __test__ = False  # not a test class, whatever pytest makes of the name

    def __init__(
        self,
        method: Callable[[nn.Module], TTAMethod],
        source_ckpt: str | None = None,
        backbone: str | nn.Module | None = None,
        num_classes: int | None = None,
        pretrained: bool = False,
        backbone_options: dict[str, Any] | None = None,
        reset: ResetPolicy = "auto",
        predict: PredictPolicy = "method",
        reset_every: int | None = None,
        classes: list[int] | str | None = None,
        source_images: int = 2000,
        channels_last: bool = False,
        processes: ProcessMode = "replicas",
        save_every: int | None = None,
        resume: ResumePolicy = "never",
        on_bad_batch: Literal["raise", "skip"] = "raise",
        measure_forgetting: bool = False,
        log_images: int = 4,
    ) -> None:
        super().__init__()
        check_choice("processes", processes, ("replicas", "synchronised"))
        check_choice("reset", reset, ("auto", "never", "domain", "batch"))
        check_choice("predict", predict, ("method", "after"))
        self.reset, self.predict, self.processes = reset, predict, processes
        self.keeper = StateKeeper(save_every, resume)
        check_choice("on_bad_batch", on_bad_batch, ("raise", "skip"))
        self.on_bad_batch = on_bad_batch
        self.watch: Watch | None = None  # set by the callback Guard
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if reset_every is not None:
            check_range("reset_every", reset_every, 1, integer=True)
        check_range("source_images", source_images, 1, integer=True)
        check_range("log_images", log_images, 0, integer=True)
        self.reset_every, self.source_images = reset_every, source_images
        self.classes = class_subset(classes, "classes")
        source = load_source(source_ckpt, backbone, num_classes, pretrained, backbone_options)
        if self.classes is not None:
            keep_classes(source, self.classes)
        self.net_info = self._describe(source)
        self.measure_forgetting = measure_forgetting
        self.pictures = StreamPictures(log_images)
        self.preprocessing = source.preprocessing if isinstance(source, Backbone) else {}
        self.method = method(source)
        if not isinstance(self.method, TTAMethod):
            raise ConfigError(f"method must make a TTAMethod; it made a {type(self.method).__name__}.")
        self.summary: StreamSummary | None = None
        self.protocol: Protocol | None = None
        self.pace: Pace | None = None
        self.gathering: Gathering | None = None
        self._parts: list[list[int]] | None = None
        self.peak_memory = PeakMemory()
        self._last_domain: int | None = None
        self._since_reset = 0
        self._description: dict[str, Any] = {}
        self._frozen: set[int] = set()

    @staticmethod
    def _describe(source: nn.Module) -> dict[str, Any]:
        if isinstance(source, Backbone):
            return source.info
        return {"name": type(source).__name__, "weights": "module", "digest": state_digest(source)}

    def configure_callbacks(self) -> list[Callback]:
        """Files, curves, report and progress of every predict run, whichever Trainer runs it."""
        from lightning_tta.run.board import StreamBoard
        from lightning_tta.run.outputs import PredictionWriter, StreamLogger, StreamProgress, StreamReport

        self.keeper.look_at(self)
        board = StreamBoard(self.pictures)
        return [PredictionWriter(), StreamLogger(), StreamReport(), StreamProgress(), board, self.keeper]

    def prepare_data(self) -> None:
        """Find the run that is to be continued; the Trainer has not written anything yet."""
        self.keeper.find(self)

    def setup(self, stage: str) -> None:
        """Check what the Trainer was asked to do.

        Raises:
            ConfigError: For a stage other than predict, or several processes where the method or stream forbids it.
        """
        if stage != "predict":
            raise ConfigError(f"TestTimeAdaptation runs in predict, not in {stage}. Use SourceClassifier to {stage}.")
        self.fix_protocol()
        self.keeper.begin(self)

    def fix_protocol(self) -> Protocol:
        """What this run measures, and this process's share of it; needs the source model as it was loaded."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ShiftedDataModule) and data.stream_kind == "blind_spot":
            device = self.trainer.strategy.root_device
            data.set_blind_spots(source_errors(self.method.model.to(device), data, self.classes, device))
        kind = data.stream_kind if isinstance(data, ShiftedDataModule) else CUSTOM_DATA["stream"]
        policy = self._policy(kind)
        apart = [*self.keeper.given, *["on_bad_batch='skip'"] * (self.on_bad_batch == "skip")]
        self.sharing = share_stream(self.trainer, data, self.method, self.processes, policy, apart)
        self._parts = data.shard() if self.sharing.joined > 1 and isinstance(data, ShiftedDataModule) else None
        description = self._description = data.describe() if isinstance(data, ShiftedDataModule) else CUSTOM_DATA
        if policy == "domain" and kind == "mixed":
            raise ConfigError("reset='domain' has no meaning on a mixed stream: its batches span domains. Use 'never'.")
        self.reset_policy = policy
        self.protocol = Protocol.from_parts(
            description,
            reset=policy,
            predict=self.predict,
            weights=f"{self.net_info['name']}: {self.net_info['weights']}",
            weights_digest=self.net_info["digest"],
            preprocessing=self.preprocessing,
            world_size=self.sharing.world,
            mode=self.sharing.mode,
        )
        return self.protocol

    def _policy(self, kind: str) -> ResetPolicy:
        usual = default_reset(kind) if kind in STREAM_KINDS else "never"
        return usual if self.reset == "auto" else self.reset

    def on_predict_start(self) -> None:
        """Start a new account, or take up that of a continued run."""
        data, description = getattr(self.trainer, "datamodule", None), self._description
        assert self.protocol is not None
        self.gathering = Gathering(self.sharing, self.protocol.hash, self.keeper.group)
        frozen = data.frozen_domains if isinstance(data, ShiftedDataModule) else []
        self._frozen = {number for number, name in enumerate(description["domains"]) if name in frozen}
        self.summary = StreamSummary(list(description["domains"]), frozen)
        charge = description.get("charge")
        self.pace = Pace(charge, description["interval"]) if charge else None
        self._last_domain, self._since_reset = None, 0
        self.watch = None  # of an earlier run; this one's comes with the first batch
        if self.measure_forgetting:
            check_forgetting(data)
        self.keeper.restore(self)
        if not self.method.prepared:
            show_source(self.method, data, self.source_images, self.device)
        self.peak_memory.start(self.device)

    def forward(self, images: Tensor) -> Tensor:
        """Adapt on a batch of images and return its logits (B, K)."""
        logits: Tensor = self.method(images)
        return logits if self.predict == "method" else self.method.predict(images)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor] | None:
        """One batch of the stream, in order: reset if the policy says so, adapt, predict.

        Returns:
            ``logits`` (B, K), and per image ``prediction``, ``confidence``, ``entropy``, ``index``, ``domain``,
            ``label`` (-1 where unknown). ``None`` for a batch that a continued run did before.
        """
        if self.keeper.is_done():
            return None
        assert self.summary is not None
        try:
            return self._step(batch, batch_idx, self.summary)
        except InputError as error:
            if self.on_bad_batch == "raise":
                raise
            return skipped(batch, self.summary, error)

    def _step(self, batch: dict[str, Tensor], number: int, summary: StreamSummary) -> dict[str, Tensor]:
        images = images_of(batch).contiguous(memory_format=self.memory_format)
        domain = batch.get("domain", torch.zeros(len(images), dtype=torch.int64))
        first = int(domain[0])
        if self._last_domain is None:
            compare_size(images, self.preprocessing, self.net_info)
            summary.started = True
        if self._needs_reset(first):
            (self.watch or self.method).reset()
            summary.resets += 1
            self._since_reset = 0
        self._last_domain = int(domain[-1])
        self._since_reset += 1
        frozen = first in self._frozen
        stopped = self.watch is not None and self.watch.stopped
        adapts = not frozen and not stopped and (self.pace is None or self.pace.take())

        present = self._parts is None or bool(self._parts[number])  # or other processes have the batch
        start = self._clock()
        with collective.joined(self.sharing.joined, present=present):
            logits = self(images) if adapts else self.method.predict(images)
        if self.watch is not None and adapts:
            logits = self.watch.review(images, logits, summary.batches)
        seconds = self._clock() - start
        stats = self.method.stats if adapts else {}
        if self.pace is not None and adapts:
            self.pace.work(stats, seconds)

        labels = labels_among(batch["label"].cpu(), self.classes) if "label" in batch else None
        output = outputs(logits, batch, summary.images, labels)
        if not present:
            return {name: value[:0] for name, value in output.items()}
        summary.update(output, stats, seconds, adapted=adapts)
        return output

    def _needs_reset(self, domain: int) -> bool:
        if self._last_domain is None:  # the stream starts with the source
            return False
        if self.reset_every is not None and self._since_reset >= self.reset_every:
            return True
        new = domain != self._last_domain and domain not in self._frozen
        return self.reset_policy == "batch" or (self.reset_policy == "domain" and new)

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
