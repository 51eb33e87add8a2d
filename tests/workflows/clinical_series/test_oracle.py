"""The oracle against brute force: the whole normal distribution of past and future written out and conditioned."""

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import multivariate_normal

from trainbook.workflows.clinical_series.generator import (
    DAY_MINUTES,
    GRADE_SHARES,
    RISKS,
    SEVERITIES,
    VITAL_SIGNS,
    generate,
)
from trainbook.workflows.clinical_series.oracle import filter_grade, oracle

MINUTES, PATCHES, PATCH = 90, 3, 20


def joint(sign, severity, length):
    """Mean and covariance of a variable without sensor noise, minute by minute, from the generator's definition."""
    days = np.arange(length) / DAY_MINUTES
    angle = 2 * np.pi * days
    mean = sign.mean + severity * (sign.level + sign.trend * days)
    mean = mean + sign.circadian[0] * np.cos(angle) + sign.circadian[1] * np.sin(angle)
    apart = np.abs(np.arange(length)[:, None] - np.arange(length))
    covariance = sign.offset**2 + sign.circadian_spread**2 * np.cos(angle[:, None] - angle)
    swing = sign.swing * np.exp(sign.unrest * severity)
    return mean, covariance + swing**2 * np.exp(-apart / sign.minutes)


def conditioned(sign, severity, x):
    """Log-likelihood of what was observed, and expected patch means of what follows."""
    mean, covariance = joint(sign, severity, MINUTES + PATCHES * PATCH)
    seen = np.flatnonzero(~np.isnan(x))
    past = covariance[np.ix_(seen, seen)] + sign.noise**2 * np.eye(len(seen))
    density = multivariate_normal(mean[seen], past).logpdf(x[seen])
    ahead = np.arange(MINUTES, len(mean))
    future = mean[ahead] + covariance[np.ix_(ahead, seen)] @ np.linalg.solve(past, x[seen] - mean[seen])
    return density, future.reshape(PATCHES, PATCH).mean(1)


@pytest.fixture(scope="module")
def observed():
    return generate(4, MINUTES, seed=3).observed.astype(float)


@pytest.mark.parametrize("index", range(len(VITAL_SIGNS)))
def test_the_kalman_filter_is_the_conditional_normal_distribution(index, observed):
    sign = VITAL_SIGNS[index]
    for severity in SEVERITIES[[0, 3, 6]]:
        likelihood, forecast = filter_grade(sign, severity, observed[..., index], PATCHES, PATCH)
        for n, x in enumerate(observed[..., index]):
            expected = conditioned(sign, severity, x)
            assert likelihood[n] == pytest.approx(expected[0], rel=1e-9)
            np.testing.assert_allclose(forecast[n], expected[1], rtol=1e-9)


def test_risk_and_forecast_are_bayes_rule_over_the_grades(observed):
    risk, forecast = oracle(observed, PATCHES, PATCH)
    for n in range(len(observed)):
        parts = [[conditioned(sign, s, observed[n, :, v]) for v, sign in enumerate(VITAL_SIGNS)] for s in SEVERITIES]
        weights = np.array([share * np.exp(sum(p[0] for p in row)) for share, row in zip(GRADE_SHARES, parts, strict=True)])
        weights /= weights.sum()
        assert risk[n] == pytest.approx(weights @ RISKS, rel=1e-8)
        expected = np.einsum("g,gvh->hv", weights, np.array([[p[1] for p in row] for row in parts]))
        np.testing.assert_allclose(forecast[n], expected, rtol=1e-8)


def test_the_generator_draws_what_the_oracle_assumes():
    found = generate(4000, 100, seed=1)
    assert np.bincount(found.grades, minlength=7) / 4000 == pytest.approx(GRADE_SHARES, abs=0.03)
    assert found.died.mean() == pytest.approx(GRADE_SHARES @ expit(-2.4 + 2.2 * SEVERITIES), abs=0.02)
    assert np.isnan(found.observed).mean() == pytest.approx(40 / 340, abs=0.01)
    there = ~np.isnan(found.observed)
    assert np.array_equal(found.observed[there], found.complete[there])
    for index, sign in enumerate(VITAL_SIGNS):
        rows = found.complete[found.grades == 3][..., index].astype(float)
        mean, covariance = joint(sign, 0.0, 100)
        covariance += sign.noise**2 * np.eye(100)
        np.testing.assert_allclose(rows.mean(0), mean, atol=4 * np.sqrt(covariance[0, 0] / len(rows)))
        for lag in (0, 1, 40):
            a, b = rows[:, 0] - mean[0], rows[:, lag] - mean[lag]
            assert (a * b).mean() == pytest.approx(covariance[0, lag], rel=0.15)
        total = np.linalg.norm(np.linalg.solve(np.linalg.cholesky(covariance), (rows - mean).T), axis=0) ** 2
        assert total.mean() == pytest.approx(100, abs=4 * np.sqrt(200 / len(rows)))  # chi-squared with 100 degrees


def test_nobody_is_better_than_the_oracle():
    found = generate(600, 300, seed=2)
    risk, forecast = oracle(found.observed[:, :240].astype(float), 3, 20)
    truth = found.complete[:, 240:].reshape(600, 3, 20, 3).mean(2)
    error = ((forecast - truth) ** 2).mean()
    assert error < ((found.complete[:, 220:240].mean(1)[:, None] - truth) ** 2).mean()
    assert ((risk - found.died) ** 2).mean() < ((found.died.mean() - found.died) ** 2).mean()
    assert error < ((0.9 * forecast + 0.1 * truth.mean((0, 1)) - truth) ** 2).mean()
