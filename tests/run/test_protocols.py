"""Protocols that the data module describes and the test-time module carries out."""

import json
import warnings
from functools import partial
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_tta import ConfigError, DataError, DigitsData, NotPreparedError, TestTimeAdaptation, adapt
from lightning_tta.cli.main import main
from lightning_tta.cli.stream import list_stream
from lightning_tta.methods import Source, Tent
from lightning_tta.run.batches import warn_of_size
from lightning_tta.run.pace import Pace
from nets import make_net
from runs import callbacks_of, directory_of

pytestmark = pytest.mark.usefixtures("one_thread")
TENT = partial(Tent, lr=1e-2)


class Spy(Source):
    """Notes what happens to it."""

    def __init__(self, model):
        super().__init__(model)
        self.events = []

    def forward(self, images):
        self.events.append("adapt")
        logits = super().forward(images)
        self.stats["backwards"] = 1.0
        return logits

    def predict(self, images, **options):
        self.events.append("predict")
        return super().predict(images, **options)

    def reset(self):
        self.events.append("reset")
        super().reset()


def run(root, method=TENT, *, data=None, net=None, **options):
    data = data or DigitsData(domains=["gaussian_noise", "contrast"], num_images=40, batch_size=16)
    net = net or make_net("bn", num_classes=10)
    callbacks = callbacks_of(options)
    module = TestTimeAdaptation(method, backbone=net, **options)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": root}
    outputs = Trainer(**quiet, callbacks=callbacks).predict(module, datamodule=data)
    return module, outputs, json.loads((directory_of(root) / "report.json").read_text())


# Blind spots -------------------------------------------------------------------------------------------------------


def test_blind_spots_are_what_the_source_gets_wrong(tmp_path):
    data = DigitsData(domains=["gaussian_noise", "contrast"], num_images=40, batch_size=16, stream="blind_spot")
    with pytest.raises(ConfigError, match="set_blind_spots"):
        data.predict_dataloader()
    net = make_net("bn", num_classes=10)
    module, outputs, report = run(tmp_path, Spy, data=data, net=net)
    names = ["gaussian_noise:blind_spots", "gaussian_noise", "contrast:blind_spots", "contrast"]
    assert report["protocol"]["domains"] == names
    sizes = report["protocol"]["images_per_domain"]
    assert sizes[1] == sizes[3] == 40
    label, prediction, domain = (
        torch.cat([output[key] for output in outputs]) for key in ("label", "prediction", "domain")
    )
    correct = label == prediction
    for blind, whole in ((0, 1), (2, 3)):
        assert not correct[domain == blind].any()  # Source predicts as it did
        assert int((domain == blind).sum()) == int((~correct[domain == whole]).sum()) == sizes[blind]
    assert report["accuracy"] == pytest.approx(float(correct[(domain == 1) | (domain == 3)].float().mean()))
    index = torch.cat([output["index"] for output in outputs])
    assert sorted(index.tolist()) == list(range(sum(sizes)))
    # Adapts on the blind spots, predicts the whole domain, starts anew at the next.
    batches = [-(-size // 16) for size in sizes]
    expected = ["adapt"] * batches[0] + ["predict"] * 3 + ["reset"] + ["adapt"] * batches[2] + ["predict"] * 3
    assert module.method.events == expected


def test_frozen_pass_is_that_of_the_adapted_net(tmp_path):
    data = DigitsData(domains=["contrast"], num_images=40, batch_size=16, stream="blind_spot")
    _, outputs, _ = run(tmp_path, data=data)
    alone = adapt(make_net("bn", num_classes=10), "tent", lr=1e-2)
    for batch, output in zip(data.predict_dataloader(), outputs, strict=True):
        logits = (
            alone(batch["image"]) if int(batch["domain"][0]) == 0 else alone.predict(batch["image"], statistics="batch")
        )
        assert torch.equal(output["logits"], logits)


# A stream that does not wait ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (1.0, "a..a..a..a"),  # one forward and one backward: 3 passes
        (1.5, "a.a.a.a.a."),
        (2.0, "a.a.a.a.a."),  # busy until 3; batches at 2 and 4
        (2.9, "a.a.a.a.a."),
        (3.0, "aaaaaaaaaa"),
        (0.6, "a....a...."),
    ],
)
def test_pace_by_hand(interval, expected):
    pace, found = Pace("passes", interval), ""
    for _ in range(10):
        free = pace.take()
        found += "a" if free else "."
        if free:
            pace.work({"forwards": 1.0, "backwards": 1.0}, seconds=99.0)
    assert found == expected
    assert pace.missed == expected.count(".")


def test_seconds_are_charged_as_measured():
    pace = Pace("seconds", 0.5)
    assert pace.take()
    pace.work({"forwards": 100.0}, seconds=0.9)
    assert [pace.take() for _ in range(3)] == [False, True, True]


def test_a_slow_method_misses_samples_and_predicts_them_as_it_is(tmp_path):
    data = DigitsData(domains=["contrast"], num_images=96, batch_size=16, charge="passes")
    _, outputs, report = run(tmp_path, data=data)
    assert (report["batches"], report["batches_not_adapted_on"], report["backwards"]) == (6, 4, 2)
    assert (report["protocol"]["charge"], report["protocol"]["interval"]) == ("passes", 1)
    alone = adapt(make_net("bn", num_classes=10), "tent", lr=1e-2)
    for number, (batch, output) in enumerate(zip(data.predict_dataloader(), outputs, strict=True)):
        expected = alone.predict(batch["image"], statistics="batch") if number % 3 else alone(batch["image"])
        assert torch.equal(output["logits"], expected)
    _, _, waiting = run(tmp_path / "b", data=DigitsData(domains=["contrast"], num_images=96, batch_size=16))
    assert waiting["batches_not_adapted_on"] == 0
    assert "charge" not in waiting["protocol"]


def test_a_method_as_fast_as_the_source_misses_nothing(tmp_path):
    data = DigitsData(domains=["contrast"], num_images=96, batch_size=16, charge="passes")
    assert run(tmp_path, Source, data=data)[2]["batches_not_adapted_on"] == 0


# Classes, resets, source data --------------------------------------------------------------------------------------


def test_a_net_cut_to_some_classes(tmp_path):
    net = make_net("bn", num_classes=12)
    classes = [11, 3, 0, 1, 2, 4, 5, 6, 7, 8, 9]
    _, whole, before = run(tmp_path / "a", Source, net=make_net("bn", num_classes=12))
    _, cut, after = run(tmp_path / "b", Source, net=net, classes=classes)
    logits = torch.cat([output["logits"] for output in whole])
    assert torch.allclose(torch.cat([output["logits"] for output in cut]), logits[:, classes], atol=1e-6)
    label, own = (torch.cat([output["label"] for output in outputs]) for outputs in (whole, cut))
    assert [classes[position] for position in own.tolist()] == label.tolist()
    assert after["accuracy"] == pytest.approx(float((logits[:, classes].argmax(1) == own).float().mean()))
    assert before["protocol"]["hash"] != after["protocol"]["hash"]


def test_wrong_classes(tmp_path):
    with pytest.raises(ConfigError, match="12 logits"):
        run(tmp_path, net=make_net("bn", num_classes=12), classes=[0, 12])
    with pytest.raises(DataError, match=r"label \d, which is not among the 2"):
        run(tmp_path, net=make_net("bn", num_classes=12), classes=[0, 1])
    with pytest.raises(ConfigError, match="classes"):
        run(tmp_path, classes="imagenet_b")


def test_reset_every_few_batches(tmp_path):
    data = DigitsData(domains=["gaussian_noise", "contrast"], num_images=80, batch_size=16, stream="continual")
    module, _, report = run(tmp_path, Spy, data=data, reset_every=3)
    assert module.method.events == (["adapt"] * 3 + ["reset"]) * 3 + ["adapt"]
    assert report["resets"] == 3
    plain = run(tmp_path / "b", Spy, data=data)[2]
    assert plain["protocol"]["hash"] == report["protocol"]["hash"]  # part of the method
    with pytest.raises(ConfigError, match="reset_every"):
        run(tmp_path / "c", reset_every=0)


class Prepared(Source):
    """Wants source data, and gradients while it sees them."""

    needs_source = True

    def prepare(self, source_batches):
        batches = list(source_batches)
        self.images = sum(len(batch["image"]) for batch in batches)
        weight = next(self.model.parameters()).requires_grad_()
        loss = nn.functional.cross_entropy(self.model(batches[0]["image"]), batches[0]["label"])
        self.gradient = torch.autograd.grad(loss, weight)[0]
        super().prepare(batches)


def test_source_data_is_shown_before_the_stream(tmp_path):
    module, _, _ = run(tmp_path, Prepared, source_images=50)
    assert module.method.images == 50
    assert module.method.gradient.abs().sum() > 0
    loader = torch.utils.data.DataLoader([{"image": torch.zeros(3, 32, 32)}], batch_size=1)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path / "b")
    with pytest.raises(NotPreparedError, match="data module"):
        trainer.predict(TestTimeAdaptation(Prepared, backbone=make_net("bn", num_classes=10)), loader)


class Twice(Source):
    """Looks at the first source batch, then at all."""

    needs_source = True

    def prepare(self, source_batches):
        self.shown = [next(iter(source_batches)), len(Counted.read), *source_batches]
        super().prepare(source_batches)


class Counted(DigitsData):
    """Counts the training images that are read."""

    read: ClassVar[list[int]] = []

    def clean(self, split):
        images = super().clean(split)
        if split == "train":
            own = images.images
            images.images = lambda positions: self.read.extend(positions.tolist()) or own(positions)
        return images


def test_source_images_are_read_as_they_are_shown(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("lightning_tta.run.batches.with_progress", lambda *a: told.append(a) or iter(range(a[0])))
    monkeypatch.setattr(Counted, "read", [])
    data = Counted(domains=["contrast"], num_images=20)
    first, read, *again = run(tmp_path, Twice, data=data, source_images=150)[0].method.shown
    assert read == 64  # no more than the first batch
    assert len(Counted.read) == 64 + 150
    assert [len(batch["image"]) for batch in again] == [64, 64, 22]
    assert torch.equal(first["index"], again[0]["index"])
    assert torch.equal(torch.cat([batch["index"] for batch in again]), torch.tensor(Counted.read[64:]))
    assert [count for count, _ in told] == [3, 3]


def test_a_size_that_the_weights_do_not_expect(tmp_path):
    from lightning_tta import create_backbone

    net = create_backbone("cifar/resnet20", 10)
    data = DigitsData(domains=["clean"], num_images=4, image_size=40)
    with pytest.warns(UserWarning, match=r"\[3, 40, 40\].*\[3, 32, 32\]"):
        run(tmp_path, Source, data=data, net=net)
    own = create_backbone("timm/test_resnet", 10)  # of 160 pixels, but these weights are nobody's
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Images are")
        run(tmp_path / "own", Source, data=data, net=own)


@pytest.mark.parametrize(("resized", "warns"), [(232, False), (233, False), (256, True), (224, True), (None, False)])
def test_a_crop_that_the_weights_do_not_expect(resized, warns):
    images, net = torch.zeros(1, 3, 224, 224), {"name": "torchvision/resnet50", "pretrained": True}
    preprocessing = {"input_size": [3, 224, 224], "interpolation": "bilinear", "crop_pct": round(224 / 232, 4)}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warn_of_size(images, preprocessing, net, resized)
        warn_of_size(images, preprocessing, {"name": "timm/resnet50"}, resized)  # weights of somebody's own
        warn_of_size(torch.zeros(1, 3, 400, 500), preprocessing, net, 400, crop=(232, 224))
    assert [str(each.message) for each in told] == warns * [
        f"Images are resized to {resized} pixels before the middle [224, 224] is cut out, in the weights' own "
        "preprocessing to 232: accuracy may suffer. Set the data's resize (or the method's crop) to 232 unless this is "
        "meant."
    ]


# Before it is run --------------------------------------------------------------------------------------------------


def test_list_of_a_stream():
    data = DigitsData(domains=["contrast", "clean"], num_images=20, batch_size=8, stream="mixed")
    rows = list_stream(data)
    assert [row["images"] for row in rows] == [8] * 5
    for row, batch in zip(rows, data.predict_dataloader(), strict=True):
        assert row["classes"] == len(batch["label"].unique())
        assert row["largest_class"] == float(torch.bincount(batch["label"]).max()) / 8
        counts = torch.bincount(batch["domain"], minlength=2).tolist()
        assert row["domains"] == {name: n for name, n in zip(("contrast", "clean"), counts, strict=True) if n}


def test_stream_command(tmp_path, capsys):
    config = tmp_path / "a.yaml"
    config.write_text("data: {class_path: DigitsData, init_args: {domains: [contrast], num_images: 30}}\n")
    main(["stream", f"--config={config}", "--data.stream=gradual", "--data.batch_size=8", "--model.reset=never"])
    text = capsys.readouterr().out
    assert "digits: gradual stream, 270 images, 36 batches" in text
    assert "    3      6" in text  # 30 images are 8, 8, 8 and 6
    assert "contrast@1 8" in text
    assert "and 16 more" in text


def test_unlike_protocols_are_compared_on_request_only(tmp_path, capsys):
    for number, name in enumerate(("a", "b")):
        run(tmp_path / name, Source, data=DigitsData(domains=["contrast"], num_images=20, order_seed=number))
    runs = [*(str(directory_of(tmp_path / name)) for name in ("a", "b")), "--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(["report", *runs])
    assert "order_seed: 0 != 1" in capsys.readouterr().err
    main(["report", *runs, "--allow_different", "true"])
    assert "protocol" in capsys.readouterr().out
