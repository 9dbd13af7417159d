"""The steps of the image study that notebooks call: configurations of models to train, carried out once and then found.

A :class:`Study` turns questions ("the Top-KG student of seed 1 after 300 steps of KD") into configurations, plain
dictionaries that hold everything that decides the result; :meth:`Study.run` carries out those that have no record yet, in
parallel processes where that is faster, each after the teacher it needs.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from accelerate.utils import set_seed
from torch import nn
from tqdm import tqdm

from ones_lib.data import ImageData, image_data
from ones_lib.distillation import Distillation
from ones_lib.gathering import gathering_methods
from ones_lib.integration import CONTROLS, integrate
from ones_lib.metrics import benefit_retention, retention_interval
from ones_lib.records import Record, Records, config_hash, project_root
from ones_lib.training import Progress, Training, fit
from ones_lib.vision import ImageClassification

Config = dict


@dataclass(frozen=True)
class Entry:
    """One row of a table of results: what a record stands for there. ``axes`` are further columns, such as a budget."""

    model: str
    stage: str
    config: Config
    axes: Mapping = field(default_factory=dict)


@dataclass
class Study:
    """One data set, one MoE, the recipes to train and distil it, and where records are kept.

    Args:
        data: arguments of :func:`ones_lib.data.image_data` (``name, image_size, num_classes, ...``).
        model: ``name`` of a timm model and arguments for it; those that are None are left to the model. Number of classes,
            image size and channels follow from the data.
        teaching: recipe of the MoE teacher and of the dense baseline.
        learning: recipe of the student's KD; its ``steps`` are the largest budget.
        distillation: the KD loss.
        seeds: of initialisation and training; teacher, baselines and students of one seed belong together.
        records: where records are kept, and found.
        cache_dir: where drawn data are kept.
        processes: trainings side by side; 0 chooses: one on a GPU, else one a core. Not part of any configuration.
    """

    data: Mapping
    model: Mapping
    teaching: Training
    learning: Training
    distillation: Distillation
    seeds: Iterable[int] = (0, 1, 2)
    records: Records = field(default_factory=lambda: Records("runs/records"))
    cache_dir: Path = Path("runs/cache")
    processes: int = 0

    def __post_init__(self) -> None:
        self.seeds = list(self.seeds)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: expected at least one, all different and not negative, found {self.seeds}")
        self.data, self.model = dict(self.data), {k: v for k, v in self.model.items() if v is not None}

    # --- what to train -----------------------------------------------------------------------------------------------

    def moe(self, seed: int, **model) -> Config:
        """The MoE teacher; ``model`` overrides its arguments, such as ``num_experts``."""
        arguments = {**self.model, **model}
        return {"kind": "moe", **self._common(seed), "model": arguments, "training": asdict(self.teaching)}

    def dense(self, seed: int, extra_steps: int = 0) -> Config:
        """The dense baseline: the MoE's definition with one expert, from scratch, no teacher.

        With ``extra_steps`` it is ``dense_long``, which trains as long as teacher and KD together.
        """
        training = replace(self.teaching, steps=self.teaching.steps + extra_steps)
        arguments = {**self.model, "num_experts": 1}
        return {"kind": "dense", **self._common(seed), "model": arguments, "training": asdict(training)}

    def dense_kd(self, seed: int) -> Config:
        """The dense model from scratch, with KD for as many steps as the teacher was trained: no gathering."""
        return {**self.dense(seed), "kind": "dense_kd", **self._taught_by(self.moe(seed))}

    def student(
        self, method: str, seed: int, budget: int | None = None, teacher: Config | None = None, **options
    ) -> Config:
        """The student made by a gathering method or control and distilled for ``budget`` steps.

        Args:
            budget: steps of KD; 0 is the student right after gathering; None the largest budget.
            teacher: configuration of another teacher than ``moe(seed)``.
            options: the gathering method's.
        """
        if method not in [*gathering_methods(), *CONTROLS]:
            raise ValueError(f"method: expected one of {[*gathering_methods(), *CONTROLS]}, found {method!r}")
        teacher = self.moe(seed) if teacher is None else teacher
        config = {"kind": "student", **self._common(seed), "method": method, "options": options}
        if budget == 0:
            return {**config, "teacher": teacher, "training": None}
        training = self.learning if budget is None else replace(self.learning, steps=budget)
        return {**config, "training": asdict(training), **self._taught_by(teacher)}

    def _common(self, seed: int) -> Config:
        return {"seed": seed, "data": self.data}

    def _taught_by(self, teacher: Config) -> Config:
        return {"teacher": teacher, "distillation": asdict(self.distillation)}

    def entries(self, methods: Iterable[str]) -> list[Entry]:
        """The main table: teacher, the dense baselines, and the students of all ``methods`` before and after KD."""
        result = self._references()
        for seed in self.seeds:
            result.append(Entry("moe", "trained", self.moe(seed)))
            result.append(Entry("dense_kd", "distilled", self.dense_kd(seed)))
            for method in methods:
                result.append(Entry(method, "gathered", self.student(method, seed, budget=0)))
                result.append(Entry(method, "distilled", self.student(method, seed)))
        return result

    def budget_entries(self, methods: Iterable[str], budgets: Iterable[int]) -> list[Entry]:
        """Students of all ``methods`` after each budget of KD steps (column ``budget``), and what they are measured by."""
        result = self._references()
        for seed in self.seeds:
            result.append(Entry("moe", "trained", self.moe(seed)))
            for budget in budgets:
                axis = {"budget": budget}
                result += [Entry(method, "distilled", self.student(method, seed, budget), axis) for method in methods]
        return result

    def expert_entries(self, methods: Iterable[str], counts: Iterable[int], budget: int) -> list[Entry]:
        """Teachers with each number of experts (column ``num_experts``) and their students after ``budget`` steps of KD."""
        result = self._references()
        for seed in self.seeds:
            for count in counts:
                axis, teacher = {"num_experts": count}, self.moe(seed, num_experts=count)
                result.append(Entry("moe", "trained", teacher, axis))
                for method in methods:
                    result.append(Entry(method, "distilled", self.student(method, seed, budget, teacher), axis))
        return result

    def _references(self) -> list[Entry]:
        """The dense baselines, the second trained as long as the teacher and the largest budget together."""
        result = []
        for seed in self.seeds:
            result.append(Entry("dense", "trained", self.dense(seed)))
            result.append(Entry("dense_long", "trained", self.dense(seed, self.learning.steps)))
        return result

    # --- doing it ----------------------------------------------------------------------------------------------------

    def open_data(self) -> ImageData:
        return _open_data(_frozen(self.data), self.cache_dir)

    def run(self, configs: Iterable[Config], description: str = "") -> list[Record]:
        """Records of all configurations, in their order; those not yet there are computed, each with its teacher."""
        configs = list(configs)
        wanted = {config_hash(c): c for config in configs for c in (*_teachers(config), config)}
        missing = {key: config for key, config in wanted.items() if self.records.find(config) is None}
        if missing:
            self.open_data()  # drawn once, and bad data is found, before any process starts
            steps = sum(_steps(config) for config in missing.values())
            with tqdm(total=steps, desc=description, unit="step", mininterval=2, dynamic_ncols=True) as bar:
                processes = min(self.processes or _default_processes(), len(missing))
                if processes == 1:
                    for config in missing.values():  # teachers stand before their students
                        carry_out(config, self.records, self.cache_dir, _bar_progress(bar, label(config)))
                else:
                    _run_parallel(missing, self.records, self.cache_dir, processes, bar)
        return [self.records.find(config) for config in configs]

    def load_model(self, record: Record) -> nn.Module:
        """The trained model of a record, in eval mode."""
        return record.load_weights(build_model(record.config, self.open_data())).eval()

    def histories(self, groups: Mapping[str, Iterable[Config]]) -> pd.DataFrame:
        """Validation accuracy (percent) over training: ``model, seed, step, val_accuracy``; ``groups`` by model's name."""
        parts = []
        for model, configs in groups.items():
            for config in configs:
                history = self.records.find(config).history.dropna(subset="val_accuracy")
                values = {"step": history["step"], "val_accuracy": 100 * history["val_accuracy"]}
                parts.append(pd.DataFrame({"model": model, "seed": config["seed"], **values}))
        return pd.concat(parts, ignore_index=True)


def label(config: Config) -> str:
    """Short name of a configuration, for people."""
    return f"{config.get('method', config['kind'])}, seed {config['seed']}"


def build_model(config: Config, data: ImageData) -> nn.Module:
    """The freshly initialised model of a configuration (a student's has its teacher's architecture, dense)."""
    if config["kind"] == "student":
        teacher = build_model(config["teacher"], data)
        k = config["options"].get("k")
        return teacher.dense_twin(d_ff=k and k * teacher.moe_layers()[0].num_experts)
    arguments = {"num_classes": data.num_classes, "img_size": data.image_size, "in_chans": data.in_chans}
    arguments |= config["model"]
    with torch.random.fork_rng():
        set_seed(config["seed"])
        return timm.create_model(arguments.pop("name"), **arguments)


def carry_out(config: Config, records: Records, cache_dir: Path, progress: Progress | None = None) -> Record:
    """Train or gather what a configuration asks for, and leave its record; its teacher's record must be there."""
    started = time.perf_counter()
    data = _open_data(_frozen(config["data"]), cache_dir)
    task, result, teacher, distillation = ImageClassification(data), {}, None, None
    if "teacher" in config:
        teacher = records.find(config["teacher"]).load_weights(build_model(config["teacher"], data))
    if config["kind"] == "student":
        model, report = integrate(teacher, config["method"], seed=config["seed"], **config["options"])
        result["integration"] = report.table().to_dict("records")
    else:
        model = build_model(config, data)
    folder, history = records.begin(config), pd.DataFrame()
    if config["training"] is not None:
        if "distillation" in config:
            distillation = Distillation(**config["distillation"])
        else:
            teacher = None
        model, history = fit(
            model,
            task,
            Training(**config["training"]),
            seed=config["seed"],
            teacher=teacher,
            distillation=distillation,
            checkpoint=folder / "checkpoint.safetensors",
            progress=progress,
        )
    predictions = task.predict(model, next(model.parameters()).device)
    result["accuracy"] = (predictions["predicted"] == predictions["label"]).double().mean().item()
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result["wall_seconds"] = time.perf_counter() - started
    return records.finish(config, model, history, predictions, result)


def image_study(
    *,
    data: str,
    data_dir: str,
    image_size: int,
    num_classes: int | None,
    train_per_class: int | None,
    val_per_class: int | None,
    distortion: float,
    color_jitter: float,
    min_crop: float,
    model: str,
    patch_size: int | None,
    d_model: int | None,
    depth: int | None,
    num_heads: int | None,
    d_ff: int | None,
    num_experts: int | None,
    top_k: int | None,
    renormalize: bool,
    share_depth: bool,
    drop_rate: float,
    seeds: list[int],
    teacher_steps: int,
    batch_size: int,
    learning_rate: float,
    warmup: float,
    weight_decay: float,
    optimizer: str,
    label_smoothing: float,
    mixup: float,
    ema_decay: float,
    mixed_precision: str,
    kd_steps: int,
    kd_learning_rate: float,
    temperature: float,
    alpha: float,
    records_dir: str,
    redo_before: str,
    processes: int,
) -> Study:
    """The :class:`Study` of the image notebooks' flat parameters; paths are relative to the project's root.

    The KD recipe is the teacher's but for steps, learning rate and, since the student starts trained, one evaluation.
    """
    root = project_root()
    teaching = Training(
        steps=teacher_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        optimizer=optimizer,
        label_smoothing=label_smoothing,
        mixup=mixup,
        ema_decay=ema_decay,
        mixed_precision=mixed_precision,
        evaluations=5,
    )
    return Study(
        data={
            "name": data,
            "data_dir": str(root / data_dir) if data_dir else "",
            "image_size": image_size,
            "num_classes": num_classes,
            "train_per_class": train_per_class,
            "val_per_class": val_per_class,
            "distortion": distortion,
            "color_jitter": color_jitter,
            "min_crop": min_crop,
        },
        model={
            "name": model,
            "patch_size": patch_size,
            "embed_dim": d_model,
            "depth": depth,
            "num_heads": num_heads,
            "d_ff": d_ff,
            "num_experts": num_experts,
            "top_k": top_k,
            "renormalize": renormalize,
            "share_depth": share_depth,
            "proj_drop_rate": drop_rate,
        },
        teaching=teaching,
        learning=replace(teaching, steps=kd_steps, learning_rate=kd_learning_rate, evaluations=1),
        distillation=Distillation(temperature, alpha),
        seeds=seeds,
        records=Records(root / records_dir, redo_before),
        cache_dir=root / "runs" / "cache",
        processes=processes,
    )


def call_with(function: Callable, namespace: Mapping):
    """Call ``function`` with those of a namespace's variables that it has parameters for (a notebook's ``globals()``)."""
    return function(**{name: namespace[name] for name in inspect.signature(function).parameters})


# --- tables of results -----------------------------------------------------------------------------------------------


def results_table(entries: Iterable[Entry], records: Records) -> pd.DataFrame:
    """One row an entry: ``data, model, stage, seed, *axes, accuracy, retention, record``; accuracy in percent.

    Retention is that of the row's seed: against the ``dense`` and ``moe`` entries of the same seed and the same axes, or of
    the same seed alone where those were not trained anew for each value of an axis.
    """
    rows = []
    for entry in entries:
        record = records.find(entry.config)
        rows.append(
            {
                "data": entry.config["data"]["name"],
                "model": entry.model,
                "stage": entry.stage,
                "seed": entry.config["seed"],
                **entry.axes,
                "accuracy": 100 * record.result["accuracy"],
                "record": record.folder.name,
            }
        )
    table = pd.DataFrame(rows)
    references = {name: _reference(table, name) for name in ("dense", "moe")}
    retention = [
        benefit_retention(row["accuracy"], *(table["accuracy"][references[name](row)] for name in references))
        for _, row in table.iterrows()
    ]
    table.insert(table.columns.get_loc("record"), "retention", retention)
    return table


def _reference(table: pd.DataFrame, model: str):
    """Function from a row to the index of the reference ``model``'s row that belongs to it."""
    candidates = table[table["model"] == model]
    axes = [c for c in table.columns if c not in ("data", "model", "stage", "seed", "accuracy", "retention", "record")]

    def find(row: pd.Series) -> int:
        same = candidates[candidates["seed"] == row["seed"]]
        for axis in axes:
            if pd.notna(row[axis]) and (same[axis] == row[axis]).any():
                same = same[same[axis] == row[axis]]
        return same.index[0]

    return find


def retention_table(table: pd.DataFrame, records: Records, by: tuple[str, ...] = ()) -> pd.DataFrame:
    """Retention over all seeds, with its interval: one row a model, stage, value of ``by``, and reference.

    Columns ``data, model, stage, *by, reference, accuracy, accuracy_sd, retention, low, high``; the references are
    ``dense`` and, where it is in the table, ``dense_long``. The interval is
    :func:`ones_lib.metrics.retention_interval`'s, 95%.
    """
    correct = {name: Record(records.root / name).correct.numpy() for name in table["record"].unique()}
    find_moe = _reference(table, "moe")
    bases = {name: _reference(table, name) for name in ("dense", "dense_long") if (table["model"] == name).any()}
    rows = []
    for values, group in table.groupby(["data", "model", "stage", *by], sort=False, dropna=False):
        group = group.sort_values("seed")

        def stacked(find, group=group):
            return [correct[table["record"][find(row)]] for _, row in group.iterrows()]

        for base, find in bases.items():
            parts = [stacked(lambda row: row.name), stacked(find), stacked(find_moe)]
            retention, low, high = retention_interval(*(np.stack(part) for part in parts))
            rows.append(
                {
                    **dict(zip(["data", "model", "stage", *by], values, strict=True)),
                    "reference": base,
                    "seeds": len(group),
                    "accuracy": group["accuracy"].mean(),
                    "accuracy_sd": group["accuracy"].std(),
                    "retention": retention,
                    "low": low,
                    "high": high,
                }
            )
    return pd.DataFrame(rows)


# --- processes -------------------------------------------------------------------------------------------------------


def _default_processes() -> int:
    return 1 if torch.accelerator.is_available() else _cores()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _teachers(config: Config) -> list[Config]:
    """The teachers that a configuration needs, those that need none first."""
    return [*_teachers(config["teacher"]), config["teacher"]] if "teacher" in config else []


def _steps(config: Config) -> int:
    return config["training"]["steps"] if config["training"] else 0


def _frozen(data: Mapping) -> tuple:
    return tuple(sorted(data.items()))


@lru_cache(maxsize=2)
def _open_data(data: tuple, cache_dir: Path) -> ImageData:
    return image_data(**dict(data), cache_dir=cache_dir)


def _bar_progress(bar: tqdm, name: str) -> Progress:
    seen = 0

    def progress(step: int, steps: int, loss: float, accuracy: float) -> None:
        nonlocal seen
        bar.set_postfix_str(f"{name}: loss {loss:.3f}, accuracy {accuracy:.1%}", refresh=False)
        bar.update(step - seen)
        seen = step

    return progress


def _run_parallel(missing: Mapping[str, Config], records: Records, cache_dir: Path, processes: int, bar: tqdm) -> None:
    """Carry out configurations in processes of their own, each as soon as its teacher is there: teachers, then the longest."""
    context = multiprocessing.get_context("spawn")
    reports, stop = context.Queue(), context.Event()
    threads = max(1, _cores() // processes)
    waiting, running = dict(missing), {}  # key -> configuration; future -> key
    progress = {key: _bar_progress(bar, label(config)) for key, config in missing.items()}

    def ready(config: Config) -> bool:
        unfinished = {*waiting, *running.values()}
        return unfinished.isdisjoint(config_hash(teacher) for teacher in _teachers(config))

    def drain() -> None:
        while True:
            try:
                key, *report = reports.get_nowait()
            except queue.Empty:
                return
            progress[key](*report)

    with ProcessPoolExecutor(processes, context, _start_worker, (threads, reports, stop)) as pool:
        try:
            while waiting or running:
                candidates = [key for key, config in waiting.items() if ready(config)]
                candidates.sort(key=lambda key: (waiting[key]["kind"] != "moe", -_steps(waiting[key])))
                for key in candidates[: processes - len(running)]:
                    running[pool.submit(_work, key, waiting.pop(key), records, cache_dir)] = key
                done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                drain()
                for future in done:
                    key = running.pop(future)
                    future.result()
            drain()
        except BaseException:
            stop.set()  # the workers end at their next report
            raise


def _start_worker(threads: int, reports: multiprocessing.Queue, stop) -> None:
    global _REPORTS, _STOP
    _REPORTS, _STOP = reports, stop
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed notebook must not leave its workers behind; what they had done is in their checkpoints."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(key: str, config: Config, records: Records, cache_dir: Path) -> None:
    def progress(*report) -> None:
        if _STOP.is_set():
            raise KeyboardInterrupt("another training failed or the study was interrupted")
        _REPORTS.put((key, *report))

    carry_out(config, records, cache_dir, progress)
