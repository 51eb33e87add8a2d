"""Is this machine fit to train: versions, device against the wheel's kernels, memory, disk, time; and what to do if not."""

import importlib
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata

import psutil
from packaging.version import Version

from trainbook.devices import KERNELS_REMEDY, kernels_missing
from trainbook.errors import UserError
from trainbook.runtime import detect, runs_folder

GIGABYTE = 1e9
MIN_FREE_DISK, MIN_FREE_MEMORY = 2 * GIGABYTE, 2 * GIGABYTE
AMPLE_GPU_MEMORY = 15 * GIGABYTE  # a card sold as 16 GB shows a little less
OLDEST, NEWEST = (3, 11), (3, 13)
# The oldest and the first too new version of what the kit imports; requirements.txt holds the same ranges.
PACKAGES = {
    "torch": ("2.10", "2.16"),
    "torchvision": ("0.25", "0.31"),
    "transformers": ("5", "6"),
    "diffusers": ("0.37", "1"),
    "numpy": ("2.0", "3"),
    "pycocotools": ("2.0.8", "3"),
    "pydantic": ("2.10", "3"),
    "safetensors": ("0.5", "1"),
    "nvidia-ml-py": ("12", "14"),
    "tqdm": ("4.66", "5"),
    "ipywidgets": ("7.7.1", "9"),
}
MODULES = {"nvidia-ml-py": "pynvml"}  # the module of a package that is called otherwise


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, what was found, whether it is well, and what to do if it is not."""

    check: str
    found: str
    well: bool
    remedy: str = ""

    def row(self) -> list[str]:
        """As a table row."""
        return [self.check, self.found, "ok" if self.well else "NOT OK", "" if self.well else self.remedy]


def examine() -> list[Finding]:
    """Every check, in the order in which a person would mend what they find."""
    return [
        _python(),
        *(_package(name, *bounds) for name, bounds in PACKAGES.items()),
        *_devices(),
        _memory(),
        _disk(),
        _time(),
    ]


def _python() -> Finding:
    found = ".".join(str(part) for part in sys.version_info[:3])
    return Finding(
        "Python",
        found,
        OLDEST <= sys.version_info[:2] <= NEWEST,
        "use Python 3.11, 3.12 or 3.13: make PYTHON=python3.12",
    )


def _package(name: str, oldest: str, too_new: str) -> Finding:
    remedy = f"pip install '{name}>={oldest},<{too_new}'"
    try:
        version = metadata.version(name)
        importlib.import_module(MODULES.get(name, name))
    except metadata.PackageNotFoundError:
        return Finding(name, "not installed", False, remedy)
    except Exception as error:
        # A torchvision built for another torch fails here: "operator torchvision::nms does not exist".
        return Finding(name, f"{version}, does not import: {error}", False, f"{remedy}, together with the torch it was built for")
    return Finding(name, version, Version(oldest) <= Version(version) < Version(too_new), remedy)


def _devices() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return [Finding("GPU", f"none ({built}); training runs on {torch.get_num_threads()} CPU threads", True)]
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        reason = kernels_missing(torch.cuda.get_device_capability(index), torch.cuda.get_arch_list())
        memory = f"{properties.total_memory / GIGABYTE:.0f} GB"
        if properties.total_memory < AMPLE_GPU_MEMORY:
            memory += f" (under {AMPLE_GPU_MEMORY / GIGABYTE:.0f} GB, batches and blocks are cut until they fit)"
        found = f"{properties.name}, {memory}, CUDA {torch.version.cuda}" + (f": {reason}" if reason else "")
        findings.append(Finding(f"GPU {index}", found, not reason, KERNELS_REMEDY))
    return findings


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIGABYTE:.1f} of {memory.total / GIGABYTE:.1f} GB free"
    return Finding("memory", found, memory.available >= MIN_FREE_MEMORY, "close other programs, or lower batch_size")


def _disk() -> Finding:
    folder = next(path for path in (runs_folder(), *runs_folder().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    return Finding(
        "disk",
        f"{free / GIGABYTE:.1f} GB free at {folder}",
        free >= MIN_FREE_DISK,
        "free some, or set TRAINBOOK_RUNS to another disk",
    )


def _time() -> Finding:
    try:
        runtime = detect()
    except UserError as error:
        return Finding("device and time", str(error), False, "mend the setting named")
    rows = {name: (value, reason) for name, value, reason in runtime.rows()}
    found = "; ".join(f"{name} {rows[name][0]} ({rows[name][1]})" for name in ("platform", "device", "dtype", "time budget"))
    return Finding("runtime", found, True)
