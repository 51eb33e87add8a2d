"""The form says what pydantic says and saves what every launcher reads; the panel stops and resumes; nobody there, no cost."""

import subprocess
import sys
import time

import pytest

from tests import digits_classifier
from tests.driving import assert_same_run
from trainbook import catalog, forms, runtime
from trainbook import run as running
from trainbook.config import field_groups
from trainbook.forms import Form, LivePanel
from trainbook.live import MAX_POINTS, LiveView, Progress
from trainbook.records import RunFolder
from trainbook.spec import RunSpec

NAMES = catalog.names()


def dbn_form(tmp_path, **options):
    return Form(RunSpec(workflow="timestep_dbn", preset="smoke"), path=tmp_path / "run.toml", **options)


def test_without_a_person_it_is_the_identity_and_loads_nothing():
    code = (
        "import sys; from trainbook import forms; from trainbook.spec import RunSpec\n"
        "spec = RunSpec(workflow='timestep_dbn', preset='smoke')\n"
        "assert forms.edit(spec) is spec\n"
        "import trainbook.run\n"
        "assert 'ipywidgets' not in sys.modules and 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_has_a_form_of_all_its_fields(name):
    config_class = catalog.load(name).Config
    grouped = [field for fields in field_groups(config_class).values() for field in fields]
    assert sorted(grouped) == sorted(config_class.model_fields)
    for preset in config_class.PRESETS:
        spec = RunSpec(workflow=name, preset=preset)
        form = Form(spec)
        assert form.inputs.keys() == config_class.model_fields.keys()
        assert form.spec() == spec
        assert form._check() == spec.config()
        assert not form.save.disabled


def test_a_mistake_stands_beside_its_field_and_is_not_saved(tmp_path):
    form = dbn_form(tmp_path)
    form.inputs["timesteps"].value = "0"
    form.inputs["hidden_units"].value = "16, 16"
    form.inputs["learning_rate"].value = "quick"
    assert "greater than or equal to 1" in form.notes["timesteps"].value
    assert "valid number" in form.notes["learning_rate"].value
    assert "✗" in form.notes["hidden_units"].value
    assert sum("✗" in note.value for note in form.notes.values()) == 3
    form._write()
    assert form.save.disabled
    assert not (tmp_path / "run.toml").exists()


def test_what_holds_between_fields_is_told_below_them(tmp_path):
    form = dbn_form(tmp_path)
    form.inputs["joint_epochs"].value = "3"
    assert "with hidden_mean the levels are not one machine" in form.wrong.value
    assert form.save.disabled
    form.inputs["context"].value = "hidden_sample"
    assert form.wrong.value == ""


def test_save_writes_what_was_changed_and_the_preset_can_be_switched_under_it(tmp_path):
    told = []
    form = dbn_form(tmp_path, saved=lambda spec: told.append(spec) or "now this")
    form.inputs["timesteps"].value = "5"
    form.inputs["hidden_units"].value = "8, 8,4"
    form.inputs["negative_phase"].value = "cd"
    form.inputs["noisy_context"].value = False
    assert "the preset has &#x27;3&#x27;" in form.notes["timesteps"].value
    form.preset.value = "laptop"
    assert "the preset has &#x27;8&#x27;" in form.notes["timesteps"].value
    assert form.inputs["epochs_per_timestep"].value == "100"  # follows the preset
    form.save.click()
    spec = RunSpec.read(tmp_path / "run.toml")
    assert told == [spec]
    assert "now this" in form.message.value
    changed = {"timesteps": 5, "hidden_units": (8, 8, 4), "negative_phase": "cd", "noisy_context": False}
    assert spec.preset == "laptop"
    assert spec.config() == catalog.load("timestep_dbn").Config.from_preset("laptop", changed)
    assert spec.overrides.keys() == changed.keys()
    form.reset.click()
    assert form.spec().overrides == {}


def test_an_estimate_is_struck_out_when_a_value_changes_and_an_error_is_shown(tmp_path):
    form = dbn_form(tmp_path, estimate=lambda config: f"{1 / (4 - config.timesteps):.2f} for {config.timesteps}")
    form.measure.click()
    form.save.click()
    assert form.estimated.value == "1.00 for 3"
    form.inputs["timesteps"].value = "4"
    assert form.estimated.value == "<s>1.00 for 3</s>"
    form.measure.click()
    assert "ZeroDivisionError" in form.estimated.value


def test_the_estimate_of_a_run_counts_its_parameters(capfd):
    run = running.prepare("timestep_dbn", "smoke")
    run.load_data()
    run.build()
    expected = sum(run.state.num_parameters().values())
    assert run._estimate(run.config).startswith(f"{expected:,} parameters; {run.state.total_steps:,} steps take ")


def test_a_saved_form_makes_the_notebooks_run_another_one_but_not_while_it_trains(tmp_path):
    run = running.prepare("timestep_dbn", "smoke", run_id="first")
    spec = RunSpec(workflow="timestep_dbn", preset="smoke", overrides={"timesteps": 5})
    run.is_training = True
    assert "stays as it is" in run._take(spec)
    assert run.run_id == "first"
    run.is_training = False
    assert run.run_id not in run._take(spec) or run.run_id != "first"
    assert (run.config.timesteps, run.state) == (5, None)
    assert run._spec() == spec


# The run under way


def progress(step, **numbers):
    return Progress(step, 100, "fit", {name: [(step, value)] for name, value in numbers.items()}, {"host_memory_bytes": 1e9})


def test_curves_hold_all_of_a_long_run_in_few_points():
    view = LiveView()
    for step in range(1, 5001):
        page = view.show(Progress(step, 5000, "fit", {"loss": [(step, 1.0 / step)]}, {"steps_per_second": 50.0}))
    points = view.curves["loss"]
    assert len(points) <= MAX_POINTS
    assert points[0] == (1, 1.0)
    assert points[-1][0] > 4900
    assert all(value == 1.0 / step for step, value in points)
    assert "step 5,000 of 5,000" in page
    assert "50 steps/s" in page
    assert page.count("<polyline") == 1


def test_the_curves_of_the_stage_under_way_come_first():
    view = LiveView()
    names = [f"metric {index}" for index in range(8)]
    view.load([{"step": 1, "stage": "first", **dict.fromkeys(names, 1.0)}])
    page = view.show(Progress(2, 9, "second", {"another": [(2, 5.0)]}, {}))
    assert page.index("another") < page.index("metric 0")


def test_a_step_that_is_taken_again_does_not_bend_the_curve_back():
    view = LiveView()
    view.load([{"step": 1, "stage": "fit", "loss": 3.0}, {"step": 9, "stage": "fit", "loss": 1.0}])
    view.show(progress(5, loss=2.0))
    assert view.curves["loss"] == [(1, 3.0), (9, 1.0)]


@pytest.fixture
def attended(monkeypatch):
    """A person in front of the digits classifier, whose panel is kept."""
    panels = []

    class Kept(LivePanel):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            panels.append(self)

    monkeypatch.setattr(forms, "can_show", lambda: True)
    monkeypatch.setattr(forms, "LivePanel", Kept)
    return panels


def prepared(run_id, steps):
    run = running.prepare(digits_classifier, "smoke", {"steps": steps}, run_id)
    run.load_data()
    run.build()
    return run


def test_stop_saves_and_resume_goes_on_bit_for_bit(attended, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("trainbook.engine.FLUSH_SECONDS", 0.01)
    whole = prepared("whole", 400)
    monkeypatch.setattr(forms, "can_show", lambda: False)
    whole.train(progress=False)
    whole.leave()
    monkeypatch.setattr(forms, "can_show", lambda: True)
    run = prepared("mine", 400)
    show = LiveView.show
    monkeypatch.setattr(LiveView, "show", lambda view, at: (at.step > 50 and attended[0].stop.click()) or show(view, at))
    run.train()
    (panel,) = attended
    assert (run.summary["status"], run.summary["why"]) == ("stopped", "Stop was pressed")
    assert 50 < run.state.step < 400
    assert not panel.go_on.disabled
    assert panel.stop.disabled
    assert "stopped at step" in panel.message.value
    monkeypatch.setattr(LiveView, "show", show)
    panel.go_on.click()
    assert "complete at step 400" in panel.message.value
    assert (panel.go_on.disabled, panel.stop.disabled) == (True, True)
    assert run.trained
    run.leave()
    assert_same_run(RunFolder(tmp_path / "runs" / "whole"), RunFolder(tmp_path / "runs" / "mine"))
    assert "it/s" not in capfd.readouterr().err  # the panel is the progress


def test_several_processes_are_watched_through_the_run_folder_and_stopped(attended, tmp_path, monkeypatch):
    monkeypatch.setenv(runtime.PROCESSES, "2")
    monkeypatch.setenv("PYTHONPATH", str(digits_classifier.__file__).rpartition("/tests/")[0])
    run = prepared("mine", 1_000_000)
    monkeypatch.setattr(LiveView, "show", lambda view, at: (at.step and attended[0].stop.click()) or f"step {at.step}")
    run.train()
    assert run.summary["status"] == "stopped"
    assert 0 < run.state.step < 1_000_000
    assert "stopped at step" in attended[0].message.value


def test_a_run_that_breaks_says_so_in_its_panel(attended, monkeypatch):
    def breaks(config, data, state):
        raise ValueError("no such luck")
        yield

    run = prepared("mine", 20)
    monkeypatch.setattr(digits_classifier, "train", breaks)
    with pytest.raises(ValueError, match="no such luck"):
        run.train()
    assert "ValueError: no such luck" in attended[0].message.value
    assert attended[0].go_on.disabled


def test_watching_costs_less_than_two_per_cent_of_the_cpu(attended, monkeypatch):
    spent, whole = [], LivePanel.__call__

    def timed(panel, at):
        began = time.thread_time()
        asked = whole(panel, at)
        spent.append(time.thread_time() - began)
        return asked

    run = prepared("mine", 1_000_000)
    run.runtime = running.replace(run.runtime, deadline=time.monotonic() + 6)
    monkeypatch.setattr(LivePanel, "__call__", timed)
    began = time.thread_time()
    run.train()
    assert len(spent) >= 3
    assert sum(spent) < 0.02 * (time.thread_time() - began)
