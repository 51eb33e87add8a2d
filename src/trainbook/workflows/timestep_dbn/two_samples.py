"""Do two sets of bit vectors come from one distribution: kernel distance, classifier, nearest neighbours, resampling."""

# N samples, M reference vectors, V bits, R resamples

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.svm import SVC
from torch import Tensor

FOLDS = 5
CLASSIFIERS = {
    "linear": lambda: LogisticRegression(max_iter=2000),  # sees each bit's mean
    "kernel": lambda: SVC(),  # radial: sees how bits go together
}
PAIRS_AT_ONCE = 2**24  # distances held at once: bounds memory


def hamming(one: Tensor, other: Tensor) -> Tensor:
    """Number of bits that differ, d(x, y) = x.(1 - y) + (1 - x).y; (N, V), (M, V) -> (N, M)."""
    return one @ (1 - other).T + (1 - one) @ other.T


def median_distance(bits: Tensor) -> float:
    """Median Hamming distance of two different rows, (N, V); at least 1."""
    rows, columns = torch.triu_indices(len(bits), len(bits), 1)
    return max(1.0, float(hamming(bits, bits)[rows, columns].median()))


def resampling_weights(num_rows: int, resamples: int, device: torch.device) -> Tensor:
    """How often each row is in a bootstrap sample: row 0 is the sample as it is, 1 each; (1 + R, num_rows)."""
    drawn = torch.randint(num_rows, (resamples, num_rows), device=device)
    counts = torch.zeros(resamples, num_rows, device=device).scatter_add_(1, drawn, torch.ones(drawn.shape, device=device))
    return torch.cat([torch.ones(1, num_rows, device=device), counts])


def squared_mmd(
    samples: Tensor, reference: Tensor, bandwidth: float, weights: Tensor | None = None, reference_weights: Tensor | None = None
) -> Tensor:
    """Unbiased squared maximum mean discrepancy with the kernel k(x, y) = exp(-d(x, y) / m), d the Hamming distance.

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j): 0 on average when both come
    from one distribution, hence at times negative. The kernel is a product over bits and tells any two distributions apart.

    Args:
        samples: x, (N, V), values in {0, 1}.
        reference: y, (M, V).
        bandwidth: m, in bits.
        weights, reference_weights: from `resampling_weights`, (1 + R, N) and (1 + R, M); a pair of one row with itself never
            counts, however often it was drawn.

    Returns:
        (1 + R,); (1,) without weights.

    Source: Gretton et al. (2012), A Kernel Two-Sample Test, equation 3.
    """
    w = samples.new_ones(1, len(samples)) if weights is None else weights
    v = reference.new_ones(1, len(reference)) if reference_weights is None else reference_weights

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return hamming(one, other).div_(-bandwidth).exp_()

    def within(bits: Tensor, weight: Tensor) -> Tensor:
        values = kernel(bits, bits).fill_diagonal_(0)
        return (weight @ values * weight).sum(1) / (weight.sum(1).square() - weight.square().sum(1))

    between = (w @ kernel(samples, reference) * v).sum(1) / (w.sum(1) * v.sum(1))
    return within(samples, w) + within(reference, v) - 2 * between


def classifier_two_sample(samples: Tensor, reference: Tensor, kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Which rows a classifier, cross-validated, puts on the right side; about half of them when it cannot tell the sides.

    Args:
        samples: (N, V).
        reference: (M, V); as many rows of either are taken as the shorter has.
        kind: a key of `CLASSIFIERS`.
        seed: of the folds.

    Returns:
        1 for right and 0 for wrong, (min(N, M),) each, samples and reference.

    Source: Lopez-Paz and Oquab (2017), Revisiting Classifier Two-Sample Tests.
    """
    size = min(len(samples), len(reference))
    rows = torch.cat([samples[:size], reference[:size]]).cpu().numpy()
    labels = torch.arange(2).repeat_interleave(size)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    predicted = torch.from_numpy(cross_val_predict(CLASSIFIERS[kind](), rows, labels.numpy(), cv=folds))
    return tuple((predicted == labels).double().split(size))


def nearest(bits: Tensor, pool: Tensor, among_itself: bool = False) -> tuple[Tensor, Tensor]:
    """Hamming distance to the nearest row of a pool, in bits, and its index; (N, V), (M, V) -> (N,), (N,).

    Args:
        bits: (N, V).
        pool: (M, V).
        among_itself: row i of `bits` is row i of `pool`, and is not its own neighbour.
    """
    found = []
    for start in range(0, len(bits), size := max(1, PAIRS_AT_ONCE // len(pool))):
        distances = hamming(bits[start : start + size], pool)
        if among_itself:
            rows = torch.arange(len(distances), device=bits.device)
            distances[rows, start + rows] = torch.inf
        found.append(distances.min(1))
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])
