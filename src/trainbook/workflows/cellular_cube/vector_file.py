"""A teacher that is a file: the user's own vectors, a row for each line of the text file."""

# N sentences, D numbers of a vector

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from trainbook.errors import UserError
from trainbook.files import file_sha256
from trainbook.workflows.cellular_cube.sentences import Corpus

REMEDY = "save an array of floats, (lines of text_file that are not blank, numbers of a vector), as .npy or .safetensors"


class FileTeacher:
    """Looks sentences up; to one that was not in the text file it gives NaN.

    Args:
        path: of the vectors.
        corpus: of the text file.

    Raises:
        UserError: when the file cannot be read, holds something else, or has another number of rows.
    """

    model, pooling = "file", "as given"

    def __init__(self, path: Path, corpus: Corpus) -> None:
        self._path, self._vectors = path, read_vectors(path)
        if len(self._vectors) != corpus.num_rows:
            raise UserError(
                f"vector_file {path} has {len(self._vectors)} rows, and text_file has {corpus.num_rows} lines that are not blank",
                "give one row for each such line, in the same order; repeated lines have rows of their own",
            )
        self._rows = dict(zip(corpus.sentences, corpus.rows.tolist(), strict=True))
        self.width, self.revision = self._vectors.shape[1], file_sha256(path)
        self.description = f"file {path.name}, {self.width} numbers: the user's own"

    def embed(self, sentences: Sequence[str]) -> np.ndarray:
        """(N, D) float32; NaN where there is no vector.

        Raises:
            UserError: for a number beyond the range of float32.
        """
        vectors = np.full((len(sentences), self.width), np.nan, dtype=np.float32)
        found = [(row, self._rows[sentence]) for row, sentence in enumerate(sentences) if sentence in self._rows]
        if found:
            to, taken = np.array(found).T
            with np.errstate(over="ignore"):  # it is checked below
                vectors[to] = self._vectors[taken]
        if np.isinf(vectors).any():
            sentence = sentences[int(np.isinf(vectors).any(1).argmax())]
            raise UserError(f"vector_file {self._path} holds infinite numbers, the first for {sentence!r}", REMEDY)
        return vectors


def read_vectors(path: Path) -> np.ndarray:
    """(rows, D) of a file, mapped into memory; nothing in it is unpickled.

    Raises:
        UserError: when it cannot be read, or is no table of floats.
    """
    try:
        vectors = _tensor(path) if path.suffix == ".safetensors" else np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read vector_file {path}: {str(error).splitlines()[0]}", REMEDY) from None
    if not (isinstance(vectors, np.ndarray) and vectors.ndim == 2 and vectors.shape[1] and vectors.dtype.kind == "f"):
        held = f"{vectors.dtype} of shape {vectors.shape}" if isinstance(vectors, np.ndarray) else "several arrays"
        raise UserError(f"vector_file {path} holds {held}", REMEDY)
    return vectors


def _tensor(path: Path) -> np.ndarray:
    with safe_open(str(path), framework="pt") as file:
        if len(file.keys()) != 1:
            raise ValueError(f"it holds {len(file.keys())} tensors, not one")
        (tensor,) = (file.get_tensor(name) for name in file.keys())  # noqa: SIM118  (no mapping)
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()  # numpy has no bfloat16
