"""A small classifier of scikit-learn's digits: the test bed of everything that `Stepper` and the engine offer."""

import os
from typing import ClassVar

import torch
from sklearn.datasets import load_digits
from torch import nn

from trainbook import distributed
from trainbook.data import Batches, Data, content_sha256
from trainbook.fitting import Stage
from trainbook.losses import cross_entropy
from trainbook.optimization import OptimizationConfig
from trainbook.plots import new_figure
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
    model.to(runtime.device)
    stage = Stage("fit", model, config, config.steps)
    return TrainState({"model": model}, stateful={"fit": stage}, total_steps=config.steps)


class Shuffled(Batches):
    """In an order drawn anew each step: processes that share a batch, and not its order, would mix up images and labels."""

    def __call__(self, step):
        batch = super().__call__(step)
        order = torch.randperm(len(batch["labels"]))
        return {name: tensor[order] for name, tensor in batch.items()}


def train(config, data, state):
    def loss(model, batch):
        logits = model(batch["images"])
        return cross_entropy(logits, batch["labels"], config), {"accuracy": accuracy(logits, batch["labels"])}

    def validate(model):
        logits = model(data.valid["images"])
        return {
            "valid_loss": cross_entropy(logits, data.valid["labels"], config),
            "valid_accuracy": accuracy(logits, data.valid["labels"]),
        }

    batches = Shuffled(data.train, config.seed, config.batch_size, config.batch_scaling)
    signal_step, number = map(int, os.environ.get("TEST_SIGNAL", "-1 0").split())
    for record in state.stateful["fit"].train(state, batches, loss, validate):
        if state.step == signal_step and distributed.rank() == 0:
            os.kill(os.getpid(), number)
        yield record


def accuracy(logits, labels):
    return (logits.argmax(1) == labels).float().mean()


@torch.no_grad()
def evaluate(config, data, state):
    logits = state.modules["model"].eval()(data.test["images"])
    return {"model/accuracy": float(accuracy(logits, data.test["labels"])), "guess/accuracy": 0.1}


def draw(config, data, state, history):
    return {"nothing": new_figure()[0]}
