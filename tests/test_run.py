"""A run as a notebook sees it: what it continues, what it refuses, what it writes down."""

import signal

import pytest

from tests.driving import SMALL_DBN, Drive
from trainbook import run as run_module
from trainbook.errors import UserError
from trainbook.records import measured_times
from trainbook.run import new_run_id, prepare


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
    run = prepare("timestep_dbn", "smoke", SMALL_DBN)
    run.load_data()
    run.build()
    run.train(progress=False)
    run.evaluate()
    run.draw()
    run.finish()
    assert prepare("timestep_dbn", "smoke", SMALL_DBN).run_id != stopped.run_id
    assert measured_times(run.runtime.runs_folder)["timestep_dbn"].startswith("smoke 0.")


def test_a_stopped_run_is_not_evaluated_but_reported(stopped):
    run = prepare("timestep_dbn", "smoke", SMALL_DBN)
    run.load_data()
    run.build()
    run.runtime = run.runtime.__class__(**{**run.runtime.__dict__, "deadline": 0.0})
    run.train(progress=False)
    assert run.stopped
    assert "trainbook resume" in run.evaluate()
    run.draw()
    assert run.finish().startswith("stopped")
    page = run.folder.report.read_text()
    assert "Metrics are measured when the run is complete" in page
    assert "the time budget is spent" in page
    assert "metrics" not in run.folder.summary()


def test_authentic_refuses_a_changed_kit_and_synthetic_or_unsigned_data(monkeypatch):
    monkeypatch.setattr(run_module, "git_revision", lambda: "abc+changes")
    with pytest.raises(UserError, match="need an unchanged kit"):
        prepare("timestep_dbn", "smoke", authentic=True)
    monkeypatch.setattr(run_module, "git_revision", lambda: "abc")
    run = prepare("timestep_dbn", "smoke", authentic=True)
    run.load_data()  # real digits with a checksum
    real = run.workflow.load_data(run.config, run.runtime)
    for change in ({"synthetic": True}, {"sha256": ""}):
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
