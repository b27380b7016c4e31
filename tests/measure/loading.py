"""How fast a stream of JPEG files is read, against a bare torchvision ImageFolder and DataLoader.

    python tests/measure/loading.py --images 600 --workers 2

Both decode the same files (made here: 500 x 375 pixels, as ImageNet's are), resize the shorter side to 256, cut out
224 x 224 and batch. Rounds take turns; images per second, medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lightning_tta.data import CIFARData, ImageNetData
from lightning_tta.data.images import StreamBatches, StreamSampler, already_collated
from lightning_tta.data.storage.cache import MappedImages
from lightning_tta.data.streams import build_stream


def make_files(folder: Path, images: int) -> None:
    """Pictures with some structure: noise at several scales, coded as a camera would (about 60 kB each)."""
    random = np.random.default_rng(0)
    for number in range(images):
        place = folder / str(number % 1000)
        place.mkdir(parents=True, exist_ok=True)
        layers = [
            np.asarray(Image.fromarray(random.integers(256, size=(h, w, 3), dtype=np.uint8)).resize((500, 375)))
            for w, h in ((8, 6), (40, 30), (160, 120))
        ]
        Image.fromarray(np.mean(layers, 0).astype(np.uint8)).save(place / f"{number}.JPEG", quality=92)


def bare(folder: Path, workers: int, batch: int) -> Iterable[Any]:
    """What one writes without this package."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    crop = [v2.Resize(256), v2.CenterCrop(224), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return DataLoader(ImageFolder(str(folder), v2.Compose(crop)), batch_size=batch, num_workers=workers, shuffle=True)


def rate(batches: Iterable[Any], count: int) -> float:
    """Images per second of one pass."""
    start = time.perf_counter()
    seen = sum(len(batch["image"] if isinstance(batch, dict) else batch[0]) for batch in batches)
    assert seen == count, f"{seen} images, expected {count}"
    return seen / (time.perf_counter() - start)


def mapped(folder: Path, images: int, batch: int, workers: int) -> Iterable[Any]:
    """A stream from an array on disk in the layout of CIFAR-C."""
    path = folder / "rows.npy"
    rows = np.random.default_rng(0).integers(256, size=(images, 32, 32, 3), dtype=np.uint8)
    np.save(path, rows)
    found = MappedImages(path, torch.zeros(images, dtype=torch.int64), channels_last=True)
    stream = build_stream([found.labels], batch_size=batch)
    return DataLoader(
        StreamBatches([found]),
        batch_sampler=StreamSampler(stream.batches),
        num_workers=workers,
        collate_fn=already_collated,
    )


def main() -> None:
    """Time both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "jpeg"
        make_files(folder, args.images)
        limit = {"num_workers": args.workers, "batch_size": args.batch}
        ours = ImageNetData({"files": str(folder)}, **limit)
        domain = ours.natural_domain("files")
        positions = build_stream([domain.labels], batch_size=args.batch).batches
        runs: dict[str, Any] = {
            "torchvision": lambda: bare(folder, args.workers, args.batch),
            "ours": lambda: ours.stream_loader([domain], positions),  # the files, not what is kept in memory
        }
        rates: dict[str, list[float]] = {key: [] for key in runs}
        for _ in range(args.rounds):
            for key, make in runs.items():
                rates[key].append(rate(make(), args.images))
        middle = {key: statistics.median(values) for key, values in rates.items()}
        print(f"JPEG files, 500 x 375 -> 224 x 224, {args.workers} workers")
        for key, value in middle.items():
            print(f"{key:12} {value:8.0f} images a second  {value / middle['torchvision']:5.2f}x")
        count = 20_000
        value = statistics.median(rate(mapped(Path(name), count, 200, 0), count) for _ in range(3))
        print(f"{CIFARData.__name__}'s mapped arrays, 32 x 32, no workers: {value:.0f} images a second")


if __name__ == "__main__":
    main()
