"""Checkpoints are whole or skipped, whatever happens to their files."""

import logging

import pytest
import torch
from torch import nn

from tests.driving import assert_identical
from trainbook.checkpoints import read_checkpoint, write_checkpoint
from trainbook.state import TrainState, load_newest_checkpoint, snapshot

FILES = ("state.pt", "metadata.json", "manifest.json")


def small_state(step=0):
    torch.manual_seed(step)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return TrainState({"net": module}, {"net": optimizer}, step=step, stage=f"stage {step}")


def save_checkpoint(folder, state, metadata, keep):
    write_checkpoint(folder, state.step, snapshot(state, metadata), keep)


@pytest.fixture
def two_checkpoints(tmp_path):
    for step in (10, 20):
        save_checkpoint(tmp_path, small_state(step), {"records_bytes": step}, keep=5)
    return tmp_path


def test_a_saved_state_comes_back_bit_for_bit(two_checkpoints):
    state = small_state()
    metadata = load_newest_checkpoint(two_checkpoints, state, "cpu")
    assert metadata == {"records_bytes": 20, "step": 20, "stage": "stage 20"}
    assert_identical(state.state_dict(), small_state(20).state_dict())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("position", [0.0, 0.25, 0.5, 0.75, 0.999])
@pytest.mark.parametrize("damage", ["bit flip", "cut"])
def test_damage_to_any_file_is_detected_and_the_one_before_is_used(name, position, damage, two_checkpoints, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("trainbook"), "propagate", True)
    path = two_checkpoints / "0000000020" / name
    content = bytearray(path.read_bytes())
    index = int(position * len(content))
    if damage == "bit flip":
        content[index] ^= 1 << (index % 8)
    path.write_bytes(bytes(content[:index]) if damage == "cut" else bytes(content))
    state = small_state()
    assert load_newest_checkpoint(two_checkpoints, state, "cpu")["step"] == 10
    assert "skipping checkpoint 0000000020" in caplog.text


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_detected(name, two_checkpoints):
    (two_checkpoints / "0000000020" / name).unlink()
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read_checkpoint(two_checkpoints / "0000000020")
    assert load_newest_checkpoint(two_checkpoints, small_state(), "cpu")["step"] == 10


def test_a_snapshot_is_a_copy(tmp_path):
    state = small_state(10)
    files = snapshot(state, {})
    with torch.no_grad():
        state.modules["net"].weight.zero_()
    write_checkpoint(tmp_path, 10, files, keep=1)
    fresh = small_state()
    load_newest_checkpoint(tmp_path, fresh, "cpu")
    assert_identical(fresh.state_dict(), small_state(10).state_dict())


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert load_newest_checkpoint(tmp_path, small_state(), "cpu") is None


def test_a_half_written_folder_of_a_crash_is_never_taken_for_a_checkpoint(two_checkpoints):
    partial = two_checkpoints / ".0000000030.partial"
    partial.mkdir()
    (partial / "state.pt").write_bytes(b"half")
    assert load_newest_checkpoint(two_checkpoints, small_state(), "cpu")["step"] == 20
    save_checkpoint(two_checkpoints, small_state(30), {}, keep=5)
    assert load_newest_checkpoint(two_checkpoints, small_state(), "cpu")["step"] == 30


def test_only_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, small_state(step), {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000000004", "0000000005", "latest"]
    assert (tmp_path / "latest").read_text() == "0000000005"


def test_a_checkpoint_holds_no_pickled_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    state = small_state(1)
    state.stage = Evil()
    with pytest.raises(TypeError):  # the metadata is JSON, so it does not even get to disk
        save_checkpoint(tmp_path, state, {}, keep=2)
    assert not list(tmp_path.glob("[0-9]*"))


def test_another_models_checkpoint_is_refused(two_checkpoints):
    state = TrainState({"other": nn.Linear(3, 2)})
    with pytest.raises(KeyError, match="saved \\['net'\\], this run has \\['other'\\]"):
        load_newest_checkpoint(two_checkpoints, state, "cpu")


def test_non_finite_tensors_are_named():
    state = small_state()
    assert state.non_finite_tensors() == []
    with torch.no_grad():
        state.modules["net"].weight[0, 0] = float("nan")
    assert state.non_finite_tensors() == ["net.weight"]
