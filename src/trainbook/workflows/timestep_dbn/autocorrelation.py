"""How fast the Gibbs chains forget: autocorrelation per timestep and level, and the sweeps that sampling needs.

Every condition (z_t and context) has its own stationary distribution and gets two chains from unlike starts. With the
product of their means in the place of the squared mean, a chain that is stuck in one mode does not look as if it mixed.
"""

# T timesteps, B conditions, V visible units, F factors of a reverse step (levels), N sweeps recorded, K lags, S statistics

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.likelihood import Factor, Factors

CPU_CHAINS, GPU_CHAINS = 256, 8192  # (timestep, condition, chain) triples run at once: bounds the memory of what is recorded
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
    rows = CPU_CHAINS if images[0].device.type == "cpu" else GPU_CHAINS
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
    series = visible.new_empty(RECORDED * max_lag, *visible.shape[:2], NUM_PROJECTIONS + 1)
    for values in series:
        visible = block.gibbs(visible, bias, field, 1)
        torch.matmul(visible, directions, out=values[..., :-1])
        values[..., -1] = block.free_energy(visible, bias) - (field * visible).sum(-1)
    pairs = series.unflatten(2, (2, -1)).movedim(2, 1)  # (N, 2, n, B, projections + 1)
    covariance = autocovariance(pairs, max_lag).mean(2)  # over conditions: (K + 1, n, projections + 1)
    pooled = torch.stack([covariance[..., :-1].sum(-1), covariance[..., -1]], -1).movedim(0, -1)  # (n, S, K + 1)
    return pooled / pooled[..., :1].clamp(min=torch.finfo(pooled.dtype).tiny)


def autocovariance(series: Tensor, max_lag: int) -> Tensor:
    """Unbiased E[x_i x_{i+k}] - E[x]^2 at lags 0..K from two independent chains of one distribution.

    E[x]^2 is the product of the two chains' means; both are centred first, which changes the variance only.

    Args:
        series: (N, 2, ...), centred in place.
        max_lag: K, below N.

    Returns:
        (K + 1, ...)
    """
    means = series.mean(0)
    centred = series.sub_(means.mean(0))
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


def settle_sweeps(
    config: Config, sampling_sweeps: Tensor, factors: Factors, codes: Sequence[Tensor], start: int, stop: int
) -> dict[str, Any]:
    """Measure how fast the Gibbs chains of trained timesteps forget, and choose their sampling sweeps where none are given.

    Args:
        config: of the run.
        sampling_sweeps: of all timesteps, (T,); those of the timestep indices start..stop-1 are set.
        factors: the model.
        codes: of the validation images, per level.
        start, stop: timestep indices.

    Returns:
        What goes into the record.
    """
    correlation = measure(factors, codes, start, stop)
    integrated = integrated_time(correlation)  # (n, F, S)
    if not config.sampling_sweeps:
        sampling_sweeps[start:stop] = sweeps_needed(integrated.amax((1, 2)), config.most_sampling_sweeps)
    return {
        "autocorrelation_first_timestep": start + 1,
        "autocorrelation_by_timestep_level_statistic_and_lag": correlation,
        "integrated_autocorrelation_sweeps_by_timestep_level_and_statistic": integrated,
        "sampling_sweeps_by_timestep": sampling_sweeps[start:stop].clone(),
    }
