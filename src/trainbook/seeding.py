"""The random numbers of a step: a function of (seed, step, process), so that a checkpoint needs no generator's state."""

import torch


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A seed for every (seed, step, rank).

    On a CPU torch uses the low 32 bits of a seed: the step's factor is odd, so no two steps of a run share them.
    """
    return (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + rank * 0xA0761D6478BD642F + 0x8CB92BA72F3D8DD7) & (2**63 - 1)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch's global generators for one step, so that its randomness depends on (seed, step, rank) alone.

    `torch.manual_seed` costs some 300 microseconds on a CPU-only process (it records a stack trace for CUDA's lazy
    start); the generators themselves take about two.
    """
    value = step_seed(seed, step, rank)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(value)
