"""Predict runs over pixels and values: figures by hand and by torchmetrics, files, resume, refusals."""

import csv
import json

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchmetrics.regression import MeanAbsoluteError, R2Score

from lightning_tta import (
    ConfigError,
    DataError,
    DigitsData,
    FinishedError,
    Guard,
    NotPreparedError,
    SegmentationFolderData,
    SourceRegressor,
    SourceSegmenter,
    StateKeeper,
    TestTimeAdaptation,
    UnsupportedModelError,
)
from lightning_tta.backbones.unet import UNet
from lightning_tta.methods import find
from lightning_tta.report import write_report
from lightning_tta.report.figures import curves_caption, curves_figure, looks
from lightning_tta.report.runs import read
from lightning_tta.report.terminal import print_report
from lightning_tta.run.board import FitBoard
from lightning_tta.run.pixels import Pixels, PixelSummary, class_iou, make_pixel_record
from lightning_tta.run.values import ValueSummary, make_value_record

K, SIDE = 4, 16
pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(predictions, targets):
    """IoU of each class over all pixels that count, by loops; None where a class is in neither."""
    ious = []
    for k in range(K):
        both = either = 0
        for p, t in zip(np.ravel(predictions), np.ravel(targets), strict=True):
            if t >= 0:
                both += p == k and t == k
                either += p == k or t == k
        ious.append(both / either if either else None)
    known = [iou for iou in ious if iou is not None]
    return ious, sum(known) / len(known)


def record(logits, target, domain, start=0):
    n = len(logits)
    outcome, index = Pixels(), torch.arange(start, start + n)
    truth = outcome.truth({"target": target}, logits, torch.full((n,), -1), None)
    rest = {"index": index, "domain": torch.tensor(domain), **truth}
    return make_pixel_record(**outcome.read(logits, torch.zeros(n, 3, 4, 4)), **rest)


def test_mean_iou_with_pixels_that_do_not_count_and_absent_classes():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, K, 8, 8, generator=generator, dtype=torch.float64)
    target = torch.randint(-1, 3, (6, 8, 8), generator=generator)  # never class 3
    logits[[2, 4, 5], 3] = -9.0  # nor predicted in the second domain
    summary = PixelSummary(["a", "b"])
    for n in range(3):
        summary.update(record(logits[2 * n : 2 * n + 2], target[2 * n : 2 * n + 2], [n > 0, n > 1], 2 * n))
    domain = torch.tensor([0, 0, 1, 0, 1, 1])
    prediction, result = logits.argmax(1), summary.result()
    for name, rows in (("a", domain == 0), ("b", domain == 1), (None, domain >= 0)):
        part = result if name is None else result["domains"][name]
        ious, mean = by_hand(prediction[rows], target[rows])
        assert [iou is None for iou in part["class_iou"]] == [False, False, False, name == "b"]
        assert [iou is None for iou in ious] == [False, False, False, name == "b"]
        assert [iou or 0 for iou in part["class_iou"]] == pytest.approx([iou or 0 for iou in ious])
        assert part["mean_iou"] == pytest.approx(mean)
        jaccard = MulticlassJaccardIndex(K, ignore_index=-1)
        accuracy = MulticlassAccuracy(K, average="micro", ignore_index=-1)
        assert part["mean_iou"] == pytest.approx(float(jaccard(prediction[rows], target[rows])), abs=1e-6)
        assert part["accuracy"] == pytest.approx(float(accuracy(prediction[rows], target[rows])), abs=1e-6)
    assert result["labelled_pixels"] == int((target >= 0).sum())
    assert summary.mean_iou == result["mean_iou"]
    assert class_iou(torch.zeros(K, K + 1)) is None


def test_an_image_without_a_prediction_is_a_miss_of_its_classes():
    logits = torch.randn(2, K, 4, 4)
    logits[1] = torch.nan
    target = torch.zeros(2, 4, 4, dtype=torch.int64)
    one = record(logits, target, [0, 0])
    assert bool((one.outputs()["prediction"][1] == -1).all())
    summary = PixelSummary(["a"])
    summary.update(one)
    hits = int((logits[0].argmax(0) == 0).sum())
    assert summary.result()["class_iou"][0] == pytest.approx(hits / 32)
    assert summary.accuracy == pytest.approx(hits / 32)


def test_errors_of_values_are_those_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9, 2, generator=generator) * 3 + 100
    target = values + torch.randn(9, 2, generator=generator)
    target[4] = values[7] = torch.nan
    domain, summary = torch.tensor([0, 0, 0, 1, 1, 0, 1, 1, 1]), ValueSummary(["a", "b"])
    for rows in (slice(0, 4), slice(4, 9)):
        summary.update(
            make_value_record(
                values=values[rows],
                target=target[rows],
                index=torch.arange(9)[rows],
                domain=domain[rows],
                label=domain[rows],
            )
        )
    result, known = summary.result(), ~(target.isnan() | values.isnan()).any(1)
    for name, rows in (("a", domain == 0), ("b", domain == 1), (None, domain >= 0)):
        part, rows = result if name is None else result["domains"][name], rows & known
        error, r2 = MeanAbsoluteError(), R2Score()
        assert part["mean_absolute_error"] == pytest.approx(float(error(values[rows].double(), target[rows].double())))
        assert part["r2"] == pytest.approx(float(r2(values[rows].double(), target[rows].double())), abs=1e-6)
    assert result["labelled_images"] == 7
    assert result["accuracy"] is None


# Whole runs


def folder(root, masks=True, count=6):
    rng = np.random.default_rng(0)
    for domain in ("day", "night"):
        for kind in ("images", "masks")[: 1 + masks]:
            (root / domain / kind).mkdir(parents=True)
        for n in range(count):
            image = rng.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8) // (3 if domain == "night" else 1)
            Image.fromarray(image).save(root / domain / f"images/{domain}{n}.png")
            if masks:
                mask = rng.integers(K, size=(SIDE, SIDE), dtype=np.uint8)
                mask[:2] = 255
                Image.fromarray(mask).save(root / domain / f"masks/{domain}{n}.png")
    return root


def scenes(root, **options):
    roots = {name: str(root / name) for name in ("day", "night")}
    return SegmentationFolderData(str(root), K, target_roots=roots, batch_size=2, cache_dir="none", **options)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet(K, width=4, depth=1)


def run(where, data, method="tent", callbacks=(), task="pixels", backbone=None, options=None, **more):
    kind = find(method)
    options = {"lr": 0.01} if options is None and method == "tent" else options or {}
    module = TestTimeAdaptation(
        lambda model: kind(model, **options), backbone=net() if backbone is None else backbone, task=task, **more
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=where, accelerator="cpu", callbacks=list(callbacks), **quiet)
    data = DataLoader(data, batch_size=None, shuffle=False) if isinstance(data, list) else data
    trainer.predict(module, data, return_predictions=False)
    return module.run.directory.path


def report_of(directory):
    return json.loads((directory / "report.json").read_text())


def lines_of(directory):
    with (directory / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_report_is_that_of_the_masks_on_disk(tmp_path, capsys):
    root = folder(tmp_path / "data")
    directory = run(tmp_path, scenes(root))
    report, lines = report_of(directory), lines_of(directory)
    assert len(lines) == report["images"] == report["labelled_images"] == 12
    for name in ("day", "night", None):
        chosen = [line for line in lines if name in (None, line["domain"])]
        masks = [np.array(Image.open(directory / line["mask"])).astype(int) for line in chosen]
        targets = [np.array(Image.open(root / line["domain"] / "masks" / line["file"])).astype(int) for line in chosen]
        targets = [np.where(target == 255, -1, target) for target in targets]
        part = report if name is None else report["domains"][name]
        ious, mean = by_hand(masks, targets)
        assert part["class_iou"] == pytest.approx(ious)
        assert part["mean_iou"] == pytest.approx(mean)
        assert [int(line["right"]) for line in chosen] == [
            int((m == t).sum()) for m, t in zip(masks, targets, strict=True)
        ]
    assert {line["mask"] for line in lines} >= {"masks/day/day0.png", "masks/night/night5.png"}
    assert report["class_names"] == ["0", "1", "2", "3"]
    assert (report["resets"], report["batches"], report["backwards"]) == (1, 6, 6)
    source = run(tmp_path, scenes(root), "source")
    assert (source / lines[0]["mask"]).is_file()
    write_report([source, directory], tmp_path / "page")
    text = (tmp_path / "page/report.md").read_text()
    assert "mean IoU %" in text
    assert f"{100 * report['mean_iou']:.1f}" in text
    assert "Differences to the source are not tested." in text
    assert text.startswith("# Test-time adaptation: folder:data, net UNet\n")
    print_report(report, directory / "report.json")
    assert "pixel" in capsys.readouterr().out
    (group,) = read([source, directory]).groups
    curve = json.loads((directory / "batches.jsonl").read_text().splitlines()[0])["mean_iou"]
    drawn = curves_figure(group, looks(group.methods)).axes[0]
    assert drawn.get_ylabel() == "mean IoU %"
    of_tent = [line.get_ydata() for line in drawn.lines if len(line.get_ydata()) == 6][-1]  # batches
    assert of_tent[0] == pytest.approx(100 * curve)
    assert "each one's mean IoU" in curves_caption(group)
    assert not group.runs[0].predictions_problem


class Kill(Callback):
    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if pl_module.run.batches == 3:
            raise RuntimeError("killed")


@pytest.mark.parametrize("method", ["tent", "cotta"])
def test_a_killed_run_goes_on_as_if_it_was_not(tmp_path, method):
    data, options = scenes(folder(tmp_path / "data")), {"reset": "never"}
    if method == "cotta":
        options["options"] = {"views": 2, "anchor_threshold": 1.0}
    whole = run(tmp_path / "whole", data, method, [StateKeeper(save_every=2)], **options)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "cut", data, method, [StateKeeper(save_every=2), Kill()], **options)
    cut = run(tmp_path / "cut", data, method, [StateKeeper(save_every=2)], **options)
    assert cut.name == whole.name
    assert (cut / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
    names = [path.relative_to(whole) for path in whole.rglob("*.png")]
    assert len(names) == 12
    assert all((cut / name).read_bytes() == (whole / name).read_bytes() for name in names)
    times = ("seconds", "seconds_per_batch", "wall_seconds", "peak_memory_mb")
    a, b = ({name: v for name, v in report_of(each).items() if name not in times} for each in (cut, whole))
    assert a == b
    with pytest.raises(FinishedError):
        run(tmp_path / "cut", data, method, **options)
    (cut / "masks/day/old.png").write_bytes(b"")
    run(tmp_path / "cut", data, method, [StateKeeper(resume="restart")], **options)
    assert len(list(cut.rglob("*.png"))) == 12


def test_without_masks_there_are_no_figures(tmp_path):
    directory = run(tmp_path, scenes(folder(tmp_path / "data", masks=False)))
    report = report_of(directory)
    assert [report[name] for name in ("mean_iou", "class_iou", "accuracy", "labelled_images")] == [None, None, None, 0]
    assert len(list(directory.rglob("*.png"))) == 12
    write_report([directory], tmp_path / "page")
    assert "mean IoU is not known" in (tmp_path / "page/report.md").read_text()


def test_a_loader_of_ones_own(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 2, 3, SIDE, SIDE, generator=generator)
    masks = torch.randint(-1, K, (4, 2, SIDE, SIDE), generator=generator)
    directory = run(tmp_path, [{"image": x, "target": y} for x, y in zip(images, masks, strict=True)], "source")
    with torch.no_grad():
        prediction = net().eval()(images.flatten(0, 1)).argmax(1)
    assert report_of(directory)["mean_iou"] == pytest.approx(by_hand(prediction, masks.flatten(0, 1))[1])
    for target, says in (
        (masks[0][:, :8], r"must be masks of whole numbers \(2, 16, 16\).*interpolate"),
        (masks[0].float(), "whole numbers"),
        (masks[0] + 10, r"class 1\d, but the net has 4 logits"),
    ):
        with pytest.raises(DataError, match=says):
            run(tmp_path / "wrong", [{"image": images[0], "target": target}], "source")


def test_what_does_not_go_with_masks_is_refused(tmp_path):
    data = scenes(folder(tmp_path / "data"))
    for name in ("eata", "neo"):
        with pytest.raises(NotPreparedError, match=r"must see training images.*train.* does not exist.*'eta'"):
            run(tmp_path / name, data, name)
    with pytest.raises(ConfigError, match="DigitsData is for task='images', and the net's task is 'pixels'"):
        run(tmp_path, DigitsData(num_images=4, domains=["clean"]))
    with pytest.raises(ConfigError, match=r"task='pixels', and the net's task is 'images'.*--model.task pixels"):
        run(tmp_path, data, "source", task="auto")
    with pytest.raises(ConfigError, match="Guard is for one class an image"):
        run(tmp_path, data, callbacks=[Guard()])
    with pytest.raises(ConfigError, match="prior= is for images with one class each"):
        run(tmp_path, data, prior="em")
    with pytest.raises(ConfigError, match="classes is for one class an image"):
        run(tmp_path, data, classes=[0, 1])
    with pytest.raises(UnsupportedModelError, match="'memo' adapts on images"):
        run(tmp_path, data, "memo")


# Values


class Brightness(nn.Module):
    """A value of an image that its norm layer shifts."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 1)

    def forward(self, images):
        return self.head(self.norm(self.conv(images)).relu().mean((2, 3)))


def value_batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(5, 4, 3, 12, 12, generator=generator)
    target = images.mean((2, 3, 4))
    target[1, 2] = torch.nan
    return [
        {"image": x, "target": y, "domain": ["ab"[n % 2]] * 4}
        for n, (x, y) in enumerate(zip(images, target, strict=True))
    ]


def test_a_run_over_values(tmp_path, capsys):
    loader = value_batches()
    loader[2]["image"][1] = torch.nan
    directory = run(tmp_path, loader, "source", task="regression", backbone=Brightness())
    report, lines = report_of(directory), lines_of(directory)
    images, targets = (torch.cat([batch[name] for batch in loader]) for name in ("image", "target"))
    with torch.no_grad():
        values = Brightness().eval()(images.nan_to_num())[:, 0]
    known = ~targets.isnan() & images.isfinite().flatten(1).all(1)
    assert report["labelled_images"] == int(known.sum()) == 18
    error = (values - targets)[known].double().abs().mean()
    assert report["mean_absolute_error"] == pytest.approx(float(error))
    assert (lines[9]["value"], lines[6]["target"]) == ("nan", "nan")
    assert float(lines[3]["value"]) == pytest.approx(float(values[3]), rel=1e-4)
    assert report["domains"].keys() == {"a", "b"}
    adapted = run(tmp_path, loader, "norm", task="regression", backbone=Brightness())
    write_report([directory, adapted], tmp_path / "page")
    text = (tmp_path / "page/report.md").read_text()
    assert "mean absolute error" in text
    assert "entropy" not in text.split("Options")[0]
    print_report(report, directory / "report.json")
    assert "R2" in capsys.readouterr().out


def test_methods_of_entropies_refuse_values_before_any_batch():
    for name in ("tent", "zerosiam", "cotta"):
        with pytest.raises(UnsupportedModelError, match="no classes"):
            TestTimeAdaptation(find(name), backbone=Brightness(), task="regression")


# Training


@pytest.mark.parametrize("kind", ["pixels", "regression"])
def test_a_training_whose_checkpoint_says_its_task(tmp_path, kind):
    if kind == "pixels":
        data = scenes(folder(tmp_path / "data"))
        (tmp_path / "data/train").symlink_to(tmp_path / "data/day")
        module = SourceSegmenter(num_classes=K, backbone_options={"width": 4, "depth": 1})
        name = "source/val_mean_iou"
    else:
        module = SourceRegressor(f"{__file__}:Brightness", scale=0.5)
        data, name = None, "source/val_mean_absolute_error"
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}
    logger = TensorBoardLogger(tmp_path, "fit", "")
    trainer = Trainer(logger=logger, callbacks=[FitBoard()], max_epochs=1, num_sanity_val_steps=0, **quiet)
    if data is None:
        batches = [{**batch, "target": batch["target"].nan_to_num(0.5)[:, None]} for batch in value_batches()]
        trainer.fit(module, *[DataLoader(batches, batch_size=None)] * 2)
    else:
        trainer.fit(module, data)
    events = EventAccumulator(str(tmp_path / "fit")).Reload()
    assert events.Scalars("hp_metric")[-1].value == pytest.approx(float(trainer.callback_metrics[name]))
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    again = TestTimeAdaptation(find("source"), source_ckpt=str(tmp_path / "best.ckpt"))
    assert again.task == kind
    images = torch.rand(2, 3, 16, 16)
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(images), module(images))
    with pytest.raises(ConfigError, match="trains for task"):
        trainer.fit(module, DigitsData())
    wrong = {"image": images, "target": torch.full((2, 16, 16), 9)}
    with pytest.raises(DataError, match=r"class 9, but num_classes is 4|values"):
        module.training_step(wrong, 0)
