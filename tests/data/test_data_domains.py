"""Domain folders, leave one out; batches balanced over source domains; what each process gets."""

import pytest
import torch
from PIL import Image

from lightning_tta import ConfigError, DataError, DigitsData, DomainFolderData
from lightning_tta.data import samplers
from lightning_tta.data.samplers import DomainBatches

DOMAINS = {"Art": 10, "Clipart": 14, "Real World": 12}
CLASSES = ("cat", "dog")


@pytest.fixture
def root(tmp_path):
    for number, (domain, count) in enumerate(DOMAINS.items()):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / domain / name
            folder.mkdir(parents=True)
            for i in range(count // 2):
                colour = (80 * number, 100 * label, 5 * i)
                Image.new("RGB", (40 + i, 36), colour).save(folder / f"{i:02}.png")
    return tmp_path


def domain_of(image):
    return round(float(image[0].mean()) * 255 / 80)


def test_target_is_the_stream_and_the_rest_the_source(root):
    data = DomainFolderData(str(root), target="real_world", image_size=32, batch_size=5)
    assert data.domain_names == ["Real World"]
    assert data.sources == ["Art", "Clipart"]
    assert data.class_names == list(CLASSES)
    batches = list(data.predict_dataloader())
    assert sum(len(batch["label"]) for batch in batches) == 12
    for batch in batches:
        assert batch["image"].shape[1:] == (3, 32, 32)
        for image, label in zip(batch["image"], batch["label"], strict=True):
            assert domain_of(image) == 2
            assert round(float(image[1].mean()) * 255 / 100) == label


def test_training_batches_are_balanced_and_in_order(root):
    data = DomainFolderData(str(root), target="Real World", image_size=32, train_batch_size=6, augment=False)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.clean("train")) // 6 == 3
    for batch in batches:
        assert batch["domain"].tolist() == [0, 0, 0, 1, 1, 1]
        assert [domain_of(image) for image in batch["image"]] == batch["domain"].tolist()
    held_back = next(iter(data.val_dataloader()))
    assert torch.bincount(held_back["label"]).tolist() == [2, 2]  # one of each class of each source
    assert "domain" not in held_back


def test_one_source(root):
    data = DomainFolderData(str(root), target=["Art", "Clipart"], image_size=32, train_batch_size=4)
    assert "domain" not in next(iter(data.train_dataloader()))
    assert data.domain_names == ["Art", "Clipart"]


def test_kfold_is_entered(root):
    inner = root / "kfold"
    inner.mkdir()
    for domain in DOMAINS:
        (root / domain).rename(inner / domain)
    assert DomainFolderData(str(root), target="art", image_size=32).sources == ["Clipart", "Real World"]


def test_a_class_that_the_sources_lack(root):
    extra = root / "Real World" / "horse"
    extra.mkdir()
    Image.new("RGB", (40, 40)).save(extra / "a.png")
    with pytest.raises(DataError, match="horse"):
        DomainFolderData(str(root), target="Real World", image_size=32).setup("predict")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "Photo"}, "no domain 'Photo'.*Art, Clipart"),
        ({"target": "Art", "sources": ["Sketch"]}, "no domain 'Sketch'"),
        ({"target": "Art", "sources": ["art"]}, "must be different"),
        ({"target": []}, "must be different"),
        ({"target": "Art", "sources": ["Clipart", "clipart"]}, "none twice"),
        ({"target": ["Art", "art"]}, "none twice"),
        ({"target": "Art", "root": "nowhere"}, "folder nowhere does not exist"),
    ],
    ids=str,
)
def test_wrong_domains(root, options, words):
    with pytest.raises((DataError, ConfigError), match=words):
        DomainFolderData(**{"root": str(root), **options})


def test_names_that_differ_by_a_sign_only(root):
    (root / "Real World" / "cat").rename(root / "cat")
    (root / "Real_World").mkdir()
    (root / "cat").rename(root / "Real_World" / "cat")
    assert DomainFolderData(str(root), target="Real_World", image_size=32).targets == ["Real_World"]
    with pytest.raises(DataError, match="several domains like 'real world'"):
        DomainFolderData(str(root), target="real world")


def test_a_batch_that_cannot_be_shared(root):
    data = DomainFolderData(str(root), target="Art", image_size=32, train_batch_size=5)
    with pytest.raises(ConfigError, match="train_batch_size=5"):
        data.train_dataloader()


def test_small_domains_start_again_and_orders_change():
    domains = torch.tensor([0] * 3 + [1] * 21)
    batches = DomainBatches(domains, 4)
    epochs = []
    for epoch in range(2):
        batches.sampler.set_epoch(epoch)
        epochs.append(list(batches))
        assert len(epochs[-1]) == len(batches) == 6
        small = [position for batch in epochs[-1] for position in batch[:2]]
        large = [position for batch in epochs[-1] for position in batch[2:]]
        assert [small.count(i) for i in range(3)] == [4, 4, 4]
        assert len(set(large)) == 12
    assert epochs[0] != epochs[1]
    batches.set_epoch(0)
    assert list(batches) == epochs[0]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_without_overlap(monkeypatch, root, world):
    seen = {"train": [], "val": [], "balanced": []}
    sizes = set()
    for rank in range(world):
        monkeypatch.setattr(samplers, "processes", lambda rank=rank: (rank, world))
        data = DigitsData(train_batch_size=32, augment=False)
        seen["train"] += [int(i) for batch in data.train_dataloader() for i in batch["index"]]
        seen["val"] += [int(i) for batch in data.val_dataloader() for i in batch["index"]]
        sizes.add(len(data.train_dataloader()))
        domains = DomainFolderData(str(root), target="Art", image_size=32, train_batch_size=4, augment=False)
        seen["balanced"] += [int(i) for batch in domains.train_dataloader() for i in batch["index"]]
    assert sorted(seen["val"]) == list(range(179))
    for name in ("train", "balanced"):
        assert len(set(seen[name])) == len(seen[name])
    assert len(sizes) == 1
    assert len(seen["train"]) > 1078 - 33 * world


def test_validation_under_shift():
    data = DigitsData(val_domains=["clean", "held_out"], severity=5, train_batch_size=64)
    plain = torch.cat([batch["image"] for batch in DigitsData().val_dataloader()])
    assert data.val_domain_names[0] == "clean"
    assert len(data.val_domain_names) == 6
    seen = dict.fromkeys(range(6), 0)
    for batch in data.val_dataloader():
        assert len(set(batch["domain"].tolist())) == 1
        number = int(batch["domain"][0])
        seen[number] += len(batch["label"])
        position = batch["index"] % 179
        same = (batch["image"] == plain[position]).flatten(1).all(1)
        assert same.all() if number == 0 else not same.any()
        assert torch.equal(batch["label"], torch.cat([b["label"] for b in DigitsData().val_dataloader()])[position])
        assert len(set(batch["label"].tolist())) > 5  # shuffled, not sorted by class
    assert set(seen.values()) == {179}


def test_validation_domains_are_checked():
    with pytest.raises(ConfigError, match="Unknown domain 'fog'"):
        DigitsData(val_domains=["fog"])


@pytest.fixture
def listed(root):
    """The same images by lists, as DomainNet-126 has them; labels not in the order of the folders' names."""
    for domain in DOMAINS:
        lines = [
            f"{domain}/{name}/{path.name} {1 - label}"
            for label, name in enumerate(CLASSES)
            for path in sorted((root / domain / name).iterdir())
        ]
        (root / f"{domain}_list.txt").write_text("\n".join(lines) + "\n")
    return {domain: f"{domain}_list.txt" for domain in DOMAINS}


def test_lists(root, listed):
    data = DomainFolderData(str(root), target="Art", lists=listed, image_size=32, batch_size=4, train_batch_size=4)
    assert data.sources == ["Clipart", "Real World"]
    assert data.class_names == ["dog", "cat"]
    for batch in data.predict_dataloader():
        for image, label in zip(batch["image"], batch["label"], strict=True):
            assert domain_of(image) == 0
            assert 1 - round(float(image[1].mean()) * 255 / 100) == label
    assert next(iter(data.train_dataloader()))["domain"].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "Art_list.txt does not exist"),
        ("", "is empty"),
        ("Art/cat/00.png\n", r"line 1: 'Art/cat/00\.png'"),
        ("Art/cat/00.png one\n", "line 1"),
        ("Art/cat/00.png 2\n", "labels up to 2.*2 classes"),
        ("Art/cat/none.png 1\n", r"none\.png"),
    ],
)
def test_wrong_lists(root, listed, content, words):
    (root / "Art_list.txt").unlink()
    if content is not None:
        (root / "Art_list.txt").write_text(content)
    with pytest.raises(DataError, match=words):
        DomainFolderData(str(root), target="Art", lists=listed, image_size=32).setup("predict")
