"""The forward process against enumeration and simulation."""

# T timesteps, B batch, V visible units, H hidden units, G context units, S = 2^V states
# z visible, h hidden, g context, a and b visible and hidden biases, W weight, U context weight, s logistic function

import math

import pytest
import torch

from tests.workflows.timestep_dbn.enumeration import (
    DOUBLE,
    SCHEDULES,
    all_bits,
    assert_fits,
    flip_matrix,
    random_case,
    state_index,
)
from trainbook.workflows.timestep_dbn.chain import diffuse, fields
from trainbook.workflows.timestep_dbn.diffusion import binary_entropy, flip, flip_schedule, posterior_probability


@pytest.mark.parametrize("kind", SCHEDULES)
def test_coupling_makes_the_reverse_step_the_exact_posterior(kind):
    num_bits, T = 4, 10
    schedule, states = flip_schedule(T, kind), all_bits(num_bits)
    data = torch.softmax(2 * torch.randn(2**num_bits, dtype=DOUBLE), 0)
    forward = data
    for t in range(1, T + 1):
        beta = float(schedule.beta[t])
        step = flip_matrix(num_bits, beta)
        bayes = forward.unsqueeze(1) * step / (forward @ step)  # q(z_{t-1} | z_t), column z_t
        field = fields([states.unsqueeze(0)], schedule.coupling[t : t + 1])[0][0]  # (z_t, V)
        model = torch.softmax(forward.log().unsqueeze(1) + states @ field.T, 0)  # F = -log q_{t-1}
        torch.testing.assert_close(model, bayes, rtol=0, atol=1e-12)
        assert float(schedule.coupling[t]) == pytest.approx(math.log((1 - beta) / beta) if beta < 0.5 else 0, abs=1e-12)
        forward = forward @ step


def test_rbm_conditional_is_the_exact_posterior_of_the_distribution_it_holds():
    case, schedule = random_case(T=1, B=1, G=0), flip_schedule(8, "cosine")
    states = all_bits(5)
    energy = case.block.free_energy(states.unsqueeze(0), case.block.hidden_bias.unsqueeze(1))[0]
    q = torch.softmax(-energy, 0)
    for t in range(1, 9):
        step = flip_matrix(5, float(schedule.beta[t]))
        bayes = q.unsqueeze(1) * step / (q @ step)
        field = fields([states.unsqueeze(0)], schedule.coupling[t : t + 1])[0]
        model = torch.softmax(-energy.unsqueeze(1) + states @ field[0].T, 0)
        torch.testing.assert_close(model, bayes, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_cumulative_flip_matches_recurrence_and_simulation(kind):
    T, size = 12, 200_000
    schedule = flip_schedule(T, kind)
    assert schedule.timesteps == T
    assert float(schedule.cumulative[0]) == 0
    bits, expected = torch.zeros(size), 0.0
    for t in range(1, T + 1):
        beta = float(schedule.beta[t])
        assert 0 < beta <= 0.5
        expected = expected * (1 - beta) + (1 - expected) * beta
        assert float(schedule.cumulative[t]) == pytest.approx(expected, abs=1e-12)
        bits = flip(bits, schedule.beta[t])
        standard_error = math.sqrt(expected * (1 - expected) / size)
        assert float(bits.mean()) == pytest.approx(expected, abs=4 * standard_error)
    assert set(bits.unique().tolist()) == {0.0, 1.0}


def test_cosine_schedule_has_the_values_of_the_note():
    schedule = flip_schedule(50, "cosine")
    for t, beta in {1: 0.0005, 10: 0.0096, 25: 0.0294, 40: 0.0825, 50: 0.165}.items():
        assert float(schedule.beta[t]) == pytest.approx(beta, rel=0.02)


@pytest.mark.parametrize("timesteps", [1, 2, 8, 50, 1000])
def test_only_the_linear_schedule_stops_short_of_noise(timesteps):
    assert float(flip_schedule(timesteps, "cosine").cumulative[-1]) == pytest.approx(0.5, abs=0.00101)
    assert float(flip_schedule(timesteps, "reciprocal").cumulative[-1]) == pytest.approx(0.5, abs=1e-12)
    if timesteps <= 50:
        assert float(flip_schedule(timesteps, "linear").cumulative[-1]) < 0.49


def test_reciprocal_schedule_spreads_the_cumulative_evenly():
    # 1 - 2 c_t = prod (1 - 1/(T - s + 1)) telescopes to 1 - t/T
    expected = torch.arange(21, dtype=DOUBLE) / 40
    torch.testing.assert_close(flip_schedule(20, "reciprocal").cumulative, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_posterior_probability_matches_enumeration(kind):
    schedule = flip_schedule(6, kind)
    for t in range(1, 7):
        previous, beta = schedule.cumulative[t - 1], schedule.beta[t]
        reach, step = flip_matrix(1, float(previous)), flip_matrix(1, float(beta))
        for clean in (0, 1):
            for noisy in (0, 1):
                joint = reach[clean] * step[:, noisy]
                actual = posterior_probability(torch.tensor(float(noisy)), torch.tensor(float(clean)), beta, previous)
                assert float(actual) == pytest.approx(float(joint[1] / joint.sum()), abs=1e-12)


def test_binary_entropy_matches_definition_and_vanishes_at_certainty():
    p = torch.linspace(0.01, 0.99, 9, dtype=DOUBLE)
    torch.testing.assert_close(binary_entropy(p), -p * p.log() - (1 - p) * (1 - p).log(), rtol=0, atol=1e-12)
    assert binary_entropy(torch.tensor([0.0, 1.0])).tolist() == [0, 0]


def test_diffuse_draws_joint_transitions():
    schedule, size = flip_schedule(6, "cosine"), 40_000
    clean = [torch.tensor([[0.0, 1.0]]).expand(size, -1), torch.tensor([[1.0]]).expand(size, -1)]
    previous, noisy = diffuse(clean, schedule, 1, 5)  # t = 2..5
    assert [tuple(bits.shape) for bits in noisy] == [(4, size, 2), (4, size, 1)]
    for row, t in enumerate(range(2, 6)):
        reach, step = flip_matrix(3, float(schedule.cumulative[t - 1])), flip_matrix(3, float(schedule.beta[t]))
        start = state_index(torch.tensor([0, 1, 1]))
        joint = (reach[start].unsqueeze(0) * step).flatten()  # (z_t, z_{t-1}): the step is symmetric
        pairs = torch.cat([bits[row] for bits in (*previous, *noisy)], 1)
        assert_fits(pairs, joint)
