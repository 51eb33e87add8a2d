"""The measured bias of the negative phase against powers of the enumerated Gibbs kernel."""

# S = 2^V states of a level's bits

import pytest
import torch
from torch import Tensor

from tests.workflows.timestep_dbn.enumeration import all_bits, product_of_bernoullis, random_dbn, state_index
from trainbook.workflows.timestep_dbn.chain import TimestepDBN
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.diffusion import flip_schedule
from trainbook.workflows.timestep_dbn.gradient_bias import negative_phase_bias

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(4)


def exact_bias(config: Config, dbn: TimestepDBN, clean: Tensor, start: Tensor) -> float:
    """By enumeration, for one timestep and levels without context, so that each is an RBM with z_t's field.

    Expectations over z_{t-1} and z_t given z_0 are sums; the chains of pcd are those that lie there.
    """
    schedule = flip_schedule(1, config.schedule)
    beta, coupling = float(schedule.beta[1]), float(schedule.coupling[1])
    bias = norm = 0.0
    offset = 0
    for level, size in zip(dbn.levels, dbn.level_sizes, strict=True):
        W, a, b = (tensor[0].detach().to(DOUBLE) for tensor in (level.weight, level.visible_bias, level.hidden_bias))
        z, h = all_bits(size), all_bits(len(b))
        here = slice(offset, offset + size)
        offset += size
        s = (b + z @ W).sigmoid()
        per_state = torch.einsum("sv,sh->svh", z, s)
        up = product_of_bernoullis(s, h)
        short = long = torch.zeros(size, len(b), dtype=DOUBLE)
        for row in range(len(clean)):
            of_noisy = product_of_bernoullis(clean[row, here] * (1 - 2 * beta) + beta, z)  # q(z_1 | z_0)
            for index, weight in enumerate(of_noisy):
                down = product_of_bernoullis((a + coupling * (2 * z[index] - 1) + h @ W.T).sigmoid(), z)
                first = {"pcd": start[row, here], "recovery": z[index], "cd": clean[row, here]}[config.negative_phase]
                after = [torch.linalg.matrix_power(up @ down, k)[state_index(first)] for k in (config.gibbs_sweeps, 4000)]
                short = short + weight * torch.einsum("s,svh->vh", after[0], per_state) / len(clean)
                long = long + weight * torch.einsum("s,svh->vh", after[1], per_state) / len(clean)
        bias += float((short - long).square().sum())
        norm += float(long.square().sum())
    return (bias / norm) ** 0.5


@pytest.mark.parametrize("negative_phase", ["pcd", "recovery", "cd"])
@pytest.mark.parametrize("sweeps", [1, 2])
def test_the_measured_bias_is_that_of_the_enumerated_kernel(negative_phase, sweeps):
    rows = 16384
    torch.manual_seed(7)  # of which every start gives another bias
    dbn, config = random_dbn([3, 2, 2], 1, scale=2.5, context="bits", noisy_context=False, batch_size=64,
                             negative_phase=negative_phase, gibbs_sweeps=sweeps)  # fmt: skip
    for level in dbn.levels:
        level.context_weight.data.zero_()
        level.chains = torch.ones(1, rows, level.chains.shape[2])
    config = config.model_copy(update={"batch_size": rows})
    clean = torch.zeros(1, 7)
    codes = clean.repeat(rows, 1)
    measured = negative_phase_bias(config, dbn, list(codes.split(dbn.level_sizes, 1)), flip_schedule(1, "cosine").to("cpu"), 40)
    exact = exact_bias(config, dbn, clean.to(DOUBLE), torch.ones(1, 7, dtype=DOUBLE))
    assert exact > 0.04
    assert measured == pytest.approx(exact, rel=0.1)


def test_more_sweeps_leave_less_bias_and_it_comes_from_more_than_one_part_of_the_timesteps():
    found = []
    for sweeps in (1, 3, 30):
        torch.manual_seed(4)
        dbn, config = random_dbn([4, 3, 2], 12, scale=1.5, batch_size=1024, negative_phase="cd", gibbs_sweeps=sweeps)
        codes = [torch.ones(1024, size) for size in dbn.level_sizes]
        found.append(negative_phase_bias(config, dbn, codes, flip_schedule(12, "cosine").to("cpu"), 20))
    assert found[0] > found[1] > found[2]
    assert found[2] < 0.02 < found[0]


def test_independent_bits_have_none():
    dbn, config = random_dbn([4, 3, 2], 3, batch_size=2048, negative_phase="pcd", gibbs_sweeps=1)
    for level in dbn.levels:
        level.weight.data.zero_()
    codes = [torch.ones(2048, size) for size in dbn.level_sizes]
    assert negative_phase_bias(config, dbn, codes, flip_schedule(3, "cosine").to("cpu")) < 0.01
