"""What the training engine costs per step, beside a bare loop and other trainers: `python -m tests.benchmarks.engine`.

Allowed: 1.10 times the bare loop's CPU time at steps of 3 ms, 1.03 times at 50 ms, less than each peer's, and 1 % of wall
time for a checkpoint every minute. Ratios printed are peer over ours. The peers come with `pip install -e '.[benchmarks]'`.
"""

import contextlib
import importlib.util
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from bisect import bisect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

from tests.benchmarks import pairing

# isort: split
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from trainbook.data import Batches, batch_indices
from trainbook.engine import Engine
from trainbook.fitting import Stage
from trainbook.optimization import OptimizationConfig
from trainbook.optimizer import make_optimizer
from trainbook.records import Record, RunFolder
from trainbook.state import TrainState

WIDTH, CLASSES, PER_EPOCH = 256, 10, 16
UNTIMED = 10  # steps at the start of a run, in which allocators and optimizer states are filled
TOLERANCE = 1e-6  # between weights after training, largest difference
CONFIG = OptimizationConfig(learning_rate=1e-4)  # AdamW; neither clips nor averages
OURS, BARE = "engine", "bare loop"

CHECKPOINT_WIDTH, CHECKPOINT_ROWS = 2232, 32  # 10 M parameters
CHECKPOINTS, CHECKPOINT_SECONDS, ALLOWED_SHARE, MINUTE = 7, 4.0, 0.01, 60
MOST_STEPS = 5000  # the run is ended when it has its checkpoints

Side = Callable[[], nn.Module]  # trains a new model in one run and returns it


@dataclass(frozen=True)
class Case:
    """One size of step: its milliseconds or else its rows, steps in a round, rounds, allowed overhead, and whether peers run."""

    milliseconds: float
    rows: int
    steps: int
    rounds: int
    allowed: float | None
    with_peers: bool


CASES = (Case(0, 32, 800, 9, None, True), Case(3, 0, 300, 7, 1.10, True), Case(50, 0, 40, 9, 1.03, False))


@dataclass
class Task:
    """A classifier to train on the same batches in the same order, and a clock that every side passes once per step."""

    rows: int
    steps: int
    width: int = WIDTH
    marks: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        number = PER_EPOCH * self.rows
        self.images = torch.randn(number, self.width, generator=generator)
        self.labels = torch.randint(CLASSES, (number,), generator=generator)
        self.order = [batch_indices(0, step, number, self.rows) for step in range(UNTIMED + self.steps)]

    def model(self) -> nn.Module:
        """Three layers, the same weights every time."""
        torch.manual_seed(0)
        square = [layer for _ in range(2) for layer in (nn.Linear(self.width, self.width), nn.ReLU())]
        return nn.Sequential(*square, nn.Linear(self.width, CLASSES))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross entropy; notes the CPU time."""
        self.marks.append(time.process_time())
        return nn.functional.cross_entropy(model(batch["images"]), batch["labels"])

    def batch(self, step: int) -> dict[str, Tensor]:
        """Images (rows, width) and labels (rows,) of a step."""
        indices = self.order[step]
        return {"images": self.images.index_select(0, indices), "labels": self.labels.index_select(0, indices)}

    def loader(self) -> DataLoader:
        """The batches as trainers take them: one epoch for the whole run, nothing to collate."""
        return DataLoader(WholeBatches(self), collate_fn=lambda batches: batches[0])

    def train(self, side: Side) -> tuple[float, np.ndarray]:
        """CPU time of one run from the first timed step until the trainer returns, its start left out; and the weights."""
        self.marks.clear()
        with silence():
            model = side()
            ended = time.process_time()
        assert len(self.marks) == len(self.order)
        return ended - self.marks[UNTIMED], nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


class WholeBatches(Dataset):
    """An entry per step."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __len__(self) -> int:
        return len(self.task.order)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return self.task.batch(step)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Hides what trainers say of themselves; progress bars count, but are not seen."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(action="ignore"),
    ):
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def bare_loop(task: Task, folder: Path | None = None) -> Side:
    """A loop that reads every loss and keeps it."""

    def run() -> nn.Module:
        model = task.model()
        optimizer, losses = make_optimizer(model, CONFIG), []
        for step in range(len(task.order)):
            optimizer.zero_grad()
            loss = task.loss(model, task.batch(step))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return model

    return run


class EngineWithoutCheckpoint(Engine):
    """No peer writes one here; `compare_checkpoints` tells what one costs."""

    def _save(self, writer: ThreadPoolExecutor, metrics: IO[bytes], state: TrainState) -> None:
        pass


def followed(task: Task, folder: Path) -> Side:
    """A stage followed by the engine in a new run folder: records of loss, gradient norm and rate, and a progress bar."""

    def run() -> nn.Module:
        model = task.model()
        state = staged(task, model)
        run_folder = RunFolder(folder / f"run-{time.monotonic_ns()}")
        outcome = EngineWithoutCheckpoint(run_folder, "cpu", seed=0).follow(training(task, state), state)
        assert outcome.status == "complete"
        assert {"loss", "gradient_norm", "learning_rate"} <= run_folder.history()[-1].keys()
        return model

    return run


def staged(task: Task, model: nn.Module) -> TrainState:
    """The state of a run with one stage."""
    steps = len(task.order)
    return TrainState({"model": model}, stateful={"train": Stage("train", model, CONFIG, steps)}, total_steps=steps)


def training(task: Task, state: TrainState) -> Iterator[Record]:
    """The records of that stage."""
    batches = Batches({"images": task.images, "labels": task.labels}, 0, task.rows)
    return state.stateful["train"].train(state, batches, task.loss)


def accelerate_loop(task: Task, folder: Path, norms: bool = False) -> Side:
    """The bare loop with what `Accelerator.prepare` returns; it can keep gradient norms too, as our records do."""
    from accelerate import Accelerator

    def run() -> nn.Module:
        accelerator = Accelerator(cpu=True)
        model = task.model()
        prepared, optimizer, loader = accelerator.prepare(model, make_optimizer(model, CONFIG), task.loader())
        losses = []
        for batch in loader:
            optimizer.zero_grad()
            loss = task.loss(prepared, batch)
            accelerator.backward(loss)
            if norms:
                losses.append(nn.utils.get_total_norm([p.grad for p in prepared.parameters()]).item())
            optimizer.step()
            losses.append(loss.item())
        return model

    return run


def transformers_trainer(task: Task, folder: Path) -> Side:
    """transformers' Trainer without clipping, logging, evaluation, checkpoints and progress bar."""
    from transformers import Trainer, TrainingArguments

    class LeanTrainer(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return self.accelerator.prepare(task.loader())

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return task.loss(model, inputs)

    def run() -> nn.Module:
        model = task.model()
        optimizer = make_optimizer(model, CONFIG)
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=len(task.order),
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            disable_tqdm=True,
            max_grad_norm=0,
            use_cpu=True,
        )
        constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        trainer = LeanTrainer(model, arguments, train_dataset=WholeBatches(task), optimizers=(optimizer, constant))
        trainer.train()
        return model

    return run


def lightning_trainer(task: Task, folder: Path) -> Side:
    """Lightning's Trainer, `barebones`: no logger, checkpoint, progress bar or summary."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model()

        def training_step(self, batch: dict[str, Tensor]) -> Tensor:
            return task.loss(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make_optimizer(self.model, CONFIG)

    def run() -> nn.Module:
        module = Module()
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_steps=len(task.order), barebones=True, default_root_dir=folder
        )
        trainer.fit(module, task.loader())
        return module.model

    return run


SIDES = {
    OURS: followed,
    BARE: bare_loop,
    "accelerate": accelerate_loop,
    "accelerate with norms": partial(accelerate_loop, norms=True),
    "transformers Trainer": transformers_trainer,
    "Lightning Trainer": lightning_trainer,
}
NEEDS = {
    "accelerate": ("accelerate",),
    "accelerate with norms": ("accelerate",),
    "transformers Trainer": ("transformers", "accelerate"),
    "Lightning Trainer": ("lightning",),
}


def find_peers() -> list[str]:
    """Those that are installed; says which are not. Imports none."""
    found = []
    for name, packages in NEEDS.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            print(f"{name}: left out, {' and '.join(missing)} not installed")
        else:
            print(f"{name}: {', '.join(f'{package} {metadata.version(package)}' for package in packages)}")
            found.append(name)
    return found


def serve(connection: Connection, name: str, rows: int, steps: int, folder: Path) -> None:
    """Train once for each word that comes, until it is an empty one."""
    task = Task(rows, steps)
    side = SIDES[name](task, folder)
    while connection.recv():
        connection.send(task.train(side))


def rows_for(milliseconds: float) -> int:
    """Batch size whose step costs about so much on this machine."""
    rows = 64
    for _ in range(3):  # the cost is not quite proportional to the rows
        task = Task(rows, 5 + int(60 / milliseconds))
        seconds = min(task.train(bare_loop(task))[0] for _ in range(3))
        rows = max(1, round(rows * milliseconds / (1e3 * seconds / task.steps)))
    return rows


def compare(case: Case, peers: list[str], folder: Path) -> list[pairing.Comparison]:
    """Train with every side in turn, round after round; the first round is not timed.

    Each side has a process of its own: where Lightning's and transformers' trainers are loaded, a bare loop, too, is a
    third slower.
    """
    rows = case.rows or rows_for(case.milliseconds)
    sides: dict[str, Connection] = {}
    seconds: dict[str, list[float]] = {}
    weights: dict[str, np.ndarray] = {}
    context = multiprocessing.get_context("spawn")
    for name in [OURS, BARE, *(peers if case.with_peers else [])]:
        sides[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, name, rows, case.steps, folder), daemon=True).start()
        theirs.close()
    for number in range(case.rounds + 1):
        for name, side in sides.items():
            side.send("train")
            taken, weights[name] = side.recv()
            if number:
                seconds.setdefault(name, []).append(taken)
    for side in sides.values():
        side.send("")
    differences = {name: float(np.abs(found - weights[BARE]).max()) for name, found in weights.items()}

    step = 1e3 * statistics.median(seconds[BARE]) / case.steps
    size = f"{case.milliseconds} ms a step" if case.milliseconds else f"{case.rows} rows a step"
    print(f"\n{rows} rows, {case.steps} steps of {step:.2f} ms in {case.rounds} rounds; CPU time over the bare loop's:")
    for name in sides:
        overheads = [x / bare for x, bare in zip(seconds[name], seconds[BARE], strict=True)]
        middle = statistics.median(overheads)
        verdict = ""
        if name == OURS and case.allowed:
            verdict = f"; allowed {case.allowed:.2f}: {'kept' if middle <= case.allowed else 'MISSED'}"
        spread = f"{min(overheads):.3f} .. {max(overheads):.3f}, {1e3 * step * (middle - 1):+.0f} microseconds a step"
        print(f"{name:>22}: {middle:.3f} ({spread}); weights differ by {differences[name]:.1e}{verdict}")
    assert max(differences.values()) <= TOLERANCE
    return [
        pairing.Comparison("engine", f"{name}, {size}", "steps per second", case.steps, seconds[OURS], seconds[name])
        for name in sides
        if name != OURS
    ]


class TimedEngine(Engine):
    """Notes when checkpoints hold the training thread, and when they are being written: (start, end) on the wall's clock."""

    held: list[tuple[float, float]]
    written: list[tuple[float, float]]
    writer_seconds: list[float]

    def _save(self, writer: ThreadPoolExecutor, metrics: IO[bytes], state: TrainState) -> None:
        started = time.perf_counter()
        super()._save(writer, metrics, state)
        self.held.append((started, time.perf_counter()))

    def _write_checkpoint(self, metrics: IO[bytes], step: int, files: dict[str, bytes]) -> None:
        started, cpu = time.perf_counter(), time.thread_time()
        super()._write_checkpoint(metrics, step, files)
        self.written.append((started, time.perf_counter()))
        self.writer_seconds.append(time.thread_time() - cpu)


def compare_checkpoints(folder: Path) -> pairing.Comparison:
    """Wall time that one checkpoint costs a run: while it holds the training thread, and while steps run beside its writing.

    Checkpoints are made more often than once a minute, so that the machine's other users change little meanwhile; what
    one of them costs is put against a minute.
    """
    task = Task(CHECKPOINT_ROWS, MOST_STEPS, CHECKPOINT_WIDTH)
    state = staged(task, task.model())
    engine = TimedEngine(RunFolder(folder / "checkpoints"), "cpu", seed=0, checkpoint_seconds=CHECKPOINT_SECONDS)
    engine.held, engine.written, engine.writer_seconds = [], [], []
    ends: list[float] = []  # of steps

    def records() -> Iterator[Record]:
        for record in training(task, state):
            ends.append(time.perf_counter())
            if len(engine.written) == CHECKPOINTS:
                return
            yield record

    with silence():
        engine.follow(records(), state)
    held, written = engine.held[:CHECKPOINTS], engine.written[:CHECKPOINTS]
    # The first step after a checkpoint began before it: it lasts from the end of the hold.
    resumes = {bisect(ends, start): end for start, end in held}
    steps = [(resumes.get(i, ends[i - 1]), ends[i]) for i in range(UNTIMED, len(ends))]
    beside = [[b - a for a, b in steps if a < end and start < b] for start, end in written]
    quiet = [b - a for a, b in steps if not any(a < end and start < b for start, end in written)]
    step = statistics.median(quiet)
    holds = [end - start for start, end in held]
    slower = [sum(lasted) - step * len(lasted) for lasted in beside]
    costs = [hold + slow for hold, slow in zip(holds, slower, strict=True)]

    def described(seconds: list[float]) -> str:
        return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} .. {max(seconds):.3f})"

    parameters = state.num_parameters()["model"]
    size = sum(path.stat().st_size for path in max(engine.folder.checkpoints.glob("[0-9]*")).iterdir())
    share = statistics.median(costs) / MINUTE
    print(f"\na checkpoint of {parameters / 1e6:.1f} M parameters and AdamW, {size / 1e6:.0f} MB; steps of {1e3 * step:.0f} ms")
    print(f"holds the training thread {described(holds)}")
    print(f"is written in {described([end - start for start, end in written])}, CPU {described(engine.writer_seconds)}")
    print(f"the {statistics.mean(map(len, beside)):.1f} steps meanwhile take longer by {described(slower)}")
    verdict = "kept" if share <= ALLOWED_SHARE else "MISSED"
    print(f"once a minute: {share:.2%} of wall time, allowed {ALLOWED_SHARE:.0%}: {verdict}")
    peer = f"no checkpoints, {parameters / 1e6:.0f} M parameters, one a minute"
    taken = [MINUTE + cost for cost in costs]
    return pairing.Comparison("engine", peer, "seconds of training per second of wall time", MINUTE, taken, [MINUTE] * len(taken))


def main() -> None:
    """Time all cases."""
    print(f"torch {torch.__version__}, one thread")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peers = find_peers()
        comparisons = [comparison for case in CASES for comparison in compare(case, peers, folder)]
        comparisons.append(compare_checkpoints(folder))
    pairing.report(comparisons)


if __name__ == "__main__":
    main()
