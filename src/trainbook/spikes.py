"""Loss spikes: which steps are left out, and what follows one."""

import copy
import math
from typing import Any

from torch import nn

from trainbook.buffers import keep_buffers
from trainbook.errors import RunFailed
from trainbook.optimization import OptimizationConfig

STEPS_BETWEEN_COPIES = 100  # of the weights, for a return to them after a spike
RATE_FACTOR_OF_A_SPIKE = 0.5
SPIKES_THAT_END_A_RUN = 20


class SpikeRule:
    """Decides which steps are loss spikes and does what `on_spike` asks for after one; without `spike_deviations` nothing.

    Args:
        config: its `spike_deviations` and `on_spike`.
        module: what is trained.
        others: what else a return to earlier weights brings back, by name: whatever has a `state_dict()`.
    """

    def __init__(self, config: OptimizationConfig, module: nn.Module, others: dict[str, Any]) -> None:
        self.applies, self.rate_factor = config.spike_deviations > 0, 1.0
        self._deviations, self._lowers_rate = config.spike_deviations, config.on_spike != "skip"
        self._rolls_back = self.applies and config.on_spike == "roll_back"
        self._losses, self._in_a_row, self._kept = LossStatistics(), 0, {}
        self._module, self._parts = module, {"module": module, **others, "losses": self._losses}

    def begin_step(self, step: int) -> None:
        """Keep what a spike in this step needs."""
        if self._rolls_back and step % STEPS_BETWEEN_COPIES == 0:
            self._kept = copy.deepcopy({name: part.state_dict() for name, part in self._parts.items()})
        if self.applies:
            self._put_buffers_back = keep_buffers(self._module)

    def is_spike(self, loss: float, gradient_norm: float) -> bool:
        """Whether the step is one; the loss of any other is taken into the statistics."""
        if not math.isfinite(gradient_norm) or self._losses.is_spike(loss, self._deviations):
            return True
        self._losses.add(loss)
        self._in_a_row = 0
        return False

    def answer(self) -> None:
        """Undo the step, whose update has not been made, and go on as configured.

        Raises:
            RunFailed: after 20 spikes in a row.
        """
        self._put_buffers_back()
        self._in_a_row += 1
        if self._in_a_row >= SPIKES_THAT_END_A_RUN:
            raise RunFailed(f"{self._in_a_row} steps in a row were loss spikes. Lower the learning rate and start again.")
        if self._lowers_rate:
            self.rate_factor *= RATE_FACTOR_OF_A_SPIKE
        if self._rolls_back:
            kept = copy.deepcopy(self._kept)
            for name, part in self._parts.items():
                part.load_state_dict(kept[name])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only."""
        counts = {"rate_factor": self.rate_factor, "spikes_in_a_row": self._in_a_row}
        return {**counts, "losses": self._losses.state_dict(), "kept": self._kept}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self._losses.load_state_dict(saved["losses"])
        self.rate_factor, self._in_a_row, self._kept = saved["rate_factor"], saved["spikes_in_a_row"], saved["kept"]


class LossStatistics:
    """Running mean and deviation of the losses so far, each loss weighing 0.98 of the one after it.

    Of their logarithms, as long as all are positive: late in training the losses of batches have a long tail, and on their
    own scale an ordinary run has false alarms by the dozen.
    """

    DECAY, LEAST = 0.98, 50  # fewer losses than LEAST say too little to call one a spike
    FLOOR = 1e-3  # least deviation, as a share of the loss: a rounding is no spike

    def __init__(self) -> None:
        self.number, self.mean, self.variance, self.logarithmic = 0, 0.0, 0.0, True

    def is_spike(self, loss: float, deviations: float) -> bool:
        """Whether a loss is not finite, or stands so many deviations above the mean."""
        if not math.isfinite(loss):
            return True
        if self.number < self.LEAST or (self.logarithmic and loss <= 0):
            return False
        value, floor = (math.log(loss), self.FLOOR) if self.logarithmic else (loss, self.FLOOR * abs(self.mean))
        return value > self.mean + deviations * max(math.sqrt(self.variance), floor)

    def add(self, loss: float) -> None:
        """Take in one loss; the first that is not positive begins anew, without logarithms."""
        if self.logarithmic and loss <= 0:
            self.number, self.mean, self.variance, self.logarithmic = 0, 0.0, 0.0, False
        self.number += 1
        weight = max(1 - self.DECAY, 1 / self.number)  # a plain mean at first
        difference = (math.log(loss) if self.logarithmic else loss) - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)

    def state_dict(self) -> dict[str, float]:
        """Everything, as numbers."""
        return dict(vars(self))

    def load_state_dict(self, saved: dict[str, float]) -> None:
        """Continue from `state_dict()`."""
        vars(self).update(saved)
