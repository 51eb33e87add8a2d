"""Two stages for tests: a classifier of the digits, which may end early, then a smaller one that learns from its answers."""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from tests import digits_classifier
from tests.digits_classifier import TARGETS, accuracy, draw, draw_data, load_data
from trainbook.data import Batches
from trainbook.fitting import Stage
from trainbook.state import TrainState

__all__ = ["TARGETS", "Config", "build", "draw", "draw_data", "evaluate", "load_data", "train"]


class Config(digits_classifier.Config):
    """Both stages take `steps` steps at most."""

    PRESETS: ClassVar = {"smoke": {}, "laptop": {}, "full": {}}


def build(config, data, runtime):
    teacher = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(32, 10))
    student = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(8, 10))
    modules = {"teacher": teacher.to(runtime.device), "student": student.to(runtime.device)}
    stages = {name: Stage(name, module, config, config.steps) for name, module in modules.items()}
    return TrainState(modules, stateful=stages, total_steps=2 * config.steps)


def train(config, data, state):
    teacher, stages = state.modules["teacher"], state.stateful

    def loss_of_teacher(model, batch):
        return functional.cross_entropy(model(batch["images"]), batch["labels"])

    def loss_of_student(model, batch):
        with torch.no_grad():
            taught = teacher(batch["images"]).softmax(1)
        return functional.cross_entropy(model(batch["images"]), taught)

    def validate(model):
        return {"valid_accuracy": accuracy(model(data.valid["images"]), data.valid["labels"])}

    batches = Batches(data.train, config.seed, config.batch_size, config.batch_scaling)
    yield from stages["teacher"].train(state, batches, loss_of_teacher, validate)
    teacher.eval()
    yield from stages["student"].train(state, batches, loss_of_student)


@torch.no_grad()
def evaluate(config, data, state):
    logits = state.modules["student"].eval()(data.test["images"])
    return {"student/accuracy": float(accuracy(logits, data.test["labels"]))}
