"""TODO."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ones_lib.views.figures.spectra import _NOISE, _as_gaussian
from ones_lib.views.figures.style import (
    CONTROLS,
    DASHES,
    MATRIX_NAMES,
    NAMES,
    PALETTE,
    TWO_COLUMNS,
    _legend_of_all,
    _mean_and_range,
    _method_style,
    _plain_log,
    _whole_ranks,
)


def perplexity_by_tokens(table: pd.DataFrame, tokens_per_step: int) -> Figure:
    """Perplexity of students against the tokens that they were distilled on, a line each; the MoE and the dense baselines as
    lines across. Right the same without what is right after gathering. Bands reach from the lowest to the highest seed.

    ``table`` is a :func:`ones_lib.study.tables.results_table` of losses with a column ``budget``, in steps.
    """
    table = table.assign(perplexity=np.exp(table["value"]))
    students = table.dropna(subset="budget")
    budgets = sorted(students["budget"].unique())
    fig, axes = plt.subplots(1, 2, figsize=(TWO_COLUMNS, 3.3))
    for ax, shown in zip(axes, (budgets, budgets[1:]), strict=True):
        for name in dict.fromkeys(students["model"]):
            part = students[(students["model"] == name) & students["budget"].isin(shown)]
            part = part.assign(place=part["budget"].map(budgets.index))
            dashes = "--" if name in CONTROLS else "-"
            _mean_and_range(ax, part, "place", "perplexity", linestyle=dashes, **_method_style(name))
        for name, dashes in DASHES.items():
            values = table.loc[(table["model"] == name) & table["budget"].isna(), "perplexity"]
            style = {"color": PALETTE[name], "linestyle": dashes, "linewidth": 1}
            ax.axhline(values.mean(), label=NAMES[name].replace("\n", " "), **style)
            ax.axhspan(values.min(), values.max(), color=PALETTE[name], alpha=0.1, linewidth=0)
        ax.set_xticks([budgets.index(b) for b in shown], [f"{int(b * tokens_per_step):,}" for b in shown])
        ax.set(yscale="log", xlabel="tokens distilled on")
        _plain_log(ax)
    axes[0].set(ylabel="validation perplexity", title="from right after gathering on")
    axes[1].set(title="distilled")
    _legend_of_all(fig)
    fig.supxlabel(f"lines: mean over {table['seed'].nunique()} seeds, bands: lowest to highest", fontsize=7)
    return fig


def spectra_by_layer(table: pd.DataFrame) -> Figure:
    """Singular values of the experts' matrices and the energy that they keep, a line a layer (the mean over its experts), a
    column each matrix; dotted: a Gaussian matrix.

    ``table`` is a :func:`ones_lib.spectra.spectrum` with a column ``layer``, in which layers stand from the first to the last.
    """
    layers, matrices = (list(dict.fromkeys(table[column])) for column in ("layer", "matrix"))
    colours = dict(zip(layers, sns.color_palette("viridis", len(layers)), strict=True))
    fig, axes = plt.subplots(2, len(matrices), figsize=(TWO_COLUMNS, 4.0), sharex="col", squeeze=False)
    for (top, bottom), matrix in zip(axes.T, matrices, strict=True):
        of_matrix = table[table["matrix"] == matrix]
        lines = [(of_matrix[of_matrix["layer"] == name], {"color": colours[name], "label": name}) for name in layers]
        for part, style in [*lines, (_as_gaussian(of_matrix), {"label": "Gaussian, mean of layers", **_NOISE})]:
            means = part.groupby("rank")[["singular_value", "energy"]].mean()
            top.plot(means.index, means["singular_value"], **style)
            bottom.plot(means.index, 100 * means["energy"], **style)
        top.set(title=MATRIX_NAMES[matrix], yscale="log")
        _plain_log(top)
        bottom.set(xlabel="rank K", ylim=(0, 103))
        _whole_ranks(bottom)
    axes[0, 0].set_ylabel("singular value")
    axes[1, 0].set_ylabel("energy kept (%)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    chosen = [*range(0, len(layers), -(-len(layers) // 12)), len(layers)]  # of many layers some, to be legible
    fig.legend([handles[i] for i in chosen], [labels[i] for i in chosen], loc="outside right center")
    return fig


def errors_by_layer(table: pd.DataFrame) -> Figure:
    """Output error of the gathered networks against the MoE's, layer by layer, a line each model; bands reach from the lowest to
    the highest seed.

    ``table`` is a :func:`ones_lib.study.tables.conversion_table`.
    """
    fig, ax = plt.subplots(figsize=(TWO_COLUMNS, 2.8))
    for name in dict.fromkeys(table["model"]):
        _mean_and_range(ax, table[table["model"] == name], "layer", "output_error", **_method_style(name))
    ax.axhline(1, color="0.45", linestyle=":", linewidth=0.8, zorder=1.6)
    ax.set(xlabel="layer", ylabel="relative output error", ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_of_all(fig)
    text = f"lines: mean over {table['seed'].nunique()} seeds, bands: lowest to highest; 1: as far off as an output of zero"
    fig.supxlabel(text, fontsize=7)
    return fig
