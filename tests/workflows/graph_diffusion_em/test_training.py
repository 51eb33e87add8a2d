"""Stages of a run, and the working domain of photon noise. Resume is tested with every workflow, in test_contract."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from trainbook.seeding import seed_step
from trainbook.workflows.graph_diffusion_em import evaluation
from trainbook.workflows.graph_diffusion_em.codebook import kmeans_codebook, training_patches
from trainbook.workflows.graph_diffusion_em.config import Config
from trainbook.workflows.graph_diffusion_em.images import load_data
from trainbook.workflows.graph_diffusion_em.objective import HeldOut, from_working, observe, to_working, working_sigma
from trainbook.workflows.graph_diffusion_em.training import build, train

RUNTIME = SimpleNamespace(device="cpu", data_folder=None)


def trained(**changes):
    config = Config.from_preset("smoke", {"ablation_seeds": 0, **changes})
    data = load_data(config, RUNTIME)
    seed_step(config.seed, 0)
    state, records = build(config, data, RUNTIME), []
    steps = train(config, data, state)
    while True:
        seed_step(config.seed, state.step)
        record = next(steps, None)
        if record is None:
            return config, data, state, records
        records.append(record.metrics)


def test_each_stage_ascends_and_the_network_starts_at_one_half():
    config, data, state, records = trained()
    for name in ("log_likelihood", "graph_log_likelihood"):
        values = [record[name] for record in records if name in record]
        assert all(b >= a - 1e-6 * abs(a) for a, b in itertools.pairwise(values)), name
    losses = state.modules["held_out"].losses
    assert float(losses[0]) == pytest.approx(0.5, abs=0.03)
    assert float(losses[-1]) == pytest.approx(HeldOut(config, data)(state.modules["network"].eval())["valid_loss"], abs=0.02)
    assert state.step == state.total_steps


def test_k_means_as_the_codebook_lowers_its_distortion_and_is_the_ablations():
    config, data, state, records = trained(codebook="kmeans", network="none")
    values = [record["distortion"] for record in records if "distortion" in record]
    assert len(values) == config.em_iterations
    assert values == sorted(values, reverse=True)
    found = kmeans_codebook(config, training_patches(config, data))
    torch.testing.assert_close(found.means, state.modules["codebook"].means)


def test_noise2noise_never_sees_a_clean_target_and_learns():
    *_, state, records = trained(network="noise2noise", num_epochs=8, batch_size=16, warmup_steps=2, learning_rate=5e-3)
    losses = state.modules["held_out"].losses
    assert float(losses[-1]) < 0.45 < float(losses[0])
    assert all(torch.isfinite(torch.as_tensor(record.get("loss", 0.0))) for record in records)


def test_photon_noise_is_white_in_the_working_domain_and_the_way_back_is_right():
    config = Config(noise="poisson_gaussian", photon_gain=0.02, noise_level=3)
    clean = torch.linspace(0.15, 0.95, 8).view(1, 8, 1).expand(1, 8, 100_000)
    working = observe(config, clean, torch.Generator().manual_seed(0))
    torch.testing.assert_close(working.std(2), torch.full((1, 8), working_sigma(config)), rtol=0.04, atol=0)
    back = from_working(config, working.mean(2, keepdim=True))
    torch.testing.assert_close(back, clean[..., :1], rtol=0.02, atol=0)
    assert float(to_working(config, torch.ones(1))) == pytest.approx(1, abs=1e-6)
    gaussian = Config()
    assert torch.equal(to_working(gaussian, clean), clean)
    assert working_sigma(gaussian) == 25 / 255


@pytest.mark.parametrize("changes", [{"noise": "poisson_gaussian", "noise_level": 5}, {"colour": True, "noise_known": False}])
def test_metrics_of_other_noise_and_colour(changes, monkeypatch):
    monkeypatch.setattr(evaluation.baselines, "bm3d_is_installed", lambda: False)
    config, data, state, _ = trained(network="none", **changes)
    metrics = evaluation.evaluate(config, data, state)
    assert metrics["ours/psnr_db"] > metrics["noisy/psnr_db"] + 2
    assert metrics["noisy/loss"] == pytest.approx(0.5, abs=0.06)
    assert metrics["ours/loss"] < 0.25
    assert metrics["bm3d/is_installed"] == 0


def test_quality_is_that_of_the_definitions():
    config = Config()
    clean = torch.full((1, 32, 32), 0.5)
    found = evaluation.judge(config, clean + 0.1, clean)
    assert found.psnr == pytest.approx(20, abs=1e-4)
    assert found.loss == pytest.approx(0.01 / (2 * config.sigma**2), rel=1e-5)
    assert evaluation.judge(config, clean + 2, clean).psnr == pytest.approx(6.0206, abs=1e-3)  # clipped to white


def test_a_config_that_cannot_work_is_refused():
    for changes, message in (
        ({"dataset": "folder"}, "image_folder"),
        ({"test_folder": "a", "test_pictures": "set12"}, "not both"),
        ({"colour": True, "test_pictures": "bsd68"}, "grey"),
        ({"crop_size": 16, "patch_size": 12}, "crop_size"),
        ({"search_radius": 3}, "search_radius"),
        ({"batch_size": 4000}, "batch_size"),
        ({"ablation_every": 400}, "ablation_every"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(**changes)
