"""What networks and arms cost on this machine: latency of an answer, time of a training step. Never part of a metric."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trainbook.workflows.distillation.job_table import JobTable
from trainbook.workflows.distillation.jobs import Job, logits_of_views, one_thread, seconds_per_step

WARM_UP, REPEATS = 20, 200
MOST_SECONDS = 3.0  # per latency: a large network on a CPU is timed fewer times
PERCENTILES = (50, 95)


@dataclass(frozen=True)
class Latency:
    """Milliseconds from a batch on the device to its logits.

    Attributes:
        batch_size: images.
        median, high: 50th and 95th percentile.
        repeats: how often it was timed.
    """

    batch_size: int
    median: float
    high: float
    repeats: int


@torch.no_grad()
def latency(network: nn.Module, images: Tensor, batch_size: int) -> Latency:
    """Time single batches: by CUDA's own events on a GPU, by the clock and with as many threads as torch has on a CPU."""
    batch = images[torch.arange(batch_size, device=images.device) % len(images)]
    network.eval()
    times, on_gpu, began = [], images.is_cuda, time.perf_counter()
    for index in range(WARM_UP + REPEATS):
        if on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            network(batch)
            end.record()
            end.synchronize()
            milliseconds = start.elapsed_time(end)
        else:
            before = time.perf_counter()
            network(batch)
            milliseconds = 1000 * (time.perf_counter() - before)
        if index >= min(WARM_UP, 2) and (index >= WARM_UP or time.perf_counter() - began > MOST_SECONDS / 2):
            times.append(milliseconds)
        if times and time.perf_counter() - began > MOST_SECONDS:
            break
    median, high = np.percentile(times, PERCENTILES)
    return Latency(batch_size, float(median), float(high), len(times))


@dataclass(frozen=True)
class TrainingTime:
    """Of one job, timed anew at the end of a run.

    Attributes:
        step_milliseconds: of one gradient step, in this process, on one thread.
        steps: of the job.
    """

    step_milliseconds: float
    steps: int

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return self.step_milliseconds * self.steps / 1000


def training_time(table: JobTable, job: Job) -> TrainingTime:
    """Time a few steps of a job from its start; nothing of them is kept."""
    seconds = seconds_per_step(table.config, table.data, job, table.teaching(job))
    return TrainingTime(1000 * seconds, job.steps)


def cache_seconds(table: JobTable, name: str) -> float:
    """Time of asking a network once about every view of every training image."""
    images = table.data.train["images"]
    with one_thread(images.device):
        began = time.perf_counter()
        logits_of_views(table.network(name), images, table.config.augmentation)
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began
