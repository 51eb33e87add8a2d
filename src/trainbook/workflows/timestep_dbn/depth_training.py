"""Greedy training of a layer above the first: contrastive divergence on the states that the layers below give it."""

# T timesteps, B batch, n timesteps of a block

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainbook.layers import blend_
from trainbook.workflows.timestep_dbn.autocorrelation import settle_sweeps
from trainbook.workflows.timestep_dbn.blocks import METRIC_ROWS
from trainbook.workflows.timestep_dbn.chain import TimestepDBN, diffuse, fields
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.contrastive import Update
from trainbook.workflows.timestep_dbn.depth import Depth, Layer, deep_factors
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule
from trainbook.workflows.timestep_dbn.early_stopping import EarlyStopping
from trainbook.workflows.timestep_dbn.optimizers import rbm_views
from trainbook.workflows.timestep_dbn.phases import add_phases
from trainbook.workflows.timestep_dbn.rbm import log_pseudo_likelihood, sample_bits
from trainbook.workflows.timestep_dbn.validation import same_numbers

METRIC_UNITS = 64  # units per level that the per-epoch pseudo-likelihood looks at


def layer_views(depth: Depth, number: int, start: int, stop: int) -> list[list[Tensor]]:
    """Views of layer n on every level that has one, the diagonal last."""
    return [rbm_views(upper, start, stop, upper.gain) for upper in depth.layer(number).values()]


class LayerStage:
    """Trains layer n of every level that has one; the layers below stay as they are.

    The epoch with the best validation pseudo-likelihood is kept; the tied start counts as epoch 0.

    Args:
        config: of the run.
        dbn, depth: the chain and the layers above it.
        number: n, from 2.
        schedule: on the codes' device.
        codes: of the validation images, per level.
        best: keeps the best epoch of `depth.layer(number)`.
    """

    def __init__(
        self,
        config: Config,
        dbn: TimestepDBN,
        depth: Depth,
        number: int,
        schedule: FlipSchedule,
        codes: Sequence[Tensor],
        best: EarlyStopping,
    ) -> None:
        self._config, self._dbn, self._depth, self._number = config, dbn, depth, number
        self._schedule, self._codes, self._best = schedule, codes, best
        self._uppers = depth.layer(number)  # by level
        self._below = {level: (dbn.levels[level], *depth.levels[level])[number - 2] for level in self._uppers}

    def begin(self, start: int, stop: int) -> None:
        """Tie the timesteps to the layer below."""
        for level, upper in self._uppers.items():
            upper.tie(self._below[level], start, stop)
        self._best.begin(start, stop)
        self.judge(start, stop, 0)

    def views(self, start: int, stop: int) -> list[list[Tensor]]:
        """Parameters of layer n, the diagonal last."""
        return layer_views(self._depth, self._number, start, stop)

    def update(self, clean: Sequence[Tensor], start: int, stop: int, updates: Sequence[Update]) -> None:
        """Contrastive statistics of layer n, and of its diagonal: E_data[x m] - E_model[x m] with m = 2 Q(x | z_t) - 1."""
        states = self._states(clean, start, stop)
        for upper, (state, layer), update in zip(self._uppers.values(), states, updates, strict=True):
            chains, noisy = upper.states[start:stop], torch.bernoulli((layer.signs + 1) / 2)
            begun = {"pcd": chains, "recovery": noisy, "cd": state}[self._config.negative_phase]
            model = layer.block.gibbs(begun, layer.context_bias, layer.field, self._config.gibbs_sweeps)
            if self._config.negative_phase == "pcd":
                chains.copy_(model)
            add_phases(update, (state, model), (layer.up(state).sigmoid_(), layer.up(model).sigmoid_()))
            gain = ((state - model) * layer.signs).mean(1).mul_(update.scale)
            blend_(update.targets[4], gain, update.keep_bias)

    @torch.no_grad()
    def judge(self, start: int, stop: int, epoch: int) -> dict[str, Any]:
        """Conditional pseudo-likelihood of the states below layer n on validation codes, in nats per unit."""
        with same_numbers(self._config.seed, self._codes[0].device):
            states = self._states([code[:METRIC_ROWS] for code in self._codes], start, stop)
        values = torch.stack(
            [log_pseudo_likelihood(x.block, state, x.context_bias, x.field, METRIC_UNITS) for state, x in states], 1
        )
        kept = self._best.judge(start, values, epoch)
        return {
            "epoch": epoch,
            "first_timestep": start + 1,
            "mean_layer_pseudo_likelihood": values.mean(),
            "layer_pseudo_likelihood_by_timestep_and_level": values,
            "kept_epoch_by_timestep_and_level": kept,
        }

    def end(self, start: int, stop: int) -> dict[str, Any]:
        """Put the best epoch back, and measure how fast the top RBMs forget."""
        self._best.restore(start, stop)
        factors = deep_factors(self._dbn, self._depth, self._schedule)
        return settle_sweeps(self._config, self._depth.sampling_sweeps, factors, self._codes, start, stop)

    def _states(self, clean: Sequence[Tensor], start: int, stop: int) -> list[tuple[Tensor, Layer]]:
        """Per level that has a layer n: x_{n-1} drawn upwards from z_{t-1}, (n, B, .), and the layer under its conditions."""
        previous, noisy = diffuse(clean, self._schedule, start, stop)
        blocks, field = self._dbn.blocks(start, stop), fields(noisy, self._schedule.coupling[start + 1 : stop + 1])
        contexts, found = self._dbn.contexts(blocks, previous, noisy), []
        for level in self._uppers:
            conditions = blocks[level], contexts[level][1], field[level], noisy[level]
            *lower, layer = self._depth.layers(level, *conditions, start, stop, self._number)
            state = previous[level]
            for one in lower:
                state = sample_bits(one.up(state))
            found.append((state, layer))
        return found
