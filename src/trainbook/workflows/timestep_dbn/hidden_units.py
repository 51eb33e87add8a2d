"""How much the hidden units of a chain do: a unit that is always on or always off carries nothing."""

# T timesteps, B batch, V_l bits of level l, H_l hidden units of level l

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from trainbook.plots import new_figure
from trainbook.workflows.timestep_dbn.chain import TimestepDBN, diffuse
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule

IDLE = 0.02  # a unit on, or off, in fewer than 1 of 50 transitions
BINS = 25


@torch.no_grad()
def hidden_usage(dbn: TimestepDBN, clean: Sequence[Tensor], schedule: FlipSchedule) -> list[Tensor]:
    """Mean over drawn transitions of P(h_j = 1 | z_{t-1}, z_t) for every hidden unit.

    Args:
        dbn: the chain.
        clean: z_0 per level, [(B, V_l)].
        schedule: on the bits' device.

    Returns:
        [(T, H_l)], fine to coarse.
    """
    previous, noisy = diffuse(clean, schedule, 0, schedule.timesteps)
    blocks = dbn.blocks(0, schedule.timesteps)
    contexts = dbn.contexts(blocks, previous, noisy)
    return [
        block.hidden_logit(bits, bias).sigmoid().mean(1)
        for block, bits, (_, bias) in zip(blocks, previous, contexts, strict=True)
    ]


def draw_hidden_usage(usage: Sequence[Tensor], level_names: Sequence[str]) -> Figure:
    """A histogram per level over all timesteps and units, with the share of idle ones; usage [(T, H_l)]."""
    figure, axes = new_figure(len(usage), width=3.6, height=2.7)
    for panel, name, values in zip(axes[0], level_names, usage, strict=True):
        values = values.flatten().cpu().numpy()
        idle = np.mean((values < IDLE) | (values > 1 - IDLE))
        panel.hist(values, BINS, range=(0, 1), color="#7fb3e6")
        panel.axvspan(0, IDLE, color="0.85", zorder=0)
        panel.axvspan(1 - IDLE, 1, color="0.85", zorder=0)
        panel.set(
            title=f"{name} level: {idle:.1%} idle", xlabel="mean activation of a hidden unit", ylabel="units, all timesteps"
        )
    return figure
