"""Teacher vectors kept on disk, one row per text: what was embedded once is read back, from whichever run it came."""

# N texts, D numbers of a vector

import fcntl
import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from trainbook.errors import UserError
from trainbook.files import file_sha256, write_atomic

logger = logging.getLogger("trainbook")

ROWS_PER_SHARD = 1024
KEY_BYTES = 32


def cache_key(model: str, revision: str, pooling: str, text: str) -> bytes:
    """SHA-256 of everything a vector depends on."""
    parts = (part.encode() for part in (model, revision, pooling, text))
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).digest()


class EmbeddingCache:
    """Memory-mapped shards of 16-bit rows, named by the SHA-256 of their content, the least recently used deleted first.

    A shard is one .npy file of records (key, vector), written beside and renamed; a damaged one is found by its name and
    computed again. Nothing in it is ever unpickled.

    Args:
        folder: made when missing.
        most_bytes: size that the shards together never keep beyond a call.

    Attributes:
        hits, misses: texts found and embedded by this object.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes, self.hits, self.misses = folder, most_bytes, 0, 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"teacher vectors cannot be kept in {folder}: {error.strerror}", "free it") from None

    @property
    def hit_rate(self) -> float:
        """Share of the texts asked for that were there; 0 before any."""
        return self.hits / max(self.hits + self.misses, 1)

    def fetch(
        self, identity: tuple[str, str, str], width: int, texts: Sequence[str], embed: Callable[[list[str]], np.ndarray]
    ) -> np.ndarray:
        """The vectors of texts, read or computed, rounded to 16 bits either way.

        Args:
            identity: model, revision and pooling.
            width: D.
            texts: N.
            embed: computes the vectors of the texts that are missing, each text once.

        Returns:
            (N, D) float32.

        Raises:
            ValueError: when a vector is not finite in 16 bits.
        """
        keys = [cache_key(*identity, text) for text in texts]
        vectors = np.empty((len(texts), width), dtype=np.float32)
        with self._locked():
            found = self._read(set(keys), width)
            missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
            self.misses += len(missing)
            self.hits += len(texts) - len(missing)
            if missing:
                computed = _to_half(embed(list(missing.values())))
                found.update(zip(missing, computed, strict=True))
                self._write(list(missing), computed)
            for row, key in enumerate(keys):
                vectors[row] = found[key]
            self._make_room()
        return vectors

    def _read(self, wanted: set[bytes], width: int) -> dict[bytes, np.ndarray]:
        found: dict[bytes, np.ndarray] = {}
        for path in self.folder.glob("*.npy"):
            try:
                if file_sha256(path) != path.stem:
                    raise ValueError("its content is not what its name says")
                shard = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                logger.warning("%s: %s; its vectors are computed again", path, error)
                path.unlink(missing_ok=True)
                continue
            if shard["vector"].shape[1] != width:
                continue
            rows = {shard["key"][row].tobytes(): row for row in range(len(shard))}
            common = wanted & rows.keys()
            found.update((key, shard["vector"][rows[key]]) for key in common)
            if common:
                os.utime(path)
        return found

    def _write(self, keys: list[bytes], vectors: np.ndarray) -> None:
        for start in range(0, len(keys), ROWS_PER_SHARD):
            part = slice(start, start + ROWS_PER_SHARD)
            records = np.empty(len(keys[part]), dtype=[("key", "u1", KEY_BYTES), ("vector", "<f2", vectors.shape[1])])
            records["key"] = np.frombuffer(b"".join(keys[part]), dtype=np.uint8).reshape(-1, KEY_BYTES)
            records["vector"] = vectors[part]
            buffer = io.BytesIO()
            np.save(buffer, records, allow_pickle=False)
            write_atomic(self.folder / f"{hashlib.sha256(buffer.getvalue()).hexdigest()}.npy", buffer.getvalue())

    def _make_room(self) -> None:
        shards = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in self.folder.glob("*.npy"))
        total = sum(size for _, size, _ in shards)
        for _, size, path in shards:
            if total <= self.most_bytes:
                break
            path.unlink()
            total -= size

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file closes, or the process dies
            yield


def _to_half(vectors: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # it is checked below
        half = np.asarray(vectors, dtype=np.float16)
    if not np.isfinite(half).all():
        raise ValueError("the teacher's vectors are not finite in 16 bits")
    return half
