"""Drives a training generator: seeds each step, records, checkpoints, guards, and stops when it is told to."""

import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import IO, Any

import torch
from tqdm import tqdm

from trainbook.checkpoints import set_aside_after, write_checkpoint
from trainbook.errors import RunFailed
from trainbook.monitor import Monitor
from trainbook.records import Record, RunFolder
from trainbook.records import now as now_utc
from trainbook.state import TrainState, load_newest_checkpoint, snapshot

logger = logging.getLogger("trainbook")

FLUSH_SECONDS = 1.0  # records wait this long at most before they are checked and written
SYSTEM_SECONDS = 5.0  # between two readings of the machine
PROGRESS_SECONDS = 2.0  # a notebook keeps every refresh: twelve hours at ten a second would be a 90 MB file


@dataclass(frozen=True)
class Outcome:
    """How a call of `follow` ended: status `complete` or `stopped`, and why."""

    status: str
    why: str


def seed_step(seed: int, step: int) -> None:
    """Seed torch's global generators for one step, so that its randomness depends on (seed, step) alone.

    `torch.manual_seed` costs some 300 microseconds on a CPU-only process (it records a stack trace for CUDA's lazy
    start); the generators themselves take about two. On a CPU torch uses the low 32 bits of a seed: the step's factor is
    odd, so no two steps of a run share them.
    """
    value = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) & 0x7FFFFFFFFFFFFFFF
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(value)


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request to stop after the current step; a second SIGINT interrupts at once.

    Outside the main thread signals cannot be caught and none are.
    """

    def __init__(self) -> None:
        self.received = ""
        self._previous: dict[int, Any] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __enter__(self) -> "StopSignals":
        try:
            self._previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            logger.debug("not in the main thread: signals do not stop this run")
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@dataclass
class Engine:
    """Follows a workflow's training generator in a run folder.

    Args:
        folder: where records and checkpoints go.
        device: torch device, for the monitor and for loading checkpoints.
        seed: of the run.
        deadline: `time.monotonic()` value at which to save and stop, or None.
        checkpoint_seconds: at most this much work is lost to a kill.
        keep: number of checkpoints kept.
        progress: show a progress bar.
    """

    folder: RunFolder
    device: str
    seed: int
    deadline: float | None = None
    checkpoint_seconds: float = 60.0
    keep: int = 2
    progress: bool = True
    _pending: list[tuple[int, str, Record]] = field(default_factory=list)
    _saving: Future | None = None
    _saving_step: int = 0

    def restore(self, state: TrainState) -> int:
        """Load the newest whole checkpoint into `state`, cut the records back to it, and return its step (0 for none)."""
        metadata = load_newest_checkpoint(self.folder.checkpoints, state, self.device)
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
        self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
        monitor = Monitor(self.device)
        started = flushed = saved = time.monotonic()
        measured, first_step, saved_step, session = -math.inf, state.step, -1, now_utc()
        with (
            StopSignals() as signals,
            self.folder.metrics.open("ab", buffering=0) as metrics,
            self.folder.system.open("ab", buffering=0) as system,
            ThreadPoolExecutor(1, "checkpoint") as writer,  # leaving the block waits for what it still writes
            tqdm(
                total=state.total_steps,
                initial=state.step,
                unit="step",
                mininterval=PROGRESS_SECONDS,
                disable=not self.progress,
                smoothing=0.05,
            ) as bar,
        ):
            while True:
                seed_step(self.seed, state.step)
                expected = state.step + 1
                record = next(records, None)
                now = time.monotonic()
                if record is not None:
                    if state.step != expected:
                        raise RunFailed(
                            f"train must advance state.step by one per record; it went from {expected - 1} to {state.step}"
                        )
                    self._pending.append((state.step, state.stage, record))
                    bar.update()
                why = "all steps done" if record is None else self._stop_reason(signals, now)
                save = bool(why) or (record is not None and record.milestone) or now - saved >= self.checkpoint_seconds
                if save or now - flushed >= FLUSH_SECONDS:
                    self._flush(metrics, state, bar)
                    flushed = now
                    if now - measured >= SYSTEM_SECONDS:
                        rate = (state.step - first_step) / max(now - started, 1e-9)
                        reading = {
                            "session": session,
                            "step": state.step,
                            "seconds": now - started,
                            "steps_per_second": rate,
                            **monitor.read(),
                        }
                        self._write(system, [json.dumps(reading)])
                        measured = now
                if save and saved_step != state.step:
                    self._save(writer, metrics, state)
                    saved_step, saved = state.step, time.monotonic()
                if why:
                    self._finish_saving()
                    return Outcome("complete" if record is None else "stopped", why)

    def _stop_reason(self, signals: StopSignals, now: float) -> str:
        if signals.received:
            return f"{signals.received} received"
        if self.deadline is not None and now >= self.deadline:
            return "the time budget is spent"
        return ""

    def _flush(self, metrics: IO[bytes], state: TrainState, bar: tqdm) -> None:
        lines = []
        for step, stage, record in self._pending:
            values = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in record.metrics.items()}
            bad = [name for name, value in values.items() if not _is_finite(value)]
            if bad:
                self._pending.clear()
                self._write(metrics, lines)
                raise RunFailed(self._explain_non_finite(step, stage, bad, state))
            if values:
                lines.append(json.dumps({"step": step, "stage": stage, **values}))
                numbers = {name: f"{value:.4g}" for name, value in values.items() if isinstance(value, float)}
                bar.set_description_str(stage, refresh=False)
                bar.set_postfix(dict(list(numbers.items())[:3]), refresh=False)
        self._pending.clear()
        self._write(metrics, lines)
        if self._saving is not None and self._saving.done():
            self._finish_saving()  # a full disk is told now, not at the next checkpoint

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
        files = snapshot(state, {"records_bytes": metrics.tell()})
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
