"""A synthetic scene whose pictures and depths are exact: four banded Lambert spheres above a checkered disc, no shadows."""

# R rays, B spheres

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainbook.workflows.nerf.rays import rays_of_pixels

AMBIENT = 0.3  # share of the light that comes from everywhere
CHECKS = 3.0  # squares of the disc per unit of length
BAND_CONTRAST = 0.35


@dataclass(frozen=True)
class Scene:
    """Its parts, in the unit of length of the cameras' distance; z points up.

    Attributes:
        centres: (B, 3).
        radii: (B,).
        colours: (B, 3).
        bands: (B, 3), direction across the bands times their number per radian, about.
        disc_height, disc_radius: of the disc around the z axis.
        disc_colours: (2, 3).
        light: (3,), unit vector towards it.
    """

    centres: Tensor
    radii: Tensor
    colours: Tensor
    bands: Tensor
    disc_height: float
    disc_radius: float
    disc_colours: Tensor
    light: Tensor


class Hits(NamedTuple):
    """Where rays meet the scene: colour (R, 3), white where they miss; distance (R,), infinite where they miss."""

    colour: Tensor
    distance: Tensor


def spheres_on_a_disc() -> Scene:
    """The scene of the embedded runs; all of it within 1.2 of the origin on every axis."""
    return Scene(
        centres=torch.tensor([[0.55, 0.10, -0.10], [-0.45, 0.50, -0.20], [-0.30, -0.55, -0.28], [0.05, 0.05, 0.62]]),
        radii=torch.tensor([0.50, 0.40, 0.32, 0.30]),
        colours=torch.tensor([[0.85, 0.25, 0.20], [0.20, 0.60, 0.30], [0.25, 0.35, 0.85], [0.90, 0.75, 0.20]]),
        bands=torch.tensor([[0.0, 0.0, 9.0], [7.0, 0.0, 4.0], [0.0, 10.0, 0.0], [5.0, 5.0, 5.0]]),
        disc_height=-0.62,
        disc_radius=1.2,
        disc_colours=torch.tensor([[0.80, 0.78, 0.72], [0.30, 0.32, 0.38]]),
        light=torch.nn.functional.normalize(torch.tensor([0.5, -0.4, 0.8]), dim=0),
    )


def intersect(scene: Scene, origins: Tensor, directions: Tensor) -> Hits:
    """The nearest surface along each ray, and its colour: ambient light plus max(0, n . l), Lambert's law, times the texture.

    Args:
        scene: what is looked at.
        origins: (R, 3), outside every sphere.
        directions: (R, 3), of length 1.
    """
    offsets = origins[:, None] - scene.centres  # (R, B, 3)
    along = (offsets * directions[:, None]).sum(-1)
    under_root = along.square() - offsets.square().sum(-1) + scene.radii.square()
    spheres = torch.where(under_root > 0, -along - under_root.clamp(min=0).sqrt(), torch.inf)
    spheres = torch.where(spheres > 0, spheres, torch.inf)
    disc = (scene.disc_height - origins[:, 2]) / directions[:, 2]
    on_plane = origins + disc[:, None] * directions
    is_on_disc = (disc > 0) & disc.isfinite() & (on_plane[:, 0].hypot(on_plane[:, 1]) <= scene.disc_radius)
    distances = torch.cat([spheres, torch.where(is_on_disc, disc, torch.inf)[:, None]], dim=1)  # (R, B + 1)
    distance, nearest = distances.min(dim=1)
    is_hit, is_disc = distance.isfinite(), nearest == len(scene.radii)
    sphere = nearest.clamp(max=len(scene.radii) - 1)
    points = origins + torch.where(is_hit, distance, 0.0)[:, None] * directions
    outward = (points - scene.centres[sphere]) / scene.radii[sphere, None]
    banded = 1 - BAND_CONTRAST * (0.5 + 0.5 * torch.sin((outward * scene.bands[sphere]).sum(-1)))
    checked = ((CHECKS * points[:, :2]).floor().sum(-1).long() % 2).abs()
    upward = torch.tensor([0.0, 0.0, 1.0])
    normals = torch.where(is_disc[:, None], upward, outward)
    albedos = torch.where(is_disc[:, None], scene.disc_colours[checked], banded[:, None] * scene.colours[sphere])
    shade = AMBIENT + (1 - AMBIENT) * (normals @ scene.light).clamp(min=0)
    return Hits(torch.where(is_hit[:, None], albedos * shade[:, None], 1.0), distance)


def photograph(scene: Scene, pose: Tensor, focal: float, size: int, supersampling: int = 4) -> Tensor:
    """A picture, (size, size, 3): the mean over supersampling^2 rays per pixel, evenly spaced."""
    steps = (torch.arange(size * supersampling) + 0.5) / supersampling
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    pixels = torch.stack([columns.flatten(), rows.flatten()], dim=-1)
    rays = rays_of_pixels(pixels, pose.expand(len(pixels), 3, 4), torch.tensor(focal).expand(len(pixels)), size, size)
    fine = intersect(scene, *rays).colour.view(size, supersampling, size, supersampling, 3)
    return fine.mean(dim=(1, 3))
