"""``lightning_tta.choose`` as a whole, on a net and a shift for which the right choice is known."""

import copy
import json

import pytest
import torch
from torch import nn

import lightning_tta
from lightning_tta import Choice, ConfigError, DataError, DigitsData, InputError, adapt, choose
from nets import make_net

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES, SIZE, NUMBER = 5, 40, 4
SHORT = ["norm", {"method": "tent", "lr": 1e-4}]


def draw(number, seed):
    """Images of a fixed pattern each class, with noise, and their labels."""
    patterns = torch.rand(CLASSES, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (number,), generator=generator)
    noise = torch.randn(number, 3, 16, 16, generator=generator)
    return (0.25 + 0.5 * patterns[labels] + 0.15 * noise).clamp(0, 1), labels


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    net = make_net("bn").train()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for step in range(80):
        images, labels = draw(64, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    net.eval()
    images, labels = draw(200, 1000)
    assert (net(images).argmax(1) == labels).float().mean() > 0.9
    return net


@pytest.fixture(scope="module")
def shifted():
    images, labels = draw(NUMBER * SIZE, 2000)
    return 0.5 + 0.4 * images, labels


def test_the_method_that_undoes_the_shift_is_chosen(trained, shifted):
    images, labels = shifted
    found = choose(trained, images, SHORT, batch_size=SIZE, labels=dict(enumerate(labels[:50].tolist())))
    right = {
        each["name"]: (torch.cat([adapt(trained, each["method"])(b) for b in images.split(SIZE)]).argmax(1) == labels)
        .float()
        .mean()
        for each in found.candidates[:2]
    }
    assert right["norm"] > right["source"] + 0.2
    assert (found.name, found.method, found.options) == ("norm", "norm", {})
    assert found.confidence > 0.95
    assert found.images == len(images)
    assert found.candidates[1]["scores"]["labels"] == pytest.approx(1, abs=0.1)


def test_the_source_stays_on_its_own_images(trained):
    images, _ = draw(NUMBER * SIZE, 3000)
    found = choose(trained, images, batch_size=SIZE)
    assert (found.name, found.method, found.options) == ("source", "source", {})
    assert not any(each["problem"] for each in found.candidates)
    assert len(found.candidates) > 5


def test_whatever_the_form_of_the_data(trained, shifted):
    images, labels = shifted
    alone = choose(trained, images, SHORT, batch_size=SIZE).as_dict()
    parts = list(zip(images.split(SIZE), labels.split(SIZE), strict=True))
    rows = [{"image": image, "label": label} for image, label in parts]
    for data in (list(images.split(SIZE)), iter(parts)):
        assert choose(trained, data, SHORT).as_dict() == alone
    counted = choose(trained, rows, SHORT, labels=20)
    assert choose(trained, parts, SHORT, labels=20).as_dict() == counted.as_dict()
    by_index = choose(trained, rows, SHORT, labels={8 * n: int(labels[8 * n]) for n in range(20)})
    assert counted.as_dict() == by_index.as_dict()
    names = [
        {**row, "index": [f"{place}.png" for place in range(n * SIZE, (n + 1) * SIZE)]} for n, row in enumerate(rows)
    ]
    named = choose(trained, names, SHORT, labels={f"{8 * n}.png": int(labels[8 * n]) for n in range(20)})
    assert named.as_dict() == by_index.as_dict()


def test_a_data_module_gives_its_stream_and_its_source_images():
    net = lightning_tta.create_backbone("timm/test_resnet", 10).eval()
    data = DigitsData(batch_size=8, num_images=32, domains=["gamma"], cache_dir="none")
    data.prepare_data()
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    labels = dict(zip(batch["index"].tolist(), batch["label"].tolist(), strict=True))
    found = choose(net, data, "output_shift", labels=labels)
    assert [each["problem"] for each in found.candidates] == ["", ""]
    right = float((net(batch["image"]).argmax(1) == batch["label"]).double().mean())
    assert found.candidates[0]["scores"]["labels"] == pytest.approx(right)


def test_the_budget_holds(trained, shifted):
    images, _ = shifted
    whole = choose(trained, images.split(16), SHORT)
    assert whole.passes == sum(each["passes"] for each in whole.candidates) == 8 * (2 + 3 + 4)
    assert whole.left_out == []
    less = choose(trained, images.split(16), SHORT, budget=40)
    assert less.passes == 4 * 9
    assert less.left_out == ["the budget lasts for 4 of 8 batches"]
    little = choose(trained, images.split(16), SHORT, budget=30)
    assert little.passes == 2 + 5 * 5 <= 30
    assert little.left_out[0] == "tent (lr 0.0001): the budget is too small for it"
    for budget in (3, 4 * 5 + 2 - 1):  # 2: tent has seen the first batch
        with pytest.raises(ConfigError, match=r"too small for any candidate.* at least 22"):
            choose(trained, images.split(16), SHORT, budget=budget)
    least = choose(trained, images.split(16), SHORT, budget=4 * 5 + 2)
    assert (least.passes, least.images) == (2 + 4 * 5, 4 * 16)


def test_bad_candidates_are_noted(trained, shifted):
    images, _ = shifted
    found = choose(trained, images, ["foa", "eata", "norm"], batch_size=SIZE)
    assert [bool(each["problem"]) for each in found.candidates] == [False, True, True, False]
    assert [bool(each["scores"]) for each in found.candidates] == [True, False, False, True]
    assert "needs source images" in str(found)


def test_an_iterator_of_source_images_is_for_all_candidates(trained, shifted):
    images, labels = draw(40, 0)
    needing, source = ["output_shift", "eata"], [{"image": images, "label": labels}]
    once = choose(trained, shifted[0], needing, batch_size=SIZE, source_batches=iter(source))
    assert [each["problem"] for each in once.candidates] == ["", "", ""]
    assert once.as_dict() == choose(trained, shifted[0], needing, batch_size=SIZE, source_batches=source).as_dict()


def test_what_is_written_can_be_read_and_adapts(trained, shifted, tmp_path):
    images, labels = shifted
    every = {"method": "tent", "lr": 0.05, "statistics": "batch", "reset_every": 2}
    found = choose(trained, images, every, batch_size=SIZE, labels=dict(enumerate(labels.tolist())))
    assert found.method == "tent"
    content = json.loads((found.write(tmp_path / "new") / "choice.json").read_text())
    assert content == found.as_dict()
    assert {"choice", "confidence", "why", "candidates"} <= set(content)
    assert {"name", "method", "options", "scores"} <= set(content["candidates"][0])
    text = (tmp_path / "new/choice.md").read_text()
    assert found.why in text
    assert "| **tent (lr 0.05, statistics batch, reset_every 2)** |" in text
    method, fresh = found.adapt(trained), adapt(trained, "tent", lr=0.05)
    parts = images.split(SIZE)
    first = [method(part) for part in parts[:3]]
    assert torch.equal(first[0], fresh(parts[0]))
    assert not torch.equal(first[2], fresh(parts[2]))  # which has gone on
    fresh.reset()
    assert torch.equal(first[2], fresh(parts[2]))
    assert isinstance(found, Choice)
    again, plain = copy.deepcopy(found.adapt(trained)), adapt(trained, "tent", lr=0.05)
    again(parts[0])
    again.load_state_dict(method.state_dict())  # after three calls: the next reset is before the fifth
    plain.load_state_dict(method.state_dict())
    rest = [(method(part), again(part), plain(part)) for part in (parts[3], parts[0])]
    assert all(torch.equal(mine, other) for mine, other, _ in rest)
    assert torch.equal(rest[1][0], first[0])
    assert not torch.equal(rest[1][2], first[0])


@pytest.mark.parametrize(
    ("data", "options", "error", "words"),
    [
        (lambda x: x, {"batches": 3}, ConfigError, "batches"),
        (lambda x: x, {"budget": 0}, ConfigError, "budget"),
        (lambda x: x, {"labels": {9999: 1}}, ConfigError, "None of the 1 labels"),
        (lambda x: x, {"labels": 5}, ConfigError, "bring no 'label'"),
        (lambda x: x, {"labels": [1, 2, 3]}, ConfigError, "dict\\(enumerate"),
        (lambda x: x, {"labels": {0: 1, 1: 5}}, ConfigError, "0 to 4; image 1 of the trial has 5"),
        (lambda x: x, {"labels": {0: -1}}, ConfigError, "has -1"),
        (lambda x: x, {"labels": {0: 1.5}}, ConfigError, "has 1.5"),
        (lambda x: x, {"labels": {0: "cat"}}, ConfigError, "has 'cat'"),
        (lambda x: [{"image": x[:8], "label": [9] * 8}] * 4, {"labels": 3}, ConfigError, "has 9"),
        (lambda x: [{"image": x[:8], "label": [1] * 3}] * 4, {}, InputError, "3 values of 'label'"),
        (lambda x: [{"image": x[:8], "index": [1] * 3}] * 4, {}, InputError, "3 values of 'index'"),
        (lambda x: [x[:8], x[:8, :, :8]] * 2, {}, InputError, "batch 1"),
        (lambda x: x.numpy(), {}, InputError, "ndarray"),
        (lambda x: x, {"candidates": []}, ConfigError, "candidates is empty"),
        (lambda x: x, {"candidates": "tint"}, ConfigError, "tent"),
        (lambda x: x[:40], {}, DataError, "1 batches"),
        (lambda x: x[0], {}, InputError, "B, C, H, W"),
        (lambda x: "folder", {}, ConfigError, "ImageFolderData"),
        (lambda x: 3, {}, ConfigError, "ImageFolderData"),
        (lambda x: [{"picture": x}], {}, InputError, "'image'"),
        (lambda x: x * 255, {}, InputError, "cannot predict the images of batch 0"),
        (lambda x: torch.cat([x[:SIZE], x[SIZE:] * 255]), {}, InputError, "batch 1: Pixels must be"),
        (lambda x: x * torch.nan, {}, InputError, "None of the 160 images can be used"),
        (lambda x: [x[:8] * torch.nan] * 5, {}, InputError, "None of the 40 images can be used"),
        (lambda x: [{"image": x[:8], "index": [*range(8)]}] * 4, {"labels": {1: 1}}, ConfigError, "0 names 4 of"),
        (lambda x: [{"image": x[:8], "index": ["a"] * 8}] * 4, {"labels": {"a": 1}}, ConfigError, "'a' names 32 of"),
        (lambda x: x, {"seed": "a"}, ConfigError, "seed"),
        (lambda x: x, {"seed": 2**64}, ConfigError, "seed"),
        (lambda x: x, {"candidates": {"method": "tent", "rate": 1}}, ConfigError, r"'tent \(rate 1\)': .*no option"),
        (lambda x: x, {"candidates": ["norm", {"method": "tent", "lr": -1}]}, ConfigError, "lr must be"),
    ],
)
def test_what_is_wrong_is_said(trained, shifted, data, options, error, words):
    with pytest.raises(error, match=words):
        choose(trained, data(shifted[0]), **{"candidates": SHORT, "batch_size": SIZE, **options})


def test_what_is_no_net_is_said(shifted):
    with pytest.raises(ConfigError, match=r"torch\.nn\.Module"):
        choose("resnet", shifted[0], SHORT)
