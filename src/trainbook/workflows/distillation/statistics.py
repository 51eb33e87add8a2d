"""Is one arm better than another: tests on differences that are paired by seed, or by test image."""

# n seeds, d differences of one seed each

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from trainbook.intervals import t_interval

SIGNIFICANCE = 0.05
ROUNDING = 1e-12  # differences whose spread is less than this share of their mean are all the same
FEWEST_FOR_WILCOXON = 6  # with n pairs its smallest p is 2^(1 - n): 0.0625 for 5


@dataclass(frozen=True)
class Paired:
    """How two arms differ over seeds.

    Attributes:
        mean: of the differences.
        low, high: ends of its 95 % t interval; infinite with one seed.
        p: of the two-sided paired t-test; NaN with one seed.
        effect: mean over standard deviation of the differences (Cohen's d_z); infinite where they do not vary.
        wilcoxon_p: of the signed-rank test; NaN below 6 seeds, where it cannot reach 0.05.
        number: of seeds.
    """

    mean: float
    low: float
    high: float
    p: float
    effect: float
    wilcoxon_p: float
    number: int

    def scaled(self, factor: float) -> "Paired":
        """The same in another unit, `factor` of which make one of the old."""
        return replace(self, mean=factor * self.mean, low=factor * self.low, high=factor * self.high)


def paired(differences: Sequence[float]) -> Paired:
    """Test whether differences that are paired by seed have mean zero.

    t = mean(d) sqrt(n) / sd(d) with n - 1 degrees of freedom.

    Args:
        differences: d, at least one.
    """
    d = np.asarray(differences, dtype=float)
    mean, half = t_interval(d.tolist())
    deviation = float(d.std(ddof=1)) if len(d) > 1 else math.nan
    if len(d) < 2:
        p, effect = math.nan, math.nan
    elif deviation <= ROUNDING * abs(mean):  # no difference at all, or the same one every time
        p, effect = (1.0, 0.0) if mean == 0 else (0.0, math.copysign(math.inf, mean))
    else:
        effect = mean / deviation
        p = float(2 * stats.t.sf(abs(effect) * math.sqrt(len(d)), len(d) - 1))
    signed_rank = len(d) >= FEWEST_FOR_WILCOXON and bool((d != 0).any())
    wilcoxon_p = float(stats.wilcoxon(d).pvalue) if signed_rank else math.nan
    return Paired(mean, mean - half, mean + half, p, effect, wilcoxon_p, len(d))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for testing several hypotheses, in the given order; a NaN stays one and is not counted.

    With p sorted upwards, p'_i = max over j <= i of min(1, (m - j + 1) p_j).

    Source: Holm (1979), A Simple Sequentially Rejective Multiple Test Procedure.
    """
    adjusted = [math.nan] * len(p_values)
    order = sorted((index for index, p in enumerate(p_values) if not math.isnan(p)), key=lambda index: p_values[index])
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def mcnemar(right: np.ndarray, other_right: np.ndarray) -> float:
    """Exact two-sided p of McNemar's test: do two classifiers err on the same images equally often.

    Of the images that exactly one gets right, the share of the first is binomial with probability 1/2.

    Args:
        right, other_right: (N,) bool, on the same images.
    """
    first, second = int((right & ~other_right).sum()), int((~right & other_right).sum())
    return float(stats.binomtest(first, first + second, 0.5).pvalue) if first + second else 1.0


def not_worse(differences: Sequence[float], margin: float) -> float:
    """P of the one-sided t-test that an arm is worse by `margin` or more; small: it is not.

    Args:
        differences: d of the arm less the other, higher being better.
        margin: positive, in the same unit.
    """
    return _one_sided(np.asarray(differences, dtype=float) + margin)


def equivalent(differences: Sequence[float], margin: float) -> float:
    """P of two one-sided t-tests (TOST) that two arms differ by `margin` or more either way; small: they are equivalent.

    Source: Schuirmann (1987), A comparison of the two one-sided tests procedure.
    """
    return max(not_worse(differences, margin), not_worse([-d for d in differences], margin))


def _one_sided(values: np.ndarray) -> float:
    """P of the mean being 0 or less."""
    if len(values) < 2:
        return math.nan
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    if deviation <= ROUNDING * abs(mean):
        return 0.0 if mean > 0 else 1.0
    return float(stats.t.sf(mean / deviation * math.sqrt(len(values)), len(values) - 1))


def sentence(one: str, other: str, found: Paired, adjusted_p: float, unit: str = "points") -> str:
    """What a comparison says, in words; `adjusted_p` is Holm's."""
    if found.number < 2:
        return f"{one} and {other} were compared with one seed: {found.mean:+.2f} {unit}, which says nothing about others"
    if found.low == found.high == 0:
        return f"{one} and {other} are right equally often with every seed (n = {found.number})"
    amount = f"{found.mean:+.2f} {unit} (95 % interval {found.low:+.2f} to {found.high:+.2f}, n = {found.number}"
    tested = f"{amount}, p = {adjusted_p:.2g} after Holm)"
    if adjusted_p < SIGNIFICANCE:
        return f"{one} is {'better' if found.mean > 0 else 'worse'} than {other}: {tested}"
    return f"no evidence of a difference between {one} and {other}: {tested}"
