"""A run that lies in a read-only input goes on, wherever a platform mounts it."""

import json
import shutil
import signal

import pytest

from tests.driving import SMALL_DBN, Drive, assert_same_run, checkpoints
from trainbook import runtime
from trainbook.errors import UserError
from trainbook.handover import copy_run, run_folders, whole_checkpoint
from trainbook.records import RunFolder
from trainbook.run import prepare

LAYOUTS = ["notebooks/someone/a-kernel/runs", "a-kernel/runs", "datasets/someone/some-files", "."]


@pytest.fixture(scope="module")
def segments(tmp_path_factory):
    """The same run uninterrupted, stopped at step 100, and stopped again at step 200."""
    folder = tmp_path_factory.mktemp("segments")
    assert Drive(folder / "whole", "mine")() == 0
    for step in (100, 200):
        Drive(folder / "going", "mine", signal_step=step, signal_number=signal.SIGTERM)()
        shutil.copytree(folder / "going" / "mine", folder / str(step) / "mine")
    return folder


def mount(source, target):
    """A copy that nobody may write to."""
    shutil.copytree(source, target)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return target


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.setenv(runtime.INPUTS, str(tmp_path / "inputs"))
    (tmp_path / "inputs" / "competition" / "train").mkdir(parents=True)
    (tmp_path / "inputs" / "competition" / "run.json").write_text("[]")
    (tmp_path / "inputs" / "competition" / "config.json").write_text("{}")
    return tmp_path / "inputs"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("run_id", ["mine", ""])
def test_a_stopped_run_goes_on_from_an_input_bit_for_bit(layout, run_id, inputs, segments, tmp_path):
    mount(segments / "100" / "mine", inputs / layout / "renamed-by-the-platform")
    run = prepare("timestep_dbn", "smoke", SMALL_DBN, run_id)
    assert run.run_id == "mine"
    drive = Drive(tmp_path / "runs", "mine")
    assert drive() == 0
    first_steps = [segment["first_step"] for segment in drive.folder.summary()["segments"]]
    assert first_steps[0] == 0
    assert first_steps[1] >= 100
    assert_same_run(drive.folder, RunFolder(segments / "whole" / "mine"))


def test_the_run_that_got_furthest_is_taken(inputs, segments, tmp_path):
    for step in ("100", "200"):
        mount(segments / step / "mine", inputs / f"part-{step}")
    run = prepare("timestep_dbn", "smoke", SMALL_DBN, "mine")
    assert whole_checkpoint(run.folder) >= 200


def test_what_lies_in_the_runs_folder_goes_before_an_input(inputs, segments, tmp_path):
    shutil.copytree(segments / "100" / "mine", tmp_path / "runs" / "mine")
    mount(segments / "200" / "mine", inputs / "later")
    assert whole_checkpoint(prepare("timestep_dbn", "smoke", SMALL_DBN, "mine").folder) < 200


def test_a_run_without_an_id_takes_only_what_can_go_on_and_is_of_this_very_config(inputs, segments):
    mount(segments / "100" / "mine", inputs / "one")
    other = prepare("timestep_dbn", "smoke", SMALL_DBN | {"seed": 5})
    assert other.run_id != "mine"
    assert not other.folder.path.exists()


def test_an_id_of_another_config_is_refused_and_nothing_is_copied(inputs, segments, tmp_path):
    mount(segments / "100" / "mine", inputs / "one")
    with pytest.raises(UserError, match="seed = 0, not 5"):
        prepare("timestep_dbn", "smoke", SMALL_DBN | {"seed": 5}, "mine")
    assert not (tmp_path / "runs").exists()


def test_torn_checkpoints_stay_behind_and_the_one_before_is_used(inputs, segments, tmp_path, capsys):
    shutil.copytree(segments / "200" / "mine", inputs / "one")
    source = RunFolder(inputs / "one")
    first, last = checkpoints(source)
    (last / "state.pt").write_bytes((last / "state.pt").read_bytes()[:-1])
    run = prepare("timestep_dbn", "smoke", SMALL_DBN, "mine")
    assert [path.name for path in checkpoints(run.folder)] == [first.name]
    assert f"skipping checkpoint {last.name}" in capsys.readouterr().err
    assert Drive(tmp_path / "runs", "mine")() == 0
    assert_same_run(run.folder, RunFolder(segments / "whole" / "mine"))


def test_a_checkpoint_newer_than_the_records_beside_it_is_not_used(segments, tmp_path):
    """What a copy taken during training looks like: records as they were a while before the checkpoint."""
    shutil.copytree(segments / "200" / "mine", tmp_path / "pulled")
    pulled = RunFolder(tmp_path / "pulled")
    first = checkpoints(pulled)[0]
    reached = json.loads((first / "metadata.json").read_text())["records_bytes"]
    pulled.metrics.write_bytes(pulled.metrics.read_bytes()[:reached])
    assert copy_run(pulled, tmp_path / "copy") == int(first.name)
    assert [path.name for path in checkpoints(RunFolder(tmp_path / "copy"))] == [first.name]
    pulled.metrics.write_bytes(b"")
    assert copy_run(pulled, tmp_path / "other") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "pulled"]


def test_a_copy_that_breaks_leaves_nothing(segments, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        copy_run(RunFolder(segments / "100" / "mine"), tmp_path / "copy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run_id", ["../../outside", "/tmp/outside", "", None, 5])
def test_a_run_id_in_an_input_cannot_lead_a_copy_elsewhere(run_id, segments, tmp_path):
    shutil.copytree(segments / "100" / "mine", tmp_path / "one")
    folder = RunFolder(tmp_path / "one")
    folder.run_json.write_text(json.dumps(folder.summary() | {"run_id": run_id}))
    assert list(run_folders([tmp_path])) == []


def test_kaggle_looks_into_its_inputs_and_other_places_into_none(monkeypatch):
    assert runtime.detect().input_folders == ()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert [str(path) for path in runtime.detect().input_folders] == ["/kaggle/input"]
