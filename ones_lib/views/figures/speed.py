"""TODO."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ones_lib.views.figures.style import _COLOURS, TWO_COLUMNS, _legend_of_all, _plain_log

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

    ``table`` is of :func:`ones_lib.views.speed.measure_speed`. Bars reach from the lower quartile of the MoE's times over the dense
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

    ``table`` is of :func:`ones_lib.views.speed.measure_dispatch`.
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
