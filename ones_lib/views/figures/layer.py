"""Views of one layer's experts, for the explorer and notebook 04.

The explorer moves the rank often. With the argument ``on``, an earlier figure, a view draws anew only what depends on the
rank.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ones_lib.views.figures import style
from ones_lib.views.figures.spectra import GAUSSIAN, SIDE_NAMES, as_gaussian, varied

ERRORS = {"error": "as gathered", "rescaled": "with the best output scale"}
SPECTRUM_SCALES = {"linear": "singular value", "log": "singular value", "energy": "energy kept (%)"}
OVERLAP = {"norm": Normalize(0, 1), "cmap": "cividis"}
MOVES = "moves"  # gid of what depends on the rank


def moving_artists(fig: Figure) -> list[Artist]:
    """What depends on the rank, in the order to draw it."""
    return [a for ax in fig.axes for a in (*ax.images, *ax.patches, *ax.lines, *ax.texts) if a.get_gid() == MOVES]


def _clear(fig: Figure) -> Figure:
    """The figure without what depends on the rank."""
    for artist in moving_artists(fig):
        artist.remove()
    return fig


def expert_spectra(
    table: pd.DataFrame, scale: str = "log", rank: int | None = None, on: Figure | None = None
) -> Figure:
    """Spectra of one layer's experts, a line each, a panel each matrix. Dotted: a Gaussian matrix of the same size and norm.

    Args:
        table: a :func:`ones_lib.spectra.spectrum`; rows of the expert ``gathered`` are drawn black.
        scale: ``linear`` or ``log`` (singular values), or ``energy``.
        rank: marked by a vertical line.
        on: an earlier figure of the same experts, on which only rank and ``gathered`` are drawn anew.
    """
    own, gathered = table[table["expert"] != "gathered"], table[table["expert"] == "gathered"]
    if on is not None and scale != "energy" and gathered["singular_value"].max() > on.axes[0].get_ylim()[1]:
        on = None  # gathered would leave the panel
    fig = _expert_lines(own, scale) if on is None else _clear(on)
    for ax, matrix in zip(fig.axes, dict.fromkeys(own["matrix"]), strict=True):
        if not gathered.empty:
            black = {"color": "black", "linewidth": 1.6, "label": "gathered", "gid": MOVES}
            _plot_spectrum(ax, gathered[gathered["matrix"] == matrix], scale, **black)
        if on is None:
            _fix_limits(ax, scale, table["singular_value"].max())
        _mark_rank(ax, rank)
    if on is None:
        experts = list(dict.fromkeys(own["expert"]))
        title = None if len(experts) <= len(style.COLOURS) else f"experts {experts[0]} (dark) to {experts[-1]} (light)"
        place = "lower right" if scale == "energy" else "best"
        fig.axes[-1].legend(loc=place, ncols=2, title=title, title_fontsize=7)
    return fig


def _expert_lines(own: pd.DataFrame, scale: str) -> Figure:
    """What does not move: a line each expert, and the Gaussian matrices' mean."""
    groups, colours = list(own.groupby("matrix", sort=False)), _expert_colours(own)
    fig, axes = _row_of_panels(len(groups))
    for ax, (matrix, part) in zip(axes, groups, strict=True):
        for expert, line in part.groupby("expert", sort=False):
            label = f"expert {expert}" if len(colours) <= len(style.COLOURS) else None
            _plot_spectrum(ax, line, scale, color=colours[expert], linewidth=1.0, label=label)
        mean = as_gaussian(part).groupby("rank", as_index=False)[["singular_value", "energy"]].mean()
        _plot_spectrum(ax, mean, scale, **GAUSSIAN)
        ax.set(xlabel="rank K" if scale == "energy" else "index of singular value", title=style.MATRIX_NAMES[matrix])
        style.whole_ranks(ax)
    axes[0].set_ylabel(SPECTRUM_SCALES[scale])
    return fig


def _plot_spectrum(ax: Axes, part: pd.DataFrame, scale: str, **looks) -> None:
    values = 100 * part["energy"] if scale == "energy" else part["singular_value"].where(part["singular_value"] > 0)
    ax.plot(part["rank"], values, **looks)


def _fix_limits(ax: Axes, scale: str, largest: float) -> None:
    """Limits for everything in the panel, which stay from now on."""
    if scale == "log":
        ax.set_yscale("log")
    else:
        ax.set_ylim(0, 103 if scale == "energy" else 1.05 * largest)
    ax.autoscale_view()
    ax.autoscale(False)
    if scale == "log":
        style.plain_log(ax)


def energy_by_expert(table: pd.DataFrame, rank: int, on: Figure | None = None) -> Figure:
    """Part of each expert's squared norm that its ``rank`` leading singular triplets keep, a panel each matrix.

    ``table`` is a :func:`ones_lib.spectra.spectrum`; ``on`` as in :func:`expert_spectra`.
    """
    matrices, colours = list(dict.fromkeys(table["matrix"])), _expert_colours(table)
    fig = _energy_panels(len(matrices), list(colours)) if on is None else _clear(on)
    for ax, matrix in zip(fig.axes, matrices, strict=True):
        energy = 100 * table[(table["matrix"] == matrix) & (table["rank"] == rank)]["energy"].to_numpy()
        ax.bar(range(len(energy)), energy, color=list(colours.values()), gid=MOVES)
        ax.axhline(energy.mean(), color="0.3", linestyle="--", linewidth=0.8, gid=MOVES)
        _moving_title(ax, f"{style.MATRIX_NAMES[matrix]}, rank {rank} (dashed: mean)")
    return fig


def _energy_panels(count: int, experts: list) -> Figure:
    fig, axes = _row_of_panels(count)
    for ax in axes:
        at = range(0, len(experts), math.ceil(len(experts) / 16))
        ax.set_xticks(at, [experts[i] for i in at])
        ax.set(ylim=(0, 100), xlim=(-0.7, len(experts) - 0.3), xlabel="expert")
        ax.grid(axis="x", visible=False)
    axes[0].set_ylabel("energy kept (%)")
    return fig


def overlap_heatmap(table: pd.DataFrame, on: Figure | None = None, numbers: bool = True) -> Figure:
    """Overlap of every pair of experts' leading subspaces, a panel each matrix and side.

    ``table`` is a :func:`ones_lib.spectra.overlap` at one rank; ``on`` as in :func:`expert_spectra`. Values are written
    into the upper half for up to 8 experts, unless ``numbers`` is False, which is faster.
    """
    groups = list(table.groupby(["matrix", "side"], sort=False))
    fig = _overlap_panels(len(groups), list(dict.fromkeys(table["expert"]))) if on is None else _clear(on)
    for ax, ((matrix, side), part) in zip(fig.axes, groups, strict=False):  # the last axes are the colour bar's
        grid = part.pivot(index="expert", columns="other", values="overlap").to_numpy()
        ax.imshow(grid, interpolation="nearest", gid=MOVES, **OVERLAP)
        if numbers and len(grid) <= 8:
            for i, j in zip(*np.triu_indices(len(grid), 1), strict=True):
                number, colour = f"{grid[i, j]:.2f}".lstrip("0"), "white" if grid[i, j] < 0.6 else "black"
                ax.text(j, i, number, ha="center", va="center", fontsize=6, color=colour, gid=MOVES)
        rank, chance = part[["rank", "chance"]].iloc[0]
        _moving_title(ax, f"{matrix}: {SIDE_NAMES[side]}\nrank {rank:g} (random: {chance:.2f})")
    return fig


def _overlap_panels(count: int, experts: list) -> Figure:
    fig, axes = _row_of_panels(count)
    for ax in axes:
        at = range(0, len(experts), math.ceil(len(experts) / 8))
        ax.set_xticks(at, [experts[i] for i in at])
        ax.set_yticks(at, [experts[i] for i in at])
        ax.set_xlabel("expert")
        ax.grid(visible=False)
    axes[0].set_ylabel("expert")
    fig.colorbar(ScalarMappable(**OVERLAP), ax=axes, label="overlap", shrink=0.8)
    return fig


def output_errors(table: pd.DataFrame, rank: int | None = None, on: Figure | None = None) -> Figure:
    """Relative output error of gathered FFNs against the MoE layer on its activations, against K; a row of panels each data set.

    Left as gathered; right with the output times the number that makes the error least. ``table`` is a
    :func:`ones_lib.spectra.output_errors`, with ``data`` for several. ``on`` as in :func:`expert_spectra`.
    """
    fig = _error_curves(table if "data" in table else table.assign(data="")) if on is None else _clear(on)
    for ax in fig.axes:
        _mark_rank(ax, rank)
    return fig


def _error_curves(table: pd.DataFrame) -> Figure:
    sets = list(table.groupby("data", sort=False))
    fig, axes = style.panel_grid(2 * len(sets), 2, 1.8, extra=0.6, sharex="row")
    for left, right, (data, part) in zip(axes[::2], axes[1::2], sets, strict=True):
        for ax, (value, title) in zip((left, right), ERRORS.items(), strict=True):
            style.lines_by_model(ax, part, "rank", value, column="method")
            ax.axhline(1, **style.GREY)
            ax.set(title=f"{data}: {title}" if data else title)
            style.whole_ranks(ax)
        left.set(ylabel="relative output error", yscale="log")
        style.plain_log(left)
        right.set_ylim(min(0.9, part["rescaled"].min() - 0.02), 1.02)
    for ax in axes[-2:]:
        ax.set_xlabel("K kept of each expert")
    style.legend(fig, "outside upper center", ncols=5)
    lines = f"\nlines: mean{found}; bands: lowest to highest" if (found := varied(table, " over")) else ""
    width = "Top-KG's FFN has K neurons of each expert: an expert's width only at its default K"
    if "d_ff" in table:
        width += f"\nread-out and fit: {table['d_ff'].max():.0f} hidden units at every K"
    style.caption(fig, f"grey: zero FFN; {width}{lines}")
    return fig


def _row_of_panels(count: int) -> tuple[Figure, list[Axes]]:
    """One panel as wide as a column; more share a page's width, up to four in a row."""
    width = style.ONE_COLUMN if count == 1 else style.TWO_COLUMNS
    return style.panel_grid(count, count if count <= 4 else 3, 2.4, width=width)


def _expert_colours(table: pd.DataFrame) -> dict:
    """The experts' colours: the colour-blind-safe palette, or beyond its ten colours a scale from dark to light."""
    experts = list(dict.fromkeys(table["expert"]))
    palette = style.COLOURS if len(experts) <= len(style.COLOURS) else sns.color_palette("cividis", len(experts))
    return dict(zip(experts, palette, strict=False))


def _moving_title(ax: Axes, text: str) -> None:
    ax.text(0.5, 1.03, text, transform=ax.transAxes, ha="center", va="bottom", gid=MOVES)


def _mark_rank(ax: Axes, rank: int | None) -> None:
    if rank is not None:
        ax.axvline(rank, color="firebrick", linewidth=1, gid=MOVES)
