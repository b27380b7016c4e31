"""A user's own net by its import path: ``my_net.MyNet``, ``my_net:MyNet`` or ``path/to/my_net.py:MyNet``.

To find a net its module is imported, which runs it: name only modules that you trust. What is called is a class of nets
or a function that makes one, so that no other code can be reached from a configuration or a checkpoint.
"""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from torch import nn

from lightning_tta.errors import ConfigError, did_you_mean

MakeNet = Callable[..., nn.Module]


def is_import_path(name: str) -> bool:
    """Whether a name has the form of an import path: ``module.Name``, ``module:Name`` or ``file.py:Name``."""
    module, _, attribute = name.rpartition(":") if ":" in name else name.rpartition(".")
    in_file = ":" in name and module.endswith(".py")
    return attribute.isidentifier() and (in_file or all(part.isidentifier() for part in module.split(".")))


def find_net(name: str) -> MakeNet:
    """The class of nets, or the function that makes one, which a name stands for; the current folder comes first.

    Raises:
        ConfigError: There is no such thing, or it is neither a subclass of :class:`torch.nn.Module` nor a function that
            is annotated to return one or stands in a file of yours below the current folder.
    """
    path, _, attribute = name.rpartition(":") if ":" in name else name.rpartition(".")
    if not path.endswith(".py") and path.partition(".")[0] in sys.stdlib_module_names:
        raise ConfigError(f"{name} is of Python's standard library, which has no nets. Name a class of your own.")
    module = _import_file(Path(path), name) if path.endswith(".py") else _import_module(path, name)
    net = getattr(module, attribute, None)
    if net is None:
        nets = [
            key
            for key, value in vars(module).items()
            if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == module.__name__
        ]
        there = f" Nets there: {', '.join(nets)}." if nets else ""
        raise ConfigError(f"{path} has no {attribute!r}.{did_you_mean(attribute, nets)}{there}")
    if inspect.isclass(net) and issubclass(net, nn.Module):
        return net
    if inspect.isfunction(net) and is_of_torch(net):
        raise ConfigError(f"{name} is a function of torch, some of which run text as code. Name a class, or your own.")
    if inspect.isfunction(net) and (_makes_net(net) or _is_local(net, path)):
        return net
    kind = "a class that is no torch.nn.Module" if inspect.isclass(net) else f"a {type(net).__name__}"
    raise ConfigError(
        f"{name} is {kind}. Allowed: a subclass of torch.nn.Module, or a function that returns one: annotated "
        "(def make_net(...) -> nn.Module), or in a file below the current folder."
    )


def is_of_torch(function: Callable[..., Any]) -> bool:
    """Whether a function is defined in torch, where ``reduce_graph_module``, for one, runs text that it is given."""
    return (function.__module__ or "").partition(".")[0] == "torch"


def check_not_beside(name: str, checkpoint: Path) -> None:
    """Refuse code that a checkpoint names and that lies with it in a folder of theirs: it came along from elsewhere.

    Raises:
        ConfigError: The code and the checkpoint have a folder in common that does not hold the current folder.
    """
    path, _, _ = name.rpartition(":") if ":" in name else name.rpartition(".")
    file = Path(path) if path.endswith(".py") else Path(*path.split("."))
    if not path.endswith(".py") and not (Path(file.parts[0]).is_dir() or Path(f"{file.parts[0]}.py").is_file()):
        return  # of an installed package
    common = os.path.commonpath([file.resolve(), checkpoint.resolve()])
    if not Path.cwd().resolve().is_relative_to(common):
        raise ConfigError(
            f"{checkpoint} asks for the net {name}, whose code lies beside it and would be run. If you trust it, name "
            f"it yourself: --model.backbone {name} (with its --model.num_classes and --model.backbone_options)."
        )


def build_own(name: str, num_classes: int | None, options: Mapping[str, Any]) -> tuple[nn.Module, int | None]:
    """The net, and its number of logits where it is known; ``num_classes`` is handed on to who takes it.

    Raises:
        ConfigError: As :func:`find_net`, where the net does not take the options, and where no net is made.
    """
    make = find_net(name)
    parameters = inspect.signature(make).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    given = dict(options)
    if num_classes is not None and (anything or "num_classes" in parameters):
        given["num_classes"] = num_classes
    unknown = [] if anything else [key for key in options if key not in parameters]
    if unknown:
        takes = ", ".join(parameters) or "none"
        raise ConfigError(
            f"{name} has no option {unknown[0]!r}.{did_you_mean(unknown[0], parameters)} It has: {takes}."
        )
    needed = [
        key
        for key, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = [key for key in needed if key not in given]
    if missing:
        how = "num_classes" if missing == ["num_classes"] else f"backbone_options={{{missing[0]}: ...}}"
        raise ConfigError(f"{name} needs {', '.join(missing)}: give {how}.")
    with _current_folder_first():  # a net may import its parts when it is built
        try:
            net = Context().run(make, **given)  # a LightningModule must not take the options of the one around it
        except (Exception, SystemExit) as error:  # whatever a user's code raises
            raise ConfigError(f"{name} cannot be built with {given}: {type(error).__name__}: {error}") from error
    if not isinstance(net, nn.Module):
        raise ConfigError(f"{name} must make a torch.nn.Module; it made a {type(net).__name__}.")
    known = num_classes if "num_classes" in given else getattr(net, "num_classes", None)
    return net, known if isinstance(known, int) else None


def _import_module(path: str, name: str) -> ModuleType:
    try:
        with _current_folder_first():
            return importlib.import_module(path)
    except ModuleNotFoundError as error:
        ours = error.name is not None and f"{path}.".startswith(f"{error.name}.")
        where = "Run the command in the folder of the file, or name the file: path/to/my_net.py:MyNet."
        raise ConfigError(f"{name} cannot be imported: {error}.{f' {where}' if ours else ''}") from error
    except (Exception, SystemExit) as error:  # whatever a user's module raises
        raise ConfigError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def _import_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{name} cannot be imported: {path} is no file (seen from {Path.cwd()}).")
    key = str(path.resolve())
    module = next((m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == key), None)
    if module is not None:
        return module
    spec = importlib.util.spec_from_file_location(path.stem, key)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # where pickle and dataclasses look for it
    try:
        with _current_folder_first(path.resolve().parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(path.stem, None)
        package = path.with_suffix("").as_posix().replace("/", ".")
        hint = f" Name it as {package}:{name.rpartition(':')[2]}." if "relative import" in str(error) else ""
        raise ConfigError(f"{name} cannot be imported: {type(error).__name__}: {error}.{hint}") from error
    return module


@contextmanager
def _current_folder_first(folder: Path | None = None) -> Iterator[None]:
    """Look for modules in the current folder first, as ``python -m`` does; afterwards last, for late imports."""
    place = str(folder or Path.cwd())
    sys.path.insert(0, place)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(place)
        if place not in sys.path:
            sys.path.append(place)


def _makes_net(function: Callable[..., Any]) -> bool:
    try:
        made = get_type_hints(function).get("return")
    except (TypeError, NameError, AttributeError):
        return False
    return inspect.isclass(made) and issubclass(made, nn.Module)


def _is_local(function: Callable[..., Any], path: str) -> bool:
    """Whether a function stands in the file ``path``, or below the current folder and in no installed package."""
    file = Path(inspect.getsourcefile(function) or "/").resolve()
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    return file == Path(path).resolve() or (file.is_relative_to(Path.cwd()) and not installed)
