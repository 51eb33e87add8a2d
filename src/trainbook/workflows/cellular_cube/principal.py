"""Principal components of the training vectors: where the transformer and the read-out start, and the first baseline."""

# D numbers of a vector, K of a code

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Principal:
    """Standard units and principal components.

    Attributes:
        mean: (D,), of the training vectors.
        scale: root mean square of a centred number, over all of them: predicting the mean has a squared error of 1.
        components: (D, D), orthonormal rows by falling variance.
        variances: (D,), of the standardised vectors along each; they sum to D.
    """

    mean: Tensor
    scale: Tensor
    components: Tensor
    variances: Tensor

    def standardised(self, vectors: Tensor) -> Tensor:
        """(vector - mean) / scale."""
        return (vectors - self.mean) / self.scale

    def reconstructed(self, vectors: Tensor, size: int) -> Tensor:
        """Standardised vectors, projected on the first components."""
        kept = self.components[:size]
        return self.standardised(vectors) @ kept.T @ kept


def fit_principal(vectors: Tensor) -> Principal:
    """Principal components by the eigenvectors of the covariance, in double precision.

    Args:
        vectors: (n, D).
    """
    wide = vectors.double()
    mean = wide.mean(0)
    centred = wide - mean
    covariance = centred.T @ centred / len(wide)
    scale = covariance.diagonal().mean().clamp(min=1e-12).sqrt()
    values, axes = torch.linalg.eigh(covariance / scale**2)
    components = axes.T.flip(0)
    largest = components.abs().argmax(1, keepdim=True)
    components = components * components.gather(1, largest).sign()  # an eigenvector's sign is arbitrary
    parts = (mean, scale, components, values.flip(0).clamp(min=0))
    return Principal(*(part.to(vectors.dtype) for part in parts))


def best_linear_fvu(variances: Tensor, size: int) -> float:
    """The least share of variance that a linear code of this size leaves unexplained: 1 - sum_{i <= k} l_i / sum l."""
    return float(1 - variances[:size].sum() / variances.sum())
