"""What happens inside the cube while it carries held-out vectors, and what that says of its parts."""

# N sentences, T steps, L side, C channels, S experts, F numbers of a plane

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainbook.workflows.cellular_cube.flow import Watcher
from trainbook.workflows.cellular_cube.information import (
    active_fraction,
    eta_squared,
    expert_information,
    gate_specialisation,
    hoyer_sparsity,
    mutual_information,
    transfer_entropy,
)
from trainbook.workflows.cellular_cube.similarity import similarity_table

MAX_NUMBERS = 2 * 10**7  # of states kept at once: fewer sentences are watched in a large cube
LEAST_SENTENCES = 16
SENTENCES_AT_ONCE = 64


class Observation(NamedTuple):
    """Of N sentences.

    Attributes:
        energies: (T + 1, L, L, L), root mean square of each cell's state over channels and sentences, by step, plane first.
        gate: (T, L, S), mean weight of each expert in a plane.
        front: T + 1 tensors (N, F): plane min(t, L - 1) after step t, where the signal is.
        ahead: T tensors (N, F): the plane before it, at the same time, that the signal has not reached.
        cell_energies: (N, L^3), mean over steps of each cell's root mean square.
        cell_weights: (N, L^3, S), mean over steps.
    """

    energies: Tensor
    gate: Tensor
    front: list[Tensor]
    ahead: list[Tensor]
    cell_energies: Tensor
    cell_weights: Tensor


def num_watched(num_sentences: int, side: int, channels: int) -> int:
    """How many sentences are watched: all, or as many as `MAX_NUMBERS` allows."""
    return min(num_sentences, max(LEAST_SENTENCES, MAX_NUMBERS // (side**3 * channels)))


@torch.no_grad()
def observe(run: Callable[[Tensor, Watcher], object], vectors: Tensor) -> Observation:
    """Watch a network at work.

    Args:
        run: passes a batch through the network with a watcher.
        vectors: (N, D), see `num_watched`.
    """
    parts = []
    for batch in vectors.split(SENTENCES_AT_ONCE):
        watcher = _Recorder()
        run(batch, watcher)
        parts.append(watcher)
    num_steps = len(parts[0].gates)
    squares, gates = (sum(torch.stack(getattr(part, name)) for part in parts) for name in ("squares", "gates"))
    front, ahead = (
        [torch.cat(of_step) for of_step in zip(*(getattr(part, name) for part in parts), strict=True)]
        for name in ("front", "ahead")
    )
    return Observation(
        (squares / len(vectors)).sqrt(),
        gates / len(vectors),
        front,
        ahead,
        torch.cat([part.energies for part in parts]) / (num_steps + 1),
        torch.cat([part.weights for part in parts]) / num_steps,
    )


class _Recorder:
    """A watcher that sums over a batch what can be summed."""

    def __init__(self) -> None:
        self.squares: list[Tensor] = []
        self.gates: list[Tensor] = []
        self.front: list[Tensor] = []
        self.ahead: list[Tensor] = []
        self.energies: Tensor | float = 0.0
        self.weights: Tensor | float = 0.0

    def __call__(self, step: int, state: Tensor, weights: Tensor | None) -> None:
        last = state.shape[1] - 1
        square = state.float().square().mean(-1)  # (B, L, L, L)
        self.squares.append(square.sum(0))
        self.energies = self.energies + square.sqrt().flatten(1)
        self.front.append(state[:, min(step, last)].flatten(1).float().cpu())
        if step < last:
            self.ahead.append(state[:, step + 1].flatten(1).float().cpu())
        if weights is not None:
            self.weights = self.weights + weights.float().flatten(1, 3)
            self.gates.append(weights.float().mean((2, 3)).sum(0))


def inside_measures(observation: Observation, labels: Tensor, seed: int) -> dict[str, float]:
    """Specialisation, information between planes and sparsity of the cube, each beside what shuffling leaves of it.

    Args:
        observation: of N sentences.
        labels: (N,) int64.
        seed: of the shuffles.

    Returns:
        "cube/<measure>" and "shuffled/<measure>" in nats or shares; "cube/<measure>_p_value".
    """
    weights = observation.cell_weights.cpu()
    num_sentences, num_cells, num_experts = weights.shape
    cells = torch.arange(num_cells).repeat(num_sentences)
    planes = planes_information(observation, seed)
    found = {
        "expert_place_information": expert_information(weights.reshape(-1, num_experts), cells, seed),
        "expert_label_information": expert_information(weights.mean(1), labels.cpu(), seed),
        "energy_by_label": eta_squared(observation.cell_energies, labels, seed)[1],
        "front_to_back_information": mutual_information(observation.front[0], observation.front[-1], seed),
    }
    metrics = {f"cube/{name}": above.value for name, above in found.items()}
    metrics |= {f"shuffled/{name}": above.floor for name, above in found.items()}
    metrics |= {f"cube/{name}_p_value": above.p_value for name, above in found.items()}
    for name in ("plane_information", "transfer_entropy"):
        metrics[f"cube/{name}"] = float(np.mean([above.value for above in planes[name]]))
        metrics[f"shuffled/{name}"] = float(np.mean([above.floor for above in planes[name]]))
    return metrics | {
        "cube/gate_specialisation": gate_specialisation(weights),
        "cube/hoyer_sparsity": hoyer_sparsity(observation.cell_energies),
        "cube/active_cells": active_fraction(observation.cell_energies),
    }


def planes_information(observation: Observation, seed: int) -> dict[str, list]:
    """Along the signal's way from plane to plane: what a plane tells of the next, and of its change beyond its own past.

    Returns:
        "plane_information" and "transfer_entropy" to an `AboveChance` per plane.
    """
    front, ahead = observation.front, observation.ahead
    return {
        "plane_information": [mutual_information(a, b, seed) for a, b in itertools.pairwise(front)],
        "transfer_entropy": [
            transfer_entropy(source, before, after, seed) for source, before, after in zip(front, ahead, front[1:], strict=False)
        ],
    }


def layer_similarity(observation: Observation, target: Tensor) -> dict[str, dict[str, float]]:
    """RSA and CKA of the teacher's vectors with the plane where the signal is: "plane z" to {"rsa", "cka"}."""
    target = target[: len(observation.front[0])].cpu()
    return similarity_table(target, {f"plane {z}": plane for z, plane in enumerate(observation.front)})
