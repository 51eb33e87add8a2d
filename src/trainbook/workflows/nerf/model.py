"""Radiance fields: position and viewing direction to density and colour, by an MLP or a dense grid; and the rays through them."""

# R rays, S samples per ray, L octaves

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainbook.workflows.nerf.config import Config
from trainbook.workflows.nerf.rays import clip_to_cube, stratified_distances
from trainbook.workflows.nerf.rendering import Pixels, composite

SKIP_FROM_DEPTH = 5
START_DENSITY = -2.0  # softplus of it is 0.13 per unit of length: fog thin enough to see through at the start
START_GRID_DENSITY = -5.0  # softplus of it is 0.007 per voxel
GRID_SPREAD = 0.1  # standard deviation of the grid's first features


@torch.no_grad()
def positional_encoding(values: Tensor, num_frequencies: int) -> Tensor:
    """(x, sin(2^k pi x), cos(2^k pi x) for k = 0 .. L - 1), each octave from the one below by the double-angle formulas.

    Args:
        values: (..., D), within about [-1, 1].
        num_frequencies: L.

    Returns:
        (..., D (1 + 2 L)); no gradient flows to the values.

    Source: Mildenhall et al. (2020), NeRF, equation 4.
    """
    size = values.shape[-1]
    encoded = values.new_empty(*values.shape[:-1], 1 + 2 * num_frequencies, size)
    encoded[..., 0, :] = values
    sine, cosine = torch.sin(math.pi * values), torch.cos(math.pi * values)
    for octave in range(num_frequencies):
        encoded[..., 1 + 2 * octave, :], encoded[..., 2 + 2 * octave, :] = sine, cosine
        sine, cosine = 2 * sine * cosine, 1 - 2 * sine * sine
    return encoded.flatten(-2)


class PositionalField(nn.Module):
    """The network of NeRF: encoded position to density and features, these and the encoded direction to colour.

    What depends on the direction alone is computed once per ray.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.position_frequencies, self.direction_frequencies = config.position_frequencies, config.direction_frequencies
        encoded, width = 3 * (1 + 2 * config.position_frequencies), config.width
        self.first = nn.Linear(encoded, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(config.depth - 1))
        self.skip = nn.Linear(encoded, width, bias=False) if config.depth >= SKIP_FROM_DEPTH else None
        self.density = nn.Linear(width, 1)
        self.features = nn.Linear(width, width // 2)
        self.direction = nn.Linear(3 * (1 + 2 * config.direction_frequencies), width // 2, bias=False)
        self.colour = nn.Linear(width // 2, 3)
        nn.init.constant_(self.density.bias, START_DENSITY)

    def forward(self, positions: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Density per unit of length, softplus(.), and colour, sigmoid(.), in float32.

        Args:
            positions: (R, S, 3), within the cube, which is [-1, 1]^3 here.
            directions: (R, 3), of length 1.

        Returns:
            (R, S), >= 0, and (R, S, 3), in [0, 1].
        """
        encoded = positional_encoding(positions, self.position_frequencies)
        h = functional.relu(self.first(encoded), inplace=True)
        for index, layer in enumerate(self.hidden):
            h = layer(h)
            if self.skip is not None and index == len(self.hidden) // 2:
                h = h + self.skip(encoded)
            h = functional.relu(h, inplace=True)
        seen_from = self.direction(positional_encoding(directions, self.direction_frequencies))[:, None]
        colour = self.colour(functional.relu(self.features(h) + seen_from, inplace=True))
        return functional.softplus(self.density(h)[..., 0].float()), colour.float().sigmoid()


class GridField(nn.Module):
    """A dense grid of raw densities and features, interpolated linearly, and a small network from features to colour.

    Source: Sun et al. (2022), Direct Voxel Grid Optimization.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.direction_frequencies = config.direction_frequencies
        size, features = config.grid_size, config.grid_features
        self.grid = nn.Parameter(GRID_SPREAD * torch.randn(1, 1 + features, size, size, size))
        with torch.no_grad():
            self.grid[:, 0] = START_GRID_DENSITY
        self.voxels_per_length = (size - 1) / (2 * config.bound)
        self.features = nn.Linear(features, config.grid_width)
        self.direction = nn.Linear(3 * (1 + 2 * config.direction_frequencies), config.grid_width, bias=False)
        self.colour = nn.Linear(config.grid_width, 3)

    def forward(self, positions: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """As `PositionalField.forward`; what a vertex holds is density per voxel, so the same start fits grids of any size."""
        sampled = functional.grid_sample(self.grid, positions[None, None], padding_mode="border", align_corners=True)
        raw = sampled[0, :, 0].permute(1, 2, 0)  # (R, S, 1 + features)
        seen_from = self.direction(positional_encoding(directions, self.direction_frequencies))[:, None]
        colour = self.colour(functional.relu(self.features(raw[..., 1:]) + seen_from, inplace=True))
        return self.voxels_per_length * functional.softplus(raw[..., 0].float()), colour.float().sigmoid()


class Renderer(nn.Module):
    """A field with the rays through it: random samples while it trains, the intervals' middles else."""

    def __init__(self, field: nn.Module, config: Config) -> None:
        super().__init__()
        self.field = field
        self.near, self.far, self.bound, self.num_samples = config.near, config.far, config.bound, config.num_samples
        self.recomputes = config.gradient_checkpointing

    def forward(self, origins: Tensor, directions: Tensor) -> Pixels:
        """What is seen along rays, (R, 3) each."""
        start, end = clip_to_cube(origins, directions, self.bound, self.near, self.far)
        distances, widths = stratified_distances(start, end, self.num_samples, random=self.training)
        positions = (origins[:, None] + distances[..., None] * directions[:, None]) / self.bound
        if self.recomputes and self.training:
            seen = checkpoint(self.field, positions, directions, use_reentrant=False)
        else:
            seen = self.field(positions, directions)
        return composite(*seen, distances, widths, self.far)


FIELDS = {"mlp": PositionalField, "grid": GridField}


def render_view(renderer: Renderer, rays: tuple[Tensor, Tensor], chunk: int = 4096) -> Pixels:
    """All rays of a view, a few at a time."""
    parts = [renderer(*part) for part in zip(*(tensor.split(chunk) for tensor in rays), strict=True)]
    return Pixels(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
