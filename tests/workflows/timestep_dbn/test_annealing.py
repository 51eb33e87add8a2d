"""Annealed partition functions against enumeration."""

# T timesteps, B batch, V visible units, H hidden units, G context units, S = 2^V states
# z visible, h hidden, g context, a and b visible and hidden biases, W weight, U context weight, s logistic function

import math

import pytest
import torch
from torch import Tensor

from tests.workflows.timestep_dbn.enumeration import (
    Case,
    all_bits,
    gibbs_kernel,
    parameters,
    product_of_bernoullis,
    random_case,
    repeat_timestep,
)
from trainbook.workflows.timestep_dbn.annealing import (
    log_partition,
    mean_log_weight,
    mean_log_weight_variance,
    reverse_log_partition,
)
from trainbook.workflows.timestep_dbn.rbm import Block


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
    case, draws = random_case(scale=0.7), 20_000
    for t, b in ((0, 0), (1, 2)):
        joint = case.log_joint(t, b)
        exact = joint.logsumexp((0, 1))
        drawn = torch.multinomial((joint.logsumexp(1) - exact).exp(), draws, replacement=True)
        one = repeat_timestep(case.block, t, 1)
        bias, field = case.context_bias[t : t + 1, b : b + 1], case.field[t : t + 1, b : b + 1]
        sample, many = all_bits(5)[drawn].unsqueeze(0), field.expand(1, draws, -1)
        log_z = reverse_log_partition(one, bias, many, temperatures, sample, particles=2)
        assert log_z.shape == (2, 1, draws)
        inverse = (exact - log_z).exp().flatten()  # mean Z / Z = 1
        assert (inverse.mean() - 1).abs() < 4 * inverse.std() / math.sqrt(draws) < 0.2
        assert log_z.mean() > exact


def annealed_sampler(case: Case, temperatures: int) -> Tensor:
    """P(z) of what comes out when the factorised base is annealed forwards to the model, by enumeration; T = B = 1; (S,)."""
    p = product_of_bernoullis((case.block.visible_bias + case.field[:, 0]).sigmoid(), all_bits(case.field.shape[2]))[0]
    for k in range(1, temperatures + 1):
        weight = case.block.weight * k / temperatures
        p = p @ gibbs_kernel(Block(weight, *parameters(case.block)[1:]), case.context_bias, case.field)
    return p


@pytest.mark.parametrize("temperatures", [1, 2, 6])
def test_reverse_annealing_from_a_data_point_is_unbiased_for_the_annealed_sampler(temperatures):
    case, draws = random_case(T=1, B=1, scale=0.8), 20_000
    exact = annealed_sampler(case, temperatures)
    model = case.probabilities(0, 0)
    for row in (int(model.argmax()), int(model.argmin()), 13):
        z = all_bits(5)[row].expand(1, draws, -1)
        log_z = reverse_log_partition(case.block, case.context_bias, case.field.expand(1, draws, -1), temperatures, z)[0]
        log_p = -case.block.free_energy(z, case.context_bias) + (case.field * z).sum(-1) - log_z
        weights = log_p.exp()
        assert (weights.mean() - exact[row]).abs() < 4 * weights.std() / math.sqrt(draws) < 0.1 * exact[row]
        assert log_p.mean() < exact[row].log()  # the direction that does not flatter
    if temperatures < 6:
        assert (exact - model).abs().max() > 0.01  # the annealed sampler is another model, and it is the one that was met


def test_standard_error_of_the_mean_weight_is_its_spread_over_repetitions():
    case = random_case(T=1, B=1, scale=0.7)
    log_weights = log_partition(case.block, case.context_bias, case.field, 3, 200 * 400).view(200, 400)
    spread, predicted = mean_log_weight(log_weights).std(), mean_log_weight_variance(log_weights).mean().sqrt()
    assert float(predicted / spread) == pytest.approx(1, abs=4 / math.sqrt(2 * 400))


def test_more_temperatures_narrow_the_annealed_weights():
    case = random_case()
    few, many = (log_partition(case.block, case.context_bias, case.field, k, 2000).std(0) for k in (2, 100))
    assert (many < 0.5 * few).all()
