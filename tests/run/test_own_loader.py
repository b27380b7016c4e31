"""What batches of a user's own loader may hold, several loaders, and loaders that do not repeat."""

import csv
import json
import warnings

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tta import ConfigError, DataError, StateKeeper, TestTimeAdaptation
from lightning_tta.methods import Source
from lightning_tta.run.own_loader import describe_loaders


class Flip(nn.Module):
    """Class 1 where the image is bright."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(1, 1)

    def forward(self, x):
        level = x.mean((1, 2, 3)) - 0.5
        return torch.stack([-level, level], 1)


def images(count, seed=0):
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def loader(*batches):
    return DataLoader(list(batches), batch_size=None)


def predict(root, loaders, reset="never", keeper=None, method=Source):
    module = TestTimeAdaptation(method, backbone=Flip(), reset=reset)
    quiet = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(default_root_dir=root, callbacks=[keeper or StateKeeper()], **quiet).predict(module, loaders)
    (report,) = root.glob("*/report.json")
    with report.with_name("predictions.csv").open(newline="") as file:
        return json.loads(report.read_text()), list(csv.DictReader(file))


def test_names_of_files_and_domains(tmp_path):
    batches = [
        {"image": images(2), "index": ["a.png", "b.png"], "domain": ["day", "night"], "label": [1, -1]},
        {"image": images(2, 1), "index": ("c.png", "d.png"), "domain": "night", "label": torch.tensor([0, 1])},
    ]
    report, rows = predict(tmp_path, loader(*batches))
    assert [row["file"] for row in rows] == ["a.png", "b.png", "c.png", "d.png"]
    assert [row["domain"] for row in rows] == ["day", "night", "night", "night"]
    assert [row["index"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["label"] for row in rows] == ["1", "-1", "0", "1"]
    assert {name: entry["images"] for name, entry in report["domains"].items()} == {"day": 1, "night": 3}


def test_numbers_of_domains_and_resets_between_them(tmp_path):
    batches = [{"image": images(2, n), "domain": torch.tensor([n, n])} for n in (3, 3, 0, 5)]
    report, rows = predict(tmp_path, loader(*batches), reset="domain")
    assert [row["domain"] for row in rows[::2]] == ["domain 3", "domain 3", "domain 0", "domain 5"]
    assert report["resets"] == 2
    assert list(report["domains"]) == ["domain 3", "domain 0", "domain 5"]


def test_several_loaders_are_one_stream(tmp_path):
    one, two = ([{"image": images(2, n)}, {"image": images(2, n + 1)}] for n in (0, 2))
    report, rows = predict(tmp_path, [loader(*one), loader(*two)])
    assert [row["domain"] for row in rows] == ["loader 0"] * 4 + ["loader 1"] * 4
    assert [int(row["index"]) for row in rows] == list(range(8))
    assert (report["images"], report["batches"]) == (8, 4)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("index", torch.rand(2), "'index'.*whole numbers, or names of files.*float32"),
        ("index", ["a.png"], "'index'.*one for each image; got list"),
        ("domain", torch.tensor([-1, 0]), "'domain'.*whole numbers from 0, or names"),
        ("domain", torch.zeros(3, dtype=torch.int64), "'domain'. of 2 images"),
        ("domain", {"a": 1}, "'domain'.*dict"),
        ("label", ["cat", "dog"], "'label'.*whole numbers from 0, -1"),
        ("label", torch.eye(2), "'label'"),
    ],
)
def test_other_kinds_are_refused_at_once(tmp_path, key, value, message):
    with pytest.raises(DataError, match=message):
        predict(tmp_path, loader({"image": images(2), key: value}))


def test_loaders_have_what_can_be_known_in_their_identity(tmp_path):
    data = TensorDataset(images(8))
    base = describe_loaders(DataLoader(data, batch_size=2))
    assert describe_loaders(DataLoader(TensorDataset(images(8)), batch_size=2)) == base
    others = [
        DataLoader(data, batch_size=4),
        DataLoader(data, batch_size=2, shuffle=True),
        DataLoader(TensorDataset(images(6)), batch_size=2),
        DataLoader(list(images(8)), batch_size=2),
        [DataLoader(data, batch_size=2)] * 2,
        iter(()),
    ]
    assert len({base, *map(describe_loaders, others)}) == 7


class Cut(Source):
    """Stops in its third batch."""

    synchronized = False

    def step(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3 and Cut.stops:
            raise RuntimeError("power cut")
        return super().step(x)


class Any_(torch.utils.data.IterableDataset):
    """A loader of which nothing can be known."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


BATCHES = [{"image": images(2, n), "index": torch.tensor([2 * n, 2 * n + 1])} for n in range(4)]
PLAIN = [{"image": batch["image"]} for batch in BATCHES]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (BATCHES, BATCHES, None),
        (PLAIN, PLAIN, None),
        (BATCHES, [BATCHES[1], BATCHES[0], *BATCHES[2:]], "gave others now"),
        (PLAIN, [PLAIN[1], PLAIN[0], *PLAIN[2:]], "gave others now"),
        (PLAIN, [{"image": torch.cat([PLAIN[n]["image"] for n in (0, 1)])}, *PLAIN[2:]], "gave others now"),
        (PLAIN, PLAIN[:1], "ended after 1"),
    ],
    ids=["index", "pixels", "shuffled", "shuffled pixels", "other sizes", "shrunk"],
)
def test_a_continued_loader_must_repeat(tmp_path, first, second, message):
    Cut.stops = True
    with pytest.raises(RuntimeError, match="power cut"):
        predict(tmp_path, DataLoader(Any_(first), batch_size=None), keeper=StateKeeper(save_every=1), method=Cut)
    Cut.stops = False
    again = DataLoader(Any_(second), batch_size=None)
    if message is None:
        report, rows = predict(tmp_path, again, keeper=StateKeeper(save_every=1), method=Cut)
        assert (report["images"], len(rows)) == (8, 8)
        return
    with pytest.raises(ConfigError, match=rf"cannot be continued: 2 batches were done.*{message}.*restart"):
        predict(tmp_path, again, keeper=StateKeeper(save_every=1), method=Cut)
