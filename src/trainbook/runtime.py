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
from dataclasses import dataclass, field
from pathlib import Path

from trainbook.errors import UserError

RUNS, DATA, DEVICE = "TRAINBOOK_RUNS", "TRAINBOOK_DATA", "TRAINBOOK_DEVICE"
TIME_BUDGET, LOG_LEVEL, PRICE = "TRAINBOOK_TIME_BUDGET", "TRAINBOOK_LOG_LEVEL", "TRAINBOOK_PRICE_PER_HOUR"
CHECKPOINT_EVERY, INPUTS, MIRROR = "TRAINBOOK_CHECKPOINT_EVERY", "TRAINBOOK_INPUTS", "TRAINBOOK_MIRROR"
# The runtime's settings, as the command line and run.toml name them, and where a child process finds them.
SETTINGS = {
    "runs": RUNS,
    "data": DATA,
    "device": DEVICE,
    "time_budget": TIME_BUDGET,
    "log_level": LOG_LEVEL,
    "checkpoint_every": CHECKPOINT_EVERY,
    "inputs": INPUTS,
    "mirror": MIRROR,
    "price_per_hour": PRICE,
}
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

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
        checkpoint_seconds: at most this much work is lost to a kill.
        input_folders: read-only folders, such as the outputs of earlier sessions, where a run to continue may lie.
        mirror_folder: a folder that outlives the machine, to which runs are copied while they train, or None.
        reasons: for platform, device, dtype and time budget, why.
    """

    platform: str
    device: str
    dtype: str
    runs_folder: Path
    data_folder: Path
    deadline: float | None
    price_per_hour: float | None = None
    checkpoint_seconds: float = 60.0
    input_folders: tuple[Path, ...] = ()
    mirror_folder: Path | None = None
    log_level: str = "INFO"
    reasons: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[list[str]]:
        """Table rows: what, chosen, why."""
        left = "none" if self.deadline is None else f"{(self.deadline - time.monotonic()) / 3600:.2f} h"
        chosen = {"platform": self.platform, "device": self.device, "dtype": self.dtype, "time budget": left}
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


def detect() -> Runtime:
    """The runtime of this process, from the environment and the hardware.

    Raises:
        UserError: for a value in the environment that cannot be read, or a device that does not work.
    """
    where, platform_reason = _platform()
    device, device_reason = _device(os.environ.get(DEVICE, "auto"))
    dtype, dtype_reason = _dtype(device)
    budget, budget_reason = _time_budget(where)
    level = os.environ.get(LOG_LEVEL, "INFO").upper()
    if level not in LOG_LEVELS:
        raise UserError(f"{LOG_LEVEL}={level} is not a log level", f"choose one of: {', '.join(LOG_LEVELS)}")
    return Runtime(
        platform=where,
        device=device,
        dtype=dtype,
        runs_folder=runs_folder(),
        data_folder=Path(os.environ.get(DATA, Path.home() / ".cache" / "trainbook")),
        deadline=None if budget is None else time.monotonic() + budget,
        price_per_hour=_price(),
        checkpoint_seconds=parse_duration(os.environ.get(CHECKPOINT_EVERY) or "60s"),
        input_folders=_input_folders(where),
        mirror_folder=_mirror_folder(),
        log_level=level,
        reasons={
            "platform": platform_reason,
            "device": device_reason,
            "dtype": dtype_reason,
            "time budget": budget_reason,
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


def parse_duration(text: str) -> float:
    """Seconds in a duration such as "90", "45s", "20m", "11h" or "1h30m".

    Raises:
        UserError: when the text is none of these.
    """
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    if not text.strip() or match is None:
        raise UserError(f"{text!r} is not a duration", "write it like 45s, 20m, 11h or 1h30m")
    return sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True))


def configure_logging(level: str, file: Path | None = None) -> None:
    """Send the kit's log to standard error from `level` up and, with everything in it, to `file`."""
    logger = logging.getLogger("trainbook")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(level)
    console.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger.addHandler(console)
    if file is not None:
        log = logging.FileHandler(file)
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
    name = "cuda:0" if wanted in ("auto", "cuda") else wanted
    try:
        # is_available() is true where the wheel has no kernels for the card: only an operation tells.
        torch.ones(8, device=name).sum().item()
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        if wanted == "auto":
            return "cpu", f"a CUDA device is there but does not work ({reason}); `trainbook doctor` says why"
        raise UserError(f"device {wanted!r} does not work: {reason}", "run `trainbook doctor`, or use --device cpu") from None
    return name, "one real operation ran on it"


def _dtype(device: str) -> tuple[str, str]:
    if device == "cpu":
        return "float32", "CPU"
    import torch

    # is_bf16_supported() counts emulation and says yes on a T4: go by the compute capability.
    major, minor = torch.cuda.get_device_capability(device)
    return ("bfloat16" if major >= 8 else "float16"), f"compute capability {major}.{minor}"


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
    if os.environ.get(TIME_BUDGET):
        return parse_duration(os.environ[TIME_BUDGET]), f"{TIME_BUDGET}={os.environ[TIME_BUDGET]}"
    if where == "kaggle":
        return KAGGLE_BUDGET_SECONDS, "a Kaggle session ends at 12 h"
    return None, "no limit known here"
