"""TensorBoard's files hold the numbers of metrics.jsonl, where it is installed."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trainbook import engine as engine_module
from trainbook import events as events_module
from trainbook.engine import Engine
from trainbook.events import Events
from trainbook.records import Record, RunFolder
from trainbook.state import TrainState

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed: the optional event files are untested"
)


def follow(path, monkeypatch, flush_every=1, breaks_at=99, offset=0.0, total_steps=10):
    """Train to the end or to where it breaks, on a clock that lets the engine write every so many steps."""
    state = TrainState({"net": nn.Linear(2, 1)}, total_steps=total_steps, stage="only")
    engine = Engine(RunFolder(path), "cpu", seed=3, progress=False, checkpoint_seconds=1e9)
    engine.folder.logs.mkdir(parents=True, exist_ok=True)
    clock = [0.0]
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def steps():
        while state.step < total_steps:
            if state.step + 1 == breaks_at:
                raise ZeroDivisionError
            state.step += 1
            clock[0] += 1.01 * engine_module.FLUSH_SECONDS / flush_every
            metrics = {"loss": torch.tensor(offset + state.step / 8), "learning_rate": 0.5 / state.step}
            if state.step % 4 == 0:
                metrics["valid_loss"] = offset - state.step / 8
            yield Record(metrics, milestone=state.step == 5)

    engine.restore(state)
    if breaks_at < total_steps:
        with pytest.raises(ZeroDivisionError):
            engine.follow(steps(), state)
    else:
        engine.follow(steps(), state)
    return engine.folder


def scalars(folder):
    """Name to its (step, value) pairs, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder.events), size_guidance={"scalars": 0}).Reload()
    return {name: [(point.step, point.value) for point in read.Scalars(name)] for name in read.Tags()["scalars"]}


def recorded(folder, name):
    return [(record["step"], pytest.approx(record[name])) for record in folder.history() if name in record]


def test_without_tensorboard_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.setattr(events_module.importlib.util, "find_spec", lambda name: None)
    with Events(tmp_path / "tensorboard", 0):
        folder = follow(tmp_path / "run", monkeypatch)
    assert len(folder.history()) == 10
    assert not list(tmp_path.rglob("*tensorboard*"))


@needs_tensorboard
def test_every_number_that_is_written_is_in_the_event_file(tmp_path, monkeypatch):
    folder = follow(tmp_path, monkeypatch)
    shown = scalars(folder)
    for name in ("loss", "learning_rate", "valid_loss"):
        assert shown[name] == recorded(folder, name)
    assert len(shown["loss"]) == 10
    assert [step for step, _ in shown["valid_loss"]] == [4, 8]
    assert {"seconds", "steps_per_second", "host_memory_bytes"} < shown.keys()


@needs_tensorboard
def test_steps_between_two_writings_keep_their_numbers(tmp_path, monkeypatch):
    folder = follow(tmp_path, monkeypatch, flush_every=3)
    shown = scalars(folder)
    assert 1 < len(shown["loss"]) < 10  # a point a second is enough for a picture
    assert shown["loss"][-1] == recorded(folder, "loss")[-1]
    for name in ("loss", "learning_rate", "valid_loss"):
        assert {step for step, _ in shown[name]} <= {step for step, _ in recorded(folder, name)}
        assert set(shown[name]) <= {(r["step"], torch.tensor(r[name]).item()) for r in folder.history() if name in r}


@needs_tensorboard
def test_steps_that_are_trained_again_are_shown_once_and_as_they_are_now(tmp_path, monkeypatch):
    folder = follow(tmp_path, monkeypatch, breaks_at=9)
    assert [step for step, _ in scalars(folder)["loss"]] == list(range(1, 9))
    follow(tmp_path, monkeypatch, offset=100.0)  # the checkpoint is that of step 5
    assert [record["loss"] > 100 for record in folder.history()] == [False] * 5 + [True] * 5
    shown = scalars(folder)
    for name in ("loss", "learning_rate", "valid_loss"):
        assert shown[name] == recorded(folder, name)
