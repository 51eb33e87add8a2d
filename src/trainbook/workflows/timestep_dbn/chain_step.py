"""One contrastive step of the chain, level after level from coarse to fine, and of the plain RBMs beside it."""

# T timesteps, B batch, V_l bits and H_l hidden units of level l; level 0 is the finest

from collections.abc import Sequence

import torch
from torch import Tensor

from trainbook.workflows.timestep_dbn.chain import TimestepDBN
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.contrastive import (
    MESSAGE,
    TRANSITION,
    Phases,
    Update,
    contrastive_update,
    num_draws,
    run_negative_phase,
)
from trainbook.workflows.timestep_dbn.diffusion import flip_schedule, transition_thresholds
from trainbook.workflows.timestep_dbn.elementwise import Elementwise
from trainbook.workflows.timestep_dbn.random_bits import RandomKeys, threshold
from trainbook.workflows.timestep_dbn.rbm import ConditionalRBM

# One core saves 1 ns for each unit it updates and needs a minute to compile where nothing is cached.
LEAST_UNITS_TO_COMPILE = 100e9


def pays_to_compile(config: Config, dbn: TimestepDBN, num_steps: int, device: torch.device) -> bool:
    """Whether the config asks for compiled kernels, or leaves the choice and the chain trains long enough to gain from them."""
    if config.acceleration == "auto" and device.type == "cpu":
        units = [2 * V + 2 * H + config.gibbs_sweeps * (V + H) for V, H in (level.weight.shape[1:] for level in dbn.levels)]
        steps = num_steps * config.block_timesteps
        return steps * config.batch_size * sum(units) > LEAST_UNITS_TO_COMPILE
    return config.acceleration == "compiled"


class ChainStep:
    """Steps up to so many neighbouring timesteps at once.

    Args:
        config: of the run.
        dbn: the chain.
        timesteps: the most that are stepped at once.
        compiled: ask for compiled kernels.
    """

    def __init__(self, config: Config, dbn: TimestepDBN, timesteps: int, compiled: bool) -> None:
        self._config, self._dbn = config, dbn
        device = dbn.levels[0].weight.device
        schedule = flip_schedule(config.timesteps, config.schedule)
        self._thresholds = threshold(transition_thresholds(schedule)).to(device)
        self._coupling = schedule.coupling[1:].float().view(-1, 1, 1).to(device)
        self._phases = [Phases(block, config.batch_size) for block in dbn.blocks(0, timesteps)]
        self._kernels = Elementwise(compiled, largest(self._phases), device)
        self._draws = num_draws(config.gibbs_sweeps)
        self._keys = RandomKeys(config.seed, len(dbn.levels) * self._draws, config.timesteps, device)

    @torch.no_grad()
    def __call__(self, clean: Sequence[Tensor], step: int, start: int, stop: int, updates: Sequence[Update]) -> None:
        """Contrastive statistics of every level for the timestep indices start..stop-1, from one batch of codes.

        Args:
            clean: z_0 per level, [(B, V_l)].
            step: of the run.
            start, stop: timestep indices.
            updates: where the statistics go, per level, for these timesteps.
        """
        config, dbn, kernels = self._config, self._dbn, self._kernels
        keys = self._keys(step)[:, start:stop].split(self._draws)
        coupling, thresholds = self._coupling[start:stop], self._thresholds[start:stop]
        phases = [each.take(stop - start) for each in self._phases]
        for level, bits in enumerate(clean):
            here = phases[level]
            kernels.draw_transition(bits, thresholds, here.visible_index, keys[level][TRANSITION], here.data, here.signs)
        for level, block in reversed(list(enumerate(dbn.blocks(start, stop)))):
            here, key, chains = phases[level], keys[level], dbn.levels[level].chains[start:stop]
            if config.noisy_context:
                at = here.context.shape[2] - sum(dbn.level_sizes)
                torch.cat([each.signs for each in phases], 2, out=here.context[..., at:])
            here.set_bias(block)
            run_negative_phase(block, here, chains, coupling, config.negative_phase, config.gibbs_sweeps, key, kernels)
            message = phases[level - 1].context[..., : dbn.coarser[level - 1]] if level else None
            if message is not None and config.context == "bits":
                message.copy_(here.data)
            moving = chains if config.negative_phase == "pcd" else None
            probabilities = None if config.context == "bits" else message
            contrastive_update(block, here, updates[level], kernels, probabilities, moving, key[-1])
            if probabilities is not None and config.context == "hidden_sample":
                kernels.draw_bits(probabilities, here.hidden_index, key[MESSAGE], probabilities)


class PlainSteps:
    """Steps RBMs of one timestep without a condition, side by side on the same batch, by persistent contrastive divergence.

    Args:
        config: of the run.
        rbms: the RBMs.
        compiled: ask for compiled kernels.
    """

    def __init__(self, config: Config, rbms: Sequence[ConditionalRBM], compiled: bool) -> None:
        self._sweeps, self._rbms = config.gibbs_sweeps, rbms
        device, draws = rbms[0].weight.device, num_draws(config.gibbs_sweeps)
        self._phases = [Phases(rbm.block(0, 1), config.batch_size) for rbm in rbms]
        self._kernels = Elementwise(compiled, largest(self._phases), device)
        self._keys = RandomKeys(config.seed, len(rbms) * draws, 1, device)

    @torch.no_grad()
    def __call__(self, bits: Tensor, step: int, updates: Sequence[Update]) -> None:
        """One step of each from a batch of bits, (B, V); `step` is the run's."""
        keys = self._keys(step).chunk(len(self._rbms))
        for rbm, phases, update, key in zip(self._rbms, self._phases, updates, keys, strict=True):
            block = rbm.block(0, 1)
            phases.data.copy_(bits)
            phases.set_bias(block)
            run_negative_phase(block, phases, rbm.chains, None, "pcd", self._sweeps, key, self._kernels)
            contrastive_update(block, phases, update, self._kernels, None, rbm.chains, key[-1])


def largest(phases: Sequence[Phases]) -> int:
    """Elements of the largest tensor among several levels' phases."""
    return max(max(each.visible.numel(), each.hidden.numel()) for each in phases)
