"""Training through the frozen decoder to text: what the loss is, whom it moves and whom it does not."""

import numpy as np
import pytest
import torch

from tests.workflows.cellular_cube.test_training import data, digest, make, run  # noqa: F401  (data is a fixture)
from trainbook.seeding import seed_step
from trainbook.workflows.cellular_cube.losses import cube_loss
from trainbook.workflows.cellular_cube.text_decoder import PAD
from trainbook.workflows.cellular_cube.training import TEXT_DECODER, train, with_tokens

ONLY_TEXT = {"reconstruction_weight": 0.0, "similarity_weight": 0.0, "emergence_weight": 0.0, "decoder_epochs": 1}


def batch_of(data, number=5):  # noqa: F811
    return {name: tensor[:number] for name, tensor in with_tokens(data).train.items()}


def frozen(state):
    decoder = state.modules[TEXT_DECODER]
    decoder.freeze()
    return decoder


def test_the_loss_is_the_cross_entropy_of_the_sentence_given_what_the_cube_says(data):  # noqa: F811
    config, state = make(data, text_weight=0.3, decoder_epochs=1)
    network, decoder, batch = state.modules["cube"].eval(), frozen(state), batch_of(data)
    with torch.no_grad():
        with_text, parts = cube_loss(config, network, batch, 0.0, decoder)
        without, other = cube_loss(config, network, batch, 0.0)
        output = network(batch["embeddings"]).vectors
        surprise = []
        for vector, row in zip(output, batch["tokens"], strict=True):
            length = int((row != PAD).sum())
            scores = decoder(vector[None], row[None, : length - 1])[0].double().numpy()  # one sentence, no padding
            probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
            surprise += [-np.log(probabilities[place, int(row[place + 1])]) for place in range(length - 1)]
    assert float(parts["text_nats"]) == pytest.approx(np.mean(surprise), rel=1e-5)
    assert float(with_text - without) == pytest.approx(0.3 * np.mean(surprise), rel=1e-4)
    assert parts.keys() - other.keys() == {"text_nats"}
    assert not torch.equal(output, batch["embeddings"])  # of the output, not of the teacher's vector


def test_its_gradient_is_that_of_finite_differences_and_reaches_every_part_of_the_cube_only(data):  # noqa: F811
    config, state = make(data, text_weight=1.0, **ONLY_TEXT)
    network, decoder = state.modules["cube"].double().train(), frozen(state).double()
    batch = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch_of(data).items()}
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():  # away from the start, so that gradients reach everything
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def loss():
        return cube_loss(config, network, batch, 0.0, decoder)[0]

    loss().backward()
    assert all(parameter.grad is None for parameter in decoder.parameters())
    parts = {"transformer": network.transformer, "rule": network.cube.rule, "readout": network.readout}
    for name, part in parts.items():
        parameter = max((p for p in part.parameters() if p.grad is not None), key=lambda p: float(p.grad.abs().max()))
        place = int(parameter.grad.abs().argmax())
        ends = []
        for change in (1e-5, -2e-5):
            parameter.data.view(-1)[place] += change
            ends.append(float(loss().detach()))
        parameter.data.view(-1)[place] += 1e-5
        expected = (ends[0] - ends[1]) / 2e-5
        assert float(parameter.grad.view(-1)[place]) == pytest.approx(expected, rel=1e-4), name
        assert abs(expected) > 1e-6


def test_the_decoder_is_trained_first_and_stays_as_it_is(data):  # noqa: F811
    config, state = make(data, text_weight=1.0, decoder_epochs=2, warm_up_epochs=1, fine_tune_epochs=1, validate_every=0)
    decoder, kept, order = state.modules[TEXT_DECODER], None, []
    fresh = digest(decoder)
    for record in train(config, data, state):
        order.append(state.stage)
        if state.stage == TEXT_DECODER:
            kept = digest(decoder)
        elif state.stage in ("main", "fine_tune"):
            assert float(record.metrics["text_nats"]) > 0
        seed_step(config.seed, state.step)
    assert list(dict.fromkeys(order)) == [TEXT_DECODER, "warm_up", "standardise", "main", "readout", "fine_tune"]
    assert kept != fresh
    assert digest(decoder) == kept
    assert len(order) == state.total_steps


def test_a_heavy_weight_teaches_the_cube_what_the_decoder_reads(data):  # noqa: F811
    """Cross entropy in the last epoch, over the same cube beside the same decoder trained without it."""
    found = []
    for weight in (1e-9, 10.0):
        config, state = make(data, text_weight=weight, decoder_epochs=6, num_epochs=3, learning_rate=5e-3, readout="gradient")
        last = [float(metrics["text_nats"]) for stage, metrics in run(config, data, state) if stage == "main"][-7:]
        found.append(np.mean(last))
    assert found[1] < found[0] - 0.05


def test_without_it_the_decoder_comes_last_and_changes_nothing(data):  # noqa: F811
    digests = []
    for epochs in (0, 1):
        config, state = make(data, decoder_epochs=epochs)
        stages = [stage for stage, _ in run(config, data, state)]
        digests.append(digest(state.modules["cube"]))
    assert stages[-1] == TEXT_DECODER
    assert digests[0] == digests[1]
