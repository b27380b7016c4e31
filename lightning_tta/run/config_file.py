"""The configuration that a command leaves in the directory of its run."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lightning_tta.run.stream_run import run_of


class RunConfig(SaveConfigCallback):
    """Writes ``config.yaml``; of a predict run into its own directory, once that is taken."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write that of a training."""
        if not hasattr(pl_module, "run"):
            super().setup(trainer, pl_module, stage)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that of a predict run."""
        if hasattr(pl_module, "run") and trainer.is_global_zero:
            path = run_of(pl_module).directory.path / self.config_filename
            self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=self.multifile)
