"""The stages of a run and their steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from trainbook.workflows.timestep_dbn.config import Config

AUTOENCODER, CHAIN, BASELINES = "autoencoder", "chain", "baselines"
JOINT = "joint"  # also the name of its module and its optimizer


@dataclass(frozen=True)
class Plan:
    """Steps of every stage, from the config and the number of training images."""

    steps_per_epoch: int
    autoencoder_steps: int
    block_steps: int
    blocks: list[tuple[int, int]]
    baseline_steps: int
    later_steps: int = 0

    @classmethod
    def of(cls, config: Config, num_images: int, bounds: Sequence[int] = ()) -> "Plan":
        """The plan of a run; `bounds` of the blocks are the config's where they are not given."""
        steps = num_images // config.batch_size
        bounds = bounds or [*range(0, config.timesteps, config.block_timesteps), config.timesteps]
        return cls(
            steps_per_epoch=steps,
            autoencoder_steps=0 if config.autoencoder else steps * config.autoencoder_epochs,
            block_steps=steps * config.epochs_per_timestep,
            blocks=[] if config.stage == AUTOENCODER else list(pairwise(bounds)),
            baseline_steps=0 if config.stage == AUTOENCODER else steps * config.baseline_epochs,
            later_steps=0 if config.stage == AUTOENCODER else steps * (len(bounds) - 1) * sum(later_epochs(config).values()),
        )

    @property
    def chain_end(self) -> int:
        """Global step at which the chain is trained."""
        return self.autoencoder_steps + self.block_steps * len(self.blocks)

    @property
    def baselines_begin(self) -> int:
        """Global step at which the baselines are next: after the chain and what goes on from it."""
        return self.chain_end + self.later_steps

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return self.baselines_begin + self.baseline_steps


def later_epochs(config: Config) -> dict[str, int]:
    """The stages after the chain in their order, with the epochs of each block."""
    layers = {f"layer_{number}": config.epochs_per_timestep for number in range(2, max(config.depth) + 1)}
    return {**layers, JOINT: config.joint_epochs} if config.joint_epochs else layers
