"""Held-out metrics of the fields beside those of the nearest training view and of the mean colour."""

# V views, H height, W width

import torch
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from trainbook.data import Data
from trainbook.state import TrainState
from trainbook.workflows.nerf.config import Config
from trainbook.workflows.nerf.model import render_view
from trainbook.workflows.nerf.rays import rays_of_view

SSIM_WINDOW = 7  # pixels, scikit-image's default


def evaluate(config: Config, data: Data, state: TrainState) -> dict[str, float]:
    """PSNR, its lowest over views, SSIM, gain over the nearest view; for the embedded scene also the error of the depth.

    The depth's error is the median over the rays that meet something, in the scene's unit.
    """
    images = data.test["images"]
    size = tuple(images.shape[1:3])
    seen = {name: render_views(state.modules[name], data.test["poses"], data.test["focals"], size) for name in config.field_names}
    metrics = {}
    for who, colours in ({name: view[0] for name, view in seen.items()} | baselines(data)).items():
        psnrs = psnr(colours, images)
        metrics |= {
            f"{who}/psnr_db": float(psnrs.mean()),
            f"{who}/worst_psnr_db": float(psnrs.min()),
            f"{who}/ssim": mean_ssim(colours, images),
        }
    for name, (_, depths) in seen.items():
        metrics[f"{name}/gain_over_nearest_view_db"] = metrics[f"{name}/psnr_db"] - metrics["nearest_view/psnr_db"]
        if "depths" in data.test:
            is_hit = data.test["depths"].isfinite()
            metrics[f"{name}/median_depth_error"] = float((depths - data.test["depths"])[is_hit].abs().median())
    return metrics


@torch.no_grad()
def render_views(renderer: nn.Module, poses: Tensor, focals: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Colours (V, H, W, 3) and depths (V, H, W) seen from cameras, without random numbers.

    Args:
        renderer: a `Renderer`.
        poses: (V, 3, 4).
        focals: (V,), in pixels.
        size: (H, W).
    """
    was_training = renderer.training
    renderer.eval()
    views = [render_view(renderer, rays_of_view(pose, focal, *size)) for pose, focal in zip(poses, focals, strict=True)]
    renderer.train(was_training)
    return torch.stack([view.colour.view(*size, 3) for view in views]), torch.stack([view.depth.view(size) for view in views])


def baselines(data: Data) -> dict[str, Tensor]:
    """What one can say of the test views without a field, (V, H, W, 3): the picture of the nearest camera, or one colour."""
    train, test = data.train, data.test
    nearest = torch.cdist(test["poses"][:, :, 3], train["poses"][:, :, 3]).argmin(1)
    mean = train["images"].mean(dim=(0, 1, 2))
    return {"nearest_view": train["images"][nearest], "mean_colour": mean.expand_as(test["images"])}


def psnr(found: Tensor, true: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, -10 log10 of the mean squared error, white being 1.

    Args:
        found, true: (V, H, W, 3).

    Returns:
        (V,)
    """
    return -10 * (found - true).square().mean(dim=(1, 2, 3)).log10()


def mean_ssim(found: Tensor, true: Tensor) -> float:
    """Mean structural similarity of pictures (V, H, W, 3), by scikit-image.

    Source: Wang et al. (2004), Image Quality Assessment: From Error Visibility to Structural Similarity.
    """
    pairs = zip(found.cpu().numpy(), true.cpu().numpy(), strict=True)
    scores = [structural_similarity(a, b, win_size=SSIM_WINDOW, channel_axis=-1, data_range=1.0) for a, b in pairs]
    return sum(scores) / len(scores)
