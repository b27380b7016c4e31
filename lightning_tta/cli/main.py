"""``lightning-tta``: looks a command up and calls it. Importing this module imports neither torch nor lightning."""

from __future__ import annotations

import atexit
import codecs
import errno
import gc
import io
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from lightning_tta._version import __version__
from lightning_tta.cli.commands import COMMANDS, overview
from lightning_tta.errors import ConfigError, FinishedError, Interrupted, LightningTTAError, did_you_mean

PLACES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Give a place where you may read and write."),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Make room, or give another place."),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG), "Give another path."),
}
"""What to do about an error of the operating system that is no fault of this package."""

ASCII = {"±": "+-", "→": "->", "…": "...", "─": "-", "━": "-", "╸": "-", "╺": "-"}
"""What stands for characters that the terminal's encoding lacks."""


def main(args: list[str] | None = None) -> None:
    """Run a command; what users, tests and notebooks call.

    Args:
        args: As on the command line, without the program's name; ``None`` takes ``sys.argv``.

    Raises:
        SystemExit: With code 2 after a message, if the configuration, data or weights are wrong, or a place cannot be
            written to; with 130 after Ctrl-C and 143 after SIGTERM; in silence where nobody reads the output any more,
            as after ``| head``. A run that was to be continued and is finished is no error.
    """
    name, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    if args is None:
        _write_any_text()
        atexit.register(gc.freeze)  # the process ends: looking for garbage in all modules would take a second or more
    with _until_output_closes():
        _call(name, rest)


def _call(name: str, rest: list[str]) -> None:
    try:
        if name in ("-h", "--help"):
            print(overview())
        elif name == "--version":
            print(__version__)
        elif name in COMMANDS:
            COMMANDS[name].run(rest)
        else:
            hint = did_you_mean(name, [*COMMANDS, "--help", "--version"])
            raise ConfigError(f"{name!r} is no command.{hint} Give one of: {', '.join(COMMANDS)}.")
    except FinishedError as done:
        from lightning.pytorch.utilities import rank_zero_only

        rank_zero_only(print)(done)
    except LightningTTAError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except OSError as error:
        if error.errno not in PLACES:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {where}{os.strerror(error.errno)}. {PLACES[error.errno]}", file=sys.stderr)
        raise SystemExit(2) from error
    except (Interrupted, KeyboardInterrupt) as stop:
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        again = stop.again if isinstance(stop, Interrupted) else []
        if _is_first():
            print(f"\n{str(stop) or 'Stopped before anything was run.'}", file=sys.stderr)
            if again is not None:
                command = shlex.join(["lightning-tta", name, *_without(rest, again), *again])
                print(f"Go on with: {command}", file=sys.stderr)
        raise SystemExit(128 + number) from None


def _write_any_text() -> None:
    """In a locale without some characters, write others for them instead of ending with an error."""
    codecs.register_error(__name__, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=__name__)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(ASCII.get(character, "?") for character in text), error.end


@contextmanager
def _until_output_closes() -> Iterator[None]:
    """End the process in silence, as a signal ends other programs, where the reader of the output is gone."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # now: at its own end, Python would complain
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:
            with suppress(OSError, ValueError):  # what is left to be written goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(128 + signal.SIGPIPE) from None
        raise  # it was another pipe


def _without(args: Sequence[str], again: Sequence[str]) -> list[str]:
    """The arguments without the option that ``again`` begins with."""
    kept: list[str] = []
    skip = False
    for arg in args:
        if skip or (again and arg.partition("=")[0] == again[0]):
            skip = not skip and "=" not in arg  # its value is the next one
        else:
            kept.append(arg)
    return kept


def _is_first() -> bool:
    """Whether this process speaks for all of a run."""
    lightning = sys.modules.get("lightning.fabric.utilities.rank_zero")
    return lightning is None or getattr(lightning.rank_zero_only, "rank", 0) == 0
