"""Frechet distance, neighbours and Gaussian draws against scipy, closed forms and brute force."""

import numpy as np
import pytest
import scipy.linalg
import torch

from trainbook.workflows.diffusion.judge import Classifier, features_and_answers, frechet_distance, gaussian_samples, nearest


def test_frechet_distance_is_the_formula_with_scipys_root():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(400, 6)) @ generator.normal(size=(6, 6)), generator.normal(size=(300, 6)) * 2 + 1
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_a_shift_and_of_a_stretch():
    features = np.random.default_rng(1).normal(size=(500, 4))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features + 3, features) == pytest.approx(4 * 9)
    centred = features - features.mean(0)
    assert frechet_distance(2 * centred, centred) == pytest.approx(np.trace(np.cov(centred.T)))  # (2 - 1)^2 tr C


def test_frechet_distance_stands_features_that_are_always_zero():
    features = np.random.default_rng(2).normal(size=(100, 4)) * [1, 1, 0, 0]
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)


def test_the_nearest_training_image_is_the_one_brute_force_finds():
    generator = torch.Generator().manual_seed(0)
    images, training = torch.rand(13, 1, 4, 4, generator=generator), torch.rand(29, 1, 4, 4, generator=generator)
    distances, indices = nearest(images, training, chunk=5)
    for image, distance, index in zip(images, distances, indices, strict=True):
        all_distances = [float((image - other).square().sum().sqrt()) for other in training]
        assert int(index) == int(np.argmin(all_distances))
        assert float(distance) == pytest.approx(min(all_distances), abs=1e-5)
    assert float(nearest(training[:5], training)[0].max()) < 1e-3  # a copied image is found


def test_gaussian_draws_have_the_images_mean_and_covariance():
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(9, 9, generator=generator) * 0.03
    images = (0.5 + torch.randn(300, 9, generator=generator) @ mixing).view(300, 1, 3, 3)
    drawn = gaussian_samples(images, 40_000, generator).flatten(1)
    expected = torch.cov(images.flatten(1).T)
    torch.testing.assert_close(drawn.mean(0), images.flatten(1).mean(0), rtol=0, atol=0.003)
    torch.testing.assert_close(torch.cov(drawn.T), expected, rtol=0, atol=0.04 * float(expected.diagonal().max()))


def test_answers_are_the_classifiers_own_and_features_what_its_head_sees():
    torch.manual_seed(0)
    classifier, images = Classifier((1, 8, 8)), torch.rand(7, 1, 8, 8)
    features, answers = features_and_answers(classifier, images, chunk=3)
    logits = torch.from_numpy(features).float() @ classifier.head.weight.T + classifier.head.bias
    torch.testing.assert_close(logits, classifier(images))
    assert torch.equal(answers, logits.argmax(1))
