"""A small classifier of scikit-learn's digits: the test bed of everything that `optim` and the engine offer."""

from typing import ClassVar

import torch
from sklearn.datasets import load_digits
from torch import nn

from trainbook.data import Data, batch_indices, content_sha256
from trainbook.optim import Stepper, averaged_copy, cross_entropy, make_optimizer, split_batch
from trainbook.optimization import OptimizationConfig
from trainbook.plots import new_figure
from trainbook.records import Record
from trainbook.state import TrainState

TARGETS = ()


class Config(OptimizationConfig):
    """The classifier's choices."""

    PRESETS: ClassVar = {"smoke": {}, "laptop": {}, "full": {}}

    steps: int = 120
    """Training steps."""
    batch_size: int = 48
    """Images per step."""
    dropout: float = 0.2
    """Share of hidden units dropped."""


def load_data(config, runtime):
    digits = load_digits()
    images, labels = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    parts = [{"images": images[part], "labels": labels[part]} for part in order.split([1197, 300, 300])]
    return Data(*parts, "scikit-learn load_digits", "CC BY 4.0", content_sha256([images]), synthetic=False)


def draw_data(config, data):
    return {}


def build(config, data, runtime):
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(64, 10))
    optimizer = make_optimizer(model, config)
    ema = averaged_copy(model) if config.ema_decay else None
    stepper = Stepper(model, optimizer, config, config.steps, ema)
    return TrainState({"model": model}, {"model": optimizer}, {"stepper": stepper}, total_steps=config.steps, stage="fit")


def train(config, data, state):
    model, stepper = state.modules["model"], state.stateful["stepper"]
    images, labels = data.train["images"], data.train["labels"]
    while state.step < config.steps:
        indices = batch_indices(config.seed, state.step, len(images), config.batch_size)
        batches = split_batch((images[indices], labels[indices]), config.accumulation)
        metrics = stepper.step(state.step, batches, lambda batch: cross_entropy(model(batch[0]), batch[1], config))
        state.step += 1
        yield Record(metrics)


@torch.no_grad()
def evaluate(config, data, state):
    model = state.stateful["stepper"].ema or state.modules["model"].eval()
    correct = (model(data.test["images"]).argmax(1) == data.test["labels"]).float().mean()
    state.modules["model"].train()
    return {"model/accuracy": float(correct), "guess/accuracy": 0.1}


def draw(config, data, state, history):
    return {"nothing": new_figure()[0]}
