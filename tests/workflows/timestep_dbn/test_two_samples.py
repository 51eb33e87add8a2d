"""Two-sample statistics against double loops, exact sums over few states, and simulation."""

# N samples, M reference vectors, V bits, R resamples

import math

import pytest
import torch
from torch import Tensor

from tests.workflows.timestep_dbn.enumeration import DOUBLE, all_bits
from trainbook.workflows.timestep_dbn import two_samples
from trainbook.workflows.timestep_dbn.two_samples import (
    classifier_two_sample,
    hamming,
    median_distance,
    nearest,
    resampling_weights,
    squared_mmd,
)

STATES = all_bits(3)
SOME = torch.softmax(torch.linspace(-1, 1.5, 8, dtype=DOUBLE), 0)
OTHER = torch.softmax(torch.tensor([0.5, 0, 1, 0, -1, 0.2, 0, -0.5], dtype=DOUBLE), 0)


def draw(probabilities: Tensor, number: int) -> Tensor:
    """Rows of `STATES` drawn with these probabilities."""
    return STATES[torch.multinomial(probabilities, number, replacement=True)]


def kernel(one: Tensor, other: Tensor, bandwidth: float) -> float:
    """exp(-d / m) of two rows."""
    return math.exp(-float((one != other).sum()) / bandwidth)


def loops(samples: Tensor, reference: Tensor, bandwidth: float) -> float:
    """The unbiased estimate as its formula is written."""
    sides = []
    for rows in (samples, reference):
        pairs = [kernel(rows[i], rows[j], bandwidth) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        sides.append(sum(pairs) / len(pairs))
    between = [kernel(x, y, bandwidth) for x in samples for y in reference]
    return sum(sides) - 2 * sum(between) / len(between)


def exact_squared_mmd(p: Tensor, q: Tensor, bandwidth: float) -> float:
    """The distance of two distributions over all states, (p - q)' K (p - q)."""
    k = torch.tensor([[kernel(one, other, bandwidth) for other in STATES] for one in STATES], dtype=DOUBLE)
    return float((p - q) @ k @ (p - q))


def test_hamming_distance_counts_differing_bits():
    one, other = torch.randint(2, (5, 7)).float(), torch.randint(2, (4, 7)).float()
    assert hamming(one, other).tolist() == [[float((x != y).sum()) for y in other] for x in one]


def test_median_distance_is_that_of_different_rows():
    rows = torch.randint(2, (9, 6)).float()
    pairs = [float((rows[i] != rows[j]).sum()) for i in range(9) for j in range(i)]
    assert median_distance(rows) == max(1, sorted(pairs)[(len(pairs) - 1) // 2])
    assert median_distance(torch.zeros(4, 3)) == 1


def test_squared_mmd_is_the_double_sum():
    samples, reference = draw(SOME, 6), draw(OTHER, 9)
    assert squared_mmd(samples, reference, 1.7).tolist() == pytest.approx([loops(samples, reference, 1.7)], abs=1e-12)


def test_resampled_mmd_is_the_double_sum_over_drawn_rows_without_a_row_and_itself():
    samples, reference = draw(SOME, 5), draw(OTHER, 4)
    weights, reference_weights = (resampling_weights(n, 3, torch.device("cpu")).to(DOUBLE) for n in (5, 4))
    values = squared_mmd(samples, reference, 2.0, weights, reference_weights)
    assert weights.sum(1).tolist() == [5] * 4
    assert values[0] == pytest.approx(loops(samples, reference, 2.0), abs=1e-12)
    for value, w, v in zip(values, weights, reference_weights, strict=True):
        x, y = ([i for i, count in enumerate(row.long().tolist()) for _ in range(count)] for row in (w, v))
        sides = []
        for rows, drawn in ((samples, x), (reference, y)):
            pairs = [
                kernel(rows[a], rows[b], 2.0)
                for i, a in enumerate(drawn)
                for j, b in enumerate(drawn)
                if i != j and a != b  # two copies of one row say nothing
            ]
            sides.append(sum(pairs) / len(pairs))
        between = [kernel(samples[a], reference[b], 2.0) for a in x for b in y]
        assert float(value) == pytest.approx(sum(sides) - 2 * sum(between) / len(between), abs=1e-12)


@pytest.mark.parametrize(("p", "q"), [(SOME, OTHER), (SOME, SOME)])
def test_squared_mmd_is_unbiased_for_the_exact_distance(p, q):
    values = torch.cat([squared_mmd(draw(p, 12), draw(q, 15), 1.5) for _ in range(3000)])
    standard_error = float(values.std()) / math.sqrt(len(values))
    assert float(values.mean()) == pytest.approx(exact_squared_mmd(p, q, 1.5), abs=4 * standard_error)
    assert standard_error < 0.003


def test_bootstrapped_intervals_hold_the_exact_distance_about_as_often_as_they_say():
    exact, held, spread, said = exact_squared_mmd(SOME, OTHER, 1.5), 0, [], []
    for _ in range(300):
        samples, reference = draw(SOME, 60), draw(OTHER, 80)
        weights = [resampling_weights(n, 100, torch.device("cpu")).to(DOUBLE) for n in (60, 80)]
        values = squared_mmd(samples, reference, 1.5, *weights)
        error = float(values[1:].std())
        held += abs(float(values[0]) - exact) < 1.96 * error
        spread.append(values[0])
        said.append(error)
    assert 0.88 < held / 300 < 0.99
    assert float(torch.tensor(said).mean()) == pytest.approx(float(torch.stack(spread).std()), rel=0.2)


def correlated(number: int, even: bool) -> Tensor:
    """Fair coins in pairs whose sum is even, or odd: every single bit looks the same, only pairs tell."""
    first = torch.randint(2, (number, 4)).float()
    return torch.cat([first, first if even else 1 - first], 1)


def accuracy(samples: Tensor, reference: Tensor, kind: str) -> float:
    """Share of rows on the right side."""
    return float(torch.cat(classifier_two_sample(samples, reference, kind, seed=0)).mean())


@pytest.mark.parametrize("kind", ["linear", "kernel"])
def test_classifier_cannot_tell_two_halves_of_one_set(kind):
    rows = correlated(400, even=True)
    assert accuracy(rows[:200], rows[200:], kind) == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 400))


def test_classifier_tells_different_sets_and_only_the_kernel_sees_pairs():
    biased = (torch.rand(300, 8) < 0.7).float()
    fair = (torch.rand(300, 8) < 0.5).float()
    assert accuracy(biased, fair, "linear") > 0.6
    assert accuracy(biased, fair, "kernel") > 0.6
    even, odd = correlated(300, even=True), correlated(300, even=False)
    assert accuracy(even, odd, "kernel") > 0.95
    assert accuracy(even, odd, "linear") < 0.6


def test_classifier_gets_as_many_rows_of_either_side():
    right = classifier_two_sample(correlated(40, even=True), correlated(25, even=False), "kernel", seed=0)
    assert [tuple(part.shape) for part in right] == [(25,), (25,)]


@pytest.mark.parametrize("at_once", [2**24, 10])
def test_nearest_is_the_minimum_over_all_rows(at_once, monkeypatch):
    monkeypatch.setattr(two_samples, "PAIRS_AT_ONCE", at_once)
    bits, pool = torch.randint(2, (13, 9)).float(), torch.randint(2, (8, 9)).float()
    distances, indices = nearest(bits, pool)
    everything = torch.tensor([[float((x != y).sum()) for y in pool] for x in bits])
    assert torch.equal(distances, everything.min(1).values)
    assert torch.equal(everything.gather(1, indices.unsqueeze(1)).squeeze(1), distances)
    among, _ = nearest(pool, pool, among_itself=True)
    assert among.tolist() == [min(float((x != y).sum()) for j, y in enumerate(pool) if j != i) for i, x in enumerate(pool)]
