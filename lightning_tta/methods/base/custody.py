"""The net in a method's hands: one call at a time, changes by others are noticed, and a broken call is tidied up."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter, is_
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.errors import ConfigError
from lightning_tta.methods.base.state import Lent

Method = TypeVar("Method", bound=Callable[..., Any])
_PACKAGE = __name__.partition(".")[0]
_HOLDERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Custody]] = weakref.WeakKeyDictionary()
_version, _training, _END = attrgetter("_version"), attrgetter("training"), object()
_address: Callable[[Any], int] = Tensor.data_ptr


class Custody:
    """A method's hold on its net. A copy of the method gets one of its own.

    Between two calls the net must stay as the last one left it: the same modules, parameters and buffers, parameters
    and statistics of norm layers with the same values. What is looked at costs microseconds: identities, addresses, and
    torch's counters of writes in place; a write through ``.data`` passes unnoticed.

    Args:
        net: The net. A second method on a part of it is told so, and has the lock of the first.
        name: The method's, for messages.
        lent: What has other values for a while, and gets its own back after an interrupt.

    Attributes:
        lock: Re-entrant; one for all that hold a part of the same net.
        busy: Whether a call is running.
        revision: Number of calls so far that may have changed the method.
    """

    def __init__(self, net: nn.Module | None = None, name: str = "", lent: Lent | None = None) -> None:
        self.lock, self.name, self._lent = threading.RLock(), name, [] if lent is None else lent
        self.revision, self.busy, self._unfinished = 0, False, False
        self._others: weakref.WeakSet[Custody] = weakref.WeakSet()  # that hold a part of the same net
        self._rival = ""  # the name of one of them that has been called since
        if net is not None:
            self._claim(net)
            self.take_stock(net)

    def __reduce__(self) -> tuple[type[Custody], tuple[()]]:
        return Custody, ()

    def _claim(self, net: nn.Module) -> None:
        owners = [module for module in net.modules() if module._parameters or module._buffers]
        others = {other for module in owners if (ref := _HOLDERS.get(module)) and (other := ref())}
        for other in others:
            self.lock = other.lock
            other._others.add(self)
            self._others.add(other)
            warnings.warn(
                f"This net, or a part of it, is in the hands of another method, '{other.name}', already. Two methods "
                "on one net undo each other, so each will refuse to go on after the other has changed the net. Leave "
                "out in_place=True, which adapts a copy; or delete the other method first (del), after a reset() if "
                "the net is to be the source again.",
                stacklevel=6,
            )
        for module in owners:
            _HOLDERS[module] = weakref.ref(self)

    def take_stock(self, net: nn.Module) -> None:
        """Take the net as it is now, modules and tensors too, for what the method left."""
        self.net = net
        self._members = list(net.modules())
        self._slots: list[dict[str, Any]] = [
            slots for m in self._members for slots in (m._parameters, m._buffers, m._modules)
        ]
        self._contents = [dict(slots) for slots in self._slots]
        self._filled = [slots for slots in self._slots if slots]
        self._entries = [*chain.from_iterable(slots.values() for slots in self._filled), _END]
        self._forwards = [vars(module).get("forward") for module in self._members]
        statistics = [getattr(m, name, None) for m in self._members for name in ("running_mean", "running_var")]
        self._tensors = {id(t): t for t in (*net.parameters(), *statistics) if has_address(t)}.values()
        self.note()

    def check(self, values: bool = True) -> None:
        """Put the net back into eval mode, and refuse one that somebody else has changed.

        Args:
            values: Whether to look at values too, not at modules and tensors alone.

        Raises:
            ConfigError: If it has other modules, tensors or values.
        """
        if self._unfinished:  # an interrupt came after the last call, or while it was tidied up
            self._put_back()
            self.note()
        if any(map(_training, self._members)):
            self.net.eval()
        if not all(map(is_, chain(chain.from_iterable(map(dict.values, self._filled)), (_END,)), self._entries)):
            raise ConfigError(
                f"A module, parameter or buffer of the net inside '{self.name}' was replaced, by another one or on "
                f"another device or of another dtype: {self._replaced()}. The method still holds the old one. Change "
                "the net before adapt(), and make a new method for it; to move the net, move the method (method.to)."
            )
        if values and self._rival:
            raise ConfigError(
                f"The net of '{self.name}' is adapted by another method too, '{self._rival}', which has been called "
                "since the last call of this one. Two methods on one net undo each other. Give each its own: "
                "lightning_tta.adapt copies the net, without in_place=True."
            )
        if values and (
            sum(map(_version, self._tensors)) != self._versions or sum(map(_address, self._tensors)) != self._addresses
        ):
            raise ConfigError(
                f"The weights of the net inside '{self.name}' were changed by somebody else since its last call, so "
                "the method would mix two nets, and reset() return to the old one. Load weights into the net before "
                "adapt(), and make a new method for them. A state of this method: method.load_state_dict(state). If "
                "the change is meant: with "
                "method.hold(changed=True): ..., which leaves what reset() goes back to as it was."
            )

    def _replaced(self) -> str:
        """Name of one thing that is another one."""
        names = dict(zip(map(id, self._members), (name for name, _ in self.net.named_modules()), strict=False))
        for number, (slots, before) in enumerate(zip(self._slots, self._contents, strict=True)):
            for key in {**before, **slots}:
                if before.get(key) is not slots.get(key):
                    return f"{names.get(id(self._members[number // 3]), '')}.{key}".lstrip(".")
        return "a module"

    @contextmanager
    def call(self, check: bool = True, values: bool = True, changes: bool = True) -> Iterator[None]:
        """One call: the others wait, and the net is what it leaves. See :func:`exclusive`, which is faster.

        Args:
            check: Whether to :meth:`check` first.
            values: Whether that looks at values too.
            changes: Whether it may change the method.
        """
        with self.lock:
            if self.busy:
                yield
                return
            if check:
                self.check(values)
            try:
                self.begin(changes)
                yield
            except BaseException:
                self.tidy_up()
                raise
            finally:
                self.busy = False
                self.note()

    def begin(self, changes: bool) -> None:
        """A call begins."""
        self._modes = torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
        self._unfinished = self.busy = True
        for other in self._others if changes else ():
            other._rival = self.name

    def note(self) -> None:
        """It ended, and is no longer ``busy``: the net is as the method left it."""
        self._versions = sum(map(_version, self._tensors))
        self._addresses = sum(map(_address, self._tensors))
        self._unfinished, self._rival = False, ""

    def tidy_up(self) -> None:
        """It broke off: put modules, tensors and torch's modes back, take off this package's hooks and forwards.

        The code that changed them does so too; but an interrupt may come in the middle of that.
        """
        torch.set_grad_enabled(self._modes[0])
        torch.set_autocast_cache_enabled(self._modes[1])
        self._put_back()

    def _put_back(self) -> None:
        while self._lent:
            tensors, values = self._lent[-1]
            with outside_inference_mode(), torch.no_grad():
                torch._foreach_copy_(tensors, values)
            self._lent.pop()
        for slots, before in zip(self._slots, self._contents, strict=True):
            for key, value in before.items():
                if slots.get(key) is not value:
                    slots[key] = value
        for module, forward in zip(self._members, self._forwards, strict=True):
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for number in [number for number, hook in hooks.items() if _is_ours(hook)]:
                    del hooks[number]
                    module._forward_hooks_always_called.pop(number, None)
            if _is_ours(vars(module).get("forward")):
                vars(module).pop("forward")
                if forward is not None:
                    module.forward = forward


def exclusive(function: Method, changes: bool = True) -> Method:
    """A method's function as one call, as :meth:`Custody.call` has it.

    Args:
        function: Of a class that has a ``_custody``.
        changes: Whether it may change the method.
    """

    @functools.wraps(function)
    def run(self: Any, *args: Any, **options: Any) -> Any:
        custody: Custody = self._custody
        with custody.lock:
            custody.revision += changes
            if custody.busy:  # a call inside a call
                return function(self, *args, **options)
            custody.check()
            try:
                custody.begin(changes)
                return function(self, *args, **options)
            except BaseException:
                custody.tidy_up()
                raise
            finally:
                custody.busy = False  # here, for an interrupt may come at the beginning of any function
                custody.note()

    return cast(Method, run)


def reading(function: Method) -> Method:
    """:func:`exclusive` for what changes nothing."""
    return exclusive(function, changes=False)


def has_address(tensor: object) -> bool:
    """Whether a tensor has an address and a counter of writes: any but inference tensors and special kinds."""
    if not isinstance(tensor, Tensor):
        return False
    try:
        return isinstance(tensor.data_ptr() + tensor._version, int)
    except (RuntimeError, NotImplementedError):
        return False


def _is_ours(function: object) -> bool:
    """Whether a function was defined in this package."""
    function = getattr(function, "func", function)  # of a partial
    return str(getattr(function, "__module__", "")).partition(".")[0] == _PACKAGE
