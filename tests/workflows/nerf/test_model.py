"""Encoding, fields and renderer against direct formulas, scipy and concatenation."""

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import RegularGridInterpolator
from torch.nn.functional import relu, softplus

from trainbook.workflows.nerf.config import Config
from trainbook.workflows.nerf.model import FIELDS, GridField, PositionalField, Renderer, positional_encoding, render_view


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def config(**fields):
    return Config.from_preset("smoke", fields)


def points(num_rays=7, num_samples=5):
    directions = torch.nn.functional.normalize(torch.randn(num_rays, 3), dim=-1)
    return torch.rand(num_rays, num_samples, 3) * 2 - 1, directions


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-3)])
def test_encoding_is_sines_and_cosines_of_octaves(dtype, tolerance):
    values = (torch.rand(50, 3, dtype=torch.float64) * 2 - 1).to(dtype)
    expected = [values.double()]
    for octave in range(10):
        angles = 2**octave * math.pi * values.double()
        expected += [angles.sin(), angles.cos()]
    found = positional_encoding(values, 10)
    torch.testing.assert_close(found.double(), torch.cat(expected, -1), rtol=0, atol=tolerance)


def test_the_mlp_is_the_network_that_concatenates_for_every_sample():
    field = PositionalField(config(depth=6))
    positions, directions = points()
    encoded = positional_encoding(positions, field.position_frequencies)
    h = relu(encoded @ field.first.weight.T + field.first.bias)
    for index, layer in enumerate(field.hidden):
        weight, entering = layer.weight, h
        if index == 2:  # in the middle of five hidden layers
            weight, entering = torch.cat([weight, field.skip.weight], 1), torch.cat([h, encoded], -1)
        h = relu(entering @ weight.T + layer.bias)
    seen_from = positional_encoding(directions, field.direction_frequencies)[:, None].expand(-1, 5, -1)
    weight = torch.cat([field.features.weight, field.direction.weight], 1)
    colour = relu(torch.cat([h, seen_from], -1) @ weight.T + field.features.bias) @ field.colour.weight.T + field.colour.bias
    density, found = field(positions, directions)
    torch.testing.assert_close(found, colour.sigmoid())
    torch.testing.assert_close(density, softplus(h @ field.density.weight.T + field.density.bias)[..., 0])


def test_the_grid_is_interpolated_linearly():
    field = GridField(config(grid_size=6))
    torch.nn.init.normal_(field.grid)
    positions, directions = points()
    axis = np.linspace(-1, 1, 6)
    values = field.grid[0, 0].detach().numpy()  # its axes are z, y, x
    expected = RegularGridInterpolator((axis, axis, axis), values)(positions.flip(-1).numpy())
    expected = np.logaddexp(0, expected) * 5 / 2.5  # softplus; five voxels along an edge of length 2.5
    np.testing.assert_allclose(field(positions, directions)[0].detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("name", FIELDS)
def test_density_does_not_depend_on_the_direction_and_colour_does(name):
    field = FIELDS[name](config())
    positions, directions = points()
    first, second = field(positions, directions), field(positions, -directions)
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


@pytest.mark.parametrize("name", FIELDS)
def test_only_training_draws_random_numbers_and_chunks_change_nothing(name):
    renderer = Renderer(FIELDS[name](config()), config())
    directions = torch.nn.functional.normalize(0.1 * torch.randn(9, 3) - torch.eye(3)[2], dim=-1)
    rays = torch.tensor([[0.0, 0.0, 4.0]]).expand(9, 3), directions
    trained = renderer(*rays), renderer(*rays)
    assert not torch.equal(trained[0].colour, trained[1].colour)
    renderer.eval()
    whole = render_view(renderer, rays)
    torch.testing.assert_close(whole.colour, render_view(renderer, rays, chunk=4).colour)
    assert torch.equal(whole.colour, render_view(renderer, rays).colour)


def test_compositing_stays_in_float32_under_autocast():
    renderer = Renderer(PositionalField(config()), config())
    rays = torch.tensor([[0.0, 0.0, 4.0]]), torch.tensor([[0.0, 0.0, -1.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert {part.dtype for part in renderer(*rays)} == {torch.float32}


def test_computing_activations_again_leaves_the_gradient_as_it_is():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(1)
        renderer = Renderer(PositionalField(config()), config(gradient_checkpointing=recompute))
        rays = torch.tensor([[0.0, 0.0, 4.0]]).expand(3, 3), torch.tensor([[0.0, 0.0, -1.0]]).expand(3, 3)
        renderer(*rays).colour.sum().backward()
        gradients.append(renderer.field.first.weight.grad)
    assert torch.equal(*gradients)
