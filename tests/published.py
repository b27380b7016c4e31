"""Data sets in the layouts in which they were published, as files of their full size and form, with a few images."""

import hashlib
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from lightning_tta.data.splits import subset
from lightning_tta.imagenet_classes import class_subset, imagenet_synsets
from lightning_tta.reproduce.needs import OFFICE_HOME, PACS

ROWS, SEVERITIES = 10_000, 5
SIZE = 64  # pixels of photos; those of ImageNet-C have 224


def pixels(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random pixels."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def cifar10_c(root: Path, corruptions: Iterable[str], images: int) -> None:
    """CIFAR-10-C: arrays of 50,000 images, sparse files but for the images of a run with ``num_images``."""
    folder = root / "CIFAR-10-C"
    folder.mkdir(parents=True, exist_ok=True)
    kept = subset(ROWS, images).numpy()
    for number, name in enumerate(corruptions):
        shape = (SEVERITIES * ROWS, 32, 32, 3)
        rows = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.uint8, shape)
        for severity in range(SEVERITIES):
            rows[severity * ROWS + kept] = pixels(len(kept), 32, 32, 3, seed=number)
        rows.flush()
    np.save(folder / "labels.npy", np.tile(np.arange(ROWS) % 10, SEVERITIES).astype(np.uint8))


def cifar10(root: Path, set_attribute: Callable[[Any, str, Any], None], images: int = 20) -> None:
    """CIFAR-10 as torchvision unpacks it; its checksums, which torchvision compares, become those of these files."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        labels = (np.arange(images) % 10).tolist()
        content = pickle.dumps({"data": pixels(images, 3072, seed=number), "labels": labels}, protocol=2)
        (folder / name).write_bytes(content)
        listed.append([name, hashlib.md5(content).hexdigest()])
    meta = pickle.dumps({CIFAR10.meta["key"]: [str(number) for number in range(10)]}, protocol=2)
    (folder / CIFAR10.meta["filename"]).write_bytes(meta)
    set_attribute(CIFAR10, "meta", {**CIFAR10.meta, "md5": hashlib.md5(meta).hexdigest()})
    set_attribute(CIFAR10, "train_list", listed[:-1])
    set_attribute(CIFAR10, "test_list", listed[-1:])


def cifar10_1(root: Path) -> None:
    """CIFAR-10.1, v6: 2,000 images, labels of four bytes."""
    folder = root / "CIFAR-10.1"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "cifar10.1_v6_data.npy", pixels(2000, 32, 32, 3))
    np.save(folder / "cifar10.1_v6_labels.npy", (np.arange(2000) % 10).astype(np.int32))


def photos(
    folder: Path, classes: Iterable[str], each: int, size: int = SIZE, stem: str = "ILSVRC2012_val_0000"
) -> None:
    """``<folder>/<class>/*.JPEG``."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for image in range(each):
            Image.fromarray(pixels(size, size, 3, seed=number + 1000 * image)).save(
                folder / name / f"{stem}{number}{image}.JPEG"
            )


def imagenet(root: Path, classes: int = 4, each: int = 2) -> None:
    """ImageNet's ``train`` and ``val``, of some synsets."""
    for split in ("train", "val"):
        photos(root / "imagenet" / split, imagenet_synsets()[:classes], each)


def imagenet_c(root: Path, corruptions: Iterable[str], classes: int = 4, each: int = 2) -> None:
    """ImageNet-C at severity 5, of some synsets, and the list of images, which has them all."""
    for name in corruptions:
        photos(root / "imagenet-c" / name / "5", imagenet_synsets()[:classes], each, 224)
    lines = [
        f"val/{synset}/ILSVRC2012_val_0000{number}{image}.JPEG"
        for number, synset in enumerate(imagenet_synsets()[:classes])
        for image in range(each)
    ]
    (root / "imagenet_test_image_ids.txt").write_text("\n".join(lines) + "\n")


def imagenet_a(root: Path, classes: int = 4, each: int = 2) -> None:
    """ImageNet-A, of some of its synsets."""
    synsets = [imagenet_synsets()[label] for label in class_subset("imagenet_a", "")[:classes]]
    photos(root / "imagenet-a", synsets, each)


def imagenet_v2(root: Path, each: int = 2) -> None:
    """ImageNet-V2: folders of numbers."""
    photos(root / "imagenetv2-matched-frequency-format-val", ["0", "2", "10", "999"], each)


def pacs(root: Path, each: int = 4) -> None:
    """PACS below ``kfold``."""
    names = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    for domain in PACS:
        photos(root / "pacs" / "kfold" / domain, names, each, stem="pic_")


def office_home(root: Path, each: int = 3) -> None:
    """Office-Home, 65 classes; one domain's name with an underscore, as some copies have it."""
    for domain in OFFICE_HOME:
        photos(root / "office_home" / domain.replace(" ", "_"), [f"class_{n:02}" for n in range(65)], each, stem="0")
