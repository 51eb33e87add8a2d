"""Noise of known size: added, estimated, stabilised."""

import numpy as np
import pytest
import torch
from scipy.stats import norm, poisson
from skimage import data

from trainbook.workflows.graph_diffusion_em.noise import add_noise, estimate_sigma, stabilise, unstabilise


def smooth_picture(channels=1):
    x = torch.linspace(0, 3, 160, dtype=torch.float64)
    return (0.5 + 0.3 * torch.sin(x)[:, None] * torch.cos(x)).expand(channels, -1, -1)


@pytest.mark.parametrize("sigma", [2 / 255, 15 / 255, 50 / 255])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_estimate_is_unbiased_within_its_interval_on_a_smooth_picture(sigma, channels):
    deviations = []
    for seed in range(40):
        noisy = add_noise(smooth_picture(channels), sigma, 0.0, torch.Generator().manual_seed(seed))
        found, error = estimate_sigma(noisy)
        deviations.append((found - sigma) / error)
    mean, spread = np.mean(deviations), np.std(deviations)
    assert abs(mean) < 4 / 40**0.5
    assert 0.7 < spread < 1.35  # the standard error is the spread


def test_on_a_photograph_it_is_a_little_too_high():
    camera = torch.from_numpy(data.camera() / 255).unsqueeze(0)
    for sigma in (10, 25, 50):
        found, _ = estimate_sigma(add_noise(camera, sigma / 255, 0.0, torch.Generator().manual_seed(sigma)))
        assert 0.97 < found * 255 / sigma < 1.08


def test_poisson_gaussian_noise_has_its_mean_and_variance():
    image = torch.tensor([0.05, 0.3, 0.9], dtype=torch.float64).repeat(200_000, 1)
    noisy = add_noise(image, 0.02, 0.01, torch.Generator().manual_seed(0))
    expected = 0.01 * image[0] + 0.0004
    torch.testing.assert_close(noisy.mean(0), image[0], atol=5 * float(expected.max().sqrt()) / 200_000**0.5, rtol=0)
    torch.testing.assert_close(noisy.var(0), expected, rtol=0.02, atol=0)


def test_stabilised_noise_has_variance_one():
    image = torch.tensor([0.1, 0.3, 0.9], dtype=torch.float64).repeat(200_000, 1)
    stable = stabilise(add_noise(image, 0.02, 0.01, torch.Generator().manual_seed(1)), 0.01, 0.02)
    torch.testing.assert_close(stable.var(0), torch.ones(3).double(), rtol=0.03, atol=0)


@pytest.mark.parametrize(("gain", "sigma"), [(0.05, 0.02), (0.02, 0.05)])
def test_the_inverse_takes_the_mean_of_the_transform_back(gain, sigma):
    """E[f(y) | x] by summing over counts and integrating over the Gaussian part."""
    counts, nodes = np.arange(0, 200), np.linspace(-6, 6, 801)
    density = norm.pdf(nodes)
    density /= density.sum()
    for x in (0.1, 0.3, 0.9):
        y = torch.from_numpy(gain * counts[:, None] + sigma * nodes)
        mean = (stabilise(y, gain, sigma).numpy() * poisson.pmf(counts, x / gain)[:, None] * density).sum()
        found = float(unstabilise(torch.tensor(mean), gain, sigma))
        assert found == pytest.approx(x, rel=0.03, abs=0.003)
        assert abs(float(unstabilise(torch.tensor(mean), gain, sigma)) - x) < abs(algebraic(mean, gain, sigma) - x)


def algebraic(stable, gain, sigma):
    """The inverse that is biased: solve f(y) = D."""
    return (stable**2 * gain**2 / 4 - 0.375 * gain**2 - sigma**2) / gain
