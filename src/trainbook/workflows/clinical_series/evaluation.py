"""Held-out metrics of the model beside its baselines and, on generated series, beside the best possible answer."""

# N windows, R resamples, H patches forecast, V variables

from dataclasses import dataclass

import numpy as np

from trainbook.comparison import ABOVE, HIGH, LOW
from trainbook.data import Data
from trainbook.state import TrainState
from trainbook.workflows.clinical_series import baselines
from trainbook.workflows.clinical_series.config import Config
from trainbook.workflows.clinical_series.training import MODEL, predict

RESAMPLES = 1000
RESAMPLE_SEED = 20_261_128
ENDS = (0.025, 0.975)
NUM_BINS = 10  # of the reliability curve, equally many windows in each
QUANTILES = (0.05, 0.25, 0.75, 0.95)  # of the forecast's fan


@dataclass(frozen=True)
class Judged:
    """What everybody said of the test windows.

    Attributes:
        forecasts: who to (N, H, V), in the variables' units.
        risks: who to (N,), where outcomes are known; else empty.
        truth, is_there: (N, H, V).
        outcomes: (N,).
        fan: (4, H, V), what to add to the model's forecast for the quantiles `QUANTILES`: of its residuals on valid.
    """

    forecasts: dict[str, np.ndarray]
    risks: dict[str, np.ndarray]
    truth: np.ndarray
    is_there: np.ndarray
    outcomes: np.ndarray
    fan: np.ndarray


def judge(config: Config, data: Data, state: TrainState) -> Judged:
    """Everybody's answers."""
    forecast, risk = (tensor.numpy() for tensor in predict(config, state, data.test))
    forecasts = {"model": forecast, **baselines.forecasts(config, data)}
    risks = {"model": risk}
    outcomes = data.test["outcomes"].cpu().numpy()
    told = all({0.0, 1.0} <= set(part["outcomes"].unique().tolist()) for part in (data.train, data.valid, data.test))
    if told:
        risks["logistic"] = baselines.logistic_risk(config, data)
    if "oracle_risk" in data.test:
        forecasts["oracle"] = data.test["oracle_forecast"].cpu().numpy()
        risks["oracle"] = data.test["oracle_risk"].cpu().numpy()
    truth, is_there = _future(config, data.test)
    return Judged(forecasts, risks if told else {}, truth, is_there, outcomes, _fan(config, data, state))


def evaluate(config: Config, data: Data, state: TrainState) -> dict[str, float]:
    """Metrics named "<who>/<metric>", with 95 % intervals from resampled patients.

    mae: mean absolute error of the forecast in deviations of the training readings, mean over windows; mae_<variable>: in its
    unit. auroc, brier, calibration_error: of the risk. "<who>/<metric>_above_model": of a baseline less the model's, lower is
    better. coverage_90: share of what came that lies in the 90 % fan.
    """
    found = judge(config, data, state)
    weights = resampled(data.test["patients"].cpu().numpy())
    deviation = state.modules[MODEL].deviation.cpu().numpy()
    metrics: dict[str, float] = {}
    errors = {who: np.abs(forecast - found.truth) for who, forecast in found.forecasts.items()}
    by_window = {who: _mean(error / deviation, found.is_there) for who, error in errors.items()}
    mae = {who: _weighted(values, weights) for who, values in by_window.items()}
    for who, error in errors.items():
        metrics |= _interval(f"{who}/mae", mae[who])
        for index, variable in enumerate(config.variables):
            there = found.is_there[..., index]
            if there.any():
                metrics[f"{who}/mae_{variable.name}"] = float(error[..., index][there].mean())
        if who != "model":
            metrics |= _interval(f"{who}/mae{ABOVE}model", mae[who] - mae["model"])
    metrics["model/mae_over_persistence"] = metrics["model/mae"] / metrics["persistence/mae"]
    if "oracle" in mae:
        metrics["model/mae_over_oracle"] = metrics["model/mae"] / metrics["oracle/mae"]
    lies = (found.forecasts["model"] + found.fan[0] <= found.truth) & (found.truth <= found.forecasts["model"] + found.fan[-1])
    metrics["model/coverage_90"] = float(lies[found.is_there].mean())
    return metrics | (_risks(found, weights) if found.risks else {})


def _risks(found: Judged, weights: np.ndarray) -> dict[str, float]:
    known = found.outcomes >= 0
    outcomes, weights = found.outcomes[known], weights[:, known]
    metrics: dict[str, float] = {}
    areas = {who: auroc(outcomes, risk[known], weights) for who, risk in found.risks.items()}
    briers = {who: _weighted((risk[known] - outcomes) ** 2, weights) for who, risk in found.risks.items()}
    for who, risk in found.risks.items():
        metrics |= _interval(f"{who}/auroc", areas[who]) | _interval(f"{who}/brier", briers[who])
        expected, happened, _ = reliability(outcomes, risk[known])
        metrics[f"{who}/calibration_error"] = float(np.abs(expected - happened).mean())
        if who != "model":
            metrics |= _interval(f"{who}/one_minus_auroc{ABOVE}model", areas["model"] - areas[who])
    metrics["base_rate/brier"] = float(outcomes.mean() * (1 - outcomes.mean()))
    if "oracle" in areas:
        metrics["model/share_of_oracle_auroc"] = (metrics["model/auroc"] - 0.5) / (metrics["oracle/auroc"] - 0.5)
    return metrics


def resampled(patients: np.ndarray) -> np.ndarray:
    """Weights of the windows, (1 + RESAMPLES, N): all 1 first, then how often each window's patient was drawn."""
    numbers, place = np.unique(patients, return_inverse=True)
    random = np.random.default_rng(RESAMPLE_SEED)
    drawn = random.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), RESAMPLES)
    return np.concatenate([np.ones((1, len(patients))), drawn[:, place]])


def auroc(outcomes: np.ndarray, risks: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """P(a case has a higher risk than another) + P(equal) / 2, for each row of weights; NaN where one class is absent.

    Args:
        outcomes: (N,), 0 or 1.
        risks: (N,), any order-preserving score.
        weights: (R, N).

    Returns:
        (R,)
    """
    scores, place = np.unique(risks, return_inverse=True)
    cases, others = (
        np.stack([np.bincount(place, row, len(scores)) for row in weights * (outcomes == label)]) for label in (1, 0)
    )
    pairs = (cases * (others.cumsum(1) - others / 2)).sum(1)
    total = cases.sum(1) * others.sum(1)
    return np.where(total > 0, pairs / np.where(total > 0, total, 1), np.nan)


def reliability(outcomes: np.ndarray, risks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean risk, share of cases and number of windows in `NUM_BINS` bins of equally many windows, by rising risk."""
    bins = np.array_split(np.argsort(risks, kind="stable"), min(NUM_BINS, len(risks)))
    return tuple(np.array(part) for part in zip(*((risks[b].mean(), outcomes[b].mean(), len(b)) for b in bins), strict=True))


def _fan(config: Config, data: Data, state: TrainState) -> np.ndarray:
    forecast, _ = predict(config, state, data.valid)
    truth, is_there = _future(config, data.valid)
    residuals = np.where(is_there, truth - forecast.numpy(), np.nan)
    unseen = ~is_there.any(0)  # nothing to learn the fan's width from
    residuals[:, unseen] = 0
    return np.nanquantile(residuals, QUANTILES, axis=0)


def _future(config: Config, split: dict) -> tuple[np.ndarray, np.ndarray]:
    return tuple(split[name][:, config.num_tokens :].cpu().numpy() for name in ("patch_means", "patch_observed"))


def _mean(error: np.ndarray, is_there: np.ndarray) -> np.ndarray:
    """Mean over what was observed of each window, (N,); NaN where nothing was."""
    count = is_there.sum((1, 2))
    return np.where(count > 0, (error * is_there).sum((1, 2)) / count.clip(1), np.nan)


def _weighted(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means over windows that have a value, (R,)."""
    known = ~np.isnan(values)
    return weights[:, known] @ values[known] / weights[:, known].sum(1)


def _interval(name: str, resamples: np.ndarray) -> dict[str, float]:
    """The value on the windows as they are, and the 95 % interval of the resamples."""
    low, high = np.nanquantile(resamples[1:], ENDS)
    return {name: float(resamples[0]), name + LOW: float(low), name + HIGH: float(high)}
