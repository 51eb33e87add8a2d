"""The graph of jobs: which networks a run trains, level by level; a level needs nothing but the levels before it."""

# L assistants of a chain

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from trainbook.workflows.distillation.arms import HPM_KD, Arm, Settings, arms, default_settings, hpm_kd
from trainbook.workflows.distillation.config import Config
from trainbook.workflows.distillation.jobs import Job
from trainbook.workflows.distillation.ladder import teachers_of
from trainbook.workflows.distillation.search import Rung

TEACHER, SEARCH, TRIAL, ASSISTANT, STUDENT = "teacher", "search", "trial", "assistant", "student"
ALL = "all_labels"
TRIAL_SHARE = 0.25  # of a student's steps that a trial of the chain takes
TEACHER_SEEDS = 10_000  # apart from those of students
SEED_STRIDE = 1_000_003  # prime: neighbouring seeds of runs do not share a student's seed


class Choices(Protocol):
    """What earlier levels have decided; before they are trained, what is planned for."""

    def rung(self, regime: str, number: int) -> list[Settings]:
        """The settings that a rung of the search trains."""

    def settings(self, regime: str) -> Settings:
        """What the search chose."""

    def assistants(self, regime: str, before: int) -> list[int]:
        """Which of the first `before` assistants the chain keeps."""


@dataclass(frozen=True)
class Level:
    """Jobs that can be trained at the same time: the stage, and which rung, trial, assistant or regime."""

    stage: str
    number: int = 0


class Graph:
    """Levels and their jobs.

    Args:
        config: of the run.
        steps_per_epoch: of all training images.
        widths: of the assistants, from the teacher's side.
        rungs: of the search.
    """

    def __init__(self, config: Config, steps_per_epoch: int, widths: Sequence[int], rungs: Sequence[Rung]) -> None:
        self.config, self.steps_per_epoch, self.widths, self.rungs = config, steps_per_epoch, widths, rungs
        self.student_steps = config.student_epochs * steps_per_epoch

    @property
    def hpm_regimes(self) -> list[str]:
        """Regimes with an arm that has the components."""
        return [regime for regime in self.config.regimes if any(arm.name == HPM_KD for arm in arms(self.config, regime))]

    def levels(self) -> list[Level]:
        """In the order of training; some may turn out to have no job."""
        config, levels = self.config, []
        if config.stage != "direct":
            levels.append(Level(TEACHER))
        if self.hpm_regimes:
            levels += [Level(SEARCH, rung) for rung in range(len(self.rungs))] if config.adaptive else []
            # A trial of one assistant is two levels: itself, and a student that learns from it.
            levels += [Level(TRIAL, number) for number in range(2 * len(self.widths))]
            levels += [Level(ASSISTANT, number) for number in range(len(self.widths))]
        students = [Level(STUDENT, number) for number in range(len(config.regimes))]
        return levels if config.stage == TEACHER else [*levels, *students]

    def jobs(self, level: Level, choices: Choices) -> list[Job]:
        """Of a level, given what was decided before."""
        by_stage: dict[str, Callable[[int, Choices], list[Job]]] = {
            TEACHER: self._teachers,
            SEARCH: self._search,
            TRIAL: self._trial,
            ASSISTANT: self._assistants,
            STUDENT: self._students,
        }
        return by_stage[level.stage](level.number, choices)

    def teachers(self, arm: Arm | None = None) -> tuple[str, ...]:
        """Names of the teachers that an arm learns from; of all, without one."""
        several = self.config.stage != "kd" if arm is None else bool(arm.gate)
        return tuple(f"teacher_{number}" for number in range(1, 1 + (self.config.num_teachers if several else 1)))

    def students(self, regime: str, arm: str) -> list[str]:
        """Names of an arm's students, one per seed."""
        return [student_name(regime, arm, seed) for seed in self.config.student_seeds]

    def student_seeds(self) -> list[int]:
        """Seeds of the students as they are trained: the run's seed sets them apart from another run's."""
        return [self.config.seed * SEED_STRIDE + seed for seed in self.config.student_seeds]

    def _teachers(self, number: int, choices: Choices) -> list[Job]:
        config, arm = self.config, Arm(TEACHER, method="")
        return [
            Job(
                name,
                TEACHER,
                ALL,
                arm,
                default_settings(config, arm),
                config.seed * SEED_STRIDE + TEACHER_SEEDS + index,
                config.teacher_network,
                config.teacher_width,
                config.teacher_epochs * self.steps_per_epoch,
            )
            for index, name in enumerate(self.teachers())
            if not (config.teacher and index == 0)
        ]

    def _learner(
        self, name: str, stage: str, regime: str, arm: Arm, seed: int, settings: Settings, ancestors: Sequence[str] = (), **other
    ) -> Job:
        """A job that learns from teachers and the assistants before it; a student's, unless said otherwise."""
        first = (self.teachers(arm),) if arm.method else ()
        sources = (*first, *((name,) for name in ancestors))
        if ancestors:
            sources = tuple(sources[index] for index in teachers_of(len(sources), self.config.chain_mode))
        shape = {"network": self.config.student_network, "width": self.config.student_width, "steps": self.student_steps}
        return Job(name, stage, regime, arm, settings, seed, sources=sources, **{**shape, **other})

    def _search(self, number: int, choices: Choices) -> list[Job]:
        seed, arm = self.student_seeds()[0], hpm_kd(self.config)
        steps = self.rungs[number].epochs * self.steps_per_epoch
        return [
            self._learner(search_name(regime, number, settings), SEARCH, regime, arm, seed, settings, steps=steps)
            for regime in self.hpm_regimes
            for settings in choices.rung(regime, number)
        ]

    def _trial(self, number: int, choices: Choices) -> list[Job]:
        """Of assistant i = number // 2: first itself (and once a student without any), then a student that has it too."""
        index, is_student = divmod(number, 2)
        seed, arm, steps = self.student_seeds()[0], hpm_kd(self.config), max(1, round(TRIAL_SHARE * self.student_steps))
        jobs = []
        for regime in self.hpm_regimes:
            settings = choices.settings(regime)
            ancestors = [trial_name(regime, i) for i in choices.assistants(regime, index)]
            if is_student or index == 0:
                own = [*ancestors, trial_name(regime, index)] if is_student else []
                name = trial_student_name(regime, index) if is_student else trial_student_name(regime, None)
                jobs.append(self._learner(name, TRIAL, regime, arm, seed, settings, own, steps=steps))
            if not is_student:
                name = trial_name(regime, index)
                jobs.append(
                    self._learner(name, TRIAL, regime, arm, seed, settings, ancestors, steps=steps, width=self.widths[index])
                )
        return jobs

    def _assistants(self, number: int, choices: Choices) -> list[Job]:
        jobs = []
        for regime in self.hpm_regimes:
            kept = choices.assistants(regime, len(self.widths))
            if number not in kept:
                continue
            for arm in (arm for arm in arms(self.config, regime) if arm.chain):
                for seed, label in zip(self.student_seeds(), self.config.student_seeds, strict=True):
                    ancestors = [assistant_name(regime, arm.name, label, i) for i in kept if i < number]
                    name, settings = assistant_name(regime, arm.name, label, number), self._settings(arm, regime, choices)
                    width = self.widths[number]
                    jobs.append(self._learner(name, ASSISTANT, regime, arm, seed, settings, ancestors, width=width))
        return jobs

    def _settings(self, arm: Arm, regime: str, choices: Choices) -> Settings:
        return choices.settings(regime) if arm.adaptive else default_settings(self.config, arm)

    def _students(self, number: int, choices: Choices) -> list[Job]:
        jobs, regime = [], self.config.regimes[number]
        for arm in arms(self.config, regime):
            kept = choices.assistants(regime, len(self.widths)) if arm.chain else []
            steps = self.student_steps * (1 + len(self.widths) if arm.long else 1)
            for seed, label in zip(self.student_seeds(), self.config.student_seeds, strict=True):
                ancestors = [assistant_name(regime, arm.name, label, i) for i in kept]
                name, settings = student_name(regime, arm.name, label), self._settings(arm, regime, choices)
                jobs.append(self._learner(name, STUDENT, regime, arm, seed, settings, ancestors, steps=steps))
        return jobs


def in_turn(jobs: Sequence[Job], chunk_steps: int) -> list[tuple[Job, int]]:
    """The order in which the chunks of a level are taken: one of each job, then the next of each."""
    chunks = [job.num_chunks(chunk_steps) for job in jobs]
    return [(job, turn) for turn in range(max(chunks, default=0)) for job, n in zip(jobs, chunks, strict=True) if turn < n]


def student_name(regime: str, arm: str, seed: int) -> str:
    """Of a job."""
    return f"{regime}/{arm}/{seed}"


def assistant_name(regime: str, arm: str, seed: int, number: int) -> str:
    """Of a job."""
    return f"{regime}/{arm}/{seed}/assistant_{number + 1}"


def search_name(regime: str, rung: int, settings: Settings) -> str:
    """Of a job."""
    values = (settings.method, *(f"{v:.4g}" for v in (settings.temperature, settings.weight, settings.learning_rate)))
    return f"{regime}/search/rung_{rung + 1}/{'/'.join(values)}/{settings.weight_decay:.4g}"


def trial_name(regime: str, number: int) -> str:
    """Of a job: an assistant on trial."""
    return f"{regime}/trial/assistant_{number + 1}"


def trial_student_name(regime: str, number: int | None) -> str:
    """Of a job: a student of the trial, with one more assistant than before, or without any."""
    return f"{regime}/trial/student" + ("" if number is None else f"_of_assistant_{number + 1}")
