"""Every notebook runs from top to bottom, is stored without outputs, and is what its .py file says."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

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


def train_for_two_epochs(notebook):
    """Replace the numbers of epochs in the set-up; returns how many there were."""
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    code.source, count = re.subn(r"^(\w*EPOCHS) = \d+$", r"\1 = 2", code.source, flags=re.MULTILINE)
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


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path):
    notebook = nbformat.read(path, as_version=4)
    assert train_for_two_epochs(notebook)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FEW_IMAGES))  # of each domain, for time
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    pictures = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert pictures
