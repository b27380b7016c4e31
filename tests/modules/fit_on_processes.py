"""Trains Meta-TTT for five steps on some processes, each with its share of every batch; run by the tests.

python fit_on_processes.py PROCESSES OUTPUT [SCHEDULE]
"""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from nets import make_images, make_net

from lightning_tta import MetaTTT


class Data(LightningDataModule):
    """Five batches of 16 images; process r of W has the r-th part of each."""

    def train_dataloader(self):
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batches = [
            {
                "image": make_images(16, seed=i, dtype=torch.float64).chunk(world)[rank],
                "label": label.chunk(world)[rank],
            }
            for i, label in enumerate((torch.arange(16) * 7 % 5).repeat(5, 1))
        ]
        return torch.utils.data.DataLoader(batches, batch_size=None)


def main(processes, output, schedule="alternating"):
    torch.set_num_threads(1)
    seed_everything(3, verbose=False)
    model = MetaTTT(
        backbone=make_net("bn"),
        schedule=schedule,
        threshold=0.4,
        max_layers=0.5,
        synthesis_probability=0.5,
        pseudo_domains=4 // processes,  # four in all
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        use_distributed_sampler=False,
        precision="64-true",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=Data())
    if trainer.is_global_zero:
        torch.save({"steps": trainer.global_step, "weights": model.backbone.state_dict()}, output)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
