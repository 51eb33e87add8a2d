"""Bernoulli diffusion on bits: exact forward process, its closed form and its posterior.

Source: Sohl-Dickstein et al. (2015), Deep Unsupervised Learning using Nonequilibrium Thermodynamics, section 2.4.2;
Wang et al. (2023), Binary Latent Diffusion, arXiv 2304.04820, section 3.2.
"""

# T timesteps; z_t bits after t steps; beta_t probability that step t flips a bit; c_t probability that z_t differs from z_0

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TERMINAL_FLIP = 0.499  # c_T of the cosine schedule: close to a fair coin, with every beta_t below 1/2


@dataclass(frozen=True)
class FlipSchedule:
    """Flip probabilities of every step.

    Attributes:
        beta: (T + 1,), beta[t] for t = 1..T; beta[0] = 0.
        cumulative: (T + 1,), c_t for t = 0..T; c_0 = 0.
        coupling: (T + 1,), Gamma_t = ln((1 - beta_t) / beta_t) for t = 1..T, in nats; coupling[0] = 0 is not used.
    """

    beta: Tensor
    cumulative: Tensor
    coupling: Tensor

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self.beta) - 1

    def to(self, device: torch.device | str) -> "FlipSchedule":
        """The same schedule in single precision on a device."""
        return FlipSchedule(*(tensor.float().to(device) for tensor in (self.beta, self.cumulative, self.coupling)))


def flip_schedule(timesteps: int, kind: Literal["cosine", "reciprocal", "linear"]) -> FlipSchedule:
    """Flip probabilities per step, in double precision.

    cosine: 1 - 2 c_t = 2p cos^2(pi t / 2T) + (1 - 2p) with p = 0.499; reciprocal: beta_t = 1 / (2 (T - t + 1));
    linear: beta_t from 1e-4 to 0.02. In each case 1 - 2 c_t = prod_{s <= t} (1 - 2 beta_s).

    Args:
        timesteps: T, at least 1.
        kind: name of the schedule.
    """
    t = torch.arange(timesteps + 1, dtype=torch.float64)
    if kind == "cosine":
        kept = 2 * TERMINAL_FLIP * torch.cos(math.pi * t / (2 * timesteps)) ** 2 + (1 - 2 * TERMINAL_FLIP)  # 1 - 2 c_t
        beta = torch.cat([torch.zeros(1, dtype=torch.float64), (1 - kept[1:] / kept[:-1]) / 2])
    elif kind == "reciprocal":
        beta = torch.where(t > 0, 1 / (2 * (timesteps - t + 1)), 0.0)
        kept = torch.cumprod(1 - 2 * beta, 0)
    else:
        beta = torch.cat([torch.zeros(1, dtype=torch.float64), torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)])
        kept = torch.cumprod(1 - 2 * beta, 0)
    coupling = torch.where(t > 0, torch.log((1 - beta) / beta.clamp(min=1e-300)), 0.0)
    return FlipSchedule(beta=beta, cumulative=(1 - kept) / 2, coupling=coupling)


def flip(bits: Tensor, probability: Tensor) -> Tensor:
    """Flip each bit with a probability: z XOR n, n ~ Bernoulli(probability).

    Args:
        bits: values in {0, 1}.
        probability: broadcasts against `bits`.

    Returns:
        The shape that both broadcast to, values in {0, 1}.
    """
    noise = torch.rand(torch.broadcast_shapes(bits.shape, probability.shape), dtype=bits.dtype, device=bits.device)
    return torch.lt(noise, probability, out=noise).sub_(bits).abs_()


def transition_thresholds(schedule: FlipSchedule) -> Tensor:
    """Where one uniform number x decides a bit's transition for t = 1..T: in [0, 1), (T, 3, 1), in double precision.

    Neither z_{t-1} nor z_t differs from z_0 below the first threshold, only z_{t-1} below the second, both below the third,
    only z_t above: with probabilities (1 - c)(1 - beta), c beta, c (1 - beta) and (1 - c) beta, c = c_{t-1}.
    """
    beta, cumulative = schedule.beta[1:].double(), schedule.cumulative[:-1].double()
    neither = (1 - cumulative) * (1 - beta)
    return torch.stack([neither, neither + cumulative * beta, neither + cumulative], 1).unsqueeze(2)


def posterior_probability(noisy: Tensor, clean: Tensor, beta: Tensor, previous_cumulative: Tensor) -> Tensor:
    """q(z_{t-1} = 1 | z_t, z_0) for each bit.

    q(z_{t-1} | z_t, z_0) ~ flip(z_{t-1}, z_0; c_{t-1}) flip(z_t, z_{t-1}; beta_t), two numbers to normalise.

    Args:
        noisy: z_t, values in {0, 1}.
        clean: z_0, values in {0, 1}.
        beta: beta_t, broadcasts against the bits.
        previous_cumulative: c_{t-1}, broadcasts against the bits.
    """
    one = torch.where(clean > 0.5, 1 - previous_cumulative, previous_cumulative) * torch.where(noisy > 0.5, 1 - beta, beta)
    zero = torch.where(clean > 0.5, previous_cumulative, 1 - previous_cumulative) * torch.where(noisy > 0.5, beta, 1 - beta)
    return one / (one + zero)


def binary_entropy(probability: Tensor) -> Tensor:
    """H(p) = -p ln p - (1 - p) ln(1 - p), in nats; 0 at p = 0 and p = 1."""
    return -torch.xlogy(probability, probability) - torch.xlogy(1 - probability, 1 - probability)
