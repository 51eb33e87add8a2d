"""The gradient of a Boltzmann machine's likelihood from states of its two phases, where both phases have their own context."""

# T timesteps, B batch, V visible units, H hidden units, G context units; + clamped to data, - free

import torch
from torch import Tensor

from trainbook.layers import blend_, product
from trainbook.workflows.timestep_dbn.contrastive import Update

Pair = tuple[Tensor, Tensor]


def add_phases(update: Update, visible: Pair, hidden: Pair, context: Pair | None = None) -> None:
    """Mean over the batch of v+ h+' - v- h-', h+ - h-, v+ - v- and g+ h+' - g- h-', put where the update goes.

    Args:
        update: for weight, visible bias, hidden bias and context weight.
        visible: v+ and v-, (T, B, V), states or means.
        hidden: h+ and h-, (T, B, H), states or means.
        context: g+ and g-, (T, B, G); None leaves the context weight alone.
    """
    weight, visible_bias, hidden_bias, context_weight = update.targets[:4]
    scale = update.scale / len(visible[0][0])
    signed = torch.cat([hidden[0] * scale, hidden[1] * -scale], 1)
    product(torch.cat(visible, 1).transpose(1, 2), signed, out=weight, keep=update.keep)
    blend_(hidden_bias, signed.sum(1), update.keep_bias)
    blend_(visible_bias, (visible[0] - visible[1]).sum(1).mul_(scale), update.keep_bias)
    if context is not None:
        product(torch.cat(context, 1).transpose(1, 2), signed, out=context_weight, keep=update.keep)
