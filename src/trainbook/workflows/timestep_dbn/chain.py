"""The chain of conditional RBMs: levels in context of each other, transitions, and ancestral sampling."""

# T timesteps, B batch, V_l bits of level l, H_l hidden units of level l; level 0 is the finest

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule, binary_entropy, flip, posterior_probability
from trainbook.workflows.timestep_dbn.rbm import Block, ConditionalRBM, sample_bits


class TimestepDBN(nn.Module):
    """One `ConditionalRBM` per level; every level sees the coarser one below it as context.

    The probability of a reverse step is log p(z_{t-1} | z_t) = sum_l log p_l(z_l | g_l, z_t,l), with g_l made from the
    coarser level of z_{t-1}, so it is a chain of conditional models that is sampled from coarse to fine.

    Args:
        config: for hidden units, context and persistent chains.
        level_sizes: V_l, fine to coarse.
    """

    def __init__(self, config: Config, level_sizes: Sequence[int]) -> None:
        super().__init__()
        self.context_kind, self.noisy_context = config.context, config.noisy_context
        self.level_sizes = list(level_sizes)
        coarser = [*(self.level_sizes if config.context == "bits" else config.hidden_units)[1:], 0]
        noisy = sum(level_sizes) if config.noisy_context else 0
        self.levels = nn.ModuleList(
            ConditionalRBM(config.timesteps, size, hidden, below + noisy, config.batch_size)
            for size, hidden, below in zip(level_sizes, config.hidden_units, coarser, strict=True)
        )
        # Per timestep; chosen from the measured autocorrelation where the config does not say.
        sweeps = config.sampling_sweeps or config.most_sampling_sweeps
        self.register_buffer("sampling_sweeps", torch.full((config.timesteps,), sweeps))

    def blocks(self, start: int, stop: int) -> list[Block]:
        """Per level, the RBMs of the timestep indices start..stop-1 (index t - 1 undoes step t)."""
        return [level.block(start, stop) for level in self.levels]

    def contexts(self, blocks: Sequence[Block], target: Sequence[Tensor], noisy: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Context and context bias of every level when all of z_{t-1} is known.

        Args:
            blocks: from `blocks`.
            target: z_{t-1} per level, [(T, B, V_l)].
            noisy: z_t per level, [(T, B, V_l)].

        Returns:
            [(context (T, B, G_l), context bias (T, B, H_l))], fine to coarse.
        """
        contexts: list[tuple[Tensor, Tensor]] = []
        below: Tensor | None = None
        for block, bits in reversed(list(zip(blocks, target, strict=True))):
            context, bias = self.context(block, below, noisy)
            contexts.append((context, bias))
            below = self.message(block, bits, bias)
        return contexts[::-1]

    def context(self, block: Block, below: Tensor | None, noisy: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Context and context bias of one level, given the coarser level's message (None at the coarsest)."""
        T, B = noisy[0].shape[:2]
        parts = ([] if below is None else [below]) + ([2 * bits - 1 for bits in noisy] if self.noisy_context else [])
        context = torch.cat(parts, -1) if parts else noisy[0].new_zeros(T, B, 0)
        return context, block.context_bias(context)

    def message(self, block: Block, bits: Tensor, context_bias: Tensor) -> Tensor:
        """What a level tells the finer one: its hidden units' mean or sample, or its bits."""
        if self.context_kind == "bits":
            return bits
        logit = block.hidden_logit(bits, context_bias)
        return logit.sigmoid_() if self.context_kind == "hidden_mean" else sample_bits(logit)


def fields(noisy: Sequence[Tensor], coupling: Tensor) -> list[Tensor]:
    """Gamma_t (2 z_t - 1) per level; coupling (T,), noisy [(T, B, V_l)]."""
    return [torch.sub(bits, 0.5).mul_(2 * coupling.view(-1, 1, 1)) for bits in noisy]


def diffuse(clean: Sequence[Tensor], schedule: FlipSchedule, start: int, stop: int) -> tuple[list[Tensor], list[Tensor]]:
    """Transitions (z_{t-1}, z_t) for t = start+1..stop: z_{t-1} by the closed form, then one step from it.

    Args:
        clean: z_0 per level, [(B, V_l)].
        schedule: on the bits' device.
        start, stop: timestep indices.

    Returns:
        z_{t-1} and z_t per level, [(T, B, V_l)] each.
    """
    previous = [flip(bits.unsqueeze(0), schedule.cumulative[start:stop].view(-1, 1, 1)) for bits in clean]
    return previous, [flip(bits, schedule.beta[start + 1 : stop + 1].view(-1, 1, 1)) for bits in previous]


@torch.no_grad()
def reverse_step(dbn: TimestepDBN, noisy: Sequence[Tensor], t: int, schedule: FlipSchedule, sweeps: int) -> list[Tensor]:
    """Sample z_{t-1} given z_t, level by level from coarse to fine, each chain started at z_t.

    Args:
        dbn: the chain.
        noisy: z_t per level, [(B, V_l)].
        t: 1..T.
        schedule: on the bits' device.
        sweeps: Gibbs sweeps per level.
    """
    noisy = [bits.unsqueeze(0) for bits in noisy]
    field = fields(noisy, schedule.coupling[t : t + 1])
    result: list[Tensor] = []
    below: Tensor | None = None
    for level, block in reversed(list(enumerate(dbn.blocks(t - 1, t)))):
        _, bias = dbn.context(block, below, noisy)
        bits = block.gibbs(noisy[level], bias, field[level], sweeps)
        below = dbn.message(block, bits, bias)
        result.append(bits.squeeze(0))
    return result[::-1]


def prior_divergence(clean: Sequence[Tensor], schedule: FlipSchedule) -> Tensor:
    """KL(q(z_T | z_0) || fair coins) = V (ln 2 - H(c_T)), the same for every sample; (B,)."""
    num_bits = sum(bits.shape[-1] for bits in clean)
    return (
        (num_bits * (torch.log(torch.tensor(2.0)) - binary_entropy(schedule.cumulative[-1])))
        .expand(len(clean[0]))
        .to(clean[0].device)
    )


def posterior_entropy(noisy: Sequence[Tensor], clean: Sequence[Tensor], schedule: FlipSchedule, start: int, stop: int) -> Tensor:
    """H(q(z_{t-1} | z_t, z_0)) for t = start+1..stop, summed over bits; noisy [(T, B, V_l)] -> (T, B), in nats."""
    beta, cumulative = (
        values.view(-1, 1, 1) for values in (schedule.beta[start + 1 : stop + 1], schedule.cumulative[start:stop])
    )
    return sum(binary_entropy(posterior_probability(z, c, beta, cumulative)).sum(-1) for z, c in zip(noisy, clean, strict=True))
