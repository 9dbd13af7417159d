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
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch.utils.data import DataLoader

from ones_lib.data import ImageData
from ones_lib.files import write_text, written_beside
from ones_lib.gathering import gathering_methods
from ones_lib.metrics import LOWER_IS_BETTER, main_metric
from ones_lib.records import project_root

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
    "matched_average": "matched averaging",
    "contribution_topk": "Top-KG by contribution",
    "whitened_svd": "whitened SVD-KG",
    "readout": "read-out",
    "fit": "layer-wise fit",
    "joint_fit": "joint fit",
    "frequency_average": "averaging by frequency",
    "topk_wide": "Top-KG, wider",
    "svd_raw": "SVD-KG, raw scale",
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
METHODS = ["sum", "average", "topk", "svd"]  # the paper's
CALIBRATED = [
    "matched_average",
    "contribution_topk",
    "whitened_svd",
    "readout",
    "fit",
    "joint_fit",
]  # those that look at data
CONTROLS = ["shared_kd", "zero_ffn", "one_expert"]
_COLOURS = sns.color_palette("colorblind")
PALETTE = dict(zip([*METHODS, *CONTROLS, "dense_kd"], [_COLOURS[i] for i in (3, 0, 2, 1, 7, 5, 4, 9)], strict=True))
PALETTE |= dict(zip(CALIBRATED, ["#5fa8d3", "#6fcf97", "#f2b880", "#1b7f79", "#d63fa5", "#4a0d67"], strict=True))
PALETTE |= {"moe": "black", "dense": "0.45", "dense_long": "0.45"}
PALETTE |= {"frequency_average": "#8fa3c9", "topk_wide": "#0b5d1e", "svd_raw": "#a6761d"}
MARKERS = dict(zip(PALETTE, "oosDv^<PosDhp*XXX<>d", strict=True))


def _add_other_methods() -> None:
    """Gatherings that have been registered and are not in the tables above get a name, a colour and a mark too, after them."""
    others = [method for method in gathering_methods() if method not in NAMES]
    for method, colour in zip(others, sns.husl_palette(len(others)) if others else [], strict=True):
        NAMES[method], PALETTE[method], MARKERS[method] = method.replace("_", " "), colour, "o"


_add_other_methods()
MATRIX_NAMES = {"up": "up projection", "gate": "gate projection", "down": "down projection"}
SIDE_NAMES = {"in": "space read from", "out": "space written to"}
MOVES = "moves"  # gid of what depends on the rank in the views of one layer: what their argument `on` draws anew
DASHES = {"moe": "-", "dense": "--", "dense_long": ":", "dense_kd": "-."}


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
        style = {"color": PALETTE[model], "linestyle": DASHES.get(model, "-")}
        _mean_and_range(ax, group, "step", "value", label=NAMES[model].replace("\n", " "), **style)
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
    texts = {"trained": "trained", "gathered": "gathered, before KD", "distilled": "distilled"}
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
    found = list(dict.fromkeys(rows["model"]))
    order = [*(m for m in NAMES if m in found), *(m for m in found if m not in NAMES)]
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
            style, bounded = _method_style(model), math.isfinite(row["low"])
            if bounded:
                ax.plot([100 * row["low"], 100 * row["high"]], [i, i], color=style["color"], linewidth=1.5)
            fill = {} if bounded else {"markerfacecolor": "white"}
            ax.plot(100 * row["retention"], i, style["marker"], color=style["color"], markersize=5, **fill)
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
            control = model in (*CONTROLS, "dense_kd")
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

    ``table`` is a :func:`ones_lib.tables.ablation_table`; ``references`` a :func:`ones_lib.tables.results_table` of MoE and dense.
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

    ``table`` is a :func:`ones_lib.tables.ablation_table`; methods with one budget alone are left out.
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

    ``table`` is a :func:`ones_lib.tables.ablation_table`, ``correlations`` of :func:`ones_lib.tables.error_correlations`.
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


def distillation_gains(results: pd.DataFrame) -> Figure:
    """What each addition to the loss gains over the first loss, in points of accuracy: strokes are seeds, each against its own
    student of the first loss, marks their mean.

    ``results`` is a :func:`ones_lib.tables.results_table` of :meth:`ones_lib.study.Study.distillation_entries`.
    """
    students = (
        results[results["stage"] == "distilled"]
        .set_index(["model", "seed", "loss"])["value"]
        .unstack("loss", sort=False)
    )
    first, *others = students.columns
    gains = students[others].sub(students[first], axis=0)
    methods = list(dict.fromkeys(gains.index.get_level_values("model")))
    fig, ax = plt.subplots(figsize=(ONE_COLUMN, 0.6 + 0.3 * len(others) * max(1, len(methods) / 2)))
    for i, method in enumerate(methods):
        style = _method_style(method)
        for row, loss in enumerate(others):
            values, at = gains.loc[method, loss], row + (i - (len(methods) - 1) / 2) * 0.3
            ax.plot(values, [at] * len(values), "|", color=style["color"], markersize=7, alpha=0.8)
            label = f"from {style['label']}" if row == 0 else None
            ax.plot(values.mean(), at, style["marker"], color=style["color"], markersize=4.5, label=label)
    ax.axvline(0, color="0.45", linewidth=0.8, zorder=1.6)
    ax.set_yticks(range(len(others)), others)
    ax.set_ylim(len(others) - 0.5, -0.5)
    ax.set(xlabel=f"gain over {first} alone (points of accuracy)")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    fig.supxlabel(f"strokes: {results['seed'].nunique()} seeds, each against its own; marks: their mean", fontsize=7)
    return fig


def _legend_of_all(fig: Figure) -> None:
    """One legend, right of the panels, of what any of them draws."""
    handles = {}
    for ax in fig.axes:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    fig.legend(handles.values(), handles, loc="outside right center")


def variant_labels(table: pd.DataFrame) -> list[str]:
    """:func:`variant_label` of every row."""
    return [variant_label(*row) for row in table[["method", "scale", "rank"]].itertuples(index=False)]


def _seed_counts(table: pd.DataFrame) -> str:
    counts = table.groupby("data", sort=False)["seed"].nunique()
    return " and ".join(str(n) for n in dict.fromkeys(counts))


DISPATCHES = {"moe": "this library's MoE", "moe_plain": "loop over experts", "moe_gshard": "one-hot products (GShard)"}
WAYS = {
    "ours": "this library",
    "loop": "plain loop",
    "one_hot": "one-hot products (GShard)",
    "eager": "transformers, eager",
    "batched_mm": "transformers, batched_mm",
    "grouped_mm": "transformers, grouped_mm",
}


def inference_speed(table: pd.DataFrame) -> Figure:
    """How many times as long an MoE takes as its dense student, by batch size; a panel each model and precision.

    ``table`` is of :func:`ones_lib.speed.measure_speed`. Bars reach from the lower quartile of the MoE's times over the dense
    model's upper one to the reverse; dotted: the ratio of the arithmetic; cross: that of the weights read, at the smallest
    batch.
    """
    keys = ["model", "precision", "device", "threads"]
    panels = list(table.groupby(keys, sort=False))
    rows = math.ceil(len(panels) / 2)
    fig, axes = plt.subplots(rows, min(len(panels), 2), figsize=(TWO_COLUMNS, 0.6 + 2.2 * rows), squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for ax, ((model, precision, device, threads), part) in zip(axes.flat, panels, strict=False):
        for mode, of_mode in part.groupby("mode", sort=False):
            times = of_mode.set_index(["variant", "batch_size"])
            dense = times.loc["dense"]
            for (variant, name), colour in zip(DISPATCHES.items(), (_COLOURS[i] for i in (0, 1, 3)), strict=True):
                if variant in times.index:
                    label = name if mode == "eager" else f"{name}, both {mode}"
                    style = {"color": colour, "linestyle": "-" if mode == "eager" else "--", "label": label}
                    ax.errorbar(*_ratio(times.loc[variant], dense), marker="o", markersize=4, capsize=2, **style)
        eager = part.drop_duplicates(["variant", "batch_size"]).set_index(["variant", "batch_size"])
        flops, weights = (eager.loc["moe", what] / eager.loc["dense", what] for what in ("flops", "weight_bytes"))
        ax.plot(flops.index, flops, color="black", linestyle=":", linewidth=1, label="arithmetic of the experts used")
        ax.plot(
            flops.index[0], weights.iloc[0], color="black", marker="x", linestyle="", label="weights read, one example"
        )
        ax.set(xscale="log", ylim=(0, None), title=f"{model}\n{precision}, {device}, {threads} thread(s)")
        ax.set_xticks(flops.index, [str(b) for b in flops.index])
        ax.minorticks_off()
        ax.axhline(1, color="0.45", linewidth=0.8, zorder=1.6)
    fig.supylabel("MoE time / student time", fontsize=plt.rcParams["axes.labelsize"])
    _legend_of_all(fig)
    fig.supxlabel(
        "batch size\nmedians; bars: from quartile to quartile of both; grey: as fast as the student", fontsize=7
    )
    return fig


def _ratio(above: pd.DataFrame, below: pd.DataFrame) -> tuple[pd.Index, pd.Series, list[pd.Series]]:
    """Places, ratios of medians, and what is between them and those of opposite quartiles."""
    ratio = above["median_ms"] / below["median_ms"]
    ends = [ratio - above["low_ms"] / below["high_ms"], above["high_ms"] / below["low_ms"] - ratio]
    return ratio.index, ratio, ends


def dispatch_speed(table: pd.DataFrame) -> Figure:
    """Time of each way of dispatch over this library's: a column of panels a layer, a row a direction, a line of marks a
    precision and batch size. Bars reach from the lower quartile of the one over the upper of the other to the reverse.

    ``table`` is of :func:`ones_lib.speed.measure_dispatch`.
    """
    layers, directions = (list(dict.fromkeys(table[key])) for key in ("layer", "direction"))
    lines = len(table[["precision", "batch_size"]].drop_duplicates())
    size = (TWO_COLUMNS, 1.1 + 2 * (0.4 + 0.22 * lines))
    fig, axes = plt.subplots(len(directions), len(layers), figsize=size, squeeze=False)
    colours = dict(zip(WAYS, (_COLOURS[i] for i in (0, 1, 3, 2, 4, 5)), strict=True))
    markers = dict(zip(WAYS, "osDv^P", strict=True))
    for row, direction in zip(axes, directions, strict=True):
        for ax, layer in zip(row, layers, strict=True):
            part = table[(table["layer"] == layer) & (table["direction"] == direction)]
            places = list(dict.fromkeys(zip(part["precision"], part["batch_size"], strict=True)))[::-1]
            of_variant = dict(list(part.set_index(["precision", "batch_size"]).groupby("variant", sort=False)))
            for variant, name in WAYS.items():
                if variant == "ours" or variant not in of_variant:
                    continue
                at, ratio, ends = _ratio(of_variant[variant], of_variant["ours"].loc[of_variant[variant].index])
                heights = [places.index(place) for place in at]
                style = {"color": colours[variant], "marker": markers[variant], "markersize": 4, "linestyle": ""}
                ax.errorbar(ratio, heights, xerr=ends, capsize=1.5, linewidth=0.8, label=name, **style)
            ax.axvline(1, color="black", linewidth=0.8, zorder=1.6)
            ax.set_yticks(range(len(places)), [f"{b:,}, {'f32' if p == 'float32' else 'bf16'}" for p, b in places])
            ax.set(xscale="log", ylim=(-0.6, len(places) - 0.4), title=f"{layer}\n{direction}")
            _plain_log(ax, "x")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=3)
    device, threads = table["device"].iloc[0], table["threads"].iloc[0]
    fig.supylabel("batch size, precision", fontsize=plt.rcParams["axes.labelsize"])
    fig.supxlabel(
        f"time / this library's ({device}, {threads} thread(s)); bars: from quartile to quartile of both", fontsize=7
    )
    return fig


def perplexity_by_tokens(table: pd.DataFrame, tokens_per_step: int) -> Figure:
    """Perplexity of students against the tokens that they were distilled on, a line each; the MoE and the dense baselines as
    lines across. Right the same without what is right after gathering. Bands reach from the lowest to the highest seed.

    ``table`` is a :func:`ones_lib.tables.results_table` of losses with a column ``budget``, in steps.
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

    ``table`` is a :func:`ones_lib.tables.conversion_table`.
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


ERRORS = {"error": "as gathered", "rescaled": "output rescaled by the best number"}
_OTHER = _COLOURS[6]  # a method that someone registered
_NOISE = {"color": "0.45", "linestyle": ":"}
_PART = Normalize(0, 1)


def _method_style(method: str) -> dict:
    """Colour, marker and label of a gathering method or control, someone's own included."""
    label = NAMES.get(method, method).replace("\n", " ")
    marker = MARKERS.get(method, ".")
    return {"color": PALETTE.get(method, _OTHER), "marker": marker, "markersize": 3, "label": label}


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


def _mean_and_range(ax: Axes, part: pd.DataFrame, x: str, y: str, **style) -> None:
    """A line through the means and a band from the lowest to the highest value."""
    values = part.groupby(x)[y].agg(["mean", "min", "max"])
    ax.plot(values.index, values["mean"], **style)
    ax.fill_between(values.index, values["min"], values["max"], color=style["color"], alpha=0.15, linewidth=0)


def _whole_ranks(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _plain_log(ax: Axes, which: str = "y") -> None:
    """Plain numbers along a logarithmic axis, and enough of them where it spans little."""
    low, high = ax.get_ylim() if which == "y" else ax.get_xlim()
    axis = ax.yaxis if which == "y" else ax.xaxis
    axis.set_major_locator(
        MaxNLocator(4) if high < 5 * low else LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,))
    )
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


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
    for suffix, metadata in {
        ".pdf": {"CreationDate": None},
        ".png": None,
    }.items():  # the same figure gives the same file
        with written_beside(path.with_suffix(suffix)) as beside:
            fig.savefig(beside, format=suffix[1:], metadata=metadata)


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
    axes[0, 0].set_yticks(range(len(models)), [NAMES.get(m, m).replace("\n", " ") for m in models])
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
