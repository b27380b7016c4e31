"""Every notebook runs from top to bottom, is stored without outputs, and is what its .py file says."""

import faulthandler
import multiprocessing
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATIENCE = 300  # seconds
PRELOAD = ["test_notebooks", "lightning_tta.data.base", "lightning_tta.modules.adaptation", "timm", "scipy.stats"]
PRELOAD += ["IPython.core.interactiveshell", "matplotlib.pyplot", "sklearn.datasets"]
INLINE = "module://matplotlib_inline.backend_inline"
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_what_its_py_file_says(path):
    jupytext = pytest.importorskip("jupytext", reason="a dev extra: pip install -e '.[dev]'")
    written, made = jupytext.read(path.with_suffix(".py")), nbformat.read(path, as_version=4)
    regenerate = "jupytext --update --to ipynb notebooks/*.py"
    assert cells(made) == cells(written), f"{path.name} is not what {path.stem}.py says: {regenerate}"
    assert made.metadata.kernelspec == written.metadata.kernelspec


def test_every_py_file_has_its_notebook():
    assert {path.stem for path in NOTEBOOKS} == {path.stem for path in NOTEBOOKS[0].parent.glob("*.py")}


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def train_for_one_epoch(notebook):
    """Replace the numbers of epochs in the set-up; returns how many there were."""
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    code.source, count = re.subn(r"^(\w*EPOCHS) = \d+$", r"\1 = 1", code.source, flags=re.MULTILINE)
    return count


FEW_IMAGES = """
import functools, lightning_tta
def few(whole):
    @functools.wraps(whole)
    def init(self, *args, **options):
        whole(self, *args, **{"num_images": 64, **options})
    return init
lightning_tta.DigitsData.__init__ = few(lightning_tta.DigitsData.__init__)
"""


def short(path):
    """A notebook with little training and few images of each domain."""
    notebook = nbformat.read(path, as_version=4)
    assert train_for_one_epoch(notebook)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FEW_IMAGES))
    return notebook


def run_here(notebook, folder):
    """Run the cells in this process as a kernel would; returns the kinds of what is shown."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output
    from matplotlib import pyplot
    from matplotlib_inline.backend_inline import configure_inline_support

    os.chdir(folder)
    shell, shown = InteractiveShell.instance(), []
    pyplot.switch_backend(INLINE)
    configure_inline_support(shell, INLINE)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            with capture_output() as captured:
                shell.run_cell(cell.source).raise_error()
            shown += [kind for output in captured.outputs for kind in output.data]
    return shown


@pytest.mark.slow
def test_runs_in_a_kernel():
    notebook = short(NOTEBOOKS[0])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS[0].parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def work(path):
    """Run a short one; where it hangs is said a while before it is killed."""
    import torch

    torch.set_num_threads(1)  # of tiny nets
    faulthandler.dump_traceback_later(0.9 * PATIENCE)
    assert "image/png" in run_here(short(path), path.parent)
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.slow
@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=lambda path: path.stem)
def test_runs(path):
    """In a copy of a process that has imported what a kernel would have to, and has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=work, args=(path,))
    process.start()
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0
