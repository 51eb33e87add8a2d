import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from trainbook import plots
from trainbook.fitting import Stage, planned_rates
from trainbook.optimization import OptimizationConfig
from trainbook.state import TrainState


def test_validation_is_drawn_over_what_the_training_batches_have():
    history = [{"step": s, "stage": "fit", "loss": 1.0 / s, "n": 3} for s in (1, 2, 3)]
    history[1] |= {"valid_loss": 0.7, "valid_accuracy": 0.5}
    history[2] |= {"valid_accuracy": 0.25, "penalty": 0.125}
    figure = plots.record_curves(history)
    panels = {panel.get_title(): panel.lines for panel in figure.axes if panel.lines}
    assert panels.keys() == {"loss", "valid accuracy"}
    (written,) = [panel for panel in figure.axes if panel.get_title() == "recorded once"]
    assert [text.get_text() for text in written.texts] == ["penalty  0.125  at step 3"]
    training, validation = panels["loss"]
    np.testing.assert_allclose(training.get_xydata(), [(1, 1), (2, 1 / 2), (3, 1 / 3)])
    np.testing.assert_allclose(validation.get_xydata(), [(2, 0.7)])
    assert validation.get_label() == "fit, validation"


def test_the_schedule_is_drawn_as_torch_will_follow_it():
    config = OptimizationConfig(schedule="cosine", learning_rate=0.3, optimizer="sgd")
    state = TrainState({}, stateful={"first": Stage("first", torch.nn.Linear(2, 2), config, 2000), "other": object()})
    figure = plots.schedules(planned_rates(state))
    (line,) = figure.axes[0].lines
    steps, rates = line.get_xydata().T
    assert figure.axes[0].get_title() == "first: learning rate"
    assert len(steps) <= 501
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2000)
    expected = []
    for _ in range(2000):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([expected[int(step)] for step in steps], rel=1e-6)


def test_bars_stand_in_rows_of_three_with_intervals_of_95_percent():
    metrics = {f"{who}/m{index}": 1.0 + index for index in range(4) for who in ("model", "base")}
    metrics["model/m1_standard_error"] = 0.25
    figure = plots.baseline_bars(metrics, ["m0", "m1", "m2", "m3"])
    drawn = [panel for panel in figure.axes if panel.patches]
    assert [panel.get_title() for panel in drawn] == ["m0", "m1", "m2", "m3"]
    assert len({panel.get_subplotspec().rowspan.start for panel in drawn}) == 2
    (bars,) = [segments for panel in drawn for segments in panel.collections]
    assert bars in drawn[1].collections
    ends = sorted(x for segment in bars.get_segments() for x, _ in segment)
    assert (ends[0], ends[-1]) == pytest.approx((2 - 1.96 * 0.25, 2 + 1.96 * 0.25), abs=1e-3)


def test_phase_times_are_named_with_their_share():
    figure = plots.phase_times({"autoencoder": 30.0, "chain": 60.0, "evaluation": 10.0})
    (panel,) = figure.axes
    assert [bar.get_width() for bar in panel.patches] == [30, 60, 10]
    assert [text.get_text() for text in panel.texts] == ["30.0 s, 30%", "60.0 s, 60%", "10.0 s, 10%"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["autoencoder", "chain", "evaluation"]


def test_a_footnote_longer_than_the_figure_is_wide_stays_within_it():
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    plots.to_png(figure, " · ".join(f"part {number}" for number in range(20)))
    note = figure.get_supxlabel()
    (text,) = [child for child in figure.texts if child.get_text() == note]
    extent = text.get_window_extent()
    assert 0 <= extent.x0 < extent.x1 <= figure.bbox.x1
    assert extent.y1 <= axes.get_tightbbox().y0
