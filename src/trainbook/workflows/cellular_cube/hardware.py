"""What a cell is told of its place: numbers that never change during a pass, learned per cell or from its coordinates."""

import math

import torch
from torch import Tensor, nn

FREQUENCIES = 4  # octaves of each coordinate
NETWORK_WIDTH = 64


def coordinates(side: int) -> Tensor:
    """(L, L, L, 3): z, y, x of the cells' middles, in (0, 1)."""
    axis = (torch.arange(side) + 0.5) / side
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)


def fourier_features(points: Tensor, frequencies: int = FREQUENCIES) -> Tensor:
    """Sin and cos of pi 2^k u for every coordinate u and k = 0, 1, ...: (..., 3) to (..., 6 K)."""
    angles = points[..., None] * math.pi * 2.0 ** torch.arange(frequencies, device=points.device)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


class LearnedHardware(nn.Module):
    """A table with P numbers per cell, h in R^(L x L x L x P)."""

    def __init__(self, side: int, numbers: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(side, side, side, numbers))

    def forward(self, side: int) -> Tensor:
        """The table; `side` is its own."""
        return self.table


class CoordinateHardware(nn.Module):
    """h(z, y, x) = W2 gelu(W1 features(z, y, x)): one set of weights for every side.

    Source: Tancik et al. (2020), Fourier Features Let Networks Learn High Frequency Functions, section 4.
    """

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(6 * FREQUENCIES, NETWORK_WIDTH), nn.GELU(), nn.Linear(NETWORK_WIDTH, numbers))
        with torch.no_grad():
            self.network[2].weight.mul_(4)  # so that cells differ as much as those of a table

    def forward(self, side: int) -> Tensor:
        """(L, L, L, P)."""
        return self.network(fourier_features(coordinates(side).to(self.network[0].weight)))
