"""The options of a predict run on the command line, beside those of the module, and where old ones have gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_tta.run.board import StreamBoard
from lightning_tta.run.input import StreamInput
from lightning_tta.run.outputs import StreamReport
from lightning_tta.run.resume import StateKeeper

if TYPE_CHECKING:  # slow to import, and needed on the command line only
    from lightning.pytorch.cli import LightningArgumentParser

PARTS = {"state": StateKeeper, "input": StreamInput, "report": StreamReport, "board": StreamBoard}
"""Callbacks of a predict run whose options can be set, by their name on the command line."""

MOVED = {
    "save_every": "state.save_every",
    "resume": "state.resume",
    "on_bad_batch": "input.on_bad_batch",
    "channels_last": "input.channels_last",
    "source_images": "input.source_images",
    "measure_forgetting": "report.measure_forgetting",
    "log_images": "board.images",
}
"""New names of options that :class:`~lightning_tta.TestTimeAdaptation` had."""


def add_options(parser: LightningArgumentParser) -> None:
    """Add the options of the run's callbacks to the parser of ``predict``: ``--state.save_every`` and so on."""
    for name, kind in PARTS.items():
        parser.add_lightning_class_args(kind, name)


def where_moved(option: str) -> str | None:
    """A sentence that names the new option in place of a former one of the module; ``None`` for any other."""
    if option == "pretrained":
        return "model.pretrained is now model.source_ckpt: use --model.source_ckpt pretrained."
    if option not in MOVED:
        return None
    part, _, name = MOVED[option].partition(".")
    return (
        f"model.{option} is now --{part}.{name} on the command line, {part}: {{{name}: ...}} in a configuration, and "
        f"{PARTS[part].__name__}({name}=...) among the callbacks of the Trainer in Python."
    )
