"""Learning rates of a run as a function of the step."""

import math

from trainbook.optimization import OptimizationConfig

ONE_CYCLE_RISE, ONE_CYCLE_START = 0.3, 1 / 25  # OneCycleLR's pct_start and 1 / div_factor


def learning_rate(config: OptimizationConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step: a function of the step alone, so that a resumed run continues exactly.

    With W warm-up steps, n = max(1, total_steps - W) steps after them, a = learning_rate, f = final share:

        rate(s) = r(0) (s + 1) / (W + 1)    for s < W
        rate(s) = r(s - W)                  from W on, where r(k) is
            constant    a
            cosine      a (f + (1 - f) (1 + cos(pi min(k / n, 1))) / 2)
            linear      a (1 + (f - 1) min(k / n, 1))
            step        a step_factor^floor(k / step_size)
            one_cycle   c(a/25, a, k / m) for k <= m, else c(a, a f, (k - m) / (n - 1 - m)), m = 0.3 n - 1

    where c(x, y, p) = y + (x - y) (1 + cos(pi p)) / 2. They are torch's CosineAnnealingLR(T_max=n),
    LinearLR(1, f, n), StepLR and OneCycleLR(total_steps=n, pct_start=0.3, div_factor=25); momentum is not cycled.

    Args:
        config: of the run.
        step: counted from 0.
        total_steps: of the whole run, warm-up included.
    """
    warmup = config.warmup_steps
    k, n = max(0, step - warmup), max(1, total_steps - warmup)
    peak, final = config.learning_rate, config.learning_rate * config.final_learning_rate_share
    match config.schedule:
        case "constant":
            rate = peak
        case "cosine":
            rate = _cosine(peak, final, min(k / n, 1.0))
        case "linear":
            rate = peak + (final - peak) * min(k / n, 1.0)
        case "step":
            rate = peak * config.step_factor ** (k // config.step_size)
        case "one_cycle":
            top = ONE_CYCLE_RISE * n - 1
            if k <= top:
                rate = _cosine(peak * ONE_CYCLE_START, peak, k / top if top else 1.0)
            else:
                rate = _cosine(peak, final, min((k - top) / (n - 1 - top), 1.0))
    return rate * (step + 1) / (warmup + 1) if step < warmup else rate


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
