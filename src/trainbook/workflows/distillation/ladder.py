"""The progressive chain: sizes and widths of the networks between teacher and student, who teaches whom, what is worth it."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainbook.seeding import step_seed

MODES = ("takd", "dgkd")
WIDTH_TOLERANCE = 0.10  # of the wanted number of parameters
DROP_PROBABILITY = 0.25
RESAMPLES = 2000


def geometric_sizes(teacher: int, student: int, assistants: int) -> list[int]:
    """Numbers of parameters from teacher to student, both included: c_i = |teacher|^(1 - i/L) |student|^(i/L).

    Args:
        teacher, student: their numbers of parameters, teacher > student > 0.
        assistants: networks in between, L - 1.

    Raises:
        ValueError: when the student is not the smaller one.
    """
    if not 0 < student < teacher:
        raise ValueError(f"a ladder goes down from teacher to student, not from {teacher:,} to {student:,} parameters")
    steps = assistants + 1
    return [round(teacher ** (1 - i / steps) * student ** (i / steps)) for i in range(steps + 1)]


def solve_width(count_parameters: Callable[[int], int], wanted: int, low: int, high: int) -> int:
    """The width of a family of networks whose number of parameters is nearest to a wanted one, by bisection.

    Args:
        count_parameters: width -> number of parameters, increasing.
        wanted: number of parameters.
        low, high: the narrowest and widest network of the family.

    Raises:
        ValueError: when none comes within 10 %.
    """
    narrow, wide = low, high
    while wide - narrow > 1:
        middle = (narrow + wide) // 2
        if count_parameters(middle) < wanted:
            narrow = middle
        else:
            wide = middle
    width = min((narrow, wide), key=lambda w: abs(count_parameters(w) - wanted))
    found = count_parameters(width)
    if abs(found - wanted) > WIDTH_TOLERANCE * wanted:
        raise ValueError(f"no width from {low} to {high} has about {wanted:,} parameters; {width} has {found:,}")
    return width


def teachers_of(stage: int, mode: str) -> tuple[int, ...]:
    """Which earlier networks teach network `stage` (the original teacher is 0): the one before, or all before.

    Source: "takd": Mirzadeh et al. (2020), Improved Knowledge Distillation via Teacher Assistant. "dgkd": Son et al.
        (2021), Densely Guided Knowledge Distillation Using Multiple Teacher Assistants.

    Raises:
        ValueError: for stage 0, or another mode.
    """
    if stage < 1 or mode not in MODES:
        raise ValueError(f"network {stage} of a {mode} chain has no teachers; the modes are {' and '.join(MODES)}")
    return (stage - 1,) if mode == "takd" else tuple(range(stage))


def teachers_at(teachers: Sequence[int], seed: int, step: int) -> tuple[int, ...]:
    """Those of several teachers that teach the batch of a step: each is left out with probability 1/4, never all.

    When all would be left out the last one, nearest to the student, stays. A function of (seed, step).

    Source: Son et al. (2021), section 3.3.
    """
    if len(teachers) == 1:
        return tuple(teachers)
    generator = torch.Generator().manual_seed(step_seed(seed, step))
    kept = torch.rand(len(teachers), generator=generator) >= DROP_PROBABILITY
    return tuple(t for t, keep in zip(teachers, kept.tolist(), strict=True) if keep) or (teachers[-1],)


def leading_channels(wide: Mapping[str, Tensor], narrow: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a narrow network cut out of a wider one of its family: of every tensor the first rows, columns, channels.

    Args:
        wide: names to tensors of the wider network.
        narrow: the same names, each tensor at most as long in every dimension; their values do not matter.

    Raises:
        ValueError: when the two are no family.
    """
    if wide.keys() != narrow.keys() or any(
        wide[name].ndim != part.ndim or any(a < b for a, b in zip(wide[name].shape, part.shape, strict=True))
        for name, part in narrow.items()
    ):
        raise ValueError("the first network is not a wider one of the second's family")
    return {name: wide[name][tuple(map(slice, part.shape))].clone() for name, part in narrow.items()}


class Acceptance(NamedTuple):
    """Whether an assistant stays in the chain.

    Attributes:
        accepted: the gain is above one standard error.
        gain: mean of (NLL without - NLL with) over the validation examples, in nats.
        standard_error: of the gain, by paired bootstrap.
    """

    accepted: bool
    gain: float
    standard_error: float


def accept_assistant(nll_with: Sequence[float], nll_without: Sequence[float], seed: int) -> Acceptance:
    """Judge an assistant by the final student's validation NLL after short runs with and without it.

    Accuracy down the chain cannot judge: it falls with the size of the networks in any chain.

    Args:
        nll_with, nll_without: of the same validation examples in the same order, (N,) each.
        seed: of the bootstrap.
    """
    gains = np.asarray(nll_without, dtype=np.float64) - np.asarray(nll_with, dtype=np.float64)
    generator = np.random.default_rng(seed)
    # How often each example is drawn: equal to resampling, without an N x resamples table of values.
    counts = generator.multinomial(len(gains), np.full(len(gains), 1 / len(gains)), size=RESAMPLES)
    error = float((counts @ gains / len(gains)).std(ddof=1))
    gain = float(gains.mean())
    return Acceptance(gain > error, gain, error)
