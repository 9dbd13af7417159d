"""Tables of results from records: one row a model, seed and metric, and retention over seeds with its interval."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from ones_lib.metrics import LOWER_IS_BETTER, benefit_retention, retention_interval
from ones_lib.records import Record, Records
from ones_lib.study import Entry

AVERAGE = "average"  # the task and the metric that stand for the mean of all tasks' main metrics
_VALUES = ("data", "model", "stage", "seed", "metric", "value", "retention", "record")


def results_table(entries: Iterable[Entry], records: Records) -> pd.DataFrame:
    """One row an entry and metric: ``data, *axes, model, stage, seed, metric, value, retention, record``.

    Values are in per cent, losses in nats. Retention is that of the row's seed: against the ``dense`` and ``moe`` entries of
    the same seed and the same axes, or of the same seed alone where those were not trained anew for each value of an axis.
    """
    rows = []
    for entry in entries:
        record = records.find(entry.config)
        for metric, value in record.result["metrics"].items():
            rows.append(
                {
                    "data": entry.config["data"]["name"],
                    **entry.axes,
                    "model": entry.model,
                    "stage": entry.stage,
                    "seed": entry.config["seed"],
                    "metric": metric,
                    "value": value if metric in LOWER_IS_BETTER else 100 * value,
                    "record": record.folder.name,
                }
            )
    return _with_retention(pd.DataFrame(rows))


def main_metrics(table: pd.DataFrame, metrics: dict[str, str]) -> pd.DataFrame:
    """The rows of each task's main metric; ``metrics`` by task."""
    return table[table["metric"] == table["task"].map(metrics)]


def with_average(table: pd.DataFrame, metrics: dict[str, str]) -> pd.DataFrame:
    """``table`` and rows of the task ``average``: the mean of the main metrics of the tasks in ``metrics``."""
    main = main_metrics(table, metrics)
    keys = [c for c in table.columns if c not in ("task", "metric", "value", "retention", "record")]
    mean = main.groupby(keys, sort=False, dropna=False)["value"].mean().reset_index()
    mean = _with_retention(mean.assign(task=AVERAGE, metric=AVERAGE, record=""))
    return pd.concat([table, mean[table.columns]], ignore_index=True)


def _with_retention(table: pd.DataFrame) -> pd.DataFrame:
    table, references = table.copy(), {name: _reference(table, name) for name in ("dense", "moe")}
    retention = []
    for _, row in table.iterrows():
        sign = -1 if row["metric"] in LOWER_IS_BETTER else 1
        dense, moe = (table["value"][references[name](row)] for name in ("dense", "moe"))
        retention.append(benefit_retention(sign * row["value"], sign * dense, sign * moe))
    table.insert(table.columns.get_loc("value") + 1, "retention", retention)
    return table


def _reference(table: pd.DataFrame, model: str):
    """Function from a row to the index of the reference ``model``'s row that belongs to it."""
    candidates = table[table["model"] == model]
    axes = [c for c in table.columns if c not in _VALUES] + ["metric"]

    def find(row: pd.Series) -> int:
        same = candidates[candidates["seed"] == row["seed"]]
        for axis in axes:
            if pd.notna(row[axis]) and (same[axis] == row[axis]).any():
                same = same[same[axis] == row[axis]]
        return same.index[0]

    return find


def retention_table(table: pd.DataFrame, records: Records, by: tuple[str, ...] = ()) -> pd.DataFrame:
    """Retention over all seeds, with its interval: one row a model, stage, value of ``by``, and reference.

    Columns ``data, model, stage, *by, reference, seeds, value, value_sd, retention, low, high``; the references are
    ``dense`` and, where it is in the table, ``dense_long``. Where rows of several tasks fall together, which must be of
    one metric each, it is the retention of their mean. The interval is :func:`ones_lib.metrics.retention_interval`'s, 95%.
    """
    held: dict[tuple[str, str], np.ndarray] = {}

    def scores(index: int) -> np.ndarray:
        key = table.loc[index, "record"], table.loc[index, "metric"]
        if key not in held:
            values = Record(records.root / key[0]).predictions[key[1]].numpy()
            held[key] = -values if key[1] in LOWER_IS_BETTER else values
        return held[key]

    find_moe = _reference(table, "moe")
    bases = {name: _reference(table, name) for name in ("dense", "dense_long") if (table["model"] == name).any()}
    rows = []
    for values, group in table.groupby(["data", "model", "stage", *by], sort=False, dropna=False):
        tasks = [part for _, part in group.groupby("task", sort=False)] if "task" in group else [group]

        def stacked(find, tasks=tasks):
            return [np.stack([scores(find(row)) for _, row in part.sort_values("seed").iterrows()]) for part in tasks]

        per_seed = group.groupby("seed")["value"].mean()
        for base, find in bases.items():
            retention, low, high = retention_interval(stacked(lambda row: row.name), stacked(find), stacked(find_moe))
            rows.append(
                {
                    **dict(zip(["data", "model", "stage", *by], values, strict=True)),
                    "reference": base,
                    "seeds": len(per_seed),
                    "value": per_seed.mean(),
                    "value_sd": per_seed.std(),
                    "retention": retention,
                    "low": low,
                    "high": high,
                }
            )
    return pd.DataFrame(rows)
