"""Cameras: from pixels to rays, and where on a ray samples lie."""

# R rays, S samples per ray, V views; x to the right, y up, the camera looks along -z (OpenGL, as Blender has it)

import torch
from torch import Tensor

LEAST_COMPONENT = 1e-9  # of a direction, so that 1 / d is finite


def rays_of_pixels(pixels: Tensor, poses: Tensor, focals: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Origin and unit direction of the rays through pixels: d = R (x - W/2, H/2 - y, -f) / |.| with (x, y) the given point.

    Args:
        pixels: (R, 2), column and row; the first pixel's middle is (0.5, 0.5).
        poses: (R, 3, 4), from the camera to the world, rotation R and position.
        focals: (R,), focal length f in pixels.
        height, width: of the picture, in pixels.

    Returns:
        Both (R, 3).

    Source: Hartley and Zisserman (2004), Multiple View Geometry, section 6.1.
    """
    right = (pixels[:, 0] - width / 2) / focals
    up = (height / 2 - pixels[:, 1]) / focals
    in_camera = torch.stack([right, up, -torch.ones_like(up)], dim=-1)
    directions = (poses[:, :, :3] * in_camera[:, None, :]).sum(-1)
    return poses[:, :, 3], torch.nn.functional.normalize(directions, dim=-1)


def rays_of_indices(indices: Tensor, poses: Tensor, focals: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rays through the middles of pixels, counted view by view and row by row.

    Args:
        indices: (R,), from 0 to V H W - 1.
        poses: (V, 3, 4).
        focals: (V,).
        height, width: of every picture.

    Returns:
        Origins and directions, (R, 3).
    """
    views, pixels = indices // (height * width), indices % (height * width)
    centres = torch.stack([pixels % width, pixels // width], dim=-1) + 0.5
    return rays_of_pixels(centres, poses[views], focals[views], height, width)


def rays_of_view(pose: Tensor, focal: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """All rays of one picture, row by row, (H W, 3); `pose` (3, 4), `focal` ()."""
    indices = torch.arange(height * width, device=pose.device)
    return rays_of_indices(indices, pose[None], focal[None], height, width)


def clip_to_cube(origins: Tensor, directions: Tensor, bound: float, near: float, far: float) -> tuple[Tensor, Tensor]:
    """The part of [near, far] of each ray that lies in the cube [-bound, bound]^3; of no length where there is none.

    Args:
        origins, directions: (R, 3).
        bound, near, far: lengths.

    Returns:
        Distances at which the part starts and ends, (R,), start <= end.

    Source: Kay and Kajiya (1986), Ray Tracing Complex Scenes (slabs).
    """
    safe = torch.where(directions.abs() < LEAST_COMPONENT, LEAST_COMPONENT, directions)
    first, second = (-bound - origins) / safe, (bound - origins) / safe
    start = torch.minimum(first, second).amax(-1).clamp(near, far)
    end = torch.maximum(first, second).amin(-1).clamp(near, far)
    return start, torch.maximum(start, end)


def stratified_distances(start: Tensor, end: Tensor, num_samples: int, random: bool) -> tuple[Tensor, Tensor]:
    """One distance in each of S equal intervals of [start, end]: t_i = start + (i + u_i) w, w = (end - start) / S.

    The intervals fill [start, end] without a gap, so optical depth of a constant density is exact, and the far plane is closed:
    the last interval ends there instead of reaching to infinity.

    Args:
        start, end: (R,).
        num_samples: S.
        random: u_i uniform in [0, 1); else 1/2.

    Returns:
        Distances (R, S) and the width of a ray's intervals, (R, 1).

    Source: Mildenhall et al. (2020), NeRF, equation 2.
    """
    places = torch.arange(num_samples, device=start.device, dtype=start.dtype)
    widths = ((end - start) / num_samples)[:, None]
    offsets = torch.rand(len(start), num_samples, device=start.device, dtype=start.dtype) if random else 0.5
    return start[:, None] + (places + offsets) * widths, widths


def orbit_poses(azimuths: Tensor, elevations: Tensor, radius: float) -> Tensor:
    """Cameras on a sphere that look at its middle, z up: poses (V, 3, 4).

    Args:
        azimuths, elevations: (V,), radians.
        radius: of the sphere.
    """
    horizontal = elevations.cos()
    backward = torch.stack([horizontal * azimuths.cos(), horizontal * azimuths.sin(), elevations.sin()], dim=-1)
    right = torch.stack([-azimuths.sin(), azimuths.cos(), torch.zeros_like(azimuths)], dim=-1)
    up = torch.linalg.cross(backward, right)
    return torch.stack([right, up, backward, radius * backward], dim=-1)
