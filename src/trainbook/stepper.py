"""One training step by gradient: schedule, gradient, clipping, update, average, thin over torch."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_

from trainbook import distributed
from trainbook.accumulation import Accumulator, LossFunction, batch_size
from trainbook.averaging import MovingAverage, averaged_copy
from trainbook.errors import UserError
from trainbook.optimization import OptimizationConfig
from trainbook.optimizer import make_optimizer
from trainbook.pipeline import Pipeline, divide
from trainbook.schedule import learning_rate
from trainbook.spikes import SpikeRule


class Stepper:
    """Takes training steps: what stands between a batch's loss and the next weights.

    It makes the optimizer and, when `config.ema_decay` is positive, `ema`: a copy of the module that follows it by
    e <- d e + (1 - d) w in parameters after each step that was not skipped; buffers (batch statistics) are copied.
    Keep `state_dict()` in a checkpoint (`TrainState.stateful`) beside the module; nothing else carries over.

    Where several processes train (`distributed`), each calls this with its share of the batch. In a pipeline that is all of
    it: each process keeps some blocks of the module, an nn.Sequential, and the micro-batches pass through all of them. It
    computes what one process computes, but that random numbers drawn by dropout or by the loss are other ones, and that
    batch normalisation sees `accumulation` micro-batches, at least one per process.

    Args:
        module: what is trained; not replaced or moved afterwards.
        config: optimizer, schedule, clipping, precision, average, rule for spikes.
        total_steps: of the whole run, for the schedule.

    Raises:
        ValueError: when `total_steps` is not positive.
        UserError: when the weights are to be divided among processes and the module or a choice does not allow it.
    """

    def __init__(self, module: nn.Module, config: OptimizationConfig, total_steps: int) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}; a schedule needs at least one step")
        self.module, self.config, self.total_steps = module, config, total_steps
        self.optimizer = make_optimizer(module, config)
        self.ema = averaged_copy(module) if config.ema_decay else None
        pipeline = self._divide()
        self._accumulator = Accumulator(module, self.optimizer, config, pipeline)
        self.scaler = self._accumulator.scaler
        self._average = MovingAverage(self.ema, module, config.ema_decay) if self.ema is not None else None
        others = {"optimizer": self.optimizer, "ema": self.ema}
        self._spikes = SpikeRule(config, module, {name: part for name, part in others.items() if part is not None})
        self.steps_done = 0

    def _divide(self) -> Pipeline | None:
        """Leave this process its part of the module, the average and the optimizer."""
        kind, config = distributed.parallel(), self.config
        if distributed.is_divided():
            choice = f"with --parallel {kind} choose"
            if config.on_spike == "roll_back" and config.spike_deviations:
                raise UserError("on_spike = roll_back keeps whole copies of the weights", f"{choice} skip or lower_rate")
            if config.acceleration != "off":
                raise UserError(f"acceleration = {config.acceleration} needs the whole model", f"{choice} off")
        pipeline = None
        if kind == "slices":
            distributed.shard(self.module, self.optimizer)
            if self.ema is not None:
                distributed.shard(self.ema)
        elif kind == "pipeline":
            pipeline = divide(self.module, config.accumulation, self.optimizer)
            if self.ema is not None:
                divide(self.ema, config.accumulation)
        return pipeline

    def step(self, batch: Any, loss_function: LossFunction, global_size: int = 0) -> dict[str, Tensor | float]:
        """One update of the weights by the gradient of the batch's mean loss.

        The batch is cut into `accumulation` micro-batches. With n_i examples in micro-batch i, the loss is
        L = sum_i (n_i / sum_j n_j) L_i: the loss and gradient of the large batch, for a loss that is a mean over examples.
        (Batch normalisation sees micro-batches: there the two differ.) Where memory runs out, their number is doubled and
        the step taken again. A float16 step whose gradient overflows changes neither weights nor average; the scaler then
        halves its scale. Without `spike_deviations` nothing here makes the host wait for a GPU.

        Args:
            batch: tensor, or dict, tuple or list of tensors; the first axis counts examples. This process's share.
            loss_function: (module, batch) -> mean loss over the batch, or that and a dict of further means to report; it
                calls the module it is given, and runs under autocast.
            global_size: examples of all processes' shares; by default as many in each as here.

        Returns:
            loss (float32 or wider) and gradient_norm (before clipping), tensors on the device; learning_rate, a float; the
            further means. With float16 also loss_scale of this step and skipped, 1 for a step that overflowed: its
            gradient_norm is reported as 0, because an overflow the scaler handles is no fault of the run. With
            spike_deviations also spike, 1 for a step that was left out; what was not finite is then not reported.

        Raises:
            RunFailed: when 20 steps in a row are spikes.
            UserError: in a pipeline, when the batch does not make equal micro-batches or the loss does more with the module
                than to call it once with one tensor.
        """
        global_size = global_size or batch_size(batch) * distributed.replicas()
        if not global_size:
            raise ValueError("a step needs at least one example")
        self._accumulator.prepare(batch, loss_function, self.steps_done)
        if self.ema is not None and self.steps_done == 0:
            self.ema.load_state_dict(self.module.state_dict())  # the module may have been given weights since
        rate = self._spikes.rate_factor * learning_rate(self.config, self.steps_done, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate_factor", 1.0)
        self._spikes.begin_step(self.steps_done)
        means = self._accumulator.backward(batch, loss_function, global_size, self.steps_done)
        scale = None
        if self.scaler is not None:
            scale = self.scaler.scale(torch.ones_like(means["loss"]))
            self._accumulator.unscale()
        norm = self._clip()
        report = {**means, "gradient_norm": norm, "learning_rate": rate}
        self.steps_done += 1
        if self._spikes.applies:
            report["spike"] = float(self._is_spike(float(means["loss"]), float(norm)))
        if report.get("spike"):
            self._spikes.answer()
            if self.scaler is not None:
                self.scaler.update()
            return {name: value for name, value in report.items() if bool(torch.as_tensor(value).isfinite().all())}
        return report | self._update(norm, scale)

    def _clip(self) -> Tensor:
        """Clip the gradient as configured; returns its norm before."""
        norm, parameters = self._accumulator.gradient_norm(), self._accumulator.parameters
        if self.config.clip_norm:
            clip_grads_with_norm_(parameters, self.config.clip_norm, norm)
        if self.config.clip_value:
            clip_grad_value_(parameters, self.config.clip_value)
        return norm

    def _is_spike(self, loss: float, norm: float) -> bool:
        overflow = self.scaler is not None and math.isfinite(loss) and not math.isfinite(norm)  # the scaler's to handle
        return not overflow and self._spikes.is_spike(loss, norm)

    def _update(self, norm: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
        """Move weights and average by the gradient; returns what a float16 step reports besides."""
        if self.scaler is None:
            self.optimizer.step()
            skipped, further = None, {}
        else:
            skipped = ~norm.isfinite()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            further = {"gradient_norm": norm.masked_fill(skipped, 0.0), "loss_scale": scale, "skipped": skipped.float()}
        if self._average is not None:
            self._average.follow(skipped)
        return further

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, so that `torch.load(weights_only=True)` reads them back."""
        parts = {"optimizer": self.optimizer, "scaler": self.scaler, "ema": self.ema}
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return states | {"steps_done": self.steps_done} | self._accumulator.state_dict() | self._spikes.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a stepper of the same config, saved by any number of processes."""
        optimizer, parameters = saved["optimizer"], self._accumulator.parameters
        if distributed.parallel() == "slices":
            states = optimizer["state"].items()
            cut = {index: distributed.sliced_like(state, parameters[index]) for index, state in states}
            optimizer = {**optimizer, "state": cut}
        if distributed.parallel() == "pipeline":
            own = {index: state for index, state in optimizer["state"].items() if not parameters[index].is_meta}
            optimizer = {**optimizer, "state": own}
        self.optimizer.load_state_dict(optimizer)
        if self.scaler is not None and "scaler" in saved:  # a run may move to a card that needs one
            self.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(distributed.sliced_like(saved["ema"], self.ema.state_dict()))
        self.steps_done = saved["steps_done"]
        self._accumulator.load_state_dict(saved)
        self._spikes.load_state_dict(saved)
