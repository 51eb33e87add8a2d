"""The notebook for Colab where `google.colab` is a stand-in: cut off, run again on an empty machine, ended bit for bit."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from tests.driving import SMALL_DBN, Drive, assert_same_run
from tests.platform_images import RUN_NOTEBOOK
from trainbook import bundles, colab, runtime
from trainbook.handover import run_folders, whole_checkpoint
from trainbook.records import RunFolder
from trainbook.spec import RunSpec

STUBS = Path(__file__).parent / "stubs" / "google_colab"
SECRET = "hf_" + "4b1dSecret" * 3
LONG_DBN = SMALL_DBN | {"autoencoder_epochs": 60, "epochs_per_timestep": 100, "baseline_epochs": 100}
SHOW_KEY = "import hashlib, os; print(hashlib.sha256(os.environ['HF_TOKEN'].encode()).hexdigest())"


class Machine:
    """A Colab machine: a disk of its own, Drive and the keys of its owner's account.

    Args:
        folder: this machine's disk.
        drive: the folder that Drive is, or `refused`.
        overrides: the config in the notebook.
        secrets: a file of NAME=VALUE lines.
        cell: source of a cell at the notebook's end.
    """

    def __init__(self, folder, drive, overrides, secrets="", cell=""):
        self.content = folder / "content"
        self.content.mkdir(parents=True)
        spec = RunSpec(workflow="timestep_dbn", preset="smoke", overrides=overrides, checkpoint_every="0.2s")
        notebook = nbformat.reads(bundles.build_notebook("colab", spec).decode(), as_version=4)
        if cell:
            notebook.cells.append(nbformat.v4.new_code_cell(cell))
        nbformat.write(notebook, self.content / "notebook.ipynb")
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "PYTHONPATH": str(STUBS),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "COLAB_RELEASE_TAG": "release",
            "STAND_IN_DRIVE": str(drive),
            "STAND_IN_SECRETS": str(secrets),
        }

    def run_all_cells(self):
        return subprocess.Popen(
            [sys.executable, *RUN_NOTEBOOK["colab"]],
            cwd=self.content,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run_to_the_end(self):
        session = self.run_all_cells()
        _, errors = session.communicate()
        assert session.returncode == 0, errors[-3000:]
        return RunFolder(next((self.content / "runs").iterdir()))

    def printed(self):
        cells = nbformat.read(self.content / "executed.ipynb", as_version=4).cells
        outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
        return "".join(output.get("text", "") for output in outputs)


def files_with(text, root):
    return [path for path in root.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_cut_off_and_run_again_on_an_empty_machine_it_ends_like_an_uninterrupted_run(tmp_path):
    whole = Drive(tmp_path / "elsewhere", "whole", LONG_DBN, checkpoint_seconds=3600)
    assert whole() == 0
    (tmp_path / "drive" / "MyDrive").mkdir(parents=True)
    secrets = tmp_path / "secrets"
    secrets.write_text(f"HF_TOKEN={SECRET}\n")
    kept = tmp_path / "drive" / "MyDrive" / "trainbook"

    first = Machine(tmp_path / "first", tmp_path / "drive", LONG_DBN, secrets)
    session = first.run_all_cells()
    while not (reached := [step for folder in run_folders([kept]) if (step := whole_checkpoint(folder)) is not None]):
        assert session.poll() is None, session.stderr.read()[-3000:]
        time.sleep(0.05)
    [cut_off] = run_folders([first.content / "runs"])
    os.kill(cut_off.training_process(), signal.SIGKILL)
    session.communicate()
    assert session.returncode != 0
    assert cut_off.summary()["status"] == "running"

    second = Machine(tmp_path / "second", tmp_path / "drive", LONG_DBN, secrets, SHOW_KEY)
    finished = second.run_to_the_end()
    summary = finished.summary()
    assert summary["status"] == "complete"
    assert summary["run_id"] == cut_off.path.name
    assert [segment["platform"] for segment in summary["segments"]] == ["colab", "colab"]
    assert 0 < reached[0] <= summary["segments"][1]["first_step"] < summary["total_steps"]
    assert_same_run(finished, whole.folder)

    [copy] = run_folders([kept])
    for name in ("run.json", "report.html", *summary["files"]):
        assert (copy.path / name).read_bytes() == (finished.path / name).read_bytes(), name
    assert_same_run(copy, whole.folder)

    assert hashlib.sha256(SECRET.encode()).hexdigest() in second.printed()
    assert "HF_TOKEN: taken" in second.printed()
    assert files_with(SECRET, tmp_path) == [secrets]


def test_without_drive_training_goes_on_with_a_warning(tmp_path):
    machine = Machine(tmp_path / "machine", "refused", SMALL_DBN)
    folder = machine.run_to_the_end()
    assert folder.summary()["status"] == "complete"
    assert "Drive is not there (ValueError: mount failed). Training goes on" in machine.printed()
    assert "HF_TOKEN: not taken" in machine.printed()
    assert not (machine.content / "drive").exists()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(STUBS)
    monkeypatch.setenv("STAND_IN_DRIVE", str(tmp_path / "account"))
    (tmp_path / "account" / "MyDrive").mkdir(parents=True)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("google.colab")]:
        del sys.modules[name]
    if hasattr(sys.modules.get("google"), "colab"):  # google itself stays: protobuf lives in it, and a second one crashes
        del sys.modules["google"].colab


def test_drive_is_mounted_once_and_becomes_mirror_and_input(stand_in):
    for _ in range(2):
        assert colab.keep_on_drive("kept") == stand_in / "drive" / "MyDrive" / "kept"
    found = runtime.detect()
    assert found.mirror_folder == stand_in / "drive" / "MyDrive" / "kept"
    assert found.input_folders == (found.mirror_folder,)
    del os.environ[runtime.MIRROR]


def test_a_full_drive_is_a_warning(stand_in, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    assert colab.keep_on_drive() is None
    assert runtime.MIRROR not in os.environ


def test_a_key_is_taken_where_it_is_and_never_printed(stand_in, monkeypatch, capsys):
    (stand_in / "secrets").write_text(f"HF_TOKEN={SECRET}\nLOCKED=\nOWN=theirs\n")
    monkeypatch.setenv("STAND_IN_SECRETS", str(stand_in / "secrets"))
    monkeypatch.setenv("OWN", "mine")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    colab.take_secrets("HF_TOKEN", "LOCKED", "MISSING", "OWN")
    assert os.environ.pop("HF_TOKEN") == SECRET
    assert os.environ["OWN"] == "mine"
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err
    assert "LOCKED: not taken (NotebookAccessError)" in shown.out
    assert "MISSING: not taken (SecretNotFoundError)" in shown.out


def test_elsewhere_nothing_is_mounted(capsys):
    assert colab.keep_on_drive() is None
    colab.take_secrets("HF_TOKEN")
    assert "not Colab" in capsys.readouterr().out
