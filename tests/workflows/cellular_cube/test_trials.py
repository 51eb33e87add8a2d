"""The trials run, each against a plain network of as many parameters, and say how sure they are."""

import pytest

from trainbook.runtime import detect
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.data import load_data
from trainbook.workflows.cellular_cube.trials import NAMES, trial_metrics


@pytest.mark.slow
def test_every_trial_has_both_sides_and_an_interval(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINBOOK_DATA", str(tmp_path))
    config = Config.from_preset("smoke", {"trial_seeds": 2, "trial_epochs": 1})
    metrics = trial_metrics(config, load_data(config, detect()))
    for name in NAMES:
        assert 0 < metrics[f"cube/{name}_fvu"] < 2
        key = f"plain/{name}_fvu_above_cube"
        assert metrics[f"{key}_low"] < metrics[key] < metrics[f"{key}_high"]
    assert metrics["cube/wall_fvu"] > metrics["cube/narrow_code_fvu"]
    assert trial_metrics(Config.from_preset("smoke"), None) == {}
