"""A stage: what it records, when it validates, which weights it ends with, when it ends, and that it resumes."""

import copy
import io
import signal

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests import digits_classifier
from tests.driving import Drive, assert_identical, assert_same_run
from trainbook import report
from trainbook.catalog import Workflow
from trainbook.data import Batches, batch_indices
from trainbook.engine import Engine
from trainbook.errors import UserError
from trainbook.fitting import Stage
from trainbook.optimization import OptimizationConfig
from trainbook.records import RunFolder
from trainbook.run import prepare
from trainbook.seeding import seed_step
from trainbook.state import TrainState

POINTS = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(40) % 3
BATCH = 8


def make(total_steps=12, **choices):
    """State of a run with one stage called "fit"; everything in its module that validation could disturb."""
    config = OptimizationConfig(**{"learning_rate": 0.02, **choices})
    seed_step(config.seed, 0)
    module = nn.Sequential(nn.Linear(6, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3))
    stage = Stage("fit", module, config, total_steps)
    return TrainState({"net": module}, stateful={"fit": stage}, total_steps=total_steps)


def loss_function(module, batch):
    return functional.cross_entropy(module(batch["points"]), batch["labels"])


def records_of(state, validate=None):
    batches = Batches({"points": POINTS, "labels": LABELS}, seed=0, batch_size=BATCH)
    return state.stateful["fit"].train(state, batches, loss_function, validate)


def follow(state, validate=None, until=10_000):
    """The records up to a step of the run, each step seeded as the engine seeds it."""
    records, followed = records_of(state, validate), []
    while state.step < until:
        seed_step(0, state.step)
        record = next(records, None)
        if record is None:
            break
        followed.append(record)
    return followed


class Scripted:
    """A validation whose value at each step is given; keeps copies of what it was shown."""

    def __init__(self, state, values):
        self.stage, self.values, self.shown = state.stateful["fit"], values, {}

    def __call__(self, module):
        step = self.stage.stepper.steps_done
        self.shown[step] = copy.deepcopy(module.state_dict())
        return {"score": torch.tensor(self.values[step], dtype=torch.float64), "training": float(module.training)}


def every(steps, values):
    """Step to value, one value each so many steps; before the first step one that is better than all."""
    return {0: 0.0, **{(i + 1) * steps: value for i, value in enumerate(values)}}


def test_losses_are_those_of_a_plain_loop():
    module, losses = copy.deepcopy(make().modules["net"]), []
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.0)
    for step in range(12):
        seed_step(0, step)
        indices = batch_indices(0, step, 40, BATCH)
        optimizer.zero_grad()
        loss = functional.cross_entropy(module(POINTS[indices]), LABELS[indices])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = make(weight_decay=0.0)
    assert [float(record.metrics["loss"]) for record in follow(state)] == pytest.approx(losses, rel=1e-5)
    for name, weight in module.state_dict().items():
        torch.testing.assert_close(state.modules["net"].state_dict()[name], weight)


def test_a_record_per_step_and_a_validation_every_four_steps_and_at_the_end():
    state = make(total_steps=11, validate_every=4, best_metric="score")
    records = follow(state, Scripted(state, dict.fromkeys(range(12), 1.0)))
    assert (len(records), state.step, state.stage, state.total_steps) == (11, 11, "fit", 11)
    assert [i for i, record in enumerate(records, 1) if "score" in record.metrics] == [4, 8, 11]
    assert [i for i, record in enumerate(records, 1) if record.milestone] == [11]
    assert {record.examples for record in records} == {BATCH}
    assert all(record.metrics["training"] == 0.0 for record in records if "score" in record.metrics)
    assert state.modules["net"].training
    assert follow(state) == []


@pytest.mark.parametrize(("best_is", "best"), [("lowest", 6), ("highest", 10)])
def test_the_module_ends_with_the_weights_of_the_best_validation(best_is, best):
    state = make(validate_every=2, best_metric="score", best_is=best_is)
    validate = Scripted(state, every(2, [0.5, 0.4, 0.1, 0.3, 0.9, 0.2]))
    validate.values[0] = {"lowest": -9.0, "highest": 9.0}[best_is]  # only asked for the names: it may not count
    follow(state, validate)
    assert sorted(validate.shown) == [0, 2, 4, 6, 8, 10, 12]
    assert_identical(state.modules["net"].state_dict(), validate.shown[best])
    assert len({tuple(shown["0.weight"].flatten().tolist()) for shown in validate.shown.values()}) == 7
    assert state.stateful["fit"].best_step == best


@pytest.mark.parametrize("best", [None, 5])
def test_the_average_is_what_is_validated_and_what_the_module_ends_with(best):
    state = make(validate_every=1, best_metric="score", ema_decay=0.8)
    stage, weights = state.stateful["fit"], {}
    average = {0: {name: p.detach().double().clone() for name, p in state.modules["net"].named_parameters()}}
    scripted = Scripted(state, {step: 0.0 if step == best else 1.0 - step / 100 for step in range(13)})

    def validate(module):
        weights[stage.stepper.steps_done] = copy.deepcopy(dict(state.modules["net"].named_parameters()))
        return scripted(module)

    follow(state, validate)
    for step in range(1, 13):
        average[step] = {n: 0.8 * e + 0.2 * weights[step][n].detach().double() for n, e in average[step - 1].items()}
        for name, expected in average[step].items():
            torch.testing.assert_close(scripted.shown[step][name].double(), expected, rtol=1e-5, atol=1e-6)
    assert_identical(state.modules["net"].state_dict(), scripted.shown[best or 12])
    unvalidated = make(ema_decay=0.8)
    follow(unvalidated)
    for name, parameter in unvalidated.modules["net"].named_parameters():
        torch.testing.assert_close(parameter.detach().double(), average[12][name], rtol=1e-5, atol=1e-6)


EARLY_ENDS = [  # values of ten validations, two steps apart; patience; which is best; last step; best step
    ([5, 4, 4.5, 4.2, 1, 1, 1, 1, 1, 1], 2, "lowest", 8, 4),
    ([5, 4, 4.5, 4.2, 4.1, 1, 1, 1, 1, 1], 3, "lowest", 10, 4),
    ([5, 5, 5, 1, 1, 1, 1, 1, 1, 1], 2, "lowest", 6, 2),  # as good is not better
    ([0.1, 0.3, 0.2, 0.4, 0.35, 0.39, 1, 1, 1, 1], 2, "highest", 12, 8),
    ([1, 2, 1, 1, 1, 1, 1, 1, 1, 1], 1, "lowest", 4, 2),
]
FULL_LENGTHS = [
    ([5, 4, 4.5, 3, 3.5, 2, 2.5, 1, 1.5, 1.7], 2, "lowest", 20, 16),  # patience ends with the stage itself
    ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 0, "lowest", 20, 2),
    ([9, 8, 7, 6, 5, 4, 3, 2, 1, 0.5], 1, "lowest", 20, 20),
]


@pytest.mark.parametrize(("values", "patience", "best_is", "last", "best"), EARLY_ENDS + FULL_LENGTHS)
def test_a_stage_ends_after_so_many_validations_without_a_new_best(values, patience, best_is, last, best, tmp_path):
    state = make(20, validate_every=2, best_metric="score", best_is=best_is, patience=patience)
    validate = Scripted(state, every(2, values))
    engine = Engine(RunFolder(tmp_path), "cpu", seed=0, progress=False)
    engine.folder.logs.mkdir()
    outcome = engine.follow(records_of(state, validate), state)
    assert outcome.status == "complete"
    assert (state.step, state.total_steps, len(engine.folder.history())) == (last, last, last)
    assert_identical(state.modules["net"].state_dict(), validate.shown[best])
    if last < 20:
        assert f"fit ended at its step {last}: score was best" in outcome.why
        assert f"at step {best}, {patience} validations before" in outcome.why
    else:
        assert outcome.why == "all steps done"


@pytest.mark.parametrize("ema_decay", [0.0, 0.7])
@pytest.mark.parametrize("patience", [0, 2])
def test_a_stage_taken_up_after_any_step_is_the_same_bit_for_bit(ema_decay, patience):
    choices = {"validate_every": 3, "best_metric": "score", "ema_decay": ema_decay, "patience": patience}
    values = every(3, [3.0, 1.0, 2.0, 2.5, 0.9])
    whole = make(15, **choices)
    losses = [record.metrics for record in follow(whole, Scripted(whole, values))]
    assert len(losses) == (12 if patience else 15)
    for cut in range(1, len(losses) + 1):
        first, second = make(15, **choices), make(15, **choices)
        begun = follow(first, Scripted(first, values), until=cut)
        saved = io.BytesIO()
        torch.save(first.state_dict(), saved)
        saved.seek(0)
        second.load_state_dict(torch.load(saved, weights_only=True))
        ended = follow(second, Scripted(second, values))
        assert_identical([record.metrics for record in begun + ended], losses)
        assert_identical(second.state_dict(), whole.state_dict())
        assert second.total_steps == whole.total_steps


def test_an_unknown_metric_is_refused_before_the_first_step():
    state = make(validate_every=5, best_metric="valid_los")
    before = copy.deepcopy(state.state_dict())
    with pytest.raises(UserError, match=r"'valid_los' is not measured in stage fit\n.*score, training"):
        follow(state, Scripted(state, {0: 1.0}))
    assert_identical(state.state_dict()["modules"], before["modules"])
    assert (state.step, state.stateful["fit"].stepper.steps_done) == (0, 0)


def measured_plainly(module):
    return {"score": functional.cross_entropy(module(POINTS), LABELS)}


def measured_with_noise(module):
    return {"score": functional.cross_entropy(module(POINTS + torch.randn_like(POINTS)), LABELS)}


@pytest.mark.parametrize("validate", [measured_plainly, measured_with_noise])
@pytest.mark.parametrize("frozen", [False, True], ids=["all training", "a part held in evaluation mode"])
def test_validation_does_not_disturb_the_training(validate, frozen):
    losses = []
    for steps_between in (0, 1, 5):
        state = make(validate_every=steps_between, best_metric="score")
        if frozen:
            state.modules["net"][1].eval()
        losses.append([float(record.metrics["loss"]) for record in follow(state, validate)])
    assert losses[1] == losses[0]
    assert losses[2] == losses[0]
    assert len(set(losses[0])) == 12


# The teacher's accuracy stops rising early; the student takes all its steps.
TWO_STAGES = {"steps": 90, "validate_every": 5, "best_metric": "valid_accuracy", "best_is": "highest", "patience": 2}
TWO_STAGES |= {"learning_rate": 0.01, "ema_decay": 0.5}


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    """A run of two stages that was left alone, and one killed in each of them and in the step between."""
    runs = tmp_path_factory.mktemp("runs")

    def drive(run_id, **disturbance):
        return Drive(runs, run_id, TWO_STAGES, "tests.teacher_student", checkpoint_seconds=0.01, **disturbance)

    assert drive("whole")() == 0
    whole = drive("whole").folder
    teacher = max(record["step"] for record in whole.history() if record["stage"] == "teacher")
    for step in (teacher // 2, teacher, teacher + 12):
        assert drive("killed", signal_step=step)() == -signal.SIGKILL
    assert drive("killed")() == 0
    return whole, drive("killed").folder


def last_steps(folder):
    return {record["stage"]: record["step"] for record in folder.history()}


def test_a_run_whose_first_stage_ended_early_resumes_bit_for_bit_in_either(two_stages):
    whole, killed = two_stages
    last = last_steps(whole)
    assert 10 < last["teacher"] < 90
    assert last["student"] == last["teacher"] + 90
    assert_same_run(killed, whole)
    assert whole.summary()["total_steps"] == last["student"] == killed.summary()["total_steps"]


def test_a_resumed_run_gives_the_same_reason_for_its_early_end(two_stages):
    whole, killed = two_stages
    assert "teacher ended at its step" in whole.summary()["why"]
    assert killed.summary()["why"] == whole.summary()["why"]


def test_run_json_says_that_training_ended_early(monkeypatch):
    monkeypatch.setattr(report, "load", lambda name: Workflow(name, digits_classifier))
    overrides = {"steps": 300, "validate_every": 5, "patience": 2, "best_metric": "valid_accuracy", "best_is": "highest"}
    run = prepare(digits_classifier, "smoke", overrides | {"learning_rate": 0.01}, "early")
    run.load_data()
    run.build()
    run.train(progress=False)
    run.evaluate()
    run.draw()
    assert run.finish().startswith("complete")
    summary, history = run.folder.summary(), run.folder.history()
    measured = {record["step"]: record["valid_accuracy"] for record in history if "valid_accuracy" in record}
    best = max(measured, key=measured.get)
    assert summary["step"] == summary["total_steps"] == history[-1]["step"] == best + 10 < 300
    assert summary["segments"][-1]["last_step"] == summary["step"]
    assert f"fit ended at its step {best + 10}" in summary["why"]
