"""A job: one network's training as a pure function of what it is told, taken chunk by chunk, in any process."""

# B images, K views, N training images, C classes, M teachers

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainbook.data import Batches, Data
from trainbook.losses import widened
from trainbook.seeding import seed_step
from trainbook.stepper import Stepper
from trainbook.workflows.distillation.arms import Arm, Settings
from trainbook.workflows.distillation.config import Config, regime_name
from trainbook.workflows.distillation.gate import mixture_logits
from trainbook.workflows.distillation.images import labelled, num_classes
from trainbook.workflows.distillation.ladder import teachers_at
from trainbook.workflows.distillation.methods import METHODS, Outputs, SoftLoss, warmup_weight
from trainbook.workflows.distillation.networks import Classifier, family
from trainbook.workflows.distillation.temperature import TemperatureLaw, hypergradient, make_law
from trainbook.workflows.distillation.views import NUM_VIEWS, plain_view, view

INITIALISATION = 2**31  # a step that no job reaches: the weights' own random numbers
HYPER_EVERY = 10  # steps between two measurements of the hypergradient
MONITORED = 1000  # validation images, at most, that a network under way is measured on; a finished one on all
ROWS = 1000  # images that pass through a network at once when nothing is learned


@dataclass(frozen=True)
class Job:
    """One network to train.

    Attributes:
        name: of its own.
        stage: teacher, search, trial, assistant or student.
        regime: which labels it sees, as `Config.regimes` names them.
        arm: what it learns from, and how.
        settings: of its loss and optimizer.
        seed: of weights, batches and views.
        network, width: what `networks.family` makes it of.
        steps: of gradient descent.
        sources: what it learns from: each one network, or several that are weighted image by image.
    """

    name: str
    stage: str
    regime: str
    arm: Arm
    settings: Settings
    seed: int
    network: str
    width: int
    steps: int
    sources: tuple[tuple[str, ...], ...] = ()

    def num_chunks(self, chunk_steps: int) -> int:
        """Records that it makes."""
        return -(-self.steps // chunk_steps)


@dataclass
class Teaching:
    """What a job's sources have to say; the same for all of its chunks.

    Attributes:
        logits: network to its logits of every view of the training images, (K, N, C); none of those that are live.
        networks: network to itself, frozen, where it is asked anew in every step.
        weights: of the networks of a source of several, (K, N, M).
        accuracy: of the first teacher on valid, for the retention.
    """

    logits: dict[str, Tensor] = field(default_factory=dict)
    networks: dict[str, Classifier] = field(default_factory=dict)
    weights: Tensor | None = None
    accuracy: float | None = None


class Learner(nn.Module):
    """A student and the losses it learns by, which may have parameters of their own.

    Args:
        student: the network.
        soft: one loss per source.
    """

    def __init__(self, student: Classifier, soft: list[SoftLoss]) -> None:
        super().__init__()
        self.student, self.soft = student, nn.ModuleList(soft)


def new_network(config: Config, data: Data, name: str, width: int, seed: int) -> Classifier:
    """A network with the random weights of a seed, on the data's device."""
    images = data.train["images"]
    seed_step(seed, INITIALISATION)
    return family(name, tuple(images.shape[1:]), num_classes(data))(width).to(images.device)


def advance(
    config: Config, data: Data, job: Job, teaching: Teaching, saved: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train a job for one more chunk.

    Args:
        saved: what the chunk before has left; for the first one None, or {"start": weights to start from}.

    Returns:
        What to give as `saved` for the next chunk; after the last one {"network", "result"}, the result being the valid
        accuracy and the negative log-likelihood of every validation image. And the metrics of the chunk.
    """
    with one_thread(data.train["images"].device):
        training = _Training(config, data, job, teaching, saved)
        metrics = training.take(min(config.chunk_steps, job.steps - training.stepper.steps_done))
        return training.saved(), metrics


class _Training:
    """A job under way, put together from what was saved of it."""

    def __init__(self, config: Config, data: Data, job: Job, teaching: Teaching, saved: dict[str, Any] | None) -> None:
        self.config, self.data, self.job, self.teaching = config, data, job, teaching
        settings, images = job.settings, data.train["images"]
        student = new_network(config, data, job.network, job.width, job.seed)
        if saved is not None and "start" in saved:
            student.load_state_dict(saved["start"])
        self.learner = Learner(student, self._soft_losses(student)).to(images.device).train()
        self.stepper = Stepper(
            self.learner, config.optimization(job.steps, settings.learning_rate, settings.weight_decay), job.steps
        )
        self.law = self._law()
        indices = seen(config, data, job)
        self.is_labelled = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        self.is_labelled[labelled_indices(config, data, job.regime)] = True
        self.batches = Batches({"index": indices}, job.seed, min(config.batch_size, len(indices)))
        if saved is not None and "learner" in saved:
            self.learner.load_state_dict(saved["learner"])
            self.stepper.load_state_dict(copy.deepcopy(saved["stepper"]))  # torch goes on in the very tensors
            self.law.load_state_dict(saved["law"])

    def _soft_losses(self, student: Classifier) -> list[SoftLoss]:
        """One per source; what they learn themselves has random weights of its own, after the student's."""
        job, images = self.job, self.data.train["images"][:1]
        if not job.sources:
            return []
        example = self._outputs(student.eval(), images)
        logits_only = Outputs(example.logits)

        def loss_for(source: tuple[str, ...]) -> SoftLoss:
            network = self.teaching.networks.get(source[0])
            teacher = logits_only if network is None else self._outputs(network, images)
            return SoftLoss(job.settings.method, example, teacher, self.data.train["labels"])

        return [loss_for(source) for source in job.sources]

    @staticmethod
    @torch.no_grad()
    def _outputs(network: Classifier, images: Tensor) -> Outputs:
        return network(images, features=True)

    def _law(self) -> TemperatureLaw:
        config, settings = self.config, self.job.settings
        scale = settings.temperature / config.temperature
        low, high = (scale * bound for bound in config.temperature_range)
        per_epoch = max(1, len(self.data.train["images"]) // config.batch_size)
        return make_law(self.job.arm.law, settings.temperature, low, high, self.job.steps, per_epoch)

    def take(self, num_steps: int) -> dict[str, Any]:
        """So many steps; the means over them, and what the network does on valid then."""
        totals: dict[str, Tensor] = {}
        for _ in range(num_steps):
            report = self.take_step()
            for name in ("loss", "hard_loss", "soft_loss"):
                if name in report:
                    totals[name] = totals.get(name, 0.0) + report[name].detach()
        metrics = {name: float(total) / num_steps for name, total in totals.items()}
        temperature = {"temperature": self.law.at(self.stepper.steps_done)} if self.job.sources else {}
        valid = self._valid_metrics()
        retention = {} if self.teaching.accuracy is None else {"retention": valid["valid_accuracy"] / self.teaching.accuracy}
        found = {**metrics, **valid, **retention, **temperature, "learning_rate": report["learning_rate"]}
        if self.job.stage == "search" and not math.isfinite(metrics["loss"]):  # the search leaves it out and goes on
            return {"diverged": 1.0, **{name: value for name, value in found.items() if math.isfinite(value)}}
        return found

    def take_step(self) -> dict[str, Any]:
        """One step of gradient descent, whose random numbers depend on the job's seed and the step alone."""
        step = self.stepper.steps_done
        seed_step(self.job.seed, step)
        batch = self._batch(step)
        temperature = torch.tensor(self.law.at(step), device=batch["images"].device)
        if self.law.wants == "loss_gradient":
            temperature.requires_grad_()
        if self.law.wants == "hypergradient" and step % HYPER_EVERY == 0:
            self.law.update(step, self._hypergradient(batch, step))
        report = self.stepper.step(batch, lambda model, part: self._loss(model, part, temperature, step))
        if self.law.wants == "loss_gradient":
            self.law.update(step, float(temperature.grad))
        per_epoch = max(1, len(self.data.train["images"]) // self.config.batch_size)
        if self.law.wants == "valid_accuracy" and (step + 1) % per_epoch == 0:
            self.law.update(step, 100 * self._valid_metrics()["valid_accuracy"])
        return report

    def _batch(self, step: int) -> dict[str, Tensor]:
        """Images in a view each, labels, and of every source what is kept of it."""
        index = self.batches(step)["index"]
        number = torch.randint(NUM_VIEWS[self.config.augmentation], (len(index),), device=index.device)
        batch = {"images": view(self.data.train["images"][index], number, self.config.augmentation), "index": index}
        batch |= {"labels": self.data.train["labels"][index], "is_labelled": self.is_labelled[index]}
        for place in self._places(step):
            source = self.job.sources[place]
            if source[0] in self.teaching.logits:
                batch[f"source_{place}"] = torch.stack([self.teaching.logits[name][number, index] for name in source], 1)
            if len(source) > 1:
                batch[f"weights_{place}"] = self.teaching.weights[number, index]
        return batch

    def _loss(self, model: Learner, batch: dict[str, Tensor], temperature: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(1 - a) cross entropy of the labelled images + a mean over sources, or with the weights of the method."""
        student = model.student(batch["images"], features=True)
        losses = functional.cross_entropy(widened(student.logits), batch["labels"], reduction="none")
        given = batch["is_labelled"]
        hard = (losses * given).sum() / given.sum().clamp(min=1)
        if not self.job.sources:
            return hard, {}
        settings = self.job.settings
        method = METHODS[settings.method]
        soft = [
            model.soft[place](student, self._teacher(place, batch, temperature), batch["labels"], batch["index"], temperature)
            for place in self._places(step)
        ]
        total = torch.stack(soft).mean()
        weights = (1 - settings.weight, settings.weight) if settings.method == "kd" else (method.hard_weight, method.soft_weight)
        rise = warmup_weight(step, self.job.steps, method.warmup)
        return weights[0] * hard + rise * weights[1] * total, {"hard_loss": hard.detach(), "soft_loss": total.detach()}

    def _places(self, step: int) -> tuple[int, ...]:
        """Which sources teach the batch of a step."""
        return teachers_at(range(len(self.job.sources)), self.job.seed, step) if self.job.sources else ()

    @torch.no_grad()
    def _live(self, source: tuple[str, ...], images: Tensor) -> list[Outputs]:
        return [self.teaching.networks[name](images, features=True) for name in source]

    def _teacher(self, place: int, batch: dict[str, Tensor], temperature: Tensor) -> Outputs:
        """What a source says of a batch; of several networks the weighted mean of their probabilities at T."""
        source = self.job.sources[place]
        live = [] if f"source_{place}" in batch else self._live(source, batch["images"])
        if len(source) == 1:
            return live[0] if live else Outputs(batch[f"source_{place}"][:, 0])
        logits = torch.stack([outputs.logits for outputs in live]) if live else batch[f"source_{place}"].transpose(0, 1)
        return Outputs(mixture_logits(logits, batch[f"weights_{place}"], temperature))

    def _hypergradient(self, batch: dict[str, Tensor], step: int) -> float:
        """Of a validation batch of the same size, drawn after the training batch."""
        valid = self.data.valid
        chosen = torch.randint(len(valid["labels"]), (len(batch["labels"]),), device=batch["labels"].device)
        images, labels = valid["images"][chosen], valid["labels"][chosen]
        rest = {key: value for key, value in batch.items() if key != "images"}
        soft = self.learner.soft

        def training_loss(network: Any, temperature: Tensor) -> Tensor:
            model = _Pair(lambda pictures, features: network(pictures, features), soft)
            return self._loss(model, {"images": batch["images"], **rest}, temperature, step)[0]

        def validation_loss(network: Any) -> Tensor:
            return functional.cross_entropy(network(images), labels)

        rate = self.job.settings.learning_rate
        return hypergradient(self.learner.student, training_loss, validation_loss, self.law.at(step), rate)

    def _valid_metrics(self) -> dict[str, float]:
        images, labels = (self.data.valid[name][:MONITORED] for name in ("images", "labels"))
        logits = predict(self.learner.student, images)
        self.learner.train()
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"valid_accuracy": float(accuracy), "valid_nll": float(functional.cross_entropy(logits, labels))}

    def saved(self) -> dict[str, Any]:
        """What the next chunk needs; when there is none, the network and how it does on valid."""
        if self.stepper.steps_done < self.job.steps:
            parts = {"learner": self.learner, "stepper": self.stepper, "law": self.law}
            return {name: dict(part.state_dict()) for name, part in parts.items()}
        logits, labels = predict(self.learner.student, self.data.valid["images"]), self.data.valid["labels"]
        losses = functional.cross_entropy(logits, labels, reduction="none")
        accuracy = float((logits.argmax(1) == labels).float().mean())
        return {
            "network": dict(self.learner.student.state_dict()),
            "result": {"valid_accuracy": accuracy, "valid_losses": losses},
        }


@dataclass
class _Pair:
    """Looks like a `Learner` whose student is a function."""

    student: Any
    soft: Any


def labelled_indices(config: Config, data: Data, regime: str) -> Tensor:
    """Which training images have a label in a regime."""
    labels = data.train["labels"]
    if regime.startswith("without_"):
        return (labels != config.missing_class).nonzero()[:, 0]
    return labelled(labels, next((number for number in config.labels if regime_name(number) == regime), 0))


def seen(config: Config, data: Data, job: Job) -> Tensor:
    """Which training images a job sees."""
    labels = data.train["labels"]
    if job.arm.unlabelled or job.stage == "teacher":
        return torch.arange(len(labels), device=labels.device)
    return labelled_indices(config, data, job.regime)


@torch.no_grad()
def predict(network: nn.Module, images: Tensor) -> Tensor:
    """Logits in evaluation mode; (N, C, H, W) -> (N, classes)."""
    network.eval()
    return torch.cat([network(part) for part in images.split(ROWS)])


@torch.no_grad()
def logits_of_views(network: nn.Module, images: Tensor, augmentation: str) -> Tensor:
    """Logits of every view of every image, (N, C, H, W) -> (K, N, classes)."""
    numbers = torch.arange(NUM_VIEWS[augmentation], device=images.device)
    return torch.stack([predict(network, view(images, number.expand(len(images)), augmentation)) for number in numbers])


def plain_logits(logits: Tensor, augmentation: str) -> Tensor:
    """Of the views the image itself, (K, N, C) -> (N, C)."""
    return logits[plain_view(augmentation)]


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU compute with one thread: a sum's order, and so its last bit, then does not depend on how many jobs run at once."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_per_step(config: Config, data: Data, job: Job, teaching: Teaching, least_seconds: float = 0.1) -> float:
    """Of wall time, over as many of a job's first steps as take so long; the first, which also sets things up, is not counted."""
    images = data.train["images"]
    with one_thread(images.device):
        training = _Training(config, data, job, teaching, None)
        training.take(1)
        began, count = time.perf_counter(), 0
        while count < job.steps - 1 and (not count or time.perf_counter() - began < least_seconds):
            training.take_step()
            count += 1
        if images.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / max(count, 1)
