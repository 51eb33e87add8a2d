"""How much one part of the cube knows of another, in nats, with the floor that chance alone reaches."""

# N sentences, D and E numbers of two parts, K components, S experts, G groups

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor

NUM_COMPONENTS = 32
NUM_SHUFFLES = 20


class AboveChance(NamedTuple):
    """A value, the mean of the same after shuffling, and the share of shuffles that reach it: (1 + reached) / (1 + shuffles)."""

    value: float
    floor: float
    p_value: float


def mutual_information(
    x: Tensor, y: Tensor, seed: int, num_components: int = NUM_COMPONENTS, num_shuffles: int = NUM_SHUFFLES
) -> AboveChance:
    """Mutual information of two parts as if they were Gaussian: -1/2 sum_i log(1 - rho_i^2), rho the canonical correlations.

    Of each part the first principal components are taken, in unit variance; the joint covariance is shrunk as Ledoit and
    Wolf do. Other than Gaussian dependence is not seen. The floor pairs each sentence with another one.

    Args:
        x, y: (N, D) and (N, E).
        seed: of the shuffles.
        num_components: K at most.
        num_shuffles: of the floor.
    """
    a, b = _components(x, num_components), _components(y, num_components)
    return _above_chance(lambda order: _gaussian_information(a[order], b), len(a), seed, num_shuffles)


def transfer_entropy(
    source: Tensor,
    target: Tensor,
    target_next: Tensor,
    seed: int,
    num_components: int = NUM_COMPONENTS // 2,
    num_shuffles: int = NUM_SHUFFLES,
) -> AboveChance:
    """What a plane tells of another plane's next state beyond that plane's own: I(target_next; source | target), Gaussian.

    I(y'; x | y) = I(y'; (x, y)) - I(y'; y). The floor shuffles the source over sentences.

    Args:
        source: (N, D), plane z at step t.
        target, target_next: (N, E), plane z + 1 at steps t and t + 1.
        seed, num_components, num_shuffles: as for `mutual_information`.

    Source: Barnett, Barrett, Seth (2009), Granger causality and transfer entropy are equivalent for Gaussian variables.
    """
    x, y, following = (_components(part, num_components) for part in (source, target, target_next))
    return _above_chance(lambda order: _gaussian_conditional(following, x[order], y), len(x), seed, num_shuffles)


def expert_information(weights: Tensor, groups: Tensor, seed: int, num_shuffles: int = NUM_SHUFFLES) -> AboveChance:
    """Mutual information of expert and group, such as a cell's place or a sentence's label.

    I(e; g) = H(mean_n w_n) - sum_g p_g H(mean_{n in g} w_n), in [0, log S]. The floor shuffles the groups.

    Args:
        weights: (N, S), rows sum to 1.
        groups: (N,) int64, from 0.
        seed, num_shuffles: of the floor.
    """
    w, g = weights.double().cpu().numpy(), groups.cpu().numpy()
    sizes = np.bincount(g)
    total = _entropy(w.mean(0))

    def information(order: np.ndarray) -> float:
        sums = np.stack([np.bincount(g[order], column, minlength=len(sizes)) for column in w.T], 1)[sizes > 0]
        share = sizes[sizes > 0]
        return float(total - (share / share.sum() * _entropy(sums / share[:, None])).sum())

    return _above_chance(information, len(g), seed, num_shuffles)


def gate_specialisation(weights: Tensor) -> float:
    """I(expert; cell) of single choices: H(mean_i w_i) - mean_i H(w_i), in [0, log S]; (..., S) weights."""
    w = weights.double().reshape(-1, weights.shape[-1])
    return float(torch.special.entr(w.mean(0)).sum() - torch.special.entr(w).sum(1).mean())


def eta_squared(energies: Tensor, labels: Tensor, seed: int, num_shuffles: int = NUM_SHUFFLES) -> tuple[np.ndarray, AboveChance]:
    """Share of each cell's variance of energy that the sentence's label explains: between / total sum of squares.

    Args:
        energies: (N, cells).
        labels: (N,) int64, from 0.
        seed, num_shuffles: of the shuffles of labels.

    Returns:
        (cells,), 0 for a cell that never varies; and their mean against its floor.
    """
    x, g = energies.double().cpu().numpy(), labels.cpu().numpy()
    x = x - x.mean(0)
    total = np.square(x).sum(0)
    one_hot = np.eye(g.max() + 1)[g]
    sizes = one_hot.sum(0)
    one_hot, sizes = one_hot[:, sizes > 0], sizes[sizes > 0]

    def shares(order: np.ndarray) -> np.ndarray:
        between = (np.square(one_hot[order].T @ x) / sizes[:, None]).sum(0)
        return np.divide(between, total, out=np.zeros_like(total), where=total > 1e-12 * max(total.max(), 1e-300))

    return shares(np.arange(len(g))), _above_chance(lambda order: float(shares(order).mean()), len(g), seed, num_shuffles)


def hoyer_sparsity(values: Tensor) -> float:
    """(sqrt n - |x|_1 / |x|_2) / (sqrt n - 1), mean over rows of (N, n): 0 where all are equal, 1 where one is not zero.

    Source: Hoyer (2004), Non-negative Matrix Factorization with Sparseness Constraints.
    """
    root = values.shape[1] ** 0.5
    ratio = values.abs().sum(1) / values.norm(dim=1).clamp(min=1e-12)
    return float(((root - ratio) / (root - 1)).mean())


def active_fraction(values: Tensor, threshold: float = 0.01) -> float:
    """Share of entries whose magnitude is above `threshold` times the largest one."""
    return float((values.abs() > threshold * values.abs().max()).double().mean())


def box_counting_slope(active: Tensor) -> Tensor:
    """How the number n(b) of boxes of b x b cells that hold an active one falls with b: -d log n / d log b, by least squares.

    2 for a filled face, 1 for a line, log 8 / log 3 for Sierpinski's carpet. A description of a pattern of a few dozen cells;
    it does not show that the pattern is a fractal. b runs over the divisors of L, so that no box is cut.

    Args:
        active: (N, L, L) bool, L at least 2.

    Returns:
        (N,) float64; not a number where no cell is active.
    """
    side = active.shape[-1]
    sizes = [size for size in range(1, side + 1) if side % size == 0]
    boxes = [active.unflatten(2, (-1, size)).unflatten(1, (-1, size)).any(4).any(2).sum((1, 2)) for size in sizes]
    widths = torch.tensor(sizes, dtype=torch.float64, device=active.device).log()
    centred = widths - widths.mean()
    counts = torch.stack(boxes, 1).double()
    return -(counts.log() @ centred / centred.square().sum()).where(counts[:, 0] > 0, torch.nan)


def _components(part: Tensor, number: int) -> np.ndarray:
    """Principal components in unit variance, (N, K), K at most `number` and a quarter of N; constant directions are left out."""
    x = part.double().flatten(1).cpu().numpy()
    x = x - x.mean(0)
    left, values, _ = np.linalg.svd(x, full_matrices=False)
    rank = int((values > 1e-6 * max(values[0], 1e-300)).sum()) if values[0] > 1e-12 else 0
    return left[:, : min(rank, number, max(1, len(x) // 4))] * np.sqrt(len(x))


def _gaussian_information(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape[1] == 0 or b.shape[1] == 0:
        return 0.0
    covariance = ledoit_wolf(np.hstack([a, b]), assume_centered=True)[0]
    k = a.shape[1]
    parts = (covariance[:k, :k], covariance[k:, k:], covariance)
    first, second, joint = (np.linalg.slogdet(part)[1] for part in parts)
    return float((first + second - joint) / 2)


def _gaussian_conditional(following: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """I(following; x | y) from one shrunk joint covariance, so that it is never negative."""
    if following.shape[1] == 0 or x.shape[1] == 0:
        return 0.0
    covariance = ledoit_wolf(np.hstack([following, x, y]), assume_centered=True)[0]
    f, g = following.shape[1], following.shape[1] + x.shape[1]
    indices = np.arange(len(covariance))
    of_f, of_x, of_y = indices[:f], indices[f:g], indices[g:]

    def log_determinant(*parts: np.ndarray) -> float:
        chosen = np.concatenate(parts)
        return float(np.linalg.slogdet(covariance[np.ix_(chosen, chosen)])[1]) if len(chosen) else 0.0

    joint = log_determinant(of_f, of_y) + log_determinant(of_x, of_y)
    return (joint - log_determinant(of_y) - log_determinant(of_f, of_x, of_y)) / 2


def _entropy(shares: np.ndarray) -> np.ndarray:
    return -(shares * np.log(np.clip(shares, 1e-300, None))).sum(-1)


def _above_chance(measure: Callable[[np.ndarray], float], number: int, seed: int, num_shuffles: int) -> AboveChance:
    generator = np.random.default_rng(seed)
    value = measure(np.arange(number))
    shuffled = [measure(generator.permutation(number)) for _ in range(num_shuffles)]
    reached = sum(one >= value for one in shuffled)
    return AboveChance(value, float(np.mean(shuffled)) if shuffled else 0.0, (1 + reached) / (1 + num_shuffles))
