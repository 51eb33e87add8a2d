"""What chooses the epoch whose weights are kept: values on held-out codes that are the same in every epoch; higher is better."""

# T timesteps, B batch, V_l bits of level l, L levels

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainbook.seeding import seed_step
from trainbook.workflows.timestep_dbn.baselines import RBM_BASELINES
from trainbook.workflows.timestep_dbn.blocks import METRIC_ROWS
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule
from trainbook.workflows.timestep_dbn.rbm import log_pseudo_likelihood

VALIDATION_STEP = 2**32 - 3  # beyond any training step: a stream of its own


@contextmanager
def same_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers that depend on the run's seed alone; afterwards they go on where they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed_step(seed, VALIDATION_STEP)
        yield


def chain_values(likelihoods: Tensor, level_sizes: Sequence[int], context: str) -> Tensor:
    """What to judge each level's epochs by, from the conditional pseudo-likelihoods per bit; (T, L) -> (T, L).

    Levels whose context is the bits below know nothing of each other's weights: each is judged by its own. With hidden units
    as context a level fits the coarser one of the same epoch only, so all levels of a timestep are judged together, by the
    mean over bits.
    """
    if context == "bits":
        return likelihoods
    shares = likelihoods.new_tensor(level_sizes) / sum(level_sizes)
    return (likelihoods @ shares).unsqueeze(1).expand_as(likelihoods)


@torch.no_grad()
def baseline_values(modules: dict[str, nn.Module], bits: Tensor, schedule: FlipSchedule, seed: int) -> dict[str, Tensor]:
    """Per baseline that is trained, (T, 1) or, where all timesteps share the weights, (1, 1), in nats per bit.

    The pseudo-likelihood of a plain RBM; the mean of ln p_t(z_{t-1} | z_t) of the others.
    """
    bits, values = bits[:METRIC_ROWS], {}
    for name in RBM_BASELINES:
        block, field = modules[name].block(0, 1), torch.zeros_like(bits).unsqueeze(0)
        values[name] = log_pseudo_likelihood(block, bits.unsqueeze(0), block.context_bias(field[..., :0]), field)
    for name in ("logistic_chain", "denoiser"):
        with same_numbers(seed, bits.device):
            steps = -modules[name].negative_log_steps(bits, schedule)[0].mean(1) / bits.shape[1]  # (T,)
        values[name] = steps if name == "logistic_chain" else steps.mean(0, keepdim=True)
    return {name: value.unsqueeze(1) for name, value in values.items()}
