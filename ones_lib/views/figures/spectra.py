"""Figures of notebook 04: spectra, overlap and likeness of experts, and how gathered FFNs differ from them."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ones_lib.views.figures import style

SIDE_NAMES = {"in": "input space", "out": "output space"}  # of a matrix: rows, columns
LIKENESS = {"cosine": "as they are", "matched": "neurons matched", "chance": "matched with\nGaussian weights"}
GAUSSIAN = {"label": "Gaussian", "color": "0.45", "linestyle": ":"}


def spectra_by_data(table: pd.DataFrame) -> Figure:
    """Singular values and the energy that they keep, a column of panels each data set and matrix.

    ``table`` has :func:`ones_lib.spectra.spectrum`'s columns and ``data``, for several seeds, layers or both.
    """
    groups = list(table.groupby(["data", "matrix"], sort=False))
    fig, axes = spectra_axes(len(groups), height=3.6)
    for (top, bottom), ((data, matrix), part) in zip(axes.T, groups, strict=True):
        experts = (part, {"label": "experts", "color": style.COLOURS[0]})
        for values, looks in (experts, (as_gaussian(part), GAUSSIAN)):
            style.mean_and_range(top, values, "rank", "singular_value", **looks)
            style.mean_and_range(bottom, values.assign(energy=100 * values["energy"]), "rank", "energy", **looks)
        top.set(title=f"{data}: {matrix}")
        style.plain_log(top)
    axes[0, 0].legend(loc="lower left")
    style.caption(fig, f"lines: mean over experts{varied(table)}; bands: lowest to highest")
    return fig


def spectra_axes(columns: int, height: float) -> tuple[Figure, np.ndarray]:
    """Panels [2, columns] for singular values, on a logarithmic scale, above the energy that they keep."""
    fig, axes = plt.subplots(2, columns, figsize=(style.TWO_COLUMNS, height), sharex="col", squeeze=False)
    for top, bottom in axes.T:
        top.set(yscale="log")
        bottom.set(xlabel="rank K", ylim=(0, 103))
        style.whole_ranks(bottom)
    axes[0, 0].set_ylabel("singular value")
    axes[1, 0].set_ylabel("energy kept (%)")
    return fig, axes


def as_gaussian(part: pd.DataFrame) -> pd.DataFrame:
    """A :func:`ones_lib.spectra.spectrum` with the Gaussian matrices' singular values and energy in the experts' place."""
    keys = [c for c in ("seed", "layer", "expert") if c in part]
    squares = part["gaussian"] ** 2
    groups = squares.groupby([part[k] for k in keys])
    return part.assign(singular_value=part["gaussian"], energy=groups.cumsum() / groups.transform("sum"))


def overlap_curves(table: pd.DataFrame) -> Figure:
    """Overlap of experts' leading subspaces against their dimension, a panel each data set and matrix.

    ``table`` is an :func:`ones_lib.spectra.overlap_summary`. Dotted: random subspaces.
    """
    groups = list(table.groupby(["data", "matrix"], sort=False))
    fig, axes = style.panel_grid(len(groups), len(groups), 2.3, sharey=True)
    for ax, ((data, matrix), part) in zip(axes, groups, strict=True):
        for side, colour in zip(SIDE_NAMES, style.COLOURS, strict=False):
            line = part[part["side"] == side].set_index("rank")
            ax.plot(line["overlap"], color=colour, label=SIDE_NAMES[side])
            ax.fill_between(line.index, line["low"], line["high"], color=colour, alpha=0.15, linewidth=0)
            random = {"linestyle": ":", "linewidth": 1, "label": f"random, {SIDE_NAMES[side]}"}
            ax.plot(line["chance"], color=colour, **random)
        ax.set(xlabel="dimension K", ylim=(0, 1.03), title=f"{data}: {matrix}")
        style.whole_ranks(ax)
    axes[0].set_ylabel("overlap")
    style.legend(fig, "outside upper center", ncols=4)
    style.caption(fig, "lines: mean over pairs of experts, seeds and layers; bands: 5th to 95th percentile")
    return fig


def expert_similarity(table: pd.DataFrame) -> Figure:
    """Cosine similarity of pairs of experts before and after matching their neurons, a panel each data set.

    ``table`` has :func:`ones_lib.spectra.similarity`'s columns and ``data``.
    """
    groups = list(table.groupby("data", sort=False))
    colours = dict(zip(LIKENESS.values(), (style.COLOURS[7], style.COLOURS[0], "white"), strict=True))
    width = style.ONE_COLUMN if len(groups) == 1 else style.TWO_COLUMNS
    fig, axes = style.panel_grid(len(groups), len(groups), 1.7, width=width)
    for ax, (data, part) in zip(axes, groups, strict=True):
        values = part[list(LIKENESS)].rename(columns=LIKENESS)
        boxes = {"whis": (5, 95), "showfliers": False, "linewidth": 0.8, "width": 0.6}
        sns.boxplot(values, orient="h", palette=colours, ax=ax, **boxes)
        ax.axvline(0, **style.GREY | {"zorder": 0})
        ax.set(title=data, xlabel="cosine similarity", ylabel="", xlim=(None, 1))
    for ax in axes[1:]:
        ax.set_yticklabels([])
    style.caption(fig, f"pairs of experts{varied(table)}; boxes: quartiles; whiskers: 5th to 95th percentile")
    return fig


def gathered_distances(table: pd.DataFrame) -> Figure:
    """Distance and cosine similarity of gathered matrices from the experts against K, a column of panels each data set and
    matrix.

    ``table`` has :func:`ones_lib.spectra.gathered_distances`' columns and ``data, method, rank`` (NaN: the method has none).
    """
    table = table.assign(target=table["target"].str.replace(r"^expert \d+$", "experts", regex=True))
    groups = list(table.groupby(["data", "matrix"], sort=False))
    dashes = dict(zip(dict.fromkeys(table["target"]), ("-", (0, (3, 2))), strict=False))
    size = (style.TWO_COLUMNS, 3.8)
    fig, axes = plt.subplots(2, len(groups), figsize=size, sharex="col", sharey="row", squeeze=False)
    for (top, bottom), ((data, matrix), part) in zip(axes.T, groups, strict=True):
        for (method, target), values in part.groupby(["method", "target"], sort=False):
            values, looks = _at_every_rank(values, part["rank"]), style.line_style(method)
            looks |= {"marker": "", "linestyle": dashes[target], "label": f"{looks['label']}, from the {target}"}
            style.mean_and_range(top, values, "rank", "distance", **looks)
            style.mean_and_range(bottom, values, "rank", "cosine", **looks)
        top.set_title(f"{data}: {matrix}")
        top.axhline(1, **style.GREY)
        bottom.set(xlabel="SVD-KG's K", ylim=(0, 1.03))
        style.whole_ranks(bottom)
    axes[0, 0].set_yscale("log")
    for ax in axes[0]:
        style.plain_log(ax)
    axes[0, 0].set_ylabel("relative distance")
    axes[1, 0].set_ylabel("cosine similarity")
    style.legend(fig, "outside upper center", ncols=2)
    style.caption(fig, f"distance 1: a matrix of zeros; lines: mean{varied(table, ' over')}; bands: lowest to highest")
    return fig


def _at_every_rank(part: pd.DataFrame, ranks: pd.Series) -> pd.DataFrame:
    """Rows of a method without a rank, at the lowest and the highest rank: a level line."""
    if part["rank"].notna().any():
        return part
    return pd.concat([part.assign(rank=ranks.min()), part.assign(rank=ranks.max())])


def varied(table: pd.DataFrame, word: str = ",") -> str:
    """For a caption, the numbers of seeds and layers where there are several: ", 3 seeds"."""
    parts = []
    for column in [c for c in ("seed", "layer") if c in table]:
        counts = table.groupby("data")[column].nunique()
        if counts.max() > 1:
            parts.append(" or ".join(str(n) for n in sorted(counts.unique(), reverse=True)) + f" {column}s")
    return f"{word} {' and '.join(parts)}" if parts else ""
