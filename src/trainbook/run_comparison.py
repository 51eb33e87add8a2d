"""Several runs beside each other: where their configs differ, metrics with intervals over seeds, verdicts, curves. Needs no torch
for its tables.
"""

import base64
import importlib.resources
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from trainbook import catalog
from trainbook.comparison import HIGH, LOW, STANDARD_ERROR
from trainbook.files import read_json, write_atomic
from trainbook.intervals import difference_interval, t_interval
from trainbook.records import RunFolder
from trainbook.report import SERIES, format_number
from trainbook.tables import Table


@dataclass(frozen=True)
class Column:
    """Runs of one config, that differ in their seed only.

    Attributes:
        folders: of the runs.
        summaries: their run.json.
        config: field to value, without the seed.
    """

    folders: tuple[RunFolder, ...]
    summaries: tuple[dict[str, Any], ...]
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its first run, and how many more there are."""
        others = len(self.folders) - 1
        return self.folders[0].path.name + (f" and {others} more" if others else "")

    def values(self, metric: str) -> list[float]:
        """What the complete runs measured."""
        return [summary["metrics"][metric] for summary in self.summaries if metric in summary.get("metrics", {})]


def columns(folders: Sequence[RunFolder]) -> list[Column]:
    """The runs, those together that differ in nothing but their seed; a run that is named twice counts once."""
    found: dict[str, list[RunFolder]] = {}
    configs = {}
    for folder in {folder.path.resolve(): folder for folder in folders}.values():
        saved = read_json(folder.config)
        config = {name: value for name, value in saved["config"].items() if name != "seed"}
        key = str([saved["workflow"], saved.get("preset"), config])
        found.setdefault(key, []).append(folder)
        configs[key] = config
    return [Column(tuple(those), tuple(f.summary() for f in those), configs[key]) for key, those in found.items()]


def table(found: Sequence[Column]) -> Table:
    """What they are, the fields in which they differ, their metrics with 95 % intervals over seeds, and the verdicts."""
    rows = [[name, *(_several(column, name) for column in found)] for name in ("workflow", "preset", "status", "seed")]
    seconds = [[summary["wall_seconds"] for summary in column.summaries] for column in found]
    rows.append(["wall seconds", *(_mean(values, "{:.1f}") for values in seconds)])
    rows += [row for row, differs in config_rows(found) if differs]
    rows += [[name, *(_mean(column.values(name)) for column in found)] for name in _metrics(found)]
    rows += [[name, *(_verdicts(column, name) for column in found)] for name in _targets(found)]
    return Table(["", *(column.name for column in found)], rows)


def config_rows(found: Sequence[Column]) -> list[tuple[list[str], bool]]:
    """A row per field with its value in each column, and whether they differ."""
    names = dict.fromkeys(name for column in found for name in column.config)
    rows = [[name, *(str(column.config.get(name, "-")) for column in found)] for name in names]
    return [(row, len(set(row[1:])) > 1) for row in rows]


def differences(found: Sequence[Column]) -> Table | None:
    """Each further column less the first, for every metric with at least two seeds in both: mean, 95 % interval, what it says.

    The interval is Welch's: the two need not vary alike. None where no metric has two seeds on both sides.
    """
    rows = []
    for metric in _metrics(found):
        first = found[0].values(metric)
        for column in found[1:]:
            values = column.values(metric)
            if min(len(first), len(values)) > 1:
                mean, low, high = difference_interval(values, first)
                says = "higher" if low > 0 else "lower" if high < 0 else "no difference seen"
                rows.append([metric, column.name, f"{mean:+.3g}", f"{low:+.3g} to {high:+.3g}", says])
    return Table(["held-out metric", f"against {found[0].name}", "difference", "95 % interval", ""], rows) if rows else None


def _metrics(found: Sequence[Column]) -> list[str]:
    names = dict.fromkeys(name for column in found for summary in column.summaries for name in summary.get("metrics", {}))
    return [name for name in names if SERIES not in name and not name.endswith((STANDARD_ERROR, LOW, HIGH))]


def _several(column: Column, name: str) -> str:
    return ", ".join(dict.fromkeys(str(summary[name]) for summary in column.summaries))


def _mean(values: Sequence[float], form: str = "") -> str:
    """The mean, and half of its 95 % t interval where there are several."""
    if not values:
        return "-"
    mean, half = t_interval(values)
    text = form.format(mean) if form else format_number(mean)
    if math.isinf(half):
        return text
    half = 0.0 if max(values) == min(values) else half  # not what rounding makes of it
    return f"{text} ± {half:.2g} ({len(values)} seeds)"


def _targets(found: Sequence[Column]) -> list[str]:
    verdicts = (verdict for column in found for summary in column.summaries for verdict in summary.get("verdicts", []))
    judged = (verdict for verdict in verdicts if verdict["verdict"] in ("reached", "missed"))
    return list(dict.fromkeys(_target(verdict) for verdict in judged))


def _target(verdict: dict[str, Any]) -> str:
    return f"{verdict['metric']} {verdict['target'].partition(' = ')[0]}"


def _verdicts(column: Column, target: str) -> str:
    said = [v["verdict"] for summary in column.summaries for v in summary.get("verdicts", []) if _target(v) == target]
    return ", ".join(f"{word} in {said.count(word)} of {len(said)}" if len(said) > 1 else word for word in dict.fromkeys(said))


def write_page(found: Sequence[Column], path: Path) -> None:
    """Write one HTML file that needs no other: tables, curves side by side, whole configs with the differences marked."""
    from trainbook import plots  # needs torch

    curves = plots.curves_side_by_side({column.name: column.folders[0].history() for column in found})
    template = importlib.resources.files("trainbook").joinpath("comparison.html.jinja").read_text()
    workflows = list(dict.fromkeys(summary["workflow"] for column in found for summary in column.summaries))
    page = (
        jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        .from_string(template)
        .render(
            title=", ".join(catalog.load(name).title for name in workflows),
            found=found,
            table=table(found),
            differences=differences(found),
            stamps=dict.fromkeys(mark for c in found for summary in c.summaries for mark in summary.get("stamp", [])),
            config=config_rows(found),
            curves=base64.b64encode(plots.to_png(curves)).decode() if curves is not None else "",
        )
    )
    write_atomic(path, page.encode())
