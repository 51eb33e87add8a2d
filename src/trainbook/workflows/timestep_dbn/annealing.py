"""Annealed importance sampling of the conditional RBMs' partition functions, from both sides.

The base is the factorised model with W = 0 and the field kept; at inverse temperature s, W becomes s W.
"""

# T timesteps, B batch, V visible units, H hidden units, P particles

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trainbook.layers import product
from trainbook.workflows.timestep_dbn.rbm import Block, sample_bits


def log_partition(block: Block, context_bias: Tensor, field: Tensor, temperatures: int, particles: int = 1) -> Tensor:
    """Log of annealed importance weights whose mean is Z(z_t, g) = sum_z exp(-F(z; g) + field.z), in nats.

    The base is the factorised model with W = 0 and the field kept, so
    Z_0 = prod_i (1 + exp(a_i + field_i)) prod_j (1 + exp(b_j + (gU)_j)); at inverse temperature s, W becomes s W.

    The mean of exp(result) is unbiased for Z at any number of temperatures; the mean of the result itself lies below
    log Z on average, so a likelihood made from it flatters the model: see `reverse_log_partition`.

    Args:
        block: the RBMs.
        context_bias: (T, B, H).
        field: (T, B, V).
        temperatures: number of steps from the base to the model.
        particles: independent weights per (timestep, sample).

    Returns:
        (particles, T, B)

    Source: Neal (2001), Annealed Importance Sampling; Salakhutdinov and Murray (2008), On the quantitative analysis of DBNs.
    """
    context_bias = context_bias.expand(*field.shape[:2], -1).repeat(1, particles, 1)
    logit = (field + block.visible_bias.unsqueeze(1)).repeat(1, particles, 1)  # (T, P B, V), a + field
    ratio = _anneal(block, context_bias, logit, sample_bits(logit.clone()), torch.linspace(0, 1, temperatures + 1).tolist())
    return (_log_base(context_bias, logit) + ratio).unflatten(1, (particles, -1)).transpose(0, 1)


def reverse_log_partition(block: Block, context_bias: Tensor, field: Tensor, temperatures: int, sample: Tensor) -> Tensor:
    """Annealing from the model back to the base: its mean lies above log Z where that of `log_partition` lies below.

    With s going from 1 to 0, mean exp(log Z_0 - result) = Z_0 / Z, so E[result] >= log Z (Jensen). Both directions
    together tell whether an estimate can be trusted: where they differ, the forward one missed part of the model.

    Args:
        block: the RBMs.
        context_bias: (T, B, H).
        field: (T, B, V).
        temperatures: number of steps from the model to the base.
        sample: (T, B, V), drawn from p(z | z_t, g); the bound is as good as this draw.

    Returns:
        (T, B), in nats.

    Source: Grosse et al. (2015), arXiv 1511.02543, Sandwiching the marginal likelihood with bidirectional Monte Carlo.
    """
    context_bias = context_bias.expand(*field.shape[:2], -1)
    logit = field + block.visible_bias.unsqueeze(1)
    return _log_base(context_bias, logit) - _anneal(
        block, context_bias, logit, sample, torch.linspace(1, 0, temperatures + 1).tolist()
    )


def _log_base(context_bias: Tensor, logit: Tensor) -> Tensor:
    """Log of Z_0, the partition function with W = 0; (T, B)."""
    return softplus(logit).sum(-1) + softplus(context_bias).sum(-1)


def _anneal(block: Block, context_bias: Tensor, logit: Tensor, visible: Tensor, scales: list[float]) -> Tensor:
    """Sum of ln f_s'(z) / f_s(z) along Gibbs chains while W is scaled by s; (T, B)."""
    transposed = block.weight.transpose(1, 2)
    total = torch.zeros(visible.shape[:2], dtype=visible.dtype, device=visible.device)
    for scale, following in pairwise(scales):
        weighted = product(visible, block.weight)  # zW
        logits = torch.add(context_bias, weighted, alpha=following)
        total += (softplus(logits) - softplus(torch.add(context_bias, weighted, alpha=scale))).sum(-1)
        visible = sample_bits(torch.add(logit, product(sample_bits(logits), transposed), alpha=following))
    return total


def mean_log_weight(log_weights: Tensor) -> Tensor:
    """Log of the mean of exp(log_weights) over the first axis, the particles; (P, ...) -> (...)."""
    return torch.logsumexp(log_weights, 0) - math.log(len(log_weights))
