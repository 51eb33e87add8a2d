"""Run folder: identity, lock, verdicts."""

import math
import os
import shutil
import subprocess
import sys

import pytest

from trainbook.errors import UserError
from trainbook.records import RunFolder, Target, find_run

IDENTITY = {"workflow": "w", "config": {"a": 1, "b": 2}}


@pytest.mark.parametrize(
    ("comparison", "measured", "value", "verdict"),
    [
        ("<", 1.0, 2.0, "reached"),
        ("<", 2.0, 2.0, "missed"),
        ("<=", 2.0, 2.0, "reached"),
        (">", 3.0, 2.0, "reached"),
        (">=", 1.0, 2.0, "missed"),
        ("<", 1.0, "baseline", "reached"),
        (">", 1.0, "baseline", "missed"),
        ("<", 1.0, "absent", "not measured"),
        ("<", math.nan, 2.0, "not measured"),
    ],
)
def test_verdicts(comparison, measured, value, verdict):
    target = Target("ours", comparison, value, ("laptop",), "somebody")
    metrics = {"ours": measured, "baseline": 1.5}
    assert target.judge(metrics, "laptop")["verdict"] == verdict
    assert target.judge(metrics, "smoke")["verdict"] == "not for preset smoke"


def test_a_folder_of_another_config_is_refused_and_the_difference_named(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create(IDENTITY)
    folder.create(IDENTITY)
    with pytest.raises(UserError, match=r"b = 2, not 3\n.*--run-id"):
        folder.create({"workflow": "w", "config": {"a": 1, "b": 3}})
    with pytest.raises(UserError, match="workflow w, not v"):
        folder.create({"workflow": "v", "config": {}})


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not a run folder"):
        RunFolder(tmp_path).create(IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create(IDENTITY)
    folder.lock()
    assert folder.training_process() == os.getpid()
    code = f"from trainbook.records import *; from pathlib import Path; RunFolder(Path({str(folder.path)!r})).lock()"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert other.returncode != 0
    assert f"process {os.getpid()} is training" in other.stderr
    folder.unlock()
    assert folder.training_process() is None
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_find_run_lists_what_there_is(tmp_path):
    RunFolder(tmp_path / "mine").create(IDENTITY)
    assert find_run("mine", tmp_path).path == find_run(str(tmp_path / "mine"), tmp_path / "elsewhere").path
    with pytest.raises(UserError, match="known: mine"):
        find_run("other", tmp_path)


def test_checkpoints_and_logs_can_lie_elsewhere(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "mine")
    folder.create(IDENTITY, {"checkpoints": tmp_path / "big disk", "logs": tmp_path / "logs"})
    folder.checkpoints.joinpath("latest").write_text("7")
    folder.log.write_text("a line")
    assert (tmp_path / "big disk" / "mine" / "latest").read_text() == "7"
    assert (tmp_path / "logs" / "mine" / "run.log").read_text() == "a line"
    folder.create(IDENTITY)  # a resumed run finds them without being told
    folder.create(IDENTITY, {"checkpoints": tmp_path / "third"})  # and does not move
    assert folder.checkpoints.joinpath("latest").read_text() == "7"
    assert not (tmp_path / "third").exists()


def test_checkpoints_of_a_run_that_is_gone_are_not_taken_for_a_new_ones(tmp_path):
    place = {"checkpoints": tmp_path / "big disk"}
    RunFolder(tmp_path / "runs" / "mine").create(IDENTITY, place)
    (tmp_path / "big disk" / "mine" / "0000000007").mkdir()
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(UserError, match="big disk/mine"):
        RunFolder(tmp_path / "runs" / "mine").create(IDENTITY, place)
    assert not (tmp_path / "runs" / "mine" / "config.json").exists()
