"""Noise: added, estimated, and Poisson noise turned into Gaussian noise of known size."""

# a gain, s standard deviation of the Gaussian part

import math

import torch
from torch import Tensor

from trainbook.workflows.graph_diffusion_em.patches import patchify

QUIET_SHARE = 0.2  # of the patches, those with the least energy outside the coefficients that are measured
NUM_HIGHEST = 3  # cosines along each axis whose products are measured


def add_noise(image: Tensor, sigma: float, gain: float, generator: torch.Generator | None = None) -> Tensor:
    """Y = x + N(0, s^2), or for gain a > 0 y = a Poisson(x / a) + N(0, s^2): variance a x + s^2. Not clipped.

    Args:
        image: values in [0, 1], any shape.
        sigma: s.
        gain: a.
        generator: on the image's device; by default torch's own.
    """
    mean = image if gain == 0 else gain * torch.poisson(image.clamp(min=0) / gain, generator)
    return mean + sigma * torch.randn(image.shape, generator=generator, dtype=image.dtype, device=image.device)


def estimate_sigma(image: Tensor, size: int = 8) -> tuple[float, float]:
    """Standard deviation of white Gaussian noise in a picture, and its standard error.

    The highest cosines of patches that do not overlap hold little but noise. Of the patches those with the least energy in the
    middle coefficients are taken: noise is independent between coefficients, so this choice does not bias what is measured.

    Args:
        image: (C, H, W), at least 5 p pixels along each side.
        size: p.

    Returns:
        sqrt(mean of squares) and its standard error, sigma / sqrt(2 n). What texture remains makes it too high, not too low.
    """
    channels, height, width = image.shape
    image = image[:, : height - height % size, : width - width % size]
    z = patchify(image, size, size).double()
    frequency = torch.arange(size, device=image.device)
    high = frequency >= size - NUM_HIGHEST
    measured = (high[:, None] & high).flatten().repeat(channels)
    means = (torch.arange(z.shape[1], device=image.device) % size**2) == 0
    others = z[:, ~measured & ~means].square().mean(1)
    quiet = others.topk(max(1, int(QUIET_SHARE * len(z))), largest=False).indices
    values = z[quiet][:, measured]
    sigma = float(values.square().mean().sqrt())
    return sigma, sigma / math.sqrt(2 * values.numel())


def stabilise(image: Tensor, gain: float, sigma: float) -> Tensor:
    """Generalised Anscombe transform: Poisson-Gaussian noise becomes nearly Gaussian of variance 1.

    f(y) = (2 / a) sqrt(max(0, a y + 3/8 a^2 + s^2)).
    """
    return (2 / gain) * (gain * image + 0.375 * gain**2 + sigma**2).clamp(min=0).sqrt()


def unstabilise(stable: Tensor, gain: float, sigma: float) -> Tensor:
    """Closed-form approximation of the exact unbiased inverse: the x with E[f(y) | x] = D.

    x / a = D^2/4 + sqrt(3/2)/4 D^-1 - 11/8 D^-2 + 5/8 sqrt(3/2) D^-3 - 1/8 - s^2 / a^2.

    Source: Makitalo and Foi 2013, Optimal inversion of the generalized Anscombe transformation, equation 10.
    """
    D = stable.clamp(min=1.0)
    root = math.sqrt(1.5)
    value = D.square() / 4 + 0.25 * root / D - 1.375 / D.square() + 0.625 * root / D**3 - 0.125 - (sigma / gain) ** 2
    return gain * value.clamp(min=0)
