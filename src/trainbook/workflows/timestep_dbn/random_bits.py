"""Random numbers from counters: every draw is a function of seed, step, use, timestep and unit, and of nothing else.

Block size, tile, device, number of threads and resuming therefore leave them as they are. One number is an integer hash
of two rounds; each takes in 32 bits of a 64-bit key of (seed, step, use, timestep) and the first an index of (row, unit):

    x <- (index ^ key_1) * 0x7FEB352D,  x <- x ^ (x >> 15),  x <- (x + key_2) * 0x846CA68B,  uniform number = x / 2^32

Whole numbers of 32 bits, so that it vectorises and wraps alike on every device; the best bits of a product are its highest,
so no shift follows the last one. Source: Salmon et al. (2011), Parallel Random Numbers: As Easy as 1, 2, 3, for counters as
state; multipliers and the shift from Wellons (2018), Prospecting for Hash Functions.
"""

# T timesteps, B batch, N units

from functools import cache

import numpy as np
import torch
from torch import Tensor

FIRST_MULTIPLIER, SHIFT, SECOND_MULTIPLIER = 0x7FEB352D, 15, 0x846CA68B - 2**32  # signed, as int32 has it
KEYS_AT_ONCE = 2**15  # keys are made for so many (step, use, timestep) in one go


class RandomKeys:
    """The keys of every draw of a run.

    Args:
        seed: of the run.
        uses: number of draws within a step and timestep.
        timesteps: T.
        device: where the numbers are needed.
    """

    def __init__(self, seed: int, uses: int, timesteps: int, device: torch.device | str) -> None:
        self._seed, self._shape, self._device = seed, (uses, timesteps), torch.device(device)
        self._steps = max(1, KEYS_AT_ONCE // (uses * timesteps))
        self._chunk, self._keys = -1, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """The keys of a step, int32 (uses, 2, T, 1, 1)."""
        chunk, position = divmod(step, self._steps)
        if chunk != self._chunk:
            steps = np.arange(chunk * self._steps, (chunk + 1) * self._steps, dtype=np.uint64)
            use, timestep = np.indices(self._shape, dtype=np.uint64)
            of_step = _mixed(_mixed(np.uint64(self._seed)) + steps).reshape(-1, 1, 1)
            keys = _mixed(of_step + (use << np.uint64(32)) + timestep)  # (steps, uses, T)
            halves = keys.view(np.int32).reshape(*keys.shape, 2)
            self._keys = torch.from_numpy(np.moveaxis(halves, -1, 2)[..., None, None].copy()).to(self._device)
            self._chunk = chunk
        return self._keys[position]


@cache
def unit_index(rows: int, units: int, device: torch.device) -> Tensor:
    """What stands for each (row, unit) in the hash, itself hashed: neighbours differ in half of their bits; int32 (1, B, N)."""
    count = np.arange(rows * units, dtype=np.uint64)
    return torch.from_numpy(_mixed(count).view(np.int32)[1::2].reshape(1, rows, units).copy()).to(device)


def random_integers(index: Tensor, key: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Equally likely whole numbers from -2^31 to 2^31 - 1.

    Args:
        index: (1, B, N), from `unit_index`.
        key: (2, T, 1, 1), one use's of `RandomKeys`.
        x: int32 (T, B, N), where they are written.
        y: as x, overwritten.

    Returns:
        x
    """
    torch.bitwise_xor(index, key[0], out=x)
    x.mul_(FIRST_MULTIPLIER)
    torch.bitwise_right_shift(x, SHIFT, out=y)
    y.bitwise_and_(2 ** (32 - SHIFT) - 1)  # int32 shifts copies of the sign in
    x.bitwise_xor_(y)
    return x.add_(key[1]).mul_(SECOND_MULTIPLIER)


def random_uniforms(index: Tensor, key: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Equally likely numbers from 0 to 1, in multiples of 2^-24 near 0 and 1; arguments as of `random_integers`, x and y float."""
    integers = random_integers(index, key, x.view(torch.int32), y.view(torch.int32))
    return y.copy_(integers).mul_(2.0**-32).add_(0.5)


def threshold(probability: Tensor) -> Tensor:
    """The whole number that `random_integers` lie below with a probability of at most 1 - 2^-32, int32."""
    return (probability.double() * 2**32 - 2**31).round_().clamp_(max=2**31 - 1).int()


def _mixed(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit words whose output looks random; Steele et al. (2014), Fast Splittable Pseudorandom Number Generators."""
    with np.errstate(over="ignore"):  # a scalar that wraps warns, an array does not
        x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
