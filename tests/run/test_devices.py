"""Which device a run touches and names, and whether its numbers come again."""

import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_tta import ConfigError, DigitsData, SourceClassifier, TestTimeAdaptation, adapt
from lightning_tta.benchmark.config import NetConfig, StreamConfig
from lightning_tta.benchmark.runner import Benchmark
from lightning_tta.files import environment
from lightning_tta.methods import Tent
from lightning_tta.report.runs import repeat_problem
from lightning_tta.run import outputs
from nets import make_net
from runs import directory_of

pytestmark = pytest.mark.usefixtures("one_thread")
TENT = partial(Tent, lr=1e-2, optimizer="sgd")  # torch's Adam asks for the current stream of the GPU, wherever it runs


def data():
    return DigitsData(domains=["contrast"], num_images=16, batch_size=8)


def trainer(root, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(accelerator="cpu", default_root_dir=root, **quiet, **options)


def predict(root, **options):
    module = TestTimeAdaptation(TENT, backbone=make_net("bn", num_classes=10))
    trainer(root, **options).predict(module, datamodule=data(), return_predictions=False)
    return module


def report_of(root):
    return json.loads((directory_of(root) / "report.json").read_text())


@pytest.fixture
def gpu_that_must_not_be_touched(monkeypatch):
    """A machine with a GPU, as far as torch says, on which whoever opens a CUDA context fails."""

    def touched(*args):
        raise AssertionError("a CUDA context was opened in a run on the CPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *args, **options: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args, **options: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "_lazy_init", touched)
    monkeypatch.setattr(torch.Tensor, "pin_memory", touched)


@pytest.mark.usefixtures("gpu_that_must_not_be_touched")
def test_runs_on_the_cpu_open_no_cuda_context(tmp_path):
    predict(tmp_path)
    module = SourceClassifier("cifar/resnet20", num_classes=10, optimizer=partial(torch.optim.SGD, lr=0.1))
    trainer(tmp_path / "fit", max_epochs=1, limit_train_batches=1).fit(module, datamodule=data())
    assert list((tmp_path / "fit").rglob("*.ckpt"))  # the random states are in it


def test_batches_are_pinned_for_a_gpu_alone(tmp_path, monkeypatch):
    module = data()
    assert not module.predict_dataloader().pin_memory  # nobody has said where they go
    module.trainer = trainer(tmp_path)
    assert not module.predict_dataloader().pin_memory
    monkeypatch.setattr(type(module.trainer.strategy), "root_device", torch.device("cuda", 0))
    assert module.predict_dataloader().pin_memory


def test_the_device_of_the_run_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Chip {device.index}")
    assert environment(torch.device("cuda", 1))["device"] == "Chip 1"
    asked = []

    def fake(device):
        asked.append(device)
        return {**environment(), "device": "Chip X"}

    monkeypatch.setattr(outputs, "environment", fake)
    result = Benchmark(
        output=str(tmp_path),
        data={"class_path": "DigitsData", "init_args": {"domains": ["contrast"], "num_images": 10}},
        nets={"bn": NetConfig(source_ckpt="none", backbone="timm/test_resnet", num_classes=10)},
        streams={"iid": StreamConfig(kind="iid", data={"batch_size": 10})},
        methods={"source": {"class_path": "Source"}},
        trainer={"accelerator": "cpu"},
    ).run()
    assert asked == [torch.device("cpu")]
    assert result["environment"]["device"] == "Chip X"
    assert [row["device"] for row in result["rows"]] == ["Chip X"]
    assert "Chip X; torch" in (tmp_path / "benchmark.md").read_text()


@pytest.fixture
def any_kernels():
    """Leaves the process as it was: Lightning's ``deterministic`` is for good."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("any_kernels")
@pytest.mark.parametrize(("choice", "exact"), [(None, False), (True, True), ("warn", False)])
def test_the_report_says_how_it_was_computed(tmp_path, choice, exact):
    module = predict(tmp_path, deterministic=choice)
    report = report_of(tmp_path)
    assert module.method.execution.deterministic is exact
    assert report["execution"] == {
        "capture": "auto",
        "captured": [],
        "compile": False,
        "deterministic": exact,
        "precision": None,
        "lean": "auto",
    }
    assert report["repeatable"] is True  # on a CPU with as many threads, whatever the kernels
    assert repeat_problem(report) == ""


def test_how_a_method_was_made_to_compute_stands(tmp_path):
    def make(net):
        return adapt(net, "tent", lr=1e-2, precision="bf16", capture=False, deterministic=True, in_place=True)

    module = TestTimeAdaptation(make, backbone=make_net("bn", num_classes=10), lean=True)
    trainer(tmp_path).predict(module, datamodule=data(), return_predictions=False)
    execution = report_of(tmp_path)["execution"]
    assert (execution["precision"], execution["capture"], execution["lean"]) == ("bf16", False, True)
    assert execution["deterministic"] is True


@pytest.mark.parametrize("option", ["capture", "compile"])
def test_what_a_device_cannot_do_is_refused_before_anything_is_written(tmp_path, option):
    module = TestTimeAdaptation(TENT, backbone=make_net("bn", num_classes=10), **{option: True})
    with pytest.raises(ConfigError, match=rf"{option}=True is not possible: CUDA graphs need.*'cpu'"):
        trainer(tmp_path).predict(module, datamodule=data(), return_predictions=False)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_speed_is_no_part_of_what_a_run_is(tmp_path):
    digests = set()
    for number, options in enumerate(({}, {"capture": False}, {"lean": True})):
        module = TestTimeAdaptation(TENT, backbone=make_net("bn", num_classes=10), **options)
        trainer(tmp_path / str(number)).predict(module, datamodule=data(), return_predictions=False)
        digests.add(report_of(tmp_path / str(number))["run_digest"])
    assert len(digests) == 1


@pytest.mark.parametrize(("exact", "repeatable"), [(False, False), (True, True)])
def test_a_gpu_repeats_itself_where_it_must(tmp_path, monkeypatch, exact, repeatable):
    """The run is on the CPU; the report believes it was on a GPU."""
    written = outputs.StreamReport.on_end

    def on_end(self, run):
        run.device = torch.device("cuda", 0)
        run.method.execution = type(run.method.execution)(deterministic=exact)
        written(self, run)

    monkeypatch.setattr(outputs.StreamReport, "on_end", on_end)
    monkeypatch.setattr(outputs, "environment", lambda device: {**environment(), "device": "Chip X"})
    monkeypatch.setattr(outputs, "peak_memory", lambda device: {})
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(0))
    predict(tmp_path)
    report = report_of(tmp_path)
    assert report["repeatable"] is repeatable
    said = repeat_problem(report)
    assert ("Chip X" in said) is not repeatable
    assert ("--trainer.deterministic true" in said) is not repeatable
