"""What a tuner searches, which values come next, and the journal that several processes share. The only user of Optuna.

Everything that is drawn or decided depends on what the journal holds and on the trial's number alone, never on when a process
was killed. Needs no torch.
"""

import fcntl
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from trainbook.config import BaseConfig
from trainbook.errors import UserError
from trainbook.trials import digest, text_of

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.pruners import SuccessiveHalvingPruner
    from optuna.samplers import BaseSampler, TPESampler
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, Trial, TrialState
except ModuleNotFoundError as error:
    raise UserError(f"the tuner needs Optuna: {error}", "pip install optuna") from None

NUM_RANDOM_TRIALS = 6  # before the sampler begins to look where earlier trials were good
LOGARITHMIC_SPAN = 10  # a positive range this wide is searched by ratio, not by difference
REDUCTION = 4  # at each rung one trial in so many goes on
RUNGS = (1, 4)  # at which a trial is judged, in sixteenths of its steps
WHOLE = REDUCTION ** len(RUNGS)

optuna.logging.set_verbosity(optuna.logging.ERROR)


def read_space(
    config_class: type[BaseConfig], preset: str, overrides: dict[str, Any], fields: dict[str, Sequence[Any]]
) -> dict[str, BaseDistribution]:
    """What each field is drawn from: a range written "1e-4..1e-2", or the values listed.

    A range is searched on a logarithmic scale where it is positive and its ends are a factor of 10 or more apart.

    Args:
        config_class, preset, overrides: what the rest of the config is.
        fields: name to one range, or to values as text or as the field's type.

    Raises:
        UserError: naming every value that the config refuses, or a range of a field that is not a number.
    """
    space, mistakes = {}, []
    for name, values in fields.items():
        ends = re.fullmatch(r"(.+?)\.\.(.+)", str(values[0])) if len(values) == 1 else None
        try:
            tried = [config_class.from_preset(preset, overrides | {name: value}) for value in (ends.groups() if ends else values)]
        except UserError as error:
            mistakes += [line for line in str(error).splitlines() if not line.startswith("  ->")]
            continue
        read = [config.model_dump(mode="json")[name] for config in tried]
        space[name] = _range(config_class, name, *read) if ends else _choices(name, read)
    if mistakes:
        raise UserError("\n".join(dict.fromkeys(mistakes)), "nothing was trained; edit the values")
    return space


def _range(config_class: type[BaseConfig], name: str, low: Any, high: Any) -> BaseDistribution:
    field = config_class.model_fields[name]
    if field.annotation not in (int, float):
        raise UserError(f"{name} is no number and has no range", f"list its values: --field {name}=...,...")
    if not low < high:
        raise UserError(f"--field {name}={low}..{high} is empty", "write the lower end first")
    logarithmic = low > 0 and high / low >= LOGARITHMIC_SPAN
    if field.annotation is float:
        return FloatDistribution(low, high, log=logarithmic)
    step = next((part.multiple_of for part in field.metadata if hasattr(part, "multiple_of")), 1)
    return IntDistribution(low, high, log=logarithmic and step == 1, step=step)


def _choices(name: str, values: list[Any]) -> CategoricalDistribution:
    choices = [value if isinstance(value, bool | int | float | str) else text_of(value) for value in values]
    if twice := next((choice for choice in choices if choices.count(choice) > 1), None):
        raise UserError(f"{name} = {twice} comes twice", "give each value once")
    return CategoricalDistribution(choices)


def num_combinations(space: dict[str, BaseDistribution]) -> float:
    """How many different trials there can be; infinite with a range of real numbers."""
    counts = []
    for one in space.values():
        whole = (one.high - one.low) // one.step + 1 if isinstance(one, IntDistribution) else math.inf
        counts.append(len(one.choices) if isinstance(one, CategoricalDistribution) else whole)
    return math.prod(counts)


@dataclass(frozen=True)
class Halving:
    """Successive halving: of the trials that reached a rung one in four goes on, as far as one could tell then.

    Source: Li et al. (2020), A System for Massively Parallel Hyperparameter Tuning; the rule is Optuna's.
    """

    highest: bool

    def ends_at(self, others: Sequence[FrozenTrial], values: dict[int, float]) -> int | None:
        """The rung at which a trial with these values is ended, or None.

        Optuna's rule looks at the order in which trials were judged; here they are judged anew, in the order of their
        numbers, so that a process that was killed between two of its entries in the journal decides what it had decided.

        Args:
            others: that reached a rung.
            values: rung to value.
        """
        pruner = SuccessiveHalvingPruner(min_resource=RUNGS[0], reduction_factor=REDUCTION)
        replay = optuna.create_study(direction=direction(self.highest), pruner=pruner)
        for earlier in (*(trial.intermediate_values for trial in sorted(others, key=lambda t: t.number)), values):
            trial = replay.ask()
            ended = None
            for rung, value in sorted(earlier.items()):
                trial.report(value, rung)
                if trial.should_prune():
                    ended = rung
                    break
        return ended


def direction(highest: bool) -> str:
    """Optuna's word for it."""
    return "maximize" if highest else "minimize"


class RepeatableSampler(BaseSampler):
    """Tree-structured Parzen estimator whose draw depends on the seed, the trial's number and the finished trials only.

    Source: Bergstra et al. (2011), Algorithms for Hyper-Parameter Optimization; carried out by Optuna.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _estimator(self, trial: FrozenTrial, part: str) -> TPESampler:
        return TPESampler(seed=int(digest([self.seed, trial.number, part]), 16), n_startup_trials=NUM_RANDOM_TRIALS)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The fields that are drawn together."""
        return self._estimator(trial, "").infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict:
        """Values of these."""
        return self._estimator(trial, "").sample_relative(study, trial, search_space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        """The value of one of the others."""
        return self._estimator(trial, param_name).sample_independent(study, trial, param_name, param_distribution)


class SharedStudy:
    """A study in a folder: its journal, and who works on which trial. A process that dies gives its trial back.

    Args:
        folder: exists, and is this study's alone.
        space: what the fields are drawn from.
        seed: of what is drawn.
        highest: whether high values are good.
    """

    def __init__(self, folder: Path, space: dict[str, BaseDistribution], seed: int, highest: bool) -> None:
        self.space, self.halving, self._locks = space, Halving(highest), folder / "locks"
        self._locks.mkdir(exist_ok=True)
        journal = folder / "journal.log"
        storage = JournalStorage(JournalFileBackend(str(journal), lock_obj=_JournalLock(journal, self._locks / "journal")))
        with self._deciding():
            self.study = optuna.create_study(
                storage=storage,
                study_name="study",
                sampler=RepeatableSampler(seed),
                direction=direction(highest),
                load_if_exists=True,
            )

    @property
    def trials(self) -> list[FrozenTrial]:
        """All of them, by number."""
        return self.study.get_trials(deepcopy=False)

    @property
    def best(self) -> FrozenTrial | None:
        """The complete trial with the best value; of equals the first."""
        return self.study.best_trial if self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]) else None

    @contextmanager
    def next_trial(self, num_trials: float) -> Iterator[Trial | None]:
        """The first trial that a dead process left, else a new one, kept from other processes for the block.

        None when there are `num_trials`, or every combination has been tried.
        """
        with self._deciding():
            trial, lock = self._abandoned()
            num_distinct = len({str(sorted(t.params.items())) for t in self.trials})
            if trial is None and len(self.trials) < num_trials and num_distinct < num_combinations(self.space):
                trial = self.study.ask()
                lock = self._lock(trial.number)
            if trial is not None:
                for name, distribution in self.space.items():  # what it has already stays as it is
                    _draw(trial, name, distribution)
        try:
            yield trial
        finally:
            if lock is not None:
                lock.close()

    def _abandoned(self) -> tuple[Trial, TextIO] | tuple[None, None]:
        for found in self.trials:
            if found.state == TrialState.RUNNING and (lock := self._lock(found.number)) is not None:
                return Trial(self.study, found._trial_id), lock
        return None, None

    def _lock(self, number: int) -> TextIO | None:
        file = (self._locks / f"trial_{number:03d}").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
        return file

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        """One process at a time."""
        with (self._locks / "deciding").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def report(self, trial: Trial, values: dict[int, float]) -> int | None:
        """Enter what a trial reached at the rungs, and say at which it is ended, if at one."""
        entered = self.trials[trial.number].intermediate_values
        for rung, value in values.items():
            if rung not in entered:
                trial.report(value, rung)
        others = [other for other in self.trials if other.number != trial.number and other.intermediate_values]
        return self.halving.ends_at(others, values)

    def twin(self, trial: Trial) -> FrozenTrial | None:
        """An earlier trial with the same values that came to an end."""
        ends = (TrialState.COMPLETE, TrialState.PRUNED)
        found = (t for t in self.trials if t.number < trial.number and t.state in ends and t.params == trial.params)
        return next(found, None)

    def importance(self) -> dict[str, float]:
        """How much of the differences between complete trials each field explains, adding up to 1; {} from fewer than 4."""
        complete = self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        if len(complete) < 4 or len({trial.value for trial in complete}) < 2:
            return {}
        return optuna.importance.get_param_importances(self.study)


def _draw(trial: Trial, name: str, distribution: BaseDistribution) -> None:
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(name, distribution.choices)
    else:
        suggest = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
        suggest(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


class _JournalLock:
    """Held by the system for a living process only; whoever takes it cuts off a line that a dead one left half written."""

    def __init__(self, journal: Path, lock: Path) -> None:
        self._journal, self._lock, self._file = journal, lock, None

    def acquire(self) -> bool:
        self._file = self._lock.open("a")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        with self._journal.open("rb+") as journal:
            end = journal.seek(0, os.SEEK_END)
            journal.seek(max(0, end - (1 << 20)))
            tail = journal.read()
            if tail and not tail.endswith(b"\n"):
                journal.truncate(end - len(tail) + tail.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self._file.close()
