"""The question whether four heads converge faster: the arithmetic of its answer."""

import numpy as np
import pytest
import torch

from trainbook.workflows.graph_diffusion_em.ablation import ablation_metrics, median_ratio, smoothed, steps_to, thresholds_of
from trainbook.workflows.graph_diffusion_em.config import Config
from trainbook.workflows.graph_diffusion_em.network import ARMS


def test_steps_to_a_threshold_and_censoring():
    losses = np.array([[0.5, 0.2, 0.12, 0.11], [0.5, 0.4, 0.3, 0.2]])
    np.testing.assert_array_equal(steps_to(losses, 0.13, 10), [30, np.inf])
    np.testing.assert_array_equal(steps_to(losses, np.array([0.2, 0.2]), 10), [20, 40])


def test_smoothing_is_a_running_mean_from_the_first_value():
    np.testing.assert_allclose(smoothed(np.array([4.0, 2.0, 2.0])), [4, 3, 2.5])


def test_median_ratio_bears_runs_that_never_got_there():
    inf = np.inf
    assert median_ratio(np.array([75.0, 80, 70]), np.array([100.0, 100, 100]))[0] == 0.75
    assert median_ratio(np.array([inf, 80, 70]), np.array([100.0, 100, 100]))[0] == 0.8
    assert median_ratio(np.array([inf, inf]), np.array([inf, inf])) == (1, 1, 1)
    assert median_ratio(np.array([50.0] * 3), np.array([inf] * 3))[0] == 0
    low, high = median_ratio(np.array([60.0, 80, 100, 120, 90]), np.full(5, 100.0))[1:]
    assert low == 0.6 or low == 0.8
    assert high == 1.2 or high == 1.0


def test_the_interval_covers_the_median_about_as_often_as_it_says():
    """Of 150 draws of 15 pairs with median ratio 0.9; the percentile interval of a median is about 93 to 97 % of them."""
    g = np.random.default_rng(0)
    draws = [0.9 * np.exp(0.2 * g.standard_normal(15)) for _ in range(150)]
    intervals = [median_ratio(draw, np.ones(15))[1:] for draw in draws]
    covered = sum(low <= 0.9 <= high for low, high in intervals)
    assert 0.90 <= covered / 150 <= 0.99


def test_metrics_find_the_arm_that_was_made_faster():
    config = Config(ablation_seeds=5, ablation_steps=200, ablation_every=10)
    steps = np.arange(10, 201, 10)
    losses = np.stack([np.stack([0.08 + 0.42 * np.exp(-steps / (40 + seed)) for seed in range(5)]) for _ in ARMS])
    losses[ARMS.index("four_heads")] = np.stack([0.08 + 0.42 * np.exp(-steps / (20 + seed / 2)) for seed in range(5)])
    losses[ARMS.index("no_graph")] = 0.2
    metrics = ablation_metrics(config, torch.from_numpy(losses), 1)
    assert metrics["one_head/steps_ratio_0.13"] == metrics["one_head/flops_ratio"] == 1
    assert metrics["four_heads/flops_ratio"] == metrics["four_random/flops_ratio"] > 1 > metrics["no_graph/flops_ratio"]
    assert metrics["four_heads/steps_ratio_0.13"] == pytest.approx(0.55, abs=0.1)
    assert metrics["four_heads/steps_ratio_0.13_high"] < 0.8
    assert metrics["no_graph/runs_censored_0.13"] == 5
    assert "no_graph/steps_ratio_0.13" not in metrics  # infinite: said by the censored runs
    np.testing.assert_allclose(thresholds_of(losses)["final"], 1.01 * losses[0].min(-1))
