"""Compositing against closed forms, quadrature by scipy and the textbook's loop."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from trainbook.workflows.nerf.rays import clip_to_cube, stratified_distances
from trainbook.workflows.nerf.rendering import composite, transmittances

NEAR, FAR = 2.0, 6.0


def samples(number, num_rays=1, random=False):
    bounds = torch.full((num_rays,), NEAR, dtype=torch.float64), torch.full((num_rays,), FAR, dtype=torch.float64)
    return stratified_distances(*bounds, number, random)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.7, 40.0])
@pytest.mark.parametrize("number", [1, 3, 64])
def test_a_slab_of_constant_density_has_its_closed_form_at_any_number_of_samples(density, number):
    torch.manual_seed(number)
    distances, widths = samples(number, num_rays=5, random=True)
    colour = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    pixels = composite(torch.full_like(distances, density), colour.expand(5, number, 3), distances, widths, FAR)
    through = math.exp(-density * (FAR - NEAR))
    expected = colour * (1 - through) + through
    torch.testing.assert_close(pixels.colour, expected.expand(5, 3), rtol=0, atol=1e-12)
    torch.testing.assert_close(pixels.opacity, torch.full((5,), 1 - through, dtype=torch.float64), rtol=0, atol=1e-12)


def test_depth_of_a_slab_tends_to_its_closed_form():
    """Mean of min(t, far) under the density of the first collision: near + (1 - exp(-sigma L)) / sigma."""
    density, number = 0.7, 4000
    distances, widths = samples(number)
    pixels = composite(torch.full_like(distances, density), torch.ones(1, number, 3).double(), distances, widths, FAR)
    assert float(pixels.depth) == pytest.approx(NEAR + (1 - math.exp(-density * (FAR - NEAR))) / density, abs=1e-5)


def smooth(t):
    """A density and a colour along a ray."""
    return 3 * np.exp(-((t - 3.4) ** 2) / 0.1) + 0.4, 0.5 + 0.5 * np.sin(3 * t)


def integral():
    def integrand(t):
        optical_depth = quad(lambda s: smooth(s)[0], NEAR, t, epsabs=1e-10)[0]
        density, colour = smooth(t)
        return math.exp(-optical_depth) * density * colour

    rest = math.exp(-quad(lambda s: smooth(s)[0], NEAR, FAR, epsabs=1e-10)[0])
    return quad(integrand, NEAR, FAR, epsabs=1e-8, limit=200)[0] + rest


def test_the_sum_tends_to_the_integral_with_the_square_of_the_interval():
    true, errors = integral(), []
    for number in (20, 40, 80, 160):
        distances, widths = samples(number)
        density, colour = (torch.from_numpy(value) for value in smooth(distances.numpy()))
        found = composite(density, colour[..., None].expand(1, number, 3), distances, widths, FAR).colour
        errors.append(abs(float(found[0, 0]) - true))
    assert errors[-1] < 2e-4
    assert all(after < 0.35 * before for before, after in itertools.pairwise(errors[1:]))


def test_random_samples_are_right_on_average():
    torch.manual_seed(0)
    distances, widths = samples(24, num_rays=4000, random=True)
    density, colour = (torch.from_numpy(value) for value in smooth(distances.numpy()))
    found = composite(density, colour[..., None].expand(-1, -1, 3), distances, widths, FAR).colour[:, 0]
    standard_error = float(found.std()) / math.sqrt(len(found))
    assert abs(float(found.mean()) - integral()) < 4 * standard_error + 2e-3  # the exponential of a sum is a little biased


def test_weights_are_those_of_alpha_compositing():
    generator = torch.Generator().manual_seed(0)
    optical_depths = torch.rand(6, 9, generator=generator, dtype=torch.float64) * 3
    weights, rest = transmittances(optical_depths)
    for row, found, left in zip(optical_depths.tolist(), weights.tolist(), rest[:, 0].tolist(), strict=True):
        through = 1.0
        for optical_depth, weight in zip(row, found, strict=True):
            alpha = 1 - math.exp(-optical_depth)
            assert weight == pytest.approx(through * alpha, abs=1e-14)
            through *= 1 - alpha
        assert left == pytest.approx(through, abs=1e-14)
    torch.testing.assert_close(weights.sum(-1, keepdim=True) + rest, torch.ones(6, 1, dtype=torch.float64))


def test_gradient_is_that_of_finite_differences():
    generator = torch.Generator().manual_seed(1)
    density = torch.rand(3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    colour = torch.rand(3, 7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    distances, widths = samples(7, num_rays=3)
    assert torch.autograd.gradcheck(lambda d, c: composite(d, c, distances, widths, FAR), (density, colour))


def test_an_empty_ray_shows_the_white_background_at_the_far_plane():
    distances, widths = samples(8, num_rays=2)
    pixels = composite(torch.zeros_like(distances), torch.zeros(2, 8, 3).double(), distances, widths, FAR)
    assert torch.equal(pixels.colour, torch.ones(2, 3).double())
    assert torch.equal(pixels.depth, torch.full((2,), FAR).double())


def test_a_ray_past_the_scene_is_white_however_dense_the_field():
    origins, directions = torch.tensor([[4.0, 0.0, 3.0]]), torch.tensor([[-1.0, 0.0, 0.0]])
    distances, widths = stratified_distances(*clip_to_cube(origins, directions, 1.5, NEAR, FAR), 8, random=True)
    assert torch.equal(composite(torch.full((1, 8), 1e6), torch.zeros(1, 8, 3), distances, widths, FAR).colour, torch.ones(1, 3))
