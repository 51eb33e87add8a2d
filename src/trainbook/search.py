"""A search for the best values of a config's fields under way: each trial is an ordinary run folder."""

import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from IPython.display import Image
from tqdm import tqdm

from trainbook import catalog, plots, runtime, search_pictures
from trainbook.errors import UserError
from trainbook.files import last_line, read_json, read_lines, write_atomic, write_json
from trainbook.launching import stopping_by_signal
from trainbook.objective import Objective, choose
from trainbook.records import EXIT_CODES, RunFolder, check_run_id
from trainbook.report import format_number
from trainbook.run import show
from trainbook.spec import RunSpec
from trainbook.study import RUNGS, WHOLE, FrozenTrial, SharedStudy, Trial, TrialState, read_space
from trainbook.tables import Table
from trainbook.trials import digest, read_result, run_trial, text_of, time_is_left

OUT_OF_TIME = "the time budget is spent"
LOOK_SECONDS = 1.0  # between two looks at a run's records
STATES = {"COMPLETE": "complete", "PRUNED": "ended early", "FAIL": "failed", "RUNNING": "unfinished"}


@dataclass(frozen=True)
class Tuned:
    """What a search has found so far; shows as the table of its trials.

    Attributes:
        code: 0 done, 1 nothing complete, 3 stopped: the same call then goes on.
        best: field to value of the best trial, {} where none is complete.
        value: of the objective there.
        folder: of tune.json, run.toml and the pictures.
        table: one row per trial, the best first.
    """

    code: int
    best: dict[str, Any]
    value: float | None
    folder: Path
    table: Table = field(repr=False)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


@dataclass
class Search:
    """One search under way.

    Attributes:
        spec: what every trial's run has in common.
        name: of the study's folder; begins those of the runs.
        study: what was tried.
        objective: what is looked for.
    """

    spec: RunSpec
    name: str
    study: SharedStudy
    objective: Objective

    @classmethod
    def open(
        cls, spec: RunSpec, fields: dict[str, Sequence[Any] | str], metric: str = "", best: str = "", study_id: str = ""
    ) -> Self:
        """The study of this search, new or as far as it has come; arguments as `ConfigurationTuner.tune` takes them."""
        listed = {name: [values] if isinstance(values, str) else list(values) for name, values in fields.items()}
        config = spec.config()
        space = read_space(type(config), spec.preset, spec.overrides, listed)
        objective = choose(config, catalog.load(spec.workflow).TARGETS, metric, best)
        about = {
            **spec.model_dump(include={"workflow", "preset", "authentic"}),
            "metric": objective.metric,
            "best": "highest" if objective.highest else "lowest",
            "fields": {name: str(one) for name, one in sorted(space.items())},
            "config": {name: value for name, value in config.model_dump(mode="json").items() if name not in fields},
        }
        name = check_run_id(study_id) or f"{spec.workflow}-{spec.preset}-tune-{digest(about)}"
        folder = runtime.runs_folder() / name
        if RunFolder(folder).config.exists() or (folder / "sweep.json").exists():
            raise UserError(f"{folder} is a run folder or a sweep", "choose another --study-id")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "study.json").exists():
            write_json(folder / "study.json", about)
        elif (known := read_json(folder / "study.json")) != about:
            differing = ", ".join(key for key in about if about[key] != known.get(key))
            raise UserError(f"{folder} is a search with other {differing}", "choose another --study-id")
        return cls(spec, name, SharedStudy(folder, space, config.seed, objective.highest), objective)

    def run(self, num_trials: float, deadline: float | None) -> str:
        """Train until there are so many trials or the time is spent; why it stopped before, or ""."""
        stop = threading.Event()
        try:
            with stopping_by_signal():
                while time_is_left(deadline):
                    with self.study.next_trial(num_trials) as trial:
                        if trial is None:
                            return ""
                        began = time.monotonic()
                        ended = self._carry_out(trial, stop)
                        if stop.is_set():
                            return "interrupted"
                        if not ended:
                            return OUT_OF_TIME
                        self._say(self.study.trials[trial.number], time.monotonic() - began)
                        self._write()
        except KeyboardInterrupt:
            return "interrupted"
        return OUT_OF_TIME

    @property
    def folder(self) -> Path:
        """Of the study."""
        return runtime.runs_folder() / self.name

    def run_id(self, number: int) -> str:
        """Of a trial's run folder."""
        return f"{self.name}-trial_{number:03d}"

    def _carry_out(self, trial: Trial, stop: threading.Event) -> bool:
        """Train a trial, or go on with it, and enter what became of it; False when it was stopped before its end."""
        spec, values = self.spec, trial.params
        print(f"[trial {trial.number}] {words(values)}: {self.run_id(trial.number)}", flush=True)
        if (twin := self.study.twin(trial)) is not None:
            for rung, value in twin.intermediate_values.items():
                if rung not in self.study.trials[trial.number].intermediate_values:
                    trial.report(value, rung)
            self._enter(trial, twin.state, twin.value, twin.user_attrs)
            return True
        overrides = spec.overrides | values
        try:
            catalog.load(spec.workflow).Config.from_preset(spec.preset, overrides)
        except UserError as error:  # each value is allowed, but not all of them together
            self._enter(trial, TrialState.FAIL, None, {"why": str(error).splitlines()[0]})
            return True
        folder = RunFolder(runtime.runs_folder() / self.run_id(trial.number))
        judge = Judge(folder, self.objective, lambda reached: self.study.report(trial, reached))
        if judge():  # its records said so before a kill
            result = read_result(folder)
        else:
            result = run_trial(spec.workflow, spec.preset, overrides, folder.path.name, spec.authentic, stop, judge)
        if result.status == "stopped" and judge.ended_at is None:
            return False
        about = {"run_id": folder.path.name, "why": result.why, "seconds": result.seconds, "memory_bytes": result.memory_bytes}
        about |= {"stamp": list(result.stamp), **throughput(folder)}
        if result.status == "failed" and judge.ended_at is None:
            self._enter(trial, TrialState.FAIL, None, about)
            return True
        judge.look()  # it may have been through before it could be told
        if judge.ended_at is not None:
            about["why"] = f"ended after {judge.ended_at} of {WHOLE} parts: worse than others there"
            self._enter(trial, TrialState.PRUNED, None, about)
            return True
        value = result.metrics.get(self.objective.metric)
        value = self.objective.value_at(folder.history()) if value is None else value
        if value is None or not math.isfinite(value):
            known = ", ".join(dict.fromkeys([*result.metrics, *numbers_in(folder.history())]))
            about["why"] = f"{self.objective.metric} was not measured; there are {known}"
            self._enter(trial, TrialState.FAIL, None, about)
            return True
        self._enter(trial, TrialState.COMPLETE, value, about)
        return True

    def _enter(self, trial: Trial, state: TrialState, value: float | None, about: dict[str, Any]) -> None:
        for key, content in about.items():
            trial.set_user_attr(key, content)
        self.study.study.tell(trial, value if state == TrialState.COMPLETE else None, state=state)

    def _say(self, trial: FrozenTrial, seconds: float) -> None:
        value = "" if trial.value is None else f" {self.objective.metric} = {format_number(trial.value)},"
        why = f": {trial.user_attrs['why']}" if trial.state in (TrialState.FAIL, TrialState.PRUNED) else ""
        print(f"  {STATES[trial.state.name]}{why},{value} {tqdm.format_interval(seconds)}", flush=True)

    def _write(self) -> None:
        """Write tune.json, and the best config as run.toml."""
        best = self.study.best
        trials = [
            {"number": t.number, "status": STATES[t.state.name], "values": t.params, "value": t.value, **t.user_attrs}
            for t in self.study.trials
        ]
        about = {"name": self.name, "metric": self.objective.metric, "highest": self.objective.highest}
        found = {} if best is None else {"best": best.number, "values": best.params, "value": best.value}
        write_json(self.folder / "tune.json", {**about, **found, "trials": trials})
        if best is not None:
            values = self.spec.model_dump() | {"overrides": self.spec.overrides | best.params}
            RunSpec(**values).write(self.folder / "run.toml")

    def show(self, stopped: str) -> Tuned:
        """Print and draw what was found."""
        self._write()
        study, best = self.study, self.study.best
        table = self._table()
        print(f"\n{table}\n")
        if best is None:
            code = EXIT_CODES["stopped" if stopped else "failed"]
            return Tuned(code, {}, None, self.folder, table)
        figures = search_pictures.draw(study.trials, study.space, self.objective, study.importance())
        stamps = dict.fromkeys(mark for trial in study.trials for mark in trial.user_attrs.get("stamp", ()))
        for name, figure in figures.items():
            png = plots.to_png(figure, " · ".join([self.name, *stamps]), json.dumps({"study": self.name}))
            write_atomic(self.folder / f"{name}.png", png)
            show(Image(png))
            print(f"picture {self.folder / f'{name}.png'}")
        print(f"best    trial {best.number}: {words(best.params)}; {self.objective.metric} = {format_number(best.value)}")
        print(f"        trainbook run --spec {self.folder / 'run.toml'}")
        if self.objective.is_held_out:
            print(
                "        chosen by held-out data, one seed each: its figure flatters; judge it by `trainbook sweep --seeds 1,2,3`"
            )
        return Tuned(EXIT_CODES["stopped" if stopped else "complete"], best.params, best.value, self.folder, table)

    def _table(self) -> Table:
        sign = -1 if self.objective.highest else 1
        trials = sorted(
            self.study.trials, key=lambda t: (t.state != TrialState.COMPLETE, t.value is None, sign * (t.value or 0), t.number)
        )
        rows = [
            [
                str(trial.number),
                *(text_of(_short(trial.params.get(name, "-"))) for name in self.study.space),
                format_number(trial.value),
                STATES[trial.state.name],
                format_number(trial.user_attrs.get("seconds")),
                format_number(trial.user_attrs.get("steps_per_second")),
                format_number(trial.user_attrs.get("examples_per_second")),
                f"{trial.user_attrs.get('memory_bytes', 0) / 1e6:.0f}",
            ]
            for trial in trials
        ]
        measured = ["status", "seconds", "steps per second", "examples per second", "peak memory, MB"]
        return Table(["trial", *self.study.space, self.objective.metric, *measured], rows)


class Judge:
    """Looks at a run's records while it goes on, and says whether it is to be ended.

    Args:
        folder: of the run; need not exist yet.
        objective: what to look at.
        report: takes rung to value, and gives the rung at which the run is ended, or None.
    """

    def __init__(self, folder: RunFolder, objective: Objective, report: Callable[[dict[int, float]], int | None]) -> None:
        self.folder, self.objective, self.report = folder, objective, report
        self.ended_at: int | None = None
        self._reached, self._looked = 0, -math.inf

    def __call__(self) -> bool:
        """Whether the run is to be ended now; quick, and may be asked often."""
        now = time.monotonic()
        if self.ended_at is None and self._reached < len(RUNGS) and now - self._looked >= LOOK_SECONDS:
            self._looked = now
            step = last_line(self.folder.metrics).get("step", 0)
            planned = self.folder.summary()["planned_steps"] if step else 0
            reached = sum(step >= planned * rung / WHOLE for rung in RUNGS) if step else 0
            if reached > self._reached:
                self._reached = reached
                self.look(reached)
        return self.ended_at is not None

    def look(self, reached: int = len(RUNGS)) -> None:
        """Judge at the rungs reached, the first so many."""
        if not self.folder.run_json.is_file() or self.ended_at is not None:
            return
        planned, history = self.folder.summary()["planned_steps"], list(read_lines(self.folder.metrics))
        values = {rung: self.objective.value_at(history, planned * rung / WHOLE) for rung in RUNGS[:reached]}
        known = {rung: value for rung, value in values.items() if value is not None}
        if known:
            self.ended_at = self.report(known)


def words(values: dict[str, Any]) -> str:
    """Values for a person."""
    return ", ".join(f"{name} = {text_of(_short(value))}" for name, value in values.items())


def _short(value: Any) -> Any:
    return format_number(value) if isinstance(value, float) else value


def numbers_in(history: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the real numbers that records hold."""
    return list(dict.fromkeys(name for record in history for name, value in record.items() if isinstance(value, float)))


def throughput(folder: RunFolder) -> dict[str, float]:
    """Steps, and examples where they are counted, per second of the last session that was read."""
    reading = last_line(folder.system)
    return {name: reading[name] for name in ("steps_per_second", "examples_per_second") if name in reading}
