"""Oracle tests of the timestep-specific DBN: enumeration, closed forms and simulation on problems small enough for them."""

# T timesteps, B batch, V visible units, H hidden units, G context units, S = 2^V states
# z visible, h hidden, g context, a and b visible and hidden biases, W weight, U context weight, s logistic function

import copy
import io
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import chisquare
from sklearn.datasets import load_digits
from torch import Tensor, nn

from trainbook.data import Data, batch_indices
from trainbook.errors import RunFailed, UserError
from trainbook.runtime import Runtime
from trainbook.seeding import seed_step
from trainbook.state import TrainState
from trainbook.workflows.timestep_dbn import autoencoder as ae
from trainbook.workflows.timestep_dbn import chain as chain_module
from trainbook.workflows.timestep_dbn import evaluation
from trainbook.workflows.timestep_dbn.baselines import (
    IndependentBits,
    LogisticChain,
    monolithic_rbm,
    negative_log_likelihood,
    small_rbm,
)
from trainbook.workflows.timestep_dbn.chain import TimestepDBN, bound, diffuse, fields, reverse_step
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.denoiser import Denoiser
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule, binary_entropy, flip, flip_schedule, posterior_probability
from trainbook.workflows.timestep_dbn.images import load_data
from trainbook.workflows.timestep_dbn.rbm import (
    Block,
    ConditionalRBM,
    Update,
    contrastive_update,
    log_partition,
    log_pseudo_likelihood,
    mean_log_weight,
    reverse_log_partition,
)
from trainbook.workflows.timestep_dbn.training import Plan, build, rbm_adam, rbm_views, train, training_parts

SCHEDULES = ("cosine", "reciprocal", "linear")
DOUBLE = torch.float64
SMALLEST_P_VALUE = 1e-4  # about 4 standard deviations; every seed is fixed


# ---------------------------------------------------------------------------------------------------- helpers


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20_261_121)


def all_bits(num_bits: int) -> Tensor:
    """Every state of so many bits, (2^n, n); row i holds the binary digits of i, lowest first."""
    return (torch.arange(2**num_bits).unsqueeze(1) >> torch.arange(num_bits) & 1).to(DOUBLE)


def state_index(bits: Tensor) -> Tensor:
    """The row of `all_bits` that holds each state, (..., n) -> (...)."""
    return (bits.long() << torch.arange(bits.shape[-1])).sum(-1)


def flip_matrix(num_bits: int, probability: float) -> Tensor:
    """P(z' | z) when every bit is flipped independently, (S, S), row z."""
    states = all_bits(num_bits)
    distance = (states.unsqueeze(1) != states.unsqueeze(0)).sum(-1).to(DOUBLE)
    return probability**distance * (1 - probability) ** (num_bits - distance)


def product_of_bernoullis(probability: Tensor, states: Tensor) -> Tensor:
    """P(state) of independent bits, (..., n), (S, n) -> (..., S)."""
    probability = probability.unsqueeze(-2)
    return torch.where(states > 0.5, probability, 1 - probability).prod(-1)


def assert_fits(samples: Tensor, probabilities: Tensor) -> None:
    """Pearson's chi-square of sampled states against their distribution; rare states are pooled to counts of 10."""
    assert chi_square_p_value(samples, probabilities) > SMALLEST_P_VALUE


def chi_square_p_value(samples: Tensor, probabilities: Tensor) -> float:
    """The p-value of Pearson's chi-square; (N, n) sampled bits, (2^n,) probabilities."""
    counts = np.bincount(state_index(samples).numpy(), minlength=len(probabilities)).astype(float)
    expected = probabilities.numpy() / probabilities.sum().item() * len(samples)
    order = np.argsort(expected)
    bins = np.minimum((np.cumsum(expected[order]) // 10).astype(int), int(expected.sum() // 10) - 1)
    _, bins = np.unique(bins, return_inverse=True)
    return float(chisquare(np.bincount(bins, counts[order]), np.bincount(bins, expected[order])).pvalue)


@dataclass
class Case:
    """Random RBMs in double precision with a batch of contexts and fields."""

    block: Block
    context: Tensor  # (T, B, G)
    noisy: Tensor  # (T, B, V)
    field: Tensor  # (T, B, V)

    @property
    def context_bias(self) -> Tensor:
        """(T, B, H), by the definition."""
        bias = self.block.hidden_bias.unsqueeze(1)
        return bias + torch.einsum("tbg,tgh->tbh", self.context, self.block.context_weight)

    def log_joint(self, t: int, b: int, with_field: bool = True) -> Tensor:
        """-E(z, h) = a.z + b.h + zWh + gUh, plus field.z, for every z and h; (2^V, 2^H)."""
        W, a, bias, U = (tensor[t] for tensor in parameters(self.block))
        z, h = all_bits(len(a)), all_bits(len(bias))
        total = (z @ a).unsqueeze(1) + h @ bias + z @ W @ h.T + h @ (self.context[t, b] @ U)
        return total + (z @ self.field[t, b]).unsqueeze(1) if with_field else total

    def probabilities(self, t: int, b: int) -> Tensor:
        """P(z | z_t, g) for every z, by summing the joint over h; (2^V,)."""
        return torch.softmax(self.log_joint(t, b).logsumexp(1), 0)


def parameters(block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, a, b, U."""
    return block.weight, block.visible_bias, block.hidden_bias, block.context_weight


def random_case(T: int = 2, B: int = 3, V: int = 5, H: int = 4, G: int = 3, scale: float = 1.0) -> Case:
    """RBMs whose units really interact: weights of standard deviation `scale`."""

    def normal(*shape: int) -> Tensor:
        return scale * torch.randn(shape, dtype=DOUBLE)

    noisy = torch.randint(2, (T, B, V)).to(DOUBLE)
    coupling = torch.linspace(0.4, 1.5, T, dtype=DOUBLE)
    block = Block(normal(T, V, H), normal(T, V), normal(T, H), normal(T, G, H))
    return Case(block, torch.randn(T, B, G, dtype=DOUBLE), noisy, coupling.view(-1, 1, 1) * (2 * noisy - 1))


def gibbs_kernel(block: Block, context_bias: Tensor, field: Tensor) -> Tensor:
    """P(z' | z) of one sweep by enumerating h, from the code's conditionals; T = B = 1; (S, S)."""
    z, h = all_bits(field.shape[-1]), all_bits(context_bias.shape[-1])
    up = product_of_bernoullis(block.hidden_logit(z.unsqueeze(0), context_bias)[0].sigmoid(), h)
    down = product_of_bernoullis(block.visible_logit(h.unsqueeze(0), field)[0].sigmoid(), z)
    return up @ down


def repeat_timestep(block: Block, t: int, times: int) -> Block:
    """One timestep's RBM as a block of `times` equal ones."""
    return Block(*(tensor[t].expand(times, *tensor.shape[1:]) for tensor in parameters(block)))


def contrastive_gradients(block: Block, data: Tensor, context: Tensor, model: Tensor) -> list[Tensor]:
    """What `contrastive_update` writes, per parameter (T, ...)."""
    gradients = [torch.full(tensor.shape, math.nan, dtype=tensor.dtype) for tensor in parameters(block)]
    contrastive_update(block, data, context, block.context_bias(context), model, Update(tuple(gradients), 0.0, 0.0, -1.0))
    return gradients


def reverse_distribution(dbn: TimestepDBN, t: int, noisy: Tensor, coupling: float, sweeps: int | None = None) -> Tensor:
    """p(z_{t-1} | z_t) for every z_{t-1}, in float64 from the definition: levels coarse to fine, hidden samples enumerated.

    Args:
        dbn: the chain.
        t: 1..T.
        noisy: z_t, all levels from fine to coarse, (V,).
        coupling: Gamma_t.
        sweeps: what so many Gibbs sweeps from z_t reach on each level, instead of their limit.
    """
    signs = 2 * noisy.to(DOUBLE) - 1
    bounds = np.cumsum([0, *dbn.level_sizes])
    weight, message = torch.ones(1, dtype=DOUBLE), torch.zeros(1, 0, dtype=DOUBLE)  # per parent (P,), (P, G)
    known = torch.zeros(1, sum(dbn.level_sizes), dtype=DOUBLE)
    for index in reversed(range(len(dbn.levels))):
        level, here = dbn.levels[index], slice(bounds[index], bounds[index + 1])
        W, a, b, U = (
            tensor[t - 1].detach().to(DOUBLE)
            for tensor in (level.weight, level.visible_bias, level.hidden_bias, level.context_weight)
        )
        g = torch.cat([message, signs.expand(len(message), -1)], 1) if dbn.noisy_context else message
        z = all_bits(dbn.level_sizes[index])  # (S, V)
        x = (b + g @ U).unsqueeze(1) + z @ W  # (P, S, H)
        visible_bias = a + coupling * signs[here]
        step = torch.softmax(z @ visible_bias + torch.log1p(x.exp()).sum(-1), 1)  # (P, S)
        if sweeps is not None:
            h = all_bits(x.shape[2])
            kernel = product_of_bernoullis(x.sigmoid(), h) @ product_of_bernoullis((visible_bias + h @ W.T).sigmoid(), z)
            step = torch.linalg.matrix_power(kernel, sweeps)[:, state_index(noisy[here])]
        weight = weight.unsqueeze(1) * step
        known = known.unsqueeze(1).repeat(1, len(z), 1)
        known[..., here] = z
        message = {"hidden_mean": x.sigmoid(), "bits": z.expand(len(x), -1, -1), "hidden_sample": x.sigmoid()}[dbn.context_kind]
        weight, known, message = weight.flatten(), known.flatten(0, 1), message.flatten(0, 1)
        if dbn.context_kind == "hidden_sample" and index:
            h = all_bits(x.shape[2])
            weight = (weight.unsqueeze(1) * product_of_bernoullis(message, h)).flatten()
            known, message = known.repeat_interleave(len(h), 0), h.repeat(len(known), 1)
    return torch.zeros(2 ** known.shape[1], dtype=DOUBLE).index_add_(0, state_index(known), weight)


def reverse_matrix(dbn: TimestepDBN, t: int, schedule: FlipSchedule) -> Tensor:
    """p(z_{t-1} | z_t) for every pair, (S, S), row z_t."""
    coupling = float(schedule.coupling[t])
    return torch.stack([reverse_distribution(dbn, t, noisy, coupling) for noisy in all_bits(sum(dbn.level_sizes))])


def logistic_reverse_matrix(logistic: LogisticChain, t: int, schedule: FlipSchedule) -> Tensor:
    """p(z_{t-1} | z_t) of a logistic chain for every pair, (S, S), row z_t."""
    W, a = (tensor[t - 1].detach().to(DOUBLE) for tensor in (logistic.weight, logistic.bias))
    states = all_bits(len(a))
    signs = 2 * states - 1
    return product_of_bernoullis((a + float(schedule.coupling[t]) * signs + signs @ W).sigmoid(), states)


def end_of_chain(matrices: list[Tensor]) -> Tensor:
    """p(z_0) of a chain that starts from fair coins; matrices for t = 1..T."""
    p = torch.full((len(matrices[0]),), 1 / len(matrices[0]), dtype=DOUBLE)
    for matrix in reversed(matrices):
        p = p @ matrix
    return p


def enumerated_bound(matrices: list[Tensor], schedule: FlipSchedule, z_0: int) -> Tensor:
    """The terms of the bound on -log p(z_0) by summing over every transition, (T + 1,)."""
    num_bits = int(math.log2(len(matrices[0])))
    last = flip_matrix(num_bits, float(schedule.cumulative[-1]))[z_0]
    terms = [(last * (last * 2**num_bits).log()).sum()]
    for t, reverse in enumerate(matrices, 1):
        previous = flip_matrix(num_bits, float(schedule.cumulative[t - 1]))[z_0]  # q(z_{t-1} | z_0)
        joint = previous.unsqueeze(1) * flip_matrix(num_bits, float(schedule.beta[t]))  # q(z_{t-1}, z_t | z_0)
        entropy = -torch.xlogy(joint, joint).sum() + torch.xlogy(joint.sum(0), joint.sum(0)).sum()
        terms.append(-(joint * reverse.T.log()).sum() - entropy)
    return torch.stack(terms)


def random_dbn(level_sizes: list[int], timesteps: int, scale: float = 0.7, **choices) -> tuple[TimestepDBN, Config]:
    """An untrained chain whose units really interact, with its config."""
    config = Config(timesteps=timesteps, hidden_units=(3, 2, 2), **choices)
    dbn = TimestepDBN(config, level_sizes)
    for parameter in dbn.parameters():
        nn.init.normal_(parameter, std=scale)
    return dbn, config


class BitCodes(nn.Module):
    """Stands where the autoencoder stands when the images are the bits themselves."""

    def __init__(self, level_sizes: list[int]) -> None:
        super().__init__()
        self.level_sizes = level_sizes

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Bits per level; (B, 1, 1, V) -> [(B, V_l)]."""
        return images.flatten(1).split(self.level_sizes, 1)


def bits_data(train: Tensor, valid: Tensor, test: Tensor) -> Data:
    """A data set whose images are rows of bits."""
    splits = ({"images": bits.float().view(len(bits), 1, 1, -1)} for bits in (train, valid, test))
    return Data(*splits, source="test", licence="", sha256="", synthetic=True)


def bits_state(config: Config, level_sizes: list[int], num_images: int) -> TrainState:
    """A run's state at the end of the autoencoder stage, with bits for codes."""
    torch.manual_seed(config.seed)
    dbn, num_bits, plan = TimestepDBN(config, level_sizes), sum(level_sizes), Plan.of(config, num_images)
    monolithic = monolithic_rbm(num_bits, sum(p.numel() for p in dbn.parameters()), config.batch_size)
    small = small_rbm(num_bits, config.batch_size)
    logistic = LogisticChain(config.timesteps, num_bits)
    modules = {
        "autoencoder": BitCodes(level_sizes),
        "dbn": dbn,
        "monolithic_rbm": monolithic,
        "small_rbm": small,
        "logistic_chain": logistic,
        "denoiser": Denoiser(config.timesteps, num_bits, 8),
        "independent_bits": IndependentBits(num_bits),
    }
    optimizers = {
        "dbn": rbm_adam(config, [rbm_views(level, *plan.blocks[0]) for level in dbn.levels]),
        "monolithic_rbm": rbm_adam(config, [rbm_views(monolithic, 0, 1)]),
        "small_rbm": rbm_adam(config, [rbm_views(small, 0, 1)]),
    }
    parts = training_parts(config, modules, plan)
    return TrainState(modules, optimizers, parts, total_steps=plan.total_steps, step=plan.autoencoder_steps)


def drive(config: Config, data: Data, state: TrainState, stop: int | None = None) -> TrainState:
    """Train up to global step `stop`, seeding each step as the engine does."""
    records = train(config, data, state)
    while state.step < (state.total_steps if stop is None else stop):
        seed_step(config.seed, state.step)
        next(records)
    return state


def tensors(state: TrainState) -> dict[str, Tensor]:
    """Every parameter and buffer of a state, copied."""
    return {f"{n}.{k}": v.clone() for n, module in state.modules.items() for k, v in module.state_dict().items()}


def local_runtime(folder: Path) -> Runtime:
    """A CPU runtime that downloads nothing."""
    return Runtime("local", "cpu", "float32", runs_folder=folder, data_folder=folder, deadline=None)


# --------------------------------------------------------------- note 2.9, items 1 to 4: the conditional RBM


def test_partition_summed_over_visible_equals_summed_over_hidden():
    case = random_case()
    free_energy = case.block.free_energy(all_bits(5).expand(2, -1, -1), case.context_bias[:, :1])  # (T, S)
    h = all_bits(4)
    for t in range(2):
        by_visible = torch.logsumexp(-free_energy[t] + all_bits(5) @ case.field[t, 0], 0)
        W, a = case.block.weight[t], case.block.visible_bias[t]
        by_hidden = torch.logsumexp(h @ case.context_bias[t, 0] + torch.log1p((a + case.field[t, 0] + h @ W.T).exp()).sum(1), 0)
        torch.testing.assert_close(by_visible, by_hidden, rtol=0, atol=1e-10)
        torch.testing.assert_close(by_visible, case.log_joint(t, 0).logsumexp((0, 1)), rtol=0, atol=1e-10)


def test_context_bias_adds_context_times_weight():
    case = random_case()
    torch.testing.assert_close(case.block.context_bias(case.context), case.context_bias, rtol=0, atol=1e-12)


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


def test_gibbs_conditionals_equal_ratios_of_the_enumerated_joint():
    case, z, h = random_case(), all_bits(5), all_bits(4)
    bias = case.context_bias
    for t in range(2):
        for b in range(3):
            joint = case.log_joint(t, b).exp()  # (2^V, 2^H)
            single = repeat_timestep(case.block, t, 1)
            up = single.hidden_logit(z.unsqueeze(0), bias[t : t + 1, b : b + 1])[0].sigmoid()
            down = single.visible_logit(h.unsqueeze(0), case.field[t : t + 1, b : b + 1])[0].sigmoid()
            torch.testing.assert_close(up, joint @ h / joint.sum(1, keepdim=True), rtol=0, atol=1e-12)
            torch.testing.assert_close(down, joint.T @ z / joint.sum(0).unsqueeze(1), rtol=0, atol=1e-12)


def test_gibbs_sweep_leaves_the_conditional_invariant():
    case = random_case(B=1)
    for t in range(2):
        p = case.probabilities(t, 0)
        kernel = gibbs_kernel(repeat_timestep(case.block, t, 1), case.context_bias[t : t + 1], case.field[t : t + 1])
        torch.testing.assert_close(kernel.sum(1), torch.ones(32, dtype=DOUBLE), rtol=0, atol=1e-12)
        torch.testing.assert_close(p @ kernel, p, rtol=0, atol=1e-12)


def test_gibbs_histogram_fits_the_enumerated_kernel_and_its_limit():
    case, chains = random_case(B=1), 20_000
    bias, field = case.context_bias.expand(-1, chains, -1), case.field.expand(-1, chains, -1)
    start = torch.tensor([1.0, 0, 1, 1, 0], dtype=DOUBLE).expand(2, chains, -1)
    after = {sweeps: case.block.gibbs(start, bias, field, sweeps) for sweeps in (0, 1, 2, 60)}
    assert torch.equal(after[0], start)
    for t in range(2):
        kernel = gibbs_kernel(repeat_timestep(case.block, t, 1), case.context_bias[t : t + 1], case.field[t : t + 1])
        row = state_index(start[t, 0])
        assert_fits(after[1][t], kernel[row])
        assert_fits(after[2][t], (kernel @ kernel)[row])
        assert_fits(after[60][t], case.probabilities(t, 0))
        without_field = torch.softmax(case.log_joint(t, 0, with_field=False).logsumexp(1), 0)
        assert chi_square_p_value(after[60][t], without_field) < 1e-12  # the comparison can fail


def test_free_energy_matches_enumeration():
    case = random_case()
    for b in range(3):
        actual = case.block.free_energy(all_bits(5).expand(2, -1, -1), case.context_bias[:, b : b + 1])
        expected = torch.stack([-case.log_joint(t, b, with_field=False).logsumexp(1) for t in range(2)])
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_free_energy_gradient_is_minus_visible_times_hidden_probability():
    case, h = random_case(T=1, B=1), all_bits(4)
    leaves = [tensor.clone().requires_grad_() for tensor in parameters(case.block)]
    block = Block(*leaves)
    for z in all_bits(5)[[0, 6, 21, 31]]:
        energy = block.free_energy(z.view(1, 1, -1), block.context_bias(case.context))
        weight, visible_bias, hidden_bias, context_weight = torch.autograd.grad(energy.sum(), leaves)
        posterior = torch.softmax(case.log_joint(0, 0)[state_index(z)], 0) @ h  # E[h | z] by enumeration
        torch.testing.assert_close(weight[0], -torch.outer(z, posterior), rtol=0, atol=1e-10)
        torch.testing.assert_close(visible_bias[0], -z, rtol=0, atol=1e-10)
        torch.testing.assert_close(hidden_bias[0], -posterior, rtol=0, atol=1e-10)
        torch.testing.assert_close(context_weight[0], -torch.outer(case.context[0, 0], posterior), rtol=0, atol=1e-10)


def exact_gradients(case: Case, data: Tensor) -> list[Tensor]:
    """Gradient of the batch mean of -log p(z | z_t, g) by autograd of the enumerated likelihood; T = 1."""
    leaves = [tensor.clone().requires_grad_() for tensor in parameters(case.block)]
    free = Case(Block(*leaves), case.context, case.noisy, case.field)
    rows = [free.log_joint(0, b) for b in range(data.shape[0])]
    losses = [row.logsumexp((0, 1)) - row[state_index(z)].logsumexp(0) for row, z in zip(rows, data, strict=True)]
    return [gradient[0] for gradient in torch.autograd.grad(torch.stack(losses).mean(), leaves)]


def test_contrastive_gradient_over_all_states_is_the_exact_gradient():
    case = random_case(T=1, B=1)
    data, states = all_bits(5)[[13]], all_bits(5).unsqueeze(1)  # (S, 1, V)
    block = repeat_timestep(case.block, 0, 32)
    per_state = contrastive_gradients(block, data.expand(32, 1, -1), case.context.expand(32, -1, -1), states)
    for gradient, exact in zip(per_state, exact_gradients(case, data), strict=True):
        torch.testing.assert_close(torch.tensordot(case.probabilities(0, 0), gradient, 1), exact, rtol=0, atol=1e-10)


def test_contrastive_gradient_of_exact_samples_is_unbiased():
    case, draws = random_case(T=1, B=3), 20_000
    data = all_bits(5)[[13, 2, 28]]
    model = torch.stack([all_bits(5)[torch.multinomial(case.probabilities(0, b), draws, replacement=True)] for b in range(3)], 1)
    block = repeat_timestep(case.block, 0, draws)
    sampled = contrastive_gradients(block, data.expand(draws, -1, -1), case.context.expand(draws, -1, -1), model)
    for gradient, exact in zip(sampled, exact_gradients(case, data), strict=True):
        standard_error = gradient.std(0) / math.sqrt(draws)
        assert standard_error.max() < 0.01
        assert ((gradient.mean(0) - exact).abs() < 4 * standard_error).all()


def test_contrastive_divergence_bias_shrinks_with_sweeps():
    case = random_case(T=1, B=1)
    data, states = all_bits(5)[[13]], all_bits(5).unsqueeze(1)
    block = repeat_timestep(case.block, 0, 32)
    per_state = contrastive_gradients(block, data.expand(32, 1, -1), case.context.expand(32, -1, -1), states)
    exact = exact_gradients(case, data)
    kernel = gibbs_kernel(case.block, case.context_bias, case.field)
    biases = []
    for sweeps in (1, 2, 5, 10):
        ends = torch.linalg.matrix_power(kernel, sweeps)[13]  # cd: the chain starts at the data
        gaps = [torch.tensordot(ends, g, 1) - e for g, e in zip(per_state, exact, strict=True)]
        biases.append(float(torch.cat([gap.flatten() for gap in gaps]).norm()))
    assert all(later < earlier for earlier, later in itertools.pairwise(biases))
    assert biases[0] > 1e-2  # one sweep is really biased here
    assert biases[-1] < 1e-6


def test_contrastive_gradient_without_context_leaves_its_gradient_alone():
    case = random_case(G=0)
    gradients = contrastive_gradients(case.block, case.noisy, case.context, 1 - case.noisy)
    assert gradients[3].shape == (2, 0, 4)
    assert all(torch.isfinite(gradient).all() for gradient in gradients[:3])


@pytest.mark.parametrize("max_bits", [10**9, 3])
def test_log_pseudo_likelihood_matches_enumerated_conditionals(max_bits):
    case = random_case()
    visible = torch.randint(2, (2, 3, 5)).to(DOUBLE)
    actual = log_pseudo_likelihood(case.block, visible, case.context_bias, case.field, max_bits)
    looked_at = range(5) if max_bits > 5 else (0, 2, 4)
    for t in range(2):
        logs = []
        for b in range(3):
            p = case.probabilities(t, b)
            for i in looked_at:
                other = visible[t, b].clone()
                other[i] = 1 - other[i]
                here, there = p[state_index(visible[t, b])], p[state_index(other)]
                logs.append((here / (here + there)).log())
        torch.testing.assert_close(actual[t], torch.stack(logs).mean(), rtol=0, atol=1e-10)


# ------------------------------------------------------------------- note 2.9, items 5 and 6: forward process


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


# ----------------------------------------------------------------------- note 2.9, items 7 and 8: whole chains


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


@pytest.mark.parametrize("noisy_context", [True, False])
@pytest.mark.parametrize("context", ["hidden_mean", "bits"])
def test_bound_matches_enumeration(context, noisy_context, monkeypatch):
    dbn, _ = random_dbn([3, 2, 1], timesteps=3, context=context, noisy_context=noisy_context)
    schedule, size, z_0 = flip_schedule(3, "cosine").to("cpu"), 4000, 37
    monkeypatch.setattr(chain_module, "EVALUATION_ROWS", 2 * size)  # two chunks of timesteps
    matrices = [reverse_matrix(dbn, t, schedule) for t in (1, 2, 3)]
    exact = enumerated_bound(matrices, schedule, z_0)
    terms = bound(dbn, all_bits(6)[[z_0]].float().expand(size, -1).split(dbn.level_sizes, 1), schedule, temperatures=60)
    standard_error = terms[1:].std(1) / math.sqrt(size)
    assert terms.shape == (4, size)
    assert standard_error.max() < 0.05
    torch.testing.assert_close(terms[0].to(DOUBLE), exact[0].expand(size), rtol=0, atol=1e-5)
    assert ((terms[1:].mean(1) - exact[1:]).abs() < 4 * standard_error).all()
    negative_log = -float(end_of_chain(matrices)[z_0].log())
    assert float(exact.sum()) > negative_log
    assert float(terms.sum(0).mean()) > negative_log


@pytest.mark.parametrize("kind", SCHEDULES)
def test_prior_divergence_matches_enumeration(kind):
    schedule = flip_schedule(6, kind).to("cpu")  # the linear one ends far from fair coins
    end = flip_matrix(5, float(schedule.cumulative[-1]))[11]
    actual = chain_module.prior_divergence([torch.zeros(3, 4), torch.zeros(3, 1)], schedule)
    assert actual.tolist() == pytest.approx([float((end * (32 * end).log()).sum())] * 3, abs=1e-6, rel=1e-5)


def test_bound_with_sampled_context_is_still_a_bound():
    dbn, _ = random_dbn([3, 2, 1], timesteps=2, context="hidden_sample")
    schedule, size = flip_schedule(2, "cosine").to("cpu"), 2000
    p = end_of_chain([reverse_matrix(dbn, t, schedule) for t in (1, 2)])
    for z_0 in (5, 37, 60):
        estimate = bound(dbn, all_bits(6)[[z_0]].float().expand(size, -1).split(dbn.level_sizes, 1), schedule, 60).sum(0)
        assert float(estimate.mean()) - 4 * float(estimate.std()) / math.sqrt(size) > -float(p[z_0].log())


STRIPE_SIZES = [4, 4, 1]


def bars_and_stripes() -> Tensor:
    """The 14 images of 3x3 pixels with equal rows or equal columns; corners, then edges, then the centre, (14, 9)."""
    lines = all_bits(3)
    images = torch.cat([lines.unsqueeze(2).expand(-1, -1, 3), lines.unsqueeze(1).expand(-1, 3, -1)]).flatten(1).unique(dim=0)
    return images[:, [0, 2, 6, 8, 1, 3, 5, 7, 4]]


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


# ---------------------------------------------------------------------------------------------- the baselines


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


def test_monolithic_likelihood_matches_enumeration_and_its_size_is_as_asked():
    rbm = monolithic_rbm(6, 69, 4)
    assert sum(p.numel() for p in rbm.parameters()) == 69  # 6 + 9 (6 + 1)
    for parameter in rbm.parameters():
        nn.init.normal_(parameter, std=0.5)
    W, a, b = (tensor[0].detach().to(DOUBLE) for tensor in (rbm.weight, rbm.visible_bias, rbm.hidden_bias))
    states = all_bits(6)
    exact = -torch.log_softmax(states @ a + torch.log1p((b + states @ W).exp()).sum(1), 0)
    for sweeps in (0, 30):  # annealed forwards, and backwards from samples
        actual = negative_log_likelihood(rbm, states.float().repeat(32, 1), 100, sweeps)[:64]
        torch.testing.assert_close(actual.to(DOUBLE), exact, rtol=0, atol=0.03)  # one log Z: 2048 weights of spread < 0.3


# ------------------------------------------------------------------------- note 2.9, item 9: batched over timesteps


@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-12), (torch.float32, 1e-4)])
def test_batched_timesteps_equal_a_loop_over_them(dtype, tolerance):
    case = random_case(T=6, B=8, V=20, H=15, G=7)
    block = Block(*(tensor.to(dtype) for tensor in parameters(case.block)))
    context, field, data, model = (x.to(dtype) for x in (case.context, case.field, case.noisy, 1 - case.noisy.roll(1, 0)))
    hidden = torch.rand(6, 8, 15, dtype=dtype).round()
    bias = block.context_bias(context)
    batched = [
        block.hidden_logit(data, bias),
        block.visible_logit(hidden, field),
        block.free_energy(data, bias),
        log_pseudo_likelihood(block, data, bias, field),
        *contrastive_gradients(block, data, context, model),
    ]
    for t in range(6):
        one, here = Block(*(tensor[t : t + 1] for tensor in parameters(block))), slice(t, t + 1)
        alone_bias = one.context_bias(context[here])
        alone = [
            one.hidden_logit(data[here], alone_bias),
            one.visible_logit(hidden[here], field[here]),
            one.free_energy(data[here], alone_bias),
            log_pseudo_likelihood(one, data[here], alone_bias, field[here]),
            *contrastive_gradients(one, data[here], context[here], model[here]),
        ]
        for together, single in zip(batched, alone, strict=True):
            torch.testing.assert_close(together[here], single, rtol=0, atol=tolerance)


def test_batched_sampling_and_annealing_equal_a_loop_with_the_same_random_numbers(monkeypatch):
    case = random_case(T=5, B=6)
    drawn, original = [], torch.rand_like

    def record(like: Tensor) -> Tensor:
        drawn.append(original(like))
        return drawn[-1].clone()

    monkeypatch.setattr(torch, "rand_like", record)
    together = case.block.gibbs(case.noisy, case.context_bias, case.field, 4)
    num_sampled = len(drawn)
    annealed = log_partition(case.block, case.context_bias, case.field, 5, particles=3)
    for t in range(5):
        here = slice(t, t + 1)
        replay = iter([numbers[here].clone() for numbers in drawn])
        monkeypatch.setattr(torch, "rand_like", lambda like, replay=replay: next(replay))
        one = Block(*(tensor[here] for tensor in parameters(case.block)))
        assert torch.equal(one.gibbs(case.noisy[here], case.context_bias[here], case.field[here], 4), together[here])
        alone = log_partition(one, case.context_bias[here], case.field[here], 5, particles=3)
        torch.testing.assert_close(alone, annealed[:, here], rtol=0, atol=1e-12)
        assert next(replay, None) is None
    assert num_sampled == 8  # h and z once per sweep


def test_sgd_in_place_is_torchs_sgd_on_the_gradients():
    case = random_case(T=3, B=6, V=7, H=5, G=4)
    data, model = (torch.randint(0, 2, (3, 6, 7)).to(DOUBLE) for _ in range(2))
    gradients = contrastive_gradients(case.block, data, case.context, model)
    reference = [parameter.clone() for parameter in parameters(case.block)]
    for tensor, gradient in zip(reference, gradients, strict=True):
        tensor.grad = gradient
    groups = [{"params": reference[::3], "weight_decay": 0.2}, {"params": reference[1:3]}]  # W, U; a, b
    torch.optim.SGD(groups, lr=0.3).step()
    update = Update.sgd(parameters(case.block), 0.3, 0.2)
    contrastive_update(case.block, data, case.context, case.block.context_bias(case.context), model, update)
    for moved, expected in zip(parameters(case.block), reference, strict=True):
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)


def test_blocks_of_timesteps_update_as_the_whole_does():
    config = Config(weight_decay=0.1, learning_rate=0.01)
    whole = ConditionalRBM(5, 7, 6, 3, 4)
    nn.init.normal_(whole.visible_bias)
    parts = copy.deepcopy(whole)
    views = {name: [rbm_views(rbm, *b) for b in blocks] for name, rbm, blocks in
             (("whole", whole, [(0, 5)]), ("parts", parts, [(0, 2), (2, 5)]))}  # fmt: skip
    optimizers = {name: [rbm_adam(config, [view]) for view in group] for name, group in views.items()}
    before = [parameter.clone() for parameter in parts.parameters()]
    for _ in range(3):
        gradients = [torch.randn_like(view) for view in views["whole"][0]]
        for view, gradient in zip(views["whole"][0], gradients, strict=True):
            view.grad.copy_(gradient)
        for group, here in zip(views["parts"], (slice(0, 2), slice(2, 5)), strict=True):
            for view, gradient in zip(group, gradients, strict=True):
                view.grad.copy_(gradient[here])
        for step in (*optimizers["whole"], *optimizers["parts"]):
            step.step()
    for old, one, other in zip(before, whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)  # vectorised and leftover elements round differently
        assert (one - old).abs().max() > 1e-3  # the views share the module's memory


def test_weight_decay_shrinks_weights_and_spares_biases():
    config = Config(optimizer="adam", weight_decay=0.5, learning_rate=0.1)
    rbm = ConditionalRBM(2, 4, 3, 2, 2)
    for parameter in rbm.parameters():
        nn.init.ones_(parameter)
    rbm_adam(config, [rbm_views(rbm, 0, 1)]).step()  # gradients are zero: only decay moves anything
    for decayed in (rbm.weight, rbm.context_weight):
        assert decayed[0].unique().tolist() == pytest.approx([0.95])
        assert decayed[1].unique().tolist() == [1]
    for kept in (rbm.visible_bias, rbm.hidden_bias):
        assert kept.unique().tolist() == [1]


# ------------------------------------------------------------- training: order, warm start, determinism, refusal


def digits_run(tmp_path: Path, **choices) -> tuple[Config, Data, TrainState]:
    """A real run of a few steps: 64 digits, 4 steps per epoch, one epoch per stage."""
    config = Config(
        **{
            "max_train_images": 64, "batch_size": 16, "autoencoder_epochs": 1, "epochs_per_timestep": 1, "baseline_epochs": 1,
            "autoencoder_width": 4, "code_channels": (1, 1, 4), "timesteps": 3, "hidden_units": (6, 5, 4), **choices,
        }
    )  # fmt: skip
    data = load_data(config, local_runtime(tmp_path))
    torch.manual_seed(config.seed)
    return config, data, build(config, data, local_runtime(tmp_path))


def dbn_parameters(state: TrainState) -> list[Tensor]:
    """The chain's parameters, copied, (T, ...) each."""
    return [parameter.detach().clone() for parameter in state.modules["dbn"].parameters()]


@pytest.mark.parametrize("order", ["block", "sequential"])
def test_training_is_a_function_of_config_and_step_and_resumes_exactly(tmp_path, order):
    choices = {"order": order, "block_size": 2}
    config, data, state = digits_run(tmp_path, **choices)
    num_blocks = 2 if order == "block" else 3
    assert state.total_steps == 4 + 4 * num_blocks + 4
    saved = {}
    for step in range(1, state.total_steps):
        drive(config, data, state, step)
        buffer = io.BytesIO()
        torch.save(state.state_dict(), buffer)
        saved[step] = buffer
    uninterrupted = tensors(drive(config, data, state))
    for step in (1, 4, 6, 8, 10, 12, state.total_steps - 2):
        _, _, resumed = digits_run(tmp_path, **choices)
        saved[step].seek(0)
        resumed.load_state_dict(torch.load(saved[step], weights_only=True))
        for name, tensor in tensors(drive(config, data, resumed)).items():
            assert torch.equal(tensor, uninterrupted[name]), f"{name} differs after a resume at step {step}"
    config, data, other = digits_run(tmp_path, **choices, seed=1)
    assert not torch.equal(tensors(drive(config, data, other))["dbn.levels.0.weight"], uninterrupted["dbn.levels.0.weight"])


def test_sequential_order_trains_each_timestep_alone(tmp_path):
    config, data, state = digits_run(tmp_path, order="sequential")
    drive(config, data, state, 4)
    for trained in range(3):
        before = dbn_parameters(state)
        drive(config, data, state, 4 + 4 * (trained + 1))
        for old, new in zip(before, dbn_parameters(state), strict=True):
            for t in range(3):
                assert torch.equal(old[t], new[t]) == (t != trained)


def test_block_order_covers_every_timestep_once():
    plan = Plan.of(Config(timesteps=7, block_size=3, batch_size=10, epochs_per_timestep=2, baseline_epochs=4), 109)
    assert plan.blocks == [(0, 3), (3, 6), (6, 7)]
    assert (plan.steps_per_epoch, plan.block_steps, plan.total_steps - plan.chain_end) == (10, 20, 40)


def test_later_blocks_start_from_the_last_timestep_before_them(tmp_path):
    rate = 1e-5  # Adam's first step moves every parameter by at most the rate
    config, data, state = digits_run(tmp_path, timesteps=5, block_size=2, learning_rate=rate, negative_phase="cd")
    untouched = dbn_parameters(state)
    chains = [level.chains for level in state.modules["dbn"].levels]
    drive(config, data, state, 8)  # the end of the first block
    for old, new in zip(untouched, dbn_parameters(state), strict=True):
        assert torch.equal(old[2:], new[2:])
    for chain in chains:
        assert not torch.equal(chain[1], chain[2])
    source = [parameter[1] for parameter in dbn_parameters(state)]
    drive(config, data, state, 9)
    assert max(float((old[2] - kept).abs().max()) for old, kept in zip(untouched, source, strict=True)) > 100 * rate
    for kept, new in zip(source, dbn_parameters(state), strict=True):
        assert (new[2:4] - kept).abs().max() < 1.05 * rate
    for chain in chains:
        assert torch.equal(chain[2:4], chain[1].expand(2, -1, -1))


def test_first_block_starts_from_the_independent_model_of_each_timestep():
    rate = 1e-6
    config = Config(timesteps=4, hidden_units=(4, 4, 4), autoencoder_epochs=1, batch_size=14, learning_rate=rate)
    bits = torch.cat([torch.ones(28, 1), torch.zeros(28, 1), bars_and_stripes().repeat(2, 1)[:, :5]], 1)
    data, state = bits_data(bits, bits, bits), bits_state(config, [4, 2, 1], 28)
    drive(config, data, state, state.step + 1)
    schedule = flip_schedule(4, "cosine")
    for t in range(1, 5):
        one = bits.to(DOUBLE) @ torch.eye(7, dtype=DOUBLE)
        one = (one * (1 - schedule.cumulative[t - 1]) + (1 - one) * schedule.cumulative[t - 1]).mean(0).clamp(0.02, 0.98)
        bias = torch.cat([level.visible_bias[t - 1] for level in state.modules["dbn"].levels]).detach().to(DOUBLE)
        torch.testing.assert_close(bias, (one / (1 - one)).log(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("negative_phase", ["pcd", "recovery", "cd"])
def test_only_persistent_chains_move_during_training(tmp_path, negative_phase):
    config, data, state = digits_run(tmp_path, negative_phase=negative_phase)
    before = [level.chains.clone() for level in state.modules["dbn"].levels]
    drive(config, data, state, 6)
    for old, level in zip(before, state.modules["dbn"].levels, strict=True):
        assert torch.equal(old, level.chains) == (negative_phase != "pcd")
        assert set(level.chains.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_timestep_without_an_update_fails_the_run(tmp_path, optimizer):
    config, data, state = digits_run(tmp_path, learning_rate=1e-30, optimizer=optimizer)
    with pytest.raises(RunFailed, match=re.escape("timesteps [1, 2, 3] made no update")):
        drive(config, data, state)
    assert state.step == 8  # the first epoch of the chain


def test_single_still_timestep_is_named(tmp_path):
    config, data, state = digits_run(tmp_path, weight_decay=0)
    drive(config, data, state, 7)
    level = state.modules["dbn"].levels[1]
    level.weight.data[1] = 1e30  # so large that a float32 does not feel an update
    with pytest.raises(RunFailed, match=re.escape("timesteps [2] made no update")):
        drive(config, data, state)


# --------------------------------------------------------------------- note 2.9, item 14: random numbers per step


def uniforms(seed: int, step: int, size: int = 400) -> np.ndarray:
    """The first uniform numbers of a step's stream."""
    seed_step(seed, step)
    return torch.rand(size, dtype=DOUBLE).numpy()


def test_step_streams_repeat_and_differ():
    assert np.array_equal(uniforms(3, 7), uniforms(3, 7))
    starts = {tuple(uniforms(seed, step, 2)) for seed in range(8) for step in range(2500)}
    assert len(starts) == 8 * 2500


def z_scores_are_standard(scores: np.ndarray) -> bool:
    """Mean 0 and standard deviation 1 within 4 standard errors."""
    count = len(scores)
    return abs(scores.mean()) < 4 / math.sqrt(count) and abs(scores.std() - 1) < 4 / math.sqrt(2 * count)


@pytest.mark.parametrize("neighbour", ["next step", "step after next", "next seed", "next number"])
def test_step_streams_are_uniform_and_uncorrelated(neighbour):
    count, size = 2000, 400
    streams = np.stack([uniforms(5, step) for step in range(count)]) - 0.5  # variance 1/12
    other = {
        "next step": lambda: np.roll(streams, 1, 0),
        "step after next": lambda: np.roll(streams, 2, 0),
        "next seed": lambda: np.stack([uniforms(6, step) for step in range(count)]) - 0.5,
        "next number": lambda: np.roll(streams, 1, 1),
    }[neighbour]()
    assert z_scores_are_standard(streams.mean(1) * math.sqrt(12 * size))
    assert z_scores_are_standard((streams * other).mean(1) * 12 * math.sqrt(size))
    first_numbers = streams[:, :8]  # where a weak seeding shows: the same place in neighbouring streams
    assert (np.abs((first_numbers * other[:, :8]).mean(0)) * 12 * math.sqrt(count) < 4).all()


def test_step_streams_fill_every_bin():
    counts = np.stack([np.histogram(uniforms(5, step), 20, (0, 1))[0] for step in range(2000)])
    statistics = ((counts - 20.0) ** 2 / 20).sum(1)  # chi-square with 19 degrees of freedom
    assert z_scores_are_standard((statistics - 19) / math.sqrt(2 * 19 * (1 - 1 / 400)))
    first = np.histogram([uniforms(5, step, 1)[0] for step in range(4000)], 20, (0, 1))[0]
    assert chisquare(first).pvalue > SMALLEST_P_VALUE


def test_batches_of_an_epoch_hold_every_example_once_and_depend_on_seed_and_epoch_only():
    epoch = torch.cat([batch_indices(4, step, 50, 10) for step in range(5)])
    assert sorted(epoch.tolist()) == list(range(50))
    assert torch.equal(epoch[20:30], batch_indices(4, 2, 50, 10))
    assert not torch.equal(epoch[:10], batch_indices(4, 5, 50, 10))
    assert not torch.equal(epoch[:10], batch_indices(5, 0, 50, 10))


# ------------------------------------------------------------------------------------- note 2.2: the autoencoder


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 32, 32), (1, 8, 24)])
def test_codes_are_exact_bits_of_the_declared_sizes(channels, height, width):
    model = ae.BinaryAutoencoder(channels, (2, 3, 5), 8)
    images = torch.rand(7, channels, height, width)
    codes = ae.encode_all(model, images, batch_size=3)
    assert [tuple(code.shape) for code in codes] == [(7, size) for size in ae.level_sizes((height, width), (2, 3, 5))]
    assert set(torch.cat(codes, 1).unique().tolist()) == {0.0, 1.0}
    for code, logit in zip(model.encode(images), model.encode_logits(images), strict=True):
        assert torch.equal(code, (logit.sigmoid() > 0.5).float())
    rebuilt = ae.decode_all(model, codes, (height, width), batch_size=3)
    assert rebuilt.shape == images.shape
    torch.testing.assert_close(rebuilt, model.decode(model.encode(images)))


def test_levels_halve_in_size_from_fine_to_coarse():
    assert ae.level_sizes((32, 32), (4, 8, 16)) == [1024, 512, 256]  # the note's default, 1792 bits
    assert ae.level_sizes((8, 8), (4, 8, 32)) == [64, 32, 32]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_level_reaches_the_image(level):
    model = ae.BinaryAutoencoder(1, (2, 3, 5), 8)
    codes = model.encode(torch.rand(4, 1, 16, 16))
    flipped = [1 - code if index == level else code for index, code in enumerate(codes)]
    change = (model.decode(flipped) - model.decode(codes)).abs()
    assert change.flatten(1).max(1).values.min() > 1e-3


def test_straight_through_is_exactly_the_bits_forward():
    probability = torch.rand(10_000)
    bits = torch.bernoulli(probability)
    assert torch.equal(ae.straight_through(probability, bits), bits)


def test_straight_through_gradient_is_that_of_the_relaxed_loss():
    model = ae.BinaryAutoencoder(1, (2, 3, 5), 8)
    images = torch.rand(4, 1, 8, 8)
    probabilities = [logit.detach().sigmoid().requires_grad_() for logit in model.encode_logits(images)]
    bits = [torch.bernoulli(p.detach()) for p in probabilities]
    relaxed = [bit.clone().requires_grad_() for bit in bits]  # the loss as a function of real-valued bits, at the bits
    expected = torch.autograd.grad((model.decode(relaxed) - images).square().mean(), relaxed)
    codes = [ae.straight_through(p, bit) for p, bit in zip(probabilities, bits, strict=True)]
    actual = torch.autograd.grad((model.decode(codes) - images).square().mean(), probabilities)
    for one, other in zip(actual, expected, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


class LogitsOnly:
    """Stands for an autoencoder whose image does not depend on its code: only the penalties have a gradient."""

    def __init__(self, logits: list[Tensor], images: Tensor) -> None:
        self.logits, self.images = logits, images

    def encode_logits(self, images: Tensor) -> list[Tensor]:
        """The logits it was made with."""
        return self.logits

    def decode(self, codes: list[Tensor]) -> Tensor:
        """The images, whatever the code."""
        return self.images


def penalty_gradient(p: Tensor, confidence_weight: float, balance_weight: float) -> Tensor:
    """Gradient of the loss to the logits of one level with probabilities p, (B, V)."""
    logit = torch.logit(p).view(*p.shape, 1, 1).requires_grad_()
    images = torch.rand(len(p), 1, 8, 8)
    loss, _ = ae.autoencoder_loss(LogitsOnly([logit], images), images, confidence_weight, balance_weight)
    return torch.autograd.grad(loss, logit)[0].view_as(p)


def test_confidence_penalty_pushes_bits_away_from_one_half_on_both_sides():
    p = torch.tensor([[0.01, 0.3, 0.49, 0.51, 0.7, 0.99]], dtype=DOUBLE)
    gradient = penalty_gradient(p, confidence_weight=1.0, balance_weight=0.0)
    assert torch.equal(gradient.sign(), (0.5 - p).sign())
    torch.testing.assert_close(gradient, -torch.logit(p) * p * (1 - p) / 6, rtol=0, atol=1e-10)  # dH/du, mean over 6 bits


def test_balance_penalty_pulls_batch_means_towards_one_half_on_both_sides():
    p = torch.tensor([[0.05, 0.45, 0.50, 0.90], [0.15, 0.50, 0.55, 0.98]], dtype=DOUBLE)
    mean = p.mean(0)
    gradient = penalty_gradient(p, confidence_weight=0.0, balance_weight=1.0)
    assert torch.equal(gradient.sign(), (mean - 0.5).sign().expand(2, -1))
    torch.testing.assert_close(gradient, torch.logit(mean) * p * (1 - p) / (2 * 4), rtol=0, atol=1e-10)


def test_penalties_have_finite_gradients_at_saturated_bits():
    logit = torch.tensor([[-200.0, 0.3, 200.0], [-200.0, -2.0, 200.0]]).view(2, 3, 1, 1).requires_grad_()
    images = torch.rand(2, 1, 8, 8)
    loss, _ = ae.autoencoder_loss(LogitsOnly([logit], images), images, 1.0, 1.0)
    assert torch.isfinite(torch.autograd.grad(loss, logit)[0]).all()


def test_logit_entropy_matches_definition_and_its_gradient_stays_finite():
    logit = torch.linspace(-8, 8, 33, dtype=DOUBLE, requires_grad=True)
    p = logit.detach().sigmoid()
    entropy = ae.logit_entropy(logit)
    torch.testing.assert_close(entropy.detach(), -p * p.log() - (1 - p) * (1 - p).log(), rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(entropy.sum(), logit)[0], -logit.detach() * p * (1 - p), rtol=0, atol=1e-10)
    extreme = torch.tensor([-1e4, -120.0, -20.0, 20.0, 120.0, 1e4], requires_grad=True)
    values = ae.logit_entropy(extreme)
    gradient = torch.autograd.grad(values.sum(), extreme)[0]
    assert values.abs().max() < 1e-5
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() < 1e-5


def test_config_rejects_a_width_the_autoencoder_cannot_take():
    # the residual blocks normalise 4 groups of channels: the class says "a multiple of 4", the config must not let 10 through
    with pytest.raises(ValidationError):
        Config(autoencoder_width=10)


# --------------------------------------------------------------------------------------------------- the images


def test_digits_are_split_once_whatever_the_seed(tmp_path):
    data, other = (load_data(Config(seed=seed), local_runtime(tmp_path)) for seed in (0, 7))
    parts = [getattr(data, split)["images"] for split in ("train", "valid", "test")]
    for split, part in zip(("train", "valid", "test"), parts, strict=True):
        assert torch.equal(part, getattr(other, split)["images"])
    assert sum(map(len, parts)) == 1797
    # The three parts together are the data set, image by image, so no image is in two of them.
    together = sorted(image.numpy().tobytes() for part in parts for image in part * 16)
    assert together == sorted(image.astype(np.float32).tobytes() for image in load_digits().images)
    assert not data.synthetic
    assert {float(part.min()) for part in parts} == {0.0}
    assert {float(part.max()) for part in parts} == {1.0}


def test_max_train_images_limits_training_only(tmp_path):
    whole, limited = (load_data(Config(max_train_images=count), local_runtime(tmp_path)) for count in (0, 50))
    assert torch.equal(limited.train["images"], whole.train["images"][:50])
    assert torch.equal(limited.test["images"], whole.test["images"])
    assert limited.sha256 == whole.sha256
    with pytest.raises(UserError, match="do not fill one batch"):
        load_data(Config(max_train_images=20, batch_size=32), local_runtime(tmp_path))


@pytest.mark.parametrize("shape", [(40, 8, 16), (40, 16, 8, 3)])
def test_images_from_file_keep_their_values(tmp_path, shape):
    arrays = {name: np.random.default_rng(0).integers(0, 256, shape, np.uint8) for name in ("train", "test")}
    np.savez(tmp_path / "mine.npz", **arrays)
    data = load_data(Config(dataset="file", data_file=str(tmp_path / "mine.npz")), local_runtime(tmp_path))
    images = data.test["images"].mul(255).round().byte().movedim(1, -1).numpy().reshape(shape)
    assert np.array_equal(images, arrays["test"])
    both = torch.cat([data.valid["images"], data.train["images"]]).mul(255).round().byte().movedim(1, -1).numpy()
    assert np.array_equal(both.reshape(shape), arrays["train"])


GOOD = np.zeros((40, 8, 8), np.uint8)


@pytest.mark.parametrize(
    "arrays",
    [
        {"train": GOOD},
        {"train": GOOD.astype(np.float32), "test": GOOD},
        {"train": GOOD, "test": GOOD.astype(np.int64)},
        {"train": np.zeros((40, 8), np.uint8), "test": GOOD},
        {"train": np.zeros((40, 8, 12), np.uint8), "test": GOOD},
        {"train": np.zeros((40, 8, 8, 4), np.uint8), "test": GOOD},
        {"train": GOOD, "test": GOOD[:0]},
        {"train": GOOD, "test": np.zeros((40, 16, 16), np.uint8)},
        {"train": GOOD, "test": np.zeros((40, 8, 8, 3), np.uint8)},
    ],
    ids=["no test", "float", "int64", "flat", "12 wide", "4 channels", "empty", "two sizes", "grey and colour"],
)
def test_unsuitable_arrays_are_explained_with_the_path(tmp_path, arrays):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_data(Config(dataset="file", data_file=str(path)), local_runtime(tmp_path))


def write_torn_archive(path: Path) -> None:
    """A .npz that lost its end."""
    np.savez(path, train=GOOD, test=GOOD)
    path.write_bytes(path.read_bytes()[:2000])


def write_damaged_archive(path: Path) -> None:
    """A .npz with one wrong bit in an array."""
    np.savez(path, train=GOOD, test=GOOD)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def write_single_array(path: Path) -> None:
    """A .npy under the name of a .npz."""
    with path.open("wb") as file:
        np.save(file, GOOD)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_text("not an archive"),
        lambda path: path.write_bytes(b""),
        write_torn_archive,
        write_damaged_archive,
        write_single_array,
    ],
    ids=["missing", "folder", "text", "empty file", "torn archive", "damaged archive", "single array"],
)
def test_unreadable_files_are_explained_with_the_path(tmp_path, write):
    path = tmp_path / "mine.npz"
    write(path)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_data(Config(dataset="file", data_file=str(path)), local_runtime(tmp_path))
