"""The read-out in closed form: given what the back face shows, the best linear map to vectors is a ridge regression."""

# N sentences, F features (numbers of a back face), D numbers of a vector

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from trainbook.workflows.cellular_cube.network import CellularCube
from trainbook.workflows.cellular_cube.readout import Readout, present_rows

PENALTIES = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0)  # per sentence, of features in units of their deviation
PASS_SIZE = 64  # sentences in a pass
MAX_STANDARDISED = 2000  # about so many sentences say what the read-out's coordinates are


class Fit(NamedTuple):
    """A linear map, its share of variance unexplained on the validation split, and the penalty that gave it (0: none)."""

    valid_fvu: float
    penalty: float
    weight: Tensor
    bias: Tensor


def ridge_towards(features: Tensor, targets: Tensor, weight: Tensor, penalties: tuple[float, ...]) -> list[tuple[Tensor, Tensor]]:
    """For each penalty the minimiser of |Y - X W^T - b|^2 + penalty N sum_f s_f^2 |W_f - W0_f|^2, s_f the features' deviations.

    One eigendecomposition serves all penalties: with Z = (X - mean) / s and Z^T Z / N = U L U^T,
    W = W0 + (U (L + penalty)^-1 U^T Z^T (Y - X W0^T) / N / s)^T.

    Args:
        features: (N, F), X.
        targets: (N, D), Y.
        weight: (D, F), W0: without any information the answer stays there.
        penalties: positive; shares of the N sentences.

    Returns:
        W (D, F) and b (D,) of each.
    """
    X, Y, W0 = features.double(), targets.double(), weight.double()
    mean, deviation = X.mean(0), X.std(0, correction=0).clamp(min=1e-6)
    Z = (X - mean) / deviation
    rest = Y - Y.mean(0) - (X - mean) @ W0.T
    values, axes = torch.linalg.eigh(Z.T @ Z / len(Z))
    along = axes.T @ (Z.T @ rest) / len(Z)
    found = []
    for penalty in penalties:
        change = axes @ (along / (values.clamp(min=0) + penalty)[:, None]) / deviation[:, None]
        W = W0 + change.T
        found.append((W.to(weight), (Y.mean(0) - W @ mean).to(weight)))
    return found


def best_ridge(
    train: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor], start: tuple[Tensor, Tensor], others: list[Tensor]
) -> Fit:
    """The map that is best on the validation split: where it starts, or a ridge regression towards there or another weight.

    Args:
        train, valid: features (N, F) and targets (N, D).
        start: weight (D, F) and bias (D,).
        others: further weights to pull towards.
    """
    total = valid[1].square().sum()

    def judged(penalty: float, weight: Tensor, bias: Tensor) -> Fit:
        return Fit(float((valid[0] @ weight.T + bias - valid[1]).square().sum() / total), penalty, weight, bias)

    best = judged(0.0, *start)
    for towards in (start[0], *others):
        for penalty, (weight, bias) in zip(PENALTIES, ridge_towards(*train, towards, PENALTIES), strict=True):
            best = min(best, judged(penalty, weight, bias), key=lambda fit: fit.valid_fvu)
    return best


@torch.no_grad()
def back_faces(network: CellularCube, vectors: Tensor) -> Tensor:
    """(N, D) to (N, L, L, C): the back face for each vector, in evaluation mode."""
    was_training = network.training
    network.eval()
    parts = [network.cube(network.front(network.transformer(part)[0])).back for part in vectors.split(PASS_SIZE)]
    network.train(was_training)
    return torch.cat(parts)


@torch.no_grad()
def standardise_readout(network: CellularCube, train: Tensor) -> None:
    """Give read-out and heads the coordinates of training vectors' back faces; what the network computes does not change."""
    some = train[:: max(1, len(train) // MAX_STANDARDISED)]
    seen = network.seen(back_faces(network, some))
    for layer in (network.readout, *network.heads.values()):
        layer.standardise(seen)


@torch.no_grad()
def fit_layer(layer: Readout, seen: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Fit:
    """Fit a read-out: what is best on the validation split of no change, and ridge regressions.

    They are pulled towards what it is, or towards that without all but the code's channels: what was learned by gradient, or
    PCA.

    Args:
        layer: changed in place.
        seen: cells (N, cells, C) of the training and of the validation split.
        targets: (N, D) of each.
    """
    layer.standardise(seen[0])
    train, valid = ((layer.coordinates(cells), vectors) for cells, vectors in zip(seen, targets, strict=True))
    code_only = layer.weight.clone()
    code_only[:, layer.code_features :] = 0
    fit = best_ridge(train, valid, (layer.weight, layer.bias), [code_only])
    layer.weight.copy_(fit.weight)
    layer.bias.copy_(fit.bias)
    return fit


@torch.no_grad()
def fit_readout(
    network: CellularCube, train: Tensor, valid: Tensor, further: Mapping[str, tuple[Tensor, Tensor]] | None = None
) -> dict[str, float]:
    """Fit a network's read-out on the training vectors, and its heads on those of further teachers, see `fit_layer`.

    Args:
        network: changed in place.
        train, valid: (N, D).
        further: name of a head to its teacher's vectors of the same sentences, rows of NaN where there is none.

    Returns:
        valid_fvu, of what is kept; readout_penalty, 0 where nothing was better than what it was.
    """
    layer, backs = network.readout, [back_faces(network, vectors) for vectors in (train, valid)]
    seen = [network.seen(back) for back in backs]
    routed = [network.read(back) - layer(cells) for back, cells in zip(backs, seen, strict=True)]
    left = [vectors - part for vectors, part in zip((train, valid), routed, strict=True)]
    fit = fit_layer(layer, tuple(seen), tuple(left))
    for name, targets in (further or {}).items():
        pairs = [(cells[present_rows(target)], target[present_rows(target)]) for cells, target in zip(seen, targets, strict=True)]
        fit_layer(network.heads[name], *zip(*pairs, strict=True))
    error = (layer(seen[1]) + routed[1] - valid).square().sum()
    return {"valid_fvu": float(error / valid.square().sum()), "readout_penalty": fit.penalty}
