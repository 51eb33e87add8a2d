"""Does a model beat its baselines: the interval of every difference, and what it says. Needs no torch."""

import math

from trainbook.tables import Table

ABOVE = "_above_"  # in the name of a metric: a baseline's value less that of the one it names, where lower is better
LOW, HIGH, STANDARD_ERROR = "_low", "_high", "_standard_error"
STANDARD_ERRORS = 1.959964  # each way from the mean: 95 % of a normal distribution


def interval(name: str, value: float, standard_error: float) -> dict[str, float]:
    """A value and its 95 % interval, normal, under the names that `baseline_table` and the pictures look for."""
    half = STANDARD_ERRORS * standard_error
    return {name: value, name + LOW: value - half, name + HIGH: value + half}


def verdict(low: float, high: float) -> str:
    """What the interval of (baseline - model) says of the model, for a metric where lower is better.

    "beats" when all of it lies above zero, "does not beat" when all of it lies below, else "ties".
    """
    if math.isnan(low) or math.isnan(high):
        return "not measured"
    return "beats" if low > 0 else "does not beat" if high < 0 else "ties"


def baseline_table(metrics: dict[str, float]) -> Table | None:
    """One row per baseline, one column per metric: the verdict, baseline - model, and its 95 % interval.

    Args:
        metrics: those named "<baseline>/<metric>_above_<model>", with "_low" and "_high", where lower is better.

    Returns:
        None when there is no such metric.
    """
    found = {}
    for key, value in metrics.items():
        who, _, name = key.rpartition("/")
        metric, _, model = name.partition(ABOVE)
        if model and key + LOW in metrics:
            low, high = metrics[key + LOW], metrics[key + HIGH]
            found[who, metric, model] = f"{verdict(low, high)}: {value:+.3g} ({low:+.3g} to {high:+.3g})"
    if not found:
        return None
    baselines, columns = (list(dict.fromkeys(parts)) for parts in zip(*((key[0], key[1:]) for key in found), strict=True))
    headers = ["", *(f"{metric}: {model} against it".replace("_", " ") for metric, model in columns)]
    return Table(headers, [[who.replace("_", " "), *(found.get((who, *c), "-") for c in columns)] for who in baselines])
