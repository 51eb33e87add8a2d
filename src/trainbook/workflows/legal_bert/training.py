"""Builds and trains the classifier."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trainbook.data import Batches, Data
from trainbook.fitting import Stage
from trainbook.losses import cross_entropy
from trainbook.records import Record
from trainbook.runtime import Runtime
from trainbook.state import TrainState
from trainbook.workflows.legal_bert.config import Config
from trainbook.workflows.legal_bert.data import label_names, tokenizer_of
from trainbook.workflows.legal_bert.model import make_model

MODEL, FIT = "model", "fit"
EVALUATION_BATCH = 256


def build(config: Config, data: Data, runtime: Runtime) -> TrainState:
    """The model and its stage."""
    model = make_model(config, len(label_names(data)), tokenizer_of(config, data).get_vocab_size()).to(runtime.device)
    stage = Stage(FIT, model, config, config.num_epochs * _batches(config, data).per_epoch)
    return TrainState({MODEL: model}, stateful={FIT: stage}, total_steps=stage.total_steps, stage=FIT)


def train(config: Config, data: Data, state: TrainState) -> Iterator[Record]:
    """Train from where the stage is to its end; yields once per step."""

    def of_batch(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = module(batch["ids"])
        return cross_entropy(logits, batch["labels"], config), {"accuracy": (logits.argmax(1) == batch["labels"]).float().mean()}

    def of_valid(module: nn.Module) -> dict[str, float]:
        logits, labels = logits_of(module, data.valid), data.valid["labels"]
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"valid_loss": float(cross_entropy(logits, labels, config)), "valid_accuracy": float(accuracy)}

    yield from state.stateful[FIT].train(state, _batches(config, data), of_batch, of_valid)


def _batches(config: Config, data: Data) -> Batches:
    source = {name: data.train[name] for name in ("ids", "labels")}
    return Batches(source, config.seed, config.batch_size, config.batch_scaling)


@torch.no_grad()
def logits_of(module: nn.Module, split: dict[str, Tensor]) -> Tensor:
    """(N, C) of all texts of a split."""
    return torch.cat([module(ids) for ids in split["ids"].split(EVALUATION_BATCH)])
