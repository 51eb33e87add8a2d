"""Series as a source gives them, before any split: what every loader returns."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Recordings:
    """Windows of equal length.

    Attributes:
        values: (N, L, V) float32 in the variables' units, NaN where nothing was observed; past and future.
        patients: (N,) int64; windows of one patient share the number and stay in one split.
        outcomes: (N,) float32, 0 or 1, NaN where nobody told.
        static: (N, S) float32, known from the beginning, of the order of 1.
        source, licence, synthetic: as in `trainbook.data.Data`.
        complete: (N, L, V), the truth without gaps, where a generator knows it.
    """

    values: np.ndarray
    patients: np.ndarray
    outcomes: np.ndarray
    static: np.ndarray
    source: str
    licence: str
    synthetic: bool | None
    complete: np.ndarray | None = None


class Raster:
    """Collects readings of one window on a regular grid; several in one cell are averaged."""

    def __init__(self, num_samples: int, num_variables: int, sample_minutes: int) -> None:
        self._sums = np.zeros((num_samples, num_variables))
        self._counts = np.zeros((num_samples, num_variables))
        self._sample_minutes = sample_minutes

    def add(self, minutes: float, variable: int, value: float) -> None:
        """Take a reading, so many minutes after the window's start; outside of it nothing happens."""
        index = int(minutes // self._sample_minutes)
        if 0 <= index < len(self._sums):
            self._sums[index, variable] += value
            self._counts[index, variable] += 1

    def values(self) -> np.ndarray:
        """(num_samples, num_variables) float32, NaN where there was no reading."""
        means = self._sums / np.maximum(self._counts, 1)
        return np.where(self._counts > 0, means, np.nan).astype(np.float32)
