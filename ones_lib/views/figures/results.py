"""Scores and benefit retention of students: notebooks 01 (images), 02 (retention curves), 03 (text), and parts of 06 and 08."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

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
from ones_lib.views.figures import style

TASK_NAMES = {
    "masked_lm": "masked LM",
    "language": "language (sentence)",
    "family": "family (sentence pair)",
    "answer": "answer span",
    "answer_or_none": "answer span or none",
    "sst2": "SST-2",
    "mnli": "MNLI",
    "squad": "SQuAD 1.1",
    "squad_v2": "SQuAD 2.0",
    "average": "average of the tasks",
}
STAGES = {  # label, colour, marker
    "trained": ("trained", "black", "o"),
    "gathered": ("gathered, before KD", style.COLOURS[7], "s"),
    "distilled": ("distilled", style.COLOURS[0], "D"),
}


def sample_images(data: ImageData, classes: int = 8, each: int = 6, seed: int = 0) -> Figure:
    """A few augmented training images of the first classes, a column each class."""
    labels = data.train.labels
    shown = [torch.nonzero(labels == c)[:each, 0] for c in range(min(classes, data.num_classes))]
    rows = max(len(s) for s in shown)
    size = (style.ONE_COLUMN, style.ONE_COLUMN * rows / len(shown))
    fig, axes = plt.subplots(rows, len(shown), figsize=size, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for column, indices in zip(axes.T, shown, strict=True):
        keys = torch.stack([indices, torch.arange(len(indices)) + seed], dim=1)
        images, _ = next(iter(DataLoader(data.train, batch_sampler=[keys], collate_fn=data.train.collate)))
        images = (images - images.min()) / (images.max() - images.min())
        for ax, image in zip(column, images, strict=False):
            ax.imshow(image.permute(1, 2, 0).expand(-1, -1, 3), interpolation="nearest")
    return fig


def learning_curves(history: pd.DataFrame, metric: str = "accuracy") -> Figure:
    """A validation metric against training steps, a line each model.

    ``history`` is a table of :meth:`ones_lib.study.study.Study.histories`.
    """
    fig, ax = plt.subplots(figsize=(style.ONE_COLUMN, 2.4))
    style.lines_by_model(ax, history, "step", "value", marker="")
    ax.set(xlabel="training step", ylabel=f"validation {style.METRICS[metric]}")
    ax.set_title(f"line: mean over {style.seeds(history)}; band: lowest to highest")
    if metric in LOWER_IS_BETTER:
        ax.legend(loc="upper right")
    else:
        ax.set_ylim(bottom=0)
        ax.legend(loc="lower right")
    return fig


def scores_by_model(results: pd.DataFrame) -> Figure:
    """Score of every model: ticks are seeds, marks their mean; students before and after KD.

    ``results`` is a table of :func:`ones_lib.study.tables.results_table` with one metric, or with a column ``task`` and one
    metric a task: a panel each.
    """
    results = results if "task" in results else results.assign(task="")
    order, tasks = style.in_order(results["model"]), list(results.groupby("task", sort=False))
    fig, axes = _model_panels(len(tasks), order)
    for ax, (task, rows) in zip(axes, tasks, strict=True):
        for stage, (label, colour, marker) in STAGES.items():
            for model, part in rows[rows["stage"] == stage].groupby("model"):
                style.seeds_and_mean(ax, part["value"], order.index(model), colour, marker, label)
        _leave_out_far(ax, rows, order)
        for model in ("moe", "dense", "dense_long"):
            style.level(ax.axvline, rows.loc[rows["model"] == model, "value"].mean(), model)
        ax.set(xlabel=style.METRICS[rows["metric"].iloc[0]], title=TASK_NAMES.get(task, task))
    lines = "MoE (solid), dense (dashed), dense with teacher + KD steps (dotted)"
    style.caption(fig, f"ticks: {style.seeds(results)}, marks: their mean; lines: {lines}")
    style.legend(fig, "outside upper center", ncols=3)
    return fig


def _leave_out_far(ax: Axes, rows: pd.DataFrame, order: list[str]) -> None:
    """Scale the axis to trained and distilled models. Students before KD that are far away become numbers at the edge;
    otherwise they would squeeze the differences among the others."""
    near = rows.loc[rows["stage"] != "gathered", "value"]
    reach = 4 * np.ptp(near)
    low, high = max(ax.get_xlim()[0], near.min() - reach), min(ax.get_xlim()[1], near.max() + reach)
    if low == high:
        return
    ax.set_xlim(low, high)
    for model, mean in rows[rows["stage"] == "gathered"].groupby("model")["value"].mean().items():
        style.number_at_edge(ax, order.index(model), mean, digits=1, colour=STAGES["gathered"][1])


def retention_by_model(retention: pd.DataFrame, panels: str = "reference") -> Figure:
    """Benefit retention of the distilled models with 95% intervals, a panel each value of the column ``panels``: ``reference``
    (the dense baseline) or ``task``.

    ``retention`` is a table of :func:`ones_lib.study.tables.retention_table`; only its ``distilled`` rows are drawn.
    """
    rows = retention[retention["stage"] == "distilled"]
    order, groups = style.in_order(rows["model"]), list(rows.groupby(panels, sort=False))
    fig, axes = _model_panels(len(groups), order)
    for ax, (value, part) in zip(axes, groups, strict=True):
        ax.set_title(_baseline(value) if panels == "reference" else TASK_NAMES.get(value, value))
        if part["retention"].isna().all():
            _say_undefined(ax)
            ax.set_xticks([])
            continue
        for i, (model, row) in enumerate(part.set_index("model").loc[order].iterrows()):
            colour, bounded = style.look(model).colour, math.isfinite(row["low"])
            if bounded:
                ax.plot([100 * row["low"], 100 * row["high"]], [i, i], color=colour, linewidth=1.5)
            fill = {} if bounded else {"markerfacecolor": "white"}
            ax.plot(100 * row["retention"], i, style.look(model).marker, color=colour, markersize=5, **fill)
        retention_levels(ax.axvline)
        ax.set(xlabel="benefit retention (%)")
        ax.xaxis.set_major_locator(MaxNLocator(5))
    _explain_retention(fig, rows, "lines")
    return fig


def retention_curves(retention: pd.DataFrame, axis: str, axis_label: str, log: bool = False) -> Figure:
    """Benefit retention against ``axis`` (a column such as ``budget``), a line each method, a panel each reference baseline.

    Bands are 95% intervals. The scale follows the lines, so a wide band may leave the panel; the table has its ends. Where
    the MoE is not above the baseline, retention is undefined, and the panel says for which values.
    """
    rows = retention[retention["stage"] == "distilled"].dropna(subset=[axis])
    groups = list(rows.groupby("reference", sort=False))
    fig, axes = style.panel_grid(len(groups), len(groups), 3.0, sharex=True)
    for ax, (reference, part) in zip(axes, groups, strict=True):
        models = style.in_order(part["model"])
        for i, model in enumerate(models):
            line = part[part["model"] == model].sort_values(axis)
            # Lines that lie on one another stay apart: each method a little to the side of the one before.
            offset = (i - (len(models) - 1) / 2) * 0.012
            x = line[axis] * (1 + offset) if log else line[axis] + offset * np.ptp(part[axis])
            _line_with_interval(ax, x, 100 * line[["retention", "low", "high"]], model)
        retention_levels(ax.axhline)
        drawn = 100 * part["retention"].dropna()
        if not drawn.empty:
            low, high = min(drawn.min(), 0), max(drawn.max(), 100)
            ax.set_ylim(low - 0.12 * (high - low), high + 0.12 * (high - low))
        if log:
            ax.set_xscale("log")
        ticks = sorted(part[axis].unique())
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set(xlabel=axis_label, title=_baseline(reference))
        if undefined := sorted(part.loc[part["retention"].isna(), axis].unique()):
            _say_undefined(ax, f"{axis_label}: {', '.join(f'{u:g}' for u in undefined)}")
    axes[0].set_ylabel("benefit retention (%)")
    style.legend(fig)
    _explain_retention(fig, rows, "bands")
    return fig


def kept_by_benefit(benefits: pd.DataFrame) -> Figure:
    """What students keep against the benefit of their MoE, both in points above the dense baseline; a panel each method.

    ``benefits`` is a :func:`ones_lib.study.tables.benefit_table`. A line joins the MoEs with one number of experts, which were
    trained for different numbers of steps.
    """
    methods, counts = style.in_order(benefits["model"]), sorted(benefits["num_experts"].unique())
    colours = dict(zip(counts, sns.color_palette("viridis", len(counts) + 1), strict=False))  # its last is too bright
    fig, axes = style.panel_grid(len(methods), len(methods), 2.6, sharex=True, sharey=True)
    for ax, method in zip(axes, methods, strict=True):
        for count, part in benefits[benefits["model"] == method].groupby("num_experts"):
            mean = part.groupby("teacher_steps")[["benefit", "kept"]].mean().sort_values("benefit")
            ax.plot(part["benefit"], part["kept"], ".", color=colours[count], markersize=3)
            ax.plot(mean["benefit"], mean["kept"], "o-", color=colours[count], label=f"{count:.0f} experts")
        ax.axhline(0, linestyle="--", **style.GREY)
        ax.axline((0, 0), slope=1, **style.GREY | {"color": "black"})
        ax.set(xlabel="MoE above dense (points)", title=style.look(method).name)
    axes[0].set_ylabel("student above dense (points)")
    style.legend(fig)
    steps = " and ".join(f"{steps:,.0f}" for steps in sorted(benefits["teacher_steps"].unique()))
    text = f"dots: {style.seeds(benefits)}, circles: their mean; MoEs trained for {steps} steps; diagonal: all is kept"
    style.caption(fig, text)
    return fig


def _line_with_interval(ax: Axes, x: pd.Series, percent: pd.DataFrame, model: str) -> None:
    """``retention`` as a line with marks, hollow where the interval from ``low`` to ``high``, the band, has no bounds."""
    looks, bounded = style.line_style(model) | {"markersize": 4}, np.isfinite(percent["low"])
    ax.plot(x, percent["retention"], **looks)
    ax.plot(x[~bounded], percent["retention"][~bounded], looks["marker"], color=looks["color"], mfc="white")
    band = {"color": looks["color"], "alpha": 0.1, "linewidth": 0}
    ax.fill_between(x, percent["low"], percent["high"], where=bounded, **band)


def retention_text(retention: pd.DataFrame, rows: Sequence[str] = ("model",)) -> pd.DataFrame:
    """Retention of the distilled models for reading: per cent with 95% interval, a column each reference baseline."""

    distilled = retention[retention["stage"] == "distilled"]
    shown = _readable(distilled.assign(text=distilled.apply(_with_interval, axis=1)), rows, ["reference"])
    return shown.rename(columns=lambda reference: style.look(reference).name)


def _with_interval(row: pd.Series) -> str:
    if math.isnan(row["retention"]):
        return "undefined (MoE not above)"
    interval = f"{100 * row['low']:.0f} to {100 * row['high']:.0f}" if math.isfinite(row["low"]) else "unbounded"
    return f"{100 * row['retention']:.0f}% ({interval})"


def retention_by_speed(table: pd.DataFrame) -> Figure:
    """Benefit retention against speed over the MoE: a mark each model and width, a line joins a method's two widths.

    ``table`` is a :func:`ones_lib.study.tables.width_table`. Bars are 95% intervals. The scale follows the marks, so a wide bar
    may leave the panel; the table has its ends. Students of one width have one speed, and stand a little apart.
    """
    fig, ax = plt.subplots(figsize=(style.TWO_COLUMNS * 0.7, 3.2))
    drawn = table[(table["stage"] == "distilled") | (table["model"] == "dense_active")]
    models = style.in_order(drawn["model"])
    for i, model in enumerate(models):
        points = drawn[drawn["model"] == model].sort_values("d_ff")
        x = points["speedup"] * (1 + (i - (len(models) - 1) / 2) * 0.006)
        percent, bounded = 100 * points[["retention", "low", "high"]], np.isfinite(points["low"])
        looks = style.line_style(model) | {"markersize": 4}
        ax.plot(x, percent["retention"], **looks)
        ax.plot(x[~bounded], percent["retention"][~bounded], looks["marker"], color=looks["color"], mfc="white")
        ax.vlines(x[bounded], percent["low"][bounded], percent["high"][bounded], color=looks["color"], linewidth=0.8)
    for model, value in (("moe", 100), ("dense", 0)):
        looks = style.line_style(model) | {"markersize": 5, "linestyle": ""}
        ax.plot(table.loc[table["model"] == model, "speedup"], [value], **looks)
    retention_levels(ax.axhline)
    marks = 100 * drawn["retention"].dropna()
    low, high = (min(marks.min(), 0), max(marks.max(), 100)) if len(marks) else (0, 100)
    ax.set_ylim(low - 0.12 * (high - low), high + 0.12 * (high - low))
    if drawn["retention"].isna().any():
        _say_undefined(ax)
    batch, device, threads = table[["batch_size", "device", "threads"]].iloc[0]
    one, active = sorted(table["d_ff"].dropna().unique())
    ax.set(xlabel="examples a second / the MoE's", ylabel="benefit retention (%)")
    ax.set_title(f"forward passes of {batch} examples ({device}, {threads} thread(s))")
    style.legend(fig)
    widths = f"joined: {active:,.0f} hidden units (the active width) and {one:,.0f} (one expert's)"
    style.caption(fig, f"{widths}\n{_retention_words(drawn, 'bars')}")
    return fig


def widths_text(table: pd.DataFrame, digits: int = 1) -> pd.DataFrame:
    """A :func:`ones_lib.study.tables.width_table` for reading: score (mean ± SD over seeds, with ``digits`` after the point),
    retention of what is not a reference, and speed."""
    rows = table.assign(place=table["model"].map(style.in_order(table["model"]).index)).sort_values(["place", "d_ff"])
    shown = pd.DataFrame({"model": [style.look(model).name for model in rows["model"]]})
    shown["hidden units"] = rows["d_ff"].map("{:,.0f}".format).where(rows["d_ff"].notna(), "").to_numpy()
    shown["score"] = _with_spread(rows["value"], rows["value_sd"], digits).to_numpy()
    reference = rows["model"].isin(["moe", "dense"])
    shown["retention (95% interval)"] = rows.apply(_with_interval, axis=1).mask(reference, "").to_numpy()
    shown["examples a second"] = rows["examples_per_second"].map("{:,.0f}".format).to_numpy()
    shown["times the MoE's"] = rows["speedup"].map("{:.2f}".format).to_numpy()
    return shown.set_index(["model", "hidden units"])


def scores_text(
    table: pd.DataFrame, rows: Sequence[str], columns: Sequence[str], value: str = "value", digits: int = 1
) -> pd.DataFrame:
    """Scores for reading: mean ± SD over seeds, with ``digits`` after the point; of one seed the score alone.

    Args:
        rows, columns: columns of ``table`` whose values become rows and columns, in the order in which they come; but models in
            that of the figures, and stages in that of the work.
    """
    scores = table.groupby([*rows, *columns], sort=False, dropna=False)[value].agg(["mean", "std"])
    text = _with_spread(scores["mean"], scores["std"], digits)
    return _readable(text.rename("text").reset_index(), rows, columns)


def _with_spread(mean: pd.Series, sd: pd.Series, digits: int) -> pd.Series:
    """Such as ``1.2 ± 0.3``; without a standard deviation the mean alone."""
    number = f"{{:.{digits}f}}".format
    return mean.map(number) + sd.map(f" ± {{:.{digits}f}}".format).where(sd.notna(), "")


def _readable(table: pd.DataFrame, rows: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """The column ``text`` of a table, laid out by rows and columns."""

    def place(values: pd.Series) -> pd.Series:
        orders = {"model": style.in_order(values), "stage": [stage for stage in STAGES if stage in set(values)]}
        order = orders.get(values.name, list(dict.fromkeys(values)))
        return values.map({one: number for number, one in enumerate(order)})

    def labels(names: list[str]) -> pd.Index:
        return table[names].drop_duplicates().sort_values(names, key=place).set_index(names).index

    rows, columns = list(rows), list(columns)
    wide = (
        table.set_index([*rows, *columns])["text"].unstack(columns).reindex(index=labels(rows), columns=labels(columns))
    )
    if "model" in rows:
        wide = wide.rename(index=lambda model: style.look(model).name, level="model" if len(rows) > 1 else None)
    return wide.fillna("")


def retention_levels(line: Callable[..., Any]) -> None:
    """The baseline's and the MoE's level; ``line`` is a panel's ``axhline`` or ``axvline``."""
    line(0, linestyle="--", **style.GREY)
    line(100, **style.GREY | {"color": "black"})


def _model_panels(count: int, models: list[str]) -> tuple[Figure, list[Axes]]:
    """Panels with the models as their common vertical axis, the first on top."""
    columns = 2 if count == 4 else 3
    fig, axes = style.panel_grid(count, columns, height=0.2 * len(models) + 0.5, extra=0.5, sharey=True)
    style.rows(axes[0], [style.look(model).name for model in models])
    return fig, axes


def _baseline(reference: str) -> str:
    return f"baseline: {style.look(reference).name}"


def _explain_retention(fig: Figure, rows: pd.DataFrame, intervals: str) -> None:
    style.caption(fig, _retention_words(rows, intervals))


def _retention_words(rows: pd.DataFrame, intervals: str) -> str:
    text = f"0: the baseline, 100: the MoE; {intervals}: 95% bootstrap intervals over seeds and test examples"
    if (~np.isfinite(rows["low"])).any():
        text += "\nhollow: no bounded interval, because the MoE is not clearly above the baseline"
    return text


def _say_undefined(ax: Axes, where: str = "") -> None:
    text = "undefined: the MoE is\nnot above this baseline" + (f"\n({where})" if where else "")
    ax.text(0.5, 0.95, text, transform=ax.transAxes, ha="center", va="top", fontsize=7, color="firebrick")
