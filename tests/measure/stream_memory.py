"""Memory along a long stream: a million synthetic samples through a whole predict run.

    python tests/measure/stream_memory.py --samples 1000000

Images are made when asked for. Prints the process's resident memory along the stream (Linux).
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.images import Images
from lightning_tta.data.source import Split
from lightning_tta.methods import available_methods
from lightning_tta.modules import TestTimeAdaptation
from tiny import quiet_trainer


def resident_mb() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


class MadeImages(Images):
    """Images of one colour and some noise, from their number."""

    def __init__(self, count: int, pixels: int, classes: int) -> None:
        self.labels = torch.arange(count) % classes
        self.noise = torch.randint(64, (256, 3, pixels, pixels), dtype=torch.uint8)
        self.colour = torch.randint(192, (classes, 3, 1, 1), dtype=torch.uint8)

    def image(self, position: int) -> Tensor:
        """One image."""
        return self.images(torch.tensor([position]))[0]

    def images(self, positions: Tensor) -> Tensor:
        """Several images."""
        return self.noise[positions % 256] + self.colour[self.labels[positions]]


class MadeData(ShiftedDataModule):
    """One natural domain of :class:`MadeImages`."""

    name = "made"

    def __init__(self, count: int, pixels: int, **kwargs: Any) -> None:
        self.made = MadeImages(count, pixels, 10)
        super().__init__(**kwargs)

    @property
    def class_names(self) -> list[str]:
        """``0`` to ``9``."""
        return [str(number) for number in range(10)]

    def clean(self, split: Split) -> Images:
        """The same for all splits."""
        return self.made

    def digest_content(self) -> list[bytes]:
        """The count."""
        return [str(len(self.made)).encode()]

    def natural_names(self) -> list[str]:
        """One."""
        return ["stream"]

    def natural_domain(self, name: str) -> Images:
        """All images."""
        return self.made


class Watch(Callback):
    """Notes memory every so many samples."""

    def __init__(self, every: int) -> None:
        self.every, self.found = every, list[tuple[int, float]]()

    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """Note and print."""
        seen = pl_module.summary.images
        if seen % self.every < pl_module.trainer.datamodule.batch_size:
            self.found.append((seen, resident_mb()))
            print(f"{seen:>9,} samples: {self.found[-1][1]:7.1f} MB", flush=True)


def main(args: list[str] | None = None) -> list[tuple[int, float]]:
    """Run a stream and return (samples seen, MB)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--method", default="tent")
    options = parser.parse_args(args)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    watch = Watch(max(options.batch, options.samples // 20))
    with tempfile.TemporaryDirectory() as place:
        module = TestTimeAdaptation(partial(available_methods()[options.method]), backbone=net)
        data = MadeData(options.samples, 8, batch_size=options.batch)
        quiet_trainer(place, watch).predict(module, datamodule=data, return_predictions=False)
    half = [memory for seen, memory in watch.found if seen >= options.samples / 2]
    print(f"second half of the stream: {half[0]:.1f} to {half[-1]:.1f} MB ({half[-1] - half[0]:+.1f})")
    return watch.found


if __name__ == "__main__":
    main()
