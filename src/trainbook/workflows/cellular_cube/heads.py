"""Heads for further teachers: linear maps of the same back face, which start as the best linear maps of the PCA code."""

# N sentences, D numbers of a further teacher's vector, K of the code

import torch
from torch import Tensor

from trainbook.workflows.cellular_cube.data import SentenceData
from trainbook.workflows.cellular_cube.network import CellularCube
from trainbook.workflows.cellular_cube.principal import Principal, fit_principal
from trainbook.workflows.cellular_cube.readout import present_rows
from trainbook.workflows.cellular_cube.readout_fit import best_ridge


def linear_map(data: SentenceData, name: str, principal: Principal, size: int) -> tuple[Tensor, Tensor]:
    """W (D, K) and b (D,) of the ridge regression of a further teacher's training vectors on the main one's PCA code.

    Args:
        data: where a vector is missing, the sentence is left out; the validation split chooses the penalty.
        name: of the teacher.
        principal: components of the main teacher's training vectors.
        size: K; at most as many numbers as the main teacher's vectors have are used.
    """
    pairs = []
    for split in (data.train, data.valid):
        rows = present_rows(split[name])
        pairs.append((split["embeddings"][rows] @ principal.components[:size].T, split[name][rows]))
    codes, targets = pairs[0]
    start = (targets.new_zeros(targets.shape[1], codes.shape[1]), targets.new_zeros(targets.shape[1]))
    return best_ridge(*pairs, start, [])[2:]


def start_heads(network: CellularCube, data: SentenceData, principal: Principal) -> None:
    """Give a network a head for each further teacher, or set those it has back to their linear maps."""
    for name, further in data.further.items():
        network.start_head(name, *linear_map(data, name, principal, network.config.code_size), further.agreement)


def baseline_outputs(data: SentenceData, name: str, principal: Principal, size: int) -> dict[str, Tensor]:
    """What plain maps make of a further teacher's test vectors, standardised: who to (N, D).

    mean; linear_map, where the head starts: from the main teacher's PCA code; own_pca, PCA of that teacher's own vectors, the
    ceiling of linear codes of this width.

    Args:
        data, name, principal, size: as of `linear_map`.
    """
    train, test = data.train[name], data.test[name]
    weight, bias = linear_map(data, name, principal, size)
    return {
        "mean": torch.zeros_like(test),
        "linear_map": data.test["embeddings"] @ principal.components[:size].T @ weight.T + bias,
        "own_pca": fit_principal(train[present_rows(train)]).reconstructed(test, size),
    }
