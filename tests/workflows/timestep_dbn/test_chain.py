"""Whole chains: enumerated transitions, bounds, samples, and what training reaches."""

# T timesteps, B batch, V visible units, H hidden units, G context units, S = 2^V states
# z visible, h hidden, g context, a and b visible and hidden biases, W weight, U context weight, s logistic function

import copy
import itertools
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tests.workflows.timestep_dbn.enumeration import (
    DOUBLE,
    SCHEDULES,
    all_bits,
    assert_fits,
    end_of_chain,
    enumerated_bound,
    flip_matrix,
    logistic_reverse_matrix,
    product_of_bernoullis,
    random_dbn,
    reverse_distribution,
    reverse_matrix,
    state_index,
)
from tests.workflows.timestep_dbn.runs import STRIPE_SIZES, bars_and_stripes, bits_data, bits_state, drive
from trainbook.state import TrainState
from trainbook.workflows.timestep_dbn import chain as chain_module
from trainbook.workflows.timestep_dbn import evaluation
from trainbook.workflows.timestep_dbn.baselines import LogisticChain
from trainbook.workflows.timestep_dbn.chain import reverse_step
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule, flip_schedule


@pytest.mark.parametrize("noisy_context", [True, False])
@pytest.mark.parametrize("context", ["hidden_mean", "hidden_sample", "bits"])
def test_reverse_step_histogram_fits_the_enumerated_transition(context, noisy_context):
    dbn, _ = random_dbn([3, 2, 1], timesteps=2, context=context, noisy_context=noisy_context)
    schedule, size = flip_schedule(2, "cosine").to("cpu"), 20_000
    for t, noisy in ((2, torch.tensor([1.0, 0, 1, 0, 1, 1])), (1, torch.tensor([0.0, 0, 1, 1, 0, 0]))):
        levels = noisy.expand(size, -1).split(dbn.level_sizes, 1)
        for sweeps, reached in ((1, 1), (30, None)):
            samples = torch.cat(reverse_step(dbn, levels, t, schedule, sweeps), 1)
            exact = reverse_distribution(dbn, t, noisy, float(schedule.coupling[t]), reached)
            assert float(exact.sum()) == pytest.approx(1, abs=1e-9)
            assert_fits(samples, exact)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_prior_divergence_matches_enumeration(kind):
    schedule = flip_schedule(6, kind).to("cpu")  # the linear one ends far from fair coins
    end = flip_matrix(5, float(schedule.cumulative[-1]))[11]
    actual = chain_module.prior_divergence([torch.zeros(3, 4), torch.zeros(3, 1)], schedule)
    assert actual.tolist() == pytest.approx([float((end * (32 * end).log()).sum())] * 3, abs=1e-6, rel=1e-5)


@pytest.fixture(scope="module")
def stripes():
    """A chain of 4 steps and its baselines, trained equally long on bars and stripes: config, state, patterns."""
    config = Config(
        timesteps=4, hidden_units=(16, 16, 4), autoencoder_epochs=1, epochs_per_timestep=250, baseline_epochs=250,
        batch_size=28, learning_rate=0.05, baseline_learning_rate=0.05, weight_decay=1e-4, gibbs_sweeps=3,
        ais_temperatures=100, sampling_sweeps=40,
    )  # fmt: skip
    patterns = bars_and_stripes()
    data = bits_data(patterns.repeat(20, 1), patterns, patterns)
    return config, drive(config, data, bits_state(config, STRIPE_SIZES, 280)), patterns


@pytest.fixture(scope="module")
def stripe_matrices(stripes):
    """Enumerated reverse transitions of the trained chain and of the logistic chain, for t = 1..4."""
    config, state, _ = stripes
    schedule = flip_schedule(config.timesteps, config.schedule)
    return (
        [reverse_matrix(state.modules["dbn"], t, schedule) for t in range(1, 5)],
        [logistic_reverse_matrix(state.modules["logistic_chain"], t, schedule) for t in range(1, 5)],
    )


def divergence_from_patterns(p: Tensor, patterns: Tensor) -> float:
    """KL(uniform over the patterns || p), in nats."""
    return float(-p[state_index(patterns)].log().mean()) - math.log(len(patterns))


def best_factorised_reverse(data: Tensor, schedule: FlipSchedule) -> list[Tensor]:
    """Per step the product of the exact posterior's marginals, the best that any factorised reverse can be; [(S, S)]."""
    num_bits = int(math.log2(len(data)))
    matrices = []
    for t in range(1, schedule.timesteps + 1):
        joint = (data @ flip_matrix(num_bits, float(schedule.cumulative[t - 1]))).unsqueeze(1) * flip_matrix(
            num_bits, float(schedule.beta[t])
        )
        marginals = joint.T @ all_bits(num_bits) / joint.sum(0).unsqueeze(1)  # (z_t, V)
        matrices.append(product_of_bernoullis(marginals, all_bits(num_bits)))
    return matrices


def test_trained_chain_beats_factorised_baselines_exactly(stripes, stripe_matrices):
    config, state, patterns = stripes
    chain, logistic = (end_of_chain(matrices) for matrices in stripe_matrices)
    independent = product_of_bernoullis(state.modules["independent_bits"].mean.to(DOUBLE), all_bits(9))
    assert [float(p.sum()) for p in (chain, logistic, independent)] == pytest.approx([1, 1, 1], abs=1e-6)
    chain_kl, logistic_kl, independent_kl = (divergence_from_patterns(p, patterns) for p in (chain, logistic, independent))
    assert independent_kl == pytest.approx(9 * math.log(2) - math.log(14), abs=0.02)  # every pixel is a fair coin
    data = torch.zeros(512, dtype=DOUBLE).index_fill_(0, state_index(patterns), 1 / 14)
    best = divergence_from_patterns(end_of_chain(best_factorised_reverse(data, flip_schedule(4, config.schedule))), patterns)
    assert best == pytest.approx(0.58, abs=0.01)  # note 2.8
    assert chain_kl < 0.6 * best < best < logistic_kl < independent_kl


def test_ancestral_samples_fit_the_enumerated_chain():
    dbn, config = random_dbn([3, 2, 1], timesteps=3, sampling_sweeps=30)
    logistic, schedule = LogisticChain(3, 6), flip_schedule(3, "cosine").to("cpu")
    for parameter in logistic.parameters():
        nn.init.normal_(parameter)
    state = TrainState({"dbn": dbn, "logistic_chain": logistic})
    step = evaluation.reverse_steps(config, state, schedule)
    exact = {
        "chain": [reverse_matrix(dbn, t, schedule) for t in (1, 2, 3)],
        "logistic_chain": [logistic_reverse_matrix(logistic, t, schedule) for t in (1, 2, 3)],
    }
    for who, matrices in exact.items():
        trajectory = evaluation.sample_trajectory(step[who], 20_000, 6, 3, torch.device("cpu"))
        assert len(trajectory) == 4
        for t, bits in enumerate(reversed(trajectory)):
            assert_fits(bits, end_of_chain(matrices[t:]) if t < 3 else torch.full((64,), 1 / 64))


def test_likelihoods_match_enumeration(stripes, stripe_matrices):
    config, state, patterns = stripes
    schedule = flip_schedule(4, config.schedule).to("cpu")
    rows = state_index(patterns)
    test = list(patterns.float().repeat(60, 1).split(STRIPE_SIZES, 1))
    rbm = copy.deepcopy(state.modules["monolithic_rbm"])
    rbm.weight.data *= 0.3  # or annealing would need thousands of temperatures
    state = TrainState({**state.modules, "monolithic_rbm": rbm})
    metrics = evaluation.likelihoods(config, state, test, schedule)
    W, a, b = (tensor[0].detach().to(DOUBLE) for tensor in (rbm.weight, rbm.visible_bias, rbm.hidden_bias))
    log_p = torch.log_softmax(all_bits(9) @ a + torch.log1p((b + all_bits(9) @ W).exp()).sum(1), 0)
    independent = product_of_bernoullis(state.modules["independent_bits"].mean.to(DOUBLE), patterns)
    exact = {
        "chain": float(torch.stack([enumerated_bound(stripe_matrices[0], schedule, int(row)).sum() for row in rows]).mean()),
        "logistic_chain": float(torch.stack([enumerated_bound(stripe_matrices[1], schedule, int(r)).sum() for r in rows]).mean()),
        "monolithic_rbm": -float(log_p[rows].mean()),
        "independent_bits": -float(independent.log().mean()),
    }
    width = metrics["chain/nats_per_bit"] - metrics["chain/nats_per_bit_other_direction"]
    assert width == pytest.approx(metrics["chain/bracket_nats_per_bit"], abs=1e-6)
    steps = [metrics[f"chain/step_nats_per_bit@{t}"] for t in range(1, 5)]
    prior = chain_module.prior_divergence(test, schedule)[0].item() / 9
    assert sum(steps) + prior == pytest.approx(metrics["chain/nats_per_bit"], abs=1e-5)
    for who in ("chain", "logistic_chain"):
        error = metrics[f"{who}/nats_per_bit_standard_error"]
        assert error < 0.02
        assert metrics[f"{who}/nats_per_bit"] == pytest.approx(exact[who] / 9, abs=4 * error)
    assert metrics["monolithic_rbm/nats_per_bit"] == pytest.approx(exact["monolithic_rbm"] / 9, abs=0.02)
    assert metrics["independent_bits/nats_per_bit"] == pytest.approx(exact["independent_bits"] / 9, abs=1e-5)
    assert metrics["chain/nats_per_bit"] < min(metrics[f"{who}/nats_per_bit"] for who in ("logistic_chain", "independent_bits"))


def test_bit_error_falls_on_held_out_digits_and_ends_below_the_factorised_chain():
    pixels = (torch.from_numpy(load_digits().images).float() > 8).float().flatten(1)  # real digits, one bit per pixel
    row, column = torch.arange(64) // 8, torch.arange(64) % 8
    kind = torch.where((row + column) % 2 == 0, 0, 1 + (row % 2))  # chessboard: 32 fine, 16 and 16 coarser bits
    pixels = pixels[torch.randperm(len(pixels))][:, torch.argsort(kind, stable=True)]
    config = Config(
        timesteps=8, hidden_units=(48, 32, 32), autoencoder_epochs=1, epochs_per_timestep=25, baseline_epochs=25,
        learning_rate=0.01, gibbs_sweeps=1,
    )  # fmt: skip
    data = bits_data(pixels[:1200], pixels[1200:1440], pixels[1440:])
    state = drive(config, data, bits_state(config, [32, 16, 16], 1200))
    schedule = flip_schedule(8, "cosine").to("cpu")
    start = evaluation.start_timestep(schedule)
    assert schedule.cumulative[start] < 0.25 <= schedule.cumulative[start + 1]
    torch.manual_seed(0)
    errors = evaluation.bit_errors(config, state, list(pixels[1440:].repeat(8, 1).split([32, 16, 16], 1)), schedule)
    assert len(errors["chain"]) == start + 1
    assert errors["chain"][0] == pytest.approx(float(schedule.cumulative[start]), abs=0.01)
    assert all(later < earlier for earlier, later in itertools.pairwise(errors["chain"]))
    assert errors["chain"][-1] < errors["logistic_chain"][-1] < errors["independent_bits"][-1] < errors["no_op"][-1]
