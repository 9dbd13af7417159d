"""Figures from tables of results: table -> matplotlib figure, saved as PNG and PDF with its CSV and where it came from.

Every function draws what its table holds and trains nothing, so a figure can be drawn again from the records, or from the
CSV beside it. Bands and bars say what they are in the axis labels or the legend.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from ones_lib.data.files import write_text, written_beside
from ones_lib.gathering.registry import gathering_methods
from ones_lib.study.records import project_root

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


def _legend_of_all(fig: Figure) -> None:
    """One legend, right of the panels, of what any of them draws."""
    handles = {}
    for ax in fig.axes:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    fig.legend(handles.values(), handles, loc="outside right center")


_OTHER = _COLOURS[6]  # a method that someone registered


def _method_style(method: str) -> dict:
    """Colour, marker and label of a gathering method or control, someone's own included."""
    label = NAMES.get(method, method).replace("\n", " ")
    marker = MARKERS.get(method, ".")
    return {"color": PALETTE.get(method, _OTHER), "marker": marker, "markersize": 3, "label": label}


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
