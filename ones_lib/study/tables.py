"""Tables of results from records: one row a model, seed and metric, and retention over seeds with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers.utils.logging import tqdm

from ones_lib.calibration import LayerActivations
from ones_lib.metrics import LOWER_IS_BETTER, benefit_retention, main_metric, rank_correlation, retention_interval
from ones_lib.spectra import output_error
from ones_lib.study.entries import Entry
from ones_lib.study.naming import data_name
from ones_lib.study.records import Record, Records
from ones_lib.study.running import record_activations
from ones_lib.study.study import Study

AVERAGE = "average"  # the task and the metric that stand for the mean of all tasks' main metrics
_VALUES = ("data", "model", "stage", "seed", "metric", "value", "retention", "record")


def results_table(entries: Iterable[Entry], records: Records) -> pd.DataFrame:
    """One row an entry and metric: ``data, *axes, model, stage, seed, metric, value, retention, record``.

    Values are in per cent, losses in nats. Retention is that of the row's seed: against the ``dense`` and ``moe`` entries of
    the same seed and the same axes, or of the same seed alone where those were not trained anew for each value of an axis. The
    divergence from a teacher (``kl``), which baselines don't have, is left out.
    """
    rows = []
    for entry in entries:
        record = records.find(entry.config)
        for metric, value in record.result["metrics"].items():
            if metric == "kl":
                continue
            rows.append(
                {
                    "data": data_name(entry.config["data"]),
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


def width_table(results: pd.DataFrame, speeds: pd.DataFrame, records: Records) -> pd.DataFrame:
    """Retention and speed, one row a model and width: ``data, model, stage, d_ff, reference, seeds, value, value_sd, retention,
    low, high`` as in a :func:`retention_table`, then ``batch_size, median_ms, examples_per_second, speedup, device, threads``.

    ``results`` is a :func:`results_table` of :func:`ones_lib.study.entries.by_width` with one metric, ``speeds`` a table of
    :func:`ones_lib.views.speed.measure_widths`. A dense model's speed depends on its width alone; the MoE has no ``d_ff``.
    """
    columns = ["d_ff", "batch_size", "median_ms", "examples_per_second", "speedup", "device", "threads"]
    table = retention_table(results, records, by=("d_ff",)).astype({"d_ff": float})
    return table.merge(speeds[columns].astype({"d_ff": float}), how="left", on="d_ff")


def ablation_table(entries: Iterable[Entry], study: Study) -> pd.DataFrame:
    """One row a student of :func:`ones_lib.study.entries.by_variant`: ``data, method, scale, rank, budget, seed, accuracy,
    retention, layer_error, loss, seconds, record``.

    ``accuracy`` is in per cent, of text that of masked tokens; ``loss`` in nats, of text alone. Retention is of accuracy, of
    text of the loss. ``layer_error`` is :func:`layer_error` right after gathering, also in the rows of the distilled.
    ``seconds`` are those of the gathering, its pass over the data included, and of KD at the fastest student's time for a
    step: a step costs all students the same, but runs may have shared the machine.
    """
    entries, axes = list(entries), ["model", "scale", "rank", "seed"]
    table = results_table(entries, study.records)
    table = table[table["stage"] != "trained"]
    values = table.pivot_table(index="record", columns="metric", values="value")
    result = table[table["metric"] == table["metric"].iloc[0]].drop(columns=["metric", "value"])
    for metric in ("accuracy", "loss"):
        result[metric] = result["record"].map(values[metric]) if metric in values else np.nan
    result["seconds"] = _seconds(result, study.records)
    rows = [
        {**entry.axes, "model": entry.model, "seed": entry.config["seed"], "layer_error": layer_error(record, study)}
        for entry in tqdm([e for e in entries if e.axes.get("budget") == 0], "layers", unit="student")
        if (record := study.records.find(entry.config))
    ]
    numbers = {"rank": float}  # else a table without any rank has a column of None
    errors = pd.DataFrame(rows)[[*axes, "layer_error"]].astype(numbers)
    result = result.astype(numbers).merge(errors, how="left", on=axes)
    result = result.rename(columns={"model": "method"}).astype({"budget": int})
    values = ["accuracy", "retention", "layer_error", "loss", "seconds", "record"]
    return result[["data", "method", *axes[1:3], "budget", "seed", *values]]


def _seconds(students: pd.DataFrame, records: Records) -> pd.Series:
    """Seconds of each student's gathering, and of its KD at the fastest one's time for a step."""
    found = pd.DataFrame([_seconds_taken(records, name) for name in students["record"]], index=students.index)
    step = (found["kd"] / students["budget"].where(students["budget"] > 0)).min()
    return found["gathering"] + (0 if pd.isna(step) else step * students["budget"])


def _seconds_taken(records: Records, name: str) -> dict[str, float]:
    """Seconds of a student's gathering and of its KD."""
    record = Record(records.root / name)
    start = records.find(record.config["start"]) if "start" in record.config else record
    distilled = record.history["seconds"].iloc[-1] if record.config["training"] else 0.0
    return {"gathering": start.result["gathering_seconds"], "kd": distilled}


def error_correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of a layer's output error with its student's score.

    Columns ``data, value, budget, variants, correlation, low, high``.

    See :func:`ones_lib.metrics.rank_correlation`. Over the variants of an :func:`ablation_table`; the score is the accuracy (of
    text the loss) right after gathering, or the retention after the smallest budget of KD.
    """
    rows = []
    for data, part in table.groupby("data", sort=False):
        for value, budget in ((main_metric(part), 0), ("retention", min(b for b in part["budget"] if b > 0))):
            at = part[part["budget"] == budget]
            at = at.assign(variant=at[["method", "scale", "rank"]].map(str).agg(" ".join, axis=1))
            x, y = (at.pivot(index="variant", columns="seed", values=v) for v in ("layer_error", value))
            known = y.notna().any()  # retention may be undefined for a seed
            x, y = x.loc[:, known], y.loc[:, known]
            estimate = rank_correlation(x.to_numpy(), y.to_numpy()) if known.any() else (math.nan,) * 3
            names = ("correlation", "low", "high")
            rows.append({"data": data, "value": value, "budget": budget, "variants": len(y)})
            rows[-1] |= dict(zip(names, estimate, strict=True))
    return pd.DataFrame(rows)


def benefit_table(table: pd.DataFrame) -> pd.DataFrame:
    """The MoE's benefit and the student's part of it, in points above the dense baseline of the same seed.

    Columns ``data, num_experts, teacher_steps, model, seed, benefit, kept``; ``table`` is a :func:`results_table` of
    :func:`ones_lib.study.entries.by_experts` with several numbers of steps.
    """
    dense = table[table["model"] == "dense"].set_index("seed")["value"]
    above = table.assign(above=table["value"] - table["seed"].map(dense))
    axes = ["data", "num_experts", "teacher_steps", "seed"]
    benefit = above[above["model"] == "moe"].set_index(axes)["above"].rename("benefit")
    students = above[above["stage"] == "distilled"].rename(columns={"above": "kept"}).join(benefit, on=axes)
    return students[[*axes[:3], "model", "seed", "benefit", "kept", "record"]].reset_index(drop=True)


def what_decides(benefits: pd.DataFrame) -> pd.DataFrame:
    """What a student keeps, explained by the MoE's benefit and its number of experts E.

    For each method and seed the least-squares plane ``kept = a + b * benefit + c * log2(E)`` over the teachers of a
    :func:`benefit_table`; mean and SD over seeds of b (points kept for each point of benefit, at equal E) and of c (points
    for each doubling of E, at equal benefit).
    """
    rows = []
    for (model, seed), part in benefits.groupby(["model", "seed"], sort=False):
        columns = [np.ones(len(part)), part["benefit"], np.log2(part["num_experts"])]
        _, b, c = np.linalg.lstsq(np.stack(columns, axis=1), part["kept"], rcond=None)[0]
        rows.append({"model": model, "seed": seed, "per point of benefit": b, "per doubling of experts": c})
    return pd.DataFrame(rows).drop(columns="seed").groupby("model", sort=False).agg(["mean", "std"])


def layer_error(student: Record, study: Study) -> float:
    """Mean over layers of the relative output error (:func:`ones_lib.spectra.output_error`) of a student's feed-forward layers
    against its teacher's MoE layers, on tokens that no gathering was calibrated on."""
    activations = _other_activations(study.records.find(student.config["teacher"]), study.cache_dir)
    model = study.load_model(student)
    ffns = {name: model.get_submodule(name).bank().expert(0) for name in activations}
    return float(
        np.mean([output_error(ffn.map(torch.Tensor.double), activations[n])["error"] for n, ffn in ffns.items()])
    )


@lru_cache(maxsize=4)
def _other_activations(teacher: Record, cache_dir: Path) -> dict[str, LayerActivations]:
    return record_activations(teacher, cache_dir, seed=1)


def published_table(entries: Iterable[Entry], records: Records) -> pd.DataFrame:
    """One row a model of :func:`ones_lib.study.entries.by_name` with an axis ``teacher``: ``data, teacher, width, budget, model,
    stage, seed, metric, value, retention, kl, parameters, perplexity, ratio, seconds, record``.

    ``value`` is the loss in nats, ``kl`` the divergence from the MoE in nats a token, ``ratio`` the perplexity divided by that of
    the MoE of the same seed. ``seconds`` are those of gathering and KD, as in an :func:`ablation_table`, a step's by teacher and
    width.
    """
    table = results_table(entries, records)
    table = table[table["metric"] == "loss"].reset_index(drop=True)
    found = [Record(records.root / name).result for name in table["record"]]
    table["kl"] = [result["metrics"].get("kl", math.nan) for result in found]
    table["parameters"] = [result["parameters"] for result in found]
    table["perplexity"] = np.exp(table["value"])
    moes = table[table["model"] == "moe"].set_index(["teacher", "seed"])["perplexity"]
    table["ratio"] = table["perplexity"] / table.set_index(["teacher", "seed"]).index.map(moes).to_numpy()
    students = table.dropna(subset="budget")
    seconds = [_seconds(part, records) for _, part in students.groupby(["teacher", "width"])]
    table["seconds"] = pd.concat(seconds).reindex(table.index)
    return table[[c for c in table if c != "record"] + ["record"]]


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
    found: dict[tuple, int] = {}  # many rows have the same reference

    def find(row: pd.Series) -> int:
        key = row["seed"], *(str(row[axis]) for axis in axes)
        if key not in found:
            same = candidates[candidates["seed"] == row["seed"]]
            for axis in axes:
                if pd.notna(row[axis]) and (same[axis] == row[axis]).any():
                    same = same[same[axis] == row[axis]]
            found[key] = same.index[0]
        return found[key]

    return find


def retention_table(table: pd.DataFrame, records: Records, by: tuple[str, ...] = (), block: int = 1) -> pd.DataFrame:
    """Retention over all seeds, with its interval: one row a model, stage, value of ``by``, and reference.

    Columns ``data, model, stage, *by, reference, seeds, value, value_sd, retention, low, high``; the references are
    ``dense`` and, where it is in the table, ``dense_long``. Where rows of several tasks fall together, which must be of
    one metric each, it is the retention of their mean. The interval is :func:`ones_lib.metrics.retention_interval`'s, 95%.

    Examples that depend on each other, such as the tokens of a sequence, are drawn together: ``block`` of them in a row.
    """
    held: dict[tuple[str, str], np.ndarray] = {}

    def scores(index: int) -> np.ndarray:
        key = table.loc[index, "record"], table.loc[index, "metric"]
        if key not in held:
            values = Record(records.root / key[0]).predictions[key[1]].numpy().reshape(-1, block).mean(axis=1)
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
