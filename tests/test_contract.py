"""Every workflow keeps the contract; a new one is tested because it exists."""

import inspect
import math

import pytest

from tests.driving import Drive, assert_same_run
from trainbook import catalog
from trainbook.comparison import ABOVE, STANDARD_ERROR
from trainbook.optimization import OptimizationConfig
from trainbook.report import SERIES
from trainbook.run import prepare

WORKFLOWS = catalog.names()


@pytest.fixture(scope="module", params=WORKFLOWS)
def finished(request, tmp_path_factory):
    """A smoke run of a workflow, trained, evaluated and drawn in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for setting in ("TRAINBOOK_RUNS", "TRAINBOOK_DATA"):
            patch.setenv(setting, str(tmp_path_factory.mktemp("folder")))
        run = prepare(request.param, "smoke")
        run.load_data()
        run.build()
        run.train(progress=False)
        run.curves()
        run.evaluate()
        run.draw()
        run.finish()
        yield run


@pytest.mark.parametrize("name", WORKFLOWS)
def test_config_is_documented_and_every_preset_is_valid(name):
    workflow = catalog.load(name)
    assert {"smoke", "laptop", "full"} <= workflow.Config.PRESETS.keys()
    for preset in workflow.Config.PRESETS:
        workflow.Config.from_preset(preset)
    assert all(field.description for field in workflow.Config.model_fields.values())
    assert len(workflow.title) > 20


@pytest.mark.parametrize("name", WORKFLOWS)
def test_functions_have_the_contracts_signatures(name):
    workflow = catalog.load(name)
    expected = {
        "load_data": ["config", "runtime"],
        "draw_data": ["config", "data"],
        "build": ["config", "data", "runtime"],
        "train": ["config", "data", "state"],
        "evaluate": ["config", "data", "state"],
        "draw": ["config", "data", "state", "history"],
    }
    assert {function: list(inspect.signature(getattr(workflow, function)).parameters) for function in expected} == expected


def test_training_neither_prints_nor_reads_a_clock_or_a_path(finished):
    source = inspect.getsource(inspect.getmodule(finished.workflow.train))
    assert not [word for word in ("print(", "import time", "import logging", "Path(", "open(") if word in source]


def test_run_json_says_complete_with_all_its_parts(finished):
    summary = finished.folder.summary()
    assert summary["status"] == "complete"
    assert summary["step"] == summary["total_steps"] > 0
    assert len(summary["config_sha256"]) == len(summary["data"]["sha256"]) == 64
    assert summary["data"]["source"]
    assert summary["data"]["licence"]
    assert summary["peak_memory_bytes"]["host"] > 10**8
    assert summary["wall_seconds"] > 0
    assert summary["provenance"]["packages"]["torch"]


def test_every_target_is_measured(finished):
    metrics = finished.summary["metrics"]
    for target in finished.workflow.TARGETS:
        assert target.metric in metrics
        assert not isinstance(target.value, str) or target.value in metrics


def test_there_is_a_baseline_beside_the_model(finished):
    assert len({name.partition("/")[0] for name in finished.summary["metrics"]}) >= 2


def test_pictures_and_the_report_are_there(finished):
    pictures = {path.stem for path in finished.folder.figures.glob("*.png")}
    assert "curves" in pictures
    assert len(pictures) >= 3
    page = finished.folder.report.read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert 'src="http' not in page
    assert 'href="http' not in page
    for name in finished.summary["metrics"]:
        metric = name.split("/")[-1].partition(SERIES)[0].partition(ABOVE)[0].removesuffix(STANDARD_ERROR)
        assert metric in page or metric.replace("_", " ") in page


def test_a_smoke_run_takes_seconds(finished):
    assert finished.summary["wall_seconds"] < 60


def test_a_smoke_run_killed_again_and_again_resumes_bit_for_bit(finished, tmp_path):
    name, steps = finished.workflow.name, finished.summary["total_steps"]
    for share in (0.1, 0.35, 0.6, 0.9):
        killed = Drive(tmp_path, "killed", {}, name, signal_step=max(1, int(share * steps)), checkpoint_seconds=0.01)
        assert killed() < 0, share
    assert Drive(tmp_path, "killed", {}, name)() == 0
    assert_same_run(killed.folder, finished.folder)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"accumulation": 2}, {"precision": "bfloat16"}, {"processes": 2}], ids=str)
@pytest.mark.parametrize("name", [name for name in WORKFLOWS if issubclass(catalog.load(name).Config, OptimizationConfig)])
def test_the_options_of_training_by_gradient_come_with_every_workflow(name, options, tmp_path):
    """It trains to its end with each; that each computes what it says is tested in test_accumulation and test_distributed."""
    processes = options.get("processes", 1)
    overrides = {} if processes > 1 else options
    drive = Drive(tmp_path, "with", overrides, name, processes=processes)
    assert drive() == 0
    summary, records = drive.folder.summary(), drive.folder.history()
    assert summary["step"] == summary["total_steps"] == records[-1]["step"]
    assert summary["segments"][-1]["processes"] == (processes if catalog.load(name).Config.DATA_PARALLEL else 1)
    assert all(math.isfinite(value) for record in records for value in record.values() if isinstance(value, float))
