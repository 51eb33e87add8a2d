import math

import pytest

from trainbook import comparison, report

METRICS = {
    "model/loss": 0.30,
    "model/loss_standard_error": 0.01,
    "weak/loss": 0.50,
    "weak/loss_standard_error": 0.02,
    **comparison.interval("weak/loss_above_model", 0.20, 0.05),
    "strong/loss": 0.10,
    **comparison.interval("strong/loss_above_model", -0.20, 0.05),
    "equal/loss": 0.32,
    **comparison.interval("equal/loss_above_model", 0.02, 0.05),
    **comparison.interval("equal/error_above_model", 3.0, 1.0),
    "model/other": 7.0,
}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.1, 0.3, "beats"),
        (-0.3, -0.1, "does not beat"),
        (-0.1, 0.2, "ties"),
        (0.0, 0.2, "ties"),
        (-0.2, 0.0, "ties"),
        (math.nan, 0.2, "not measured"),
        (0.1, math.nan, "not measured"),
    ],
)
def test_verdict_is_what_the_whole_interval_says(low, high, expected):
    assert comparison.verdict(low, high) == expected


def test_interval_is_the_normal_one_of_95_percent():
    values = comparison.interval("x/y", 2.0, 0.5)
    inside = 0.5 * (
        math.erf((values["x/y_high"] - 2) / 0.5 / math.sqrt(2)) - math.erf((values["x/y_low"] - 2) / 0.5 / math.sqrt(2))
    )
    assert values["x/y"] == 2.0
    assert inside == pytest.approx(0.95, abs=1e-6)


def test_table_has_a_row_per_baseline_and_a_column_per_metric():
    table = comparison.baseline_table(METRICS)
    assert table.headers == ["", "loss: model against it", "error: model against it"]
    assert [row[0] for row in table.rows] == ["weak", "strong", "equal"]
    assert [row[1].partition(":")[0] for row in table.rows] == ["beats", "does not beat", "ties"]
    assert table.rows[0][1] == "beats: +0.2 (+0.102 to +0.298)"
    assert [row[2] for row in table.rows[:2]] == ["-", "-"]
    assert table.rows[2][2].startswith("beats: +3 ")


def test_there_is_no_table_without_a_comparison():
    assert comparison.baseline_table({"model/loss": 1.0, "model/loss_standard_error": 0.1, "weak/loss_above_model": 0.2}) is None


def test_metrics_stand_with_their_errors_and_without_what_the_other_table_shows():
    table = report.metrics_table(METRICS)
    assert table.headers == ["held-out metric", "model", "weak", "strong", "equal"]
    assert table.rows == [["loss", "0.3 ± 0.01", "0.5 ± 0.02", "0.1", "0.32"], ["other", "7", "-", "-", "-"]]
