"""Where to train: hours, sessions and cost per platform, from steps measured here and a dated table of cards and prices.

Needs torch only to measure.
"""

import math
import os
import re
import time
import tomllib
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainbook.catalog import Workflow
from trainbook.config import BaseConfig
from trainbook.errors import UserError
from trainbook.monitor import peak_memory_bytes
from trainbook.records import RunFolder
from trainbook.runtime import Runtime
from trainbook.tables import Table

PRICES = Path(__file__).with_name("prices.toml")
MEASURE_SECONDS = 6.0
PROBES = 6  # places in the run at which steps are measured: its stages cost differently
MAX_OVERRUN = 10  # times the seconds asked for; after that the places not yet measured count like the last one
RATE_SECONDS = 0.3
MATRIX_SIZE, COPY_BYTES = 1024, 1 << 28
NOT_MEASURED = "not measured on this device"


class Accelerator(BaseModel):
    """A card's peak rates, as its maker gives them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    known_as: list[str]
    memory_gigabytes: float = Field(gt=0)
    float32_tflops: float = Field(gt=0)
    tensor_tflops: float = Field(gt=0)
    gigabytes_per_second: float = Field(gt=0)


class Offer(BaseModel):
    """What a platform gives and takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    platform: str
    accelerator: str
    price_per_hour: float = Field(ge=0)
    session_hours: float = Field(ge=0)
    setup_minutes: float = Field(ge=0)
    weekly_hours: float = Field(ge=0)
    source: str


class Prices(BaseModel):
    """The dated table of accelerators and offers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    date: date
    currency: str
    launch_microseconds: float = Field(ge=0)
    accelerators: dict[str, Accelerator]
    offers: list[Offer]

    @classmethod
    def read(cls, path: Path = PRICES) -> "Prices":
        """The table in a file.

        Raises:
            UserError: naming the file and what is wrong in it.
        """
        try:
            prices = cls(**tomllib.loads(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: {where}: {first['msg']}", f"mend it; {PRICES} is an example") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}", f"mend it; {PRICES} is an example") from None
        unknown = sorted({offer.accelerator for offer in prices.offers} - prices.accelerators.keys())
        if unknown:
            raise UserError(f"{path}: offers name {', '.join(unknown)}, of which no rates are given", "add [accelerators.NAME]")
        return prices

    def named(self, device_name: str) -> str:
        """The accelerator in the table that a driver calls by this name; "" when there is none."""
        names = [(part, name) for name, card in self.accelerators.items() for part in card.known_as]
        found = [(len(part), name) for part, name in names if re.search(rf"\b{re.escape(part)}\b", device_name)]
        return max(found)[1] if found else ""


@dataclass(frozen=True)
class Rates:
    """What a device can do: 10^12 operations of the run's number format, and 10^9 bytes of its memory, per second."""

    tflops: float
    gigabytes_per_second: float


@dataclass(frozen=True)
class Measurement:
    """What a run was found to take on one device.

    Attributes:
        hours: of training, over all steps.
        total_steps: of the run.
        device_name: the device's product name.
        rates: the device's own, measured; None where its data sheet is in the table or nothing is known.
        precision: the number format of the products: float32, or a 16-bit one.
        how: one line for a person.
        busy: what else kept the machine busy, in a sentence, or "".
        parts: where steps were timed.
        operations: of all steps together; 0 where they were not counted.
        parameters: of all modules; 0 where they were not counted.
        memory_bytes: this process's peak, on the device where there is one, else on the host; 0 where it was not measured.
    """

    hours: float
    total_steps: int
    device_name: str
    rates: Rates | None
    precision: str
    how: str
    busy: str = ""
    parts: list["Part"] = field(default_factory=list)
    operations: float = 0.0
    parameters: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True)
class Part:
    """Steps timed at one place: their stage, seconds and tensor operations per step."""

    step: int
    stage: str
    seconds: float
    operations: int


@dataclass(frozen=True)
class Estimate:
    """What an offer would take: from the best case to the worst, equal where it was measured.

    Attributes:
        offer: the platform's.
        hours: of training.
        sessions: that many times it is started.
        cost: with the set-up of every session.
        measured: whether the steps were timed on this very kind of card.
    """

    offer: Offer
    hours: tuple[float, float]
    sessions: tuple[int, int]
    cost: tuple[float, float]
    measured: bool


def estimate(measurement: Measurement, prices: Prices) -> list[Estimate]:
    """Hours, sessions and cost of every offer.

    On a card of the kind that was measured, the hours are those. On another, h' = h r / r' for each of two rates r, of
    computing and of memory, and never less than what it takes to start the operations. Sessions are ceil(h' / limit),
    cost is price (h' + sessions set-up).

    Returns:
        One per offer, in the table's order; none but the measured where nothing is known of the device.
    """
    here = prices.named(measurement.device_name)
    own = _rates(prices.accelerators[here], measurement.precision) if here else measurement.rates
    started = measurement.operations * prices.launch_microseconds / 1e6 / 3600
    estimates = []
    for offer in prices.offers:
        measured = offer.accelerator == here
        if own is None:
            continue
        there = _rates(prices.accelerators[offer.accelerator], measurement.precision)
        factors = [own.tflops / there.tflops, own.gigabytes_per_second / there.gigabytes_per_second]
        hours = (measurement.hours,) * 2
        if not measured:
            hours = tuple(max(started, measurement.hours * factor) for factor in (min(factors), max(factors)))
        sessions = tuple(max(1, math.ceil(h / offer.session_hours)) if offer.session_hours else 1 for h in hours)
        cost = tuple(
            offer.price_per_hour * (h + count * offer.setup_minutes / 60) for h, count in zip(hours, sessions, strict=True)
        )
        estimates.append(Estimate(offer, hours, sessions, cost, measured))
    return estimates


def _rates(card: Accelerator, precision: str) -> Rates:
    return Rates(card.float32_tflops if precision == "float32" else card.tensor_tflops, card.gigabytes_per_second)


def table(measurement: Measurement, prices: Prices, price_here: float | None = None) -> Table:
    """What to show: this device, then every offer."""
    own = "not given" if price_here is None else f"{price_here * measurement.hours:.2f}"
    rows = [["here", measurement.device_name, _duration(measurement.hours), "1", own, "measured"]]
    for found in estimate(measurement, prices):
        rows.append(
            [
                found.offer.platform,
                found.offer.accelerator,
                _range(found.hours, _duration),
                _range(found.sessions, str) + _weeks(found),
                _range(found.cost, lambda cost: f"{cost:.2f}"),
                "measured" if found.measured else NOT_MEASURED,
            ]
        )
    return Table(["where", "device", "training", "sessions", f"cost, {prices.currency}", "steps"], rows)


def assumptions(measurement: Measurement, prices: Prices, path: Path = PRICES) -> list[str]:
    """What the numbers rest on, a sentence each."""
    known = prices.named(measurement.device_name)
    kind = "float32" if measurement.precision == "float32" else "16-bit tensor"
    lines = [measurement.how, *([measurement.busy] if measurement.busy else [])]
    if measurement.rates is None and not known:
        lines.append(f"{measurement.device_name or 'The device'} is not in the table: nothing is said of other devices.")
    else:
        if known:
            basis = f"the {kind} and memory rates of its data sheet"
        else:
            rates = measurement.rates
            basis = f"what was measured here, {rates.tflops:.2g} TFLOPS and {rates.gigabytes_per_second:.2g} GB/s,"
        lines += [
            f'"{NOT_MEASURED}": h r / r\', with {basis} against the data sheet of the other; the two ends of a range are the '
            "two rates. " + _floor(measurement, prices),
            "One card is counted, also where a platform gives several. Whether the run fits its memory is not checked.",
        ]
    lines += [
        "Evaluation, pictures, downloads, storage and traffic are not counted; the set-up of each session is, in the cost.",
        f"Prices and limits are of {prices.date:%Y-%m-%d}, from {path}; they move, look before you spend:",
    ]
    sources: dict[str, list[str]] = {}
    for offer in prices.offers:
        sources.setdefault(f"{offer.platform}|{offer.source}", []).append(offer.accelerator)
    lines += [f"  {key.partition('|')[0]} {', '.join(cards)}: {key.partition('|')[2]}" for key, cards in sources.items()]
    return lines


def _floor(measurement: Measurement, prices: Prices) -> str:
    if not measurement.operations:
        return "Steps that are too small to keep a card busy gain less than that, and can be slower."
    each = measurement.operations / measurement.total_steps
    return (
        f"Never less than {prices.launch_microseconds:g} microseconds for each of a step's {each:,.0f} operations, "
        "counted here; small steps are bound by that and gain nothing from a faster card."
    )


def read_run(folder: RunFolder) -> Measurement:
    """What a run took on the device of its last session that trained.

    Raises:
        UserError: when no session of it says how long it took.
    """
    summary = folder.summary()
    timed = [s for s in summary["segments"] if s.get("last_step") and s["last_step"] > s["first_step"] and s["seconds"] > 0]
    if not timed:
        raise UserError(f"{folder.path.name} has no session that trained and was timed", "leave out --run to measure here")
    name = timed[-1]["device_name"]
    timed = [s for s in timed if s["device_name"] == name]
    steps, seconds = sum(s["last_step"] - s["first_step"] for s in timed), sum(s["seconds"] for s in timed)
    spans = ", ".join(f"{s['first_step']} to {s['last_step']}" for s in timed)
    whole = steps >= summary["total_steps"]
    how = f"Read from {folder.path.name}: steps {spans} of {summary['total_steps']} took {seconds:.1f} s on {name}" + (
        "." if whole else "; the others are assumed to take as long each."
    )
    return Measurement(
        hours=seconds / steps * summary["total_steps"] / 3600,
        total_steps=summary["total_steps"],
        device_name=name,
        rates=None,
        precision=_precision(folder),
        how=how,
    )


def _precision(folder: RunFolder) -> str:
    from trainbook.files import read_json

    return read_json(folder.config)["config"].get("precision", "float32")


def measure(workflow: Workflow, config: BaseConfig, runtime: Runtime, seconds: float = MEASURE_SECONDS) -> Measurement:
    """Take real training steps at places spread over the run, and add up what all of its steps would take.

    The weights at a later place are those at the start: what a step costs, not what it learns, is measured. The first
    step at each place is not counted, it also sets things up. Nothing is written.

    Args:
        workflow: what to train.
        config: its config.
        runtime: where.
        seconds: to take steps for; setting up comes on top.
    """
    from trainbook.engine import seed_step

    config, runtime = config.model_copy(update=config.TIMED_WITH), replace(runtime, jobs=1)  # timed in this process
    data = workflow.load_data(config, runtime)
    parts: list[Part] = []
    parameters = 0
    began, probes, total = time.monotonic(), PROBES, 1
    for index in range(PROBES):
        if index >= probes or (index and time.monotonic() - began > MAX_OVERRUN * seconds):
            break
        seed_step(config.seed, 0)
        state = workflow.build(config, data, runtime)
        total, parameters = state.total_steps, sum(state.num_parameters().values())
        probes = min(PROBES, total)
        _seek(state, (2 * index + 1) * total // (2 * probes))
        first = state.step
        records = iter(workflow.train(config, data, state))
        parts.append(_time_steps(records, state, first, config.seed, runtime.device, seconds / probes))
    counted = [parts[min(index, len(parts) - 1)] for index in range(probes)]
    share = total / probes
    where = f"{len(parts)} of {probes} places" if len(parts) < probes else f"{probes} places"
    stages = ", ".join(dict.fromkeys(part.stage for part in parts if part.stage))
    name = runtime.device_name()
    peaks = peak_memory_bytes(runtime.device)
    return Measurement(
        hours=sum(part.seconds for part in counted) * share / 3600,
        total_steps=total,
        device_name=name,
        rates=measure_rates(runtime.device),
        precision=getattr(config, "precision", "float32"),
        how=f"Measured here, on {name}: real steps at {where} of {total:,}, in the stages {stages or 'of the run'}.",
        busy=_busy(),
        parts=parts,
        operations=sum(part.operations for part in counted) * share,
        parameters=parameters,
        memory_bytes=peaks.get("device", peaks["host"]),
    )


def in_a_line(measurement: Measurement) -> str:
    """Size, time and memory of what was measured here, for a person."""
    where = f"{measurement.total_steps:,} steps take {_duration(measurement.hours)} of training on {measurement.device_name}"
    memory = f"{measurement.memory_bytes / 1e6:,.0f} MB at the peak of this process so far"
    return f"{measurement.parameters:,} parameters; {where}; {memory}"


def _seek(state: Any, step: int) -> None:
    """Let a freshly built state stand at a step; parts that count their own steps are filled up in order."""
    state.step = step
    for part in state.stateful.values():
        counter = getattr(part, "stepper", part)
        if hasattr(counter, "steps_done") and hasattr(counter, "total_steps"):
            done = min(step, counter.total_steps)
            counter.steps_done, step = done, step - done
            if hasattr(part, "finished"):
                part.finished = done == counter.total_steps


def _time_steps(records: Any, state: Any, first: int, seed: int, device: str, seconds: float) -> Part:
    """Take steps from here: one that also sets things up, one to count its operations, and the rest against the clock."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from trainbook.engine import seed_step

    class Counting(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            Counting.operations += not function.is_view
            return function(*arguments, **(keywords or {}))

    def take() -> bool:
        seed_step(seed, state.step)
        return next(records, None) is not None

    began = time.perf_counter()
    take()
    _wait_for(device)
    alone, count = time.perf_counter() - began, 0
    stage = state.stage
    if not (state.step < state.total_steps):
        return Part(first, stage, alone, 0)
    with Counting():
        take()
    _wait_for(device)
    began = time.perf_counter()
    while take():
        count += 1
        if time.perf_counter() - began >= seconds:
            break
    _wait_for(device)
    return Part(first, stage, (time.perf_counter() - began) / count if count else alone, Counting.operations)


def measure_rates(device: str) -> Rates:
    """What a device does here: float32 products of square matrices, and copies within its memory (read and written)."""
    import torch

    one = torch.ones(MATRIX_SIZE, MATRIX_SIZE, device=device)
    out = torch.empty_like(one)
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    products = _per_second(lambda: torch.mm(one, one, out=out), device)
    copies = _per_second(lambda: target.copy_(source), device)
    return Rates(products * 2 * MATRIX_SIZE**3 / 1e12, copies * 2 * COPY_BYTES / 1e9)


def _per_second(action: Any, device: str) -> float:
    action()
    _wait_for(device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < RATE_SECONDS:
        action()
        count += 1
        _wait_for(device)
    return count / (time.perf_counter() - began)


def _busy() -> str:
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores:
        return ""
    return f"The machine had other work (load {load:.1f} on {cores} cores): alone, the steps would have been quicker."


def _wait_for(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def _weeks(found: Estimate) -> str:
    weeks = math.ceil(found.hours[1] / found.offer.weekly_hours) if found.offer.weekly_hours else 1
    return f", over {weeks} weeks" if weeks > 1 else ""


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.1f} s"
    return f"{hours * 60:.1f} min" if hours < 1 else f"{hours:.1f} h"


def _range(ends: tuple[Any, Any], shown: Any) -> str:
    low, high = shown(ends[0]), shown(ends[1])
    return low if low == high else f"{low} to {high}"
