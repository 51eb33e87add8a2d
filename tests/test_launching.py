"""What the launchers share: a run folder that came back is judged, and never takes the place of one that got further."""

import json
import shutil
import signal

import pytest

from tests.driving import SMALL_DBN, Drive, assert_same_run, checkpoints
from trainbook.errors import UserError
from trainbook.files import file_sha256
from trainbook.launching import Verdict, keep_pulled, progress_of, read_pulled, say_end, say_verdict
from trainbook.records import RunFolder
from trainbook.spec import RunSpec

SPEC = RunSpec(workflow="timestep_dbn", preset="smoke", overrides=SMALL_DBN, run_id="mine")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The same run stopped at step 100 and at step 200."""
    folder = tmp_path_factory.mktemp("parts")
    for step in (100, 200):
        Drive(folder / "going", "mine", signal_step=step, signal_number=signal.SIGTERM)()
        shutil.copytree(folder / "going" / "mine", folder / str(step))
    return folder


def altered(folder, **changes):
    folder = RunFolder(folder)
    folder.run_json.write_text(json.dumps(folder.summary() | changes))
    return folder


def test_progress_is_the_step_a_run_can_go_on_from(parts, tmp_path):
    assert progress_of(RunFolder(parts / "100"))[1] >= 100
    assert progress_of(RunFolder(parts / "200")) > progress_of(RunFolder(parts / "100"))
    assert progress_of(RunFolder(tmp_path / "nothing")) == (False, -1)
    shutil.copytree(parts / "200", tmp_path / "torn")
    for checkpoint in checkpoints(RunFolder(tmp_path / "torn")):
        (checkpoint / "state.pt").write_bytes(b"")
    assert progress_of(RunFolder(tmp_path / "torn")) == (False, -1)
    assert progress_of(altered(tmp_path / "torn", status="complete")) > progress_of(RunFolder(parts / "200"))


@pytest.mark.parametrize(("here", "came", "kept"), [("100", "200", True), ("200", "100", False), ("200", "200", True)])
def test_what_came_back_replaces_what_did_not_get_further(here, came, kept, parts, tmp_path):
    shutil.copytree(parts / here, tmp_path / "mine")
    shutil.copytree(parts / came, tmp_path / "pulled")
    (tmp_path / "mine" / "left-over").touch()
    assert keep_pulled(tmp_path / "pulled", tmp_path / "mine") == kept
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "left-over").exists() == (not kept)
    assert_same_run(RunFolder(tmp_path / "mine"), RunFolder(parts / "200"))


def test_another_run_and_a_damaged_file_are_refused(parts, tmp_path):
    pulled = RunFolder(shutil.copytree(parts / "200", tmp_path / "pulled"))
    assert read_pulled(pulled, SPEC)["status"] == "stopped"
    with pytest.raises(UserError, match="not yours"):
        read_pulled(pulled, SPEC.model_copy(update={"run_id": "yours"}))
    with pytest.raises(UserError, match="another config"):
        read_pulled(pulled, RunSpec(**SPEC.model_dump() | {"overrides": SMALL_DBN | {"seed": 5}}))
    altered(pulled.path, files={"metrics.jsonl": file_sha256(pulled.metrics)})
    assert read_pulled(pulled, SPEC)["status"] == "stopped"
    pulled.metrics.write_bytes(pulled.metrics.read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"damaged on the way here: metrics\.jsonl"):
        read_pulled(pulled, SPEC)


def test_the_last_words_name_what_is_there_and_what_goes_on(tmp_path, capsys):
    folder = RunFolder(tmp_path / "mine")
    assert say_verdict(Verdict(1, "failed: nothing came back"), folder) == 1
    assert capsys.readouterr().out == "\nfailed: nothing came back\n"
    folder.path.mkdir()
    assert say_verdict(Verdict(3, "stopped: SIGINT received"), folder) == 3
    again = f"the same command with --run-id mine; or here: trainbook resume {folder.path}"
    assert capsys.readouterr().out == f"\nstopped: SIGINT received\nrun     {folder.path}\nresume  {again}\n"
    folder.report.touch()
    say_end(folder, "stopped: by hand", resumable=True, launched=False)
    assert capsys.readouterr().out.splitlines()[3:] == [f"report  {folder.report}", "resume  trainbook resume mine"]
