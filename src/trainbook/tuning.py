"""The tuner: searches for the best values of some fields of a workflow's config, or compares the values of one."""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trainbook import runtime, sweep
from trainbook.errors import UserError
from trainbook.spec import RunSpec

if TYPE_CHECKING:
    from trainbook.search import Tuned

NUM_TRIALS = 20


class ConfigurationTuner:
    """Finds values of a config's fields for a workflow.

    Args:
        workflow: a module of `trainbook.workflows`, or its name.
        preset, overrides, authentic: of every run, as `trainbook.start` takes them.
    """

    def __init__(
        self,
        workflow: ModuleType | str,
        preset: str = "laptop",
        overrides: dict[str, Any] | None = None,
        authentic: bool = False,
    ) -> None:
        name = workflow if isinstance(workflow, str) else workflow.__name__.rpartition(".")[2]
        self.spec = RunSpec(workflow=name, preset=preset, overrides=overrides or {}, authentic=authentic)

    def tune_parameter(self, name: str, values: Sequence[Any], seeds: str = "0,1,2", metrics: Sequence[str] = ()) -> int:
        """Train each value of one field with the same seeds, and show its metrics with intervals: a sweep.

        Args:
            name: of the field.
            values: as text or as the field's type.
            seeds: such as "0,1,2".
            metrics: to show beside those of the targets.

        Returns:
            0 when all runs are complete, 1 when one failed, 3 when it was stopped.
        """
        spec = self.spec
        planned = sweep.plan(spec.workflow, spec.preset, spec.overrides, {name: list(values)}, seeds, spec.authentic)
        return sweep.run(planned, metrics)

    def tune(
        self,
        fields: dict[str, Sequence[Any] | str],
        num_trials: int | None = None,
        budget: str = "",
        metric: str = "",
        best: str = "",
        study_id: str = "",
    ) -> "Tuned":
        """Train trial after trial, each with values drawn where earlier ones were good, and write the best as run.toml.

        The same call goes on with the same study, also in several processes at once. One process alone ends with the same
        best trial however often it was killed. A trial that fails is recorded; one that is worse than three quarters of the
        others a sixteenth or a quarter of the way through is ended there.

        Args:
            fields: name to a range such as "1e-4..1e-2", or to values.
            num_trials: of the study altogether, failed ones too; None: 20, or without end where there is a budget.
            budget: stop and save after this long, such as "20m"; "" takes the runtime's.
            metric: to look for, see `objective.choose`.
            best: highest or lowest, or "" where it is known.
            study_id: begins the names of the folders; "": the same for the same search.

        Raises:
            UserError: for a mistake in these, before anything is trained.
        """
        from trainbook.search import OUT_OF_TIME, Search

        if runtime.group_size() > 1:
            raise UserError("a tuner starts its runs itself", "start it without torchrun; --processes says how many train each")
        if not fields:
            raise UserError("nothing to tune", "name a field, such as --field learning_rate=1e-4..1e-2")
        if num_trials is not None and num_trials < 1:
            raise UserError(f"{num_trials} trials are too few", "give at least 1")
        runtime.export(time_budget=budget)
        deadline = runtime.detect().deadline
        num_trials = num_trials or (math.inf if budget else NUM_TRIALS)
        search = Search.open(self.spec, fields, metric, best, study_id)
        print(f"{search.name}: {search.objective}, {len(search.study.trials)} trials so far", flush=True)
        stopped = search.run(num_trials, deadline)
        tuned = search.show(stopped if stopped != OUT_OF_TIME or math.isfinite(num_trials) else "")
        print(f"stopped: {stopped}; the same command goes on" if stopped else "done")
        return tuned
