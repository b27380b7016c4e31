"""The protocol of a run: all that must be equal before two results may be compared."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_tta.errors import ConfigError, DataError, check_choice, check_range
from lightning_tta.files import json_digest


def _canonical(value: Any) -> Any:
    """The value as JSON has it: tuples as lists, floats to six significant digits, whole floats as integers."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        rounded = float(f"{value:.6g}")
        return int(rounded) if rounded.is_integer() else rounded
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _canonical(value[key]) for key in sorted(value)}
    allowed = "finite numbers, strings, lists and dicts with string keys"
    raise ConfigError(f"A protocol holds {allowed} only; got {value!r}. Convert it.")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What was measured, apart from the method. Two results are comparable only when their hashes are equal.

    What a user's own data module does not say is ``None``, or empty.

    Attributes:
        data: Name of the data.
        data_digest: Hash of the test images.
        split: The split they come from.
        domains: The stream's domains, in order.
        images: Number of images in the stream.
        images_per_domain: Number of images in each domain.
        function_set: Name and version of the corruption functions; ``None`` without corruptions.
        severity: Their severity, 1 to 5; ``None`` without corruptions.
        corruption_seed: Their seed; ``None`` without corruptions.
        stream: Kind of the stream.
        order_seed: Seed of its order.
        batch_size: Samples in a batch.
        reset: When the method starts anew: ``never``, ``domain``, ``batch`` or, with a language model, ``prompt``.
        predict: Which logits count: ``method`` (those the method returns) or ``after`` (a second pass after the step).
        weights: Name of the source weights.
        weights_digest: Hash of the source weights, if known.
        preprocessing: What happens to pixels before the net: mean, standard deviation, size.
        world_size: Number of processes.
        mode: How they share the stream: ``single``, ``replicas`` or ``synchronised``.
        dirichlet: Concentration of the labels over time; ``None``: the kind says all.
        charge: By what a method's time counts, ``passes`` or ``seconds``; ``None``: batches wait for it.
        interval: Time between two batches, in that unit.
        visits: How often the domains of a ``recurring`` stream come; ``domains`` names each visit.
        class_correlation: Chance of a ``markov`` stream to stay in the most frequent class.
        domain_correlation: The same for domains.
        class_imbalance: How many times as often the first class comes as the last.
        domain_imbalance: The same for domains.
        pollution: Share of polluting images.
        polluters: What they are: the kind of noise, or the hash of a folder.
        pollution_first: ``True`` where they come before the real images.
        subset_seed: Seed of the choice of the images; ``None``: the usual choice, or all.
    """

    data: str
    data_digest: str | None = None
    split: str | None = None
    domains: tuple[str, ...] = ()
    images: int | None = None
    images_per_domain: tuple[int, ...] = ()
    function_set: str | None = None
    severity: int | None = None
    corruption_seed: int | None = None
    stream: str | None = None
    order_seed: int | None = None
    batch_size: int | None = None
    reset: str
    predict: str
    weights: str
    weights_digest: str | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1
    mode: str = "single"
    dirichlet: float | None = None
    charge: str | None = None
    interval: float | None = None
    visits: int | None = None
    class_correlation: float | None = None
    domain_correlation: float | None = None
    class_imbalance: float | None = None
    domain_imbalance: float | None = None
    pollution: float | None = None
    polluters: str | None = None
    pollution_first: bool | None = None
    subset_seed: int | None = None

    def __post_init__(self) -> None:
        check_choice("reset", self.reset, ("never", "domain", "batch", "prompt"))
        check_choice("predict", self.predict, ("method", "after"))
        check_choice("mode", self.mode, ("single", "replicas", "synchronised"))
        check_range("world_size", self.world_size, 1, integer=True)
        if (self.mode == "single") != (self.world_size == 1):
            processes = f"mode={self.mode!r} with world_size={self.world_size}"
            raise ConfigError(f'mode="single" is for one process, and one process only; got {processes}.')
        for name in ("domains", "images_per_domain"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "preprocessing", _canonical(self.preprocessing or {}))
        _canonical(self._values())

    @classmethod
    def from_parts(cls, data_description: Mapping[str, Any], **run: Any) -> "Protocol":
        """Put together what the data, the net and the run know.

        Args:
            data_description: ``ShiftedDataModule.describe()``, or at least ``data``, a name.
            **run: The other fields: ``reset``, ``predict``, ``weights`` and, where they are not the defaults,
                ``weights_digest``, ``preprocessing``, ``world_size`` and ``mode``.

        Raises:
            ConfigError: On a value that is not allowed, or a description with unknown fields.
        """
        unknown = sorted(set(data_description) - _DATA_FIELDS)
        if unknown or "data" not in data_description:
            raise ConfigError(
                f"The description of the data must have 'data' and may have {', '.join(sorted(_DATA_FIELDS))}; got "
                f"{', '.join(sorted(data_description)) or 'nothing'}."
            )
        return cls(**data_description, **run)

    def _values(self) -> dict[str, Any]:
        """The fields; those added later only where they say something, so that old hashes stay."""
        values = {name: getattr(self, name) for name in _names()}
        return {name: value for name, value in values.items() if name not in _LATER_FIELDS or value is not None}

    @property
    def hash(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of all fields, as canonical JSON."""
        return json_digest(_canonical(self._values()))

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON has them, and ``hash``."""
        return {name: _canonical(value) for name, value in self._values().items()} | {"hash": self.hash}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Protocol":
        """Read what :meth:`to_dict` wrote.

        Raises:
            DataError: When fields are missing or unknown, or do not fit the hash.
        """
        content = {name: value for name, value in values.items() if name != "hash"}
        known = set(_names())
        if set(content) | _LATER_FIELDS != known:
            missing = ", ".join(sorted(known - set(content) - _LATER_FIELDS)) or "nothing"
            unknown = ", ".join(sorted(set(content) - known)) or "nothing"
            raise DataError(f"Not a protocol of this version of lightning_tta: missing {missing}, unknown {unknown}.")
        protocol = cls(**content)
        if values.get("hash") != protocol.hash:
            raise DataError(
                f"The protocol was changed after it was written: it says hash {values.get('hash')!r}, its fields give "
                f"{protocol.hash!r}. Run the experiment again, or restore the file."
            )
        return protocol

    def diff(self, other: "Protocol") -> list[str]:
        """One line ``field: a != b`` for each field that differs."""
        mine, theirs = self.to_dict(), other.to_dict()
        different = [name for name in _names() if mine.get(name) != theirs.get(name)]
        return [f"{name}: {mine.get(name)!r} != {theirs.get(name)!r}" for name in different]


def _names() -> list[str]:
    return [field.name for field in fields(Protocol)]


_LATER_FIELDS = {
    *("dirichlet", "charge", "interval", "visits", "class_correlation", "domain_correlation"),
    *("class_imbalance", "domain_imbalance", "pollution", "polluters", "pollution_first", "subset_seed"),
}
_RUN_FIELDS = {"reset", "predict", "weights", "weights_digest", "preprocessing", "world_size", "mode"}
_DATA_FIELDS = set(_names()) - _RUN_FIELDS

CUSTOM_DATA: dict[str, Any] = {
    "data": "custom loader",
    "data_digest": "",
    "split": "",
    "domains": ["stream"],
    "images": 0,
    "images_per_domain": [0],
    "stream": "custom",
    "order_seed": 0,
    "batch_size": 0,
}
"""What the protocol can say of a loader that is not from a ``ShiftedDataModule``."""
