"""Tables that read well in a terminal, in a notebook and in a report."""

from dataclasses import dataclass

from tabulate import tabulate

MAX_COLUMN_CHARACTERS = 60


@dataclass(frozen=True)
class Table:
    """Rows under headers; prints as text and shows as HTML in a notebook."""

    headers: list[str]
    rows: list[list[str]]

    def __repr__(self) -> str:
        return tabulate(self.rows, self.headers, tablefmt="simple", disable_numparse=True, maxcolwidths=MAX_COLUMN_CHARACTERS)

    def _repr_html_(self) -> str:
        return tabulate(self.rows, self.headers, tablefmt="html", disable_numparse=True)
