"""The baselines against enumeration."""

# T timesteps, B batch, V visible units, H hidden units, G context units, S = 2^V states
# z visible, h hidden, g context, a and b visible and hidden biases, W weight, U context weight, s logistic function

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
from trainbook.workflows.timestep_dbn.baselines import IndependentBits, LogisticChain, monolithic_rbm
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
