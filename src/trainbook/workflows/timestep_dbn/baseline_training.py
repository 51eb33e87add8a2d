"""Trains what the chain must beat, each baseline at a rate of its own, and keeps each one's best epoch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trainbook.data import Batches
from trainbook.records import Record
from trainbook.schedule import learning_rate
from trainbook.state import TrainState
from trainbook.workflows.timestep_dbn.baselines import GRADIENT_BASELINES, RBM_BASELINES
from trainbook.workflows.timestep_dbn.chain_step import PlainStep, pays_to_compile
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.diffusion import flip_schedule
from trainbook.workflows.timestep_dbn.early_stopping import EarlyStopping
from trainbook.workflows.timestep_dbn.optimizers import attach_optimizer, rbm_update, rbm_views
from trainbook.workflows.timestep_dbn.stages import BASELINES, Plan
from trainbook.workflows.timestep_dbn.validation import baseline_values

VALIDATE_EVERY = 4  # epochs


def plain_rbm_config(config: Config) -> Config:
    """The config as the plain RBMs' optimizer reads it."""
    return config.model_copy(update={"weight_decay": config.baseline_weight_decay})


def train_baselines(config: Config, codes: dict[str, list[Tensor]], state: TrainState, plan: Plan) -> Iterator[Record]:
    """The plain RBMs by persistent contrastive divergence, logistic chain and denoiser by gradient, side by side."""
    bits, valid = (torch.cat(codes[split], 1) for split in ("train", "valid"))
    schedule = flip_schedule(config.timesteps, config.schedule).to(bits.device)
    fresh = state.step == plan.baselines_begin
    rbms = {name: state.modules[name] for name in RBM_BASELINES}
    if fresh:
        state.modules["independent_bits"].fit(bits)
        state.modules["logistic_chain"].initialise(bits.mean(0), schedule)
        state.modules["denoiser"].initialise(bits.mean(0))
        for rbm in rbms.values():
            rbm.initialise_visible_bias(bits.mean(0, keepdim=True))
    views = {name: rbm_views(rbm, 0, 1) for name, rbm in rbms.items()}
    plain = plain_rbm_config(config)
    step_optimizers = {name: attach_optimizer(plain, state, name, [view], fresh) for name, view in views.items()}
    rates = {"monolithic_rbm": config.monolithic_rbm_learning_rate, "small_rbm": config.small_rbm_learning_rate}
    updates = {"monolithic_rbm": 1, "small_rbm": config.small_rbm_updates}  # per step
    compiled = pays_to_compile(config, state.modules["dbn"], plan.block_steps * len(plan.blocks))
    step_rbms = {name: PlainStep(config, rbm, stream, compiled) for stream, (name, rbm) in enumerate(rbms.items(), 1)}
    batches = Batches({"bits": bits}, config.seed, config.batch_size)
    state.stage = BASELINES
    while state.step < plan.total_steps:
        step = state.step - plan.baselines_begin
        for name, view in views.items():
            for index in range(updates[name] * step, updates[name] * (step + 1)):
                rate = learning_rate(config.optimization(rates[name]), index, updates[name] * plan.baseline_steps)
                step_rbms[name](batches(index)["bits"], index, rbm_update(plain, view, rate))
                step_optimizers[name](rate)
        batch = batches(step)["bits"]
        metrics: dict[str, Any] = {}
        for name in GRADIENT_BASELINES:
            report = state.stateful[name].step(batch, lambda model, clean: model.loss(clean, schedule))
            metrics[f"{name}_loss"] = report["loss"]
        state.step += 1
        last = state.step == plan.total_steps
        epoch, position = divmod(step + 1, plan.steps_per_epoch)
        if last or (position == 0 and epoch % VALIDATE_EVERY == 0):
            for name, values in baseline_values(state.modules, valid, schedule, config.seed).items():
                keeper: EarlyStopping = state.stateful[f"{name}_best"]
                keeper.judge(0, values, epoch)
                metrics[f"{name}_valid"] = values.mean()
                if last:
                    keeper.restore(0, len(values))
        yield Record(metrics, last, config.batch_size)
