"""Held-out metrics of teachers and students, arm by arm and seed by seed, and what the differences say."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainbook.comparison import ABOVE, HIGH, LOW, STANDARD_ERROR
from trainbook.data import Data
from trainbook.state import TrainState
from trainbook.workflows.distillation.arms import COMPONENTS, DIRECT, HPM_KD, KD, KD_LONG, WARM, WITHOUT, arms
from trainbook.workflows.distillation.config import Config
from trainbook.workflows.distillation.graph import TEACHER, Graph, student_name
from trainbook.workflows.distillation.job_table import JOBS, JobTable
from trainbook.workflows.distillation.jobs import one_thread, predict
from trainbook.workflows.distillation.networks import multiply_accumulates, num_parameters
from trainbook.workflows.distillation.scores import Scores, bias_for_class, recall, score, with_bias
from trainbook.workflows.distillation.statistics import Paired, equivalent, holm, mcnemar, paired

PLANNED = ((KD, DIRECT), (HPM_KD, KD), (HPM_KD, KD_LONG))  # the contrasts that Holm's correction counts
MARGIN = 0.1  # points of accuracy within which two arms count as equal
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Contrast:
    """One arm against another in a regime, in points of accuracy.

    Attributes:
        one, other: names of the arms.
        found: of the differences over seeds.
        adjusted_p: by Holm's method over the contrasts of its family.
        mcnemar: exact p on the test images, for each seed.
        equivalent_p: that they differ by `MARGIN` or more; NaN with one seed.
    """

    one: str
    other: str
    found: Paired
    adjusted_p: float
    mcnemar: list[float]
    equivalent_p: float


def test_logits(data: Data, table: JobTable) -> dict[str, Tensor]:
    """Of every teacher and student, on the CPU; computed once, and this is all that reads the test images."""
    if not table.test_logits:
        graph = table.graph
        names = list(graph.teachers()) if table.config.stage != DIRECT else []
        for regime in table.config.regimes:
            names += [name for arm in arms(table.config, regime) for name in graph.students(regime, arm.name)]
        with one_thread(data.test["images"].device):
            table.test_logits = {name: predict(table.network(name), data.test["images"]).cpu() for name in names}
    return table.test_logits


def all_scores(data: Data, table: JobTable) -> dict[str, Scores]:
    """Of every teacher and student; faithfulness is to the first teacher."""
    logits, labels = test_logits(data, table), data.test["labels"].cpu()
    teacher = logits.get("teacher_1")
    return {name: score(each, labels, None if name == "teacher_1" else teacher) for name, each in logits.items()}


def contrasts(data: Data, table: JobTable, regime: str, pairs: list[tuple[str, str]]) -> list[Contrast]:
    """Pairs of arms compared seed by seed; Holm's method counts the pairs given."""
    config, logits, labels = table.config, test_logits(data, table), data.test["labels"].cpu()
    right = {name: (each.argmax(1) == labels).numpy() for name, each in logits.items()}
    made = []
    for one, other in pairs:
        names = [[student_name(regime, arm, seed) for seed in config.student_seeds] for arm in (one, other)]
        # Counted in images, exactly: what is equal stays equal.
        gains = [int(right[a].sum()) - int(right[b].sum()) for a, b in zip(*names, strict=True)]
        point = len(labels) / 100
        by_image = [mcnemar(right[a], right[b]) for a, b in zip(*names, strict=True)]
        made.append((one, other, paired(gains).scaled(1 / point), by_image, equivalent(gains, MARGIN * point)))
    adjusted = holm([found.p for _, _, found, _, _ in made])
    return [Contrast(one, other, found, p, images, e) for (one, other, found, images, e), p in zip(made, adjusted, strict=True)]


def planned_pairs(config: Config, regime: str) -> list[tuple[str, str]]:
    """The planned contrasts whose arms the regime has."""
    names = {arm.name for arm in arms(config, regime)}
    return [pair for pair in PLANNED if names.issuperset(pair)]


def ablation_pairs(config: Config, regime: str) -> list[tuple[str, str]]:
    """HPM-KD against itself without each component, and with warm starts."""
    names = {arm.name for arm in arms(config, regime)}
    return [(HPM_KD, name) for name in (*(WITHOUT + component for component in COMPONENTS), WARM) if name in names]


@torch.no_grad()
def evaluate(config: Config, data: Data, state: TrainState) -> dict[str, float]:
    """Metrics on the test images, named "<who>/<metric>", those of students "<arm>/<metric>_<regime>" and means over seeds.

    accuracy, nll (nats), ece (15 bins), retention (accuracy over the first teacher's), agreement and divergence (KL in nats)
    with the first teacher. "<arm>/points_over_<arm>_<regime>" is a planned contrast in points of accuracy, with its interval
    and Holm's p; "<arm>/error_<regime>_above_<arm>" is the same for every pair that is compared, in the kit's table of
    baselines, where it is error that is lower. recall_of_<class>: of the class that students never saw.

    Raises:
        RunFailed: when some network was not trained to its end.
    """
    table: JobTable = state.stateful[JOBS]
    table.check_all_trained()
    scores = all_scores(data, table)
    metrics = {"run/student_seeds": float(len(config.student_seeds))}
    metrics |= _sizes(data, state, table.graph)
    if "teacher_1" in scores:
        teacher = scores["teacher_1"]
        metrics |= {"teacher/accuracy": teacher.accuracy, "teacher/nll": teacher.nll, "teacher/ece": teacher.ece}
        metrics |= _ensemble(data, table)
    for regime in config.regimes:
        for arm in arms(config, regime):
            found = [scores[name] for name in table.graph.students(regime, arm.name)]
            metrics |= _means(arm.name, regime, found, scores.get("teacher_1"))
        metrics |= _contrast_metrics(data, table, regime)
    if config.missing_class >= 0 and config.stage == "all":
        metrics |= missing_metrics(data, table)
    return metrics | _decisions(table)


def _means(arm: str, regime: str, found: list[Scores], teacher: Scores | None) -> dict[str, float]:
    """Means over seeds; of the accuracy its standard error too."""
    values = {"accuracy": [s.accuracy for s in found], "nll": [s.nll for s in found], "ece": [s.ece for s in found]}
    if teacher is not None:
        values["retention"] = [s.accuracy / teacher.accuracy for s in found]
        values["agreement"] = [s.agreement for s in found]
        values["divergence"] = [s.divergence for s in found]
    metrics = {f"{arm}/{name}_{regime}": float(np.mean(each)) for name, each in values.items()}
    if len(found) > 1:
        error = float(np.std(values["accuracy"], ddof=1)) / len(found) ** 0.5
        metrics[f"{arm}/accuracy_{regime}{STANDARD_ERROR}"] = error
    return metrics


def _sizes(data: Data, state: TrainState, graph: Graph) -> dict[str, float]:
    shape = tuple(data.test["images"].shape[1:])
    students = [name for name in state.modules if name != TEACHER]
    networks = {TEACHER: state.modules.get(TEACHER), "student": state.modules[students[0]] if students else None}
    metrics = {}
    for who, network in networks.items():
        if network is not None:
            number = num_parameters(network)
            metrics |= {f"{who}/parameters": float(number), f"{who}/bytes": float(FLOAT_BYTES * number)}
            metrics[f"{who}/multiply_accumulates"] = float(multiply_accumulates(network, shape))
    if None not in networks.values():
        metrics["student/compression"] = metrics["teacher/parameters"] / metrics["student/parameters"]
    return metrics


def _ensemble(data: Data, table: JobTable) -> dict[str, float]:
    """All teachers' mean probability."""
    names, logits = table.graph.teachers(), test_logits(data, table)
    if len(names) < 2:
        return {}
    mean = torch.stack([logits[name].double().softmax(1) for name in names]).mean(0).log()
    found = score(mean, data.test["labels"].cpu())
    return {"teacher_ensemble/accuracy": found.accuracy, "teacher_ensemble/nll": found.nll, "teacher_ensemble/ece": found.ece}


def _contrast_metrics(data: Data, table: JobTable, regime: str) -> dict[str, float]:
    metrics = {}
    config = table.config
    for contrast in contrasts(data, table, regime, planned_pairs(config, regime)):
        key = f"{contrast.one}/points_over_{contrast.other}_{regime}"
        metrics[key] = contrast.found.mean
        if contrast.found.number > 1:
            metrics |= {key + LOW: contrast.found.low, key + HIGH: contrast.found.high, f"{key}_p": contrast.adjusted_p}
    for contrast in contrasts(data, table, regime, [*planned_pairs(config, regime), *ablation_pairs(config, regime)]):
        key = f"{contrast.other}/error_{regime}{ABOVE}{contrast.one}"
        if contrast.found.number > 1:
            metrics |= {key: contrast.found.mean, key + LOW: contrast.found.low, key + HIGH: contrast.found.high}
    return metrics


def missing_logits(data: Data, table: JobTable, arm: str, seed: int) -> tuple[Tensor, Tensor]:
    """Test logits of a student that never saw a class, as they are and with that class's bias set on valid; (N, C) each."""
    number, name = table.config.missing_class, student_name(f"without_{table.config.missing_class}", arm, seed)
    logits, valid = test_logits(data, table)[name], data.valid
    with one_thread(valid["images"].device):
        bias = bias_for_class(predict(table.network(name), valid["images"]).cpu(), valid["labels"].cpu(), number)
    return logits, with_bias(logits, number, bias)


def missing_metrics(data: Data, table: JobTable) -> dict[str, float]:
    """Recall of the class that students never saw, and their accuracy, before and after its bias is set on valid."""
    config, labels = table.config, data.test["labels"].cpu()
    number, metrics = config.missing_class, {}
    for arm in (DIRECT, KD):
        both = [missing_logits(data, table, arm, seed) for seed in config.student_seeds]
        for place, suffix in enumerate(("", "_bias_set")):
            recalls = [recall(pair[place], labels, number) for pair in both]
            metrics[f"{arm}/recall_of_{number}{suffix}"] = float(np.mean(recalls))
            if place:
                right = [float((pair[1].argmax(1) == labels).double().mean()) for pair in both]
                metrics[f"{arm}/accuracy_without_{number}{suffix}"] = float(np.mean(right))
    return metrics


def _decisions(table: JobTable) -> dict[str, float]:
    """What the gate, the chain and the search decided, on valid."""
    metrics = {}
    if "gate" in table.facts:
        gate = table.facts["gate"]
        metrics = {f"gate/valid_nll_{name.replace(' ', '_')}": value for name, value in gate["nll"].items()}
        metrics["gate/learned_is_used"] = float(gate["rule"] == "learned")
    for regime in table.graph.hpm_regimes:
        if table.graph.widths:
            metrics[f"chain/assistants_kept_{regime}"] = float(len(table.assistants(regime, len(table.graph.widths))))
        metrics |= {f"search/{name}_{regime}": value for name, value in table.search_losses(regime).items()}
    return metrics
