import os
import signal
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from lightning_tta.methods import names

TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "configs"
WHOLE_RUNS = (  # left out of each_commit
    "benchmark/",
    "cli/test_choose.py",
    "cli/test_doctor.py",
    "cli/test_hostile_configurations.py",
    "cli/test_interrupted_commands.py",
    "cli/test_own_net.py",
    "cli/test_print_config.py",
    "cli/test_wrong_input.py",
    "guard/test_watch_digits.py",
    "measure/",
    "methods/test_faults.py",
    "modules/test_language.py",
    "report/test_figures.py",
    "report/test_page.py",
    "report/test_results.py",
    "reproduce/test_rerun.py",
    "run/",
    "serving/",
    "test_diagnosis.py",
    "test_export.py",
    "test_exported_step.py",
    "test_notebooks.py",
    "test_pages.py",
    "test_progress.py",
)

# Before any fake device is known: autograd would start threads for it, and no process could be forked any more.
torch.ones((), requires_grad=True).backward()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell; the tests of Ctrl-C need it
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared by processes: threads on top of them only wait
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_ignore_collect(collection_path, config):
    """Spare each_commit the imports of what it leaves out."""
    whole = collection_path.is_file() and collection_path.relative_to(TESTS).as_posix().startswith(WHOLE_RUNS)
    return True if whole and config.option.markexpr == "each_commit" else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark ``each_commit``: all but the slow ones, the rooms of whole runs, and what is alike for many methods.

    That is: of a test that goes through all methods those with the mechanism of another; they keep their life's test.
    """
    for item in items:
        path = item.path.relative_to(TESTS).as_posix()
        if not path.startswith(WHOLE_RUNS) and not item.get_closest_marker("slow") and not _is_one_of_many(item):
            item.add_marker("each_commit")


def _is_one_of_many(item):
    params = item.callspec.params.values() if hasattr(item, "callspec") else ()
    named = [value[0] if isinstance(value, tuple) and value else value for value in params]
    of_methods = {value for value in named if isinstance(value, str)} & set(names())
    if not of_methods or item.originalname == "test_one_life" or item.path.stem.removeprefix("test_") in of_methods:
        return False
    from contract import CORE  # makes every method around every net, so only where tests of these are collected

    return not of_methods & CORE


@pytest.fixture(autouse=True)
def _seeded():
    torch.default_generator.manual_seed(0)  # torch.manual_seed also notes a seed, with its stack, for every accelerator


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Corrupted images are kept in a folder of this test run's own."""
    os.environ["LIGHTNING_TTA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def digits_source(tmp_path_factory, _own_cache):
    """A net that was trained on the digits for one epoch, by the command line: the folder of its runs.

    All processes of pytest-xdist share it: the first to ask trains.
    """
    from lightning_tta.cli.main import main

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "digits_source"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
            place = f"--trainer.logger.init_args.save_dir={folder}"
            main(["fit", f"--config={CONFIGS / 'digits/source.yaml'}", "--trainer.max_epochs=1", place, *quiet])
            (folder / "done").touch()
    return folder / "source"


@pytest.fixture(scope="session")
def parse():
    """Parses arguments of fit, validate, test or predict as the command would, without building a parser each time."""
    from lightning_tta.launch.lightning import run_lightning

    cli = run_lightning(["predict", "--data=DigitsData", "--model.method=source"], parse_only=True)

    def parse(args):
        cli.parse_arguments(cli.parser, args)
        return cli.config[cli.config["subcommand"]]

    return parse


@pytest.fixture
def one_thread():
    """For modules of many tiny passes: handing them to several threads costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def views(monkeypatch):
    """Views of a teacher that a test can know: darker and shifted images, in the order in which they were made."""
    from lightning_tta.methods.components import teacher

    made = []

    def view(images, key):
        number = key.sum().item()
        made.append((images * (0.5 + (number % 97) / 200)).roll(number % 5, -1))
        return made[-1]

    monkeypatch.setattr(teacher, "jitter", view)
    return made
