"""What is measured of units and chains, on models whose answer is known, and the hint that each threshold gives."""

import math

import pytest
import torch

from tests.workflows.timestep_dbn.runs import digits_run
from trainbook import report
from trainbook.errors import RunFailed
from trainbook.run import prepare
from trainbook.seeding import seed_step
from trainbook.workflows.timestep_dbn.diagnostics import dead_bits, health, hints
from trainbook.workflows.timestep_dbn.rbm import Block
from trainbook.workflows.timestep_dbn.training import train

n, R, V, H = 2, 4000, 6, 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def block(weight=0.0, visible_bias=0.0, hidden_bias=0.0):
    shapes = ((n, V, H), (n, V), (n, H), (n, 0, H))
    tensors = [torch.zeros(shape) for shape in shapes]
    for tensor, value in zip(tensors, (weight, visible_bias, hidden_bias), strict=False):
        tensor += torch.as_tensor(value)
    return Block(*tensors)


def measured(model, coupling=0.0, beta=0.5):
    visible = torch.randint(2, (n, R, V)).float()
    field = coupling * (2 * visible - 1)
    return health(model, visible, model.hidden_bias.unsqueeze(1), field, torch.full((n,), beta))


def test_coins_are_as_alive_as_can_be():
    found = measured(block())
    assert found["hidden_saturation"].tolist() == found["visible_saturation"].tolist() == [0, 0]
    assert found["chain_mobility"].tolist() == pytest.approx([1, 1], abs=0.03)  # two coins differ half of the time


@pytest.mark.parametrize("beta", [0.001, 0.02, 0.3])
def test_mobility_is_one_when_the_noisy_bits_are_all_that_is_known(beta):
    found = measured(block(), coupling=math.log((1 - beta) / beta), beta=beta)
    expected = 2 * beta * (1 - beta) * R * V
    assert found["chain_mobility"].tolist() == pytest.approx([1, 1], abs=5 / math.sqrt(expected))


def test_hidden_units_that_never_change_are_counted():
    found = measured(block(hidden_bias=torch.tensor([-7.0, 7.0, 0.0, 2.0])))
    assert found["hidden_saturation"].tolist() == [0.5, 0.5]


def test_bits_that_the_biases_decide_are_counted_and_stall_the_chain():
    found = measured(block(visible_bias=torch.tensor([-12.0, 11.0, -11.0, 30.0, 0.0, 9.0])))
    assert found["visible_saturation"].tolist() == pytest.approx([4 / 6] * 2)
    assert measured(block(visible_bias=30.0))["chain_mobility"].tolist() == [0, 0]


def test_strong_weights_freeze_a_chain():
    frozen = measured(block(weight=30.0, hidden_bias=-105.0, visible_bias=-60.0))  # all on or all off, for ever
    assert frozen["chain_mobility"].max() < 0.05


def test_dead_bits_are_counted_per_level():
    codes = torch.randint(2, (500, 10)).float()
    codes[:, :3] = 0
    codes[:4, 0] = 1  # in less than 1 % of the images
    codes[:, 3] = 1
    assert dead_bits([codes, codes[:, 4:]]).tolist() == pytest.approx([0.4, 0])


WELL = {
    "first_timestep": 11,
    "hidden_saturation_by_timestep_and_level": [[0.0, 0.5, 0.2], [0.1, 0.0, 0.0]],
    "visible_saturation_by_timestep_and_level": [[0.0, 0.5, 0.2], [0.1, 0.0, 0.0]],
    "chain_mobility_by_timestep_and_level": [[0.9, 0.05, 0.2], [0.1, 1.0, 1.3]],
    "dead_bits_by_level": [0.0, 0.2, 0.1],
}


def test_at_the_thresholds_all_is_well():
    assert hints(WELL) == {}
    assert hints({}) == {}


@pytest.mark.parametrize("kind_of", [lambda rows: rows, torch.tensor])
@pytest.mark.parametrize(
    ("name", "value", "kind", "advice"),
    [
        ("hidden_saturation", 0.51, "saturated hidden units", "lower learning_rate or raise weight_decay"),
        ("visible_saturation", 0.51, "saturated visible units", "lower learning_rate or raise weight_decay"),
        ("chain_mobility", 0.049, "stalled chain", "gibbs_sweeps"),
        ("chain_mobility", 0.0, "stalled chain", "gibbs_sweeps"),
    ],
)
def test_a_threshold_that_is_passed_gives_its_hint_with_place_and_page(name, value, kind, advice, kind_of):
    table = f"{name}_by_timestep_and_level"
    rows = [row.copy() for row in WELL[table]]
    rows[1][2] = value
    found = hints(WELL | {table: kind_of(rows)})
    assert list(found) == [kind]
    assert found[kind].startswith("timesteps 12, coarse level: ")
    assert advice in found[kind]
    assert found[kind].endswith(f"see '{kind}' in the workflow's README")


def test_many_timesteps_are_counted_and_not_listed():
    found = hints({"first_timestep": 1, "chain_mobility_by_timestep_and_level": [[0.0, 1.0, 0.0]] * 50})
    assert found["stalled chain"].startswith("timesteps 1, 2, 3, 4, 5, 6 and 44 more, fine and coarse level: ")


def test_dead_bits_and_nan_have_their_hints():
    found = hints(WELL | {"dead_bits_by_level": [0.3, 0.0, 0.21]})
    assert found["dead bits"].startswith("fine and coarse level: more than a fifth")
    found = hints(WELL | {"update_norm_by_timestep_and_level": [[0.1, math.nan, 0.1], [0.1, 0.1, 0.1]]})
    assert "update_norm became NaN" in found["NaN"]


def drive_all(config, data, state):
    records, found = train(config, data, state), []
    while state.step < state.total_steps:
        seed_step(config.seed, state.step)
        found.append(next(records))
    return found


def test_a_healthy_run_has_no_hints_and_a_rate_that_is_far_too_high_has(tmp_path):
    config, data, state = digits_run(tmp_path, learning_rate=1e-3)
    assert not {kind for record in drive_all(config, data, state) for kind in record.metrics.get("hints", {})} - {"dead bits"}
    config, data, state = digits_run(tmp_path, learning_rate=10.0, weight_decay=0)
    kinds = {kind for record in drive_all(config, data, state) for kind in record.metrics.get("hints", {})}
    assert {"saturated hidden units", "saturated visible units", "stalled chain"} <= kinds


def test_hints_are_logged_once_and_listed_in_the_report():
    overrides = {"learning_rate": 10.0, "weight_decay": 0.0, "epochs_per_timestep": 3}
    run = prepare("timestep_dbn", "smoke", overrides, "mine")
    for step in (run.load_data, run.build, lambda: run.train(progress=False), run.finish):
        step()
    log = run.folder.log.read_text()
    assert log.count("saturated hidden units: timesteps") == 1
    table = report.hints_table(run.folder.history())
    kinds = {row[0]: row for row in table.rows}
    first, last = kinds["saturated hidden units"][1:3]
    assert int(first) < int(last)
    assert "Hints from training" in run.folder.report.read_text()
    assert "saturated hidden units" in run.folder.report.read_text()


def test_a_nan_is_hinted_at_before_the_run_fails(monkeypatch, caplog):
    run = prepare("timestep_dbn", "smoke", {"autoencoder_epochs": 1}, "mine")
    run.load_data()
    run.build()
    original = run.workflow.train

    def spoiled(config, data, state):
        for record in original(config, data, state):
            if "epoch" in record.metrics:
                record.metrics["hints"] = {"NaN": "update_norm became NaN"}
                record.metrics["mean_update_norm"] = math.nan
            yield record

    monkeypatch.setattr(run.workflow.module, "train", spoiled, raising=False)
    with pytest.raises(RunFailed, match="mean_update_norm became non-finite"):
        run.train(progress=False)
    assert "NaN: update_norm became NaN" in run.folder.log.read_text()
