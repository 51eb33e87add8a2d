"""What is watched is what happened, and the measures tell a specialised cube from an indifferent one."""

import math

import pytest
import torch

from trainbook.workflows.cellular_cube import observation
from trainbook.workflows.cellular_cube.observation import inside_measures, layer_similarity, num_watched, observe

SIDE, CHANNELS, STEPS = 3, 2, 2


def run(vectors, watch):
    """The code moves one plane per step; expert 0 has the front half of the planes, expert 1 the rest."""
    state = torch.zeros(len(vectors), SIDE, SIDE, SIDE, CHANNELS)
    state[:, 0] = vectors.view(-1, SIDE, SIDE, CHANNELS)
    weights = torch.zeros(*state.shape[:-1], 3)
    weights[:, :1, ..., 0] = weights[:, 1:, ..., 1] = 1
    watch(0, state, None)
    for step in range(STEPS):
        state = torch.cat([torch.zeros_like(state[:, :1]), state[:, :-1]], 1)
        watch(step + 1, state, weights)


def vectors(number):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % 2
    return torch.randn(number, SIDE * SIDE * CHANNELS, generator=generator) * (1 + 2 * labels[:, None]), labels


def test_what_is_watched_is_what_happened(monkeypatch):
    x, _ = vectors(10)
    monkeypatch.setattr(observation, "SENTENCES_AT_ONCE", 4)
    found = observe(run, x)
    for step in range(STEPS + 1):
        torch.testing.assert_close(found.front[step], x)
        expected = torch.zeros(SIDE, SIDE, SIDE)
        expected[step] = x.view(10, SIDE, SIDE, CHANNELS).square().mean((0, 3)).sqrt()
        torch.testing.assert_close(found.energies[step], expected)
    assert len(found.ahead) == STEPS
    assert not found.ahead[0].any()
    torch.testing.assert_close(found.gate[0], torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 0]]))
    assert found.cell_energies.shape == (10, SIDE**3)
    per_cell = x.view(10, -1, CHANNELS).square().mean(-1).sqrt().repeat(1, SIDE) / (STEPS + 1)
    torch.testing.assert_close(found.cell_energies, per_cell)


def test_measures_of_a_known_cube():
    x, labels = vectors(200)
    found = observe(run, x)
    metrics = inside_measures(found, labels, seed=0)
    third, rest = 1 / 3, 2 / 3
    assert metrics["cube/expert_place_information"] == pytest.approx(-third * math.log(third) - rest * math.log(rest), rel=1e-4)
    assert metrics["shuffled/expert_place_information"] < 0.02
    assert metrics["cube/expert_label_information"] == pytest.approx(0, abs=1e-6)
    assert metrics["cube/energy_by_label"] > 0.3 > 10 * metrics["shuffled/energy_by_label"]
    assert metrics["cube/energy_by_label_p_value"] < 0.05
    assert metrics["cube/front_to_back_information"] > 5 * metrics["shuffled/front_to_back_information"]
    assert metrics["cube/transfer_entropy"] > 5 * metrics["shuffled/transfer_entropy"]
    assert metrics["cube/active_cells"] == pytest.approx(1, abs=0.05)
    assert layer_similarity(found, x)["plane 2"]["cka"] == pytest.approx(1)


def test_a_large_cube_is_watched_with_fewer_sentences():
    assert num_watched(300, 8, 16) == 300
    assert num_watched(300, 37, 32) == observation.LEAST_SENTENCES
