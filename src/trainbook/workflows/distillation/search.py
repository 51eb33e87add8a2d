"""Search for a configuration by successive halving in which the default can never lose: what it picks is as good on valid."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from scipy.stats import qmc

T = TypeVar("T")
Arm = dict[str, Any]
Losses = Any  # anything that numpy takes as (N,), such as a tensor; or None
NARROWING = 3  # arms of a rung over those of the next, and epochs of the next over those of the rung


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


def next_size(number: int) -> int:
    """How many of so many arms go on to the next rung, the default among them: a third, at least 2."""
    return max(2, number // NARROWING)


def num_rungs(number: int) -> int:
    """Rungs for so many arms, each of a third of the arms and three times the epochs of the one before; 27 arms have 3."""
    return 1 if number < 3 * NARROWING else 1 + num_rungs(next_size(number))


def survivors(arms: Sequence[T], nll: Sequence[Losses]) -> list[T]:
    """The arms that go on: the default, which comes first, then the best of the others.

    Args:
        arms: of a rung, the default first.
        nll: of each arm, the validation examples' NLLs, (N,); None for one that failed. The same examples for all.
    """
    means = mean_losses(nll)
    ranked = sorted(range(1, len(arms)), key=lambda place: (means[place], place))
    return [arms[0], *(arms[place] for place in ranked[: next_size(len(arms)) - 1])]


class Judgement(NamedTuple):
    """What the last rung says.

    Attributes:
        place: of the chosen arm in it; 0 is the default.
        gain: NLL of the default less that of the best arm, in nats.
        standard_error: of the gain, over the validation examples.
        why: in one sentence.
    """

    place: int
    gain: float
    standard_error: float
    why: str


def judge(nll: Sequence[Losses]) -> Judgement:
    """The arm with the lowest mean NLL, unless the default is within one standard error of it: then the default.

    So the chosen arm's mean is never above the default's.

    Args:
        nll: as in `survivors`.

    Raises:
        ValueError: when the default failed: there is then nothing to compare with.
    """
    means = mean_losses(nll)
    if not math.isfinite(means[0]):
        raise ValueError("the default configuration failed, so that there is nothing to compare the others with")
    best = min(range(len(means)), key=lambda place: (means[place], place))
    difference = as_array(nll[0]) - as_array(nll[best])
    gain = float(difference.mean())
    error = float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else 0.0
    if best == 0:
        return Judgement(0, 0.0, 0.0, f"none of {len(means)} is better than the default ({means[0]:.4f} nats)")
    why = f"the best gains {gain:.4f} nats over the default (standard error {error:.4f})"
    return Judgement(best, gain, error, why) if gain > error else Judgement(0, gain, error, why + ": too little, it stays")


def choose(arms: Sequence[T], nll: Sequence[Losses]) -> T:
    """The arm of the last rung that `judge` picks."""
    return arms[judge(nll).place]


def log_rows(rung: int, epochs: int, arms: Sequence[Arm], nll: Sequence[Losses]) -> list[dict[str, Any]]:
    """A plain JSON object for every arm of a rung; without a number for one that failed."""
    return [
        {"rung": rung, "epochs": epochs, "is_default": place == 0, "valid_nll": mean if math.isfinite(mean) else None, **arm}
        for place, (arm, mean) in enumerate(zip(arms, mean_losses(nll), strict=True))
    ]


def mean_losses(nll: Sequence[Losses]) -> list[float]:
    """Mean of each arm's NLLs; infinite for one that failed or diverged."""
    means = [math.inf if values is None else float(as_array(values).mean()) for values in nll]
    return [mean if math.isfinite(mean) else math.inf for mean in means]


def as_array(values: Losses) -> np.ndarray:
    """In float64."""
    return np.asarray(values, dtype=np.float64)
