"""Independent jobs in worker processes that stay: one per GPU or CPU core, with the results of a serial run."""

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.multiprocessing

from trainbook import runtime

logger = logging.getLogger("trainbook")


Arrays = dict[str, np.ndarray]
JobFunction = Callable[[Any, Arrays], Any]


@dataclass(frozen=True)
class Job:
    """A call of `function(spec, shared)`.

    Attributes:
        name: in messages.
        function: one that a fresh process can import: at the top of a module that is not the notebook or script itself. Its
            result depends on its arguments alone; it seeds what it draws.
        spec: plain data and CPU tensors.
        seconds: estimate; longer jobs start first.
    """

    name: str
    function: JobFunction
    spec: Any
    seconds: float = 0.0


@dataclass(frozen=True)
class Failure:
    """In place of a result: the job raised, or its process died twice."""

    name: str
    why: str


class JobPool:
    """Runs jobs one after the other in this process, or side by side in others that live until `close`.

    Arrays that several jobs read travel once, as files that the workers map. Every job runs with one CPU thread in either
    engine, so that both give the same bits. Workers ignore Ctrl-C, which is for this process, and end when it ends.

    Args:
        engine: "serial" or "parallel".
        slots: what a worker of its own is for: a GPU's number, or None for a CPU core.
        shared: name to array; no job may change one.
    """

    def __init__(
        self, engine: Literal["serial", "parallel"], slots: Sequence[int | None], shared: Mapping[str, np.ndarray | torch.Tensor]
    ) -> None:
        if not slots:
            raise ValueError("a pool of jobs needs a slot")
        self.engine, self.slots = engine, list(slots)
        self._shared = {name: np.asarray(array) for name, array in shared.items()}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._workers: dict[int, ProcessPoolExecutor] = {}

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """Results, or a `Failure` each, in the order of the jobs.

        A job whose process dies runs once more when the others are done, in a process of its own.

        Raises:
            ValueError: for a function that no other process can import.
        """
        for job in jobs:
            _check_importable(job)
        order = sorted(range(len(jobs)), key=lambda number: -jobs[number].seconds)
        results: dict[int, Any] = {}
        if self.engine == "serial":
            for number in order:
                results[number] = self._run_here(jobs[number])
        else:
            died = self._run_there(jobs, order, self.slots, results)
            for number in died:  # alone: it may have died of what the others needed
                logger.warning("job %s: its process died; it runs once more", jobs[number].name)
                if self._run_there(jobs, [number], self.slots[:1], results):
                    results[number] = Failure(jobs[number].name, "its process died twice: killed, or out of memory")
        for failure in (result for result in results.values() if isinstance(result, Failure)):
            logger.error("job %s failed: %s", failure.name, failure.why)
        return [results[number] for number in range(len(jobs))]

    def _run_here(self, job: Job) -> Any:
        with one_thread(), torch.random.fork_rng():
            return pickle.loads(_call(_packed(job), self._shared))  # also a copy, as from another process

    def _run_there(
        self, jobs: Sequence[Job], order: Sequence[int], slots: Sequence[int | None], results: dict[int, Any]
    ) -> list[int]:
        """Fill in results; returns the jobs whose process died."""
        waiting, free, died = list(order), list(range(len(slots))), []
        running: dict[Future[bytes], tuple[int, int]] = {}
        try:
            while waiting or running:
                while waiting and free:
                    number, slot = waiting.pop(0), free.pop(0)
                    running[self._submit(slot, jobs[number])] = number, slot
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number, slot = running.pop(future)
                    free.append(slot)
                    try:
                        results[number] = pickle.loads(future.result())
                    except BrokenProcessPool:
                        died.append(number)
                        self._workers.pop(slot).shutdown(wait=False)
        except BaseException:  # a stop request: what still runs is not waited for
            self._end(kill=True)
            raise
        return died

    def _submit(self, slot: int, job: Job) -> "Future[bytes]":
        packed = _packed(job)
        for _ in range(2):
            if slot not in self._workers:
                self._workers[slot] = ProcessPoolExecutor(
                    1, torch.multiprocessing.get_context("spawn"), _start_worker, (self.slots[slot], self._files())
                )
            with contextlib.suppress(BrokenProcessPool):  # it died while it waited for work
                return self._workers[slot].submit(_work, packed)
            self._workers.pop(slot).shutdown(wait=False)
        raise BrokenProcessPool(f"no worker process can be started for job {job.name}")

    def _files(self) -> dict[str, str]:
        """Name of each shared array to its file, written when the first worker starts."""
        write = self._folder is None
        if write:
            self._folder = tempfile.TemporaryDirectory(prefix="trainbook-jobs-")
        files = {name: str(Path(self._folder.name) / f"{place}.npy") for place, name in enumerate(self._shared)}
        for name, path in files.items() if write else ():
            np.save(path, self._shared[name], allow_pickle=False)
        return files

    def _end(self, kill: bool) -> None:
        for worker in self._workers.values():
            processes = list((worker._processes or {}).values()) if kill else []
            worker.shutdown(wait=not kill, cancel_futures=True)
            for process in processes:
                process.terminate()
        self._workers.clear()

    def close(self) -> None:
        """End the workers and delete the files they share."""
        self._end(kill=False)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> "JobPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread for torch, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_importable(job: Job) -> None:
    module, name = getattr(job.function, "__module__", None), getattr(job.function, "__qualname__", "<unnamed>")
    if module in (None, "__main__") or not name.isidentifier():
        raise ValueError(f"job {job.name}: {module}.{name} cannot be imported by another process: move it to a module")


def _packed(job: Job) -> bytes:
    # Plain pickle copies tensors; torch's own way to send them needs files in shared memory, of which containers have little.
    return pickle.dumps((job.name, job.function, job.spec))


def _call(packed: bytes, shared: Arrays) -> bytes:
    name, function, spec = pickle.loads(packed)
    try:
        result = function(spec, shared)
    except Exception as error:
        logger.debug("job %s\n%s", name, traceback.format_exc())
        lines = traceback.extract_tb(error.__traceback__)
        place = f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""
        result = Failure(name, f"{type(error).__name__}: {error}{place}")
    return pickle.dumps(result)


_mapped: Arrays = {}  # in a worker


def _start_worker(gpu: int | None, files: dict[str, str]) -> None:
    if gpu is not None:
        runtime.see_one_gpu(gpu)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # Mapped so that writing to one stays in this process and changes no file.
    _mapped.update({name: np.load(path, mmap_mode="c", allow_pickle=False) for name, path in files.items()})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Both ends of the queue of work are open here, so that no end of file tells of a parent that was killed.
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _work(packed: bytes) -> bytes:
    return _call(packed, _mapped)
