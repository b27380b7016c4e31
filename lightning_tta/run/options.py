"""The configuration of a predict run: the options of its callbacks, where old options have gone, and the saved file."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lightning_tta.errors import ConfigError
from lightning_tta.run.batches import StreamInput
from lightning_tta.run.board import StreamBoard
from lightning_tta.run.outputs import StreamReport
from lightning_tta.run.resume import StateKeeper
from lightning_tta.run.stream_run import run_of

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


def where_moved(option: str) -> str | None:
    """A sentence that names the new option in place of a former one of the module; ``None`` for any other."""
    if option == "pretrained":
        return (
            "model.pretrained is gone: use --model.source_ckpt pretrained for the library's pretrained weights, and "
            "leave model.pretrained out where it was false."
        )
    if option not in MOVED:
        return None
    owner, _, name = MOVED[option].partition(".")
    return (
        f"model.{option} is now --{owner}.{name} on the command line, {owner}: {{{name}: ...}} in a configuration, and "
        f"{PARTS[owner].__name__}({name}=...) among the callbacks of the Trainer in Python."
    )


def check_precisions(precision: str | None, trainers: object) -> None:
    """Refuse a method's precision that Lightning's contradicts.

    Args:
        precision: That of :class:`~lightning_tta.methods.base.execution.Execution`.
        trainers: The Trainer's, such as ``bf16-mixed`` or ``32``; ``None``: float32.

    Raises:
        ConfigError: With the values that go together.
    """
    whole = ("32-true", "32")
    allowed = {"exact": (*whole, "64-true", "64"), "tf32": whole, "bf16": (*whole, "bf16-mixed", "bf16")}
    given = "32-true" if trainers is None else str(trainers)
    if precision is not None and given not in allowed[precision]:
        with_it = " or ".join(word for word in allowed[precision] if "-" in word)
        raise ConfigError(
            f"--model.precision {precision} and --trainer.precision {given} contradict each other: the Trainer would "
            f"cast the net or its operations otherwise. With {precision} goes --trainer.precision {with_it}; or leave "
            "--model.precision out, to compute as the Trainer says."
        )


class RunConfig(SaveConfigCallback):
    """Writes ``config.yaml``; of a predict run into its own directory, once that is taken."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet: what is refused now must not replace the file of another run."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that of a training."""
        super().setup(trainer, pl_module, "fit")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that of an evaluation, where a logger gives it a directory of its own."""
        if trainer.logger is not None and trainer.state.fn == "validate":
            super().setup(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same."""
        if trainer.logger is not None:
            super().setup(trainer, pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that of a predict run."""
        if hasattr(pl_module, "run") and trainer.is_global_zero:
            path = run_of(pl_module).directory.path / self.config_filename
            self.parser.save(  # it was checked when it was parsed
                self.config,
                path,
                **{"skip_none": False, "skip_validation": True, "overwrite": True, "multifile": self.multifile},
            )
