"""Paired timing of two callables in CPU seconds of one thread. Import it before numpy and torch: it sets their threads."""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # read when the libraries load

import torch

torch.set_num_threads(1)


@dataclass(frozen=True)
class Comparison:
    """CPU seconds of both sides, round by round, for `units` units of work a round."""

    benchmark: str
    peer: str
    unit: str
    units: float
    ours: list[float]
    theirs: list[float]

    @property
    def ratios(self) -> list[float]:
        """Peer's seconds over ours in every round; above 1 ours is faster."""
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of `ratios`."""
        return statistics.median(self.ratios)

    def result(self) -> dict[str, str | float | int]:
        """What is printed as JSON: median, lowest and highest ratio of the rounds."""
        ratios = self.ratios
        return {
            "benchmark": self.benchmark,
            "peer": self.peer,
            "ratio": round(self.ratio, 4),
            "low": round(min(ratios), 4),
            "high": round(max(ratios), 4),
            "rounds": len(ratios),
            "unit": self.unit,
        }


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process, which runs one thread; wall time would count the machine's other users."""
    started = time.process_time()
    work()
    return time.process_time() - started


def alternate(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int,
    *,
    benchmark: str,
    peer: str,
    unit: str,
    units: float,
) -> Comparison:
    """Time ours, theirs, ours, theirs, ... after one unmeasured call of each."""
    ours()
    theirs()
    pairs = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(rounds)]
    return Comparison(benchmark, peer, unit, units, [pair[0] for pair in pairs], [pair[1] for pair in pairs])


def report(comparisons: Sequence[Comparison]) -> None:
    """Print a table of median rates and ratios, then one JSON object per comparison."""
    names = [f"{comparison.benchmark} / {comparison.peer}" for comparison in comparisons]
    width = max(map(len, names))
    print(f"\n{'ours / peer':<{width}}  {'ours /s':>9}  {'peer /s':>9}  {'ratio':>6}  lowest and highest of the rounds")
    for name, c in zip(names, comparisons, strict=True):
        ours, theirs = (c.units / statistics.median(seconds) for seconds in (c.ours, c.theirs))
        low, high = min(c.ratios), max(c.ratios)
        spread = f"{low:.3f} .. {high:.3f} of {len(c.ratios)}, in {c.unit}"
        print(f"{name:<{width}}  {ours:9.1f}  {theirs:9.1f}  {c.ratio:6.3f}  {spread}")
    for comparison in comparisons:
        print(json.dumps(comparison.result()))
