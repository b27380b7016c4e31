"""What a configuration may do: name classes of the kinds that options declare, and nothing else.

Whatever lies in an option without a declared class, such as ``backbone_options``, is data. A class or function that is
named is imported, which runs its module: that is the one way in which a configuration runs code, and the standard
library is closed to it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_type_hints

import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings

from lightning_tta.errors import ConfigError
from lightning_tta.launch.method_names import name_in

MODE = "yaml, None is null"
"""The parser mode: jsonargparse 4.53 hands the null of a nested option on as the text ``None``."""
LARGEST = 1_000_000
"""A configuration may have so many values, each counted as often as an alias names it."""
_yaml_load = get_loader("yaml")


@cache
def close_parsers() -> None:
    """Close the ways in which jsonargparse lets a configuration call what no option declares: for the whole process.

    A mapping with ``class_path`` under an option of any type stays a mapping; no value names the standard library.
    """
    set_parsing_settings(
        instantiate_subclass_spec_in_any=False, import_path_denylist=sorted({*sys.stdlib_module_names, "pip"})
    )
    set_loader("yaml", _load, exceptions=(yaml.YAMLError,))


def _load(text: str) -> Any:
    try:
        value = _yaml_load(text)
        if ":" in text:
            _check_keys(yaml.compose(text, Loader=yaml.SafeLoader), set())
        size = _size(value, {})
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply, or an alias names itself.") from None
    if size > LARGEST:
        raise yaml.YAMLError(f"its aliases stand for {size:.1e} values; a configuration may have {LARGEST:,}.")
    return value


def _check_keys(node: yaml.Node | None, seen: set[int]) -> None:
    """Refuse a key that is there twice, of which YAML would keep the last without a word."""
    if node is None or id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    keys = set[str]()
    for item in node.value:
        key, value = item if isinstance(node, yaml.MappingNode) else (None, item)
        if isinstance(key, yaml.ScalarNode) and key.value in keys and key.value != "<<":
            raise yaml.YAMLError(f"the key {key.value!r} is there twice, in line {key.start_mark.line + 1} again.")
        keys |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        _check_keys(value, seen)


def _size(value: Any, sizes: dict[int, int]) -> int:
    """Number of values in what was loaded; an alias is one object, which is counted once and added at each place."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in sizes:
        items = value.values() if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_size(item, sizes) for item in items)
    return sizes[id(value)]


def _load_null(text: str) -> Any:
    value = name_in(_load(text))
    return None if isinstance(value, str) and value.strip() == "None" else value


set_loader(MODE, _load_null, exceptions=(yaml.YAMLError,))


def check_classes(config: Namespace) -> None:
    """Refuse a parsed configuration that would call anything but a class, or a maker, of a declared kind.

    jsonargparse calls any function, and any class whose instances can be called, where an option is a ``Callable``.

    Raises:
        ConfigError: With the option and what it names.
    """
    from lightning_tta.backbones.own import is_of_torch

    for option, path in _class_paths(config, ""):
        kind = find_loaded(path)
        made = kind if inspect.isclass(kind) else _returns(kind)
        is_kind = inspect.isclass(made) and issubclass(made, _declared())
        if kind is not None and (not is_kind or (inspect.isfunction(kind) and is_of_torch(kind))):
            raise ConfigError(
                f"--{option} names {path}, which a configuration may not call. Allowed: classes of the option's kind, "
                "such as a torch.optim.Optimizer, a Callback or a torch.nn.Module. Call anything else from Python."
            )


def _class_paths(value: Any, option: str) -> Iterator[tuple[str, str]]:
    """Where in a configuration a class is named, and which."""
    if isinstance(value, (Namespace, Mapping)):
        items = vars(value) if isinstance(value, Namespace) else value
        if isinstance(path := items.get("class_path"), str):
            yield option, path
        for key, item in items.items():
            yield from _class_paths(item, option if key == "init_args" else f"{option}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _class_paths(item, option)


def find_loaded(path: str) -> Any:
    """What an import path names, if its module is loaded; ``None`` otherwise. Nothing is imported."""
    module, rest = path, ""
    while module and module not in sys.modules:
        module, _, name = module.rpartition(".")
        rest = f"{name}.{rest}" if rest else name
    found: Any = sys.modules.get(module)
    for name in filter(None, rest.split(".")):
        found = getattr(found, name, None)
    return found


def _returns(function: Any) -> Any:
    try:
        return get_type_hints(function).get("return")
    except (TypeError, NameError, AttributeError):
        return None


@cache
def _declared() -> tuple[type, ...]:
    """The kinds of which options of this package, of Lightning's Trainer and of torch's schedules are."""
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
    from lightning.pytorch import Callback, LightningDataModule
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.plugins import LayerSync, Precision
    from lightning.pytorch.profilers import Profiler
    from lightning.pytorch.strategies import Strategy
    from torch.nn import Module
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    of_lightning = (Accelerator, Callback, CheckpointIO, ClusterEnvironment, LayerSync, Logger, Precision, Profiler)
    return (*of_lightning, LightningDataModule, LRScheduler, Module, Optimizer, Strategy)
