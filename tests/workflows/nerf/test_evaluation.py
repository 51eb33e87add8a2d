"""Metrics against scikit-image and brute force; a field learns; the real scene where it is there."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from trainbook.seeding import seed_step
from trainbook.workflows.nerf.config import Config
from trainbook.workflows.nerf.data import load_data
from trainbook.workflows.nerf.evaluation import baselines, evaluate, psnr
from trainbook.workflows.nerf.training import build, ray_loss, squared_errors, train

LEGO = Path(__file__).parents[4] / "shared/data/nerf/lego100_train100_white.npz"  # beside the checkout
RUNTIME = SimpleNamespace(device="cpu")


def trained(config):
    """Held-out metrics after all steps, seeded as the engine does."""
    data = load_data(config, RUNTIME)
    torch.manual_seed(config.seed)
    state = build(config, data, RUNTIME)
    records = train(config, data, state)
    seed_step(config.seed, 0)
    for _ in records:
        seed_step(config.seed, state.step)
    return evaluate(config, data, state)


def test_psnr_is_scikit_images():
    found, true = torch.rand(2, 3, 9, 8, 3, dtype=torch.float64)
    expected = [peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1.0) for a, b in zip(found, true, strict=True)]
    torch.testing.assert_close(psnr(found, true), torch.tensor(expected, dtype=torch.float64))


def test_the_nearest_view_is_the_one_brute_force_finds():
    data = load_data(Config.from_preset("smoke"), RUNTIME)
    nearest = baselines(data)["nearest_view"]
    for index, pose in enumerate(data.test["poses"]):
        distances = [float((pose[:, 3] - other[:, 3]).norm()) for other in data.train["poses"]]
        assert torch.equal(nearest[index], data.train["images"][distances.index(min(distances))])


def test_the_best_of_one_colour_is_the_training_pictures_mean():
    data = load_data(Config.from_preset("smoke"), RUNTIME)
    mean, images = baselines(data)["mean_colour"][0, 0, 0], data.train["images"]
    for change in (0.02, -0.02):
        assert (images - mean).square().mean() < (images - mean - change).square().mean()


def test_the_loss_is_the_error_of_the_pixels_of_those_rays():
    config = Config.from_preset("smoke")
    data = load_data(config, RUNTIME)
    renderer = build(config, data, RUNTIME).modules["mlp"].eval()
    colours = data.train["images"].flatten(0, 2)
    views = {name: tensor[1:2] for name, tensor in data.train.items()}
    indices = torch.arange(256, 512)  # the second view's pixels
    with torch.no_grad():
        torch.testing.assert_close(ray_loss(renderer, indices, data.train, colours), squared_errors(renderer, views)[0])


def test_the_grid_learns_the_scene_in_seconds():
    config = Config.from_preset(
        "smoke", {"fields": "grid", "num_cameras": 48, "grid_size": 20, "grid_epochs": 10, "num_rays": 256, "validate_every": 0}
    )
    metrics = trained(config)
    assert metrics["grid/psnr_db"] > metrics["nearest_view/psnr_db"] + 1.5
    assert metrics["grid/psnr_db"] > metrics["mean_colour/psnr_db"] + 6


@pytest.mark.slow
@pytest.mark.skipif(not LEGO.is_file(), reason="lego is not in ../shared/data/nerf")
def test_both_fields_learn_the_real_lego():
    fields = {"dataset": "packed", "data_file": str(LEGO), "image_size": 32, "test_views": 12, "num_epochs": 4, "grid_epochs": 3}
    metrics = trained(Config.from_preset("laptop", fields))
    for name in ("mlp", "grid"):
        assert metrics[f"{name}/psnr_db"] > metrics["nearest_view/psnr_db"] + 1.5
        assert metrics[f"{name}/psnr_db"] > metrics["mean_colour/psnr_db"] + 5
