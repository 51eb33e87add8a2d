"""Where a run happens: platform, device, number format, folders, time budget, each with the reason it was chosen.

The only module that reads or writes environment variables or asks which platform this is.
"""

import functools
import importlib.util
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainbook.devices import KERNELS_REMEDY, kernels_missing
from trainbook.errors import UserError

RUNS, DATA, DEVICE = "TRAINBOOK_RUNS", "TRAINBOOK_DATA", "TRAINBOOK_DEVICE"
TIME_BUDGET, LOG_LEVEL, PRICE = "TRAINBOOK_TIME_BUDGET", "TRAINBOOK_LOG_LEVEL", "TRAINBOOK_PRICE_PER_HOUR"
PROCESSES, PARALLEL, WORKERS = "TRAINBOOK_PROCESSES", "TRAINBOOK_PARALLEL", "TRAINBOOK_WORKERS"
JOBS = "TRAINBOOK_JOBS"
CHECKPOINT_EVERY, KEEP = "TRAINBOOK_CHECKPOINT_EVERY", "TRAINBOOK_KEEP"
CHECKPOINT_DIR, LOG_DIR, INPUTS = "TRAINBOOK_CHECKPOINT_DIR", "TRAINBOOK_LOG_DIR", "TRAINBOOK_INPUTS"
MIRROR, MEMORY_LIMIT = "TRAINBOOK_MIRROR", "TRAINBOOK_MEMORY_LIMIT"
DEADLINE = "TRAINBOOK_DEADLINE"  # `time.monotonic()` value, the same in all processes of a machine; for those that a run starts
# The runtime's settings, as the command line and the training brief name them, and where a child process finds them.
SETTINGS = {
    "runs": RUNS,
    "data": DATA,
    "device": DEVICE,
    "time_budget": TIME_BUDGET,
    "log_level": LOG_LEVEL,
    "processes": PROCESSES,
    "parallel": PARALLEL,
    "workers": WORKERS,
    "jobs": JOBS,
    "checkpoint_every": CHECKPOINT_EVERY,
    "keep": KEEP,
    "checkpoint_dir": CHECKPOINT_DIR,
    "log_dir": LOG_DIR,
    "inputs": INPUTS,
    "mirror": MIRROR,
    "memory_limit": MEMORY_LIMIT,
    "price_per_hour": PRICE,
}
ERROR_LOG = "errors.log"
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
# How several processes share a model, and what of its weights each has then.
PARALLEL_KINDS = {"copies": "a copy", "slices": "a slice of every tensor", "pipeline": "a stage"}

KAGGLE_BUDGET_SECONDS = 11 * 3600  # a Kaggle session is cut at 12 h and a cut session's files may be lost
KAGGLE_INPUTS = Path("/kaggle/input")


@dataclass(frozen=True)
class Runtime:
    """Where and how long, never what: two runtimes with one config train the same model.

    Attributes:
        platform: kaggle, colab, vastai or local.
        device: a torch device such as "cpu" or "cuda:0".
        dtype: the number format mixed precision uses there: float32, float16 or bfloat16.
        runs_folder: run folders are made here.
        data_folder: downloads are kept here.
        deadline: `time.monotonic()` value at which training stops and saves, or None.
        price_per_hour: what the machine costs, in the currency of whoever set it, or None.
        processes: how many train together on this machine, each on its own GPU where there are several.
        parallel: what each keeps of the weights: "copies" all of them (DDP), "slices" a slice of every parameter (FSDP2),
            "pipeline" some of the blocks of a sequence.
        workers: processes that read a data set too large for the device.
        jobs: networks trained at the same time by a workflow that trains many, each in a process of its own.
        checkpoint_seconds: at most this much work is lost to a kill.
        keep: number of checkpoints kept.
        memory_limit: count on so many bytes of the device's free memory, or None for all of them.
        elsewhere: "checkpoints" and "logs" to a folder that shall hold them instead of the run folder.
        input_folders: read-only folders, such as the outputs of earlier sessions, where a run to continue may lie.
        mirror_folder: a folder that outlives the machine, to which runs are copied while they train, or None.
        kept: what an earlier session of the run kept of its data, see `Data.kept`.
        reasons: for platform, device, dtype and time budget, why.
    """

    platform: str
    device: str
    dtype: str
    runs_folder: Path
    data_folder: Path
    deadline: float | None
    price_per_hour: float | None = None
    mirror_folder: Path | None = None
    log_level: str = "INFO"
    processes: int = 1
    parallel: str = "copies"
    workers: int = 0
    jobs: int = 1
    checkpoint_seconds: float = 60.0
    keep: int = 2
    memory_limit: int | None = None
    elsewhere: dict[str, Path] = field(default_factory=dict)
    input_folders: tuple[Path, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[list[str]]:
        """Table rows: what, chosen, why."""
        left = "none" if self.deadline is None else f"{(self.deadline - time.monotonic()) / 3600:.2f} h"
        chosen = {"platform": self.platform, "device": self.device, "dtype": self.dtype, "time budget": left}
        if self.processes > 1:
            chosen["processes"] = f"{self.processes}, each with {PARALLEL_KINDS[self.parallel]} of the weights"
        folders = [
            ["runs", str(self.runs_folder), f"${RUNS} or ./runs"],
            ["data", str(self.data_folder), f"${DATA} or the user's cache"],
        ]
        folders += [["inputs", str(folder), "runs lying there are continued"] for folder in self.input_folders]
        folders += [["mirror", str(self.mirror_folder), "runs are copied there while they train"]] if self.mirror_folder else []
        return [[name, value, self.reasons.get(name, "")] for name, value in chosen.items()] + folders

    def device_name(self) -> str:
        """The device's product name."""
        if self.device == "cpu":
            return platform.processor() or platform.machine()
        import torch

        return torch.cuda.get_device_name(self.device)


def detect(hardware: bool = True) -> Runtime:
    """The runtime of this process, from the environment and the hardware.

    Args:
        hardware: look at the device too, which imports torch and takes memory on a GPU. Without, it is as on a CPU.

    Raises:
        UserError: for a value in the environment that cannot be read, or a device that does not work.
    """
    where, platform_reason = _platform()
    device, device_reason = _device(os.environ.get(DEVICE, "auto")) if hardware else ("cpu", "not looked at")
    dtype, dtype_reason = _dtype(device)
    budget, budget_reason = _time_budget(where)
    processes, processes_reason = _processes(where, device)
    level = os.environ.get(LOG_LEVEL, "INFO").upper()
    if level not in LOG_LEVELS:
        raise UserError(f"{LOG_LEVEL}={level} is not a log level", f"choose one of: {', '.join(LOG_LEVELS)}")
    parallel = os.environ.get(PARALLEL) or "copies"
    if parallel not in PARALLEL_KINDS:
        raise UserError(f"{PARALLEL}={parallel} is no way to train in parallel", f"choose one of: {', '.join(PARALLEL_KINDS)}")
    return Runtime(
        platform=where,
        device=device,
        dtype=dtype,
        runs_folder=runs_folder(),
        data_folder=Path(os.environ.get(DATA, Path.home() / ".cache" / "trainbook")),
        deadline=None if budget is None else time.monotonic() + budget,
        price_per_hour=_price(),
        mirror_folder=_mirror_folder(),
        log_level=level,
        processes=processes,
        parallel=parallel,
        workers=_whole_number(WORKERS, 0, least=0),
        jobs=_jobs(device),
        checkpoint_seconds=_checkpoint_seconds(),
        keep=_whole_number(KEEP, 2, least=1),
        memory_limit=parse_bytes(os.environ[MEMORY_LIMIT]) if os.environ.get(MEMORY_LIMIT) else None,
        elsewhere=_elsewhere(),
        input_folders=_input_folders(where),
        reasons={
            "platform": platform_reason,
            "device": device_reason,
            "dtype": dtype_reason,
            "time budget": budget_reason,
            "processes": processes_reason,
        },
    )


def calm_threads() -> None:
    """Let OpenMP threads sleep while they wait, unless the environment says otherwise; only works before torch is loaded.

    By default they spin. Where another process holds one of two cores, spinning made small steps 100 times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@functools.cache
def cpu_vendor() -> str:
    """The CPU's vendor id, such as "GenuineIntel" or "AuthenticAMD"; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def runs_folder() -> Path:
    """Where run folders lie: $TRAINBOOK_RUNS, else `runs` in the working folder."""
    return Path(os.environ.get(RUNS, Path.cwd() / "runs")).absolute()


def export(**settings: str | None) -> None:
    """Put settings, by their names in `SETTINGS`, where child processes find them."""
    os.environ.update({SETTINGS[name]: value for name, value in settings.items() if value})


def keep_secret(name: str, value: str) -> None:
    """Put a key where this process and its children look for it, unless it is there already."""
    os.environ.setdefault(name, value)


def import_from(folder: Path) -> None:
    """Let this process and its children import what lies in a folder, before anything else of that name."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(folder), *filter(None, given)]))
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def see_one_gpu(number: int) -> None:
    """Leave this process one of the GPUs it sees, counted from 0, as its "cuda:0"; before torch uses any."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[number] if seen else str(number)


def group_size() -> int:
    """Processes of the group that torchrun started this one in; 1 outside one."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def leave_group() -> None:
    """Forget torchrun's settings, so that what this process starts next trains on its own."""
    for name in list(os.environ):
        if name.startswith("TORCHELASTIC_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
            del os.environ[name]


def group_environment(deadline: float | None, processes: int) -> dict[str, str]:
    """The environment of processes that train a run together: this one's, its deadline, and their share of cores."""
    own = dict(os.environ)
    own.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    return own | ({} if deadline is None else {DEADLINE: str(deadline)})


def parse_duration(text: str) -> float:
    """Seconds in a duration such as "90", "45s", "20m", "11h" or "1h30m".

    Raises:
        UserError: when the text is none of these.
    """
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    if not text.strip() or match is None:
        raise UserError(f"{text!r} is not a duration", "write it like 45s, 20m, 11h or 1h30m")
    return sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True))


def parse_bytes(text: str) -> int:
    """Bytes in a size such as "500MB" or "12GB".

    Raises:
        UserError: when the text is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B", text.strip())
    if match is None:
        raise UserError(f"{text!r} is not a size in memory", "write it like 500MB or 12GB")
    return int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " "))


def configure_logging(level: str, file: Path | None = None) -> None:
    """Send the kit's log to standard error from `level` up, all of it to `file`, and errors to errors.log beside that."""
    logger = logging.getLogger("trainbook")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(level)
    console.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    console.addFilter(lambda record: record.exc_info is None)  # the notebook shows a traceback itself
    logger.addHandler(console)
    for path, least in ((file, logging.DEBUG), (file and file.with_name(ERROR_LOG), logging.ERROR)):
        if path is not None:
            log = logging.FileHandler(path, delay=True)
            log.setLevel(least)
            log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            logger.addHandler(log)


def _platform() -> tuple[str, str]:
    # Kaggle's image is built from Colab's, so google.colab is importable there too: ask for Kaggle first.
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle", "KAGGLE_KERNEL_RUN_TYPE is set"
    if "COLAB_RELEASE_TAG" in os.environ or (
        importlib.util.find_spec("google") is not None and importlib.util.find_spec("google.colab") is not None
    ):
        return "colab", "google.colab is there"
    if "CONTAINER_ID" in os.environ and "VAST_CONTAINERLABEL" in os.environ:
        return "vastai", "VAST_CONTAINERLABEL is set"
    return "local", "no cloud platform's marks found"


def _device(wanted: str) -> tuple[str, str]:
    import torch

    if wanted == "auto" and not torch.cuda.is_available():
        return "cpu", "torch sees no CUDA device"
    if wanted == "cpu":
        return "cpu", f"{DEVICE}=cpu"
    own = os.environ.get("LOCAL_RANK", "0") if group_size() > 1 else "0"
    name = f"cuda:{own}" if wanted in ("auto", "cuda") else wanted
    number = torch.cuda.device_count()
    if group_size() > 1 and name == f"cuda:{own}" and int(own) >= number:
        raise UserError(f"process {own} finds only {number} GPUs", f"use --processes {max(number, 1)}, or --device cpu")
    if missing := _kernels_missing(name):
        remedy = f"{KERNELS_REMEDY}; or train on the CPU: --device cpu. See 'CUDA and the card' in the workflow's README"
        raise UserError(f"device {name}: {missing}", remedy)
    try:
        # is_available() is true where the wheel has no kernels for the card: only an operation tells.
        torch.ones(8, device=name).sum().item()
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        if wanted == "auto":
            return "cpu", f"a CUDA device is there but does not work ({reason}); `trainbook doctor` says why"
        raise UserError(f"device {wanted!r} does not work: {reason}", "run `trainbook doctor`, or use --device cpu") from None
    return name, "one real operation ran on it"


def _kernels_missing(device: str) -> str:
    import torch

    try:
        missing = kernels_missing(torch.cuda.get_device_capability(device), torch.cuda.get_arch_list())
        return f"{torch.cuda.get_device_name(device)} has {missing}" if missing else ""
    except (
        RuntimeError,
        AssertionError,
        ValueError,
    ):  # no such card, or a driver that does not answer: the operation below tells
        return ""


def mixed_dtype(device: str) -> str:
    """The number format of mixed precision on a device: bfloat16, float16, or float32 on a CPU."""
    return _dtype(device)[0]


def _dtype(device: str) -> tuple[str, str]:
    if device == "cpu":
        return "float32", "CPU"
    import torch

    # is_bf16_supported() counts emulation and says yes on a T4: go by the compute capability.
    major, minor = torch.cuda.get_device_capability(device)
    return ("bfloat16" if major >= 8 else "float16"), f"compute capability {major}.{minor}"


def _processes(where: str, device: str) -> tuple[int, str]:
    wanted = os.environ.get(PROCESSES) or "auto"
    if wanted != "auto":
        return _whole_number(PROCESSES, 1, least=1), f"{PROCESSES}={wanted}"
    if where == "kaggle" and device.startswith("cuda") and group_size() == 1:
        import torch

        if (number := torch.cuda.device_count()) > 1:
            return number, f"Kaggle gave {number} GPUs"
    return 1, ""


def _jobs(device: str) -> int:
    if os.environ.get(JOBS) or group_size() > 1:
        return _whole_number(JOBS, 1, least=1)
    if device == "cpu":
        return len(os.sched_getaffinity(0))
    import torch

    return torch.cuda.device_count() if device == "cuda:0" else 1  # a card that was named is the only one asked for


def _whole_number(name: str, default: int, least: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text} is not a whole number from {least} on", f"set it to one, such as {max(default, 2)}")
    return int(text)


def _checkpoint_seconds() -> float:
    text = os.environ.get(CHECKPOINT_EVERY) or "60s"
    if not (seconds := parse_duration(text)):
        raise UserError(f"{CHECKPOINT_EVERY}={text} leaves no time between checkpoints", "set it to 1s or more")
    return seconds


def _elsewhere() -> dict[str, Path]:
    wanted = {"checkpoints": os.environ.get(CHECKPOINT_DIR), "logs": os.environ.get(LOG_DIR)}
    return {name: Path(place).absolute() for name, place in wanted.items() if place and place != name}


def _price() -> float | None:
    try:
        return float(os.environ[PRICE]) if os.environ.get(PRICE) else None
    except ValueError:
        raise UserError(f"{PRICE}={os.environ[PRICE]} is not a number", "give the price of an hour, such as 0.35") from None


def _input_folders(where: str) -> tuple[Path, ...]:
    named = [Path(folder).absolute() for folder in os.environ.get(INPUTS, "").split(os.pathsep) if folder]
    if not named and where == "kaggle":
        named = [KAGGLE_INPUTS]
    # What an earlier machine copied to the mirror is continued on this one.
    return (*named, *([mirror] if (mirror := _mirror_folder()) and mirror not in named else []))


def _mirror_folder() -> Path | None:
    if not os.environ.get(MIRROR):
        return None
    if Path(os.environ[MIRROR]).resolve() == runs_folder().resolve():
        raise UserError(f"{MIRROR} is the runs folder itself", "name a folder that outlives this machine, or none")
    return Path(os.environ[MIRROR]).absolute()


def _time_budget(where: str) -> tuple[float | None, str]:
    if os.environ.get(DEADLINE):
        return float(os.environ[DEADLINE]) - time.monotonic(), "what is left to the run"
    if os.environ.get(TIME_BUDGET):
        return parse_duration(os.environ[TIME_BUDGET]), f"{TIME_BUDGET}={os.environ[TIME_BUDGET]}"
    if where == "kaggle":
        return KAGGLE_BUDGET_SECONDS, "a Kaggle session ends at 12 h"
    return None, "no limit known here"
