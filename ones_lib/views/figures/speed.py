"""Figures of notebook 05: speed of the dense student against its MoE, in engines too, and of ways of dispatch."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ones_lib.views.figures import style

DISPATCHES = {  # name, colour
    "moe": ("this library's MoE", style.COLOURS[0]),
    "moe_plain": ("loop over experts", style.COLOURS[1]),
    "moe_gshard": ("one-hot products (GShard)", style.COLOURS[3]),
}
LINES, MODE_NAMES = {"compiled": "--", "onnx": "-."}, {"onnx": "in ONNX Runtime"}
WAYS = {  # name, colour, marker
    "loop": ("plain loop", style.COLOURS[1], "s"),
    "one_hot": ("one-hot products (GShard)", style.COLOURS[3], "D"),
    "eager": ("transformers, eager", style.COLOURS[2], "v"),
    "batched_mm": ("transformers, batched_mm", style.COLOURS[4], "^"),
    "grouped_mm": ("transformers, grouped_mm", style.COLOURS[5], "P"),
}


def inference_speed(table: pd.DataFrame) -> Figure:
    """Time of an MoE relative to its dense student by batch size, a panel each model and precision.

    ``table`` is of :func:`ones_lib.views.speed.measure_speed`. Dotted: ratio of the FLOPs. Cross: ratio of the bytes of weights
    read, at the smallest batch.
    """
    groups = list(table.groupby(["model", "precision", "device", "threads"], sort=False))
    fig, axes = style.panel_grid(len(groups), 2, 2.2, extra=0.6)
    for ax, ((model, precision, device, threads), part) in zip(axes, groups, strict=True):
        _relative_times(ax, part)
        ax.axhline(1, **style.GREY)
        batch_sizes = sorted(part["batch_size"].unique())
        ax.set(xscale="log", ylim=(0, None), title=f"{model}\n{precision}, {device}, {threads} thread(s)")
        ax.set_xticks(batch_sizes, [str(b) for b in batch_sizes])
        ax.minorticks_off()
    fig.supylabel("MoE time / student time", fontsize=plt.rcParams["axes.labelsize"])
    style.legend(fig)
    bars = "bars: lower quartile / upper quartile, and the reverse"
    style.caption(fig, f"batch size\nmarks: ratio of medians; {bars}; grey: as fast as the student")
    return fig


def _relative_times(ax: Axes, part: pd.DataFrame) -> None:
    """The MoE's variants over the dense student, and what FLOPs and weights would give."""
    for mode, of_mode in part.groupby("mode", sort=False):
        times = of_mode.set_index(["variant", "batch_size"])
        for variant, (name, colour) in DISPATCHES.items():
            if variant in times.index:
                x, ratio, ends = _ratio(times.loc[variant], times.loc["dense"])
                looks = {"linestyle": "-", "label": name}
                if mode != "eager":
                    looks = {"linestyle": LINES[mode], "label": f"{name}, both {MODE_NAMES.get(mode, mode)}"}
                ax.errorbar(x, ratio, ends, color=colour, marker="o", markersize=4, capsize=2, **looks)
    counts = part.drop_duplicates(["variant", "batch_size"]).set_index(["variant", "batch_size"])
    flops, weights = (counts.loc["moe", what] / counts.loc["dense", what] for what in ("flops", "weight_bytes"))
    ax.plot(flops, color="black", linestyle=":", linewidth=1, label="FLOPs, of the experts used")
    ax.plot(weights.iloc[:1], color="black", marker="x", linestyle="", label="weights read, smallest batch")


def _ratio(above: pd.DataFrame, below: pd.DataFrame) -> tuple[pd.Index, pd.Series, list[pd.Series]]:
    """Places, ratios of medians, and how far the ratios of opposite quartiles are below and above them."""
    ratio = above["median_ms"] / below["median_ms"]
    ends = [ratio - above["low_ms"] / below["high_ms"], above["high_ms"] / below["low_ms"] - ratio]
    return ratio.index, ratio, ends


def dispatch_speed(table: pd.DataFrame) -> Figure:
    """Time of each way of dispatch relative to this library's: a column of panels each layer, a row each direction.

    ``table`` is of :func:`ones_lib.views.speed.measure_dispatch`.
    """
    groups = list(table.sort_values("direction", kind="stable").groupby(["direction", "layer"], sort=False))
    lines = len(table[["precision", "batch_size"]].drop_duplicates())
    fig, axes = style.panel_grid(len(groups), table["layer"].nunique(), 0.4 + 0.22 * lines, extra=1.1)
    for ax, ((direction, layer), part) in zip(axes, groups, strict=True):
        places = list(dict.fromkeys(zip(part["precision"], part["batch_size"], strict=True)))[::-1]
        of_variant = dict(list(part.set_index(["precision", "batch_size"]).groupby("variant", sort=False)))
        for variant, (name, colour, marker) in WAYS.items():
            if variant not in of_variant:
                continue
            at, ratio, ends = _ratio(of_variant[variant], of_variant["ours"].loc[of_variant[variant].index])
            looks = {"color": colour, "marker": marker, "markersize": 4, "linestyle": "", "label": name}
            ax.errorbar(ratio, [places.index(place) for place in at], xerr=ends, capsize=1.5, linewidth=0.8, **looks)
        ax.axvline(1, **style.GREY | {"color": "black"})
        ax.set_yticks(range(len(places)), [f"{b:,}, {'f32' if p == 'float32' else 'bf16'}" for p, b in places])
        ax.set(xscale="log", ylim=(-0.6, len(places) - 0.4), title=f"{layer}\n{direction}")
        style.plain_log(ax, "x")
    style.legend(fig, "outside upper center", ncols=3)
    device, threads = table[["device", "threads"]].iloc[0]
    fig.supylabel("batch size, precision", fontsize=plt.rcParams["axes.labelsize"])
    bars = "bars: lower quartile / upper quartile, and the reverse"
    style.caption(fig, f"time / this library's time ({device}, {threads} thread(s)); {bars}")
    return fig


def engine_speed(table: pd.DataFrame) -> Figure:
    """Tokens a second of the dense student over its MoE's, by engine: a column of panels each stack of layers, a row each phase.

    ``table`` is of :func:`ones_lib.views.engines.measure_engines`. Dotted: what memory and arithmetic allow.
    """
    groups = list(table.sort_values("phase", kind="stable").groupby(["phase", "stack"], sort=False))
    fig, axes = style.panel_grid(len(groups), table["stack"].nunique(), 1.7, extra=0.7, sharey=True)
    engines = [engine for engine in table["engine"].unique() if engine != "limit"]
    colours = dict(zip(engines, style.COLOURS, strict=False))
    for ax, ((phase, stack), part) in zip(axes, groups, strict=True):
        batch_sizes = sorted(part["batch_size"].unique())
        for engine, of_engine in part.groupby("engine", sort=False):
            moe, dense = (of_engine[of_engine["model"] == m].set_index("batch_size") for m in ("moe", "dense"))
            _, ratio, ends = _ratio(moe, dense)
            x = [batch_sizes.index(b) for b in ratio.index]
            if engine in colours:
                looks = {"color": colours[engine], "marker": "o", "markersize": 4, "capsize": 2}
                ax.errorbar(x, ratio, ends, label=engine, **looks)
            else:
                ax.plot(x, ratio, color="black", linestyle=":", marker="x", label="memory and arithmetic")
        ax.axhline(1, **style.GREY)
        ax.set_xticks(range(len(batch_sizes)), [str(b) for b in batch_sizes])
        ax.set(yscale="log", title=f"{stack}\n{phase}", xlim=(-0.3, len(batch_sizes) - 0.7))
        style.plain_log(ax, "y")
    machine, threads = table[["machine", "threads"]].iloc[0]
    style.legend(fig)
    fig.supylabel("student / MoE, tokens a second", fontsize=plt.rcParams["axes.labelsize"])
    bars = "bars: lower quartile / upper quartile, and the reverse"
    style.caption(fig, f"sequences of a batch ({machine}, {threads} thread(s))\nmarks: ratio of medians; {bars}")
    return fig
