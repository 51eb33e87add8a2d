"""The moving average of the weights against its closed form."""

import pytest
import torch
from torch import nn

from tests.driving import assert_identical
from tests.small_network import examples, loss_of, small_network, stepper_of, weights_of


def test_average_is_the_closed_form_sum_and_copies_batch_statistics():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    stepper = stepper_of(network, ema_decay=0.8, learning_rate=0.05)
    nn.init.ones_(network[0].weight)  # weights given to the module after the stepper was made
    history = [weights_of(network)]
    for step in range(6):
        stepper.step(examples(9, torch.float64, seed=step), loss_of)
        history.append(weights_of(network))
    expected = 0.8**6 * history[0] + sum(0.2 * 0.8 ** (6 - t) * history[t] for t in range(1, 7))
    torch.testing.assert_close(weights_of(stepper.ema), expected, rtol=1e-12, atol=1e-12)
    assert_identical(dict(stepper.ema.named_buffers()), dict(network.named_buffers()))
    assert int(stepper.ema[1].num_batches_tracked) == 6
    assert not stepper.ema.training
    assert not any(p.requires_grad for p in stepper.ema.parameters())


def test_an_average_exists_exactly_when_the_config_asks_and_a_run_without_steps_is_refused():
    network = small_network()
    assert stepper_of(network).ema is None
    assert stepper_of(network, ema_decay=0.9).ema is not None
    with pytest.raises(ValueError, match="total_steps is 0"):
        stepper_of(network, total_steps=0)
