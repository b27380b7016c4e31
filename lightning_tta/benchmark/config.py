"""The sections of a benchmark's configuration file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from lightning_tta.errors import ConfigError


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
        net: Over prompts, instead of ``fit``: a folder of a causal language model of transformers, or of an adapter.
        backbone_options: Further arguments of the backbone.
    """

    fit: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    source_ckpt: str | None = None
    backbone: str | None = None
    num_classes: int | None = None
    pretrained: bool = False
    net: str | None = None
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
        run: Options of the run's callbacks for this method, such as ``{input: {channels_last: true}}``.
        default: Whether it runs where ``only`` does not name it.
    """

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    nets: list[str] | None = None
    streams: list[str] | None = None
    model: dict[str, Any] = field(default_factory=dict)
    run: dict[str, dict[str, Any]] = field(default_factory=dict)
    default: bool = True

    @classmethod
    def from_dict(cls, label: str, entry: dict[str, Any]) -> MethodConfig:
        """Read an entry of the file; jsonargparse would take its ``class_path`` for a class of ``MethodConfig``.

        Raises:
            ConfigError: If the entry lacks its ``class_path`` or has an unknown key.
        """
        allowed = [option.name for option in fields(cls)]
        if not set(entry) <= set(allowed) or not isinstance(entry.get("class_path"), str):
            raise ConfigError(
                f"methods.{label} must have a class_path and may have {allowed[1:]}; got {sorted(entry)}."
            )
        return cls(**entry)


@dataclass(frozen=True)
class Cell:
    """One run: a method on a net and a stream with a seed."""

    method: str
    net: str
    stream: str
    seed: int

    def __str__(self) -> str:
        return f"{self.net}/{self.stream}/{self.method}/seed{self.seed}"
