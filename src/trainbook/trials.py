"""One run among several that are compared: its name, its training, what became of it."""

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainbook import runtime
from trainbook.headless import execute
from trainbook.records import EXIT_CODES, RunFolder

MAX_ID_CHARACTERS = 150  # of a run's name; a file's may have 255 bytes


@dataclass(frozen=True)
class Result:
    """What became of a trial.

    Attributes:
        status: complete, failed, stopped or waiting.
        why: of run.json.
        metrics: held-out metrics of a complete run.
        seconds: that it trained and measured.
        stamp: what its pictures say of it, such as "SYNTHETIC DATA".
        memory_bytes: peak, on the device where there is one, else on the host.
    """

    status: str
    why: str
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    stamp: tuple[str, ...] = ()
    memory_bytes: int = 0


def run_trial(
    workflow: str,
    preset: str,
    overrides: dict[str, Any],
    run_id: str,
    authentic: bool = False,
    stop: threading.Event | None = None,
    ends_early: Callable[[], bool] | None = None,
) -> Result:
    """Train one ordinary run, as `trainbook run` does, or go on with it; a complete one is left as it is.

    What it prints is in its notebook; its progress and errors show here.

    Args:
        workflow, preset, overrides, run_id, authentic: of the run.
        stop: set when a signal asked for an end.
        ends_early: asked while the run goes on; True lets it save and stop.

    Raises:
        UserError: for what can be refused without looking at the device, see `headless.execute`.
    """
    folder = RunFolder(runtime.runs_folder() / run_id)
    result = read_result(folder)
    if result.status == "complete":
        return result
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        code = execute(workflow, preset, overrides, run_id, authentic, stop=stop, ends_early=ends_early)
    result = read_result(folder)
    if code == EXIT_CODES["complete"]:
        return result
    interrupted = stop is not None and stop.is_set()
    status = "stopped" if code == EXIT_CODES["stopped"] or interrupted else "failed"
    why = result.why if result.status == status else "interrupted" if interrupted else "it ended before it was trained, see above"
    return Result(status, why, seconds=result.seconds)


def time_is_left(deadline: float | None) -> bool:
    """Whether there is time for another run; what is left is the next one's time budget.

    Args:
        deadline: `time.monotonic()` value at which the last one stops and saves, or None.
    """
    if deadline is None:
        return True
    seconds = deadline - time.monotonic()
    if seconds > 0:
        runtime.export(time_budget=f"{seconds:.3f}s")
    return seconds > 0


def read_result(folder: RunFolder) -> Result:
    """What a run folder says."""
    if not folder.run_json.is_file():
        return Result("waiting", "")
    summary = folder.summary()
    status = "stopped" if summary["status"] == "running" else summary["status"]
    metrics = summary["metrics"] if status == "complete" else {}
    peaks = summary.get("peak_memory_bytes", {})
    memory = peaks.get("device", peaks.get("host", 0))
    return Result(status, summary["why"], metrics, summary["wall_seconds"], tuple(summary.get("stamp", ())), memory)


def text_of(value: Any) -> str:
    """A field's value as the command line takes it."""
    return f"({','.join(map(text_of, value))})" if isinstance(value, list | tuple) else str(value)


def run_id_of(prefix: str, values: dict[str, Any], seed: int) -> str:
    """A run id that starts with `prefix` and no other values have: what cannot stand in one is told apart by a digest."""
    parts = []
    for name, value in values.items():
        text = text_of(value)
        safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", text)
        parts.append(f"{name}_{safe}" if safe == text else f"{name}_{safe.strip('_')[:24]}-{digest(text)}")
    run_id = "-".join([prefix, *parts, f"seed_{seed}"])
    return run_id if len(run_id) <= MAX_ID_CHARACTERS else f"{prefix}-{digest(values)}-seed_{seed}"


def digest(content: Any) -> str:
    """Eight characters that tell apart what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
