"""Heads of further teachers: where they start, whom they learn from, and what is said of them; each by an independent way."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from tests.workflows.cellular_cube.test_data import load
from tests.workflows.cellular_cube.test_training import digest, run
from tests.workflows.cellular_cube.test_vector_file import bad, write
from trainbook.errors import UserError
from trainbook.runtime import detect
from trainbook.seeding import seed_step
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.evaluation import _further
from trainbook.workflows.cellular_cube.losses import cube_loss, present_reconstruction
from trainbook.workflows.cellular_cube.readout_fit import PENALTIES, standardise_readout
from trainbook.workflows.cellular_cube.training import build, reconstruct, train

MISSING = slice(0, 200, 5)
TINY = {"decoder_epochs": 0, "fine_tune_epochs": 0, "num_epochs": 1}


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """TF-IDF of real sentences, and beside it SYNTHETIC vectors from a file, of which every fifth is missing."""
    found, _ = write(tmp_path_factory.mktemp("mine"), change=lambda rows: bad(3 * rows + 1, MISSING, np.nan))
    return found | {"teacher": "tfidf_svd", "further_teachers": ["file"]} | TINY


@pytest.fixture(scope="module")
def data(fields, tmp_path_factory):
    """The file's vectors are given something to learn from the main ones."""
    data = load(tmp_path_factory.mktemp("data"), **fields)
    splits = {}
    for name in ("train", "valid", "test"):
        split = dict(getattr(data, name))
        splits[name] = split | {"file": split["file"] + 3 * split["embeddings"][:, :24].tanh()}
    centre = splits["train"]["file"].nanmean(0)
    scale = (splits["train"]["file"] - centre).square().nanmean().sqrt()
    return replace(data, **{name: split | {"file": (split["file"] - centre) / scale} for name, split in splits.items()})


def make(fields, data, **changes):
    config = Config.from_preset("smoke", fields | changes)
    seed_step(0, 0)
    return config, build(config, data, detect())


def arrays(data):
    """(inputs, targets) of each split, the sentences that have both."""
    found = []
    for split in (data.train, data.valid, data.test):
        rows = ~np.isnan(split["file"].numpy()).any(1)
        assert 0 < rows.sum() < len(rows)
        found.append((split["embeddings"].numpy()[rows], split["file"].numpy()[rows]))
    return found


def linear_map(data, size):
    """scikit-learn's regression on scikit-learn's PCA code, its penalty by the validation split: test outputs."""
    pca = PCA(size).fit(data.train["embeddings"].numpy())
    (codes, targets), (valid_codes, valid_targets), (test_codes, _) = ((pca.transform(x), y) for x, y in arrays(data))
    deviation, best = codes.std(0), None
    for penalty in PENALTIES:
        peer = Ridge(alpha=penalty * len(codes)).fit(codes / deviation, targets)
        error = np.square(peer.predict(valid_codes / deviation) - valid_targets).sum()
        if best is None or error < best[0]:
            best = error, peer.predict(test_codes / deviation)
    return best[1]


@pytest.mark.parametrize(
    "changes",
    [{}, {"readout": "gradient"}, {"numbers_per_cell": 2}, {"universal_width": 10}, {"transformer": "hierarchical"},
     {"face_layout": "identity", "router_tokens": 2}],
    ids=str,
)  # fmt: skip
def test_untrained_a_head_is_the_regression_on_the_pca_code(fields, data, changes):
    config, state = make(fields, data, **changes)
    network, present = state.modules["cube"], ~data.test["file"].isnan().any(1)
    expected = linear_map(data, config.code_size)
    np.testing.assert_allclose(reconstruct(network, data.test["embeddings"], head="file")[present], expected, atol=2e-4)
    standardise_readout(network, data.train["embeddings"])  # other coordinates, the same map
    np.testing.assert_allclose(reconstruct(network, data.test["embeddings"], head="file")[present], expected, atol=2e-3)


def test_agreement_is_that_of_the_kernels_of_sentences_that_both_have(fields, tmp_path):
    data = load(tmp_path, **fields)
    (x, y), *_ = arrays(data)
    centre = np.eye(len(x)) - 1 / len(x)
    kernels = [centre @ (vectors.astype(np.float64) @ vectors.T) @ centre for vectors in (x, y)]
    expected = (kernels[0] * kernels[1]).sum() / np.linalg.norm(kernels[0]) / np.linalg.norm(kernels[1])
    assert data.further["file"].agreement == pytest.approx(expected, rel=1e-6)
    assert 0 < expected < 0.7
    raw = data.train["file"] * data.further["file"].scale + data.further["file"].mean
    assert float(data.train["file"].nanmean()) == pytest.approx(0, abs=1e-5)
    assert float(raw.nanmean()) == pytest.approx(1, abs=0.2)


def test_missing_vectors_take_no_part_in_loss_or_gradient(fields, data):
    config, state = make(fields, data, emergence_weight=0, reconstruction_weight=0, similarity_weight=0, further_weight=0.7)
    network = state.modules["cube"].eval()
    for parameter in network.parameters():  # away from the start, so that gradients reach everything
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = {name: tensor[:16] for name, tensor in data.train.items()}
    present = [row for row in range(16) if not bool(batch["file"][row].isnan().any())]
    assert 0 < len(present) < 16
    total, parts = cube_loss(config, network, batch, 0.0)
    total.backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    output = network(batch["embeddings"][present]).further["file"]
    plain = torch.nn.functional.mse_loss(output, batch["file"][present])
    (0.7 * data.further["file"].agreement * plain).backward()
    assert float(parts["file_error"]) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert float(total.detach()) == pytest.approx(0.7 * data.further["file"].agreement * float(plain.detach()), rel=1e-5)
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6)
    assert bool(network.heads["file"].weight.grad.any())
    assert bool(network.transformer.linear.weight.grad.any())
    assert all(bool(parameter.grad.any()) for parameter in network.cube.rule.columns[0].local.parameters())
    outputs = torch.randn(3, 24, requires_grad=True)
    nothing = present_reconstruction(outputs, torch.full((3, 24), torch.nan))
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert not bool(outputs.grad.any())


def test_figures_are_those_of_the_vectors_that_there_are(fields, data):
    config, state = make(fields, data)
    network, further = state.modules["cube"], data.further["file"]
    run(config, data, state)
    found = _further(config, data, network)
    (_, y), _, (_, target) = arrays(data)
    present = ~data.test["file"].isnan().any(1)
    pca = PCA(config.code_size).fit(y)
    outputs = {
        "cube": reconstruct(network, data.test["embeddings"], head="file")[present].numpy(),
        "linear_map": linear_map(data, config.code_size),
        "own_pca": pca.inverse_transform(pca.transform(target)),
    }
    assert found["mean/file_fvu"] == 1
    mean = further.mean.numpy()
    for who, output in outputs.items():
        assert found[f"{who}/file_fvu"] == pytest.approx(np.square(output - target).sum() / np.square(target).sum(), abs=1e-3)
        raw, wanted = output * further.scale + mean, target * further.scale + mean
        cosines = (raw * wanted).sum(1) / np.linalg.norm(raw, axis=1) / np.linalg.norm(wanted, axis=1)
        assert found[f"{who}/file_cosine"] == pytest.approx(cosines.mean(), abs=1e-3)
    difference = np.square(outputs["linear_map"] - target).sum(1) - np.square(outputs["cube"] - target).sum(1)
    assert found["linear_map/file_fvu_above_cube"] == pytest.approx(difference.mean() / np.square(target).sum(1).mean(), abs=1e-3)
    assert found["teacher/file_present"] == pytest.approx(float(present.double().mean()))
    assert found["own_pca/file_fvu"] < found["linear_map/file_fvu"] < 1


def test_heads_learn_the_closed_form_helps_and_a_bad_end_goes_back_to_the_linear_map(fields, data):
    config, state = make(fields, data, readout="gradient", num_epochs=6, learning_rate=3e-3)
    errors = [metrics["file_error"] for stage, metrics in run(config, data, state) if stage == "main"]
    assert np.mean([float(error) for error in errors[-7:]]) < 0.97 * np.mean([float(error) for error in errors[:7]])
    config, state = make(fields, data, num_epochs=1)
    before, last = None, None
    for _ in train(config, data, state):
        before, last = last, _valid_error(state.modules["cube"], data)
        seed_step(0, state.step)
    assert state.stage == "readout"
    assert last <= before
    config, state = make(fields, data, readout="gradient", learning_rate=1.0)
    assert run(config, data, state)[-1][1]["fell_back_to_pca"] == 1
    _, fresh = make(fields, data)
    again, start = (reconstruct(one.modules["cube"], data.test["embeddings"], head="file") for one in (state, fresh))
    torch.testing.assert_close(again, start, atol=1e-4, rtol=1e-3)


def _valid_error(network, data):
    target = data.valid["file"]
    return float((reconstruct(network, data.valid["embeddings"], head="file") - target)[~target.isnan().any(1)].square().sum())


def test_synthetic_vectors_teach_a_head_nothing_and_the_cube_without_heads_starts_the_same(fields, data):
    config, state = make(fields, data, warm_up_epochs=1)
    network, before = state.modules["cube"], None
    before = digest(network.heads)
    for record in train(config, data, state):
        if state.stage == "warm_up":
            assert "file_error" not in record.metrics
            assert digest(network.heads) == before
        seed_step(0, state.step)
    assert digest(network.heads) != before
    with_heads, without = (make(fields, each)[1].modules["cube"].state_dict() for each in (data, replace(data, further={})))
    assert {name for name in with_heads if not name.startswith("heads.")} == without.keys()
    assert all(torch.equal(with_heads[name], tensor) for name, tensor in without.items())


def test_a_teacher_with_hardly_a_vector_is_refused_and_zeros_count_as_none(tmp_path):
    fields, _ = write(tmp_path, change=lambda rows: bad(rows, slice(2, None), np.nan))
    both = fields | {"teacher": "tfidf_svd", "further_teachers": "file"}
    with pytest.raises(UserError, match=r"file has [01] (train|valid|test) vectors"):
        load(tmp_path, **both)
    fields, of_line = write(tmp_path, change=lambda rows: rows * (np.arange(len(rows)) % 3 > 0)[:, None])
    data = load(tmp_path, **fields | {"teacher": "tfidf_svd", "further_teachers": "file"})
    zero = [not of_line[sentence.lower()].any() for sentence in data.sentences["train"]]
    assert data.train["file"].isnan().all(1).tolist() == zero
    assert 0 < sum(zero) < len(zero)
