"""What a tuner looks for: one metric, and its value as far as a run has come. Needs no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from trainbook.config import BaseConfig
from trainbook.errors import UserError
from trainbook.records import Target

TAIL = 0.1  # share of the steps so far whose records are averaged: one batch says little


@dataclass(frozen=True)
class Objective:
    """One metric and which way is good.

    Attributes:
        metric: held out, "<who>/<metric>", or one that the records have.
        highest: whether high values are good.
        chooses_weights: whether the run keeps the weights of the best value instead of the last.
    """

    metric: str
    highest: bool
    chooses_weights: bool = False

    @property
    def is_held_out(self) -> bool:
        """Whether it is measured at the end only, on data that chooses nothing else."""
        return "/" in self.metric

    def value_at(self, history: Sequence[dict[str, Any]], step: float = math.inf) -> float | None:
        """Mean of what the records say in the last tenth of the steps up to one, or the best of them where that chooses weights.

        Args:
            history: records of a run.
            step: the last one to look at.

        Returns:
            None where they say nothing.
        """
        found = {record["step"]: float(record[self.metric]) for record in history if self.metric in record}
        found = {at: value for at, value in found.items() if at <= step}
        if not found:
            return None
        if self.chooses_weights:
            return max(found.values()) if self.highest else min(found.values())
        last = max(found)
        return fmean(value for at, value in found.items() if at > last - max(1, TAIL * last))

    def __str__(self) -> str:
        return f"{'highest' if self.highest else 'lowest'} {self.metric}"


def choose(config: BaseConfig, targets: Sequence[Target], metric: str = "", best: str = "") -> Objective:
    """The metric asked for; else the one that chooses the weights, where the config validates; else the first target's.

    Args:
        config: of the runs.
        targets: of the workflow.
        metric: or "".
        best: highest or lowest, or "" where it is known: of a target, of best_metric, or a loss.

    Raises:
        UserError: when nothing says which metric, or which way is good.
    """
    validated = getattr(config, "best_metric", "") if getattr(config, "validate_every", 0) else ""
    metric = metric or validated or (targets[0].metric if targets else "")
    if not metric:
        raise UserError("nothing says what to look for", "name a metric, such as --metric loss, or set validate_every")
    known = {target.metric: "highest" if target.comparison in (">", ">=") else "lowest" for target in targets}
    if validated:
        known[validated] = config.best_is
    best = best or known.get(metric) or ("lowest" if metric.endswith("loss") else "")
    if best not in ("highest", "lowest"):
        raise UserError(f"is the highest {metric} best, or the lowest?", "say it: --best highest or --best lowest")
    return Objective(metric, best == "highest", metric == validated)
