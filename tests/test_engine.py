"""The engine's loop: guards, milestones, records, seeds."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trainbook import engine as engine_module
from trainbook.engine import Engine
from trainbook.errors import RunFailed
from trainbook.files import read_lines
from trainbook.monitor import stage_seconds
from trainbook.records import Record, RunFolder
from trainbook.seeding import seed_step
from trainbook.state import TrainState


def make(tmp_path, **options):
    state = TrainState({"net": nn.Linear(2, 1)}, total_steps=10, stage="only")
    return Engine(RunFolder(tmp_path), "cpu", seed=3, progress=False, **options), state


def steps(state, metrics=lambda step: {"loss": torch.tensor(1.0)}, milestones=()):
    while state.step < state.total_steps:
        state.step += 1
        yield Record(metrics(state.step), milestone=state.step in milestones)


def saved(engine):
    return sorted(int(path.name) for path in engine.folder.checkpoints.glob("[0-9]*"))


def test_follows_to_the_end_and_saves_there(tmp_path):
    engine, state = make(tmp_path)
    outcome = engine.follow(steps(state), state)
    assert (outcome.status, saved(engine)) == ("complete", [10])
    assert [record["step"] for record in engine.folder.history()] == list(range(1, 11))


def test_milestones_are_saved(tmp_path):
    engine, state = make(tmp_path, keep=10)
    engine.follow(steps(state, milestones=(3, 7)), state)
    assert saved(engine) == [3, 7, 10]


def test_checkpoints_follow_the_clock(tmp_path, monkeypatch):
    engine, state = make(tmp_path, keep=100, checkpoint_seconds=0.05)
    clock = [0.0]
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow():
        for record in steps(state):
            clock[0] += 0.03
            yield record

    engine.follow(slow(), state)
    assert saved(engine) == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wrap", [torch.tensor, lambda value: [[1.0, value]], float])
def test_a_non_finite_record_stops_with_step_and_last_good_checkpoint(bad, wrap, tmp_path):
    engine, state = make(tmp_path)
    records = steps(state, lambda step: {"fine": 1.0, "loss": wrap(bad if step == 8 else 1.0)}, milestones=(5,))
    with pytest.raises(RunFailed, match=r"loss became non-finite at step 8 of stage 'only'.*last good checkpoint is step 5"):
        engine.follow(records, state)
    assert saved(engine) == [5]
    assert [record["step"] for record in engine.folder.history()] == list(range(1, 8))


def test_non_finite_weights_are_never_saved_even_when_no_record_shows_them(tmp_path):
    engine, state = make(tmp_path)

    def poison(step):
        if step == 8:
            state.modules["net"].bias.data.fill_(math.inf)
        return {}

    with pytest.raises(RunFailed, match=r"net\.bias became non-finite at step 10.*last good checkpoint is step 5"):
        engine.follow(steps(state, poison, milestones=(5,)), state)
    assert saved(engine) == [5]


def test_a_step_that_is_not_counted_is_refused(tmp_path):
    engine, state = make(tmp_path)
    with pytest.raises(RunFailed, match=r"advance state\.step by one"):
        engine.follow(iter([Record()]), state)


def test_restore_cuts_records_back_to_the_checkpoint(tmp_path):
    engine, state = make(tmp_path)
    engine.follow(steps(state), state)
    size = engine.folder.metrics.stat().st_size
    with engine.folder.metrics.open("a") as file:
        file.write(json.dumps({"step": 11, "stage": "only", "loss": 1.0}) + "\n")
    engine, fresh = make(tmp_path)
    assert engine.restore(fresh) == 10
    assert engine.folder.metrics.stat().st_size == size


def test_restore_refuses_when_records_were_lost(tmp_path):
    engine, state = make(tmp_path)
    engine.follow(steps(state), state)
    engine.folder.metrics.write_text("")
    with pytest.raises(RunFailed, match="records were lost"):
        engine.restore(state)


def test_a_record_without_metrics_writes_no_line(tmp_path):
    engine, state = make(tmp_path)
    engine.follow(steps(state, lambda step: {"loss": 0.5} if step == 4 else {}), state)
    assert engine.folder.history() == [{"step": 4, "stage": "only", "loss": 0.5}]


def test_every_step_is_seeded_by_seed_and_step_alone(tmp_path):
    def numbers(first, seed):
        engine, state = make(tmp_path / f"{first} {seed}")
        engine.seed, state.step = seed, first
        engine.folder.path.mkdir()
        engine.follow(steps(state, lambda step: {"x": torch.rand(())}), state)
        return [record["x"] for record in engine.folder.history()]

    whole = numbers(0, 3)
    assert numbers(6, 3) == whole[6:]
    assert numbers(0, 4) != whole
    assert len(set(whole)) == 10


def test_seed_step_reaches_dropout():
    ones = torch.ones(1000)
    seed_step(1, 5)
    a = torch.dropout(ones, 0.5, True)
    seed_step(1, 5)
    b = torch.dropout(ones, 0.5, True)
    seed_step(1, 6)
    c = torch.dropout(ones, 0.5, True)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_torn_checkpoints_of_later_steps_do_not_push_out_new_ones(tmp_path):
    engine, state = make(tmp_path)
    engine.follow(steps(state, milestones=(8,)), state)
    for checkpoint in engine.folder.checkpoints.glob("[0-9]*"):
        (checkpoint / "state.pt").write_bytes(b"torn")
    engine, fresh = make(tmp_path)
    assert engine.restore(fresh) == 0
    fresh.total_steps = 4
    engine.follow(steps(fresh, milestones=(2,)), fresh)
    assert saved(engine) == [2, 4]
    engine, again = make(tmp_path)
    assert engine.restore(again) == 4


def test_a_write_that_takes_only_a_part_is_continued(tmp_path):
    class Slow:
        content = b""

        def write(self, data):
            self.content += bytes(data[:3])
            return min(3, len(data))

    engine, slow = make(tmp_path)[0], Slow()
    engine._write(slow, ["abcdefgh", "ij"])
    assert slow.content == b"abcdefgh\nij\n"


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_checkpoints_stay(keep, tmp_path):
    engine, state = make(tmp_path, keep=keep)
    engine.follow(steps(state, milestones=range(1, 11)), state)
    assert saved(engine) == list(range(11 - keep, 11))


def test_rates_count_the_steps_and_examples_of_the_session(tmp_path, monkeypatch):
    engine, state = make(tmp_path)
    clock = [100.0]
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def of_two_sizes():
        while state.step < state.total_steps:
            state.step += 1
            clock[0] += 2.0
            yield Record({"loss": 0.5}, examples=32 if state.step % 2 else 16)

    state.step = 3  # an earlier session's
    engine.follow(of_two_sizes(), state)
    readings = list(read_lines(engine.folder.system))
    assert [reading["step"] for reading in readings] == [4, 7, 10]
    for reading in readings:
        done = reading["step"] - 3
        assert reading["seconds"] == 2.0 * done
        assert reading["steps_per_second"] == pytest.approx(0.5)
        examples = sum(32 if step % 2 else 16 for step in range(4, reading["step"] + 1))
        assert reading["examples_per_second"] == pytest.approx(examples / (2.0 * done))


def test_steps_that_count_no_examples_have_no_rate_of_them(tmp_path):
    engine, state = make(tmp_path)
    engine.follow(steps(state), state)
    readings = list(read_lines(engine.folder.system))
    assert readings
    assert all("examples_per_second" not in reading for reading in readings)


def test_time_of_a_stage_ends_with_it(tmp_path, monkeypatch):
    engine, state = make(tmp_path)
    clock = [100.0]
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def of_two_stages():
        while state.step < state.total_steps:
            state.stage = "first" if state.step < 7 else "second"
            state.step += 1
            clock[0] += 1.0 if state.stage == "first" else 3.0
            yield Record({"loss": 0.5}, milestone=state.step in (7, state.total_steps))

    state.step = 2  # an earlier session's
    engine.follow(of_two_stages(), state)
    state.step = 8
    clock[0] += 1000.0  # between the sessions nothing is trained
    engine.follow(of_two_stages(), state)
    assert stage_seconds(read_lines(engine.folder.system)) == {"first": 5.0, "second": 3.0 * 3 + 3.0 * 2}
