"""Multi-resolution binary autoencoder: an image as exact bits on three levels, each injected at its own size.

Source: straight-through gradient, Bengio et al. (2013), arXiv 1308.3432; binary latents for diffusion, Wang et al.
(2023), arXiv 2304.04820 (whose code penalty is replaced: it pushed every bit to 1).
"""

# B batch, C channels; level 0 is the finest, at half the image's width

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss, softplus

from trainbook.workflows.timestep_dbn.diffusion import binary_entropy


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(norm(x))))), width kept."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(4, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.body(x)


class BinaryAutoencoder(nn.Module):
    """Encoder with one head of logits per level, decoder from coarse to fine.

    Args:
        image_channels: 1 or 3.
        code_channels: bits per position, from fine to coarse; level l lies at 1/2^(l+1) of the image's width.
        width: channels of the convolutions, a multiple of 4.
    """

    def __init__(self, image_channels: int, code_channels: Sequence[int], width: int) -> None:
        super().__init__()
        levels = range(len(code_channels))
        self.stem = nn.Conv2d(image_channels, width, 3, padding=1)
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 4, stride=2, padding=1), ResidualBlock(width)) for _ in levels
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, channels, 1) for channels in code_channels)
        self.inject = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in code_channels)
        self.up = nn.ModuleList(ResidualBlock(width) for _ in levels)
        self.out = nn.Sequential(ResidualBlock(width), nn.SiLU(), nn.Conv2d(width, image_channels, 3, padding=1))

    def encode_logits(self, images: Tensor) -> list[Tensor]:
        """Log odds of every bit, fine to coarse; (B, C, H, W) -> [(B, C_l, H_l, W_l)]."""
        x, logits = self.stem(images), []
        for down, head in zip(self.down, self.heads, strict=True):
            x = down(x)
            logits.append(head(x))
        return logits

    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """Images from bits, coarse to fine; [(B, C_l, H_l, W_l)] -> (B, C, H, W), values in (0, 1)."""
        x = torch.zeros((), device=codes[0].device)
        for code, inject, up in reversed(list(zip(codes, self.inject, self.up, strict=True))):
            x = up(x + inject(2 * code - 1))
            x = interpolate(x, scale_factor=2.0, mode="nearest")
        return self.out(x).sigmoid()

    def encode(self, images: Tensor) -> list[Tensor]:
        """The code: b = [p > 1/2], values in {0, 1}."""
        return [(logit > 0).to(images.dtype) for logit in self.encode_logits(images)]


def straight_through(probability: Tensor, bits: Tensor) -> Tensor:
    """The bits in the forward pass, the probability's gradient in the backward pass."""
    return bits + (probability - probability.detach())  # the bracket is exactly 0


def autoencoder_loss(
    model: BinaryAutoencoder, images: Tensor, confidence_weight: float, balance_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error of the image decoded from sampled bits + w_e mean H(p) - w_b H(batch mean of p).

    The first penalty wants sure bits, the second balanced ones; H is the entropy of a bit in nats.

    Args:
        model: the autoencoder.
        images: (B, C, H, W), values in [0, 1].
        confidence_weight: w_e.
        balance_weight: w_b.

    Returns:
        The loss, and its parts by name.
    """
    logits = model.encode_logits(images)
    probabilities = [logit.sigmoid() for logit in logits]
    codes = [straight_through(p, torch.bernoulli(p.detach())) for p in probabilities]
    error = mse_loss(model.decode(codes), images)
    confidence = mean_over_bits([logit_entropy(logit) for logit in logits])
    balance = mean_over_bits([binary_entropy(usage(p)) for p in probabilities])
    loss = error + confidence_weight * confidence - balance_weight * balance
    return loss, {
        "reconstruction_mse": error.detach(),
        "bit_entropy": confidence.detach(),
        "bit_balance": balance.detach(),
    }


def logit_entropy(logit: Tensor) -> Tensor:
    """H(sigmoid(u)) = softplus(u) - u sigmoid(u), in nats; its gradient stays finite where p rounds to 0 or 1."""
    return softplus(logit) - logit * logit.sigmoid()


def usage(probability: Tensor) -> Tensor:
    """Mean over the batch of each bit's probability, kept off 0 and 1 where the entropy's gradient is infinite."""
    return probability.mean(0).clamp(1e-6, 1 - 1e-6)


def mean_over_bits(values: Sequence[Tensor]) -> Tensor:
    """Mean over all entries of all levels."""
    return torch.cat([value.flatten() for value in values]).mean()


@torch.no_grad()
def encode_all(model: BinaryAutoencoder, images: Tensor, batch_size: int = 256) -> list[Tensor]:
    """Codes of many images, flat per level: (N, C, H, W) -> [(N, V_l)], fine to coarse."""
    batches = [model.encode(batch) for batch in images.split(batch_size)]
    return [torch.cat([batch[level] for batch in batches]).flatten(1) for level in range(len(batches[0]))]


@torch.no_grad()
def decode_all(model: BinaryAutoencoder, codes: Sequence[Tensor], image_size: Sequence[int], batch_size: int = 256) -> Tensor:
    """Images from flat codes.

    Args:
        model: the autoencoder.
        codes: [(N, V_l)], fine to coarse.
        image_size: height and width of the images.
        batch_size: decoded at once.

    Returns:
        (N, C, H, W)
    """
    height, width = image_size
    shaped = [code.unflatten(1, (-1, height >> (level + 1), width >> (level + 1))) for level, code in enumerate(codes)]
    return torch.cat([model.decode(batch) for batch in zip(*(code.split(batch_size) for code in shaped), strict=True)])


def level_sizes(image_size: Sequence[int], code_channels: Sequence[int]) -> list[int]:
    """V_l, the bits on each level, fine to coarse."""
    height, width = image_size
    return [channels * (height >> (level + 1)) * (width >> (level + 1)) for level, channels in enumerate(code_channels)]
