"""Adaptive correlation penalty: timesteps whose Gibbs chains forget too slowly are pulled towards independent units.

lambda KL(prod_i p(s_i) || p) with the marginals p(s_i) of all units s = (z, h) held fixed is added to the loss of a timestep.
Only products of two units have a gradient: d/dW = lambda (E_p[z h'] - E_p[z] E_p[h]') per condition, the covariance. Two
independent chains per condition estimate it without bias: E[(z - y)(s(z) - s(y))'] / 2.

Source: Jelincic et al. (2025), arXiv 2510.23972, adaptive correlation penalty.
"""

# T timesteps, B batch, V visible units, H hidden units, L levels, n timesteps of a tile

from typing import Any

import torch
from torch import Tensor

from trainbook.layers import product
from trainbook.workflows.timestep_dbn.chain import TimestepDBN
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.rbm import Block, Update

LOWEST = 1e-3  # a strength below this is none
RAISED, LOWERED = 1.5, 0.7


def add_correlation_penalty(
    block: Block, first: Tensor, second: Tensor, context_bias: Tensor, strength: Tensor, update: Update
) -> None:
    """Add the statistics of -strength times the penalty to where an update goes.

    Args:
        block: the RBMs.
        first, second: states of two independent chains per condition, (T, B, V).
        context_bias: (T, B, H).
        strength: lambda, (T,).
        update: where the contrastive statistics went.
    """
    hidden = block.hidden_logit(first, context_bias).sigmoid_() - block.hidden_logit(second, context_bias).sigmoid_()
    hidden.mul_(-update.scale / (2 * first.shape[1]) * strength.view(-1, 1, 1))
    product((first - second).transpose(1, 2), hidden, out=update.targets[0], keep=1.0)


def adapted(strength: Tensor, measured: Tensor, previous: Tensor, threshold: float) -> Tensor:
    """The next strengths: raised where the autocorrelation is above the threshold and not falling, lowered where it is below.

    Args:
        strength: lambda, (n, L).
        measured: autocorrelation at the chosen lag, (n, L).
        previous: the one before; NaN where there was none, which counts as not falling.
        threshold: wanted.
    """
    strength = strength.clamp(min=LOWEST)
    falling = measured < previous
    factor = torch.where(measured < threshold, LOWERED, torch.where(falling, 1.0, RAISED))
    raised = strength * factor
    return torch.where(raised < LOWEST, 0.0, raised)


class CorrelationPenalty:
    """Strength of the penalty per timestep and level, and the chains that estimate its gradient.

    Keep it in `TrainState.stateful`.

    Args:
        config: `correlation_threshold` and the batch size.
        dbn: the chain, for its shapes and its device.

    Attributes:
        strength: lambda, (T, L).
        previous: the last measured autocorrelation, (T, L), NaN before the first.
        chains: two per condition and level, [(T, 2, B, V_l)].
    """

    def __init__(self, config: Config, dbn: TimestepDBN) -> None:
        self._config = config
        shape = config.timesteps, len(dbn.levels)
        self.strength, self.previous = torch.zeros(shape), torch.full(shape, torch.nan)
        self.chains = [
            torch.bernoulli(torch.full((config.timesteps, 2, config.batch_size, size), 0.5)).to(level.weight.device)
            for size, level in zip(dbn.level_sizes, dbn.levels, strict=True)
        ]

    @torch.no_grad()
    def apply(self, level: int, start: int, block: Block, context_bias: Tensor, field: Tensor, update: Update) -> None:
        """Move the chains of some timesteps on under new conditions and add the penalty to the update; nothing at strength 0.

        Args:
            level: which.
            start: timestep index of the first.
            block: the RBMs, (n, ...).
            context_bias: (n, B, H).
            field: (n, B, V).
            update: where the contrastive statistics went.
        """
        rows = slice(start, start + len(field))
        strength = self.strength[rows, level].to(field.device)
        if not bool((self.strength[rows, level] > 0).any()):
            return
        both = self.chains[level][rows].flatten(1, 2)
        bias = context_bias.expand(*field.shape[:2], -1)
        both = block.gibbs(both, bias.repeat(1, 2, 1), field.repeat(1, 2, 1), self._config.gibbs_sweeps).unflatten(1, (2, -1))
        self.chains[level][rows] = both
        add_correlation_penalty(block, both[:, 0], both[:, 1], bias, strength, update)

    def adapt(self, start: int, measured: Tensor) -> Tensor:
        """Take in the autocorrelations of an epoch, (n, L), of the timesteps from index `start` on; returns their strengths."""
        rows, measured = slice(start, start + len(measured)), measured.cpu()
        self.strength[rows] = adapted(self.strength[rows], measured, self.previous[rows], self._config.correlation_threshold)
        self.previous[rows] = measured
        return self.strength[rows].clone()

    def begin(self, start: int, stop: int) -> None:
        """A later block starts from the last timestep before it, and so do its strength and chains."""
        if start:
            for tensor in (self.strength, self.previous, *self.chains):
                tensor[start:stop] = tensor[start - 1]

    def state_dict(self) -> dict[str, Any]:
        """Tensors only, so that `torch.load(weights_only=True)` reads them back."""
        return {"strength": self.strength.clone(), "previous": self.previous.clone(), "chains": self.chains}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a run of the same config."""
        for name in ("strength", "previous"):
            getattr(self, name).copy_(saved[name])
        for own, chain in zip(self.chains, saved["chains"], strict=True):
            own.copy_(chain)
