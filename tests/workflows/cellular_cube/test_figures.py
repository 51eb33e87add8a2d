"""The pictures: every cell, plane and sentence that is asked for is there, and long text does not break them."""

import numpy as np
import pytest
import torch

from trainbook.plots import to_png
from trainbook.workflows.cellular_cube.figures import (
    draw_corpus,
    draw_examples,
    draw_flow,
    draw_gate,
    draw_planes,
    draw_similarity,
    draw_spectrum,
)

SIDE, STEPS = 4, 3


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]]


@pytest.mark.parametrize("side", [SIDE, 37])
def test_planes_show_each_step_and_plane_that_fits(side):
    energies = torch.zeros(STEPS + 1, side, side, side)
    energies[0, 0, 1, 2] = 5
    figure = draw_planes(energies)
    panel = figure.axes[0]
    assert len(panel.get_xticks()) == min(side, 9)
    assert len(panel.get_yticks()) == STEPS + 1
    canvas = panel.images[0].get_array()
    np.testing.assert_array_equal(canvas[:side, :side], energies[0, 0].numpy())
    assert np.isfinite(canvas).sum() == (STEPS + 1) * min(side, 9) * side**2
    assert to_png(figure).startswith(b"\x89PNG")


def test_gate_bars_reach_one():
    figure = draw_gate(torch.softmax(gaussian(STEPS, SIDE, 3), -1))
    tops = [max(bar.get_y() + bar.get_height() for bar in axes.patches) for axes in figure.axes if axes.patches]
    assert tops == pytest.approx([1.0] * 3)
    assert {"local", "functional", "distant"} <= {text.get_text() for text in figure.axes[0].get_legend().get_texts()}


def test_flow_marks_the_most_sensitive_cells():
    path = torch.tensor([[0, 1, 2], [1, 1, 2], [2, 3, 0], [3, 0, 0]])
    figure = draw_flow(gaussian(STEPS + 1, SIDE, SIDE, SIDE).square(), gaussian(STEPS, SIDE).abs(), path)
    assert "0,1" in texts(figure)  # two planes at one place
    points = figure.axes[2].collections[0].get_offsets()
    np.testing.assert_array_equal(points, path[:, [2, 1]].numpy())


def test_similarity_matrices_are_sorted_by_label():
    labels = torch.tensor([1, 0, 1, 0])
    vectors = torch.eye(4)[labels]
    figure = draw_similarity({"teacher": vectors, "cube": vectors}, labels, ["a", "b"])
    expected = np.kron(np.eye(2), np.ones((2, 2)))
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), expected, atol=1e-6)
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["a", "b"]


def test_the_spectrum_sums_to_the_variance():
    vectors = gaussian(200, 6)
    figure = draw_spectrum({"teacher": vectors}, 3)
    assert figure.axes[0].lines[0].get_ydata().sum() == pytest.approx(float(vectors.var(0, unbiased=False).sum()), rel=1e-5)


def test_examples_wrap_and_take_any_text():
    figure = draw_examples({"cube": ["a $strange_ text " * 9 + "\x18\x00 \u6587", ""]}, ["short", "x" * 200], 5, "decoded")
    assert any("strange" in text and "\n" in text for text in texts(figure))
    assert to_png(figure)


def test_the_corpus_picture_counts_labels():
    figure = draw_corpus(["one two three", "four five"], torch.tensor([0, 1]), ["a", "b"], torch.tensor([3.0, 1.0]))
    assert [bar.get_width() for bar in figure.axes[1].patches] == [1, 1]
    np.testing.assert_allclose(figure.axes[2].lines[0].get_ydata(), [0.25, 0], atol=1e-6)
