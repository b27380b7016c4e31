"""Claims as data: ``claims/NAME.yaml`` holds a paper's constants, its figures, and what is not known.

A claim has parts. A part is one experiment: data, nets, streams and methods as in a benchmark's configuration, and the
figures that were published for it. In its values, ``$PLACE`` stands for the place of a data set, see
:data:`~lightning_tta.reproduce.needs.PLACES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lightning_tta.benchmark.config import StreamConfig
from lightning_tta.data import data_modules
from lightning_tta.errors import ConfigError, check_choice, did_you_mean
from lightning_tta.reproduce.needs import PLACES, SETS, nets
from lightning_tta.shipped import configurations

FOLDER = Path(__file__).parent / "claims"
KINDS = {
    "authors": "the authors' code repository",
    "paper": "the paper",
    "others": "a benchmark of other authors",
    "quoted": "quoted by somebody else, who names the paper",
    "digest": "a digest of the paper by a third party",
    "unknown": "published, but not in anything that could be read here",
}
"""Where a figure was read. Only the first two are the source itself."""
AT = "@"
"""Between a method and a net, in the benchmark's name of a method whose options differ by net."""
EVERY = "*"
"""In place of a net or a stream: the mean over all of the part. Of a method in ``tolerance``: any other."""


@dataclass(frozen=True)
class Published:
    """Figures from one place.

    Attributes:
        stands: Where they stand.
        kind: One of :data:`KINDS`.
        measure: ``error`` or ``accuracy``, in percent.
        tolerance: For how far off ours may be, in points: a number, or one by method.
        why: The reason for that tolerance.
        figures: Net -> method -> mean over domains; ``None``: not known. A pair is a figure and its spread.
        domains: Net -> method -> a figure for each domain of the part, in order.
        streams: The streams that they are about; several: the mean over these.
        ranking: Whether the order of the methods is a claim too.
    """

    stands: str
    kind: str
    measure: str
    tolerance: float | dict[str, float]
    why: str
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    domains: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    streams: list[str] = field(default_factory=list)
    ranking: bool = False

    def tolerance_of(self, method: str) -> float:
        """How many points ours may be off."""
        if not isinstance(self.tolerance, Mapping):
            return float(self.tolerance)
        return float(self.tolerance[method if method in self.tolerance else EVERY])


@dataclass(frozen=True)
class Part:
    """One experiment of a claim.

    Attributes:
        title: What it is, in a line.
        needs: Names of data sets, see :data:`~lightning_tta.reproduce.needs.SETS`.
        data: ``class_path`` and ``init_args`` of the data module.
        nets: Label -> name in ``nets.yaml``, or ``fit`` with ``options`` and ``start`` as in a benchmark.
        streams: As in a benchmark.
        methods: As in a benchmark.
        published: Figures.
        seeds: Of the order of the stream and of everything random.
        model: As in a benchmark.
        run: As in a benchmark.
        unknown: Constants that nobody published, and what is taken in their place.
        differs: How this run is known to differ from theirs.
    """

    title: str
    needs: list[str]
    data: dict[str, Any]
    nets: dict[str, Any]
    streams: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    published: list[Published]
    seeds: list[int] = field(default_factory=lambda: [0])
    model: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)

    def rows(self) -> Iterator[tuple[str, str]]:
        """Net and method of each row that can be run."""
        for net in self.nets:
            for method, entry in self.methods.items():
                if net in (entry.get("nets") or self.nets):
                    yield net, method


@dataclass(frozen=True)
class Claim:
    """A paper's claim.

    Attributes:
        name: Of the file.
        title: Of the paper.
        paper: Where it was published, with its arXiv number.
        code: Address of the authors' code; ``None``: none is known.
        parts: By label.
        notes: What a reader must know before comparing.
    """

    name: str
    title: str
    paper: str
    code: str | None
    parts: dict[str, Part]
    notes: list[str] = field(default_factory=list)

    def figures(self) -> int:
        """How many figures are known."""
        return sum(len(list(figures_of(published))) for part in self.parts.values() for published in part.published)


def figures_of(published: Published) -> Iterator[tuple[str, str, int | None, float, float | None]]:
    """Known figures: net, method, position of the domain (``None``: the mean), figure, spread."""
    for net, methods in published.figures.items():
        for method, figure in methods.items():
            if figure is not None:
                value, spread = figure if isinstance(figure, list) else (figure, None)
                yield net, method, None, float(value), spread
    for net, by_method in published.domains.items():
        for method, values in by_method.items():
            for position, value in enumerate(values):
                yield net, method, position, float(value), None


def names() -> list[str]:
    """Names of the claims."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def load(name: str) -> Claim:
    """A claim by its name, or from a ``.yaml`` file of one's own.

    Raises:
        ConfigError: If there is none of this name, or its file is not as described here.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = names()
        raise ConfigError(f"There is no claim {name!r}.{did_you_mean(name, known)} Claims: {', '.join(known)}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    content = _mapping(path.name, content)
    content = {key: value for key, value in content.items() if not str(key).startswith("x-")}  # what anchors refer to
    entries = _mapping(f"{path.name}: parts", content.pop("parts", None))
    parts = {str(label): _part(f"{path.name}: {label}", _mapping(label, entry)) for label, entry in entries.items()}
    return _make(Claim, path.name, {"name": path.stem, "parts": parts, **content})  # type: ignore[no-any-return]


def _part(where: str, entry: dict[str, Any]) -> Part:
    published = [_published(where, figures) for figures in entry.get("published", [])]
    part: Part = _make(Part, where, {**entry, "published": published})
    _check(where, part)
    domains = (part.data.get("init_args") or {}).get("domains")
    for figures in part.published:
        for net, method in {(n, m) for n, ms in (*figures.figures.items(), *figures.domains.items()) for m in ms}:
            if net not in (*part.nets, EVERY) or method not in part.methods:
                raise ConfigError(f"{where}: a figure is of {net}/{method}, which the part does not run.")
            if isinstance(figures.tolerance, dict) and not {method, EVERY} & set(figures.tolerance):
                raise ConfigError(f"{where}: there is no tolerance for {method}.")
        if unknown := [stream for stream in figures.streams if stream not in part.streams]:
            raise ConfigError(f"{where}: figures are of streams {unknown}; the part has {list(part.streams)}.")
        for values in (values for by_method in figures.domains.values() for values in by_method.values()):
            if not isinstance(domains, list) or len(values) != len(domains):
                raise ConfigError(f"{where}: {len(values)} figures for {len(domains or [])} domains.")
    return part


def _mapping(where: Any, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{where} must be a mapping with entries; got {content!r}. See the claims of the package.")
    return content


def _check(where: str, part: Part) -> None:
    """Refuse a part that names data sets, nets, places, data modules or methods that there are not."""
    for name in ("data", "nets", "streams", "methods"):
        _mapping(f"{where}: {name}", getattr(part, name))
    for need in part.needs or [""]:
        check_choice(f"{where}: needs", need, tuple(SETS))
    check_choice(f"{where}: data.class_path", part.data.get("class_path"), tuple(data_modules()))
    for label, entry in part.nets.items():
        if not isinstance(entry, dict):
            check_choice(f"{where}: nets.{label}", entry, tuple(nets()))
        elif not (configurations() / str(entry.get("fit"))).is_file():
            raise ConfigError(
                f"{where}: nets.{label} must name a net, or have fit, a file below configs/; got {entry}. Nets: "
                f"{', '.join(nets())}."
            )
    for label, entry in part.streams.items():
        allowed = [each.name for each in fields(StreamConfig)]
        if unknown := sorted(set(_mapping(f"{where}: streams.{label}", entry)) - set(allowed)):
            hint = did_you_mean(unknown[0], allowed)
            raise ConfigError(f"{where}: streams.{label}: unknown {', '.join(unknown)}.{hint}")
    for label, entry in part.methods.items():
        if not isinstance(_mapping(f"{where}: methods.{label}", entry).get("class_path"), str):
            raise ConfigError(f"{where}: methods.{label} needs a class_path, such as Tent; got {entry}.")
    for place in _places([part.data, part.nets, part.streams]):
        check_choice(f"{where}: ${place}", place, tuple(PLACES))


def _places(value: Any) -> Iterator[str]:
    """The places that values name: ``$cifar`` names ``cifar``."""
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _places(item)
    elif isinstance(value, str) and value.startswith("$"):
        yield value[1:]


def _published(where: str, entry: dict[str, Any]) -> Published:
    figures: Published = _make(Published, f"{where}: published", entry)
    check_choice(f"{where}: kind", figures.kind, tuple(KINDS))
    check_choice(f"{where}: measure", figures.measure, ("error", "accuracy"))
    return figures


def _make(kind: Any, where: str, content: dict[str, Any]) -> Any:
    allowed = [entry.name for entry in fields(kind)]
    if unknown := sorted(set(content) - set(allowed)):
        raise ConfigError(f"{where}: unknown {', '.join(unknown)}.{did_you_mean(unknown[0], allowed)}")
    needed = [each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING]
    if lacking := [name for name in needed if name not in content]:
        raise ConfigError(f"{where} lacks {', '.join(lacking)}. It may have: {', '.join(allowed)}.")
    return kind(**content)


def matches(patterns: list[str] | None, part: str, net: str, method: str) -> bool:
    """Whether one of some patterns, such as ``*/tent``, is of a row ``PART/NET/METHOD``; none: any row."""
    row = f"{part}/{net}/{method}"
    return not patterns or any(fnmatchcase(row, pattern) or fnmatchcase(method, pattern) for pattern in patterns)
