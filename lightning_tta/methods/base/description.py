"""What a method says of itself to those who save it or compare it: its options, and where its adapted weights are."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from lightning_tta.backbones.norms import batch_norm_layers
from lightning_tta.errors import check_choice

BATCH_STATISTICS = (
    "The method normalises with statistics of the test batch; the plain net's BatchNorm layers normalise with the "
    "source's, so that its logits differ. To get the method's, put these layers, and only these, into training mode "
    "with track_running_stats=False, running_mean=None and running_var=None."
)


class Described(ABC):
    """Base of the methods' base.

    Attributes:
        options: What the method was built with, defaults included, in primitives.
        parallel: Ways to run on several processes, of each class for itself: ``replicas``, and ``synchronised`` where
            all that is taken over a batch goes through :mod:`lightning_tta.collective`.
        uses_batch_statistics: Whether its plain pass has BatchNorm normalise with the batch's own statistics.
    """

    parallel: ClassVar[frozenset[str]] = frozenset({"replicas"})
    uses_batch_statistics: ClassVar[bool] = False
    options: dict[str, Any]
    model: nn.Module

    def __init_subclass__(cls, **options: Any) -> None:  # what holds for a class need not hold for its subclass
        super().__init_subclass__(**options)
        cls.parallel = cls.__dict__.get("parallel", Described.parallel)

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

    @property
    @abstractmethod
    def adaptable(self) -> dict[str, Tensor]:
        """The tensors that the method may change, by their name in ``state_dict()``."""

    @property
    def weight_names(self) -> dict[str, str]:
        """The net's tensors as adapted: their names in ``state_dict()`` by those in the net's own state dict.

        Empty where there are none to take away: nothing of the net adapts, or not for longer than a batch.
        """
        names = {name: f"model.{name}" for name, value in self.model.state_dict().items() if isinstance(value, Tensor)}
        return names if any(name.startswith("model.") for name in self.adaptable) else {}

    @property
    def lacks(self) -> str:
        """What this method's predictions have and the plain net with these weights has not; empty for nothing."""
        return BATCH_STATISTICS if batch_norm_layers(self.model) else ""


def _options(cls: type, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    try:
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]  # of a class
        bound = signature.bind(None, *args, **options)
    except TypeError:  # __init__ says what is wrong; a copy is made without arguments and gets its options later
        return {}
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        if signature.parameters[name].annotation in (bool, "bool"):  # a text such as "false" would count as true
            check_choice(name, value, (True, False))
    given = {name: value for name, value in list(bound.arguments.items())[1:] if not isinstance(value, nn.Module)}
    return {name: _primitive(value) for name, value in given.items()}


def _primitive(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_primitive(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _primitive(item) for key, item in value.items()}
    return getattr(value, "__qualname__", type(value).__qualname__)
