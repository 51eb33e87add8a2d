"""Random numbers per step: repeatable, different and uncorrelated between steps and seeds."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from tests.workflows.timestep_dbn.enumeration import DOUBLE, SMALLEST_P_VALUE
from trainbook.data import batch_indices
from trainbook.seeding import seed_step


def uniforms(seed: int, step: int, size: int = 400) -> np.ndarray:
    """The first uniform numbers of a step's stream."""
    seed_step(seed, step)
    return torch.rand(size, dtype=DOUBLE).numpy()


def test_step_streams_repeat_and_differ():
    assert np.array_equal(uniforms(3, 7), uniforms(3, 7))
    starts = {tuple(uniforms(seed, step, 2)) for seed in range(8) for step in range(2500)}
    assert len(starts) == 8 * 2500


def z_scores_are_standard(scores: np.ndarray) -> bool:
    """Mean 0 and standard deviation 1 within 4 standard errors."""
    count = len(scores)
    return abs(scores.mean()) < 4 / math.sqrt(count) and abs(scores.std() - 1) < 4 / math.sqrt(2 * count)


@pytest.mark.parametrize("neighbour", ["next step", "step after next", "next seed", "next number"])
def test_step_streams_are_uniform_and_uncorrelated(neighbour):
    count, size = 2000, 400
    streams = np.stack([uniforms(5, step) for step in range(count)]) - 0.5  # variance 1/12
    other = {
        "next step": lambda: np.roll(streams, 1, 0),
        "step after next": lambda: np.roll(streams, 2, 0),
        "next seed": lambda: np.stack([uniforms(6, step) for step in range(count)]) - 0.5,
        "next number": lambda: np.roll(streams, 1, 1),
    }[neighbour]()
    assert z_scores_are_standard(streams.mean(1) * math.sqrt(12 * size))
    assert z_scores_are_standard((streams * other).mean(1) * 12 * math.sqrt(size))
    first_numbers = streams[:, :8]  # where a weak seeding shows: the same place in neighbouring streams
    assert (np.abs((first_numbers * other[:, :8]).mean(0)) * 12 * math.sqrt(count) < 4).all()


def test_step_streams_fill_every_bin():
    counts = np.stack([np.histogram(uniforms(5, step), 20, (0, 1))[0] for step in range(2000)])
    statistics = ((counts - 20.0) ** 2 / 20).sum(1)  # chi-square with 19 degrees of freedom
    assert z_scores_are_standard((statistics - 19) / math.sqrt(2 * 19 * (1 - 1 / 400)))
    first = np.histogram([uniforms(5, step, 1)[0] for step in range(4000)], 20, (0, 1))[0]
    assert chisquare(first).pvalue > SMALLEST_P_VALUE


def test_batches_of_an_epoch_hold_every_example_once_and_depend_on_seed_and_epoch_only():
    epoch = torch.cat([batch_indices(4, step, 50, 10) for step in range(5)])
    assert sorted(epoch.tolist()) == list(range(50))
    assert torch.equal(epoch[20:30], batch_indices(4, 2, 50, 10))
    assert not torch.equal(epoch[:10], batch_indices(4, 5, 50, 10))
    assert not torch.equal(epoch[:10], batch_indices(5, 0, 50, 10))
