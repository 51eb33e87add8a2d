"""What a practitioner reaches for first: blur, total variation, non-local means, BM3D, and a patch mixture without a graph."""

import importlib.util
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from skimage.filters import gaussian
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle
from torch import Tensor

from trainbook.workflows.graph_diffusion_em.denoiser import codebook_estimate
from trainbook.workflows.graph_diffusion_em.mixture import GaussianMixture

Method = Callable[[Tensor, float], Tensor]  # noisy picture (C, H, W) and sigma to a clean one

WIDTHS = (0.4, 0.6, 0.8, 1.0, 1.3, 1.7, 2.2)  # of the blur, in pixels
TV_WEIGHTS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 1.9)  # in units of sigma
EPLL_BETAS = (1, 4, 8, 16, 32)  # in units of 1 / sigma^2
TUNING_CROPS = 48


def blur(width: float) -> Method:
    """Gaussian blur of a width in pixels."""
    return _by_numpy(lambda noisy, sigma: gaussian(noisy, width, channel_axis=0))


def total_variation(weight: float) -> Method:
    """Total variation with a weight in units of sigma (Chambolle 2004), by scikit-image."""
    return _by_numpy(lambda noisy, sigma: denoise_tv_chambolle(noisy, weight=weight * sigma, max_num_iter=100, channel_axis=0))


def non_local_means() -> Method:
    """Fast non-local means with 5 x 5 patches in a 21 x 21 window and h = 0.6 sigma (Buades et al. 2005), by scikit-image."""

    def method(noisy: np.ndarray, sigma: float) -> np.ndarray:
        options = {"patch_size": 5, "patch_distance": 10, "h": 0.6 * sigma, "sigma": sigma, "fast_mode": True}
        if len(noisy) == 1:  # with a channel axis of length 1 scikit-image mixes up the axes
            return denoise_nl_means(noisy[0], **options)
        return denoise_nl_means(noisy, channel_axis=0, **options)

    return _by_numpy(method)


def bm3d_is_installed() -> bool:
    """Whether the optional package is there: `pip install bm3d`."""
    return importlib.util.find_spec("bm3d") is not None


def bm3d() -> Method:
    """Block matching and 3-D filtering (Dabov et al. 2007), by its authors' package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bm3d as package

    profile = package.BM3DProfile()
    profile.num_threads = 1  # several add up in an order that changes from run to run

    def method(noisy: np.ndarray, sigma: float) -> np.ndarray:
        if len(noisy) == 1:
            return package.bm3d(noisy[0].astype(float), sigma, profile)[None]
        return package.bm3d_rgb(noisy.transpose(1, 2, 0).astype(float), sigma, profile).transpose(2, 0, 1)

    return _by_numpy(method)


def patch_mixture(mixture: GaussianMixture, size: int, stride: int) -> Method:
    """Expected patch log-likelihood with our mixture: half-quadratic splitting, no graph and no groups.

    Five times: patches <- posterior mean at variance 1 / beta; x <- (y / sigma^2 + beta mean of patches) / (1 / sigma^2 + beta).

    Source: Zoran and Weiss 2011, From learning models of natural image patches to whole image restoration, section 3.
    """

    def method(noisy: Tensor, sigma: float) -> Tensor:
        image = noisy
        for beta in EPLL_BETAS:
            patches = codebook_estimate(mixture, image, sigma / beta**0.5, size, stride)
            image = (noisy + beta * patches) / (1 + beta)
        return image

    return method


def _by_numpy(method: Callable[[np.ndarray, float], np.ndarray]) -> Method:
    return lambda noisy, sigma: torch.from_numpy(np.reshape(method(noisy.cpu().numpy(), sigma), noisy.shape)).to(noisy)


def best_of(make: Callable[[float], Method], choices: Sequence[float], noisy: Tensor, clean: Tensor, sigma: float) -> Method:
    """The method with the choice whose squared error on validation crops, (N, C, S, S), is least."""
    number = min(TUNING_CROPS, len(noisy))

    def error(choice: float) -> float:
        method = make(choice)
        return sum(float((method(noisy[i], sigma) - clean[i]).square().mean()) for i in range(number))

    return make(min(choices, key=error))
