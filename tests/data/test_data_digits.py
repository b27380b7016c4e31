import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits

from lightning_tta.data import DigitsData, ShiftedDataModule, corrupt, corruption_names, default_reset
from lightning_tta.data.sets.digits import split_positions
from lightning_tta.data.sharing import Sharing
from lightning_tta.data.storage.cache import CACHE
from lightning_tta.data.streams import OPTIONS
from lightning_tta.errors import ConfigError


def batches(loader):
    return list(loader)


def joined(loader):
    """All samples of a loader, sorted by index."""
    parts = batches(loader)
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = values["index"].argsort()
    return {name: value[order] for name, value in values.items()}


def test_split_is_stratified_fixed_and_complete():
    labels = torch.tensor(load_digits().target)
    split = split_positions(labels)
    assert sorted(torch.cat(list(split.values())).tolist()) == list(range(1797))
    assert [len(split[name]) for name in ("train", "val", "test")] == [1078, 179, 540]
    for name, share in (("train", 0.6), ("val", 0.1), ("test", 0.3)):
        assert (labels[split[name]].bincount() / labels.bincount() - share).abs().max() < 0.01
    assert split["test"][:8].tolist() == [4, 5, 9, 11, 15, 17, 18, 22]


def test_images_are_the_original_digits():
    data = DigitsData()
    image, label = data.clean("test")[7]
    original = load_digits()
    number = split_positions(torch.tensor(original.target))["test"][7].item()
    assert label == original.target[number]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.uint8
    assert torch.equal(image[0], image[1])
    means = image[0].float().unfold(0, 4, 4).unfold(1, 4, 4).mean((2, 3))  # back to 8x8
    correlation = np.corrcoef(means.flatten(), original.images[number].flatten())[0, 1]
    assert correlation > 0.97


def test_clean_loaders():
    data = DigitsData(train_batch_size=100, augment=False)
    train, test = batches(data.train_dataloader()), joined(data.test_dataloader())
    assert [len(batch["label"]) for batch in train] == [100] * 10
    assert [len(batch["label"]) for batch in data.val_dataloader()] == [100, 79]
    assert set(test) == {"image", "label", "index"}
    assert test["image"].dtype == torch.float32
    assert 0 <= test["image"].min() < test["image"].max() <= 1
    assert torch.equal((test["image"] * 255).byte()[3], data.clean("test")[3][0])
    index = torch.cat([batch["index"] for batch in train])
    assert len(set(index.tolist())) == 1000
    assert index.tolist() != sorted(index.tolist())
    assert data.num_classes == 10
    assert data.class_names[3] == "3"


def test_augmentation_changes_training_images_only():
    data = DigitsData()
    clean = data.clean("train")
    for batch in data.train_dataloader():
        same = [
            torch.equal((image * 255).byte(), clean[i][0])
            for image, i in zip(batch["image"], batch["index"], strict=True)
        ]
        assert not any(same)
        break
    for batch in data.source_batches(20, 20):
        for image, label, i in zip(batch["image"], batch["label"], batch["index"], strict=True):
            assert torch.equal((image * 255).round().byte(), clean[int(i)][0])
            assert label == clean[int(i)][1]


def test_source_batches_are_seeded_and_can_be_repeated():
    data = DigitsData()
    source = data.source_batches(num_images=50, batch_size=20, seed=1)
    first, second = (torch.cat([batch["index"] for batch in source]).tolist() for _ in range(2))
    assert first == second
    assert len(set(first)) == 50
    assert [len(batch["label"]) for batch in source] == [20, 20, 10]
    other = torch.cat([batch["index"] for batch in data.source_batches(50, 20, seed=2)]).tolist()
    assert other != first
    assert sum(len(batch["label"]) for batch in data.source_batches()) == 1078
    with pytest.raises(ConfigError, match="num_images"):
        data.source_batches(0)


def test_stream_batches_hold_what_their_index_says():
    data = DigitsData(domains=["clean", "contrast", "gaussian_noise"], severity=4, num_images=30, batch_size=8)
    assert data.domain_names == ["clean", "contrast", "gaussian_noise"]
    stream = batches(data.predict_dataloader())
    assert [batch["index"].tolist() for batch in stream] == data.stream.batches
    values = joined(data.predict_dataloader())
    assert values["index"].tolist() == list(range(90))
    assert values["domain"].tolist() == [0] * 30 + [1] * 30 + [2] * 30
    assert values["label"][:30].tolist() == values["label"][30:60].tolist() == values["label"][60:].tolist()
    # the subset is sorted: find each clean image in the test split, and corrupt it by hand
    test = data.clean("test")
    numbers = [next(n for n in range(540) if torch.equal(test[n][0], i)) for i in (values["image"][:30] * 255).byte()]
    assert numbers == sorted(set(numbers))
    assert values["label"][:30].tolist() == [test[n][1] for n in numbers]
    for domain, name in ((1, "contrast"), (2, "gaussian_noise")):
        expected = torch.stack([corrupt(test[n][0], name, 4, seed=0, index=n) for n in numbers])
        assert torch.equal(values["image"][values["domain"] == domain], expected.float() / 255)


def test_smaller_subsets_lie_inside_larger_ones_with_the_same_pixels():
    small, large = (
        {
            tuple(i.flatten().tolist())
            for i in joined(DigitsData(domains=["haze"], num_images=n).predict_dataloader())["image"]
        }
        for n in (10, 40)
    )
    assert len(small) == 10
    assert small < large


def test_a_seed_of_the_subset_leaves_other_images():
    def left(**options):
        data = DigitsData(domains=["clean", "haze"], num_images=20, **options)
        data.setup("predict")
        one, other = data.domain_images
        positions = data._clean_test.positions.tolist()
        assert torch.equal(one.labels, other.labels)  # the same ones in each domain
        return positions, data.describe()

    (usual, described), (zero, _), (first, seeded) = left(), left(subset_seed=0), left(subset_seed=1)
    assert usual == zero
    assert described["subset_seed"] is None
    assert seeded["subset_seed"] == 1
    assert first == sorted(set(first))
    assert len(first) == 20
    assert len(set(first) & set(usual)) < 10
    assert DigitsData(domains=["clean"], subset_seed=3).describe()["subset_seed"] is None  # all images: no choice


@pytest.mark.parametrize("stream", ["iid", "label_shift", "mixed"])
def test_pixels_do_not_depend_on_order_batch_size_or_workers(stream):
    options = {"domains": ["shot_noise", "rotate"], "num_images": 40}
    reference = joined(DigitsData(**options, stream="iid", batch_size=64).predict_dataloader())
    CACHE.clear()  # or the same tensors would be compared with themselves
    random.seed(5)
    torch.manual_seed(5)
    other = joined(DigitsData(**options, stream=stream, batch_size=7, order_seed=3).predict_dataloader())
    for name in reference:
        assert torch.equal(reference[name], other[name]), name


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_batches(workers):
    options = {"domains": ["haze", "clean"], "num_images": 20, "batch_size": 6, "stream": "mixed"}
    for one, other in zip(
        DigitsData(**options).predict_dataloader(),
        DigitsData(**options, num_workers=workers).predict_dataloader(),
        strict=True,
    ):
        assert all(torch.equal(one[name], other[name]) for name in ("image", "index", "domain", "label"))


def test_label_shift_stream_is_sorted_by_class():
    data = DigitsData(domains=["clean", "brightness"], stream="label_shift", num_images=100, batch_size=10)
    for domain in (0, 1):
        labels = torch.cat([b["label"][b["domain"] == domain] for b in data.predict_dataloader()]).tolist()
        assert sum(a != b for a, b in pairwise(labels)) == len(set(labels)) - 1


def test_shuffled_labels_change_no_image(monkeypatch):
    options = {"domains": ["elastic"], "num_images": 20, "stream": "iid"}
    reference = joined(DigitsData(**options).predict_dataloader())
    CACHE.clear()
    clean = DigitsData.clean

    def shuffled(self, split):
        images = clean(self, split)
        images.labels = images.labels.flip(0)
        return images

    monkeypatch.setattr(DigitsData, "clean", shuffled)
    other = joined(DigitsData(**options).predict_dataloader())
    assert not torch.equal(reference["label"], other["label"])
    assert torch.equal(reference["image"], other["image"])


def test_corruption_seed_and_severity_change_pixels_and_order_seed_does_not():
    def image(**options):
        return joined(DigitsData(domains=["impulse_noise"], num_images=8, **options).predict_dataloader())["image"]

    assert torch.equal(image(), image(order_seed=9))
    assert not torch.equal(image(), image(corruption_seed=9))
    assert not torch.equal(image(), image(severity=4))


def test_corrupted_images_are_computed_once(monkeypatch):
    CACHE.clear()
    first = DigitsData(domains=["contrast"], num_images=10)
    first.setup("predict")

    def fail(*_, **__):
        raise AssertionError("corrupted again")

    monkeypatch.setattr("lightning_tta.data.images.corrupt", fail)
    again = DigitsData(domains=["contrast"], num_images=10, stream="label_shift", batch_size=3)
    assert len(batches(again.predict_dataloader())) == 4
    with pytest.raises(AssertionError, match="corrupted again"):
        DigitsData(domains=["contrast"], num_images=10, severity=1).setup("predict")


def test_streams_too_large_for_memory_are_made_on_the_fly(monkeypatch):
    options = {"domains": ["jpeg", "clean"], "num_images": 10}
    reference = joined(DigitsData(**options).predict_dataloader())
    CACHE.clear()
    monkeypatch.setattr(CACHE, "limit", 1000)
    lazy = joined(DigitsData(**options).predict_dataloader())
    assert CACHE.nbytes == 0
    assert all(torch.equal(reference[name], lazy[name]) for name in reference)


def test_domains_by_group():
    assert DigitsData().domain_names == corruption_names()
    assert DigitsData(domains=["held_out", "none"]).domain_names == [*corruption_names(held_out=True), "clean"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domains": ["gausian_noise"]}, "Did you mean gaussian_noise"),
        ({"domains": []}, "at least one"),
        ({"domains": ["haze", "reported"]}, "more than once: haze"),
        ({"stream": "sorted"}, "stream must be one of 'iid'"),
        ({"severity": 0}, "severity"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_images": 0}, "num_images"),
        ({"num_workers": -1}, "num_workers"),
        ({"function_set": "other"}, "function_set must be one of 'builtin'"),
        ({"image_size": 28}, "image_size"),
        ({"order_seed": -1}, "order_seed"),
    ],
)
def test_wrong_values_fail_before_data_is_read(monkeypatch, options, message):
    monkeypatch.setattr("lightning_tta.data.sets.digits._load", None)
    with pytest.raises(ConfigError, match=message):
        DigitsData(**options)


def test_what_a_leaf_must_provide():
    class Leaf(ShiftedDataModule):
        class_names = ("a",)

    with pytest.raises(TypeError, match=r"abstract methods '?clean'?, '?digest_content'?"):
        Leaf()
    with pytest.raises(ConfigError, match="DigitsData has no natural domain 'sketch'"):
        DigitsData().natural_domain("sketch")


def test_describe():
    data = DigitsData(domains=["clean", "haze"], num_images=12, stream="mixed", order_seed=4, batch_size=5)
    assert data.describe() == {
        "data": "digits",
        "data_digest": "65e5b4619795-32",
        "split": "test",
        "domains": ["clean", "haze"],
        "images": 24,
        "images_per_domain": [12, 12],
        "function_set": "builtin-1",
        "severity": 3,
        "corruption_seed": 0,
        "stream": "mixed",
        "order_seed": 4,
        "batch_size": 5,
        **dict.fromkeys(OPTIONS),
        "subset_seed": None,
        "charge": None,
        "interval": None,
    }
    assert default_reset(data.stream_kind) == "never"
    clean = DigitsData(domains=["clean"], num_images=12, severity=5).describe()
    assert [clean[name] for name in ("function_set", "severity", "corruption_seed")] == [None] * 3


def indices(data):
    return [batch["index"].tolist() for batch in data.predict_dataloader()]


def test_a_stream_is_shared_and_taken_back():
    data = DigitsData(domains=["clean", "contrast"], num_images=21, batch_size=5)
    alone = data.stream.batches
    data.share(Sharing("synchronised", 1, 2))
    whole = data.stream.batches
    assert [len(batch) for batch in whole] == [10, 10, 1] * 2  # two processes' batches in one
    assert data.shard() == [batch[5:] for batch in whole]
    assert indices(data) == [batch[5:] or batch for batch in whole]  # a loader has no empty batch
    shards = []
    for rank in range(2):
        data.share(Sharing("replicas", rank, 2))
        shards.append(data.shard())
        assert indices(data) == shards[-1]
    assert shards[0] + shards[1] == data.stream.batches == alone
    with pytest.raises(ConfigError, match="3 processes cannot share 2 domains"):
        data.share(Sharing("replicas", 0, 3))
    data.share(Sharing())
    data.start_at(3)
    assert (data.sharing, data.first_batch) == (Sharing(), 3)
    assert indices(data) == alone[3:]


def test_blind_spots_make_the_stream_anew():
    data = DigitsData(domains=["clean"], num_images=6, stream="blind_spot", batch_size=4)
    with pytest.raises(ConfigError, match="set_blind_spots"):
        _ = data.stream
    for wrong in ([True] * 2 + [False] * 4, [False] * 3 + [True] * 3):
        data.set_blind_spots([torch.tensor(wrong)])
        assert data.stream.sizes == (sum(wrong), 6)
        assert data.describe()["images_per_domain"] == [sum(wrong), 6]
        first = torch.cat([batch["image"] for batch in data.predict_dataloader()])[: sum(wrong)]
        clean = data.domain_images[0].images(torch.tensor(wrong).nonzero()[:, 0]).float() / 255
        assert sorted(first.flatten(1).sum(1).tolist()) == sorted(clean.flatten(1).sum(1).tolist())


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.seen = []

    def predict_step(self, batch, batch_idx):
        self.seen.append(batch["index"].tolist())


@pytest.mark.filterwarnings("error:.*custom batch sampler.*", "error:.*drop_last.*")
def test_lightning_does_not_change_the_order_of_the_stream():
    data = DigitsData(domains=["clean", "contrast"], stream="label_shift", num_images=20, batch_size=6)
    recorder = Recorder()
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.predict(recorder, datamodule=data, return_predictions=False)
    assert recorder.seen == data.stream.batches


def test_options_of_the_base_are_options_of_the_command_line():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DigitsData, "data")
    parsed = parser.parse_args(["--data.stream", "label_shift", "--data.domains", '["haze"]', "--data.image_size=40"])
    instantiate = (
        getattr(parser, "instantiate", None) or parser.instantiate_classes
    )  # the name before jsonargparse 4.49
    data = instantiate(parsed).data
    assert (data.stream_kind, data.domain_names, data.image_size) == ("label_shift", ["haze"], 40)
