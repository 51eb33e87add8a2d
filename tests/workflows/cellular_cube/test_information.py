"""Information against closed forms, enumeration and scipy; the chance floors stay at chance."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from trainbook.workflows.cellular_cube.flow import cell_sensitivity, lesion_curve, saliency_path
from trainbook.workflows.cellular_cube.information import (
    active_fraction,
    box_counting_slope,
    eta_squared,
    expert_information,
    gate_specialisation,
    hoyer_sparsity,
    mutual_information,
    transfer_entropy,
)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9])
def test_mutual_information_of_gaussians_is_within_a_tenth_of_the_closed_form(rho):
    dimensions, number = 4, 5000
    x, noise = gaussian(number, dimensions), gaussian(number, dimensions, seed=1)
    y = (rho * x + math.sqrt(1 - rho**2) * noise) @ torch.linalg.qr(gaussian(dimensions, dimensions, seed=2)).Q
    found = mutual_information(x, y, seed=0)
    assert found.value == pytest.approx(-dimensions / 2 * math.log(1 - rho**2), rel=0.1)
    assert found.floor < 0.02
    assert found.p_value == pytest.approx(1 / 21)
    chance = mutual_information(x, noise, seed=0)
    assert chance.value < 2 * chance.floor + 0.01
    assert mutual_information(x, torch.zeros(number, 3), seed=0).value == 0


def test_transfer_entropy_is_what_a_linear_channel_adds():
    number, gain, noise = 6000, 0.8, 0.5
    source, target = gaussian(number, 2), gaussian(number, 2, seed=1)
    following = 0.7 * target + gain * source + noise * gaussian(number, 2, seed=2)
    found = transfer_entropy(source, target, following, seed=0)
    assert found.value == pytest.approx(2 * 0.5 * math.log((gain**2 + noise**2) / noise**2), rel=0.1)
    assert found.floor < 0.02
    nothing = transfer_entropy(source, target, target + 0.5 * gaussian(number, 2, seed=3), seed=0)
    assert nothing.value < 0.02
    redundant = transfer_entropy(target, target, following, seed=0)  # the source says nothing that the target does not
    assert redundant.value < 0.02


def test_expert_information_matches_the_joint_table():
    weights = torch.softmax(gaussian(60, 3).double(), 1)
    groups = torch.arange(60) % 4
    joint = np.array([[weights[groups == g, e].sum().item() / 60 for e in range(3)] for g in range(4)])
    expected = sum(
        joint[g, e] * math.log(joint[g, e] / joint[g].sum() / joint[:, e].sum()) for g, e in itertools.product(range(4), range(3))
    )
    assert expert_information(weights, groups, seed=0).value == pytest.approx(expected, abs=1e-9)
    exact = expert_information(torch.eye(3).repeat(40, 1), torch.arange(120) % 3, seed=0)
    assert exact.value == pytest.approx(math.log(3))
    assert exact.p_value == pytest.approx(1 / 21)
    assert exact.floor < 0.1


def test_gate_specialisation_is_zero_for_mixers_and_log_3_for_specialists():
    assert gate_specialisation(torch.full((2, 5, 3), 1 / 3)) == pytest.approx(0, abs=1e-7)
    assert gate_specialisation(torch.eye(3).repeat(4, 1)) == pytest.approx(math.log(3))


def test_eta_squared_is_the_f_statistic_and_shuffled_labels_lose_it():
    labels = torch.arange(90) % 3
    energies = gaussian(90, 4) + labels[:, None] * torch.tensor([2.0, 1.0, 0.0, 0.0])
    energies[:, 3] = 7.0
    shares, summary = eta_squared(energies, labels, seed=0, num_shuffles=50)
    for cell in range(3):
        f = stats.f_oneway(*(energies[labels == label, cell].numpy() for label in range(3))).statistic
        assert shares[cell] == pytest.approx(f * 2 / (f * 2 + 87), rel=1e-4)
    assert shares[3] == 0
    assert summary.value == pytest.approx(shares.mean())
    assert summary.p_value == pytest.approx(1 / 51)
    assert eta_squared(gaussian(90, 4, seed=5), labels, seed=0, num_shuffles=50)[1].p_value > 0.05


def test_sparsity_of_known_vectors():
    assert hoyer_sparsity(torch.eye(5)) == pytest.approx(1)
    assert hoyer_sparsity(torch.ones(2, 9)) == pytest.approx(0, abs=1e-6)
    assert active_fraction(torch.tensor([[0.0, 1.0, 0.001, -1.0]])) == 0.5


def test_box_counting_slopes_of_known_figures():
    carpet = torch.ones(1, 1, dtype=torch.bool)
    for _ in range(3):
        row = torch.cat([carpet] * 3, 1)
        carpet = torch.cat([row, torch.cat([carpet, torch.zeros_like(carpet), carpet], 1), row])
    plane, line = torch.ones(27, 27, dtype=torch.bool), torch.eye(27, dtype=torch.bool)
    point = torch.zeros(27, 27, dtype=torch.bool)
    point[4, 20] = True
    found = box_counting_slope(torch.stack([plane, line, carpet, point, torch.zeros_like(point)]))
    assert found[:4].tolist() == pytest.approx([2, 1, math.log(8) / math.log(3), 0], abs=1e-9)
    assert math.isnan(found[4])
    assert box_counting_slope(torch.ones(1, 12, 12, dtype=torch.bool)).item() == pytest.approx(2)


class ToyCube:
    """States (B, 3, 2, 2, 1) move one plane per step times `gain`; the output reads the last plane."""

    def __init__(self, gain=2.0):
        self.x = gaussian(5, 3, 2, 2, 1)
        self.gain = gain
        self.num_steps = 2

    def __call__(self, watch):
        state = self.x
        for step in range(self.num_steps + 1):
            if step:
                state = torch.cat([torch.zeros_like(state[:, :1]), self.gain * state[:, :-1]], 1)
            changed = watch(step, state, None)
            state = state if changed is None else changed
        return state[:, -1].flatten(1)


def test_sensitivity_follows_the_light_cone_and_matches_finite_differences():
    toy = ToyCube()
    found = cell_sensitivity(toy, seed=0, num_probes=2).sum((2, 3))
    expected = torch.zeros(3, 3)
    expected[0, 0], expected[1, 1], expected[2, 2] = 4 * 2.0**4, 4 * 2.0**2, 4.0  # four cells, squared gain to the output
    torch.testing.assert_close(found, expected)

    def moved(step, state, weights):
        return state + 1e-2 * torch.eye(4).view(4, 1, 2, 2, 1).sum(0) if step == 1 else None

    difference = ((toy(moved) - toy(lambda *_: None)) / 1e-2).square().mean(0)
    torch.testing.assert_close(difference, torch.full((4,), 4.0), rtol=1e-3, atol=1e-3)
    path = saliency_path(cell_sensitivity(toy, seed=0))
    assert path[:, 0].tolist() == [0, 1, 2]


def test_a_lesion_costs_all_where_the_signal_is_and_nothing_elsewhere():
    toy = ToyCube()
    target = toy(lambda *_: None)
    torch.testing.assert_close(lesion_curve(toy, target, 2, 3), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
