import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from lightning_tta.data import FolderData, corrupt, corruption_names
from lightning_tta.errors import ConfigError, DataError


def write(path, number, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.fixture
def root(tmp_path):
    for c, name in enumerate(("cat", "ant", "dog")):
        for n in range(10):
            write(tmp_path / "birds" / "train" / name / f"{n}.png", 100 * c + n)
        for n in range(4):
            write(tmp_path / "birds" / "test" / name / f"{n}.png", 1000 + 100 * c + n)
    (tmp_path / "birds" / "test" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path / "birds"


def labels_of(loader):
    return torch.cat([batch["label"] for batch in loader]).tolist()


def test_classes_splits_and_pixels(root):
    data = FolderData(str(root), val_share=0.2, augment=False)
    assert data.class_names == ["ant", "cat", "dog"]
    assert data.num_classes == 3
    assert data.name == "folder:birds"
    image, label = data.clean("test")[5]  # ant 0-3, cat 0, cat 1
    assert label == 1
    assert torch.equal(image, write(root.parent / "again.png", 1000 + 1))
    train, val = data.clean("train"), data.clean("val")
    assert (train.labels.bincount().tolist(), val.labels.bincount().tolist()) == ([8] * 3, [2] * 3)
    pixels = {tuple(images[i][0].flatten().tolist()) for images in (train, val) for i in range(len(images))}
    assert len(pixels) == 30  # nothing is in both
    other = FolderData(str(root), val_share=0.2, val_seed=1).clean("val")
    assert {str(other[i][0]) for i in range(6)} != {str(val[i][0]) for i in range(6)}
    assert len(labels_of(data.train_dataloader())) == 24


def test_own_validation_folder(root):
    for name in ("ant", "cat", "dog"):
        write(root / "val" / name / "x.png", 1)
    data = FolderData(str(root))
    assert len(data.clean("train")) == 30
    assert labels_of(data.val_dataloader()) == [0, 1, 2]


def test_stream_of_corruptions(root):
    data = FolderData(str(root), domains=["clean", "contrast"], severity=2, batch_size=5)
    test = data.clean("test")
    for batch in data.predict_dataloader():
        for image, index, domain, label in zip(*(batch[k] for k in ("image", "index", "domain", "label")), strict=True):
            number = int(index) % 12
            clean, expected = test[number]
            wanted = clean if domain == 0 else corrupt(clean, "contrast", 2, index=number)
            assert torch.equal(image, wanted.float() / 255)
            assert label == expected


def test_images_come_as_they_are_unless_corruptions_are_named(root):
    data = FolderData(str(root))
    assert data.domain_names == ["clean"]
    assert data.describe()["function_set"] is None
    assert FolderData(str(root), domains=["reported"]).domain_names == corruption_names()
    for option in ({"severity": 5}, {"function_set": "imagenet_c"}):
        with pytest.raises(ConfigError, match=r"nothing to act on.*--data.domains"):
            FolderData(str(root), **option)


def test_a_folder_of_class_folders_is_a_test_set(root):
    data = FolderData(str(root / "train"))
    assert data.class_names == ["ant", "cat", "dog"]
    assert len(data.clean("test")) == 30
    assert data.clean("test").file(10) == "cat/0.png"
    with pytest.raises(DataError, match=r"0\.png|train"):
        data.clean("train")


def test_flat_folders_and_lone_classes_are_pointed_to_the_set_without_labels(root):
    with pytest.raises(DataError, match=r"no class folders.*--data ImageFolderData --data.path .*train/ant"):
        FolderData(str(root / "train" / "ant"))
    (root / "flat" / "test").mkdir(parents=True)
    write(root / "flat" / "test" / "0.png", 1)
    with pytest.raises(DataError, match=r"no class folders.*--data ImageFolderData"):
        _ = FolderData(str(root / "flat")).class_names
    write(root / "lone" / "dummy" / "0.png", 1)
    with pytest.warns(UserWarning, match="one class folder only, 'dummy'.*ImageFolderData"):
        _ = FolderData(str(root / "lone")).class_names


def test_nested_folders_are_read_as_torchvision_reads_them(root):
    write(root / "test" / "cat" / "day2" / "2.png", 77)
    write(root / "test" / "cat" / "a" / "B.JPG", 78)
    (root / "test" / "cat" / "._0.png").write_bytes(b"resource fork")
    (root / "test" / "cat" / "Thumbs.db").write_bytes(b"thumbs")
    data = FolderData(str(root))
    theirs = ImageFolder(str(root / "test"), is_valid_file=lambda path: "._" not in path and ".db" not in path[-4:])
    theirs = [(path, label) for path, label in theirs.samples if not path.endswith(".txt")]
    images = data.clean("test")
    assert [(f"{root}/{images.file(n)}", int(images.labels[n])) for n in range(len(images))] == theirs
    assert len(images) == 14


def test_target_folders_are_matched_by_class_name(root, tmp_path):
    sketch = {name: write(tmp_path / "sketch" / name / "a.png", 7 + n) for n, name in enumerate(("dog", "cat"))}
    data = FolderData(str(root), target_roots={"sketch": str(tmp_path / "sketch")}, batch_size=1)
    assert data.domain_names == ["sketch"]
    seen = {int(batch["label"]): batch["image"][0] for batch in data.predict_dataloader()}
    assert set(seen) == {1, 2}
    assert torch.equal(seen[1], sketch["cat"].float() / 255)
    assert torch.equal(seen[2], sketch["dog"].float() / 255)
    mixed = FolderData(
        str(root), target_roots={"sketch": str(tmp_path / "sketch")}, domains=["haze", "sketch"], stream="mixed"
    )
    assert mixed.describe()["images_per_domain"] == [12, 2]
    write(tmp_path / "sketch" / "emu" / "a.png", 1)
    with pytest.raises(DataError, match=r"not classes of the source \(ant, cat, dog\): emu"):
        FolderData(str(root), target_roots={"sketch": str(tmp_path / "sketch")}).setup("predict")


def test_image_size_resizes_the_shorter_side_and_crops_the_middle(root):
    picture = np.zeros((40, 120, 3), dtype=np.uint8)
    picture[:, 40:80] = 200  # only the middle third is bright
    for split in ("train", "test"):
        Image.fromarray(picture).save(root / split / "ant" / "0.png")
    image = FolderData(str(root), image_size=20, domains=["clean"]).clean("test")[0][0]
    assert image.shape == (3, 20, 20)
    assert image[:, :, 1:-1].float().mean() > 195
    with pytest.raises(DataError, match=r"png has 32x32 pixels.*0\.png has 120x40.*image_size"):
        list(FolderData(str(root)).predict_dataloader())


def test_small_images_with_corruptions_fail_with_a_way_out(root):
    with pytest.raises(ConfigError, match="at least 32x32"):
        FolderData(str(root), image_size=16, domains=["reported"]).setup("predict")
    FolderData(str(root), image_size=16).setup("predict")


def test_damaged_image_is_named(root):
    broken = root / "test" / "cat" / "1.png"
    broken.write_bytes(broken.read_bytes()[:200])
    for options in ({}, {"domains": ["haze"]}, {"domains": ["haze"], "cache_dir": "none"}):
        data = FolderData(str(root), **options)
        with pytest.raises(DataError, match=r"test/cat/1\.png"):
            list(data.predict_dataloader())
        assert "test/cat/1.png" in str(data.known_problem())
    with pytest.raises(DataError, match=r"test/cat/1\.png"):
        FolderData(str(root)).clean("test").images(torch.arange(12))


def test_missing_folders_are_named(root, tmp_path):
    with pytest.raises(DataError, match=r"nowhere/test.*<class>"):
        FolderData(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"gone does not exist"):
        FolderData(str(root), target_roots={"far": str(tmp_path / "gone")})
    with pytest.raises(ConfigError, match="val_share"):
        FolderData(str(root), val_share=0.0)
    (root / "train").rename(root / "unused")
    data = FolderData(str(root))
    assert data.class_names == ["ant", "cat", "dog"]
    with pytest.raises(DataError, match="train"):
        data.train_dataloader()
    (root / "test" / "cat").rename(root / "test" / "ant" / "deeper")
    assert FolderData(str(root)).class_names == ["ant", "dog"]


def test_class_of_the_test_split_must_be_in_the_source(root):
    write(root / "test" / "emu" / "0.png", 3)
    with pytest.raises(DataError, match=r"not classes of the source \(ant, cat, dog\): emu"):
        FolderData(str(root)).clean("test")


def test_augmentation_shifts_and_flips(root):
    data = FolderData(str(root))
    augment, image = data.augmentation(), data.clean("train")[0][0]
    torch.manual_seed(0)
    views = [augment(image) for _ in range(8)]
    assert all(view.shape == image.shape and view.dtype == torch.uint8 for view in views)
    assert len({view.float().sum().item() for view in views}) > 1
