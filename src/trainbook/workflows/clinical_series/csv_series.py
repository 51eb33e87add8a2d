"""Series from a CSV file of one's own: a row per reading, or a column per variable; such as continuous glucose readings."""

import csv
from collections import defaultdict
from datetime import datetime
from pathlib import Path

import numpy as np

from trainbook.errors import UserError
from trainbook.workflows.clinical_series.config import Config
from trainbook.workflows.clinical_series.recordings import Raster, Recordings

LEAST_OBSERVED = 0.5  # share of the window's patches, of what is read and of what is forecast, that have a reading
Reading = tuple[float, int, float]  # minutes, variable, value


def load_csv(config: Config) -> Recordings:
    """Windows of every id's readings that are at least half full.

    Raises:
        UserError: when a file or column is missing, a value is no number, or no window is full enough.
    """
    outcomes = _outcomes(config.outcome_file) if config.outcome_file else {}
    readings = read_csv(Path(config.data_path), config.value_columns)
    values, patients, told = [], [], []
    for number, (name, series) in enumerate(sorted(readings.items())):
        for window in _windows(config, sorted(series)):
            values.append(window)
            patients.append(number)
            told.append(outcomes.get(name, np.nan))
    if not values:
        raise UserError(f"no window of {config.data_path} is half full", "shorten sequence_length or prediction_horizon")
    return Recordings(
        values=np.stack(values),
        patients=np.array(patients),
        outcomes=np.array(told, np.float32),
        static=np.zeros((len(values), 0), np.float32),
        source=f"{Path(config.data_path).name}, a file of the user's",
        licence="as the user knows",
        synthetic=None,
    )


def read_csv(path: Path, names: tuple[str, ...]) -> dict[str, list[Reading]]:
    """Readings of each id; time is a number of minutes or an ISO date, an empty value is none.

    Args:
        path: with the columns id and time, and either one column per variable or the columns variable and value.
        names: the variables.

    Raises:
        UserError: naming the line.
    """
    readings: dict[str, list[Reading]] = defaultdict(list)
    columns = {name: index for index, name in enumerate(names)}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            is_long = {"variable", "value"} <= set(rows.fieldnames or ())
            needed = {"id", "time"} | ({"variable", "value"} if is_long else set(names))
            if missing := needed - set(rows.fieldnames or ()):
                raise UserError(f"{path} has no column {', '.join(sorted(missing))}", "name its columns id, time and the values'")
            for line, row in enumerate(rows, 2):
                pairs = [(row["variable"], row["value"])] if is_long else [(name, row[name]) for name in names]
                try:
                    minutes = _minutes(row["time"])
                    found = [(minutes, columns[name], float(value)) for name, value in pairs if name in columns and value]
                except (TypeError, ValueError) as error:
                    remedy = "times are minutes or ISO dates, values are numbers"
                    raise UserError(f"{path}, line {line}: {error}", remedy) from None
                readings[row["id"]] += [reading for reading in found if np.isfinite(reading[2])]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}", "give a CSV file in UTF-8") from None
    return readings


def _minutes(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        moment = datetime.fromisoformat(text)
        return (moment - datetime(1970, 1, 1, tzinfo=moment.tzinfo)).total_seconds() / 60


def _windows(config: Config, series: list[Reading]) -> list[np.ndarray]:
    """All windows of a record that are full enough, (L, V) each."""
    if not series:
        return []
    minutes = np.array([reading[0] for reading in series])
    length = config.window_samples * config.sample_minutes
    last = minutes[-1] - length if config.window_stride_minutes else minutes[0]
    starts = np.arange(minutes[0], max(last, minutes[0]) + 1, config.window_stride_minutes or 1)
    found = []
    for start in starts:
        raster = Raster(config.window_samples, len(config.value_columns), config.sample_minutes)
        for moment, variable, value in series[slice(*np.searchsorted(minutes, [start, start + length]))]:
            raster.add(moment - start, variable, value)
        window = raster.values()
        is_seen = ~np.isnan(window).reshape(-1, config.patch_samples * window.shape[1]).all(1)
        if min(is_seen[: config.num_tokens].mean(), is_seen[config.num_tokens :].mean()) >= LEAST_OBSERVED:
            found.append(window)
    return found


def _outcomes(path: str) -> dict[str, float]:
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            found = {row["id"]: float(row["outcome"]) for row in csv.DictReader(file)}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"cannot read outcomes from {path}: {error!r}", "give a CSV file of id and outcome, 0 or 1") from None
    if not set(found.values()) <= {0.0, 1.0}:
        raise UserError(f"{path} has outcomes other than 0 and 1", "write 1 for what happened and 0 for what did not")
    return found
