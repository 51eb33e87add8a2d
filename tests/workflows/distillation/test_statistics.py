"""The tests on differences against scipy's own, against sums done by hand, and against enumeration."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from trainbook.workflows.distillation.statistics import equivalent, holm, mcnemar, not_worse, paired, sentence


def test_paired_is_scipys_paired_t_test_with_its_interval():
    one, other = np.random.default_rng(0).normal(size=(2, 7))
    found = paired(list(one - other))
    expected = stats.ttest_rel(one, other)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(one, other).pvalue)
    assert found.effect == pytest.approx(expected.statistic / math.sqrt(7))


def test_paired_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, t = 2 sqrt 3 = 3.46; two degrees of freedom make p = 1 - t / sqrt(t^2 + 2)."""
    found = paired([1, 2, 3])
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert (found.mean, found.effect, found.number) == (2, 2, 3)
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert math.isnan(found.wilcoxon_p)


def test_another_unit_changes_amounts_and_no_p():
    images, points = paired([9, -18, 27, 3]), paired([1, -2, 3, 1 / 3])
    scaled = images.scaled(1 / 9)
    assert (scaled.mean, scaled.low, scaled.high) == pytest.approx((points.mean, points.low, points.high))
    assert (scaled.p, scaled.effect) == pytest.approx((points.p, points.effect))


def test_one_seed_and_equal_seeds_say_what_they_can():
    assert math.isnan(paired([0.3]).p)
    assert paired([0.3]).high == math.inf
    same, moved = paired([0.0, 0.0, 0.0]), paired([0.5, 0.5])
    assert (same.p, same.effect, same.low, same.high) == (1, 0, 0, 0)
    assert (moved.p, moved.effect) == (0, math.inf)


def test_five_pairs_cannot_reach_significance_by_ranks_and_six_can():
    assert math.isnan(paired([1, 2, 3, 4, 5]).wilcoxon_p)
    assert paired([1, 2, 3, 4, 5, 6]).wilcoxon_p == pytest.approx(2 / 2**6)


def test_holm_by_hand():
    """0.01 x 3, then 0.02 x 2 and 0.03 x 1, of which the last is raised to the one before."""
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1, 1]
    adjusted = holm([math.nan, 0.04])
    assert math.isnan(adjusted[0])
    assert adjusted[1] == 0.04


def test_holm_rejects_what_the_step_down_procedure_rejects():
    generator = np.random.default_rng(1)
    for _ in range(200):
        p = generator.random(5) ** 3
        rejected, order = set(), np.argsort(p)
        for place, index in enumerate(order):
            if p[index] > 0.05 / (5 - place):
                break
            rejected.add(int(index))
        assert {i for i, q in enumerate(holm(list(p))) if q <= 0.05} == rejected


def test_mcnemar_by_enumeration():
    """All ways in which 7 images that one of the two gets right fall to either side."""
    right, other = np.array([True] * 6 + [False] + [True] * 10), np.array([False] * 6 + [True] + [True] * 10)
    splits = [sum(sides) for sides in itertools.product((0, 1), repeat=7)]
    as_extreme = sum(abs(number - 3.5) >= abs(6 - 3.5) for number in splits)
    assert mcnemar(right, other) == pytest.approx(as_extreme / len(splits))
    assert mcnemar(right, right) == 1


def test_equivalence_against_two_of_scipys_one_sided_tests():
    d = np.random.default_rng(2).normal(0.02, 0.05, 6)
    lower = stats.ttest_1samp(d, -0.1, alternative="greater").pvalue
    upper = stats.ttest_1samp(d, 0.1, alternative="less").pvalue
    assert not_worse(list(d), 0.1) == pytest.approx(lower)
    assert equivalent(list(d), 0.1) == pytest.approx(max(lower, upper))
    assert equivalent([0.0, 0.0], 0.1) == 0
    assert equivalent([0.2, 0.2], 0.1) == 1
    assert math.isnan(equivalent([0.0], 0.1))


def test_sentences_say_better_worse_or_no_evidence():
    better, unsure = paired([1.0, 1.1, 0.9, 1.05]), paired([0.5, -0.4, 0.1, -0.2])
    assert sentence("a", "b", better, 0.01).startswith("a is better than b: +1.01 points")
    assert sentence("a", "b", paired([-1.0, -1.1, -0.9]), 0.01).startswith("a is worse than b")
    assert sentence("a", "b", unsure, 0.9).startswith("no evidence of a difference between a and b")
    assert "equally often" in sentence("a", "b", paired([0, 0, 0]), 1.0)
    assert "one seed" in sentence("a", "b", paired([1.0]), math.nan)


def test_the_paired_test_keeps_its_level():
    """5 seeds without a difference: 5 % of 2,000 trials are called significant, give or take three standard errors."""
    generator = np.random.default_rng(3)
    share = np.mean([paired(list(generator.normal(size=5))).p < 0.05 for _ in range(2000)])
    assert abs(share - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 2000)
