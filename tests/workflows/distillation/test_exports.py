"""What a run leaves behind for others to compute with: the numbers in its files follow from its own predictions."""

import csv
import json
from collections import defaultdict

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import confusion_matrix

from tests.driving import train_and_draw
from trainbook.run import prepare
from trainbook.workflows.distillation.arms import arms

OVERRIDES = {
    "max_train_images": 160, "batch_size": 32, "teacher_epochs": 3, "student_epochs": 4, "chunk_steps": 10, "labels": (0, 40),
    "student_seeds": (3, 4, 5), "num_assistants": 1, "adaptive": False, "methods": ("multi_teacher",), "unlabelled_arm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAINBOOK_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.setenv("TRAINBOOK_DATA", str(tmp_path_factory.mktemp("data")))
        run = train_and_draw(prepare("distillation", "smoke", OVERRIDES))
        run.finish()
        yield run


@pytest.fixture(scope="module")
def predictions(finished):
    lines = (finished.folder.export / "predictions.csv").read_text().splitlines()
    return {name: np.array(classes.split(), int) for name, _, classes in (line.partition(",") for line in lines)}


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished.folder.export / "results.json").read_text())


def accuracies(predictions, regime, arm, seeds=(3, 4, 5)):
    return np.array([(predictions[f"{regime}/{arm}/{seed}"] == predictions["labels"]).mean() for seed in seeds])


def test_there_is_a_row_per_network_and_its_accuracy_follows_from_its_predictions(finished, predictions):
    rows = list(csv.DictReader((finished.folder.export / "results.csv").read_text().splitlines()))
    named = {"/".join((row["regime"], row["arm"], row["seed"])): row for row in rows if row["arm"] != "teacher"}
    named |= {f"teacher_{row['seed']}": row for row in rows if row["arm"] == "teacher"}
    assert named.keys() == predictions.keys() - {"labels"}
    expected = sum(len(arms(finished.config, regime)) for regime in finished.config.regimes) * 3 + 2
    assert len(rows) == expected
    for name, row in named.items():
        assert float(row["accuracy"]) == pytest.approx((predictions[name] == predictions["labels"]).mean())


def test_metrics_follow_from_the_predictions(finished, predictions):
    metrics = finished.summary["metrics"]
    for regime in ("all_labels", "40_labels"):
        kd, hpm = accuracies(predictions, regime, "kd"), accuracies(predictions, regime, "hpm_kd")
        assert metrics[f"kd/accuracy_{regime}"] == pytest.approx(kd.mean())
        teacher = (predictions["teacher_1"] == predictions["labels"]).mean()
        assert metrics[f"hpm_kd/retention_{regime}"] == pytest.approx((hpm / teacher).mean())
        assert metrics[f"hpm_kd/points_over_kd_{regime}"] == pytest.approx(100 * (hpm - kd).mean())
        interval = stats.ttest_rel(100 * hpm, 100 * kd).confidence_interval(0.95)
        found = [metrics[f"hpm_kd/points_over_kd_{regime}{end}"] for end in ("_low", "_high")]
        assert found == pytest.approx(list(interval))
        assert metrics[f"kd/error_{regime}_above_hpm_kd"] == pytest.approx(100 * (hpm - kd).mean())
    assert metrics["student/compression"] == metrics["teacher/parameters"] / metrics["student/parameters"]


def test_every_test_is_recomputed_from_the_predictions(results, predictions):
    for regime, families in results["contrasts"].items():
        for found in (each for family in families.values() for each in family):
            one, other = (accuracies(predictions, regime, found[side]) for side in ("one", "other"))
            if (one - other).std() > 1e-12:
                assert found["found"]["p"] == pytest.approx(stats.ttest_rel(one, other).pvalue, rel=1e-6)
            for seed, p in zip((3, 4, 5), found["mcnemar"], strict=True):
                names = [f"{regime}/{found[side]}/{seed}" for side in ("one", "other")]
                right = [predictions[name] == predictions["labels"] for name in names]
                only = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
                expected = stats.binomtest(only[0], sum(only), 0.5).pvalue if sum(only) else 1.0
                assert p == pytest.approx(expected)
    planned = {(c["one"], c["other"]) for c in results["contrasts"]["all_labels"]["planned"]}
    assert planned == {("kd", "direct"), ("hpm_kd", "kd"), ("hpm_kd", "kd_long")}


def test_confusion_matrices_are_scikit_learns(results, predictions):
    for name, matrix in results["confusion"].items():
        assert (np.array(matrix) == confusion_matrix(predictions["labels"], predictions[name], labels=range(10))).all()


def test_the_text_says_for_every_contrast_whether_there_is_evidence_and_the_report_shows_it(finished, results):
    text = (finished.folder.export / "results.txt").read_text()
    said = defaultdict(int)
    for family in (each for families in results["contrasts"].values() for each in families.values()):
        for found in family:
            if found["found"]["low"] == found["found"]["high"] == 0:
                said["equal"] += 1
                continue
            sure = found["adjusted_p"] is not None and found["adjusted_p"] < 0.05
            said["better" if sure and found["found"]["mean"] > 0 else "worse" if sure else "no evidence"] += 1
    assert text.count("no evidence of a difference") == said["no evidence"]
    assert text.count("are right equally often with every seed") == said["equal"] > 0
    assert text.count(" is better than ") == said["better"]
    assert text.count(" is worse than ") == said["worse"]
    assert "p50 / p95" in text
    page = finished.folder.report.read_text()
    assert "no evidence of a difference" in page
    assert "REGIME 40 labels" in page
    assert {"results.txt", "results.csv", "results.json", "predictions.csv"} <= {p.name for p in finished.folder.export.iterdir()}
    assert all(f"export/{name}" in finished.summary["files"] for name in ("results.txt", "predictions.csv"))


def test_the_exported_students_are_the_best_on_valid_of_the_first_regime(finished):
    table = finished.state.stateful["jobs"]
    for arm in ("direct", "kd", "hpm_kd"):
        names = table.graph.students("all_labels", arm)
        best = max(table.results[name]["valid_accuracy"] for name in names)
        mine = [name for name in names if same(table.networks[name], finished.state.modules[arm].state_dict())]
        assert [table.results[name]["valid_accuracy"] for name in mine] == [best]


def same(one, other):
    return all((one[key] == other[key]).all() for key in one)


def test_pictures(finished):
    drawn = {path.stem for path in finished.folder.figures.glob("*.png")}
    wanted = {"accuracy", "retention", "components", "confusion", "calibration", "valid_accuracy", "temperature", "gate"}
    assert wanted | {"missing_class", "phase_times"} <= drawn


@pytest.mark.parametrize("stage", ["teacher", "direct", "kd"])
def test_a_stage_alone_is_evaluated_drawn_and_reported(stage, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINBOOK_DATA", str(tmp_path / "data"))
    run = prepare("distillation", "smoke", OVERRIDES | {"stage": stage, "student_seeds": (3,), "labels": (40,)})
    run.load_data()
    run.build()
    run.train(progress=False)
    run.evaluate()
    run.draw()
    assert run.finish().startswith("complete")
    metrics, text = run.summary["metrics"], (run.folder.export / "results.txt").read_text()
    assert ("teacher/accuracy" in metrics) == (stage != "direct")
    assert ("direct/accuracy_40_labels" in metrics) == (stage == "direct")
    assert ("kd/retention_40_labels" in metrics) == (stage == "kd")
    assert ("REGIME 40 labels" in text) == (stage != "teacher")
    assert {verdict["verdict"] for verdict in run.summary["verdicts"]} == {"not for preset smoke"}
