"""Code lengths against enumeration, from both sides, and how far annealing goes."""

# T timesteps, B images, V visible units, F factors of a reverse step, S = 2^V states, K temperatures, D width times K

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.workflows.timestep_dbn.enumeration import (
    DOUBLE,
    all_bits,
    end_of_chain,
    enumerated_bound,
    random_dbn,
    reverse_matrix,
)
from trainbook.workflows.timestep_dbn import likelihood
from trainbook.workflows.timestep_dbn.baselines import monolithic_rbm
from trainbook.workflows.timestep_dbn.chain import prior_divergence
from trainbook.workflows.timestep_dbn.diffusion import flip_schedule
from trainbook.workflows.timestep_dbn.likelihood import (
    Annealing,
    allocate,
    bracket,
    bracket_metrics,
    chain_factors,
    choose_temperatures,
    plain_bracket,
)

SIZES = [3, 2, 1]
EXHAUSTIVE = Annealing(tolerance=1e-4, max_temperatures=60, particles=2)


def copies(z_0: int, number: int) -> tuple[Tensor, ...]:
    """One state of six bits so many times, per level."""
    return all_bits(6)[[z_0]].float().expand(number, -1).split(SIZES, 1)


@pytest.mark.parametrize("noisy_context", [True, False])
@pytest.mark.parametrize("context", ["hidden_mean", "bits"])
def test_both_sides_of_every_step_match_enumeration(context, noisy_context, monkeypatch):
    dbn, _ = random_dbn(SIZES, timesteps=3, context=context, noisy_context=noisy_context)
    schedule, size, z_0 = flip_schedule(3, "cosine").to("cpu"), 4000, 37
    monkeypatch.setattr(likelihood, "CHUNK", 1500)  # three chunks of images
    monkeypatch.setattr(likelihood, "CPU_ROWS", 6000)  # of two tiles of timesteps each
    matrices = [reverse_matrix(dbn, t, schedule) for t in (1, 2, 3)]
    exact = enumerated_bound(matrices, schedule, z_0)
    found = bracket(chain_factors(dbn, schedule), copies(z_0, size), 3, EXHAUSTIVE, "test")
    for side in (found.low, found.high):
        standard_error = side.std(1) / math.sqrt(size)
        assert side.shape == (3, size)
        assert standard_error.max() < 0.05
        assert ((side.mean(1) - exact[1:]).abs() < 4 * standard_error).all()
    gap, error = (found.high - found.low).sum(0), found.variance.sum(0).mean().sqrt() / math.sqrt(size)
    assert -4 * error < gap.mean() < 0.05
    negative_log = -float(end_of_chain(matrices)[z_0].log())
    assert float(exact.sum()) > negative_log
    assert float((prior_divergence(copies(z_0, size), schedule) + found.high.sum(0)).mean()) > negative_log


def test_bound_with_sampled_context_is_still_a_bound():
    dbn, _ = random_dbn(SIZES, timesteps=2, context="hidden_sample")
    schedule, size = flip_schedule(2, "cosine").to("cpu"), 1000
    p = end_of_chain([reverse_matrix(dbn, t, schedule) for t in (1, 2)])
    for z_0 in (5, 60):
        clean = copies(z_0, size)
        estimate = prior_divergence(clean, schedule) + bracket(
            chain_factors(dbn, schedule), clean, 2, EXHAUSTIVE, "test"
        ).low.sum(0)
        assert float(estimate.mean()) - 4 * float(estimate.std()) / math.sqrt(size) > -float(p[z_0].log())


def test_the_two_sides_lie_apart_when_temperatures_are_few():
    dbn, _ = random_dbn(SIZES, timesteps=3, scale=1.5)
    schedule, size, z_0 = flip_schedule(3, "cosine").to("cpu"), 4000, 37
    exact = enumerated_bound([reverse_matrix(dbn, t, schedule) for t in (1, 2, 3)], schedule, z_0)[1:].sum()
    found = bracket(chain_factors(dbn, schedule), copies(z_0, size), 3, Annealing(1e-4, 2, 2), "test")
    low, high = (side.sum(0) for side in (found.low, found.high))
    for side, sign in ((low, -1), (high, 1)):
        assert sign * (side.mean() - exact) > 4 * side.std() / math.sqrt(size)


def test_allocation_is_the_cheapest_that_reaches_the_width():
    falling, costs, width = torch.tensor([[3.0, 0.2], [0.5, 8.0]], dtype=DOUBLE), torch.tensor([1.0, 5.0], dtype=DOUBLE), 0.1
    shares = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(4), 50_000)).view(-1, 2, 2)  # of the width
    found = allocate(falling, costs, width)
    cost, others = (costs * found).sum(), (costs * falling / (width * shares)).sum((1, 2))
    assert float((falling / found).sum()) == pytest.approx(width)
    assert cost <= others.min() < 1.01 * cost


def test_temperatures_go_where_the_width_is_and_reach_the_tolerance():
    dbn, _ = random_dbn([8, 6, 4], timesteps=4, scale=0.5)
    dbn.levels[0].weight.data[2] *= 3
    dbn.levels[1].weight.data[:] = 0  # nothing to anneal
    schedule, clean = flip_schedule(4, "cosine").to("cpu"), torch.randint(2, (600, 18)).float().split([8, 6, 4], 1)
    annealing = Annealing(tolerance=0.002, max_temperatures=4000, particles=2)
    temperatures, seconds = choose_temperatures(chain_factors(dbn, schedule), clean, 4, annealing)
    assert temperatures[2, 0] == temperatures.max() > 2 * temperatures[:, 2].max()
    assert temperatures[:, 1].unique().tolist() == [likelihood.FIRST_TEMPERATURES]
    assert seconds > 0
    found = bracket(chain_factors(dbn, schedule), clean, 4, annealing, "test")
    width = (found.high - found.low).sum(0) / 18
    assert float(width.mean()) < 0.002 + 4 * float(width.std()) / math.sqrt(width.numel())
    capped = bracket(chain_factors(dbn, schedule), clean, 4, Annealing(1e-9, 30, 2), "test")
    assert capped.temperatures.max() == 30


@pytest.mark.parametrize(("tolerance", "images"), [(1.0, 64), (1e-9, 200)])
def test_images_are_taken_until_the_standard_error_is_small_enough(tolerance, images):
    dbn, _ = random_dbn(SIZES, timesteps=2)
    clean = torch.randint(2, (200, 6)).float().split(SIZES, 1)
    schedule = flip_schedule(2, "cosine").to("cpu")
    found = bracket(chain_factors(dbn, schedule), clean, 2, Annealing(tolerance, 4, 2), "test")
    assert found.low.shape == found.high.shape == (2, images)
    assert bracket_metrics("chain", found, 6)["chain/likelihood_images"] == images


def test_plain_likelihood_matches_enumeration_on_both_sides():
    rbm = monolithic_rbm(6, 69, 4)
    for parameter in rbm.parameters():
        nn.init.normal_(parameter, std=0.5)
    W, a, b = (tensor[0].detach().to(DOUBLE) for tensor in (rbm.weight, rbm.visible_bias, rbm.hidden_bias))
    states = all_bits(6)
    exact = -torch.log_softmax(states @ a + torch.log1p((b + states @ W).exp()).sum(1), 0)
    for side in plain_bracket(rbm, states.float(), Annealing(tolerance=1e-4, max_temperatures=400, particles=32)):
        torch.testing.assert_close(side.to(DOUBLE), exact, rtol=0, atol=0.02)  # one log Z: 2048 weights of spread < 0.2
