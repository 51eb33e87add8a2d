"""What training carries from step to step, and how it goes into a checkpoint and back, on any device."""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainbook import distributed
from trainbook.checkpoints import METADATA_FILE, STATE_FILE, newest_whole


@dataclass
class TrainState:
    """Everything a run needs to go on from `step`.

    The randomness of a step follows from (seed, step) alone, so no generator state is part of it.

    Attributes:
        modules: name to module; tensors that training carries besides weights (Gibbs chains) are buffers of one.
        optimizers: name to optimizer.
        stateful: name to anything else with `state_dict` and `load_state_dict`, such as a `fitting.Stage`.
        total_steps: how many steps the run takes, over all stages.
        step: how many are done.
        stage: the stage the next step belongs to.
        ending: why training ended before all steps were done, or "".
    """

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    stateful: dict[str, Any] = field(default_factory=dict)
    total_steps: int = 0
    step: int = 0
    stage: str = ""
    ending: str = ""

    def _parts(self) -> dict[str, dict[str, Any]]:
        return {"modules": self.modules, "optimizers": self.optimizers, "stateful": self.stateful}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers only, so that `torch.load(weights_only=True)` reads it back."""
        parts = {kind: {name: part.state_dict() for name, part in group.items()} for kind, group in self._parts().items()}
        return {"step": self.step, "stage": self.stage, **parts}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a state built from the same config.

        Raises:
            KeyError, RuntimeError: when the parts or their shapes differ.
        """
        for kind, group in self._parts().items():
            if group.keys() != saved[kind].keys():
                raise KeyError(f"{kind}: saved {sorted(saved[kind])}, this run has {sorted(group)}")
            for name, part in group.items():
                content = saved[kind][name]
                part.load_state_dict(distributed.sliced_like(content, part.state_dict()) if kind == "modules" else content)
        self.step, self.stage = saved["step"], saved["stage"]

    def num_parameters(self) -> dict[str, int]:
        """Parameters per module."""
        return {name: sum(p.numel() for p in module.parameters()) for name, module in self.modules.items()}

    def non_finite_tensors(self) -> list[str]:
        """Names, such as "dbn.weight_0", of the parameters and buffers that hold a NaN or an infinity."""
        return [
            f"{name}.{key}"
            for name, module in self.modules.items()
            for key, tensor in module.state_dict().items()
            if tensor.is_floating_point() and not bool(torch.isfinite(distributed.own_part(tensor)).all())
        ]


def snapshot(state: TrainState, metadata: dict[str, Any]) -> dict[str, bytes]:
    """The files of a checkpoint, as a copy that training no longer touches.

    Args:
        state: what to save.
        metadata: plain JSON kept beside it.
    """
    buffer = io.BytesIO()
    torch.save(distributed.whole(state.state_dict()), buffer)
    described = json.dumps({**metadata, "step": state.step, "stage": state.stage}).encode()
    return {STATE_FILE: buffer.getvalue(), METADATA_FILE: described}


def load_newest_checkpoint(folder: Path, state: TrainState, device: str) -> dict[str, Any] | None:
    """Put the newest whole checkpoint into `state` and return its metadata; None when there is none.

    A torn or altered checkpoint is skipped with a warning. Of several processes the first reads it for all.
    """
    contents = newest_whole(folder) if distributed.rank() == 0 else None
    names = (STATE_FILE, METADATA_FILE)
    found = {name: distributed.bytes_from_first(contents[name] if contents else None) for name in names}
    if found[STATE_FILE] is None:
        return None
    state.load_state_dict(torch.load(io.BytesIO(found[STATE_FILE]), map_location=device, weights_only=True))
    return json.loads(found[METADATA_FILE])
