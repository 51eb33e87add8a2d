"""Synthetic bedside series of which everything is known: vital signs that drift with a severity that also decides on death."""

# N patients, L minutes, V variables, G grades of severity

from dataclasses import dataclass

import numpy as np
from scipy.signal import lfilter
from scipy.special import expit
from scipy.stats import binom

DAY_MINUTES = 1440
GAP_START, GAP_MINUTES = 1 / 300, 40  # chance per minute that a gap begins, and its mean length
GRADES = np.arange(7)
GRADE_SHARES = binom.pmf(GRADES, len(GRADES) - 1, 0.5)
SEVERITIES = (GRADES - 3) / np.sqrt(1.5)  # standardised: mean 0, variance 1
RISKS = expit(-2.4 + 2.2 * SEVERITIES)  # of death, by grade


@dataclass(frozen=True)
class VitalSign:
    """One variable, in its own unit; `s` is the severity and t the time in days.

    x(t) = mean + s level + s trend t + offset + c cos(2 pi t) + d sin(2 pi t) + u(t) + noise

    Attributes:
        mean, level, trend: of the patients, per unit of severity, and per unit of severity and day.
        offset: deviation over patients.
        circadian: means of c and d; `circadian_spread` is their deviation.
        swing: stationary deviation of u, an Ornstein-Uhlenbeck process, times exp(`unrest` s).
        minutes: in which the correlation of u falls to 1/e.
        noise: deviation of the sensor, independent from minute to minute.
    """

    mean: float
    level: float
    trend: float
    offset: float
    circadian: tuple[float, float]
    circadian_spread: float
    swing: float
    unrest: float
    minutes: float
    noise: float

    def expected(self, severity: np.ndarray, days: np.ndarray) -> np.ndarray:
        """Mean over patients of a severity: broadcasts both."""
        wave = self.circadian[0] * np.cos(2 * np.pi * days) + self.circadian[1] * np.sin(2 * np.pi * days)
        return self.mean + severity * (self.level + self.trend * days) + wave

    def swing_of(self, severity: np.ndarray) -> np.ndarray:
        """Stationary deviation of u."""
        return self.swing * np.exp(self.unrest * severity)

    @property
    def kept(self) -> float:
        """Correlation of u between two minutes."""
        return float(np.exp(-1 / self.minutes))


VITAL_SIGNS = (
    VitalSign(84, 4.0, 3.0, 9.0, (-3.0, -2.0), 2.0, 6.0, 0.10, 150, 2.0),  # HR
    VitalSign(82, -3.5, -3.0, 7.0, (-2.0, -1.5), 1.5, 6.0, 0.10, 120, 3.0),  # MAP
    VitalSign(94, -0.7, -0.6, 1.0, (0.3, 0.2), 0.2, 0.8, 0.15, 90, 0.5),  # SpO2; not clipped at 100: the oracle needs it normal
)


@dataclass(frozen=True)
class Generated:
    """Series (N, L, V) with NaN in gaps, the truth without gaps, grades (N,) and deaths (N,)."""

    observed: np.ndarray
    complete: np.ndarray
    grades: np.ndarray
    died: np.ndarray


def generate(num_patients: int, num_minutes: int, seed: int) -> Generated:
    """Draw patients: severity, death, and every variable minute by minute."""
    random = np.random.default_rng(seed)
    grades = random.choice(GRADES, num_patients, p=GRADE_SHARES)
    died = random.random(num_patients) < RISKS[grades]
    severity, days = SEVERITIES[grades][:, None], np.arange(num_minutes)[None] / DAY_MINUTES
    series = []
    for sign in VITAL_SIGNS:
        offset, cosine, sine = random.standard_normal((3, num_patients, 1))
        steps = random.standard_normal((num_patients, num_minutes))
        steps[:, 1:] *= np.sqrt(1 - sign.kept**2)  # the first one is stationary
        wave = cosine * np.cos(2 * np.pi * days) + sine * np.sin(2 * np.pi * days)
        swing = sign.swing_of(severity) * lfilter([1], [1, -sign.kept], steps, axis=1)
        noise = sign.noise * random.standard_normal(steps.shape)
        series.append(sign.expected(severity, days) + sign.offset * offset + sign.circadian_spread * wave + swing + noise)
    complete = np.stack(series, -1).astype(np.float32)
    return Generated(np.where(_gaps(random, complete.shape), np.nan, complete), complete, grades, died)


def _gaps(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Where nothing was measured: a chain of two states, minute by minute, for each patient and variable."""
    drawn = random.random(shape, dtype=np.float32)
    gap = np.zeros(shape, bool)
    gap[:, 0] = drawn[:, 0] < GAP_START * GAP_MINUTES
    for minute in range(1, shape[1]):
        gap[:, minute] = drawn[:, minute] < np.where(gap[:, minute - 1], 1 - 1 / GAP_MINUTES, GAP_START)
    return gap
