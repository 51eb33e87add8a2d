"""An interrupted and resumed run is the uninterrupted run, bit for bit."""

import random
import signal

import pytest

from tests.driving import SMALL_DBN, STAGES, Drive, assert_same_run, checkpoints, final_state
from trainbook.checkpoints import read_checkpoint
from trainbook.files import read_json

KILLS_PER_STAGE, BY_DEFAULT = 10, 3
KILLS = [*range(BY_DEFAULT), *(pytest.param(n, marks=pytest.mark.slow) for n in range(BY_DEFAULT, KILLS_PER_STAGE))]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    drive = Drive(tmp_path_factory.mktemp("runs"), "whole", checkpoint_seconds=3600)
    assert drive() == 0
    return drive.folder


def test_stage_boundaries_are_where_the_kill_tests_think(uninterrupted):
    stages = {}
    for record in uninterrupted.history():
        stages.setdefault(record["stage"], []).append(record["step"])
    assert stages.keys() == STAGES.keys()
    assert all(STAGES[name][0] <= min(steps) and max(steps) == STAGES[name][1] for name, steps in stages.items())
    assert final_state(uninterrupted)["step"] == STAGES["baselines"][1]


def test_same_seed_twice_gives_identical_records_and_another_seed_others(uninterrupted, tmp_path):
    again, other = Drive(tmp_path, "again"), Drive(tmp_path, "other", SMALL_DBN | {"seed": 1})
    assert again() == other() == 0
    assert_same_run(again.folder, uninterrupted)
    assert other.folder.metrics.read_bytes() != uninterrupted.metrics.read_bytes()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("trial", KILLS)
def test_kill_9_at_a_random_moment_then_resume_is_bit_identical(stage, trial, uninterrupted, tmp_path):
    chance = random.Random(f"{stage} {trial}")
    # Checkpoints every 0.1 s, so that some kills fall into the writing of one; the delay puts a kill anywhere in a step.
    first, last = STAGES[stage]
    killed = Drive(tmp_path, "killed", signal_step=chance.randint(first, last - 5), delay=chance.uniform(0, 0.004))
    assert killed() == -signal.SIGKILL
    assert read_json(killed.folder.run_json)["status"] == "running"
    assert Drive(tmp_path, "killed")() == 0
    assert_same_run(killed.folder, uninterrupted)


def test_killed_again_and_again_still_identical(uninterrupted, tmp_path):
    for step in (40, 90, 150, 200):
        assert Drive(tmp_path, "killed", signal_step=step)() == -signal.SIGKILL
    assert Drive(tmp_path, "killed")() == 0
    assert_same_run(Drive(tmp_path, "killed").folder, uninterrupted)
    assert len(read_json(Drive(tmp_path, "killed").folder.run_json)["segments"]) == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_the_very_step_and_stops_resumably(number, uninterrupted, tmp_path):
    stopped = Drive(tmp_path, "stopped", checkpoint_seconds=3600, signal_step=100, signal_number=number)
    assert stopped() == 0
    summary = read_json(stopped.folder.run_json)
    assert summary["status"] == "stopped"
    assert number.name in summary["why"]
    assert 100 <= summary["step"] == final_state(stopped.folder)["step"] < 256
    assert Drive(tmp_path, "stopped")() == 0
    assert_same_run(stopped.folder, uninterrupted)


def test_time_budget_stops_resumably(uninterrupted, tmp_path):
    stopped = Drive(tmp_path, "stopped", time_budget="0.4s")
    assert stopped() == 0
    summary = read_json(stopped.folder.run_json)
    assert (summary["status"], summary["why"]) == ("stopped", "the time budget is spent")
    assert Drive(tmp_path, "stopped")() == 0
    assert_same_run(stopped.folder, uninterrupted)


def test_disk_full_while_saving_fails_clearly_and_leaves_the_previous_checkpoint_whole(uninterrupted, tmp_path):
    full = Drive(tmp_path, "full", checkpoint_seconds=0.001, signal_step=120, file_limit=20_000)
    assert full() == 1
    summary = read_json(full.folder.run_json)
    assert summary["status"] == "failed"
    assert "cannot be written" in summary["why"]
    assert "trainbook resume" in summary["why"]
    assert [path.name for path in full.folder.checkpoints.glob(".*")] == []
    for checkpoint in checkpoints(full.folder):
        read_checkpoint(checkpoint)
    assert Drive(tmp_path, "full")() == 0
    assert_same_run(full.folder, uninterrupted)


def test_resume_falls_back_when_the_newest_checkpoint_is_torn(uninterrupted, tmp_path):
    assert Drive(tmp_path, "torn", signal_step=120, signal_number=signal.SIGTERM)() == 0
    folder = Drive(tmp_path, "torn").folder
    state = checkpoints(folder)[-1] / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    assert Drive(tmp_path, "torn")() == 0
    assert read_json(folder.run_json)["segments"][-1]["first_step"] == int(checkpoints_before(folder, state))
    assert_same_run(folder, uninterrupted)


EVERYTHING = {"schedule": "cosine", "warmup_steps": 20, "clip_norm": 1.0, "label_smoothing": 0.1, "ema_decay": 0.95}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"accumulation": 3},
        {"precision": "bfloat16"},
        {"precision": "float16", "learning_rate": 3e-3},
        {"ema_decay": 0.9},
        {"schedule": "one_cycle", "warmup_steps": 10},
        {"optimizer": "sgd", "learning_rate": 0.1},
        EVERYTHING | {"accumulation": 2, "precision": "bfloat16"},
        EVERYTHING | {"accumulation": 2, "precision": "float16", "optimizer": "sgd", "learning_rate": 0.1},
    ],
    ids=lambda overrides: " ".join(overrides) or "plain",
)
def test_a_classifier_killed_under_every_option_resumes_bit_for_bit(overrides, tmp_path):
    def drive(run_id, **disturbance):
        return Drive(tmp_path, run_id, overrides, "tests.digits_classifier", checkpoint_seconds=0.02, **disturbance)

    assert drive("whole")() == 0
    for step in (37, 80):
        assert drive("killed", signal_step=step, delay=0.001)() == -signal.SIGKILL
    assert drive("killed")() == 0
    assert_same_run(drive("whole").folder, drive("killed").folder)
    losses = [record["loss"] for record in drive("whole").folder.history()]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])  # it learns, or equality would say little


def checkpoints_before(folder, state):
    """Step of the checkpoint that the resumed session must have fallen back to: its log names the torn one."""
    lines = [line for line in folder.log.read_text().splitlines() if "skipping checkpoint" in line]
    assert len(lines) == 1
    assert state.parent.name in lines[0]
    return next(line.split("at step ")[1].split()[0] for line in folder.log.read_text().splitlines() if "continuing" in line)
