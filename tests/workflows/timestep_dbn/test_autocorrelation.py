"""Autocorrelation of Gibbs chains against enumerated kernels, and the correlation penalty against enumeration and by hand."""

# T timesteps, B conditions, V visible units, H hidden units, F factors, S statistics or states, N sweeps, K lags

import math

import pytest
import torch
from torch import Tensor

from tests.workflows.timestep_dbn.enumeration import (
    DOUBLE,
    Case,
    all_bits,
    gibbs_kernel,
    parameters,
    random_case,
    repeat_timestep,
)
from tests.workflows.timestep_dbn.runs import bits_data, bits_state, digits_run, drive
from trainbook.workflows.timestep_dbn import autocorrelation
from trainbook.workflows.timestep_dbn.autocorrelation import autocovariance, integrated_time, measure, sweeps_needed
from trainbook.workflows.timestep_dbn.chain import TimestepDBN
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.correlation_penalty import CorrelationPenalty, adapted, add_correlation_penalty
from trainbook.workflows.timestep_dbn.diffusion import flip_schedule
from trainbook.workflows.timestep_dbn.likelihood import Factor, chain_factors
from trainbook.workflows.timestep_dbn.rbm import Block, Update


def exact_covariances(case: Case, t: int, b: int, statistic: Tensor, max_lag: int) -> Tensor:
    """Cov(f(z_0), f(z_k)) of the stationary Gibbs chain by powers of its kernel; f (S, n) -> (K + 1, n)."""
    kernel = gibbs_kernel(
        repeat_timestep(case.block, t, 1), case.context_bias[t : t + 1, b : b + 1], case.field[t : t + 1, b : b + 1]
    )
    p = case.probabilities(t, b).unsqueeze(1)
    centred, covariances = statistic - (p * statistic).sum(0), []
    moved = centred
    for _ in range(max_lag + 1):
        covariances.append((p * centred * moved).sum(0))
        moved = kernel @ moved
    return torch.stack(covariances)


def test_measured_autocorrelation_matches_the_enumerated_kernel(monkeypatch):
    case, conditions, max_lag = random_case(T=2, B=2, scale=0.3), 2000, 4
    case.block.weight += torch.tensor([0.5, 1.0], dtype=DOUBLE).view(-1, 1, 1)  # all on or all off: two modes
    case.block.visible_bias -= case.block.weight.sum(2) / 2
    case.block.hidden_bias -= case.block.weight.sum(1) / 2
    monkeypatch.setattr(autocorrelation, "NUM_CONDITIONS", conditions)
    monkeypatch.setattr(autocorrelation, "RECORDED", 40)
    directions = torch.randn(5, autocorrelation.NUM_PROJECTIONS, dtype=DOUBLE)
    monkeypatch.setattr(torch, "randn", lambda *size, **kwargs: directions)

    def factors(clean: list[Tensor], start: int, stop: int) -> list[Factor]:
        rows, times = slice(start, stop), len(clean[0]) // 2
        many = (tensor[rows].repeat(1, times, 1) for tensor in (case.context_bias, case.field))
        block = Block(*(tensor[rows] for tensor in parameters(case.block)))
        state = torch.randint(2, (stop - start, 2 * times, 5)).to(DOUBLE)
        return [Factor(block, *many, state, state[..., 0])]

    measured = measure(factors, [torch.zeros(conditions, 5)], 0, 2, max_lag)  # (T, 1, 2, K + 1)
    assert measured.shape == (2, 1, 2, max_lag + 1)
    for t in range(2):
        energy = [case.block.free_energy(all_bits(5).expand(2, -1, -1), case.context_bias[:, b : b + 1])[t] for b in range(2)]
        statistics = [
            torch.cat([all_bits(5) @ directions, (energy[b] - all_bits(5) @ case.field[t, b]).unsqueeze(1)], 1) for b in (0, 1)
        ]
        exact = sum(exact_covariances(case, t, b, statistics[b], max_lag) for b in (0, 1))
        for row, expected in enumerate((exact[:, :-1].sum(1), exact[:, -1])):
            torch.testing.assert_close(measured[t, 0, row], expected / expected[0], rtol=0, atol=0.02)
        assert measured[t, 0, 0, 1] > 0.05  # there is something to remember


def test_autocovariance_is_unbiased_for_an_autoregressive_process():
    rho, length, pairs = 0.9, 60, 20_000  # so short that a mean taken from one chain alone would take off a third
    x = [torch.randn(2, pairs, dtype=DOUBLE) + 3]
    for _ in range(length - 1):
        x.append(3 + rho * (x[-1] - 3) + math.sqrt(1 - rho**2) * torch.randn(2, pairs, dtype=DOUBLE))
    found = autocovariance(torch.stack(x), 20)
    standard_error = found.std(1) / math.sqrt(pairs)
    assert ((found.mean(1) - rho ** torch.arange(21)).abs() < 4 * standard_error).all()
    assert standard_error.max() < 0.02


def test_chains_that_are_stuck_do_not_look_as_if_they_mixed():
    modes = torch.where(torch.rand(2, 4000, dtype=DOUBLE) < 0.5, -1.0, 1.0)
    found = autocovariance(modes + 0.1 * torch.randn(50, 2, 4000, dtype=DOUBLE), 10).mean(1)
    torch.testing.assert_close(found / found[0], torch.ones(11, dtype=DOUBLE), rtol=0, atol=0.05)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8, 0.95])
def test_integrated_time_and_sweeps_of_a_geometric_decay(rate):
    correlation = rate ** torch.arange(400, dtype=DOUBLE)
    time = integrated_time(correlation)
    assert float(time) == pytest.approx((1 + rate) / (1 - rate), rel=0.02)
    sweeps = int(sweeps_needed(torch.tensor((1 + rate) / (1 - rate), dtype=DOUBLE), 1000))
    assert rate**sweeps <= autocorrelation.RESIDUAL * 1.000001
    assert sweeps == 1 or rate ** (sweeps - 1) > autocorrelation.RESIDUAL
    assert int(sweeps_needed(torch.tensor(1e9, dtype=DOUBLE), 77)) == 77


def test_integrated_time_is_summed_in_its_window_only():
    correlation = torch.cat([0.5 ** torch.arange(40, dtype=DOUBLE), torch.full((400,), 0.5, dtype=DOUBLE)])
    assert float(integrated_time(correlation)) == pytest.approx(3, rel=0.01)  # the rest would add 400


@pytest.mark.parametrize("given", [0, 7])
def test_sampling_sweeps_are_measured_where_none_are_given(tmp_path, given):
    config, data, state = digits_run(tmp_path, sampling_sweeps=given, most_sampling_sweeps=50)
    dbn = state.modules["dbn"]
    assert dbn.sampling_sweeps.tolist() == [given or 50] * 3
    drive(config, data, state, 8)  # the end of the chain
    if given:
        assert dbn.sampling_sweeps.tolist() == [given] * 3
        return
    assert dbn.sampling_sweeps.max() < 20  # hardly trained: it forgets fast
    for level in dbn.levels:
        level.weight.data[1] = 4.0  # two modes far apart at the second timestep alone
        level.visible_bias.data[1] = -2.0 * level.weight.shape[2]
        level.hidden_bias.data[1] = -2.0 * level.weight.shape[1]
        level.context_weight.data[1] = 0
    schedule, codes = (
        flip_schedule(3, config.schedule).to("cpu"),
        list(torch.rand(64, sum(dbn.level_sizes)).round().split(dbn.level_sizes, 1)),
    )
    slow = integrated_time(measure(chain_factors(dbn, schedule), codes, 0, 3)).amax((1, 2))
    assert sweeps_needed(slow, 50).tolist()[1] == 50


# ------------------------------------------------------------------------------------------------------ the penalty


def exact_penalty_gradient(case: Case, b: int) -> Tensor:
    """d/dW of KL(prod_i p(s_i) || p) with the marginals held fixed, by autograd over every state of all units; T = 1."""
    W = case.block.weight.clone().requires_grad_()
    joint = Case(Block(W, *parameters(case.block)[1:]), case.context, case.noisy, case.field).log_joint(0, b)
    log_p = joint - joint.logsumexp((0, 1))
    p = log_p.detach().exp()
    z, h = all_bits(p.shape[0].bit_length() - 1), all_bits(p.shape[1].bit_length() - 1)
    mean_z, mean_h = p.sum(1) @ z, p.sum(0) @ h

    def product(mean: Tensor, states: Tensor) -> Tensor:
        return torch.where(states > 0.5, mean, 1 - mean).prod(1)

    factorised = product(mean_z, z).unsqueeze(1) * product(mean_h, h)
    divergence = (factorised * (factorised.log() - log_p)).sum()
    return torch.autograd.grad(divergence, W)[0][0]


def test_penalty_gradient_over_all_pairs_of_states_is_the_exact_one():
    case, strength, rate = random_case(T=1, B=1, V=4, H=3), 0.3, 0.05
    states = all_bits(4)
    first, second = states.repeat_interleave(16, 0).unsqueeze(1), states.repeat(16, 1).unsqueeze(1)  # every pair a timestep
    block, bias = repeat_timestep(case.block, 0, 256), case.context_bias.expand(256, 1, -1)
    p = case.probabilities(0, 0)
    chance = torch.outer(p, p).flatten()  # two independent chains
    exact = exact_penalty_gradient(case, 0)
    gradients = [torch.ones(256, *tensor.shape[1:], dtype=DOUBLE) for tensor in parameters(case.block)]
    lambdas = torch.full((256,), strength, dtype=DOUBLE)
    add_correlation_penalty(block, first, second, bias, lambdas, Update(tuple(gradients), 0.0, 0.0, -1.0))
    torch.testing.assert_close(torch.tensordot(chance, gradients[0] - 1, 1), strength * exact, rtol=0, atol=1e-10)
    moved = [torch.zeros(256, *tensor.shape[1:], dtype=DOUBLE) for tensor in parameters(case.block)]
    add_correlation_penalty(block, first, second, bias, lambdas, Update(tuple(moved), 1.0, 1.0, rate))
    torch.testing.assert_close(torch.tensordot(chance, moved[0], 1), -rate * strength * exact, rtol=0, atol=1e-10)
    assert exact.abs().max() > 0.01


def test_strength_follows_a_sequence_computed_by_hand():
    sequence = [0.5, 0.6, 0.55, 0.58, 0.58, 0.2, 0.05, 0.05, 0.04, 0.03, 0.02, 0.01, 0.3]
    # raised on the first look, on a rise and on a tie; kept while it falls above 0.1; lowered below, to nothing under 0.001
    expected = [0.0015, 0.00225, 0.00225, 0.003375, 0.0050625, 0.0050625, 0.00354375, 0.002480625, 0.0017364375, 0.00121550625]
    expected += [0.0, 0.0, 0.0015]
    strength, previous, found = torch.zeros(1, 1, dtype=DOUBLE), torch.full((1, 1), math.nan, dtype=DOUBLE), []
    for value in sequence:
        measured = torch.full((1, 1), value, dtype=DOUBLE)
        strength, previous = adapted(strength, measured, previous, 0.1), measured
        found.append(float(strength))
    assert found == pytest.approx(expected)


def two_modes(threshold: float) -> float:
    """Autocorrelation at lag 10 on the finest level of a chain trained on all zeros and all ones there, coins elsewhere."""
    config = Config(
        timesteps=1, hidden_units=(8, 1, 1), autoencoder_epochs=1, epochs_per_timestep=150, baseline_epochs=1, batch_size=16,
        learning_rate=0.02, weight_decay=0.0, noisy_context=False, gibbs_sweeps=5, correlation_threshold=threshold,
    )  # fmt: skip
    index = torch.arange(32).unsqueeze(1)
    bits = torch.cat([(index < 16).expand(-1, 10), index % 2, index // 2 % 2], 1).float()
    state = bits_state(config, [10, 1, 1], 32)
    drive(config, bits_data(bits, bits, bits), state, state.step + 300)
    schedule = flip_schedule(1, config.schedule).to("cpu")
    factors = chain_factors(state.modules["dbn"], schedule)
    return sum(float(measure(factors, bits.split([10, 1, 1], 1), 0, 1, 10)[0, 0, 0, -1]) for _ in range(3)) / 3


def test_penalty_frees_a_chain_that_is_stuck():
    stuck, freed = two_modes(0.0), two_modes(0.1)
    assert stuck > 0.3
    assert freed < 0.5 * stuck


def test_penalty_of_a_later_block_goes_on_from_the_last_timestep_before_it_and_survives_a_checkpoint():
    config = Config(timesteps=4, hidden_units=(3, 2, 2), correlation_threshold=0.05)
    dbn = TimestepDBN(config, [5, 4, 3])
    penalty = CorrelationPenalty(config, dbn)
    penalty.adapt(0, torch.full((2, 3), 0.9))
    penalty.begin(2, 4)
    assert torch.equal(penalty.strength[2:], penalty.strength[1].expand(2, -1))
    assert penalty.strength.unique().tolist() == pytest.approx([0.0015])
    other = CorrelationPenalty(config, dbn)
    other.load_state_dict(penalty.state_dict())
    for one, two in zip(
        (other.strength, other.previous, *other.chains), (penalty.strength, penalty.previous, *penalty.chains), strict=True
    ):
        assert torch.equal(one.nan_to_num(-1), two.nan_to_num(-1))
