"""Cameras and samples against projection, brute force and the uniform distribution."""

import numpy as np
import pytest
import torch
from scipy import stats

from trainbook.workflows.nerf.rays import (
    clip_to_cube,
    orbit_poses,
    rays_of_indices,
    rays_of_pixels,
    rays_of_view,
    stratified_distances,
)


@pytest.fixture
def poses():
    generator = torch.Generator().manual_seed(3)
    return orbit_poses(6.28 * torch.rand(5, generator=generator), 1.2 * torch.rand(5, generator=generator), 4.0)


def test_orbit_poses_are_rotations_that_look_at_the_origin(poses):
    rotations = poses[:, :, :3]
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).expand(5, 3, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(5))
    torch.testing.assert_close(poses[:, :, 3], 4 * rotations[:, :, 2])  # it stands where its backward axis points
    assert (rotations[:, 2, 1] > 0).all()  # up in the picture is up in the world


def test_the_ray_of_a_projected_point_passes_through_the_point(poses):
    generator = torch.Generator().manual_seed(4)
    focal, height, width = 90.0, 60, 80
    for pose in poses:
        points = torch.rand(20, 3, generator=generator) * 2 - 1
        camera = torch.cat([pose, torch.tensor([[0.0, 0.0, 0.0, 1.0]])]).inverse()
        x, y, z = (torch.cat([points, torch.ones(20, 1)], 1) @ camera.T)[:, :3].T
        assert (z < 0).all()  # in front of it
        pixels = torch.stack([width / 2 + focal * x / -z, height / 2 - focal * y / -z], dim=-1)
        origins, directions = rays_of_pixels(pixels, pose.expand(20, 3, 4), torch.full((20,), focal), height, width)
        offsets = points - origins
        torch.testing.assert_close(directions, offsets / offsets.norm(dim=-1, keepdim=True), rtol=0, atol=1e-5)


def test_indices_count_view_by_view_and_row_by_row(poses):
    focals = torch.linspace(20, 40, 5)
    expected = [rays_of_view(pose, focal, 6, 9) for pose, focal in zip(poses, focals, strict=True)]
    found = rays_of_indices(torch.arange(5 * 54), poses, focals, 6, 9)
    for part in range(2):
        torch.testing.assert_close(found[part], torch.cat([rays[part] for rays in expected]))
    middle = rays_of_pixels(torch.tensor([[2.5, 1.5]]), poses[3:4], focals[3:4], 6, 9)[1]
    torch.testing.assert_close(found[1][3 * 54 + 9 + 2], middle[0])


def test_the_part_in_the_cube_is_what_brute_force_finds():
    generator = torch.Generator().manual_seed(5)
    origins = torch.randn(60, 3, generator=generator) * 2
    directions = torch.nn.functional.normalize(torch.randn(60, 3, generator=generator) - 0.4 * origins, dim=-1)
    directions[0] = torch.tensor([0.0, 0.0, 1.0])  # parallel to four faces
    origins[0] = torch.tensor([0.5, 0.5, -3.0])
    start, end = clip_to_cube(origins, directions, 1.0, 0.5, 5.0)
    steps = torch.linspace(0.5, 5.0, 20_001)
    inside = ((origins[:, None] + steps[:, None] * directions[:, None]).abs() <= 1.0).all(-1)
    assert inside.any(1).sum() > 10
    for ray in range(60):
        if inside[ray].any():
            assert float(start[ray]) == pytest.approx(float(steps[inside[ray]][0]), abs=1e-3)
            assert float(end[ray]) == pytest.approx(float(steps[inside[ray]][-1]), abs=1e-3)
        else:
            assert float(end[ray] - start[ray]) < 1e-3


def test_one_sample_uniform_in_each_interval():
    torch.manual_seed(6)
    start, end = torch.full((3000,), 2.0), torch.full((3000,), 4.0)
    distances, widths = stratified_distances(start, end, 5, random=True)
    shares = (distances - start[:, None]) / widths - torch.arange(5)
    assert ((shares > -1e-5) & (shares < 1 + 1e-5)).all()
    assert all(stats.kstest(shares[:, index].numpy(), "uniform").pvalue > 1e-3 for index in range(5))
    assert abs(np.corrcoef(shares.numpy().T)[0, 1]) < 0.06  # drawn one by one
    middles, _ = stratified_distances(start[:1], end[:1], 5, random=False)
    torch.testing.assert_close(middles, torch.tensor([[2.2, 2.6, 3.0, 3.4, 3.8]]))
