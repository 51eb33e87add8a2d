"""Notebooks: thin, paired by content, without outputs, and they run."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

from trainbook import catalog, runtime
from trainbook.files import read_json
from trainbook.records import find_run

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = catalog.names()
MAX_CODE_CELLS = 12


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_workflow_has_a_pair_and_every_pair_a_workflow():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in FOLDER.glob("*.py")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_pair_is_equal_by_content(name):
    source = jupytext.read(FOLDER / f"{name}.py")
    cells = [[(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in nb.cells] for nb in (source, read(name))]
    assert cells[0] == cells[1], "run `make notebooks`: the .py file is the source"


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_is_thin(name):
    cells = code_cells(read(name))
    assert len(cells) <= MAX_CODE_CELLS
    for cell in cells:
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.For | ast.While | ast.Lambda | ast.comprehension), (
                cell.source
            )


@pytest.mark.parametrize("name", NAMES)
def test_tags_kernel_and_no_outputs(name):
    notebook = read(name)
    assert notebook.metadata.kernelspec.name == "python3"
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    assert tags == ["bootstrap", "parameters"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))
    nbformat.validate(notebook)


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_cell_holds_plain_literals(name):
    cell = next(cell for cell in read(name).cells if "parameters" in cell.metadata.get("tags", []))
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
    assert values == {"preset": "laptop", "overrides": {}, "run_id": "", "authentic": False}


# The bundles of all workflows, which hold the same cells, are run by default (test_bundles.py); here two are.
@pytest.fixture(
    scope="module",
    params=[name if name in ("timestep_dbn", "nerf") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def by_papermill(request, tmp_path_factory):
    """`papermill notebooks/NAME.ipynb out.ipynb -p preset smoke` from another folder: the name and that folder."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    notebook = FOLDER / f"{request.param}.ipynb"
    options = ["-p", "preset", "smoke", "-p", "run_id", "mine"]
    environment = {name: value for name, value in os.environ.items() if name not in runtime.SETTINGS.values()}
    environment[runtime.DATA] = str(elsewhere / "data")
    command = [sys.executable, "-m", "papermill", str(notebook), "out.ipynb", *options]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, elsewhere


def test_plain_papermill_runs_it_from_any_folder(by_papermill):
    """The run is judged by run.json."""
    _, elsewhere = by_papermill
    summary = read_json(find_run("mine", elsewhere / "runs").run_json)
    assert summary["status"] == "complete"
    outputs = [output for cell in code_cells(nbformat.read(elsewhere / "out.ipynb", as_version=4)) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures >= 4


def test_cells_by_hand_and_headless_do_the_same_work(by_papermill, tmp_path):
    """Running the cells one after another, as a person does, gives the records and metrics of papermill."""
    name, elsewhere = by_papermill
    source = "\n".join(cell.source for cell in code_cells(read(name)))
    source = source.replace('preset = "laptop"', 'preset = "smoke"').replace('run_id = ""', 'run_id = "mine"')
    subprocess.run([sys.executable, "-c", source], check=True, capture_output=True)
    by_hand, headless = find_run("mine", tmp_path / "runs"), find_run("mine", elsewhere / "runs")
    assert by_hand.metrics.read_bytes() == headless.metrics.read_bytes()
    assert by_hand.summary()["metrics"] == headless.summary()["metrics"]
