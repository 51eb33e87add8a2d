"""Small runs of the timestep-specific DBN, driven as the engine drives them."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tests.workflows.timestep_dbn.enumeration import all_bits
from trainbook.data import Data
from trainbook.runtime import Runtime
from trainbook.seeding import seed_step
from trainbook.state import TrainState
from trainbook.workflows.timestep_dbn.baselines import IndependentBits, LogisticChain, monolithic_rbm, small_rbm
from trainbook.workflows.timestep_dbn.blocks import Blocks
from trainbook.workflows.timestep_dbn.chain import TimestepDBN
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.denoiser import Denoiser
from trainbook.workflows.timestep_dbn.images import load_data
from trainbook.workflows.timestep_dbn.later_stages import later_modules, later_optimizers
from trainbook.workflows.timestep_dbn.stages import Plan
from trainbook.workflows.timestep_dbn.training import build, rbm_adam, rbm_views, train, training_parts


class BitCodes(nn.Module):
    """Stands where the autoencoder stands when the images are the bits themselves."""

    def __init__(self, level_sizes: list[int]) -> None:
        super().__init__()
        self.level_sizes = level_sizes

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Bits per level; (B, 1, 1, V) -> [(B, V_l)]."""
        return images.flatten(1).split(self.level_sizes, 1)


def bits_data(train: Tensor, valid: Tensor, test: Tensor) -> Data:
    """A data set whose images are rows of bits."""
    splits = ({"images": bits.float().view(len(bits), 1, 1, -1)} for bits in (train, valid, test))
    return Data(*splits, source="test", licence="", sha256="", synthetic=True)


def bits_state(config: Config, level_sizes: list[int], num_images: int) -> TrainState:
    """A run's state at the end of the autoencoder stage, with bits for codes."""
    torch.manual_seed(config.seed)
    dbn, num_bits, plan = TimestepDBN(config, level_sizes), sum(level_sizes), Plan.of(config, num_images)
    monolithic = monolithic_rbm(num_bits, sum(p.numel() for p in dbn.parameters()), config.batch_size)
    small = small_rbm(num_bits, config.batch_size)
    modules = {
        "autoencoder": BitCodes(level_sizes),
        "dbn": dbn,
        "monolithic_rbm": monolithic,
        "small_rbm": small,
        "logistic_chain": LogisticChain(config.timesteps, num_bits),
        "denoiser": Denoiser(config.timesteps, num_bits, 8),
        "independent_bits": IndependentBits(num_bits),
        **later_modules(config, dbn),
    }
    optimizers = {
        "dbn": rbm_adam(config, [rbm_views(level, *plan.blocks[0]) for level in dbn.levels]),
        "monolithic_rbm": rbm_adam(config, [rbm_views(monolithic, 0, 1)]),
        "small_rbm": rbm_adam(config, [rbm_views(small, 0, 1)]),
        **later_optimizers(config, modules, plan.blocks[0]),
    }
    parts = {"blocks": Blocks(config, dbn, num_images, on_cpu=True, free_bytes=10**9), **training_parts(config, modules, plan)}
    return TrainState(modules, optimizers, parts, total_steps=plan.total_steps, step=plan.autoencoder_steps)


def drive(config: Config, data: Data, state: TrainState, stop: int | None = None) -> TrainState:
    """Train up to global step `stop`, seeding each step as the engine does."""
    records = train(config, data, state)
    while state.step < (state.total_steps if stop is None else stop):
        seed_step(config.seed, state.step)
        next(records)
    return state


def tensors(state: TrainState) -> dict[str, Tensor]:
    """Every parameter and buffer of a state, copied."""
    return {f"{n}.{k}": v.clone() for n, module in state.modules.items() for k, v in module.state_dict().items()}


def local_runtime(folder: Path) -> Runtime:
    """A CPU runtime that downloads nothing."""
    return Runtime("local", "cpu", "float32", runs_folder=folder, data_folder=folder, deadline=None)


STRIPE_SIZES = [4, 4, 1]


def bars_and_stripes() -> Tensor:
    """The 14 images of 3x3 pixels with equal rows or equal columns; corners, then edges, then the centre, (14, 9)."""
    lines = all_bits(3)
    images = torch.cat([lines.unsqueeze(2).expand(-1, -1, 3), lines.unsqueeze(1).expand(-1, 3, -1)]).flatten(1).unique(dim=0)
    return images[:, [0, 2, 6, 8, 1, 3, 5, 7, 4]]


def digits_run(tmp_path: Path, **choices) -> tuple[Config, Data, TrainState]:
    """A real run of a few steps: 64 digits, 4 steps per epoch, one epoch per stage."""
    config = Config(
        **{
            "max_train_images": 64, "batch_size": 16, "autoencoder_epochs": 1, "epochs_per_timestep": 1, "baseline_epochs": 1,
            "autoencoder_width": 4, "code_channels": (1, 1, 4), "timesteps": 3, "hidden_units": (6, 5, 4), **choices,
        }
    )  # fmt: skip
    data = load_data(config, local_runtime(tmp_path))
    torch.manual_seed(config.seed)
    return config, data, build(config, data, local_runtime(tmp_path))


def dbn_parameters(state: TrainState) -> list[Tensor]:
    """The chain's parameters, copied, (T, ...) each."""
    return [parameter.detach().clone() for parameter in state.modules["dbn"].parameters()]
