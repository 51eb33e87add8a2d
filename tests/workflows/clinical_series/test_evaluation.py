"""Metrics against scikit-learn and definitions; a smoke run is judged in test_contract."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from trainbook.seeding import seed_step
from trainbook.workflows.clinical_series import baselines
from trainbook.workflows.clinical_series.config import Config
from trainbook.workflows.clinical_series.data import load_data
from trainbook.workflows.clinical_series.evaluation import auroc, evaluate, judge, reliability, resampled
from trainbook.workflows.clinical_series.pictures import draw
from trainbook.workflows.clinical_series.training import build, train

RUNTIME = SimpleNamespace(device="cpu", data_folder=None)


def test_auroc_is_scikit_learns_with_ties_and_weights():
    random = np.random.default_rng(0)
    outcomes, risks = (random.random(200) < 0.3).astype(float), random.integers(0, 12, 200) / 12
    weights = random.integers(0, 4, (20, 200)).astype(float)
    expected = [roc_auc_score(outcomes, risks, sample_weight=row) for row in weights]
    np.testing.assert_allclose(auroc(outcomes, risks, weights), expected, rtol=1e-12)
    assert np.isnan(auroc(np.ones(5), np.arange(5.0), np.ones((1, 5)))[0])


def test_patients_are_resampled_whole():
    weights = resampled(np.array([7, 7, 3, 9, 9, 9]))
    assert (weights[0] == 1).all()
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[1:, [0, 2, 3]].sum(1) == 3).all()
    assert weights[1:].mean() == pytest.approx(1, abs=0.05)


def test_reliability_of_a_calibrated_risk_lies_on_the_diagonal():
    random = np.random.default_rng(1)
    risk = random.random(20_000)
    expected, happened, number = reliability((random.random(20_000) < risk).astype(float), risk)
    assert number.sum() == 20_000
    np.testing.assert_allclose(expected, happened, atol=4 * np.sqrt(0.25 / 2000))


@pytest.fixture(scope="module")
def run():
    config = Config.from_preset("smoke")
    data = load_data(config, RUNTIME)
    seed_step(0, 0)
    state = build(config, data, RUNTIME)
    for _ in train(config, data, state):
        pass
    return config, data, state


def test_the_oracle_is_ahead_and_the_ratios_are_those_of_the_metrics(run):
    metrics = evaluate(*run)
    whos = ("model", "persistence", "day_mean", "ridge")
    assert metrics["oracle/mae"] < min(metrics[f"{who}/mae"] for who in whos)
    assert metrics["model/mae_over_oracle"] == pytest.approx(metrics["model/mae"] / metrics["oracle/mae"])
    share = (metrics["model/auroc"] - 0.5) / (metrics["oracle/auroc"] - 0.5)
    assert metrics["model/share_of_oracle_auroc"] == pytest.approx(share)
    assert metrics["persistence/mae_above_model"] == pytest.approx(metrics["persistence/mae"] - metrics["model/mae"])
    for name in ("model/mae", "model/auroc", "logistic/auroc"):
        assert metrics[name + "_low"] < metrics[name] < metrics[name + "_high"]
    data = run[1]
    assert metrics["oracle/auroc"] == pytest.approx(roc_auc_score(data.test["outcomes"], data.test["oracle_risk"]))


def test_persistence_and_day_mean_are_what_their_names_say(run):
    config, data, _ = run
    found = baselines.forecasts(config, data)
    x, there = data.test["values"].numpy(), data.test["observed"].numpy()
    for n in range(5):
        for v in range(3):
            patches = [(x[n, t : t + 20, v], there[n, t : t + 20, v]) for t in range(0, 240, 20)]
            means = [values[seen].mean() for values, seen in patches if seen.any()]
            assert found["persistence"][n, :, v] == pytest.approx([means[-1]] * 4, rel=1e-5)
            assert found["day_mean"][n, :, v] == pytest.approx([np.mean(means)] * 4, rel=1e-5)
    assert np.abs(found["ridge"] - data.test["oracle_forecast"].numpy()).mean() < np.abs(found["day_mean"]).mean() * 0.1


def test_without_outcomes_only_the_forecast_is_judged(run):
    config, data, state = run
    blind = {split: {**getattr(data, split), "outcomes": torch.full_like(getattr(data, split)["outcomes"], -1)} for split in
             ("train", "valid", "test")}  # fmt: skip
    data = type(data)(**blind, source="", licence="", sha256="", synthetic=True)
    assert judge(config, data, state).risks == {}
    metrics = evaluate(config, data, state)
    assert "model/mae" in metrics
    assert "model/auroc" not in metrics
    figures = draw(config, data, state, [{"step": 1, "stage": "evaluation", **metrics}])
    assert {"forecast", "error_by_horizon", "comparison", "attention"} == set(figures)
