"""COCO's metrics against values computed by hand. (The original's mAP was a literal 0.0.)"""

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from trainbook.workflows.license_plates.scoring import score


def split(*pictures):
    """The tensors of a split from lists of boxes."""
    most = max(map(len, pictures))
    boxes = torch.zeros(len(pictures), most, 4)
    for place, found in zip(boxes, pictures, strict=True):
        place[: len(found)] = torch.tensor(found).view(-1, 4)
    return {"boxes": boxes, "num_boxes": torch.tensor([len(found) for found in pictures])}


def found(*pairs):
    return {"boxes": torch.tensor([box for box, _ in pairs]).view(-1, 4), "scores": torch.tensor([float(s) for _, s in pairs])}


NOTHING = found()
A, B, FAR = [0.0, 0.0, 10.0, 4.0], [20.0, 10.0, 30.0, 15.0], [50.0, 50.0, 60.0, 55.0]


def shifted(box, x):
    return [box[0] + x, box[1], box[2] + x, box[3]]


def test_perfect_boxes_give_one():
    metrics = score(split([A, B], [], [FAR]), [found((A, 0.9), (B, 0.3)), NOTHING, found((FAR, 0.5))], 0.25).metrics
    assert metrics == pytest.approx(dict.fromkeys(metrics, 1.0))


def test_no_boxes_give_zero():
    assert set(score(split([A], [B, FAR]), [NOTHING, NOTHING], 0.25).metrics.values()) == {0.0}


def test_boxes_shifted_by_a_fifth_pass_at_the_thresholds_below_their_overlap():
    """IoU = 8 / 12: right at 0.5, 0.55, 0.6 and 0.65, wrong at the other six."""
    metrics = score(split([A], [B]), [found((shifted(A, 2), 0.9)), found((shifted(B, 2), 0.8))], 0.25).metrics
    assert float(box_iou(torch.tensor([A]), torch.tensor([shifted(A, 2)]))) == pytest.approx(2 / 3)
    assert metrics["ap"] == pytest.approx(0.4)
    assert (metrics["ap50"], metrics["ap75"], metrics["top1_at_iou70"]) == (1, 0, 0)
    assert (metrics["precision"], metrics["recall"]) == (1, 1)


def test_a_false_box_between_two_right_ones():
    """Precision 1 up to recall 1/2, then 2/3: over COCO's 101 points of recall, 51 at 1 and 50 at 2/3."""
    scored = score(split([A, B]), [found((A, 0.9), (FAR, 0.8), (B, 0.7))], 0.75)
    assert scored.metrics["ap"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert np.allclose(scored.precision[0], [1] * 51 + [2 / 3] * 50)
    assert (scored.metrics["precision"], scored.metrics["recall"]) == (0.5, 0.5)  # above 0.75: one right, one false


def test_a_missed_plate_caps_the_recall():
    assert score(split([A, B]), [found((A, 0.9))], 0.25).metrics["ap"] == pytest.approx(51 / 101)


def test_a_second_box_on_the_same_plate_is_false():
    metrics = score(split([A]), [found((A, 0.9), (shifted(A, 1), 0.8))], 0.25).metrics
    assert (metrics["ap"], metrics["precision"], metrics["recall"]) == pytest.approx((1, 0.5, 1))


def test_the_top_box_alone_counts_where_there_is_a_plate():
    pictures = split([A], [A], [], [B])
    boxes = [found((FAR, 0.9), (A, 0.8)), found((A, 0.1), (FAR, 0.05)), found((A, 1.0)), NOTHING]
    assert score(pictures, boxes, 0.25).metrics["top1_at_iou70"] == pytest.approx(1 / 3)


def test_what_became_of_each_box_is_told_in_its_order():
    scored = score(split([A, B], []), [found((FAR, 0.9), (B, 0.8), (A, 0.2)), found((A, 0.6))], 0.25)
    assert scored.matches[0].found.tolist() == [False, True]  # A was found, but scored too low to be reported
    assert scored.matches[0].correct.tolist() == [False, True]
    assert scored.matches[1].correct.tolist() == [False]
    empty = score(split([A], []), [NOTHING, NOTHING], 0.25).matches
    assert [(m.found.tolist(), m.correct.tolist()) for m in empty] == [([False], []), ([], [])]


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_at_half_against_a_count_by_hand(seed):
    """Random boxes: greedy matching by score, then the interpolated area, written out."""
    generator = torch.Generator().manual_seed(seed)

    def random_boxes(number):
        corner, size = torch.rand(number, 2, generator=generator) * 30, torch.rand(number, 2, generator=generator) * 10 + 5
        return torch.cat((corner, corner + size), 1)

    true = [random_boxes(int(torch.randint(1, 4, (), generator=generator))) for _ in range(12)]
    guesses = [{"boxes": torch.cat((boxes + torch.randn(boxes.shape, generator=generator), random_boxes(2)))} for boxes in true]
    for guess in guesses:
        guess["scores"] = torch.rand(len(guess["boxes"]), generator=generator)
    order = sorted(((float(s), i, j) for i, g in enumerate(guesses) for j, s in enumerate(g["scores"])), reverse=True)
    taken, hits = set(), []
    for _, i, j in order:
        overlap = box_iou(guesses[i]["boxes"][j : j + 1], true[i])[0]
        free = [(float(overlap[k]), k) for k in range(len(true[i])) if (i, k) not in taken]
        best = max(free, default=(0.0, -1))
        hits.append(best[0] >= 0.5)
        if hits[-1]:
            taken.add((i, best[1]))
    right = np.cumsum(hits)
    precision, recall = right / np.arange(1, len(hits) + 1), right / sum(map(len, true))
    expected = np.mean([max(precision[recall >= point], default=0.0) for point in np.linspace(0, 1, 101)])
    assert 0 < expected < 1
    measured = score(split(*[boxes.tolist() for boxes in true]), guesses, 0.25).metrics["ap50"]
    assert measured == pytest.approx(expected, abs=1e-6)


def test_a_split_without_boxes_cannot_be_scored():
    with pytest.raises(ValueError, match="without boxes"):
        score(split([], []) | {"boxes": torch.zeros(2, 1, 4)}, [NOTHING, NOTHING], 0.25)
