"""Figures from tables of results: table -> matplotlib figure, saved as PNG and PDF with its CSV and where it came from.

Every function draws what its table holds and trains nothing, so a figure can be drawn again from the records, or from the
CSV beside it. Bands and bars say what they are in the axis labels or the legend.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.utils.data import DataLoader

from ones_lib.data import ImageData
from ones_lib.metrics import LOWER_IS_BETTER
from ones_lib.records import project_root, write_text

ONE_COLUMN, TWO_COLUMNS = 3.5, 7.2  # inches, the usual widths of a paper's columns

NAMES = {
    "moe": "MoE (teacher)",
    "dense_long": "dense, as long as\nteacher + KD",
    "dense": "dense",
    "dense_kd": "dense, KD from scratch",
    "shared_kd": "shared weights only",
    "zero_ffn": "zero FFN",
    "one_expert": "one expert",
    "sum": "summation",
    "average": "averaging",
    "topk": "Top-KG",
    "svd": "SVD-KG",
}
METRICS = {
    "accuracy": "accuracy (%)",
    "f1": "F1 (%)",
    "exact_match": "exact match (%)",
    "loss": "loss (nats; less is better)",
    "average": "mean of the tasks (%)",
}
TASK_NAMES = {
    "masked_lm": "masked LM",
    "package": "package: one sentence",
    "statement": "statement: a pair",
    "answer": "answer span",
    "answer_or_none": "answer span or none",
    "sst2": "SST-2",
    "mnli": "MNLI",
    "squad": "SQuAD 1.1",
    "squad_v2": "SQuAD 2.0",
    "average": "average of the tasks",
}
METHODS = ["sum", "average", "topk", "svd"]
CONTROLS = ["shared_kd", "zero_ffn", "one_expert"]
_COLOURS = sns.color_palette("colorblind")
PALETTE = dict(zip([*METHODS, *CONTROLS, "dense_kd"], [_COLOURS[i] for i in (3, 0, 2, 1, 7, 5, 4, 9)], strict=True))
PALETTE |= {"moe": "black", "dense": "0.45", "dense_long": "0.45"}
MARKERS = dict(zip(PALETTE, "oosDv^<PXXX", strict=False))
DASHES = {"moe": "-", "dense": "--", "dense_long": ":"}


def set_style() -> None:
    """The one style of all figures: small sans serif, light grid, fonts embedded in PDFs as text."""
    sns.set_theme(
        context="paper",
        style="ticks",
        rc={
            "axes.grid": True,
            "axes.labelsize": 8,
            "axes.titlesize": 8,
            "figure.constrained_layout.use": True,
            "figure.dpi": 150,
            "font.size": 8,
            "grid.color": "0.9",
            "legend.fontsize": 7,
            "legend.frameon": False,
            "lines.linewidth": 1.2,
            "lines.markersize": 4,
            "pdf.fonttype": 42,
            "savefig.dpi": 300,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
        },
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

    ``history`` is a table of :meth:`ones_lib.study.Study.histories`.
    """
    fig, ax = plt.subplots(figsize=(ONE_COLUMN, 2.4))
    for model, group in history.groupby("model", sort=False):
        by_step = group.groupby("step")["value"].agg(["mean", "min", "max"])
        style = {"color": PALETTE[model], "linestyle": DASHES.get(model, "-")}
        ax.plot(by_step.index, by_step["mean"], label=NAMES[model].replace("\n", " "), **style)
        ax.fill_between(by_step.index, by_step["min"], by_step["max"], color=style["color"], alpha=0.15, linewidth=0)
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

    ``results`` is a table of :func:`ones_lib.tables.results_table` with one metric, or with one a task: a panel each.
    """
    tasks = list(dict.fromkeys(results["task"])) if "task" in results else [None]
    order = [m for m in NAMES if m in set(results["model"])]
    fig, axes = _panels(len(tasks), order)
    stages = {"trained": ("black", "o"), "gathered": (_COLOURS[7], "s"), "distilled": (_COLOURS[0], "D")}
    texts = {"trained": "trained from scratch", "gathered": "gathered, before KD", "distilled": "distilled"}
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

    ``retention`` is a table of :func:`ones_lib.tables.retention_table`; only its ``distilled`` rows are drawn.
    """
    rows = retention[retention["stage"] == "distilled"]
    order = [m for m in NAMES if m in set(rows["model"])]
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
            bounded = math.isfinite(row["low"])
            if bounded:
                ax.plot([100 * row["low"], 100 * row["high"]], [i, i], color=PALETTE[model], linewidth=1.5)
            fill = {} if bounded else {"markerfacecolor": "white"}
            ax.plot(100 * row["retention"], i, MARKERS[model], color=PALETTE[model], markersize=5, **fill)
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
            control = model not in METHODS
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


def save_figure(fig: Figure, name: str, table: pd.DataFrame, folder: str | Path, records: Iterable[str] = ()) -> None:
    """Write ``name.png``, ``name.pdf`` and what :func:`save_table` writes, ``table`` being what is drawn."""
    save_table(table, name, folder, records)
    path = project_root() / folder / name
    fig.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})  # the same figure gives the same file
    fig.savefig(path.with_suffix(".png"))


def save_table(table: pd.DataFrame, name: str, folder: str | Path, records: Iterable[str] = ()) -> None:
    """Write ``name.csv`` and ``name.json``, the records behind it; ``folder`` is relative to the project's root.

    A column ``record`` goes to the JSON, row by row, instead of to the CSV.
    """
    path = project_root() / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if "record" in table:
        records, table = table["record"], table.drop(columns="record")
    write_text(path.with_suffix(".csv"), table.to_csv(index=False, float_format="%.6f"))
    write_text(path.with_suffix(".json"), json.dumps({"records": list(records)}, indent=1) + "\n")


def _panels(count: int, models: list[str]) -> tuple[Figure, list[Axes]]:
    """Panels in rows of up to three, with the models as their common vertical axis, the first on top."""
    columns = min(3, count) if count != 4 else 2
    rows = math.ceil(count / columns)
    size = (TWO_COLUMNS, rows * (0.2 * len(models) + 0.5) + 0.5)
    fig, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    axes[0, 0].set_yticks(range(len(models)), [NAMES[m].replace("\n", " ") for m in models])
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
