"""Batches that cannot be used, on two processes with whole domains: as on one, counted and predicted once."""

import csv
import json
from functools import partial

import pytest
import torch
from forked import TIMES
from lightning.pytorch import seed_everything

from lightning_tta import DigitsData, TestTimeAdaptation
from lightning_tta.methods import Tent
from nets import make_net
from processes import MARKS, Processes, trainer
from runs import callbacks_of, directory_of

pytestmark = MARKS
DOMAINS = ["gaussian_noise", "contrast", "clean"]  # of five batches each: the first process has the first and the last


class Broken(DigitsData):
    """Some batches, by domain and number, are not what a method takes: refused before it, or by it."""

    bad: dict = {}  # noqa: RUF012

    def on_after_batch_transfer(self, batch, dataloader_idx):
        first = int(batch["index"][0])
        place = next(i for i, own in enumerate(self.stream.batches) if first in own)
        how = self.bad.get(divmod(place, 5))
        images = batch["image"]
        broken = {None: images, "dimensions": images[0], "channels": images[:, :1], "range": images * 255}
        return {**batch, "image": broken[how]}


def run(root, bad, world, rank=0, **options):
    seed_everything(0, verbose=False)
    data = Broken(domains=DOMAINS, num_images=40, batch_size=8)
    data.bad = bad
    method = partial(Tent, lr=1e-2)
    options = {"reset": "domain", "on_bad_batch": "skip", **options}
    callbacks = callbacks_of(options)
    module = TestTimeAdaptation(method, backbone=make_net("bn", num_classes=10), **options)
    trainer(root, world, callbacks=callbacks).predict(module, datamodule=data, return_predictions=False)


def outcome(root):
    report = json.loads((directory_of(root) / "report.json").read_text())
    return {name: value for name, value in report.items() if name not in (*TIMES, "protocol", "run_digest")}


EVERY = {(domain, number): "range" for domain in range(3) for number in range(5)}
CASES = {
    "some": {(0, 0): "dimensions", (0, 3): "channels", (1, 0): "range", (2, 0): "dimensions", (2, 4): "range"},
    "first of the second process": {(1, 0): "dimensions"},
    "first domain of the first process": {(0, number): "dimensions" for number in range(5)},
    "all of the second process, before the method": {(1, number): "dimensions" for number in range(5)},
    "all of the second process, by the method": {(1, number): "range" for number in range(5)},
    "all of the first process": {(d, n): ("dimensions", "", "channels")[d] for d in (0, 2) for n in range(5)},
    "all": EVERY,
}


@pytest.mark.parametrize("bad", CASES.values(), ids=CASES)
@pytest.mark.parametrize("reset", ["domain", "batch"])
def test_as_on_one_process(tmp_path, bad, reset):
    with pytest.warns(UserWarning, match="is skipped"):
        run(tmp_path / "one", bad, 1, reset=reset)
    both = Processes(partial(run, tmp_path / "two", bad, 2, reset=reset), tmp_path / "two")
    assert (both.wait(), both.said()) == ([0, 0], ["", ""])
    predictions = [(directory_of(tmp_path / name) / "predictions.csv").read_bytes() for name in ("one", "two")]
    assert predictions[0] == predictions[1]
    assert outcome(tmp_path / "two") == outcome(tmp_path / "one")
    assert outcome(tmp_path / "two")["skipped_batches"] == len(bad)
    rows = list(csv.DictReader((directory_of(tmp_path / "two") / "predictions.csv").open(newline="")))
    assert sorted(int(row["index"]) for row in rows) == list(range(120))
    assert sum(row["prediction"] == "-1" for row in rows) == 8 * len(bad)


def test_killed_between_bad_batches(tmp_path):
    bad = CASES["some"]
    whole = Processes(partial(run, tmp_path / "whole", bad, 2), tmp_path / "whole")
    assert whole.wait() == [0, 0]
    root, options = tmp_path / "cut", {"save_every": 1}

    def cut(rank):
        step, last = TestTimeAdaptation.predict_step, [6, 3][rank]

        def stop(self, batch, batch_idx):
            if self.run.summary.batches == last:
                raise KeyError
            return step(self, batch, batch_idx)

        TestTimeAdaptation.predict_step = stop  # in this child only
        run(root, bad, 2, **options)

    assert Processes(cut, root).wait() == [1, 1]
    assert [torch.load(directory_of(root) / f"state.rank{rank}.pt")["batches"] for rank in range(2)] == [6, 3]
    assert Processes(partial(run, root, bad, 2, **options), root).wait() == [0, 0]
    predictions = [(directory_of(path) / "predictions.csv").read_bytes() for path in (root, tmp_path / "whole")]
    assert predictions[0] == predictions[1]
    assert outcome(root) == outcome(tmp_path / "whole")
