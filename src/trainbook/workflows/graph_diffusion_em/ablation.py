"""Do four heads converge faster? Five arms of equal size, paired seeds, steps to fixed held-out losses."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainbook.data import Batches, Data
from trainbook.fitting import Stage
from trainbook.records import Record
from trainbook.seeding import step_seed
from trainbook.state import TrainState
from trainbook.workflows.graph_diffusion_em.config import Config
from trainbook.workflows.graph_diffusion_em.network import ARMS, Arm, UnrolledDenoiser
from trainbook.workflows.graph_diffusion_em.objective import HeldOut, batch_loss

FIXED = (0.13, 0.10)
BEST_FACTOR = 1.01  # the third threshold: so many times the best loss of the arm with one head, seed by seed
SMOOTHING = 0.5  # share of the running mean kept at each measurement
RESAMPLES = 4000


class Ablation(nn.Module):
    """Held-out losses of every arm and seed, (arms, seeds, measurements), filled as the stage goes on."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        number = config.ablation_steps // config.ablation_every
        self.register_buffer("losses", torch.zeros(len(ARMS), config.ablation_seeds, number))


class ArmStage:
    """Trains one arm after the other, seed by seed; only the arm under way is kept.

    Arms of one seed see the same batches with the same noise. Keep it in `TrainState.stateful`.
    """

    def __init__(self, config: Config, channels: int, device: str) -> None:
        self.config = config.model_copy(
            update={"validate_every": config.ablation_every, "patience": 0, "ema_decay": 0.0, "schedule": "constant"}
        )
        self.channels, self.device = channels, device
        self.steps_done, self.total_steps = 0, len(ARMS) * config.ablation_seeds * config.ablation_steps
        self._stage = self._build(0)

    def _build(self, index: int) -> Stage:
        """Run number `index`: an arm's network from the seed's own random numbers."""
        seed, arm = divmod(index, len(ARMS))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(step_seed(self.config.seed, seed))
            model = build_arm(self.config, self.channels, ARMS[arm])
        return Stage("ablation", model.to(self.device), self.config, self.config.ablation_steps)

    def train(self, state: TrainState, data: Data) -> Iterator[Record]:
        """From where the stage is to its end; yields once per step."""
        config, results = self.config, state.modules["ablation"].losses
        held_out = HeldOut(config, data)
        while self.steps_done < self.total_steps:
            index, step = divmod(self.steps_done, config.ablation_steps)
            if step == 0:
                self._stage = self._build(index)
            seed, arm = divmod(index, len(ARMS))
            batches = Batches(data.train, step_seed(config.seed, seed) % 2**31, config.batch_size)
            before = state.total_steps  # a stage takes off what it leaves out, which is nothing
            for record in self._stage.train(state, batches, self._loss(seed), held_out):
                step += 1
                self.steps_done += 1
                value, metrics = record.metrics.get("valid_loss"), {}
                if value is not None and step % config.ablation_every == 0:
                    results[arm, seed, step // config.ablation_every - 1] = value
                    metrics = {"arm_held_out_loss": value, "arm": arm, "arm_seed": seed, "arm_step": step}
                yield Record(metrics, record.milestone and index + 1 == len(ARMS) * config.ablation_seeds, record.examples)
            state.total_steps = before

    def _loss(self, seed: int) -> Any:
        def noisy_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            device = batch["crops"].device
            generator = torch.Generator(device).manual_seed(step_seed(self.config.seed, self._stage.stepper.steps_done, seed))
            return batch_loss(self.config, model, batch["crops"], generator)

        return noisy_loss

    def state_dict(self) -> dict[str, Any]:
        """The arm under way with its weights, and how many steps are done."""
        return {"steps_done": self.steps_done, "stage": self._stage.state_dict(), "module": self._stage.module.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.steps_done = saved["steps_done"]
        index = max(0, self.steps_done - 1) // self.config.ablation_steps
        self._stage = self._build(index)
        self._stage.module.load_state_dict(saved["module"])
        self._stage.load_state_dict(saved["stage"])


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Running exponential mean along the last axis, from the first value."""
    found = losses.astype(float).copy()
    for index in range(1, losses.shape[-1]):
        found[..., index] = SMOOTHING * found[..., index - 1] + (1 - SMOOTHING) * losses[..., index]
    return found


def steps_to(losses: np.ndarray, thresholds: np.ndarray | float, every: int) -> np.ndarray:
    """First measured step at or below a threshold; infinite where it was not reached (censored).

    Args:
        losses: smoothed, (..., measurements).
        thresholds: one, or one per leading index.
        every: steps between measurements.
    """
    below = losses <= np.asarray(thresholds)[..., None]
    return np.where(below.any(-1), (below.argmax(-1) + 1.0) * every, np.inf)


def median_ratio(ours: np.ndarray, others: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Median over paired seeds of ours / others, and its 95 % bootstrap interval; a pair with nobody there counts as 1.

    A run that never got there counts as infinitely slow: the ratio is 0 or infinite, which a median bears.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(np.isinf(ours) & np.isinf(others), 1.0, np.where(np.isinf(others), 0.0, ours / others))
    drawn = np.random.default_rng(seed).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    medians = np.quantile(ratios[drawn], 0.5, axis=1, method="nearest")  # an interpolation has no meaning at infinity
    low, high = np.quantile(medians, [0.025, 0.975], method="nearest")
    return float(np.quantile(ratios, 0.5, method="nearest")), float(low), float(high)


def thresholds_of(losses: np.ndarray) -> dict[str, np.ndarray]:
    """Name to threshold per seed: the fixed ones, and 1.01 times the best of one head."""
    seeds = losses.shape[1]
    fixed = {f"{value:.2f}": np.full(seeds, value) for value in FIXED}
    return {**fixed, "final": BEST_FACTOR * losses[ARMS.index("one_head")].min(-1)}


def build_arm(config: Config, channels: int, arm: Arm) -> UnrolledDenoiser:
    """An arm's network from torch's random numbers."""
    return UnrolledDenoiser(channels, config.patch_size, config.ablation_width, config.network_rounds, arm)


@torch.no_grad()
def flops(config: Config, channels: int, arm: Arm) -> int:
    """Floating-point operations of an arm's forward pass over one crop, counted by torch."""
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        build_arm(config, channels, arm)(torch.zeros(1, channels, config.crop_size, config.crop_size), 1.0)
    return counter.get_total_flops()


def ablation_metrics(config: Config, results: Tensor, channels: int) -> dict[str, float]:
    """Per arm and threshold: steps as a ratio to one head's (below 1 is faster) with its interval, censored runs, final loss.

    flops_ratio is that of the operations of a step; multiplied by steps_ratio it is that of all work. Ratios that are not finite
    are left out: then `runs_censored` says why.
    """
    losses = smoothed(results.cpu().numpy())
    limits, metrics = thresholds_of(losses), {}
    reference = flops(config, channels, "one_head")
    for index, arm in enumerate(ARMS):
        metrics[f"{arm}/flops_ratio"] = flops(config, channels, arm) / reference
        metrics[f"{arm}/arm_final_loss"] = float(losses[index, :, -1].mean())
        for name, limit in limits.items():
            steps = steps_to(losses, limit[None], config.ablation_every)
            metrics[f"{arm}/runs_censored_{name}"] = float(np.isinf(steps[index]).sum())
            ratio, low, high = median_ratio(steps[index], steps[ARMS.index("one_head")])
            values = {"": ratio, "_low": low, "_high": high}
            metrics |= {f"{arm}/steps_ratio_{name}{end}": v for end, v in values.items() if np.isfinite(v)}
    return metrics
