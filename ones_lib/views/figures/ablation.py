"""TODO."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ones_lib.metrics import LOWER_IS_BETTER, main_metric
from ones_lib.views.figures.results import _retention_marks
from ones_lib.views.figures.style import (
    CONTROLS,
    DASHES,
    METRICS,
    NAMES,
    PALETTE,
    TWO_COLUMNS,
    _legend_of_all,
    _mean_and_range,
    _method_style,
    _plain_log,
)

SCALES = {"router": "router's scale", "scalar": "scale by data", "vector": "scale per output by data"}


def variant_label(method: str, scale: float | str | None, rank: float | None) -> str:
    """A method, its scale and its rank, for people; what is a method's default is left out."""
    parts = [_method_style(method)["label"]]
    if not (pd.isna(scale) or scale == 1):
        parts.append(SCALES.get(scale, f"scale {scale}"))
    if not pd.isna(rank):
        parts.append(f"K = {rank:g}")
    return ", ".join(parts)


def gathering_starts(table: pd.DataFrame, references: pd.DataFrame) -> Figure:
    """Accuracy, of text the loss, of every variant right after gathering, a panel each data set: strokes are seeds, marks their
    mean. Lines are what was trained.

    ``table`` is a :func:`ones_lib.study.tables.ablation_table`; ``references`` a :func:`ones_lib.study.tables.results_table` of MoE and dense.
    What is far from the others is a number at the panel's edge.
    """
    start = table[table["budget"] == 0].assign(label=variant_labels)
    rows = [m for m in NAMES if m in set(start["method"])] + sorted(set(start["method"]) - set(NAMES))
    start = start.sort_values("method", key=lambda m: m.map(rows.index), kind="stable")
    order = list(dict.fromkeys(start["label"]))
    sets = list(dict.fromkeys(table["data"]))
    size = (TWO_COLUMNS, 0.16 * len(order) + 1.0)
    fig, axes = plt.subplots(1, len(sets), figsize=size, sharey=True, squeeze=False)
    for ax, data in zip(axes[0], sets, strict=True):
        part, metric = start[start["data"] == data], main_metric(table[table["data"] == data])
        levels = (
            references[(references["data"] == data) & (references["metric"] == metric)].groupby("model")["value"].mean()
        )
        means = part.groupby("label")[metric].mean()
        if metric in LOWER_IS_BETTER:  # what is far off would press the others together
            best, worst = min(means.min(), levels.min()), max(levels.max(), means.median())
            ax.set_xlim(best - 0.1 * (worst - best), worst + 1.5 * (worst - best))
        for i, label in enumerate(order):
            values = part.loc[part["label"] == label]
            if values.empty:
                continue
            style = _method_style(values["method"].iloc[0])
            if metric in LOWER_IS_BETTER and means[label] > ax.get_xlim()[1]:
                place = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "center", "fontsize": 7}
                ax.text(0.98, i, f"{means[label]:.2f} →", color=style["color"], **place)
                continue
            ax.plot(values[metric], [i] * len(values), "|", color=style["color"], markersize=6, alpha=0.8)
            ax.plot(means[label], i, style["marker"], color=style["color"], markersize=4.5)
        for model in ("moe", "dense"):
            if model in levels:
                line = {"color": PALETTE[model], "linestyle": DASHES[model], "linewidth": 0.8, "zorder": 1.6}
                ax.axvline(levels[model], label=NAMES[model], **line)
        ax.set(xlabel=METRICS[metric], title=f"{data}: right after gathering")
    axes[0, 0].set_yticks(range(len(order)), order)
    axes[0, 0].set_ylim(len(order) - 0.5, -0.5)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    fig.supxlabel(
        f"strokes: {_seed_counts(table)} seeds, marks: their mean; no training but what a fit does", fontsize=7
    )
    return fig


def gathering_budgets(table: pd.DataFrame) -> Figure:
    """Benefit retention against the KD budget, 0 included, a line each method at its default scale and rank, a panel each data
    set; bands reach from the lowest to the highest seed. Linear between -100% and 100%, logarithmic below.

    ``table`` is a :func:`ones_lib.study.tables.ablation_table`; methods with one budget alone are left out.
    """
    plain = table[(table["scale"].isna() | (table["scale"] == 1)) & table["rank"].isna()]
    sets = list(dict.fromkeys(plain["data"]))
    fig, axes = plt.subplots(1, len(sets), figsize=(TWO_COLUMNS, 3.3), squeeze=False)
    for ax, data in zip(axes[0], sets, strict=True):
        part = plain[plain["data"] == data]
        budgets = sorted(part["budget"].unique())
        full = part.groupby("method")["budget"].nunique()
        for method in [m for m in PALETTE if full.get(m, 0) == len(budgets)]:
            values = part[part["method"] == method]
            values = values.assign(place=values["budget"].map(budgets.index), percent=100 * values["retention"])
            dashes = "--" if method in CONTROLS else "-"
            _mean_and_range(
                ax, values.dropna(subset="percent"), "place", "percent", linestyle=dashes, **_method_style(method)
            )
        _retention_marks(ax.axhline)
        ax.set_xticks(range(len(budgets)), [f"{b:g}" for b in budgets])
        ax.set_yscale("symlog", linthresh=100, linscale=2)
        ax.set_yticks([t for t in (-5000, -2000, -1000, -500, -200, -100, -50, 0, 50, 100) if t >= ax.get_ylim()[0]])
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set(xlabel="KD steps", title=data)
        ax.set_ylim(top=120)
    axes[0, 0].set_ylabel("benefit retention (%)")
    _legend_of_all(fig)
    text = f"0: dense, 100: the MoE; lines: mean over {_seed_counts(table)} seeds, bands: lowest to highest"
    fig.supxlabel(text, fontsize=7)
    return fig


def gathering_errors(table: pd.DataFrame, correlations: pd.DataFrame) -> Figure:
    """The layer's output error right after gathering against what the student is worth then, and after the smallest budget of
    KD; a row each data set, a mark each variant (mean over seeds).

    ``table`` is a :func:`ones_lib.study.tables.ablation_table`, ``correlations`` of :func:`ones_lib.study.tables.error_correlations`.
    """
    sets = list(dict.fromkeys(table["data"]))
    fig, axes = plt.subplots(len(sets), 2, figsize=(TWO_COLUMNS, 0.8 + 2.1 * len(sets)), squeeze=False)
    for row, data in zip(axes, sets, strict=True):
        of_set = correlations[correlations["data"] == data]
        for ax, (_, found) in zip(row, of_set.iterrows(), strict=True):
            part = table[(table["data"] == data) & (table["budget"] == found["budget"])].assign(label=variant_labels)
            factor = 100 if found["value"] == "retention" else 1
            for _, variant in part.groupby("label", sort=False):
                style = _method_style(variant["method"].iloc[0]) | {"markersize": 4, "linestyle": "none"}
                y = factor * variant[found["value"]]
                ax.plot(variant["layer_error"].mean(), y.mean(), **style)
                ax.vlines(variant["layer_error"].mean(), y.min(), y.max(), color=style["color"], linewidth=0.8)
            when = "right after gathering" if found["budget"] == 0 else f"after {found['budget']:g} steps of KD"
            text = "rank correlation {:.2f} ({:.2f} to {:.2f})".format(*found[["correlation", "low", "high"]])
            text = text.replace("-", "\N{MINUS SIGN}")
            ax.set(xscale="log", title=f"{data}, {when}\n{text}")
            ax.set(ylabel="benefit retention (%)" if factor == 100 else METRICS[found["value"]])
            _plain_log(ax, "x")
    for ax in axes[-1]:
        ax.set_xlabel("relative output error of the layer")
    _legend_of_all(fig)
    fig.supxlabel(
        f"marks: mean over {_seed_counts(table)} seeds; strokes: lowest to highest; intervals: 95% bootstrap",
        fontsize=7,
    )
    return fig


def variant_labels(table: pd.DataFrame) -> list[str]:
    """:func:`variant_label` of every row."""
    return [variant_label(*row) for row in table[["method", "scale", "rank"]].itertuples(index=False)]


def _seed_counts(table: pd.DataFrame) -> str:
    counts = table.groupby("data", sort=False)["seed"].nunique()
    return " and ".join(str(n) for n in dict.fromkeys(counts))
