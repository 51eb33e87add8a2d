"""The read-out in closed form: given what the back face shows, the best linear map to vectors is a ridge regression."""

# N sentences, F features (numbers of a back face), D numbers of a vector

import torch
from torch import Tensor

from trainbook.workflows.cellular_cube.network import CellularCube

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # per sentence, of features in units of their deviation
PASS_SIZE = 64  # sentences in a pass
MAX_FEATURES = 8192


def ridge_towards(features: Tensor, targets: Tensor, weight: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """The minimiser of |Y - X W^T - b|^2 + penalty N sum_f s_f^2 |W_f - W0_f|^2, s_f the features' deviations.

    Args:
        features: (N, F), X.
        targets: (N, D), Y.
        weight: (D, F), W0: without any information the answer stays there.
        penalty: positive; a share of the N sentences.

    Returns:
        W (D, F) and b (D,).
    """
    X, Y, W0 = features.double(), targets.double(), weight.double()
    mean, deviation = X.mean(0), X.std(0, correction=0).clamp(min=1e-6)
    Z = (X - mean) / deviation
    rest = Y - Y.mean(0) - (X - mean) @ W0.T
    gram = Z.T @ Z + penalty * len(Z) * torch.eye(Z.shape[1], dtype=Z.dtype, device=Z.device)
    change = torch.linalg.solve(gram, Z.T @ rest) / deviation[:, None]
    W = W0 + change.T
    return W.to(weight), (Y.mean(0) - W @ mean).to(weight)


@torch.no_grad()
def back_faces(network: CellularCube, vectors: Tensor) -> Tensor:
    """(N, D) to (N, L, L, C): the back face for each vector, in evaluation mode."""
    was_training = network.training
    network.eval()
    parts = [network.cube(network.front(network.transformer(part)[0])).back for part in vectors.split(PASS_SIZE)]
    network.train(was_training)
    return torch.cat(parts)


@torch.no_grad()
def fit_readout(network: CellularCube, train: Tensor, valid: Tensor) -> dict[str, float]:
    """Fit the read-out on the training vectors, pulled towards what it is; the penalty that is best on valid, or no change.

    Returns:
        valid_fvu, of what is kept; readout_penalty, 0 where nothing was better than what it was.
    """
    backs = [back_faces(network, vectors) for vectors in (train, valid)]
    features, held_out = (network.seen(back).flatten(1) for back in backs)
    layer = network.readout
    routed, routed_valid = (network.read(back) - layer(network.seen(back).flatten(1)) for back in backs)
    total = valid.square().sum()

    def fvu(weight: Tensor, bias: Tensor) -> float:
        return float((held_out @ weight.T + bias + routed_valid - valid).square().sum() / total)

    best = (fvu(layer.weight, layer.bias), 0.0, layer.weight, layer.bias)
    for penalty in PENALTIES:
        weight, bias = ridge_towards(features, train - routed, layer.weight, penalty)
        best = min(best, (fvu(weight, bias), penalty, weight, bias), key=lambda found: found[0])
    layer.weight.copy_(best[2])
    layer.bias.copy_(best[3])
    return {"valid_fvu": best[0], "readout_penalty": best[1]}
