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
MEMORY_SHARE = 0.05  # of held-out codes lie nearer to a training code than what counts as remembered


@torch.no_grad()
def sample_metrics(samples: dict[str, Tensor], test: Tensor, train: Tensor, num_rows: int) -> dict[str, float]:
    """Metrics of each set of samples against held-out codes, and of as many training codes, the floor; lower is better.

    sample_mean_error, sample_covariance_error: root mean square difference of the bits' means and covariances.
    squared_mmd: see `two_samples.squared_mmd`; its bandwidth is the median distance of held-out codes.
    c2st_linear, c2st_kernel: share of rows that a cross-validated classifier tells right; 0.5 is indistinguishable.
    nearest_training_distance: mean Hamming distance to the nearest training code, per bit; of a training code to another.
    remembered_share: of the samples, how many lie nearer to a training code than 95 % of the held-out codes do.

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
    """Distances to the nearest training code, and how many are suspiciously short; `chosen` are the floor's rows of `train`."""
    num_bits, metrics = test.shape[1], {}
    held_out, _ = nearest(test, train)
    shortest = torch.quantile(held_out, MEMORY_SHARE, interpolation="lower")
    among_training, _ = nearest(train, train, among_itself=True)
    distances = {who: among_training[chosen] if who == FLOOR else nearest(bits, train)[0] for who, bits in sets.items()}
    for who, values in {**distances, "held_out_data": held_out}.items():
        share = float((values < shortest).double().mean())
        metrics[f"{who}/nearest_training_distance"] = float(values.mean()) / num_bits
        metrics[f"{who}/nearest_training_distance{STANDARD_ERROR}"] = float(values.std()) / num_bits / math.sqrt(len(values))
        metrics[f"{who}/remembered_share"] = share
        metrics[f"{who}/remembered_share{STANDARD_ERROR}"] = math.sqrt(share * (1 - share) / len(values))
    return metrics
