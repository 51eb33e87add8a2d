"""The page one sends to a colleague: report.html, self-contained, made from the run folder alone. Needs no torch."""

import base64
import importlib.resources

import jinja2

from trainbook.catalog import load
from trainbook.comparison import ABOVE, STANDARD_ERROR, baseline_table
from trainbook.files import read_json, write_atomic
from trainbook.records import RunFolder
from trainbook.tables import Table

SERIES = "@"  # in the name of a metric: before the place in a series, such as a timestep


def metrics_table(metrics: dict[str, float]) -> Table:
    """Metrics named "<who>/<metric>" with one row per metric and one column per who; others in the first column.

    A standard error stands behind its metric; what `baseline_table` and `series_table` show is left out.
    """
    shown = {key: value for key, value in metrics.items() if ABOVE not in key and SERIES not in key}
    errors = {key for key in shown if key.endswith(STANDARD_ERROR) and key.removesuffix(STANDARD_ERROR) in shown}
    keys = [key.rpartition("/")[::2] for key in shown if key not in errors]
    columns = list(dict.fromkeys(who for who, _ in keys))
    names = list(dict.fromkeys(metric for _, metric in keys))

    def cell(who: str, name: str) -> str:
        key = f"{who}/{name}" if who else name
        error = shown.get(key + STANDARD_ERROR)
        return format_number(shown.get(key)) + ("" if error is None else f" ± {error:.2g}")

    rows = [[name, *(cell(who, name) for who in columns)] for name in names]
    return Table(["held-out metric", *(who.replace("_", " ") or "run" for who in columns)], rows)


def series_table(metrics: dict[str, float]) -> Table | None:
    """Metrics named "<who>/<metric>@<place>" with one row per place and one column each; None when there are none."""
    found = {tuple(key.split(SERIES)): value for key, value in metrics.items() if SERIES in key}
    if not found:
        return None
    columns, places = (list(dict.fromkeys(parts)) for parts in zip(*found, strict=True))
    rows = [[place, *(format_number(found.get((column, place))) for column in columns)] for place in places]
    return Table(["", *(column.replace("_", " ").replace("/", ": ") for column in columns)], rows)


def verdict_table(verdicts: list[dict]) -> Table:
    """One row per target: metric, promise, measurement, verdict, who promised it."""
    rows = [[v["metric"], v["target"], format_number(v["measured"]), v["verdict"], v["source"]] for v in verdicts]
    return Table(["metric", "target", "measured", "verdict", "source"], rows)


def hints_table(history: list[dict]) -> Table:
    """Kinds of trouble that the records name, with the steps they came first and last at, and what to do about the last."""
    found: dict[str, tuple[int, int, str]] = {}
    for record in history:
        for kind, text in record.get("hints", {}).items():
            found[kind] = (found.get(kind, (record["step"],))[0], record["step"], text)
    return Table(["hint", "from step", "to step", "what to do"], [[k, str(a), str(b), text] for k, (a, b, text) in found.items()])


def format_number(value: float | None) -> str:
    """Four significant digits; a dash for nothing."""
    return "-" if value is None else f"{value:.4g}"


def write(folder: RunFolder, summary: dict | None = None) -> None:
    """Write report.html from what lies in the run folder; `summary` is what run.json is about to say.

    Raises:
        UserError: when it is not a run folder.
    """
    summary = summary or folder.summary()
    workflow = load(summary["workflow"])
    config = workflow.Config(**read_json(folder.config)["config"])
    figures = [
        (path.stem.replace("_", " "), base64.b64encode(path.read_bytes()).decode())
        for path in sorted(folder.figures.glob("*.png"))
    ]
    template = importlib.resources.files("trainbook").joinpath("report.html.jinja").read_text()
    page = (
        jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        .from_string(template)
        .render(
            title=workflow.title,
            summary=summary,
            metrics=metrics_table(summary["metrics"]) if "metrics" in summary else None,
            hints=hints_table(folder.history()),
            baselines=baseline_table(summary.get("metrics", {})),
            series=series_table(summary.get("metrics", {})),
            verdicts=verdict_table(summary["verdicts"]) if "verdicts" in summary else None,
            config=Table(["field", "value", f"{summary['preset']} has", "allowed", "meaning"], config.rows(summary["preset"])),
            figures=figures,
            texts=[(path.stem.replace("_", " "), path.read_text()) for path in sorted(folder.export.glob("*.txt"))],
        )
    )
    write_atomic(folder.report, page.encode())
