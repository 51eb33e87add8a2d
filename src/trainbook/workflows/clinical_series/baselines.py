"""What a practitioner tries first: persistence, the day's mean, ridge regression, and logistic regression on summaries."""

# N windows, T patches read, H patches forecast, V variables, S static features

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from trainbook.data import Data
from trainbook.workflows.clinical_series.config import Config
from trainbook.workflows.clinical_series.model import carried_forward

PENALTIES = (1.0, 10.0, 100.0, 1000.0)  # of ridge; the best on valid is taken
INVERSE_PENALTIES = (0.003, 0.03, 0.3, 3.0)  # of logistic regression, likewise

Split = dict[str, Tensor]


def forecasts(config: Config, data: Data) -> dict[str, np.ndarray]:
    """Name to forecast of the test windows in the variables' units, (N, H, V)."""
    means = _training_means(config, data)
    last, day = (_filled(config, part, means) for part in (data.test, data.test))
    return {
        "persistence": np.repeat(last[:, -1:], config.prediction_horizon, 1),
        "day_mean": np.repeat(_day_mean(config, data.test, means)[:, None], config.prediction_horizon, 1),
        "ridge": _ridge(config, data, means, day),
    }


def logistic_risk(config: Config, data: Data) -> np.ndarray:
    """Probability of the outcome for each test window, (N,), from summaries of what was read; penalty chosen on valid."""
    scaler = StandardScaler()
    train = scaler.fit_transform(_summaries(config, data.train, data))
    valid, test = (scaler.transform(_summaries(config, part, data)) for part in (data.valid, data.test))
    labels = {name: part["outcomes"].cpu().numpy() for name, part in (("train", data.train), ("valid", data.valid))}
    known = {name: values >= 0 for name, values in labels.items()}
    models = [
        LogisticRegression(C=penalty, max_iter=5000).fit(train[known["train"]], labels["train"][known["train"]])
        for penalty in INVERSE_PENALTIES
    ]
    truth, rows = labels["valid"][known["valid"]], valid[known["valid"]]
    best = min(models, key=lambda model: log_loss(truth, model.predict_proba(rows)[:, 1], labels=[0, 1]))
    return best.predict_proba(test)[:, 1]


def _read(config: Config, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Patch means of what was read, and whether there was one, (N, T, V)."""
    return tuple(split[name][:, : config.num_tokens].cpu().numpy() for name in ("patch_means", "patch_observed"))


def _training_means(config: Config, data: Data) -> np.ndarray:
    values, seen = _read(config, data.train)
    return (values * seen).sum((0, 1)) / seen.sum((0, 1)).clip(1)


def _filled(config: Config, split: Split, means: np.ndarray) -> np.ndarray:
    """Patch means with the last one carried over gaps, and the training mean before the first, (N, T, V)."""
    centred = split["patch_means"][:, : config.num_tokens].cpu() - Tensor(means)
    return carried_forward(centred, split["patch_observed"][:, : config.num_tokens].cpu()).numpy() + means


def _day_mean(config: Config, split: Split, means: np.ndarray) -> np.ndarray:
    """Mean of each window's observed patches, (N, V)."""
    values, seen = _read(config, split)
    count = seen.sum(1)
    return np.where(count > 0, (values * seen).sum(1) / count.clip(1), means)


def _ridge(config: Config, data: Data, means: np.ndarray, test: np.ndarray) -> np.ndarray:
    """One ridge regression per variable and hour, on all patches of all variables; trained where that hour was observed."""
    inputs = {"train": _filled(config, data.train, means), "valid": _filled(config, data.valid, means), "test": test}
    rows = {name: part.reshape(len(part), -1) for name, part in inputs.items()}
    spread = rows["train"].std(0).clip(1e-6)
    rows = {name: (part - rows["train"].mean(0)) / spread for name, part in rows.items()}
    future = {
        name: tuple(split[key][:, config.num_tokens :].cpu().numpy() for key in ("patch_means", "patch_observed"))
        for name, split in (("train", data.train), ("valid", data.valid))
    }
    found = np.repeat(
        _day_mean(config, data.test, means)[:, None], config.prediction_horizon, 1
    )  # where there is nothing to learn
    for variable in range(found.shape[2]):
        seen = [future["train"][1][:, hour, variable] for hour in range(config.prediction_horizon)]
        models = {
            penalty: [
                Ridge(penalty).fit(rows["train"][there], future["train"][0][there, hour, variable]) if there.sum() > 1 else None
                for hour, there in enumerate(seen)
            ]
            for penalty in PENALTIES
        }

        def error(penalty: float, variable: int = variable, models: dict = models) -> float:
            truth, there = (part[..., variable] for part in future["valid"])
            errors = [
                np.abs(model.predict(rows["valid"]) - truth[:, hour])[there[:, hour]].sum()
                for hour, model in enumerate(models[penalty])
                if model is not None
            ]
            return sum(errors)

        for hour, model in enumerate(models[min(PENALTIES, key=error)]):
            if model is not None:
                found[:, hour, variable] = model.predict(rows["test"])
    return found


def _summaries(config: Config, split: Split, data: Data) -> np.ndarray:
    """Per variable the mean, deviation, lowest, highest, first, last, slope and number of patch means; static features too."""
    means = _training_means(config, data)
    values, seen = _read(config, split)
    filled = _filled(config, split, means)
    day = _day_mean(config, split, means)
    inside = np.where(seen, values, day[:, None])
    hours = np.arange(config.num_tokens) - (config.num_tokens - 1) / 2
    slope = ((inside - day[:, None]) * hours[:, None]).sum(1) / (hours**2).sum().clip(1)
    parts = [day, inside.std(1), inside.min(1), inside.max(1), inside[:, 0], filled[:, -1], slope, seen.mean(1)]
    return np.concatenate([*parts, split["static"].cpu().numpy()], 1)
