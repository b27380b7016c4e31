"""A user's own images without labels."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_tta import ConfigError, DataError, ImageFolderData
from lightning_tta.data.corruptions.corrupt import corrupt


def write(path, number, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.fixture
def photos(tmp_path):
    for number in (10, 9, 1):
        write(tmp_path / "photos" / f"{number}.png", number)
    write(tmp_path / "photos" / "sub" / "2.png", 2)
    return tmp_path / "photos"


def files_of(data):
    return [data.file_of(n) for n in range(sum(data.describe()["images_per_domain"]))]


def test_a_folder_in_natural_order_as_it_is(photos):
    data = ImageFolderData(str(photos), batch_size=3)
    first, second = data.predict_dataloader()
    assert files_of(data) == ["1.png", "9.png", "10.png", "sub/2.png"]
    assert torch.equal(first["image"][2], write(photos.parent / "x.png", 10).float() / 255)
    assert (first["index"].tolist(), second["index"].tolist()) == ([0, 1, 2], [3])
    assert torch.cat([first["label"], second["label"]]).tolist() == [-1] * 4
    assert (data.domain_names, data.class_names, data.num_classes) == (["images"], [], 0)
    assert data.describe()["stream"] == "ordered"
    assert data.describe()["function_set"] is None


@pytest.mark.parametrize("kind", ["pattern", "list", "text", "one"])
def test_other_ways_to_name_files(photos, kind):
    (photos.parent / "notes.md").write_text("x")
    text = photos.parent / "files.txt"
    text.write_text("# two\nphotos/9.png\n\nphotos/1.png\n")
    path, expected = {
        "pattern": (str(photos / "**" / "*.png"), ["1.png", "9.png", "10.png", "sub/2.png"]),
        "list": ([str(photos / "9.png"), str(photos / "1.png")], ["9.png", "1.png"]),
        "text": (str(text), ["9.png", "1.png"]),
        "one": (str(photos / "9.png"), ["9.png"]),
    }[kind]
    data = ImageFolderData(path)
    assert files_of(data) == expected
    assert len(next(iter(data.predict_dataloader()))["image"]) == len(expected)


def test_named_domains_and_corruptions_where_they_are_asked_for(photos):
    data = ImageFolderData({"day": str(photos / "*.png"), "night": [str(photos / "sub")]})
    batches = list(data.predict_dataloader())
    assert [(data.stream_domains[int(b["domain"][0])], len(b["image"])) for b in batches] == [("day", 3), ("night", 1)]
    corrupted = ImageFolderData(str(photos), domains=["images", "haze@2"])
    clean, haze = corrupted.predict_dataloader()
    pixels = (clean["image"][1] * 255).round().byte()
    assert torch.equal((haze["image"][1] * 255).round().byte(), corrupt(pixels, "haze", 2, index=1))
    assert corrupted.file_of(5) == "9.png"
    with pytest.raises(ConfigError, match="domain of the data cannot have the name"):
        ImageFolderData({"haze": str(photos)})


def test_the_nets_own_preprocessing_fills_what_is_left_open(photos):
    write(photos / "wide.png", 5, size=(80, 40))
    with pytest.raises(DataError, match=r"wide.png has 80x40.*need image_size"):
        list(ImageFolderData(str(photos)).predict_dataloader())
    net = {"input_size": [3, 24, 24], "crop_pct": 0.75, "interpolation": "bicubic", "name": "a/b", "pretrained": True}
    data = ImageFolderData(str(photos))
    before = data.digest()
    data.fit_to_net(net)
    images = data.natural_domain("images")
    assert (images.resize, images.crop, images.interpolation) == (32, 24, "bicubic")
    assert data.digest() != before
    with pytest.warns(UserWarning, match=r"resized to 32 pixels and cut to 24, as a/b was published"):
        data.fit_to_net({**net, "pretrained": False})
    own = ImageFolderData(str(photos), image_size=20, resize=30, interpolation="bilinear")
    own.fit_to_net(net)
    images = own.natural_domain("images")
    assert (images.resize, images.crop, images.interpolation, images.channels) == (30, 20, "bilinear", 3)
    grey = ImageFolderData(str(photos), image_size=20)
    grey.fit_to_net({**net, "input_size": [1, 24, 24]})
    assert next(iter(grey.predict_dataloader()))["image"].shape == (5, 1, 20, 20)


def test_digest_follows_contents_and_order_and_not_the_place(photos, tmp_path):
    digest = ImageFolderData(str(photos)).digest()
    assert ImageFolderData(str(photos), image_size=20).digest() != digest
    paths = [str(photos / name) for name in ("1.png", "9.png")]
    assert ImageFolderData(paths).digest() != ImageFolderData(paths[::-1]).digest()
    moved = photos.rename(tmp_path / "elsewhere")
    assert ImageFolderData(str(moved)).digest() == digest
    write(moved / "1.png", 77)
    assert ImageFolderData(str(moved)).digest() != digest


def test_labels_and_class_names_where_they_are_given(photos):
    table = photos.parent / "labels.csv"
    table.write_text("file,class\n9.png,dog\nsub/2.png,0\n")
    (photos.parent / "names.txt").write_text("cat\ndog\n")
    data = ImageFolderData(str(photos), labels=str(table), class_names=str(photos.parent / "names.txt"))
    (batch,) = data.predict_dataloader()
    assert batch["label"].tolist() == [-1, 1, -1, 0]
    assert data.class_names == ["cat", "dog"]
    assert data.file_of(3) == "sub/2.png"
    for text, message in (("9.png,emu\n1.png,emu\n", "line 1.*one of cat, dog"), ("x.png,cat\n", "names none")):
        table.write_text(text)
        with pytest.raises(DataError, match=message):
            ImageFolderData(str(photos), labels=str(table), class_names=["cat", "dog"]).setup("predict")


def test_labels_and_names_that_contradict(photos):
    table = photos.parent / "labels.csv"
    table.write_text("9.png,dog\n1.png,cat\n9.png,1\n1.png,0\n")
    names = ["cat", "dog"]
    (batch,) = ImageFolderData(str(photos), labels=str(table), class_names=names).predict_dataloader()
    assert sorted(batch["label"].tolist()) == [-1, -1, 0, 1]
    table.write_text("9.png,dog\n1.png,cat\n9.png,cat\n")
    with pytest.raises(DataError, match=r"line 3: 9.png had another class before: 1, now 0"):
        ImageFolderData(str(photos), labels=str(table), class_names=names).setup("predict")
    table.write_text("9.png,dog\nphotos/1.png,cat\n")
    with pytest.warns(UserWarning, match=r"1 of 2 files in .*labels.csv are none of the images, such as photos/1.png"):
        ImageFolderData(str(photos), labels=str(table), class_names=names).setup("predict")
    table.write_text("9.png,dog\n1.png,cat\n")
    with pytest.raises(DataError, match=r"2 images are not in .*labels.csv; test needs a label for each"):
        ImageFolderData(str(photos), labels=str(table), class_names=names).test_dataloader()
    with pytest.raises(DataError, match="class_names must be different; dog is there more than once"):
        _ = ImageFolderData(str(photos), class_names=["dog", "cat", "dog"]).class_names


def test_text_files_of_windows(photos):
    """With the mark and the line ends that Notepad and Excel write."""
    files = {"list.txt": "# day\r\n\r\n9.png\r\n1.png\r\n", "labels.csv": "9.png,dog\r\n1.png,cat\r\n"}
    for name, text in {**files, "names.txt": "cat\r\ndog\r\n"}.items():
        (photos / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    data = ImageFolderData(
        str(photos / "list.txt"), labels=str(photos / "labels.csv"), class_names=str(photos / "names.txt")
    )
    (batch,) = data.predict_dataloader()
    assert (data.class_names, data.file_of(0)) == (["cat", "dog"], "9.png")
    assert batch["label"].tolist() == [1, 0]


def test_without_labels_nothing_that_needs_them_runs(photos):
    for kind in ("label_shift", "correlated", "blind_spot"):
        with pytest.raises(ConfigError, match=rf"stream='{kind}' orders images by their labels.*iid.*ordered"):
            ImageFolderData(str(photos), stream=kind)
    data = ImageFolderData(str(photos))
    with pytest.raises(DataError, match="no labels, so there is nothing to test"):
        data.test_dataloader()
    for call in (data.train_dataloader, data.val_dataloader, lambda: data.source_batches(10)):
        with pytest.raises(DataError, match=r"no (train|val) images.*--data FolderData"):
            call()


def test_sub_folders_that_could_be_classes_are_said(tmp_path):
    for name in ("cat", "dog"):
        write(tmp_path / "pets" / name / "0.png", 1)
    with pytest.warns(UserWarning, match=r"2 sub-folders \(cat, dog\), which could be classes.*--data.root .*pets"):
        ImageFolderData(str(tmp_path / "pets"))


def test_what_names_nothing_is_refused(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.doc").write_text("x")
    (tmp_path / "list.txt").write_text("gone.png\nlost.png\n")
    for path, message in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "has no images. It has 1 entries, such as notes.doc"),
        (tmp_path / "*.gif", "No image fits"),
        (tmp_path / "list.txt", "None of the 2 files exists"),
    ):
        with pytest.raises(DataError, match=message):
            ImageFolderData(str(path))
    with pytest.raises(ConfigError, match="resize=10"):
        ImageFolderData(str(photos), resize=10, image_size=20)
    with pytest.raises(ConfigError, match="path must name"):
        ImageFolderData([])


def test_damaged_files_are_marked_or_raise(photos):
    (photos / "9.png").write_bytes(b"no image")
    data = ImageFolderData([str(photos / name) for name in ("1.png", "9.png", "gone.png", "10.png")])
    with pytest.raises(DataError, match=r"9\.png"):
        list(data.predict_dataloader())
    data.marks_damaged = True
    (batch,) = data.predict_dataloader()
    assert batch["damaged"].tolist() == [False, True, True, False]
    assert batch["image"].isnan().flatten(1).all(1).tolist() == [False, True, True, False]
    assert "gone.png" in str(data.problem_of(2))


def make_video(path, count=7, size=(48, 32)):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
        for number in range(count):
            pixels = np.full((size[1], size[0], 3), 30 * number + 20, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def test_frames_of_a_video_in_order(photos, tmp_path):
    make_video(tmp_path / "clip.mp4")
    data = ImageFolderData(str(tmp_path / "clip.mp4"), every=3, image_size=32, batch_size=2)
    batches = list(data.predict_dataloader())
    levels = torch.cat([batch["image"] for batch in batches]).mean((1, 2, 3)) * 255
    assert torch.allclose(levels, torch.tensor([20.0, 110.0, 200.0]), atol=4)
    assert batches[0]["image"].shape == (2, 3, 32, 32)
    assert files_of(data) == ["clip.mp4#frame=0", "clip.mp4#frame=3", "clip.mp4#frame=6"]
    frames = data.stream_images[0][1]
    assert torch.equal(frames.image(0), frames.images(torch.tensor([0]))[0])  # back to the beginning
    assert frames.image(2).float().mean() > frames.image(1).float().mean() + 50
    both = ImageFolderData([str(tmp_path / "clip.mp4"), str(photos / "9.png")], image_size=32)
    assert len(next(iter(both.predict_dataloader()))["image"]) == 8
    workers = ImageFolderData(str(tmp_path / "clip.mp4"), image_size=32, batch_size=2, num_workers=2)
    alone = ImageFolderData(str(tmp_path / "clip.mp4"), image_size=32, batch_size=2)
    for one, other in zip(workers.predict_dataloader(), alone.predict_dataloader(), strict=True):
        assert torch.equal(one["image"], other["image"])


def test_videos_that_cannot_be_read_are_named(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"Cannot read the video .*a\.mp4"):
        ImageFolderData(str(tmp_path / "a.mp4")).setup("predict")


def test_videos_in_a_folder_are_not_lost_without_a_word(photos):
    (photos / "a.MP4").touch()
    with pytest.warns(UserWarning, match=r"1 files are left out.*a.MP4.*of a video.* the path of the file itself"):
        assert len(ImageFolderData(str(photos)).natural_domain("images")) == 4
