"""Schedule, loss, guidance and sampler against formulas and a distribution whose noise is known."""

import math

import pytest
import torch
from torch import nn

from trainbook.workflows.diffusion.config import Config
from trainbook.workflows.diffusion.model import (
    NULL_CLASS,
    denoise,
    draw_samples,
    guided_noise,
    hide_labels,
    make_unet,
    noise_loss,
    noise_schedule,
)


def shares(num_timesteps=1000):
    """What is left of the image's variance: Nichol and Dhariwal's cosine, its steps cut at 0.999."""

    def f(t):
        return math.cos((t / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    kept = [1 - min(1 - f(t + 1) / f(t), 0.999) for t in range(num_timesteps)]
    return torch.tensor(kept, dtype=torch.float64).cumprod(0)


class Exact(nn.Module):
    """Predicts the noise in images whose pixels are independent, normal, with this mean per class and deviation.

    E[e | x_t] = sqrt(1 - a) (x_t - sqrt(a) m) / (a s^2 + 1 - a).
    """

    def __init__(self, means, deviation):
        super().__init__()
        self.means = nn.Parameter(means)
        self.deviation, self.shares = deviation, shares()

    def forward(self, noisy, timestep, labels, return_dict):
        a = self.shares[timestep].to(noisy.dtype).view(-1, 1, 1, 1)
        mean = self.means[labels].view(-1, 1, 1, 1)
        return ((1 - a).sqrt() * (noisy - a.sqrt() * mean) / (a * self.deviation**2 + 1 - a),)


def exact(deviation=0.2):
    means = torch.cat([torch.linspace(-0.4, 0.4, 10), torch.zeros(1)])
    return Exact(means, deviation), means


def test_the_schedule_is_the_squared_cosine():
    torch.testing.assert_close(noise_schedule(Config()).alphas_cumprod.double(), shares(), rtol=1e-3, atol=1e-7)


def test_the_loss_is_the_squared_error_of_the_noise():
    torch.manual_seed(0)
    unet, _ = exact()
    images, noise = torch.rand(6, 1, 4, 4) * 2 - 1, torch.randn(6, 1, 4, 4)
    labels, timesteps = torch.arange(6), torch.tensor([0, 10, 200, 500, 900, 999])
    a = shares()[timesteps].float().view(-1, 1, 1, 1)
    noisy = a.sqrt() * images + (1 - a).sqrt() * noise
    expected = (unet(noisy, timesteps, labels, False)[0] - noise).square().mean()
    torch.testing.assert_close(noise_loss(unet, noise_schedule(Config()), images, labels, timesteps, noise), expected)


def test_labels_are_hidden_at_the_given_rate():
    torch.manual_seed(0)
    labels = torch.arange(20_000) % 10
    hidden = hide_labels(labels, 0.1)
    share = float((hidden == NULL_CLASS).float().mean())
    assert abs(share - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 20_000)
    assert torch.equal(hidden[hidden != NULL_CLASS], labels[hidden != NULL_CLASS])
    assert torch.equal(hide_labels(labels, 0.0), labels)


def test_guidance_extrapolates_from_the_unconditional_prediction():
    unet, _ = exact()
    noisy, labels, t = torch.randn(5, 1, 3, 3), torch.arange(5), torch.tensor(400)
    told, untold = unet(noisy, t, labels, False)[0], unet(noisy, t, torch.full((5,), NULL_CLASS), False)[0]
    assert torch.equal(guided_noise(unet, noisy, t, labels, 1.0), told)
    torch.testing.assert_close(guided_noise(unet, noisy, t, labels, 2.5), 2.5 * told - 1.5 * untold)


def test_sampling_with_the_exact_noise_draws_the_known_distribution():
    torch.manual_seed(1)
    unet, means = exact(deviation=0.15)
    labels = torch.arange(10).repeat(60)
    images = denoise(unet, Config(), torch.randn(600, 1, 4, 4), labels, 1.0)[-1]
    for k in range(10):
        found = images[labels == k]
        assert float(found.mean()) == pytest.approx(float(means[k]), abs=0.02)
        assert float(found.std()) == pytest.approx(0.15, rel=0.1)
    guided = denoise(unet, Config(), torch.randn(600, 1, 4, 4), labels, 2.0)[-1]
    assert float(guided[labels == 9].mean()) > float(means[9]) + 0.1  # pushed beyond the class's mean


def test_more_steps_come_nearer_to_the_exact_flow():
    """With normal data the flow from noise to image is x -> m + s x for the noise's own deviation 1."""
    unet, means = exact()
    labels, errors = torch.full((40,), 7), []
    start = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(2)) * 0.5
    for steps in (10, 40, 160):
        found = denoise(unet, Config(num_inference_steps=steps), start, labels, 1.0)[-1]
        errors.append(float((found - (means[7] + 0.2 * start)).abs().mean()))
    assert errors[2] < 0.6 * errors[0]
    assert errors[2] < 0.02


def test_samples_repeat_and_leave_the_random_numbers_of_training_alone():
    config = Config.from_preset("smoke")
    torch.manual_seed(3)
    unet = make_unet(config, (1, 8, 8))
    before = torch.get_rng_state()
    images, labels = draw_samples(unet, config, (1, 8, 8), 13, 1.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert unet.training
    assert labels.tolist() == [*range(10), 0, 1, 2]
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    again, _ = draw_samples(unet, config, (1, 8, 8), 13, 1.0, chunk=5)
    torch.testing.assert_close(again, images, rtol=0, atol=1e-5)


def test_the_network_is_told_class_and_timestep_and_can_be_built_for_every_set():
    torch.manual_seed(4)
    unet = make_unet(Config.from_preset("smoke", {"attention": True, "gradient_checkpointing": True}), (3, 8, 8))
    noisy = torch.randn(2, 3, 8, 8)
    found = [unet(noisy, torch.tensor(t), torch.full((2,), y), return_dict=False)[0] for t, y in ((5, 1), (5, 2), (6, 1))]
    assert found[0].shape == noisy.shape
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
