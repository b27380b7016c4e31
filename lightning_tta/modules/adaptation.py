"""Adaptation at test time: a stream goes through a method, predictions and a report come out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from lightning_tta import collective
from lightning_tta.backbones import Backbone, state_digest
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.backbones.split import keep_classes
from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.protocol import CUSTOM_DATA, Protocol
from lightning_tta.data.streams import STREAM_KINDS, default_reset
from lightning_tta.errors import ConfigError, InputError, check_choice, check_range
from lightning_tta.guard.callback import Guard
from lightning_tta.imagenet_classes import class_subset
from lightning_tta.methods.base.execution import Capture, Execution, Precision
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components.additions import add, make_selecting
from lightning_tta.methods.components.tasks import as_task, check_additions
from lightning_tta.modules.classes import check_class_counts, check_labels, class_names_of, count_logits
from lightning_tta.modules.loading import load_source, source_recipe
from lightning_tta.run import batches
from lightning_tta.run.batches import StreamInput
from lightning_tta.run.board import StreamBoard
from lightning_tta.run.directory import withhold_loggers
from lightning_tta.run.measures import source_errors
from lightning_tta.run.options import check_precisions, where_moved
from lightning_tta.run.outcomes import Outcome
from lightning_tta.run.outputs import PredictionWriter, StreamLogger, StreamReport
from lightning_tta.run.own_loader import describe_loaders
from lightning_tta.run.pixels import Pixels
from lightning_tta.run.processes import ProcessMode, share_stream
from lightning_tta.run.progress import StreamProgress
from lightning_tta.run.readback import Moment, Transfer, UnreadBatch
from lightning_tta.run.resume import StateKeeper
from lightning_tta.run.stream_run import StreamRun, run_of
from lightning_tta.run.values import Values

ResetPolicy = Literal["auto", "never", "domain", "batch"]
PredictPolicy = Literal["method", "after"]
CALLBACKS: tuple[type[Callback], ...] = (
    *(StreamInput, PredictionWriter, StreamLogger, StreamBoard, StreamReport, StreamProgress),
    StateKeeper,  # last: what it saves must be in the files already
)
OUTCOMES: dict[str, Outcome] = {"images": Outcome(), "pixels": Pixels(), "regression": Values()}
"""What a run makes of the method's outputs, by task."""


def callbacks_with(writer: type[PredictionWriter]) -> tuple[type[Callback], ...]:
    """:data:`CALLBACKS` with another writer of predictions."""
    return tuple(writer if kind is PredictionWriter else kind for kind in CALLBACKS)


class AdaptationModule(LightningModule):
    """A method on a stream in ``predict``: callbacks, directory and account of the run, whatever the batches hold.

    Attributes:
        method: The method around its net.
        reset: As of :class:`TestTimeAdaptation`.
        execution: How the method computes.
        run: What the current or last predict run knows.
    """

    kinds: tuple[type[Callback], ...] = CALLBACKS
    method: TTAMethod
    reset: str
    execution: Execution

    def __init__(self) -> None:
        super().__init__()
        self.run: StreamRun | None = None
        self._loggers: list[Logger] = []
        self._input, self._keeper = StreamInput(), StateKeeper()

    def configure_callbacks(self) -> list[Callback]:
        """Files, curves, report and progress of every predict run, whichever Trainer runs it."""
        self.run = None
        self._loggers = withhold_loggers(self.trainer)
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        chosen = [next((c for c in callbacks if isinstance(c, kind)), None) or kind() for kind in self.kinds]
        self.trainer.callbacks = [c for c in callbacks if c not in chosen]  # type: ignore[attr-defined]
        self._input, self._keeper = cast(StreamInput, chosen[0]), cast(StateKeeper, chosen[-1])
        return chosen

    def setup(self, stage: str) -> None:
        """Find out what the run measures, and take its directory."""
        self.trainer.loggers = self._loggers  # nothing asks them to write before the run has its directory
        if stage != "predict":
            name, trains = type(self).__name__, "SourceClassifier, or another source of this package,"
            raise ConfigError(f"{name} runs in predict, not in {stage}. Use {trains} to {stage}.")
        check_precisions(self.execution.precision, self.trainer.precision)
        exact = torch.are_deterministic_algorithms_enabled()  # Lightning's --trainer.deterministic true
        exact &= not torch.is_deterministic_algorithms_warn_only_enabled()
        self.method.execution = replace(self.execution, deterministic=exact or self.execution.deterministic)
        self.method.check_capture(self.trainer.strategy.root_device)
        run = self._make_run()
        run.begin(self._keeper.resume)
        self.run = run

    def _make_run(self) -> StreamRun:
        """What this module's run measures."""
        raise NotImplementedError

    def _policy(self, kind: str, spans_domains: bool) -> str:
        """When the method returns to the source, on a stream of this kind.

        Raises:
            ConfigError: If it is to do so at domains that the batches span.
        """
        policy = self.reset
        if policy == "auto":
            policy = default_reset(kind) if kind in STREAM_KINDS else "never"
        if policy == "domain" and spans_domains:
            raise ConfigError(
                f"reset='domain' has no meaning on a {kind} stream: its batches span domains. Use 'never'."
            )
        return policy

    def _described_loaders(self) -> dict[str, Any]:
        """What the protocol says of a loader that is from no data module of this package."""
        return {**CUSTOM_DATA, "data_digest": describe_loaders(self.trainer.predict_loop._data_source.instance)}

    def on_predict_start(self) -> None:
        """Take up what was saved, or show the source to a method, or monitors, that must see it."""
        run = run_of(self)
        run.restore()
        run.defers = run.may_defer(self)
        if not run.method.prepared:
            batches.show_source(run.method, run.data, self._input.source_images, self.device)

    def _warn_of_skip(self, what: str, error: Exception | str) -> None:
        summary = run_of(self).summary
        if not (summary.skipped_batches or summary.skipped_images):
            warnings.warn(
                f"{what} is skipped, and so will be others like it (on_bad_batch='skip'): {error}", stacklevel=3
            )

    def _begins(self, run: StreamRun, domain: Tensor) -> None:
        """A batch of these domains comes: the method returns to the source where its policy says so."""
        if run.last_domain is None:
            run.summary.started = True
        if run.needs_reset(int(domain[0])):
            run.method.reset()
            run.summary.resets += 1
            run.since_reset = 0
        run.last_domain = int(domain[-1])
        run.since_reset += 1


class TestTimeAdaptation(AdaptationModule):
    """Applies a method to a stream in ``predict``.

    Batches are dicts with ``image`` (B, C, H, W) in [0, 1] and optionally ``index``, ``domain``, ``label`` (B,): whole
    numbers, ``index`` also names of files and ``domain`` also names. The method gets the images, nothing else. Works
    under any Trainer, ``inference_mode`` included. With ``task`` pixels or regression ``target`` takes the place of
    ``label``: masks (B, H, W) of whole numbers, below 0 where a pixel does not count, or values (B, D).

    The run writes ``predictions.csv``, ``batches.jsonl``, ``report.json`` and TensorBoard curves into a directory that
    follows from its configuration, so that the same command finds the same run, see
    :mod:`lightning_tta.run.directory`. What is saved, logged and shown is up to callbacks with options of their own:
    ``Trainer(callbacks=[StateKeeper(save_every=50), StreamBoard(images=0)])``, on the command line
    ``--state.save_every 50 --board.images 0``; the module adds those that the Trainer has not.

    Args:
        method: Called with the source model; returns the method, such as ``functools.partial(Tent, lr=1e-3)``. On the
            command line: a name (``tent``), a class (``Tent``) or a file (``configs/methods/tent.yaml``).
        source_ckpt: Source weights: a checkpoint of ``SourceClassifier`` or ``MetaTTT``, which knows its net, or a
            directory that holds one, or a weights file for ``backbone``; ``"pretrained"`` for the library's pretrained
            weights of ``backbone`` (downloads them), ``"none"`` for random weights.
        backbone: Name for :func:`lightning_tta.create_backbone`, or a module (used as it is, adapted in place). A class
            of your own is ``my_net.MyNet`` or ``path/to/my_net.py:MyNet``; a classifier of transformers, which brings
            its weights, ``hf/FOLDER``.
        num_classes: Number of classes of ``backbone``.
        backbone_options: Further arguments of the backbone; ``mean`` and ``std`` where its weights do not say them.
        task: What the net gives of an image: ``images``, one class; ``pixels``, a class for each pixel; ``regression``,
            values without classes; ``auto``: what the checkpoint says, else one class. The run then writes masks and
            mean IoU, or mean absolute error and R2.
        classes: Cut the net to these of its logits, before anything adapts: ``imagenet_a`` or ``imagenet_r`` (their
            200 of 1000), or positions. Labels are still those of the whole net.
        reset: When the method returns to the source: ``never``, at each new ``domain``, before each ``batch``, or
            ``auto``: as usual for the stream's kind (domain for iid, label_shift and polluted, never for continual,
            mixed and recurring).
        reset_every: Also return to the source after this many batches (RDumb, arXiv 2306.05401). It needs to know
            nothing of the stream, so it counts as part of the method, not of the protocol.
        predict: ``method``: the logits that the method returns; ``after``: those of a further forward pass after
            the step.
        processes: How several processes (``--trainer.devices 2 --trainer.strategy ddp``) share the stream.
            ``replicas``: each has whole domains, which a reset policy of domain or batch must part; equals one
            process. ``synchronised``: each has a part of every batch, of W times the batch size, and gradients and
            statistics are those of all; equals one process with that batch size, up to summation order. Only replicas
            save, resume and skip batches.
        select: What learns, of a method that learns by gradients: ``norm``, ``all``, adapters (``lora``, or a dict of
            ``kind`` and its options, ``{kind: lora, rank: 4}``), or a list of these, see
            :mod:`lightning_tta.methods.components.adapters`; ``None``: what the method learns by itself.
        statistics: Those of the BatchNorm layers, such as ``ema`` or ``auto``, whatever the method: a word, or
            a dict of ``kind`` and its options, ``{kind: ema, momentum: 0.02}``, see
            :mod:`lightning_tta.methods.components.statistics`; ``None``: those of the method.
        window: Adapt once every so many images, on all of them, and predict each when it comes: for streams of one or a
            few images at a time, see :meth:`~lightning_tta.methods.base.method.TTAMethod.slide`; ``None``: on each
            batch as it comes.
        reservoir: Keep up to so many states of the method, one for each domain that it tells apart by itself, see
            :class:`~lightning_tta.methods.components.reservoir.Reservoir`; or a dict of its options.
        prior: How predictions are corrected for the labels of the stream: ``em``, ``moving``, ``markov``, or a dict
            as for ``statistics``, see :mod:`lightning_tta.methods.components.priors`; ``None``: they are not.
        refine: How the predictions of a batch are refined then: ``lame``, ``cofa``, or a dict as for ``statistics``,
            see :mod:`lightning_tta.methods.components.refinements`; ``None``: they are not.
        gate: Adapt only while the stream differs from the source: ``poem``, or a dict as for ``statistics``, see
            :class:`~lightning_tta.methods.components.gates.PoemGate`; ``None``: on every batch.
        capture: Whether steps are recorded once and replayed, on CUDA, see
            :class:`~lightning_tta.methods.base.execution.Execution`.
        compile: Whether the net is compiled for recorded steps.
        precision: ``exact``, ``tf32`` or ``bf16``; ``None``: as ``--trainer.precision`` says.
        lean: Whether the backward pass keeps no more activations than what learns needs. These four, where they are
            left at their defaults, are as ``method`` made the method; so is its determinism, which the Trainer's
            ``deterministic=True`` turns on too.
        removed: Former options, refused with a sentence that names the new ones.

    Attributes:
        run: What the current or last predict run knows.
        class_names: Names of the classes, in the order of the logits, if the net or its checkpoint says them.

    Raises:
        ConfigError: If an option is wrong, before any data is read; when the run begins, if several processes cannot
            share it, or its directory is in use.
        FinishedError: When the run begins, if it is finished.
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
        backbone_options: dict[str, Any] | None = None,
        task: Literal["auto", "images", "pixels", "regression"] = "auto",
        classes: list[int] | str | None = None,
        reset: ResetPolicy = "auto",
        reset_every: int | None = None,
        predict: PredictPolicy = "method",
        processes: ProcessMode = "replicas",
        select: str | dict[str, Any] | list[Any] | None = None,
        statistics: str | dict[str, Any] | None = None,
        window: int | None = None,
        reservoir: int | dict[str, Any] | None = None,
        prior: str | dict[str, Any] | None = None,
        refine: str | dict[str, Any] | None = None,
        gate: str | dict[str, Any] | None = None,
        capture: Capture = "auto",
        compile: bool = False,
        precision: Precision | None = None,
        lean: Literal["auto"] | bool = "auto",
        **removed: Any,
    ) -> None:
        super().__init__()
        for name in removed:
            raise ConfigError(where_moved(name) or f"TestTimeAdaptation has no option {name!r}.")
        check_choice("processes", processes, ("replicas", "synchronised"))
        check_choice("reset", reset, ("auto", "never", "domain", "batch"))
        check_choice("predict", predict, ("method", "after"))
        check_choice("task", task, ("auto", "images", "pixels", "regression"))
        if reset_every is not None:
            check_range("reset_every", reset_every, 1, integer=True)
        self.reset, self.reset_every, self.predict, self.processes = reset, reset_every, predict, processes
        self.classes = class_subset(classes, "classes")
        pretrained = source_ckpt == "pretrained"
        source = load_source(None if pretrained else source_ckpt, backbone, num_classes, pretrained, backbone_options)
        self.recipe = source_recipe(source_ckpt, backbone, num_classes, backbone_options)
        self.task: str = getattr(source, "task", "images") if task == "auto" else task
        self.outcome = OUTCOMES[self.task]
        self.kinds = callbacks_with(self.outcome.writer)
        names = getattr(source, "class_names", None)
        if self.classes is not None and self.task != "images":
            raise ConfigError(f"classes is for one class an image, and the task is {self.task!r}. Leave it out.")
        if self.classes is not None:
            keep_classes(source, self.classes)
            names = [names[position] for position in self.classes] if names else None
        self.class_names: list[str] | None = names
        self._logits = len(self.classes) if self.classes is not None else count_logits(source)
        self.net_info = _describe(source)
        self.preprocessing = source.preprocessing if isinstance(source, Backbone) else {}
        wanted = {"statistics": statistics, "prior": prior, "refine": refine, "window": window}
        wanted |= {"reservoir": reservoir, "gate": gate}
        if self.task != "images":
            source = as_task(source, self.task)
            check_additions(source, [name for name, value in wanted.items() if value is not None])
        self.method = make_selecting(method, source, select)
        if not isinstance(self.method, TTAMethod):
            raise ConfigError(f"method must make a TTAMethod; it made a {type(self.method).__name__}.")
        with outside_inference_mode():
            add(self.method, **wanted)
        if self.task != "images":
            self.method.options["task"] = {"kind": self.task}
        chosen = Execution(capture=capture, compile=compile, precision=precision, lean=lean)
        self.execution = self.method.execution = self.method.execution.changed_by(chosen)
        self._transfer = Transfer()
        self._shares: list[list[int]] | None = None

    # Before the stream

    def _make_run(self) -> StreamRun:
        trainer = self.trainer
        module = getattr(trainer, "datamodule", None)
        data = module if isinstance(module, ShiftedDataModule) else None
        kind = CUSTOM_DATA["stream"] if data is None else data.stream_kind
        if data is not None and data.task != self.task:
            raise ConfigError(
                f"{type(data).__name__} is for task={data.task!r}, and the net's task is {self.task!r}. Give a net for "
                f"it, or say what the net gives: --model.task {data.task}."
            )
        if self.task != "images":
            self._check_dense(trainer)
        if data is not None and kind == "blind_spot":
            device = trainer.strategy.root_device
            data.set_blind_spots(source_errors(self.method.model.to(device), data, self.classes, device))
        if self.classes is None:
            pixels = self.task == "pixels"
            check_class_counts(class_names_of(trainer), self._logits, self.class_names, of_pixels=pixels)
            if data is not None and self._logits:
                check_labels(torch.cat([images.labels for _, images in data.stream_images]), self._logits)
        policy = self._policy(kind, data is not None and data.spans_domains)
        incompatible = ["save_every"] if self._keeper.save_every else []
        incompatible += ["on_bad_batch='skip'"] if self._input.skips else []
        sharing = share_stream(trainer, data, self.method, self.processes, policy, incompatible)
        self._shares = data.shard() if sharing.joined > 1 and data is not None else None
        if data is not None:
            data.marks_damaged = True
            problem = None if self._input.skips else data.known_problem()
            if problem is not None:
                raise batches.or_skip(problem)
            small = self.method.of_batches(data.batch_size * sharing.joined)
            if small:  # before the stream, and not at its first batch
                warnings.warn(small, stacklevel=2)
                self.method.told_of_batches = True
        protocol = Protocol.from_parts(
            self._described_loaders() if data is None else data.describe(),
            reset=policy,
            predict=self.predict,
            weights=f"{self.net_info['name']}: {self.net_info['weights']}",
            weights_digest=self.net_info["digest"],
            preprocessing=self.preprocessing,
            world_size=sharing.world,
            mode=sharing.mode,
        )
        return StreamRun(
            trainer,
            self.method,
            self.net_info,
            protocol,
            data,
            self.reset_every,
            self.classes,
            sharing,
            self.recipe,
            self.outcome.account,
        )

    def _check_dense(self, trainer: Any) -> None:
        """Refuse what runs with one class an image alone.

        Raises:
            ConfigError: With its name.
        """
        if trainer.world_size > 1:
            raise ConfigError(
                f"task={self.task!r} runs on one process; there are {trainer.world_size}. Use --trainer.devices 1."
            )
        if any(isinstance(callback, Guard) for callback in trainer.callbacks):
            raise ConfigError(f"Guard is for one class an image, and the task is {self.task!r}. Leave it out.")

    # Along the stream

    def forward(self, images: Tensor) -> Tensor:
        """Adapt on a batch of images and return its logits (B, K)."""
        method = self.method if self.run is None else self.run.method
        logits: Tensor = method(images)
        return logits if self.predict == "method" else method.predict(images, statistics="batch")

    @wraps(LightningModule.transfer_batch_to_device, assigned=())  # or Lightning warns of it beside any data module
    def transfer_batch_to_device(  # type: ignore[override]
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Only images go to the device; what a batch says of them is for the host, which would have to fetch it back.

        On CUDA they are copied beside what the device is at work on, without waiting where their memory is pinned.
        """
        if not isinstance(batch, dict) or not isinstance(batch.get("image"), Tensor):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return {**batch, "image": self._transfer(batch["image"], device)}

    def predict_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int | None = None
    ) -> dict[str, Tensor] | None:
        """One batch of the stream, in order: reset if the policy says so, adapt, predict.

        Several loaders are one stream, one after the other, each a domain unless its batches say otherwise.

        Returns :meth:`~lightning_tta.run.summary.BatchRecord.outputs`; ``None`` for a batch that an earlier run did;
        nothing where the batch is accounted for later, see :meth:`~lightning_tta.run.stream_run.StreamRun.may_defer`.
        """
        run = run_of(self)
        if run.is_done(batch):
            return None
        try:
            record = self._step(run, batch, batch_idx, dataloader_idx)
        except InputError as error:
            if not self._input.skips:
                raise
            run.settle()  # the one before is counted first
            self._warn_of_skip("A batch", error)
            return run.account(batches.refused_batch(batch, error, run, dataloader_idx))
        if self._shares is not None and not self._shares[batch_idx]:  # other processes have all of the batch
            return {name: value[:0] for name, value in record.record().outputs().items()}
        run.settle()  # the one before, while the device is at work on this one
        if run.defers and not self.trainer.predict_loop.batch_progress.is_last_batch:  # type: ignore[attr-defined]
            run.defer(record)
            return {}
        return run.account(record.record())

    def _step(self, run: StreamRun, batch: dict[str, Any], number: int, loader: int | None) -> UnreadBatch:
        images = batches.images_of(batch).contiguous(memory_format=self._input.memory_format)
        labels = batches.labels_of(batch, len(images), run, loader)
        damaged, why = batches.damage_of(batch, run.data, self._input.skips)
        whole, domain = images, labels.domain
        if damaged is not None:
            run.settle()
            self._warn_of_skip("An image", why)
            images = images[~damaged.to(images.device)]
        first = int(domain[0])
        if run.last_domain is None:
            resized = None if run.data is None else run.data.resized_to
            batches.warn_of_size(images, self.preprocessing, self.net_info, resized, run.method.crop)
            if self.classes is None and self._logits:
                check_labels(labels.label, self._logits)
        self._begins(run, domain)
        adapts = first not in run.frozen and (run.pace is None or run.pace.take())
        present = self._shares is None or bool(self._shares[number])
        start = Moment(run.device)
        with collective.joined(run.sharing.joined, present=present):
            logits = self(images) if adapts else run.method.predict(images, statistics="batch")
        done = Moment(run.device)
        logits = batches.spread(logits, damaged)
        truth = self.outcome.truth(batch, logits, labels.label, self.classes)
        check_labels(truth["label"], logits.shape[-1])
        stats = run.method.unread_stats() if adapts else {}
        rest = {"index": labels.index, "domain": domain, **truth, "adapted": adapts, "images": whole}
        rest |= {"files": labels.files, "damaged": damaged, "note": why}
        outputs = self.outcome.read(logits, whole)
        unread = UnreadBatch(outputs, stats, (start, done), rest, make=self.outcome.record, pack=run.defers)
        if run.pace is not None and adapts:
            run.pace.work(*unread.cost())
        return unread


def _describe(source: nn.Module) -> dict[str, Any]:
    if isinstance(source, Backbone):
        return source.info
    return {"name": type(source).__name__, "weights": "module", "digest": state_digest(source)}
