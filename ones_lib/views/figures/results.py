"""TODO."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.utils.data import DataLoader

from ones_lib.data import ImageData
from ones_lib.metrics import LOWER_IS_BETTER
from ones_lib.views.figures.style import (
    _COLOURS,
    CONTROLS,
    DASHES,
    MARKERS,
    METRICS,
    NAMES,
    ONE_COLUMN,
    PALETTE,
    TASK_NAMES,
    TWO_COLUMNS,
    _mean_and_range,
    _method_style,
)


def sample_images(data: ImageData, classes: int = 8, each: int = 6, seed: int = 0) -> Figure:
    """A few augmented training images of the first classes, one column a class."""
    labels = data.train.labels
    shown = [torch.nonzero(labels == c)[:each, 0] for c in range(min(classes, data.num_classes))]
    rows = max(len(s) for s in shown)
    fig, axes = plt.subplots(rows, len(shown), figsize=(ONE_COLUMN, ONE_COLUMN * rows / len(shown)), squeeze=False)
    for column, indices in enumerate(shown):
        keys = torch.stack([indices, torch.arange(len(indices)) + seed], dim=1)
        images, _ = next(iter(DataLoader(data.train, batch_sampler=[keys], collate_fn=data.train.collate)))
        for row, ax in enumerate(axes[:, column]):
            ax.set_axis_off()
            if row < len(images):
                picture = images[row].permute(1, 2, 0)
                picture = (picture - images.min()) / (images.max() - images.min())
                ax.imshow(picture.expand(-1, -1, 3), interpolation="nearest")
    return fig


def learning_curves(history: pd.DataFrame, metric: str = "accuracy") -> Figure:
    """A validation metric against steps, one line a model, band: lowest to highest seed.

    ``history`` is a table of :meth:`ones_lib.study.study.Study.histories`.
    """
    fig, ax = plt.subplots(figsize=(ONE_COLUMN, 2.4))
    for model, group in history.groupby("model", sort=False):
        style = {"color": PALETTE[model], "linestyle": DASHES.get(model, "-")}
        _mean_and_range(ax, group, "step", "value", label=NAMES[model].replace("\n", " "), **style)
    seeds = history["seed"].nunique()
    ax.set(
        xlabel="training step",
        ylabel=f"validation {METRICS[metric]}",
        title=f"mean of {seeds} seed(s); band: lowest to highest",
    )
    if metric not in LOWER_IS_BETTER:
        ax.set_ylim(bottom=0)
    ax.legend(loc="upper right" if metric in LOWER_IS_BETTER else "lower right")
    return fig


def scores_by_model(results: pd.DataFrame) -> Figure:
    """Score of every model: small marks are seeds, large ones their mean; students before and after KD. What is far from the
    others before KD is a number at the panel's edge.

    ``results`` is a table of :func:`ones_lib.study.tables.results_table` with one metric, or with one a task: a panel each.
    """
    tasks = list(dict.fromkeys(results["task"])) if "task" in results else [None]
    order = [m for m in NAMES if m in set(results["model"])]
    fig, axes = _panels(len(tasks), order)
    stages = {"trained": ("black", "o"), "gathered": (_COLOURS[7], "s"), "distilled": (_COLOURS[0], "D")}
    texts = {"trained": "trained", "gathered": "gathered, before KD", "distilled": "distilled"}
    for ax, task in zip(axes, tasks, strict=True):
        rows = results if task is None else results[results["task"] == task]
        for stage, (colour, marker) in stages.items():
            part = rows[rows["stage"] == stage]
            if part.empty:
                continue
            at = part["model"].map(order.index)
            ax.plot(part["value"], at, "|", color=colour, markersize=7, alpha=0.7)
            means = part.groupby(at)["value"].mean()
            ax.plot(means, means.index, marker, color=colour, label=texts[stage], markersize=5)
        _leave_out_far(ax, rows, order)
        for model in ("moe", "dense", "dense_long"):
            mean = rows.loc[rows["model"] == model, "value"].mean()
            ax.axvline(mean, color=PALETTE[model], linestyle=DASHES[model], linewidth=0.8, zorder=1.6)
        ax.set(xlabel=METRICS[rows["metric"].iloc[0]], title="" if task is None else TASK_NAMES.get(task, task))
    strokes = f"strokes: {results['seed'].nunique()} seed(s), marks: their mean"
    fig.supxlabel(f"{strokes}; lines: MoE (solid), dense (dashed), dense as long as teacher + KD (dotted)", fontsize=7)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


def _leave_out_far(ax: Axes, rows: pd.DataFrame, order: list[str]) -> None:
    """Scale the axis to the trained and distilled models: those right after gathering that are far away stand as numbers at its
    edge, else the differences among the others could not be seen."""
    near = rows.loc[rows["stage"] != "gathered", "value"]
    reach = 4 * np.ptp(near)
    low, high = max(ax.get_xlim()[0], near.min() - reach), min(ax.get_xlim()[1], near.max() + reach)
    if low == high:
        return
    ax.set_xlim(low, high)
    for model, mean in rows[rows["stage"] == "gathered"].groupby("model")["value"].mean().items():
        if not low <= mean <= high:
            at, text = (0.02, f"← {mean:.1f}") if mean < low else (0.98, f"{mean:.1f} →")
            place = {"transform": ax.get_yaxis_transform(), "ha": "left" if mean < low else "right", "va": "center"}
            ax.text(at, order.index(model), text, fontsize=7, color=_COLOURS[7], **place)


def retention_by_model(retention: pd.DataFrame, panels: str = "reference") -> Figure:
    """Benefit retention of the distilled models with 95% intervals, a panel each reference baseline or task.

    ``retention`` is a table of :func:`ones_lib.study.tables.retention_table`; only its ``distilled`` rows are drawn.
    """
    rows = retention[retention["stage"] == "distilled"]
    found = list(dict.fromkeys(rows["model"]))
    order = [*(m for m in NAMES if m in found), *(m for m in found if m not in NAMES)]
    values = list(dict.fromkeys(rows[panels]))
    fig, axes = _panels(len(values), order)
    for ax, value in zip(axes, values, strict=True):
        part = rows[rows[panels] == value].set_index("model").loc[order]
        ax.set_title(_baseline(value) if panels == "reference" else TASK_NAMES.get(value, value))
        if part["retention"].isna().all():
            _undefined(ax)
            ax.set_xticks([])
            continue
        for i, (model, row) in enumerate(part.iterrows()):
            style, bounded = _method_style(model), math.isfinite(row["low"])
            if bounded:
                ax.plot([100 * row["low"], 100 * row["high"]], [i, i], color=style["color"], linewidth=1.5)
            fill = {} if bounded else {"markerfacecolor": "white"}
            ax.plot(100 * row["retention"], i, style["marker"], color=style["color"], markersize=5, **fill)
        _retention_marks(ax.axvline)
        ax.set(xlabel="benefit retention (%)")
        ax.xaxis.set_major_locator(MaxNLocator(5))
    _explain(fig, rows, "lines")
    return fig


def retention_curves(retention: pd.DataFrame, axis: str, axis_label: str, log: bool = False) -> Figure:
    """Benefit retention against ``axis`` (a column such as ``budget``), one line a method, bands: 95% intervals.

    The scale is that of the lines, so a wide band may leave the panel; the table has its ends.

    One panel a reference baseline; methods and controls that share a panel share its scale. Where the MoE is not above
    the baseline, retention is undefined and the panel says for which values.
    """
    rows = retention[retention["stage"] == "distilled"].dropna(subset=[axis])
    references = list(dict.fromkeys(rows["reference"]))
    fig, axes = plt.subplots(1, len(references), figsize=(TWO_COLUMNS, 3.0), sharex=True, squeeze=False)
    for ax, reference in zip(axes[0], references, strict=True):
        part = rows[rows["reference"] == reference]
        undefined = sorted(part.loc[part["retention"].isna(), axis].unique())
        models = [m for m in PALETTE if m in set(part["model"])]
        for i, model in enumerate(models):
            line = part[part["model"] == model].sort_values(axis)
            control = model in (*CONTROLS, "dense_kd")
            # Lines that lie on one another stay apart: each method a little to the side of the one before.
            offset = (i - (len(models) - 1) / 2) * 0.012
            x = line[axis] * (1 + offset) if log else line[axis] + offset * np.ptp(part[axis])
            ax.plot(
                x,
                100 * line["retention"],
                marker=MARKERS[model],
                color=PALETTE[model],
                linestyle="--" if control else "-",
                label=NAMES[model],
            )
            finite = np.isfinite(line["low"])
            ax.plot(x[~finite], 100 * line["retention"][~finite], MARKERS[model], color=PALETTE[model], mfc="white")
            ax.fill_between(
                x, 100 * line["low"], 100 * line["high"], where=finite, color=PALETTE[model], alpha=0.1, linewidth=0
            )
        _retention_marks(ax.axhline)
        drawn = 100 * part["retention"].dropna()
        if not drawn.empty:  # scaled to the lines: a wide band must not press them together
            low, high = min(drawn.min(), 0), max(drawn.max(), 100)
            ax.set_ylim(low - 0.12 * (high - low), high + 0.12 * (high - low))
        if log:
            ax.set_xscale("log")
        ticks = sorted(part[axis].unique())
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set(xlabel=axis_label, title=_baseline(reference))
        if undefined:
            _undefined(ax, f"{axis_label}: {', '.join(f'{u:g}' for u in undefined)}")
    axes[0, 0].set_ylabel("benefit retention (%)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right center")
    _explain(fig, rows, "bands")
    return fig


def retention_text(retention: pd.DataFrame) -> pd.DataFrame:
    """Retention of the distilled models, for reading: per cent with 95% interval, a column a reference."""
    rows = retention[retention["stage"] == "distilled"]

    def text(row: pd.Series) -> str:
        if math.isnan(row["retention"]):
            return "undefined (MoE not above)"
        interval = f"{100 * row['low']:.0f} to {100 * row['high']:.0f}" if math.isfinite(row["low"]) else "unbounded"
        return f"{100 * row['retention']:.0f}% ({interval})"

    table = rows.assign(text=rows.apply(text, axis=1)).pivot(index="model", columns="reference", values="text")
    order = [m for m in NAMES if m in table.index]
    return table.loc[order].rename(index={m: NAMES[m].replace("\n", " ") for m in order})


def _panels(count: int, models: list[str]) -> tuple[Figure, list[Axes]]:
    """Panels in rows of up to three, with the models as their common vertical axis, the first on top."""
    columns = min(3, count) if count != 4 else 2
    rows = math.ceil(count / columns)
    size = (TWO_COLUMNS, rows * (0.2 * len(models) + 0.5) + 0.5)
    fig, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    axes[0, 0].set_yticks(range(len(models)), [NAMES.get(m, m).replace("\n", " ") for m in models])
    axes[0, 0].set_ylim(len(models) - 0.5, -0.5)
    return fig, list(axes.flat[:count])


def _baseline(reference: str) -> str:
    return f"baseline: {NAMES[reference]}".replace("\n", " ")


def _retention_marks(line) -> None:
    line(0, color="0.45", linestyle="--", linewidth=0.8, zorder=1.6)
    line(100, color="black", linewidth=0.8, zorder=1.6)


def _explain(fig: Figure, rows: pd.DataFrame, intervals: str) -> None:
    text = f"0: the baseline, 100: the MoE; {intervals}: 95% bootstrap over seeds and test examples"
    if (~np.isfinite(rows["low"])).any():
        text += "\nhollow: no bounded interval, since the MoE is not clearly above the baseline"
    fig.supxlabel(text, fontsize=7)


def _undefined(ax: Axes, where: str = "") -> None:
    text = "retention undefined: the MoE is not\nabove this baseline" + (f"\n({where})" if where else "")
    ax.text(0.5, 0.95, text, transform=ax.transAxes, ha="center", va="top", fontsize=7, color="firebrick")
