"""Teachers that know different digits: students of the learned gate against students of the plain average."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from trainbook.runtime import detect
from trainbook.workflows.distillation import jobs
from trainbook.workflows.distillation.arms import Arm, Settings
from trainbook.workflows.distillation.config import Config
from trainbook.workflows.distillation.graph import STUDENT
from trainbook.workflows.distillation.images import load_data
from trainbook.workflows.distillation.job_table import JobTable
from trainbook.workflows.distillation.jobs import Job, advance, predict
from trainbook.workflows.distillation.statistics import paired

KNOWN = {"teacher_1": range(0, 5), "teacher_2": range(5, 10), "teacher_3": range(3, 7)}


@pytest.mark.slow
def test_the_learned_gate_is_worth_ten_points_over_the_average(tmp_path, monkeypatch):
    """Students see no label at all (weight 1): what they know is what they were told, and whom they listened to."""
    runtime = replace(detect(), jobs=1, data_folder=tmp_path)
    config = Config(chunk_steps=10_000, num_teachers=3)
    data = load_data(config, runtime)
    table = JobTable(config, data, runtime)
    labels = data.train["labels"]
    for number, (name, classes) in enumerate(KNOWN.items()):
        known = torch.isin(labels, torch.tensor(list(classes))).nonzero()[:, 0]
        monkeypatch.setattr(jobs, "labelled_indices", lambda *_, known=known: known)
        settings = Settings("", 4.0, 0.9, 0.1, 5e-4)
        job = Job(name, "specialist", "all_labels", Arm("one", method=""), settings, number, "resnet8", 16, 200)
        table.take(job, advance(config, data, job, table.teaching(job), None)[0])
    monkeypatch.undo()
    accuracy = {"uniform": [], "learned": []}
    for rule, found in accuracy.items():
        for seed in range(5):
            settings, arm = Settings("kd", 4.0, 1.0, 0.1, 5e-4), Arm("one", gate=rule)
            job = Job(rule, STUDENT, "all_labels", arm, settings, seed, "small_cnn", 8, 660, (tuple(KNOWN),))
            table.networks["student"] = advance(config, data, job, table.teaching(job), None)[0]["network"]
            logits = predict(table.network("student"), data.test["images"])
            found.append(100 * float((logits.argmax(1) == data.test["labels"]).float().mean()))
    gain = paired(list(np.subtract(accuracy["learned"], accuracy["uniform"])))
    assert table.facts["gate"]["rule"] == "learned"
    assert gain.mean > 10, accuracy
    assert gain.low > 0, accuracy
    print(accuracy, gain)
