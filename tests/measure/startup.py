"""Processor seconds (user and system) until the command line has answered, here and in another checkout.

    python tests/measure/startup.py --run runs/digits/tent --against ../before

Checkouts take turns; medians. ``python -c pass`` shows what the interpreter alone costs. ``report`` needs the
directory of a finished run (``--run``) and is left out without one.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

from plumbing import arguments, header, medians, row

ROOT = Path(__file__).parents[2]


def seconds(checkout: Path, command: list[str]) -> float:
    """User and system time of one command, which may end with an error; it must not die of an exception."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=checkout)
    if "Traceback" in done.stderr:
        raise SystemExit(f"{command}: {done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main(args: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Print the table; returns seconds by command and checkout."""
    options = arguments(
        __doc__, args, against=("", "root of the other checkout"), run="", repeats=5, only=(["all"], "some of the rows")
    )
    cli = ["-m", "lightning_tta"]
    commands = {
        "python -c pass": ["-c", "pass"],
        "import lightning_tta": ["-c", "import lightning_tta"],
        "--help": [*cli, "--help"],
        "--version": [*cli, "--version"],
        "a typo": [*cli, "predcit"],
        "methods": [*cli, "methods"],
        **({"report RUN": [*cli, "report", str(Path(options.run).resolve())]} if options.run else {}),
        "predict --help": [*cli, "predict", "--help"],
    }
    if options.only != ["all"]:
        commands = {name: commands[name] for name in options.only}
    checkouts = {"this": ROOT, **({"the other": Path(options.against).resolve()} if options.against else {})}
    header("processor seconds", *checkouts)
    table = {}
    for name, command in commands.items():
        times: dict[str, list[float]] = {checkout: [] for checkout in checkouts}
        for _ in range(options.repeats):
            for checkout, root in checkouts.items():
                times[checkout].append(seconds(root, command))
        table[name] = medians(times)
        row(name, *(f"{value:.2f}" for value in table[name].values()))
    return table


if __name__ == "__main__":
    main()
