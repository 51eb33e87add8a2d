"""What the machine is doing while a run trains: GPU utilisation, memory, temperature, power; host memory."""

import resource
import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import psutil


class Monitor:
    """Reads one GPU through NVML, and this process's memory; says nothing about a GPU where there is none.

    Args:
        device: a torch device; only "cuda:<index>" is looked up in NVML.
    """

    def __init__(self, device: str) -> None:
        self._handle = None
        self._process = psutil.Process()
        if device.startswith("cuda"):
            import pynvml
            import torch

            try:
                pynvml.nvmlInit()
                # NVML counts the machine's GPUs, torch only those it may see: the UUID is common to both.
                uuid = torch.cuda.get_device_properties(device).uuid
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            except (pynvml.NVMLError, AttributeError):
                self._handle = None

    def read(self) -> dict[str, Any]:
        """Current values: memory in bytes, utilisation in %, temperature in degrees Celsius, power in watts."""
        values: dict[str, Any] = {"host_memory_bytes": self._process.memory_info().rss}
        if self._handle is None:
            return values
        import pynvml

        readings = {
            "gpu_utilisation_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu,
            "gpu_memory_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(self._handle).used,
            "gpu_temperature_celsius": lambda: pynvml.nvmlDeviceGetTemperature(self._handle, pynvml.NVML_TEMPERATURE_GPU),
            "gpu_power_watts": lambda: pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1000,
        }
        for name, reading in readings.items():
            try:
                values[name] = reading()
            except pynvml.NVMLError:  # some cards and virtual machines hide single sensors
                continue
        return values


def peak_memory_bytes(device: str) -> dict[str, int]:
    """Peak memory of this process on the host and, on CUDA, of torch's allocator on the device."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts kilobytes on Linux, bytes on macOS
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.startswith("cuda"):
        import torch

        peaks["device"] = torch.cuda.max_memory_allocated(device)
    return peaks


def free_memory_bytes(device: str, limit: int | None = None) -> int:
    """Memory that this process can still take on a device, or the limit where that is less."""
    if device.startswith("cuda"):
        import torch

        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + reusable
    else:
        free = psutil.virtual_memory().available
    return free if limit is None else min(free, limit)


def stage_seconds(readings: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds that each stage of training took, over all sessions; steps that a resumed run took again count again.

    Args:
        readings: of the run folder's system.jsonl: session, stage and seconds since the session began. One is taken at each
            stage's end.
    """
    total: dict[str, float] = defaultdict(float)
    session, before = "", 0.0
    for reading in readings:
        if reading["session"] != session or reading["seconds"] < before:  # two may have begun in one second
            session, before = reading["session"], 0.0
        total[reading.get("stage", "training")] += reading["seconds"] - before
        before = reading["seconds"]
    return dict(total)
