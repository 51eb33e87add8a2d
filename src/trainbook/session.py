"""One session of a run, and run.json, which says of all of them where each ran, from which step to which, and why it ended."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainbook import distributed
from trainbook.errors import is_out_of_memory
from trainbook.files import read_lines, write_json
from trainbook.monitor import peak_memory_bytes
from trainbook.records import RunFolder, now
from trainbook.runtime import Runtime
from trainbook.state import TrainState

logger = logging.getLogger("trainbook")


class Session:
    """Keeps run.json while a run is under way; it is written at once.

    Args:
        folder: of the run.
        runtime: where the session runs.
        state: what it trains.
        facts: what run.json says beside.
        earlier: segments, as sessions are called in run.json, that came before.
        leave: called when the run is neither under way nor complete any more.

    Attributes:
        summary: the content of run.json.
        segment: this session's part of it.
        phase_seconds: name of each phase after training to its time.
    """

    def __init__(
        self,
        folder: RunFolder,
        runtime: Runtime,
        state: TrainState,
        facts: dict[str, Any],
        earlier: list[dict[str, Any]],
        leave: Callable[[], None],
    ) -> None:
        self.folder, self.runtime, self.state, self._leave = folder, runtime, state, leave
        self.phase_seconds: dict[str, float] = {}
        if earlier and earlier[-1]["ended"] is None:  # cut off: what is known of it is the last reading of the machine
            readings = [r for r in read_lines(folder.system) if r["session"] >= earlier[-1]["started"]]
            if readings:
                earlier[-1].update(last_step=readings[-1]["step"], seconds=readings[-1]["seconds"])
        kit = facts["provenance"]
        versions = {"kit": (kit["git"] or kit["trainbook"])[:8], "torch": kit["packages"]["torch"]}
        before = earlier[-1].get("versions", versions) if earlier else versions
        if before != versions:
            logger.warning(
                "the session before ran with kit %s and torch %s, this one with kit %s and torch %s: from here on bits may "
                "differ from what theirs would have been",
                *before.values(),
                *versions.values(),
            )
        self.segment = {
            "versions": versions,
            "platform": runtime.platform,
            "device": runtime.device,
            "device_name": runtime.device_name(),
            "threads": torch.get_num_threads(),
            "processes": max(runtime.processes, distributed.size()),
            "started": now(),
            "ended": None,
            "first_step": 0,
            "last_step": None,
            "seconds": 0.0,
        }
        self.summary: dict[str, Any] = {
            **facts,
            "status": "running",
            "why": "",
            "segments": [*earlier, self.segment],
            "parameters": state.num_parameters(),
            "planned_steps": state.total_steps,  # an early end lowers total_steps
        }
        self.write()

    @contextmanager
    def recorded(self, phase: str = "") -> Iterator[None]:
        """Add the time of the block to this segment; when it breaks, let run.json say failed (or stopped, by Ctrl-C) and why."""
        began = time.monotonic()
        try:
            yield
        except BaseException as error:
            status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            if status == "failed":
                logger.error("%s failed at step %d", self.folder.path.name, self.state.step, exc_info=True)
            remedy = "; lower batch_size or the sizes of the model" if is_out_of_memory(error) else ""
            self.summary.update(status=status, why=(str(error) or type(error).__name__) + remedy)
            raise
        finally:
            seconds = time.monotonic() - began
            self.segment.update(ended=now(), last_step=self.state.step, seconds=self.segment["seconds"] + seconds)
            if phase:
                self.phase_seconds[phase] = seconds
            self.write()
            if self.summary["status"] != "running":
                self._leave()

    def write(self) -> None:
        """Write run.json as it is known now."""
        seconds = sum(segment["seconds"] for segment in self.summary["segments"])
        on_gpu = sum(s["seconds"] * s["processes"] for s in self.summary["segments"] if s["device"].startswith("cuda"))
        price = self.runtime.price_per_hour
        self.summary.update(
            step=self.state.step,
            total_steps=self.state.total_steps,
            wall_seconds=seconds,
            gpu_seconds=on_gpu,
            peak_memory_bytes=peak_memory_bytes(self.runtime.device),
            estimated_cost=None if price is None else price * seconds / 3600,
        )
        write_json(self.folder.run_json, self.summary)
