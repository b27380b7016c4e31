"""What all sets of files have in common: the split rule, the digest, the names that no domain may have."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_tta import ArrayData, ConfigError, DomainFolderData, FolderData, ImageNetData
from lightning_tta.data.splits import shuffled_classes, validation_count, validation_share

PINNED = ([2, 6, 7, 9, 11, 13], [2, 4, 9, 10, 12, 14], [2, 3, 11, 13, 15])
NAMES = ("1", "2", "3")  # classes that ImageNetData knows too


def save(folder, count, seed=0, size=(36, 40)):
    for label, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([seed, label, i]).integers(256, size=(*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@dataclass
class Case:
    """A set of files: how it is written, read, changed, and read with one natural domain of a name."""

    write: Any
    read: Any
    test_file: str
    named: Any


def write_arrays(root):
    random = np.random.default_rng(0)
    arrays = {f"x_{split}": random.integers(256, size=(30, 32, 32), dtype=np.uint8) for split in ("train", "test")}
    np.savez(root / "a.npz", **arrays, y_train=np.arange(30) % 3, y_test=np.arange(30) % 3)


def write_folders(*names):
    return lambda root: [save(root / name, 10, seed) for seed, name in enumerate(names)]


SIZE = {"resize": 32, "image_size": 32}
CASES = {
    "arrays": Case(
        write_arrays,
        lambda root, **options: ArrayData(str(root / "a.npz"), **options),
        "a.npz",
        lambda root, name: ArrayData(str(root / "a.npz"), {name: str(root / "a.npz")}),
    ),
    "folder": Case(
        write_folders("train", "test"),
        lambda root, **options: FolderData(str(root), **options),
        "test/1/0.png",
        lambda root, name: FolderData(str(root), target_roots={name: str(root / "test")}),
    ),
    "domains": Case(
        write_folders("art", "sketch", "photo"),
        lambda root, **options: DomainFolderData(str(root), target="photo", **{"image_size": 32, **options}),
        "photo/1/0.png",
        lambda root, name: [(root / "photo").rename(root / name), DomainFolderData(str(root), target=name)],
    ),
    "imagenet": Case(
        write_folders("train", "val"),
        lambda root, **options: ImageNetData(source=str(root), **{**SIZE, "num_val": 4, **options}),
        "val/1/0.png",
        lambda root, name: ImageNetData({name: str(root / "val")}),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def root(case, tmp_path):
    (tmp_path / "data").mkdir()
    case.write(tmp_path / "data")
    return tmp_path / "data"


def test_training_and_validation_share_the_images(case, root):
    train, val = (case.read(root).clean(split) for split in ("train", "val"))
    assert sorted(torch.cat([train.positions, val.positions]).tolist()) == list(range(len(train) + len(val)))
    assert 0 < len(val) < len(train)
    assert torch.equal(case.read(root).clean("val").positions, val.positions)
    if not isinstance(case.read(root), ImageNetData):  # others hold out a share of each class
        assert set(val.labels.tolist()) == set(train.labels.tolist())
        more = case.read(root, val_share=0.5).clean("val")
        assert set(val.positions.tolist()) < set(more.positions.tolist())
        assert len(more) == (len(train) + len(val)) / 2


def test_digest_follows_the_test_images_and_not_the_place(case, root, tmp_path):
    digest = case.read(root).digest()
    assert digest == hashlib.sha256(b"".join(case.read(root).digest_content())).hexdigest()[:12]
    root = root.rename(tmp_path / "elsewhere")
    assert case.read(root).digest() == digest
    assert case.read(root, image_size=33, **({"resize": 33} if case is CASES["imagenet"] else {})).digest() != digest
    path = root / case.test_file
    if path.suffix == ".npz":
        arrays = dict(np.load(path))
        arrays["x_test"][3, 4, 5] ^= 1
        np.savez(path, **arrays)
    else:
        content = path.read_bytes()
        path.write_bytes(content + b"\0")  # of another size in bytes
        assert case.read(root).digest() != digest
        path.write_bytes(content)
        assert case.read(root).digest() == digest
        path.unlink()
    assert case.read(root).digest() != digest


@pytest.mark.parametrize("name", ["clean", "none", "reported", "held_out", "fog", "haze", "spatter"])
def test_no_domain_has_the_name_of_a_corruption_or_a_group(case, root, name):
    with pytest.raises(ConfigError, match=f"{name}: a domain of the data cannot have the name"):
        case.named(root, name)


def test_split_rules_are_pinned():
    """Written down once: another split gives another source model, and other figures."""
    labels = torch.tensor([0, 1, 2] * 6 + [5])
    assert validation_share(labels, 0.3).nonzero()[:, 0].tolist() == PINNED[0]
    assert validation_share(labels, 0.3, 7).nonzero()[:, 0].tolist() == PINNED[1]
    assert validation_count(19, 5).nonzero()[:, 0].tolist() == PINNED[2]
    assert validation_count(3, 5).tolist().count(False) == 1  # one is left to train on
    with pytest.warns(UserWarning, match="Each of the 4 classes has one training image"):
        assert validation_share(torch.arange(4), 0.9).sum() == 3  # a share of all
    with pytest.warns(UserWarning, match="Give two images or more"):
        assert validation_share(torch.arange(40), 0.1, 7).sum() == 4
    assert not validation_share(torch.arange(1), 0.9).any()
    classes = shuffled_classes(labels)
    assert [sorted(members.tolist()) for members in classes] == [
        (labels == label).nonzero()[:, 0].tolist() for label in (0, 1, 2, 5)
    ]
    assert [members.tolist() for members in classes] != [sorted(members.tolist()) for members in classes]
