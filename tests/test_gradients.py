"""Recomputed gradients against kept ones, and finite differences on a gradient known to be wrong."""

import pytest
import torch
from torch import nn

from tests.small_network import gradient_of
from trainbook.gradients import check_gradients, checkpointed


def test_checkpointed_blocks_have_equal_gradients_and_keep_less():
    torch.manual_seed(0)
    blocks = nn.ModuleList(
        nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.3), nn.Linear(64, 16), nn.Tanh()) for _ in range(4)
    )
    inputs, gradients, kept = torch.randn(32, 16), [], []
    for enabled in (False, True):
        sizes = {}
        blocks.zero_grad()
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.update({x.data_ptr(): x.nbytes}) or x, lambda x: x
        ):
            outputs = checkpointed(blocks, inputs, enabled)
        outputs.square().mean().backward()
        gradients.append(gradient_of(blocks).clone())
        weights = {p.data_ptr() for p in blocks.parameters()}
        kept.append(sum(size for pointer, size in sizes.items() if pointer not in weights))
    assert torch.equal(gradients[0], gradients[1])
    assert kept[1] < kept[0] / 3


class Cube(torch.autograd.Function):
    """x^3, with a backward that is right only for a factor of 3."""

    @staticmethod
    def forward(context, x, factor):
        context.save_for_backward(x)
        context.factor = factor
        return x**3

    @staticmethod
    def backward(context, gradient):
        (x,) = context.saved_tensors
        return context.factor * x**2 * gradient, None


def test_finite_differences_accept_a_right_gradient_and_name_a_wrong_one():
    inputs = {"left": torch.tensor([0.5, -1.5]), "index": torch.tensor([1, 0]), "right": torch.tensor([1.0, 2.0])}
    check_gradients(lambda left, index, right: Cube.apply(left, 3)[index] * right.sin(), inputs)
    with pytest.raises(ValueError, match="'right'"):
        check_gradients(lambda left, index, right: left[index] * Cube.apply(right, 3.03), inputs)
    with pytest.raises(ValueError, match="'left'"):
        check_gradients(lambda left, index, right: left.detach() + right, inputs)
