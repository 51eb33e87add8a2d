"""Weights leave a run as safetensors and enter another, all or none of them."""

import copy
import hashlib
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests import digits_classifier
from tests.driving import assert_identical, assert_same_run, checkpoints, final_state
from trainbook import report
from trainbook.catalog import Workflow
from trainbook.errors import UserError
from trainbook.run import prepare
from trainbook.weights import export_weights, load_weights


class Tied(nn.Module):
    """Shares a parameter, keeps buffers of several types, and holds a transposed (not contiguous) weight."""

    def __init__(self, words=7):
        super().__init__()
        self.embedding, self.head = nn.Embedding(words, 4), nn.Linear(4, words)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(4)
        self.turned = nn.Parameter(torch.randn(3, 5).t())
        self.register_buffer("steps", torch.tensor(5))
        self.register_buffer("codes", torch.randn(3).bfloat16())


def two():
    return {"reader": Tied(), "probe": nn.Linear(2, 3)}


def contents(modules):
    return {name: copy.deepcopy(module.state_dict()) for name, module in modules.items()}


@pytest.fixture
def exported(tmp_path):
    """Modules whose weights were exported as those of the complete run "mine"."""
    modules = two()
    modules["reader"].norm(torch.randn(9, 4))
    export_weights(modules, tmp_path / "runs" / "mine" / "export", {"run_id": "mine"})
    return modules


@pytest.mark.parametrize("source", ["mine", "runs/mine", "runs/mine/export"])
def test_weights_and_buffers_come_back_bit_for_bit(source, exported, tmp_path):
    fresh = two()
    digests = load_weights(fresh, source, tmp_path / "runs")
    assert_identical(contents(fresh), contents(exported))
    assert fresh["reader"].head.weight is fresh["reader"].embedding.weight
    files = {name: tmp_path / "runs" / "mine" / "export" / f"{name}.safetensors" for name in fresh}
    assert_identical({name: load_file(path) for name, path in files.items()}, {n: dict(m) for n, m in contents(exported).items()})
    assert digests == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def test_a_single_file_fills_the_module_of_its_name(exported, tmp_path):
    fresh = two()
    before = contents(fresh)
    path = tmp_path / "runs" / "mine" / "export" / "probe.safetensors"
    assert list(load_weights(fresh, str(path), tmp_path / "nowhere")) == ["probe"]
    assert_identical(contents(fresh), {"reader": before["reader"], "probe": contents(exported)["probe"]})


def test_a_second_export_leaves_nothing_of_the_first(tmp_path):
    export_weights({"old": nn.Linear(1, 1)}, tmp_path / "export", {})
    export_weights({"new": nn.Linear(1, 1)}, tmp_path / "export", {})
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["new.safetensors"]


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-20])


def emptied(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut_short, emptied])
@pytest.mark.parametrize("name", ["probe", "reader"])
def test_a_damaged_file_is_named_and_nothing_is_loaded(damage, name, exported, tmp_path):
    damage(tmp_path / "runs" / "mine" / "export" / f"{name}.safetensors")
    fresh = two()
    before = contents(fresh)
    with pytest.raises(UserError, match=rf"export/{name}\.safetensors cannot be read"):
        load_weights(fresh, "mine", tmp_path / "runs")
    assert_identical(contents(fresh), before)


class Wider(Tied):
    def __init__(self):
        super().__init__(words=8)


class Shorter(Tied):
    def __init__(self):
        super().__init__()
        del self.turned


class Longer(Tied):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(2, 1)


@pytest.mark.parametrize(
    ("module", "difference"),
    [
        (
            lambda: Tied(8),
            "embedding.weight is (7, 4), not (8, 4), head.bias is (7,), not (8,), head.weight is (7, 4), not (8, 4)",
        ),
        (Shorter, "turned is (5, 3), not wanted"),
        (Longer, "extra.bias is missing, not (1,), extra.weight is missing, not (1, 2)"),
    ],
    ids=["another shape", "one too many", "one missing"],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(module, difference, exported, tmp_path):
    fresh = {"probe": nn.Linear(2, 3), "reader": module()}
    before = contents(fresh)
    with pytest.raises(UserError, match=re.escape(f"reader.safetensors does not fit module 'reader': {difference}\n")):
        load_weights(fresh, "mine", tmp_path / "runs")
    assert_identical(contents(fresh), before)


def test_of_many_tensors_that_do_not_fit_three_are_named(exported, tmp_path):
    with pytest.raises(UserError, match=r"bias is missing.* and 10 more\n"):
        load_weights({"reader": nn.Linear(2, 1)}, "mine", tmp_path / "runs")


@pytest.mark.parametrize("source", ["yours", "runs", "runs/mine/config.json", "letter.safetensors"])
def test_a_place_without_weights_is_refused(source, exported, tmp_path):
    (tmp_path / "runs" / "mine" / "config.json").write_text("{}")
    (tmp_path / "letter.safetensors").write_text("dear")
    with pytest.raises(UserError, match=rf"'{source}' holds none of: reader\.safetensors, probe\.safetensors"):
        load_weights(two(), source, tmp_path / "runs")


def built(run_id, **overrides):
    run = prepare(digits_classifier, "smoke", {"steps": 30, "initial_weights": "teacher", **overrides}, run_id)
    run.load_data()
    run.build()
    return run


def trained(run, deadline=None):
    run.runtime = replace(run.runtime, deadline=deadline)
    run.train(progress=False)
    run.folder.unlock()
    return run


def stopped_at_once(run_id):
    run = trained(built(run_id), deadline=0.0)
    assert run.folder.summary()["status"] == "stopped"
    return run


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """The export folder of a complete run."""
    monkeypatch.setattr(report, "load", lambda name: Workflow(name, digits_classifier))
    run = built("teacher", initial_weights="", seed=5, steps=4)
    run.train(progress=False)
    run.evaluate()
    run.draw()
    assert run.finish().startswith("complete")
    return run.folder.export / "model.safetensors"


def test_a_run_starts_from_the_weights_it_is_given(teacher):
    given = final_state(prepare(digits_classifier, "smoke", {"steps": 4, "seed": 5}, "teacher").folder)["modules"]["model"]
    # A rate of nothing leaves weights where they are: an average that began elsewhere would still be on its way.
    run = built("pupil", learning_rate=1e-30, weight_decay=0.0, ema_decay=0.9)
    assert_identical(run.state.modules["model"].state_dict(), given)
    saved = final_state(trained(run).folder)
    assert_identical(saved["modules"]["model"], given)
    assert_identical(saved["stateful"]["fit"]["stepper"]["ema"], given)
    assert run.folder.summary()["initial_weights"] == {"model": hashlib.sha256(teacher.read_bytes()).hexdigest()}


def test_a_resumed_run_does_not_need_the_file_any_more(teacher):
    whole = trained(built("whole"))
    stopped_at_once("pupil")
    digest = hashlib.sha256(teacher.read_bytes()).hexdigest()
    teacher.unlink()
    run = trained(built("pupil"))
    assert len(run.folder.summary()["segments"]) == 2
    assert run.folder.summary()["initial_weights"] == {"model": digest}
    assert_same_run(run.folder, whole.folder)
    with pytest.raises(UserError, match="'teacher' holds none of"):
        built("late")


def test_a_run_whose_checkpoints_are_all_torn_starts_from_the_given_weights_again(teacher):
    whole = trained(built("whole"))
    for checkpoint in checkpoints(stopped_at_once("pupil").folder):
        (checkpoint / "state.pt").write_bytes(b"torn")
    run = trained(built("pupil"))
    assert_same_run(run.folder, whole.folder)
