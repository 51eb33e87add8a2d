"""The baselines against enumeration."""

# T timesteps, B batch, V visible units, H hidden units, G context units, S = 2^V states
# z visible, h hidden, g context, a and b visible and hidden biases, W weight, U context weight, s logistic function

import itertools
import math

import pytest
import torch
from torch import nn

from tests.workflows.timestep_dbn.enumeration import (
    DOUBLE,
    all_bits,
    assert_fits,
    flip_matrix,
    logistic_reverse_matrix,
    product_of_bernoullis,
    state_index,
)
from tests.workflows.timestep_dbn.runs import digits_run, drive
from trainbook.data import Data
from trainbook.state import TrainState
from trainbook.workflows.timestep_dbn import baseline_training
from trainbook.workflows.timestep_dbn.baselines import (
    IndependentBits,
    LogisticChain,
    monolithic_rbm,
    rbm_reverse_step,
)
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.diffusion import flip_schedule


def test_independent_bits_and_logistic_start_reverse_independent_bits_exactly():
    schedule, mean, size = flip_schedule(5, "cosine"), torch.tensor([0.1, 0.5, 0.8]), 40_000
    independent = IndependentBits(3)
    independent.mean.copy_(mean)
    data = product_of_bernoullis(mean.to(DOUBLE), all_bits(3))
    assert independent.negative_log_likelihood(all_bits(3).float()).neg().exp().tolist() == pytest.approx(data.tolist(), abs=1e-6)
    logistic = LogisticChain(5, 3)
    noisy = torch.tensor([1.0, 1, 0])
    for t in (1, 3, 5):
        c = float(schedule.cumulative[t - 1])
        q = data @ flip_matrix(3, c)
        bayes = q * flip_matrix(3, float(schedule.beta[t]))[:, state_index(noisy)]
        assert_fits(independent.reverse_step(noisy.expand(size, -1), t, schedule), bayes)
        with torch.no_grad():
            logistic.bias[t - 1] = torch.logit(mean * (1 - 2 * c) + c)
        assert_fits(logistic.reverse_step(noisy.expand(size, -1), t, schedule.to("cpu")), bayes)


def test_independent_bits_fit_counts_with_one_added_to_each_side():
    independent = IndependentBits(2)
    independent.fit(torch.tensor([[1.0, 0], [1, 0], [1, 1]]))
    assert independent.mean.tolist() == pytest.approx([4 / 5, 2 / 5])


def test_logistic_loss_is_the_mean_of_the_enumerated_steps():
    schedule, size = flip_schedule(3, "cosine").to("cpu"), 20_000
    logistic = LogisticChain(3, 3)
    for parameter in logistic.parameters():
        nn.init.normal_(parameter)
    clean = torch.tensor([1.0, 0, 1])
    steps = logistic.negative_log_steps(clean.expand(size, -1), schedule)[0].detach()  # (T, B)
    for t in (1, 2, 3):
        joint = flip_matrix(3, float(schedule.cumulative[t - 1]))[state_index(clean)].unsqueeze(1) * flip_matrix(
            3, float(schedule.beta[t])
        )
        exact = -float((joint * logistic_reverse_matrix(logistic, t, schedule).T.log()).sum())
        assert float(steps[t - 1].mean()) == pytest.approx(exact, abs=4 * float(steps[t - 1].std()) / math.sqrt(size))


def test_monolithic_rbm_is_of_the_size_that_was_asked_for():
    rbm = monolithic_rbm(6, 69, 4)
    assert sum(p.numel() for p in rbm.parameters()) == 69  # 6 + 9 (6 + 1)


@pytest.mark.parametrize("kind", ["cosine", "reciprocal", "linear"])
def test_reverse_step_of_a_plain_rbm_is_bayes_rule_with_it_as_the_prior(kind):
    rbm, schedule, states = monolithic_rbm(3, 15, 4), flip_schedule(4, kind).to("cpu"), all_bits(3)
    for parameter in rbm.parameters():
        nn.init.normal_(parameter)
    W, a, b = (tensor[0].detach().to(DOUBLE) for tensor in (rbm.weight, rbm.visible_bias, rbm.hidden_bias))
    prior = torch.softmax(states @ a + torch.log1p((b + states @ W).exp()).sum(1), 0)
    noisy = torch.tensor([1.0, 0, 1])
    for t in (1, 2, 4):
        forward = prior @ flip_matrix(3, float(schedule.cumulative[t - 1]))
        bayes = forward * flip_matrix(3, float(schedule.beta[t]))[:, state_index(noisy)]
        assert_fits(rbm_reverse_step(rbm, noisy.expand(20_000, -1), t, schedule, sweeps=40), bayes)


def train_baselines(config: Config, data: Data, state: TrainState, steps: int) -> None:
    """The last stage alone, of a run that says that the chain is trained."""
    state.step = state.total_steps - steps
    state.stateful["blocks"].moved += 1
    drive(config, data, state)


def test_small_rbm_gets_its_share_of_the_time(tmp_path, monkeypatch):
    seen, original = [], baseline_training.PlainStep.__call__

    def count(step, *rest):
        seen.append(step.rbm.weight.shape[2])
        original(step, *rest)

    monkeypatch.setattr(baseline_training.PlainStep, "__call__", count)
    config, data, state = digits_run(tmp_path, small_rbm_updates=5, baseline_epochs=2)
    train_baselines(config, data, state, 8)
    widths = {name: state.modules[name].weight.shape[2] for name in ("monolithic_rbm", "small_rbm")}
    assert len(set(widths.values())) == 2
    assert {name: seen.count(width) for name, width in widths.items()} == {"monolithic_rbm": 8, "small_rbm": 40}


@pytest.mark.parametrize("name", ["monolithic_rbm", "small_rbm", "logistic_chain", "denoiser"])
def test_every_baseline_keeps_its_best_epoch(tmp_path, monkeypatch, name):
    values, original = [], baseline_training.baseline_values
    falling = itertools.count(0, -1)

    def worse_and_worse(*arguments):
        measured = original(*arguments)
        values.append({key: [p.detach().clone() for p in state.modules[key].parameters()] for key in measured})
        worth = float(next(falling))
        return {key: torch.full_like(value, worth) for key, value in measured.items()}

    monkeypatch.setattr(baseline_training, "baseline_values", worse_and_worse)
    config, data, state = digits_run(tmp_path, baseline_epochs=9)
    train_baselines(config, data, state, 36)
    assert len(values) == 3  # after epochs 4, 8 and 9
    for parameter, first, last in zip(state.modules[name].parameters(), values[0][name], values[-1][name], strict=True):
        assert torch.equal(parameter, first)
        assert parameter.numel() == 0 or not torch.equal(first, last)
