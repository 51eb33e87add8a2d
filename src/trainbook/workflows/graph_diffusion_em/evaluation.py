"""Held-out quality of the denoiser, of what is left when a part is taken out, and of the baselines; same pictures, same noise."""

from dataclasses import dataclass

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from trainbook.comparison import ABOVE, HIGH, LOW, STANDARD_ERROR
from trainbook.data import Data
from trainbook.intervals import t_interval
from trainbook.state import TrainState
from trainbook.workflows.graph_diffusion_em import baselines
from trainbook.workflows.graph_diffusion_em.ablation import ablation_metrics
from trainbook.workflows.graph_diffusion_em.baselines import Method
from trainbook.workflows.graph_diffusion_em.codebook import kmeans_codebook, training_patches
from trainbook.workflows.graph_diffusion_em.config import Config
from trainbook.workflows.graph_diffusion_em.denoiser import denoise
from trainbook.workflows.graph_diffusion_em.graph import HEADS
from trainbook.workflows.graph_diffusion_em.noise import estimate_sigma
from trainbook.workflows.graph_diffusion_em.objective import HeldOut, from_working, observe, working_sigma

NOISE_SEED = 20_261_129
BRIEF_LOSS = 0.13


@dataclass(frozen=True)
class Restored:
    """One picture by one method: peak signal-to-noise ratio in dB, structural similarity, loss."""

    psnr: float
    ssim: float
    loss: float


def noisy_pictures(config: Config, data: Data) -> tuple[Tensor, list[float]]:
    """Test pictures under noise that depends on the picture's number alone, and the level that each method is told."""
    pictures = data.test["pictures"]
    noisy = torch.stack(
        [
            observe(config, picture, torch.Generator().manual_seed(NOISE_SEED + index))
            for index, picture in enumerate(pictures.cpu())
        ]
    ).to(pictures.device)
    if config.noise_known:
        return noisy, [working_sigma(config)] * len(noisy)
    return noisy, [estimate_sigma(picture)[0] for picture in noisy]


def methods(config: Config, data: Data, state: TrainState) -> dict[str, Method]:
    """Ours, with parts taken out, and the baselines; each takes a noisy picture in the working domain and its noise level."""
    mixture, time = state.modules["codebook"], state.modules["diffusion_time"]

    def ours(codebook: torch.nn.Module = mixture, **changes: object) -> Method:
        changed = config.model_copy(update=changes)
        return lambda noisy, sigma: denoise(changed, codebook, noisy, sigma, time.time(sigma)).image

    held_out = HeldOut(config, data)
    tuned = held_out.noisy, held_out.clean, held_out.sigma
    found: dict[str, Method] = {"ours": ours()}
    if "network" in state.modules:
        network = state.modules["network"].eval()
        found["network"] = lambda noisy, sigma: network.denoise(noisy, sigma, config.crop_size)
    found |= {
        "noisy": lambda noisy, sigma: noisy,
        "blur": baselines.best_of(baselines.blur, baselines.WIDTHS, *tuned),
        "total_variation": baselines.best_of(baselines.total_variation, baselines.TV_WEIGHTS, *tuned),
        "non_local_means": baselines.non_local_means(),
        "patch_mixture": baselines.patch_mixture(mixture, config.patch_size, config.codebook_stride),
    }
    if baselines.bm3d_is_installed():
        found["bm3d"] = baselines.bm3d()
    return found | {
        "ours_no_em": ours(kmeans_codebook(config, training_patches(config, data))),
        "ours_no_diffusion": ours(diffusion="none"),
        "ours_one_head": ours(num_heads=1),
        "ours_pagerank": ours(diffusion="pagerank"),
        "ours_no_polish": ours(polish_passes=0),
    }


def judge(config: Config, restored: Tensor, clean: Tensor, clip: bool = True) -> Restored:
    """Quality of a picture in the working domain, clipped to [0, 1] unless it is the noisy one, both (C, H, W).

    Loss: mean squared error over twice the mean variance of the noise, 0.5 for the noisy picture.
    """
    image = from_working(config, restored) if clip else restored
    error = float((image - clean).double().square().mean())
    variance = config.sigma**2 + (config.photon_gain * float(clean.mean()) if config.noise == "poisson_gaussian" else 0.0)
    pair = (array.cpu().numpy().astype(float) for array in (image, clean))
    similarity = structural_similarity(*pair, data_range=1.0, channel_axis=0)
    return Restored(-10 * float(np.log10(max(error, 1e-12))), float(similarity), error / (2 * variance))


@torch.no_grad()
def evaluate(config: Config, data: Data, state: TrainState) -> dict[str, float]:
    """Metrics named "<who>/<metric>", means over test pictures with standard errors.

    psnr_db and ssim: higher is better. loss: lower, 0.5 where nothing is removed. "<who>/loss_above_ours": its loss less ours,
    with a 95 % t interval over pictures. Further: the network's held-out loss by epoch, the noise estimate, the heads' shares,
    and the ablation's ratios where its stage was run.
    """
    clean = data.test["pictures"]
    noisy, levels = noisy_pictures(config, data)
    plain = {"noisy"} if config.noise == "gaussian" else set()
    results = {
        who: [judge(config, method(y, level), x, who not in plain) for y, level, x in zip(noisy, levels, clean, strict=True)]
        for who, method in methods(config, data, state).items()
    }
    metrics: dict[str, float] = {}
    for who, pictures in results.items():
        for name, part in (("psnr_db", "psnr"), ("ssim", "ssim"), ("loss", "loss")):
            metrics |= _mean(f"{who}/{name}", [getattr(one, part) for one in pictures])
        if who != "ours" and len(clean) > 1:
            difference = [one.loss - mine.loss for one, mine in zip(pictures, results["ours"], strict=True)]
            mean, half = t_interval(difference)
            name = f"{who}/loss{ABOVE}ours"
            metrics |= {name: mean, name + LOW: mean - half, name + HIGH: mean + half}
    gains = [mine.psnr - other.psnr for mine, other in zip(results["ours"], results["non_local_means"], strict=True)]
    metrics["ours/worst_gain_over_non_local_means_db"] = min(gains)
    metrics["bm3d/is_installed"] = float(baselines.bm3d_is_installed())
    for index in range(len(clean)):
        metrics |= {f"{who}/psnr_db@picture {index}": pictures[index].psnr for who, pictures in results.items()}
    estimates = [estimate_sigma(y)[0] / working_sigma(config) for y in noisy]
    metrics |= _mean("ours/noise_estimate_over_truth", estimates)
    return metrics | _heads(config, state, noisy, levels) | _network(config, data, state) | _arms(config, data, state)


def _mean(name: str, values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {name: values[0]}
    return {name: float(np.mean(values)), name + STANDARD_ERROR: float(np.std(values, ddof=1) / len(values) ** 0.5)}


def _heads(config: Config, state: TrainState, noisy: Tensor, levels: list[float]) -> dict[str, float]:
    """Mean share of each named head, and the rise of its EM's log-likelihood."""
    if config.diffusion != "attention":
        return {}
    unpolished = config.model_copy(update={"polish_passes": 0})
    pairs = zip(noisy, levels, strict=True)
    found = [denoise(unpolished, state.modules["codebook"], y, level).attention[-1] for y, level in pairs]
    shares = torch.stack([one.shares.mean(0) for one in found]).mean(0).tolist()
    named = zip(HEADS, shares, strict=True) if config.num_heads == len(HEADS) else ()
    metrics = {f"head_{name}/share": share for name, share in named}
    if config.head_em_steps > 1:
        rises = [one.log_likelihood[-1] - one.log_likelihood[0] for one in found]
        metrics["ours/head_log_likelihood_rise"] = float(np.mean(rises))
    return metrics


def _network(config: Config, data: Data, state: TrainState) -> dict[str, float]:
    """The brief's headline: held-out loss before training, after the first epoch, and of the weights that are kept."""
    if "network" not in state.modules:
        return {}
    losses = state.modules["held_out"].losses.tolist()
    kept = HeldOut(config, data)(state.modules["network"].eval())["valid_loss"]
    below = [epoch for epoch, value in enumerate(losses) if 0 < value <= BRIEF_LOSS]
    within = [epoch for epoch, value in enumerate(losses) if epoch and 0 < value <= 1.01 * kept]
    metrics = {
        "network/loss_of_identity": losses[0],
        "network/held_out_loss_epoch_1": losses[1],
        "network/held_out_loss": kept,
        "network/loss_reduction": 1 - kept / losses[0],
        "network/epochs_to_0.13": float(below[0]) if below else float(config.num_epochs + 1),
    }
    return metrics | ({"network/epochs_to_within_1_percent": float(within[0])} if within else {})


def _arms(config: Config, data: Data, state: TrainState) -> dict[str, float]:
    if not config.ablation_seeds:
        return {}
    return ablation_metrics(config, state.modules["ablation"].losses, data.train["crops"].shape[1])
