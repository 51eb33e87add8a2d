"""Training: order, warm start, resuming bit for bit, refusal."""

# T timesteps, B batch, V visible units, H hidden units, G context units, S = 2^V states
# z visible, h hidden, g context, a and b visible and hidden biases, W weight, U context weight, s logistic function

import copy
import io
import re

import pytest
import torch
from torch import nn

from tests.workflows.timestep_dbn.enumeration import DOUBLE
from tests.workflows.timestep_dbn.runs import bars_and_stripes, bits_data, bits_state, dbn_parameters, digits_run, drive, tensors
from trainbook.errors import RunFailed
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.diffusion import flip_schedule
from trainbook.workflows.timestep_dbn.rbm import ConditionalRBM
from trainbook.workflows.timestep_dbn.stages import Plan
from trainbook.workflows.timestep_dbn.training import rbm_adam, rbm_views


def test_blocks_of_timesteps_update_as_the_whole_does():
    config = Config(weight_decay=0.1, learning_rate=0.01)
    whole = ConditionalRBM(5, 7, 6, 3, 4)
    nn.init.normal_(whole.visible_bias)
    parts = copy.deepcopy(whole)
    views = {name: [rbm_views(rbm, *b) for b in blocks] for name, rbm, blocks in
             (("whole", whole, [(0, 5)]), ("parts", parts, [(0, 2), (2, 5)]))}  # fmt: skip
    optimizers = {name: [rbm_adam(config, [view]) for view in group] for name, group in views.items()}
    before = [parameter.clone() for parameter in parts.parameters()]
    for _ in range(3):
        gradients = [torch.randn_like(view) for view in views["whole"][0]]
        for view, gradient in zip(views["whole"][0], gradients, strict=True):
            view.grad.copy_(gradient)
        for group, here in zip(views["parts"], (slice(0, 2), slice(2, 5)), strict=True):
            for view, gradient in zip(group, gradients, strict=True):
                view.grad.copy_(gradient[here])
        for step in (*optimizers["whole"], *optimizers["parts"]):
            step.step()
    for old, one, other in zip(before, whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)  # vectorised and leftover elements round differently
        assert (one - old).abs().max() > 1e-3  # the views share the module's memory


def test_weight_decay_shrinks_weights_and_spares_biases():
    config = Config(optimizer="adam", weight_decay=0.5, learning_rate=0.1)
    rbm = ConditionalRBM(2, 4, 3, 2, 2)
    for parameter in rbm.parameters():
        nn.init.ones_(parameter)
    rbm_adam(config, [rbm_views(rbm, 0, 1)]).step()  # gradients are zero: only decay moves anything
    for decayed in (rbm.weight, rbm.context_weight):
        assert decayed[0].unique().tolist() == pytest.approx([0.95])
        assert decayed[1].unique().tolist() == [1]
    for kept in (rbm.visible_bias, rbm.hidden_bias):
        assert kept.unique().tolist() == [1]


@pytest.mark.parametrize("order", ["block", "sequential"])
def test_training_is_a_function_of_config_and_step_and_resumes_exactly(tmp_path, order):
    choices = {"order": order, "block_size": 2}
    config, data, state = digits_run(tmp_path, **choices)
    num_blocks = 2 if order == "block" else 3
    assert state.total_steps == 4 + 4 * num_blocks + 4
    saved = {}
    for step in range(1, state.total_steps):
        drive(config, data, state, step)
        buffer = io.BytesIO()
        torch.save(state.state_dict(), buffer)
        saved[step] = buffer
    uninterrupted = tensors(drive(config, data, state))
    for step in (1, 4, 6, 8, 10, 12, state.total_steps - 2):
        _, _, resumed = digits_run(tmp_path, **choices)
        saved[step].seek(0)
        resumed.load_state_dict(torch.load(saved[step], weights_only=True))
        for name, tensor in tensors(drive(config, data, resumed)).items():
            assert torch.equal(tensor, uninterrupted[name]), f"{name} differs after a resume at step {step}"
    config, data, other = digits_run(tmp_path, **choices, seed=1)
    assert not torch.equal(tensors(drive(config, data, other))["dbn.levels.0.weight"], uninterrupted["dbn.levels.0.weight"])


def test_sequential_order_trains_each_timestep_alone(tmp_path):
    config, data, state = digits_run(tmp_path, order="sequential")
    drive(config, data, state, 4)
    for trained in range(3):
        before = dbn_parameters(state)
        drive(config, data, state, 4 + 4 * (trained + 1))
        for old, new in zip(before, dbn_parameters(state), strict=True):
            for t in range(3):
                assert torch.equal(old[t], new[t]) == (t != trained)


def test_block_order_covers_every_timestep_once():
    plan = Plan.of(Config(timesteps=7, block_size=3, batch_size=10, epochs_per_timestep=2, baseline_epochs=4), 109)
    assert plan.blocks == [(0, 3), (3, 6), (6, 7)]
    assert (plan.steps_per_epoch, plan.block_steps, plan.total_steps - plan.chain_end) == (10, 20, 40)


def test_later_blocks_start_from_the_last_timestep_before_them(tmp_path):
    rate = 1e-5  # Adam's first step moves every parameter by at most the rate
    config, data, state = digits_run(tmp_path, timesteps=5, block_size=2, learning_rate=rate, negative_phase="cd")
    untouched = dbn_parameters(state)
    chains = [level.chains for level in state.modules["dbn"].levels]
    drive(config, data, state, 8)  # the end of the first block
    for old, new in zip(untouched, dbn_parameters(state), strict=True):
        assert torch.equal(old[2:], new[2:])
    for chain in chains:
        assert not torch.equal(chain[1], chain[2])
    source = [parameter[1] for parameter in dbn_parameters(state)]
    drive(config, data, state, 9)
    assert max(float((old[2] - kept).abs().max()) for old, kept in zip(untouched, source, strict=True)) > 100 * rate
    for kept, new in zip(source, dbn_parameters(state), strict=True):
        assert (new[2:4] - kept).abs().max() < 1.05 * rate
    for chain in chains:
        assert torch.equal(chain[2:4], chain[1].expand(2, -1, -1))


def test_first_block_starts_from_the_independent_model_of_each_timestep():
    rate = 1e-6
    config = Config(timesteps=4, hidden_units=(4, 4, 4), autoencoder_epochs=1, batch_size=14, learning_rate=rate)
    bits = torch.cat([torch.ones(28, 1), torch.zeros(28, 1), bars_and_stripes().repeat(2, 1)[:, :5]], 1)
    data, state = bits_data(bits, bits, bits), bits_state(config, [4, 2, 1], 28)
    drive(config, data, state, state.step + 1)
    schedule = flip_schedule(4, "cosine")
    for t in range(1, 5):
        one = bits.to(DOUBLE) @ torch.eye(7, dtype=DOUBLE)
        one = (one * (1 - schedule.cumulative[t - 1]) + (1 - one) * schedule.cumulative[t - 1]).mean(0).clamp(0.02, 0.98)
        bias = torch.cat([level.visible_bias[t - 1] for level in state.modules["dbn"].levels]).detach().to(DOUBLE)
        torch.testing.assert_close(bias, (one / (1 - one)).log(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("negative_phase", ["pcd", "recovery", "cd"])
def test_only_persistent_chains_move_during_training(tmp_path, negative_phase):
    config, data, state = digits_run(tmp_path, negative_phase=negative_phase)
    before = [level.chains.clone() for level in state.modules["dbn"].levels]
    drive(config, data, state, 6)
    for old, level in zip(before, state.modules["dbn"].levels, strict=True):
        assert torch.equal(old, level.chains) == (negative_phase != "pcd")
        assert set(level.chains.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_timestep_without_an_update_fails_the_run(tmp_path, optimizer):
    config, data, state = digits_run(tmp_path, learning_rate=1e-30, optimizer=optimizer)
    with pytest.raises(RunFailed, match=re.escape("timesteps [1, 2, 3] made no update")):
        drive(config, data, state)
    assert state.step == 7  # in the last step of the first epoch of the chain


def test_single_still_timestep_is_named(tmp_path):
    config, data, state = digits_run(tmp_path, weight_decay=0)
    drive(config, data, state, 7)
    level = state.modules["dbn"].levels[1]
    level.weight.data[1] = 1e30  # so large that a float32 does not feel an update
    with pytest.raises(RunFailed, match=re.escape("timesteps [2] made no update")):
        drive(config, data, state)
