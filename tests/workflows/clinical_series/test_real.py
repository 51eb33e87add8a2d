"""Real stays, glucose readings, and the laptop run against the oracle; by hand: `pytest -m slow`. Figures: the README."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from trainbook.seeding import seed_step
from trainbook.workflows.clinical_series.config import Config
from trainbook.workflows.clinical_series.data import load_data
from trainbook.workflows.clinical_series.evaluation import evaluate
from trainbook.workflows.clinical_series.training import build, train

SHARED = Path(__file__).parents[4] / "shared/data/clinical"  # beside the checkout
RUNTIME = SimpleNamespace(device="cpu", data_folder=None)
STAYS, GLUCOSE = SHARED / "physionet2012_set_a.tar.gz", SHARED / "example_data_hall.csv"

pytestmark = pytest.mark.slow


def measured(preset, **overrides):
    config = Config.from_preset(preset, overrides)
    data = load_data(config, RUNTIME)
    seed_step(config.seed, 0)
    state = build(config, data, RUNTIME)
    records = train(config, data, state)
    while True:
        seed_step(config.seed, state.step)
        if next(records, None) is None:
            break
    metrics = evaluate(config, data, state)
    print({name: round(value, 4) for name, value in metrics.items() if not name.endswith(("_low", "_high"))})
    return metrics


def test_synthetic_patients_come_near_the_oracle():
    metrics = measured("laptop")
    assert metrics["model/share_of_oracle_auroc"] >= 0.9
    assert metrics["model/mae_over_persistence"] <= 0.85
    assert metrics["model/mae_over_oracle"] <= 1.15


def test_real_stays():
    """4,000 stays, 24 h to 12 h and death in hospital, with the laptop's small model."""
    if not STAYS.is_file():
        pytest.skip(f"{STAYS} is not there")
    small = {"dropout": 0.3, "num_epochs": 8, "learning_rate": 2e-3, "batch_size": 32, "validate_every": 75}
    metrics = measured("laptop", dataset="physionet", sample_minutes=60, data_path=str(STAYS), **small)
    assert metrics["model/auroc"] >= 0.78
    assert metrics["model/mae"] < min(metrics[f"{who}/mae"] for who in ("persistence", "day_mean"))


def test_glucose_readings():
    """3 h to 1 h, every 5 minutes; tested on persons that were not trained on."""
    if not GLUCOSE.is_file():
        pytest.skip(f"{GLUCOSE} is not there")
    metrics = measured(
        "laptop", dataset="csv", data_path=str(GLUCOSE), value_columns=("gl",), units=("mg/dL",), sample_minutes=5,
        patch_minutes=5, sequence_length=180, prediction_horizon=12, window_stride_minutes=30, num_epochs=4,
    )  # fmt: skip
    assert metrics["model/mae"] < metrics["persistence/mae"]
