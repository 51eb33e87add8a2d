"""Builds and trains: codebook by EM, diffusion times by EM, the network by gradient, then the arms of the ablation."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trainbook.data import Batches, Data
from trainbook.fitting import Stage
from trainbook.records import Record
from trainbook.runtime import Runtime
from trainbook.state import TrainState
from trainbook.workflows.graph_diffusion_em.ablation import Ablation, ArmStage
from trainbook.workflows.graph_diffusion_em.codebook import (
    TIME_STEPS,
    DiffusionTime,
    Iterations,
    codebook_step,
    graph_spectra,
    start_codebook,
    time_step,
    training_patches,
)
from trainbook.workflows.graph_diffusion_em.config import Config
from trainbook.workflows.graph_diffusion_em.network import UnrolledDenoiser
from trainbook.workflows.graph_diffusion_em.objective import HeldOut, batch_loss, to_working, working_sigma

CODEBOOK, TIME, NETWORK, ABLATION = "codebook", "diffusion_time", "network", "ablation"


class HeldOutLosses(nn.Module):
    """Loss of the network on held-out crops: before training, then after each epoch; 0 where there was none yet."""

    def __init__(self, num_epochs: int) -> None:
        super().__init__()
        self.register_buffer("losses", torch.zeros(num_epochs + 1, dtype=torch.float64))


def build(config: Config, data: Data, runtime: Runtime) -> TrainState:
    """Modules and stages of a run, on the runtime's device."""
    crops = data.train["crops"]
    channels = crops.shape[1]
    modules: dict[str, nn.Module] = {
        CODEBOOK: start_codebook(config, training_patches(config, data)),
        TIME: DiffusionTime(channels * config.patch_size**2, runtime.device),
    }
    stateful = {CODEBOOK: Iterations(config.em_iterations), TIME: Iterations(TIME_STEPS)}
    if config.network != "none":
        model = UnrolledDenoiser(channels, config.patch_size, config.width, config.network_rounds)
        modules |= {NETWORK: model.to(runtime.device), "held_out": HeldOutLosses(config.num_epochs)}
        steps = len(crops) // config.batch_size
        validating = config.model_copy(update={"validate_every": config.validate_every or steps})
        stateful[NETWORK] = Stage(NETWORK, model, validating, steps * config.num_epochs)
    if config.ablation_seeds:
        modules[ABLATION] = Ablation(config)
        stateful[ABLATION] = ArmStage(config, channels, runtime.device)
    total = sum(part.total_steps for part in stateful.values())
    return TrainState(modules, stateful=stateful, total_steps=total, stage=CODEBOOK)


def train(config: Config, data: Data, state: TrainState) -> Iterator[Record]:
    """Train stage after stage from where each one is; yields once per step."""
    yield from _fit_codebook(config, data, state)
    yield from _fit_times(config, data, state)
    if NETWORK in state.stateful:
        yield from _train_network(config, data, state)
    if ABLATION in state.stateful:
        yield from state.stateful[ABLATION].train(state, data)


def _fit_codebook(config: Config, data: Data, state: TrainState) -> Iterator[Record]:
    part: Iterations = state.stateful[CODEBOOK]
    if part.steps_done < part.total_steps:
        z = training_patches(config, data)
        state.stage = CODEBOOK
    while part.steps_done < part.total_steps:
        metrics = codebook_step(config, state.modules[CODEBOOK], z)
        part.steps_done += 1
        state.step += 1
        yield Record(metrics, part.steps_done == part.total_steps, len(z))


def _fit_times(config: Config, data: Data, state: TrainState) -> Iterator[Record]:
    part: Iterations = state.stateful[TIME]
    if part.steps_done < part.total_steps:
        spectra = graph_spectra(config, state.modules[CODEBOOK], to_working(config, data.train["crops"]), working_sigma(config))
        state.stage = TIME
    while part.steps_done < part.total_steps:
        metrics = time_step(state.modules[TIME], spectra, working_sigma(config))
        part.steps_done += 1
        state.step += 1
        yield Record(metrics, part.steps_done == part.total_steps)


def _train_network(config: Config, data: Data, state: TrainState) -> Iterator[Record]:
    def noisy_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return batch_loss(config, model, batch["crops"])

    stage, losses, held_out = state.stateful[NETWORK], state.modules["held_out"].losses, HeldOut(config, data)
    if stage.stepper.steps_done == 0:
        with torch.no_grad():
            losses[0] = held_out(state.modules[NETWORK])["valid_loss"]
    batches = Batches(data.train, config.seed, config.batch_size, config.batch_scaling)
    for record in stage.train(state, batches, noisy_loss, held_out):
        epoch, rest = divmod(stage.stepper.steps_done, batches.per_epoch)
        if rest == 0 and "valid_loss" in record.metrics:
            losses[epoch] = record.metrics["valid_loss"]
        yield record
