"""Figures of notebook 07: all gatherings against one another, before and after KD."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ones_lib.metrics import LOWER_IS_BETTER, main_metric
from ones_lib.views.figures import style
from ones_lib.views.figures.results import retention_levels

SCALES = {"router": "router's scale", "scalar": "scale by data", "vector": "scale per output by data"}


def variant_labels(table: pd.DataFrame) -> list[str]:
    """Method, scale and rank of every row, in words; a method's defaults are left out."""

    def label(method: str, scale: float | str | None, rank: float | None) -> str:
        parts = [style.look(method).name]
        if not (pd.isna(scale) or scale == 1):
            parts.append(SCALES.get(scale, f"scale {scale}"))
        if not pd.isna(rank):
            parts.append(f"K = {rank:g}")
        return ", ".join(parts)

    return [label(*row) for row in table[["method", "scale", "rank"]].itertuples(index=False)]


def gathering_starts(table: pd.DataFrame, references: pd.DataFrame) -> Figure:
    """Accuracy (text: loss) of every variant right after gathering, a row each variant, a panel each data set.

    Lines are the MoE and the dense baseline. Losses far above the others become numbers at the panel's edge.

    Args:
        table: of :func:`ones_lib.study.tables.ablation_table`.
        references: of :func:`ones_lib.study.tables.results_table`, the MoE and the dense baseline.
    """
    start = table[table["budget"] == 0].assign(label=variant_labels)
    start = start.sort_values("method", key=lambda m: m.map(style.in_order(m).index), kind="stable")
    order, sets = list(dict.fromkeys(start["label"])), list(dict.fromkeys(table["data"]))
    fig, axes = style.panel_grid(len(sets), len(sets), 0.16 * len(order), extra=1.0, sharey=True)
    for ax, data in zip(axes, sets, strict=True):
        metric = main_metric(table[table["data"] == data])
        known = references[(references["data"] == data) & (references["metric"] == metric)]
        _starts_of_data(ax, start[start["data"] == data], metric, order, known.groupby("model")["value"].mean())
        ax.set(xlabel=style.METRICS[metric], title=f"{data}: right after gathering")
    style.rows(axes[0], order)
    style.legend(fig, "outside upper right", ncols=2)
    style.caption(
        fig, f"ticks: {_seed_counts(table)} seeds, marks: their mean; only fitting methods train anything here"
    )
    return fig


def _starts_of_data(ax: Axes, part: pd.DataFrame, metric: str, order: list[str], levels: pd.Series) -> None:
    """The variants' marks in one panel, and the ``levels`` of trained models as lines."""
    means = part.groupby("label")[metric].mean()
    if metric in LOWER_IS_BETTER:  # leave out what is far off
        best, worst = min(means.min(), levels.min()), max(levels.max(), means.median())
        ax.set_xlim(best - 0.1 * (worst - best), worst + 1.5 * (worst - best))
    for label, values in part.groupby("label", sort=False):
        row, looks = order.index(label), style.look(values["method"].iloc[0])
        if metric in LOWER_IS_BETTER and style.number_at_edge(ax, row, means[label], digits=2, colour=looks.colour):
            continue
        style.seeds_and_mean(ax, values[metric], row, looks.colour, looks.marker)
    for model in ("moe", "dense"):
        if model in levels:
            style.level(ax.axvline, levels[model], model, label=style.look(model).name)


def gathering_budgets(table: pd.DataFrame) -> Figure:
    """Benefit retention against the KD budget, 0 included, a line each method at its default scale and rank, a panel each data
    set. The vertical axis is linear between -100% and 100% and logarithmic below.

    ``table`` is a :func:`ones_lib.study.tables.ablation_table`; only methods measured at every budget are drawn.
    """

    def draw(ax: Axes, part: pd.DataFrame) -> None:
        budgets = sorted(part["budget"].unique())
        part = part.assign(place=part["budget"].map(budgets.index)).dropna(subset="percent")
        style.lines_by_model(ax, part, "place", "percent", column="method")
        ax.set_xticks(range(len(budgets)), [f"{b:g}" for b in budgets])

    lines = f"lines: mean over {_seed_counts(table)} seeds; bands: lowest to highest"
    return _retention_panels(table, draw, "KD steps", lines)


def gathering_times(table: pd.DataFrame) -> Figure:
    """:func:`gathering_budgets` against the time of gathering and KD together, means over seeds. The first mark of a line is the
    student right after gathering; what takes less than a tenth of a second stands at the left edge."""

    def draw(ax: Axes, part: pd.DataFrame) -> None:
        for method, rows in part.groupby("method", sort=False):
            mean = rows.groupby("budget")[["seconds", "percent"]].mean()
            ax.plot(mean["seconds"].clip(lower=0.1), mean["percent"], **style.line_style(method))
        ax.set_xscale("log")
        style.plain_log(ax, "x")

    marks = f"marks: mean over {_seed_counts(table)} seeds, by KD budget"
    return _retention_panels(table, draw, "gathering and KD (s)", marks)


def _retention_panels(
    table: pd.DataFrame, draw: Callable[[Axes, pd.DataFrame], None], axis_label: str, marks: str
) -> Figure:
    """A panel each data set, in which ``draw`` draws the retention of its :func:`_plain_methods`; ``marks`` says what is drawn."""
    sets = _plain_methods(table)
    fig, axes = style.panel_grid(len(sets), len(sets), 3.3)
    for ax, (data, part) in zip(axes, sets.items(), strict=True):
        draw(ax, part)
        _retention_scale(ax)
        ax.set(xlabel=axis_label, title=data)
    axes[0].set_ylabel("benefit retention (%)")
    style.legend(fig)
    style.caption(fig, f"0: dense, 100: MoE; {marks}")
    return fig


def _plain_methods(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of the methods at their default scale and rank, measured at every budget, by data set; with a column
    ``percent``, the retention."""
    plain = table[(table["scale"].isna() | (table["scale"] == 1)) & table["rank"].isna()]
    plain = plain.assign(percent=100 * plain["retention"])
    plain = plain.sort_values("method", key=lambda m: m.map(style.in_order(m).index), kind="stable")
    sets = dict(list(plain.groupby("data", sort=False)))
    return {d: s[s.groupby("method")["budget"].transform("nunique") == s["budget"].nunique()] for d, s in sets.items()}


def _retention_scale(ax: Axes) -> None:
    """A vertical axis that is linear between -100% and 100% and logarithmic below."""
    retention_levels(ax.axhline)
    ax.set_yscale("symlog", linthresh=100, linscale=2)
    ax.set_yticks([t for t in (-5000, -2000, -1000, -500, -200, -100, -50, 0, 50, 100) if t >= ax.get_ylim()[0]])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(top=120)


def gathering_errors(table: pd.DataFrame, correlations: pd.DataFrame) -> Figure:
    """The layer's output error against the student's score right after gathering, and against its benefit retention after the
    smallest KD budget; a row of panels each data set, a mark each variant.

    Args:
        table: of :func:`ones_lib.study.tables.ablation_table`.
        correlations: of :func:`ones_lib.study.tables.error_correlations`, two rows a data set.
    """
    fig, axes = style.panel_grid(len(correlations), 2, 2.1, extra=0.8)
    for ax, (_, found) in zip(axes, correlations.iterrows(), strict=True):
        data, value, budget = found[["data", "value", "budget"]]
        part = table[(table["data"] == data) & (table["budget"] == budget)].assign(label=variant_labels)
        factor = 100 if value == "retention" else 1
        for _, variant in part.groupby("label", sort=False):
            looks = style.line_style(variant["method"].iloc[0]) | {"markersize": 4, "linestyle": "none"}
            x, y = variant["layer_error"].mean(), factor * variant[value]
            ax.plot(x, y.mean(), **looks)
            ax.vlines(x, y.min(), y.max(), color=looks["color"], linewidth=0.8)
        when = "right after gathering" if budget == 0 else f"after {budget:g} KD steps"
        text = "rank correlation {:.2f} ({:.2f} to {:.2f})".format(*found[["correlation", "low", "high"]])
        ax.set(xscale="log", title=f"{data}, {when}\n{text}".replace("-", "\N{MINUS SIGN}"))
        ax.set_ylabel("benefit retention (%)" if value == "retention" else style.METRICS[value])
        style.plain_log(ax, "x")
    for ax in axes[-2:]:
        ax.set_xlabel("relative output error of the layer")
    style.legend(fig)
    means = f"marks: mean over {_seed_counts(table)} seeds; vertical lines: lowest to highest"
    style.caption(fig, f"{means}; intervals: 95% bootstrap")
    return fig


def _seed_counts(table: pd.DataFrame) -> str:
    """The number of seeds, data set by data set where it differs: "3" or "3 and 2"."""
    counts = table.groupby("data", sort=False)["seed"].nunique()
    return " and ".join(str(n) for n in dict.fromkeys(counts))
