"""Images in .npz files: what comes out, and what is refused."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_tta import ArrayData, ConfigError, DataError
from lightning_tta.data.sets import arrays


def write(path, *, train=40, test=20, size=28, channels=None, labels=np.uint8, seed=0, **replaced):
    random = np.random.default_rng(seed)
    shape = (size, size) if channels is None else (size, size, channels)
    arrays = {
        "x_train": random.integers(0, 256, (train, *shape), dtype=np.uint8),
        "y_train": (np.arange(train) % 4).astype(labels),
        "x_test": random.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": (np.arange(test) % 4).astype(labels),
    }
    arrays = {name: value for name, value in {**arrays, **replaced}.items() if value is not None}
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture
def files(tmp_path):
    return write(tmp_path / "source.npz"), write(tmp_path / "target.npz", size=16, labels=np.int32, seed=1)


def test_source_and_target(files):
    data = ArrayData(files[0], {"other": files[1]}, batch_size=8, order_seed=1)
    assert data.class_names == ["0", "1", "2", "3"]
    assert data.domain_names == ["other"]
    batches = list(data.predict_dataloader())
    assert [len(batch["label"]) for batch in batches] == [8, 8, 4]
    assert batches[0]["image"].shape == (8, 3, 32, 32)
    index, label = (torch.cat([batch[key] for batch in batches]) for key in ("index", "label"))
    assert sorted(index.tolist()) == list(range(20))
    assert torch.equal(label, index % 4)
    original = np.load(files[1])["x_test"][int(index[0])]
    image = batches[0]["image"][0]
    assert torch.equal(image[0], image[2])
    assert abs(image.mean() * 255 - original.mean()) < 3


def test_resizing_keeps_a_flat_image(tmp_path):
    flat = np.full((20, 28, 28, 3), (10, 100, 200), dtype=np.uint8)
    data = ArrayData(write(tmp_path / "a.npz", channels=3, x_test=flat), domains=["clean"], image_size=40)
    image = next(iter(data.predict_dataloader()))["image"]
    assert image.shape[1:] == (3, 40, 40)
    assert torch.equal(image[0, :, 5, 5] * 255, torch.tensor([10.0, 100.0, 200.0]))


def test_a_target_in_use_is_in_the_digest(files):
    targets = {"other": files[1]}
    without, unused, used = (
        ArrayData(files[0], **options).digest()
        for options in ({}, {"targets": targets, "domains": ["clean"]}, {"targets": targets})
    )
    assert without == unused != used


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"x_test": np.zeros((20, 28, 28))}, "uint8 images"),
        ({"x_test": np.zeros((20, 28, 28, 4), np.uint8)}, "1 or 3"),
        ({"y_test": np.zeros(20)}, "whole number"),
        ({"y_test": np.zeros(19, np.int64)}, "each of the 20"),
        ({"y_test": np.full(20, 7)}, r"classes \[7\].*\[0, 1, 2, 3\]"),
        ({"y_test": np.full(20, -1)}, "from 0"),
        ({"y_test": np.zeros((20, 1), np.int64)}, "whole number"),
        ({"y_train": np.zeros(0, np.int64)}, "whole number"),
        ({"y_train": np.arange(40) % 4 * 2}, r"classes \[1, 3\]"),
        (
            {"y_test": None},
            r"no array 'y_test'.*\['x_test', 'x_train', 'y_train'\].*Expected a .npz",
        ),
        ({"y_test": np.array([None] * 20)}, "not a readable"),
    ],
    ids=(
        "floats,four channels,float labels,too few labels,too large,negative,one-column labels,no labels,gaps,missing,"
        "objects"
    ).split(","),
)
def test_wrong_files(tmp_path, replaced, words):
    data = ArrayData(write(tmp_path / "a.npz", **replaced), domains=["clean"])
    with pytest.raises(DataError, match=words) as caught:
        data.setup("predict")
    assert "a.npz" in str(caught.value)


def test_missing_and_damaged_files(tmp_path, files):
    with pytest.raises(DataError, match=r"nowhere\.npz does not exist"):
        ArrayData(str(tmp_path / "nowhere.npz"))
    with pytest.raises(DataError, match=r"nowhere\.npz does not exist"):
        ArrayData(files[0], {"other": str(tmp_path / "nowhere.npz")})
    broken = tmp_path / "broken.npz"
    with broken.open("wb") as file:
        np.save(file, np.zeros(3))  # one array, not a file of several
    for content in (b"<html>not found</html>", broken.read_bytes(), Path(files[0]).read_bytes()[:5000]):
        broken.write_bytes(content)
        with pytest.raises(DataError, match="not a readable"):
            ArrayData(str(broken)).setup("predict")


def test_a_class_that_the_source_lacks(tmp_path, files):
    gap = write(tmp_path / "gap.npz", y_train=np.arange(40) % 2 * 3, y_test=np.arange(20) % 2 * 3)
    assert ArrayData(gap, domains=["clean"]).num_classes == 4
    with pytest.raises(DataError, match=r"target\.npz: y_test has classes \[1, 2\]"):
        ArrayData(gap, {"other": files[1]}).setup("predict")


def test_class_names(tmp_path, files):
    names = ["cat", "dog", "cow", "hen", "ant"]
    assert ArrayData(files[0], class_names=names).class_names == names
    with pytest.raises(DataError, match="3 class_names"):
        ArrayData(files[0], class_names=names[:3]).setup("predict")


@pytest.mark.parametrize("count", [2, 5, 10, 23, 33, 100])
def test_num_train_is_kept_and_balanced(tmp_path, count):
    path = write(tmp_path / "a.npz", y_train=np.repeat([0, 1, 2, 3], [20, 12, 5, 3]))
    whole = torch.bincount(ArrayData(path).clean("train").labels)
    chosen = ArrayData(path, num_train=count).clean("train")
    taken = torch.bincount(chosen.labels, minlength=4)
    assert taken.sum() == min(count, whole.sum())
    rest = taken < whole  # a class gives less than the largest share only where it has no more
    assert not rest.any() or taken.max() - taken[rest].min() <= 1
    assert len(set(chosen.positions.tolist())) == len(chosen)
    assert set(chosen.positions.tolist()) <= set(ArrayData(path).clean("train").positions.tolist())


def test_a_file_written_anew_is_read_anew(tmp_path):
    for seed in (1, 2):
        path = write(tmp_path / "a.npz", size=32, seed=seed, train=36 + 4 * seed)
        image = ArrayData(path).clean("train").image(0)[0]
        position = int(ArrayData(path).clean("train").positions[0])
        assert torch.equal(image, torch.from_numpy(np.load(path)["x_train"][position]))


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 16},
        {"num_train": 0},
        {"val_share": 0},
        {"domains": ["usps"]},
        {"class_names": list("abca")},
    ],
    ids=str,
)
def test_wrong_options(files, options):
    with pytest.raises(ConfigError):
        ArrayData(files[0], **options)


def test_a_head_that_claims_more_than_is_there_or_than_fits(tmp_path, monkeypatch):
    path = write(tmp_path / "a.npz")
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    for name in ("x_test.npy", "y_test.npy"):
        head = io.BytesIO()
        shape = (2**40, 32, 32) if name[0] == "x" else (2**40,)
        np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
            for other, data in content.items():
                archive.writestr(other, data if other != name else head.getvalue() + b"x")
        with pytest.raises(DataError, match=rf"b\.npz: '{name[:-4]}' claims to have 1099511627776 .*bytes.*damaged"):
            ArrayData(str(tmp_path / "b.npz")).digest()
    monkeypatch.setattr(arrays, "_memory", lambda: 1000)
    with pytest.raises(DataError, match="more than this machine's memory"):
        ArrayData(path).digest()


def test_the_images_come_as_they_are(tmp_path):
    data = ArrayData(write(tmp_path / "a.npz"))
    assert (data.domain_names, data.describe()["function_set"]) == (["clean"], None)
