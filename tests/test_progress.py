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
from lightning_tta.run import bar
from lightning_tta.run.progress import FitProgress

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--data", "DigitsData", "--data.train_batch_size=512"]
NET = ["--model.backbone=timm/test_resnet", "--model.num_classes=10"]
FIT = ["fit", "--model=SourceClassifier", *NET, *SMALL, "--trainer.max_epochs=3", "--trainer.logger=false"]
PREDICT = ["predict", "--model.source_ckpt=none", *NET, "--data=DigitsData", "--data.domains=[clean]"]
PREDICT += ["--model.method=source", "--data.num_images=60", "--data.batch_size=10", "--trainer.logger=false"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes three seconds with every look at it."""
    now = iter(range(0, 30_000, 3))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))


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


@pytest.fixture
def slow(monkeypatch):
    """A clock that goes ten seconds with every look at it."""
    now = iter(range(0, 100_000, 10))
    monkeypatch.setattr(bar, "time", SimpleNamespace(monotonic=lambda: next(now)))


def screen_of(monkeypatch, **options):
    """A screen that is 80 columns wide, for the bar of a run."""
    screen = Console(file=io.StringIO(), width=80, **options)
    monkeypatch.setattr(bar, "Console", lambda **_: screen)
    return screen


@pytest.mark.usefixtures("slow")
def test_a_fit_says_what_all_epochs_will_take(monkeypatch, capsys, tmp_path):
    screen_of(monkeypatch, force_terminal=False)
    monkeypatch.setattr(bar, "FIRST", 0.0)
    monkeypatch.setattr(bar, "GROWTH", 0.0)  # a line a batch
    main([*FIT, f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"])
    out, err = capsys.readouterr()
    lines = [
        re.fullmatch(r"epoch (\d)/3, batch (\d)/(\d), (\d+:\d\d:\d\d|\d\d:\d\d) left.*", x) for x in err.splitlines()
    ]
    found = [line.groups() for line in lines if line]
    batches = int(found[0][2])
    assert [(int(epoch), int(done)) for epoch, done, _, _ in found] == [
        (epoch, done) for epoch in (1, 2, 3) for done in range(1, batches + 1)
    ]
    assert found[-1][3] == "00:00"
    weights = next(tmp_path.rglob("*.ckpt"))
    assert out.splitlines()[-2] == f"weights: {weights}"
    assert out.splitlines()[-1].startswith("adapt them: lightning-tta predict --data lightning_tta")
    assert f"--model.source_ckpt {weights}" in out
    assert all(option in out.splitlines()[-1] for option in FIT if option.startswith("--data."))
    assert "Tip" not in err
    assert "GPU" not in err


def test_a_bar_fits_the_screen_and_is_gone_before_the_table(monkeypatch, capsys, tmp_path):
    screen = screen_of(monkeypatch, force_terminal=True)
    main([*PREDICT, f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"])
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", shown)]
    assert max(map(len, lines)) <= 80
    assert re.search(r"predict .* 6/6 .*left  accuracy \d\.\d{3}$", "\n".join(lines), re.MULTILINE)
    assert screen.file.getvalue().endswith("\x1b[2K")  # the line is empty again
    out = capsys.readouterr().out
    assert out.startswith("source, iid stream")
    assert out.splitlines()[-1].startswith("page: lightning-tta report ")


def test_a_bar_is_not_updated_more_often_than_anybody_sees(monkeypatch, tmp_path):
    """Sixty batches in no time: the first and the last are shown."""
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 0.0))
    screen_of(monkeypatch, force_terminal=True)
    shown, show = [], bar.RunBar._show
    monkeypatch.setattr(bar.RunBar, "_show", lambda self, done, *rest: (shown.append(done), show(self, done, *rest)))
    main([*PREDICT, "--data.batch_size=1", f"--trainer.default_root_dir={tmp_path}"])
    assert shown == [1, 60]


def test_values_that_do_not_fit_are_left_out_as_a_whole():
    texts = ["0:10 left", "train_loss 0.501", "val_accuracy 0.536"]
    assert bar._fitting(texts, 80) == "0:10 left  train_loss 0.501  val_accuracy 0.536"
    assert bar._fitting(texts, 46) == "0:10 left  train_loss 0.501"
    assert bar._fitting(texts, 5) == ""


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
    with grid(Console(file=io.StringIO(), force_terminal=True)) as bars:
        callback = FitProgress()
        callback._line.start = -100.0
        callback._line.show("fit", 1, 10)
        assert len(bars.tasks) == 1
        callback.on_exception(None, None, ValueError())
        assert not bars.tasks


def test_the_estimate_is_by_all_runs():
    now = [0.0]
    with grid(Console(file=io.StringIO(), force_terminal=True)) as bars:
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
