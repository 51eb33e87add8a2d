"""Every combination of some fields' values with every seed, each an ordinary run, and what the fields do to the metrics."""

import itertools
import json
import math
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from trainbook import catalog, plots, runtime
from trainbook.config import BaseConfig
from trainbook.errors import UserError
from trainbook.files import write_atomic, write_json
from trainbook.intervals import t_interval
from trainbook.launching import stopping_by_signal
from trainbook.records import EXIT_CODES, RunFolder, check_run_id, identity
from trainbook.report import format_number
from trainbook.tables import Table
from trainbook.trials import Result, digest, read_result, run_id_of, run_trial, text_of, time_is_left


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        run_id: of its folder.
        values: swept field to value.
        seed: of the run.
        overrides: all that is changed of the preset.
        config: the whole.
    """

    run_id: str
    values: dict[str, Any]
    seed: int
    overrides: dict[str, Any]
    config: BaseConfig

    @property
    def point(self) -> str:
        """Its values in words; equal for the trials that differ in their seed only."""
        return ", ".join(f"{name} = {text_of(value)}" for name, value in self.values.items())


@dataclass(frozen=True)
class Sweep:
    """Which trials, and where their summary lies.

    Attributes:
        name: begins the names of all folders.
        workflow, preset, authentic: of every trial.
        trials: seed by seed, so that the first seed has all values when time runs out.
    """

    name: str
    workflow: str
    preset: str
    authentic: bool
    trials: tuple[Trial, ...]

    @property
    def folder(self) -> Path:
        """Of sweep.json and sweep.png, beside the run folders."""
        return runtime.runs_folder() / self.name


@dataclass(frozen=True)
class Estimate:
    """A metric at one combination of values, over its seeds.

    Attributes:
        values: swept field to value.
        metric: "<who>/<metric>".
        mean: over the complete runs.
        low, high: ends of the mean's 95 % t interval, or None with one run.
        number: of runs.
    """

    values: dict[str, Any]
    metric: str
    mean: float
    low: float | None
    high: float | None
    number: int


def read_fields(texts: Sequence[str]) -> dict[str, list[str]]:
    """Field to values from texts such as "timesteps=1,2,4"; commas inside brackets do not separate.

    Raises:
        UserError: for a text that is not like this, or a field that comes twice.
    """
    fields: dict[str, list[str]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UserError(f"--field {text} names no values", "write it like --field timesteps=1,2,4")
        if name in fields:
            raise UserError(f"--field {name} is given twice", f"give all its values in one: --field {name}=...,...")
        if name == "seed":
            raise UserError("--field seed: results are averaged over seeds", "give them with --seeds 0,1,2")
        fields[name] = [part.strip() for part in re.split(r",(?![^(\[]*[)\]])", values)]
    return fields


def plan(
    name: str,
    preset: str,
    overrides: dict[str, Any],
    fields: dict[str, list[Any]],
    seeds: str = "",
    authentic: bool = False,
    sweep_id: str = "",
) -> Sweep:
    """All trials, each checked: its config, and the folder that may lie in its place. Trains nothing.

    Args:
        name: of the workflow.
        preset, overrides, authentic: of every run.
        fields: swept field to values, as text or as the field's type.
        seeds: such as "0,1,2"; empty: the one that the config has.
        sweep_id: begins the names of the folders; empty: the same for the same fields of the same config, so that the
            command goes on with what is there, also with other values or further seeds.

    Raises:
        UserError: naming every value that no config takes, a value that comes twice, or a folder of another run.
    """
    config_class = catalog.load(name).Config
    found: list[tuple[dict[str, Any], BaseConfig]] = []
    mistakes: dict[str, None] = {}
    for seed in [part.strip() for part in seeds.split(",")] if seeds else [None]:
        for values in itertools.product(*fields.values()):
            chosen = overrides | dict(zip(fields, values, strict=True)) | ({} if seed is None else {"seed": seed})
            try:
                found.append((chosen, config_class.from_preset(preset, chosen)))
            except UserError as error:
                mistakes |= dict.fromkeys(line for line in str(error).splitlines() if not line.startswith("  ->"))
    if mistakes:
        raise UserError("\n".join(mistakes), "nothing was trained; edit the values")
    base = {key: value for key, value in found[0][1].model_dump(mode="json").items() if key not in {*fields, "seed"}}
    sweep_id = check_run_id(sweep_id) or f"{name}-{preset}-sweep-{digest([authentic, base, sorted(fields)])}"
    trials = []
    for chosen, config in found:
        values = {key: config.model_dump(mode="json")[key] for key in fields}
        trials.append(Trial(run_id_of(sweep_id, values, config.seed), values, config.seed, chosen, config))
    sweep = Sweep(sweep_id, name, preset, authentic, tuple(trials))
    _check(sweep)
    return sweep


def _check(sweep: Sweep) -> None:
    ids = [trial.run_id for trial in sweep.trials]
    if twice := next((trial for trial in sweep.trials if ids.count(trial.run_id) > 1), None):
        raise UserError(f"{twice.point}, seed {twice.seed} comes twice", "give each value and each seed once")
    if RunFolder(sweep.folder).config.exists():
        raise UserError(f"{sweep.folder} is a run folder", "choose another --sweep-id")
    for trial in sweep.trials:
        folder = RunFolder(runtime.runs_folder() / trial.run_id)
        if folder.path.exists() and any(folder.path.iterdir()):
            folder.check(identity(sweep.workflow, sweep.preset, trial.config, sweep.authentic))


def run(sweep: Sweep, metrics: Sequence[str] = ()) -> int:
    """Train what is not complete yet, then write and show what the fields do. A run that fails does not end the sweep.

    Args:
        sweep: what to train.
        metrics: to show beside those of the workflow's targets.

    Returns:
        0 when all runs are complete, 1 when one failed, 3 when it was stopped: the same sweep then goes on.
    """
    if runtime.group_size() > 1:
        raise UserError("a sweep starts its runs itself", "start it without torchrun; --processes says how many train each")
    deadline = runtime.detect().deadline
    results = {trial.run_id: read_result(RunFolder(runtime.runs_folder() / trial.run_id)) for trial in sweep.trials}
    done = sum(result.status == "complete" for result in results.values())
    print(f"{sweep.name}: {len(sweep.trials)} runs, {done} of them complete", flush=True)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    stopped = ""
    try:
        with stopping_by_signal():
            for trial, result in _trained(sweep, results, deadline):
                results[trial.run_id] = result
                _write(sweep, results, metrics)
                print(f"  {result.status}" + (f": {result.why}" if result.status != "complete" else ""), flush=True)
                if result.status == "stopped":
                    stopped = result.why
                    break
    except KeyboardInterrupt:
        stopped = "interrupted"
    _show(sweep, _write(sweep, results, metrics), results, metrics)
    if stopped:
        print(f"stopped: {stopped}; the same command goes on")
        return EXIT_CODES["stopped"]
    failed = any(result.status != "complete" for result in results.values())
    return EXIT_CODES["failed" if failed else "complete"]


def _trained(sweep: Sweep, results: dict[str, Result], deadline: float | None) -> Iterator[tuple[Trial, Result]]:
    """The trials that are not complete yet, one after another, each with its result; a signal ends them."""
    stop, took = threading.Event(), {}
    for number, trial in enumerate(sweep.trials, 1):
        if results[trial.run_id].status == "complete":
            continue
        left = _seconds_left(sweep, results, took)
        told = "" if left is None else f", about {tqdm.format_interval(left)} left"
        print(f"[{number}/{len(sweep.trials)}] {trial.point}, seed {trial.seed}{told}: {trial.run_id}", flush=True)
        if not time_is_left(deadline):
            yield trial, Result("stopped", "the time budget is spent")
            return
        began = time.monotonic()
        result = run_trial(sweep.workflow, sweep.preset, trial.overrides, trial.run_id, sweep.authentic, stop)
        took[trial.run_id] = time.monotonic() - began
        yield trial, result
        if stop.is_set() and result.status != "stopped":
            raise KeyboardInterrupt


def _seconds_left(sweep: Sweep, results: dict[str, Result], took: dict[str, float]) -> float | None:
    """For the trials to come: as much as the complete ones of the same values took, else as all did at the mean."""
    seconds: dict[str, list[float]] = {}
    for trial in sweep.trials:
        if (result := results[trial.run_id]).status == "complete":
            seconds.setdefault(trial.point, []).append(took.get(trial.run_id, result.seconds))
    every = list(itertools.chain(*seconds.values()))
    if not every:
        return None
    to_come = [trial for trial in sweep.trials if trial.run_id not in took and results[trial.run_id].status != "complete"]
    return sum(fmean(seconds.get(trial.point, every)) for trial in to_come)


def estimates(sweep: Sweep, results: dict[str, Result], metrics: Sequence[str] = ()) -> list[Estimate]:
    """Mean and 95 % t interval over seeds of each metric that stands in a target or is asked for, or of all where none is.

    Args:
        sweep: whose trials.
        results: run id to result; those that are not complete are left out.
        metrics: names, or what comes after the slash in several.
    """
    targets = catalog.load(sweep.workflow).TARGETS
    wanted = [*(t.metric for t in targets), *(t.value for t in targets if isinstance(t.value, str)), *metrics]
    complete = [(trial, results[trial.run_id].metrics) for trial in sweep.trials if results[trial.run_id].status == "complete"]
    measured = list(dict.fromkeys(name for _, measurement in complete for name in measurement))
    shown = [name for name in measured if not wanted or name in wanted or name.rpartition("/")[2] in wanted]
    points = {trial.point: trial.values for trial in sweep.trials}
    found = []
    for metric, (point, values) in itertools.product(shown, points.items()):
        numbers = [measurement[metric] for trial, measurement in complete if trial.point == point and metric in measurement]
        if numbers:
            mean, half = t_interval(numbers)
            low, high = (mean - half, mean + half) if math.isfinite(half) else (None, None)
            found.append(Estimate(values, metric, mean, low, high, len(numbers)))
    return found


def _write(sweep: Sweep, results: dict[str, Result], metrics: Sequence[str]) -> list[Estimate]:
    """Write sweep.json: what was to be trained, what became of it, and the estimates."""
    found = estimates(sweep, results, metrics)
    runs = [
        {"run_id": trial.run_id, "values": trial.values, "seed": trial.seed, **asdict(results[trial.run_id])}
        for trial in sweep.trials
    ]
    about = {name: getattr(sweep, name) for name in ("name", "workflow", "preset", "authentic")}
    write_json(sweep.folder / "sweep.json", {**about, "runs": runs, "estimates": [asdict(estimate) for estimate in found]})
    return found


def table(found: Sequence[Estimate]) -> Table:
    """One row per metric and combination of values."""
    rows = [
        [
            e.metric,
            *map(text_of, e.values.values()),
            format_number(e.mean),
            "-" if e.low is None else f"{format_number(e.low)} to {format_number(e.high)}",
            str(e.number),
        ]
        for e in found
    ]
    return Table(["held-out metric", *found[0].values, "mean", "95 % interval", "runs"], rows)


def _show(sweep: Sweep, found: list[Estimate], results: dict[str, Result], metrics: Sequence[str]) -> None:
    """Print the table, draw the picture, and name what failed and what nobody measured."""
    if found:
        print(f"\n{table(found)}\n")
        complete = {run_id: result for run_id, result in results.items() if result.status == "complete"}
        stamps = dict.fromkeys(mark for result in complete.values() for mark in result.stamp)
        footnote, description = " · ".join([sweep.name, *stamps]), json.dumps({"sweep": sweep.name, "runs": list(complete)})
        write_atomic(sweep.folder / "sweep.png", plots.to_png(draw(found), footnote, description))
        print(f"picture {sweep.folder / 'sweep.png'}")
    print(f"summary {sweep.folder / 'sweep.json'}")
    shown = {part for estimate in found for part in (estimate.metric, estimate.metric.rpartition("/")[2])}
    if found and (absent := [name for name in metrics if name not in shown]):
        measured = dict.fromkeys(name.rpartition("/")[2] for result in results.values() for name in result.metrics)
        print(f"not measured: {', '.join(absent)}; there are {', '.join(measured)}")
    for run_id, result in results.items():
        if result.status == "failed":
            print(f"failed  {run_id}: {result.why}")


def draw(found: Sequence[Estimate]) -> Figure:
    """Metrics against the first field's values, a line per model; a row of panels per combination of the other fields."""
    first = next(iter(found[0].values))
    panels: dict[tuple[str, str], dict[str, list[Estimate]]] = {}
    for estimate in found:
        who, _, metric = estimate.metric.rpartition("/")
        others = ", ".join(f"{name} = {text_of(value)}" for name, value in estimate.values.items() if name != first)
        panels.setdefault((others, metric), {}).setdefault(who, []).append(estimate)
    metrics = list(dict.fromkeys(metric for _, metric in panels))
    rows = list(dict.fromkeys(others for others, _ in panels))
    num_columns = len(metrics) if len(rows) > 1 else min(3, len(metrics))
    places = [(others, metric) for others in rows for metric in metrics]
    colours = {who: f"C{index}" for index, who in enumerate(dict.fromkeys(who for lines in panels.values() for who in lines))}
    figure, axes = plots.new_figure(num_columns, math.ceil(len(places) / num_columns))
    for index, (panel, (others, metric)) in enumerate(itertools.zip_longest(axes.flat, places, fillvalue=("", ""))):
        lines = panels.get((others, metric))
        if not lines:
            panel.set_axis_off()
            continue
        if len(rows) > 1 and index >= num_columns:
            panel.sharey(axes[0, index % num_columns])
        points = {who: [(_place(e.values[first]), e.mean, e.low, e.high) for e in line] for who, line in lines.items()}
        plots.interval_lines(panel, points, colours)
        panel.set(xlabel=first, title=metric.replace("_", " ") + (f"\n{others}" if others else ""))
    return figure


def _place(value: Any) -> float | str:
    """On the x axis: a number stays one, anything else is a category."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else text_of(value)
