"""What all figures share: names and looks of models, helpers for axes, and saving."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from ones_lib.data.files import write_text, written_beside
from ones_lib.gathering.registry import gathering_methods
from ones_lib.study.records import project_root

ONE_COLUMN, TWO_COLUMNS = 3.5, 7.2  # inches, the usual widths of a paper's columns
COLOURS = sns.color_palette("colorblind")
GREY = {"color": "0.45", "linewidth": 0.8, "zorder": 1.6}  # a reference line: above the grid, below the data


class Look(NamedTuple):
    """How a model is drawn."""

    name: str
    colour: Any
    marker: str
    line: str = "-"


#: In the order of figures and tables: baselines, controls (dashed), the paper's methods, those that look at data, others.
MODELS = {
    "moe": Look("MoE (teacher)", "black", "X"),
    "dense_long": Look("dense (teacher + KD steps)", "0.45", "X", ":"),
    "dense": Look("dense", "0.45", "X", "--"),
    "dense_width_long": Look("dense, same width (teacher + KD steps)", "0.45", "P", ":"),
    "dense_width": Look("dense, same width", "0.45", "P", "--"),
    "dense_active": Look("dense, active width", "0.45", "P", "--"),
    "dense_kd": Look("dense, KD from scratch", COLOURS[9], "P", "-."),
    "shared_kd": Look("shared weights only", COLOURS[7], "v", "--"),
    "zero_ffn": Look("zero FFN", COLOURS[5], "^", "--"),
    "one_expert": Look("one expert", COLOURS[4], "<", "--"),
    "sum": Look("summation", COLOURS[3], "o"),
    "average": Look("averaging", COLOURS[0], "o"),
    "topk": Look("Top-KG", COLOURS[2], "s"),
    "svd": Look("SVD-KG", COLOURS[1], "D"),
    "matched_average": Look("matched averaging", "#5fa8d3", "o"),
    "contribution_topk": Look("Top-KG by contribution", "#6fcf97", "s"),
    "whitened_svd": Look("whitened SVD-KG", "#f2b880", "D"),
    "readout": Look("read-out", "#1b7f79", "h"),
    "fit": Look("layer-wise fit", "#d63fa5", "p"),
    "joint_fit": Look("joint fit", "#4a0d67", "*"),
    "frequency_average": Look("averaging by frequency", "#8fa3c9", "<"),
    "expert_selection": Look("expert selection", "#7a5c00", "d"),
    "sf": Look("selection by frequency", "#a6761d", "<"),
    "do_acp": Look("DO-ACP selection", "#c44e00", ">"),
    "reconstruction": Look("reconstruction", "#d63fa5", "p"),
}
METHODS = ["sum", "average", "topk", "svd"]  # the paper's
METRICS = {
    "accuracy": "accuracy (%)",
    "f1": "F1 (%)",
    "exact_match": "exact match (%)",
    "loss": "loss (nats; lower is better)",
    "average": "mean of the tasks (%)",
}
MATRIX_NAMES = {"up": "up projection", "gate": "gate projection", "down": "down projection"}


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


# --- models ----------------------------------------------------------------------------------------------------------


def look(model: str) -> Look:
    """The look of a model; one outside the table keeps its name, and gets a colour of its own if it is registered."""
    if model in MODELS:
        return MODELS[model]
    others = [method for method in gathering_methods() if method not in MODELS]
    colours = dict(zip(others, sns.husl_palette(len(others)) if others else [], strict=True))
    return Look(model.replace("_", " "), colours.get(model, COLOURS[6]), "o")


def in_order(models: Iterable[str]) -> list[str]:
    """Each model once, in the order of :data:`MODELS`; those outside it follow as they come."""
    found = list(dict.fromkeys(models))
    return [*(m for m in MODELS if m in found), *(m for m in found if m not in MODELS)]


def line_style(model: str) -> dict[str, Any]:
    """Arguments of ``Axes.plot`` for a line with marks."""
    name, colour, marker, line = look(model)
    return {"label": name, "color": colour, "marker": marker, "markersize": 3, "linestyle": line}


def level(line: Callable[..., Any], value: float, model: str, **style) -> None:
    """A baseline's level as a line across the panel; ``line`` is its ``axhline`` or ``axvline``."""
    line(value, **(GREY | {"color": look(model).colour, "linestyle": look(model).line} | style))


# --- panels and axes -------------------------------------------------------------------------------------------------


def panel_grid(
    count: int, columns: int, height: float, extra: float = 0.0, width: float = TWO_COLUMNS, **options
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels, up to ``columns`` in a row; ``options`` go to ``plt.subplots``.

    Each row is ``height`` inches high; ``extra`` inches are for legend and caption.
    """
    rows = math.ceil(count / columns)
    size = (width, rows * height + extra)
    fig, axes = plt.subplots(rows, min(count, columns), figsize=size, squeeze=False, **options)
    for ax in axes.flat[count:]:
        ax.remove()
    return fig, list(axes.flat[:count])


def mean_and_range(ax: Axes, part: pd.DataFrame, x: str, y: str, **style) -> None:
    """A line through the means and a band from the lowest to the highest value."""
    values = part.groupby(x)[y].agg(["mean", "min", "max"])
    ax.plot(values.index, values["mean"], **style)
    ax.fill_between(values.index, values["min"], values["max"], color=style["color"], alpha=0.15, linewidth=0)


def lines_by_model(ax: Axes, table: pd.DataFrame, x: str, y: str, column: str = "model", **looks) -> None:
    """:func:`mean_and_range` of every model; ``looks`` override its line style."""
    for model, part in table.groupby(column, sort=False):
        mean_and_range(ax, part, x, y, **line_style(model) | looks)


def seeds_and_mean(ax: Axes, values: pd.Series, row: float, colour: Any, marker: str, label: str | None = None) -> None:
    """A tick for each seed's value in row ``row`` and a mark at their mean."""
    ax.plot(values, [row] * len(values), "|", color=colour, markersize=7, alpha=0.7)
    ax.plot(values.mean(), row, marker, color=colour, label=label, markersize=5)


def rows(ax: Axes, labels: list[str]) -> None:
    """Labels along the y-axis, the first on top."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)


def number_at_edge(ax: Axes, row: float, value: float, digits: int, colour: Any) -> bool:
    """Whether a mark in row ``row`` would be outside the panel; if so, its value is written at the edge."""
    low, high = ax.get_xlim()
    if low <= value <= high:
        return False
    place = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 7, "color": colour}
    if value < low:
        ax.text(0.02, row, f"← {value:.{digits}f}", ha="left", **place)
    else:
        ax.text(0.98, row, f"{value:.{digits}f} →", ha="right", **place)
    return True


def legend(fig: Figure, loc: str = "outside right center", ncols: int = 1) -> None:
    """One legend of everything that has a label in any panel."""
    handles = {}
    for ax in fig.axes:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    fig.legend(handles.values(), handles, loc=loc, ncols=ncols)


def caption(fig: Figure, text: str) -> None:
    """A line below the panels that says what marks, bands and bars are."""
    fig.supxlabel(text, fontsize=7)


def seeds(table: pd.DataFrame) -> str:
    """The number of a table's seeds, in words for a caption."""
    count = table["seed"].nunique()
    return f"{count} seed{'s' if count > 1 else ''}"


def whole_ranks(ax: Axes) -> None:
    """Whole numbers along the x-axis."""
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def plain_log(ax: Axes, which: str = "y") -> None:
    """Plain numbers along a logarithmic axis, and enough of them where it spans little."""
    axis = ax.yaxis if which == "y" else ax.xaxis
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high < 50 * low else (1,)
    axis.set_major_locator(MaxNLocator(4) if high < 5 * low else LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


# --- saving ----------------------------------------------------------------------------------------------------------


def save_figure(fig: Figure, name: str, table: pd.DataFrame, folder: str | Path, records: Iterable[str] = ()) -> None:
    """Write ``name.png`` and ``name.pdf``, and what is drawn with :func:`save_table`. The same figure gives the same files."""
    save_table(table, name, folder, records)
    path = project_root() / folder / name
    for suffix, metadata in {".pdf": {"CreationDate": None}, ".png": None}.items():
        with written_beside(path.with_suffix(suffix)) as beside:
            fig.savefig(beside, format=suffix[1:], metadata=metadata)


def save_table(table: pd.DataFrame, name: str, folder: str | Path, records: Iterable[str] = ()) -> None:
    """Write ``name.csv``, and ``name.json`` with the names of the records behind it.

    ``folder`` is relative to the project's root. A column ``record`` goes row by row to the JSON instead of the CSV.
    """
    path = project_root() / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if "record" in table:
        records, table = table["record"], table.drop(columns="record")
    write_text(path.with_suffix(".csv"), table.to_csv(index=False, float_format="%.6f"))
    write_text(path.with_suffix(".json"), json.dumps({"records": list(records)}, indent=1) + "\n")
