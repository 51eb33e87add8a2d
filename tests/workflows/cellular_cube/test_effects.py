"""What training and its options do to a small cube: each the effect that it is there for, over three seeds."""

import pytest
import torch

from trainbook.data import Batches
from trainbook.runtime import detect
from trainbook.seeding import seed_step
from trainbook.stepper import Stepper
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.data import load_data
from trainbook.workflows.cellular_cube.losses import cube_loss
from trainbook.workflows.cellular_cube.network import CellularCube
from trainbook.workflows.cellular_cube.principal import fit_principal
from trainbook.workflows.cellular_cube.readout_fit import fit_readout, standardise_readout
from trainbook.workflows.cellular_cube.training import build, reconstruct, train

pytestmark = pytest.mark.slow
SMALL = {
    "decoder_epochs": 0, "warm_up_epochs": 0, "fine_tune_epochs": 0, "num_epochs": 6, "validate_every": 0, "max_sentences": 500,
    "held_out_sentences": 100, "readout": "gradient", "learning_rate": 5e-3,
}  # fmt: skip
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAINBOOK_DATA", str(tmp_path_factory.mktemp("data")))
        patch.setenv("TRAINBOOK_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield load_data(Config.from_preset("smoke", SMALL), detect())


def trained(data, seed, **changes):
    """The network, and its error on the first domain's test sentences when the main phase ends and at the end."""
    config = Config.from_preset("smoke", {**SMALL, **changes, "seed": seed})
    seed_step(seed, 0)
    state, before, metrics = build(config, data, detect()), 0.0, {}
    network, end_of_main = state.modules["cube"], state.stateful["main"].total_steps
    vectors = data.test["embeddings"][data.test["labels"] < data.num_first_domain]
    for record in train(config, data, state):
        if state.step == end_of_main:
            before = unexplained(network, vectors)
        metrics = record.metrics
        seed_step(seed, state.step)
    return network, (before, unexplained(network, vectors)), metrics


@torch.no_grad()
def unexplained(network, vectors):
    return float((reconstruct(network, vectors) - vectors).square().sum() / vectors.square().sum())


@pytest.fixture(scope="module")
def forgotten(data):
    """What training on a second domain adds to the error on the first, by option and seed."""
    options = {"nothing": {}, "elastic": {"elastic_weight": 30.0}, "replay": {"replay_share": 0.5}}
    found = {}
    for name, changes in options.items():
        for seed in SEEDS:
            _, (before, after), _ = trained(data, seed, domains="two", fine_tune_epochs=6, **changes)
            found[name, seed] = after - before
    print(found)
    return found


@pytest.mark.parametrize("option", ["elastic", "replay"])
def test_forgetting_falls(option, forgotten):
    for seed in SEEDS:
        assert forgotten["nothing", seed] > 0.005
        assert forgotten[option, seed] < 0.8 * forgotten["nothing", seed]


def test_states_shrink_with_the_weight_of_their_magnitude(data):
    for seed in SEEDS:
        magnitudes = []
        for weight in (0.0, 0.1, 1.0):
            network, _, _ = trained(data, seed, sparsity_weight=weight)
            with torch.no_grad():
                magnitudes.append(float(network(data.test["embeddings"]).run.magnitude))
        assert magnitudes == sorted(magnitudes, reverse=True), magnitudes
        assert magnitudes[2] < 0.9 * magnitudes[0]


def test_the_rate_of_the_bottleneck_falls_with_its_weight(data):
    for seed in SEEDS:
        rates = [trained(data, seed, bottleneck_weight=weight)[2]["code_nats"] for weight in (1e-4, 1e-3, 1e-2)]
        assert rates == sorted(rates, reverse=True), rates
        assert rates[2] < 0.8 * rates[0]


def test_experts_earn_their_training():
    """On a SYNTHETIC surface in 24 dimensions, against the same cube with the same closed form and nothing else trained."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2600, 12, generator=generator)
    curved = torch.cat([latent, 0.7 * latent.roll(1, 1) * latent], 1) @ torch.randn(24, 24, generator=generator)
    vectors = (curved - curved.mean(0)) / (curved - curved.mean(0)).square().mean().sqrt()
    fit, valid, test = vectors.split([2000, 300, 300])
    size = {"side": 4, "channels": 6, "mixed_numbers": 3, "hidden_width": 6, "attention_rank": 2, "value_width": 2}
    for seed in SEEDS:
        config = Config(**size, universal_width=12, seed=seed)
        errors = {}
        for num_steps in (0, 400):
            seed_step(seed, 0)
            network = CellularCube(config, fit_principal(fit), torch.zeros(24), 1.0)
            standardise_readout(network, fit)
            batches = Batches({"embeddings": fit, "labels": torch.zeros(len(fit), dtype=torch.int64)}, seed, config.batch_size)
            stepper = Stepper(network, config, max(num_steps, 1))
            for step in range(num_steps):
                stepper.step(batches(step), lambda model, batch: cube_loss(config, model, batch, 0.0), config.batch_size)  # noqa: B023
            fit_readout(network, fit, valid)
            errors[num_steps] = unexplained(network, test)
        assert errors[400] < 0.9 * errors[0], errors
