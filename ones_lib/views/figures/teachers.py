"""TODO."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ones_lib.views.figures.style import ONE_COLUMN, _method_style


def distillation_gains(results: pd.DataFrame) -> Figure:
    """What each addition to the loss gains over the first loss, in points of accuracy: strokes are seeds, each against its own
    student of the first loss, marks their mean.

    ``results`` is a :func:`ones_lib.study.tables.results_table` of :meth:`ones_lib.study.study.Study.distillation_entries`.
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
