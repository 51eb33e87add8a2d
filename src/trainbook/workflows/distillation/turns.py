"""Takes the chunks of a level in their order, one after the other or several at once in processes of their own."""

from collections.abc import Iterator, Sequence
from typing import Any

from trainbook.data import Data
from trainbook.workflows.distillation.config import Config
from trainbook.workflows.distillation.job_table import JobTable
from trainbook.workflows.distillation.jobs import Job, advance


def in_turn(
    config: Config, data: Data, table: JobTable, order: Sequence[tuple[Job, int]]
) -> Iterator[tuple[Job, dict[str, Any], dict[str, Any]]]:
    """Each chunk's job, what it leaves, and its metrics; whoever takes them puts them into the table before the next."""
    for job, _ in order:
        yield job, *advance(config, data, job, table.teaching(job), table.saved(job))
