"""Builds and trains the transformer: every hour's forecast and risk at once."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from trainbook.data import Batches, Data
from trainbook.fitting import Stage
from trainbook.losses import widened
from trainbook.records import Record
from trainbook.runtime import Runtime
from trainbook.state import TrainState
from trainbook.workflows.clinical_series.config import Config
from trainbook.workflows.clinical_series.data import targets
from trainbook.workflows.clinical_series.model import PatchTransformer

MODEL, FIT = "model", "fit"
INPUTS = ("values", "observed", "static")


def build(config: Config, data: Data, runtime: Runtime) -> TrainState:
    """The model, scaled by the training readings, and its stage."""
    values, observed = data.train["values"], data.train["observed"]
    count = observed.sum((0, 1)).clamp(min=1)
    mean = values.double().sum((0, 1)) / count
    deviation = (((values - mean) * observed).square().sum((0, 1)) / count).sqrt().clamp(min=1e-6)
    model = PatchTransformer(config, mean.float(), deviation.float(), data.train["static"].shape[1]).to(runtime.device)
    batches = Batches(data.train, config.seed, config.batch_size, config.batch_scaling)
    stage = Stage(FIT, model, config, config.num_epochs * batches.per_epoch)
    return TrainState({MODEL: model}, stateful={FIT: stage}, total_steps=stage.total_steps, stage=FIT)


def train(config: Config, data: Data, state: TrainState) -> Iterator[Record]:
    """Train from where the stage is to its end; yields once per step."""
    model = state.modules[MODEL]

    def of_batch(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return loss(config, model, module(*(batch[name] for name in INPUTS)), batch)

    def of_valid(module: nn.Module) -> dict[str, float]:
        found = loss(config, model, module(*(data.valid[name] for name in INPUTS)), data.valid, last_only=True)
        return {"valid_loss": float(found[0])} | {f"valid_{name}": float(value) for name, value in found[1].items()}

    batches = Batches(data.train, config.seed, config.batch_size, config.batch_scaling)
    yield from state.stateful[FIT].train(state, batches, of_batch, of_valid)


def loss(
    config: Config, model: PatchTransformer, outputs: tuple[Tensor, Tensor], batch: dict[str, Tensor], last_only: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over patients of the cross entropy of the outcome (nats) plus forecast_weight times the squared error.

    Both are means over a patient's tokens, the squared error over what was observed, in deviations of the training readings. A
    patient without a known outcome or an observed future counts with 0 there.

    Args:
        config: its `forecast_weight`.
        model: standardises the targets.
        outputs: of the model.
        batch: as `load_data` describes it.
        last_only: judge only the last token, as the evaluation does.
    """
    forecast, risk = (widened(tensor) for tensor in outputs)
    expected, is_there = targets(config, batch)
    outcomes = batch["outcomes"]
    if last_only:
        forecast, risk, expected, is_there = forecast[:, -1:], risk[:, -1:], expected[:, -1:], is_there[:, -1:]
    known = (outcomes >= 0).float()
    told = (outcomes * known).unsqueeze(1).expand_as(risk)
    cross_entropy = (binary_cross_entropy_with_logits(risk, told, reduction="none").mean(1) * known).mean()
    error = (forecast - model.standardise(expected)).square() * is_there
    squared_error = (error.flatten(1).sum(1) / is_there.flatten(1).sum(1).clamp(min=1)).mean()
    total = cross_entropy + config.forecast_weight * squared_error
    return total, {"cross_entropy": cross_entropy.detach(), "squared_error": squared_error.detach()}


@torch.no_grad()
def predict(config: Config, state: TrainState, split: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Forecasts in the variables' units, (N, H, V), and risks in [0, 1], (N,), from the last token, on the CPU."""
    model = state.modules[MODEL].eval()
    chunks = zip(*(split[name].split(512) for name in INPUTS), strict=True)
    found = [tuple(out[:, -1] for out in model(*chunk)) for chunk in chunks]
    forecast, risk = (torch.cat(part) for part in zip(*found, strict=True))
    return (forecast * model.deviation + model.mean).cpu(), risk.sigmoid().cpu()
