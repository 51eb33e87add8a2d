"""A sweep trains what `trainbook run` trains, goes on where it was cut off, and says what scipy says of the runs' metrics."""

import itertools
import os
import signal
import subprocess
import sys
import time

import pytest
from scipy import stats

from tests import digits_classifier
from tests.driving import REPOSITORY, assert_same_run
from trainbook import catalog, runtime, sweep, trials
from trainbook import run as running
from trainbook.__main__ import main
from trainbook.errors import RunFailed, UserError
from trainbook.files import read_json, write_json
from trainbook.records import EXIT_CODES, RunFolder

QUICK = {"batch_size": 48, "steps": 30, "learning_rate": 0.01}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items() if name != "steps"]


def train(name, preset, overrides, run_id, authentic=False, stop=None, ends_early=None):
    """What the notebook does, without a kernel."""
    run = running.prepare(name, preset, overrides, run_id, authentic)
    run.load_data()
    run.build()
    try:
        run.train(progress=False)
    except RunFailed:
        return EXIT_CODES["failed"]
    run.evaluate()
    run.draw()
    run.finish()
    return EXIT_CODES[run.summary["status"]]


@pytest.fixture
def digits(monkeypatch):
    """The digits classifier as the one workflow, trained without kernels."""
    workflow = catalog.Workflow("digits_classifier", digits_classifier)
    monkeypatch.setattr(catalog, "names", lambda: ["digits_classifier"])
    for module in (catalog, running, sys.modules["trainbook.report"]):
        monkeypatch.setattr(module, "load", lambda name: workflow)
    monkeypatch.setattr(trials, "execute", train)


def files(folder):
    """Content and time of change of every file."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


def runs(tmp_path):
    return sorted(path.parent.name for path in (tmp_path / "runs").glob("*/run.json"))


def summary_of(tmp_path):
    (path,) = (tmp_path / "runs").glob("*/sweep.json")
    return read_json(path)


# What is to be trained


def test_commas_in_brackets_do_not_separate():
    assert sweep.read_fields(["hidden-units=(16,16,8),[4,4,4], 8", "loss=a"]) == {
        "hidden_units": ["(16,16,8)", "[4,4,4]", "8"],
        "loss": ["a"],
    }


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["timesteps"], "names no values"),
        (["=3"], "names no values"),
        (["timesteps=1", "timesteps=2"], "given twice"),
        (["seed=1,2"], "--seeds"),
    ],
)
def test_a_field_that_cannot_be_read_is_refused(texts, said):
    with pytest.raises(UserError, match=said):
        sweep.read_fields(texts)


def test_every_combination_comes_once_with_every_seed_and_has_a_name_of_its_own():
    fields = {"timesteps": ["1", "2", "4"], "hidden_units": ["(8,8,8)", "(16,16,8)"], "weight_decay": ["1e-5", "0"]}
    planned = sweep.plan("timestep_dbn", "smoke", {"block_size": "2"}, fields, "0,7")
    expected = set(itertools.product((1, 2, 4), ((8, 8, 8), (16, 16, 8)), (1e-5, 0.0), (0, 7)))
    configs = [trial.config for trial in planned.trials]
    assert {(c.timesteps, c.hidden_units, c.weight_decay, c.seed) for c in configs} == expected
    assert len(configs) == len({trial.run_id for trial in planned.trials}) == len(expected)
    assert {c.block_size for c in configs} == {2}
    assert [trial.seed for trial in planned.trials] == [0] * 12 + [7] * 12
    assert planned.trials[0].run_id.startswith(f"{planned.name}-timesteps_1-hidden_units_8_8_8-")


def test_names_stay_when_values_and_seeds_come_and_change_when_the_config_does():
    def names(values, seeds="0", **overrides):
        planned = sweep.plan("timestep_dbn", "smoke", overrides, {"timesteps": values}, seeds)
        return {(trial.config.timesteps, trial.seed): trial.run_id for trial in planned.trials}

    few, many = names(["1", "2"]), names(["4", "2", "1"], "1,0")
    assert few.items() < many.items()
    assert not set(names(["1", "2"], epochs_per_timestep=7).values()) & set(many.values())
    assert names(["1"], "3") == names(["1"], "", seed="3")


def test_whatever_the_values_a_disk_takes_their_names_and_no_two_are_alike():
    values = ["a" * 500, "a" * 501, "b/" * 90, "a/b", "a_b", "a b"]
    planned = sweep.plan("timestep_dbn", "smoke", {"dataset": "file"}, {"data_file": values}, "0,1")
    assert len({trial.run_id for trial in planned.trials}) == 12
    assert all(len(trial.run_id) < 200 and "/" not in trial.run_id for trial in planned.trials)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--field=timesteps=1,0,2000", "--field=weight-decay=-3"],
            ["timesteps = '0'", "timesteps = '2000'", "weight_decay = '-3'"],
        ),
        (["--field=timestep=1"], ["there is no field 'timestep'; did you mean 'timesteps'?"]),
        (["--field=timesteps=1,2,01"], ["timesteps = 1, seed 0 comes twice"]),
        (["--field=timesteps=1", "--seeds=0,1,0"], ["timesteps = 1, seed 0 comes twice"]),
        (["--field=timesteps=1", "--seeds=0,one"], ["seed = 'one'"]),
        (["--field=timesteps=1", "--timesteps=3"], ["timesteps is given as an option and with --field"]),
        (["--field=timesteps=1", "--seeds=0,1", "--seed=3"], ["--seed and --seeds"]),
        (["--field=timesteps=1", "--sweep-id=../a"], ["cannot name a run folder"]),
    ],
)
def test_mistakes_are_told_at_once_before_anything_is_made(options, said, capfd, tmp_path):
    assert main(["sweep", "timestep_dbn", "--preset=smoke", *options]) == 2
    error = capfd.readouterr().err
    assert all(part in error for part in said), error
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_another_run_is_refused_before_any_is_trained(digits, tmp_path, capfd):
    command = ["sweep", "digits_classifier", "--preset=smoke", "--field=steps=20,30", "--sweep-id=mine"]
    theirs = RunFolder(tmp_path / "runs" / "mine-steps_30-seed_0")
    theirs.create({"workflow": "another", "config": {}})
    assert main(command) == 2
    assert "workflow another" in capfd.readouterr().err
    assert runs(tmp_path) == []


# What becomes of it


def test_the_table_says_what_scipy_says_of_the_runs_metrics(digits, tmp_path, monkeypatch, capfd):
    command = ["sweep", "digits_classifier", "--preset=smoke", *OPTIONS, "--metric=accuracy"]
    assert main([*command, "--field=steps=8,60", "--seeds=0,1,2"]) == 0
    said = capfd.readouterr().out
    summary = summary_of(tmp_path)
    assert [entry["metric"] for entry in summary["estimates"]] == ["model/accuracy"] * 2 + ["guess/accuracy"] * 2
    for entry in summary["estimates"]:
        folders = [RunFolder(path.parent) for path in (tmp_path / "runs").glob("*/run.json")]
        values = [
            folder.summary()["metrics"][entry["metric"]]
            for folder in folders
            if read_json(folder.config)["config"]["steps"] == entry["values"]["steps"]
        ]
        assert entry["number"] == len(values) == 3
        if entry["metric"] == "model/accuracy":
            interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
            assert len(set(values)) > 1
            assert (entry["low"], entry["high"]) == pytest.approx(tuple(interval), rel=1e-9)
            assert f"{entry['low']:.4g} to {entry['high']:.4g}" in said
        assert entry["mean"] == pytest.approx(sum(values) / 3, rel=1e-12)
    assert (tmp_path / "runs" / summary["name"] / "sweep.png").stat().st_size > 5000

    # Each is the run that the same overrides give, and another call leaves all as they are and adds what is new.
    train("digits_classifier", "smoke", QUICK | {"steps": 60, "seed": 2}, "alone")
    whole = tmp_path / "runs" / f"{summary['name']}-steps_60-seed_2"
    assert_same_run(RunFolder(tmp_path / "runs" / "alone"), RunFolder(whole))
    before = {entry["run_id"]: files(tmp_path / "runs" / entry["run_id"]) for entry in summary["runs"]}
    executed = []
    monkeypatch.setattr(trials, "execute", lambda *run, **_: executed.append(run[3]) or train(*run))
    assert main([*command, "--field=steps=8,60,9", "--seeds=2,0"]) == 0
    assert "6 runs, 4 of them complete" in (said := capfd.readouterr().out)
    assert said.count("complete\n") == 3  # that line, and one for each of two
    assert executed == [f"{summary['name']}-steps_9-seed_{seed}" for seed in (2, 0)]
    assert trials.run_trial("digits_classifier", "smoke", {}, whole.name) == trials.read_result(RunFolder(whole))
    assert len(executed) == 2
    assert before == {name: files(tmp_path / "runs" / name) for name in before}
    assert [entry["number"] for entry in summary_of(tmp_path)["estimates"]] == [2] * 6


def test_one_seed_has_no_interval(digits, tmp_path, capfd):
    assert main(["sweep", "digits_classifier", "--preset=smoke", *OPTIONS, "--field=steps=5,6"]) == 0
    assert {(e["low"], e["high"], e["number"]) for e in summary_of(tmp_path)["estimates"]} == {(None, None, 1)}
    assert len(summary_of(tmp_path)["estimates"]) == 4  # no target names a metric: all are shown


def test_a_run_that_fails_is_told_and_the_others_are_trained(digits, tmp_path, monkeypatch, capfd):
    whole = digits_classifier.train

    def breaks(config, data, state):
        if config.learning_rate == 100:
            raise RunFailed("too fast")
        return whole(config, data, state)

    def refuses(name, preset, overrides, run_id, authentic, stop, ends_early):
        return EXIT_CODES["failed"] + 1 if "0.5" in overrides.values() else train(name, preset, overrides, run_id, authentic)

    monkeypatch.setattr(digits_classifier, "train", breaks)
    monkeypatch.setattr(trials, "execute", refuses)
    command = ["sweep", "digits_classifier", "--preset=smoke", "--steps=5", "--field=learning_rate=0.01,100,0.5,0.02"]
    assert main(command) == 1
    found = {entry["values"]["learning_rate"]: entry for entry in summary_of(tmp_path)["runs"]}
    assert [entry["status"] for entry in found.values()] == ["complete", "failed", "failed", "complete"]
    said = capfd.readouterr().out
    assert f"failed  {found[100]['run_id']}: too fast\n" in said
    assert f"failed  {found[0.5]['run_id']}: it ended before it was trained" in said
    assert {entry["values"]["learning_rate"] for entry in summary_of(tmp_path)["estimates"]} == {0.01, 0.02}
    monkeypatch.setattr(digits_classifier, "train", whole)
    monkeypatch.setattr(trials, "execute", train)
    assert main(command) == 0  # what failed is tried again


@pytest.mark.parametrize("when", ["before", "while", "after"])
def test_an_interrupt_ends_the_sweep_and_the_same_command_goes_on(when, digits, tmp_path, monkeypatch, capfd):
    def interrupted(name, preset, overrides, run_id, authentic, stop, ends_early):
        if "steps_6" not in run_id:
            return train(name, preset, overrides, run_id, authentic)
        if when == "before":
            raise KeyboardInterrupt
        stop.set()
        return train(name, preset, overrides, run_id, authentic) if when == "after" else EXIT_CODES["failed"]

    command = ["sweep", "digits_classifier", "--preset=smoke", "--field=steps=5,6,7"]
    monkeypatch.setattr(trials, "execute", interrupted)
    assert main(command) == 3
    assert "the same command goes on" in capfd.readouterr().out
    second = {"before": "waiting", "while": "stopped", "after": "complete"}[when]
    assert [entry["status"] for entry in summary_of(tmp_path)["runs"]] == ["complete", second, "waiting"]
    done = {name: files(tmp_path / "runs" / name) for name in runs(tmp_path)}
    monkeypatch.setattr(trials, "execute", train)
    assert main(command) == 0
    assert {name: files(tmp_path / "runs" / name) for name in done} == done
    assert len(runs(tmp_path)) == 3


def test_the_time_budget_is_the_whole_sweeps(digits, monkeypatch, tmp_path):
    budgets = []

    def slow(name, preset, overrides, run_id, authentic, stop, ends_early):
        budgets.append(runtime.parse_duration(os.environ[runtime.TIME_BUDGET]))
        time.sleep(0.6)
        folder = RunFolder(tmp_path / "runs" / run_id)
        folder.path.mkdir()
        summary = {"status": "complete", "why": "", "metrics": {"loss": 1.0}, "wall_seconds": 0.6}
        write_json(folder.run_json, summary)
        return 0

    monkeypatch.setattr(trials, "execute", slow)
    assert main(["sweep", "digits_classifier", "--preset=smoke", "--field=steps=2,3,4,5,6,7,8,9", "--time-budget=2s"]) == 3
    assert 1 < len(budgets) < 5
    assert budgets[0] <= 2
    assert all(later <= earlier - 0.6 for earlier, later in itertools.pairwise(budgets))
    assert [run["why"] for run in summary_of(tmp_path)["runs"] if run["status"] == "stopped"] == ["the time budget is spent"]


def test_the_estimate_is_what_runs_of_the_same_values_took():
    planned = sweep.plan("timestep_dbn", "smoke", {}, {"timesteps": ["1", "2"]}, "0,1,2")
    results = dict.fromkeys((trial.run_id for trial in planned.trials), trials.Result("waiting", ""))
    assert sweep._seconds_left(planned, results, {}) is None
    first, second, third = (trial.run_id for trial in planned.trials[:3])  # timesteps 1, 2, 1
    results[first] = trials.Result("complete", "", {}, 10.0)
    assert sweep._seconds_left(planned, results, {}) == 5 * 10
    results |= {second: trials.Result("complete", "", {}, 3.0), third: trials.Result("failed", "")}
    assert sweep._seconds_left(planned, results, {second: 40.0, third: 1.0}) == 10 + 2 * 40  # with its start, timed here


def test_every_metric_of_a_target_is_shown(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(trials, "execute", train)
    command = ["sweep", "timestep_dbn", "--preset=smoke", "--field=timesteps=1,2", "--max-train-images=64"]
    assert main([*command, "--metric=psnr_test_db", "--metric=beauty"]) == 0
    found = summary_of(tmp_path)
    named = {m for target in catalog.load("timestep_dbn").TARGETS for m in (target.metric, target.value) if isinstance(m, str)}
    assert {e["metric"] for e in found["estimates"]} == named | {"autoencoder/psnr_test_db", "mean_image/psnr_test_db"}
    for run in found["runs"]:
        metrics = RunFolder(tmp_path / "runs" / run["run_id"]).summary()["metrics"]
        assert "SMOKE RUN" in run["stamp"]
        of_this = [e for e in found["estimates"] if e["values"] == run["values"]]
        assert len(of_this) == len(named) + 2
        assert all(e["mean"] == metrics[e["metric"]] for e in of_this)
    assert "not measured: beauty; there are " in capfd.readouterr().out


# The picture


def estimate(metric, mean, half=None, **values):
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return sweep.Estimate(values, metric, mean, low, high, 1 if half is None else 3)


def test_the_picture_has_a_line_per_model_through_the_means():
    found = [estimate(f"{who}/loss", mean * t, 0.5, t=t) for who, mean in (("chain", 2), ("small_rbm", 3)) for t in (4, 1, 2)]
    figure = sweep.draw([*found, estimate("chain/error", 1.0, t=1)])
    loss, error = (axes for axes in figure.axes if axes.axison)
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["chain", "small rbm"]
    for container, mean in zip(loss.containers, (2, 3), strict=True):
        line, _, (bars,) = container.lines
        assert line.get_xydata().tolist() == [[t, mean * t] for t in (1, 2, 4)]
        assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [
            [mean * t - 0.5, mean * t + 0.5] for t in (1, 2, 4)
        ]
    assert [tick.get_text() for tick in loss.get_xticklabels()] == ["1", "2", "4"]
    low, high = loss.get_ylim()
    assert low < 1.5
    assert high > 12.5
    assert all(len(segment) < 2 for segment in error.containers[0].lines[2][0].get_segments())  # one seed: no bar
    assert [line.get_color() for line in (loss.containers[0].lines[0], error.containers[0].lines[0])] == ["C0", "C0"]


@pytest.mark.parametrize(
    ("values", "scale", "labels"),
    [
        ([1, 2, 4, 8], "log", ["1", "2", "4", "8"]),
        ([1e-5, 1e-3], "log", ["1e-05", "0.001"]),
        ([10, 20, 30], "linear", ["10", "20", "30"]),
        ([0, 1, 10], "linear", ["0", "1", "10"]),
        ([5], "linear", ["5"]),
        ([True, False], "linear", ["True", "False"]),
        (["sgd", "adamw"], "linear", ["sgd", "adamw"]),
        ([[16, 16, 8], [4, 4, 4]], "linear", ["(16,16,8)", "(4,4,4)"]),
    ],
)
def test_the_axis_is_logarithmic_or_has_categories_as_fits(values, scale, labels):
    (axes,) = sweep.draw([estimate("loss", index, field=value) for index, value in enumerate(values)]).axes
    assert axes.get_xscale() == scale
    assert [tick.get_text() for tick in axes.get_xticklabels()] == labels
    assert [tick.get_position()[0] for tick in axes.get_xticklabels()] == (
        values if all(type(value) in (int, float) for value in values) else [*range(len(values))]
    )


def test_further_fields_have_a_row_of_panels_per_combination():
    found = [
        estimate(f"a/{metric}", t + 10 * h, t=t, h=h, s="x") for metric in ("loss", "error") for h in (1, 2) for t in (1, 2, 3)
    ]
    axes = sweep.draw(found).axes
    assert [panel.get_title() for panel in axes] == [f"{m}\nh = {h}, s = x" for h in (1, 2) for m in ("loss", "error")]
    assert axes[3].containers[0].lines[0].get_xydata().tolist() == [[t, t + 20] for t in (1, 2, 3)]
    assert axes[3].get_ylim() == axes[1].get_ylim()


# As a person uses it


def test_ctrl_c_exits_3_and_the_same_command_goes_on_and_leaves_complete_runs_alone(tmp_path):
    """Through notebooks and kernels: the second run is cut off in the middle, the sweep then completed."""
    notebook = (REPOSITORY / "notebooks" / "timestep_dbn.ipynb").read_text()
    notebook = notebook.replace("from trainbook.workflows import", "from tests import digits_command,")
    (tmp_path / "digits_classifier.ipynb").write_text(notebook.replace("timestep_dbn", "digits_classifier"))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "TEST_NOTEBOOKS": str(tmp_path),
    }
    command = [sys.executable, "-m", "tests.digits_command", "sweep", "digits_classifier", "--preset=smoke", "--sweep-id=mine"]
    command += ["--field=steps=20,3000", "--metric=model/accuracy", "--checkpoint-every=1s"]
    first, second = (RunFolder(tmp_path / "runs" / f"mine-steps_{steps}-seed_0") for steps in (20, 3000))
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while process.poll() is None and not second.history():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole foreground group
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 3, output
    assert "stopped: SIG" in output
    assert [run["status"] for run in summary_of(tmp_path)["runs"]] == ["complete", "stopped"]
    cut, before = second.summary()["step"], files(first.path)
    assert 0 < cut < 3000
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert files(first.path) == before
    assert second.summary()["segments"][1]["first_step"] == cut
    assert first.notebook.exists()
    for estimate, folder in zip(summary_of(tmp_path)["estimates"], (first, second), strict=True):
        assert estimate["mean"] == folder.summary()["metrics"]["model/accuracy"]
