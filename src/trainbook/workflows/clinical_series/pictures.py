"""The pictures of a run: the series, the forecast's fan, errors by horizon, ROC and precision, calibration, risk hour by hour."""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from trainbook.attention import attention_weights
from trainbook.comparison import HIGH, LOW
from trainbook.data import Data
from trainbook.plots import baseline_bars, draw_attention, new_figure
from trainbook.state import TrainState
from trainbook.workflows.clinical_series.config import Config
from trainbook.workflows.clinical_series.evaluation import Judged, auroc, judge, reliability
from trainbook.workflows.clinical_series.training import INPUTS, MODEL

COLOURS = {"model": "#2b7bba", "oracle": "black", "ridge": "tab:orange", "logistic": "tab:orange"}
COLOURS |= {"persistence": "0.55", "day_mean": "tab:green"}
NUM_PATIENTS, MAX_VARIABLES = 3, 4  # columns and rows of the pictures of series


def draw_data(config: Config, data: Data) -> dict[str, Figure]:
    """Some training windows: what is read, with its gaps, and the patch means to forecast."""
    shown = config.variables[:MAX_VARIABLES]
    figure, axes = new_figure(NUM_PATIENTS, len(shown), width=3.6, height=1.8)
    for column in range(NUM_PATIENTS):
        for row, variable in enumerate(shown):
            _draw_read(config, axes[row, column], data.train, column, row)
            seen, means = (data.train[name][column, :, row].cpu().numpy() for name in ("patch_observed", "patch_means"))
            ahead = np.flatnonzero(seen[config.num_tokens :]) + config.num_tokens
            axes[row, column].plot(_hours(config, ahead), means[ahead], "o", color="black", markersize=3)
            axes[row, column].set_ylabel(f"{variable.name}, {variable.unit}" if column == 0 else "")
        died = {1.0: "died", 0.0: "survived"}.get(float(data.train["outcomes"][column]), "outcome unknown")
        axes[0, column].set_title(f"{_kind(data)} {column + 1}, {died}", fontsize=10)
        axes[-1, column].set_xlabel("hours")
    return {"data": figure}


def draw(config: Config, data: Data, state: TrainState, history: list[dict[str, Any]]) -> dict[str, Figure]:
    """Fans, error by horizon, everybody's metrics, attention; ROC, calibration and risk where outcomes are known."""
    found, metrics = judge(config, data, state), history[-1]
    figures = {
        "forecast": draw_fans(config, data, found),
        "error_by_horizon": draw_horizon(config, found),
        "comparison": baseline_bars(
            {name: value for name, value in metrics.items() if isinstance(value, float)},
            ["mae", *(["auroc", "brier"] if found.risks else [])],
        ),
    }
    if found.risks:
        figures |= {"roc": draw_roc(found, metrics), "calibration": draw_calibration(found)}
        figures["risk_by_hour"] = draw_risk(config, data, state)
    sample = [data.test[name][:1] for name in INPUTS]
    figures["attention"] = draw_attention(attention_weights(state.modules[MODEL], *sample))
    return figures


def draw_fans(config: Config, data: Data, found: Judged) -> Figure:
    """Forecasts of the first test windows: 50 and 90 % bands, what came, persistence, and the best possible forecast."""
    shown = config.variables[:MAX_VARIABLES]
    figure, axes = new_figure(NUM_PATIENTS, len(shown), width=3.9, height=2.2)
    ahead = np.arange(config.num_tokens, config.num_tokens + config.prediction_horizon)
    hours = _hours(config, ahead)
    for column in range(NUM_PATIENTS):
        for row, variable in enumerate(shown):
            panel = axes[row, column]
            _draw_read(config, panel, data.test, column, row)
            forecast = found.forecasts["model"][column, :, row]
            low, lower, upper, high = found.fan[..., row]
            panel.fill_between(hours, forecast + low, forecast + high, color=COLOURS["model"], alpha=0.2, label="90 %", lw=0)
            panel.fill_between(hours, forecast + lower, forecast + upper, color=COLOURS["model"], alpha=0.35, label="50 %", lw=0)
            for who in ("model", "persistence", "oracle"):
                if who in found.forecasts:
                    style = {"model": "-", "persistence": ":", "oracle": "--"}[who]
                    panel.plot(hours, found.forecasts[who][column, :, row], style, color=COLOURS[who], lw=1.4, label=who)
            there = found.is_there[column, :, row]
            panel.plot(hours[there], found.truth[column, there, row], "o", color="tab:red", ms=3, label="what came")
            panel.set_ylabel(f"{variable.name}, {variable.unit}" if column == 0 else "")
        axes[0, column].set_title(f"test {_kind(data)} {column + 1}", fontsize=10)
        axes[-1, column].set_xlabel("hours")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncol=7, fontsize=8)
    return figure


def draw_horizon(config: Config, found: Judged) -> Figure:
    """Mean absolute error of every forecast, hour by hour ahead, in each variable's unit."""
    shown = [index for index in range(len(config.variables)) if found.is_there[..., index].any()]
    figure, axes = new_figure(min(4, len(shown)), -(-len(shown) // 4), width=3.4, height=2.8)
    for panel, index in zip(axes.flat, shown, strict=False):
        variable, there = config.variables[index], found.is_there[..., index]
        hours = _hours(config, np.arange(config.prediction_horizon)) + config.patch_minutes / 120
        for who, forecast in found.forecasts.items():
            error = np.where(there, np.abs(forecast - found.truth)[..., index], 0).sum(0) / there.sum(0).clip(1)
            panel.plot(hours, error, "--" if who == "oracle" else ".-", color=COLOURS[who], label=who.replace("_", " "), lw=1.2)
        panel.set(title=variable.name, xlabel="hours ahead", ylabel=f"mean absolute error, {variable.unit}", ylim=(0, None))
        panel.grid(alpha=0.3)
    for panel in list(axes.flat)[len(shown) :]:
        panel.set_axis_off()
    axes[0, 0].legend(fontsize=8)
    return figure


def draw_roc(found: Judged, metrics: dict[str, Any]) -> Figure:
    """Receiver operating characteristic and precision over recall."""
    figure, axes = new_figure(2, width=4.4, height=4.0)
    known = found.outcomes >= 0
    outcomes = found.outcomes[known]
    for who, risk in found.risks.items():
        area = "{:.3f} ({:.3f} to {:.3f})".format(*(metrics[f"{who}/auroc{end}"] for end in ("", LOW, HIGH)))
        style = {"color": COLOURS[who], "linestyle": "--" if who == "oracle" else "-", "linewidth": 1.3}
        axes[0, 0].plot(*roc_curve(outcomes, risk[known])[:2], label=f"{who} {area}", **style)
        precision, recall, _ = precision_recall_curve(outcomes, risk[known])
        axes[0, 1].plot(recall, precision, label=who, **style)
    axes[0, 0].plot([0, 1], [0, 1], color="0.8", lw=1)
    axes[0, 1].axhline(outcomes.mean(), color="0.8", lw=1)
    axes[0, 0].set(title="ROC; area with 95 % interval", xlabel="share of false alarms", ylabel="share of cases found")
    axes[0, 1].set(title="precision and recall", xlabel="share of cases found", ylabel="share of right alarms", ylim=(0, 1))
    axes[0, 0].legend(fontsize=8, loc="lower right")
    return figure


def draw_calibration(found: Judged) -> Figure:
    """Share of cases over the risk that was stated, in tenths of the windows, with 95 % binomial intervals."""
    figure, axes = new_figure(len(found.risks), width=3.6, height=3.4)
    known = found.outcomes >= 0
    for panel, (who, risk) in zip(axes[0], found.risks.items(), strict=True):
        expected, happened, number = reliability(found.outcomes[known], risk[known])
        error = 1.96 * np.sqrt(happened * (1 - happened) / number)
        top = max(expected.max(), (happened + error).max()) * 1.05
        panel.plot([0, top], [0, top], color="0.8", lw=1)
        panel.errorbar(expected, happened, error, fmt="o", color=COLOURS[who], ms=4, capsize=2, lw=1)
        panel.set(title=who, xlabel="stated risk", ylabel="share of cases", xlim=(0, top), ylim=(0, top))
    return figure


@torch.no_grad()
def draw_risk(config: Config, data: Data, state: TrainState) -> Figure:
    """Risk as each hour ends, of those who died and those who did not, and the AUROC if one had to decide then."""
    model = state.modules[MODEL].eval()
    chunks = zip(*(data.test[name].split(512) for name in INPUTS), strict=True)
    risk = torch.cat([model(*chunk)[1] for chunk in chunks]).sigmoid().cpu().numpy()  # (N, T)
    outcomes = data.test["outcomes"].cpu().numpy()
    hours = _hours(config, np.arange(config.num_tokens)) + config.patch_minutes / 120
    figure, axes = new_figure(2, width=4.4, height=3.0)
    for label, name, colour in ((1, "died", "tab:red"), (0, "survived", COLOURS["model"])):
        low, middle, high = np.quantile(risk[outcomes == label], [0.25, 0.5, 0.75], axis=0)
        axes[0, 0].fill_between(hours, low, high, color=colour, alpha=0.2, lw=0)
        axes[0, 0].plot(hours, middle, color=colour, label=f"{name}: median and middle half")
    axes[0, 0].set(title="risk hour by hour", xlabel="hours read", ylabel="stated risk", ylim=(0, None))
    axes[0, 0].legend(fontsize=8)
    known = outcomes >= 0
    areas = [auroc(outcomes[known], column[known], np.ones((1, known.sum())))[0] for column in risk.T]
    axes[0, 1].plot(hours, areas, ".-", color=COLOURS["model"])
    axes[0, 1].set(title="AUROC hour by hour", xlabel="hours read", ylabel="AUROC")
    axes[0, 1].grid(alpha=0.3)
    return figure


def _draw_read(config: Config, panel: Any, split: dict[str, torch.Tensor], window: int, variable: int) -> None:
    """What was read of one variable: a line through its readings, broken at gaps, or dots where there are few."""
    seen = split["observed"][window, :, variable].cpu().numpy()
    values = np.where(seen, split["values"][window, :, variable].cpu().numpy(), np.nan)
    hours = np.arange(len(values)) * config.sample_minutes / 60
    panel.plot(hours, values, "-" if seen.mean() > 0.5 else ".", color="0.6", lw=0.6, ms=4)
    panel.axvline(config.sequence_length / 60, color="0.8", lw=1)


def _hours(config: Config, patches: np.ndarray) -> np.ndarray:
    """Middles of patches, in hours."""
    return (patches + 0.5) * config.patch_minutes / 60


def _kind(data: Data) -> str:
    return "synthetic patient" if data.synthetic else "patient"
