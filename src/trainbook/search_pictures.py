"""Pictures of a search: what each trial reached and took, which values went together, and which field mattered."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trainbook.objective import Objective
from trainbook.plots import new_figure
from trainbook.report import format_number
from trainbook.trials import text_of

BAD, GOOD, NEUTRAL = "0.75", "#1f6fb4", "#7fb3e6"


def draw(
    trials: Sequence[Any], space: Mapping[str, Any], objective: Objective, importance: Mapping[str, float]
) -> dict[str, Figure]:
    """Name to figure: pareto, parallel, and importance where it is known.

    Args:
        trials: Optuna's, at least one of them complete.
        space: field to distribution.
        objective: what was looked for.
        importance: field to share.
    """
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    figures = {"pareto": _pareto(complete, objective), "parallel": _parallel(trials, space, objective)}
    if importance:
        figures["importance"] = _importance(importance, objective)
    return figures


def front(costs: np.ndarray) -> np.ndarray:
    """Which points no other is at least as good as in everything and better in something.

    Args:
        costs: (N, M), lower is better.

    Returns:
        (N,), True for those on the Pareto front.
    """
    no_worse = (costs[:, None] <= costs[None]).all(axis=-1)
    better = (costs[:, None] < costs[None]).any(axis=-1)
    return ~(no_worse & better).any(axis=0)


def _pareto(trials: Sequence[Any], objective: Objective) -> Figure:
    """The objective against each thing that a trial costs, with the trials that none beats in both."""
    values = np.array([trial.value for trial in trials])
    axes_of = {
        "seconds": [trial.user_attrs["seconds"] for trial in trials],
        "peak memory, MB": [trial.user_attrs["memory_bytes"] / 1e6 for trial in trials],
        "seconds per 1000 steps": [1000 / trial.user_attrs.get("steps_per_second", np.nan) for trial in trials],
    }
    figure, axes = new_figure(len(axes_of), width=4.0, height=3.2)
    for panel, (name, costs) in zip(axes[0], axes_of.items(), strict=True):
        costs = np.array(costs, dtype=float)
        best = front(np.stack([-values if objective.highest else values, costs], axis=-1))
        panel.plot(costs[~best], values[~best], "o", color=BAD, markersize=5, label="another is better in both")
        order = np.argsort(costs[best])
        panel.plot(costs[best][order], values[best][order], "o-", color=GOOD, markersize=6, linewidth=1, label="Pareto front")
        for trial, cost in zip(trials, costs, strict=True):
            if best[trials.index(trial)]:
                panel.annotate(str(trial.number), (cost, trial.value), xytext=(5, 5), textcoords="offset points", fontsize=8)
        panel.set(xlabel=name, title=str(objective).replace("_", " ") if panel is axes[0, 0] else "")
        panel.margins(0.12)
        panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel(objective.metric.replace("_", " "))
    axes[0, 0].legend(fontsize=7, framealpha=0.6)
    return figure


def _parallel(trials: Sequence[Any], space: Mapping[str, Any], objective: Objective) -> Figure:
    """One axis per field and one for the objective; a line per trial, dark where it is good, grey where it was ended early."""
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    values = np.array([trial.value for trial in complete])
    low, high = values.min(), values.max()
    figure, axes = new_figure(width=2.2 * (len(space) + 1), height=3.6)
    panel = axes[0, 0]
    ticks = {name: _ticks(distribution) for name, distribution in space.items()}
    for trial in trials:
        if trial.state.name == "PRUNED":
            places = [_place(space[name], trial.params[name]) for name in space]
            panel.plot(range(len(space)), places, color=BAD, linewidth=0.8, linestyle=":")
    goodness = (values - low) / max(high - low, 1e-300)
    goodness = goodness if objective.highest else 1 - goodness
    for index in np.argsort(goodness):
        places = [_place(space[name], complete[index].params[name]) for name in space]
        end = (values[index] - low) / max(high - low, 1e-300)
        is_best = goodness[index] == goodness.max()
        panel.plot(
            range(len(space) + 1),
            [*places, end],
            color=GOOD,
            alpha=0.15 + 0.85 * float(goodness[index]) ** 2,
            linewidth=2.2 if is_best else 1.1,
        )
    ticks[objective.metric] = [(0.0, format_number(low))] + ([(1.0, format_number(high))] if high > low else [])
    for index, marks in enumerate(ticks.values()):
        panel.axvline(index, color="0.3", linewidth=0.8)
        for place, text in marks:
            panel.annotate(text, (index, place), xytext=(4, 0), textcoords="offset points", fontsize=7, va="center", color="0.25")
    panel.set_xticks(range(len(ticks)), [name.replace("_", " ") for name in ticks], fontsize=9)
    panel.set(yticks=[], ylim=(-0.08, 1.08), xlim=(-0.2, len(space) + 0.6), title="dark: good; dotted: ended early")
    for side in ("left", "right", "top"):
        panel.spines[side].set_visible(False)
    return figure


def _place(distribution: Any, value: Any) -> float:
    """Where a value lies on its axis, 0 to 1."""
    if hasattr(distribution, "choices"):
        return distribution.choices.index(value) / max(len(distribution.choices) - 1, 1)
    low, high, at = (np.log(x) if distribution.log else x for x in (distribution.low, distribution.high, value))
    return float((at - low) / max(high - low, 1e-300))


def _ticks(distribution: Any) -> list[tuple[float, str]]:
    if hasattr(distribution, "choices"):
        return [(_place(distribution, choice), text_of(choice)) for choice in distribution.choices]
    low, high = distribution.low, distribution.high
    middle = np.sqrt(low * high) if distribution.log else (low + high) / 2
    return [(_place(distribution, value), format_number(value)) for value in (low, middle, high)]


def _importance(importance: Mapping[str, float], objective: Objective) -> Figure:
    figure, axes = new_figure(width=5.0, height=0.9 + 0.32 * len(importance))
    positions = np.arange(len(importance))[::-1]
    axes[0, 0].barh(positions, list(importance.values()), color=NEUTRAL)
    for position, share in zip(positions, importance.values(), strict=True):
        axes[0, 0].annotate(f"{share:.0%}", (0, position), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes[0, 0].set_yticks(positions, [name.replace("_", " ") for name in importance])
    title = f"which field decided {objective.metric.replace('_', ' ')}"
    axes[0, 0].set(title=title, xlabel="share of the importance (PED-ANOVA)", xlim=(0, 1))
    return figure
