"""The chain's sizes, widths, teachers and acceptance."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from trainbook.workflows.distillation.ladder import (
    accept_assistant,
    geometric_sizes,
    leading_channels,
    solve_width,
    teachers_at,
    teachers_of,
)


@pytest.mark.parametrize("assistants", [0, 1, 2, 5])
def test_sizes_fall_by_the_same_factor(assistants):
    sizes = geometric_sizes(11_172_810, 273_674, assistants)
    assert (sizes[0], sizes[-1], len(sizes)) == (11_172_810, 273_674, assistants + 2)
    factors = [a / b for a, b in pairwise(sizes)]
    assert factors == pytest.approx([factors[0]] * len(factors), rel=1e-4)


def test_a_ladder_does_not_go_up():
    with pytest.raises(ValueError, match="goes down"):
        geometric_sizes(100, 100, 1)


def count(width):
    """Parameters of two convolutions and a classifier, in closed form."""
    model = nn.Sequential(nn.Conv2d(1, width, 3), nn.Conv2d(width, 2 * width, 3), nn.Linear(2 * width, 10))
    number = sum(parameter.numel() for parameter in model.parameters())
    assert number == 10 * width + 2 * width * (9 * width + 1) + 20 * width + 10
    return number


@pytest.mark.parametrize("wanted", [410, 1_120, 5_000, 20_000, 60_000])
def test_width_is_the_best_there_is(wanted):
    width = solve_width(count, wanted, 1, 64)
    assert abs(count(width) - wanted) <= 0.1 * wanted
    assert width == min(range(1, 65), key=lambda w: abs(count(w) - wanted))


def test_a_size_outside_the_family_is_refused():
    with pytest.raises(ValueError, match="no width"):
        solve_width(count, 10**7, 1, 64)


def test_teachers_are_the_one_before_or_all_before():
    assert [teachers_of(stage, "takd") for stage in (1, 2, 3)] == [(0,), (1,), (2,)]
    assert [teachers_of(stage, "dgkd") for stage in (1, 2, 3)] == [(0,), (0, 1), (0, 1, 2)]
    with pytest.raises(ValueError, match="modes"):
        teachers_of(2, "other")
    with pytest.raises(ValueError, match="no teachers"):
        teachers_of(0, "takd")


def test_a_quarter_of_the_teachers_is_left_out_and_never_all():
    steps = 4000
    drawn = [teachers_at((0, 1, 2), 7, step) for step in range(steps)]
    assert all(drawn)
    counts = Counter(teacher for teachers in drawn for teacher in teachers)
    error = 5 * math.sqrt(steps * 0.25 * 0.75)
    assert counts[0] == pytest.approx(0.75 * steps, abs=error)
    assert counts[1] == pytest.approx(0.75 * steps, abs=error)
    assert counts[2] == pytest.approx((0.75 + 0.25**3) * steps, abs=error)  # it stays when all would go
    together = sum(0 in teachers and 1 in teachers for teachers in drawn)
    assert together == pytest.approx(0.75**2 * steps, abs=error)


def test_left_out_teachers_are_a_function_of_seed_and_step():
    first = [teachers_at((0, 1, 2), 7, step) for step in range(50)]
    assert [teachers_at((0, 1, 2), 7, step) for step in reversed(range(50))] == first[::-1]
    assert [teachers_at((0, 1, 2), 8, step) for step in range(50)] != first
    assert [teachers_at((4,), 7, step) for step in range(50)] == [(4,)] * 50


def two_layers(width):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 2 * width, 3))


def test_leading_channels_compute_what_the_wide_network_computes_with_its_other_channels_at_zero():
    torch.manual_seed(0)
    wide, narrow = two_layers(5).eval(), two_layers(3).eval()
    narrow.load_state_dict(leading_channels(wide.state_dict(), narrow.state_dict()))
    images = torch.randn(2, 1, 7, 7)
    with torch.no_grad():
        hidden = wide[1](wide[0](images))
        hidden[:, 3:] = 0
        torch.testing.assert_close(narrow(images), wide[2](hidden)[:, :6])


def test_only_a_wider_network_of_the_same_family_can_be_cut():
    wide, narrow = two_layers(5).state_dict(), two_layers(3).state_dict()
    for one, other in ((narrow, wide), (wide, nn.Linear(2, 2).state_dict())):
        with pytest.raises(ValueError, match="family"):
            leading_channels(one, other)


def test_bootstrap_error_is_that_of_a_mean():
    generator = np.random.default_rng(0)
    with_it, without = generator.gamma(1.0, 0.3, 400), generator.gamma(1.0, 0.3, 400)
    found = accept_assistant(with_it, without, 0)
    gains = without - with_it
    assert found.gain == pytest.approx(gains.mean())
    assert found.standard_error == pytest.approx(gains.std() / math.sqrt(400), rel=0.08)
    assert found == accept_assistant(with_it, without, 0)


def test_an_assistant_stays_for_more_than_one_standard_error():
    generator = np.random.default_rng(0)
    nll = generator.gamma(1.0, 0.3, 400)
    noise = generator.normal(0.0, 0.2, 400)
    noise -= noise.mean()  # the error of the mean gain is 0.01
    assert accept_assistant(nll, nll + noise + 0.03, 0).accepted
    assert not accept_assistant(nll, nll + noise + 0.005, 0).accepted
    assert not accept_assistant(nll, nll - 0.03, 0).accepted
    assert not accept_assistant(nll, nll, 0).accepted
