"""Stages after the chain: they resume bit for bit, leave the chain alone, and have their rows in the report."""

import copy
import io

import pytest
import torch

from tests.workflows.timestep_dbn.runs import digits_run, drive, tensors
from trainbook.workflows.timestep_dbn import evaluation
from trainbook.workflows.timestep_dbn.stages import Plan

LATER = {
    "layers, Adam": {"depth": (2, 1, 3), "block_size": 2},
    "layers, SGD": {"depth": (1, 2, 1), "optimizer": "sgd", "order": "sequential"},
    "layers and joint": {"depth": 2, "context": "hidden_sample", "joint_epochs": 2, "block_size": 2},
    "penalty": {"correlation_threshold": 0.001, "correlation_lag": 2, "epochs_per_timestep": 3},
}


@pytest.mark.parametrize("name", LATER)
def test_a_run_with_later_stages_resumes_exactly_at_any_step(tmp_path, name):
    config, data, state = digits_run(tmp_path, **LATER[name])
    steps = sorted({1, 4, 5, 7, 8, 9, 11, 13, 16, 18, 21, 23, state.total_steps - 2} & set(range(state.total_steps)))
    saved = {}
    for step in steps:
        drive(config, data, state, step)
        buffer = io.BytesIO()
        torch.save(state.state_dict(), buffer)
        saved[step] = buffer.getvalue()
    uninterrupted = tensors(drive(config, data, state))
    for step, content in saved.items():
        _, _, resumed = digits_run(tmp_path, **LATER[name])
        resumed.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
        for tensor_name, tensor in tensors(drive(config, data, resumed)).items():
            assert torch.equal(tensor, uninterrupted[tensor_name]), f"{tensor_name} differs after a resume at step {step}"


def test_later_stages_move_their_own_parameters_and_leave_the_chain_alone(tmp_path):
    config, data, state = digits_run(tmp_path, **LATER["layers and joint"])
    plan = Plan.of(config, 64)
    assert plan.later_steps == 4 * 2 * (1 + 2)  # 4 steps an epoch, 2 blocks, 1 epoch of the second layer, 2 joint ones
    drive(config, data, state, plan.chain_end)
    chain = copy.deepcopy(state.modules["dbn"].state_dict())
    before = tensors(state)
    stages = []
    for step in range(plan.chain_end + 1, plan.baselines_begin + 1):
        drive(config, data, state, step)
        stages.append(state.stage)
    assert stages == ["layer_2"] * 8 + ["joint"] * 16
    for name, tensor in state.modules["dbn"].state_dict().items():
        assert torch.equal(tensor, chain[name])
    moved = {name for name, tensor in tensors(state).items() if not torch.equal(tensor, before[name])}
    for part in ("depth.levels.0.0.weight", "depth.levels.2.0.gain", "joint.levels.1.context_weight", "joint.levels.0.weight"):
        assert part in moved


def test_the_joint_machine_starts_from_the_chain(tmp_path):
    config, data, state = digits_run(tmp_path, context="hidden_sample", joint_epochs=1, learning_rate=1e-6, block_size=2)
    drive(config, data, state, Plan.of(config, 64).chain_end + 1)
    for own, source in zip(state.modules["joint"].levels.parameters(), state.modules["dbn"].levels.parameters(), strict=True):
        torch.testing.assert_close(own[:2], source[:2], rtol=0, atol=1e-5)
        if own.ndim == 3 and own.numel():
            assert not torch.allclose(own[2], source[2], atol=1e-5)  # the second block has not begun


def test_every_chain_has_its_row_beside_the_others(tmp_path):
    config, data, state = digits_run(
        tmp_path, depth=2, context="hidden_sample", joint_epochs=1, num_samples=16, evaluation_images=32, ais_temperatures=20
    )
    metrics = evaluation.evaluate(config, data, drive(config, data, state))
    for who in ("chain", "deep_chain", "joint_chain"):
        for metric in ("nats_per_bit", "bracket_nats_per_bit", "end_bit_error", "sample_covariance_error", "step_nats_per_bit@3"):
            assert f"{who}/{metric}" in metrics
        assert metrics[f"{who}/nats_per_bit"] == pytest.approx(metrics[f"{who}/nats_per_bit_other_direction"], abs=0.05)
