"""A baseline without training: random units of a PCA code, read out by ridge regression."""

# N sentences, D numbers of a vector, K of a code, F features

import torch
from torch import Tensor
from torch.nn import functional

from trainbook.workflows.cellular_cube.principal import Principal
from trainbook.workflows.cellular_cube.readout_fit import PENALTIES, ridge_towards


def random_feature_output(
    principal: Principal, size: int, num_features: int, train: Tensor, valid: Tensor, test: Tensor, seed: int
) -> Tensor:
    """Decode PCA codes by gelu(W z + b), W and b random, and a ridge regression whose penalty is best on valid.

    Args:
        principal: components of `train`.
        size: K.
        num_features: F, as many as the cube's read-out reads.
        train, valid, test: (N, D), standardised.
        seed: of W and b.

    Returns:
        (N, D), of the test vectors.

    Source: Rahimi and Recht (2008), Weighted Sums of Random Kitchen Sinks.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = principal.components[:size].cpu()
    gain = principal.variances[:size].sum().div(size).clamp(min=1e-12).sqrt().cpu()
    W = torch.randn(num_features, len(kept), generator=generator) / len(kept) ** 0.5
    b = 0.5 * torch.randn(num_features, generator=generator)

    def features(vectors: Tensor) -> Tensor:
        code = vectors.cpu() @ kept.T / gain
        return torch.cat([code, functional.gelu(code @ W.T + b)], 1)

    start = torch.cat([kept.T * gain, torch.zeros(kept.shape[1], num_features)], 1)
    parts = [features(vectors) for vectors in (train, valid, test)]
    best: tuple[float, Tensor] = (float((parts[1] @ start.T - valid.cpu()).square().sum()), parts[2] @ start.T)
    for penalty in PENALTIES:
        weight, bias = ridge_towards(parts[0], train.cpu(), start, penalty)
        error = float((parts[1] @ weight.T + bias - valid.cpu()).square().sum())
        best = min(best, (error, parts[2] @ weight.T + bias), key=lambda found: found[0])
    return best[1].to(test)
