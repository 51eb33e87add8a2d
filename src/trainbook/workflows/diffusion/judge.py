"""What judges samples: a classifier trained in the run, Frechet distance of its features, distance to training images."""

# N images, M training images, F features

import numpy as np
import torch
from torch import Tensor, nn

from trainbook.workflows.diffusion.data import NUM_CLASSES

NUM_FEATURES = 32


class Classifier(nn.Module):
    """Two convolutions, features, classes."""

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(image_shape[0], 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 16, NUM_FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> logits (N, 10)."""
        return self.head(self.body(images))


@torch.no_grad()
def features_and_answers(classifier: Classifier, images: Tensor, chunk: int = 1000) -> tuple[np.ndarray, Tensor]:
    """Features (N, F) in double precision and the likeliest classes (N,)."""
    was_training = classifier.training
    classifier.eval()
    features = torch.cat([classifier.body(part) for part in images.split(chunk)])
    answers = classifier.head(features).argmax(1)
    classifier.train(was_training)
    return features.double().cpu().numpy(), answers


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C^(1/2) C' C^(1/2))^(1/2)) of the normal distributions fitted to two sets of features.

    This is the formula of FID with other features: its values compare within one run's classifier only.

    Args:
        features: (N, F).
        reference: (M, F).

    Source: Dowson and Landau (1982), The Frechet Distance between Multivariate Normal Distributions.
    """
    (mean, covariance), (other_mean, other) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (features, reference))
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ other @ root).clip(0)).sum()
    return float(np.square(mean - other_mean).sum() + np.trace(covariance) + np.trace(other) - 2 * cross)


def nearest(images: Tensor, training: Tensor, chunk: int = 500) -> tuple[Tensor, Tensor]:
    """Euclidean distance of each image to its nearest training image, (N,), and which that is, (N,).

    Args:
        images: (N, C, H, W).
        training: (M, C, H, W).
    """
    flat = training.flatten(1)
    found = [torch.cdist(part.flatten(1), flat).min(1) for part in images.split(chunk)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def gaussian_samples(images: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Draws from the normal distribution with the mean and covariance of images, cut to [0, 1].

    m + Z (X - m) / sqrt(M - 1) with standard normal Z (number, M) has exactly that covariance, and needs no decomposition.

    Args:
        images: (M, C, H, W), X.
        number: of draws.
        generator: on the CPU.
    """
    flat = images.flatten(1)
    mean = flat.mean(0)
    weights = torch.randn(number, len(flat), generator=generator).to(flat.device) / (len(flat) - 1) ** 0.5
    return (mean + weights @ (flat - mean)).clamp(0, 1).view(number, *images.shape[1:])
