"""The figure of notebook 08: expert-aware losses against plain KD."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ones_lib.views.figures import style


def distillation_gains(results: pd.DataFrame) -> Figure:
    """Points of accuracy that each further loss gains over the first; every seed is compared with its own student of the first
    loss.

    ``results`` is a :func:`ones_lib.study.tables.results_table` of :meth:`ones_lib.study.study.Study.distillation_entries`.
    """
    distilled = results[results["stage"] == "distilled"].set_index(["model", "seed", "loss"])["value"]
    students = distilled.unstack("loss", sort=False)
    first, *others = students.columns
    gains = students[others].sub(students[first], axis=0)
    methods = list(dict.fromkeys(gains.index.get_level_values("model")))
    fig, ax = plt.subplots(figsize=(style.ONE_COLUMN, 0.7 + 0.3 * len(others) * max(1, len(methods) / 2)))
    for i, method in enumerate(methods):
        looks = style.look(method)
        for row, loss in enumerate(others):
            values, at = gains.loc[method, loss], row + (i - (len(methods) - 1) / 2) * 0.3
            style.seeds_and_mean(ax, values, at, looks.colour, looks.marker, f"from {looks.name}")
    ax.axvline(0, **style.GREY)
    style.rows(ax, others)
    ax.set(xlabel=f"gain over {first} (accuracy points)")
    style.legend(fig, "outside upper center", ncols=2)
    style.caption(fig, f"ticks: {style.seeds(results)}, each against its own {first} student\nmarks: their mean")
    return fig
