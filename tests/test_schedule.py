"""Learning rates against torch's schedulers and by hand."""

import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tests.small_network import examples, gradient_of, loss_of, small_network, stepper_of, weights_of
from trainbook.optimization import OptimizationConfig
from trainbook.schedule import learning_rate


def rates(total_steps, **choices):
    config = OptimizationConfig(**choices)
    return [learning_rate(config, step, total_steps) for step in range(total_steps)]


def torch_rates(total_steps, rate, make_scheduler):
    """The rates that torch's scheduler gives to the optimizer, step by step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = make_scheduler(optimizer)
    found = []
    for _ in range(total_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step() if len(found) < total_steps else None
    return found


@pytest.mark.parametrize("total_steps", [1, 2, 3, 7, 10, 100, 997])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "step", "one_cycle"])
def test_schedules_match_those_of_torch_at_every_step(schedule, share, total_steps):
    divisor = 1 / (25 * share) if share else math.inf  # OneCycleLR divides its start by this to get its end
    peers = {
        "constant": lambda o: lr_scheduler.ConstantLR(o, 1.0),
        "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=total_steps, eta_min=0.3 * share),
        "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, share, total_iters=total_steps),
        "step": lambda o: lr_scheduler.StepLR(o, step_size=4, gamma=0.5),
        "one_cycle": lambda o: lr_scheduler.OneCycleLR(
            o, 0.3, total_steps=total_steps, final_div_factor=divisor, cycle_momentum=False
        ),
    }
    ours = rates(total_steps, schedule=schedule, learning_rate=0.3, final_learning_rate_share=share, step_size=4, step_factor=0.5)
    assert ours == pytest.approx(torch_rates(total_steps, 0.3, peers[schedule]), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "step", "one_cycle"])
def test_warm_up_rises_in_equal_steps_to_the_start_of_any_schedule(schedule):
    choices = {"schedule": schedule, "learning_rate": 0.2, "step_size": 3}
    warm, plain = rates(17, warmup_steps=4, **choices), rates(13, **choices)
    assert warm[4:] == plain
    assert warm[:4] == pytest.approx([plain[0] * share for share in (0.2, 0.4, 0.6, 0.8)])


def test_hand_computed_rates():
    assert rates(4, schedule="cosine", learning_rate=1.0) == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])
    assert rates(6, schedule="linear", learning_rate=1.0, warmup_steps=1, final_learning_rate_share=0.5) == pytest.approx(
        [0.5, 1.0, 0.9, 0.8, 0.7, 0.6]
    )


def test_rates_stay_at_the_end_after_the_last_step_and_below_the_peak_in_an_endless_warm_up():
    for schedule in ("cosine", "linear", "one_cycle"):
        config = OptimizationConfig(schedule=schedule, learning_rate=0.5, final_learning_rate_share=0.1)
        assert learning_rate(config, 1000, 10) == pytest.approx(0.05)
    assert rates(3, warmup_steps=9, learning_rate=1.0) == pytest.approx([0.1, 0.2, 0.3])


def test_the_rate_reaches_the_optimizer():
    network = small_network()
    stepper = stepper_of(network, 10, optimizer="sgd", momentum=0.0, weight_decay=0.0, schedule="linear", learning_rate=0.4)
    for step in range(6):
        before = weights_of(network)
        report = stepper.step(examples(4), loss_of)
        assert report["learning_rate"] == pytest.approx(0.4 * (1 - step / 10))
        torch.testing.assert_close(before - weights_of(network), 0.4 * (1 - step / 10) * gradient_of(network))
