"""How fast a stream of JPEG files is read, against a bare torchvision ImageFolder and DataLoader.

    python tests/measure/loading.py --images 600 --workers 2

Both decode the same files (made here: 500 x 375 pixels, as ImageNet's are), resize the shorter side to 256, cut out
224 x 224 and batch. Rounds take turns; images per second, medians.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lightning_tta.data import CIFARData, ImageNetData, build_stream
from lightning_tta.data.images import Images, StreamBatches, StreamSampler, already_collated
from lightning_tta.data.storage.cache import MappedImages
from plumbing import arguments, medians, take_turns


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
    crop = [v2.Resize(256), v2.CenterCrop(224), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return DataLoader(ImageFolder(str(folder), v2.Compose(crop)), batch_size=batch, num_workers=workers, shuffle=True)


def stream_of(images: Images, workers: int, batch: int) -> Iterable[Any]:
    """The stream that this package makes of images, without its caches."""
    batches = build_stream([images.labels], batch_size=batch).batches
    sampler = StreamSampler(batches)
    return DataLoader(StreamBatches([images]), batch_sampler=sampler, num_workers=workers, collate_fn=already_collated)


def read(batches: Iterable[Any], count: int) -> None:
    """One pass."""
    seen = sum(len(batch["image"] if isinstance(batch, dict) else batch[0]) for batch in batches)
    assert seen == count, f"{seen} images, expected {count}"


def main(args: list[str] | None = None) -> None:
    """Time both."""
    options = arguments(__doc__, args, images=600, batch=64, workers=2, rounds=5)
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name) / "jpeg", Path(name) / "rows.npy"
        make_files(folder, options.images)
        files = ImageNetData({"files": str(folder)}).natural_domain("files")
        load = {"workers": options.workers, "batch": options.batch}
        runs = {
            "torchvision": lambda: read(bare(folder, **load), options.images),
            "ours": lambda: read(stream_of(files, **load), options.images),
        }
        rates = {key: options.images / value for key, value in medians(take_turns(runs, options.rounds)).items()}
        print(f"JPEG files, 500 x 375 -> 224 x 224, {options.workers} workers")
        for key, value in rates.items():
            print(f"{key:12} {value:8.0f} images a second  {value / rates['torchvision']:5.2f}x")
        count = 20_000  # in the layout of CIFAR-C
        np.save(rows, np.random.default_rng(0).integers(256, size=(count, 32, 32, 3), dtype=np.uint8))
        mapped = MappedImages(rows, torch.zeros(count, dtype=torch.int64), channels_last=True)
        seconds = medians(take_turns({"mapped": lambda: read(stream_of(mapped, 0, 200), count)}, 3))["mapped"]
        print(f"{CIFARData.__name__}'s mapped arrays, 32 x 32, no workers: {count / seconds:.0f} images a second")


if __name__ == "__main__":
    main()
