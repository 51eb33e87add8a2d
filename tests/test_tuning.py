"""A tuner that was killed anywhere ends as one that was not; what it decides is what brute force decides."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import tomllib

import numpy as np
import pytest

from tests import digits_classifier
from tests.driving import CHILDREN, REPOSITORY
from tests.test_sweep import digits, train  # noqa: F401  (a fixture)
from trainbook import catalog, runtime, search, study, trials
from trainbook.__main__ import main
from trainbook.errors import RunFailed, UserError
from trainbook.execution import run_notebook
from trainbook.files import last_line, read_json
from trainbook.objective import Objective, choose
from trainbook.records import RunFolder, Target
from trainbook.search_pictures import front
from trainbook.study import RUNGS, Halving, SharedStudy, num_combinations, read_space
from trainbook.tuning import ConfigurationTuner
from trainbook.workflows.timestep_dbn.config import Config as DBNConfig

COMMAND = ["tune", "digits_classifier", "--preset=smoke", "--steps=32", "--validate-every=2", "--study-id=mine"]
FIELDS = ["--field=learning_rate=1e-4..1e-1", "--field=batch_size=16,48"]


def in_child(runs, command, moment=""):
    """Run the command line in another process, which dies the first time it comes to a moment, with digits trained there."""
    child = CHILDREN.Process(target=_tune, args=(runs, command, moment))
    child.start()
    return child


def _tune(runs, command, moment):
    os.environ[runtime.RUNS] = str(runs)
    workflow = catalog.Workflow("digits_classifier", digits_classifier)
    catalog.names = lambda: ["digits_classifier"]
    for module in (catalog, sys.modules["trainbook.run"], sys.modules["trainbook.report"]):
        module.load = lambda name: workflow
    trials.execute = train

    def dies(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def before(owner, name, which=1):
        whole, calls = getattr(owner, name), iter(range(1, 10**9))
        setattr(owner, name, lambda *a, **k: dies() if next(calls) == which else whole(*a, **k))

    if moment == "between two fields":
        before(study, "_draw", 4)
    elif moment == "while it trains":
        os.environ["TEST_SIGNAL"] = f"11 {int(signal.SIGKILL)}"
        os.environ["TRAINBOOK_CHECKPOINT_EVERY"] = "0.001s"
    elif moment == "before the report":
        before(SharedStudy, "report")
    elif moment == "after the report":
        before(search.Search, "_enter")
    elif moment == "in the midst of a line":

        def torn(self, trial, *rest):
            with (self.folder / "journal.log").open("a") as journal:
                journal.write('{"op_code": 6, "worker')
            dies()

        search.Search._enter = torn
    elif moment == "after the entry":
        before(search.Search, "_write")
    sys.exit(main(command))


def entries(runs, name):
    """What the journal of a study says of its trials, but for what was timed."""
    (about,) = [read_json(path) for path in runs.glob(f"{name}/study.json")]
    space = read_space(digits_classifier.Config, "smoke", {}, {"learning_rate": ["1e-4..1e-1"], "batch_size": [16, 48]})
    found = SharedStudy(runs / name, space, 0, about["best"] == "highest")
    return [(t.number, t.params, t.state.name, t.value, t.intermediate_values) for t in found.trials], found.best.number


MOMENTS = [
    "between two fields",
    "while it trains",
    "before the report",
    "after the report",
    "in the midst of a line",
    "after the entry",
]


def test_killed_at_every_moment_it_ends_as_if_never_killed(tmp_path):
    runs = tmp_path / "runs"
    whole = in_child(tmp_path / "runs", [*COMMAND[:-1], "--study-id=whole", *FIELDS, "--trials=9"])
    whole.join()
    assert whole.exitcode == 0
    for moment in MOMENTS:
        child = in_child(tmp_path / "runs", [*COMMAND, *FIELDS, "--trials=9"], moment)
        child.join()
        assert child.exitcode == -signal.SIGKILL, moment
    last = in_child(tmp_path / "runs", [*COMMAND, *FIELDS, "--trials=9"])
    last.join()
    assert last.exitcode == 0
    expected, best = entries(runs, "whole")
    assert entries(runs, "mine") == (expected, best)
    assert {state for _, _, state, _, _ in expected} == {"COMPLETE", "PRUNED"}
    assert len(expected) == 9
    spec = tomllib.loads((runs / "mine" / "run.toml").read_text())
    assert (spec["workflow"], spec["preset"]) == ("digits_classifier", "smoke")
    assert spec["overrides"] == {"steps": 32, "validate_every": 2, **expected[best][1]}
    for picture in ("pareto", "parallel"):
        assert (runs / "mine" / f"{picture}.png").stat().st_size > 5000
    # An ordinary run folder each, and the value is the one of its records.
    for number, values, state, value, _ in expected:
        folder = RunFolder(runs / f"mine-trial_{number:03d}")
        config = read_json(folder.config)["config"]
        assert (config["learning_rate"], config["batch_size"]) == (values["learning_rate"], values["batch_size"])
        if state == "COMPLETE":
            assert value == min(record["valid_loss"] for record in folder.history() if "valid_loss" in record)


def test_two_processes_share_a_study_and_no_trial_is_taken_twice(tmp_path):
    both = [in_child(tmp_path / "runs", [*COMMAND, *FIELDS, "--trials=8"]) for _ in range(2)]
    for child in both:
        child.join()
    assert [child.exitcode for child in both] == [0, 0]
    found, _ = entries(tmp_path / "runs", "mine")
    assert [number for number, *_ in found] == list(range(8))
    assert {state for _, _, state, _, _ in found} <= {"COMPLETE", "PRUNED"}
    for number, *_ in found:
        (segment,) = RunFolder(tmp_path / "runs" / f"mine-trial_{number:03d}").summary()["segments"]
        assert segment["first_step"] == 0


def test_a_trial_that_fails_is_recorded_and_the_study_goes_on(digits, tmp_path, monkeypatch, capfd):  # noqa: F811
    whole = digits_classifier.train

    def breaks(config, data, state):
        if config.batch_size == 16:
            raise RunFailed("no 16 today")
        return whole(config, data, state)

    monkeypatch.setattr(digits_classifier, "train", breaks)
    tuner = ConfigurationTuner("digits_classifier", "smoke", {"steps": 5, "validate_every": 2})
    fields = {"batch_size": [16, 48], "patience": [0, 2], "validate_every": [0, 2]}
    wanted = {"metric": "model/accuracy", "best": "highest", "study_id": "mine"}
    assert tuner.tune(fields, 16, **wanted).code == 0
    assert "chosen by held-out data" in capfd.readouterr().out
    found = read_json(tmp_path / "runs" / "mine" / "tune.json")
    reasons = {tuple(t["values"][name] for name in fields): (t["status"], t["why"]) for t in found["trials"]}
    assert {status for status, _ in reasons.values()} == {"complete", "failed"}
    for (batch_size, patience, validate_every), (status, why) in reasons.items():
        if patience and not validate_every:  # allowed one by one, not together
            assert (status, "set validate_every too" in why) == ("failed", True)
        elif batch_size == 16:
            assert (status, why) == ("failed", "no 16 today")
        else:
            assert status == "complete"
    assert found["values"]["batch_size"] == 48


def test_what_was_tried_is_not_trained_again_and_all_of_few_combinations_end_it(digits, tmp_path, monkeypatch):  # noqa: F811
    trained = []
    monkeypatch.setattr(trials, "execute", lambda *run, **_: trained.append(run[2]["batch_size"]) or train(*run))
    tuner = ConfigurationTuner("digits_classifier", "smoke", {"steps": 5})
    assert tuner.tune({"batch_size": [16, 48, 24]}, 100, metric="model/accuracy", best="highest").code == 0
    assert sorted(trained) == [16, 24, 48]


def test_an_interrupt_and_a_spent_budget_leave_a_study_that_goes_on(digits, tmp_path, monkeypatch, capfd):  # noqa: F811
    def interrupted(*run, stop, ends_early):
        stop.set()
        return 3

    monkeypatch.setattr(trials, "execute", interrupted)
    assert main([*COMMAND, *FIELDS, "--trials=2"]) == 3
    assert "the same command goes on" in capfd.readouterr().out
    monkeypatch.setattr(trials, "execute", train)
    assert main([*COMMAND, *FIELDS, "--trials=2"]) == 0
    assert len(read_json(tmp_path / "runs" / "mine" / "tune.json")["trials"]) == 2
    assert main([*COMMAND, *FIELDS, "--trials=1000", "--budget=1s"]) == 3
    assert main([*COMMAND, *FIELDS, "--budget=1s"]) == 0  # nobody asked for a number
    assert 2 < len(read_json(tmp_path / "runs" / "mine" / "tune.json")["trials"]) < 100


def test_one_field_with_fixed_seeds_is_a_sweep_of_it(digits, tmp_path):  # noqa: F811
    tuner = ConfigurationTuner("digits_classifier", "smoke", {"steps": 8})
    assert tuner.tune_parameter("learning_rate", [0.01, 0.1], seeds="0,1", metrics=["accuracy"]) == 0
    (path,) = (tmp_path / "runs").glob("*/sweep.json")
    assert [(run["values"]["learning_rate"], run["seed"]) for run in read_json(path)["runs"]] == [
        (0.01, 0),
        (0.1, 0),
        (0.01, 1),
        (0.1, 1),
    ]


def test_a_run_that_is_ended_early_stops_resumable_and_nobody_takes_it_for_a_signal(tmp_path):
    """Through a kernel, as every trial is trained."""
    notebook = (REPOSITORY / "notebooks" / "timestep_dbn.ipynb").read_text()
    notebook = notebook.replace("from trainbook.workflows import", "from tests import")
    (tmp_path / "digits.ipynb").write_text(notebook.replace("timestep_dbn", "digits_classifier"))
    child = CHILDREN.Process(target=_end_early, args=(tmp_path,))
    child.start()
    child.join()
    folder = RunFolder(tmp_path / "runs" / "long")
    assert (child.exitcode, folder.summary()["status"]) == (3, "stopped")
    assert 20 < folder.summary()["step"] < 1_000_000
    assert folder.summary()["planned_steps"] == 1_000_000


def _end_early(folder):
    os.environ |= {"PYTHONPATH": str(REPOSITORY), runtime.RUNS: str(folder / "runs")}
    run, stop = RunFolder(folder / "runs" / "long"), threading.Event()
    code = run_notebook(
        catalog.Workflow("digits_classifier", digits_classifier),
        run,
        {"preset": "smoke", "overrides": {"steps": 1_000_000}, "run_id": "long"},
        folder / "digits.ipynb",
        stop,
        lambda: last_line(run.metrics).get("step", 0) > 20,
    )
    sys.exit(99 if stop.is_set() else code)


def test_held_out_metrics_end_no_trial_early_and_all_pictures_are_drawn(digits, tmp_path):  # noqa: F811
    command = [*COMMAND[:-1], "--study-id=mine", *FIELDS, "--metric=model/accuracy", "--best=highest", "--trials=7"]
    assert main(command) == 0
    found = read_json(tmp_path / "runs" / "mine" / "tune.json")
    assert {trial["status"] for trial in found["trials"]} == {"complete"}
    assert found["value"] == max(trial["value"] for trial in found["trials"])
    for trial in found["trials"]:
        assert trial["value"] == RunFolder(tmp_path / "runs" / trial["run_id"]).summary()["metrics"]["model/accuracy"]
        assert all(trial[name] > 0 for name in ("seconds", "memory_bytes", "steps_per_second", "examples_per_second"))
    for picture in ("pareto", "parallel", "importance"):
        assert (tmp_path / "runs" / "mine" / f"{picture}.png").stat().st_size > 5000


# What it decides


def test_halving_keeps_the_best_quarter_of_those_that_came_so_far():
    """Against the rule by hand: at a rung, a trial is among the best n // 4 of the n there (at least the best) or ends."""
    draw = random.Random(0)
    for highest in (False, True):
        values = [{rung: draw.random() for rung in RUNGS} for _ in range(40)]
        reached = {rung: [] for rung in RUNGS}
        others = []
        for number, one in enumerate(values):
            expected = None
            for rung in RUNGS:
                reached[rung].append(one[rung])
                better = sorted(reached[rung], reverse=highest)[: max(1, len(reached[rung]) // 4)]
                if one[rung] not in better:
                    expected = rung
                    break
            assert Halving(highest).ends_at(others, one) == expected
            kept = {rung: value for rung, value in one.items() if expected is None or rung <= expected}
            others.append(type("Other", (), {"number": number, "intermediate_values": kept}))


def test_the_front_is_what_nobody_beats():
    costs = np.random.default_rng(0).integers(0, 6, (60, 3)).astype(float)
    by_hand = [not any((b <= a).all() and (b < a).any() for b in costs) for a in costs]
    assert front(costs).tolist() == by_hand
    assert 0 < sum(by_hand) < 60


def test_the_value_of_a_run_is_that_of_its_last_tenth_or_its_best():
    history = [{"step": step, "loss": float((7 * step) % 101)} for step in range(1, 201)] + [{"step": 201, "other": 1.0}]
    losses = np.array([record["loss"] for record in history[:-1]])
    assert Objective("loss", False).value_at(history) == pytest.approx(losses[180:].mean())
    assert Objective("loss", False).value_at(history, 50) == pytest.approx(losses[45:50].mean())
    assert Objective("loss", False, True).value_at(history, 50) == losses[:50].min()
    assert Objective("loss", True, True).value_at(history) == losses.max()
    assert Objective("none", True).value_at(history) is None


def test_ranges_are_searched_by_ratio_where_they_are_wide():
    space = read_space(
        DBNConfig,
        "smoke",
        {},
        {
            "learning_rate": ["1e-4..1e-2"],
            "weight_decay": ["0..0.1"],
            "timesteps": ["2..40"],
            "gibbs_sweeps": ["1..5"],
            "autoencoder_width": ["8..128"],
            "hidden_units": ["(8,8,8)", "(16,16,8)"],
            "order": ["block", "sequential"],
        },
    )
    scales = {name: (one.low, one.high, one.log) for name, one in space.items() if hasattr(one, "log")}
    assert scales == {
        "learning_rate": (1e-4, 1e-2, True),
        "weight_decay": (0.0, 0.1, False),
        "timesteps": (2, 40, True),
        "gibbs_sweeps": (1, 5, False),
        "autoencoder_width": (8, 128, False),
    }
    assert space["autoencoder_width"].step == 4
    assert space["hidden_units"].choices == ("(8,8,8)", "(16,16,8)")
    assert num_combinations({name: space[name] for name in ("gibbs_sweeps", "autoencoder_width", "order")}) == 5 * 31 * 2
    assert num_combinations(space) == float("inf")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--field=timesteps=0..4", "--field=learning_rate=1..99"], ["timesteps = '0'", "learning_rate = '99'"]),
        (["--field=timestep=1..4"], ["did you mean 'timesteps'"]),
        (["--field=timesteps=4..2"], ["is empty"]),
        (["--field=order=block..sequential"], ["order is no number"]),
        (["--field=timesteps=1,01"], ["comes twice"]),
        (["--field=timesteps=1..4", "--timesteps=3"], ["as an option and with --field"]),
        (["--field=timesteps=1..4", "--metric=mean_pseudo_likelihood"], ["--best highest or --best lowest"]),
        (["--field=timesteps=1..4", "--trials=0"], ["0 trials are too few"]),
        (["--field=timesteps=1..4", "--budget=soon"], ["'soon' is not a duration"]),
    ],
)
def test_mistakes_are_told_before_anything_is_made(options, said, capfd, tmp_path):
    assert main(["tune", "timestep_dbn", "--preset=smoke", *options]) == 2
    error = capfd.readouterr().err
    assert all(part in error for part in said), error
    assert not (tmp_path / "runs").exists()


def test_what_is_looked_for_comes_from_the_config_or_the_targets(monkeypatch):
    targets = (Target("a/error", "<", 1.0, ("smoke",), "me"), Target("a/score", ">", 1.0, ("smoke",), "me"))
    config = digits_classifier.Config
    assert choose(config(), targets) == Objective("a/error", False)
    assert choose(config(), targets, "a/score") == Objective("a/score", True)
    validated = config(validate_every=2, best_metric="valid_accuracy", best_is="highest")
    assert choose(validated, targets) == Objective("valid_accuracy", True, True)
    assert choose(config(), (), "loss") == Objective("loss", False)
    with pytest.raises(UserError, match="nothing says what to look for"):
        choose(config(), ())


def test_a_study_of_another_search_is_refused(digits, capfd):  # noqa: F811
    assert main([*COMMAND, *FIELDS, "--trials=1"]) == 0
    assert main([*COMMAND, "--field=learning_rate=1e-3..1e-1", "--trials=1"]) == 2
    assert "a search with other fields" in capfd.readouterr().err


@pytest.mark.slow
def test_a_chain_of_boltzmann_machines_tuned_killed_and_continued(tmp_path):
    """Two fields of timestep_dbn at smoke, through kernels; killed with its kernel in the middle of a trial."""
    command = [sys.executable, "-m", "trainbook", "tune", "timestep_dbn", "--preset=smoke", "--trials=4", "--checkpoint-every=1s"]
    command += ["--epochs-per-timestep=40", "--field=learning_rate=1e-3..1e-1", "--field=gibbs_sweeps=1..4"]
    command += ["--metric=chain/nats_per_bit", "--study-id"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "whole"], check=True, env=environment, capture_output=True)
    process = subprocess.Popen([*command, "mine"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    second = RunFolder(tmp_path / "runs" / "mine-trial_001")
    while process.poll() is None and last_line(second.metrics).get("stage") != "chain":
        time.sleep(0.05)
    os.kill(second.training_process(), signal.SIGKILL)
    process.kill()
    process.wait()
    done = subprocess.run([*command, "mine"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, whole = (read_json(tmp_path / "runs" / name / "tune.json") for name in ("mine", "whole"))
    for key in ("best", "values", "value"):
        assert found[key] == whole[key]
    assert [(t["values"], t["value"]) for t in found["trials"]] == [(t["values"], t["value"]) for t in whole["trials"]]
    assert len(second.summary()["segments"]) == 2
