"""The cube: a code is written into the front face, all cells follow the rule step by step, the back face is read."""

# B batch, L side, C channels, F numbers per face cell, T steps

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainbook.workflows.cellular_cube.bands import pooled, spread
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.hardware import CoordinateHardware, LearnedHardware
from trainbook.workflows.cellular_cube.rule import Geometry, Rule
from trainbook.workflows.cellular_cube.sleep import Sleep

FULL_STEPS = 7  # of a cube of side 8: in more of them the experts' answers would add up until gradients overflow


class Tally(NamedTuple):
    """Sums over the steps so far, for the losses: expert weights (3,), their entropies (), magnitude of states ()."""

    weights: Tensor
    entropy: Tensor
    magnitude: Tensor


class Pass(NamedTuple):
    """What a pass through the cube gives.

    Attributes:
        back: (B, L, L, C), the back face after the last step.
        weights: (3,), mean weight of each expert over cells, steps and sentences.
        entropy: (), mean entropy of a cell's weights, in nats.
        magnitude: (), mean absolute state.
        active_share: share of cells, over steps, whose change was worked out: that were not asleep.
    """

    back: Tensor
    weights: Tensor
    entropy: Tensor
    magnitude: Tensor
    active_share: float


Watcher = Callable[[int, Tensor, Tensor], Tensor | None]  # step, state, expert weights; may give another state


class Cube(nn.Module):
    """L^3 cells with C numbers each. In a step the first channels move one layer back, then every cell follows the rule.

    What the experts add to a number therefore travels on with it. Numbers that no expert changes arrive at the back face after
    L - 1 steps as they were written into the front face; the back face adds up what
    arrives. States are channels-last: (B, z, y, x, C).

    Args:
        config: of the run.
        side: L, by default the config's. A way of more than 7 steps, or than the config's, is taken in
            steps that change as much less.

    Attributes:
        sleep_threshold: in evaluation, see `Sleep`; 0 keeps all cells awake.
    """

    def __init__(self, config: Config, side: int = 0) -> None:
        super().__init__()
        self.config, self.side = config, side or config.side
        self.num_steps = max(config.steps, self.side - 1) if side else config.steps
        self.step_size = min(FULL_STEPS / config.steps, 1) * config.steps / self.num_steps
        self.moving, self.sleep_threshold = config.moving_channels, config.sleep_threshold
        self.rule = Rule(config)
        coordinates = config.hardware == "coordinates"
        numbers = config.hardware_numbers
        self.hardware = CoordinateHardware(numbers) if coordinates else LearnedHardware(self.side, numbers)
        self.geometries = nn.ModuleList(Geometry(-(-self.side // 2**level), config) for level in range(config.levels))

    def forward(self, code: Tensor, watch: Watcher | None = None) -> Pass:
        """Run all steps.

        Args:
            code: (B, L, L, F), what the front face is given.
            watch: called before the first step and after each one, with weights None before the first; what it returns, if
                anything, is the state from there on.
        """
        config, training = self.config, self.training
        hardware = self.level_hardware()
        num_steps = self.num_steps
        if training and config.any_time:
            num_steps = int(torch.randint(self.side - 1, self.num_steps + 1, ()))
        x = code.new_zeros(len(code), self.side, self.side, self.side, config.channels)
        if training and config.pool_share and float(torch.rand(())) < config.pool_share:
            with torch.no_grad():  # as a pool does: a state that an earlier pass left, through which no gradient flows
                x = self._run(self._written(x, code), _nothing(x), code, hardware, 0, self.num_steps, -1)[0]
        else:
            x = self._written(x, code)
        damaged = int(torch.randint(num_steps, ())) if training and config.damage_share else -1
        tally = _nothing(x)
        sleep = Sleep(self.sleep_threshold, self.side) if self.sleep_threshold and not training else None
        if watch is not None:
            x = _changed(x, watch(0, x, None))
        segment = config.checkpoint_steps or math.ceil(math.sqrt(num_steps))
        if training and config.gradient_checkpointing and watch is None and torch.is_grad_enabled():
            for first in range(0, num_steps, segment):
                last = min(first + segment, num_steps)
                x, tally = checkpoint(self._run, x, tally, code, hardware, first, last, damaged, use_reentrant=False)
        else:
            for step in range(num_steps):
                x, tally, weights = self._step(x, tally, code, hardware, step == damaged, sleep)
                if watch is not None:
                    x = _changed(x, watch(step + 1, x, weights))
        cells = num_steps * x[..., 0].numel()
        share = sleep.num_active / sleep.num_cells if sleep else 1.0
        return Pass(x[:, -1], tally.weights / cells, tally.entropy / cells, tally.magnitude / cells, share)

    def level_hardware(self) -> list[Tensor]:
        """The hardware of each level: the cube's own, then means over blocks."""
        table = self.hardware(self.side)
        return [table] + [pooled(table[None], 2**level)[0] for level in range(1, self.config.levels)]

    def _run(
        self, x: Tensor, tally: Tally, code: Tensor, hardware: list[Tensor], first: int, last: int, damaged: int
    ) -> tuple[Tensor, Tally]:
        for step in range(first, last):
            x, tally, _ = self._step(x, tally, code, hardware, step == damaged, None)
        return x, tally

    def _step(
        self, x: Tensor, tally: Tally, code: Tensor, hardware: list[Tensor], damage: bool, sleep: Sleep | None
    ) -> tuple[Tensor, Tally, Tensor]:
        config, geometry = self.config, self.geometries[0]
        x = self._transported(x)
        if config.write == "clamp":
            x = self._written(x, code)
        if geometry.has_wall:  # before anything looks at it
            x = x * geometry.alive
        if damage:
            x = x * (torch.rand(x.shape[:-1], device=x.device) >= config.damage_share).unsqueeze(-1)
        asked = (x, hardware[0], geometry)
        change, weights = self.rule(*asked) if sleep is None else sleep.answer(self.rule, *asked)
        for level in range(1, config.levels):
            coarse, _ = self.rule(pooled(x, 2**level), hardware[level], self.geometries[level])
            change = change + self.rule.level_gains[level - 1] * spread(coarse, 2**level, self.side)
        if self.training and config.cell_dropout:
            change = change * (torch.rand(x.shape[:-1], device=x.device) >= config.cell_dropout).unsqueeze(-1)
        if self.step_size != 1:
            change = self.step_size * change
        x = x + change.to(x.dtype)
        if geometry.has_wall:
            x = x * geometry.alive
        entropy = torch.special.entr(weights.float()).sum()
        parts = (weights.float().sum((0, 1, 2, 3)), entropy, x.float().abs().mean(-1).sum())
        return x, Tally(*(a + b for a, b in zip(tally, parts, strict=True))), weights

    def _written(self, x: Tensor, code: Tensor) -> Tensor:
        front = torch.cat([code, x[:, 0, :, :, code.shape[-1] :]], -1)
        return torch.cat([front.unsqueeze(1), x[:, 1:]], 1)

    def _transported(self, x: Tensor) -> Tensor:
        moving, resting = x[..., : self.moving], x[..., self.moving :]
        arrived = moving[:, -2:-1] if self.config.write == "clamp" else moving[:, -2:-1] + moving[:, -1:]
        moved = torch.cat([torch.zeros_like(moving[:, :1]), moving[:, :-2], arrived], 1)
        return torch.cat([moved, resting], -1)


def _nothing(x: Tensor) -> Tally:
    return Tally(x.new_zeros(3), x.new_zeros(()), x.new_zeros(()))


def _changed(x: Tensor, other: Tensor | None) -> Tensor:
    return x if other is None else other
