"""What a teacher said of a data set, kept on disk: computed once for exactly this teacher, these images and these views."""

# N examples, K views (augmented versions of each), C classes, D features

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainbook.errors import UserError
from trainbook.files import file_sha256, sync_folder, write_json

logger = logging.getLogger("trainbook")

HEADER, LOCKS = "header.json", "locks"
DTYPES = ("float16", "float32")
FORMAT = 1  # of the folder; another one is another key


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and contents."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content = tensor.detach().cpu().contiguous()
        digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_teacher(teacher: nn.Module) -> str:
    """SHA-256 of a network's architecture, as torch prints it, and of every parameter and buffer."""
    architecture = f"{type(teacher).__module__}.{type(teacher).__qualname__}\n{teacher!r}\n"
    return hashlib.sha256((architecture + fingerprint_tensors(teacher.state_dict())).encode()).hexdigest()


def cache_key(teacher: nn.Module, data_sha256: str, transform: Mapping[str, Any], views: int, seed: int, dtype: str) -> str:
    """The name of an entry: SHA-256 of everything its content depends on.

    Args:
        teacher: the network, in evaluation mode.
        data_sha256: of the images in their order, see `fingerprint_tensors`.
        transform: what is done to an image before the teacher sees it, as JSON: normalisation and augmentation.
        views: K.
        seed: of the views.
        dtype: float16 or float32.
    """
    parts = [FORMAT, fingerprint_teacher(teacher), data_sha256, transform, views, seed, dtype]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass
class Counters:
    """What a store did in this process.

    Attributes:
        hits, misses: entries found and computed.
        seconds_computing: spent on the misses.
        seconds_saved: what the hits took when they were computed, less what reading them took.
    """

    hits: int = 0
    misses: int = 0
    seconds_computing: float = 0.0
    seconds_saved: float = 0.0


class LogitStore:
    """Arrays that a teacher computed (logits, features), one folder per key: .npy files and a JSON header.

    Row i of view k is always that of example i, whatever the order of training. Files are written beside, renamed
    together, and their SHA-256 is checked whenever they are opened.

    Args:
        folder: made when missing.
        most_bytes: entries unused for longest are deleted beyond this; the one just asked for stays.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes, self.counters = folder, most_bytes, Counters()
        try:
            (folder / LOCKS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the teacher's logits cannot be kept in {folder}: {error.strerror}", "free it") from None

    def fetch(
        self, key: str, shapes: Mapping[str, tuple[int, ...]], dtype: str, fill: Callable[[dict[str, np.ndarray]], None]
    ) -> dict[str, np.ndarray]:
        """The arrays of a key, read from disk or computed; of two processes that ask at once one computes.

        Args:
            key: from `cache_key`.
            shapes: name of each array to its shape, such as {"logits": (K, N, C), "features": (K, N, D)}.
            dtype: float16 or float32.
            fill: writes every element of the arrays it is given.

        Returns:
            The arrays, mapped from the files; writing to them changes no file.

        Raises:
            ValueError: when what was computed is not finite in `dtype`.
        """
        if dtype not in DTYPES:
            raise ValueError(f"{dtype!r} is none of {', '.join(DTYPES)}")
        with self._locked(key):
            started = time.perf_counter()
            arrays, header = self._open(key, shapes, dtype)
            if arrays is None:
                header = self._compute(key, shapes, dtype, fill)
                self.counters.misses += 1
                self.counters.seconds_computing += header["seconds"]
                arrays = self._map(key, shapes)
            else:
                self.counters.hits += 1
                self.counters.seconds_saved += header["seconds"] - (time.perf_counter() - started)
            os.utime(self.folder / key / HEADER)
        self._make_room(key)
        return arrays

    def _open(
        self, key: str, shapes: Mapping[str, tuple[int, ...]], dtype: str
    ) -> tuple[dict[str, np.ndarray] | None, dict[str, Any]]:
        place = self.folder / key
        if not place.exists():
            return None, {}
        try:
            header = json.loads((place / HEADER).read_text())
            for name in shapes:  # an entry without an array that is asked for now is computed again, with it
                if name in header["sha256"] and file_sha256(place / f"{name}.npy") != header["sha256"][name]:
                    raise ValueError(f"{name}.npy is damaged")
            if not shapes.keys() <= header["sha256"].keys():
                return None, {}
            arrays = self._map(key, shapes)
            for name, array in arrays.items():
                if array.shape != tuple(shapes[name]) or array.dtype != dtype:
                    raise ValueError(f"{name}.npy has another shape or type")
            return arrays, header
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s: %s; the teacher's outputs are computed again", place, error)
            return None, {}

    def _map(self, key: str, names: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {name: np.load(self.folder / key / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in names}

    def _compute(
        self, key: str, shapes: Mapping[str, tuple[int, ...]], dtype: str, fill: Callable[[dict[str, np.ndarray]], None]
    ) -> dict[str, Any]:
        partial = self.folder / f".{key}.partial"  # an earlier one was left by a crash: the lock is ours
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        started = time.perf_counter()
        open_array = np.lib.format.open_memmap
        arrays = {name: open_array(partial / f"{name}.npy", "w+", dtype, tuple(shape)) for name, shape in shapes.items()}
        with np.errstate(over="ignore"):  # it is checked below
            fill(arrays)
        for name, array in arrays.items():
            if not all(np.isfinite(part).all() for part in array):
                raise ValueError(f"the teacher's {name} are not finite in {dtype}: choose float32, or look at the teacher")
            array.flush()
        header = {
            "format": FORMAT,
            "seconds": time.perf_counter() - started,
            "sha256": {name: file_sha256(partial / f"{name}.npy") for name in shapes},
        }
        write_json(partial / HEADER, header)
        shutil.rmtree(self.folder / key, ignore_errors=True)
        partial.rename(self.folder / key)
        sync_folder(self.folder)
        return header

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.folder / LOCKS / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file closes, or the process dies
            yield

    def _make_room(self, keep: str) -> None:
        with self._locked("room"):
            entries = []
            for header in self.folder.glob(f"[0-9a-f]*/{HEADER}"):
                try:
                    size = sum(path.stat().st_size for path in header.parent.iterdir())
                    entries.append((header.stat().st_mtime_ns, size, header.parent))
                except FileNotFoundError:  # another process replaces it just now
                    continue
            total = sum(size for _, size, _ in entries)
            for _, size, place in sorted(entries):
                if total <= self.most_bytes:
                    break
                if place.name != keep:
                    shutil.rmtree(place, ignore_errors=True)  # processes that have it mapped keep it
                    total -= size
                    logger.info("%s: the teacher's outputs that were unused for longest are deleted", place)
