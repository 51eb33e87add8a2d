"""Held-out metrics of samples, with and without guidance, beside Gaussians, noise and the held-out images themselves."""

import torch
from torch import Tensor

from trainbook.data import Data
from trainbook.state import TrainState
from trainbook.workflows.diffusion.config import Config
from trainbook.workflows.diffusion.data import NUM_CLASSES
from trainbook.workflows.diffusion.judge import features_and_answers, frechet_distance, gaussian_samples, nearest
from trainbook.workflows.diffusion.model import draw_samples
from trainbook.workflows.diffusion.training import CLASSIFIER, UNET, held_out_loss

BASELINE_SEED = 7


def evaluate(config: Config, data: Data, state: TrainState) -> dict[str, float]:
    """Frechet distance to the training images, conditional accuracy and distance to the nearest training image of everybody.

    `nearest_distance` is a median; `nearest_distance_share` is it over that of the held-out images: far below 1 is memory.
    """
    classifier, unet, training = state.modules[CLASSIFIER], state.modules[UNET], data.train["images"]
    reference, _ = features_and_answers(classifier, training)
    metrics = {}
    for who, (images, labels) in candidates(config, data, state).items():
        features, answers = features_and_answers(classifier, images)
        metrics[f"{who}/frechet_distance"] = frechet_distance(features, reference)
        if labels is not None:
            metrics[f"{who}/conditional_accuracy"] = float((answers == labels).float().mean())
        metrics[f"{who}/nearest_distance"] = float(nearest(images, training)[0].median())
    for who in ("samples", "guided"):
        metrics[f"{who}/nearest_distance_share"] = metrics[f"{who}/nearest_distance"] / metrics["held_out/nearest_distance"]
    with torch.no_grad():
        unet.eval()
        metrics["samples/held_out_loss"] = held_out_loss(unet, config, data.test["images"], data.test["labels"])
        unet.train()
    return metrics


def candidates(config: Config, data: Data, state: TrainState) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Who to images (N, C, H, W) in [0, 1] and the classes they were asked for, or None where nobody asked.

    samples: the model's, scale 1; guided: at `guidance_scale`; held_out: real images, the floor that finite numbers allow;
    class_gaussians: a full-covariance normal distribution per class; gaussian: one for all; noise: uniform pixels.
    """
    unet, training, labels = state.modules[UNET], data.train["images"], data.train["labels"]
    shape, number = tuple(training.shape[1:]), config.num_samples
    generator = torch.Generator().manual_seed(BASELINE_SEED)
    asked = torch.arange(number, device=labels.device) % NUM_CLASSES
    per_class = torch.empty(number, *shape, device=training.device)
    for k in range(NUM_CLASSES):
        per_class[asked == k] = gaussian_samples(training[labels == k], int((asked == k).sum()), generator)
    return {
        "samples": draw_samples(unet, config, shape, number, 1.0),
        "guided": draw_samples(unet, config, shape, number, config.guidance_scale),
        "held_out": (data.test["images"][:number], data.test["labels"][:number]),
        "class_gaussians": (per_class, asked),
        "gaussian": (gaussian_samples(training, number, generator), None),
        "noise": (torch.rand(number, *shape, generator=generator).to(training.device), None),
    }
