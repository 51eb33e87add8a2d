"""Batches of tensors against torch's DataLoader: `python -m tests.benchmarks.batches`.

Needed: at least 3 times the samples per second of a DataLoader with 2 workers. Wall time, because workers are processes of
their own; they are started before the clock, and stay.
"""

import gzip
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks import pairing

# isort: split
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trainbook.data import Batches

MNIST = Path(__file__).parents[3] / "shared/data/mnist"  # beside the checkout
BATCH_SIZES = (32, 256)
WORKERS = (2, 0)  # without workers for information
ROUNDS = 5
ROUND_SAMPLES = 50_000  # or one epoch, whichever is more
HIDDEN, CLASSES = 32, 10
NEEDED = 3.0

Read = Callable[[], Iterator[tuple[Tensor, ...]]]  # one epoch


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: (N, 64) in 0 to 1, and labels (N,)."""
    data = load_digits()
    return whole_batches(torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target))


def mnist() -> tuple[Tensor, Tensor]:
    """MNIST's training images: (N, 784) in 0 to 1, and labels (N,)."""
    pixels, labels = (
        np.frombuffer(gzip.decompress((MNIST / name).read_bytes()), np.uint8, offset=offset)
        for name, offset in (("train-images-idx3-ubyte.gz", 16), ("train-labels-idx1-ubyte.gz", 8))
    )
    return whole_batches(torch.tensor(pixels).view(len(labels), -1).float() / 255, torch.tensor(labels, dtype=torch.int64))


def whole_batches(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """As many examples as fill batches of every size: then both sides drop none, and an epoch is the whole set."""
    number = len(images) // max(BATCH_SIZES) * max(BATCH_SIZES)
    return images[:number].contiguous(), labels[:number].contiguous()


@dataclass
class Ours:
    """Reads epoch after epoch of `Batches`."""

    batches: Batches
    step: int = 0

    def __call__(self) -> Iterator[tuple[Tensor, ...]]:
        for _ in range(self.batches.per_epoch):
            yield tuple(self.batches(self.step).values())
            self.step += 1


def ours(tensors: tuple[Tensor, ...], batch_size: int) -> Read:
    """Batches of those tensors."""
    return Ours(Batches(dict(enumerate(tensors)), 0, batch_size))


def loader(tensors: tuple[Tensor, ...], batch_size: int, workers: int) -> Read:
    """A shuffling DataLoader of those tensors, as most tutorials make it."""
    reader = DataLoader(
        TensorDataset(*tensors),
        batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        drop_last=True,
        generator=torch.Generator().manual_seed(0),
    )
    return lambda: iter(reader)


def check(tensors: tuple[Tensor, Tensor], batch_size: int, epochs: int = 2) -> None:
    """Both sides give every example once per epoch, with its own image and label, in another order each time."""
    images, labels = tensors
    numbered = (*tensors, torch.arange(len(labels)))
    for read in (ours(numbered, batch_size), loader(numbered, batch_size, 2)):
        orders = []
        for _ in range(epochs):
            batches = list(read())
            assert all(len(batch[2]) == batch_size for batch in batches)
            found_images, found_labels, order = (torch.cat(parts) for parts in zip(*batches, strict=True))
            assert torch.equal(order.sort().values, numbered[2])
            assert torch.equal(found_images, images[order])
            assert torch.equal(found_labels, labels[order])
            orders.append(order)
        assert not torch.equal(*orders)


def only_read(epochs: int, read: Read) -> None:
    """Ask for every batch and do nothing."""
    for _ in range(epochs):
        for _ in read():
            pass


class Training:
    """A step of a small classifier on every batch; each side has one of its own."""

    def __init__(self, pixels: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(pixels, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, fused=True)

    def __call__(self, epochs: int, read: Read) -> None:
        for _ in range(epochs):
            for images, labels in read():
                self.optimizer.zero_grad()
                nn.functional.cross_entropy(self.model(images), labels).backward()
                self.optimizer.step()


def wall_seconds(work: Callable[[], object]) -> float:
    """Wall time."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(name: str, tensors: tuple[Tensor, Tensor], batch_size: int, workers: int) -> list[pairing.Comparison]:
    """Time the read loop and the loop with a training step, ours and theirs in turn, after one unmeasured epoch of each."""
    number = len(tensors[1])
    epochs = max(1, round(ROUND_SAMPLES / number))
    reads = ours(tensors, batch_size), loader(tensors, batch_size, workers)
    comparisons = []
    for what, works in (
        ("read", (only_read, only_read)),
        ("train", tuple(Training(tensors[0].shape[1]) for _ in reads)),
    ):
        for work, read in zip(works, reads, strict=True):
            work(1, read)
        rounds = [
            [wall_seconds(lambda work=work, read=read: work(epochs, read)) for work, read in zip(works, reads, strict=True)]
            for _ in range(ROUNDS)
        ]
        mine, theirs = ([row[side] for row in rounds] for side in range(2))
        peer = f"DataLoader, {workers} workers, batch {batch_size}, {what}"
        comparisons.append(pairing.Comparison(f"batches {name}", peer, "samples per second", epochs * number, mine, theirs))
    return comparisons


def main() -> None:
    """Compare on both data sets."""
    print(f"torch {torch.__version__}, CPU, one thread in each process, wall time")
    sources = {"digits": digits}
    if MNIST.is_dir():
        sources["MNIST"] = mnist
    else:
        print("MNIST: left out, its files are not in ../shared/data/mnist")
    comparisons = []
    for name, load in sources.items():
        tensors = load()
        for batch_size in BATCH_SIZES:
            check(tensors, batch_size)
        print(f"{name}: both sides give each of {len(tensors[1])} examples once per epoch, in another order each time")
        comparisons += [c for size in BATCH_SIZES for workers in WORKERS for c in compare(name, tensors, size, workers)]
    for c in comparisons:
        if "2 workers" in c.peer:
            print(f"{c.benchmark}, {c.peer}: {c.ratio:.1f}, needed {NEEDED:.0f}: {'reached' if c.ratio >= NEEDED else 'MISSED'}")
    pairing.report(comparisons)


if __name__ == "__main__":
    main()
