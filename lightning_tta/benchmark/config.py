"""The parts of a benchmark's configuration file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from torch import nn

from lightning_tta.errors import ConfigError, UnsupportedModelError
from lightning_tta.methods import create_method, find

T = TypeVar("T")


@dataclass
class NetConfig:
    """A net of the benchmark: trained by a ``fit`` configuration, or with weights that exist.

    Attributes:
        fit: Configuration file of a source training; trained once per seed if it was not.
        options: Arguments of that training that differ from the file, such as ``{model.schedule: chained}``.
        start: Label of the net, of the same seed, whose weights the training starts from (``--model.source_ckpt``).
        source_ckpt: Existing weights, instead of ``fit``.
        backbone: Name of the net that ``source_ckpt`` is for.
        num_classes: Number of its classes.
        pretrained: Use the library's pretrained weights.
        backbone_options: Further arguments of the backbone.
    """

    fit: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    source_ckpt: str | None = None
    backbone: str | None = None
    num_classes: int | None = None
    pretrained: bool = False
    backbone_options: dict[str, Any] | None = None


@dataclass
class StreamConfig:
    """A stream of the benchmark.

    Attributes:
        kind: One of :data:`lightning_tta.STREAM_KINDS`.
        reset: Reset policy of the test-time module.
        data: Arguments of the data module that differ for this stream, such as ``{batch_size: 1}``.
        nets: Only on these nets; by default on all.
        seeds: Only with these seeds; by default with all.
    """

    kind: str = "iid"
    reset: str = "auto"
    data: dict[str, Any] = field(default_factory=dict)
    nets: list[str] | None = None
    seeds: list[int] | None = None


@dataclass
class MethodConfig:
    """A method of the benchmark.

    Attributes:
        class_path: Class name, such as ``Tent``.
        init_args: Its arguments.
        nets: Only on these nets; by default on all that it supports.
        streams: Only on these streams; by default on all.
        model: Further arguments of the test-time module for this method, such as ``{reset_every: 1000}``.
        default: Whether it runs where ``only`` does not name it.
    """

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    nets: list[str] | None = None
    streams: list[str] | None = None
    model: dict[str, Any] = field(default_factory=dict)
    default: bool = True


@dataclass
class DataConfig:
    """The data module of the benchmark: class name and arguments."""

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One run: a method on a net and a stream with a seed."""

    net: str
    stream: str
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.net}/{self.stream}/{self.method}/seed{self.seed}"


def from_dict(kind: type[T], key: str, entry: dict[str, Any]) -> T:
    """Build a part from its place in the file; jsonargparse keeps ``class_path`` for classes of its own.

    Raises:
        ConfigError: If the entry lacks its ``class_path`` or has an unknown key.
    """
    allowed = [part.name for part in fields(kind)]  # type: ignore[arg-type]
    unknown = [name for name in entry if name not in allowed]
    if unknown or not isinstance(entry.get("class_path"), str):
        raise ConfigError(f"{key} must have a class_path and may have {allowed[1:]}; got {sorted(entry)}.")
    return kind(**entry)


def check_method(label: str, method: MethodConfig) -> None:
    """Refuse wrong options and ranges by building the method on a tiny net."""
    try:
        find(name := method.class_path.removeprefix("lightning_tta.methods."))
    except ConfigError:
        return  # a user's own class: checked when it is parsed
    probe = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    try:
        create_method(name, probe, **method.init_args)
    except UnsupportedModelError:
        pass  # the probe says nothing about the nets of the benchmark
    except ConfigError as error:
        raise ConfigError(f"Method '{label}': {error}") from error
