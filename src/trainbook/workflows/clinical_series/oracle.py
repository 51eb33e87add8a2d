"""The best possible answer on generated series: Bayes' rule over the grades of severity, exact by a Kalman filter for each."""

# N patients, L minutes read, G grades, V variables, H patches forecast

import numpy as np
from scipy.special import logsumexp

from trainbook.workflows.clinical_series.generator import (
    DAY_MINUTES,
    GRADE_SHARES,
    RISKS,
    SEVERITIES,
    VITAL_SIGNS,
    VitalSign,
)


def oracle(observed: np.ndarray, num_patches: int, patch_minutes: int) -> tuple[np.ndarray, np.ndarray]:
    """Risk of death and expected patch means of the future, given all that was observed and how the series are generated.

    P(grade | x) is proportional to P(grade) p(x | grade); given the grade the series are normal.

    Args:
        observed: (N, L, V), NaN in gaps.
        num_patches, patch_minutes: H, and the minutes of one.

    Returns:
        P(death | x), (N,), and E[mean of each patch | x], (N, H, V).
    """
    found = [
        [filter_grade(sign, severity, observed[..., index], num_patches, patch_minutes) for severity in SEVERITIES]
        for index, sign in enumerate(VITAL_SIGNS)
    ]
    likelihood = np.array([[one[0] for one in grades] for grades in found]).sum(0)  # (G, N)
    log_posterior = np.log(GRADE_SHARES)[:, None] + likelihood
    posterior = np.exp(log_posterior - logsumexp(log_posterior, axis=0))
    forecasts = np.array([[one[1] for one in grades] for grades in found])  # (V, G, N, H)
    return posterior.T @ RISKS, np.einsum("gn,vgnh->nhv", posterior, forecasts)


def filter_grade(
    sign: VitalSign, severity: float, x: np.ndarray, num_patches: int, patch_minutes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood of one variable given the severity, and the expected patch means that follow, by a Kalman filter.

    State z = (offset, c - mean, d - mean, u); observation x_t = expected_t + h_t z + noise with h_t = (1, cos, sin, 1).

    Args:
        sign, severity: the variable and the grade's severity.
        x: (N, L), NaN in gaps.
        num_patches, patch_minutes: H, and the minutes of one.

    Returns:
        (N,) in nats, and (N, H).

    Source: Kalman (1960), A New Approach to Linear Filtering and Prediction Problems.
    """
    number, length = x.shape
    swing, noise = float(sign.swing_of(severity)), sign.noise**2
    days = np.arange(length + num_patches * patch_minutes) / DAY_MINUTES
    expected = sign.expected(severity, days)
    rows = np.stack([np.ones_like(days), np.cos(2 * np.pi * days), np.sin(2 * np.pi * days), np.ones_like(days)], 1)
    z = np.zeros((4, number))
    variances = np.array([sign.offset**2, sign.circadian_spread**2, sign.circadian_spread**2, swing**2])
    P = np.diag(variances)[..., None].repeat(number, -1)  # (4, 4, N)
    log_likelihood = np.zeros(number)
    is_there = ~np.isnan(x)
    filled = np.where(is_there, x, 0.0)
    for t in range(length):
        if t:
            z[3] *= sign.kept
            P[3] *= sign.kept
            P[:, 3] *= sign.kept
            P[3, 3] += swing**2 * (1 - sign.kept**2)
        h = rows[t]
        Ph = np.tensordot(h, P, 1)  # (4, N)
        variance = h @ Ph + noise
        error = filled[:, t] - expected[t] - h @ z
        gain = np.where(is_there[:, t], Ph / variance, 0.0)
        z += gain * error
        P -= gain[:, None] * Ph[None]
        log_likelihood -= np.where(is_there[:, t], 0.5 * (np.log(2 * np.pi * variance) + error**2 / variance), 0.0)
    ahead = rows[length:].copy()
    ahead[:, 3] = sign.kept ** np.arange(1, len(ahead) + 1)
    future = expected[length:, None] + ahead @ z  # (minutes, N)
    return log_likelihood, future.reshape(num_patches, patch_minutes, number).mean(1).T
