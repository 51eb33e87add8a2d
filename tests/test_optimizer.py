"""Parameter groups and optimizers against their formulas."""

import pytest
import torch
from torch import nn

from tests.small_network import examples, gradient_of, loss_of, small_network, stepper_of, weights_of
from trainbook.optimization import OptimizationConfig
from trainbook.optimizer import parameter_groups
from trainbook.stepper import Stepper


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.convolution = nn.Embedding(4, 6), nn.Conv2d(1, 2, 3)
        self.batch_norm, self.layer_norm, self.square_norm = nn.BatchNorm2d(2), nn.LayerNorm(6), nn.LayerNorm((2, 6))
        self.linear, self.tied, self.frozen = nn.Linear(6, 4), nn.Linear(6, 4, bias=False), nn.Linear(2, 2)
        self.tied.weight = self.embedding.weight
        self.hidden_bias, self.scale = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.ones(()))
        self.frozen.requires_grad_(False)


def test_only_matrices_outside_norms_decay_and_each_parameter_comes_once():
    module = Mixed()
    names = {id(p): name for name, p in module.named_parameters()}
    decayed, undecayed = parameter_groups(module, 0.1)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    assert [names[id(p)] for p in decayed["params"]] == ["embedding.weight", "convolution.weight", "linear.weight"]
    assert sorted(names[id(p)] for p in undecayed["params"]) == sorted(
        ["convolution.bias", "linear.bias", "hidden_bias", "scale"]
        + [f"{norm}_norm.{kind}" for norm in ("batch", "layer", "square") for kind in ("weight", "bias")]
    )


def test_a_group_without_parameters_is_left_out():
    assert [group["weight_decay"] for group in parameter_groups(nn.Linear(2, 2, bias=False), 0.3)] == [0.3]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_decay_shrinks_the_weight_by_the_formula_and_spares_the_bias(optimizer):
    network = nn.Linear(3, 2)
    weight, bias = network.weight.detach().clone(), network.bias.detach().clone()
    stepper = stepper_of(network, optimizer=optimizer, learning_rate=0.1, weight_decay=0.5)
    stepper.step(torch.zeros(4, 3), lambda module, batch: (module(batch) * 0).sum())  # gradient 0: only the decay acts
    torch.testing.assert_close(network.weight.detach(), weight * (1 - 0.1 * 0.5))
    assert torch.equal(network.bias, bias)


def test_steps_of_sgd_follow_the_heavy_ball_by_hand():
    network = small_network(torch.float64)
    stepper = stepper_of(network, optimizer="sgd", momentum=0.7, weight_decay=0.0, learning_rate=0.05)
    weights, velocity = weights_of(network), 0.0
    for step in range(4):
        stepper.step(examples(6, torch.float64, seed=step), loss_of)
        velocity = 0.7 * velocity + gradient_of(network)
        weights = weights - 0.05 * velocity
        torch.testing.assert_close(weights_of(network), weights, rtol=1e-12, atol=1e-12)


def test_a_parameter_can_have_a_rate_of_its_own():
    """One group per factor and decay; with a factor of 2 a weight moves twice as far."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight.rate_factor = 2.0
    groups = parameter_groups(model, 0.1)
    assert [(group["rate_factor"], len(group["params"])) for group in groups] == [(1.0, 1), (2.0, 1)]
    config = OptimizationConfig(optimizer="sgd", momentum=0.0, weight_decay=0.0, learning_rate=0.1)
    before = [layer.weight.detach().clone() for layer in model]
    Stepper(model, config, 1).step(torch.zeros(3, 2), lambda module, batch: module[0].weight.sum() + module[1].weight.sum())
    moved = [float((layer.weight.detach() - start).mean()) for layer, start in zip(model, before, strict=True)]
    assert moved == pytest.approx([-0.1, -0.2])
