"""Small problems summed over every state: the oracles of the timestep-specific DBN's tests."""

# T timesteps, B batch, V visible units, H hidden units, G context units, S = 2^V states
# z visible, h hidden, g context, a and b visible and hidden biases, W weight, U context weight, s logistic function

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from trainbook.workflows.timestep_dbn.baselines import LogisticChain
from trainbook.workflows.timestep_dbn.chain import TimestepDBN
from trainbook.workflows.timestep_dbn.chain_step import largest
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.contrastive import Phases, Update, contrastive_update
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule
from trainbook.workflows.timestep_dbn.elementwise import Elementwise
from trainbook.workflows.timestep_dbn.rbm import Block

SCHEDULES = ("cosine", "reciprocal", "linear")
DOUBLE = torch.float64
SMALLEST_P_VALUE = 1e-4  # about 4 standard deviations; every seed is fixed


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


def phases_of(block: Block, data: Tensor, context: Tensor, model: Tensor) -> Phases:
    """Both phases of a step: z+ and z-, (T, B, V), in a context g, (T, B, G)."""
    phases = Phases(block, data.shape[1])
    for target, value in ((phases.data, data), (phases.model, model), (phases.context, context)):
        target.copy_(value)
    phases.load(block)
    return phases


@torch.no_grad()
def contrastive_gradients(block: Block, data: Tensor, context: Tensor, model: Tensor) -> list[Tensor]:
    """What `contrastive_update` writes, per parameter (T, ...)."""
    gradients = [torch.full(tensor.shape, math.nan, dtype=tensor.dtype) for tensor in parameters(block)]
    phases, update = phases_of(block, data, context, model), Update(tuple(gradients), 0.0, 0.0, -1.0)
    contrastive_update(block, phases, update, Elementwise(False, largest([phases]), "cpu"))
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


def exact_gradients(case: Case, data: Tensor) -> list[Tensor]:
    """Gradient of the batch mean of -log p(z | z_t, g) by autograd of the enumerated likelihood; T = 1."""
    leaves = [tensor.clone().requires_grad_() for tensor in parameters(case.block)]
    free = Case(Block(*leaves), case.context, case.noisy, case.field)
    rows = [free.log_joint(0, b) for b in range(data.shape[0])]
    losses = [row.logsumexp((0, 1)) - row[state_index(z)].logsumexp(0) for row, z in zip(rows, data, strict=True)]
    return [gradient[0] for gradient in torch.autograd.grad(torch.stack(losses).mean(), leaves)]
