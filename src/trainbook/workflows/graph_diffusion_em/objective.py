"""What the network is trained on: fresh noise for each batch, and the held-out loss under noise that stays the same."""

import torch
from torch import Tensor, nn

from trainbook.data import Data
from trainbook.workflows.graph_diffusion_em.config import Config
from trainbook.workflows.graph_diffusion_em.network import loss
from trainbook.workflows.graph_diffusion_em.noise import add_noise, stabilise, unstabilise

HELD_OUT_SEED = 20_261_128
CROPS_AT_ONCE = 32


def observe(config: Config, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A noisy picture as every method sees it: with photon noise after the transform that makes it white, see `to_working`."""
    if config.noise == "gaussian":
        return add_noise(clean, config.sigma, 0.0, generator)
    return to_working(config, add_noise(clean, config.sigma, config.photon_gain, generator))


def working_sigma(config: Config) -> float:
    """Standard deviation of the noise in what `observe` returns."""
    return config.sigma if config.noise == "gaussian" else 1 / working_scale(config)


def working_scale(config: Config) -> float:
    """f(white): what the transform makes of a white pixel, so that working pictures lie in about [0, 1]."""
    return float(stabilise(torch.tensor(1.0, dtype=torch.float64), config.photon_gain, config.sigma))


def to_working(config: Config, image: Tensor) -> Tensor:
    """A clean or noisy picture in the domain in which the noise is white, scaled so that white stays 1."""
    if config.noise == "gaussian":
        return image
    return stabilise(image, config.photon_gain, config.sigma) / working_scale(config)


def from_working(config: Config, image: Tensor) -> Tensor:
    """The picture that a denoised one in the working domain stands for, clipped to [0, 1]."""
    if config.noise == "poisson_gaussian":
        image = unstabilise(image * working_scale(config), config.photon_gain, config.sigma)
    return image.clamp(0, 1)


def batch_loss(config: Config, model: nn.Module, crops: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The loss of a batch of clean crops under noise drawn for it; with Noise2Noise the target is a second noisy view."""
    noisy = observe(config, crops, generator)
    noise2noise = config.network == "noise2noise"
    target = observe(config, crops, generator) if noise2noise else to_working(config, crops)
    return loss(model, noisy, target, working_sigma(config), noise2noise)


class HeldOut:
    """Loss on the validation crops against their clean selves, under the same noise whenever it is measured."""

    def __init__(self, config: Config, data: Data) -> None:
        crops = data.valid["crops"]
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        self.noisy = observe(config, crops.cpu(), generator).to(crops.device)
        self.clean, self.sigma = to_working(config, crops), working_sigma(config)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Metrics of a module in evaluation mode."""
        parts = zip(self.noisy.split(CROPS_AT_ONCE), self.clean.split(CROPS_AT_ONCE), strict=True)
        total = sum(float(loss(model, noisy, clean, self.sigma, False)) * len(noisy) for noisy, clean in parts)
        return {"valid_loss": total / len(self.noisy)}
