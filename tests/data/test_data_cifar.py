"""CIFAR's files as users have them, small: torchvision's pickles, CIFAR-C's arrays, CIFAR-10.1."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from torchvision import datasets

from lightning_tta import CIFARData, ConfigError, DataError, DigitsData
from lightning_tta.data.corruptions.corrupt import corruption_names
from lightning_tta.data.sets import cifar

ROWS = 12
FOG = "fog.npy"


def pixel_rows(count, offset=0):
    """Images (N, 32, 32, 3) whose red is the row's number."""
    images = np.zeros((count, 32, 32, 3), np.uint8)
    images[..., 0] = (np.arange(count) + offset)[:, None, None]
    images[:, 0, 5, 1] = 200  # row 0, column 5, green
    return images


@pytest.fixture
def published(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "ROWS", ROWS)
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    for number, name in enumerate(("fog", "frost", "spatter")):
        np.save(folder / f"{name}.npy", pixel_rows(5 * ROWS, offset=60 * number))
    np.save(folder / "labels.npy", np.tile(np.arange(ROWS) % 10, 5).astype(np.uint8))  # one-byte labels
    return tmp_path


def make(root, **options):
    return CIFARData(str(root), **{"function_set": "published", "domains": ["fog"], "batch_size": 5, **options})


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_severity_is_a_range_of_rows(published, severity, workers):
    data = make(published, severity=severity, domains=["fog", "frost"], num_workers=workers)
    batches = list(data.predict_dataloader())
    for number in range(2):
        seen = {}
        for batch in batches:
            here = batch["domain"] == number
            for image, label, index in zip(
                batch["image"][here], batch["label"][here], batch["index"][here], strict=True
            ):
                row = round(float(image[0, 3, 3]) * 255) - 60 * number
                seen[row] = int(label)
                assert int(index) - number * ROWS == row - (severity - 1) * ROWS
                assert image[1, 0, 5] > 0.5  # not transposed
                assert image[1, 5, 0] == 0
        assert seen == {(severity - 1) * ROWS + i: i % 10 for i in range(ROWS)}


def test_a_severity_of_its_own_and_the_same_subset_everywhere(published):
    data = make(published, domains=["fog@1", "frost@4", "spatter"], severity=2, num_images=4)
    kept = [images.positions.tolist() for images in data.domain_images]
    assert kept[0] == kept[1] == kept[2]
    assert len(kept[0]) == 4
    red = [[int(images.image(i)[0, 0, 0]) for i in range(4)] for images in data.domain_images]
    assert red[0] == kept[0]
    assert red[1] == [60 + 3 * ROWS + i for i in kept[0]]
    assert red[2] == [120 + ROWS + i for i in kept[0]]
    described = data.describe()
    assert (described["function_set"], described["data"], described["severity"]) == ("published", "CIFAR-10-C", 2)


def test_files_are_mapped_and_not_read(published):
    (images,) = make(published).domain_images
    assert isinstance(images.source._rows, np.memmap)


def test_default_is_the_fifteen(published):
    with pytest.raises(DataError, match="brightness"):
        CIFARData(str(published), function_set="published")
    assert CIFARData(str(published), cache_dir="none").domain_names == corruption_names()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / FOG).unlink(), r"fog\.npy does not exist.*download true"),
        (lambda f: [(f / FOG).unlink(), (f / FOG).mkdir()], r"fog\.npy is a folder"),
        (lambda f: np.save(f / FOG, pixel_rows(ROWS)), r"holds uint8 \(12, 32, 32, 3\).*\(60, 32, 32, 3\)"),
        (lambda f: np.save(f / FOG, pixel_rows(5 * ROWS) / 255), "holds float64"),
        (lambda f: (f / FOG).write_bytes((f / FOG).read_bytes()[:-7]), r"fog\.npy is not a readable"),
        (lambda f: (f / FOG).write_bytes(b"<html>gone</html>"), r"fog\.npy is not a readable"),
        (lambda f: np.savez((f / FOG).open("wb"), a=np.zeros(3)), "several arrays"),
        (lambda f: np.save(f / "labels.npy", np.zeros(7, np.uint8)), r"labels\.npy holds uint8 \(7,\).*60"),
        (lambda f: np.save(f / "labels.npy", np.zeros(60)), "class numbers"),
        (lambda f: np.save(f / "labels.npy", np.full(60, 10)), "classes 10 to 10; expected 0 to 9"),
        (lambda f: np.save(f / "labels.npy", np.array([None] * 60)), r"labels\.npy is not a readable"),
    ],
    ids="missing,folder,one severity,floats,truncated,page,npz,few labels,float labels,range,objects".split(","),
)
def test_damaged_files(published, damage, words):
    damage(published / "CIFAR-10-C")
    with pytest.raises(DataError, match=words):
        make(published).setup("predict")


@pytest.mark.parametrize("version", ["v4", "v6"])
def test_cifar10_1(tmp_path, version):
    folder = tmp_path / "CIFAR-10.1"
    folder.mkdir()
    count = cifar.VERSIONS[f"cifar10_1_{version}"]
    with pytest.raises(DataError, match=r"_data\.npy does not exist.*modestyachts"):
        make(tmp_path, domains=[f"cifar10_1_{version}"])
    np.save(folder / f"cifar10.1_{version}_data.npy", pixel_rows(count % 256 + count // 256 * 256))
    np.save(folder / f"cifar10.1_{version}_labels.npy", (np.arange(count) % 10).astype(np.int32))
    data = make(tmp_path, domains=[f"cifar10_1_{version}"], batch_size=500)
    batches = list(data.predict_dataloader())
    assert sum(len(batch["label"]) for batch in batches) == count
    for batch in batches:
        assert batch["label"].dtype == torch.int64
        assert torch.equal(batch["label"], batch["index"] % 10)


@pytest.fixture
def pickles(tmp_path, monkeypatch):
    """Torchvision's layout with 60 training and 20 test images, and the checksums of these files."""

    def write(kind, folder, names, label_key, classes):
        (tmp_path / folder).mkdir()
        listed, start = [], 0
        for name in names:
            count = 60 if name == "train" else 20 if "test" in name else 12
            start = 0 if "test" in name else start
            red = np.zeros((count, 3, 32, 32), np.uint8)
            red[:, 0] = (np.arange(count) + start)[:, None, None]
            start += count
            labels = (np.arange(count) % classes).tolist()
            content = pickle.dumps({"data": red.reshape(count, -1), label_key: labels}, protocol=2)
            (tmp_path / folder / name).write_bytes(content)
            listed.append([name, hashlib.md5(content).hexdigest()])
        meta = pickle.dumps({kind.meta["key"]: [str(i) for i in range(classes)]}, protocol=2)
        (tmp_path / folder / kind.meta["filename"]).write_bytes(meta)
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": hashlib.md5(meta).hexdigest()})
        monkeypatch.setattr(kind, "train_list", [entry for entry in listed if "test" not in entry[0]])
        monkeypatch.setattr(kind, "test_list", [entry for entry in listed if "test" in entry[0]])

    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    write(datasets.CIFAR10, "cifar-10-batches-py", batches, "labels", 10)
    write(datasets.CIFAR100, "cifar-100-python", ["train", "test"], "fine_labels", 100)
    return tmp_path


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_torchvisions_files(pickles, dataset):
    data = CIFARData(str(pickles), dataset=dataset, domains=["clean"], num_val=7, cache_dir="none")
    train, val, test = (data.clean(split) for split in ("train", "val", "test"))
    assert [len(part) for part in (train, val, test)] == [53, 7, 20]
    assert not set(train.positions.tolist()) & set(val.positions.tolist())
    classes = 10 if dataset == "cifar10" else 100
    for part in (train, test):
        for i in range(len(part)):
            red = int(part.image(i)[0, 0, 0])
            assert int(part.labels[i]) == (red % 12 % classes if classes == 10 and part is train else red % classes)
    assert data.num_classes == classes
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape[1:] == (3, 32, 32)
    usual, all_of_them = (CIFARData(str(pickles), dataset=dataset, domains=["clean"], num_val=n) for n in (None, 60))
    assert [len(usual.clean(split)) for split in ("train", "val")] == [54, 6]  # a tenth, where 5,000 are not there
    with pytest.raises(ConfigError, match=r"num_val=60 holds back all of the 60 training images. Give at most 59"):
        all_of_them.clean("train")


def test_a_changed_pickle_is_never_opened(pickles):
    bad = pickles / "cifar-10-batches-py" / "test_batch"

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    bad.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match=r"no complete copy of cifar10.*cifar-10-batches-py"):
        CIFARData(str(pickles), domains=["clean"]).setup("predict")


def test_corruptions_are_made_from_the_clean_images(pickles):
    data = CIFARData(str(pickles), domains=["contrast", "clean"], batch_size=20)
    first, second = data.predict_dataloader()
    assert not torch.equal(first["image"], second["image"])
    assert data.describe()["function_set"] == "builtin-1"


def test_wrong_options(tmp_path):
    for wrong in ({"dataset": "cifar20"}, {"num_val": 0}, {"domains": ["fogg"]}, {"domains": ["fog@6"]}):
        with pytest.raises(ConfigError):
            make(tmp_path, **wrong)
    with pytest.raises(ConfigError, match=r"computes nothing.*CIFARData.*builtin"):
        DigitsData(function_set="published", domains=["fog"])


def test_validation_images_are_computed(published):
    with pytest.raises(ConfigError, match=r"computes nothing.*for the stream.*builtin"):
        make(published, val_domains=["fog"])
    assert make(published, val_domains=["clean"]).val_domain_names == ["clean"]
