"""How samples differ from held-out codes, for the chain and every baseline, with intervals; training codes are the floor."""

# N samples, M held-out codes, V bits, R resamples

import math

import torch
from torch import Tensor

from trainbook.comparison import ABOVE, STANDARD_ERROR, interval
from trainbook.workflows.timestep_dbn.two_samples import (
    CLASSIFIERS,
    classifier_two_sample,
    median_distance,
    nearest,
    resampling_weights,
    squared_mmd,
)

RESAMPLES = 200
FLOOR = "training_data"


@torch.no_grad()
def sample_metrics(samples: dict[str, Tensor], test: Tensor, train: Tensor, num_rows: int) -> dict[str, float]:
    """Metrics of each set of samples against held-out codes, and of as many training codes, the floor.

    Lower is better in all but the last two.

    sample_mean_error, sample_covariance_error: root mean square difference of the bits' means and covariances.
    squared_mmd: see `two_samples.squared_mmd`; its bandwidth is the median distance of held-out codes.
    c2st_linear, c2st_kernel: share of rows that a cross-validated classifier tells right; 0.5 is indistinguishable.
    nearest_training_distance: mean Hamming distance to the nearest training code, per bit; of a training code to another.
    nearer_than_held_out: probability that a sample lies nearer to the training codes than a held-out code does, 0.5 for new
    samples as good as the data; towards 1 the model remembers, towards 0 it makes what is unlike the data.

    Args:
        samples: name to (N, V); "chain" is compared with every other.
        test: (M, V).
        train: (K, V).
        num_rows: training codes that stand for the floor.
    """
    device, chosen = test.device, torch.randperm(len(train))[:num_rows].to(test.device)
    sets = {**samples, FLOOR: train[chosen]}
    seed, bandwidth = int(torch.randint(2**31, ())), median_distance(test)
    reference = resampling_weights(len(test), RESAMPLES, device)  # one for all: differences between models are paired
    metrics: dict[str, float] = {}
    resampled: dict[str, dict[str, Tensor]] = {}
    for who, bits in sets.items():
        weights = resampling_weights(len(bits), RESAMPLES, device)
        resampled[who] = {
            "sample_covariance_error": covariance_errors(bits, test, weights, reference),
            "squared_mmd": squared_mmd(bits, test, bandwidth, weights, reference),
        }
        metrics[f"{who}/sample_mean_error"] = float((bits.mean(0) - test.mean(0)).square().mean().sqrt())
        for name, values in resampled[who].items():
            metrics[f"{who}/{name}"] = float(values[0])
            metrics[f"{who}/{name}{STANDARD_ERROR}"] = float(values[1:].std())
            if who != "chain":
                difference = values - resampled["chain"][name]
                metrics |= interval(f"{who}/{name}{ABOVE}chain", float(difference[0]), float(difference[1:].std()))
    for kind in CLASSIFIERS:
        metrics |= classifier_metrics(sets, test, kind, seed)
    return metrics | neighbour_metrics(sets, test, train, chosen)


def covariance_errors(bits: Tensor, reference: Tensor, weights: Tensor, reference_weights: Tensor) -> Tensor:
    """Root mean square difference of the bits' covariances, for each row of weights; (N, V), (M, V), (1 + R, ...) -> (1 + R,)."""

    def covariance(rows: Tensor, weight: Tensor) -> Tensor:
        return torch.cov(rows.T, fweights=weight.long())

    pairs = zip(weights, reference_weights, strict=True)
    return torch.stack([(covariance(bits, w) - covariance(reference, v)).square().mean().sqrt() for w, v in pairs])


def classifier_metrics(sets: dict[str, Tensor], test: Tensor, kind: str, seed: int) -> dict[str, float]:
    """Accuracy of one kind of classifier on each set, with the binomial standard error.

    The difference between two sets pairs the held-out codes, which are the same for both.
    """
    right = {who: classifier_two_sample(bits, test, kind, seed) for who, bits in sets.items()}
    metrics = {}
    for who, (samples, codes) in right.items():
        name = f"{who}/c2st_{kind}"
        accuracy = float(torch.cat([samples, codes]).mean())
        metrics[name] = accuracy
        metrics[name + STANDARD_ERROR] = math.sqrt(accuracy * (1 - accuracy) / (2 * len(codes)))
        if who != "chain":
            ours, our_codes = right["chain"]
            both = min(len(codes), len(our_codes))
            variance = samples.var() / len(samples) + ours.var() / len(ours) + (codes[:both] - our_codes[:both]).var() / both
            metrics |= interval(f"{name}{ABOVE}chain", accuracy - metrics[f"chain/c2st_{kind}"], 0.5 * math.sqrt(variance))
    return metrics


def neighbour_metrics(sets: dict[str, Tensor], test: Tensor, train: Tensor, chosen: Tensor) -> dict[str, float]:
    """Distances to the nearest training code beside those of held-out codes; `chosen` are the floor's rows of `train`."""
    metrics, held_out = {}, nearest(test, train)[0] / test.shape[1]
    among_training = nearest(train, train, among_itself=True)[0]
    found = {who: among_training[chosen] if who == FLOOR else nearest(bits, train)[0] for who, bits in sets.items()}
    distances = {**{who: values / test.shape[1] for who, values in found.items()}, "held_out_data": held_out}
    for who, values in distances.items():
        name = f"{who}/nearest_training_distance"
        metrics[name], metrics[name + STANDARD_ERROR] = float(values.mean()), float(values.std()) / math.sqrt(len(values))
        if who != "held_out_data":
            name = f"{who}/nearer_than_held_out"
            metrics[name], metrics[name + STANDARD_ERROR] = probability_below(values, held_out)
    return metrics


def probability_below(values: Tensor, others: Tensor) -> tuple[float, float]:
    """P(x < y) + P(x = y) / 2 of a value and another, with its standard error; (N,), (M,).

    Source: DeLong et al. (1988), Comparing the Areas under Two or More Correlated Receiver Operating Characteristic Curves.
    """
    below = (torch.sign(others - values.unsqueeze(1)) + 1) / 2  # (N, M): 1, 0, or 1/2 for a tie
    variance = below.mean(1).var() / len(values) + below.mean(0).var() / len(others)
    return float(below.mean()), math.sqrt(variance)
