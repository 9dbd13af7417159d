"""Carrying out configurations: their models, data and tasks, training and gathering, here, side by side, or under torchrun.

``python -m ones_lib.study.running PLAN`` is what a launcher such as torchrun starts, in every process.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Self

import pandas as pd
import torch
from accelerate.utils import set_seed
from torch import nn

from ones_lib.calibration import Calibration, LayerActivations, collect_activations
from ones_lib.data import ImageData, image_data
from ones_lib.data.files import model_tensors
from ones_lib.data.text import TextData, text_data
from ones_lib.distillation import Distillation
from ones_lib.integration import integrate
from ones_lib.models.upcycling import upcycle
from ones_lib.study.image_task import ImageClassification, classification_model
from ones_lib.study.language_task import LanguageModelling, gathered_model, language_model
from ones_lib.study.processes import (
    alone,
    is_main,
    main_first,
    said_by_main,
    same_weights,
    wait_for_all,
    whole_tensors,
    world_size,
)
from ones_lib.study.records import Record, Records, config_hash
from ones_lib.study.text_tasks import finetuning_model, pretraining_model, text_task
from ones_lib.study.training import Progress, Task, Training, default_device, fit

CALIBRATION_BATCH = 64  # examples: with their tokens at every depth enough for a measure, and small for a large model
Config = dict
Data = ImageData | TextData


@dataclass(frozen=True)
class Execution:
    """How work is done, which is no part of what is asked for: any way leads to the same record, but for rounding and, under
    several processes, what :mod:`ones_lib.study.training` says of them.

    Args:
        launch: command that starts several processes of a training and sets WORLD_SIZE for each, such as
            ``torchrun --nproc_per_node 8``. Empty: none, trainings run in this process or side by side.
        device_batch: examples that a process takes at a time, see :func:`ones_lib.study.training.fit`.
        shard: spread models over the processes, see the same.
        deterministic: deterministic algorithms alone (``torch.use_deterministic_algorithms``); they cost time on a GPU, none
            on a CPU, and what has no such algorithm is an error.
        plan: file to write what would be done to, in the place of doing it. Records that are not there are then None.
    """

    launch: str = ""
    device_batch: int = 0
    shard: bool = False
    deterministic: bool = False
    plan: str = ""

    def __post_init__(self) -> None:
        if self.device_batch < 0:
            raise ValueError(f"device_batch: expected a number of at least 0, found {self.device_batch}")
        if self.shard and not self.launch:
            raise ValueError("shard: expected a launch command, such as 'torchrun --nproc_per_node 8', found none")

    @classmethod
    def from_environment(cls) -> Self:
        """As ``run_all.sh`` was told, which passes it on to the notebooks by ONES_LAUNCH, ONES_DEVICE_BATCH, ONES_SHARD,
        ONES_DETERMINISTIC and ONES_PLAN."""
        given = {name: os.environ.get(f"ONES_{name.upper()}", "") for name in cls.__dataclass_fields__}
        return cls(
            launch=given["launch"],
            device_batch=int(given["device_batch"] or 0),
            shard=given["shard"] == "1",
            deterministic=given["deterministic"] == "1",
            plan=given["plan"],
        )


@dataclass(frozen=True)
class Workplace:
    """Where work is done: records, drawn data, the logits that students share while they are trained; and how."""

    records: Records
    cache_dir: Path
    teacher_logits: Path
    execution: Execution = Execution()


def label(config: Config) -> str:
    """Short name of a configuration, for people."""
    if config["kind"] == "finetuned":
        return f"{config['task']}: {label(config['start'])}"
    return f"{config.get('method', config['kind'])}, seed {config['seed']}"


def build_model(config: Config, data: Data) -> nn.Module:
    """The freshly initialised model of a configuration (a student's has its teacher's architecture, dense)."""
    if config["kind"] == "student" and config["domain"] == "language":
        dense = {**config["teacher"]["model"], "num_experts": 1}
        return language_model(dense, data, config["seed"], config["options"].get("d_ff"))
    if config["kind"] == "student":
        teacher = build_model(config["teacher"], data)
        k = config["options"].get("k")
        return teacher.dense_twin(d_ff=k and k * teacher.moe_layers()[0].num_experts)
    if "upcycling" in config:
        return upcycle(build_model(config["start"], data), seed=config["seed"], **config["upcycling"])
    if config["kind"] == "finetuned":
        return finetuning_model(build_model(config["start"], data), config["task"], config["seed"])
    build = {"image": classification_model, "text": pretraining_model, "language": language_model}[config["domain"]]
    return build(config["model"], data, config["seed"])


def task_of(config: Config, data: Data) -> Task:
    """What a configuration's model does and is measured by; a student does what its teacher does."""
    if config["kind"] == "student":
        return task_of(config["teacher"], data)
    if config["domain"] == "language":
        return LanguageModelling(data)
    if config["domain"] == "image":
        return ImageClassification(data)
    return text_task(config.get("task", "masked_lm"), data)


def calibration_batches(
    task: Task,
    recipe: Mapping,
    examples: int,
    batch_size: int = 64,
    device: torch.device | None = None,
    seed: int = 0,
) -> list:
    """Batches of a task's training data, always the same ones for a ``seed``; ``recipe`` are the arguments of the
    :class:`Training` that they are drawn as for, but for mixup. ``batch_size`` is not above the recipe's."""
    batch_size = min(batch_size, recipe["batch_size"])
    training = replace(Training(**recipe), mixup=0.0, batch_size=batch_size, steps=math.ceil(examples / batch_size))
    with torch.random.fork_rng():
        set_seed(seed)  # of the batches' masks
        return list(task.batches(training, seed=seed, start=0, device=device or torch.device("cpu")))


def recipe_of(config: Config) -> Mapping:
    """The training recipe of a model, or of what it was made of."""
    return config["training"] or recipe_of(config["start"])


def load_record(record: Record, cache_dir: Path) -> tuple[nn.Module, Task]:
    """The trained model of a record, in eval mode, and the task that it was trained for."""
    data = open_data(record.config["domain"], frozen(record.config["data"]), cache_dir)
    return _load(record, data).eval(), task_of(record.config, data)


def _load(record: Record, data: Data) -> nn.Module:
    model = build_model(record.config, data)
    return model if _published(record.config) else record.load_weights(model)


def _published(config: Config) -> bool:
    """Whether the weights are those of a checkpoint, of which a record keeps no copy."""
    return config["kind"] == "moe" and "checkpoint" in config.get("model", {})


def record_activations(
    record: Record, cache_dir: Path, max_tokens: int = 4096, seed: int = 0
) -> dict[str, LayerActivations]:
    """Activations by layer of a record's model on one batch of its own training data, always the same one for a ``seed``.

    Layers have the names that :func:`open_experts` gives them. In float64, so that what is made of them does not depend on
    the number of threads.
    """
    model, task = load_record(record, cache_dir)
    recipe = recipe_of(record.config)
    (batch,) = calibration_batches(task, recipe, min(CALIBRATION_BATCH, recipe["batch_size"]), seed=seed)
    batch = batch._replace(
        **{k: v.double() for k, v in batch._asdict().items() if torch.is_tensor(v) and v.is_floating_point()}
    )
    return collect_activations(model.double(), task.forward, [batch], max_tokens)


def carry_out(config: Config, place: Workplace, progress: Progress | None = None) -> Record:
    """Train or gather what a configuration asks for, and leave its record; the records that it needs must be there.

    Whoever else does the same at the same time is waited for, and what has been finished meanwhile is not done again.
    """
    records = place.records
    with records.lock(config) if is_main() else nullcontext():
        if not said_by_main(is_main() and records.find(config) is not None):
            if config["training"] is not None:
                _carry_out(config, place, progress)
            elif is_main():  # gathered, or read from a checkpoint: no work for several
                with alone():
                    _carry_out(config, place, progress)
        wait_for_all()
    return records.find(config)


def _carry_out(config: Config, place: Workplace, progress: Progress | None) -> None:
    torch.use_deterministic_algorithms(place.execution.deterministic)
    started, records = time.perf_counter(), place.records
    with main_first():
        data = open_data(config["domain"], frozen(config["data"]), place.cache_dir)
    task, result, teacher, distillation = task_of(config, data), {}, None, None

    def load(other: Config) -> nn.Module:
        return _load(records.find(other), data)

    if "teacher" in config:
        teacher = load(config["teacher"])
    if config["kind"] == "student" and "start" in config:
        model = load(config["start"])
    elif config["kind"] == "student" and config["domain"] == "language":
        model, result["layers"] = gathered_model(teacher, config, data)
    elif config["kind"] == "student":
        calibration = None
        if "calibration_examples" in config:
            teacher.to(default_device())
            batches = calibration_batches(
                task, recipe_of(config["teacher"]), config["calibration_examples"], device=default_device()
            )
            calibration = Calibration(task.forward, batches)
        made = time.perf_counter()
        options = {"seed": config["seed"], "calibration": calibration, **config["options"]}
        model, report = integrate(teacher.eval(), config["method"], **options)
        result["gathering_seconds"] = time.perf_counter() - made
        result["integration"] = report.table().to_dict("records")
    elif "upcycling" in config:
        model = upcycle(load(config["start"]), seed=config["seed"], **config["upcycling"])
    elif config["kind"] == "finetuned":
        model = finetuning_model(load(config["start"]), config["task"], config["seed"])
    else:
        model = build_model(config, data)
    if is_main():
        records.begin(config)
    wait_for_all()
    history, logits = pd.DataFrame(), None
    if config["training"] is not None:
        if "distillation" in config:
            distillation = Distillation(**config["distillation"])
            logits = place.teacher_logits / config_hash(config["teacher"])
        else:
            teacher = None
        same_weights(model_tensors(model.to(default_device())).values())
        model, history = fit(
            model,
            task,
            Training(**config["training"]),
            seed=config["seed"],
            teacher=teacher,
            distillation=distillation,
            teacher_logits=logits,
            checkpoint=records.partial(config) / "checkpoint.safetensors",
            device_batch=place.execution.device_batch,
            shard=place.execution.shard,
            progress=progress,
        )
    predictions = task.predict(model, next(model.parameters()).device)
    result["metrics"] = {metric: predictions[metric].double().mean().item() for metric in task.metrics}
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result["wall_seconds"] = time.perf_counter() - started
    how = ("device_batch", "shard", "deterministic")
    result["execution"] = {"processes": world_size(), **{name: getattr(place.execution, name) for name in how}}
    weights = {} if _published(config) else whole_tensors(model_tensors(model))
    if is_main():
        records.finish(config, weights, history, predictions, result)


def needed(config: Config) -> list[Config]:
    """The configurations whose models this one starts or learns from, those that need none first."""
    direct = [config[role] for role in ("start", "teacher") if role in config]
    return [found for other in direct for found in (*needed(other), other)]


def steps_of(config: Config) -> int:
    return config["training"]["steps"] if config.get("training") else 0


def frozen(data: Mapping) -> str:
    return json.dumps(data, sort_keys=True)


@lru_cache(maxsize=2)
def open_data(domain: str, data: str, cache_dir: Path) -> Data:
    return {"image": image_data, "text": text_data, "language": text_data}[domain](
        **json.loads(data), cache_dir=cache_dir
    )
