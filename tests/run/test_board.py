"""What a predict run measures beside accuracy, and what TensorBoard gets."""

import copy
import inspect
import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn

from lightning_tta import ConfigError, DigitsData, TestTimeAdaptation, adapt
from lightning_tta.methods import T3A, CoTTA, MetaTTT, Norm, Source, Tent
from lightning_tta.run import board
from lightning_tta.run.measures import peak_memory, source_accuracy
from nets import make_net, same
from runs import callbacks_of, directory_of

pytestmark = pytest.mark.usefixtures("one_thread")
TENT = partial(Tent, lr=0.3, optimizer="sgd")


def data(**options):
    return DigitsData(**{"domains": ["contrast", "haze"], "num_images": 40, "batch_size": 20, **options})


def run(
    directory, method=TENT, *, backbone=None, loader=None, tensorboard=False, inference_mode=True, more=(), **options
):
    """Run a stream; returns the module and ``report.json``."""
    callbacks = [*callbacks_of(options), *more]
    module = TestTimeAdaptation(method, backbone=backbone or make_net("bn", 10), **options)
    logger = TensorBoardLogger(directory.parent, directory.name, "") if tensorboard else False
    trainer = Trainer(
        accelerator="cpu", logger=logger, default_root_dir=directory, enable_progress_bar=False, callbacks=callbacks,
        enable_model_summary=False, enable_checkpointing=False, inference_mode=inference_mode,
    )  # fmt: skip
    trainer.predict(module, **({"datamodule": data()} if loader is None else {"dataloaders": loader}))
    return module, json.loads((directory_of(directory) / "report.json").read_text())


def test_peak_memory_counts_what_was_held():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(int(before["peak_memory_mb"] + 200) * 250_000)  # MB
    del held
    after = peak_memory(torch.device("cpu"))
    assert before["peak_memory"] == after["peak_memory"] == "resident, of the process's whole life"
    assert after["peak_memory_mb"] > before["peak_memory_mb"] + 100


def test_forgetting_by_hand(tmp_path):
    module, report = run(tmp_path / "run", measure_forgetting=True)
    assert report["peak_memory_mb"] > 50
    clean = data().clean("test")
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(0))[:40]
    right = 0
    for part in order.split(20):
        prediction = module.method.predict(clean.images(part).float() / 255, statistics="batch").argmax(1)
        right += int((prediction == clean.labels[part]).sum())
    assert report["source_accuracy_after"] == right / 40

    untouched = run(tmp_path / "source", Source, measure_forgetting=True)[1]
    assert untouched["source_accuracy_after"] == source_accuracy(
        Source(make_net("bn", 10)), data(), None, torch.device("cpu")
    )


def test_forgetting_changes_no_prediction_and_is_off_by_default(tmp_path):
    _, plain = run(tmp_path / "plain")
    _, measured = run(tmp_path / "measured", measure_forgetting=True)
    assert "source_accuracy_after" not in plain
    assert plain["accuracy"] == measured["accuracy"]
    texts = [(directory_of(tmp_path / name) / "predictions.csv").read_text() for name in ("plain", "measured")]
    assert texts[0] == texts[1]


def test_forgetting_needs_source_images(tmp_path):
    loader = torch.utils.data.DataLoader([{"image": torch.rand(3, 32, 32)}] * 4, batch_size=2)
    with pytest.raises(ConfigError, match="measure_forgetting"):
        run(tmp_path / "run", loader=loader, measure_forgetting=True)


def test_classes_that_the_net_was_cut_to(tmp_path):
    class FirstPixel(nn.Module):
        def forward(self, images):
            return torch.stack([torch.ones(len(images)), torch.zeros(len(images))], 1)

    found = source_accuracy(Source(FirstPixel()), data(num_images=None), [3, 8], torch.device("cpu"))
    labels = data().clean("test").labels
    threes, eights = (int((labels == k).sum()) for k in (3, 8))
    assert found == threes / (threes + eights)


def test_tensorboard_of_a_finished_run(tmp_path):
    _, report = run(tmp_path / "run", TENT, tensorboard=True)
    events = EventAccumulator(str(directory_of(tmp_path / "run")), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert directory_of(tmp_path / "run").name == "run"  # this one was named
    assert tags["images"] == ["images"]
    assert tags["histograms"] == ["entropies"]
    images = events.Images("images")
    assert [image.step for image in images] == [20, 40]  # images seen, in the first two batches
    assert images[0].width >= 4 * (board.SIDE + board.GAP)
    assert [h.step for h in events.Histograms("entropies")] == [20, 40, 60, 80]
    assert events.Scalars("hp_metric")[-1].value == pytest.approx(report["accuracy"])
    assert events.Scalars("adapt/accuracy")[-1].value == pytest.approx(report["accuracy"])
    assert all(tag.startswith(("adapt/", "hp_metric", "hp/")) for tag in tags["scalars"])
    assert len(tags["scalars"]) <= 12
    assert "_hparams_/experiment" in events.summary_metadata
    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    said = HParamsPluginData.FromString(start).session_start_info.hparams
    assert said["method"].string_value == "tent"
    assert said["batch_size"].number_value == 20
    assert (said["lr"].number_value, said["optimizer"].string_value) == (0.3, "sgd")
    assert set(inspect.signature(Tent).parameters) - {"model"} <= set(said)  # defaults too


def tags_of(directory):
    events = EventAccumulator(str(directory))
    events.Reload()
    return events.Tags()["scalars"]


def test_curves_of_all_methods_have_one_name_and_the_rest_is_an_option(tmp_path):
    plain = []
    for method in (Source, TENT):
        run(tmp_path / method_name(method), method, tensorboard=True, log_images=0)
        plain.append(set(tags_of(directory_of(tmp_path / method_name(method)))))
    assert plain[0] - plain[1] == set()
    assert plain[1] - plain[0] <= {"adapt/loss"}
    run(tmp_path / "more", TENT, tensorboard=True, more=[board.StreamBoard(images=0, details=True)])
    more = set(tags_of(directory_of(tmp_path / "more"))) - plain[1]
    assert {"domain/contrast", "domain/haze", "method/forwards"} <= more
    assert all(tag.startswith(("domain/", "method/")) for tag in more)


def method_name(method):
    return getattr(method, "func", method).__name__


def test_a_run_is_named_by_method_and_stream(tmp_path):
    run(tmp_path / "runs", Source)
    assert directory_of(tmp_path / "runs").name.startswith("source-iid-")


def test_hyper_parameters_are_flat_and_without_paths_of_classes():
    nested = {
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}},
        "weights": None,
        "k": {"a": 1},
    }
    assert board.plain(nested) == {"optimizer": "AdamW", "optimizer.lr": 0.1, "weights": "-", "k.a": 1}


def test_lines_below_a_picture_do_not_overlap():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 2), nn.LayerNorm(2))
    names = ["a_class_with_a_long_name", "another_class_of_a_long_name"]
    strip = board.draw(adapt(net, "tent"), torch.rand(2, 3, 1, 1), torch.zeros(2), torch.tensor([1, 1]), names)
    width = strip.shape[1] // 2
    below = strip[board.SIDE :]
    assert width > board.SIDE + 60  # wider than the image
    assert (below[:, width - board.GAP + 2 : width] == 255).all()  # the gap between two columns is white
    assert (below[:, -board.GAP + 2 :] == 255).all()  # the last one is not cut
    assert (below < 255).any()


class Noisy(nn.Module):
    """A net that draws random numbers in its pass."""

    def __init__(self, net):
        super().__init__()
        self.net, self.head = net, net.head

    def forward(self, images):
        return self.net(images + 0.1 * torch.randn_like(images))


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize(
    ("method", "wrap"),
    [
        (TENT, None),
        (partial(Norm, momentum=0.3), Noisy),
        (partial(CoTTA, lr=0.01, views=2), None),
        (T3A, None),
        (partial(MetaTTT, episodic=False), None),
    ],
    ids=["tent", "norm", "cotta", "t3a", "meta_ttt"],
)
def test_pictures_do_not_change_one_bit(tmp_path, method, wrap, inference_mode):
    ends = []
    for count in (0, 4):
        torch.manual_seed(0)
        net = make_net("bn", 10) if wrap is None else wrap(make_net("bn", 10))
        how = {"tensorboard": True, "log_images": count, "inference_mode": inference_mode}
        module, _ = run(tmp_path / str(count), method, backbone=net, **how)
        ends.append(module.method.state_dict())
    texts = [(directory_of(tmp_path / str(count)) / "predictions.csv").read_text() for count in (0, 4)]
    assert texts[0] == texts[1]
    assert same(*ends)
    source = {name: module.method.source_value(name) for name in module.method.adaptable}
    assert not same(source, module.method.adaptable)  # it did adapt


def test_pictures_can_be_off(tmp_path):
    for count, logged in ((0, []), (3, ["images"])):
        run(tmp_path / str(count), Norm, tensorboard=True, log_images=count)
        events = EventAccumulator(str(directory_of(tmp_path / str(count))))
        events.Reload()
        assert events.Tags()["images"] == logged
    with pytest.raises(ConfigError, match="images"):
        board.StreamBoard(images=-1)


def test_nothing_is_drawn_that_nobody_sees(tmp_path, monkeypatch):
    monkeypatch.setattr(board, "draw", None)
    run(tmp_path / "nobody")
    with pytest.raises(TypeError):
        run(tmp_path / "seen", tensorboard=True)


def test_the_pictures_show_the_source_of_a_net_that_has_changed():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 2), nn.LayerNorm(2))
    asked = []
    images = torch.rand(5, 3, 1, 1)
    expected = net(images[:2])
    method = adapt(net, "tent", in_place=True)
    net.register_forward_hook(lambda module, args, output: asked.append(output))
    with method.hold(), torch.no_grad():
        for tensor in method.adaptable.values():
            tensor.sub_(3)
    learned = copy.deepcopy(method.state_dict())
    strip = board.draw(method, images[:2], torch.zeros(5), torch.tensor([1, -1, 0, 0, 0]), None)
    assert strip.shape[1:] == (2 * (board.SIDE + board.GAP), 3)
    assert torch.equal(asked[0], expected)
    assert same(method.state_dict(), learned)
    grey = images[:1, :1].expand(1, 3, 1, 1)
    assert board.draw(method, grey, torch.zeros(1), torch.zeros(1), ["cat", "dog"]).shape[1:] == (
        board.SIDE + board.GAP,
        3,
    )
    assert len(asked) == 2


@pytest.mark.parametrize(("prefix", "events"), [("", 1), ("a", 2)])
def test_numbers_of_a_batch_are_one_event_with_the_same_curves(tmp_path, prefix, events):
    logger = TensorBoardLogger(tmp_path, name="", version="", prefix=prefix)
    board.log_numbers(logger, {"adapt/loss": 0.5, "adapt/entropy": 0.25}, 7)
    logger.experiment.close()
    (file,) = tmp_path.glob("events*")
    seen = [event for event in EventFileLoader(str(file)).Load() if event.summary.value]
    assert len(seen) == events
    curves = EventAccumulator(str(tmp_path)).Reload()
    for name, value in (("adapt/loss", 0.5), ("adapt/entropy", 0.25)):
        tag = f"{prefix}-{name}" if prefix else name
        assert [(point.step, point.value) for point in curves.Scalars(tag)] == [(7, value)]
