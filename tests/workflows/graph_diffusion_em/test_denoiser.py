"""The whole denoiser on photographs, and against the baselines."""

import pytest
import torch
from skimage import data as photos

from trainbook.workflows.graph_diffusion_em import baselines
from trainbook.workflows.graph_diffusion_em.codebook import start_codebook
from trainbook.workflows.graph_diffusion_em.config import Config
from trainbook.workflows.graph_diffusion_em.denoiser import codebook_estimate, denoise, polish_scales
from trainbook.workflows.graph_diffusion_em.mixture import em_step
from trainbook.workflows.graph_diffusion_em.patches import mean_columns, patchify

SIGMA = 25 / 255
SETTINGS = Config(num_components=16, num_neighbours=12, search_radius=7, polish_neighbours=23)


def psnr(image, clean):
    return -10 * float((image.clamp(0, 1) - clean).square().mean().log10())


@pytest.fixture(scope="module")
def mixture():
    """Fitted to the left half of a photograph whose right half is denoised."""
    camera = torch.from_numpy(photos.camera() / 255).float()
    z = patchify(camera[None, 100:300, :240], 8, 2)[:, ~mean_columns(8, 1)]
    found = start_codebook(SETTINGS, z)
    for _ in range(8):
        em_step(found, z)
    return found


@pytest.fixture(scope="module")
def pictures():
    clean = torch.from_numpy(photos.camera() / 255).float()[None, 120:216, 300:396]
    return clean + SIGMA * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)), clean


def test_every_part_adds_and_non_local_means_is_beaten(mixture, pictures):
    noisy, clean = pictures
    found = denoise(SETTINGS, mixture, noisy, SIGMA)
    nlm = psnr(baselines.non_local_means()(noisy, SIGMA), clean)
    assert psnr(noisy, clean) + 5 < psnr(found.pilot, clean) < psnr(found.diffused, clean) < psnr(found.image, clean)
    assert psnr(found.image, clean) > nlm


@pytest.mark.parametrize("diffusion", ["heat", "pagerank", "explicit"])
def test_diffusion_by_a_laplacian_removes_noise(mixture, pictures, diffusion):
    noisy, clean = pictures
    changed = SETTINGS.model_copy(update={"diffusion": diffusion, "polish_passes": 0})
    time = torch.full((64,), 3.0)
    found = denoise(changed, mixture, noisy, SIGMA, time)
    assert psnr(found.image, clean) > psnr(noisy, clean) + 4
    with pytest.raises(ValueError, match="time per coefficient"):
        denoise(changed, mixture, noisy, SIGMA)


def test_parts_that_are_left_out_are_left_out(mixture, pictures):
    noisy, _ = pictures
    bare = SETTINGS.model_copy(update={"diffusion": "none", "polish_passes": 0})
    found = denoise(bare, mixture, noisy, SIGMA)
    assert torch.equal(found.image, codebook_estimate(mixture, noisy, SIGMA, 8, bare.codebook_stride))
    assert found.diffused is None
    assert not found.attention


def test_coarse_scales_are_polished_at_their_noise_and_their_change_is_added(pictures):
    """A picture of 96 x 96 at half its size, by hand; the width that 2 does not divide keeps its size."""
    noisy, _ = pictures
    plain = SETTINGS.model_copy(update={"polish_scales": 0})
    image = torch.nn.functional.avg_pool2d(noisy, 5, 1, 2)
    halves = [one.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4)) for one in (noisy, image)]
    change = polish_scales(plain, *halves, SIGMA / 2) - halves[1]
    change = torch.nn.functional.interpolate(change[None], scale_factor=2, mode="bilinear")[0]
    once = SETTINGS.model_copy(update={"polish_scales": 1})
    torch.testing.assert_close(polish_scales(once, noisy, image, SIGMA), polish_scales(plain, noisy, image + change, SIGMA))
    assert polish_scales(SETTINGS, noisy[:, :, :-3], image[:, :, :-3], SIGMA).shape == (1, 96, 93)
    small = noisy[:, :22, :22], image[:, :22, :22]  # its half has no window with enough patches
    assert torch.equal(polish_scales(once, *small, SIGMA), polish_scales(plain, *small, SIGMA))


def test_coarse_scales_remove_noise_that_is_wider_than_a_patch():
    clean = torch.full((1, 96, 96), 0.5)
    noisy = clean + SIGMA * torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    image = torch.nn.functional.avg_pool2d(noisy, 9, 1, 4)
    with_scales, without = (
        polish_scales(SETTINGS.model_copy(update={"polish_scales": scales}), noisy, image, SIGMA) for scales in (2, 0)
    )
    assert psnr(with_scales, clean) > psnr(without, clean) + 1


def test_a_clean_picture_stays_as_the_noise_goes_to_nothing(mixture, pictures):
    _, clean = pictures
    assert psnr(denoise(SETTINGS, mixture, clean, 1.0 / 255).image, clean) > 45


def test_colour_uses_what_channels_share(mixture):
    """A grey picture in three channels with independent noise is denoised better than any of its channels alone."""
    camera = torch.from_numpy(photos.camera() / 255).float()[None]
    grey, g = camera[:, 120:184, 300:364], torch.Generator().manual_seed(1)
    z = patchify(camera[:, 100:300, :240].expand(3, -1, -1), 8, 3)[:, ~mean_columns(8, 3)]
    three = start_codebook(SETTINGS, z)
    em_step(three, z)
    clean = grey.expand(3, -1, -1)
    noisy = clean + SIGMA * torch.randn(clean.shape, generator=g)
    together = denoise(SETTINGS, three, noisy, SIGMA).image
    apart = denoise(SETTINGS, mixture, noisy[:1], SIGMA).image
    assert psnr(together, clean) > psnr(apart, grey) + 1


def test_baselines_are_the_libraries_and_the_best_of_is_best(pictures):
    noisy, clean = pictures
    widths = (0.3, 1.0, 4.0)
    errors = {w: float((baselines.blur(w)(noisy, SIGMA) - clean).square().mean()) for w in widths}
    best = baselines.best_of(baselines.blur, widths, noisy[None], clean[None], SIGMA)
    assert float((best(noisy, SIGMA) - clean).square().mean()) == min(errors.values())
    for method in (baselines.total_variation(1.0), baselines.non_local_means()):
        assert psnr(method(noisy, SIGMA), clean) > psnr(noisy, clean) + 5
        colour = noisy.expand(3, -1, -1)
        assert method(colour, SIGMA).shape == colour.shape


def test_the_patch_mixture_improves_on_its_own_first_estimate(mixture, pictures):
    noisy, clean = pictures
    assert psnr(baselines.patch_mixture(mixture, 8, 1)(noisy, SIGMA), clean) > psnr(noisy, clean) + 6
