"""Tables that read well in a terminal, in a notebook and in a report."""

import textwrap
from dataclasses import dataclass

from tabulate import tabulate

MAX_COLUMN_CHARACTERS = 60


@dataclass(frozen=True)
class Table:
    """Rows under headers; prints as text and shows as HTML in a notebook."""

    headers: list[str]
    rows: list[list[str]]

    def __repr__(self) -> str:
        rows = [[textwrap.fill(cell, MAX_COLUMN_CHARACTERS) for cell in row] for row in self.rows]
        return tabulate(rows, self.headers, tablefmt="simple", disable_numparse=True)

    def _repr_html_(self) -> str:
        return tabulate(self.rows, self.headers, tablefmt="html", disable_numparse=True)
