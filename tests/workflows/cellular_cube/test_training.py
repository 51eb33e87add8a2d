"""Phases, what each trains, and what is kept: on real docstrings with the dependency-free teacher, in a very small cube."""

import hashlib

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from trainbook.data import Batches
from trainbook.optimizer import make_optimizer
from trainbook.runtime import detect
from trainbook.seeding import seed_step
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.continual import Elastic, Replay, Reservoir
from trainbook.workflows.cellular_cube.curriculum import Curriculum, shrunk_variances, synthetic_vectors
from trainbook.workflows.cellular_cube.data import load_data
from trainbook.workflows.cellular_cube.epoch_examples import NAME as EXAMPLES
from trainbook.workflows.cellular_cube.epoch_examples import EpochExamples, export
from trainbook.workflows.cellular_cube.losses import cube_loss
from trainbook.workflows.cellular_cube.principal import best_linear_fvu, fit_principal
from trainbook.workflows.cellular_cube.training import build, domains, reconstruct, train

TINY = {"decoder_epochs": 0, "warm_up_epochs": 0, "fine_tune_epochs": 0, "num_epochs": 1, "validate_every": 0}
REPTILE = {"reptile_steps": 2, "domains": "two", "fine_tune_epochs": 1, "router_tokens": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAINBOOK_DATA", str(tmp_path_factory.mktemp("data")))
        patch.setenv("TRAINBOOK_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield load_data(Config.from_preset("smoke"), detect())


def make(data, **changes):
    config = Config.from_preset("smoke", {**TINY, **changes})
    seed_step(0, 0)
    return config, build(config, data, detect())


def run(config, data, state):
    records = []
    for record in train(config, data, state):
        records.append((state.stage, record.metrics))
        seed_step(config.seed, state.step)
    assert len(records) == state.total_steps
    return records


def step(config, data, state):
    """One step of the main phase's optimizer."""
    stepper = state.stateful["main"].stepper
    batch = Batches(data.train, 0, config.batch_size)(stepper.steps_done)
    stepper.step(batch, lambda model, part: cube_loss(config, model, part, 0.0), config.batch_size)


def digest(module):
    parts = [value.detach().numpy().tobytes() for value in module.state_dict().values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def parts_of(network):
    column = network.cube.rule.columns[0]
    named = {name: getattr(column, name) for name in ("local", "functional", "distant", "gate")}
    return named | {"transformer": network.transformer, "readout": network.readout}


def test_after_two_steps_every_expert_and_the_gate_learn(data):
    config, state = make(data, readout="gradient")
    for _ in range(3):
        step(config, data, state)
    still = [name for name, p in state.modules["cube"].cube.rule.named_parameters() if p.numel() and not bool(p.grad.any())]
    assert still == []


@pytest.mark.parametrize("scope", ["experts", "experts_pca"])
def test_the_brief_s_rule_trains_the_experts_only(data, scope):
    config, state = make(data, train_scope=scope)
    network = state.modules["cube"]
    before = {name: digest(part) for name, part in parts_of(network).items()}
    start = reconstruct(network, data.test["embeddings"])
    run(config, data, state)
    changed = {name for name, part in parts_of(network).items() if digest(part) != before[name]}
    assert changed <= {"local", "functional", "distant", "gate", "readout"}
    if scope == "experts_pca":
        assert changed >= {"local", "functional", "distant"}
    assert ("readout" in changed) == (scope == "experts")  # fitted in closed form
    trained = {name.partition(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"cube"}
    if scope == "experts_pca":  # a correction within the components' span can only add to the error on the training vectors
        vectors = data.test["embeddings"]
        better = (start - vectors).square().sum() - (reconstruct(network, vectors) - vectors).square().sum()
        assert float(better) <= 1e-3


def test_a_rate_of_zero_leaves_that_expert_as_it_was_and_factors_reach_the_optimizer(data):
    config, state = make(data, distant_rate=0.0, local_rate=3.0, readout="gradient")
    network = state.modules["cube"]
    before = {name: digest(part) for name, part in parts_of(network).items()}
    groups = make_optimizer(network, config).param_groups
    local = {id(p) for p in network.cube.rule.columns[0].local.parameters()}
    assert {group["rate_factor"] for group in groups for p in group["params"] if id(p) in local} == {3.0}
    step(config, data, state)
    step(config, data, state)
    changed = {name for name, part in parts_of(network).items() if digest(part) != before[name]}
    assert changed == set(before) - {"distant"}
    rates = {group["rate_factor"]: group["lr"] for group in state.stateful["main"].stepper.optimizer.param_groups}
    assert rates[3.0] == pytest.approx(3 * rates[1.0])


def test_all_phases_come_in_order_and_the_kept_weights_are_no_worse_than_pca(data):
    config, state = make(
        data, warm_up_epochs=1, fine_tune_epochs=1, decoder_epochs=1, transformer="autoencoder", learning_rate=1.0
    )
    records = run(config, data, state)
    order = list(dict.fromkeys(stage for stage, _ in records))
    assert order == ["autoencoder", "warm_up", "standardise", "main", "readout", "fine_tune", "text_decoder"]
    last_main = [metrics for stage, metrics in records if stage == "main"][-1]
    fitted = next(metrics for stage, metrics in records if stage == "readout")
    assert last_main["valid_fvu"] > 1  # a rate of 1 wrecks it
    assert fitted["kept_valid_fvu"] <= fitted["pca_valid_fvu"]


def test_every_validation_is_shown_by_its_nearest_known_sentences(data):
    config, state = make(data, num_epochs=2)
    records = run(config, data, state)
    rows, network = state.stateful[EXAMPLES].rows, state.modules["cube"]
    measured = [metrics["valid_fvu"] for stage, metrics in records if stage == "main" and "valid_fvu" in metrics]
    assert [fvu for _, fvu, _ in rows] == measured
    assert len(rows) == 2
    network.start_at_principal(fit_principal(data.train["embeddings"]))
    state.stateful[EXAMPLES].add(data, 99, 0.5, reconstruct(network, data.valid["embeddings"][:4]))
    raw = [data.raw(v).numpy() for v in (data.train["embeddings"], reconstruct(network, data.valid["embeddings"][:4]))]
    bank, queries = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in raw)
    known = [data.sentences["train"][index] for index in (queries @ bank.T).argmax(1)]
    assert rows[-1] == (99, 0.5, known)
    again = EpochExamples()
    again.load_state_dict(state.stateful[EXAMPLES].state_dict())
    text = export(config, data, state, {})["epoch_examples.txt"]
    assert again.text(data.sentences["valid"]) == text
    assert all(text.count(sentence) >= 1 for sentence in (*data.sentences["valid"][:4], *known))


def test_synthetic_vectors_have_the_shrunk_covariance_and_the_oracle_its_error(data):
    principal = fit_principal(data.train["embeddings"])
    made = synthetic_vectors(principal, 20_000, 0)
    along = (made @ principal.components.T).var(0)
    torch.testing.assert_close(along, shrunk_variances(principal), rtol=0.06, atol=0.02)
    error = (principal.reconstructed(made, 16) - made).square().sum() / made.square().sum()
    assert float(error) == pytest.approx(best_linear_fvu(shrunk_variances(principal), 16), abs=0.01)


def test_the_curriculum_starts_with_what_pca_leaves_little_of(data):
    vectors, principal = data.train["embeddings"], fit_principal(data.train["embeddings"])
    hardness = (vectors - principal.reconstructed(vectors, 16)).square().sum(1)
    source = {"embeddings": vectors, "hardness": hardness}
    curriculum = Curriculum(source, principal, 16, 0.25, 100, 0, 8, "kept")
    assert [curriculum.share(step) for step in (0, 25, 50, 99)] == pytest.approx([0.25, 0.625, 1.0, 1.0])
    limit = hardness.sort().values[int(0.25 * len(hardness))]
    assert bool((curriculum(0)["hardness"] <= limit).all())
    torch.testing.assert_close(curriculum(7)["hardness"], curriculum(7)["hardness"])
    late = torch.cat([curriculum(step)["hardness"] for step in range(60, 100)])
    assert float(late.max()) > float(limit)


def test_a_reservoir_is_a_uniform_sample():
    counts = torch.zeros(40)
    for seed in range(400):
        reservoir = Reservoir(8, seed)
        reservoir.add(torch.arange(40))
        assert len(set(reservoir.items.tolist())) == 8
        counts[reservoir.items] += 1
    assert stats.chisquare(counts.numpy()).pvalue > 0.001


def test_replay_mixes_the_share_it_was_told():
    new = Batches({"embeddings": torch.ones(64, 2)}, 0, 16)
    batch = Replay(new, {"embeddings": torch.zeros(5, 2)}, 0.25, 0)(3)["embeddings"]
    assert batch.shape == (16, 2)
    assert float(batch.sum()) == 24


def test_fisher_information_is_that_of_single_sentences():
    """For a linear map and half the squared error: the mean over sentences of (error input^T)^2."""
    torch.manual_seed(0)
    layer, vectors = torch.nn.Linear(3, 2, bias=False), torch.randn(10, 3)
    elastic = Elastic(layer)
    elastic.remember(layer, vectors, lambda model, vector: 0.5 * model(vector).square().sum())
    errors = layer(vectors).detach()
    expected = (errors[:, :, None] * vectors[:, None]).square().mean(0)
    torch.testing.assert_close(elastic.fisher_weight, expected)
    assert float(elastic(layer).detach()) == 0
    with torch.no_grad():
        layer.weight.add_(0.1)
    torch.testing.assert_close(elastic(layer).detach(), 0.5 * (expected * 0.01).sum())


def test_two_domains_are_told_apart_and_elastic_weights_hold_the_first(data):
    moved = {}
    for weight in (0.0, 1e4):
        config, state = make(data, domains="two", fine_tune_epochs=2, elastic_weight=weight, readout="gradient")
        first, second = domains(config, data)
        assert int(first["labels"].max()) < data.num_first_domain <= int(second["labels"].min())
        network, records = state.modules["cube"], []
        for record in train(config, data, state):
            records.append(record)
            if state.stage == "main":
                before = {name: p.detach().clone() for name, p in network.named_parameters()}
            seed_step(0, state.step)
        moved[weight] = float(sum((p.detach() - before[name]).square().sum() for name, p in network.named_parameters()))
    assert moved[1e4] < 0.5 * moved[0.0]


def test_a_grown_column_leaves_the_first_domain_alone_when_masked(data):
    config, state = make(data, domains="two", fine_tune_epochs=2, expert_columns="grow")
    network, before, code = state.modules["cube"], None, None
    for _ in train(config, data, state):
        if state.stage == "readout":
            before, code = reconstruct(network, data.test["embeddings"]), digest(network.cube.rule.columns[0])
        seed_step(0, state.step)
    assert digest(network.cube.rule.columns[0]) == code
    assert not torch.equal(reconstruct(network, data.test["embeddings"]), before)
    network.cube.rule.masked = True
    torch.testing.assert_close(reconstruct(network, data.test["embeddings"]), before, atol=0, rtol=0)


def test_prefixes_of_the_code_are_learned(data):
    config, state = make(data, prefix_weight=1.0)
    assert "prefix" in run(config, data, state)[-2][1]
    output = state.modules["cube"].eval()(data.test["embeddings"][:3], prefix=4)
    assert not bool(output.code[:, 4:].any())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 5}, "do not reach the back face"),
        ({"channels": 4}, "channels must hold"),
        ({"replay_share": 0.5}, "need domains = two"),
        ({"domains": "two"}, "set them"),
        ({"wall_hole": 3, "band_shape": "euclidean"}, "look through the wall"),
        ({"universal_width": 65}, "side\\^2"),
        ({"reptile_steps": 2, "domains": "two", "fine_tune_epochs": 1}, "router_tokens"),
        ({**REPTILE, "curriculum_start": 0.5}, "curriculum_start"),
        ({"universal_width": 9, "face_layout": "pyramid"}, "lies as cosines"),
        ({"held_out_sentences": 2000}, "half of max_sentences"),
        ({"corpus": "file"}, "text_file"),
        ({"levels": 3}, "needs a side"),
        ({"any_time": True}, "nothing to choose"),
        ({"lattice": 8}, "Extra inputs"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        Config(**changes)


def test_the_code_is_as_wide_as_the_brief_says():
    assert Config(side=8).code_size == 64
    assert Config(side=37, numbers_per_cell=1, mixed_numbers=0).code_size == 1369
    assert Config().steps == 7
