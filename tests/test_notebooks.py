"""Notebooks: thin, paired by content, without outputs, and they run."""

import ast
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import papermill
import pytest

from trainbook import catalog
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


@pytest.mark.parametrize("name", NAMES)
def test_plain_papermill_runs_it_from_any_folder(name, tmp_path, monkeypatch):
    """`papermill notebooks/NAME.ipynb out.ipynb -p preset smoke`, with the run judged by run.json."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.delenv("TRAINBOOK_RUNS")
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(FOLDER / f"{name}.ipynb"),
        "out.ipynb",
        "-p",
        "preset",
        "smoke",
        "-p",
        "run_id",
        "mine",
    ]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = read_json(find_run("mine", elsewhere / "runs").run_json)
    assert summary["status"] == "complete"
    outputs = [output for cell in code_cells(nbformat.read(elsewhere / "out.ipynb", as_version=4)) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures >= 4


@pytest.mark.parametrize("name", NAMES)
def test_cells_by_hand_and_headless_do_the_same_work(name, tmp_path, monkeypatch):
    """Running the cells one after another in a kernel, as a person does, gives the records and metrics of papermill."""
    folders = []
    for way in ("papermill", "by hand"):
        monkeypatch.setenv("TRAINBOOK_RUNS", str(tmp_path / way.replace(" ", "-")))
        if way == "papermill":
            papermill.execute_notebook(FOLDER / f"{name}.ipynb", None, {"preset": "smoke", "run_id": "same"}, progress_bar=False)
        else:
            source = "\n".join(cell.source for cell in code_cells(read(name)))
            source = source.replace('preset = "laptop"', 'preset = "smoke"').replace('run_id = ""', 'run_id = "same"')
            subprocess.run([sys.executable, "-c", source], check=True, capture_output=True)
        folders.append(find_run("same", tmp_path / way.replace(" ", "-")))
    assert folders[0].metrics.read_bytes() == folders[1].metrics.read_bytes()
    assert folders[0].summary()["metrics"] == folders[1].summary()["metrics"]
