"""Imports run one way (DESIGN section 1), read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "trainbook"
# A module may import modules of a lower row only.
ROWS = [
    {"errors", "devices"},
    {"config", "runtime", "files", "tables", "seeding", "distributed", "buffers", "signals", "intervals", "kernel", "live"},
    {
        "optimization",
        "acceleration",
        "brief",
        "checkpoints",
        "bootstrap",
        "pipeline",
        "colab",
        "comparison",
        "downloads",
        "near_duplicates",
    },
    {
        "state",
        "data",
        "records",
        "plots",
        "monitor",
        "events",
        "layers",
        "schedule",
        "optimizer",
        "losses",
        "gradients",
        "averaging",
        "spikes",
        "weights",
        "attention",
        "augmentation",
    },
    {"accumulation", "image_sets"},
    {"stepper"},
    {"fitting"},
    {"engine", "handover"},
    {"workflows", "mirror"},
    {"catalog"},
    {"report", "execution", "processes", "session", "spec", "objective", "plan"},
    {"forms"},
    {"run", "doctor", "bundles", "launching", "run_comparison", "options"},
    {"verification", "worker"},
    {"headless"},
    {"trials"},
    {"sweep", "study", "search_pictures"},
    {"search"},
    {"tuning"},
    {"__main__"},
]
ONLY_USERS = {
    "matplotlib": {"plots"},
    "ipywidgets": {"forms"},
    "papermill": {"execution"},
    "jupytext": {"execution"},
    "optuna": {"study"},
    "torch.distributed.pipelining": {"pipeline"},
    "os.environ": {"runtime"},
}
MODULES = sorted(SOURCE.rglob("*.py"))


def row_of(module):
    return next((index for index, row in enumerate(ROWS) if module.split(".")[0] in row), None)


def module_name(path):
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def imports(path):
    """Dotted names that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_run_one_way(path):
    name = module_name(path)
    if name in ("__init__",):
        return
    assert row_of(name) is not None, f"{name} has no row in this test"
    for imported in imports(path):
        parts = imported.split(".")
        if (
            parts[0] != "trainbook"
            or len(parts) == 1
            or (not (SOURCE / parts[1]).exists() and not (SOURCE / f"{parts[1]}.py").exists())
        ):
            continue
        if parts[1] == "workflows" and name.startswith("workflows."):
            assert parts[2] == name.split(".")[1], f"{name} imports another workflow: {imported}"
        else:
            assert row_of(parts[1]) < row_of(name), f"{name} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_libraries_stay_behind_their_one_module(path):
    name, text = module_name(path), path.read_text()
    for library, users in ONLY_USERS.items():
        used = library in text if "." in library else any(i.split(".")[0] == library for i in imports(path))
        # A workflow may name matplotlib's Figure in a signature; it draws through plots.
        if library == "matplotlib":
            used = any(i.split(".")[0] == library and i != "matplotlib.figure.Figure" for i in imports(path))
        assert not used or name in users, f"{name} uses {library}"


@pytest.mark.parametrize(
    "command",
    ["import trainbook", *(f"from trainbook.__main__ import main; main({a})" for a in (["list"], ["show", "timestep_dbn"]))],
)
def test_quick_commands_do_not_import_torch(command):
    code = f"import sys\n{command}\nassert not {{'torch', 'transformers', 'matplotlib', 'sklearn'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_no_name_that_says_nothing():
    empty = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
    assert not [path for path in MODULES if path.stem in empty]
