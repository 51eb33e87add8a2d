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
