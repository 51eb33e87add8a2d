"""The networks have the sizes that the brief's research recovered, and count their own work correctly."""

import pytest
import torch

from trainbook.workflows.distillation.networks import family, multiply_accumulates, num_parameters

GREY, DIGIT, COLOUR = (1, 28, 28), (1, 8, 8), (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "width", "shape", "parameters"),
    [
        ("resnet18", 64, GREY, 11_172_810),
        ("resnet18", 16, GREY, 701_178),
        ("mobilenet", 32, GREY, 273_674),
        ("simple_cnn", 32, GREY, 130_890),
        ("resnet8", 16, DIGIT, 77_754),
        ("small_cnn", 8, DIGIT, 1_922),
        ("resnet18", 64, COLOUR, 11_173_962),  # the count that the original printed: that of three channels
    ],
)
def test_parameters(name, width, shape, parameters):
    assert num_parameters(family(name, shape, 10)(width)) == parameters


@pytest.mark.parametrize(
    ("name", "width", "millions"), [("resnet18", 64, 455.8), ("mobilenet", 32, 14.3), ("simple_cnn", 32, 5.7)]
)
def test_multiply_accumulates(name, width, millions):
    assert multiply_accumulates(family(name, GREY, 10)(width), GREY) / 1e6 == pytest.approx(millions, abs=0.05)


def test_multiply_accumulates_by_hand():
    """One convolution 1 -> 2 on 8 x 8, one 2 -> 4 on 4 x 4, and 16 x 10 of the output."""
    assert multiply_accumulates(family("small_cnn", DIGIT, 10)(2), DIGIT) == 2 * 9 * 64 + 4 * 2 * 9 * 16 + 16 * 10


@pytest.mark.parametrize("name", ["resnet18", "resnet8", "mobilenet", "simple_cnn", "small_cnn"])
@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_logits_do_not_depend_on_whether_features_are_asked_for(name, shape):
    network = family(name, shape, 7)(4).eval()
    images = torch.rand(3, *shape)
    outputs = network(images, features=True)
    assert torch.equal(outputs.logits, network(images))
    assert outputs.logits.shape == (3, 7)
    assert outputs.features.ndim == 2
    assert outputs.feature_map.ndim == 4
    assert torch.equal(network.output(outputs.features), outputs.logits)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet", "simple_cnn", "small_cnn"])
def test_parameters_grow_with_the_width(name):
    counts = [num_parameters(family(name, GREY, 10)(width)) for width in (1, 2, 3, 8, 20)]
    assert counts == sorted(set(counts))
