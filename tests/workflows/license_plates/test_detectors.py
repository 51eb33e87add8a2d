"""The detector: its loss against the published formulas written out, and what training and evaluation hand to each other."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid
from torchvision.ops import box_iou

from trainbook.checkpoints import write_checkpoint
from trainbook.state import load_newest_checkpoint, snapshot
from trainbook.workflows.license_plates.config import Config
from trainbook.workflows.license_plates.detectors import SCORE_FLOOR, build_detector, detect
from trainbook.workflows.license_plates.evaluation import evaluate
from trainbook.workflows.license_plates.images import load_data
from trainbook.workflows.license_plates.training import augment, build, detection_loss, prepared, train

RUNTIME = SimpleNamespace(device="cpu", data_folder=Path("data"))
SMOKE = Config.from_preset("smoke")


@pytest.fixture(scope="module")
def data():
    return load_data(SMOKE, RUNTIME)


def fresh(**overrides):
    torch.manual_seed(0)
    return build_detector(SMOKE.model_copy(update=overrides), Path("data"))


def batch_of(data, number):
    return {name: tensor[:number] for name, tensor in data.train.items()}


def loss_of(model, batch):
    return detection_loss(model, *prepared(batch, torch.device("cpu")), batch["num_boxes"])


def moved(anchor, offsets):
    """An anchor's box: its centre moved by shares of its sides, its sides multiplied."""
    (x0, y0, x1, y1), (tx, ty, tw, th) = anchor.tolist(), offsets
    wide, tall = (x1 - x0) * math.exp(tw), (y1 - y0) * math.exp(th)
    x, y = (x0 + x1) / 2 + tx * (x1 - x0), (y0 + y1) / 2 + ty * (y1 - y0)
    return x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2


def giou(a, b):
    """Intersection over union, less the share of the hull that neither covers."""
    both = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - both
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return both / union - (hull - union) / hull


def test_the_loss_is_the_papers(data):
    """Focal loss and GIoU loss of every anchor, from the network's own outputs, by loops and the formulas."""
    batch, model, caught = batch_of(data, 4), fresh(), {}
    model.head.register_forward_hook(lambda module, inputs, outputs: caught.update({k: v.detach() for k, v in outputs.items()}))
    model.anchor_generator.register_forward_hook(lambda module, inputs, outputs: caught.update(anchors=outputs))
    loss, parts = loss_of(model, batch)
    expected_focal, expected_giou = 0.0, 0.0
    for index, number in enumerate(batch["num_boxes"].tolist()):
        anchors, logits = caught["anchors"][index], caught["cls_logits"][index][:, 0]
        true = batch["boxes"][index][:number]
        overlap = box_iou(anchors, true) if number else torch.zeros(len(anchors), 1)
        best, which = overlap.max(1)
        positive = best >= 0.5
        if number:  # an anchor that is a plate's best is its, however little it overlaps
            positive = positive | (overlap == overlap.max(0).values).any(1)
        background = (best < 0.4) & ~positive
        p = logits.sigmoid()
        focal = torch.where(positive, -0.25 * (1 - p) ** 2 * logsigmoid(logits), -0.75 * p**2 * logsigmoid(-logits))
        count = max(1, int(positive.sum()))
        expected_focal += float(focal[positive | background].sum()) / count / 4
        outputs = caught["bbox_regression"][index]
        for anchor, offsets, box in zip(anchors[positive], outputs[positive], true[which[positive]], strict=True):
            expected_giou += (1 - giou(moved(anchor, offsets.tolist()), box.tolist())) / count / 4
    assert float(parts["classification_loss"].detach()) == pytest.approx(expected_focal, rel=1e-4)
    assert float(parts["regression_loss"].detach()) == pytest.approx(expected_giou, rel=1e-4)
    assert float(loss.detach()) == pytest.approx(expected_focal + expected_giou, rel=1e-4)


def test_a_batch_is_the_mean_of_its_pictures(data):
    """So that accumulation and several processes train what one batch trains."""
    whole, parts = batch_of(data, 4), []
    model = fresh()
    for index in range(4):
        parts.append(float(loss_of(model, {name: tensor[index : index + 1] for name, tensor in whole.items()})[0].detach()))
    assert float(loss_of(model, whole)[0].detach()) == pytest.approx(sum(parts) / 4, rel=1e-5)


def test_pictures_without_plates_are_learned_from(data):
    empty = batch_of(data, 2) | {"num_boxes": torch.zeros(2, dtype=torch.int64)}
    model = fresh()
    loss, parts = loss_of(model, empty)
    loss.backward()
    assert float(parts["regression_loss"].detach()) == 0 < float(parts["classification_loss"].detach())
    assert all(p.grad is not None for p in model.parameters())  # several processes wait for every gradient


def test_losses_are_float32_in_mixed_precision(data):
    batch, model = batch_of(data, 2), fresh()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = loss_of(model, batch)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(loss_of(model, batch)[0].detach()), rel=0.05)


def test_mirrored_pictures_keep_their_boxes_around_the_same_pixels():
    images, boxes = torch.full((64, 3, 20, 40), 0.5), torch.tensor([4.0, 5.0, 14.0, 9.0]).expand(64, 1, 4)
    images[:, :, 5:9, 4:14] = 1.0
    torch.manual_seed(0)
    changed, moved = augment(images, boxes)
    lefts = set()
    for image, box in zip(changed, moved[:, 0].int().tolist(), strict=True):
        plate = image[0] > image[0].median()
        rows, columns = plate.any(1).nonzero(), plate.any(0).nonzero()
        assert (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) == tuple(box)
        lefts.add(box[0])
    assert lefts == {4, 26}
    assert 0 <= changed.min() < changed.max() <= 1


def test_detections_are_inside_best_first_apart_and_leave_the_mode(data):
    model = fresh().train()
    torch.nn.init.normal_(model.head.classification_head.cls_logits.weight, std=3)
    found = detect(model, data.test["images"], 3)
    assert model.training
    assert len(found) == 4
    assert sum(len(one["boxes"]) for one in found) > 10
    for one in found:
        assert (one["scores"].diff() <= 0).all()
        assert (one["scores"] >= SCORE_FLOOR).all()
        assert (one["boxes"] >= 0).all()
        assert (one["boxes"] <= torch.tensor([64.0, 48.0, 64.0, 48.0])).all()
        overlap = box_iou(one["boxes"], one["boxes"]).nan_to_num().triu(1)  # boxes clipped to nothing have none
        assert (overlap <= SMOKE.nms_threshold).all()


def test_the_best_weights_are_what_evaluation_reads_through_a_checkpoint(data, tmp_path):
    """The original saved a best checkpoint that its evaluation could not read."""
    config = SMOKE.model_copy(update={"num_epochs": 10, "validate_every": 2, "learning_rate": 5e-3})
    torch.manual_seed(0)
    state = build(config, data, RUNTIME)
    # Validated on the training pictures, which can be learned in seconds; that is not what is measured here.
    known = type(data)(**{**vars(data), "valid": data.train, "test": data.train})
    records = [record.metrics for record in train(config, known, state)]
    best = max(record["valid_ap"] for record in records if "valid_ap" in record)
    assert best > 0
    write_checkpoint(tmp_path, state.step, snapshot(state, {}), keep=1)
    torch.manual_seed(1)
    again = build(config, data, RUNTIME)
    load_newest_checkpoint(tmp_path, again, "cpu")
    assert evaluate(config, known, again)["detector/ap"] == pytest.approx(best, abs=1e-12)
    assert state.stateful["fit"].best_value == pytest.approx(best, abs=1e-12)


def test_the_full_models_head_is_one_class_and_starts_from_rare_plates():
    model = build_detector(Config(body="resnet50", coco_weights=False, image_width=64, image_height=64), Path("data"))
    head = model.head.classification_head
    assert head.cls_logits.out_channels == 9 * head.num_classes == 9
    assert head.cls_logits.bias.detach() == pytest.approx(torch.full((9,), -math.log(99)))
    assert (model.transform.min_size, model.transform.max_size) == ((64,), 64)
    assert model.nms_thresh == 0.5
