"""Runs beside each other: what scipy says of their seeds, what differs, and a page that needs nothing else."""

import re

import pytest
from scipy import stats

from tests import digits_classifier
from tests.test_sweep import digits, train  # noqa: F401  (a fixture)
from trainbook import run_comparison
from trainbook.__main__ import main
from trainbook.files import read_json, write_json
from trainbook.intervals import difference_interval
from trainbook.records import RunFolder, Target


def row(table, name):
    return next(cells[1:] for cells in table.rows if cells[0] == name)


@pytest.fixture
def folders(digits, tmp_path, monkeypatch):  # noqa: F811
    """Two learning rates with three seeds each, one run alone, and one that was not finished."""
    monkeypatch.setattr(digits_classifier, "TARGETS", (Target("model/accuracy", ">", 0.8, ("smoke",), "me"),))
    found = []
    for rate, seed in [(0.0001, 0), (0.0001, 1), (0.0001, 2), (0.05, 0), (0.05, 1), (0.05, 5), (0.02, 0)]:
        run_id = f"rate_{rate}-seed_{seed}"
        train("digits_classifier", "smoke", {"steps": 30, "learning_rate": rate, "seed": seed}, run_id)
        found.append(RunFolder(tmp_path / "runs" / run_id))
    write_json(found[-1].run_json, {k: v for k, v in found[-1].summary().items() if k not in ("metrics", "verdicts")})
    return found


def test_seeds_stand_together_with_the_intervals_of_scipy_and_the_verdicts(folders, tmp_path, capfd):
    assert main(["compare", *(str(folder.path) for folder in folders), str(folders[0].path), "--out=page.html"]) == 0
    said = capfd.readouterr().out
    found = run_comparison.columns(folders)
    assert [len(column.folders) for column in found] == [3, 3, 1]
    table = run_comparison.table(found)
    assert row(table, "learning_rate") == ["0.0001", "0.05", "0.02"]
    assert row(table, "seed") == ["0, 1, 2", "0, 1, 5", "0"]
    assert not [cells for cells in table.rows if cells[0] == "batch_size"]  # equal in all
    slow, quick = ([folder.summary()["metrics"]["model/accuracy"] for folder in part] for part in (folders[:3], folders[3:6]))
    for values, cell in zip((slow, quick), row(table, "model/accuracy"), strict=False):
        interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        assert cell == f"{sum(values) / 3:.4g} ± {(interval.high - interval.low) / 2:.2g} (3 seeds)"
    assert row(table, "guess/accuracy") == ["0.1 ± 0 (3 seeds)", "0.1 ± 0 (3 seeds)", "-"]
    assert max(slow) < 0.8 < min(quick), (slow, quick)
    assert row(table, "model/accuracy > 0.8")[:2] == ["missed in 3 of 3", "reached in 3 of 3"]
    welch = stats.ttest_ind(quick, slow, equal_var=False)
    (difference,) = [cells for cells in run_comparison.differences(found).rows if cells[0] == "model/accuracy"]
    low, high = welch.confidence_interval(0.95)
    assert difference[2:] == [f"{sum(quick) / 3 - sum(slow) / 3:+.3g}", f"{low:+.3g} to {high:+.3g}", "higher"]
    assert welch.pvalue < 0.05
    assert all(part in said for part in ("3 seeds", "higher", "page.html"))

    page = (tmp_path / "page.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 1
    marked = re.findall(r'<tr class="differs"><td>(\w+)</td>', page)
    assert marked == ["learning_rate"]
    assert all(folder.path.name in page for folder in folders)
    assert "SMOKE RUN" in page


def test_one_run_alone_has_no_interval_and_no_differences(folders):
    found = run_comparison.columns([folders[0], folders[3]])
    assert run_comparison.differences(found) is None
    accuracies = [folder.summary()["metrics"]["model/accuracy"] for folder in (folders[0], folders[3])]
    assert row(run_comparison.table(found), "model/accuracy") == [f"{value:.4g}" for value in accuracies]
    assert read_json(folders[0].config)["config"]["seed"] == 0


def test_a_difference_of_what_no_seed_moves_is_exact():
    assert difference_interval([0.3, 0.3], [0.1, 0.1, 0.1]) == pytest.approx((0.2, 0.2, 0.2))
