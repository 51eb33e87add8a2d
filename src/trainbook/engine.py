"""Drives a training generator: seeds each step, records, checkpoints, guards, and stops when it is told to."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from trainbook import distributed
from trainbook.checkpoints import set_aside_after, write_checkpoint
from trainbook.errors import RunFailed
from trainbook.events import Events
from trainbook.live import Progress
from trainbook.monitor import Monitor
from trainbook.records import Record, RunFolder
from trainbook.records import now as now_utc
from trainbook.seeding import seed_step
from trainbook.signals import StopSignals
from trainbook.state import TrainState, load_newest_checkpoint, snapshot

logger = logging.getLogger("trainbook")

FLUSH_SECONDS = 1.0  # records wait this long at most before they are checked and written
SYSTEM_SECONDS = 5.0  # between two readings of the machine
AGREEMENT_SECONDS = 0.2  # several processes agree about this often on whether to save or to stop
AGREEMENT_STEPS = 16  # and at least this often: a slow stage may follow a quick one
PROGRESS_SECONDS = 2.0  # a notebook keeps every refresh: twelve hours at ten a second would be a 90 MB file


@dataclass(frozen=True)
class Outcome:
    """How training ended: status `complete` or `stopped`, why, and which steps were this session's."""

    status: str
    why: str
    first_step: int = 0
    total_steps: int = 0


@dataclass
class Session:
    """What one call of `follow` has done so far.

    Attributes:
        monitor: of the machine.
        started: `time.monotonic()` value.
        first_step: reached before.
        examples: seen since.
        name: when it began.
    """

    monitor: Monitor
    started: float
    first_step: int
    examples: int = 0
    name: str = field(default_factory=now_utc)

    def steps_per_second(self, step: int, now: float) -> float:
        """Mean pace so far."""
        return (step - self.first_step) / max(now - self.started, 1e-9)

    def reading(self, step: int, now: float) -> dict[str, Any]:
        """Pace and the machine's state, as one line of system.jsonl has them."""
        seconds = now - self.started
        examples = {"examples_per_second": self.examples / max(seconds, 1e-9)} if self.examples else {}
        return {"seconds": seconds, "steps_per_second": self.steps_per_second(step, now), **examples, **self.monitor.read()}


@dataclass
class Engine:
    """Follows a workflow's training generator in a run folder; of several processes the first writes there.

    Args:
        folder: where records and checkpoints go.
        device: torch device, for the monitor and for loading checkpoints.
        seed: of the run.
        deadline: `time.monotonic()` value at which to save and stop, or None.
        checkpoint_seconds: at most this much work is lost to a kill.
        keep: number of checkpoints kept.
        progress: show a progress bar.
        origin: what every checkpoint says of where it comes from, plain JSON.
        watch: shown the progress about once a second, between two steps; True asks for a stop.
    """

    folder: RunFolder
    device: str
    seed: int
    deadline: float | None = None
    checkpoint_seconds: float = 60.0
    keep: int = 2
    progress: bool = True
    origin: dict[str, Any] = field(default_factory=dict)
    watch: Callable[[Progress], bool] | None = None
    _stop_asked: bool = False
    _reading: dict[str, Any] = field(default_factory=dict)
    _points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    _pending: list[tuple[int, str, Record]] = field(default_factory=list)
    _saving: Future | None = None
    _saving_step: int = 0
    _agree_at: int = 0
    _hinted: set[str] = field(default_factory=set)

    def restore(self, state: TrainState) -> int:
        """Load the newest whole checkpoint into `state`, cut the records back to it, and return its step (0 for none)."""
        metadata = load_newest_checkpoint(self.folder.checkpoints, state, self.device)
        if distributed.rank() > 0:
            return state.step
        set_aside_after(self.folder.checkpoints, state.step if metadata else -1)
        size = metadata["records_bytes"] if metadata else 0
        if self.folder.metrics.exists():
            if self.folder.metrics.stat().st_size < size:
                raise RunFailed(
                    f"{self.folder.metrics} is shorter than the checkpoint of step {state.step} says: records were lost"
                )
            os.truncate(self.folder.metrics, size)
        return state.step

    def follow(self, records: Iterator[Record], state: TrainState) -> Outcome:
        """Drive the generator to its end, a stop request or the deadline; the state is saved in each case.

        Records are checked and written every second, not every step, so that a GPU is not made to wait for the host.
        A checkpoint is only ever written after the records before it were found finite: copied between two steps,
        written in the background, one at a time, and waited for before this returns.

        Raises:
            RunFailed: on a non-finite record, or when a checkpoint cannot be written.
        """
        if self.checkpoint_seconds <= 0:
            raise ValueError("checkpoint_seconds must be positive")
        if distributed.rank() == 0:
            self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
        session = Session(Monitor(self.device), time.monotonic(), state.step)
        flushed = saved = session.started
        measured, saved_step = -math.inf, -1
        self._agree_at = state.step + 1
        with (
            StopSignals() as signals,
            self._opened(self.folder.metrics) as metrics,
            self._opened(self.folder.system) as system,
            Events(self.folder.events, state.step) as events,
            ThreadPoolExecutor(1, "checkpoint") as writer,  # leaving the block waits for what it still writes
            self._bar(state) as bar,
        ):
            while True:
                record = self._next(records, state)
                now = time.monotonic()
                if record is not None:
                    self._pending.append((state.step, state.stage, record))
                    session.examples += record.examples
                    bar.update()
                    pace = session.steps_per_second(state.step, now)
                    stop, due = self._agree(self._stop_reason(signals, now), now - saved >= self.checkpoint_seconds, state, pace)
                    why, save = stop, bool(stop) or due or record.milestone
                else:
                    why, save = state.ending or "all steps done", True
                if save or now - flushed >= FLUSH_SECONDS:
                    values = numbers = self._flush(metrics, state, bar)
                    flushed = now
                    if now - measured >= SYSTEM_SECONDS or (record is not None and record.milestone):
                        reading = self._reading = session.reading(state.step, now)
                        where = {"session": session.name, "stage": state.stage, "step": state.step}
                        self._write(system, [json.dumps(where | reading)])
                        numbers = values | {name: (state.step, value) for name, value in reading.items()}
                        measured = now
                    events.write(numbers)
                    if self.watch is not None:
                        progress = Progress(state.step, state.total_steps, state.stage, self._points, self._reading)
                        self._stop_asked = self.watch(progress) or self._stop_asked
                if save and saved_step != state.step:
                    self._save(writer, metrics, state)
                    saved_step, saved = state.step, time.monotonic()
                if why:
                    self._finish_saving()
                    return Outcome("complete" if record is None else "stopped", why)

    def _next(self, records: Iterator[Record], state: TrainState) -> Record | None:
        """Have the next step taken, with its own random numbers; None when there is none."""
        before = state.step
        seed_step(self.seed, before, distributed.replica())
        record = next(records, None)
        if record is not None and state.step != before + 1:
            raise RunFailed(f"train must advance state.step by one per record; it went from {before} to {state.step}")
        return record

    def _bar(self, state: TrainState) -> tqdm:
        return tqdm(
            total=state.total_steps,
            initial=state.step,
            unit="step",
            mininterval=PROGRESS_SECONDS,
            disable=not self.progress or distributed.rank() > 0,
            smoothing=0.05,
        )

    @staticmethod
    def _opened(path: Path) -> IO[bytes]:
        """The file to append to, or nowhere for a process that is not the first."""
        return (path if distributed.rank() == 0 else Path(os.devnull)).open("ab", buffering=0)

    def _agree(self, stop: str, save: bool, state: TrainState, pace: float) -> tuple[str, bool]:
        """Stop reason and whether to save, the same in every process; (stop, save) as given where there is one."""
        if distributed.size() == 1:
            return stop, save
        if state.step < self._agree_at:
            return "", False
        steps = min(max(1, round(pace * AGREEMENT_SECONDS)), AGREEMENT_STEPS)
        several = distributed.largest_of([bool(stop), save, steps])
        self._agree_at = state.step + int(several[2])
        return (stop or "another process was told to stop") if several[0] else "", bool(several[1])

    def _stop_reason(self, signals: StopSignals, now: float) -> str:
        if signals.received:
            return f"{signals.received} received"
        if self._stop_asked:
            return "Stop was pressed"
        if self.deadline is not None and now >= self.deadline:
            return "the time budget is spent"
        return ""

    def _flush(self, metrics: IO[bytes], state: TrainState, bar: tqdm) -> dict[str, float]:
        """Check and write the records since the last time; returns the numbers of the last one that had any."""
        lines, numbers = [], {}
        self._points = {}
        for step, stage, record in self._pending:
            for kind, text in record.metrics.get("hints", {}).items():
                if kind not in self._hinted:  # once a session; the records have it every time
                    self._hinted.add(kind)
                    logger.warning("hint at step %d, %s: %s", step, kind, text)
            values = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in record.metrics.items()}
            bad = [name for name, value in values.items() if not _is_finite(value)]
            if bad:
                self._pending.clear()
                self._write(metrics, lines)
                raise RunFailed(self._explain_non_finite(step, stage, bad, state))
            if values:
                lines.append(json.dumps({"step": step, "stage": stage, **values}))
                of_step = {name: (step, value) for name, value in values.items() if isinstance(value, float)}
                numbers.update(of_step)
                if self.watch is not None:
                    for name, point in of_step.items():
                        self._points.setdefault(name, []).append(point)
                bar.set_description_str(stage, refresh=False)
        bar.set_postfix({name: f"{value:.4g}" for name, (_, value) in list(numbers.items())[:3]}, refresh=False)
        bar.total = state.total_steps
        self._pending.clear()
        self._write(metrics, lines)
        if self._saving is not None and self._saving.done():
            self._finish_saving()  # a full disk is told now, not at the next checkpoint
        return numbers

    def _write(self, file: IO[bytes], lines: list[str]) -> None:
        if lines:
            with self._disk_errors_explained("the records"):
                content = memoryview(("\n".join(lines) + "\n").encode())
                while content:  # an unbuffered write may take only a part
                    content = content[file.write(content) :]

    def _explain_non_finite(self, step: int, stage: str, metrics: list[str], state: TrainState) -> str:
        self._finish_saving()
        tensors = state.non_finite_tensors()
        where = f"non-finite tensors now: {', '.join(tensors[:5])}" if tensors else "all parameters are still finite"
        good = sorted(path.name for path in self.folder.checkpoints.glob("[0-9]*"))
        last = f"the last good checkpoint is step {int(good[-1])}" if good else "there is no checkpoint yet"
        what = f"{', '.join(metrics)} became non-finite at step {step} of stage {stage!r}"
        return f"{what}; {where}; {last}. Lower the learning rate and start again."

    def _save(self, writer: ThreadPoolExecutor, metrics: IO[bytes], state: TrainState) -> None:
        if bad := state.non_finite_tensors():
            raise RunFailed(self._explain_non_finite(state.step, state.stage, bad, state))
        self._finish_saving()  # never two at once
        if distributed.rank() > 0 and not distributed.is_divided():
            return
        files = snapshot(state, {"records_bytes": metrics.tell(), "origin": self.origin})
        if distributed.rank() > 0:
            return
        self._saving_step, self._saving = state.step, writer.submit(self._write_checkpoint, metrics, state.step, files)

    def _write_checkpoint(self, metrics: IO[bytes], step: int, files: dict[str, bytes]) -> None:
        os.fsync(metrics.fileno())
        write_checkpoint(self.folder.checkpoints, step, files, self.keep)

    def _finish_saving(self) -> None:
        """Wait until the checkpoint being written is on the disk."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            with self._disk_errors_explained(f"the checkpoint of step {self._saving_step}"):
                saving.result()

    @contextmanager
    def _disk_errors_explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunFailed(
                f"{what} cannot be written: {error.strerror or error}. "
                f"Earlier checkpoints are whole: free some space, then `trainbook resume {self.folder.path.name}`."
            ) from error


def _is_finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)
