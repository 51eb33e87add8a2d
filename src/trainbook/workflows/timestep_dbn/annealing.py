"""Annealed importance sampling of the conditional RBMs' partition functions, from both sides.

The base is the factorised model with W = 0 and the field kept, whose partition function is
Z_0 = prod_i (1 + exp(a_i + field_i)) prod_j (1 + exp(b_j + (gU)_j)); at inverse temperature s, W becomes s W.
"""

# T timesteps, B batch, V visible units, H hidden units, P particles, K temperatures: steps of s between 0 and 1

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trainbook.layers import product
from trainbook.workflows.timestep_dbn.rbm import Block, sample_bits


def log_partition(block: Block, context_bias: Tensor, field: Tensor, temperatures: int, particles: int = 1) -> Tensor:
    """Log of annealed importance weights whose mean is Z(z_t, g) = sum_z exp(-F(z; g) + field.z), in nats.

    The mean of exp(result) is unbiased for Z at any number of temperatures, so the log of a mean over particles lies
    below log Z on average, and a likelihood made from it flatters the model: see `reverse_log_partition`.

    Args:
        block: the RBMs.
        context_bias: (T, B, H).
        field: (T, B, V).
        temperatures: K, number of steps from the base to the model.
        particles: independent weights per (timestep, sample).

    Returns:
        (P, T, B)

    Source: Neal (2001), Annealed Importance Sampling; Salakhutdinov and Murray (2008), On the quantitative analysis of DBNs.
    """
    context_bias, logit = _repeated(block, context_bias, field, particles)
    ratio = _anneal(block, context_bias, logit, sample_bits(logit.clone()), torch.linspace(0, 1, temperatures + 1))
    return (_log_base(context_bias, logit) + ratio).unflatten(1, (particles, -1)).transpose(0, 1)


def reverse_log_partition(
    block: Block, context_bias: Tensor, field: Tensor, temperatures: int, sample: Tensor, particles: int = 1
) -> Tensor:
    """Annealing from a state of the model back to the base: estimates that lie above log Z where `log_partition` lies below.

    With s going from 1 to 0 from a state z, w = exp(-F(z) + field.z - result) has the mean p_K(z): the probability that z
    is what comes out when a state of the base is annealed forwards through the same K temperatures. That holds for any z.

    - From a data point, -log of the mean of w over particles is, on average, an upper bound on its code length under the
      annealed sampler, a model that one can really draw from, and that tends to the RBM as K grows. Nothing has to mix.
    - From a sample of the RBM, the mean of exp(-result) is 1 / Z, so each result lies above log Z on average (Jensen).

    Args:
        block: the RBMs.
        context_bias: (T, B, H).
        field: (T, B, V).
        temperatures: K, number of steps from the model to the base.
        sample: (T, B, V), where the chains start.
        particles: independent chains per (timestep, sample).

    Returns:
        (P, T, B), in nats.

    Source: Burda, Grosse and Salakhutdinov (2015), arXiv 1412.8566, for data points (RAISE); Grosse, Ghahramani and Adams
    (2015), arXiv 1511.02543, for samples of the model.
    """
    context_bias, logit = _repeated(block, context_bias, field, particles)
    start = block.gibbs(sample.repeat(1, particles, 1), context_bias, field.repeat(1, particles, 1), 1)
    ratio = _anneal(block, context_bias, logit, start, torch.linspace(1, 0, temperatures + 1))
    return (_log_base(context_bias, logit) - ratio).unflatten(1, (particles, -1)).transpose(0, 1)


def mean_log_weight(log_weights: Tensor) -> Tensor:
    """Log of the mean of exp(log_weights) over the first axis, the particles; (P, ...) -> (...)."""
    return torch.logsumexp(log_weights, 0) - math.log(len(log_weights))


def mean_log_weight_variance(log_weights: Tensor) -> Tensor:
    """Variance of `mean_log_weight` by the delta method: that of the weights over their mean, by P; (P, ...) -> (...).

    At least two particles are needed; it is too small where few weights carry the mean.
    """
    weights = (log_weights - log_weights.max(0).values).exp_()
    return weights.var(0) / weights.mean(0).square() / len(weights)


def _repeated(block: Block, context_bias: Tensor, field: Tensor, particles: int) -> tuple[Tensor, Tensor]:
    """Hidden and visible biases of every particle, particles slowest; (T, P B, H), (T, P B, V)."""
    hidden = context_bias.expand(*field.shape[:2], -1).repeat(1, particles, 1)
    return hidden, (field + block.visible_bias.unsqueeze(1)).repeat(1, particles, 1)


def _log_base(context_bias: Tensor, logit: Tensor) -> Tensor:
    """Log of Z_0, the partition function with W = 0; (T, B)."""
    return softplus(logit).sum(-1) + softplus(context_bias).sum(-1)


def _anneal(block: Block, context_bias: Tensor, logit: Tensor, visible: Tensor, scales: Tensor) -> Tensor:
    """Sum of ln f_s'(z) / f_s(z) while W is scaled by s, with a Gibbs sweep at every s between first and last; (T, B)."""
    transposed = block.weight.transpose(1, 2)
    total = torch.zeros(visible.shape[:2], dtype=visible.dtype, device=visible.device)
    steps = list(pairwise(scales.tolist()))
    for index, (scale, following) in enumerate(steps, 1):
        weighted = product(visible, block.weight)  # zW
        logits = torch.add(context_bias, weighted, alpha=following)
        total += (softplus(logits) - softplus(weighted.mul_(scale).add_(context_bias))).sum(-1)
        if index < len(steps):
            visible = sample_bits(product(sample_bits(logits), transposed).mul_(following).add_(logit))
    return total
