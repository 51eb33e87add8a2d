"""Distillation with kept teacher logits against torchdistill, and what else saves time: `python -m tests.benchmarks.distillation
[loading] [parallel] [kept]`.

Needed, end to end over 20 epochs with the one-off pass of the 11.2 M teacher: 2.5 times torchdistill to the MobileNet of
273,674 parameters, 6 times to the SimpleCNN of 130,890; and of an epoch at least 0.7 of what leaving out the teacher could
save, (t_T + t_S) / t_S. Teachers from data on the device: 2 times a DataLoader of 2 workers for small networks. Arms in 2
processes: 1.6 times one after the other. Training is the workflow's own, chunk by chunk; a chunk is an epoch.
"""

# t_T seconds of the teacher's forward pass over an epoch, t_S of the student's training

import copy
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.benchmarks import pairing

# isort: split
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from torchvision import transforms

from trainbook.data import Data, batch_indices
from trainbook.runtime import detect
from trainbook.workflows.distillation.config import Config
from trainbook.workflows.distillation.graph import STUDENT, TEACHER, Level
from trainbook.workflows.distillation.images import load_data
from trainbook.workflows.distillation.job_table import JobTable
from trainbook.workflows.distillation.jobs import Job, Teaching, advance, new_network
from trainbook.workflows.distillation.networks import num_parameters
from trainbook.workflows.distillation.turns import Turns

PLACES = [folder / "shared/data/mnist" for folder in Path(__file__).parents]  # beside the project, or one of its worktrees
IMAGES, VALID, BATCH, EPOCHS = 640, 64, 64, 20
ROUNDS = 2  # of epochs with the large teacher; each side trains one more that is not timed
SMALL_ROUNDS = 5
TEMPERATURE, WEIGHT, RATE, MOMENTUM = 4.0, 0.9, 0.02, 0.9
LOSS_TOLERANCE = 1e-3  # relative, of an epoch's mean loss
STUDENTS = {"mobilenet": 2.5, "simple_cnn": 6.0}  # and the ratio needed end to end
CEILING_SHARE = 0.7
LOADER_NEEDED, PARALLEL_NEEDED = 2.0, 1.6
ARMS, ARM_STEPS = 6, 132
CHUNK_EPOCHS = 12  # of small networks: the preset's chunk of 132 steps
# Plain gradient descent at one rate, without what the peer has no equal for; no view but the image itself.
PLAIN = {
    "augmentation": "none", "missing_class": -1, "labels": (0,), "student_seeds": (0,), "num_teachers": 1,
    "unlabelled_arm": False, "batch_size": BATCH, "temperature": TEMPERATURE, "distillation_weight": WEIGHT,
    "learning_rate": RATE, "final_learning_rate_share": 1.0, "momentum": MOMENTUM, "weight_decay": 0.0, "warmup_share": 0.0,
    "clip_norm": 0.0,
}  # fmt: skip


def first(data: Data, images: int) -> Data:
    """So many training images; of the others a few, since a chunk measures itself on valid, which no peer does here."""
    cut = {"train": images, "valid": VALID, "test": VALID}
    return replace(data, **{split: {k: v[:n].clone() for k, v in getattr(data, split).items()} for split, n in cut.items()})


def mnist(config: Config) -> tuple[Config, Data]:
    """Real MNIST, or scikit-learn's digits enlarged to its size."""
    runtime = detect()
    found = next((place for place in PLACES if place.is_dir()), None)
    if found:
        config = config.model_copy(update={"dataset": "mnist", "data_folder": str(found)})
        data = load_data(config, runtime)
    else:
        print("no shared/data/mnist: scikit-learn's digits, enlarged from 8x8 to 28x28")
        data = load_data(config, runtime)
        for split in (data.train, data.valid, data.test):
            split["images"] = functional.interpolate(split["images"], size=(28, 28), mode="bilinear")
    data = first(data, IMAGES)
    print(f"{data.source}; {IMAGES} training images in batches of {BATCH}")
    return config, data


class Ours:
    """A job of the workflow, an epoch at a time."""

    def __init__(self, config: Config, data: Data, job: Job, teaching: Teaching) -> None:
        self.config, self.data, self.job, self.teaching = config, data, job, teaching
        self.saved: dict[str, Any] | None = None
        self.losses: list[float] = []

    def epoch(self) -> None:
        """Train for a chunk, which also puts the job together, measures it on valid and takes its state apart again."""
        self.saved, metrics = advance(self.config, self.data, self.job, self.teaching, self.saved)
        self.losses.append(metrics["loss"])


class InOurOrder(Sampler):
    """The batches of `data.Batches`, so that both sides learn from the same images in the same order."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.number, self.seed, self.step = len(dataset), seed, 0

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.number // BATCH):
            yield from batch_indices(self.seed, self.step, self.number, BATCH).tolist()
            self.step += 1

    def __len__(self) -> int:
        return self.number


class Torchdistill:
    """The same student and teacher in torchdistill's box for one stage, with tensors as its data set: nothing is decoded."""

    def __init__(self, data: Data, job: Job, teacher: nn.Module, student: nn.Module) -> None:
        from torchdistill.core.distillation import get_distillation_box

        paths = {
            f"{who}_module_{what}": value for who in ("student", "teacher") for what, value in (("path", "."), ("io", "output"))
        }
        loss = {"key": "KDLoss", "kwargs": {**paths, "temperature": TEMPERATURE, "alpha": 1 - WEIGHT, "reduction": "batchmean"}}
        self.box = get_distillation_box(
            teacher,
            student,
            {"train": TensorDataset(data.train["images"], data.train["labels"])},
            {
                "num_epochs": EPOCHS,
                "train_data_loader": {
                    "dataset_id": "train",
                    "sampler": {"class_or_func": InOurOrder, "kwargs": {"seed": job.seed}},
                    "kwargs": {"batch_size": BATCH, "num_workers": 0, "drop_last": True},
                },
                "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
                "student": {"forward_proc": "forward_batch_only"},
                "optimizer": {"key": "SGD", "kwargs": {"lr": RATE, "momentum": MOMENTUM}},
                "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}}},
            },
            torch.device("cpu"),
            None,
            False,
            1,
        )
        self.losses: list[float] = []

    def epoch(self) -> None:
        """Its loop, as its own example scripts have it."""
        total = 0.0
        self.box.pre_epoch_process(epoch=len(self.losses))
        for images, labels, extra in self.box.train_data_loader:
            self.box.pre_forward_process()
            loss = self.box.forward_process(images, labels, extra)
            self.box.post_forward_process(loss)
            total += float(loss.detach())
        self.box.post_epoch_process()
        self.losses.append(total / len(self.box.train_data_loader))


def compare_distillation(folder: Path) -> list[pairing.Comparison]:
    """An epoch of both students against torchdistill's, the one-off pass, and how far it could go at all."""
    config = Config(
        **PLAIN,
        stage="kd",
        teacher_network="resnet18",
        teacher_width=64,
        student_width=32,
        teacher_epochs=1,
        student_epochs=EPOCHS,
        chunk_steps=IMAGES // BATCH,
    )
    config, data = mnist(config)
    teacher = train_teacher(config, data, folder)
    comparisons = []
    for name, needed in STUDENTS.items():
        comparisons += compare_student(config.model_copy(update={"student_network": name}), data, teacher, needed, folder)
    return comparisons


def train_teacher(config: Config, data: Data, folder: Path) -> nn.Module:
    """The large teacher after one epoch of the workflow's training: real logits; their values do not change the time."""
    table = JobTable(config, data, replace(detect(), jobs=1, data_folder=folder / "unused"))
    (job,) = table.graph.jobs(Level(TEACHER), table)
    seconds = pairing.cpu_seconds(lambda: table.take(job, advance(config, data, job, Teaching(), None)[0]))
    teacher = table.network("teacher_1")
    print(f"teacher: {job.network} of {num_parameters(teacher):,} parameters, trained for one epoch in {seconds:.0f} CPU s")
    return teacher


def compare_student(config: Config, data: Data, teacher: nn.Module, needed: float, folder: Path) -> list[pairing.Comparison]:
    """Alternate passes, epochs from kept logits, epochs with a live teacher and torchdistill's epochs."""
    (job,) = student_jobs(config, data, folder)
    student = new_network(config, data, job.network, job.width, job.seed)
    peer = Torchdistill(data, job, copy.deepcopy(teacher), copy.deepcopy(student))

    def one_off_pass(number: int) -> Teaching:
        """Everything that is done once: teacher put together, fingerprints, pass, and the file, read back."""
        table = JobTable(config, data, replace(detect(), jobs=1, data_folder=folder / f"{job.network}-{number}"))
        table.adopt("teacher_1", teacher)
        return table.teaching(job)

    kept = Ours(config, data, job, one_off_pass(-1))
    live = Ours(config, data, job, Teaching(networks={"teacher_1": teacher}))
    works: dict[str, Callable[[], object]] = {
        "ours, kept logits": kept.epoch,
        "torchdistill": peer.epoch,
        "ours, live teacher": live.epoch,
        "t_S, bare": bare_student(data, student),
        "t_T, bare": bare_teacher(data, teacher),
    }
    seconds: dict[str, list[float]] = {name: [] for name in [*works, "one-off pass"]}
    for number in range(ROUNDS + 1):
        for name, work in works.items():
            taken = pairing.cpu_seconds(work)
            if number:
                seconds[name].append(taken)
        if number:
            seconds["one-off pass"].append(pairing.cpu_seconds(lambda number=number: one_off_pass(number)))

    print(f"\nstudent: {job.network} of {num_parameters(student):,} parameters; CPU seconds an epoch, median of {ROUNDS}")
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in middle.items():
        print(f"{name:>22}: {value:7.3f} ({min(seconds[name]):.3f} .. {max(seconds[name]):.3f})")
    check_losses(kept.losses, "torchdistill", peer.losses)
    check_losses(kept.losses, "live teacher", live.losses)
    passed, ours, theirs = (seconds[name] for name in ("one-off pass", "ours, kept logits", "torchdistill"))
    whole = [(p + EPOCHS * o, EPOCHS * t) for p, o, t in zip(passed, ours, theirs, strict=True)]
    end_to_end = pairing.Comparison(
        "distillation, end to end",
        f"torchdistill 1.1.5, {job.network}, one-off pass + {EPOCHS} epochs, from measured epochs",
        "epochs per CPU second",
        EPOCHS,
        [pair[0] for pair in whole],
        [pair[1] for pair in whole],
    )
    verdict = kept_or(end_to_end.ratio, needed)
    print(f"pass + {EPOCHS} x epoch, not run but multiplied: {end_to_end.ratio:.2f}, needed {needed}: {verdict}")
    ceilings = [(t + s) / s for t, s in zip(seconds["t_T, bare"], seconds["t_S, bare"], strict=True)]
    own = statistics.median(a / b for a, b in zip(seconds["ours, live teacher"], ours, strict=True))
    ceiling = statistics.median(ceilings)
    print(
        f"ceiling (t_T + t_S) / t_S: {ceiling:.2f} ({min(ceilings):.2f} .. {max(ceilings):.2f}); our live epoch over our kept "
        f"epoch: {own:.2f}, {own / ceiling:.2f} of it, needed {CEILING_SHARE}: {kept_or(own / ceiling, CEILING_SHARE)}"
    )
    epoch = pairing.Comparison(
        "distillation epoch", f"torchdistill 1.1.5, {job.network}", "epochs per CPU second", 1, list(ours), list(theirs)
    )
    return [epoch, end_to_end]


def kept_or(value: float, needed: float) -> str:
    """The verdict on a needed figure."""
    return "kept" if value >= needed else "MISSED"


def student_jobs(config: Config, data: Data, folder: Path) -> list[Job]:
    """The students of the graph, as a run would train them."""
    table = JobTable(config, data, replace(detect(), jobs=1, data_folder=folder / "unused"))
    level = next(level for level in table.graph.levels() if level.stage == STUDENT)
    return table.graph.jobs(level, table)


def check_losses(ours: list[float], name: str, theirs: list[float]) -> None:
    """Both sides must have done the same work: every epoch's mean loss agrees."""
    difference = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    pairs = ", ".join(f"{a:.6f} {b:.6f}" for a, b in zip(ours, theirs, strict=True))
    print(f"mean losses of the epochs, kept logits and {name}: {pairs}; relative difference at most {difference:.1e}")
    assert difference <= LOSS_TOLERANCE


def bare_student(data: Data, network: nn.Module) -> Callable[[], None]:
    """An epoch of nothing but the student's passes and updates: no data, no records."""
    model = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    batches = list(zip(data.train["images"].split(BATCH), data.train["labels"].split(BATCH), strict=True))

    def epoch() -> None:
        for images, labels in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    return epoch


def bare_teacher(data: Data, teacher: nn.Module) -> Callable[[], None]:
    """The teacher's forward passes of an epoch, batch by batch."""

    @torch.no_grad()
    def epoch() -> None:
        for images in data.train["images"].split(BATCH):
            teacher(images)

    return epoch


class Pictures(Dataset):
    """Images as torchvision's data sets give them: decoded, moved by up to a pixel, made a tensor, one by one."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.pictures = [Image.fromarray(array) for array in (images[:, 0] * 255).round().to(torch.uint8).numpy()]
        self.labels = labels.tolist()
        self.transform = transforms.Compose([transforms.RandomCrop(images.shape[-1], padding=1), transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]


def compare_loading(folder: Path) -> list[pairing.Comparison]:
    """Teachers and direct students of the laptop preset, on digits: our chunk of an epoch against a DataLoader of 2 workers.

    CPU time of all processes; wall time, which depends on who else uses the cores, is printed beside it.
    """
    comparisons = []
    for network, width in (("small_cnn", 8), ("resnet8", 16)):
        config = Config(
            **PLAIN | {"augmentation": "shifts"},
            stage="teacher",
            teacher_network=network,
            teacher_width=width,
            teacher_epochs=200,
        )
        data = load_data(config, detect())
        data = first(data, len(data.train["labels"]))
        steps = len(data.train["labels"]) // BATCH
        config = config.model_copy(update={"chunk_steps": CHUNK_EPOCHS * steps})
        table = JobTable(config, data, replace(detect(), jobs=1, data_folder=folder / "unused"))
        (job,) = table.graph.jobs(Level(TEACHER), table)
        ours = Ours(config, data, job, Teaching())
        pictures = Pictures(data.train["images"], data.train["labels"])
        loader = DataLoader(pictures, BATCH, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True)
        model = new_network(config, data, network, width, job.seed).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
        losses: list[float] = []

        def epochs(loader=loader, model=model, optimizer=optimizer, losses=losses) -> None:
            total = 0.0
            for _ in range(CHUNK_EPOCHS):
                for images, labels in loader:
                    optimizer.zero_grad()
                    loss = functional.cross_entropy(model(images), labels)
                    loss.backward()
                    optimizer.step()
                    total += loss.item()
            losses.append(total / len(loader) / CHUNK_EPOCHS)

        sides: tuple[list[float], list[float]] = ([], [])
        cpu: tuple[list[float], list[float]] = ([], [])
        ours.epoch()
        epochs()  # starts the workers
        workers = [worker.pid for worker in loader._iterator._workers]
        for _ in range(SMALL_ROUNDS):
            for side, (work, others) in enumerate(((ours.epoch, []), (epochs, workers))):
                began, used = time.perf_counter(), time.process_time() + sum(map(cpu_of, others))
                work()
                sides[side].append(time.perf_counter() - began)
                cpu[side].append(time.process_time() + sum(map(cpu_of, others)) - used)
        images = CHUNK_EPOCHS * steps * BATCH
        name = f"{network}, width {width}, {num_parameters(model):,} parameters"
        comparison = pairing.Comparison(
            "training from the device", f"DataLoader of 2 workers, {name}", "images per CPU second of all processes", images, *cpu
        )
        wall = statistics.median(b / a for a, b in zip(*sides, strict=True))
        load = os.getloadavg()[0]
        microseconds = [statistics.median(side) / images * 1e6 for side in cpu]
        verdict = kept_or(comparison.ratio, LOADER_NEEDED)
        print(
            f"\n{name}: CPU time {microseconds[0]:.0f} us an image, with a DataLoader {microseconds[1]:.0f} in 3 processes, "
            f"ratio {comparison.ratio:.2f}, needed {LOADER_NEEDED}: {verdict}; wall time, at a load of {load:.1f}: ratio "
            f"{wall:.2f}; losses {ours.losses[0]:.3f} to {ours.losses[-1]:.3f}, theirs {losses[0]:.3f} to {losses[-1]:.3f}"
        )
        assert abs(ours.losses[-1] - losses[-1]) < 0.2  # other random shifts, so only about equal
        comparisons.append(comparison)
    return comparisons


def compare_parallel(folder: Path) -> list[pairing.Comparison]:
    """Arms of the laptop preset in two processes against one after the other, through the workflow's own turns."""
    config = Config(
        **PLAIN | {"augmentation": "shifts", "student_seeds": tuple(range(ARMS))}, stage="direct", chunk_steps=ARM_STEPS
    )
    data = load_data(config, detect())
    jobs = student_jobs(config, data, folder)
    order = [(job, 0) for job in jobs]
    tables = [JobTable(config, data, replace(detect(), jobs=number, data_folder=folder / "unused")) for number in (1, 2)]
    serial, parallel = (Turns(config, data, table) for table in tables)
    found: dict[str, list[Any]] = {}

    def take(turns: Turns, name: str) -> Callable[[], None]:
        def work() -> None:
            found[name] = [saved for _, saved, _ in turns.take(order)]

        return work

    works = {"serial": take(serial, "serial"), "parallel": take(parallel, "parallel")}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    cpu: dict[str, list[float]] = {name: [] for name in works}
    works["parallel"]()  # starts the processes
    workers = [process.pid for worker in parallel._pool._workers.values() for process in worker._processes.values()]
    works["serial"]()
    for _ in range(SMALL_ROUNDS):
        for name, work in works.items():
            began, used = time.perf_counter(), time.process_time() + sum(map(cpu_of, workers))
            work()
            seconds[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() + sum(map(cpu_of, workers)) - used)
    parallel.close()
    same = all(torch.equal(a, b) for a, b in zip(*(map(list, map(tensors_in, found.values()))), strict=True))
    comparison = pairing.Comparison(
        "arms in 2 processes",
        f"one after the other, {ARMS} students of {ARM_STEPS} steps",
        "steps per second",
        ARMS * ARM_STEPS,
        seconds["parallel"],
        seconds["serial"],
    )
    used = statistics.median(b / a for a, b in zip(cpu["serial"], cpu["parallel"], strict=True))
    print(
        f"\narms: weights of both {'the same to the last bit' if same else 'DIFFER'}; wall time ratio {comparison.ratio:.2f} "
        f"({min(comparison.ratios):.2f} .. {max(comparison.ratios):.2f}) at a load of {os.getloadavg()[0]:.1f} on "
        f"{len(os.sched_getaffinity(0))} cores, needed {PARALLEL_NEEDED}: {kept_or(comparison.ratio, PARALLEL_NEEDED)}; "
        f"{used:.3f} times the CPU time, so {2 / used:.2f} on two idle cores"
    )
    assert same
    return [comparison]


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors of nested dicts and lists, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict | list | tuple):
        for value in values.values() if isinstance(values, dict) else values:
            yield from tensors_in(value)


def cpu_of(process: int) -> float:
    """CPU seconds of another process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


SECTIONS = {"loading": compare_loading, "parallel": compare_parallel, "kept": compare_distillation}


def main(names: list[str]) -> None:
    """The sections of those names; all without any."""
    print(f"torch {torch.__version__}, one thread, load {os.getloadavg()[0]:.1f}, numpy {np.__version__}")
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        comparisons = [comparison for section in names or SECTIONS for comparison in SECTIONS[section](folder)]
    pairing.report(comparisons)


if __name__ == "__main__":
    main(sys.argv[1:])
