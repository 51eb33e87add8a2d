"""How alike vectors are to what they should be, and two sets of vectors to each other."""

# N sentences, D numbers of a vector

from collections.abc import Mapping

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional

COLLAPSED = 0.1  # of the teacher's participation ratio: below it the alarm is raised


def reconstruction_quality(output: Tensor, target: Tensor, mean: Tensor, scale: float) -> dict[str, float]:
    """Error and cosine in standard units and in the teacher's own.

    fvu = sum |o - t|^2 / sum |t|^2, where 1 is what predicting the training mean scores; raw_mse = scale^2 mean (o - t)^2;
    cosine is between the raw vectors, centred_cosine between the standardised ones: a common direction counts for nothing.

    Args:
        output, target: (N, D), standardised.
        mean: (D,) of the raw training vectors.
        scale: raw = standardised * scale + mean.
    """
    output, target, mean = output.double(), target.double(), mean.double().to(output.device)
    error = (output - target).square()
    return {
        "fvu": float(error.sum() / target.square().sum()),
        "raw_mse": float(error.mean() * scale**2),
        "cosine": float(functional.cosine_similarity(output * scale + mean, target * scale + mean).mean()),
        "centred_cosine": float(functional.cosine_similarity(output, target).mean()),
    }


def participation_ratio(vectors: Tensor) -> float:
    """Effective number of dimensions: (sum l)^2 / sum l^2 over the covariance's eigenvalues l; D for isotropic vectors.

    Computed without eigenvalues: sum l = tr C and sum l^2 = |C|_F^2.

    Args:
        vectors: (N, D), N >= 2.
    """
    centred = vectors.double() - vectors.double().mean(0)
    # |X^T X|_F = |X X^T|_F: the smaller of the two products
    gram = centred.T @ centred if len(centred) > centred.shape[1] else centred @ centred.T
    squares = gram.square().sum()
    return float(gram.trace() ** 2 / squares) if squares > 0 else 0.0


def norm_summary(output: Tensor, target: Tensor) -> dict[str, float]:
    """Norms and spread of the output beside the target's, and an alarm (1 or 0) where it collapses to few directions.

    Args:
        output, target: (N, D), N >= 2.
    """
    ratio, reference = participation_ratio(output), participation_ratio(target)
    return {
        "norm": float(output.norm(dim=1).mean()),
        "norm_deviation": float(output.norm(dim=1).std()),
        "dimension_deviation": float(output.std(0).mean()),
        "participation_ratio": ratio,
        "collapse": float(ratio < COLLAPSED * reference),
    }


def cosine_matrix(vectors: Tensor) -> Tensor:
    """Cosine of each pair of (N, D) vectors, (N, N)."""
    unit = functional.normalize(vectors.double(), dim=1)
    return unit @ unit.T


def representational_similarity(vectors: Tensor, others: Tensor) -> float:
    """Spearman correlation of the two sets' cosines over all pairs of sentences, in [-1, 1].

    Args:
        vectors, others: (N, D) and (N, E), N >= 3, of the same sentences.

    Source: Kriegeskorte, Mur, Bandettini (2008), Representational similarity analysis.
    """
    above = torch.triu_indices(len(vectors), len(vectors), 1)
    a, b = (cosine_matrix(one)[above[0], above[1]].cpu().numpy() for one in (vectors, others))
    if np.ptp(a) == 0 or np.ptp(b) == 0:  # all pairs alike: there is no order to compare
        return 0.0
    return float(stats.spearmanr(a, b).statistic)


def linear_cka(vectors: Tensor, others: Tensor) -> float:
    """Linear centred kernel alignment: |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F) of centred X, Y, in [0, 1].

    1 for the same vectors up to rotation, shift and scale.

    Args:
        vectors, others: (N, D) and (N, E), of the same sentences.

    Source: Kornblith et al. (2019), Similarity of Neural Network Representations Revisited, section 3.
    """
    x, y = (one.double() - one.double().mean(0) for one in (vectors, others))
    norms = (x.T @ x).norm() * (y.T @ y).norm()
    return float((y.T @ x).square().sum() / norms) if norms > 0 else 0.0


def similarity_table(target: Tensor, layers: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Both measures of each named layer against the target: name to {"rsa", "cka"}."""
    return {
        name: {"rsa": representational_similarity(layer, target), "cka": linear_cka(layer, target)}
        for name, layer in layers.items()
    }
