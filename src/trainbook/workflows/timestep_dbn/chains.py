"""The chains of Boltzmann machines of a run: of depth 1, with layers above, and trained jointly; each with what it can do."""

# T timesteps, B batch, V bits of all levels together

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainbook.workflows.timestep_dbn.chain import TimestepDBN, reverse_step
from trainbook.workflows.timestep_dbn.depth import deep_factors, deep_reverse_step
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule
from trainbook.workflows.timestep_dbn.joint import joint_factors, joint_reverse_step
from trainbook.workflows.timestep_dbn.later_stages import DEPTH
from trainbook.workflows.timestep_dbn.likelihood import Factors, chain_factors
from trainbook.workflows.timestep_dbn.stages import JOINT


class Chain(NamedTuple):
    """One of them.

    Attributes:
        factors: what its likelihood is made of.
        step: samples z_{t-1} given z_t and t, (B, V) -> (B, V).
        sampling_sweeps: that a step takes, per timestep, (T,).
    """

    factors: Factors
    step: Callable[[Tensor, int], Tensor]
    sampling_sweeps: Tensor


def chains(modules: dict[str, nn.Module], schedule: FlipSchedule) -> dict[str, Chain]:
    """Those that were trained, by name; "chain" has depth 1."""
    dbn: TimestepDBN = modules["dbn"]

    def on_bits(step: Callable[[Sequence[Tensor], int, int], list[Tensor]], sweeps: Tensor) -> Callable[[Tensor, int], Tensor]:
        numbers = sweeps.tolist()
        return lambda noisy, t: torch.cat(step(noisy.split(dbn.level_sizes, 1), t, numbers[t - 1]), 1)

    found = {"chain": (chain_factors(dbn, schedule), lambda z, t, k: reverse_step(dbn, z, t, schedule, k), dbn.sampling_sweeps)}
    if DEPTH in modules:
        depth = modules[DEPTH]
        found["deep_chain"] = (
            deep_factors(dbn, depth, schedule),
            lambda z, t, k: deep_reverse_step(dbn, depth, z, t, schedule, k),
            depth.sampling_sweeps,
        )
    if JOINT in modules:
        joint = modules[JOINT]
        found["joint_chain"] = (
            joint_factors(joint, schedule),
            lambda z, t, k: joint_reverse_step(joint, z, t, schedule, k),
            joint.sampling_sweeps,
        )
    return {name: Chain(factors, on_bits(step, sweeps), sweeps) for name, (factors, step, sweeps) in found.items()}
