"""Metrics of samples: what they say of sets whose relation is known."""

# N samples, M held-out codes, V bits

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trainbook.workflows.timestep_dbn.sample_metrics import (
    classifier_metrics,
    covariance_errors,
    probability_below,
    sample_metrics,
)
from trainbook.workflows.timestep_dbn.two_samples import resampling_weights

V = 24
MIXING = 1.5 * torch.randn(6, V, generator=torch.Generator().manual_seed(3))


def draw(number: int) -> Tensor:
    """Correlated bits: signs of a few hidden normal numbers mixed."""
    return (torch.randn(number, 6) @ MIXING + 0.7 * torch.randn(number, V) > 0).float()


def shuffled(bits: Tensor) -> Tensor:
    """Each column in an order of its own: the same means, no correlation."""
    return torch.stack([column[torch.randperm(len(bits))] for column in bits.T], 1)


@pytest.fixture(scope="module")
def metrics():
    """Three kinds of samples: as good as the data, without correlations, and the training data itself."""
    torch.manual_seed(1)
    train, test = draw(600), draw(400)
    sets = {
        "chain": draw(300),
        "shuffled": shuffled(draw(300)),
        "copied": train[:300],
        "fair": torch.randint(2, (300, V)).float(),
    }
    return sample_metrics(sets, test, train, num_rows=300)


def test_samples_as_good_as_the_data_are_at_the_floor(metrics):
    for name in ("sample_covariance_error", "squared_mmd", "c2st_linear", "c2st_kernel"):
        low, high = metrics[f"training_data/{name}_above_chain_low"], metrics[f"training_data/{name}_above_chain_high"]
        assert low < 0 < high
    for kind in ("linear", "kernel"):
        assert metrics[f"chain/c2st_{kind}"] == pytest.approx(0.5, abs=4 * metrics[f"chain/c2st_{kind}_standard_error"])
    assert abs(metrics["chain/squared_mmd"]) < 4 * metrics["chain/squared_mmd_standard_error"]


@pytest.mark.parametrize("name", ["sample_covariance_error", "squared_mmd", "c2st_kernel"])
def test_lost_correlations_are_seen_where_pairs_count(metrics, name):
    assert metrics[f"shuffled/{name}_above_chain_low"] > 0
    assert metrics[f"shuffled/{name}_above_chain"] == pytest.approx(metrics[f"shuffled/{name}"] - metrics[f"chain/{name}"])


def test_linear_classifier_sees_means_only(metrics):
    assert metrics["shuffled/c2st_linear"] == pytest.approx(0.5, abs=4 * metrics["shuffled/c2st_linear_standard_error"])
    assert metrics["chain/c2st_linear_standard_error"] == pytest.approx(math.sqrt(0.25 / 600), rel=0.05)


def test_copies_of_training_codes_are_remembered_and_new_samples_are_not(metrics):
    assert metrics["copied/nearest_training_distance"] == 0
    assert metrics["copied/nearer_than_held_out"] > 0.7
    for who in ("chain", "training_data"):  # training codes are compared with the others, as if they were held out
        error = metrics[f"{who}/nearer_than_held_out_standard_error"]
        assert metrics[f"{who}/nearer_than_held_out"] == pytest.approx(0.5, abs=4 * error)
    assert metrics["fair/nearer_than_held_out"] < 0.2
    assert metrics["fair/nearest_training_distance"] > metrics["held_out_data/nearest_training_distance"]


def test_probability_below_is_the_count_of_pairs_and_its_error_their_spread():
    values, others = torch.randint(5, (8,)).double(), torch.randint(6, (11,)).double()
    counted = [1.0 if x < y else 0.5 if x == y else 0.0 for x in values for y in others]
    assert probability_below(values, others)[0] == pytest.approx(np.mean(counted))
    draws = [probability_below(torch.randint(5, (60,)).double(), torch.randint(6, (80,)).double()) for _ in range(500)]
    means, errors = np.array(draws).T
    assert errors.mean() == pytest.approx(means.std(), rel=0.1)


def test_intervals_of_the_classifier_hold_the_difference_of_two_equal_models():
    held = 0
    for seed in range(40):
        torch.manual_seed(seed)
        values = classifier_metrics({"chain": draw(80), "twin": draw(60)}, draw(80), "linear", seed)
        held += values["twin/c2st_linear_above_chain_low"] < 0 < values["twin/c2st_linear_above_chain_high"]
    assert held >= 33  # 38 expected


def test_covariance_errors_are_those_of_the_repeated_rows():
    bits, reference = draw(20), draw(30)
    weights, reference_weights = (resampling_weights(n, 4, torch.device("cpu")) for n in (20, 30))
    values = covariance_errors(bits, reference, weights, reference_weights)
    for value, w, v in zip(values, weights, reference_weights, strict=True):
        one, other = (
            np.cov(np.repeat(rows.numpy(), row.long().numpy(), axis=0), rowvar=False) for rows, row in ((bits, w), (reference, v))
        )
        assert float(value) == pytest.approx(math.sqrt(((one - other) ** 2).mean()), rel=1e-4)
