"""A run as a notebook sees it: what it continues, what it refuses, what it writes down."""

import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import digits_classifier
from tests.driving import SMALL_DBN, Drive, assert_same_run, checkpoints, train_and_draw
from trainbook import records, runtime
from trainbook.errors import UserError
from trainbook.records import measured_times, new_run_id
from trainbook.run import DRAWING_STEP, EVALUATION_STEP, prepare
from trainbook.seeding import seed_step
from trainbook.workflows.legal_bert import licences


@pytest.fixture
def stopped(tmp_path):
    drive = Drive(tmp_path / "runs", new_run_id("timestep_dbn", "smoke"), signal_step=100, signal_number=signal.SIGTERM)
    assert drive() == 0
    return drive


def test_running_the_cells_again_continues_the_unfinished_run_of_this_config(stopped):
    assert prepare("timestep_dbn", "smoke", SMALL_DBN).run_id == stopped.run_id
    assert prepare("timestep_dbn", "smoke", SMALL_DBN | {"seed": 5}).run_id != stopped.run_id
    assert prepare("timestep_dbn", "smoke", SMALL_DBN, authentic=False, run_id="mine").run_id == "mine"
    folder = stopped.folder
    folder.lock()
    assert prepare("timestep_dbn", "smoke", SMALL_DBN).run_id != stopped.run_id
    folder.unlock()


def test_a_finished_run_is_not_continued(stopped):
    run = train_and_draw(prepare("timestep_dbn", "smoke", SMALL_DBN))
    run.finish()
    assert prepare("timestep_dbn", "smoke", SMALL_DBN).run_id != stopped.run_id
    assert measured_times(run.runtime.runs_folder)["timestep_dbn"].startswith("smoke 0.")


def test_a_stopped_run_is_not_evaluated_but_reported(stopped):
    run = prepare("timestep_dbn", "smoke", SMALL_DBN)
    run.load_data()
    run.build()
    run.runtime = run.runtime.__class__(**{**run.runtime.__dict__, "deadline": 0.0})
    run.train(progress=False)
    assert "trainbook resume" in run.evaluate()
    run.draw()
    assert run.finish().startswith("stopped")
    page = run.folder.report.read_text()
    assert "Metrics are measured when the run is complete" in page
    assert "the time budget is spent" in page
    assert "metrics" not in run.folder.summary()


def test_authentic_refuses_a_changed_kit_and_synthetic_or_unsigned_data(monkeypatch):
    for revision in ("abc+changes", None):
        monkeypatch.setattr(records, "git_revision", lambda revision=revision: revision)
        with pytest.raises(UserError, match="need an unchanged kit"):
            prepare("timestep_dbn", "smoke", authentic=True)
    monkeypatch.setattr(records, "git_revision", lambda: "abc")
    run = prepare("timestep_dbn", "smoke", authentic=True)
    run.load_data()  # real digits with a checksum
    real = run.workflow.load_data(run.config, run.runtime)
    for change in ({"synthetic": True}, {"synthetic": None}, {"sha256": ""}):
        altered = real.__class__(**{**real.__dict__, **change})
        monkeypatch.setattr(run.workflow.module, "load_data", lambda config, runtime, altered=altered: altered, raising=False)
        with pytest.raises(UserError, match="need real data with a checksum"):
            run.load_data()


def test_the_price_of_the_machine_becomes_the_cost_of_the_run(stopped, monkeypatch):
    monkeypatch.setenv("TRAINBOOK_PRICE_PER_HOUR", "3600")
    run = prepare("timestep_dbn", "smoke", SMALL_DBN)
    run.load_data()
    run.build()
    run.train(progress=False)
    run.folder.unlock()
    summary = run.folder.summary()
    assert summary["estimated_cost"] == pytest.approx(summary["wall_seconds"])
    assert len(summary["segments"]) == 2


def finished_by_hand(overrides=SMALL_DBN):
    return train_and_draw(prepare("timestep_dbn", "smoke", overrides, "by-hand"))


def test_a_run_that_broke_never_becomes_complete(monkeypatch):
    run = prepare("timestep_dbn", "smoke", SMALL_DBN, "broken")
    run.load_data()
    run.build()
    train = run.workflow.module.train

    def breaking(config, data, state):
        for record in train(config, data, state):
            if state.step == 20:
                raise ZeroDivisionError("in the workflow")
            yield record

    monkeypatch.setattr(run.workflow.module, "train", breaking, raising=False)
    with pytest.raises(ZeroDivisionError):
        run.train(progress=False)
    assert "the run is failed" in run.evaluate()
    run.draw()
    assert run.finish().startswith("failed")
    assert (run.folder.summary()["status"], run.folder.summary()["why"]) == ("failed", "in the workflow")


def test_a_run_that_was_not_evaluated_is_not_complete():
    run = prepare("timestep_dbn", "smoke", SMALL_DBN, "hasty")
    run.load_data()
    run.build()
    run.train(progress=False)
    assert run.finish().startswith("running")
    assert run.folder.summary()["status"] == "running"


def test_opening_a_complete_run_again_changes_nothing():
    run = finished_by_hand()
    assert run.finish().startswith("complete")
    before = run.folder.run_json.read_bytes()
    for picture in run.folder.figures.iterdir():
        picture.write_bytes(b"as it was drawn then")
    again = finished_by_hand()
    again.curves()
    assert {picture.read_bytes() for picture in run.folder.figures.iterdir()} == {b"as it was drawn then"}
    assert again.folder.run_json.read_bytes() == before
    assert again.finish().startswith("complete")
    assert again.folder.run_json.read_bytes() == before


def test_resume_on_other_data_is_refused(tmp_path):
    def write(seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (160, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / "mine.npz", train=pixels[:130], test=pixels[130:])

    overrides = {**SMALL_DBN, "dataset": "file", "data_file": str(tmp_path / "mine.npz"), "max_train_images": 96}
    write(0)
    assert Drive(tmp_path / "runs", "mine", overrides, signal_step=50, signal_number=signal.SIGTERM)() == 0
    write(1)
    run = prepare("timestep_dbn", "smoke", overrides, "mine")
    run.load_data()
    run.build()
    with pytest.raises(UserError, match="was started on other data"):
        run.train(progress=False)
    assert run.data.synthetic is None
    assert run.folder.summary()["status"] == "stopped"


def test_a_session_with_other_versions_says_so_and_the_report_keeps_both(stopped, monkeypatch):
    found = records.provenance()
    packages = {**found["packages"], "torch": "2.99.0"}
    monkeypatch.setattr("trainbook.run.provenance", lambda: {**found, "git": "f" * 40, "packages": packages})
    train_and_draw(prepare("timestep_dbn", "smoke", SMALL_DBN)).finish()
    (warning,) = [line for line in stopped.folder.log.read_text().splitlines() if "the session before" in line]
    assert f"torch {torch.__version__.split('+')[0]}" in warning
    assert "kit ffffffff and torch 2.99.0" in warning
    page = stopped.folder.report.read_text()
    assert "<td>ffffffff, 2.99.0</td>" in page
    assert f", {found['packages']['torch']}</td>" in page


def test_a_run_on_texts_of_installed_packages_goes_on_where_their_versions_are_others(tmp_path, monkeypatch):
    drive = Drive(tmp_path / "runs", "mine", {}, "legal_bert", signal_step=3, signal_number=signal.SIGTERM)
    assert drive() == 0
    monkeypatch.setattr(licences, "DISTRIBUTIONS", licences.DISTRIBUTIONS[:-20])

    def load(run_id):
        run = prepare("legal_bert", "smoke", run_id=run_id)
        run.load_data()
        run.build()
        return run

    assert load("other").data.sha256 != drive.folder.summary()["data"]["sha256"]
    run = load("mine")
    run.train(progress=False)
    run.leave()
    assert run.trained
    (kept,) = drive.folder.data.iterdir()
    assert [text in kept.read_text() for text in ("scikit-learn", "urllib3 ")] == [True, True]
    kept.unlink()
    with pytest.raises(UserError, match="was started on other data"):
        load("mine").train(progress=False)


def test_evaluation_and_drawing_have_random_streams_of_their_own():
    draws = []
    for step in (0, 1, 2, EVALUATION_STEP, DRAWING_STEP):
        seed_step(3, step)
        draws.append(float(torch.rand(())))
    assert len(set(draws)) == 5


def test_a_summary_of_another_kit_does_not_stop_list(tmp_path):
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "run.json").write_text("{}")
    assert measured_times(tmp_path / "runs") == {}
    prepare("timestep_dbn", "smoke")


def digits(run_id, train=digits_classifier.train, deadline=None):
    """A run of the digits classifier up to its training, which another function may do."""
    run = prepare(digits_classifier, "smoke", {"steps": 40}, run_id)
    run.load_data()
    run.build()
    run.workflow = SimpleNamespace(**vars(digits_classifier) | {"train": train, "name": "digits_classifier"})
    run.runtime = replace(run.runtime, deadline=deadline)
    return run


def breaking_after(step):
    def train(config, data, state):
        for record in digits_classifier.train(config, data, state):
            if state.step > step:
                raise ZeroDivisionError("in the workflow")
            yield record

    return train


def trained(run, **options):
    run.train(progress=False, **options)
    run.folder.unlock()
    return run.folder


def test_what_broke_a_workflow_is_in_errors_log_and_the_run_goes_on_from_its_checkpoint(capfd):
    whole = trained(digits("whole"))
    assert not (whole.logs / runtime.ERROR_LOG).exists()
    run = digits("broken", breaking_after(20))
    with pytest.raises(ZeroDivisionError):
        run.train(checkpoint_seconds=1e-6, progress=False)
    assert "Traceback" not in capfd.readouterr().err  # the notebook shows it, once
    log = (run.folder.logs / runtime.ERROR_LOG).read_text()
    assert log.count("Traceback") == 1
    assert 'raise ZeroDivisionError("in the workflow")' in log
    assert log.rstrip().endswith("ZeroDivisionError: in the workflow")
    assert all("INFO" not in line for line in log.splitlines())
    assert log in run.folder.log.read_text()
    summary = run.folder.summary()
    assert (summary["status"], summary["why"]) == ("failed", "in the workflow")
    resumed = trained(digits("broken"))
    assert resumed.summary()["segments"][-1]["first_step"] == 20
    assert_same_run(resumed, whole)
    assert (resumed.logs / runtime.ERROR_LOG).read_text() == log


def test_a_run_whose_checkpoints_and_logs_lie_elsewhere_resumes(tmp_path, monkeypatch):
    whole = trained(digits("whole"))
    monkeypatch.setenv(runtime.CHECKPOINT_DIR, "big disk")
    monkeypatch.setenv(runtime.LOG_DIR, str(tmp_path / "records"))
    stopped = trained(digits("stopped", deadline=0.0))
    assert stopped.summary()["status"] == "stopped"
    assert (tmp_path / "big disk" / "stopped" / "0000000001" / "state.pt").is_file()
    assert "at step 1 of 40" in (tmp_path / "records" / "stopped" / "run.log").read_text()
    assert stopped.checkpoints.is_symlink()
    assert stopped.logs.is_symlink()
    monkeypatch.delenv(runtime.CHECKPOINT_DIR)
    monkeypatch.delenv(runtime.LOG_DIR)
    resumed = trained(digits("stopped"))
    assert resumed.summary()["segments"][-1]["first_step"] == 1
    assert_same_run(resumed, whole)
    assert (tmp_path / "big disk" / "stopped" / "0000000040" / "state.pt").is_file()
    assert "continuing stopped at step 1 of 40" in (tmp_path / "records" / "stopped" / "run.log").read_text()


def test_as_many_checkpoints_stay_as_the_runtime_says(monkeypatch):
    monkeypatch.setenv(runtime.KEEP, "5")
    folder = trained(digits("mine"), checkpoint_seconds=1e-6)
    assert [int(path.name) for path in checkpoints(folder)] == [36, 37, 38, 39, 40]
