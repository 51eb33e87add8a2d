"""Early stopping per timestep against a replay of everything that was seen."""

# T timesteps, L levels, E epochs, B batch, V bits of a level, H hidden units

import io
import itertools
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.workflows.timestep_dbn.enumeration import DOUBLE, all_bits
from tests.workflows.timestep_dbn.runs import dbn_parameters, digits_run, drive, tensors
from trainbook.errors import RunFailed
from trainbook.seeding import seed_step
from trainbook.workflows.timestep_dbn import training
from trainbook.workflows.timestep_dbn.autoencoder import encode_all
from trainbook.workflows.timestep_dbn.chain import diffuse
from trainbook.workflows.timestep_dbn.diffusion import flip_schedule
from trainbook.workflows.timestep_dbn.early_stopping import EarlyStopping
from trainbook.workflows.timestep_dbn.validation import chain_values, same_numbers


def replay(values: np.ndarray, patience: int) -> tuple[np.ndarray, np.ndarray]:
    """Epoch after which a timestep is stopped (E + 1: never), (T,), and its best epoch, (T, L), by looking at all; (E, T, L)."""
    epochs, timesteps, levels = values.shape
    last = np.full(timesteps, epochs + 1)
    for t in range(timesteps):
        for epoch in range(1, epochs + 1):
            best = [int(values[:epoch, t, level].argmax()) + 1 for level in range(levels)]
            if patience and all(epoch - one >= patience for one in best):
                last[t] = epoch
                break
    best = np.array([[values[: last[t], t, level].argmax() + 1 for level in range(levels)] for t in range(timesteps)])
    return last, best


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_kept_weights_are_those_of_the_best_epoch_before_the_stop(patience):
    generator = np.random.default_rng(5)
    values = generator.normal(size=(12, 6, 3)).cumsum(0)
    history = [[[torch.randn(6, 2, level + 1), torch.randn(6, 4)] for level in range(3)] for _ in range(12)]
    live = [[tensor.clone() for tensor in member] for member in history[0]]
    stopping = EarlyStopping(live, patience)
    last, best = replay(values, patience)
    assert len(set(last.tolist())) > 2 or not patience  # or the comparison says little
    for epoch, (weights, measured) in enumerate(zip(history, values, strict=True), 1):
        for member, seen in zip(live, weights, strict=True):
            for tensor, value in zip(member, seen, strict=True):
                tensor.copy_(value)
        for start, stop in ((0, 2), (2, 6)):  # two blocks
            stopping.judge(start, torch.from_numpy(measured[start:stop]), epoch)
        expected = torch.from_numpy(last <= epoch) if patience else torch.zeros(6, dtype=torch.bool)
        assert torch.equal(stopping.stopped, expected)
    assert np.array_equal(stopping.best_epoch.numpy(), best)
    stopping.restore(0, 6)
    for level in range(3):
        for index in range(2):
            for t in range(6):
                assert torch.equal(live[level][index][t], history[best[t, level] - 1][level][index][t])


def test_only_stopped_timesteps_are_held_and_only_the_block_is_restored():
    live = [[torch.zeros(4, 2)]]
    stopping = EarlyStopping(live, patience=1)
    stopping.judge(0, torch.tensor([[1.0], [1.0], [1.0], [1.0]]), 1)
    live[0][0] += 1
    stopping.judge(0, torch.tensor([[0.5], [2.0], [0.5], [2.0]]), 2)
    live[0][0] += 1
    assert stopping.hold(1, 4).tolist() == [False, True, False]
    assert live[0][0][:, 0].tolist() == [2, 2, 0, 2]  # the first is stopped too, but of another block
    stopping.restore(0, 2)
    assert live[0][0][:, 0].tolist() == [0, 1, 0, 2]
    stopping.begin(0, 1)
    assert not stopping.stopped[0]
    stopping.judge(0, torch.tensor([[-5.0]]), 1)
    assert stopping.best_epoch[0].tolist() == [1]


def test_what_goes_on_is_cut_into_neighbouring_runs():
    stopping = EarlyStopping([[torch.zeros(9, 1)]], patience=1)
    stopping.waited[[2, 3, 8]] = 1
    assert stopping.active(0, 9, 100) == [(0, 2), (4, 8)]
    assert stopping.active(0, 9, 3) == [(0, 2), (4, 7), (7, 8)]
    assert stopping.active(1, 4, 1) == [(1, 2)]
    assert stopping.active(8, 9, 5) == []
    assert EarlyStopping([[torch.zeros(9, 1)]], patience=0).active(0, 9, 4) == [(0, 4), (4, 8), (8, 9)]


def test_levels_are_judged_together_unless_their_context_is_bits():
    likelihoods = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, -1.0, -1.0]])
    assert chain_values(likelihoods, [4, 2, 2], "bits") is likelihoods
    for context in ("hidden_mean", "hidden_sample"):
        assert chain_values(likelihoods, [4, 2, 2], context).tolist() == [[-2.0] * 3, [-2.0] * 3]


def enumerated_pseudo_likelihood(parameters: list[Tensor], z: Tensor, bias: Tensor, field: Tensor) -> Tensor:
    """Mean of ln p(z_i | z_-i) from the joint summed over all hidden states; weights of one timestep, (B, V), (B, H)."""
    W, a = (tensor.to(DOUBLE) for tensor in parameters[:2])
    h = all_bits(W.shape[1])

    def log_p(z: Tensor) -> Tensor:
        joint = (z @ W).unsqueeze(1) + bias.to(DOUBLE).unsqueeze(1)  # (B, 1, H)
        return (z * (a + field.to(DOUBLE))).sum(1) + torch.logsumexp((joint * h).sum(-1), 1)

    z, logs = z.to(DOUBLE), []
    for i in range(z.shape[1]):
        other = z.clone()
        other[:, i] = 1 - other[:, i]
        here, there = log_p(z), log_p(other)
        logs.append(here - torch.logaddexp(here, there))
    return torch.stack(logs).mean()


@pytest.mark.parametrize("context", ["hidden_mean", "bits"])
def test_trained_chain_holds_the_epoch_with_the_best_enumerated_pseudo_likelihood(tmp_path, monkeypatch, context):
    choices = {"epochs_per_timestep": 6, "learning_rate": 3.0, "context": context}
    config, data, state = digits_run(tmp_path, **choices)
    with monkeypatch.context() as patch:  # the same run without its end: the weights after every epoch
        patch.setattr(EarlyStopping, "restore", lambda self, start, stop: None)
        raw = []
        for epoch in range(1, 7):
            drive(config, data, state, 4 + 4 * epoch)
            raw.append(dbn_parameters(state))
    codes = {split: encode_all(state.modules["autoencoder"], getattr(data, split)["images"]) for split in ("train", "valid")}
    dbn, schedule = state.modules["dbn"], flip_schedule(3, config.schedule).to("cpu")
    with same_numbers(config.seed, torch.device("cpu")):
        for levels in codes.values():
            previous, noisy = diffuse([code[: training.METRIC_ROWS] for code in levels], schedule, 0, 3)  # valid comes last
    signs = torch.cat([2 * bits - 1 for bits in noisy], -1)
    values = np.zeros((6, 3, 3))
    for epoch, weights in enumerate(raw):
        for t in range(3):
            below = None
            for level in (2, 1, 0):
                W, a, b, U = (tensor[t] for tensor in weights[4 * level : 4 * level + 4])
                g = signs[t] if below is None else torch.cat([below, signs[t]], 1)
                bias, z = b + g @ U, previous[level][t]
                field = float(schedule.coupling[t + 1]) * (2 * noisy[level][t] - 1)
                values[epoch, t, level] = enumerated_pseudo_likelihood([W, a], z, bias, field)
                below = z if context == "bits" else (bias + z @ W).sigmoid()
    if context != "bits":
        values = np.repeat((values @ np.array(dbn.level_sizes) / sum(dbn.level_sizes))[..., None], 3, 2)
    _, best = replay(values, 0)
    assert (best < 6).any()  # some timestep did overfit
    config, data, state = digits_run(tmp_path, **choices)
    drive(config, data, state, 4 + 4 * 6)
    for index, parameter in enumerate(dbn_parameters(state)):
        for t in range(3):
            assert torch.equal(parameter[t], raw[best[t, index // 4] - 1][index][t])


def stopping_run(tmp_path, **choices):
    """A run whose timesteps overfit at once and stop at different epochs."""
    return digits_run(tmp_path, **{"timesteps": 4, "epochs_per_timestep": 10, "learning_rate": 0.3, "patience": 2, **choices})


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_stopped_timesteps_cost_nothing_and_keep_their_best_weights(tmp_path, monkeypatch, optimizer):
    stepped, original = [], training.ChainStep.__call__
    monkeypatch.setattr(training.ChainStep, "__call__", lambda *a: (stepped.append(a[3:5]), original(*a)))
    config, data, state = stopping_run(tmp_path, optimizer=optimizer)
    drive(config, data, state, 4)
    records, likelihoods, weights, kept = training.train(config, data, state), [], [], []
    while state.step < 44:
        seed_step(config.seed, state.step)
        record = next(records)
        if "epoch" in record.metrics:
            likelihoods.append(record.metrics["pseudo_likelihood_by_timestep_and_level"].double().numpy())
            kept.append(record.metrics["kept_epoch_by_timestep_and_level"].numpy())
            weights.append(dbn_parameters(state))
    sizes = np.array(state.modules["dbn"].level_sizes)
    values = np.stack(likelihoods) @ (sizes / sizes.sum())
    last, best = replay(values[..., None].repeat(3, 2), 2)
    assert len(set(last.tolist())) > 1
    assert last.min() < 9
    assert np.array_equal(kept[-1], best)
    trained = [sum(first <= t < end for first, end in stepped) for t in range(4)]
    assert trained == (4 * np.minimum(last, 10)).tolist()  # 4 steps per epoch until it stops, none after
    for index, final in enumerate(dbn_parameters(state)):
        for t in range(4):
            for epoch in range(last[t] + 1, len(weights)):  # held from the epoch after the stop
                assert torch.equal(weights[epoch - 1][index][t], final[t])


def test_block_that_stopped_entirely_does_nothing_until_its_end(tmp_path, monkeypatch):
    falling = itertools.count(0, -1)
    monkeypatch.setattr(training, "chain_values", lambda likelihoods, *_: torch.full_like(likelihoods, float(next(falling))))
    config, data, state = stopping_run(tmp_path, patience=2, epochs_per_timestep=9)
    drive(config, data, state, 8)
    first_epoch = dbn_parameters(state)
    drive(config, data, state, 16)
    assert state.stateful["early_stopping"].stopped.all()
    assert not torch.equal(dbn_parameters(state)[0], first_epoch[0])
    records = training.train(config, data, state)
    while state.step < 4 + 4 * 9:
        seed_step(config.seed, state.step)
        metrics = next(records).metrics
        assert "epoch" not in metrics
        assert not metrics or state.step == 4 + 4 * 9  # what is measured of a block at its end
    assert all(torch.equal(one, other) for one, other in zip(dbn_parameters(state), first_epoch, strict=True))


def test_resume_with_stopped_timesteps_is_bit_for_bit(tmp_path):
    choices = {"block_size": 3, "epochs_per_timestep": 6, "patience": 1, "learning_rate": 3.0}
    config, data, state = stopping_run(tmp_path, **choices)
    saved, stopped_at = {}, set()
    for step in range(1, state.total_steps):
        drive(config, data, state, step)
        saved[step] = io.BytesIO()
        torch.save(state.state_dict(), saved[step])
        if step < 28 and state.stateful["early_stopping"].stopped.any():
            stopped_at.add(step)
    uninterrupted = tensors(drive(config, data, state))
    assert stopped_at  # some timestep of the first block stopped before its end
    for step in (min(stopped_at), min(stopped_at) + 1, 27, 28, 40):
        _, _, resumed = stopping_run(tmp_path, **choices)
        saved[step].seek(0)
        resumed.load_state_dict(torch.load(saved[step], weights_only=True))
        for name, tensor in tensors(drive(config, data, resumed)).items():
            assert torch.equal(tensor, uninterrupted[name]), f"{name} differs after a resume at step {step}"


def test_stopped_timestep_may_stand_still_and_another_may_not(tmp_path):
    config, data, state = stopping_run(tmp_path, patience=1, weight_decay=0, timesteps=3)
    stopping = state.stateful["early_stopping"]
    drive(config, data, state, 8)
    stopping.waited[0] = 1
    drive(config, data, state, 12)  # its weights do not move, and that is no failure
    level = state.modules["dbn"].levels[1]
    level.weight.data[1] = 1e30  # so large that a float32 does not feel an update
    stopping.waited[1:] = 0
    with pytest.raises(RunFailed, match=re.escape("timesteps [2] made no update")):
        drive(config, data, state)
