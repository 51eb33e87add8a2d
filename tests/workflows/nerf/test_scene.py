"""The scene's rays against marching, and the renderer against the scene."""

import pytest
import torch

from trainbook.workflows.nerf.rays import clip_to_cube, orbit_poses, rays_of_view, stratified_distances
from trainbook.workflows.nerf.rendering import composite
from trainbook.workflows.nerf.scene import intersect, photograph, spheres_on_a_disc

SIZE, FOCAL = 24, 33.0
HALF_THICKNESS = 0.004  # of the disc as a solid


def view():
    pose = orbit_poses(torch.tensor([0.7]), torch.tensor([0.5]), 4.0)[0]
    return pose, rays_of_view(pose, torch.tensor(FOCAL), SIZE, SIZE)


def distance_to_surface(scene, points):
    """Signed distance to the nearest solid, the disc as a plate of no thickness."""
    spheres = (points[..., None, :] - scene.centres).norm(dim=-1) - scene.radii
    outside = (points[..., :2].norm(dim=-1) - scene.disc_radius).clamp(min=0)
    disc = torch.hypot(outside, points[..., 2] - scene.disc_height)
    return torch.minimum(spheres.amin(-1), disc)


def test_rays_meet_what_sphere_tracing_meets():
    scene, (_, (origins, directions)) = spheres_on_a_disc(), view()
    found = intersect(scene, origins, directions).distance
    t = torch.zeros(len(origins), dtype=torch.float64)
    for _ in range(600):
        t += distance_to_surface(scene, origins.double() + t[:, None] * directions.double())
    is_hit = t < 10
    assert 0.2 < is_hit.float().mean() < 0.9
    assert (is_hit == found.isfinite()).float().mean() > 0.995  # grazing rays may need more steps
    both = is_hit & found.isfinite()
    assert (found[both] - t[both]).abs().quantile(0.99) < 1e-3


def test_compositing_an_opaque_scene_is_ray_intersection():
    scene, (_, rays) = spheres_on_a_disc(), view()
    hits = intersect(scene, *rays)
    distances, widths = stratified_distances(*clip_to_cube(*rays, 1.5, 2.0, 6.0), 3000, random=False)
    points = rays[0][:, None] + distances[..., None] * rays[1][:, None]
    in_spheres = ((points[..., None, :] - scene.centres).norm(dim=-1) < scene.radii).any(-1)
    in_disc = (points[..., 2] - scene.disc_height).abs() < HALF_THICKNESS
    in_disc &= points[..., :2].norm(dim=-1) < scene.disc_radius
    densities = torch.where(in_spheres | in_disc, 1e5, 0.0)
    pixels = composite(densities, hits.colour[:, None].expand(-1, 3000, 3), distances, widths, 6.0)
    is_hit = hits.distance.isfinite()
    assert ((pixels.opacity > 0.99) == is_hit).float().mean() > 0.99  # the plate's rim
    agree = (pixels.opacity > 0.99) & is_hit
    assert (pixels.depth[agree] - hits.distance[agree]).abs().quantile(0.98) < 0.01 + HALF_THICKNESS
    missed = (pixels.opacity < 0.01) & ~is_hit
    assert torch.equal(pixels.colour[missed], torch.ones(int(missed.sum()), 3))
    torch.testing.assert_close(pixels.colour[agree], hits.colour[agree], rtol=0, atol=1e-4)


def test_a_picture_is_the_mean_over_its_pixels():
    scene, (pose, (origins, directions)) = spheres_on_a_disc(), view()
    coarse, fine = (photograph(scene, pose, FOCAL, SIZE, supersampling) for supersampling in (4, 16))
    assert float((coarse - fine).square().mean().sqrt()) < 0.015
    middles = intersect(scene, origins, directions).colour.view(SIZE, SIZE, 3)
    assert torch.equal(photograph(scene, pose, FOCAL, SIZE, 1), middles)
    assert float((middles - fine).square().mean().sqrt()) > 2 * float((coarse - fine).square().mean().sqrt())


def test_light_follows_lamberts_law_on_the_disc_and_no_ray_sees_below():
    scene = spheres_on_a_disc()
    down = torch.tensor([[0.0, 0.0, -1.0]])
    hit = intersect(scene, torch.tensor([[0.2, -1.1, 3.0]]), down)
    expected = scene.disc_colours[(0 + -4) % 2] * (0.3 + 0.7 * scene.light[2])
    torch.testing.assert_close(hit.colour[0], expected)
    assert float(hit.distance[0]) == pytest.approx(3.0 - scene.disc_height)
    assert intersect(scene, torch.tensor([[0.0, 1.3, 3.0]]), down).distance.isinf().all()
