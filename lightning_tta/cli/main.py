"""``lightning-tta``: looks a command up and calls it. Importing this module imports neither torch nor lightning."""

from __future__ import annotations

import sys

from lightning_tta._version import __version__
from lightning_tta.cli.commands import COMMANDS, overview
from lightning_tta.errors import ConfigError, FinishedError, LightningTTAError, did_you_mean


def main(args: list[str] | None = None) -> None:
    """Run a command; what users, tests and notebooks call.

    Args:
        args: As on the command line, without the program's name; ``None`` takes ``sys.argv``.

    Raises:
        SystemExit: With code 2 after a message, if the configuration, data or weights are wrong. A run that was to be
            continued and is finished is no error.
    """
    name, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
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
