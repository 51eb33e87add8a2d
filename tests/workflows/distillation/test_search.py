"""Successive halving: near the optimum for a quarter of a grid's cost, and never worse than the default."""

import json
import math

import numpy as np
import pytest
import torch

from trainbook.workflows.distillation.search import (
    Span,
    choose,
    draw_arms,
    judge,
    log_rows,
    mean_losses,
    next_size,
    num_rungs,
    survivors,
)

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


def halving(arms, response, epochs=2):
    """Train every rung; returns the chosen arm, the NLLs of the last rung, the epochs it took, and the log."""
    cost, rows, nll = 0, [], []
    for rung in range(num_rungs(len(arms))):
        if rung:
            arms = survivors(arms, nll)
            epochs *= 3
        nll = [response(arm, epochs) for arm in arms]
        rows += log_rows(rung, epochs, arms, nll)
        cost += epochs * len(arms)
    return choose(arms, nll), nll, cost, rows


def around(value, spread=0.02):
    """Examples' NLLs around a mean."""
    noise = np.random.default_rng(0).normal(0.0, 1.0, EXAMPLES)
    return value + spread * (noise - noise.mean())


def smooth(arm, epochs):
    return around(surface(arm, epochs))


def test_rungs_are_those_of_the_note():
    assert [next_size(number) for number in (27, 9)] == [9, 3]
    assert [num_rungs(number) for number in (2, 3, 8, 9, 27, 81)] == [1, 1, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(5))
def test_search_comes_near_the_optimum_for_a_quarter_of_a_grid(seed):
    arm, _, cost, _ = halving(draw_arms(SPACE, DEFAULT, 27, seed), smooth)
    assert cost == 27 * 2 + 9 * 6 + 3 * 18
    assert cost <= 0.25 * 4 * 4 * 3 * 20
    assert surface(arm, 18) <= 1.05 * (OPTIMUM + 0.3 / 18)


@pytest.mark.parametrize("seed", range(30))
def test_search_is_never_worse_than_the_default(seed):
    """On surfaces without any order, where short training says nothing of long training, and arms fail."""
    generator = np.random.default_rng(seed)

    def response(arm, epochs):
        if arm != DEFAULT and generator.random() < 0.2:
            return None
        return generator.gamma(1.0, 0.3, EXAMPLES) * generator.uniform(0.5, 2.0)

    arm, nll, _, rows = halving(draw_arms(SPACE, DEFAULT, 27, seed), response)
    assert mean_losses(nll)[judge(nll).place] <= mean_losses(nll)[0]
    last = [row for row in rows if row["rung"] == 2]
    chosen = next(row for row in last if {name: row[name] for name in SPACE} == arm)
    assert chosen["valid_nll"] <= next(row["valid_nll"] for row in last if row["is_default"])
    assert [sum(row["is_default"] for row in rows if row["rung"] == rung) for rung in range(3)] == [1, 1, 1]


def test_an_arm_within_one_standard_error_does_not_replace_the_default():
    noise = np.random.default_rng(0).normal(0.0, 1.0, EXAMPLES)
    noise = (noise - noise.mean()) / noise.std(ddof=1)  # the error of its mean is 1 / sqrt(EXAMPLES)
    for gain, place in ((0.9, 0), (1.1, 1)):
        found = judge([np.full(EXAMPLES, 5.0), 5.0 + noise - gain / math.sqrt(EXAMPLES)])
        assert found.place == place
        assert found.gain == pytest.approx(gain / math.sqrt(EXAMPLES))
        assert found.standard_error == pytest.approx(1 / math.sqrt(EXAMPLES))
        assert ("it stays" in found.why) is (place == 0)


def test_the_same_seed_gives_the_same_search():
    one, two = (halving(draw_arms(SPACE, DEFAULT, 27, 3), smooth) for _ in range(2))
    assert one[0] == two[0]
    assert one[3] == two[3]
    assert draw_arms(SPACE, DEFAULT, 27, 3) != draw_arms(SPACE, DEFAULT, 27, 4)


def test_arms_fill_the_space_and_the_default_is_the_first():
    arms = draw_arms(SPACE, DEFAULT, 65, 0)
    assert arms[0] == DEFAULT
    temperatures = sorted(arm["temperature"] for arm in arms[1:])
    assert 1.0 <= temperatures[0] < 1.2
    assert 8.0 < temperatures[-1] <= 10.0
    assert np.mean(np.array(temperatures) < math.sqrt(10)) == pytest.approx(0.5, abs=0.05)
    assert {arm["loss"] for arm in arms} == {"kd", "dkd", "dist"}
    with pytest.raises(ValueError, match="the space"):
        draw_arms(SPACE, {"alpha": 0.5}, 3, 0)


def test_the_best_others_go_on_behind_the_default():
    nll = [torch.full((4,), value) for value in (9.0, 3.0, 1.0, 8.0, 2.0, 7.0, 6.0, 5.0, 4.0)]
    assert survivors(list("abcdefghi"), nll) == ["a", "c", "e"]


def test_every_arm_of_every_rung_is_logged_as_json():
    _, _, _, rows = halving(draw_arms(SPACE, DEFAULT, 27, 0), smooth)
    assert [json.loads(json.dumps(row, allow_nan=False)) for row in rows] == rows
    assert [sum(row["rung"] == rung for row in rows) for rung in range(3)] == [27, 9, 3]


def test_an_arm_that_diverged_is_last_and_logged_without_a_number():
    arms = draw_arms(SPACE, DEFAULT, 4, 0)
    nll = [np.full(EXAMPLES, 1.0), np.full(EXAMPLES, math.nan), None, np.full(EXAMPLES, 2.0)]
    assert survivors(arms, nll) == [arms[0], arms[3]]
    assert [row["valid_nll"] for row in log_rows(0, 1, arms, nll)] == [1.0, None, None, 2.0]
    assert choose(arms, nll) == arms[0]


def test_a_default_that_fails_is_an_error():
    with pytest.raises(ValueError, match="default configuration failed"):
        judge([None, np.full(EXAMPLES, 1.0)])
