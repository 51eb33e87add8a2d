"""A stage of training by gradient: its steps, its validation, the best weights and when to end."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from trainbook import distributed
from trainbook.accumulation import LossFunction
from trainbook.data import Batches
from trainbook.errors import UserError
from trainbook.optimization import OptimizationConfig
from trainbook.records import Record
from trainbook.schedule import learning_rate
from trainbook.state import TrainState
from trainbook.stepper import Stepper


class Stage:
    """One stage of a run that trains a module by gradient; keep it in `TrainState.stateful`.

    When the stage ends the module holds the weights that were best on the validation split, where `validate_every` is
    set; else the average, where `ema_decay` is; else the last ones.

    Args:
        name: of the stage, as the records call it.
        module: what is trained.
        config: of the run.
        total_steps: of the stage.
    """

    def __init__(self, name: str, module: nn.Module, config: OptimizationConfig, total_steps: int) -> None:
        self.name, self.module, self.config, self.total_steps = name, module, config, total_steps
        self.stepper = Stepper(module, config, total_steps)
        self.best_step, self.best_value, self.finished, self.ending = 0, 0.0, False, ""
        self._best: dict[str, torch.Tensor] = {}
        self._without_best = 0

    def train(
        self,
        state: TrainState,
        batches: Batches,
        loss_function: LossFunction,
        validate: Callable[[nn.Module], dict[str, float]] | None = None,
    ) -> Iterator[Record]:
        """Train from where the stage is to its end; yields once per step, and nothing when it has ended before.

        Args:
            state: its `step` and `stage` are kept up to date.
            batches: step of the stage to batch.
            loss_function: (module, batch) -> mean loss, or that and a dict of further means.
            validate: module in evaluation mode -> metrics of the validation split, such as {"valid_loss": ...}.

        Raises:
            UserError: before the first step, when `validate` does not measure `best_metric`.
        """
        if not self.finished:
            state.stage = self.name
            validates = validate is not None and self.config.validate_every > 0
            if validates and self.stepper.steps_done == 0:
                self._check_metric(self._measure(validate))
        while not self.finished:
            step = self.stepper.steps_done
            metrics: dict[str, Any] = self.stepper.step(batches(step), loss_function, batches.batch_size)
            self.finished = step + 1 == self.total_steps
            if validates and ((step + 1) % self.config.validate_every == 0 or self.finished):
                measured = self._measure(validate)
                self._judge(measured[self.config.best_metric], step + 1)
                metrics = {**metrics, **measured}
                if self.config.patience and self._without_best >= self.config.patience and not self.finished:
                    self.finished = True
                    self.ending = (
                        f"{self.name} ended at its step {step + 1}: {self.config.best_metric} was best "
                        f"({self.best_value:.4g}) at step {self.best_step}, {self._without_best} validations before"
                    )
            if self.finished:
                self._take_final_weights()
            state.step += 1
            yield Record(metrics, milestone=self.finished, examples=batches.batch_size)
        state.ending = self.ending or state.ending
        state.total_steps -= self.total_steps - self.stepper.steps_done

    def _measure(self, validate: Callable[[nn.Module], dict[str, float]]) -> dict[str, float]:
        module = self.stepper.ema if self.stepper.ema is not None else self.module
        modes = [(part, part.training) for part in module.modules()]
        devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
        module.eval()
        with torch.random.fork_rng(devices), torch.no_grad():
            metrics = {name: float(value) for name, value in validate(module).items()}
        for part, training in modes:
            part.training = training
        # Processes must not differ by a rounding in when they end.
        values = distributed.from_first(torch.tensor(list(metrics.values()), dtype=torch.float64))
        return dict(zip(metrics, values.tolist(), strict=True))

    def _check_metric(self, metrics: dict[str, float]) -> None:
        if self.config.best_metric not in metrics:
            raise UserError(
                f"best_metric = {self.config.best_metric!r} is not measured in stage {self.name}",
                f"choose one of: {', '.join(metrics)}",
            )

    def _judge(self, value: float, step: int) -> None:
        sign = 1 if self.config.best_is == "highest" else -1
        if self._best and not sign * value > sign * self.best_value:
            self._without_best += 1
            return
        self.best_step, self.best_value, self._without_best = step, value, 0
        module = self.stepper.ema if self.stepper.ema is not None else self.module
        self._best = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def _take_final_weights(self) -> None:
        if self._best:
            self.module.load_state_dict(self._best)
        elif self.stepper.ema is not None:
            self.module.load_state_dict(self.stepper.ema.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text only, so that `torch.load(weights_only=True)` reads them back."""
        numbers = {name: getattr(self, name) for name in ("best_step", "best_value", "finished", "ending", "_without_best")}
        return {"stepper": self.stepper.state_dict(), "best": self._best, **numbers}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a stage of the same config."""
        self.stepper.load_state_dict(saved["stepper"])
        self._best = distributed.sliced_like(saved["best"], self.module.state_dict())
        for name in ("best_step", "best_value", "finished", "ending", "_without_best"):
            setattr(self, name, saved[name])


def planned_rates(state: TrainState, points: int = 500) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and learning rates of each stage that trains by gradient, at so many points or fewer."""
    parts = {name: part.stepper if isinstance(part, Stage) else part for name, part in state.stateful.items()}
    steppers = {name: part for name, part in parts.items() if isinstance(part, Stepper)}
    steps = {name: list(range(0, s.total_steps, -(-s.total_steps // points))) for name, s in steppers.items()}
    return {name: (steps[name], [learning_rate(s.config, k, s.total_steps) for k in steps[name]]) for name, s in steppers.items()}
