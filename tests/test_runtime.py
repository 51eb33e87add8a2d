"""Where a run happens, from marks that the platforms leave."""

import time

import pytest

from trainbook import runtime
from trainbook.errors import UserError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("45s", 45), ("20m", 1200), ("11h", 39600), ("1h30m", 5400), ("0.5h", 1800), ("1h1m1s", 3661)],
)
def test_durations(text, seconds):
    assert runtime.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "5 days", "-3m", "h", "m5"])
def test_what_is_no_duration(text):
    with pytest.raises(UserError, match="is not a duration"):
        runtime.parse_duration(text)


def test_kaggle_is_told_from_colab_though_its_image_is_built_from_colabs(monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert runtime.detect().platform == "colab"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    found = runtime.detect()
    assert found.platform == "kaggle"
    assert 10.9 * 3600 < found.deadline - time.monotonic() <= 11 * 3600


def test_a_time_budget_given_wins(monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv(runtime.TIME_BUDGET, "20m")
    assert runtime.detect().deadline - time.monotonic() <= 1200


def test_a_bad_log_level_is_refused(monkeypatch):
    monkeypatch.setenv(runtime.LOG_LEVEL, "loud")
    with pytest.raises(UserError, match="DEBUG, INFO, WARNING, ERROR"):
        runtime.detect()


def test_every_choice_has_its_reason():
    found = runtime.detect()
    assert all(found.reasons[name] for name in ("platform", "device", "dtype", "time budget"))
