"""Takes the chunks of a level in their order, one after the other or several at once in processes of their own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainbook.data import Data
from trainbook.errors import RunFailed
from trainbook.workflows.distillation.config import Config
from trainbook.workflows.distillation.job_pool import Arrays, Failure, JobPool
from trainbook.workflows.distillation.job_pool import Job as PoolJob
from trainbook.workflows.distillation.job_table import JobTable
from trainbook.workflows.distillation.jobs import Job, Teaching, advance, new_network

CHUNKS_AHEAD = 2  # per process: what is computed and not yet recorded when a run is killed is computed again
SPLITS = ("train", "valid")  # no job sees a test image

Chunk = tuple[Job, dict[str, Any], dict[str, Any]]


class Turns:
    """Computes chunks of jobs; those of several jobs at once where the run may use several processes.

    Args:
        config, data: of the run.
        table: its jobs.
    """

    def __init__(self, config: Config, data: Data, table: JobTable) -> None:
        self.config, self.data, self.table = config, data, table
        self._pool: JobPool | None = None

    def take(self, order: Sequence[tuple[Job, int]]) -> Iterator[Chunk]:
        """Each chunk's job, what it leaves, and its metrics; whoever takes one puts it into the table before the next."""
        if self.table.jobs_at_once == 1 or len({job.name for job, _ in order}) == 1:
            for job, _ in order:
                yield job, *advance(self.config, self.data, job, self.table.teaching(job), self.table.saved(job))
            return
        position = 0
        while position < len(order):
            wave = self._wave([job for job, _ in order[position:]])
            yield from zip(wave, *zip(*self._computed(wave), strict=True), strict=True)
            position += len(wave)

    def _wave(self, jobs: Sequence[Job]) -> list[Job]:
        """The next jobs of the order, as far as none comes twice."""
        wave: list[Job] = []
        for job in jobs[: CHUNKS_AHEAD * self.table.jobs_at_once]:
            if job in wave:
                break
            wave.append(job)
        return wave

    def _computed(self, wave: Sequence[Job]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        if self._pool is None:
            self._pool = JobPool("parallel", self._slots(), _shared(self.data))
        results = self._pool.run([PoolJob(job.name, run_chunk, self._spec(job), float(job.steps)) for job in wave])
        failures = [result for result in results if isinstance(result, Failure)]
        if failures:
            raise RunFailed(f"{failures[0].name}: {failures[0].why}")
        device = self.data.train["images"].device
        return [(_moved(saved, device), metrics) for saved, metrics in results]

    def _slots(self) -> list[int | None]:
        number = self.table.jobs_at_once
        return list(range(number)) if self.data.train["images"].is_cuda else [None] * number

    def _spec(self, job: Job) -> dict[str, Any]:
        """Everything a process needs to take the chunk, on the CPU; logits that are kept on disk by their path."""
        teaching = self.table.teaching(job)
        return {
            "config": self.config.model_dump(mode="json"),
            "job": job,
            "saved": _moved(self.table.saved(job), torch.device("cpu")),
            "logits": {name: self.table.path(name) or logits.cpu() for name, logits in teaching.logits.items()},
            "networks": {name: _moved(each.state_dict(), torch.device("cpu")) for name, each in teaching.networks.items()},
            "shapes": {name: self.table.shape(name) for name in teaching.networks},
            "weights": None if teaching.weights is None else teaching.weights.cpu(),
            "accuracy": teaching.accuracy,
            "on_gpu": self.data.train["images"].is_cuda,
        }

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.close()


@contextmanager
def taking_turns(config: Config, data: Data, table: JobTable) -> Iterator[Turns]:
    """`Turns` whose processes end with the block."""
    turns = Turns(config, data, table)
    try:
        yield turns
    finally:
        turns.close()


def run_chunk(spec: dict[str, Any], shared: Arrays) -> tuple[dict[str, Any], dict[str, Any]]:
    """`advance` in another process; what `Turns` sends it, and the arrays that all chunks share."""
    device = torch.device("cuda:0" if spec["on_gpu"] else "cpu")
    splits = {split: {} for split in (*SPLITS, "test")}
    for name, array in shared.items():
        split, _, key = name.partition(".")
        splits[split][key] = torch.from_numpy(array).to(device)
    config, data = Config(**spec["config"]), Data(**splits, source="", licence="", sha256="", synthetic=None)
    networks = {}
    for name, weights in spec["networks"].items():
        networks[name] = new_network(config, data, *spec["shapes"][name], seed=0).requires_grad_(False).eval()
        networks[name].load_state_dict(weights)
    logits = {name: _mapped(each).to(device) for name, each in spec["logits"].items()}
    weights = None if spec["weights"] is None else spec["weights"].to(device)
    teaching = Teaching(logits, networks, weights, spec["accuracy"])
    saved, metrics = advance(config, data, spec["job"], teaching, _moved(spec["saved"], device))
    return _moved(saved, torch.device("cpu")), metrics


def _mapped(kept: str | Tensor) -> Tensor:
    """Logits from the file that holds them, or as they came."""
    return torch.from_numpy(np.load(kept, mmap_mode="c", allow_pickle=False)) if isinstance(kept, str) else kept


def _shared(data: Data) -> dict[str, np.ndarray]:
    return {f"{split}.{name}": tensor.cpu().numpy() for split in SPLITS for name, tensor in getattr(data, split).items()}


def _moved(value: Any, device: torch.device) -> Any:
    """A nested state with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(each, device) for key, each in value.items()}
    return type(value)(_moved(each, device) for each in value) if isinstance(value, list | tuple) else value
