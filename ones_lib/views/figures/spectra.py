"""TODO."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ones_lib.views.figures.style import (
    _COLOURS,
    CONTROLS,
    MATRIX_NAMES,
    ONE_COLUMN,
    TWO_COLUMNS,
    _mean_and_range,
    _method_style,
    _plain_log,
    _whole_ranks,
)

SIDE_NAMES = {"in": "space read from", "out": "space written to"}
MOVES = "moves"  # gid of what depends on the rank in the views of one layer: what their argument `on` draws anew


# --- experts: tables of ones_lib.spectra -----------------------------------------------------------------------------

SPECTRUM_SCALES = {"linear": "singular value", "log": "singular value", "energy": "energy kept (%)"}


def expert_spectra(
    table: pd.DataFrame, scale: str = "log", rank: int | None = None, on: Figure | None = None
) -> Figure:
    """Spectra of one layer's experts, a line each, a panel each matrix: ``scale`` is ``linear``, ``log`` or ``energy``.

    ``table`` is a :func:`ones_lib.spectra.spectrum`; rows with the expert ``gathered`` are drawn black. Dotted: a Gaussian
    matrix of the same size and norm. ``rank`` is marked. With ``on``, a figure of the same experts, only rank and gathered
    are drawn anew.
    """
    own, gathered = table[table["expert"] != "gathered"], table[table["expert"] == "gathered"]
    matrices, experts = (list(dict.fromkeys(own[column])) for column in ("matrix", "expert"))
    colours = _expert_colours(experts)
    if on is not None and scale != "energy" and gathered["singular_value"].max() > on.axes[0].get_ylim()[1]:
        on = None  # gathered would leave the panel
    fig, axes = _row_of_panels(len(matrices)) if on is None else _cleared(on)
    for ax, matrix in zip(axes, matrices, strict=True):
        if on is None:
            for expert in experts:
                part = own[(own["matrix"] == matrix) & (own["expert"] == expert)]
                label = f"expert {expert}" if len(experts) <= len(_COLOURS) else None
                _spectrum(ax, part, scale, color=colours[expert], linewidth=1.0, label=label)
            _gaussian(ax, own[own["matrix"] == matrix], scale)
            ax.set(xlabel="rank K" if scale == "energy" else "index of singular value", title=MATRIX_NAMES[matrix])
            _whole_ranks(ax)
            if scale == "log":
                ax.set_yscale("log")
            else:
                ax.set_ylim(0, 103 if scale == "energy" else 1.05 * table["singular_value"].max())
        if not gathered.empty:
            part = gathered[gathered["matrix"] == matrix]
            _spectrum(ax, part, scale, color="black", linewidth=1.6, label="gathered", gid=MOVES)
        if on is None:
            ax.autoscale_view()  # with what moves in it; from now on the limits stay
            ax.autoscale(False)
            if scale == "log":
                _plain_log(ax)
        _mark_rank(ax, rank)
    if on is None:
        axes[0].set_ylabel(SPECTRUM_SCALES[scale])
        title = None if len(experts) <= len(_COLOURS) else f"experts {experts[0]} (dark) to {experts[-1]} (light)"
        axes[-1].legend(loc="lower right" if scale == "energy" else "best", ncols=2, title=title, title_fontsize=7)
    return fig


def spectra_by_data(table: pd.DataFrame) -> Figure:
    """Singular values and the energy that they keep, a column each data set and matrix.

    ``table`` has :func:`ones_lib.spectra.spectrum`'s columns and ``data``, for several seeds, layers or both. Lines are means over
    experts, seeds and layers, bands reach from the lowest to the highest.
    """
    groups = list(table.groupby(["data", "matrix"], sort=False))
    fig, axes = plt.subplots(2, len(groups), figsize=(TWO_COLUMNS, 3.6), sharex="col", squeeze=False)
    for column, ((data, matrix), part) in zip(axes.T, groups, strict=True):
        for values, style in (
            (part, {"label": "experts", "color": _COLOURS[0]}),
            (_as_gaussian(part), {"label": "Gaussian", **_NOISE}),
        ):
            _mean_and_range(column[0], values, "rank", "singular_value", **style)
            _mean_and_range(column[1], values.assign(energy=100 * values["energy"]), "rank", "energy", **style)
        column[0].set(title=f"{data}: {matrix}", yscale="log")
        _plain_log(column[0])
        column[1].set(xlabel="rank K", ylim=(0, 103))
        _whole_ranks(column[1])
    axes[0, 0].set_ylabel("singular value")
    axes[1, 0].set_ylabel("energy kept (%)")
    axes[0, 0].legend(loc="lower left")
    fig.supxlabel(f"lines: mean over experts{_varied(table)}; bands: lowest to highest", fontsize=7)
    return fig


def energy_by_expert(table: pd.DataFrame, rank: int, on: Figure | None = None) -> Figure:
    """Part of each expert's squared norm that its ``rank`` leading singular triplets keep, a panel each matrix.

    ``table`` is a :func:`ones_lib.spectra.spectrum`; ``on`` as in :func:`expert_spectra`.
    """
    matrices, experts = (list(dict.fromkeys(table[column])) for column in ("matrix", "expert"))
    colours = list(_expert_colours(experts).values())
    fig, axes = _row_of_panels(len(matrices)) if on is None else _cleared(on)
    for ax, matrix in zip(axes, matrices, strict=True):
        energy = 100 * table[(table["matrix"] == matrix) & (table["rank"] == rank)]["energy"].to_numpy()
        if on is None:
            at = range(0, len(experts), math.ceil(len(experts) / 16))
            ax.set_xticks(at, [experts[i] for i in at])
            ax.set(ylim=(0, 100), xlim=(-0.7, len(experts) - 0.3), xlabel="expert")
            ax.grid(axis="x", visible=False)
        ax.bar(range(len(experts)), energy, color=colours, gid=MOVES)
        ax.axhline(energy.mean(), color="0.3", linestyle="--", linewidth=0.8, gid=MOVES)
        _moving_title(ax, f"{MATRIX_NAMES[matrix]}, rank {rank} (dashed: mean)")
    if on is None:
        axes[0].set_ylabel("energy kept (%)")
    return fig


def overlap_heatmap(table: pd.DataFrame, on: Figure | None = None, numbers: bool = True) -> Figure:
    """Overlap of every pair of experts' leading subspaces, a panel each matrix and side.

    ``table`` is a :func:`ones_lib.spectra.overlap` at one rank; ``on`` as in :func:`expert_spectra`. Values are written
    into the upper half for up to 8 experts, unless ``numbers`` is False, which is faster.
    """
    keys = list(dict.fromkeys(zip(table["matrix"], table["side"], strict=True)))
    fig, axes = _row_of_panels(len(keys), height=2.4) if on is None else _cleared(on)
    for ax, (matrix, side) in zip(axes, keys, strict=False):  # a figure has one more, the colour bar's
        part = table[(table["matrix"] == matrix) & (table["side"] == side)]
        grid = part.pivot(index="expert", columns="other", values="overlap")
        ax.imshow(grid, norm=_PART, cmap="cividis", interpolation="nearest", gid=MOVES)
        for (i, j), value in np.ndenumerate(grid.to_numpy()):
            if numbers and len(grid) <= 8 and i < j:  # it is symmetric
                style = {"ha": "center", "va": "center", "fontsize": 6, "color": "white" if value < 0.6 else "black"}
                ax.text(j, i, f"{value:.2f}".lstrip("0"), gid=MOVES, **style)
        _moving_title(
            ax, f"{matrix}: {SIDE_NAMES[side]}\nrank {part['rank'].iloc[0]} (random: {part['chance'].iloc[0]:.2f})"
        )
        if on is None:
            at = range(0, len(grid), math.ceil(len(grid) / 8))
            ax.set_xticks(at, grid.columns[list(at)])
            ax.set_yticks(at, grid.index[list(at)])
            ax.set_xlabel("expert")
            ax.grid(visible=False)
    if on is None:
        axes[0].set_ylabel("expert")
        fig.colorbar(ScalarMappable(_PART, "cividis"), ax=axes, label="overlap", shrink=0.8)
    return fig


def overlap_curves(table: pd.DataFrame) -> Figure:
    """Overlap of experts' leading subspaces against their dimension, a panel each data set and matrix.

    ``table`` is an :func:`ones_lib.spectra.overlap_summary`. Lines are means over pairs, seeds and layers, bands reach from the 5th
    to the 95th percentile; dotted: random subspaces.
    """
    groups = list(table.groupby(["data", "matrix"], sort=False))
    fig, axes = plt.subplots(1, len(groups), figsize=(TWO_COLUMNS, 2.3), sharey=True, squeeze=False)
    for ax, ((data, matrix), part) in zip(axes[0], groups, strict=True):
        for side, colour in zip(SIDE_NAMES, _COLOURS, strict=False):
            line = part[part["side"] == side]
            ax.plot(line["rank"], line["overlap"], color=colour, label=SIDE_NAMES[side])
            ax.fill_between(line["rank"], line["low"], line["high"], color=colour, alpha=0.15, linewidth=0)
            ax.plot(
                line["rank"],
                line["chance"],
                color=colour,
                linestyle=":",
                linewidth=1,
                label=f"random, {SIDE_NAMES[side]}",
            )
        ax.set(xlabel="dimension K", ylim=(0, 1.03), title=f"{data}: {matrix}")
        _whole_ranks(ax)
    axes[0, 0].set_ylabel("overlap")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    fig.supxlabel(
        "lines: mean over pairs of experts of all seeds and layers; bands: 5th to 95th percentile", fontsize=7
    )
    return fig


LIKENESS = {"cosine": "as they are", "matched": "neurons matched", "chance": "matched with\nGaussian weights"}


def expert_similarity(table: pd.DataFrame) -> Figure:
    """Cosine similarity of pairs of experts, before and after matching, a panel each data set.

    ``table`` has :func:`ones_lib.spectra.similarity`'s columns and ``data``. Boxes are quartiles, whiskers go from the 5th to
    the 95th percentile.
    """
    sets = list(dict.fromkeys(table["data"]))
    fig, axes = plt.subplots(1, len(sets), figsize=(TWO_COLUMNS if len(sets) > 1 else ONE_COLUMN, 1.7), squeeze=False)
    for ax, data in zip(axes[0], sets, strict=True):
        values = table[table["data"] == data][list(LIKENESS)].rename(columns=LIKENESS)
        colours = dict(zip(LIKENESS.values(), (_COLOURS[7], _COLOURS[0], "white"), strict=True))
        sns.boxplot(
            values, orient="h", whis=(5, 95), showfliers=False, palette=colours, linewidth=0.8, width=0.6, ax=ax
        )
        ax.axvline(0, color="0.45", linewidth=0.8, zorder=0)
        ax.set(title=data, xlabel="cosine similarity", ylabel="", xlim=(None, 1))
    for ax in axes[0, 1:]:
        ax.set_yticklabels([])
    fig.supxlabel(f"pairs of experts{_varied(table)}: quartiles; whiskers: 5th to 95th percentile", fontsize=7)
    return fig


def gathered_distances(table: pd.DataFrame) -> Figure:
    """Distance and cosine of gathered matrices from the experts against K, a column each data set and matrix.

    ``table`` has :func:`ones_lib.spectra.gathered_distances`' columns and ``data, method, rank`` (NaN: the method has none). Lines
    are means, bands reach from the lowest to the highest.
    """
    table = table.assign(target=table["target"].str.replace(r"^expert \d+$", "experts", regex=True))
    groups = list(table.groupby(["data", "matrix"], sort=False))
    targets, methods = (list(dict.fromkeys(table[column])) for column in ("target", "method"))
    fig, axes = plt.subplots(2, len(groups), figsize=(TWO_COLUMNS, 3.8), sharex="col", sharey="row", squeeze=False)
    for column, ((data, matrix), part) in zip(axes.T, groups, strict=True):
        for ax, value in zip(column, ("distance", "cosine"), strict=True):
            for method in methods:
                for target, dashes in zip(targets, ("-", (0, (3, 2))), strict=False):
                    values = _at_every_rank(part[(part["method"] == method) & (part["target"] == target)], part["rank"])
                    style = _method_style(method)
                    style |= {"marker": "", "linestyle": dashes, "label": f"{style['label']}, from the {target}"}
                    _mean_and_range(ax, values, "rank", value, **style)
        column[0].set_title(f"{data}: {matrix}")
        column[0].axhline(1, color="0.45", linewidth=0.8, zorder=1.6)
        column[1].set(xlabel="SVD-KG's K", ylim=(0, 1.03))
        _whole_ranks(column[1])
    axes[0, 0].set_yscale("log")
    for ax in axes[0]:
        _plain_log(ax)
    axes[0, 0].set_ylabel("relative distance")
    axes[1, 0].set_ylabel("cosine similarity")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    text = f"distance 1: a matrix of zeros; lines: mean{_varied(table, ' over')}; bands: lowest to highest"
    fig.supxlabel(text, fontsize=7)
    return fig


def output_errors(table: pd.DataFrame, rank: int | None = None, on: Figure | None = None) -> Figure:
    """Relative error of gathered FFNs' output against the MoE layer's on activations, against K; a row each data set.

    ``table`` is a :func:`ones_lib.spectra.output_errors`, with ``data`` for several. Left as gathered, right with the output
    times the number that is best. Lines are means, bands reach from the lowest to the highest seed or layer. ``on`` as in
    :func:`expert_spectra`.
    """
    if on is not None:
        for ax in _cleared(on)[1]:
            _mark_rank(ax, rank)
        return on
    table = table if "data" in table else table.assign(data="")
    sets = list(dict.fromkeys(table["data"]))
    fig, axes = plt.subplots(len(sets), 2, figsize=(TWO_COLUMNS, 0.6 + 1.8 * len(sets)), sharex="row", squeeze=False)
    for row, data in zip(axes, sets, strict=True):
        part = table[table["data"] == data]
        for ax, value in zip(row, ("error", "rescaled"), strict=True):
            for method, values in part.groupby("method", sort=False):
                dashes = "--" if method in CONTROLS else "-"
                _mean_and_range(ax, values, "rank", value, linestyle=dashes, **_method_style(method))
            ax.axhline(1, color="0.45", linewidth=0.8, zorder=1.6)
            ax.set(title=f"{data}: {ERRORS[value]}" if data else ERRORS[value])
            _mark_rank(ax, rank)
        row[0].set(ylabel="relative output error", yscale="log")
        _plain_log(row[0])
        row[1].set_ylim(min(0.9, part["rescaled"].min() - 0.02), 1.02)
    for ax in axes.flat:
        _whole_ranks(ax)
    for ax in axes[-1]:
        ax.set_xlabel("K kept of each expert")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    text = (
        "grey: an FFN of zeros; Top-KG's FFN has K neurons of each expert, and so an expert's width at its default only"
    )
    if varied := _varied(table, " over"):
        text += f"\nlines: mean{varied}; bands: lowest to highest"
    fig.supxlabel(text, fontsize=7)
    return fig


ERRORS = {"error": "as gathered", "rescaled": "output rescaled by the best number"}
_NOISE = {"color": "0.45", "linestyle": ":"}
_PART = Normalize(0, 1)


def _cleared(fig: Figure) -> tuple[Figure, list[Axes]]:
    """A figure without what depends on the rank, and its axes."""
    for artist in moving_artists(fig):
        artist.remove()
    return fig, fig.axes


def moving_artists(fig: Figure) -> list[Artist]:
    """What depends on the rank in a view of one layer, in the order to draw it."""
    return [a for ax in fig.axes for a in (*ax.images, *ax.patches, *ax.lines, *ax.texts) if a.get_gid() == MOVES]


def _moving_title(ax: Axes, text: str) -> None:
    ax.text(0.5, 1.03, text, transform=ax.transAxes, ha="center", va="bottom", gid=MOVES)


def _row_of_panels(count: int, height: float = 2.4) -> tuple[Figure, list[Axes]]:
    """One panel as wide as a column; more share a page's width, up to four in a row of ``height`` inches."""
    columns = count if count <= 4 else 3
    rows = math.ceil(count / columns)
    size = (ONE_COLUMN if count == 1 else TWO_COLUMNS, rows * height)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax in axes.flat[count:]:
        ax.remove()
    return fig, list(axes.flat[:count])


def _expert_colours(experts: list) -> dict:
    """The colour-blind-safe palette, or beyond its ten colours a scale from dark to light."""
    palette = _COLOURS if len(experts) <= len(_COLOURS) else sns.color_palette("cividis", len(experts))
    return dict(zip(experts, palette, strict=False))


def _spectrum(ax: Axes, part: pd.DataFrame, scale: str, **style) -> None:
    values = 100 * part["energy"] if scale == "energy" else part["singular_value"].where(part["singular_value"] > 0)
    ax.plot(part["rank"], values, **style)


def _gaussian(ax: Axes, part: pd.DataFrame, scale: str) -> None:
    mean = _as_gaussian(part).groupby("rank", as_index=False)[["singular_value", "energy"]].mean()
    _spectrum(ax, mean, scale, label="Gaussian", **_NOISE)


def _as_gaussian(part: pd.DataFrame) -> pd.DataFrame:
    """Spectra of the Gaussian matrices beside whole spectra of experts, and the energy that they keep."""
    keys = [c for c in ("seed", "layer", "expert") if c in part]
    squares = part["gaussian"] ** 2
    groups = squares.groupby([part[k] for k in keys])
    return part.assign(singular_value=part["gaussian"], energy=groups.cumsum() / groups.transform("sum"))


def _at_every_rank(part: pd.DataFrame, ranks: pd.Series) -> pd.DataFrame:
    """Rows without a rank stand at the lowest and the highest: a level line."""
    if part["rank"].notna().any():
        return part
    return pd.concat([part.assign(rank=ranks.min()), part.assign(rank=ranks.max())])


def _varied(table: pd.DataFrame, word: str = ",") -> str:
    """What there is more than one of, for a caption: ", 3 seeds"."""
    parts = []
    for column in ("seed", "layer"):
        counts = table.groupby("data")[column].nunique() if {"data", column} <= set(table) else pd.Series([1])
        if counts.max() > 1:
            parts.append(" or ".join(str(n) for n in sorted(counts.unique(), reverse=True)) + f" {column}s")
    return f"{word} {' and '.join(parts)}" if parts else ""


def _mark_rank(ax: Axes, rank: int | None) -> None:
    if rank is not None:
        ax.axvline(rank, color="firebrick", linewidth=1, gid=MOVES)
