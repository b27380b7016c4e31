"""The contract of every method: a plain module that wraps a net and adapts it while it predicts."""

from __future__ import annotations

import copy
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tta import collective
from lightning_tta.backbones.casts import FrozenCasts
from lightning_tta.backbones.copying import copied_whole, holds_parameters_elsewhere
from lightning_tta.backbones.dense import DenseModel
from lightning_tta.backbones.language import TokenModel
from lightning_tta.backbones.layout import wanted_layout
from lightning_tta.backbones.lean import lean_backward
from lightning_tta.backbones.norms import (
    MomentsRecord,
    batch_norm_layers,
    fixed_statistics,
    grouped_batch_statistics,
    weighted_batch_statistics,
)
from lightning_tta.backbones.passes import call_with, outside_inference_mode, safe_checkpoints
from lightning_tta.backbones.split import HeadSplit, features_at, module_at, recorded_calls
from lightning_tta.errors import (
    ConfigError,
    DataError,
    NotPreparedError,
    UnsupportedModelError,
    check_choice,
    check_range,
)
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.account import IMAGES, MOMENTS, Account, Statistics, StreamAccount
from lightning_tta.methods.base.capture import COUNTS, STEP, Replayable
from lightning_tta.methods.base.chunks import chunked
from lightning_tta.methods.base.correction import Correction
from lightning_tta.methods.base.custody import Custody, exclusive, reading
from lightning_tta.methods.base.description import Described
from lightning_tta.methods.base.first_pass import FirstPass
from lightning_tta.methods.base.gate import Gate
from lightning_tta.methods.base.generation import computed_once, generate, left_padded, read_generation
from lightning_tta.methods.base.host import host_has
from lightning_tta.methods.base.memory import DomainMemory
from lightning_tta.methods.base.plain import plain_net
from lightning_tta.methods.base.selection import read_flags, select_chosen, select_parameters, take_choice
from lightning_tta.methods.base.task import (
    Images,
    Task,
    explained,
    fill,
    float_dtype,
    fresh_casts,
    plain_model,
    with_gradients,
)
from lightning_tta.methods.base.tokens import PROMPTS_DIFFER, Tokens, check_mask_names
from lightning_tta.methods.base.values import TASKS
from lightning_tta.methods.base.window import Window
from lightning_tta.metrics import collapse_measures

Stats = dict[str, float]
PredictWith = Literal["stream", "batch"]
CHOSEN = "statistics."
"""How names of states begin that belong to chosen statistics."""
_FOR = {
    "images": "a method for images, or another task",
    "tokens": "'zerosiam', 'tent', 'come', 'eta', or another one with tokens in its docstring",
    "pixels": "'tent', 'zerosiam', 'eata', 'cotta', 'neo', 'norm'",
    "regression": "'actmad', 'norm', 'output_shift', which align statistics",
}
_MEMORY_ALONE = (
    "reservoir= goes with neither window= nor a refinement that needs features, as refine='lame'. Leave one of "
    "them out."
)


class TTAMethod(Described, Replayable, ABC):
    """Wraps a net; ``forward(x) -> logits`` adapts it on the way, and writes the declared state and nothing else.

    ``state_dict()`` is complete, :meth:`reset` exact. The net stays in eval mode, whatever mode the method is put in.
    Calls may come from many threads; one runs at a time (:meth:`hold` makes several one). Between calls nobody else may
    change the net: a method whose net has other weights or modules than it left refuses to go on.
    A method sees the input only: no labels, domains, trainer or device names.

    To write one: call ``super().__init__(model)``, declare what it may change with :meth:`state`, and implement
    :meth:`step`; with gradients start from :class:`~lightning_tta.methods.base.gradient.GradientMethod`. A step is
    tensors only: no ``bool(t)``, ``.item()``, ``x[mask]``. A sample that does not count has weight 0; a write that must
    not happen is masked (:meth:`write`). So a step can be captured, and summed over processes.

    Args:
        model: Pixels (B, C, H, W) in [0, 1] -> logits (B, K). Used and changed in place;
            :func:`lightning_tta.adapt` makes a copy first.
        steps: Adaptation steps per batch, at least 1. The logits are those of the last step.

    Attributes:
        returns: Whether the logits come from before or after the batch's own update.
        needs_source: Whether :meth:`prepare` must run before the stream; may depend on the options.
        needs_held_out: Whether the images that :meth:`prepare` sees must be such as the net was not trained on.
        prepared: Whether it has.
        image_shape: That of an image of the last batch, (C, H, W).
        required: Names of the net's parameters that required gradients when the method was made.
        choice: What is to be learned in the place of what the method selects; ``None``: nothing else.
        optimizers: By name; empty for methods without gradients. Their moments are state, and exist from the start.
        told_of_batches: Whether somebody was told what batches of the stream's size mean.
        task: What the input is: :class:`~lightning_tta.methods.base.task.Images`, or
            :class:`~lightning_tta.methods.base.tokens.Tokens`.
        rows: During a step over an input with several predictions a sample, which of these count (B, ...), bool;
            ``None``: all.
        small_batch: A first batch of fewer images than this, of a net with BatchNorm, is warned of: 8 where the batch's
            own statistics are taken, else 0.
        replaces_statistics: Whether BatchNorm runs with other statistics than the source's.
        skips_when_empty: Whether passes that cannot change anything, as no sample is kept, are left out where the host
            knows that at no cost: on a CPU. On other devices they run, and their result is masked.
        images_apart: Whether passes treat each image on its own, so that a batch has no statistics: chosen ones are
            then taken from a pass over the images, one more forward pass, and stay the same for all that follow.
        joins_images: Whether the prediction of an image depends on others of the batch, beside BatchNorm's statistics.
        crop: Shorter side that the method itself resizes images to, and the side of the middle square that it then
            cuts out for the net; ``None``: it gives the net what it is given.
        own_statistics: Why a method's BatchNorm statistics cannot be chosen; empty where they can.
        own_prior: Why no prior can be put on the predictions, and what to do; empty where one can.
        step_on_host: Why a step cannot be captured as a whole, but only the parts that it gives to :meth:`replayed`;
            empty: it is tensors only.
    """

    returns: Literal["before the step", "after the step"] = "before the step"
    needs_source: bool = False
    needs_held_out: bool = False
    task: Task = Images()
    rows: Tensor | None = None
    skips_when_empty: bool = True
    images_apart: ClassVar[bool] = False
    joins_images: ClassVar[bool] = False
    crop: tuple[int, int] | None = None
    own_statistics: str = ""
    own_prior: str = ""
    step_on_host: str = ""
    _no_plain_net_either: str = ""  # because of what was added

    def __init__(self, model: nn.Module, *, steps: int = 1) -> None:
        super().__init__()
        check_range("steps", steps, 1, integer=True)
        plain = plain_model(model).eval()
        self.required = frozenset(name for name, p in plain.named_parameters() if p.requires_grad)
        self._flags = read_flags(plain)
        self.choice = take_choice(plain)
        self._holds_parameters_elsewhere = holds_parameters_elsewhere(plain)
        self.task = self._task_of(plain)
        self.small_batch = 8 if self.uses_batch_statistics else 0
        self.replaces_statistics = self.uses_batch_statistics or type(self).running is not TTAMethod.running
        self._first_pass = FirstPass()
        self.model = plain.requires_grad_(False)
        self._casts = FrozenCasts(self.model)
        self._layout: torch.memory_format | None = None  # of the images; None: as they come
        self._layout_chosen = False
        self._custody = Custody(self.model, self.name, self._lent)
        self.register_load_state_dict_post_hook(_take_stock)  # type: ignore[no-untyped-call]
        self.steps = steps
        self.prepared = not self.needs_source
        self.optimizers: dict[str, Optimizer] = {}
        self._module_at: dict[float, str] = {}
        self._batch_size = 0
        self.image_shape: list[int] | None = None
        self._unrecorded: Tensor | None = None  # the batch, until its pass comes whose statistics are accounted for
        self._account: Account | None = None
        self.account_chosen = self.told_of_batches = False
        self._window: Window | None = None
        self._memory: DomainMemory | None = None
        self._gate: Gate | None = None
        self.corrections: list[Correction] = []
        self._features_seen: Tensor | None = None  # of the batch, for the corrections that want them
        if self.uses_batch_statistics and batch_norm_layers(plain):
            with torch.no_grad():
                self._account = StreamAccount(self, plain)
            self.keep_wide(*self._account.float32)
        self.scalars = {}, dict.fromkeys(COUNTS, 0)
        self._logits: Tensor | None = None  # of the last batch
        self.rows = None  # an attribute of its own from the start: a recording looks at these
        self._row_measures: dict[str, Tensor] = {}  # of the last batch, where a sample has several predictions
        self._stats: Stats | None = {}  # None: not computed yet

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("forward", "reset", "prepare"):  # whoever overrides one need not think of threads
            if name in vars(cls):
                setattr(cls, name, exclusive(vars(cls)[name]))

    def _task_of(self, model: nn.Module) -> Task:
        kind = model.kind if isinstance(model, DenseModel) else "images"
        if kind not in self.tasks:
            net = type(model.net if isinstance(model, DenseModel) else model).__name__
            reason = "; a regression has no classes, of which it could take entropies" if kind == "regression" else ""
            raise UnsupportedModelError(
                f"'{self.name}' adapts on {' or '.join(sorted(self.tasks))}, and the task of {net} is {kind}{reason}. "
                f"Use {_FOR[kind]}."
            )
        if isinstance(model, TokenModel):
            self.step_on_host = PROMPTS_DIFFER
            return Tokens(model, **model.settings)
        if isinstance(model, DenseModel):
            return TASKS[kind]()
        return copy.copy(self.task)  # it remembers what it has warned of

    # What a method implements ----------------------------------------------------------------------------------------

    @abstractmethod
    def step(self, x: Tensor) -> Tensor:
        """One adaptation step on usable samples (B, C, H, W); returns logits (B, ..., K). Gradients are enabled."""

    def infer(self, x: Tensor) -> Tensor:
        """The logits as this method predicts, without adapting. Override where that is not a pass of the net."""
        return self.logits(x)

    def infer_plain(self, x: Tensor) -> Tensor:
        """The logits as near to :meth:`infer` as one pass of a plain net, which keeps images apart, can give."""
        return self.infer(x)

    def running(self) -> AbstractContextManager[None]:
        """How the net runs in every pass: by default with batch statistics, if :attr:`uses_batch_statistics`."""
        return nullcontext() if self._account is None else self._account.running(self)

    def stream_statistics(self) -> Statistics | None:
        """Mean and variance (C,) with which BatchNorm runs after the stream, by layer; ``None``: the source's.

        An empty dict: of a method that takes them from the stream, and has seen no batch yet. Asks the device.
        """
        return None if self._account is None else self._account.statistics(self, self.model)

    def take_up(self, account: Account | None) -> None:
        """Run BatchNorm with other statistics than the method's own, in all passes; before the first batch.

        Args:
            account: Says which, and what is kept of them; its constructor has declared its state on this method, after
                :meth:`leave_statistics`. ``None``: the source's.
        """
        self._account = account
        self.account_chosen = True
        self.small_batch = 0 if account is None else account.small_batch
        self.uses_batch_statistics = self.replaces_statistics = account is not None
        if account is not None and not account.synchronized:
            self.parallel = frozenset({"replicas"})  # type: ignore[misc]
        if account is not None:
            self.keep_wide(*account.float32)
            self._no_plain_net_either = account.no_plain_net

    def leave_statistics(self) -> None:
        """Forget the state of the statistics that the method has run with."""
        if isinstance(self._account, StreamAccount):
            self.withdraw(MOMENTS, IMAGES)
        self.withdraw(*(name for name in self.rest if name.startswith(CHOSEN)))  # which a method has for its own
        self._account = None

    def of_batches(self, images: int) -> str:
        """What batches of so many images mean for the method, and what to do; empty where they are enough."""
        if not self.small_batch or images >= self.small_batch or not batch_norm_layers(self.model):
            return ""
        if self.task.kind == "pixels":  # an image alone has many positions
            return ""
        return (
            f"'{self.name}' {self._advice}; batches of {images} image{'s' if images > 1 else ''} are too small for "
            "that: accuracy may fall far below that of the source. Give larger batches; or window=64, which adapts on "
            "the last 64 images together; or statistics='auto', which keeps statistics over the stream (a step on each "
            "image still is one on little); or use a method that takes images one by one ('memo', 'single_image_bn', "
            "'neo')."
        )

    @property
    def _advice(self) -> str:
        return StreamAccount.advice if self._account is None else self._account.advice

    def extra_repr(self) -> str:
        """What is to be known of the size of batches."""
        if self._window is not None:
            return f"adapts once every {self._window.size} images, on all of them; predicts each at once"
        if self.small_batch and batch_norm_layers(self.model):
            return f"{self._advice}; so give batches of {self.small_batch} or more"
        return "batches of any size"

    def remember(self, memory: DomainMemory) -> None:
        """Keep a state of its own for each domain that a memory tells apart.

        Raises:
            ConfigError: If there is a window, or a correction of the predictions that needs features.
        """
        if self._window is not None or self._wants_features:
            raise ConfigError(_MEMORY_ALONE)
        self._memory = memory
        self.needs_source, self.prepared = True, False
        self.parallel = frozenset({"replicas"})  # type: ignore[misc]
        self._no_plain_net_either = (
            "it has a state for each domain that it has met. Deploy the method itself, or adapt without a memory"
        )

    @property
    def has_memory(self) -> bool:
        """Whether it keeps a state of its own for each domain."""
        return self._memory is not None

    @property
    def has_window(self) -> bool:
        """Whether it adapts on a window of the last images, and predicts each image among them."""
        return self._window is not None

    def put_behind(self, gate: Gate) -> None:
        """Adapt only while a gate is open; else the source answers, with its own statistics and without corrections.

        Args:
            gate: Its constructor has declared its state on this method.
        """
        self._gate = gate
        self.needs_source, self.needs_held_out, self.prepared = True, True, False
        self.parallel = frozenset({"replicas"})  # type: ignore[misc]

    def slide(self, images: int) -> None:
        """Adapt once every so many images, on all of them together, however few come at a time.

        Each image is predicted when it comes: where the batch's own statistics are taken, in a pass over the last
        ``images`` images, which is so many times as dear as one over the image; else alone. After each full window
        the method is where batches of this size would have brought it.

        Args:
            images: At least 2.

        Raises:
            ConfigError: If it is out of range, or a correction of the predictions needs features.
        """
        if self._wants_features:
            raise ConfigError(f"window={images} and refine= exclude each other. Leave one of them out.")
        if self.images_apart:
            raise ConfigError(f"window={images}: '{self.name}' treats each image on its own already. Leave window out.")
        if self._memory is not None:
            raise ConfigError(_MEMORY_ALONE)
        self._window = Window(self, images)
        self.small_batch = 0
        self.parallel = frozenset({"replicas"})  # type: ignore[misc]

    @contextmanager
    def normalizing(self) -> Iterator[None]:
        """While active, BatchNorm runs as the method says (:meth:`running`), or with statistics chosen instead."""
        if not self.account_chosen:
            with self.running():
                yield
        elif self._account is None or self.images_apart:
            yield
        else:
            with self._account.running(self):
                yield

    @contextmanager
    def _statistics_apart(self, x: Tensor) -> Iterator[None]:
        """Of a method with ``images_apart``: take statistics of a batch, and hold them while active."""
        if self._account is None or not self.images_apart:
            yield
            return
        account = self._account
        with torch.no_grad(), account.running(self):
            account.look(self, x)
            account.begin(self)
            try:
                logits = self.task.logits(self.model(x))
            finally:
                account.end()
            account.note(self, logits)
        account.take(self, self._batch_size, 0)
        with fixed_statistics(self.model, account.statistics(self, self.model) or {}):
            yield

    @contextmanager
    def counting(self, weights: Tensor) -> Iterator[None]:
        """While active, BatchNorm that takes the batch's own statistics takes them of the samples that count.

        Args:
            weights: (B,), bool or >= 0. Other statistics than the batch's own are of all samples.
        """
        own = isinstance(self._account, StreamAccount)
        kept = safe_checkpoints(recompute=False)  # in the backward pass the statistics are others again
        with kept, weighted_batch_statistics(self.model, weights) if own else nullcontext():
            yield

    def put_on(self, correction: Correction) -> None:
        """Correct all predictions, after the corrections that are there; before the first batch.

        Args:
            correction: Its constructor has declared its state on this method.

        Raises:
            ConfigError: If it wants features, and there is a memory of domains.
            UnsupportedModelError: If it wants features, and the net has no linear layer that they could go into.
        """
        if correction.wants_features:
            if self._memory is not None:
                raise ConfigError(_MEMORY_ALONE)
            assert self.split
        if not correction.synchronized:
            self.parallel = frozenset({"replicas"})  # type: ignore[misc]
        self.corrections.append(correction)

    def stream_weights(self) -> dict[str, Tensor]:
        """Values of the net's parameters with which the method predicts, by name, where the net has others."""
        return {}

    @exclusive
    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Collect what the method needs from source data, once, before the stream. Most need nothing."""
        for option, part in (("reservoir", self._memory), ("gate", self._gate)):
            if part is None:
                continue
            if hasattr(source_batches, "__next__") and type(self).prepare is not TTAMethod.prepare:
                raise DataError(
                    f"{option}= and '{self.name}' both look at the source batches, and an iterator gives them once: "
                    f"got a {type(source_batches).__name__}. Give a list of batches, or a DataLoader."
                )
            part.prepare(self, source_batches)
        self.prepared = True

    def check_not_prepared(self) -> None:
        """Refuse a second :meth:`prepare` of a method whose source is what the first has trained.

        Raises:
            ConfigError: If there was one.
        """
        if self.prepared:
            raise ConfigError(
                f"'{self.name}' is prepared already, and what it has trained there is its source now: once more would "
                f"train on from that. reset() goes back to it; to prepare anew make a new one, adapt(net, "
                f"'{self.name}')."
            )

    # What a method uses ----------------------------------------------------------------------------------------------

    def logits(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        groups: int = 1,
        *,
        accounted: bool | None = None,
    ) -> Tensor:
        """A pass of the net.

        Args:
            x: Samples (B, C, H, W).
            weights: Other values for some of the net's parameters, by name; cast to their dtype.
            groups: Number of equal batches in ``x``, one after the other: BatchNorm takes the statistics of each apart.
            accounted: Whether the first such pass over the batch, as it came to the step, is the one whose BatchNorm
                statistics go into the account of the stream; by default the one with the net's own weights.

        Returns:
            Logits (B, ..., K).
        """
        with nullcontext() if groups == 1 else grouped_batch_statistics(self.model, groups):
            if weights is None:
                return self._accounted(x, accounted is not False, lambda: (None, self.task.logits(self.model(x))))[1]
            parameters = dict(self.model.named_parameters(remove_duplicate=False))
            cast = {parameters[name]: weight.to(parameters[name].dtype) for name, weight in weights.items()}
            if self._holds_parameters_elsewhere and not torch.is_grad_enabled():
                with self.lend(list(cast)):  # in their places it would be missed
                    for parameter, weight in cast.items():
                        parameter.copy_(weight)
                    return self._accounted(x, accounted is True, lambda: (None, self.task.logits(self.model(x))))[1]
            run = lambda: (None, self.task.logits(call_with(self.model, cast, x)))  # noqa: E731
            return self._accounted(x, accounted is True, run)[1]

    def features(self, x: Tensor, at: float | Sequence[str] | Literal["head"] = "head") -> tuple[Any, Tensor]:
        """Features and logits in one pass.

        Args:
            x: Samples (B, C, H, W).
            at: ``head``: the input of the last linear layer, (B, D). A number in (0, 1]: the output of the stage or
                block at this share of the net's depth, in the order of execution. Names of modules: a dict of their
                outputs.

        Returns:
            Features, with their graph, and logits (B, ..., K).

        Raises:
            UnsupportedModelError: If the net does not end in a linear layer, or a named module does not run.
        """
        return self._accounted(x, True, lambda: self._features(x, at))

    def judged(self, x: Tensor, objective: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """A pass of the net, and the loss of each of its predictions.

        Args:
            x: Samples, as :meth:`step` gets them.
            objective: Logits (..., K) -> losses (...).

        Returns:
            Logits (B, ..., K) and losses (B, ...), these with their graph. Over tokens the logits have none, and the
            losses are those of the positions that count, 0 elsewhere.
        """
        if not self.task.in_chunks:
            logits = self.logits(x)
            return logits, objective(logits)
        features, logits = self.features(x)
        return logits, self.by_rows(lambda z: objective(self.split.head(z)), features)

    def by_rows(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """``function(*tensors)``; over tokens some rows at a time, computed again in the backward pass.

        Args:
            function: Of tensors (N, ...), returns a tensor (N,) or a tuple of such, each row by itself.
            *tensors: (B, ..., D), the rows of the first dimensions.

        Returns:
            What the function returns; over tokens (B, T), of the positions that count, 0 elsewhere. The host is asked
            how many these are.
        """
        if not self.task.in_chunks:
            return function(*tensors)
        assert self.rows is not None
        return chunked(function, tensors, self.rows, self.task.chunk)  # type: ignore[attr-defined]

    def _features(self, x: Tensor, at: float | Sequence[str]) -> tuple[Any, Tensor]:
        if isinstance(at, str) and self.task.in_chunks:
            return self.split.before_head(x)
        if isinstance(at, str):
            features, logits = self.split(x)
            return features.clone() if features.is_inference() else features, logits
        if isinstance(at, (int, float)):
            if at not in self._module_at:
                with self._first_pass.aside(self.model):  # a copy of the net is asked
                    self._module_at[at] = module_at(self.model, at)
            outputs, output = features_at(self.model, x, [self._module_at[at]])
            return outputs[self._module_at[at]], self.task.logits(output)
        outputs, output = features_at(self.model, x, at)
        return outputs, self.task.logits(output)

    @contextmanager
    def computing(self, device: torch.device) -> Iterator[None]:
        """While active, passes of the net on ``device`` compute as :attr:`execution` says."""
        if device.type == "cuda" and not self._layout_chosen:
            self._layout_chosen = True
            self._lay_out(wanted_layout(self.model, device, self.execution.precision_on(device)))
        dtype = torch.float32 if self.execution.precision is None else float_dtype(self.model)
        with self.execution.active(device, dtype), self._casts.active(device):
            yield

    @contextmanager
    def passes(self) -> Iterator[None]:
        """While active, passes of the net are counted, and see images as given; inside :meth:`running`."""
        statistics = self.replaces_statistics
        watch = self._first_pass.watch(self.model, lambda: self.count("forwards"), statistics=statistics)
        lean = self.execution.lean if self._flags.learned and torch.is_grad_enabled() else False
        saves = lean and not self.execution.compile
        less = lean_backward(self.model, only_free=lean == "auto") if saves else nullcontext()
        with safe_checkpoints(), watch, less:
            yield

    @property
    def has_run(self) -> bool:
        """Whether the net has taken a batch."""
        return self._first_pass.has_run

    @property
    def ran(self) -> frozenset[str] | None:
        """Names of the net's modules with parameters that run in a pass; ``None`` as long as it is not known."""
        return self._first_pass.ran

    @property
    def split(self) -> HeadSplit:
        """Where the net parts into features and head: its last linear layer, unless the method names another."""
        if "_split" not in self.__dict__:
            self.__dict__["_split"] = HeadSplit(self.model)  # not a module of its own
        split: HeadSplit = self.__dict__["_split"]
        return split

    @split.setter
    def split(self, split: HeadSplit) -> None:
        self.__dict__["_split"] = split

    def select(
        self,
        what: str | re.Pattern[str],
        *,
        frozen_fraction: float = 0.25,
        include_frozen: bool = False,
    ) -> dict[str, nn.Parameter]:
        """Parameters of the net, by name: those that a method may :meth:`state` or learn.

        If the user has chosen others, by the option ``select``, it is these.

        Args:
            what: ``norm``: weight and bias of the normalisation layers; ``early_norm``: without those of the net's last
                stages or blocks, in the order of execution; ``all``; or a pattern that names must match as a whole.
            frozen_fraction: Of ``early_norm``: the share of the stages or blocks that is left out.
            include_frozen: Also take what the user had frozen (``requires_grad = False``) in a net of which other
                parameters were not. They stay frozen otherwise.

        Raises:
            UnsupportedModelError: If there is none.
        """
        frozen = frozenset() if include_frozen else self._flags.frozen
        if self.choice is not None:
            return select_chosen(self.model, self.choice, frozen_fraction, frozen)
        return select_parameters(self.model, what, frozen_fraction, frozen)

    def state(self, name: str, tensor: Tensor, **settings: Any) -> Tensor:
        """Declare a tensor that the method may change, see :meth:`~lightning_tta.methods.base.state.State.state`."""
        if name.startswith("model.") and isinstance(tensor, nn.Parameter):
            self._flags.learned.add(name.removeprefix("model."))
        return super().state(name, tensor, **settings)

    def known(self, condition: Tensor) -> bool:
        """Whether a condition, 0-dimensional, is true and the host knows it at no cost.

        ``False`` says nothing. For leaving out passes whose result is masked anyway, and for nothing else.
        """
        if not self.skips_when_empty or not host_has(condition):
            return False
        return bool(condition.detach().numpy())  # reads the host's own memory; no synchronisation

    def batch_among(self, tensors: Sequence[Tensor]) -> int:
        """Which of them is the batch whose pass is still to be accounted for; -1 for none."""
        return next((n for n, tensor in enumerate(tensors) if tensor is self._unrecorded), -1)

    def set_batch(self, x: Tensor) -> None:
        """The same batch, in another tensor."""
        self._unrecorded = x

    def noted_statistics(self) -> tuple[Tensor, ...]:
        """What was accounted for and not yet taken in."""
        noted = None if self._account is None else self._account.noted
        statistics = () if noted is None else tuple(map(torch.as_tensor, noted))
        if not self._wants_features or (self._features_seen is None and not statistics):
            return statistics
        return (torch.empty(0) if self._features_seen is None else self._features_seen, *statistics)

    def note_statistics(self, noted: tuple[Tensor, ...]) -> None:
        """Counterpart of :meth:`noted_statistics`; the batch is accounted for."""
        self._unrecorded = None
        if self._wants_features:
            features, *rest = noted
            self._features_seen, noted = features if features.numel() else None, tuple(rest)
        if self._account is not None:
            self._account.noted = noted or None

    # What users call -------------------------------------------------------------------------------------------------

    @exclusive
    def forward(self, x: Tensor) -> Tensor:
        """Adapt on a batch and predict it.

        Images with non-finite pixels are left out of the adaptation and get zero logits (the uniform distribution);
        ``stats["nonfinite_images"]`` counts them. Works under ``no_grad`` and ``inference_mode`` too.

        Args:
            x: Images (B, C, H, W), floating point, pixels in [0, 1], B >= 1.

        Returns:
            Logits (B, K), at least float32, detached.

        Raises:
            InputError: If the input is no batch of images in [0, 1], or the net refuses it. Nothing has changed.
            NotPreparedError: If the method needs source data and has not seen any.
        """
        self._check_prepared()
        x = self.task.take_in(x)
        usable = self.task.usable(x)
        self.image_shape = list(x.shape[1:])
        number = int(usable.sum())
        self.scalars = {}, {**dict.fromkeys(COUNTS, 0), "nonfinite_images": len(usable) - number}
        self._stats, self._logits, self._row_measures = None, None, {}
        self._warn_of_small_batch(number)
        if self._gate is None or not number:
            return self._answer(x, usable, number)
        source = self._source_logits(x, usable, at_source=not self._gate.is_open(self))
        if self._gate.admits(self, source):
            logits = self._answer(x, usable, number)
        else:
            self._logits = source.clone()
            logits = fill(source, usable)
        self.scalars[0].update(self._gate.notes(self))
        return logits

    @torch.no_grad()
    def _source_logits(self, x: Tensor, usable: Tensor, *, at_source: bool) -> Tensor:
        """What the source net says of usable images, with its own statistics; ``at_source``: it is there already."""
        seen = explained(self.model, x, has_run=self.has_run)
        with seen, outside_inference_mode(), torch.no_grad(), self.computing(x.device), fresh_casts(), self.passes():
            images = x if bool(usable.all()) else x[usable.to(x.device)]
            with nullcontext() if at_source else self.at_source():
                images = self._laid_out(self.task.cast(images, float_dtype(self.model)))
                logits: Tensor = self.task.logits(self.model(images))
        return at_least_float32(logits)

    def _answer(self, x: Tensor, usable: Tensor, number: int) -> Tensor:
        whole = number == len(usable)
        if self._window is not None and number:
            return self._through_window(self._window, x, usable)
        if self._memory is not None and number:
            return self._remembering(self._memory, x, usable)
        with self._capture.deciding(self, x, whole):
            return self._adapt_and_predict(x, usable, number)

    def _check_prepared(self) -> None:
        if not self.prepared:
            raise NotPreparedError(
                f"{type(self).__name__} must see source data before the stream: call prepare(source_batches) with "
                f"{self.task.source_batch}, and 'label' (B,) where the method needs labels, of the training set."
            )

    def _remembering(self, memory: DomainMemory, x: Tensor, usable: Tensor) -> Tensor:
        """Step from the state that the memory has for such batches."""
        x = x if bool(usable.all()) else x[usable.to(x.device)]
        device = x.device

        @contextmanager
        def running() -> Iterator[Tensor]:
            seen = explained(self.model, x, has_run=self.has_run)
            with seen, outside_inference_mode(), self.computing(device), fresh_casts(), self.passes(), torch.no_grad():
                yield self._laid_out(self.task.cast(x, float_dtype(self.model)))

        with running() as images:
            style = memory.style(self, images)
        with running() as images, self.normalizing():
            memory.assign(self, style, lambda: self.infer(images))
        with self._capture.deciding(self, x, True):
            logits = self._adapt_and_predict(x, torch.ones(len(x), dtype=torch.bool), len(x))
        memory.store(self)
        logits = self._corrected(x, logits, learn=True)
        self._logits = logits.clone()
        return fill(logits, usable)

    def _through_window(self, window: Window, x: Tensor, usable: Tensor) -> Tensor:
        """Predict each image among the last ones, and step where a window is full."""
        x, logits = x[usable.to(x.device)], []
        try:
            with outside_inference_mode():
                for images, part, is_full in window.parts(self, x):
                    self.count(
                        "images_in_passes",
                        part.stop - part.start if self._predicts_alone and not is_full else len(images),
                    )
                    if is_full:
                        with self._capture.deciding(self, images, True):
                            seen = torch.ones(len(images), dtype=torch.bool)
                            logits.append(self._adapt_and_predict(images, seen, len(images))[part])
                    else:
                        logits.append(self._in_context(images, part))
        except BaseException:
            window.look_again()
            raise
        together = self._corrected(x, torch.cat(logits), learn=True)
        self._logits = together.clone()
        return fill(together, usable)

    @property
    def _is_shut(self) -> bool:
        """Whether a gate lets the source answer."""
        return self._gate is not None and not self._gate.is_open(self)

    @property
    def _predicts_alone(self) -> bool:
        """Whether the prediction of an image does not depend on others that come with it."""
        own = self.uses_batch_statistics and (self._account is None or not self._account.images_apart)
        return not own and not self.joins_images

    @torch.no_grad()
    def _in_context(self, images: Tensor, part: slice) -> Tensor:
        """Logits of a part of a window, as the method predicts now: among the others if it takes batch statistics."""
        alone = self._predicts_alone
        statistics = self.stream_statistics() if alone else {}
        seen = explained(self.model, images, has_run=self.has_run)
        with seen, self.computing(images.device), fresh_casts(), self._running(statistics) as infer, self.passes():
            images = self._laid_out(self.task.cast(images, float_dtype(self.model)))
            logits = infer(images[part]) if alone else infer(images)[part]
        return at_least_float32(logits)

    def _adapt_and_predict(self, x: Tensor, usable: Tensor, number: int) -> Tensor:
        whole = number == len(usable)
        key = self._capture.key(STEP, (x,)) if self._capture.active and not self.step_on_host else None
        recording = None if key is None else self._capture.recordings.get(key)
        if recording is not None:
            self._casts.keep_up()
            with outside_inference_mode():
                replayed: Tensor = self._capture.replay(self, recording, (x,))
                return replayed
        with (
            explained(self.model, x, has_run=self.has_run),
            self.computing(x.device),
            with_gradients(x, float_dtype(self.model)) as x,
            self.normalizing(),
            self.passes(),
        ):
            x = self._laid_out(x if whole else x[usable.to(x.device)])
            steps = self._all_steps
            logits = steps(x) if key is None else self._capture.run(self, STEP, steps, (x,), key)
        measures = self.task.measures(logits, x) if number else {}
        if measures is not None:
            self._row_measures = measures
        else:
            self._logits = logits.clone()  # for stats; the caller may write to what it gets
        return fill(logits, usable)

    def _all_steps(self, x: Tensor) -> Tensor:
        return self.task.answer(self._adapted(x))

    def _adapted(self, x: Tensor) -> Tensor:
        """All steps on usable samples (B, C, H, W), B >= 0; their logits."""
        self._batch_size = collective.count(x)
        if not self._batch_size:
            return self._no_logits(x)
        present = len(x) > 0  # else other processes have samples
        with nullcontext() if present else collective.absent(), ExitStack() as stack:
            x = x if present else self.task.stand_in(x)
            try:
                stack.enter_context(self._statistics_apart(x))
                self.rows = self.task.rows(x)
                for number in range(self.steps):
                    self.scalars[0].clear()
                    self._unrecorded = x if self._watches_batch and number + 1 == self.steps else None
                    if self._account is not None and not self.images_apart:
                        self._account.look(self, x)
                    logits = self.step(x).detach()
                if self._account is not None and not self.images_apart:
                    self._account.take(self, self._batch_size, self.scalars[1]["skipped_steps"])
                if self._window is None and self._memory is None:
                    logits = self._corrected(x, logits, learn=True)
            finally:
                self._unrecorded = self._features_seen = self.rows = None
                if self._account is not None:
                    self._account.drop()
        return logits if present else logits[:0]

    @reading
    @torch.no_grad()
    def predict(self, x: Tensor, *, statistics: PredictWith = "stream") -> Tensor:
        """Logits (B, K) of the net as adapted so far; changes nothing. Same input and errors as :meth:`forward`.

        Args:
            x: As in :meth:`forward`.
            statistics: Of a method whose BatchNorm layers normalise with statistics of the test data: ``stream``, those
                of the stream so far (:class:`~lightning_tta.methods.base.account.StreamAccount`), so that images do not
                depend on each other, and one alone is right too; while nothing was seen as ``batch``, those of ``x``;
                with a window, as when they come, those of the last images with ``x`` among them.

        Raises:
            ConfigError: If ``statistics`` is another word.
        """
        check_choice("statistics", statistics, ("stream", "batch"))
        self._check_prepared()
        x = self.task.take_in(x)
        usable = self.task.usable(x)
        before, self.scalars = self.scalars, ({}, {})
        try:
            if self._is_shut and bool(usable.any()):
                return fill(self._source_logits(x, usable, at_source=True), usable)
            if statistics == "batch" and self._window is not None and bool(usable.any()):
                samples = x[usable.to(x.device)]
                everything = samples, slice(None)
                images, part = everything if self._predicts_alone else self._window.among(self, samples)
                return fill(self._corrected(samples, self._in_context(images, part), learn=False), usable)
            stream = self.stream_statistics() if statistics == "stream" else {}
            seen = explained(self.model, x, has_run=self.has_run)
            with seen, self.computing(x.device), fresh_casts(), self._running(stream) as infer, self.passes():
                samples = self.task.cast(x, float_dtype(self.model))
                samples = samples if bool(usable.all()) else samples[usable.to(x.device)]
                samples = self._laid_out(samples)
                logits = self._predicted(samples, infer) if len(samples) else self._no_logits(samples, infer)
        finally:
            self.scalars = before
        return fill(self.task.answer(logits), usable)

    @reading
    @torch.no_grad()
    def generate(self, batch: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
        """Answer prompts with the net as adapted so far; changes nothing.

        Args:
            batch: Prompts, as of :meth:`forward`: ``input_ids`` and ``attention_mask`` (B, T), padding on either side.
            **options: Of :class:`~lightning_tta.methods.base.generation.Generation`: ``max_new_tokens``, ``stop``,
                ``temperature``, ``seed``, ``pad``.

        Returns:
            ``input_ids``, ``attention_mask`` and ``generated``, each (B, T + N): the prompts, their padding on the left
            now, and the answers. It is a batch that :meth:`forward` takes.

        Raises:
            ConfigError: If the net is no language model, or an option is wrong.
            InputError: If the batch is none of prompts.
        """
        if not isinstance(self.model, TokenModel):
            raise ConfigError(
                f"generate() is for language models; {type(self.model).__name__} takes {self.task.kind}. Call the "
                "method itself: logits = method(batch)."
            )
        how = read_generation(options)
        self._check_prepared()
        if isinstance(batch, Mapping) and isinstance(ids := batch.get("input_ids"), Tensor):
            check_mask_names(batch)
            batch = {"generated": torch.zeros_like(ids, dtype=torch.bool), **batch}  # nothing yet, if it is not said
        x = self.task.take_in(batch)
        given = batch["generated"].to(x)
        ids, attention, before = left_padded(x[:, 0], x[:, 1], given)
        before_scalars, self.scalars = self.scalars, ({}, {})
        try:
            seen = explained(self.model, x, has_run=self.has_run)
            with seen, outside_inference_mode(), torch.no_grad(), self.computing(x.device), fresh_casts():
                with self.normalizing(), self.generating(), computed_once(self.model):
                    ids, attention, new = generate(self.model, ids, attention, how, self.decode)
        finally:
            self.scalars = before_scalars
        new[:, : before.shape[1]] |= before.bool()
        return {"input_ids": ids, "attention_mask": attention, "generated": new}

    def generating(self) -> AbstractContextManager[None]:
        """While active, passes of the net are those of an answer; by default as they are."""
        return nullcontext()

    def decode(self, logits: Tensor) -> Tensor:
        """Logits (B, V) by which the next token of an answer is chosen, of those that the net gives."""
        return logits

    def export(self) -> nn.Module:
        """A plain net that predicts each image as :meth:`predict` does now, up to rounding.

        A copy of the user's net, of its own class and with its own names, in eval mode: with the adapted parameters,
        and with the stream's statistics as running statistics of its BatchNorm layers. A
        :class:`~lightning_tta.Backbone` stays one: it takes pixels.

        Raises:
            UnsupportedModelError: If no plain net predicts as this method does, with the reason and what to use.
            ConfigError: If the method needs statistics of the stream and has seen no batch.
        """
        added = (self._no_plain_net_either, *(each.no_plain_net for each in self.corrections))
        for reason in (self.no_plain_net, *added):
            if reason:
                raise UnsupportedModelError(f"No plain net predicts as '{self.name}' does: {reason}.")
        statistics = None if self._is_shut else self.stream_statistics()
        if statistics is not None and not statistics:
            raise ConfigError(
                f"'{self.name}' has seen no batch since it was made or reset, or only such that gave values that are "
                "not finite (stats['skipped_steps']), so there are no statistics of the stream for the BatchNorm "
                "layers. Stream some batches through it first: method(images)."
            )
        finish = None if self.choice is None else self.choice.finish
        net = plain_net(self.model, self.stream_weights(), statistics or {}, self.required, finish)
        if any(each.acts_apart for each in self.corrections) and not self._is_shut:
            self._fold_corrections(net)
        return net.net if isinstance(net, DenseModel) else net

    @property
    def stats(self) -> Stats:
        """Floats that describe the last batch: loss, passes, skipped steps, what the method noted, collapse measures.

        ``forwards`` and ``backwards`` count the passes that ran. Reading them waits for the device. The last batch is
        that of whichever thread came last; to read those of a call of one's own, see :meth:`hold`.
        """
        with self._custody.lock:
            if self._stats is None:
                numbers = _read(self.unread_stats())
                self._stats = {name: value for name, value in numbers.items() if value == value}  # NaN: there is none
            return self._stats

    def unread_stats(self) -> dict[str, Tensor | float]:
        """What :attr:`stats` is made of, where it is, NaN included: nobody waits for the device."""
        with self._custody.lock:
            measures = self._row_measures if self._logits is None else collapse_measures(self._logits)
            return {**self.scalars[0], **measures, **self.scalars[1]}

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """While active, passes of the net are compiled (``torch.compile``), for shapes that do not change."""

        def call(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
            return forward(*inputs, **options)

        call.__code__ = call.__code__.replace()  # torch keeps what it compiled by the code, and for several nets
        hooks_count = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
        with hooks_count, self._first_pass.through(torch.compile(call, dynamic=False)):
            yield

    @exclusive
    def reset(self) -> None:
        """Back to the source: every declared state exactly as at construction."""
        super().reset()
        self._stats, self._logits, self.scalars = {}, None, ({}, dict.fromkeys(COUNTS, 0))
        self._row_measures = {}

    def reset_where(self, condition: Tensor | None) -> None:
        """As of the state; what was seen of the batch is of another net now."""
        super().reset_where(condition)
        if condition is None:
            for part in (self._window, self._memory, self._gate):
                if part is not None:
                    part.look_again()
        if self._account is not None:
            self._account.drop(condition)

    def train(self, mode: bool = True) -> TTAMethod:
        """Record ``mode`` on the method; the net inside stays in eval mode (no dropout, no drop path)."""
        with self._custody.call(check=False, changes=False):
            super().train(mode)
            self.model.eval()
        return self

    def hold(self, *, changed: bool = False) -> AbstractContextManager[None]:
        """While active, this thread has the method for itself; what it does to the net's weights meanwhile is meant.

        ::

            with method.hold():
                logits, stats = method(images), method.stats  # of the same batch, whatever other threads do

        Single calls need it not: of several threads, one runs at a time, in whatever order.

        Args:
            changed: Accept that the net's weights have been changed since the last call. What :meth:`reset` goes back
                to stays what it was.
        """
        return self._custody.call(check=not changed)

    @property
    def revision(self) -> int:
        """Number of calls so far that may have changed the method: of it, :meth:`reset`, :meth:`load_state_dict`."""
        return self._custody.revision

    @reading
    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """As torch's; a copy of all that the method may change, so that it may go on while this is saved."""
        state: dict[str, Any] = super().state_dict(*args, **options)
        if not options.get("keep_vars"):
            prefix = options.get("prefix", args[1] if len(args) > 1 else "")
            state.update({prefix + name: tensor.detach().clone() for name, tensor in self.adaptable.items()})
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, but all or nothing, whatever ``strict``: only a whole state of the same method and net fits.

        Raises:
            ConfigError: If it does not fit, or ``assign`` is set. Nothing has changed.
        """
        if not isinstance(state_dict, Mapping):
            raise ConfigError(
                f"A state is what method.state_dict() gave; got a {type(state_dict).__name__}. From a file: "
                "method.load_state_dict(torch.load(path))."
            )
        self._custody.revision += 1
        with self._custody.call(check=True, values=False):
            return super().load_state_dict(state_dict, strict, assign)

    def get_extra_state(self) -> dict[str, Any]:
        """What is neither parameter nor buffer. Safe for ``weights_only`` loading."""
        return {**super().get_extra_state(), "method": self.name, "prepared": self.prepared}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Counterpart of :meth:`get_extra_state`."""
        super().set_extra_state(state)
        for part in (self._window, self._memory, self._gate):
            if part is not None:
                part.look_again()
        self.prepared = state.get("prepared", self.prepared)

    def _check_fits(self, state: Mapping[str, Any]) -> None:
        saved = state.get("_extra_state")
        name = saved.get("method", self.name) if isinstance(saved, Mapping) else self.name
        if name != self.name:
            raise ConfigError(
                f"This state does not fit: it is of method '{name}', and this is '{self.name}'. Build the method with "
                "the name and the options that the state was saved with."
            )
        super()._check_fits(state)

    @property
    def account(self) -> Account | None:
        """The BatchNorm statistics that come from the stream, and what is kept of them; ``None``: the source's."""
        return self._account

    @property
    def record(self) -> MomentsRecord | None:
        """What :meth:`running` hands on, so that the statistics of the batch's pass are accounted for."""
        return self._account.record if isinstance(self._account, StreamAccount) else None

    @contextmanager
    def at_source(self) -> Iterator[None]:
        """As of the state; a pass meanwhile says nothing of the net as adapted."""
        batch, self._unrecorded = self._unrecorded, None
        corrections, self.corrections = self.corrections, []  # which have learned from the net as adapted
        try:
            with super().at_source():
                yield
        finally:
            self._unrecorded, self.corrections = batch, corrections

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        with self._custody.call():
            super()._apply(fn, recurse)
            self._capture.clear()
            if self._account is not None:
                self._account.renew(self, self.model)
            self._casts.drop()
            self._custody.take_stock(self.model)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        with self._custody.lock:  # not in the middle of a step
            twin = type(self).__new__(type(self))
            memo[id(self)] = twin
            with copied_whole(self.model, memo):
                state = {name: copy.deepcopy(value, memo) for name, value in vars(self).items()}
            twin.__setstate__(state)
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._custody = Custody(self.model, self.name, self._lent)  # a copy's own

    # Internals -------------------------------------------------------------------------------------------------------

    def _accounted(self, x: Tensor, wanted: bool, run: Callable[[], tuple[Any, Tensor]]) -> tuple[Any, Tensor]:
        """Run a pass; the first over the batch as it came to the step is accounted for, if ``wanted``."""
        if not self._watches_batch or x is not self._unrecorded or not wanted:
            return run()
        self._unrecorded = None
        with self._features_watched() as calls:
            if self._account is None:
                features, logits = run()
            else:
                self._account.begin(self)
                try:
                    features, logits = run()
                finally:
                    self._account.end()
        if self._wants_features:
            self._features_seen = self.split.check(calls, logits).detach()
        if self._account is not None:
            self._account.note(self, logits.detach())
        return features, logits

    @property
    def _wants_features(self) -> bool:
        return any(each.wants_features for each in self.corrections)

    @property
    def _watches_batch(self) -> bool:
        """Whether something is to be seen of the first pass over the batch."""
        return self._account is not None or self._wants_features

    def _features_watched(self) -> AbstractContextManager[Sequence[tuple[str, Any, Any]]]:
        """While active, the calls of the head are listed, where a correction wants features."""
        return recorded_calls({self.split.name: self.split.head} if self._wants_features else {})

    @torch.no_grad()
    def _corrected(self, x: Tensor, logits: Tensor, *, learn: bool) -> Tensor:
        """Logits of a batch, as the corrections have them."""
        if not self.corrections:
            return logits
        features, self._features_seen = self._features_seen, None
        if features is None and self._wants_features:
            features = self._features(x, "head")[0].detach()
        logits = at_least_float32(logits)
        with torch.autocast(x.device.type, enabled=False):
            for each in self.corrections:
                logits = each.correct(self, logits, features, learn=learn)
        return logits

    def _predicted(self, x: Tensor, infer: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of a prediction."""
        if not self.corrections:
            return infer(x)
        with self._features_watched() as calls:
            logits = infer(x)
        if len(calls) == 1 and self.split.is_checked and len(calls[0][1][0]) == len(x):  # else of views of the images
            self._features_seen = calls[0][1][0].detach()
        try:
            return self._corrected(x, logits, learn=False)
        finally:
            self._features_seen = None

    @torch.no_grad()
    def _fold_corrections(self, net: nn.Module) -> None:
        """Write what the corrections do into the last linear layer of the plain net."""
        split = HeadSplit(net, self.split.name)
        head, parameters = split.head, dict(net.named_parameters(remove_duplicate=False))
        names = [f"{split.name}.weight", f"{split.name}.bias"]
        if type(head).forward is not nn.Linear.forward or any(name not in parameters for name in names):
            raise UnsupportedModelError(
                f"The correction of the predictions has no place in a plain net: its last linear layer '{split.name}' "
                "has no bias, or computes its parameters. Export without prior=, or deploy the method itself."
            )
        if self.image_shape is None:
            raise ConfigError(
                f"'{self.name}' has seen no images, so it is not known whether the net ends in '{split.name}', which "
                "is to take up the correction of the predictions. Stream some batches first: method(images)."
            )
        split(head.weight.new_zeros(1, *self.image_shape))  # it refuses a net that does not end there
        tensors = [at_least_float32(parameters[name].detach()) for name in names]
        for each in self.corrections:
            tensors = list(each.fold(self, *tensors))
        for name, tensor in zip(names, tensors, strict=True):
            if any(parameters[name] is p for other, p in parameters.items() if other != name) and not torch.equal(
                tensor.to(parameters[name]), parameters[name]
            ):
                raise UnsupportedModelError(
                    f"The correction of the predictions has no place in a plain net: '{name}' is also that of another "
                    "layer. Export without prior=, or deploy the method itself."
                )
            parameters[name].copy_(tensor)

    def _lay_out(self, layout: torch.memory_format | None) -> None:
        """Let net, state and, from now on, images lie in memory so; the parameters stay the same objects."""
        self._layout = layout
        if layout is not None:
            with outside_inference_mode():
                self._apply(lambda t: t.contiguous(memory_format=layout) if t.ndim == 4 else t)

    def _laid_out(self, x: Tensor) -> Tensor:
        return x if self._layout is None else x.contiguous(memory_format=self._layout)

    @contextmanager
    def _running(self, stream: Statistics | None) -> Iterator[Callable[[Tensor], Tensor]]:
        """How the net runs in a prediction, and what predicts."""
        if stream:
            with fixed_statistics(self.model, stream):
                yield self.infer_plain
        else:
            with self.normalizing():
                yield self._looking(self.infer_plain if stream is None else self.infer, apart=stream is None)

    @torch.no_grad()
    def _no_logits(self, x: Tensor, infer: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Logits (0, K): what is left when every sample is left out."""
        with collective.absent():
            logits = (infer or self.infer)(self.task.stand_in(x))[:0]
        self.scalars[0].clear()  # of a sample that stands in for none
        return logits

    def _looking(self, infer: Callable[[Tensor], Tensor], *, apart: bool) -> Callable[[Tensor], Tensor]:
        """``infer``, before which chosen statistics see the images: as before a step, or each apart from the others."""
        account = self._account
        if account is None or not self.account_chosen or self.images_apart:
            return infer

        def run(x: Tensor) -> Tensor:
            try:
                (account.look_apart if apart else account.look)(self, x)
                return infer(x)
            finally:
                account.drop()

        return run

    def _warn_of_small_batch(self, number: int) -> None:
        told, self.told_of_batches = self.told_of_batches, True
        text = "" if told or not number or collective.is_joined() else self.of_batches(number)
        if text:
            warnings.warn(text, stacklevel=3)


def _read(scalars: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Numbers as floats; those on a device come in one read."""
    tensors = {name: value for name, value in scalars.items() if isinstance(value, Tensor)}
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        by_device.setdefault(tensor.device, []).append(name)
    numbers: dict[str, float] = {}
    for names in by_device.values():
        stacked = torch.stack([tensors[name].detach().double().view(()) for name in names])
        numbers |= dict(zip(names, stacked.tolist(), strict=True))
    return {name: numbers[name] if name in numbers else float(value) for name, value in scalars.items()}


def _take_stock(method: nn.Module, incompatible_keys: object) -> None:
    """What a state dict has brought, on its own or with that of a module around the method, is the method's own."""
    assert isinstance(method, TTAMethod)
    with method._custody.lock:
        method._custody.take_stock(method.model)
