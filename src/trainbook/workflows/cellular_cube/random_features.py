"""A baseline without training: random units of a PCA code, read out by ridge regression."""

# N sentences, D numbers of a vector, K of a code, F features

import torch
from torch import Tensor
from torch.nn import functional

from trainbook.workflows.cellular_cube.principal import Principal
from trainbook.workflows.cellular_cube.readout import fit_surplus
from trainbook.workflows.cellular_cube.readout_fit import best_ridge


def random_feature_output(
    principal: Principal, size: int, num_features: int, train: Tensor, valid: Tensor, test: Tensor, seed: int
) -> Tensor:
    """Decode PCA codes by gelu(W z + b), W and b random, and a ridge regression whose penalty is best on valid.

    The regression is the cube's: beside the code it sees what no linear map of the code foretells of the units.

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

    codes = [vectors.cpu() @ kept.T / gain for vectors in (train, valid, test)]
    units = [functional.gelu(code @ W.T + b) for code in codes]
    surplus = fit_surplus(codes[0], units[0])
    parts = [torch.cat([code, surplus.of(code, unit)], 1) for code, unit in zip(codes, units, strict=True)]
    start = torch.cat([kept.T * gain, torch.zeros(kept.shape[1], num_features)], 1)
    nothing = torch.zeros(len(start)).to(start)
    fit = best_ridge((parts[0], train.cpu()), (parts[1], valid.cpu()), (start, nothing), [])
    return (parts[2] @ fit.weight.T + fit.bias).to(test)
