"""What the chain must beat: independent bits, one RBM of equal or of fitting size, a factorised logistic reverse step.

The fifth, one network for all timesteps, is in `denoiser`.
"""

# T timesteps, B batch, V bits of all levels together

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule, flip, posterior_probability
from trainbook.workflows.timestep_dbn.rbm import ConditionalRBM


class LogisticChain(nn.Module):
    """Factorised reverse steps: p_t(z_{t-1,i} = 1 | z_t) = s(a_t + Gamma_t (2 z_t - 1) + (2 z_t - 1) W_t)_i.

    The exact coupling is given, so that W = 0 is already the reverse step of independent bits.

    Args:
        timesteps: T.
        num_bits: V.
    """

    def __init__(self, timesteps: int, num_bits: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(timesteps, num_bits, num_bits))
        self.bias = nn.Parameter(torch.zeros(timesteps, num_bits))

    @torch.no_grad()
    def initialise(self, bit_mean: Tensor, schedule: FlipSchedule) -> None:
        """Start as the reverse steps of independent bits with these means of z_0, (V,)."""
        c = schedule.cumulative[:-1].unsqueeze(1)
        self.bias.copy_(torch.logit((bit_mean * (1 - 2 * c) + c).clamp(0.02, 0.98)))

    def logits(self, noisy: Tensor, coupling: Tensor, start: int, stop: int) -> Tensor:
        """Log odds of z_{t-1} for t = start+1..stop; noisy (T, B, V), coupling (T,) -> (T, B, V)."""
        signs = 2 * noisy - 1
        return torch.baddbmm(self.bias[start:stop].unsqueeze(1) + coupling.view(-1, 1, 1) * signs, signs, self.weight[start:stop])

    def loss(self, clean: Tensor, schedule: FlipSchedule) -> Tensor:
        """Mean over timesteps of -log p_t(z_{t-1} | z_t), in nats per bit; clean (B, V)."""
        return self.negative_log_steps(clean, schedule)[0].mean() / clean.shape[1]

    def negative_log_steps(self, clean: Tensor, schedule: FlipSchedule) -> tuple[Tensor, Tensor]:
        """Mean of -log p_t(z_{t-1} | z_t) over q(z_{t-1} | z_t, z_0), (T, B) in nats, and the z_t, drawn from q(z_t | z_0)."""
        noisy = flip(clean.unsqueeze(0), schedule.cumulative[1:].view(-1, 1, 1))
        beta, previous = schedule.beta[1:].view(-1, 1, 1), schedule.cumulative[:-1].view(-1, 1, 1)
        target = posterior_probability(noisy, clean, beta, previous)
        logits = self.logits(noisy, schedule.coupling[1:], 0, schedule.timesteps)
        return binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1), noisy

    @torch.no_grad()
    def reverse_step(self, noisy: Tensor, t: int, schedule: FlipSchedule) -> Tensor:
        """Sample z_{t-1} given z_t; (B, V) -> (B, V)."""
        return torch.bernoulli(self.logits(noisy.unsqueeze(0), schedule.coupling[t : t + 1], t - 1, t).sigmoid()).squeeze(0)


class IndependentBits(nn.Module):
    """Every bit an independent coin with its own mean, from counts with one added to each side.

    Args:
        num_bits: V.
    """

    def __init__(self, num_bits: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((num_bits,), 0.5))

    def fit(self, bits: Tensor) -> None:
        """Set the means from training bits, (N, V)."""
        self.mean.copy_((bits.sum(0) + 1) / (len(bits) + 2))

    def negative_log_likelihood(self, bits: Tensor) -> Tensor:
        """-log p(z), exact; (B, V) -> (B,), in nats."""
        return -(torch.xlogy(bits, self.mean) + torch.xlogy(1 - bits, 1 - self.mean)).sum(-1)

    @torch.no_grad()
    def reverse_step(self, noisy: Tensor, t: int, schedule: FlipSchedule) -> Tensor:
        """Sample z_{t-1} given z_t, exact for independent bits; (B, V) -> (B, V)."""
        c = schedule.cumulative[t - 1]
        odds = torch.logit(self.mean * (1 - 2 * c) + c) + schedule.coupling[t] * (2 * noisy - 1)
        return torch.bernoulli(odds.sigmoid())


@torch.no_grad()
def rbm_reverse_step(rbm: ConditionalRBM, noisy: Tensor, t: int, schedule: FlipSchedule, sweeps: int) -> Tensor:
    """Sample z_{t-1} given z_t with a plain RBM as the prior of z_0; (B, V) -> (B, V).

    q(z_t | z_0) acts on z_0 as the field ln((1 - c_t) / c_t) (2 z_t - 1); Gibbs sweeps from z_t draw z_0, and
    z_{t-1} follows from q(z_{t-1} | z_t, z_0).
    """
    field = (-torch.logit(schedule.cumulative[t]) * (2 * noisy - 1)).unsqueeze(0)
    block = rbm.block(0, 1)
    clean = block.gibbs(noisy.unsqueeze(0), block.context_bias(field[..., :0]), field, sweeps).squeeze(0)
    return torch.bernoulli(posterior_probability(noisy, clean, schedule.beta[t], schedule.cumulative[t - 1]))


# One RBM over the bits of all levels, T = 1: of the chain's size, which is far too wide for so few images, and one of a
# fitting width. Chosen on the validation split of the digits: rates from 5e-4 to 1e-2, weight decay 0 to 1, 96, 192 and 384
# hidden units for 128 bits; what counted most for the small one was to train it as long as the chain takes.
RBM_BASELINES = ("monolithic_rbm", "small_rbm")
GRADIENT_BASELINES = ("logistic_chain", "denoiser")  # their reverse steps treat bits apart: the mean over z_{t-1} is exact
SMALL_RBM_RATIO = 1.5  # hidden units per bit


def small_rbm(num_bits: int, num_chains: int) -> ConditionalRBM:
    """One RBM over the bits of all levels with 1.5 hidden units per bit, no condition."""
    return ConditionalRBM(1, num_bits, round(SMALL_RBM_RATIO * num_bits), 0, num_chains)


def monolithic_rbm(num_bits: int, num_parameters: int, num_chains: int) -> ConditionalRBM:
    """One RBM over the bits of all levels with about `num_parameters` parameters: the chain's size, T = 1, no condition."""
    hidden = max(1, round((num_parameters - num_bits) / (num_bits + 1)))
    return ConditionalRBM(1, num_bits, hidden, 0, num_chains)
