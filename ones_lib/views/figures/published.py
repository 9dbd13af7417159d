"""Figures of notebook 06: a causal MoE as published, made dense and distilled."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ones_lib.views.figures import style
from ones_lib.views.figures.spectra import GAUSSIAN, as_gaussian, spectra_axes


def perplexity_by_tokens(table: pd.DataFrame, tokens_per_step: int) -> Figure:
    """Perplexity of students against the number of tokens they were distilled on, a line each; the MoE and the dense baselines
    as levels. The right panel leaves out the students right after gathering.

    ``table`` is a :func:`ones_lib.study.tables.results_table` of losses with a column ``budget`` in steps, empty for the MoE and
    the baselines.
    """
    table = table.assign(perplexity=np.exp(table["value"]))
    trained, students = table[table["budget"].isna()], table.dropna(subset="budget")
    budgets = sorted(students["budget"].unique())
    fig, axes = style.panel_grid(2, 2, 3.3)
    for ax, shown in zip(axes, (budgets, budgets[1:]), strict=True):
        drawn = students[students["budget"].isin(shown)]
        drawn = drawn.assign(place=drawn["budget"].map(budgets.index))
        style.lines_by_model(ax, drawn, "place", "perplexity")
        for name in style.in_order(trained["model"]):
            values = trained.loc[trained["model"] == name, "perplexity"]
            style.level(ax.axhline, values.mean(), name, label=style.look(name).name, linewidth=1)
            ax.axhspan(values.min(), values.max(), color=style.look(name).colour, alpha=0.1, linewidth=0)
        ax.set_xticks([budgets.index(b) for b in shown], [f"{int(b * tokens_per_step):,}" for b in shown])
        ax.set(yscale="log", xlabel="tokens distilled on")
        style.plain_log(ax)
    axes[0].set(ylabel="validation perplexity", title="right after gathering and distilled")
    axes[1].set(title="distilled")
    style.legend(fig)
    style.caption(fig, f"lines: mean over {style.seeds(table)}; bands: lowest to highest")
    return fig


def spectra_by_layer(table: pd.DataFrame) -> Figure:
    """Singular values of the experts' matrices and the energy that they keep, a line each layer (mean over its experts), a
    column of panels each matrix. Dotted: a Gaussian matrix.

    ``table`` is a :func:`ones_lib.spectra.spectrum` with a column ``layer``, ordered from the first layer to the last.
    """
    layers, groups = list(dict.fromkeys(table["layer"])), list(table.groupby("matrix", sort=False))
    colours = dict(zip(layers, sns.color_palette("viridis", len(layers)), strict=True))
    fig, axes = spectra_axes(len(groups), height=4.0)
    for (top, bottom), (matrix, of_matrix) in zip(axes.T, groups, strict=True):
        lines = [(of_matrix[of_matrix["layer"] == name], {"color": colours[name], "label": name}) for name in layers]
        for part, looks in [*lines, (as_gaussian(of_matrix), GAUSSIAN | {"label": "Gaussian (mean over layers)"})]:
            means = part.groupby("rank")[["singular_value", "energy"]].mean()
            top.plot(means["singular_value"], **looks)
            bottom.plot(100 * means["energy"], **looks)
        top.set(title=style.MATRIX_NAMES[matrix])
        style.plain_log(top)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    chosen = [*range(0, len(layers), -(-len(layers) // 12)), len(layers)]  # up to 12 of the layers, to be legible
    fig.legend([handles[i] for i in chosen], [labels[i] for i in chosen], loc="outside right center")
    return fig


def errors_by_layer(table: pd.DataFrame) -> Figure:
    """Output error of the gathered FFNs against the MoE layers', layer by layer, a line each model.

    ``table`` is a :func:`ones_lib.study.tables.conversion_table`.
    """
    fig, ax = plt.subplots(figsize=(style.TWO_COLUMNS, 2.8))
    style.lines_by_model(ax, table, "layer", "output_error")
    ax.axhline(1, linestyle=":", **style.GREY)
    ax.set(xlabel="layer", ylabel="relative output error", ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    style.legend(fig)
    style.caption(
        fig, f"lines: mean over {style.seeds(table)}; bands: lowest to highest; 1: error of an output of zeros"
    )
    return fig
