"""Figures of notebook 06: causal MoEs as published, made dense and distilled."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from ones_lib.views.figures import style


def perplexity_by_tokens(table: pd.DataFrame, labels: Mapping[float, str]) -> Figure:
    """Perplexity of students, divided by their MoE's of the same seed, against the tokens of their distillation: a panel each
    MoE, a line each student. The MoE is at 1, the dense baselines are levels.

    ``table`` is a :func:`ones_lib.study.tables.published_table`; ``labels`` say what each of its budgets is.
    """
    budgets = list(labels)
    fig, axes = _panels_of_moes(table)
    for ax, (moe, part) in zip(axes, table.groupby("teacher", sort=False), strict=True):
        drawn = part.dropna(subset="budget")
        style.lines_by_model(ax, drawn.assign(place=drawn["budget"].map(budgets.index)), "place", "ratio")
        _levels(ax, part)
        ax.set_xticks(range(len(budgets)), labels.values())
        ax.set(title=moe, xlabel="tokens of distillation")
    return _finished(fig, axes, f"lines: mean over {style.seeds(table)}; bands: lowest to highest; 1: the MoE")


def frontier(table: pd.DataFrame, speeds: pd.DataFrame, labels: Mapping[float, str]) -> Figure:
    """Perplexity of one kind of student, divided by its MoE's, against its speed over the MoE: a panel each MoE, a line each
    budget of distillation, a mark each width. The MoE is at (1, 1); dense models from scratch stand at their width's speed.

    Args:
        table: the rows of a :func:`ones_lib.study.tables.published_table` of one kind of student, of the baselines and the MoE.
        speeds: one row a ``teacher`` and ``width``, with its ``speedup``; see :func:`ones_lib.views.speed.measure_language_speed`.
        labels: by budget, what it is.
    """
    fig, axes = _panels_of_moes(table)
    colours = dict(zip(labels, sns.color_palette("viridis_r", len(labels)), strict=True))
    for ax, (moe, part) in zip(axes, table.groupby("teacher", sort=False), strict=True):
        speed = speeds[speeds["teacher"] == moe].set_index("width")["speedup"]
        students = part.dropna(subset="budget")
        for budget, rows in students.groupby("budget", sort=True):
            ratios = rows.groupby("width", sort=False)["ratio"].agg(["mean", "min", "max"])
            x = ratios.index.map(speed)
            looks = {"color": colours[budget], "linewidth": 1.2}
            ax.plot(x, ratios["mean"], marker="o", markersize=3.5, label=labels[budget], **looks)
            ax.vlines(x, ratios["min"], ratios["max"], **looks)
        for width, high in students.groupby("width", sort=False)["ratio"].max().items():
            ax.annotate(width, (speed[width], high), (0, 3), textcoords="offset points", ha="center", fontsize=6)
        for model in ("dense", "dense_long", "dense_width", "dense_width_long"):
            for width, rows in part[part["model"] == model].groupby(part["width"].fillna("active")):
                look = style.look(model)
                marks = {"color": look.colour, "marker": look.marker, "linestyle": "", "markersize": 5}
                marks |= {"markerfacecolor": "white"} if model.endswith("_long") else {}
                ax.plot(speed[width], rows["ratio"].mean(), label=look.name, **marks)
                ax.vlines(speed[width], rows["ratio"].min(), rows["ratio"].max(), color=look.colour, linewidth=1)
        ax.plot(1, 1, **{**style.line_style("moe"), "linestyle": "", "markersize": 5})
        ax.axhline(1, linestyle=":", **style.GREY)
        ax.set(title=moe, xlabel="speed over the MoE")
        ax.margins(x=0.12, y=0.12)
    words = f"marks: mean over {style.seeds(table)}, bars: lowest to highest; above the marks, the width"
    return _finished(fig, axes, words)


def perplexity_by_time(table: pd.DataFrame) -> Figure:
    """:func:`perplexity_by_tokens` against the seconds of gathering and distillation together, means over seeds."""
    fig, axes = _panels_of_moes(table)
    for ax, (moe, part) in zip(axes, table.groupby("teacher", sort=False), strict=True):
        for model, rows in part.dropna(subset="budget").groupby("model", sort=False):
            mean = rows.groupby("budget")[["seconds", "ratio"]].mean()
            ax.plot(mean["seconds"], mean["ratio"], **style.line_style(model))
        _levels(ax, part)
        ax.set(title=moe, xlabel="gathering and distillation (s)", xscale="log")
        style.plain_log(ax, "x")
    return _finished(fig, axes, f"marks: mean over {style.seeds(table)}, by tokens of distillation; 1: the MoE")


def _panels_of_moes(table: pd.DataFrame) -> tuple[Figure, list[Axes]]:
    return style.panel_grid(table["teacher"].nunique(), 3, 2.6, extra=0.7)


def _levels(ax: Axes, part: pd.DataFrame) -> None:
    """The MoE's and the baselines' levels."""
    for model in style.in_order(part.loc[part["budget"].isna(), "model"]):
        values = part.loc[part["model"] == model, "ratio"]
        style.level(ax.axhline, values.mean(), model, label=style.look(model).name, linewidth=1)
        ax.axhspan(values.min(), values.max(), color=style.look(model).colour, alpha=0.1, linewidth=0)


def _finished(fig: Figure, axes: list[Axes], caption: str) -> Figure:
    for ax in axes:
        ax.set_yscale("log")
        few = ax.get_ylim()[1] > 5
        ax.yaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100] if few else [1, 1.2, 1.5, 2, 3]))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("")
    axes[0].set(ylabel="perplexity / the MoE's")
    style.legend(fig, "outside upper center", ncols=4)
    style.caption(fig, caption)
    return fig


def router_by_layer(router: pd.DataFrame, errors: pd.DataFrame) -> Figure:
    """How evenly each layer's router uses its experts, and the held-out error of read-outs against their width, a line each
    layer. Dashed: their number of experts; the mean over layers.

    ``router`` and ``errors`` are an :class:`ones_lib.checkpoints.inspection.Inspection`'s, of one MoE.
    """
    layers, looks = list(router["layer"]), {"marker": "o", "markersize": 3}
    numbers = range(1, len(layers) + 1)
    fig, (used, uneven, wide) = style.panel_grid(3, 3, 2.3)
    used.plot(numbers, router["experts"], color="0.3", linestyle="--", label="all experts")
    used.plot(numbers, router["effective_experts"], color=style.COLOURS[0], **looks)
    used.set(title="experts in use", ylabel="effective experts", ylim=(0, 1.15 * router["experts"].max()))
    used.legend()
    uneven.plot(numbers, router["gini"], color=style.COLOURS[0], **looks)
    uneven.set(title="inequality of their use", ylabel="Gini coefficient", ylim=(0, 1))
    for ax in (used, uneven):
        ax.set(xlabel="layer", xlim=(0.5, len(layers) + 0.5))
        style.whole_ranks(ax)

    colours = sns.color_palette("viridis", len(layers))
    for layer, part in errors.groupby("layer", sort=False):
        colour = colours[layers.index(layer)]
        wide.plot(part["multiple"], part["output_error"], color=colour, linewidth=1, **looks)
    mean = errors.groupby("multiple")["output_error"].mean()
    wide.plot(mean, color="black", linestyle="--", label="mean over layers", zorder=3)
    wide.axhline(1, linestyle=":", **style.GREY)
    wide.set(title="a dense network in their place", xlabel="width (experts' widths)", ylabel="relative output error")
    wide.set(xscale="log", ylim=(0, None))
    wide.set_xticks(mean.index, [str(m) for m in mean.index])
    wide.set_xticks([], minor=True)
    wide.legend(loc="lower left")
    scale = ScalarMappable(Normalize(0.5, len(layers) + 0.5), ListedColormap(colours))
    fig.colorbar(scale, ax=wide, label="layer", ticks=MaxNLocator(5, integer=True)).outline.set_visible(False)
    style.caption(fig, "right: read-out, on tokens that it was not solved on; 1: error of an output of zeros")
    return fig
