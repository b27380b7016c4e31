"""What a method says of itself to those who save it or compare it: its name, its options, what it can be."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import nn

from lightning_tta.errors import ConfigError, check_choice, did_you_mean


@dataclass(frozen=True, kw_only=True)
class About:
    """A method in a few words; the tables of the documentation and the list of methods are made from these.

    Written as plain text in the class's body, for it is also read from the file alone.

    Attributes:
        does: What it minimises or does, in one line.
        learns: Which parameters: ``norm layers``, ``all``, ``none``.
        passes: Forward / backward passes a batch with the default options.
        needs: Of the net and of source data; ``-``: nothing.
        holds: What it keeps beside the net and its optimizer; ``-``: nothing.
        suits: Streams that it is made for.
        formula: Where its formula is from. ``reconstruction``: neither code nor a whole formula was published;
            ``own work``: of this project, without a paper; ``-``: there is none.
        paper: Venue, year and number.
    """

    does: str
    learns: str
    passes: str
    needs: str
    holds: str
    suits: str
    formula: Literal["code", "paper", "code and paper", "reconstruction", "own work", "-"]
    paper: str


class Described:
    """Base of the methods' base.

    Attributes:
        about: The method in a few words. A method of this package has its own.
        options: What the method was built with, defaults included, in primitives.
        parallel: Ways to run on several processes: ``replicas``, and ``synchronised`` where ``synchronized``.
        synchronized: Whether several processes can adapt as one: all that is taken over a batch goes through
            :mod:`lightning_tta.collective`. A subclass that overrides ``step`` must say it again.
        tasks: What it can adapt on: ``images``, ``tokens``; for a subclass that overrides ``step``, and does not say it
            again, images alone.
        loss_on: Over tokens, which count in the loss unless the task says otherwise.
        task_defaults: Options whose defaults are others over some kind of input, by kind and name.
        fixed_options: Options of a base class that this class sets itself, and does not take.
        uses_batch_statistics: Whether its plain pass has BatchNorm normalise with the batch's own statistics.
        no_plain_net: Why no plain net predicts as the method does, and what to do; empty where one can, see ``export``.
    """

    about: ClassVar[About | None] = None
    parallel: ClassVar[frozenset[str]] = frozenset({"replicas"})
    synchronized: ClassVar[bool] = False
    tasks: ClassVar[frozenset[str]] = frozenset({"images"})
    loss_on: ClassVar[str] = "auto"
    task_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    fixed_options: ClassVar[frozenset[str]] = frozenset()
    uses_batch_statistics: bool = False
    no_plain_net: str = ""
    options: dict[str, Any]
    model: nn.Module

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.synchronized and "step" in cls.__dict__ and "synchronized" not in cls.__dict__:
            raise TypeError(
                f"{cls.__name__} overrides step() of a method that several processes can run as one. Say whether that "
                "still holds: `synchronized = True` if all that is taken over a batch goes through "
                "lightning_tta.collective, as self.descend() does, else `synchronized = False`."
            )
        if "step" in cls.__dict__ and "tasks" not in cls.__dict__:
            cls.tasks = frozenset({"images"})
        cls.parallel = frozenset({"replicas", "synchronised"} if cls.synchronized else {"replicas"})
        cls.__signature__ = signature_of(cls)  # type: ignore[attr-defined]  # what inspect.signature(cls) gives

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Note the arguments; the model is none of them."""
        self = super().__new__(cls)
        self.__dict__["options"] = _options(cls, args, options)  # nn.Module's own __setattr__ is not ready yet
        return self

    @property
    def name(self) -> str:
        """The name to ask for: the file's name in this package, or the class name of a method from elsewhere."""
        package, _, file = type(self).__module__.rpartition(".")
        return file if package == "lightning_tta.methods" else type(self).__name__


def signature_of(cls: type) -> inspect.Signature:
    """The constructor's signature, ``**options`` resolved: with the keyword arguments of the base classes."""
    parameters: dict[str, inspect.Parameter] = {}
    fixed: set[str] = set()
    for base in cls.__mro__:
        if "__init__" not in base.__dict__:
            fixed |= base.__dict__.get("fixed_options", set())
            continue
        declared = list(inspect.signature(base.__dict__["__init__"]).parameters.values())[1:]
        for parameter in declared:
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD and parameter.name not in fixed:
                parameters.setdefault(parameter.name, parameter)
        fixed |= base.__dict__.get("fixed_options", set())
        if declared and declared[-1].kind is not inspect.Parameter.VAR_KEYWORD:
            break
    return inspect.Signature(sorted(parameters.values(), key=lambda parameter: parameter.kind))


def _options(cls: type, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    signature = signature_of(cls)
    try:
        bound = signature.bind(*args, **options)
    except TypeError:
        unknown = [name for name in options if name not in signature.parameters]
        if unknown:  # __init__ might hand it on to a base that takes it
            allowed = [name for name in signature.parameters if name != "model"]
            raise ConfigError(
                f"{cls.__name__} has no option {unknown[0]!r}.{did_you_mean(unknown[0], allowed)} Its options: "
                f"{', '.join(allowed) or 'none'}."
            ) from None
        return {}  # __init__ says what is wrong; a copy is made without arguments and gets its options later
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        if signature.parameters[name].annotation in (bool, "bool"):  # a text such as "false" would count as true
            check_choice(name, value, (True, False))
    return {n: _primitive(v) for n, v in list(bound.arguments.items()) if not isinstance(v, nn.Module)}


def _primitive(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_primitive(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _primitive(item) for key, item in value.items()}
    return getattr(value, "__qualname__", type(value).__qualname__)
