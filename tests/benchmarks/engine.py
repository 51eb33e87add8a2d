"""Overhead of `Engine.follow` over a bare loop on the same generator: `python -m tests.benchmarks.engine`.

Allowed: 1.10 times the bare loop's CPU time at steps of 3 ms, 1.03 times at 50 ms; the ratio printed is bare over ours.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks import pairing

# isort: split
import torch
from torch import Tensor, nn

from trainbook.engine import Engine
from trainbook.records import Record, RunFolder
from trainbook.state import TrainState

ROUNDS = 9
WIDTH, CLASSES = 256, 10
CASES = ((3, 300, 1.10), (50, 40, 1.03))  # milliseconds a step, steps a round, allowed overhead


def build(steps: int) -> TrainState:
    """A small classifier with its optimizer, the same every time."""
    torch.manual_seed(0)
    layers = (nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    model = nn.Sequential(*layers)
    return TrainState({"model": model}, {"model": torch.optim.SGD(model.parameters(), lr=0.01)}, total_steps=steps, stage="train")


def train(state: TrainState, images: Tensor, labels: Tensor) -> Iterator[Record]:
    """Train on one batch and yield the loss of every step; nothing in it is random."""
    model, optimizer = state.modules["model"], state.optimizers["model"]
    while state.step < state.total_steps:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state.step += 1
        yield Record({"loss": loss.detach()})


def batch(rows: int) -> tuple[Tensor, Tensor]:
    """Images (rows, WIDTH) and labels (rows,)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(rows, WIDTH, generator=generator)
    return images, torch.randint(CLASSES, (rows,), generator=generator)


def rows_for(milliseconds: float) -> int:
    """Batch size whose step costs about so much on this machine."""
    rows = 64
    for _ in range(3):  # the cost is not quite proportional to the rows
        data, steps = batch(rows), 5 + int(60 / milliseconds)
        list(train(build(2), *data))
        state = build(steps)
        seconds = pairing.cpu_seconds(lambda state=state, data=data: list(train(state, *data)))
        rows = max(1, round(rows * milliseconds / (1e3 * seconds / steps)))
    return rows


@dataclass
class Sides:
    """Both ways of consuming the generator; each keeps the state and the losses of its last round."""

    data: tuple[Tensor, Tensor]
    steps: int
    folder: Path

    def bare(self) -> None:
        """A loop that reads every loss and keeps it."""
        self.bare_state = build(self.steps)
        self.losses = [record.metrics["loss"].item() for record in train(self.bare_state, *self.data)]

    def engine(self) -> None:
        """The engine in a new run folder, with its progress bar, records and last checkpoint."""
        self.engine_state = build(self.steps)
        self.run = RunFolder(self.folder / f"run-{time.monotonic_ns()}")
        outcome = Engine(self.run, "cpu", seed=0).follow(train(self.engine_state, *self.data), self.engine_state)
        assert outcome.status == "complete"

    def same(self) -> bool:
        """Whether both recorded the same losses and ended at the same weights, bit for bit."""
        pairs = zip(*(state.modules["model"].parameters() for state in (self.bare_state, self.engine_state)), strict=True)
        equal = all(torch.equal(ours, theirs) for ours, theirs in pairs)
        return equal and self.losses == [row["loss"] for row in self.run.history()]


def empty_step_seconds(folder: Path, steps: int = 20_000) -> float:
    """CPU seconds that the engine spends per step when the step itself does nothing, start and last checkpoint included."""
    state, loss = build(steps), torch.zeros(())

    def nothing() -> Iterator[Record]:
        while state.step < steps:
            state.step += 1
            yield Record({"loss": loss})

    return pairing.cpu_seconds(lambda: Engine(RunFolder(folder / "empty"), "cpu", seed=0).follow(nothing(), state)) / steps


def main() -> None:
    """Time both cases."""
    comparisons = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stderr(nowhere),
    ):
        for milliseconds, steps, allowed in CASES:
            sides = Sides(batch(rows_for(milliseconds)), steps, Path(folder))
            comparison = pairing.alternate(
                sides.engine,
                sides.bare,
                ROUNDS,
                benchmark="engine",
                peer=f"bare loop, {milliseconds} ms a step",
                unit="steps per second",
                units=steps,
            )
            comparisons.append(comparison)
            assert sides.same()
            overhead = 1 / comparison.ratio
            real = 1e3 * sorted(comparison.theirs)[ROUNDS // 2] / steps
            print(
                f"{len(sides.data[0])} rows, {steps} steps of {real:.2f} ms: engine {overhead:.3f} times the bare loop, "
                f"allowed {allowed:.2f}, {'kept' if overhead <= allowed else 'MISSED'}; losses and weights bit for bit equal"
            )
        print(f"the engine alone: {1e6 * empty_step_seconds(Path(folder)):.0f} microseconds a step that does nothing")
    pairing.report(comparisons)


if __name__ == "__main__":
    main()
