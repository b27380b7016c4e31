"""Errors a user can act on. Each message says what was given, what is allowed and what to do."""

import difflib
import math
from collections.abc import Iterable, Sequence


class LightningTTAError(Exception):
    """Base of the errors that this package raises on purpose."""


class ConfigError(LightningTTAError, ValueError):
    """An option has a wrong name, type or range."""


class InputError(ConfigError):
    """A batch that no method, or not this net, can take. Nothing has changed: go on with the next batch."""


class UnsupportedModelError(LightningTTAError, TypeError):
    """A method cannot run on this net, for example because it has no normalisation layers."""


class NotPreparedError(LightningTTAError, RuntimeError):
    """A method needs source data first: call ``prepare(source_batches)`` before the stream."""


class WeightsError(LightningTTAError, ValueError):
    """A weights file cannot be read, or does not fit the net."""


class DataError(LightningTTAError, ValueError):
    """A data set is missing, damaged or not what the configuration says."""


class QueueFullError(LightningTTAError, RuntimeError):
    """A server has more requests than it can answer: try again later."""


class ClosedError(LightningTTAError, RuntimeError):
    """A server was closed, and answers no more."""


class AnswerTimeoutError(LightningTTAError, TimeoutError):
    """A server did not answer in time."""


class CellsFailedError(LightningTTAError):
    """Some cells of a benchmark failed; its files have the others, and the reasons."""


class FinishedError(LightningTTAError):
    """A run that was to be continued is finished: there is nothing to do. The command line ends with success."""


class Interrupted(BaseException):
    """A signal has ended a run. No :class:`Exception`, as KeyboardInterrupt is none: ``except Exception`` lets it pass.

    Attributes:
        number: The signal, such as ``signal.SIGINT``.
        args: One sentence that says what is kept, and where; or an empty one.
        again: Options with which the same command goes on from what is kept; ``None`` where all is done.
    """

    def __init__(self, number: int, kept: str = "", again: Sequence[str] | None = ()) -> None:
        super().__init__(kept)
        self.number, self.again = number, None if again is None else list(again)


def check_range(
    name: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    *,
    low_open: bool = False,
    integer: bool = False,
) -> None:
    """Raise :class:`ConfigError` unless ``low <= value <= high`` and ``value`` is finite.

    Args:
        name: The option's name, for the message.
        value: What was given.
        low: Smallest allowed value; ``None`` for no bound.
        high: Largest allowed value; ``None`` for no bound.
        low_open: Whether ``low`` itself is excluded.
        integer: Whether only whole numbers are allowed.
    """
    wrong_type = (
        isinstance(value, bool) or not isinstance(value, (int, float)) or (integer and not isinstance(value, int))
    )
    too_low = not wrong_type and low is not None and not (value > low if low_open else value >= low)
    too_high = not wrong_type and high is not None and not value <= high
    if wrong_type or too_low or too_high or not math.isfinite(value):
        left = "(-inf" if low is None else f"{'(' if low_open else '['}{low}"
        right = "inf)" if high is None else f"{high}]"
        kind = "a whole number" if integer else "a number"
        raise ConfigError(f"{name} must be {kind} in {left}, {right}; got {value!r}.")


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}.")


def check_names(name: str, value: object) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a list of names, or ``None``."""
    if value is not None and not (isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)):
        raise ConfigError(f"{name} must be a list of names, or None; got {value!r}.")


def did_you_mean(name: object, known: Iterable[str], count: int = 1) -> str:
    """A question, after a space, that names up to ``count`` similar ones of the known names; empty where none is."""
    by_lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(str(name).lower(), sorted(by_lower), n=count, cutoff=0.7)
    return f" Did you mean {' or '.join(by_lower[match] for match in close)}?" if close else ""


def in_one_line(error: BaseException) -> str:
    """Class and first line of an error, for a message of ours: a text, as an error itself holds all frames."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
