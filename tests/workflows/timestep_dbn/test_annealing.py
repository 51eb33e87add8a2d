"""Annealed partition functions against enumeration."""

# T timesteps, B batch, V visible units, H hidden units, G context units, S = 2^V states
# z visible, h hidden, g context, a and b visible and hidden biases, W weight, U context weight, s logistic function

import math

import pytest
import torch

from tests.workflows.timestep_dbn.enumeration import all_bits, random_case, repeat_timestep
from trainbook.workflows.timestep_dbn.annealing import log_partition, mean_log_weight, reverse_log_partition


@pytest.mark.parametrize("temperatures", [1, 3, 30])
def test_annealed_weights_are_unbiased_for_the_enumerated_partition(temperatures):
    case, particles = random_case(scale=0.7), 40_000
    log_weights = log_partition(case.block, case.context_bias, case.field, temperatures, particles)
    exact = torch.stack([torch.stack([case.log_joint(t, b).logsumexp((0, 1)) for b in range(3)]) for t in range(2)])
    weights = (log_weights - exact).exp()  # (P, T, B), mean 1
    standard_error = weights.std(0) / math.sqrt(particles)
    assert weights.shape == (particles, 2, 3)
    assert standard_error.max() < 0.03  # or the comparison would say nothing
    assert ((weights.mean(0) - 1).abs() < 4 * standard_error).all()
    assert (log_weights.mean(0) < exact).all()  # Jensen: the flattering direction that the docstring states
    torch.testing.assert_close(mean_log_weight(log_weights) - exact, weights.mean(0).log(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("temperatures", [1, 3, 30])
def test_reverse_annealing_from_exact_samples_is_unbiased_for_the_inverse_ratio_and_lies_above(temperatures):
    case, particles = random_case(scale=0.7), 40_000
    for t, b in ((0, 0), (1, 2)):
        joint = case.log_joint(t, b)
        exact = joint.logsumexp((0, 1))
        drawn = torch.multinomial((joint.logsumexp(1) - exact).exp(), particles, replacement=True)
        one = repeat_timestep(case.block, t, 1)
        bias, field = case.context_bias[t : t + 1, b : b + 1], case.field[t : t + 1, b : b + 1]
        sample, many = all_bits(5)[drawn].unsqueeze(0), field.expand(1, particles, -1)
        log_weights = reverse_log_partition(one, bias.expand(1, particles, -1), many, temperatures, sample)[0]
        inverse = (exact - log_weights).exp()  # mean Z / Z = 1
        assert (inverse.mean() - 1).abs() < 4 * inverse.std() / math.sqrt(particles) < 0.2
        assert log_weights.mean() > exact


def test_more_temperatures_narrow_the_annealed_weights():
    case = random_case()
    few, many = (log_partition(case.block, case.context_bias, case.field, k, 2000).std(0) for k in (2, 100))
    assert (many < 0.5 * few).all()
