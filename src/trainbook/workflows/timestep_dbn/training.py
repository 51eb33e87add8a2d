"""Builds and trains the timestep-specific DBN: autoencoder, then the chain block by block, then the baselines."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trainbook.data import Batches, Data
from trainbook.errors import RunFailed, is_out_of_memory
from trainbook.fitting import Stage
from trainbook.monitor import free_memory_bytes
from trainbook.records import Record
from trainbook.runtime import Runtime
from trainbook.schedule import learning_rate
from trainbook.seeding import seed_step
from trainbook.state import TrainState
from trainbook.stepper import Stepper
from trainbook.workflows.timestep_dbn.autocorrelation import measure, settle_sweeps
from trainbook.workflows.timestep_dbn.autoencoder import BinaryAutoencoder, autoencoder_loss, encode_all, level_sizes
from trainbook.workflows.timestep_dbn.baseline_training import plain_rbm_config, train_baselines
from trainbook.workflows.timestep_dbn.baselines import RBM_BASELINES, IndependentBits, LogisticChain, monolithic_rbm, small_rbm
from trainbook.workflows.timestep_dbn.blocks import CPU_TILE, METRIC_ROWS, Blocks, release
from trainbook.workflows.timestep_dbn.chain import TimestepDBN, diffuse, fields
from trainbook.workflows.timestep_dbn.chain_step import ChainStep, pays_to_compile
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.correlation_penalty import CorrelationPenalty
from trainbook.workflows.timestep_dbn.denoiser import Denoiser
from trainbook.workflows.timestep_dbn.diagnostics import dead_bits, health, hints
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule, flip_schedule
from trainbook.workflows.timestep_dbn.early_stopping import EarlyStopping
from trainbook.workflows.timestep_dbn.later_stages import (
    later_keepers,
    later_modules,
    later_optimizers,
    train_later,
)
from trainbook.workflows.timestep_dbn.likelihood import chain_factors
from trainbook.workflows.timestep_dbn.optimizers import attach_optimizer, rbm_adam, rbm_update, rbm_views
from trainbook.workflows.timestep_dbn.pretrained import check_codes
from trainbook.workflows.timestep_dbn.rbm import Block, log_pseudo_likelihood
from trainbook.workflows.timestep_dbn.self_test import check_computation
from trainbook.workflows.timestep_dbn.stages import AUTOENCODER, CHAIN, Plan
from trainbook.workflows.timestep_dbn.validation import chain_values, same_numbers

BLOCKS, PENALTY = "blocks", "correlation_penalty"
METRIC_BITS = 64  # bits per level that the per-epoch pseudo-likelihood looks at


def build(config: Config, data: Data, runtime: Runtime) -> TrainState:
    """Modules and optimizers of a run, on the runtime's device."""
    images = data.train["images"]
    autoencoder = BinaryAutoencoder(images.shape[1], config.code_channels, config.autoencoder_width).to(runtime.device)
    stateful: dict[str, Any] = {}
    if not config.autoencoder:
        optimization = config.optimization(config.autoencoder_learning_rate)
        stateful[AUTOENCODER] = Stage(
            AUTOENCODER, autoencoder, optimization, len(images) // config.batch_size * config.autoencoder_epochs
        )
    if config.stage == AUTOENCODER:
        total = Plan.of(config, len(images)).total_steps
        return TrainState({AUTOENCODER: autoencoder}, {}, stateful, total_steps=total, stage=AUTOENCODER)
    sizes = level_sizes(images.shape[2:], config.code_channels)
    dbn = TimestepDBN(config, sizes)
    num_parameters = sum(p.numel() for p in dbn.parameters())
    modules: dict[str, nn.Module] = {
        AUTOENCODER: autoencoder,
        "dbn": dbn,
        "monolithic_rbm": monolithic_rbm(sum(sizes), num_parameters, config.batch_size),
        "small_rbm": small_rbm(sum(sizes), config.batch_size),
        "logistic_chain": LogisticChain(config.timesteps, sum(sizes)),
        "denoiser": Denoiser.of_size(config.timesteps, sum(sizes), num_parameters),
        "independent_bits": IndependentBits(sum(sizes)),
        **later_modules(config, dbn),
    }
    for module in modules.values():
        module.to(runtime.device)
    free_bytes = free_memory_bytes(runtime.device, runtime.memory_limit)
    num_images = len(images) + len(data.valid["images"])
    stateful[BLOCKS] = Blocks(config, dbn, num_images, runtime.device == "cpu", free_bytes)
    plan = Plan.of(config, len(images), stateful[BLOCKS].bounds)
    stateful |= training_parts(config, modules, plan)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if config.optimizer == "adam":
        optimizers["dbn"] = rbm_adam(config, [rbm_views(level, *plan.blocks[0]) for level in dbn.levels])
        plain = plain_rbm_config(config)
        optimizers.update({name: rbm_adam(plain, [rbm_views(modules[name], 0, 1)]) for name in RBM_BASELINES})
        optimizers.update(later_optimizers(config, modules, plan.blocks[0]))
    return TrainState(
        modules, optimizers, stateful, total_steps=plan.total_steps, stage=AUTOENCODER if plan.autoencoder_steps else CHAIN
    )


def training_parts(config: Config, modules: dict[str, nn.Module], plan: Plan) -> dict[str, Any]:
    """What trains the baselines by gradient, and what keeps the best epoch of the chain and of every baseline."""
    rates = {"logistic_chain": config.baseline_learning_rate, "denoiser": config.denoiser_learning_rate}
    members = {name: [list(modules[name].parameters())] for name in (*RBM_BASELINES, "logistic_chain")}
    members["denoiser"] = [[parameter.unsqueeze(0) for parameter in modules["denoiser"].parameters()]]  # one for all timesteps
    penalty = {PENALTY: CorrelationPenalty(config, modules["dbn"])} if config.correlation_threshold else {}
    return {
        **penalty,
        **{name: Stepper(modules[name], config.optimization(rate), plan.baseline_steps) for name, rate in rates.items()},
        "early_stopping": EarlyStopping([list(level.parameters()) for level in modules["dbn"].levels], config.patience),
        **later_keepers(config, modules),
        **{f"{name}_best": EarlyStopping(tensors, 0) for name, tensors in members.items()},
    }


def train(config: Config, data: Data, state: TrainState) -> Iterator[Record]:
    """Train stage after stage from `state.step`; yields once per step. The first record holds the self-test's deviations.

    Raises:
        RunFailed: when the self-test fails, or some timestep made no update in an epoch.
        UserError: before the first step, when a pre-trained autoencoder does not code the images.
    """
    deviations = check_computation(data.train["images"].device)  # in every session: it may be another machine
    for record in _train_stages(config, data, state):
        if state.step == 1:
            record.metrics["self_test"] = deviations
        yield record


def _train_stages(config: Config, data: Data, state: TrainState) -> Iterator[Record]:
    plan = _plan(config, data, state)
    if config.autoencoder and state.step == 0:
        check_codes(state.modules[AUTOENCODER], config, data.valid["images"])
    if state.step < plan.autoencoder_steps:
        yield from _train_autoencoder(config, data, state)
    if state.step < plan.total_steps:
        codes = {split: encode_all(state.modules["autoencoder"], getattr(data, split)["images"]) for split in ("train", "valid")}
        if state.step < plan.chain_end:
            yield from _train_chain(config, data, codes, state)
        if config.optimizer == "adam":
            release(state.optimizers["dbn"], 0)
        plan = _plan(config, data, state)
        yield from train_later(config, codes, state, plan.blocks, plan.chain_end)
        yield from train_baselines(config, codes, state, plan)


def _plan(config: Config, data: Data, state: TrainState) -> Plan:
    """The plan with the blocks that the state says, which memory may have made smaller; keeps `state.total_steps` up to date."""
    plan = Plan.of(config, len(data.train["images"]), state.stateful[BLOCKS].bounds if BLOCKS in state.stateful else ())
    state.total_steps = plan.total_steps
    return plan


def _train_autoencoder(config: Config, data: Data, state: TrainState) -> Iterator[Record]:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return autoencoder_loss(model, batch["images"], config.confidence_weight, config.balance_weight)

    batches = Batches({"images": data.train["images"]}, config.seed, config.batch_size)
    yield from state.stateful[AUTOENCODER].train(state, batches, loss)


def _train_chain(config: Config, data: Data, codes: dict[str, list[Tensor]], state: TrainState) -> Iterator[Record]:
    """Block after block; where memory runs out the block is halved and goes on from where it is."""
    planned: Blocks = state.stateful[BLOCKS]
    planned.announce()
    state.stage = CHAIN
    while state.step < (plan := _plan(config, data, state)).chain_end:
        start = plan.blocks[(state.step - plan.autoencoder_steps) // plan.block_steps][0]
        try:
            yield from _train_block(config, codes, state, plan)
            continue
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        planned.halve(start)  # outside the handler: the traceback held what filled the memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        seed_step(config.seed, state.step)  # the step is taken again


def _train_block(config: Config, codes: dict[str, list[Tensor]], state: TrainState, plan: Plan) -> Iterator[Record]:
    dbn: TimestepDBN = state.modules["dbn"]
    device = codes["train"][0].device
    schedule = flip_schedule(config.timesteps, config.schedule).to(device)
    batches = Batches(dict(enumerate(codes["train"])), config.seed, config.batch_size)
    optimization = config.optimization(config.learning_rate)
    block_index, block_step = divmod(state.step - plan.autoencoder_steps, plan.block_steps)
    start, stop = plan.blocks[block_index]
    stopping: EarlyStopping = state.stateful["early_stopping"]
    penalty: CorrelationPenalty | None = state.stateful.get(PENALTY)
    if config.optimizer == "adam":  # before the next one's gradients come
        release(state.optimizers["dbn"], stop - start if block_step else 0)
    if block_step == 0:
        _begin_block(dbn, codes["train"], schedule.cumulative[start:stop], start, stop)
        if penalty:
            penalty.begin(start, stop)
        stopping.begin(start, stop)
    views = [rbm_views(level, start, stop) for level in dbn.levels]
    step_optimizer = attach_optimizer(config, state, "dbn", views, fresh=block_step == 0)
    blocks = dbn.blocks(start, stop)
    tile = min(CPU_TILE, stop - start) if device.type == "cpu" else stop - start
    compiled = pays_to_compile(config, dbn, plan.block_steps * len(plan.blocks))
    chain_step = ChainStep(config, dbn, tile, compiled)
    active = stopping.active(start, stop, tile)
    while block_step < plan.block_steps:
        epoch, position = divmod(block_step + 1, plan.steps_per_epoch)
        metrics: dict[str, Any] = {}
        if active:  # else every timestep of the block is stopped, and its remaining steps do nothing
            clean = list(batches(block_step).values())
            rate = learning_rate(optimization, block_step, plan.block_steps)
            before = [block.weight.detach().clone() for block in blocks] if position == 0 else []
            updates = [rbm_update(config, view, rate) for view in views]
            for first, last in active:
                parts = [update.at(slice(first - start, last - start)) for update in updates]
                chain_step(clean, state.step, first, last, parts)
                if penalty:
                    penalty.apply(dbn, clean, schedule, first, last, parts)
            step_optimizer(rate)
            if position == 0:
                stopped = stopping.hold(start, stop)
                with same_numbers(config.seed, device):
                    metrics = _epoch_metrics(dbn, blocks, codes, schedule, start, stop, before, stopped)
                state.stateful[BLOCKS].count(start, metrics["update_norm_by_timestep_and_level"])
                likelihoods = metrics["pseudo_likelihood_by_timestep_and_level"]
                values = chain_values(likelihoods, dbn.level_sizes, config.context)
                if penalty:  # it trades likelihood for mixing: what it came to is kept, not what it came from
                    values = torch.full_like(values, epoch)
                kept = stopping.judge(start, values, epoch)
                active = stopping.active(start, stop, tile)
                metrics = {"epoch": epoch, "first_timestep": start + 1, **metrics, "kept_epoch_by_timestep_and_level": kept}
                if penalty:
                    correlation = measure(chain_factors(dbn, schedule), codes["valid"], start, stop, config.correlation_lag)
                    metrics["chain_autocorrelation_by_timestep_and_level"] = slowest = correlation[..., -1].amax(-1)
                    metrics["correlation_penalty_by_timestep_and_level"] = penalty.adapt(start, slowest)
                metrics["hints"] = hints(metrics)
        if block_step + 1 == plan.block_steps:
            stopping.restore(start, stop)
            metrics |= settle_sweeps(config, dbn.sampling_sweeps, chain_factors(dbn, schedule), codes["valid"], start, stop)
        block_step += 1
        state.step += 1
        yield Record(metrics, block_step == plan.block_steps, config.batch_size)


@torch.no_grad()
def _begin_block(dbn: TimestepDBN, codes: list[Tensor], cumulative: Tensor, start: int, stop: int) -> None:
    """Start a block from the last timestep before it; the first block from the independent model of its bits."""
    for level, code in zip(dbn.levels, codes, strict=True):
        if start:
            level.start_from(start - 1, start, stop)
        else:
            mean = code.mean(0) * (1 - 2 * cumulative.unsqueeze(1)) + cumulative.unsqueeze(1)  # of z_{t-1}
            level.visible_bias[start:stop] = torch.logit(mean.clamp(0.02, 0.98))


@torch.no_grad()
def _epoch_metrics(
    dbn: TimestepDBN,
    blocks: list[Block],
    codes: dict[str, list[Tensor]],
    schedule: FlipSchedule,
    start: int,
    stop: int,
    before: list[Tensor],
    stopped: Tensor,
) -> dict[str, Any]:
    """Per (timestep, level): reconstruction error, pseudo-likelihood, free-energy gap, update norm; and their means.

    Raises:
        RunFailed: when the weights of some timestep did not move at all.
    """
    per_split = {}
    for split, levels in codes.items():
        previous, noisy = diffuse([code[:METRIC_ROWS] for code in levels], schedule, start, stop)
        contexts, field = dbn.contexts(blocks, previous, noisy), fields(noisy, schedule.coupling[start + 1 : stop + 1])
        per_split[split] = list(zip(blocks, previous, field, [bias for _, bias in contexts], strict=True))
    valid, num_bits = per_split["valid"], [code.shape[1] for code in codes["train"]]
    energies = {split: [b.free_energy(z, bias).mean(1) for b, z, _, bias in rows] for split, rows in per_split.items()}
    errors = [(z - b.visible_logit(b.hidden_logit(z, bias).sigmoid(), f).sigmoid()).abs().mean((1, 2)) for b, z, f, bias in valid]
    likelihoods = [log_pseudo_likelihood(b, z, bias, f, METRIC_BITS) for b, z, f, bias in valid]
    gaps = [(v - t) / size for v, t, size in zip(energies["valid"], energies["train"], num_bits, strict=True)]
    stopped = stopped.to(gaps[0].device)
    norms = [(b.weight - old).square().mean((1, 2)).sqrt() for b, old in zip(blocks, before, strict=True)]
    norms = [norm.masked_fill(stopped, 0.0) for norm in norms]
    still = [start + 1 + int(t) for norm in norms for t in ((norm == 0) & ~stopped).nonzero()]
    if still:
        raise RunFailed(f"timesteps {sorted(set(still))} made no update in the last step of an epoch; raise the learning rate")
    beta = schedule.beta[start + 1 : stop + 1]
    alive = [health(b, z, bias, f, beta) for b, z, f, bias in valid]
    named = {
        "reconstruction_error": errors,
        "pseudo_likelihood": likelihoods,
        "free_energy_gap": gaps,
        "update_norm": norms,
    }
    tables = {name: torch.stack(values, 1) for name, values in named.items()}  # (T, level)
    return {
        **{f"mean_{name}": table.mean() for name, table in tables.items()},
        **{f"{name}_by_timestep_and_level": table for name, table in tables.items()},
        **{f"{name}_by_timestep_and_level": torch.stack([level[name] for level in alive], 1) for name in alive[0]},
        "dead_bits_by_level": dead_bits(codes["train"]),
    }
