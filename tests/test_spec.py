"""run.toml: what is written is read back, and a mistake names the file and the key."""

import tomllib

import pytest

from trainbook.errors import UserError
from trainbook.spec import RunSpec

GOOD = {
    "workflow": "timestep_dbn",
    "preset": "smoke",
    "overrides": {
        "learning_rate": "5e-4",
        "code_channels": "2, 2, 4",
        "dataset": "file",
        "data_file": 'a "quoted\\ path"\n\x7f\x00é😀',
    },
    "run_id": "mine",
    "time_budget": "1h30m",
    "accelerator": "T4",
    "max_price_per_hour": 0.5,
    "budget": 3,
}


def test_a_spec_is_read_back_as_it_was_written(tmp_path):
    spec = RunSpec(**GOOD)
    spec.write(tmp_path / "run.toml")
    assert RunSpec.read(tmp_path / "run.toml") == spec
    assert tomllib.loads(spec.to_toml()) == spec.model_dump(exclude_none=True)
    assert spec.config().code_channels == (2, 2, 4)
    read = GOOD["overrides"] | {"learning_rate": 5e-4, "code_channels": [2, 2, 4]}
    assert spec.parameters()["overrides"] == spec.overrides == read


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"presett": "smoke"}, "there is no field 'presett'; did you mean 'preset'?"),
        ({"workflow": "timestep"}, "there is no workflow 'timestep'"),
        ({"preset": "enormous"}, "there is no preset 'enormous'"),
        ({"overrides": {"learning_rat": 1e-3}}, "there is no field 'learning_rat'; did you mean 'learning_rate'?"),
        ({"overrides": {"timesteps": 0}}, "timesteps = 0"),
        ({"run_id": "../mine"}, "cannot name a run folder"),
        ({"time_budget": "soon"}, "is not a duration"),
        ({"checkpoint_every": "0s"}, "longer than nothing"),
        ({"max_price_per_hour": -1}, "max_price_per_hour = -1"),
        ({"budget": float("inf")}, "budget = inf"),
    ],
)
def test_a_mistake_names_the_file_and_the_key(change, said, tmp_path):
    values = GOOD | change
    with pytest.raises(UserError, match=said.replace("?", r"\?").replace("(", r"\(")):
        RunSpec(**values)
    path = tmp_path / "run.toml"
    overrides = values.pop("overrides")
    lines = [f"{key} = {value!r}" for key, value in values.items()] + ["[overrides]"]
    path.write_text("\n".join([*lines, *(f"{k} = {v!r}" for k, v in overrides.items() if not k.startswith("data"))]))
    with pytest.raises(UserError) as error:
        RunSpec.read(path)
    assert str(error.value).startswith(str(path))
    assert said in str(error.value)


def test_a_file_that_is_missing_or_no_toml_or_lacks_the_workflow_is_refused(tmp_path):
    path = tmp_path / "run.toml"
    with pytest.raises(UserError, match="No such file"):
        RunSpec.read(path)
    path.write_text("workflow = ")
    with pytest.raises(UserError, match="cannot be read"):
        RunSpec.read(path)
    path.write_text('preset = "smoke"')
    with pytest.raises(UserError, match="workflow is missing"):
        RunSpec.read(path)


def test_a_run_is_named_once():
    spec = RunSpec(workflow="timestep_dbn")
    named = spec.named()
    assert named.run_id.startswith("timestep_dbn-laptop-")
    assert named.named() == named
    assert named.model_copy(update={"run_id": ""}) == spec
