"""How far the negative phase is from the model it stands for: what contrastive divergence costs, measured after training."""

# n timesteps at once, R rows, V_l bits, H_l hidden units; k Gibbs sweeps in training

import torch
from torch import Tensor

from trainbook.workflows.timestep_dbn.chain import TimestepDBN, diffuse, fields
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule
from trainbook.workflows.timestep_dbn.rbm import Block

MORE_SWEEPS = 50  # times k: what stands for infinitely many
TIMESTEPS_AT_ONCE = 10


@torch.no_grad()
def negative_phase_bias(
    config: Config, dbn: TimestepDBN, codes: list[Tensor], schedule: FlipSchedule, more_sweeps: int = MORE_SWEEPS
) -> float:
    """Relative error of the statistics that the negative phase stands in for the model's with, over all timesteps and levels.

    |E_k[z s'] - E_K[z s']| / |E_K[z s']|, where k sweeps start as in training (persistent chains, z_t, or z_{t-1}), K = 50 k
    stands for infinity, s = P(h | z, g), and |.| is the Euclidean norm over the entries of W of all timesteps and levels.
    Squared norms are inner products of two independent estimates, so the noise of R rows adds nothing to them on average.

    Args:
        config: its negative phase and sweeps.
        dbn: the trained chain.
        codes: held-out z_0 per level, [(N, V_l)]; as many rows as there are persistent chains are used, at most.
        schedule: on the codes' device.
        more_sweeps: K / k.

    Returns:
        0 without bias; nan where the model's statistics vanish.
    """
    rows = min(len(codes[0]), config.batch_size)
    bias = norm = 0.0
    for start in range(0, schedule.timesteps, TIMESTEPS_AT_ONCE):
        stop = min(start + TIMESTEPS_AT_ONCE, schedule.timesteps)
        estimates: list[list[tuple[Tensor, Tensor]]] = []
        for _ in range(2):
            previous, noisy = diffuse([code[:rows] for code in codes], schedule, start, stop)
            blocks, field = dbn.blocks(start, stop), fields(noisy, schedule.coupling[start + 1 : stop + 1])
            estimate = []
            for level, (_, context_bias) in enumerate(dbn.contexts(blocks, previous, noisy)):
                chains = dbn.levels[level].chains[start:stop, :rows]
                begin = {"pcd": chains, "recovery": noisy[level], "cd": previous[level]}[config.negative_phase]
                short = blocks[level].gibbs(begin, context_bias, field[level], config.gibbs_sweeps)
                long = blocks[level].gibbs(short, context_bias, field[level], (more_sweeps - 1) * config.gibbs_sweeps)
                estimate.append(tuple(_statistics(blocks[level], bits, context_bias) for bits in (short, long)))
            estimates.append(estimate)
        for (short, long), (other_short, other_long) in zip(*estimates, strict=True):
            bias += float(((short - long) * (other_short - other_long)).sum())
            norm += float((long * other_long).sum())
    return (max(bias, 0.0) / norm) ** 0.5 if norm > 0 else float("nan")


def _statistics(block: Block, visible: Tensor, context_bias: Tensor) -> Tensor:
    """Mean over rows of z s(z)'; (n, R, V) -> (n, V, H)."""
    return visible.mT @ block.hidden_logit(visible, context_bias).sigmoid() / visible.shape[1]
