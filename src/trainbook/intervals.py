"""How sure a mean over seeds is."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean of n independent values and the half width of its t interval: t_((1 + p) / 2, n - 1) s / sqrt(n).

    Args:
        values: at least one; of one the half width is infinite.
        level: p, the share of such intervals that hold the true mean, for normal values.
    """
    n = len(values)
    if n < 2:
        return float(values[0]), math.inf
    return float(np.mean(values)), float(stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def difference_interval(values: Sequence[float], others: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Difference of two means and the ends of its interval, where the two groups need not vary alike.

    Args:
        values, others: at least two each; mean(values) - mean(others) is meant.
        level: as in `t_interval`.

    Source: Welch (1947), The Generalization of "Student's" Problem; scipy's `ttest_ind`.
    """
    if np.ptp(values) == np.ptp(others) == 0:  # a metric that no seed moves
        difference = float(values[0] - others[0])
        return difference, difference, difference
    interval = stats.ttest_ind(values, others, equal_var=False).confidence_interval(level)
    return float(np.mean(values) - np.mean(others)), float(interval.low), float(interval.high)
