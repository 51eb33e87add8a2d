"""Builds the table of jobs and trains it: teachers, search, trial of the chain, assistants, students."""

from collections.abc import Iterator

from torch import nn

from trainbook.data import Data
from trainbook.errors import UserError
from trainbook.records import Record
from trainbook.runtime import Runtime
from trainbook.state import TrainState
from trainbook.workflows.distillation.arms import DIRECT, HPM_KD, KD, WITHOUT, arms
from trainbook.workflows.distillation.config import Config
from trainbook.workflows.distillation.graph import STUDENT, TEACHER, in_turn
from trainbook.workflows.distillation.images import num_classes
from trainbook.workflows.distillation.job_table import JOBS, JobTable
from trainbook.workflows.distillation.jobs import Job, new_network
from trainbook.workflows.distillation.turns import taking_turns

EXPORTED = (DIRECT, KD, HPM_KD)  # arms whose best student on valid becomes a module, and so goes into the export
ABLATION, OTHERS = "hpm_kd_without", "other_arms"  # stages of the students of all other arms
CHANCE = 2.0  # a teacher must be right so many times as often as chance


def build(config: Config, data: Data, runtime: Runtime) -> TrainState:
    """The first teacher and one student of each main arm as modules, and the table of jobs."""
    modules: dict[str, nn.Module] = {}
    if config.stage != "direct":
        modules[TEACHER] = new_network(config, data, config.teacher_network, config.teacher_width, config.seed)
    for arm in arms(config, config.regimes[0]):
        if arm.name in EXPORTED:
            modules[arm.name] = new_network(config, data, config.student_network, config.student_width, config.seed)
    table = JobTable(config, data, runtime)
    return TrainState(modules, stateful={JOBS: table}, total_steps=sum(table.chunks()), stage=table.graph.levels()[0].stage)


def train(config: Config, data: Data, state: TrainState) -> Iterator[Record]:
    """Train level after level from `state.step` on; a step is a chunk of one job, and yields its metrics on valid.

    Raises:
        UserError: before the first step, when a trained teacher does not know these images.
    """
    table: JobTable = state.stateful[JOBS]
    if config.teacher:
        table.adopt("teacher_1", state.modules[TEACHER])
        check_teacher(table.results["teacher_1"]["valid_accuracy"], num_classes(data), config.teacher)
    begun = 0
    with taking_turns(config, data, table) as turns:
        for level in table.graph.levels():
            order = in_turn(table.graph.jobs(level, table), config.chunk_steps)
            state.total_steps = sum(table.chunks())  # what earlier levels decided may have left jobs out
            for job, saved, metrics in turns.take(order[max(0, state.step - begun) :]):
                table.take(job, saved)
                is_finished = "network" in saved
                if is_finished:
                    _keep_module(config, state, table, job)
                state.step += 1
                state.stage = stage_of(job)
                yield Record({"job": job.name, **metrics}, milestone=state.step == begun + len(order))
            begun += len(order)


def stage_of(job: Job) -> str:
    """What the records call a job's stage: of students their arm, or what kind of arm it is."""
    if job.stage != STUDENT or job.arm.name in EXPORTED:
        return job.stage if job.stage != STUDENT else job.arm.name
    return ABLATION if job.arm.name.startswith(WITHOUT) else OTHERS


def check_teacher(accuracy: float, classes: int, source: str) -> None:
    """Refuse a trained teacher that knows hardly more than chance.

    Raises:
        UserError: saying so.
    """
    if accuracy < CHANCE / classes:
        raise UserError(
            f"the teacher of {source} is right on {accuracy:.1%} of these validation images",
            "choose the data set that it was trained on, or train one with: trainbook run distillation --stage teacher",
        )


def _keep_module(config: Config, state: TrainState, table: JobTable, job: Job) -> None:
    """Let a finished job's network be the module of its arm, where none before it was better on valid."""
    name = TEACHER if job.name == "teacher_1" else job.arm.name if job.stage == STUDENT else ""
    if name not in state.modules or (job.stage == STUDENT and job.regime != config.regimes[0]):
        return
    rivals = [other for other in table.graph.students(config.regimes[0], job.arm.name) if other in table.results]
    best = max((table.results[other]["valid_accuracy"] for other in rivals), default=0.0)
    if job.stage == TEACHER or table.results[job.name]["valid_accuracy"] >= best:
        state.modules[name].load_state_dict(table.networks[job.name])
