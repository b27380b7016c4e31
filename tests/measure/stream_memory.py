"""Memory along a long stream: a million synthetic samples through a whole predict run.

    python tests/measure/stream_memory.py --samples 1000000

Images are made when asked for. Prints the process's resident memory along the stream (Linux).
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_tta.data import ShiftedDataModule
from lightning_tta.data.images import Images
from lightning_tta.methods import available_methods
from plumbing import arguments, predict, resident


class MadeImages(Images):
    """Images of one color and some noise, from their number."""

    def __init__(self, count: int, pixels: int, classes: int) -> None:
        self.labels = torch.arange(count) % classes
        self.noise = torch.randint(64, (256, 3, pixels, pixels), dtype=torch.uint8)
        self.color = torch.randint(192, (classes, 3, 1, 1), dtype=torch.uint8)

    def image(self, position: int) -> Tensor:
        return self.images(torch.tensor([position]))[0]

    def images(self, positions: Tensor) -> Tensor:
        return self.noise[positions % 256] + self.color[self.labels[positions]]


class MadeData(ShiftedDataModule):
    """One natural domain of :class:`MadeImages`."""

    name = "made"

    def __init__(self, count: int, pixels: int, **options: Any) -> None:
        self.made = MadeImages(count, pixels, 10)
        super().__init__(**options)

    @property
    def class_names(self) -> list[str]:
        return list("0123456789")

    def clean(self, split: str) -> Images:
        return self.made

    def digest(self) -> str:
        return f"made-{len(self.made)}"

    def natural_names(self) -> list[str]:
        return ["stream"]

    def natural_domain(self, name: str) -> Images:
        return self.made


class Memory(Callback):
    """Notes memory every so many samples."""

    def __init__(self, every: int) -> None:
        self.every, self.seen, self.notes = every, 0, list[tuple[int, float]]()

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        count = len(batch["image"])
        self.seen += count
        if self.seen % self.every < count:
            self.notes.append((self.seen, resident() / 1e6))
            print(f"{self.seen:>9,} samples: {self.notes[-1][1]:7.1f} MB", flush=True)


def main(args: list[str] | None = None) -> list[tuple[int, float]]:
    """Run a stream and return (samples seen, MB)."""
    options = arguments(__doc__, args, samples=1_000_000, batch=500, method="tent")
    net = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    memory = Memory(max(options.batch, options.samples // 20))
    data = MadeData(options.samples, 8, batch_size=options.batch)
    predict(available_methods()[options.method], data, memory, backbone=net)
    half = [megabytes for seen, megabytes in memory.notes if seen >= options.samples / 2]
    print(f"second half of the stream: {half[0]:.1f} to {half[-1]:.1f} MB ({half[-1] - half[0]:+.1f})")
    return memory.notes


if __name__ == "__main__":
    main()
