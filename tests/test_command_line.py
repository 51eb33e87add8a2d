"""The command line as a person uses it: real processes, exit codes 0, 1, 2, 3, one clear message for a mistake."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from tests import digits_classifier
from tests.driving import SMALL_DBN, Drive, assert_same_run, checkpoints
from trainbook import __main__ as command_line
from trainbook import runtime
from trainbook.__main__ import main
from trainbook.files import read_json
from trainbook.records import RunFolder
from trainbook.run import prepare

# Slow enough to be interrupted, quick enough for a test.
LONG_DBN = [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL_DBN | {"epochs_per_timestep": 400}).items()]


def trainbook(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "trainbook", *arguments], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """`trainbook run` in a terminal, Ctrl-C half way, then `trainbook resume`; what each said and returned."""
    runs = tmp_path_factory.mktemp("runs")
    folder = RunFolder(runs / "mine")
    environment = {**os.environ, "TRAINBOOK_RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "trainbook", "run", "timestep_dbn", "--preset", "smoke", "--run-id", "mine", *LONG_DBN],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    while process.poll() is None and not any(record["stage"] == "chain" for record in folder.history()):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole foreground group
    output, _ = process.communicate(timeout=120)
    stopped = read_json(folder.run_json)
    resumed = trainbook("resume", "mine", env=environment)
    return {
        "folder": folder,
        "env": environment,
        "code": process.returncode,
        "output": output,
        "stopped": stopped,
        "resumed": resumed,
    }


def test_ctrl_c_exits_3_with_the_command_that_goes_on(interrupted):
    assert interrupted["code"] == 3, interrupted["output"]
    assert "trainbook resume mine" in interrupted["output"]
    assert interrupted["stopped"]["status"] == "stopped"
    assert 80 < interrupted["stopped"]["step"] < interrupted["stopped"]["total_steps"]


def test_resume_finishes_it_and_exits_0(interrupted):
    assert interrupted["resumed"].returncode == 0, interrupted["resumed"].stderr
    summary = interrupted["folder"].summary()
    assert summary["status"] == "complete"
    assert summary["segments"][1]["first_step"] == interrupted["stopped"]["step"]
    assert interrupted["folder"].report.exists()
    assert interrupted["folder"].notebook.exists()
    assert not list(interrupted["folder"].path.parent.glob(".*"))


def test_resume_of_a_complete_run_says_so(interrupted):
    again = trainbook("resume", "mine", env=interrupted["env"])
    assert (again.returncode, "is complete" in again.stdout) == (0, True)


def test_verify_confirms_it(interrupted):
    done = trainbook("verify", "mine", env=interrupted["env"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified: the run is what it says" in done.stdout
    assert "DIFFERS" not in done.stdout


@pytest.mark.parametrize("what", ["metric", "export", "records"])
def test_verify_finds_what_was_tampered_with(what, interrupted, tmp_path):
    copy = RunFolder(tmp_path / "copy" / "mine")
    shutil.copytree(interrupted["folder"].path, copy.path)
    if what == "metric":
        copy.run_json.write_text(copy.run_json.read_text().replace('"chain/nats_per_bit": 0.', '"chain/nats_per_bit": 0.0'))
    else:
        path = copy.metrics if what == "records" else copy.export / "dbn.safetensors"
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(bytes(content))
    done = trainbook("verify", str(copy.path), env=interrupted["env"])
    assert done.returncode == 1
    assert done.stdout.count("DIFFERS") == 2  # the row, and the line that points to it


def test_ctrl_c_while_a_resumed_run_is_starting_is_not_forgotten(interrupted, tmp_path):
    environment = {**interrupted["env"], "TRAINBOOK_RUNS": str(tmp_path)}
    folder = RunFolder(tmp_path / "early")
    command = [sys.executable, "-m", "trainbook", "run", "timestep_dbn", "--preset", "smoke", "--run-id", "early", *LONG_DBN]
    command.append("--epochs-per-timestep=40000")  # far longer than the time budget
    stopped = trainbook(*command[3:], "--time-budget", "9s", env=environment)
    assert (stopped.returncode, folder.summary()["status"]) == (3, "stopped"), stopped.stdout + stopped.stderr
    process = subprocess.Popen(
        [*command[:3], "resume", "early", "--time-budget", "1h"],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    time.sleep(4)  # the kernel is coming up; nobody trains yet
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 3
    assert folder.summary()["status"] == "stopped"
    assert folder.summary()["step"] < folder.summary()["total_steps"]


def test_a_killed_kernel_is_recorded_as_failed(interrupted, tmp_path):
    environment = {**interrupted["env"], "TRAINBOOK_RUNS": str(tmp_path)}
    folder = RunFolder(tmp_path / "dead")
    process = subprocess.Popen(
        [sys.executable, "-m", "trainbook", "run", "timestep_dbn", "--preset", "smoke", "--run-id", "dead", *LONG_DBN],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and folder.training_process() is None:
        time.sleep(0.05)
    taken = trainbook("run", "timestep_dbn", "--preset", "smoke", "--run-id", "dead", *LONG_DBN, env=environment)
    assert (taken.returncode, "is training in" in taken.stderr) == (2, True)
    os.kill(folder.training_process(), signal.SIGKILL)
    assert process.wait(60) == 1
    assert folder.summary()["status"] == "failed"
    assert "kernel died" in folder.summary()["why"]


def test_a_mistake_on_resuming_a_run_that_was_cut_off_leaves_it_as_it_was(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (160, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", train=pixels[:130], test=pixels[130:])
    overrides = {**SMALL_DBN, "dataset": "file", "data_file": str(tmp_path / "mine.npz"), "max_train_images": 96}
    assert Drive(tmp_path / "runs", "cut", overrides, signal_step=50)() == -signal.SIGKILL
    (tmp_path / "mine.npz").unlink()
    resumed = trainbook("resume", "cut")
    assert (resumed.returncode, "cannot read images" in resumed.stderr) == (2, True), resumed.stdout + resumed.stderr
    assert RunFolder(tmp_path / "runs" / "cut").summary()["status"] == "running"


def test_report_and_compare(interrupted):
    interrupted["folder"].report.unlink()
    assert trainbook("report", "mine", env=interrupted["env"]).returncode == 0
    assert "Held-out metrics" in interrupted["folder"].report.read_text()
    table = trainbook("compare", "mine", "mine", env=interrupted["env"])
    assert table.returncode == 0
    assert "chain/nats_per_bit" in table.stdout


def test_exported_weights_load_without_pickle_and_equal_the_checkpoint(interrupted):
    from safetensors.torch import load_file

    from tests.driving import assert_identical, final_state

    saved = final_state(interrupted["folder"])["modules"]
    for name, tensors in saved.items():
        assert_identical(
            load_file(interrupted["folder"].export / f"{name}.safetensors"), {k: v.contiguous() for k, v in tensors.items()}
        )


def mistake(capfd, tmp_path, *arguments):
    """Run a command that must be refused: exit 2, no traceback, nothing left behind; returns what it said."""
    before = sorted(tmp_path.rglob("*"))
    assert main(list(arguments)) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert said.count("\n") <= 4
    assert sorted(tmp_path.rglob("*")) == before
    return said


def test_a_misspelt_value_is_refused(capfd, tmp_path):
    said = mistake(capfd, tmp_path, "run", "timestep_dbn", "--preset", "smoke", "--negative-phase", "pdc")
    assert "negative_phase = 'pdc'" in said


def test_a_misspelt_option_exits_2_and_starts_nothing(capfd, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["run", "timestep_dbn", "--learning-rat", "1e-3"])
    assert stop.value.code == 2
    assert "--learning-rat" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_value_out_of_range_is_refused_with_the_range(capfd, tmp_path):
    said = mistake(capfd, tmp_path, "run", "timestep_dbn", "--timesteps", "0")
    assert "timesteps = '0'" in said
    assert "greater than or equal to 1" in said


def test_an_unknown_preset_or_workflow_or_run_lists_the_known(capfd, tmp_path):
    assert "smoke, laptop, full" in mistake(capfd, tmp_path, "run", "timestep_dbn", "--preset", "enormous")
    assert "timestep_dbn" in mistake(capfd, tmp_path, "show", "timestep")
    assert "there is no run 'nothing'" in mistake(capfd, tmp_path, "resume", "nothing")


def test_a_bad_time_budget_price_or_device_is_refused(capfd, tmp_path, monkeypatch):
    assert "is not a duration" in mistake(capfd, tmp_path, "run", "timestep_dbn", "--time-budget", "soon")
    monkeypatch.setenv("TRAINBOOK_PRICE_PER_HOUR", "cheap")
    assert "is not a number" in mistake(capfd, tmp_path, "run", "timestep_dbn")
    monkeypatch.delenv("TRAINBOOK_PRICE_PER_HOUR")
    done = trainbook("run", "timestep_dbn", "--device", "cuda:7")  # the notebook finds it
    assert (done.returncode, "device 'cuda:7' does not work" in done.stderr) == (2, True), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_refused(capfd, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("TRAINBOOK_RUNS", str(tmp_path / "file"))
    assert "cannot write in" in mistake(capfd, tmp_path, "run", "timestep_dbn", "--preset", "smoke")


def test_a_foreign_run_folder_is_refused(capfd, tmp_path):
    folder = RunFolder(tmp_path / "runs" / "theirs")
    folder.create({"workflow": "another", "config": {}})
    said = mistake(capfd, tmp_path, "run", "timestep_dbn", "--preset", "smoke", "--run-id", "theirs")
    assert "workflow another, not timestep_dbn" in said
    (tmp_path / "runs" / "letters").mkdir()
    (tmp_path / "runs" / "letters" / "thesis.txt").write_text("two years of work")
    assert "is not a run folder" in mistake(capfd, tmp_path, "run", "timestep_dbn", "--run-id", "letters")


@pytest.mark.parametrize("run_id", ["../outside", "/absolute", ".hidden", "a b", "x/y"])
def test_a_run_id_cannot_leave_the_runs_folder(run_id, capfd, tmp_path):
    said = mistake(capfd, tmp_path, "run", "timestep_dbn", "--preset", "smoke", "--run-id", run_id)
    assert "cannot name a run folder" in said


def test_a_missing_data_file_is_refused_in_the_notebook_too(tmp_path):
    done = trainbook("run", "timestep_dbn", "--preset", "smoke", "--dataset", "file", "--data-file", "missing.npz")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "cannot read images from missing.npz" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_users_own_images_train(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (160, 16, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", train=pixels[:120], test=pixels[120:])
    done = trainbook(
        "run", "timestep_dbn", "--preset", "smoke", "--dataset", "file", "--data-file", "mine.npz", "--run-id", "colour"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert RunFolder(tmp_path / "runs" / "colour").summary()["data"]["source"] == "file mine.npz"


def test_a_run_that_learns_nothing_exits_1_and_says_why(tmp_path):
    done = trainbook("run", "timestep_dbn", "--preset", "smoke", "--run-id", "bad", "--learning-rate", "1e-30")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "timesteps [1, 2, 3] made no update" in done.stderr
    summary = RunFolder(tmp_path / "runs" / "bad").summary()
    assert summary["status"] == "failed"
    assert "made no update" in summary["why"]
    assert "Traceback" in (tmp_path / "runs" / "bad" / "logs" / "run.log").read_text()


def test_doctor_finds_this_machine_well(capsys):
    assert main(["doctor"]) == 0
    assert "NOT OK" not in capsys.readouterr().out


@pytest.fixture
def kept(monkeypatch):
    """A run cut off at step 30 of 40, checkpoints of steps 11 to 30 kept, and a whole one; `resume` trains without a notebook."""
    monkeypatch.setenv(runtime.KEEP, "20")
    monkeypatch.setenv(runtime.RUNS, str(runtime.runs_folder()))  # `resume` sets it again

    def train(name, preset, overrides, run_id, authentic, until=40):
        run = prepare(digits_classifier, preset, overrides, run_id, authentic)
        run.load_data()
        run.build()
        steps = digits_classifier.train(run.config, run.data, run.state)
        run.workflow = SimpleNamespace(train=lambda *_: itertools.islice(steps, until), name=run.workflow.name)
        run.train(checkpoint_seconds=1e-6, progress=False)
        run.folder.unlock()
        return run.folder

    monkeypatch.setattr(command_line, "execute", lambda *arguments: train(*arguments) and 0)
    overrides = {"steps": 40, "validate_every": 4, "ema_decay": 0.9}
    whole = train("", "smoke", overrides, "whole", False)
    mine = train("", "smoke", overrides, "mine", False, until=30)
    assert [int(path.name) for path in checkpoints(mine)] == list(range(11, 31))
    return mine, whole


def test_resume_goes_back_to_a_step_and_ends_where_it_would_have(kept):
    mine, whole = kept
    assert main(["resume", "mine", "--step", "17"]) == 0
    assert mine.summary()["segments"][-1]["first_step"] == 17
    assert_same_run(mine, whole)
    aside = sorted(path.name for path in mine.checkpoints.glob(".torn-*"))
    assert aside == [f".torn-{step:010d}" for step in range(18, 31)]


def test_resume_at_an_unknown_step_names_those_there_are(kept, capfd):
    mine, _ = kept
    before = sorted(mine.checkpoints.iterdir())
    assert main(["resume", "mine", "--step", "7"]) == 2
    said = capfd.readouterr().err
    assert "there is no checkpoint of step 7" in said
    assert f"choose one of: {', '.join(map(str, range(11, 31)))}" in said
    assert sorted(mine.checkpoints.iterdir()) == before


def test_resume_at_a_step_whose_checkpoint_is_torn_is_refused(kept, capfd):
    mine, _ = kept
    (mine.checkpoints / "0000000017" / "state.pt").write_bytes(b"torn")
    before = sorted(mine.checkpoints.iterdir())
    assert main(["resume", "mine", "--step", "17"]) == 2
    assert "0000000017: state.pt was cut short or altered" in capfd.readouterr().err
    assert sorted(mine.checkpoints.iterdir()) == before


def test_resume_at_a_step_leaves_a_run_alone_that_is_training(kept, capfd):
    mine, _ = kept
    before = sorted(mine.checkpoints.iterdir())
    mine.lock()
    assert main(["resume", "mine", "--step", "17"]) == 2
    mine.unlock()
    assert "is training in" in capfd.readouterr().err
    assert sorted(mine.checkpoints.iterdir()) == before
