"""Watch on class-sorted digits: real collapses, and healthy methods."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_tta import DigitsData, Watch, adapt
from lightning_tta.data.threads import one_thread
from nets import TinyNet

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:Guard")]


@pytest.fixture(scope="module")
def digits():
    """A GroupNorm net that knows clean digits, and a class-sorted stream of shifted ones."""
    data = DigitsData(
        domains=["gaussian_noise", "contrast", "motion_blur"],
        severity=4,
        stream="label_shift",
        batch_size=16,
        cache_dir="none",
    )
    data.setup("predict")
    source = data.clean("train")
    pixels, labels = source.images(torch.arange(len(source))).float() / 255, source.labels
    with torch.random.fork_rng(devices=[]), one_thread():  # threads add up in another order: another net
        torch.manual_seed(0)
        net = TinyNet("gn", 10, width=24)
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(250):
            chosen = torch.randint(len(pixels), (64,))
            optimizer.zero_grad()
            cross_entropy(net(pixels[chosen]), labels[chosen]).backward()
            optimizer.step()
    return net.eval(), list(data.predict_dataloader())


def accuracy(digits, run):
    right = [run(batch["image"]).argmax(1) == batch["label"] for batch in digits[1]]
    return torch.cat(right).float().mean().item()


@pytest.mark.parametrize("compare", ["history", "source"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("source", {}),
        ("zerosiam", {"lr": 1e-3, "predictor_lr": 1e-3, "lr_batch_size": None}),
        ("tent", {"lr": 1e-4, "optimizer": "sgd"}),
    ],
)
def test_no_alarm_because_a_stream_is_sorted(digits, compare, name, options):
    watch = Watch(adapt(digits[0], name, **options), "warn", compare=compare)
    assert accuracy(digits, watch) > accuracy(digits, adapt(digits[0], "source")) - 0.05
    assert watch.events == []


def test_a_collapse_is_caught(digits):
    source = accuracy(digits, adapt(digits[0], "source"))
    collapsing = {"lr": 0.1, "optimizer": "sgd"}
    assert accuracy(digits, adapt(digits[0], "tent", **collapsing)) < source - 0.25
    for compare, delay, loss in (("history", 20, 0.09), ("source", 16, 1e-9)):
        watch = Watch(adapt(digits[0], "tent", **collapsing), "stop", compare=compare)
        assert accuracy(digits, watch) > source - loss
        assert watch.events[0]["batch"] < delay
        rolling = Watch(adapt(digits[0], "tent", **collapsing), "rollback", compare=compare)
        assert accuracy(digits, rolling) > source - 2 * loss
        assert rolling.stopped  # for good, after several in a row
        last = digits[1][-20:]
        alone = adapt(digits[0], "source")
        assert all(torch.equal(rolling(b["image"]), alone(b["image"])) for b in last)  # and ends as the source
