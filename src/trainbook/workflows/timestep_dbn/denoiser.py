"""One network for all timesteps that predicts the clean bits: the reverse process of discrete diffusion models.

Source: Austin et al. (2021), arXiv 2107.03006, section 3.1 (the x0-parametrisation); Wang et al. (2023), arXiv 2304.04820.
"""

# T timesteps, B batch, V bits of all levels together, W width

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule, flip, posterior_probability

NUM_BLOCKS = 2
TIMESTEPS_PER_IMAGE = 3  # of a batch: with the chain's number of parameters a step then costs about what one of the chain does


class Denoiser(nn.Module):
    """q(z_0,i = 1 | z_t) = s(f(z_t, t) + ln((1 - c_t) / c_t) (2 z_t - 1))_i with a residual network f.

    The exact coupling is given, so that a constant f is already the denoiser of independent bits.

    Args:
        timesteps: T.
        num_bits: V.
        width: W, of the residual blocks.
    """

    def __init__(self, timesteps: int, num_bits: int, width: int) -> None:
        super().__init__()
        self.time = nn.Embedding(timesteps, width)
        self.enter = nn.Linear(num_bits, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(NUM_BLOCKS))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_bits))
        nn.init.zeros_(self.leave[1].weight)

    @classmethod
    def of_size(cls, timesteps: int, num_bits: int, num_parameters: int) -> "Denoiser":
        """With about so many parameters: 2 W^2 + (T + 2 V + 9) W + V of them, for two blocks."""
        linear = timesteps + 2 * num_bits + 3 * NUM_BLOCKS + 3
        root = math.sqrt(linear**2 + 4 * NUM_BLOCKS * max(0, num_parameters - num_bits))
        return cls(timesteps, num_bits, max(1, round((root - linear) / (2 * NUM_BLOCKS))))

    @torch.no_grad()
    def initialise(self, bit_mean: Tensor) -> None:
        """Start as the denoiser of independent bits with these means, (V,)."""
        self.leave[1].bias.copy_(torch.logit(bit_mean.clamp(0.02, 0.98)))

    def logits(self, noisy: Tensor, t: Tensor, schedule: FlipSchedule) -> Tensor:
        """Log odds of z_0 = 1.

        Args:
            noisy: z_t, (..., V).
            t: (...), 1..T.
            schedule: on the bits' device.
        """
        signs = 2 * noisy - 1
        x = self.enter(signs) + self.time(t - 1)
        for norm, linear in self.blocks:
            x = x + linear(silu(norm(x)))
        norm, linear = self.leave
        return linear(silu(norm(x))) - torch.logit(schedule.cumulative[t]).unsqueeze(-1) * signs

    def reverse_log_probabilities(self, noisy: Tensor, t: Tensor, schedule: FlipSchedule) -> tuple[Tensor, Tensor]:
        """Logarithms of p_t(z_{t-1,i} = 1 | z_t) and of its opposite, (..., V) each.

        p_t(z_{t-1,i} | z_t) = sum over z_0,i of q(z_{t-1,i} | z_t,i, z_0,i) q(z_0,i | z_t).
        """
        logit = self.logits(noisy, t, schedule)
        beta, previous = schedule.beta[t].unsqueeze(-1), schedule.cumulative[t - 1].unsqueeze(-1)

        def mixed(bits: Tensor, sign: int) -> Tensor:  # with all bits exchanged a zero is a one: no 1 - p that rounds
            one, zero = (posterior_probability(bits, torch.full_like(bits, z), beta, previous).log() for z in (1.0, 0.0))
            return torch.logaddexp(logsigmoid(sign * logit) + one, logsigmoid(-sign * logit) + zero)

        return mixed(noisy, 1), mixed(1 - noisy, -1)

    def cross_entropy(self, clean: Tensor, noisy: Tensor, t: Tensor, schedule: FlipSchedule) -> Tensor:
        """The mean of -ln p_t(z_{t-1} | z_t) over q(z_{t-1} | z_t, z_0), exact, in nats; (..., V) and t (...) -> (...)."""
        beta, previous = schedule.beta[t].unsqueeze(-1), schedule.cumulative[t - 1].unsqueeze(-1)
        one, zero = self.reverse_log_probabilities(noisy, t, schedule)
        posterior = posterior_probability(noisy, clean, beta, previous)
        return -(posterior * one + (1 - posterior) * zero).sum(-1)

    def loss(self, clean: Tensor, schedule: FlipSchedule) -> Tensor:
        """Mean of `cross_entropy` per bit, in nats, over `TIMESTEPS_PER_IMAGE` of each image, evenly spread over t; (B, V)."""
        clean = clean.repeat_interleave(TIMESTEPS_PER_IMAGE, 0)
        T, rows = schedule.timesteps, torch.arange(len(clean), device=clean.device)
        t = 1 + (rows * T // len(clean) + torch.randint(T, (1,), device=clean.device)) % T
        return self.cross_entropy(clean, flip(clean, schedule.cumulative[t].unsqueeze(-1)), t, schedule).mean() / clean.shape[1]

    def negative_log_steps(self, clean: Tensor, schedule: FlipSchedule) -> tuple[Tensor, Tensor]:
        """As in `baselines.LogisticChain`: (T, B) in nats, and the z_t, drawn from q(z_t | z_0); clean (B, V)."""
        t = torch.arange(1, schedule.timesteps + 1, device=clean.device).unsqueeze(1).expand(-1, len(clean))
        noisy = flip(clean.unsqueeze(0), schedule.cumulative[1:].view(-1, 1, 1))
        return self.cross_entropy(clean.expand_as(noisy), noisy, t, schedule), noisy

    @torch.no_grad()
    def reverse_step(self, noisy: Tensor, t: int, schedule: FlipSchedule) -> Tensor:
        """Sample z_{t-1} given z_t; (B, V) -> (B, V)."""
        steps = torch.full((len(noisy),), t, device=noisy.device)
        return torch.bernoulli(self.reverse_log_probabilities(noisy, steps, schedule)[0].exp().clamp(max=1))
