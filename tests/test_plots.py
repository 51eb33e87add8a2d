import numpy as np
import pytest
import torch

from trainbook import plots
from trainbook.fitting import Stage, planned_rates
from trainbook.optimization import OptimizationConfig
from trainbook.state import TrainState


def test_validation_is_drawn_over_what_the_training_batches_have():
    history = [{"step": s, "stage": "fit", "loss": 1.0 / s, "n": 3} for s in (1, 2, 3)]
    history[1] |= {"valid_loss": 0.7, "valid_accuracy": 0.5}
    figure = plots.record_curves(history)
    panels = {panel.get_title(): panel.lines for panel in figure.axes if panel.lines}
    assert panels.keys() == {"loss", "valid accuracy"}
    training, validation = panels["loss"]
    np.testing.assert_allclose(training.get_xydata(), [(1, 1), (2, 1 / 2), (3, 1 / 3)])
    np.testing.assert_allclose(validation.get_xydata(), [(2, 0.7)])
    assert validation.get_label() == "fit, validation"


def test_the_schedule_is_drawn_as_torch_will_follow_it():
    config = OptimizationConfig(schedule="cosine", learning_rate=0.3, optimizer="sgd")
    state = TrainState({}, stateful={"first": Stage("first", torch.nn.Linear(2, 2), config, 2000), "other": object()})
    figure = plots.schedules(planned_rates(state))
    (line,) = figure.axes[0].lines
    steps, rates = line.get_xydata().T
    assert figure.axes[0].get_title() == "first: learning rate"
    assert len(steps) <= 501
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2000)
    expected = []
    for _ in range(2000):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([expected[int(step)] for step in steps], rel=1e-6)
