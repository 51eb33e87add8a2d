"""Weights as safetensors: what a run exports, and what another may start from; torch checkpoints are read too."""

import json
import logging
import pickle
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trainbook import distributed
from trainbook.errors import UserError
from trainbook.files import file_sha256

logger = logging.getLogger("trainbook")

SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt")
WRAPPINGS = ("modules", "state_dict", "model_state_dict", "model")  # where torch checkpoints keep a module's tensors
CONFIG = "config"  # key of what an export says of itself: the config as JSON


def export_weights(modules: dict[str, nn.Module], folder: Path, metadata: dict[str, str]) -> None:
    """Write each module's parameters and buffers to `folder/<name>.safetensors`, in place of what the folder held."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, module in modules.items():
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in module.state_dict().items()}
        save_file(tensors, str(folder / f"{name}{SUFFIX}"), metadata=metadata)


def find_weights(names: Collection[str], source: str, runs_folder: Path) -> dict[str, Path]:
    """The files that hold modules' weights; {} when there are none.

    Args:
        names: of the modules.
        source: a run id, a run folder, a folder of .safetensors files, or one such file (its name is the module's). With
            one module also any one file, a torch checkpoint too.
        runs_folder: where a run id is looked up.
    """
    places = [runs_folder / source / "export", Path(source) / "export", Path(source)]
    place = next((path for path in places if path.exists()), None)
    if place is None:
        return {}
    if place.is_file() and len(names) == 1 and place.suffix in (SUFFIX, *TORCH_SUFFIXES):
        return {next(iter(names)): place}
    files = [place] if place.is_file() else sorted(place.glob(f"*{SUFFIX}"))
    return {path.stem: path for path in files if path.suffix == SUFFIX and path.stem in names}


def read_weights(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A module's tensors in a file, on the CPU, and the config that the file says they were trained with ({} if it does not).

    A torch checkpoint is read with `weights_only=True`, so that nothing in it is executed. Its tensors may lie in it
    itself, under the module's name or under one of `WRAPPINGS`, and their names may begin with "module.".

    Args:
        path: a .safetensors file, or a torch checkpoint.
        name: of the module.

    Raises:
        UserError: when it cannot be read, or holds something else than finite tensors; says what.
    """
    try:
        path.open("rb").close()  # the readers below say less about a file that may not be read
        if path.suffix == SUFFIX:
            with safe_open(str(path), framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
                config = json.loads((file.metadata() or {}).get(CONFIG, "{}"))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
            config = content.get(CONFIG, {}) if isinstance(content, dict) else {}
            tensors = _tensors_in(content, name)
    except PermissionError:
        raise UserError(f"{path} may not be read by this user", f"chmod u+r {path}, or copy it to a folder of yours") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than weights, or is no torch checkpoint: it is not opened, since its code would run",
            "save the weights alone: torch.save(model.state_dict(), FILE)",
        ) from None
    except Exception as error:  # a damaged file breaks torch's reader in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read: {reason}", "export it again, or copy it again") from None
    odd = [key for key, value in tensors.items() if not isinstance(value, Tensor)]
    if odd or not tensors:
        raise UserError(
            f"{path} holds no weights of {name!r}" + (f": {', '.join(map(str, odd[:3]))} is no tensor" if odd else ""),
            "save the weights alone: torch.save(model.state_dict(), FILE)",
        )
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
    if bad:
        raise UserError(f"{path} holds NaN or infinite values in {', '.join(bad[:3])}", "export it from an earlier checkpoint")
    return tensors, config if isinstance(config, dict) else {}


def _tensors_in(content: Any, name: str) -> dict[str, Any]:
    for key in (WRAPPINGS[0], name, *WRAPPINGS[1:]):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        return {}
    return {key.removeprefix("module.") if isinstance(key, str) else key: value for key, value in content.items()}


def load_weights(
    modules: dict[str, nn.Module],
    source: str,
    runs_folder: Path,
    field: str = "initial_weights",
    remedy: str = "use the config that the weights were trained with",
) -> dict[str, str]:
    """Put weights from files into the modules of the same names, all or none.

    Args:
        modules: name to module; those without a file keep what they have.
        source, runs_folder: as in `find_weights`.
        field: of the config that names the source, for messages.
        remedy: what to do about a file that does not fit.

    Returns:
        The SHA-256 of each file, by module.

    Raises:
        UserError: when there is nothing to load, or a file does not fit its module; says which tensors.
    """
    found = find_weights(modules, source, runs_folder)
    if not found:
        raise UserError(
            f"{field} = {source!r} holds none of: {', '.join(f'{name}{SUFFIX}' for name in modules)}",
            "give a complete run, its export folder, or one of its files",
        )
    loaded = {}
    for name, path in found.items():
        loaded[name], _ = read_weights(path, name)
        wanted = {key: tuple(tensor.shape) for key, tensor in modules[name].state_dict().items()}
        offered = {key: tuple(tensor.shape) for key, tensor in loaded[name].items()}
        if mismatch := describe_mismatch(wanted, offered):
            raise UserError(f"{path} does not fit module {name!r}: {mismatch}", remedy)
    for name, tensors in loaded.items():
        modules[name].load_state_dict(distributed.sliced_like(tensors, modules[name].state_dict()))
    digests = {name: file_sha256(path) for name, path in found.items()}
    for name, digest in digests.items():
        logger.info("%s: weights from %s, SHA-256 %s", name, found[name], digest)
    return digests


def describe_mismatch(wanted: dict[str, tuple[int, ...]], offered: dict[str, tuple[int, ...]]) -> str:
    """Which tensors differ in shape, are missing or are too many; "" when none."""
    wrong = [key for key in sorted({*wanted, *offered}) if wanted.get(key) != offered.get(key)]
    shown = ", ".join(f"{key} is {offered.get(key, 'missing')}, not {wanted.get(key, 'wanted')}" for key in wrong[:3])
    return shown + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
