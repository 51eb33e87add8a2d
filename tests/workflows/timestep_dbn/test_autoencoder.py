"""The binary autoencoder: exact bits, straight-through gradient, penalties."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.workflows.timestep_dbn.enumeration import DOUBLE
from trainbook.workflows.timestep_dbn import autoencoder as ae
from trainbook.workflows.timestep_dbn.config import Config


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 32, 32), (1, 8, 24)])
def test_codes_are_exact_bits_of_the_declared_sizes(channels, height, width):
    model = ae.BinaryAutoencoder(channels, (2, 3, 5), 8)
    images = torch.rand(7, channels, height, width)
    codes = ae.encode_all(model, images, batch_size=3)
    assert [tuple(code.shape) for code in codes] == [(7, size) for size in ae.level_sizes((height, width), (2, 3, 5))]
    assert set(torch.cat(codes, 1).unique().tolist()) == {0.0, 1.0}
    for code, logit in zip(model.encode(images), model.encode_logits(images), strict=True):
        assert torch.equal(code, (logit.sigmoid() > 0.5).float())
    rebuilt = ae.decode_all(model, codes, (height, width), batch_size=3)
    assert rebuilt.shape == images.shape
    torch.testing.assert_close(rebuilt, model.decode(model.encode(images)))


def test_levels_halve_in_size_from_fine_to_coarse():
    assert ae.level_sizes((32, 32), (4, 8, 16)) == [1024, 512, 256]  # the note's default, 1792 bits
    assert ae.level_sizes((8, 8), (4, 8, 32)) == [64, 32, 32]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_level_reaches_the_image(level):
    model = ae.BinaryAutoencoder(1, (2, 3, 5), 8)
    codes = model.encode(torch.rand(4, 1, 16, 16))
    flipped = [1 - code if index == level else code for index, code in enumerate(codes)]
    change = (model.decode(flipped) - model.decode(codes)).abs()
    assert change.flatten(1).max(1).values.min() > 1e-3


def test_straight_through_is_exactly_the_bits_forward():
    probability = torch.rand(10_000)
    bits = torch.bernoulli(probability)
    assert torch.equal(ae.straight_through(probability, bits), bits)


def test_straight_through_gradient_is_that_of_the_relaxed_loss():
    model = ae.BinaryAutoencoder(1, (2, 3, 5), 8)
    images = torch.rand(4, 1, 8, 8)
    probabilities = [logit.detach().sigmoid().requires_grad_() for logit in model.encode_logits(images)]
    bits = [torch.bernoulli(p.detach()) for p in probabilities]
    relaxed = [bit.clone().requires_grad_() for bit in bits]  # the loss as a function of real-valued bits, at the bits
    expected = torch.autograd.grad((model.decode(relaxed) - images).square().mean(), relaxed)
    codes = [ae.straight_through(p, bit) for p, bit in zip(probabilities, bits, strict=True)]
    actual = torch.autograd.grad((model.decode(codes) - images).square().mean(), probabilities)
    for one, other in zip(actual, expected, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


class LogitsOnly:
    """Stands for an autoencoder whose image does not depend on its code: only the penalties have a gradient."""

    def __init__(self, logits: list[Tensor], images: Tensor) -> None:
        self.logits, self.images = logits, images

    def encode_logits(self, images: Tensor) -> list[Tensor]:
        """The logits it was made with."""
        return self.logits

    def decode(self, codes: list[Tensor]) -> Tensor:
        """The images, whatever the code."""
        return self.images


def penalty_gradient(p: Tensor, confidence_weight: float, balance_weight: float) -> Tensor:
    """Gradient of the loss to the logits of one level with probabilities p, (B, V)."""
    logit = torch.logit(p).view(*p.shape, 1, 1).requires_grad_()
    images = torch.rand(len(p), 1, 8, 8)
    loss, _ = ae.autoencoder_loss(LogitsOnly([logit], images), images, confidence_weight, balance_weight)
    return torch.autograd.grad(loss, logit)[0].view_as(p)


def test_confidence_penalty_pushes_bits_away_from_one_half_on_both_sides():
    p = torch.tensor([[0.01, 0.3, 0.49, 0.51, 0.7, 0.99]], dtype=DOUBLE)
    gradient = penalty_gradient(p, confidence_weight=1.0, balance_weight=0.0)
    assert torch.equal(gradient.sign(), (0.5 - p).sign())
    torch.testing.assert_close(gradient, -torch.logit(p) * p * (1 - p) / 6, rtol=0, atol=1e-10)  # dH/du, mean over 6 bits


def test_balance_penalty_pulls_batch_means_towards_one_half_on_both_sides():
    p = torch.tensor([[0.05, 0.45, 0.50, 0.90], [0.15, 0.50, 0.55, 0.98]], dtype=DOUBLE)
    mean = p.mean(0)
    gradient = penalty_gradient(p, confidence_weight=0.0, balance_weight=1.0)
    assert torch.equal(gradient.sign(), (mean - 0.5).sign().expand(2, -1))
    torch.testing.assert_close(gradient, torch.logit(mean) * p * (1 - p) / (2 * 4), rtol=0, atol=1e-10)


def test_penalties_have_finite_gradients_at_saturated_bits():
    logit = torch.tensor([[-200.0, 0.3, 200.0], [-200.0, -2.0, 200.0]]).view(2, 3, 1, 1).requires_grad_()
    images = torch.rand(2, 1, 8, 8)
    loss, _ = ae.autoencoder_loss(LogitsOnly([logit], images), images, 1.0, 1.0)
    assert torch.isfinite(torch.autograd.grad(loss, logit)[0]).all()


def test_logit_entropy_matches_definition_and_its_gradient_stays_finite():
    logit = torch.linspace(-8, 8, 33, dtype=DOUBLE, requires_grad=True)
    p = logit.detach().sigmoid()
    entropy = ae.logit_entropy(logit)
    torch.testing.assert_close(entropy.detach(), -p * p.log() - (1 - p) * (1 - p).log(), rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(entropy.sum(), logit)[0], -logit.detach() * p * (1 - p), rtol=0, atol=1e-10)
    extreme = torch.tensor([-1e4, -120.0, -20.0, 20.0, 120.0, 1e4], requires_grad=True)
    values = ae.logit_entropy(extreme)
    gradient = torch.autograd.grad(values.sum(), extreme)[0]
    assert values.abs().max() < 1e-5
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() < 1e-5


def test_config_rejects_a_width_the_autoencoder_cannot_take():
    # the residual blocks normalise 4 groups of channels: the class says "a multiple of 4", the config must not let 10 through
    with pytest.raises(ValidationError):
        Config(autoencoder_width=10)
