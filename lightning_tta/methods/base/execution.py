"""How a method computes: what changes its speed, its memory and the last bits of its results, not what it does."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch.utils import deterministic

from lightning_tta.errors import ConfigError, UnsupportedModelError, check_choice

Capture = Literal["auto"] | bool
Precision = Literal["exact", "tf32", "bf16"]


@dataclass(frozen=True)
class Execution:
    """How a method computes, the same for every method.

    Args:
        capture: Whether steps on batches of a shape that comes again are recorded once and replayed, as one CUDA graph:
            ``auto``: on CUDA, where the method can be; ``True``: refuse to run where it cannot be; ``False``: never.
        compile: Whether the net is compiled for captured steps (``torch.compile``); needs a compiler for the device.
        deterministic: Whether only operations are used that give the same bits each time. On CUDA this sets the
            environment variable ``CUBLAS_WORKSPACE_CONFIG`` where it is not set, which has an effect only before the
            process's first matrix product there: make the method before the net runs.
        precision: Of a float32 net. ``exact``: float32 as it is, without TF32; ``tf32``: TF32 in matrix products and
            convolutions on CUDA; ``bf16``: autocast to bfloat16; ``None``: as the process is set, which with torch's
            defaults is TF32 in convolutions on CUDA, and not in matrix products.
        lean: Whether the backward pass keeps no more activations than what learns needs, with the same gradients:
            about half of them where norm layers alone learn. ``True``: everywhere, which costs up to a tenth of the
            time in a net with ReLUs; ``auto``: where it adds no operation, see
            :func:`~lightning_tta.backbones.lean.lean_backward`; ``False``: nowhere.

    Raises:
        ConfigError: If a value is none of these.
    """

    capture: Capture = "auto"
    compile: bool = False
    deterministic: bool = False
    precision: Precision | None = None
    lean: Literal["auto"] | bool = "auto"

    def __post_init__(self) -> None:
        choices = {"capture": "True, False or 'auto'", "lean": "True, False or 'auto'"}
        for name in ("capture", "compile", "deterministic", "lean"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name in choices and value == "auto"):
                raise ConfigError(f"{name} must be {choices.get(name, 'True or False')}; got {value!r}.")
        if self.compile and self.capture is False:
            raise ConfigError("compile=True compiles captured steps. Use it with capture='auto' or True.")
        if self.compile and self.lean is True:
            raise ConfigError(
                "lean=True and compile=True exclude each other: a compiled pass decides by itself what it keeps. Leave "
                "one of them out."
            )
        if self.precision is not None:
            check_choice("precision", self.precision, ("exact", "tf32", "bf16"))

        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, by the first matrix product

    def changed_by(self, other: Execution) -> Execution:
        """What ``other`` says where it says something else than the defaults; this elsewhere."""
        default = Execution()
        names = [name for name in NAMES if getattr(other, name) != getattr(default, name)]
        return replace(self, **{name: getattr(other, name) for name in names})

    def active(self, device: torch.device, dtype: torch.dtype = torch.float32) -> AbstractContextManager[None]:
        """While active, this process computes as it is said here; as before afterwards.

        Settings that torch has once for the process are shared by threads that want the same, and waited for by others.

        Args:
            device: Where the net is.
            dtype: Of its weights.

        Raises:
            ConfigError: If the precision is not for such weights, or an autocast around the call asks for another one;
                meanwhile, if determinism came too late for cuBLAS.
            UnsupportedModelError: Meanwhile, if an operation of the net is not deterministic.
        """
        if self.precision is None:
            return self._deterministic(None) if self.deterministic else nullcontext()
        self._check(device, dtype)
        if self.precision == "bf16":
            cast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
            return _both(self._deterministic(None), cast) if self.deterministic else cast
        if self.precision == "tf32" and device.type == "cpu":
            return self._deterministic(None) if self.deterministic else nullcontext()
        return self._deterministic(self.precision == "tf32")

    def precision_on(self, device: torch.device) -> Precision | None:
        """In which precision a call computes on ``device``, by an autocast around it too; ``None``: it is not said."""
        if self.precision is None and torch.is_autocast_enabled(device.type):
            return "bf16"  # or float16, for which the same layout is quicker
        return self.precision

    def _check(self, device: torch.device, dtype: torch.dtype) -> None:
        if dtype != torch.float32 and not (self.precision == "exact" and dtype == torch.float64):
            raise ConfigError(
                f"precision='{self.precision}' is one of a float32 net; the weights of this one are {dtype}. Leave "
                "precision out, or convert the net with net.float() before adapt()."
            )
        if torch.is_autocast_enabled(device.type):
            around = torch.get_autocast_dtype(device.type)
            if self.precision != "bf16" or around != torch.bfloat16:
                raise ConfigError(
                    f"precision='{self.precision}' contradicts the autocast to {around} around this call (with "
                    "Lightning: --trainer.precision bf16-mixed or 16-mixed). Leave one of the two out."
                )

    @contextmanager
    def _deterministic(self, tf32: bool | None) -> Iterator[None]:
        """What the whole process shares, and torch's refusals in our words."""
        with _PROCESS.set(_Wish(self.deterministic, tf32)):
            try:
                yield
            except RuntimeError as error:
                if not self.deterministic or not any(words in str(error) for words in _REFUSALS):
                    raise
                raise _explained(error) from error


@dataclass(frozen=True)
class _Wish:
    """Settings of the process: determinism, if it is to be on; whether TF32 is allowed, or ``None``: as it is."""

    deterministic: bool
    tf32: bool | None

    def fulfil(self) -> None:
        """Set it. Both names that torch has for TF32: it refuses to be asked by one what only the other one says."""
        if self.tf32 is not None:
            others = [kind.fp32_precision for kind in _CPU_KINDS]
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = self.tf32
            for kind in _CUDA_KINDS:
                kind.fp32_precision = "tf32" if self.tf32 else "ieee"
            for kind, other in zip(_CPU_KINDS, others, strict=True):
                kind.fp32_precision = other if self.tf32 else "ieee"
        if self.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False
            _FILL.fill_uninitialized_memory = False  # a kernel for each tensor, and nobody reads it


class _Settings:
    """The process's settings at one moment."""

    def __init__(self) -> None:
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        self.fill = _FILL.fill_uninitialized_memory
        self.cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
        self.kinds = [kind.fp32_precision for kind in (*_CUDA_KINDS, *_CPU_KINDS)]
        matmul, convolution, *_ = self.kinds
        self.matmul = "highest" if matmul == "tf32" else "high"  # where torch refuses to say: the two names disagree
        self.convolution = convolution != "tf32"
        with suppress(RuntimeError):
            self.matmul = torch.get_float32_matmul_precision()
        with suppress(RuntimeError):
            self.convolution = torch.backends.cudnn.allow_tf32

    def restore(self, wish: _Wish) -> None:
        """Set again what ``wish`` has changed."""
        if wish.tf32 is not None:
            torch.set_float32_matmul_precision(self.matmul)
            torch.backends.cudnn.allow_tf32 = self.convolution
            for kind, value in zip((*_CUDA_KINDS, *_CPU_KINDS), self.kinds, strict=True):
                kind.fp32_precision = value
        if wish.deterministic:
            torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = self.cudnn
            _FILL.fill_uninitialized_memory = self.fill


class _Process:
    """Holders of the process's settings. Several threads may hold the same; one that wants others waits for them."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._holders: list[tuple[int, _Wish]] = []  # threads
        self._levels: list[_Level] = []  # several where one thread nests them

    @contextmanager
    def set(self, wish: _Wish) -> Iterator[None]:
        me = threading.get_ident()
        with self._free:
            self._free.wait_for(lambda: all(me == thread or wish == other for thread, other in self._holders))
            if not self._levels or self._levels[-1].wish != wish:
                self._levels.append(_Level(wish, _Settings()))
                wish.fulfil()
            level = self._levels[-1]
            level.users += 1
            self._holders.append((me, wish))
        try:
            yield
        finally:
            with self._free:
                level.users -= 1
                self._holders.remove((me, wish))
                while self._levels and self._levels[-1].users == 0:
                    last = self._levels.pop()
                    last.before.restore(last.wish)
                self._free.notify_all()


@dataclass(eq=False)
class _Level:
    wish: _Wish
    before: _Settings
    users: int = 0


_CUDNN: Any = torch.backends.cudnn  # whose stubs do not know these names
_MKLDNN: Any = torch.backends.mkldnn
_FILL: Any = deterministic
_CUDA_KINDS: tuple[Any, ...] = (torch.backends.cuda.matmul, _CUDNN.conv, _CUDNN.rnn)
_CPU_KINDS: tuple[Any, ...] = (_MKLDNN.matmul, _MKLDNN.conv, _MKLDNN.rnn)
_PROCESS = _Process()
_REFUSALS = ("not have a deterministic implementation", "not deterministic because")  # torch's words


@contextmanager
def _both(first: AbstractContextManager[None], second: Any) -> Iterator[None]:
    with first, second:
        yield


def _explained(error: RuntimeError) -> Exception:
    """What torch says where an operation is not deterministic, with what to do about it."""
    if "CUBLAS_WORKSPACE_CONFIG" in str(error):
        return ConfigError(
            "deterministic=True came too late: this process has multiplied matrices on the GPU before, without "
            "CUBLAS_WORKSPACE_CONFIG, which is read once (or the variable has a value that is not deterministic: "
            f"{os.environ.get('CUBLAS_WORKSPACE_CONFIG')!r}). Start Python with CUBLAS_WORKSPACE_CONFIG=:4096:8 in the "
            "environment, or call adapt(..., deterministic=True) before the net runs on the GPU."
        )
    return UnsupportedModelError(
        f"deterministic=True, but an operation of the net has no deterministic implementation: "
        f"{str(error).strip().splitlines()[0]} Leave deterministic out, or replace that layer."
    )


NAMES = tuple(field.name for field in fields(Execution))


def split_options(options: dict[str, Any]) -> tuple[Execution, dict[str, Any]]:
    """An :class:`Execution` of those options that are of one, and the others."""
    mine = {name: value for name, value in options.items() if name in NAMES}
    return Execution(**mine), {name: value for name, value in options.items() if name not in NAMES}
