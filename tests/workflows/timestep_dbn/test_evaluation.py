"""Bit errors of the reverse processes, image by image."""

import math

import pytest
import torch

from tests.workflows.timestep_dbn.enumeration import random_dbn
from tests.workflows.timestep_dbn.runs import digits_run
from trainbook.workflows.timestep_dbn import evaluation
from trainbook.workflows.timestep_dbn.diffusion import flip_schedule
from trainbook.workflows.timestep_dbn.rbm import ConditionalRBM


def test_differences_of_bit_errors_pair_the_images():
    hard = torch.rand(50)  # what is hard for one model is hard for the other
    errors = {
        "chain": torch.stack([torch.zeros(50), hard]),
        "other": torch.stack([torch.zeros(50), hard + 0.1 + 0.01 * torch.randn(50)]),
    }
    metrics = evaluation.end_bit_errors(errors)
    difference = (errors["other"][-1] - errors["chain"][-1]).double().numpy()
    assert metrics["other/end_bit_error_above_chain"] == pytest.approx(difference.mean(), abs=1e-6)
    half = 1.96 * difference.std(ddof=1) / math.sqrt(50)
    assert metrics["other/end_bit_error_above_chain_low"] == pytest.approx(difference.mean() - half, abs=1e-5)
    assert metrics["other/end_bit_error_above_chain_high"] == pytest.approx(difference.mean() + half, abs=1e-5)
    assert metrics["other/end_bit_error_standard_error"] == pytest.approx(float(errors["other"][-1].std()) / math.sqrt(50))
    assert metrics["chain/end_bit_error"] == pytest.approx(float(hard.mean()))
    assert "chain/end_bit_error_above_chain" not in metrics


def test_every_model_starts_from_the_same_noisy_bits_and_errors_are_counted(tmp_path, monkeypatch):
    config, _, state = digits_run(tmp_path, timesteps=6)
    schedule = flip_schedule(6, "cosine").to("cpu")
    seen, original = {}, evaluation.reverse_steps

    def remembered(*arguments):
        def watch(who, step):
            def take(bits, t):
                seen.setdefault(who, []).append(bits)
                seen[who, t] = step(bits, t)
                return seen[who, t]

            return take

        return {who: watch(who, step) for who, step in original(*arguments).items()}

    monkeypatch.setattr(evaluation, "reverse_steps", remembered)
    clean = [torch.randint(2, (9, size)).float() for size in state.modules["dbn"].level_sizes]
    errors = evaluation.reverse_errors(config, state, clean, schedule)
    start = evaluation.start_timestep(schedule)
    assert errors.keys() == {
        "chain", "monolithic_rbm", "small_rbm", "logistic_chain", "denoiser", "independent_bits", "no_op"
    }  # fmt: skip
    for who in errors.keys() - {"no_op"}:
        assert torch.equal(seen[who][0], seen["chain"][0])
        wrong = (seen[who, 1] != torch.cat(clean, 1)).float().mean(1)
        torch.testing.assert_close(errors[who][-1], wrong)
        assert errors[who].shape == (start + 1, 9)
    assert torch.equal(errors["no_op"][0], errors["no_op"][-1])


def test_sweeps_of_equal_work_count_weights():
    chain, _ = random_dbn([6, 4, 2], timesteps=5)  # hidden units 3, 2, 2
    own = 6 * 3 + 4 * 2 + 2 * 2
    large, small = ConditionalRBM(1, 12, 5 * own // 12 + 1, 0, 4), ConditionalRBM(1, 12, 1, 0, 4)
    share = own / large.weight.numel()
    assert evaluation.equal_work(chain, large, 1000, 1) == round(1000 * share)
    assert 150 < round(1000 * share) < 200  # about a fifth, for five timesteps
    assert evaluation.equal_work(chain, large, 1000, 700) == 700
    assert evaluation.equal_work(chain, large, 5, 10) == 5
    assert evaluation.equal_work(chain, small, 1000, 1) == 1000  # never more sweeps than the chain takes
