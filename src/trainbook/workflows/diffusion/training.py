"""Builds and trains: first the classifier that will judge, then the U-Net, with samples of every class on the way."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainbook.data import Batches, Data
from trainbook.fitting import Stage
from trainbook.records import Record
from trainbook.runtime import Runtime
from trainbook.state import TrainState
from trainbook.workflows.diffusion.config import Config
from trainbook.workflows.diffusion.data import NUM_CLASSES
from trainbook.workflows.diffusion.judge import Classifier
from trainbook.workflows.diffusion.model import draw_samples, make_unet, noise_loss, noise_schedule, training_loss

CLASSIFIER, UNET, SNAPSHOTS = "classifier", "unet", "snapshots"
VALID_SEED = 20_261_127  # of the noise in which the validation loss is measured, the same every time
MAX_VALID_IMAGES = 1000


class Snapshots(nn.Module):
    """Samples of every class from the same noise, at several steps of training; zeros where there are none yet."""

    def __init__(self, config: Config, image_shape: tuple[int, int, int], total_steps: int) -> None:
        super().__init__()
        number = min(config.num_snapshots, total_steps)
        self.steps = [round(total_steps * (index + 1) / number) for index in range(number)]
        self.register_buffer("images", torch.zeros(number, NUM_CLASSES, *image_shape))


def build(config: Config, data: Data, runtime: Runtime) -> TrainState:
    """Classifier, U-Net and their stages."""
    shape = tuple(data.train["images"].shape[1:])
    classifier = Classifier(shape).to(runtime.device)
    unet = make_unet(config, shape).to(runtime.device)
    per_epoch = len(data.train["labels"]) // config.batch_size
    plain = {"learning_rate": config.classifier_learning_rate, "schedule": "constant", "ema_decay": 0.0}
    judging = config.model_copy(update=plain | {"validate_every": 0, "patience": 0})
    steps = per_epoch * config.num_epochs
    stages = {
        CLASSIFIER: Stage(CLASSIFIER, classifier, judging, per_epoch * config.classifier_epochs),
        UNET: Stage(UNET, unet, config, steps),
    }
    snapshots = Snapshots(config, shape, steps).to(runtime.device)
    total = sum(stage.total_steps for stage in stages.values())
    modules = {CLASSIFIER: classifier, UNET: unet, SNAPSHOTS: snapshots}
    return TrainState(modules, stateful=stages, total_steps=total, stage=CLASSIFIER)


def train(config: Config, data: Data, state: TrainState) -> Iterator[Record]:
    """Train each stage from where it is; yields once per step."""
    batches = Batches(data.train, config.seed, config.batch_size, config.batch_scaling)
    yield from state.stateful[CLASSIFIER].train(state, batches, classifier_loss)

    schedule = noise_schedule(config)

    def loss(unet: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return training_loss(unet, schedule, 2 * batch["images"] - 1, batch["labels"], config.label_dropout)

    def validate(unet: nn.Module) -> dict[str, float]:
        images, labels = (data.valid[name][:MAX_VALID_IMAGES] for name in ("images", "labels"))
        return {"valid_loss": held_out_loss(unet, config, images, labels)}

    stage, snapshots = state.stateful[UNET], state.modules[SNAPSHOTS]
    for record in stage.train(state, batches, loss, validate):
        if stage.stepper.steps_done in snapshots.steps:
            drawing = stage.module if stage.finished or stage.stepper.ema is None else stage.stepper.ema
            images, _ = draw_samples(drawing, config, tuple(snapshots.images.shape[2:]), NUM_CLASSES, 1.0)
            snapshots.images[snapshots.steps.index(stage.stepper.steps_done)] = images
        yield record


def classifier_loss(classifier: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy."""
    return cross_entropy(classifier(batch["images"]), batch["labels"])


def held_out_loss(unet: nn.Module, config: Config, images: Tensor, labels: Tensor) -> float:
    """Loss at evenly spaced timesteps with the same noise every time; `images` (N, C, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(VALID_SEED)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    spread = torch.linspace(0, config.num_timesteps - 1, len(images)).long()
    timesteps = spread[torch.randperm(len(images), generator=generator)].to(images.device)
    return float(noise_loss(unet, noise_schedule(config), 2 * images - 1, labels, timesteps, noise))
