"""A run under way as a small page: how far, how long still, the machine, and its curves. Plain HTML and SVG, cheap to make."""

import html
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

MAX_POINTS = 240  # of a curve; beyond it every other one is dropped
MAX_CURVES = 6
WIDTH, HEIGHT = 250, 90  # of a curve, in pixels
READINGS = {
    "steps_per_second": "{:.3g} steps/s",
    "examples_per_second": "{:.3g} examples/s",
    "gpu_utilisation_percent": "GPU {:.0f} %",
    "gpu_memory_bytes": "GPU memory {:,.0f} MB",
    "gpu_temperature_celsius": "{:.0f} °C",
    "gpu_power_watts": "{:.0f} W",
    "host_memory_bytes": "memory {:,.0f} MB",
}


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step, total_steps, stage: of the training.
        numbers: name of a metric to the (step, value) of the records of the last second that have it.
        reading: of the machine, see `Session.reading`.
    """

    step: int
    total_steps: int
    stage: str
    numbers: Mapping[str, Sequence[tuple[int, float]]]
    reading: Mapping[str, Any]


@dataclass
class LiveView:
    """Gathers progress and shows it.

    Attributes:
        curves: name to (step, value), the newest last.
    """

    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    _stages: dict[str, str] = field(default_factory=dict)
    _started: tuple[float, int] | None = None

    def load(self, history: Iterable[Mapping[str, Any]]) -> None:
        """Take up what earlier sessions recorded."""
        for record in history:
            self._add({n: [(record["step"], v)] for n, v in record.items() if isinstance(v, float)}, record["stage"])

    def _add(self, numbers: Mapping[str, Sequence[tuple[int, float]]], stage: str) -> None:
        for name, points in numbers.items():
            curve = self.curves.setdefault(name, [])
            last = curve[-1][0] if curve else -1
            curve += [point for point in points if point[0] > last]  # others are taken again after a stop
            while len(curve) > MAX_POINTS:
                del curve[1:-1:2]
            self._stages[name] = stage

    def show(self, progress: Progress) -> str:
        """The page after this progress."""
        now = time.monotonic()
        if self._started is None or progress.step < self._started[1]:
            self._started = (now, progress.step)
        self._add(progress.numbers, progress.stage)
        began, first = self._started
        done = progress.step - first
        left = (now - began) / done * (progress.total_steps - progress.step) if done else None
        share = progress.step / max(progress.total_steps, 1)
        told = [
            html.escape(progress.stage),
            f"step {progress.step:,} of {progress.total_steps:,}",
            "" if left is None else f"{tqdm.format_interval(left)} left",
            *(form.format(_scaled(name, progress.reading[name])) for name, form in READINGS.items() if name in progress.reading),
        ]
        bar = (
            '<div style="background:#e6e9ed;height:8px;border-radius:4px;max-width:770px">'
            f'<div style="background:#1f6fb4;height:8px;border-radius:4px;width:{100 * min(share, 1):.1f}%"></div></div>'
        )
        of_now = [name for name, stage in self._stages.items() if stage == progress.stage]
        shown = sorted(self.curves, key=lambda name: (name not in of_now, "loss" not in name))[:MAX_CURVES]
        charts = "".join(chart(name.replace("_", " "), self.curves[name]) for name in shown)
        return f'<div style="font:13px sans-serif">{" · ".join(filter(None, told))}{bar}{charts}</div>'


def _scaled(name: str, value: float) -> float:
    return value / 1e6 if name.endswith("_bytes") else value


def chart(title: str, points: list[tuple[int, float]]) -> str:
    """One curve as SVG, with its ends written at the axes."""
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    across = (WIDTH - 12) / max(steps[-1] - steps[0], 1)
    up = (HEIGHT - 12) / ((high - low) or 1.0)
    line = " ".join(f"{6 + (s - steps[0]) * across:.1f},{HEIGHT - 6 - (v - low) * up:.1f}" for s, v in points)
    x, y = line.rpartition(" ")[2].split(",")
    dot = f'<circle cx="{x}" cy="{y}" r="2.5" fill="#1f6fb4"/>'  # the newest
    return (
        f'<div style="display:inline-block;margin:6px 8px 0 0;vertical-align:top"><div style="font-size:12px;width:{WIDTH}px">'
        f"<b>{html.escape(title)}</b> {values[-1]:.4g}</div>"
        f'<svg width="{WIDTH}" height="{HEIGHT}" style="border:1px solid #d0d7de;background:#fff">'
        f'<polyline points="{line}" fill="none" stroke="#1f6fb4" stroke-width="1.4"/>{dot}</svg>'
        f'<div style="font-size:10px;color:#57606a;width:{WIDTH}px">{low:.3g} to {high:.3g}; '
        f"steps {steps[0]:,} to {steps[-1]:,}</div></div>"
    )
