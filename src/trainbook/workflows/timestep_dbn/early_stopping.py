"""The weights of the best epoch, kept per timestep: timesteps of a chain overfit at different epochs."""

# T timesteps, L members of a timestep (levels of the chain), n timesteps of a block

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class EarlyStopping:
    """Keeps what was best on the validation split, per timestep and member, and says which timesteps to go on with.

    Keep it in `TrainState.stateful`.

    Args:
        members: the tensors of each member as they are trained, (T, ...) each; they stay where they are.
        patience: epochs in a row without a better value after which a member has waited long enough; a timestep whose
            members all have is stopped for good. 0 stops none. The best weights are kept either way.

    Attributes:
        best_value: (T, L), higher is better; minus infinity before the first epoch.
        best_epoch: (T, L), counted from 1.
        waited: (T, L), epochs since.
    """

    def __init__(self, members: Sequence[Sequence[Tensor]], patience: int) -> None:
        self._live = [[tensor.detach() for tensor in member] for member in members]
        self._best = [[tensor.clone() for tensor in member] for member in self._live]
        self.patience = patience
        shape = len(self._live[0][0]), len(self._live)
        self.best_value = torch.full(shape, -torch.inf, dtype=torch.float64)
        self.best_epoch, self.waited = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))

    def begin(self, start: int, stop: int) -> None:
        """Forget what was measured of the timestep indices start..stop-1: their training starts anew."""
        self.best_value[start:stop] = -torch.inf
        self.best_epoch[start:stop] = self.waited[start:stop] = 0

    @property
    def stopped(self) -> Tensor:
        """Timesteps that are no longer updated, (T,)."""
        return (self.waited >= self.patience).all(1) if self.patience else torch.zeros(len(self.waited), dtype=torch.bool)

    def active(self, start: int, stop: int, longest: int) -> list[tuple[int, int]]:
        """Runs of neighbouring timestep indices in start..stop-1 that are not stopped, none longer than `longest`."""
        runs: list[tuple[int, int]] = []
        for index in range(start, stop):
            if not self.stopped[index]:
                grows = runs and runs[-1][1] == index and index - runs[-1][0] < longest
                first = runs.pop()[0] if grows else index
                runs.append((first, index + 1))
        return runs

    @torch.no_grad()
    def judge(self, start: int, values: Tensor, epoch: int) -> Tensor:
        """Take in the validation values of an epoch for the timestep indices start..start+n-1, (n, L); higher is better.

        The weights of those that are the best so far are copied. Stopped timesteps are not judged.

        Returns:
            The best epochs so far, (n, L).
        """
        rows = slice(start, start + len(values))
        values, judged = values.to("cpu", torch.float64), ~self.stopped[rows].unsqueeze(1)
        better = (values > self.best_value[rows]) & judged
        self.best_value[rows] = torch.where(better, values, self.best_value[rows])
        self.best_epoch[rows] = torch.where(better, epoch, self.best_epoch[rows])
        self.waited[rows] = torch.where(better, 0, self.waited[rows] + judged)
        for kept, live, improved in zip(self._best, self._live, better.unbind(1), strict=True):
            _copy(live, kept, start + improved.nonzero().squeeze(1))
        return self.best_epoch[rows].clone()

    @torch.no_grad()
    def restore(self, start: int, stop: int) -> None:
        """Put the kept weights back into the timestep indices start..stop-1."""
        for kept, live in zip(self._best, self._live, strict=True):
            _copy(kept, live, torch.arange(start, stop))

    @torch.no_grad()
    def hold(self, start: int, stop: int) -> Tensor:
        """Put the kept weights back into those that are stopped: momentum and decay move what has no gradient, too.

        Returns:
            Which of start..stop-1 are, (n,).
        """
        stopped = self.stopped[start:stop]
        for kept, live in zip(self._best, self._live, strict=True):
            _copy(kept, live, start + stopped.nonzero().squeeze(1))
        return stopped

    def state_dict(self) -> dict[str, Any]:
        """Tensors only, so that `torch.load(weights_only=True)` reads them back."""
        measured = {name: getattr(self, name).clone() for name in ("best_value", "best_epoch", "waited")}
        return {"best": self._best, **measured}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a run of the same config."""
        for kept, best in zip(self._best, saved["best"], strict=True):
            for tensor, value in zip(kept, best, strict=True):
                tensor.copy_(value)
        for name in ("best_value", "best_epoch", "waited"):
            setattr(self, name, saved[name].to("cpu"))


def _copy(source: Sequence[Tensor], target: Sequence[Tensor], timesteps: Tensor) -> None:
    if len(timesteps):
        for one, other in zip(source, target, strict=True):
            chosen = timesteps.to(one.device)
            other[chosen] = one[chosen]
