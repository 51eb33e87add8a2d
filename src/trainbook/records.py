"""The run folder: what a run wrote, what it reached, and the verdict on every target. Needs no torch."""

import fcntl
import logging
import math
import operator
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TextIO

from trainbook import __version__
from trainbook.config import BaseConfig
from trainbook.errors import UserError
from trainbook.files import read_json, read_lines, write_atomic, write_json

logger = logging.getLogger("trainbook")

EXIT_CODES = {"complete": 0, "failed": 1, "stopped": 3, "running": 3}
BAD_INPUT = 2
EVALUATION = "evaluation"  # the stage of the last record that `draw` gets: the held-out metrics
LOCK_ATTEMPTS = 50
REVISION_FILE = "revision.txt"  # in the kit that a bundle carries

COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class Record:
    """What one training step has to say.

    Attributes:
        metrics: name to number, tensor, or nested list of numbers; may be empty. "hints" may name kinds of trouble, each
            with a sentence on what to do: the engine logs a kind when it first comes, and the report lists them.
        milestone: True asks the engine for a checkpoint here (the end of a stage).
        examples: how many the step trained on, for the rate in examples per second; 0 when that means nothing.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    milestone: bool = False
    examples: int = 0


@dataclass(frozen=True)
class Target:
    """A promise of the literature or the brief, judged after every run.

    Attributes:
        metric: a key of what `evaluate` returns.
        comparison: how the metric must stand to the value.
        value: a number, or the name of another metric (a baseline's).
        presets: the presets it is a promise for.
        source: who promised it.
    """

    metric: str
    comparison: Literal["<", "<=", ">", ">="]
    value: float | str
    presets: tuple[str, ...]
    source: str

    def judge(self, metrics: dict[str, float], preset: str) -> dict[str, Any]:
        """The target with what the run measured and a verdict: reached, missed, not measured, or not for this preset."""
        found = metrics.get(self.metric)
        bound = metrics.get(self.value) if isinstance(self.value, str) else self.value
        if preset not in self.presets:
            verdict = f"not for preset {preset}"
        elif found is None or bound is None or math.isnan(found) or math.isnan(bound):
            verdict = "not measured"
        else:
            verdict = "reached" if COMPARISONS[self.comparison](found, bound) else "missed"
        target = f"{self.comparison} {self.value}" + (
            f" = {bound:.4g}" if isinstance(self.value, str) and bound is not None else ""
        )
        return {"metric": self.metric, "target": target, "measured": found, "verdict": verdict, "source": self.source}


class RunFolder:
    """`runs/<run_id>/` and the files in it.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.system = path / "system.jsonl"
        self.checkpoints = path / "checkpoints"
        self.data = path / "data"  # what could not be read again elsewhere
        self.figures = path / "figures"
        self.export = path / "export"
        self.logs = path / "logs"
        self.log = self.logs / "run.log"
        self.events = self.logs / "tensorboard"
        self.report = path / "report.html"
        self.notebook = path / "notebook.ipynb"
        self.run_json = path / "run.json"
        self.outcome = path / "outcome.json"  # how the processes of a session ended, for the one that started them
        self._lock: TextIO | None = None

    def create(self, config: dict[str, Any], elsewhere: dict[str, Path] | None = None) -> None:
        """Make the folder with its config, or check that it is this config's.

        Args:
            config: workflow, preset and fields.
            elsewhere: "checkpoints" or "logs" to the folder that shall hold them; a link then lies in the run folder.

        Raises:
            UserError: when it cannot be written, or is another run's.
        """
        try:
            self.check(config)
            if not self.config.exists():
                for name, place in (elsewhere or {}).items():  # all are checked before anything is made
                    if (place / self.path.name).exists() and any((place / self.path.name).iterdir()):
                        raise UserError(
                            f"{place / self.path.name} holds the {name} of an earlier run", "choose another --run-id, or move it"
                        )
                self.path.mkdir(parents=True, exist_ok=True)
                for name, place in (elsewhere or {}).items():
                    (place / self.path.name).mkdir(parents=True, exist_ok=True)
                    (self.path / name).symlink_to((place / self.path.name).absolute(), target_is_directory=True)
                write_json(self.config, config)
            self.logs.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {self.path}: {error.strerror}",
                "free it, or set TRAINBOOK_RUNS to another folder",
            ) from None

    def check(self, config: dict[str, Any]) -> None:
        """Refuse a folder that holds a run of another workflow or config.

        Raises:
            UserError: naming what differs.
        """
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not self.config.is_file():
            raise UserError(f"{self.path} is not a run folder", "choose another --run-id")
        found = read_json(self.config)
        if found == config:
            return
        if found.get("workflow") != config["workflow"]:
            difference = f"workflow {found.get('workflow')}, not {config['workflow']}"
        else:
            old, new = (
                {**side.get("config", {}), **{k: side.get(k) for k in ("preset", "authentic")}} for side in (found, config)
            )
            difference = ", ".join(
                f"{k} = {old.get(k)}, not {new.get(k)}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)
            )
        raise UserError(f"{self.path} holds a run with {difference}", "choose another --run-id, or `trainbook resume` that run")

    def keep_data(self, kept: Mapping[str, str]) -> None:
        """Keep texts that the data were made of, see `Data.kept`; what is kept already stays as it is."""
        for name, text in kept.items():
            if not (self.data / name).exists():
                self.data.mkdir(exist_ok=True)
                write_atomic(self.data / name, text.encode())

    def kept_data(self) -> dict[str, str]:
        """What `keep_data` kept, by file name."""
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(self.data.glob("[!.]*"))}

    def check_writable(self) -> None:
        """Refuse a folder that cannot be written, or made.

        Raises:
            UserError: saying why.
        """
        folder = next(path for path in (self.path, *self.path.parents) if path.exists())
        probe = folder / f".trainbook-{self.path.name}"
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"cannot write in {folder}: {error.strerror}", "choose another folder with TRAINBOOK_RUNS") from None

    def lock(self) -> None:
        """Claim the folder for this process until it ends, and for those that inherit `lock_descriptor`.

        Raises:
            UserError: when another process is training there.
        """
        self._lock = (self.path / "lock").open("a+")
        for attempt in range(LOCK_ATTEMPTS):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:  # somebody trains, or only looks whether somebody does
                process = self.training_process()
                if process is None and attempt < LOCK_ATTEMPTS - 1:
                    time.sleep(0.01)
                    continue
            self._lock.close()
            raise UserError(f"process {process} is training in {self.path}", "wait for it or stop it first")
        self.sign()

    @property
    def lock_descriptor(self) -> int:
        """Of the file that is locked; the folder stays claimed while a process has it open."""
        return self._lock.fileno()

    def sign(self) -> None:
        """Let stop requests for whoever claimed the folder go to this process."""
        (self.path / "lock").write_text(str(os.getpid()))

    def unlock(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def training_process(self) -> int | None:
        """Process id of whoever trains in this folder now, or None."""
        try:
            with (self.path / "lock").open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    return int(file.read() or 0) or None
        except FileNotFoundError:
            pass
        return None

    def history(self) -> list[dict[str, Any]]:
        """The records so far: step, stage and metrics of every step that had something to say."""
        return list(read_lines(self.metrics))

    def summary(self) -> dict[str, Any]:
        """The content of run.json.

        Raises:
            UserError: when there is none.
        """
        if not self.run_json.is_file():
            raise UserError(
                f"{self.path} is not a run folder: it has no run.json", "give the folder that `trainbook run` printed"
            )
        return read_json(self.run_json)


def identity(name: str, preset: str, config: BaseConfig, authentic: bool) -> dict[str, Any]:
    """What config.json says: equal for two runs that do the same work."""
    return {
        "workflow": name,
        "preset": preset,
        "authentic": authentic,
        "config": config.model_dump(mode="json"),
        "config_sha256": config.sha256(),
    }


def new_run_id(name: str, preset: str) -> str:
    """A run id that sorts by time and does not repeat within a microsecond."""
    return f"{name}-{preset}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"


def check_run_id(run_id: str) -> str:
    """The run id itself, if it can name a folder; empty means that there is none yet.

    Raises:
        UserError: when it could lead out of the runs folder.
    """
    if run_id and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", run_id):
        raise UserError(
            f"{run_id!r} cannot name a run folder", "use letters, digits, '-', '_' and '.'; set TRAINBOOK_RUNS for the place"
        )
    return run_id


def find_run(name: str, runs_folder: Path) -> RunFolder:
    """The run folder of a run id or path.

    Raises:
        UserError: when there is no such run.
    """
    for path in (runs_folder / name, Path(name)):
        if (path / "config.json").is_file():
            return RunFolder(path.absolute())
    known = sorted(path.parent.name for path in runs_folder.glob("*/config.json"))
    raise UserError(
        f"there is no run {name!r} in {runs_folder}",
        f"known: {', '.join(known[-8:])}" if known else "start one with `trainbook run NAME`",
    )


def measured_times(runs_folder: Path) -> dict[str, str]:
    """Per workflow, what its complete runs of each preset took at the median, such as "laptop 1.8 min"."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for path in sorted(runs_folder.glob("*/run.json")):
        summary = read_json(path)
        if summary.get("status") == "complete":
            seconds.setdefault(summary["workflow"], {}).setdefault(summary["preset"], []).append(summary["wall_seconds"])
    return {
        workflow: ", ".join(f"{preset} {statistics.median(times) / 60:.1f} min" for preset, times in presets.items())
        for workflow, presets in seconds.items()
    }


def provenance() -> dict[str, Any]:
    """Versions that a reader needs to repeat a run: kit, git revision, Python, packages."""
    packages = (
        "torch",
        "torchvision",
        "numpy",
        "scikit-learn",
        "scikit-image",
        "transformers",
        "papermill",
    )
    versions = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"trainbook": __version__, "git": git_revision(), "python": platform.python_version(), "packages": versions}


def check_unchanged() -> str:
    """The git revision that the kit is.

    Raises:
        UserError: when it differs from one, or there is none.
    """
    revision = git_revision()
    if revision is None or revision.endswith("+changes"):
        raise UserError(
            "authentic runs need an unchanged kit; its files or notebooks differ from the git revision, or there is none",
            "work in a clone of the repository, and commit or stash the changes",
        )
    return revision


def git_revision() -> str | None:
    """Commit of the tree the kit runs from, "+changes" when its source or notebooks differ from it; None outside git.

    A kit that travels in a bundle says itself which one it is.
    """
    source = Path(__file__).resolve().parent
    if (source / REVISION_FILE).is_file():
        return (source / REVISION_FILE).read_text()
    notebooks = source.parents[1] / "notebooks"
    try:
        commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--", str(source), str(notebooks)])
        head, changes = (
            subprocess.run(
                ["git", "-C", str(source), *command], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changes else "")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
