"""The base of the callbacks that follow a predict run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.run.stream_run import StreamRun, run_of

Outputs = dict[str, Tensor]
"""What ``predict_step`` returns for a batch, see :class:`~lightning_tta.run.batches.BatchRecord`."""


class RunCallback(Callback):
    """Takes Lightning's hooks once; a subclass implements those of these methods that it needs.

    Python: ``Trainer(callbacks=[StateKeeper(save_every=50)])``; those that the Trainer has not,
    :class:`~lightning_tta.TestTimeAdaptation` adds with their defaults.
    """

    def identity(self) -> dict[str, Any]:
        """Options that change what is predicted, by name: a run with others is another run."""
        return {}

    def wrap(self, method: TTAMethod) -> TTAMethod:
        """The method, or something with its interface around it, which is then called in its place."""
        return method

    def results(self, run: StreamRun) -> dict[str, Any]:
        """Entries for ``report.json``."""
        return {}

    def on_start(self, run: StreamRun) -> None:
        """The directory is known, and what was saved has been read."""

    def on_ready(self, run: StreamRun) -> None:
        """The method is prepared; the first batch comes next."""

    def on_batch(self, run: StreamRun, output: Outputs) -> None:
        """A batch was predicted, and counted in ``run.summary``."""

    def on_end(self, run: StreamRun) -> None:
        """The stream has ended."""

    def close(self) -> None:
        """The run has ended, in whatever way."""

    # Lightning's hooks

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call :meth:`on_start`."""
        self.on_start(run_of(pl_module))

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call :meth:`on_ready`."""
        self.on_ready(run_of(pl_module))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Call :meth:`on_batch`, unless the batch was done before the run was continued."""
        if outputs is not None:
            self.on_batch(run_of(pl_module), outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call :meth:`on_end` and :meth:`close`."""
        self.on_end(run_of(pl_module))
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Call :meth:`close`."""
        self.close()
