"""Random numbers from counters: uniform, independent of each other and between keys, and functions of their counters alone."""

# T timesteps, B batch, N units, n numbers of one key

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.workflows.timestep_dbn.enumeration import assert_fits
from tests.workflows.timestep_dbn.test_random_numbers import z_scores_are_standard
from trainbook.workflows.timestep_dbn import random_bits
from trainbook.workflows.timestep_dbn.diffusion import flip_schedule, transition_thresholds
from trainbook.workflows.timestep_dbn.random_bits import RandomKeys, random_integers, random_uniforms, threshold, unit_index

CPU = torch.device("cpu")
ROWS, UNITS, STEPS, USES, TIMESTEPS = 32, 128, 30, 2, 25
COUNT = ROWS * UNITS


def numbers(keys: Tensor, rows: int = ROWS, units: int = UNITS, draw=random_uniforms, dtype=torch.float32) -> Tensor:
    """Numbers of some keys, (T, 2, 1) -> (T, rows * units)."""
    x, y = torch.empty(2, len(keys), rows, units, dtype=dtype)
    return draw(unit_index(rows, units, CPU), keys, x, y).flatten(1)


@cache
def streams(rounds: int) -> np.ndarray:
    """Centred uniforms of many keys, (step, use, timestep; n); with one round the second multiplies by 1."""
    with pytest.MonkeyPatch.context() as patch:
        if rounds == 1:
            patch.setattr(random_bits, "SECOND_MULTIPLIER", 1)
        keys = RandomKeys(5, 0, USES, TIMESTEPS, CPU)
        drawn = [numbers(keys(step)[use]) for step in range(STEPS) for use in range(USES)]
    return torch.cat(drawn).double().numpy() - 0.5


def correlations(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Standardised correlation of each row with a row of the other, for uniforms of variance 1/12."""
    return (one * other).mean(1) * 12 * math.sqrt(one.shape[1])


def neighbours(streams: np.ndarray, distance: int) -> np.ndarray:
    """Correlation between the numbers of one key and those of another so many keys on."""
    return correlations(streams[:-distance], streams[distance:])


BETWEEN_KEYS = {"next timestep": 1, "next use": TIMESTEPS, "next step": USES * TIMESTEPS, "ten steps on": 10 * USES * TIMESTEPS}


@pytest.mark.parametrize("name", BETWEEN_KEYS)
def test_numbers_of_different_keys_are_uncorrelated(name):
    assert z_scores_are_standard(neighbours(streams(2), BETWEEN_KEYS[name]))


def pairs_of_keys(streams: np.ndarray) -> np.ndarray:
    """Correlation between the numbers of every two of the 1,500 keys."""
    products = streams @ streams.T * 12 / math.sqrt(streams.shape[1])
    return products[np.triu_indices(len(streams), 1)]


def test_numbers_of_no_two_keys_are_correlated_and_one_round_would_fail():
    assert z_scores_are_standard(pairs_of_keys(streams(2)))
    assert np.abs(pairs_of_keys(streams(2))).max() < 6  # of 1.1 million normal numbers one is above 6 in 450 such tests
    assert not z_scores_are_standard(pairs_of_keys(streams(1)))
    assert np.abs(pairs_of_keys(streams(1))).max() > 20


@pytest.mark.parametrize("lag", [1, 2, 3, 31, UNITS, UNITS + 1, 1024])
def test_numbers_of_one_key_are_uncorrelated_at_every_lag(lag):
    values = streams(2)
    assert z_scores_are_standard(correlations(values[:, :-lag], values[:, lag:]))


def test_numbers_have_mean_and_variance_of_uniforms():
    values = streams(2)
    assert z_scores_are_standard(values.mean(1) * math.sqrt(12 * COUNT))
    assert z_scores_are_standard(((values**2).mean(1) - 1 / 12) * math.sqrt(180 * COUNT))  # variance of x^2: 1/180


def test_numbers_of_a_unit_over_keys_are_uniform():
    values = streams(2).T
    assert z_scores_are_standard(values.mean(1) * math.sqrt(12 * values.shape[1]))
    assert z_scores_are_standard(correlations(values[:-1], values[1:]))


@pytest.mark.parametrize("bits", [0, 6, 12, 18])
def test_every_group_of_six_bits_fills_its_bins_evenly(bits):
    groups = np.floor((streams(2) + 0.5) * 2.0**bits * 64).astype(np.int64) % 64  # bits further and further behind the point
    expected = COUNT / 64
    statistics = [((np.bincount(row, minlength=64) - expected) ** 2 / expected).sum() for row in groups]
    spread = math.sqrt(2 * 63 * (1 - 1 / COUNT))
    assert z_scores_are_standard((np.array(statistics) - 63) / spread)


def test_pairs_of_units_are_independent_over_keys():
    signs = np.sign(streams(2)[:, :512])
    products = signs.T @ signs / math.sqrt(len(signs))
    pairs = products[np.triu_indices(512, 1)]
    assert abs(pairs.std() - 1) < 4 / math.sqrt(2 * len(pairs))
    assert np.abs(pairs).max() < 6  # 131,000 pairs of normal numbers: above 6 once in 4,000 such tests


def test_numbers_are_functions_of_seed_stream_step_use_timestep_and_unit():
    def first(seed: int, stream: int, step: int, use: int, timestep: int) -> tuple[float, ...]:
        return tuple(numbers(RandomKeys(seed, stream, 3, 4, CPU)(step)[use, timestep : timestep + 1])[0, :4].tolist())

    arguments = [(1, 0, 7, 2, 3), (2, 0, 7, 2, 3), (1, 1, 7, 2, 3), (1, 0, 8, 2, 3), (1, 0, 7, 1, 3), (1, 0, 7, 2, 2)]
    found = [first(*each) for each in arguments]
    assert len(set(found)) == len(arguments)
    assert [first(*each) for each in reversed(arguments)] == found[::-1]
    large = RandomKeys(1, 0, 3, 4, CPU)
    assert torch.equal(large(2**31 + 5).clone(), RandomKeys(1, 0, 3, 4, CPU)(2**31 + 5))


def test_keys_do_not_depend_on_how_many_timesteps_uses_or_steps_are_made_at_once(monkeypatch):
    whole = RandomKeys(3, 0, 4, 6, CPU)
    every = torch.stack([whole(step).clone() for step in range(40)])
    assert len(every.flatten(0, 2).squeeze(-1).unique(dim=0)) == 40 * 4 * 6
    assert torch.equal(torch.stack([RandomKeys(3, 0, 2, 3, CPU)(step).clone() for step in range(40)]), every[:, :2, :3])
    monkeypatch.setattr(random_bits, "KEYS_AT_ONCE", 50)
    assert torch.equal(torch.stack([RandomKeys(3, 0, 4, 6, CPU)(step).clone() for step in (39, 2)]), every[[39, 2]])


def test_integers_are_the_formula_in_whole_numbers():
    key, index = RandomKeys(0, 0, 1, 3, CPU)(4)[0], unit_index(5, 7, CPU)
    drawn = numbers(key, 5, 7, random_integers, torch.int32)
    for t in range(3):
        first, second = (int(part) % 2**32 for part in key[t, :, 0])
        for unit, place in enumerate(index.flatten().tolist()):
            x = (place % 2**32 ^ first) * 0x7FEB352D % 2**32
            x = ((x ^ x >> 15) + second) * 0x846CA68B % 2**32
            assert int(drawn[t, unit]) % 2**32 == x
    assert torch.equal(numbers(key, 5, 7), (drawn >> 8).float() * 2.0**-24 + 0.5)


def test_transitions_of_one_number_have_the_joint_distribution_of_two_flips():
    schedule = flip_schedule(4, "cosine")
    cuts, keys = threshold(transition_thresholds(schedule)), RandomKeys(0, 0, 1, 4, CPU)
    x = torch.stack([numbers(keys(step)[0], draw=random_integers, dtype=torch.int32) for step in range(20)], 1).flatten(1)
    differ = [((x[t] >= cuts[t, 0]) & (x[t] < cuts[t, 2]), x[t] >= cuts[t, 1]) for t in range(4)]  # z_{t-1} and z_t from z_0
    assert not differ[0][0].any()  # c_0 = 0
    for t, (previous, noisy) in enumerate(differ[1:], 1):
        c, beta = float(schedule.cumulative[t]), float(schedule.beta[t + 1])
        probabilities = torch.tensor([(1 - c) * (1 - beta), c * beta, (1 - c) * beta, c * (1 - beta)], dtype=torch.float64)
        assert_fits(torch.stack([previous, noisy], 1), probabilities)  # state = previous + 2 noisy
