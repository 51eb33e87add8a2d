"""Weights as safetensors: what a run exports, and what another may start from."""

import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from trainbook import distributed
from trainbook.errors import UserError
from trainbook.files import file_sha256

SUFFIX = ".safetensors"


def export_weights(modules: dict[str, nn.Module], folder: Path, metadata: dict[str, str]) -> None:
    """Write each module's parameters and buffers to `folder/<name>.safetensors`, in place of what the folder held."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, module in modules.items():
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in module.state_dict().items()}
        save_file(tensors, str(folder / f"{name}{SUFFIX}"), metadata=metadata)


def load_weights(modules: dict[str, nn.Module], source: str, runs_folder: Path) -> dict[str, str]:
    """Put exported weights into the modules of the same names, all or none.

    Args:
        modules: name to module; those without a file keep what they have.
        source: a run id, a run folder, a folder of .safetensors files, or one such file (its name is the module's).
        runs_folder: where a run id is looked up.

    Returns:
        The SHA-256 of each file, by module.

    Raises:
        UserError: when there is nothing to load, or a file does not fit its module; says which tensors.
    """
    places = [runs_folder / source / "export", Path(source) / "export", Path(source)]
    place = next((path for path in places if path.exists()), None)
    files = [] if place is None else [place] if place.is_file() else sorted(place.glob(f"*{SUFFIX}"))
    found = {path.stem: path for path in files if path.suffix == SUFFIX and path.stem in modules}
    if not found:
        raise UserError(
            f"initial_weights = {source!r} holds none of: {', '.join(f'{name}{SUFFIX}' for name in modules)}",
            "give a complete run, its export folder, or one of its files",
        )
    loaded = {}
    for name, path in found.items():
        try:
            loaded[name] = load_file(str(path))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}", "export it again") from None
        wanted = {key: tuple(tensor.shape) for key, tensor in modules[name].state_dict().items()}
        offered = {key: tuple(tensor.shape) for key, tensor in loaded[name].items()}
        wrong = [key for key in sorted({*wanted, *offered}) if wanted.get(key) != offered.get(key)]
        if wrong:
            shown = ", ".join(f"{key} is {offered.get(key, 'missing')}, not {wanted.get(key, 'wanted')}" for key in wrong[:3])
            raise UserError(
                f"{path} does not fit module {name!r}: {shown}" + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""),
                "use the config that the weights were trained with",
            )
    for name, tensors in loaded.items():
        modules[name].load_state_dict(distributed.sliced_like(tensors, modules[name].state_dict()))
    return {name: file_sha256(path) for name, path in found.items()}
