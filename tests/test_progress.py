"""What a long fit and a benchmark show on a terminal: how far, and how long yet."""

import io
import re
import time
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import Progress

from lightning_tta import progress
from lightning_tta.cli.main import main
from lightning_tta.progress import grid
from lightning_tta.run import progress as run_progress
from lightning_tta.run.progress import FitProgress

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--data", "DigitsData", "--data.train_batch_size=512"]
NET = ["--model.backbone=timm/test_resnet", "--model.num_classes=10"]
FIT = ["fit", "--model=SourceClassifier", *NET, *SMALL, "--trainer.max_epochs=3", "--trainer.logger=false"]
PREDICT = ["predict", "--model.source_ckpt=none", *NET, "--data=DigitsData", "--data.domains=[clean]"]
PREDICT += ["--model.method=source", "--data.num_images=60", "--data.batch_size=10", "--trainer.logger=false"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes one second with every look at it."""
    now = iter(range(10_000))
    for module in (progress, run_progress):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(now)))


@pytest.fixture
def shown(monkeypatch):
    """What the lines of any rich bar were made to say, with how much is done."""
    said = []
    update, add = Progress.update, Progress.add_task

    def noted(self, task, **fields):
        said.append((fields.get("description"), fields.get("completed")))
        update(self, task, **fields)

    def added(self, text, *options, **fields):
        said.append((text, fields.get("total")))
        return add(self, text, *options, **fields)

    monkeypatch.setattr(Progress, "update", noted)
    monkeypatch.setattr(Progress, "add_task", added)
    return said


def test_a_fit_says_what_all_epochs_will_take(monkeypatch, shown, tmp_path):
    now = iter(range(0, 100_000, 10))
    slow = SimpleNamespace(monotonic=lambda: next(now))
    for module in (progress, run_progress):
        monkeypatch.setattr(module, "time", slow)
    main([*FIT, f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"])
    texts = [text for text, _ in shown if text and "left in all" in text]
    batches = len(texts) // 3
    assert batches > 1
    left = [re.fullmatch(r"Epoch (\d)/2, 0:(\d\d):(\d\d) left in all", text).groups() for text in texts]
    assert [int(epoch) for epoch, _, _ in left] == [0] * batches + [1] * batches + [2] * batches
    seconds = [60 * int(minutes) + int(rest) for _, minutes, rest in left]
    assert seconds == [10 * (3 * batches - done) for done in range(1, 3 * batches + 1)]  # ten a batch


def run_in_grid(args, tmp_path):
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    with grid(screen) as bars:
        whole = bars.add_task("cells", total=1)
        quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
        main([*args, f"--trainer.default_root_dir={tmp_path}", *quiet])
        assert [task.id for task in bars.tasks] == [whole]  # the run's own line is gone


@pytest.mark.parametrize(("args", "lines"), [(FIT, 3), (PREDICT, 1)], ids=["fit", "predict"])
@pytest.mark.usefixtures("clock")
def test_a_long_run_has_a_line_in_the_grid(shown, tmp_path, args, lines):
    run_in_grid(args, tmp_path)
    own = [(text, count) for text, count in shown if text and text.startswith(f"  {args[0]}")]
    (_, total), *updates = own
    assert len({text for text, _ in own}) == lines
    assert [count for _, count in updates] == list(range(total - len(updates) + 1, total + 1))
    assert len(updates) > 1


def test_a_short_run_has_none(shown, tmp_path):
    run_in_grid(PREDICT, tmp_path)
    assert [text for text, _ in shown] == ["cells"]


def test_the_line_of_a_run_that_fails_goes_too():
    with grid(Console(file=io.StringIO())) as bars:
        callback = FitProgress()
        callback._line.start = -100.0
        callback._line.show("fit", 1, 10)
        assert len(bars.tasks) == 1
        callback.on_exception(None, None, ValueError())
        assert not bars.tasks


def test_the_estimate_is_by_all_runs():
    now = [0.0]
    with grid(Console(file=io.StringIO())) as bars:
        bars.get_time = lambda: now[0]
        task = bars.add_task("cells", total=10)
        for _ in range(3):  # each longer than the half minute that rich looks back
            now[0] += 120
            bars.advance(task)
        assert bars.tasks[0].time_remaining == pytest.approx(7 * 120)


def test_work_that_is_slow_shows_a_bar(capsys, monkeypatch):
    assert list(progress.with_progress(3, "Working")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    for _ in progress.with_progress(3, "Working"):
        time.sleep(0.01)
    assert "Working" in capsys.readouterr().err
