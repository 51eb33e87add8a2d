"""The data of a run: recordings split by patient, with the patch means that are to be forecast."""

# N windows, L readings that are read, V variables, S static features, P patches read and to come, H patches forecast

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from trainbook.data import Data, content_sha256
from trainbook.errors import UserError
from trainbook.runtime import Runtime
from trainbook.workflows.clinical_series.config import Config
from trainbook.workflows.clinical_series.csv_series import load_csv
from trainbook.workflows.clinical_series.generator import generate
from trainbook.workflows.clinical_series.oracle import oracle
from trainbook.workflows.clinical_series.physionet import load_physionet
from trainbook.workflows.clinical_series.recordings import Recordings

DATA_SEED = 20_261_127  # of the generator and of the split, which belong to the data, not to the run
VALID_SHARE, TEST_SHARE = 0.15, 0.25
UNKNOWN = -1.0  # an outcome that nobody told


def load_data(config: Config, runtime: Runtime) -> Data:
    """Windows split by patient, on the runtime's device.

    Every split has values (N, L, V) in the variables' units, 0 where there is none; observed, (N, L, V) bool; static, (N, S);
    patch_means and patch_observed, (N, P, V), of what is read and what is to come; outcomes, (N,), 0, 1 or UNKNOWN; patients,
    (N,). The test split of generated series also has oracle_risk, (N,), and oracle_forecast, (N, H, V).

    Raises:
        UserError: when files cannot be had or read, or there are too few patients to split.
    """
    if config.dataset == "generated":
        recordings = _generated(config)
    else:
        recordings = load_physionet(config, runtime) if config.dataset == "physionet" else load_csv(config)
    parts = split_by_patient(recordings)
    splits = {name: tensors(config, recordings, part) for name, part in parts.items()}
    if config.dataset == "generated":
        read = recordings.values[parts["test"], : config.sequence_length]
        risk, forecast = oracle(read, config.prediction_horizon, config.patch_minutes)
        splits["test"] |= {"oracle_risk": torch.from_numpy(risk).float(), "oracle_forecast": torch.from_numpy(forecast).float()}
    arrays = (recordings.values, recordings.outcomes, recordings.static, recordings.patients)
    digest = content_sha256(torch.from_numpy(array) for array in arrays)
    data = Data(**splits, source=recordings.source, licence=recordings.licence, sha256=digest, synthetic=recordings.synthetic)
    return data.to(runtime.device)


def _generated(config: Config) -> Recordings:
    found = generate(config.num_patients, config.window_samples, DATA_SEED)
    return Recordings(
        values=found.observed,
        patients=np.arange(config.num_patients),
        outcomes=found.died.astype(np.float32),
        static=np.zeros((config.num_patients, 0), np.float32),
        source="clinical_series generator: heart rate, mean arterial pressure and oxygen saturation that no patient had",
        licence="the kit's own",
        synthetic=True,
        complete=found.complete,
    )


def split_by_patient(recordings: Recordings) -> dict[str, np.ndarray]:
    """Indices of train, valid and test; all windows of a patient stand together, and outcomes are spread evenly.

    Raises:
        UserError: with fewer than 8 patients.
    """
    patients, first = np.unique(recordings.patients, return_index=True)
    if len(patients) < 8:
        raise UserError(f"{len(patients)} patients cannot be split into train, valid and test", "give at least 8")
    outcomes = recordings.outcomes[first]

    def cut(members: np.ndarray, share: float) -> list[np.ndarray]:
        classes = np.bincount(outcomes[members].astype(int), minlength=2) if not np.isnan(outcomes).any() else np.zeros(2)
        strata = outcomes[members] if classes.min() >= 4 else None
        return train_test_split(members, test_size=share, random_state=DATA_SEED, stratify=strata)

    rest, test = cut(np.arange(len(patients)), TEST_SHARE)
    train, valid = cut(rest, VALID_SHARE / (1 - TEST_SHARE))
    parts = {"train": train, "valid": valid, "test": test}
    return {name: np.flatnonzero(np.isin(recordings.patients, patients[part])) for name, part in parts.items()}


def tensors(config: Config, recordings: Recordings, part: np.ndarray) -> dict[str, Tensor]:
    """The tensors of a split, as `load_data` describes them."""
    values = torch.from_numpy(recordings.values[part])
    truth = values if recordings.complete is None else torch.from_numpy(recordings.complete[part])
    read, ahead = config.num_tokens * config.patch_samples, slice(config.num_tokens, None)
    means, seen = patch_means(values, config.patch_samples)
    future, future_seen = patch_means(truth, config.patch_samples)
    means[:, ahead], seen[:, ahead] = future[:, ahead], future_seen[:, ahead]  # what is to come is judged without gaps
    return {
        "values": values[:, :read].nan_to_num(),
        "observed": ~values[:, :read].isnan(),
        "static": torch.from_numpy(recordings.static[part]),
        "patch_means": means,
        "patch_observed": seen,
        "outcomes": torch.from_numpy(recordings.outcomes[part]).nan_to_num(UNKNOWN),
        "patients": torch.from_numpy(recordings.patients[part]),
    }


def patch_means(values: Tensor, patch_samples: int) -> tuple[Tensor, Tensor]:
    """Mean of the readings in each patch, 0 without any, and whether there was one.

    Args:
        values: (N, samples, V), NaN where there is none.
        patch_samples: readings per patch.
    """
    patches = values.unflatten(1, (-1, patch_samples))
    seen = (~patches.isnan()).sum(2)
    return patches.nan_to_num().sum(2) / seen.clamp(min=1), seen > 0


def targets(config: Config, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What each token forecasts, and whether it was observed: the next H patch means from every token on.

    Returns:
        (N, T, H, V) twice.
    """
    return tuple(
        batch[name][:, 1:].unfold(1, config.prediction_horizon, 1).movedim(-1, 2) for name in ("patch_means", "patch_observed")
    )
