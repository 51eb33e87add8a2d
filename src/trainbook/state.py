"""What training carries from step to step, and its checkpoints: atomic, verified, loadable on any device."""

import hashlib
import io
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainbook import distributed
from trainbook.files import sync_folder, write_atomic, write_synced

logger = logging.getLogger("trainbook")

STATE_FILE, METADATA_FILE, MANIFEST_FILE = "state.pt", "metadata.json", "manifest.json"


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


def write_checkpoint(folder: Path, step: int, files: dict[str, bytes], keep: int) -> Path:
    """Write `folder/<step>` so that it is either whole or not there, then drop all but the `keep` newest.

    Files are written to a folder beside it and fsynced, the manifest with every file's SHA-256 last, then the folder
    is renamed. A crash or a full disk at any moment leaves the checkpoints before it as they were.

    Args:
        folder: the run's `checkpoints` folder.
        step: names the checkpoint.
        files: from `snapshot`.
        keep: how many checkpoints stay, at least 1.

    Raises:
        OSError: when writing fails; nothing is left behind.
    """
    entries = {name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)} for name, content in files.items()}
    manifest = _compact({"files": entries, "sha256": _digest(entries)})
    final = folder / f"{step:010d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, content in {**files, MANIFEST_FILE: manifest}.items():
            write_synced(partial / name, content)
        sync_folder(partial)
        if final.exists():  # the same step again, after a resume that trained nothing
            shutil.rmtree(final)
        partial.rename(final)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    write_atomic(folder / "latest", final.name.encode())
    sync_folder(folder)
    for old in _numbered(folder)[keep:]:
        shutil.rmtree(old)
    return final


def read_checkpoint(checkpoint: Path) -> dict[str, bytes]:
    """The files of one checkpoint, each checked against the manifest.

    Raises:
        ValueError: naming the file that is missing, cut short or altered.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_bytes())
        entries, digest = manifest["files"], manifest["sha256"]
        intact = digest == _digest(entries) and entries.keys() == {STATE_FILE, METADATA_FILE}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint.name}: {MANIFEST_FILE} cannot be read ({error})") from None
    if not intact:
        raise ValueError(f"{checkpoint.name}: {MANIFEST_FILE} was altered")
    contents = {}
    for name, entry in entries.items():
        try:
            contents[name] = (checkpoint / name).read_bytes()
        except OSError as error:
            raise ValueError(f"{checkpoint.name}: {name} cannot be read ({error})") from None
        if hashlib.sha256(contents[name]).hexdigest() != entry["sha256"]:
            raise ValueError(f"{checkpoint.name}: {name} was cut short or altered")
    return contents


def load_newest_checkpoint(folder: Path, state: TrainState, device: str) -> dict[str, Any] | None:
    """Put the newest whole checkpoint into `state` and return its metadata; None when there is none.

    A torn or altered checkpoint is skipped with a warning. Of several processes the first reads it for all.
    """
    contents = _newest_whole(folder) if distributed.rank() == 0 else None
    names = (STATE_FILE, METADATA_FILE)
    found = {name: distributed.bytes_from_first(contents[name] if contents else None) for name in names}
    if found[STATE_FILE] is None:
        return None
    state.load_state_dict(torch.load(io.BytesIO(found[STATE_FILE]), map_location=device, weights_only=True))
    return json.loads(found[METADATA_FILE])


def has_whole_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint to continue from."""
    return _newest_whole(folder) is not None


def _newest_whole(folder: Path) -> dict[str, bytes] | None:
    for checkpoint in _numbered(folder):
        try:
            return read_checkpoint(checkpoint)
        except ValueError as error:
            logger.warning("skipping checkpoint %s", error)
    return None


def set_aside_after(folder: Path, step: int) -> None:
    """Rename checkpoints later than `step` to `.torn-...`: a resumed run writes those steps anew, and pruning goes by number."""
    for checkpoint in _numbered(folder):
        if int(checkpoint.name) > step:
            aside = folder / f".torn-{checkpoint.name}"
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps there are checkpoints of, in order."""
    return sorted(int(path.name) for path in _numbered(folder))


def _numbered(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("*") if path.is_dir() and path.name.isdigit()), reverse=True)


def _compact(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _digest(entries: dict[str, Any]) -> str:
    return hashlib.sha256(_compact(entries)).hexdigest()
