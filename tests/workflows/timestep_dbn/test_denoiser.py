"""The denoiser against enumeration: its reverse probabilities, its bound, and the best that a factorised step can reach."""

# T timesteps, B batch, V bits, S = 2^V states

import math

import pytest
import torch
from torch import Tensor, nn

from tests.workflows.timestep_dbn.enumeration import (
    DOUBLE,
    all_bits,
    assert_fits,
    enumerated_bound,
    flip_matrix,
    logistic_reverse_matrix,
    product_of_bernoullis,
    state_index,
)
from tests.workflows.timestep_dbn.runs import bars_and_stripes
from trainbook.stepper import Stepper
from trainbook.workflows.timestep_dbn import denoiser as denoiser_module
from trainbook.workflows.timestep_dbn.baselines import LogisticChain
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.denoiser import Denoiser
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule, flip_schedule
from trainbook.workflows.timestep_dbn.evaluation import factorised_bound

SCHEDULES = ("cosine", "reciprocal", "linear")


def random_denoiser(timesteps: int, num_bits: int) -> Denoiser:
    """One whose predictions differ between bits and timesteps."""
    model = Denoiser(timesteps, num_bits, 8).to(DOUBLE)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model


def posterior(num_bits: int, t: int, schedule: FlipSchedule) -> Tensor:
    """q(z_{t-1} | z_t, z_0) for every triple, (z_0, z_t, z_{t-1}), by Bayes' rule over all states."""
    reach, step = flip_matrix(num_bits, float(schedule.cumulative[t - 1])), flip_matrix(num_bits, float(schedule.beta[t]))
    joint = reach.unsqueeze(1) * step.unsqueeze(0)  # q(z_{t-1} | z_0) q(z_t | z_{t-1}), the step is symmetric
    return joint / joint.sum(2, keepdim=True)


@torch.no_grad()
def denoiser_reverse_matrix(model: Denoiser, t: int, schedule: FlipSchedule, num_bits: int) -> Tensor:
    """p(z_{t-1} | z_t) = sum over z_0 of q(z_{t-1} | z_t, z_0) p(z_0 | z_t), (S, S), row z_t."""
    states = all_bits(num_bits)
    dtype = next(model.parameters()).dtype
    logits = model.logits(states.to(dtype), torch.full((len(states),), t), schedule).to(DOUBLE)
    clean = product_of_bernoullis(logits.sigmoid(), states)  # (z_t, z_0)
    return torch.einsum("ab,bac->ac", clean, posterior(num_bits, t, schedule))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_reverse_probabilities_are_the_mixture_over_all_clean_states(kind):
    schedule, model, states = flip_schedule(4, kind), random_denoiser(4, 3), all_bits(3)
    for t in range(1, 5):
        one, zero = model.reverse_log_probabilities(states, torch.full((8,), t), schedule)
        torch.testing.assert_close(one.exp() + zero.exp(), torch.ones_like(one), rtol=0, atol=1e-12)
        expected = denoiser_reverse_matrix(model, t, schedule, 3)
        torch.testing.assert_close(product_of_bernoullis(one.exp(), states), expected, rtol=0, atol=1e-12)


def test_single_precision_keeps_small_probabilities():
    # At small t a bit that agrees in z_t and z_0 stays with 1 - 1e-6: 1 - p in single precision would be wrong by a tenth.
    schedule, model = flip_schedule(200, "cosine"), random_denoiser(200, 3)
    single = Denoiser(200, 3, 8)
    single.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    t, states = torch.full((8,), 2), all_bits(3)
    exact, rounded = model.reverse_log_probabilities(states, t, schedule), single.reverse_log_probabilities(
        states.float(), t, schedule.to("cpu")
    )  # fmt: skip
    for one, other in zip(exact, rounded, strict=True):
        torch.testing.assert_close(other.to(DOUBLE), one, rtol=1e-3, atol=1e-3)


def test_reverse_step_draws_from_the_mixture():
    schedule, model = flip_schedule(3, "cosine"), random_denoiser(3, 4)
    for t, noisy in ((3, [1.0, 0, 1, 1]), (2, [0.0, 0, 1, 0]), (1, [1.0, 1, 1, 0])):
        bits = torch.tensor(noisy, dtype=DOUBLE)
        samples = model.reverse_step(bits.expand(20_000, -1), t, schedule)
        assert_fits(samples, denoiser_reverse_matrix(model, t, schedule, 4)[state_index(bits)])


def test_start_is_the_reverse_process_of_independent_bits():
    schedule, mean, states = flip_schedule(5, "cosine"), torch.tensor([0.1, 0.5, 0.8], dtype=DOUBLE), all_bits(3)
    model = Denoiser(5, 3, 8).to(DOUBLE)
    model.initialise(mean)
    logistic = LogisticChain(5, 3).to(DOUBLE)
    logistic.initialise(mean, schedule)
    data = product_of_bernoullis(mean, states)
    for t in range(1, 6):
        joint = (data @ flip_matrix(3, float(schedule.cumulative[t - 1]))).unsqueeze(1) * flip_matrix(3, float(schedule.beta[t]))
        bayes = joint.T / joint.sum(0).unsqueeze(1)
        torch.testing.assert_close(denoiser_reverse_matrix(model, t, schedule, 3), bayes, rtol=0, atol=1e-12)
        torch.testing.assert_close(logistic_reverse_matrix(logistic, t, schedule), bayes, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model", ["denoiser", "logistic_chain"])
def test_steps_are_exact_means_over_the_previous_state(model):
    schedule, states, z_0 = flip_schedule(3, "cosine"), all_bits(3), 5
    made = random_denoiser(3, 3) if model == "denoiser" else LogisticChain(3, 3).to(DOUBLE)
    if model == "logistic_chain":
        for parameter in made.parameters():
            nn.init.normal_(parameter)
    steps, noisy = made.negative_log_steps(states[[z_0]].expand(400, -1), schedule)
    for t in (1, 2, 3):
        is_logistic = model == "logistic_chain"
        reverse = logistic_reverse_matrix(made, t, schedule) if is_logistic else denoiser_reverse_matrix(made, t, schedule, 3)
        exact = -torch.xlogy(posterior(3, t, schedule)[z_0], reverse).sum(1)  # (z_t,)
        torch.testing.assert_close(steps[t - 1].detach(), exact[state_index(noisy[t - 1])], rtol=0, atol=1e-9)
        assert_fits(noisy[t - 1], flip_matrix(3, float(schedule.cumulative[t]))[z_0])


@pytest.mark.parametrize("kind", SCHEDULES)
def test_bound_matches_enumeration(kind):
    schedule, model, size = flip_schedule(4, kind), random_denoiser(4, 3), 4000
    matrices = [denoiser_reverse_matrix(model, t, schedule, 3) for t in range(1, 5)]
    for z_0 in (0, 5):
        with torch.no_grad():
            values = factorised_bound(model, all_bits(3)[[z_0]].expand(size, -1), schedule)
        exact = float(enumerated_bound(matrices, schedule, z_0).sum())
        assert float(values.mean()) == pytest.approx(exact, abs=4 * float(values.std()) / math.sqrt(size))


@pytest.mark.parametrize(("batch", "timesteps"), [(20_000, 4), (7, 50)])
def test_loss_spreads_its_timesteps_evenly(batch, timesteps, monkeypatch):
    seen = []

    def record(self, clean: Tensor, noisy: Tensor, t: Tensor, schedule: FlipSchedule) -> Tensor:
        seen.append(t)
        return clean.sum(-1)

    monkeypatch.setattr(Denoiser, "cross_entropy", record)
    model, schedule = Denoiser(timesteps, 3, 4), flip_schedule(timesteps, "cosine").to("cpu")
    per_image = denoiser_module.TIMESTEPS_PER_IMAGE
    for _ in range(3000 if batch < timesteps else 1):
        model.loss(torch.ones(batch, 3), schedule)
        counts = torch.bincount(seen[-1], minlength=timesteps + 1)[1:]
        assert len(seen[-1]) == batch * per_image
        assert counts.max() - counts.min() <= 1
    total = torch.bincount(torch.cat(seen), minlength=timesteps + 1)[1:].double()
    expected = len(torch.cat(seen)) / timesteps
    assert ((total - expected).abs() < 5 * math.sqrt(expected) + 1).all()


def test_loss_is_the_mean_of_the_enumerated_steps():
    schedule, model, clean = flip_schedule(3, "cosine"), random_denoiser(3, 3), all_bits(3)[6]
    exact = 0.0
    for t in (1, 2, 3):
        reach = flip_matrix(3, float(schedule.cumulative[t]))[6]  # q(z_t | z_0)
        log_p = denoiser_reverse_matrix(model, t, schedule, 3)
        exact -= float(reach @ torch.xlogy(posterior(3, t, schedule)[6], log_p).sum(1)) / (3 * 3)
    with torch.no_grad():
        losses = torch.stack([model.loss(clean.expand(3000, -1), schedule) for _ in range(20)])
    assert float(losses.mean()) == pytest.approx(exact, abs=4 * float(losses.std()) / math.sqrt(20))


@pytest.mark.parametrize(("timesteps", "num_bits", "asked"), [(8, 128, 700_160), (50, 1792, 36_000_000), (3, 7, 60)])
def test_size_is_as_asked(timesteps, num_bits, asked):
    model = Denoiser.of_size(timesteps, num_bits, asked)
    width = model.enter.out_features
    one_wider = sum(p.numel() for p in Denoiser(timesteps, num_bits, width + 1).parameters())
    found = sum(p.numel() for p in model.parameters())
    assert abs(found - asked) <= one_wider - found or width == 1


def test_trained_denoiser_nearly_reaches_the_best_factorised_bound_and_not_more():
    patterns, T = bars_and_stripes(), 4
    schedule = flip_schedule(T, "cosine")
    data = torch.zeros(512, dtype=DOUBLE).index_fill_(0, state_index(patterns), 1 / 14)
    best = []
    for t in range(1, T + 1):
        joint = (data @ flip_matrix(9, float(schedule.cumulative[t - 1]))).unsqueeze(1) * flip_matrix(9, float(schedule.beta[t]))
        best.append(product_of_bernoullis(joint.T @ all_bits(9) / joint.sum(0).unsqueeze(1), all_bits(9)))
    model, clean = Denoiser(T, 9, 32), patterns.float().repeat(10, 1)
    stepper = Stepper(model, Config().optimization(1e-2), 400)
    for _ in range(400):
        stepper.step(clean, lambda denoiser, bits: denoiser.loss(bits, schedule.to("cpu")))
    trained = [denoiser_reverse_matrix(model, t, schedule.to("cpu"), 9) for t in range(1, T + 1)]
    bounds = {
        name: sum(float(enumerated_bound(matrices, schedule, int(row)).sum()) for row in state_index(patterns)) / 14
        for name, matrices in (("best", best), ("trained", trained))
    }
    assert bounds["best"] < bounds["trained"] < bounds["best"] + 0.25
