"""A run as a notebook sees it: start, load_data, build, train, evaluate, draw, finish, each one call."""

import json
import logging
import shlex
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

from IPython import get_ipython
from IPython.display import Image, display
from matplotlib.figure import Figure

from trainbook import distributed, forms, plan, plots, report
from trainbook.catalog import Workflow, load
from trainbook.checkpoints import newest_whole
from trainbook.comparison import baseline_table
from trainbook.config import BaseConfig
from trainbook.data import Data
from trainbook.engine import Engine, Outcome
from trainbook.errors import UserError
from trainbook.files import file_sha256, read_lines, write_json
from trainbook.fitting import planned_rates
from trainbook.handover import take_over
from trainbook.live import Progress
from trainbook.mirror import Mirror
from trainbook.monitor import stage_seconds
from trainbook.processes import train_in_processes
from trainbook.records import EVALUATION, RunFolder, check_run_id, check_unchanged, identity, new_run_id, provenance
from trainbook.runtime import Runtime, configure_logging, detect, group_size
from trainbook.seeding import seed_step
from trainbook.session import Session
from trainbook.spec import RunSpec
from trainbook.state import TrainState, load_newest_checkpoint
from trainbook.tables import Table
from trainbook.weights import export_weights, load_weights

logger = logging.getLogger("trainbook")

# Beyond any training step, and different from each in the 32 bits of a seed that a CPU uses: streams of their own.
EXPORT_STEP, EVALUATION_STEP, DRAWING_STEP = 2**32 - 3, 2**32 - 2, 2**32 - 1
ESTIMATE_SECONDS = 2.0
# Of run.json, what every checkpoint and picture carries.
ORIGIN = ("run_id", "command", "seed", "config_sha256", "authentic", "stamp", "data", "initial_weights", "provenance")


def start(
    workflow: ModuleType | str,
    preset: str = "laptop",
    overrides: dict[str, Any] | None = None,
    run_id: str = "",
    authentic: bool = False,
) -> "Run":
    """Prepare a run: check the config, look at the machine, and find what there is to continue. Trains nothing.

    Args:
        workflow: a module of `trainbook.workflows`, or its name.
        preset: a key of the config's `PRESETS`, such as smoke, laptop or full.
        overrides: field name to value, on top of the preset.
        run_id: name of the run folder. A folder of this very config is continued. Empty: continue the newest unfinished
            run of this config, or start a new one. What is not in the runs folder is looked for in the inputs.
        authentic: refuse synthetic data, data without a checksum, and a kit whose files differ from its git revision.

    Raises:
        UserError: for a bad config, an unwritable folder, a foreign run folder, a device that does not work.
    """
    run = prepare(workflow, preset, overrides, run_id, authentic)
    print(f"{run.workflow.name}, preset {preset}, run {run.run_id}")
    show(Table(["", "chosen", "why"], run.runtime.rows()))
    return run


def prepare(
    workflow: str | ModuleType,
    preset: str,
    overrides: dict[str, Any] | None = None,
    run_id: str = "",
    authentic: bool = False,
    folder: RunFolder | None = None,
) -> "Run":
    """What `start` does, without a word; `folder` names an existing run folder that lies elsewhere."""
    name = workflow if isinstance(workflow, str) else workflow.__name__.rpartition(".")[2]
    workflow = load(name) if isinstance(workflow, str) else Workflow(name, workflow)
    config = workflow.Config.from_preset(preset, overrides)
    runtime = detect()
    configure_logging(runtime.log_level)
    if runtime.processes > 1 and not config.DATA_PARALLEL:
        logger.warning("%s trains in one process, whatever --processes says", name)
        runtime = replace(runtime, processes=1)
    if group_size() > 1 and not config.DATA_PARALLEL:
        raise UserError(f"{name} trains in one process", "start it without torchrun")
    if authentic and folder is None:
        check_unchanged()
    if folder is None:
        run_id = check_run_id(run_id) or _unfinished(name, preset, config, authentic, runtime)
        if distributed.rank() == 0 and not (run_id and (runtime.runs_folder / run_id).exists()):
            wanted = identity(name, preset, config, authentic)
            run_id = take_over(runtime.input_folders, runtime.runs_folder, wanted, run_id) or run_id
        folder = RunFolder(runtime.runs_folder / (run_id or new_run_id(name, preset)))
    return Run(workflow, config, preset, runtime, folder, authentic)


def show(thing: Any) -> None:
    """Show a table or a picture where there is a notebook to show it in."""
    if get_ipython() is not None:
        display(thing)


def _unfinished(name: str, preset: str, config: BaseConfig, authentic: bool, runtime: Runtime) -> str:
    """Id of the newest run of this very config that was stopped or cut off and that nobody is training; "" when there is none."""
    wanted = {"preset": preset, "authentic": authentic, "config_sha256": config.sha256()}
    for path in sorted(runtime.runs_folder.glob(f"{name}-*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        folder = RunFolder(path.parent)
        summary = folder.summary()
        resumable = summary.get("status") in ("stopped", "running") and folder.training_process() is None
        if resumable and all(summary.get(key) == value for key, value in wanted.items()):
            return path.parent.name
    return ""


class Run:
    """One run of one workflow. The methods are called in the order of the notebook's cells."""

    def __init__(
        self, workflow: Workflow, config: BaseConfig, preset: str, runtime: Runtime, folder: RunFolder, authentic: bool
    ) -> None:
        self.workflow, self.config, self.preset, self.runtime, self.folder = workflow, config, preset, runtime, folder
        self.authentic = authentic
        self.run_id = folder.path.name
        self.data: Data | None = None
        self.state: TrainState | None = None
        self.summary: dict[str, Any] = {}
        self.trained = self.is_training = False
        self._panel: forms.LivePanel | None = None
        self._initial: dict[str, str] = {}
        self._session: Session | None = None
        mirrored = runtime.mirror_folder is not None and distributed.rank() == 0
        self._mirror = Mirror(folder, runtime.mirror_folder) if mirrored else None
        self._identity = identity(workflow.name, preset, config, authentic)
        if distributed.rank() == 0:  # the others, perhaps on another machine, do not write there
            self.folder.check(self._identity)
            self.folder.check_writable()

    def config_table(self) -> Table | None:
        """Every field with its value, its bounds, its meaning and what the preset says; where a person is, the form."""
        if forms.can_show():
            forms.edit(self._spec(), self._take, self._estimate)
            return None
        return Table(["field", "value", f"{self.preset} has", "allowed", "meaning"], self.config.rows(self.preset))

    def _spec(self) -> RunSpec:
        own, there = (config.model_dump(mode="json") for config in (self.config, type(self.config).from_preset(self.preset)))
        overrides = {name: value for name, value in own.items() if value != there[name]}
        return RunSpec(workflow=self.workflow.name, preset=self.preset, overrides=overrides, authentic=self.authentic)

    def _take(self, spec: RunSpec) -> str:
        """Become the run that a saved form says."""
        if self.is_training:
            return "The run that is being trained stays as it is; save again when it is done."
        if self._panel:
            self._panel.ended("another config was saved", resumable=False)
        new = prepare(self.workflow.module, spec.preset, spec.overrides, authentic=spec.authentic)
        self.__dict__.update(new.__dict__)
        return f"This notebook now trains {self.run_id}: run the cells below."

    def _estimate(self, config: BaseConfig) -> str:
        found = plan.measure(self.workflow, config, self.runtime, ESTIMATE_SECONDS)
        return plan.in_a_line(found)

    def load_data(self) -> Table:
        """Load the data set; show examples and where it comes from.

        Raises:
            UserError: when it is missing, or not allowed in an authentic run.
        """
        self.data = self.workflow.load_data(self.config, replace(self.runtime, kept=self.folder.kept_data()))
        if self.authentic and (self.data.synthetic is not False or not self.data.sha256):
            raise UserError("authentic runs need real data with a checksum", "drop --authentic, or choose another data set")
        if get_ipython() is not None:
            for figure in self.workflow.draw_data(self.config, self.data).values():
                show(Image(plots.to_png(figure)))
        return Table(["split", "tensor", "content"], self.data.rows())

    def build(self) -> Table:
        """Build modules and optimizers from the seed, and count the parameters."""
        seed_step(self.config.seed, 0)
        self.state = self.workflow.build(self.config, self.data, self.runtime)
        if newest_whole(self.folder.checkpoints) is None:
            self._load_initial_weights()
        if get_ipython() is not None and (rates := planned_rates(self.state)):
            show(Image(plots.to_png(plots.schedules(rates))))
        counts = self.state.num_parameters()
        return Table(
            ["module", "parameters"],
            [*([name, f"{n:,}"] for name, n in counts.items()), ["total", f"{sum(counts.values()):,}"]],
        )

    def _load_initial_weights(self) -> None:
        modules, runs_folder = self.state.modules, self.runtime.runs_folder
        if self.config.initial_weights:
            self._initial = load_weights(modules, self.config.initial_weights, runs_folder)
        for field, (name, remedy) in self.config.MODULE_FIELDS.items():
            if source := getattr(self.config, field):
                self._initial |= load_weights({name: modules[name]}, source, runs_folder, field, remedy)

    def train(self, checkpoint_seconds: float = 0.0, progress: bool = True) -> None:
        """Train from the newest checkpoint to the end, a stop request or the deadline; writes run.json.

        Args:
            checkpoint_seconds: time between checkpoints; 0 takes the runtime's.
            progress: show a progress bar.

        Raises:
            RunFailed: on a non-finite value or a checkpoint that cannot be written; the checkpoints before it are whole.
            Exception: whatever broke in the workflow. In every case run.json says why.
        """
        checkpoint_seconds = checkpoint_seconds or self.runtime.checkpoint_seconds
        if forms.can_show():
            history = self.folder.history()
            self._panel = panel = forms.LivePanel(history, lambda: self._train(checkpoint_seconds, False, panel))
        self._train(checkpoint_seconds, progress and self._panel is None, self._panel)

    def _train(self, checkpoint_seconds: float, progress: bool, panel: forms.LivePanel | None) -> None:
        self.is_training = True
        try:
            self._train_session(checkpoint_seconds, progress, panel)
        except BaseException as error:
            if panel:
                panel.ended(f"{type(error).__name__}: {error}", resumable=False)
            raise
        finally:
            self.is_training = False
        if panel:
            ending = "complete" if self.trained or self._complete_already else "stopped"
            panel.ended(f"{ending} at step {self.state.step:,}: {self.summary['why']}", resumable=ending == "stopped")

    def _train_session(self, checkpoint_seconds: float, progress: bool, watch: Callable[[Progress], bool] | None) -> None:
        if distributed.rank() > 0:  # the first process keeps the run folder
            self.trained = self.follow(checkpoint_seconds, progress).status == "complete"
            return
        self.folder.create(self._identity, self.runtime.elsewhere)
        self.folder.lock()
        configure_logging(self.runtime.log_level, self.folder.log)
        if self._mirror:
            self._mirror.start()
        earlier = self.folder.summary() if self.folder.run_json.exists() else {}
        self._check_data(earlier)
        if earlier.get("status") == "complete":
            load_newest_checkpoint(self.folder.checkpoints, self.state, self.runtime.device)
            self.summary = earlier
            print(f"{self.run_id} is complete already; nothing is trained or measured anew.")
            return
        self.folder.keep_data(self.data.kept)
        self._begin(earlier)
        with self._session.recorded():
            if self.runtime.processes > 1 and distributed.size() == 1:
                outcome = self._train_in_processes(checkpoint_seconds, progress, watch)
            else:
                outcome = self.follow(checkpoint_seconds, progress, watch)
            self._session.segment["first_step"] = outcome.first_step
            self.trained = outcome.status == "complete"
            self.summary.update(why=outcome.why, status="running" if self.trained else "stopped")
        where = f"at step {self.state.step} of {self.state.total_steps}: {self.summary['why']}"
        logger.info("%s %s", self.run_id, where)
        if not self.trained:
            print(f"Stopped {where}. Continue: trainbook resume {self.run_id}")

    def follow(self, checkpoint_seconds: float, progress: bool, watch: Callable[[Progress], bool] | None = None) -> Outcome:
        """Train in this process, which may be one of several, and leave run.json to the caller."""
        engine = Engine(
            self.folder,
            self.runtime.device,
            self.config.seed,
            self.runtime.deadline,
            checkpoint_seconds=checkpoint_seconds,
            keep=self.runtime.keep,
            progress=progress,
            origin=self._origin(),
            watch=watch,
        )
        first = engine.restore(self.state)
        if first:
            logger.info("continuing %s at step %d of %d", self.run_id, first, self.state.total_steps)
        outcome = engine.follow(iter(self.workflow.train(self.config, self.data, self.state)), self.state)
        return replace(outcome, first_step=first, total_steps=self.state.total_steps)

    def _origin(self) -> dict[str, Any]:
        """What makes a checkpoint or a picture traceable, from run.json; {} in a process that has none."""
        summary = self.folder.summary() if self.folder.run_json.exists() else {}
        return {key: summary[key] for key in ORIGIN if key in summary}

    def _stamp(self) -> list[str]:
        """What everything that this run makes says of itself."""
        real = {True: "SYNTHETIC DATA", False: "", None: "data of unknown origin"}[self.data.synthetic]
        checked = "authentic" if self.authentic else "authenticity not checked"
        return [mark for mark in ("SMOKE RUN" if self.preset == "smoke" else "", checked, real) if mark]

    def _train_in_processes(self, checkpoint_seconds: float, progress: bool, watch: Callable[[Progress], bool] | None) -> Outcome:
        """Let other processes train, then take up what they reached."""
        try:
            module = self.workflow.module.__name__
            outcome = train_in_processes(
                self.folder, module, self.runtime.processes, self.runtime.deadline, checkpoint_seconds, progress, watch
            )
        finally:
            self.folder.sign()
            load_newest_checkpoint(self.folder.checkpoints, self.state, self.runtime.device)
        self.state.total_steps = outcome.total_steps
        return outcome

    def leave(self) -> None:
        """Nothing more is written: let the copy catch up and give the folder back."""
        if self._mirror:
            self._mirror.close()
        self.folder.unlock()

    def _check_data(self, earlier: dict[str, Any]) -> None:
        recorded = earlier.get("data", {}).get("sha256", self.data.sha256)
        if recorded != self.data.sha256:
            self.leave()
            raise UserError(
                f"{self.run_id} was started on other data: SHA-256 {recorded[:12]}..., now {self.data.sha256[:12]}...",
                "put the data back as it was, or start a new run",
            )

    def _begin(self, earlier: dict[str, Any]) -> None:
        """Write run.json of a run under way; the segments of earlier sessions stay in it."""
        facts = {
            **{key: self._identity[key] for key in ("workflow", "preset", "authentic")},
            "run_id": self.run_id,
            "command": shlex.join(self._command()),
            "stamp": self._stamp(),
            "config_sha256": self._identity["config_sha256"],
            "seed": self.config.seed,
            "data": {key: getattr(self.data, key) for key in ("source", "licence", "sha256", "synthetic")},
            "initial_weights": self._initial or earlier.get("initial_weights", {}),
            "provenance": provenance(),
        }
        self._session = Session(self.folder, self.runtime, self.state, facts, earlier.get("segments", []), self.leave)
        self.summary = self._session.summary

    def _command(self) -> list[str]:
        authentic = ["--authentic"] if self.authentic else []
        return ["trainbook", "run", self.workflow.name, "--preset", self.preset, *self.config.options(self.preset), *authentic]

    def curves(self) -> None:
        """Show the recorded curves, one panel per metric, stage by stage."""
        figure = plots.record_curves(self.folder.history())
        self._show({"curves": figure})

    def evaluate(self) -> Table | str:
        """Measure on held-out data, show it beside the baselines, and judge the targets."""
        if self._unfinished_because:
            return self._unfinished_because
        if not self._complete_already:
            with self._session.recorded("evaluation"):
                self.summary["metrics"] = self.measure()
            self.summary["verdicts"] = [target.judge(self.summary["metrics"], self.preset) for target in self.workflow.TARGETS]
        show(report.metrics_table(self.summary["metrics"]))
        metrics = self.summary["metrics"]
        compared = dict.fromkeys(
            t.metric.rpartition("/")[2] for t in self.workflow.TARGETS if isinstance(t.value, str) and t.metric in metrics
        )
        if compared:
            self._show({"baselines": plots.baseline_bars(metrics, list(compared))})
        for table in (baseline_table(metrics), report.series_table(metrics)):
            if table is not None:
                show(table)
        return report.verdict_table(self.summary["verdicts"])

    @property
    def _complete_already(self) -> bool:
        return self.summary.get("status") == "complete"

    @property
    def _unfinished_because(self) -> str:
        """Why there is nothing to evaluate, draw or finish; "" when training came to its end."""
        if self.trained or self._complete_already:
            return ""
        status = self.summary.get("status", "not trained")
        return f"not evaluated: the run is {status}. Go on with: trainbook resume {self.run_id}"

    def measure(self) -> dict[str, float]:
        """The workflow's held-out metrics, with a random stream that depends on the seed only."""
        seed_step(self.config.seed, EVALUATION_STEP)
        return {name: float(value) for name, value in self.workflow.evaluate(self.config, self.data, self.state).items()}

    def draw(self) -> None:
        """Draw, save and show the workflow's pictures."""
        if self._unfinished_because:
            return
        if self._complete_already:
            for path in sorted(self.folder.figures.glob("*.png")):
                show(Image(filename=str(path)))
            return
        seed_step(self.config.seed, DRAWING_STEP)
        measured = {"step": self.state.step, "stage": EVALUATION, **self.summary.get("metrics", {})}
        with self._session.recorded("pictures"):
            figures = self.workflow.draw(self.config, self.data, self.state, [*self.folder.history(), measured])
        seconds = {**stage_seconds(read_lines(self.folder.system)), **self._session.phase_seconds}
        figures["phase_times"] = plots.phase_times(seconds)
        self._show(figures)

    def _show(self, figures: dict[str, Figure]) -> None:
        self.folder.figures.mkdir(exist_ok=True)
        revision = self.summary.get("provenance", {}).get("git")
        for name, figure in figures.items():
            path = self.folder.figures / f"{name}.png"
            sources = [f"seed {self.config.seed}", f"kit {(revision or 'unknown')[:8]}", f"data {self.data.sha256[:8]}"]
            footnote = " · ".join([self.run_id, f"step {self.state.step}", *sources, *self._stamp()])
            png = plots.to_png(figure, footnote, json.dumps({**self._origin(), "step": self.state.step}))
            if not self._complete_already:  # a complete run's files stand in run.json with their checksums
                path.write_bytes(png)
            show(Image(png))

    def finish(self) -> str:
        """Export the weights, write the report, and run.json last of all."""
        if self.trained and "metrics" in self.summary:
            self.folder.figures.mkdir(exist_ok=True)
            with self._session.recorded():
                self._export()
                complete = {"status": "complete", "why": f"{self.summary['why']}; evaluated", "files": self._checksums()}
                report.write(self.folder, {**self.summary, **complete})
            self.summary.update(complete)
            self._session.write()
        elif self.summary:
            report.write(self.folder, self.summary)
        self.leave()
        return f"{self.summary.get('status', 'not trained')}: {self.folder.report}"

    def _export(self) -> None:
        metadata = {
            "run_id": self.run_id,
            "config_sha256": self.config.sha256(),
            "config": self.config.model_dump_json(),
            "stamp": ", ".join(self._stamp()),
        }
        export_weights(self.state.modules, self.folder.export, metadata)
        write_json(self.folder.export / "config.json", self._identity)
        seed_step(self.config.seed, EXPORT_STEP)
        for name, text in self.workflow.exports(self.config, self.data, self.state, self.summary["metrics"]).items():
            (self.folder.export / name).write_text(text)
            if name.endswith(".txt"):
                print(text)

    def _checksums(self) -> dict[str, str]:
        files = [self.folder.metrics, *sorted(self.folder.export.iterdir()), *sorted(self.folder.figures.iterdir())]
        return {str(path.relative_to(self.folder.path)): file_sha256(path) for path in files}
