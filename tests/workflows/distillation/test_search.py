"""Successive halving: near the optimum for a quarter of a grid's cost, and never worse than the default."""

import json
import math

import numpy as np
import pytest

from trainbook.workflows.distillation.search import Rung, Span, draw_arms, search

RUNGS = (Rung(27, 2), Rung(9, 6), Rung(3, 18))
GRID = 4 * 4 * 3 * 20  # epochs of the paper's grid
SPACE = {
    "temperature": Span(1.0, 10.0, log=True),
    "alpha": Span(0.05, 0.95),
    "loss": ("kd", "dkd", "dist"),
}
DEFAULT = {"temperature": 4.0, "alpha": 0.5, "loss": "kd"}
OPTIMUM = 0.08  # nats
EXAMPLES = 200


def surface(arm, epochs):
    """A bowl over the space, in nats, that training approaches from above."""
    bowl = 0.02 * math.log(arm["temperature"] / 2.5) ** 2 + 0.03 * (arm["alpha"] - 0.7) ** 2
    return OPTIMUM + bowl + {"kd": 0.0, "dkd": 0.01, "dist": 0.02}[arm["loss"]] + 0.3 / epochs


def trainer(response, spread=0.02, calls=None):
    """Examples' NLLs around a response, the same examples for every arm."""
    noise = np.random.default_rng(0).normal(0.0, 1.0, EXAMPLES)

    def train(arms, epochs):
        if calls is not None:
            calls.extend((number, epochs) for number, _ in arms)
        return [response(arm, epochs) + spread * (noise - noise.mean()) for _, arm in arms]

    return train


@pytest.mark.parametrize("seed", range(5))
def test_search_comes_near_the_optimum_for_a_quarter_of_a_grid(seed):
    calls = []
    found = search(draw_arms(SPACE, DEFAULT, 27, seed), RUNGS, trainer(surface, calls=calls))
    assert sum(epochs for _, epochs in calls) <= 0.25 * GRID
    assert surface(found.arm, 18) <= 1.05 * (OPTIMUM + 0.3 / 18)


@pytest.mark.parametrize("seed", range(30))
def test_search_is_never_worse_than_the_default(seed):
    """On surfaces without any order, where short training says nothing of long training, and arms fail."""
    generator = np.random.default_rng(seed)

    def train(arms, epochs):
        failing = [number > 0 and generator.random() < 0.2 for number, _ in arms]
        values = [generator.gamma(1.0, 0.3, EXAMPLES) * generator.uniform(0.5, 2.0) for _ in arms]
        return [None if fails else value for fails, value in zip(failing, values, strict=True)]

    found = search(draw_arms(SPACE, DEFAULT, 27, seed), RUNGS, train)
    assert found.valid_nll <= found.default_valid_nll
    for level in range(len(RUNGS)):
        assert [row for row in found.rows if row["rung"] == level and row["is_default"]]


def test_an_arm_within_one_standard_error_does_not_replace_the_default():
    arms, rungs = draw_arms(SPACE, DEFAULT, 2, 0), (Rung(2, 1),)
    noise = np.random.default_rng(0).normal(0.0, 1.0, EXAMPLES)
    noise = (noise - noise.mean()) / noise.std(ddof=1)  # the error of its mean is 1 / sqrt(EXAMPLES)
    for gain, is_default in ((0.9, True), (1.1, False)):
        other = 5.0 + noise - gain / math.sqrt(EXAMPLES)
        found = search(arms, rungs, lambda *_, other=other: [np.full(EXAMPLES, 5.0), other])
        assert found.is_default is is_default
        assert ("the default stays" in found.why) is is_default


def test_the_same_seed_gives_the_same_search():
    one, two = (search(draw_arms(SPACE, DEFAULT, 27, 3), RUNGS, trainer(surface)) for _ in range(2))
    assert one == two
    assert draw_arms(SPACE, DEFAULT, 27, 3) != draw_arms(SPACE, DEFAULT, 27, 4)


def test_arms_fill_the_space_and_the_default_is_the_first():
    arms = draw_arms(SPACE, DEFAULT, 65, 0)
    assert arms[0] == DEFAULT
    temperatures = sorted(arm["temperature"] for arm in arms[1:])
    assert 1.0 <= temperatures[0] < 1.2
    assert 8.0 < temperatures[-1] <= 10.0
    assert np.mean(np.array(temperatures) < math.sqrt(10)) == pytest.approx(0.5, abs=0.05)
    assert {arm["loss"] for arm in arms} == {"kd", "dkd", "dist"}


def test_every_arm_of_every_rung_is_logged_as_json():
    found = search(draw_arms(SPACE, DEFAULT, 27, 0), RUNGS, trainer(surface))
    rows = [json.loads(json.dumps(row, allow_nan=False)) for row in found.rows]
    assert rows == found.rows
    assert [sum(row["rung"] == level for row in rows) for level in range(3)] == [27, 9, 3]
    assert [sum(row["rung"] == level and row["kept"] for row in rows) for level in range(3)] == [9, 3, 1]
    first = [row for row in rows if row["rung"] == 0]
    kept = sorted(row["valid_nll"] for row in first if row["kept"] and not row["is_default"])
    assert kept == sorted(row["valid_nll"] for row in first if not row["is_default"])[:8]


def test_an_arm_that_diverged_is_last_and_logged_without_a_number():
    def train(arms, epochs):
        return [np.full(EXAMPLES, math.nan) if number == 1 else np.full(EXAMPLES, 1.0) for number, _ in arms]

    found = search(draw_arms(SPACE, DEFAULT, 4, 0), (Rung(4, 1), Rung(2, 2)), train)
    row = next(row for row in found.rows if row["arm"] == 1)
    assert row["valid_nll"] is None
    assert not row["kept"]
    assert found.is_default


def test_a_default_that_fails_is_an_error():
    with pytest.raises(ValueError, match="default configuration failed"):
        search(draw_arms(SPACE, DEFAULT, 4, 0), (Rung(4, 1), Rung(2, 2)), lambda arms, _: [None] * len(arms))


@pytest.mark.parametrize("rungs", [(Rung(4, 1), Rung(5, 2)), (Rung(3, 1),), (Rung(4, 1), Rung(1, 2))])
def test_rungs_that_do_not_narrow_are_refused(rungs):
    with pytest.raises(ValueError, match="do not fit"):
        search(draw_arms(SPACE, DEFAULT, 4, 0), rungs, trainer(surface))
