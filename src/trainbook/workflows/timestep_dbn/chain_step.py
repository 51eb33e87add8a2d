"""One contrastive step of the chain, level after level from coarse to fine, and of the plain RBMs beside it."""

# T timesteps, B batch, V_l bits and H_l hidden units of level l; level 0 is the finest

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from trainbook.workflows.timestep_dbn.chain import TimestepDBN
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.contrastive import MESSAGE, TRANSITION, Phases, Update, contrastive_step, num_draws
from trainbook.workflows.timestep_dbn.cuda_graphs import CudaGraphs
from trainbook.workflows.timestep_dbn.diffusion import flip_schedule, transition_thresholds
from trainbook.workflows.timestep_dbn.elementwise import Elementwise
from trainbook.workflows.timestep_dbn.products import product_dtype
from trainbook.workflows.timestep_dbn.random_bits import RandomKeys, threshold
from trainbook.workflows.timestep_dbn.rbm import ConditionalRBM

CHAIN_STREAM = 0  # of random numbers; plain RBMs have others
# One core saves 1 ns for each unit it updates and needs a minute to compile where nothing is cached.
LEAST_UNITS_TO_COMPILE = 100e9


def pays_to_compile(config: Config, dbn: TimestepDBN, num_steps: int) -> bool:
    """Whether the config asks for compiled kernels, or leaves the choice and a CPU trains long enough to gain from them.

    Args:
        config: of the run.
        dbn: the chain, for its shapes and its device.
        num_steps: of all blocks together.
    """
    if config.acceleration != "auto" or dbn.levels[0].weight.device.type != "cpu":
        return config.acceleration == "compiled"
    units = [2 * V + 2 * H + config.gibbs_sweeps * (V + H) for V, H in (level.weight.shape[1:] for level in dbn.levels)]
    return num_steps * config.block_timesteps * config.batch_size * sum(units) > LEAST_UNITS_TO_COMPILE


class ChainStep:
    """Steps up to so many neighbouring timesteps at once.

    Args:
        config: of the run.
        dbn: the chain.
        timesteps: the most that are stepped at once.
        compiled: ask for compiled kernels, and on a GPU for CUDA graphs of the Gibbs sweeps.
    """

    def __init__(self, config: Config, dbn: TimestepDBN, timesteps: int, compiled: bool) -> None:
        self._config, self._dbn = config, dbn
        device = dbn.levels[0].weight.device
        schedule = flip_schedule(config.timesteps, config.schedule)
        self._thresholds = threshold(transition_thresholds(schedule)).to(device)
        self._coupling = schedule.coupling[1:].float().view(-1, 1, 1).to(device)
        dtype = product_dtype(config.rbm_precision, device)
        self._phases = [Phases(block, config.batch_size, dtype) for block in dbn.blocks(0, timesteps)]
        self._kernels = Elementwise(compiled, largest(self._phases), device)
        self._graphs = CudaGraphs() if compiled and device.type == "cuda" else None
        uses = len(dbn.levels) * num_draws(config.gibbs_sweeps)
        self._keys = RandomKeys(config.seed, CHAIN_STREAM, uses, config.timesteps, device)

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
        keys = self._keys(step)[:, start:stop].chunk(len(dbn.levels))
        coupling, thresholds = self._coupling[start:stop], self._thresholds[start:stop]
        phases = [each.take(stop - start) for each in self._phases]
        for here, bits, key in zip(phases, clean, keys, strict=True):
            kernels.draw_transition(bits, thresholds, here.visible_index, key[TRANSITION], here.data, here.signs)
        for level, block in reversed(list(enumerate(dbn.blocks(start, stop)))):
            here, key = phases[level], keys[level]
            if config.noisy_context:
                of_noise = here.context[..., dbn.coarser[level] :].split(dbn.level_sizes, 2)
                for part, each in zip(of_noise, phases, strict=True):
                    part.copy_(each.signs)
            here.load(block)
            message = phases[level - 1].context[..., : dbn.coarser[level - 1]] if level else None
            if message is not None and config.context == "bits":
                message.copy_(here.data)
                message = None
            contrastive_step(
                block, here, dbn.levels[level].chains[start:stop], coupling, config.negative_phase, config.gibbs_sweeps,
                updates[level], key, kernels, message, self._runner((level, start, stop)),
            )  # fmt: skip
            if message is not None and config.context == "hidden_sample":
                kernels.draw_bits(message, here.hidden_index, key[MESSAGE])

    def _runner(self, name: tuple[int, int, int]) -> Callable[[Callable[[], None]], None]:
        return partial(self._graphs.run, name) if self._graphs else lambda work: work()


class PlainStep:
    """Steps an RBM of one timestep without a condition, by persistent contrastive divergence.

    Args:
        config: of the run.
        rbm: the RBM.
        stream: of its random numbers.
        compiled: ask for compiled kernels.
    """

    def __init__(self, config: Config, rbm: ConditionalRBM, stream: int, compiled: bool) -> None:
        self._sweeps, self.rbm, device = config.gibbs_sweeps, rbm, rbm.weight.device
        self._phases = Phases(rbm.block(0, 1), config.batch_size, product_dtype(config.rbm_precision, device))
        self._kernels = Elementwise(compiled, largest([self._phases]), device)
        self._keys = RandomKeys(config.seed, stream, num_draws(config.gibbs_sweeps), 1, device)

    @torch.no_grad()
    def __call__(self, bits: Tensor, index: int, update: Update) -> None:
        """One step from a batch of bits, (B, V); `index` counts the RBM's own."""
        block, phases = self.rbm.block(0, 1), self._phases
        phases.data.copy_(bits)
        phases.load(block)
        contrastive_step(block, phases, self.rbm.chains, None, "pcd", self._sweeps, update, self._keys(index), self._kernels)


def largest(phases: Sequence[Phases]) -> int:
    """Elements of the largest tensor among several levels' phases."""
    return max(max(each.visible.numel(), each.hidden.numel()) for each in phases)
