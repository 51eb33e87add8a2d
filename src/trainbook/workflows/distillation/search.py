"""Search for a configuration by successive halving in which the default can never lose: what it picks is as good on valid."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import qmc

Arm = dict[str, Any]
Row = dict[str, Any]  # plain JSON


class Span(NamedTuple):
    """Numbers from low to high, evenly or (`log`) evenly in their logarithm."""

    low: float
    high: float
    log: bool = False

    def at(self, share: float) -> float:
        """The number at a share of the way, 0 to 1."""
        if self.log:
            return self.low * (self.high / self.low) ** share
        return self.low + (self.high - self.low) * share


class Rung(NamedTuple):
    """So many arms are trained for so many epochs."""

    arms: int
    epochs: int


def draw_arms(space: dict[str, Span | tuple[Any, ...]], default: Arm, number: int, seed: int) -> list[Arm]:
    """The default, then arms spread over the space by a scrambled Sobol sequence: the same for the same seed.

    Args:
        space: name to a span of numbers or a tuple of choices.
        default: a value for each name; it may lie outside the space.
        number: of arms, the default included.
        seed: of the scrambling.

    Raises:
        ValueError: when the default does not have the names of the space.
    """
    if default.keys() != space.keys():
        raise ValueError(f"the default sets {sorted(default)}, the space {sorted(space)}")
    # Sobol points are balanced in powers of two, so more are drawn than used.
    points = qmc.Sobol(len(space), seed=seed).random_base2(max(1, (number - 1).bit_length()))
    arms = [dict(default)]
    for point in points[: number - 1]:
        values = {}
        for share, (name, choices) in zip(point, space.items(), strict=True):
            values[name] = choices.at(float(share)) if isinstance(choices, Span) else choices[int(share * len(choices))]
        arms.append(values)
    return arms


class Selection(NamedTuple):
    """What a search picked.

    Attributes:
        arm: the picked configuration.
        is_default: whether it is the default.
        valid_nll, default_valid_nll: mean of the last rung, in nats; the first is never above the second.
        why: in one sentence.
        rows: one per arm and rung, for the log.
    """

    arm: Arm
    is_default: bool
    valid_nll: float
    default_valid_nll: float
    why: str
    rows: list[Row]


def search(
    arms: Sequence[Arm],
    rungs: Sequence[Rung],
    train: Callable[[list[tuple[int, Arm]], int], list[Sequence[float] | None]],
) -> Selection:
    """Train all arms briefly, the better ones longer, and so on; the default, arm 0, is in every rung.

    Of the last rung the arm with the lowest mean NLL is picked, unless the default is within one standard error of it.

    Args:
        arms: from `draw_arms`, as many as the first rung trains.
        rungs: fewer arms and more epochs each time.
        train: ([(number, arm), ...], epochs) -> the validation NLL of each example, (N,) for each arm in that order, the
            same examples for all arms; None for an arm that failed. It may train them side by side.

    Raises:
        ValueError: for rungs that do not narrow, another number of arms, or when the default fails: there is then nothing
            to compare with.
    """
    sizes = [rung.arms for rung in rungs]
    if sizes != sorted(sizes, reverse=True) or len(arms) != sizes[0] or sizes[-1] < 2:
        raise ValueError(f"{len(arms)} arms do not fit rungs of {sizes}: each rung is to be smaller, the last at least 2")
    alive = list(range(len(arms)))
    rows: list[Row] = []
    for level, rung in enumerate(rungs):
        measured = train([(number, arms[number]) for number in alive], rung.epochs)
        nll = {number: values_of(values) for number, values in zip(alive, measured, strict=True)}
        means = {number: float(values.mean()) for number, values in nll.items()}
        if not math.isfinite(means[0]):
            raise ValueError(f"the default configuration failed when trained for {rung.epochs} epochs")
        ranked = sorted(alive, key=lambda number: (means[number], number))  # equal arms in their order: the default first
        following = rungs[level + 1].arms if level + 1 < len(rungs) else 1
        kept = [0, *[number for number in ranked if number][: following - 1]] if following > 1 else ranked[:1]
        for number in alive:
            rows.append(
                {
                    "arm": number,
                    "is_default": number == 0,
                    "rung": level,
                    "epochs": rung.epochs,
                    "valid_nll": means[number] if math.isfinite(means[number]) else None,
                    "kept": number in kept,
                    "config": dict(arms[number]),
                }
            )
        alive = kept
    best = ranked[0]
    difference = nll[0] - nll[best]
    error = float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else 0.0
    gain = means[0] - means[best]
    picked = best if gain > error else 0
    if best == 0:
        why = f"no arm is better than the default ({means[0]:.4f} nats)"
    else:
        why = f"arm {best} gains {gain:.4f} nats over the default (standard error {error:.4f})"
        why += "" if picked else ": too little, the default stays"
    return Selection(dict(arms[picked]), picked == 0, means[picked], means[0], why, rows)


def values_of(values: Sequence[float] | None) -> np.ndarray:
    """NLLs as an array; infinite for an arm that failed or diverged."""
    array = np.asarray([math.inf] if values is None else values, dtype=np.float64)
    return array if bool(np.isfinite(array).all()) else np.full(array.shape, math.inf)
