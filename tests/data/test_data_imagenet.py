"""Sets for ImageNet nets: labels from the folders' names, whatever their order; every shipped MEMO row on them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from lightning_tta import ConfigError, DataError, ImageNetData, create_backbone
from lightning_tta.cli.main import main
from lightning_tta.imagenet_classes import class_subset, imagenet_synsets

CONFIGS = Path(__file__).parents[2] / "configs"
ROWS = sorted(path for path in (CONFIGS / "memo").glob("*.yaml") if "methods.memo.MEMO" in path.read_text())


def save(folder, label, count=2, size=(80, 64)):
    """Images whose red says the label's low byte, green its high one."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", size, (label % 256, 40 * (label // 256), 10 * i)).save(folder / f"{i}.png")


@pytest.fixture
def numbered(tmp_path):
    for label in (0, 2, 10, 100, 999):  # as strings: 0, 10, 100, 2, 999
        save(tmp_path / "v2" / str(label), label)
    return tmp_path / "v2"


@pytest.fixture
def synsets(tmp_path):
    for label in class_subset("imagenet_a", "")[:3]:
        save(tmp_path / "a" / imagenet_synsets()[label], label)
    return tmp_path / "a"


def labels_in_pixels(image):
    colour = (image[:, :2, 16, 16] * 255).round().int()
    return colour[:, 0] + 256 * (colour[:, 1] // 40)


@pytest.mark.parametrize("layout", ["numbered", "synsets"])
def test_labels_come_from_names(layout, request):
    folder = request.getfixturevalue(layout)
    data = ImageNetData({"shifted": str(folder)}, resize=40, image_size=32, batch_size=4, stream="label_shift")
    assert data.num_classes == 1000
    batches = list(data.predict_dataloader())
    image, label = (torch.cat([batch[key] for batch in batches]) for key in ("image", "label"))
    assert image.shape[1:] == (3, 32, 32)
    assert torch.equal(labels_in_pixels(image), label.int())
    assert len(label) == 2 * len(set(label.tolist())) == (10 if layout == "numbered" else 6)


def test_what_images_are_resized_to(numbered, tmp_path):
    assert ImageNetData({"v2": str(numbered)}, resize=40, image_size=32).resized_to == 40
    save(tmp_path / "c" / "fog" / "5" / imagenet_synsets()[0], 0)
    settings = {"corrupted": str(tmp_path / "c"), "function_set": "published", "severity": 5}
    assert ImageNetData(domains=["fog"], **settings).resized_to is None  # these files are cut already
    assert ImageNetData({"v2": str(numbered)}, domains=["fog", "v2"], **settings).resized_to == 256


def test_label_spaces():
    synsets = imagenet_synsets()
    assert len(set(synsets)) == 1000
    assert synsets == sorted(synsets)
    for name in ("imagenet_a", "imagenet_r"):
        found = class_subset(name, "")
        assert len(set(found)) == 200
        assert 0 <= min(found) < max(found) < 1000
    assert class_subset("imagenet_a", "") != class_subset("imagenet_r", "")
    for wrong in ([], [1, 1], [-1], "imagenet_b"):
        with pytest.raises(ConfigError, match="predict_classes"):
            class_subset(wrong, "predict_classes")


def test_crop_is_the_middle_of_the_resized_image(tmp_path):
    folder = tmp_path / "set" / "7"
    folder.mkdir(parents=True)
    picture = Image.new("RGB", (120, 60))
    picture.paste((255, 0, 0), (40, 0, 80, 60))  # the middle third
    picture.save(folder / "a.png")
    (batch,) = ImageNetData({"x": str(tmp_path / "set")}, resize=60, image_size=36).predict_dataloader()
    assert (batch["image"][0, 0] > 0.99).all()


@pytest.mark.parametrize(
    ("name", "words"), [("n00000000", "n00000000"), ("1000", "1000"), ("cat", "not synsets.*: cat")]
)
def test_other_folders_are_refused(numbered, name, words):
    save(numbered / name, 0)
    with pytest.raises(DataError, match=words):
        ImageNetData({"x": str(numbered)}, resize=40, image_size=32).setup("predict")


def test_wrong_arguments(numbered):
    with pytest.raises(DataError, match="folder nowhere does not exist"):
        ImageNetData({"x": "nowhere"})
    with pytest.raises(ConfigError, match="resize"):
        ImageNetData({"x": str(numbered)}, resize=200, image_size=224)
    with pytest.raises(ConfigError, match="needs folders"):
        ImageNetData({})
    with pytest.raises(DataError, match="no train images"):
        ImageNetData({"x": str(numbered)}).train_dataloader()


@pytest.fixture
def imagenet_c(tmp_path):
    """Two severities of two corruptions, and a clean source with train and val."""
    for corruption in ("fog", "frost"):
        for level in (3, 5):
            for label in (2, 10, 999):
                save(tmp_path / "c" / corruption / str(level) / imagenet_synsets()[label], label, 2, (48, 48))
    for split, count in (("train", 5), ("val", 2)):
        for label in (2, 10, 999):
            save(tmp_path / "source" / split / imagenet_synsets()[label], label, count)
    return tmp_path


def published(root, **options):
    return ImageNetData(corrupted=str(root / "c"), function_set="published", image_size=32, **options)


def test_imagenet_c_is_not_resized(imagenet_c):
    data = published(imagenet_c, domains=["fog", "frost@5"], severity=3, batch_size=4)
    batches = list(data.predict_dataloader())
    image, label, domain = (torch.cat([batch[key] for batch in batches]) for key in ("image", "label", "domain"))
    assert torch.equal(labels_in_pixels(image), label.int())
    assert torch.bincount(domain).tolist() == [6, 6]
    assert data.describe()["data"] == "imagenet_c"
    data = ImageNetData(corrupted=str(imagenet_c / "c"), function_set="published", domains=["fog@5"], image_size=64)
    with pytest.raises(DataError, match="48x48 pixels; expected at least 64x64"):
        next(iter(data.predict_dataloader()))


def test_missing_folders_of_imagenet_c(imagenet_c):
    with pytest.raises(DataError, match=r"fog.4 does not exist"):
        published(imagenet_c, domains=["fog"], severity=4)
    with pytest.raises(ConfigError, match="corrupted=FOLDER"):
        ImageNetData(source=str(imagenet_c / "source"), function_set="published", domains=["fog"])
    (imagenet_c / "c/snow").mkdir()
    (imagenet_c / "c/snow/3").write_text("a file")
    with pytest.raises(DataError, match=r"snow.3 is a file"):
        published(imagenet_c, domains=["snow"], severity=3)


def test_image_list_is_kept_in_order_and_in_the_digest(imagenet_c):
    synset = imagenet_synsets()[10]
    listed = imagenet_c / "list.txt"
    listed.write_text(f"val/{synset}/1.png 10\n\n{imagenet_synsets()[2]}/0.png\n")
    data = published(imagenet_c, domains=["fog@5"], image_list=str(listed))
    assert data.domain_images[0].labels.tolist() == [10, 2]
    assert data.describe()["images_per_domain"] == [2]
    assert data.digest() != published(imagenet_c, domains=["fog@5"]).digest()
    listed.write_text("n01440764/none.png\n")
    with pytest.raises(DataError, match=r"lacks 1 of the 1 images.*n01440764/none\.png"):
        published(imagenet_c, domains=["fog@5"], image_list=str(listed)).setup("predict")


def test_source_splits_and_corruptions_of_val(imagenet_c):
    data = ImageNetData(
        source=str(imagenet_c / "source"),
        domains=["clean", "contrast"],
        resize=40,
        image_size=32,
        num_val=4,
        train_batch_size=4,
    )
    train, val = data.clean("train"), data.clean("val")
    assert (len(train), len(val), len(data.clean("test"))) == (11, 4, 6)
    assert not set(train.positions.tolist()) & set(val.positions.tolist())
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32)
    clean, contrast = (batch["image"] for batch in data.predict_dataloader())
    assert clean.shape == contrast.shape
    assert not torch.equal(clean, contrast)


# Sizes that the net's published weights say, and a sample of images that are cut already


def test_sizes_are_those_of_published_weights_unless_they_are_set(tmp_path):
    folder = tmp_path / "set" / "7"
    folder.mkdir(parents=True)
    Image.effect_noise((120, 90), 90).convert("RGB").save(folder / "a.png")
    net = {"input_size": [3, 48, 48], "crop_pct": 0.75, "interpolation": "bicubic", "pretrained": True}

    def read(net, **options):
        data = ImageNetData({"x": str(tmp_path / "set")}, **options)
        data.fit_to_net(net)
        (batch,) = data.predict_dataloader()
        return batch["image"][0], data.resized_to, data.digest()

    pixels = pil_to_tensor(Image.open(folder / "a.png"))
    image, resized, digest = read(net)
    expected = center_crop(resize(pixels, [64], InterpolationMode.BICUBIC, antialias=True), [48, 48])
    assert resized == 64
    assert torch.equal((image * 255).round().to(torch.uint8), expected)
    image, resized, other = read(net, resize=50, image_size=40, interpolation="bilinear")
    assert (image.shape[1:], resized) == ((40, 40), 50)
    assert other != digest
    assert other == read({}, resize=50, image_size=40)[2]  # as before nets were asked
    assert digest != read(net, interpolation="bilinear")[2]
    assert read(net, image_size=90)[1] == 120
    assert (read({**net, "pretrained": False})[0].shape[1], read({**net, "pretrained": False})[1]) == (224, 256)
    with pytest.raises(ConfigError, match="resize=40 is less than 48, which the net takes"):
        read(net, resize=40)


def test_images_that_are_cut_already_lose_no_border(tmp_path):
    save(tmp_path / "set" / "7", 7, 1, (48, 48))
    Image.effect_noise((48, 48), 90).convert("RGB").save(tmp_path / "set" / "7" / "0.png")
    pixels = pil_to_tensor(Image.open(tmp_path / "set" / "7" / "0.png").convert("RGB"))
    net = {"input_size": [3, 48, 48], "crop_pct": 0.75, "interpolation": "bicubic", "pretrained": True}
    for size in (48, 60):
        data = ImageNetData({"x": str(tmp_path / "set")}, already_cut=True)
        data.fit_to_net({**net, "input_size": [3, size, size]})
        (batch,) = data.predict_dataloader()
        expected = resize(pixels, [size], InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal((batch["image"][0] * 255).round().to(torch.uint8), expected)
        assert data.resized_to is None
    with pytest.raises(ConfigError, match="leave resize=48 out"):
        ImageNetData({"x": str(tmp_path / "set")}, already_cut=True, resize=48)


@pytest.fixture
def sample(tmp_path):
    """One image a class, and no folder ``train``."""
    for label in (0, 3, 300, 301, 700, 998):
        save(tmp_path / "sample/val" / imagenet_synsets()[label], label, 1, (32, 32))
    return str(tmp_path / "sample")


def test_some_images_of_a_sample_stand_for_the_source(sample, tmp_path):
    options = {"source": sample, "domains": ["clean", "contrast"], "already_cut": True, "image_size": 32}
    options |= {"cache_dir": str(tmp_path / "cache"), "num_val": 1}
    whole, data = ImageNetData(**options), ImageNetData(**options, num_source=3)
    sets = {split: data.clean(split).labels.tolist() for split in ("train", "val", "test")}
    assert {split: len(labels) for split, labels in sets.items()} == {"train": 2, "val": 1, "test": 3}
    assert sorted(label for labels in sets.values() for label in labels) == [0, 3, 300, 301, 700, 998]
    assert sorted(label for batch in data.source_batches() for label in batch["label"].tolist()) == sets["train"]
    assert data.describe()["images_per_domain"] == [3, 3]
    assert whole.describe()["images_per_domain"] == [6, 6]
    assert len({whole.digest(), data.digest(), ImageNetData(**options, num_source=2).digest()}) == 3
    image, label = (torch.cat([batch[key] for batch in data.predict_dataloader()]) for key in ("image", "label"))
    assert torch.equal(labels_in_pixels(image[:3]), label[:3].int())
    usual = ImageNetData(**{**options, "num_val": None}, num_source=5)
    assert [len(usual.clean(split)) for split in ("train", "val", "test")] == [4, 1, 1]
    with pytest.raises(ConfigError, match="num_val=1 holds back all of the 1 training images"):
        ImageNetData(**options, num_source=1).clean("val")
    with pytest.raises(DataError, match="has 6 images: num_source=6 leaves none"):
        ImageNetData(**options, num_source=6).clean("test")
    with pytest.raises(DataError, match=r"train does not exist.*set num_source"):
        whole.source_batches()
    with pytest.raises(ConfigError, match="num_source=3 takes images of source/val"):
        ImageNetData({"x": f"{sample}/val"}, num_source=3)


def test_a_predict_run_on_a_sample_says_what_the_net_takes(sample, tmp_path):
    """The shipped configuration, with a net whose file of weights says how its images are made, as a converted one."""
    weights = tmp_path / "w.safetensors"
    facts = {"net": "timm/test_resnet", "num_classes": 1000, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.8}
    facts |= {"input_size": [3, 40, 40], "interpolation": "bicubic", "package": "a-package 0.1.0"}
    metadata = {"lightning_tta": "0.1.0", **{name: json.dumps(value) for name, value in facts.items()}}
    save_file(create_backbone("timm/test_resnet").net.state_dict(), weights, metadata)
    args = [f"--config={CONFIGS / 'imagenet/sample.yaml'}", "--model.method=source", f"--model.source_ckpt={weights}"]
    args += [f"--data.source={sample}", "--data.num_source=2", "--data.function_set=builtin", "--data.domains=[haze]"]
    args += ["--model.backbone=timm/test_resnet", f"--data.cache_dir={tmp_path / 'cache'}"]
    args += ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    main(["predict", *args, f"--trainer.logger.init_args.save_dir={tmp_path / 'runs'}"])
    (report,) = tmp_path.rglob("report.json")
    protocol = json.loads(report.read_text())["protocol"]
    named = ("mean", "std", "input_size", "interpolation", "crop_pct")
    assert protocol["preprocessing"] == {name: facts[name] for name in named}
    assert (protocol["images"], protocol["severity"]) == (4, 3)
    (kept,) = (tmp_path / "cache").glob("*.npy")
    assert np.load(kept, mmap_mode="r").shape == (4, 3, 40, 40)


def test_a_truncated_image_is_named(imagenet_c):
    path = imagenet_c / "c/fog/5" / imagenet_synsets()[2] / "0.JPEG"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path, "jpeg")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"0\.JPEG"):
        list(published(imagenet_c, domains=["fog@5"]).predict_dataloader())


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda path: path.stem)
def test_every_row_runs(row, numbered, synsets, tmp_path):
    """The shipped rows on small folders, with a small net of 1000 classes and few views."""
    subset = "imagenet_a" in row.stem
    name, folder = ("imagenet_a", synsets) if subset else ("imagenet_v2", numbered)
    small = ["--data.resize=40", "--data.image_size=32", "--data.num_workers=0", "--model.method.views=2"]
    net = ["--model.source_ckpt=none", "--model.backbone=cifar/resnet20"]
    place = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    place += [f"--trainer.logger.init_args.save_dir={tmp_path / 'runs'}"]
    main(
        [
            "predict",
            f"--config={CONFIGS / f'memo/{name}_resnet50.yaml'}",
            f"--model.method={row}",
            f"--data.folders={json.dumps({name: str(folder)})}",
            "--model.num_classes=1000",
            *small,
            *net,
            *place,
        ]
    )
    (report,) = tmp_path.rglob("report.json")
    content = json.loads(report.read_text())
    assert content["images"] == (6 if subset else 10)
    assert content["backwards"] == content["images"]
    lines = (report.parent / "predictions.csv").read_text().splitlines()[1:]
    predicted = {int(line.split(",")[3]) for line in lines}
    if subset:
        assert predicted <= set(class_subset("imagenet_a", ""))
