"""How fast the Gibbs chains forget: autocorrelation per timestep and level, and the sweeps that sampling needs.

Every condition (z_t and context) has its own stationary distribution and gets two chains from unlike starts. With the
product of their means in the place of the squared mean, a chain that is stuck in one mode does not look as if it mixed.
"""

# T timesteps, B conditions, V visible units, F factors of a reverse step (levels), N sweeps recorded, K lags, S statistics

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainbook.workflows.timestep_dbn.likelihood import CPU_ROWS, GPU_ROWS, Factor, Factors

NUM_CONDITIONS = 32
NUM_PROJECTIONS = 8
RECORDED = 4  # sweeps per lag looked at
MAX_LAG = 64
WINDOW = 5  # an integrated time is summed up to so many of itself
RESIDUAL = 0.01  # share of what a chain remembers of its start that is left after the chosen sweeps


@torch.no_grad()
def measure(factors: Factors, clean: Sequence[Tensor], start: int, stop: int, max_lag: int = MAX_LAG) -> Tensor:
    """Autocorrelation of every factor's Gibbs chain at lags 0..K sweeps, of random projections of z and of the energy.

    Args:
        factors: the model.
        clean: z_0 per level, [(B, V_l)]; the first ones give the conditions.
        start, stop: timestep indices.
        max_lag: K.

    Returns:
        (n, F, S, K + 1); S = 2: projections pooled, energy.
    """
    images = [bits[:NUM_CONDITIONS] for bits in clean]
    rows = CPU_ROWS if images[0].device.type == "cpu" else GPU_ROWS
    size = max(1, rows // (2 * len(images[0])))
    tiles = [
        torch.stack([_of_factor(factor, max_lag) for factor in factors(images, first, min(first + size, stop))], 1)
        for first in range(start, stop, size)
    ]
    return torch.cat(tiles)


def _of_factor(factor: Factor, max_lag: int) -> Tensor:
    """Autocorrelations of one factor, (n, S, K + 1)."""
    block, state = factor.block, factor.state
    visible = torch.cat([state, state.roll(1, 1)], 1)  # the second chain starts from another image's bits
    bias = factor.context_bias.expand(*state.shape[:2], -1).repeat(1, 2, 1)
    field = factor.field.repeat(1, 2, 1)
    directions = torch.randn(visible.shape[2], NUM_PROJECTIONS, device=visible.device, dtype=visible.dtype)
    visible = block.gibbs(visible, bias, field, RECORDED * max_lag // 4)
    series = []
    for _ in range(RECORDED * max_lag):
        visible = block.gibbs(visible, bias, field, 1)
        energy = block.free_energy(visible, bias) - (field * visible).sum(-1)
        series.append(torch.cat([visible @ directions, energy.unsqueeze(-1)], -1))
    pairs = torch.stack(series).unflatten(2, (2, -1))  # (N, n, 2, B, projections + 1)
    covariance = autocovariance(pairs.movedim(2, 1), max_lag).mean(2)  # over conditions: (K + 1, n, projections + 1)
    pooled = torch.stack([covariance[..., :-1].sum(-1), covariance[..., -1]], -1).movedim(0, -1)  # (n, S, K + 1)
    return pooled / pooled[..., :1].clamp(min=torch.finfo(pooled.dtype).tiny)


def autocovariance(series: Tensor, max_lag: int) -> Tensor:
    """Unbiased E[x_i x_{i+k}] - E[x]^2 at lags 0..K from two independent chains of one distribution.

    E[x]^2 is the product of the two chains' means; both are centred first, which changes the variance only.

    Args:
        series: (N, 2, ...).
        max_lag: K, below N.

    Returns:
        (K + 1, ...)
    """
    means = series.mean(0)
    centred = series - means.mean(0)
    apart = (means[0] - means[1]).square() / 4  # minus the product of the centred means
    length = len(series)
    lags = [(centred[: length - k] * centred[k:]).mean((0, 1)) for k in range(max_lag + 1)]
    return torch.stack(lags) + apart


def integrated_time(correlation: Tensor) -> Tensor:
    """Tau = 1 + 2 sum_{k = 1..M} rho_k in sweeps, with M the first that is at least 5 tau; (..., K + 1) -> (...).

    Source: Sokal (1997), Monte Carlo Methods in Statistical Mechanics, section 3.
    """
    times = 2 * correlation.cumsum(-1) - 1
    lags = torch.arange(correlation.shape[-1], device=correlation.device)
    inside = lags < WINDOW * times
    last = torch.where(inside.all(-1), len(lags) - 1, inside.long().argmin(-1))
    return times.gather(-1, last.unsqueeze(-1)).squeeze(-1).clamp(min=1)


def sweeps_needed(integrated: Tensor, at_most: int) -> Tensor:
    """Sweeps after which 1 % of the start is left, if rho falls as r^k: r = (tau - 1) / (tau + 1); (...) -> (...), at least 1."""
    rate = 2 * torch.atanh(1 / integrated.clamp(min=1 + 1e-6))  # -ln r
    return (-math.log(RESIDUAL) / rate).ceil().long().clamp(1, at_most)
