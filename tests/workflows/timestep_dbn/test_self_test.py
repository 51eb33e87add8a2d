"""The self-test passes here, leaves no trace in the random numbers, and finds every fault that is put into the computation."""

import json
import time

import pytest
import torch

from trainbook.errors import RunFailed
from trainbook.run import prepare
from trainbook.workflows.timestep_dbn import chain, rbm, self_test, training
from trainbook.workflows.timestep_dbn.rbm import Block
from trainbook.workflows.timestep_dbn.self_test import ROUNDING, STANDARD_ERRORS, check_computation

SMALL = {"stage": "autoencoder", "autoencoder_epochs": 1, "max_train_images": 64, "autoencoder_width": 4}


def test_it_passes_on_this_machine_in_about_a_second_whatever_is_drawn(monkeypatch):
    began = time.process_time()
    check_computation("cpu")
    assert time.process_time() - began < 2
    for seed in range(1, 30):
        monkeypatch.setattr(self_test, "seed_step", lambda *_, seed=seed: torch.manual_seed(seed))
        check_computation("cpu")


def test_it_leaves_the_runs_random_numbers_as_they_were():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    found = check_computation("cpu")
    assert torch.equal(torch.rand(3), expected)
    assert found == check_computation("cpu")


def changed(original, change):
    return lambda *arguments, **others: change(original(*arguments, **others))


FAULTS = {
    "hidden biases left out": (
        Block, "hidden_logit", lambda f: lambda self, z, bias: f(self, z, 0 * bias), "log Z from free energies",
    ),
    "a hidden unit's odds off by 1e-3": (Block, "hidden_logit", lambda f: changed(f, lambda x: x + 1e-3), "P(h | z)"),
    "field of the wrong sign": (
        Block, "visible_logit", lambda f: lambda self, h, field: f(self, h, -field), "P(z | h, z_t)",
    ),
    "biased coins": (rbm, "sample_bits", lambda f: lambda x: f(x + 0.15), "Gibbs samples"),
    "coins that repeat": (
        rbm, "sample_bits", lambda f: lambda x: (x.sigmoid() > 0.5).to(x.dtype), "Gibbs samples",
    ),
    "gradient of the wrong sign": (
        self_test, "contrastive_update", lambda f: lambda b, d, c, bias, m, u: f(b, m, c, bias, d, u), "gradient of the free",
    ),
    "negative phase of the data": (
        rbm, "contrastive_update", lambda f: lambda b, d, c, bias, m, u: f(b, d, c, bias, d, u), "contrastive gradient",
    ),
    "annealing without its base": (self_test, "log_partition", lambda f: changed(f, lambda x: x - 0.5), "annealed Z"),
    "half the coupling": (self_test, "fields", lambda f: changed(f, lambda x: [0.5 * part for part in x]), "exact coupling"),
    "bits flipped too often": (chain, "flip", lambda f: lambda bits, p: f(bits, 1.1 * p), "drawn flips"),
    "NaN": (Block, "free_energy", lambda f: changed(f, lambda x: x * torch.nan), "log Z from free energies: nan"),
}  # fmt: skip


@pytest.mark.parametrize(("place", "name", "fault", "told"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found_and_named_before_anything_is_trained(place, name, fault, told, monkeypatch):
    monkeypatch.setattr(place, name, fault(getattr(place, name)))
    with pytest.raises(RunFailed, match=r"self-test failed on cpu, so nothing was trained(.*)'Wrong results'") as failed:
        check_computation("cpu")
    assert told in str(failed.value)


def test_a_schedule_whose_closed_form_is_wrong_is_found(monkeypatch):
    original = self_test.flip_schedule

    def wrong(*arguments):
        schedule = original(*arguments)
        schedule.cumulative.mul_(1.01)
        return schedule

    monkeypatch.setattr(self_test, "flip_schedule", wrong)
    with pytest.raises(RunFailed, match="closed form of the flips"):
        check_computation("cpu")


def test_a_run_records_it_once_and_fails_with_it(monkeypatch):
    run = prepare("timestep_dbn", "smoke", SMALL, "mine")
    for step in (run.load_data, run.build, lambda: run.train(progress=False)):
        step()
    run.leave()
    records = run.folder.history()
    assert [record["step"] for record in records if "self_test" in record] == [1]
    for name, value in records[0]["self_test"].items():
        assert value <= (STANDARD_ERRORS if name.endswith("standard errors") else ROUNDING), name
    assert len(records[0]["self_test"]) == 10

    def fails(device):
        raise RunFailed("the self-test failed on a test")

    monkeypatch.setattr(training, "check_computation", fails)
    run = prepare("timestep_dbn", "smoke", SMALL, "bad")
    run.load_data()
    run.build()
    with pytest.raises(RunFailed):
        run.train(progress=False)
    summary = json.loads(run.folder.run_json.read_text())
    assert (summary["status"], summary["step"], summary["why"]) == ("failed", 0, "the self-test failed on a test")
