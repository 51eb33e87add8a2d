"""The comparison as text, CSV and JSON: what lies in a run's export folder beside the weights."""

import csv
import io
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from trainbook.data import Data
from trainbook.intervals import t_interval
from trainbook.state import TrainState
from trainbook.tables import Table
from trainbook.workflows.distillation.arms import DIRECT, HPM_KD, KD, WITHOUT, arms
from trainbook.workflows.distillation.config import Config
from trainbook.workflows.distillation.costs import Latency, TrainingTime, cache_seconds, latency, training_time
from trainbook.workflows.distillation.evaluation import (
    MARGIN,
    Contrast,
    ablation_pairs,
    all_scores,
    contrasts,
    planned_pairs,
    test_logits,
)
from trainbook.workflows.distillation.graph import STUDENT, TEACHER
from trainbook.workflows.distillation.job_table import JOBS, JobTable
from trainbook.workflows.distillation.jobs import Job
from trainbook.workflows.distillation.networks import num_parameters
from trainbook.workflows.distillation.scores import Scores, confusion
from trainbook.workflows.distillation.statistics import SIGNIFICANCE, sentence

SCHEMA_VERSION = 1
BATCH_SIZES = (1, 128)  # of latencies


def export(config: Config, data: Data, state: TrainState, metrics: dict[str, float]) -> dict[str, str]:
    """The files results.txt, results.csv (a row per network), results.json and predictions.csv (chosen classes).

    Latencies and training times are measured here, on this machine, and differ from one call to the next.
    """
    table: JobTable = state.stateful[JOBS]
    scores, labels = all_scores(data, table), data.test["labels"].cpu()
    rows = [_row(config, table, name, found) for name, found in scores.items()]
    latencies = {name: [latency(module, data.test["images"], size) for size in BATCH_SIZES] for name, module in _timed(state)}
    times = _training_times(table)
    compared = {regime: _contrasts(data, table, regime) for regime in config.regimes}
    sections = [
        _costs_text(metrics, data, latencies),
        *(_regime_text(config, table, regime, scores, times) for regime in config.regimes),
        *(_contrasts_text(regime, families) for regime, families in compared.items()),
        _times_text(table, times),
        _decisions_text(table),
    ]
    content = {
        "schema_version": SCHEMA_VERSION,
        "config": config.model_dump(mode="json"),
        "data_sha256": data.sha256,
        "environment": {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()},
        "threads": torch.get_num_threads(),
        "metrics": metrics,
        "networks": rows,
        "contrasts": {regime: {kind: [asdict(c) for c in each] for kind, each in f.items()} for regime, f in compared.items()},
        "confusion": {name: confusion(each, labels).tolist() for name, each in test_logits(data, table).items()},
        "latency_milliseconds": {name: [asdict(each) for each in found] for name, found in latencies.items()},
        "search": {regime: found.rows for regime in table.graph.hpm_regimes if (found := table.selection(regime)) is not None},
        "training": {name: {**asdict(found), "seconds": found.seconds} for name, found in times.items()},
    }
    return {
        "results.txt": "\n\n".join(section for section in sections if section) + "\n",
        "results.csv": _csv(rows),
        "results.json": json.dumps(_finite(content), indent=1),
        "predictions.csv": _predictions(data, table),
    }


def _timed(state: TrainState) -> list[tuple[str, torch.nn.Module]]:
    """The teacher, and a student: all are alike."""
    students = [name for name in state.modules if name != TEACHER]
    found = [(TEACHER, state.modules[TEACHER])] if TEACHER in state.modules else []
    return [*found, *([("student", state.modules[students[0]])] if students else [])]


def _row(config: Config, table: JobTable, name: str, found: Scores) -> dict[str, Any]:
    regime, arm, seed = name.split("/") if "/" in name else ("all_labels", TEACHER, name.removeprefix("teacher_"))
    result = table.results[name]
    teacher = table.results.get("teacher_1")
    return {
        "regime": regime,
        "arm": arm,
        "seed": seed,
        **asdict(found),
        "valid_accuracy": result["valid_accuracy"],
        "valid_retention": None if teacher is None else result["valid_accuracy"] / teacher["valid_accuracy"],
        "parameters": num_parameters(table.network(name)),
    }


def _contrasts(data: Data, table: JobTable, regime: str) -> dict[str, list[Contrast]]:
    pairs = {"planned": planned_pairs(table.config, regime), "ablation": ablation_pairs(table.config, regime)}
    done = {DIRECT, *(one for one, _ in pairs["planned"])}
    others = [arm.name for arm in arms(table.config, regime) if arm.name not in done and not arm.name.startswith(WITHOUT)]
    names = {arm.name for arm in arms(table.config, regime)}
    pairs["against direct"] = [(name, DIRECT) for name in (*others, HPM_KD) if DIRECT in names and name in names]
    pairs["against kd"] = [(name, KD) for name in others if KD in names]
    return {kind: contrasts(data, table, regime, each) for kind, each in pairs.items() if each}


def _training_times(table: JobTable) -> dict[str, TrainingTime]:
    """Of the first teacher, and of the first seed's student of every arm in the first regime."""
    jobs: dict[str, Job] = {}
    for level in table.graph.levels():
        for job in table.graph.jobs(level, table):
            if job.name == "teacher_1" or (job.stage == STUDENT and job.regime == table.config.regimes[0]):
                jobs.setdefault(job.arm.name, job)
    return {name: training_time(table, job) for name, job in jobs.items()}


def _costs_text(metrics: dict[str, float], data: Data, latencies: dict[str, list[Latency]]) -> str:
    rows = []
    for name, found in latencies.items():
        numbers = [f"{metrics[f'{name}/{key}']:,.0f}" for key in ("parameters", "bytes", "multiply_accumulates")]
        rows.append([name, *numbers, *(f"{each.median:.3g} / {each.high:.3g}" for each in found)])
    device = data.test["images"].device
    where = "GPU, CUDA events" if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    headers = [
        "network",
        "parameters",
        "bytes",
        "multiply-accumulates",
        *(f"ms per batch of {n}, p50 / p95" for n in BATCH_SIZES),
    ]
    ratio = metrics.get("student/compression")
    return f"NETWORKS, latency in ms ({where})\n{Table(headers, rows)}" + (f"\ncompression {ratio:.1f} times" if ratio else "")


def _regime_text(config: Config, table: JobTable, regime: str, scores: dict[str, Scores], times: dict[str, TrainingTime]) -> str:
    rows = []
    for arm in arms(config, regime):
        found = [scores[name] for name in table.graph.students(regime, arm.name)]
        mean, half = t_interval([100 * each.accuracy for each in found])
        rest = [[getattr(each, key) for each in found] for key in ("nll", "ece", "agreement", "divergence")]
        means = ["-" if None in values else f"{sum(values) / len(values):.4f}" for values in rest]
        kept = "-" if "teacher_1" not in scores else f"{mean / scores['teacher_1'].accuracy:.2f}"
        rows.append([arm.name, f"{mean:.2f}" + (f" ± {half:.2f}" if math.isfinite(half) else ""), kept, *means])
    if not rows:
        return ""
    headers = ["arm", "accuracy %, 95 % t interval", "retention %", "NLL", "ECE", "agreement", "KL to teacher"]
    seeds = f"{len(config.student_seeds)} seeds: {', '.join(map(str, config.student_seeds))}"
    teacher = f"; teacher {100 * scores['teacher_1'].accuracy:.2f} %" if "teacher_1" in scores else ""
    return f"REGIME {regime.replace('_', ' ')} ({seeds}{teacher})\n{Table(headers, rows)}"


def _contrasts_text(regime: str, families: dict[str, list[Contrast]]) -> str:
    headers = ["", "points (95 % interval)", "p", "p, Holm", "d_z", "McNemar p < 0.05", f"TOST {MARGIN}, p", "Wilcoxon p"]
    texts = []
    for kind, found in families.items():
        rows = [
            [
                f"{each.one} - {each.other}",
                f"{each.found.mean:+.2f} ({each.found.low:+.2f} to {each.found.high:+.2f})",
                *(_number(p) for p in (each.found.p, each.adjusted_p, each.found.effect)),
                f"{sum(p < SIGNIFICANCE for p in each.mcnemar)} of {len(each.mcnemar)} seeds",
                _number(each.equivalent_p),
                _number(each.found.wilcoxon_p),
            ]
            for each in found
        ]
        lines = [sentence(each.one, each.other, each.found, each.adjusted_p) + "." for each in found]
        texts.append(f"CONTRASTS, {regime.replace('_', ' ')}, {kind}\n{Table(headers, rows)}\n" + "\n".join(lines))
    return "\n\n".join(texts)


def _number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.2g}"


def _times_text(table: JobTable, times: dict[str, TrainingTime]) -> str:
    rows = [[name, f"{found.step_milliseconds:.3g}", str(found.steps), f"{found.seconds:.3g}"] for name, found in times.items()]
    text = f"TRAINING TIME, steps timed at the end, one at a time\n{Table(['arm', 'ms per step', 'steps', 'seconds'], rows)}"
    if "teacher_1" in table.networks:
        text += (
            f"\nkeeping the first teacher's answers takes {cache_seconds(table, 'teacher_1'):.2f} s once for all arms and seeds"
        )
    if table.store is not None:
        counters = table.store.counters
        hit_rate = 1 - counters.misses / max(1, table.asked)
        text += (
            f"\nkept logits in this session: asked for {table.asked} times, hit rate {hit_rate:.1%}; "
            f"found on disk {counters.hits} times, computed {counters.misses} times in {counters.seconds_computing:.2f} s; "
            f"{counters.seconds_saved:.2f} s saved by the disk"
        )
    on = f"up to {table.jobs_at_once} networks at once" if table.jobs_at_once > 1 else "one network at a time"
    return f"{text}\nthis run trained {on}; that changes its time, not its results"


def _decisions_text(table: JobTable) -> str:
    lines = [table.facts["gate"]["why"]] if "gate" in table.facts else []
    for regime in table.graph.hpm_regimes:
        name = regime.replace("_", " ")
        if table.graph.widths:
            kept = table.assistants(regime, len(table.graph.widths))
            widths = ", ".join(str(table.graph.widths[index]) for index in kept)
            lines.append(
                f"{name}: " + (f"the chain keeps assistants of width {widths}" if kept else "the chain keeps no assistant")
            )
        if (picked := table.selection(regime)) is not None:
            settings = ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else value for key, value in picked.arm.items())
            lines.append(f"{name}: the search picks {settings}; {picked.why}")
            again = "/".join(f"{value:.4g}" if isinstance(value, float) else value for value in picked.arm.values())
            lines += [] if picked.is_default else [f"{name}: to try it in another run: --known-settings {again}"]
    return "DECISIONS on valid\n" + "\n".join(lines) if lines else ""


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _predictions(data: Data, table: JobTable) -> str:
    """A line per network with the class it chooses for every test image; the first line has the labels."""
    found = {"labels": data.test["labels"].cpu()} | {name: each.argmax(1) for name, each in test_logits(data, table).items()}
    return "".join(f"{name},{' '.join(map(str, classes.tolist()))}\n" for name, classes in found.items())


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: None stands for both."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
