"""Stages that go on from a trained chain, block of timesteps by block: layers above the first, and the joint fine-tune."""

# T timesteps, B batch, n timesteps of a block

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainbook.data import Batches
from trainbook.records import Record
from trainbook.schedule import learning_rate
from trainbook.state import TrainState
from trainbook.workflows.timestep_dbn.blocks import CPU_TILE, release
from trainbook.workflows.timestep_dbn.chain import TimestepDBN
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.contrastive import Update
from trainbook.workflows.timestep_dbn.depth import Depth
from trainbook.workflows.timestep_dbn.depth_training import LayerStage, layer_views
from trainbook.workflows.timestep_dbn.diffusion import flip_schedule
from trainbook.workflows.timestep_dbn.early_stopping import EarlyStopping
from trainbook.workflows.timestep_dbn.joint import JointDBN, JointStage
from trainbook.workflows.timestep_dbn.optimizers import attach_optimizer, rbm_adam, rbm_update
from trainbook.workflows.timestep_dbn.stages import JOINT, later_epochs

DEPTH = "depth"  # name of the module


class LaterStage(Protocol):
    """What is trained after the chain; timestep indices start..stop-1 each time."""

    def begin(self, start: int, stop: int) -> None:
        """Set the timesteps to where their training starts."""

    def views(self, start: int, stop: int) -> list[list[Tensor]]:
        """The parameters that move, one list per RBM, as `optimizers.rbm_views` makes them."""

    def update(self, clean: Sequence[Tensor], start: int, stop: int, updates: Sequence[Update]) -> None:
        """Put the statistics of a batch of codes, [(B, V_l)], where the updates go."""

    def judge(self, start: int, stop: int, epoch: int) -> dict[str, Any]:
        """What is measured at the end of an epoch."""

    def end(self, start: int, stop: int) -> dict[str, Any]:
        """Set the timesteps to what is kept of them; what is measured then."""


def later_modules(config: Config, dbn: TimestepDBN) -> dict[str, nn.Module]:
    """Modules of the stages after the chain."""
    depth = {DEPTH: Depth(config, dbn)} if max(config.depth) > 1 else {}
    return {**depth, JOINT: JointDBN(config, dbn)} if config.joint_epochs else depth


def later_keepers(config: Config, modules: dict[str, nn.Module]) -> dict[str, EarlyStopping]:
    """What keeps the best epoch of every layer above the first."""
    return {
        f"layer_{number}_best": EarlyStopping([list(upper.parameters()) for upper in modules[DEPTH].layer(number).values()], 0)
        for number in range(2, max(config.depth) + 1)
    }


def later_optimizers(config: Config, modules: dict[str, nn.Module], block: tuple[int, int]) -> dict[str, torch.optim.Optimizer]:
    """Optimizers of the stages after the chain as a checkpoint has them before these begin: without gradients or moments."""
    views = {f"layer_{number}": layer_views(modules[DEPTH], number, *block) for number in range(2, max(config.depth) + 1)}
    if config.joint_epochs:
        views[JOINT] = modules[JOINT].views(*block)
    optimizers = {name: rbm_adam(config, group) for name, group in views.items()}
    for optimizer in optimizers.values():
        release(optimizer, 0)
    return optimizers


def train_later(
    config: Config, codes: dict[str, list[Tensor]], state: TrainState, blocks: Sequence[tuple[int, int]], begun: int
) -> Iterator[Record]:
    """Train the stages after the chain from `state.step` on; yields once per step.

    Args:
        config: of the run.
        codes: of the training and validation images, per level.
        state: the run.
        blocks: timestep indices (start, stop) that are trained together.
        begun: the global step at which the first of these stages begins.
    """
    schedule = flip_schedule(config.timesteps, config.schedule).to(codes["valid"][0].device)
    modules, steps_per_epoch = state.modules, len(codes["train"][0]) // config.batch_size
    for name, epochs in later_epochs(config).items():
        end = begun + epochs * steps_per_epoch * len(blocks)
        if state.step < end:
            state.stage = name
            stage: LaterStage
            if name == JOINT:
                stage = JointStage(config, modules["dbn"], modules[JOINT], schedule, codes["valid"])
            else:
                number, best = int(name.removeprefix("layer_")), state.stateful[f"{name}_best"]
                stage = LayerStage(config, modules["dbn"], modules[DEPTH], number, schedule, codes["valid"], best)
            yield from _train_blocks(config, name, stage, codes["train"], state, blocks, begun, epochs * steps_per_epoch)
            if config.optimizer == "adam":
                release(state.optimizers[name], 0)
        begun = end


def _train_blocks(
    config: Config,
    name: str,
    stage: LaterStage,
    codes: list[Tensor],
    state: TrainState,
    blocks: Sequence[tuple[int, int]],
    begun: int,
    steps: int,
) -> Iterator[Record]:
    """One stage, so many steps for each block."""
    batches = Batches(dict(enumerate(codes)), config.seed, config.batch_size)
    steps_per_epoch, optimization = len(codes[0]) // config.batch_size, config.optimization(config.learning_rate)
    while state.step < begun + steps * len(blocks):
        index, block_step = divmod(state.step - begun, steps)
        start, stop = blocks[index]
        if block_step == 0:
            stage.begin(start, stop)
        views = stage.views(start, stop)
        step_optimizer = attach_optimizer(config, state, name, views, fresh=block_step == 0)
        tile = CPU_TILE if codes[0].device.type == "cpu" else stop - start
        while block_step < steps:
            clean, rate = list(batches(block_step).values()), learning_rate(optimization, block_step, steps)
            updates = [rbm_update(config, view, rate) for view in views]
            with torch.no_grad():
                for first in range(start, stop, tile):
                    last = min(first + tile, stop)
                    stage.update(clean, first, last, [update.at(slice(first - start, last - start)) for update in updates])
            step_optimizer(rate)
            block_step += 1
            state.step += 1
            epoch, position = divmod(block_step, steps_per_epoch)
            metrics = stage.judge(start, stop, epoch) if position == 0 else {}
            if block_step == steps:
                metrics |= stage.end(start, stop)
            yield Record(metrics, block_step == steps, config.batch_size)
