"""Use of the hidden units against the formula, unit by unit."""

import pytest
import torch

from tests.workflows.timestep_dbn.enumeration import random_dbn
from trainbook.workflows.timestep_dbn import hidden_units
from trainbook.workflows.timestep_dbn.diffusion import flip_schedule
from trainbook.workflows.timestep_dbn.hidden_units import draw_hidden_usage, hidden_usage


@torch.no_grad()
def test_usage_is_the_mean_probability_of_every_unit(monkeypatch):
    dbn, _ = random_dbn([3, 2, 1], timesteps=2, context="bits")
    previous, noisy = ([torch.randint(2, (2, 5, size)).float() for size in (3, 2, 1)] for _ in range(2))
    monkeypatch.setattr(hidden_units, "diffuse", lambda clean, schedule, start, stop: (previous, noisy))
    usage = hidden_usage(dbn, [], flip_schedule(2, "cosine").to("cpu"))
    for index, level in enumerate(dbn.levels):
        for t in range(2):
            for unit in range(level.hidden_bias.shape[1]):
                total = 0.0
                for row in range(5):
                    signs = torch.cat([2 * bits[t, row] - 1 for bits in noisy])
                    context = signs if index == 2 else torch.cat([previous[index + 1][t, row], signs])
                    logit = level.hidden_bias[t, unit] + previous[index][t, row] @ level.weight[t, :, unit]
                    total += float((logit + context @ level.context_weight[t, :, unit]).sigmoid())
                assert float(usage[index][t, unit]) == pytest.approx(total / 5, abs=1e-6)


def test_idle_units_are_counted_on_both_sides():
    values = torch.tensor([[0.0, 0.5, 1.0, 0.99], [0.3, 0.4, 0.6, 0.03]])
    figure = draw_hidden_usage([values], ["fine"])
    assert figure.axes[0].get_title() == "fine level: 37.5% idle"
    heights, edges = zip(*((bar.get_height(), bar.get_x()) for bar in figure.axes[0].patches[:25]), strict=True)
    assert sum(heights) == 8
    assert heights[0] == 1 + 1  # 0 and 0.03
    assert edges[0] == 0
