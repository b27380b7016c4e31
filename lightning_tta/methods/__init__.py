"""The methods. A file ``foo_bar.py`` with a class ``FooBar`` here is a method named "foo_bar"; nothing to register.

Importing this package imports no method and no torch: :func:`find` or an attribute such as ``Tent`` imports one file.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tta.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from lightning_tta.methods.base.method import TTAMethod

__all__ = ["TTAMethod", "about", "adapt", "available_methods", "create_method", "docstring", "find", "names"]


@functools.cache
def names() -> tuple[str, ...]:
    """The names of the methods, which are those of their files, alphabetically."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.ispkg))


def find(name: str) -> type[TTAMethod]:
    """The class of a method. Only its file is imported.

    Args:
        name: The file's name or the class's: ``"single_image_bn"`` or ``"SingleImageBN"``.

    Raises:
        ConfigError: If there is no such method.
        ImportError: If the file does not define the method.
    """
    from lightning_tta.methods.base.method import TTAMethod

    for file in names():
        class_name = file.replace("_", "")
        if str(name).lower() not in (file, class_name):
            continue
        module = importlib.import_module(f"{__name__}.{file}")
        for key, member in vars(module).items():
            if key.lower() == class_name and inspect.isclass(member) and issubclass(member, TTAMethod):
                return member
        raise ImportError(f"{module.__name__} must define a TTAMethod named like the file, '{file}'.")
    raise ConfigError(f"Unknown method {name!r}.{did_you_mean(name, names())} Available: {', '.join(names())}.")


def available_methods() -> dict[str, type[TTAMethod]]:
    """Method classes by name, alphabetically. Imports all of them."""
    return {name: find(name) for name in names()}


@functools.cache
def _class_of(name: str) -> ast.ClassDef:
    """A method's class as it is written in its file, which is not imported."""
    tree = ast.parse(Path(__path__[0], f"{name}.py").read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return next(node for node in classes if node.name.lower() == name.replace("_", ""))


def docstring(name: str) -> str:
    """The docstring of a method's class, read from its file, which is not imported."""
    return ast.get_docstring(_class_of(name)) or ""


def about(name: str) -> dict[str, str]:
    """What a method's class says of itself, ``about``, read from its file, which is not imported.

    Returns:
        By the names of :class:`~lightning_tta.methods.base.description.About`.
    """
    for node in _class_of(name).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            if [target.id for target in node.targets if isinstance(target, ast.Name)] == ["about"]:
                return {word.arg or "": ast.literal_eval(word.value) for word in node.value.keywords}
    return {}


def create_method(name: str, model: nn.Module, **options: Any) -> TTAMethod:
    """Wrap ``model`` (in place) with a method.

    Args:
        name: One of :func:`available_methods`.
        model: Pixels in [0, 1] -> logits.
        **options: As of :func:`adapt`.

    Raises:
        ConfigError: If the name or an option is unknown, or a value is out of range.
        UnsupportedModelError: If the method cannot run on this net.
    """
    import torch

    from lightning_tta.backbones.passes import outside_inference_mode
    from lightning_tta.methods.base.execution import split_options
    from lightning_tta.methods.components.additions import ADDITIONS, OPTIONS, add, make_selecting
    from lightning_tta.methods.components.tasks import as_task, check_additions, default_select, settings_of, task_kind

    kind = find(name)
    execution, options = split_options(options)
    model = as_task(model, options.pop("task", "auto"), kind.loss_on)
    options = {**kind.task_defaults.get(task_kind(model), {}), **options}
    own = inspect.signature(kind).parameters
    added = {option: options.pop(option) for option in ADDITIONS if option in options and option not in own}
    check_additions(model, added)
    select = options.pop("select", None)
    allowed = [option for option in (*own, *OPTIONS, "task") if option != "model"]
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise ConfigError(
            f"Method '{name}' has no option {', '.join(map(repr, unknown))}.{did_you_mean(unknown[0], allowed)} "
            f"Its options: {', '.join(allowed) or 'none'}."
        )
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    with outside_inference_mode():  # what is created under inference_mode could not be adapted
        select = default_select(kind, model) if select is None else select
        made = make_selecting(functools.partial(kind, **options), model, select)
        add(made, **added)
    made.execution = execution
    if task_kind(model) != "images":
        made.options["task"] = {"kind": task_kind(model), **settings_of(model)}
    return made


def adapt(model: nn.Module, method: str = "zerosiam", *, in_place: bool = False, **options: Any) -> TTAMethod:
    """Wrap a classifier so that it adapts to the unlabelled images it predicts.

    It works on a copy: ``model`` stays as it is, so ``model.state_dict()`` is still that of the source after the
    stream. The adapted net is in the method: :func:`lightning_tta.save` writes it as a plain net, and
    ``method.state_dict()`` has all of the method's state, to go on from.

    Args:
        model: Any classifier: pixels (B, C, H, W) in [0, 1] -> logits (B, K). Normalisation belongs inside it.
        method: Name of a method, see :func:`lightning_tta.available_methods`.
        in_place: Adapt ``model`` itself, which saves the memory of a copy. It is in the method's hands then: one method
            at a time, and no weights may be loaded into it any more.
        **options: Arguments of the method's class, such as ``lr``; what every method takes beside them, ``statistics``,
            ``prior``, ``refine``, ``window``, ``reservoir``, ``gate``:
            :mod:`~lightning_tta.methods.components.additions`;
            ``select``, what learns: :mod:`~lightning_tta.methods.components.adapters`;
            ``task``, what the net takes, images or tokens: :mod:`~lightning_tta.methods.components.tasks`; and
            how it computes, see :class:`~lightning_tta.methods.base.execution.Execution`: ``capture``, ``compile``,
            ``deterministic``, ``precision``, ``lean``.

    Returns:
        A module with ``method(images) -> logits``, ``reset()``, complete ``state_dict()``, ``stats``.

    Raises:
        ConfigError: If the name or an option is unknown, or a value is out of range.
        UnsupportedModelError: If the method cannot run on this net, or the net cannot be copied.
        WeightsError: If a weight is not a number.
    """
    import torch

    from lightning_tta.backbones.copying import copy_net
    from lightning_tta.backbones.passes import outside_inference_mode

    if not in_place and isinstance(model, torch.nn.Module):
        with outside_inference_mode():  # a copy made under inference_mode could not be adapted
            model = copy_net(model)
    return create_method(method, model, **options)


def __getattr__(name: str) -> Any:
    """``lightning_tta.methods.Tent`` and the base class, imported when they are asked for."""
    if name == "TTAMethod":
        return importlib.import_module(f"{__name__}.base.method").TTAMethod
    if name not in names() and name.lower() in (file.replace("_", "") for file in names()):  # else: a file, a module
        kind = find(name)
        if kind.__name__ == name:
            return kind
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
