"""Runs configs: opens their data, builds models, trains or gathers, and leaves a record."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Self

import pandas as pd
import torch
from accelerate.utils import set_seed
from torch import nn

from ones_lib.calibration import Calibration, LayerActivations, collect_activations
from ones_lib.data.files import model_tensors
from ones_lib.data.images import ImageData, image_data
from ones_lib.data.text import Corpus, TextTasks, text_corpus, text_tasks
from ones_lib.distillation import Distillation
from ones_lib.integration import integrate
from ones_lib.models import upcycle
from ones_lib.study.image_task import ImageClassification, classification_model
from ones_lib.study.inputs import arguments_of, check_unchanged
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
from ones_lib.study.text_tasks import MaskedLanguageModelling, finetuning_model, finetuning_task, pretraining_model
from ones_lib.study.training import Progress, Task, Training, default_device, fit

CALIBRATION_BATCH = 64  # examples: with their tokens at every depth enough for a measure, and small for a large model
Config = dict
Data = ImageData | Corpus


@dataclass(frozen=True)
class Execution:
    """How work is done. The record is the same up to rounding; with several processes some random draws differ too, see
    :mod:`ones_lib.study.training`.

    Args:
        launch: command that starts several processes of a training and sets WORLD_SIZE for each, such as
            ``torchrun --nproc_per_node 8``. Empty: trainings run in this process or side by side.
        device_batch: examples that a process takes at a time, see :func:`ones_lib.study.training.fit`.
        shard: spread models over the processes, see the same.
        deterministic: deterministic algorithms alone (``torch.use_deterministic_algorithms``). They cost time on a GPU, none
            on a CPU. An operation that has no such algorithm is an error.
        plan: file to write the missing configs to, instead of running them. Their records are then None.
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

    def environment(self) -> dict[str, str]:
        """Environment variables, such as ONES_LAUNCH, by which ``run_all.sh`` passes its options on to the notebooks."""
        given = {f"ONES_{f.name.upper()}": str(getattr(self, f.name)) for f in fields(self) if getattr(self, f.name)}
        return given | ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if self.deterministic else {})

    @classmethod
    def from_environment(cls) -> Self:
        """What :meth:`environment` said."""
        given = {f.name: os.environ.get(f"ONES_{f.name.upper()}", "") for f in fields(cls)}
        return cls(**{f.name: type(f.default)(given[f.name]) for f in fields(cls) if given[f.name] not in ("", "0")})


@dataclass(frozen=True)
class Workplace:
    """Where work is done: records, drawn data, the teacher logits that students share while they are trained; and how."""

    records: Records
    cache_dir: Path
    teacher_logits: Path
    execution: Execution = Execution()


# --- configs -----------------------------------------------------------------------------------------------------------


def label(config: Config) -> str:
    """Short name of a config, for people."""
    if config["kind"] == "finetuned":
        return f"{config['task']}: {label(config['start'])}"
    return f"{config.get('method', config['kind'])}, seed {config['seed']}"


def needed(config: Config) -> list[Config]:
    """The configs whose models this one starts or learns from; those that need none come first."""
    direct = [config[role] for role in ("start", "teacher") if role in config]
    return [found for other in direct for found in (*needed(other), other)]


def steps_of(config: Config) -> int:
    return config["training"]["steps"] if config.get("training") else 0


def recipe_of(config: Config) -> Mapping:
    """The training recipe of a model, or of the model it was made of."""
    return config["training"] or recipe_of(config["start"])


def _published(config: Config) -> bool:
    """Whether the weights are a checkpoint's. A record keeps no copy of these."""
    return config["kind"] == "moe" and "checkpoint" in config.get("model", {})


# --- data, models, tasks -----------------------------------------------------------------------------------------------


def data_of(config: Config, cache_dir: Path) -> Data:
    """A config's data; of text the corpus. Opened once."""
    return _open_data(config["domain"], json.dumps(config["data"], sort_keys=True), cache_dir)


@lru_cache(maxsize=2)
def _open_data(domain: str, data: str, cache_dir: Path) -> Data:
    arguments = arguments_of(json.loads(data))
    return (image_data if domain == "image" else text_corpus)(**arguments, cache_dir=cache_dir)


def tasks_of(config: Config, cache_dir: Path) -> TextTasks:
    """The tasks that a text config's models are fine-tuned on. Opened once."""
    return _open_tasks(*(json.dumps(config[part], sort_keys=True) for part in ("data", "task_data")), cache_dir)


@lru_cache(maxsize=2)
def _open_tasks(data: str, task_data: str, cache_dir: Path) -> TextTasks:
    arguments = arguments_of(json.loads(task_data))
    return text_tasks(**arguments, tokenizer=_open_data("text", data, cache_dir).tokenizer, cache_dir=cache_dir)


def build_model(config: Config, data: Data) -> nn.Module:
    """The freshly initialised model of a config. A student has its teacher's architecture, dense."""
    if config["kind"] == "student" and config["domain"] == "language":
        width = {"dense_width": config["options"]["d_ff"]} if "d_ff" in config["options"] else {}
        return language_model({**config["teacher"]["model"], **width}, data, config["seed"], dense=True)
    if config["domain"] == "language":
        return language_model(config["model"], data, config["seed"], dense=config["kind"] != "moe")
    if config["kind"] == "student":
        teacher = build_model(config["teacher"], data)
        k, d_ff = (config["options"].get(name) for name in ("k", "d_ff"))
        return teacher.dense_twin(d_ff=d_ff or (k and k * teacher.moe_layers()[0].num_experts))
    if "upcycling" in config:
        return upcycle(build_model(config["start"], data), seed=config["seed"], **config["upcycling"])
    if config["kind"] == "finetuned":
        return _finetuning_model(build_model(config["start"], data), config)
    build = {"image": classification_model, "text": pretraining_model}[config["domain"]]
    return build(config["model"], data, config["seed"])


def _finetuning_model(start: nn.Module, config: Config) -> nn.Module:
    data = config["task_data"]
    return finetuning_model(start, config["task"], config["seed"], data["task_length"], data.get("own"))


def task_of(config: Config, cache_dir: Path) -> Task:
    """What a config's model is trained to do and measured by. A student does what its teacher does."""
    if config["kind"] == "student":
        return task_of(config["teacher"], cache_dir)
    if config["kind"] == "finetuned":
        return finetuning_task(config["task"], tasks_of(config, cache_dir))
    task = {"image": ImageClassification, "text": MaskedLanguageModelling, "language": LanguageModelling}[
        config["domain"]
    ]
    return task(data_of(config, cache_dir))


def calibration_batches(
    task: Task,
    recipe: Mapping,
    examples: int,
    batch_size: int = CALIBRATION_BATCH,
    device: torch.device | None = None,
    seed: int = 0,
) -> list:
    """Batches of a task's training data, always the same ones for a ``seed``.

    They are drawn as for a :class:`Training` with the arguments ``recipe``, but without mixup. ``batch_size`` is at most the
    recipe's.
    """
    batch_size = min(batch_size, recipe["batch_size"])
    training = replace(Training(**recipe), mixup=0.0, batch_size=batch_size, steps=math.ceil(examples / batch_size))
    with torch.random.fork_rng():
        set_seed(seed)  # of the batches' masks
        return list(task.batches(training, seed=seed, start=0, device=device or torch.device("cpu")))


def load_record(record: Record, cache_dir: Path) -> tuple[nn.Module, Task]:
    """The trained model of a record, in eval mode, and the task that it was trained for."""
    return _load(record, cache_dir).eval(), task_of(record.config, cache_dir)


def _load(record: Record, cache_dir: Path) -> nn.Module:
    model = build_model(record.config, data_of(record.config, cache_dir))
    return model if _published(record.config) else record.load_weights(model)


def record_activations(
    record: Record, cache_dir: Path, max_tokens: int = 4096, seed: int = 0
) -> dict[str, LayerActivations]:
    """Activations by layer of a record's model on one batch of its own training data, always the same one for a ``seed``.

    Layers have the names that :func:`ones_lib.checkpoints.open_experts` gives them. In float64, so that results do not depend
    on the number of threads.
    """
    model, task = load_record(record, cache_dir)
    recipe = recipe_of(record.config)
    (batch,) = calibration_batches(task, recipe, min(CALIBRATION_BATCH, recipe["batch_size"]), seed=seed)
    batch = batch._replace(
        **{k: v.double() for k, v in batch._asdict().items() if torch.is_tensor(v) and v.is_floating_point()}
    )
    return collect_activations(model.double(), task.forward, [batch], max_tokens)


# --- work --------------------------------------------------------------------------------------------------------------


def carry_out(config: Config, place: Workplace, progress: Progress | None = None) -> Record:
    """Train or gather what a config asks for, and leave its record. The records that it needs must be there.

    Whoever runs the same config at the same time is waited for, and a record finished meanwhile is not made again.
    """
    records = place.records
    with records.lock(config) if is_main() else nullcontext():
        if not said_by_main(is_main() and records.find(config) is not None):
            if config["training"] is not None:
                _carry_out(config, place, progress)
            elif is_main():  # gathered, or read from a checkpoint: no work for several processes
                with alone():
                    _carry_out(config, place, progress)
        wait_for_all()
    return records.find(config)


def _carry_out(config: Config, place: Workplace, progress: Progress | None) -> None:
    torch.use_deterministic_algorithms(place.execution.deterministic)
    started, records = time.perf_counter(), place.records
    check_unchanged(config, place.cache_dir)
    with main_first():  # it fills the cache
        task = task_of(config, place.cache_dir)
    teacher = _load(records.find(config["teacher"]), place.cache_dir) if "teacher" in config else None
    model, result = _start(config, place, task, teacher)
    if is_main():
        records.begin(config)
    wait_for_all()
    history = pd.DataFrame()
    if config["training"] is not None:
        model, history = _train(config, place, task, model, teacher, progress)
    device = next(model.parameters()).device
    predictions, metrics = dict(task.predict(model, device)), task.metrics
    if teacher is not None and isinstance(task, LanguageModelling):
        predictions["kl"], metrics = task.divergence(model, teacher, device), (*metrics, "kl")
    result["metrics"] = {metric: predictions[metric].double().mean().item() for metric in metrics}
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result["wall_seconds"] = time.perf_counter() - started
    how = ("device_batch", "shard", "deterministic")
    result["execution"] = {"processes": world_size(), **{name: getattr(place.execution, name) for name in how}}
    weights = {} if _published(config) else whole_tensors(model_tensors(model))
    if is_main():
        records.finish(config, weights, history, predictions, result)


def _start(config: Config, place: Workplace, task: Task, teacher: nn.Module | None) -> tuple[nn.Module, dict]:
    """The model that a training starts from, or the gathered one; and what to note of how it was made."""
    data = data_of(config, place.cache_dir)
    start = _load(place.records.find(config["start"]), place.cache_dir) if "start" in config else None
    if "upcycling" in config:
        return upcycle(start, seed=config["seed"], **config["upcycling"]), {}
    if config["kind"] == "finetuned":
        return _finetuning_model(start, config), {}
    if config["kind"] != "student":
        return build_model(config, data), {}
    if start is not None:
        return start, {}
    if config["domain"] == "language":
        made = time.perf_counter()
        model, layers = gathered_model(teacher, config, data)
        return model, {"gathering_seconds": time.perf_counter() - made, "layers": layers}
    calibration, device = None, default_device()
    if "calibration_examples" in config:
        teacher.to(device)
        recipe = recipe_of(config["teacher"])
        batches = calibration_batches(task, recipe, config["calibration_examples"], device=device)
        calibration = Calibration(task.forward, batches)
    made = time.perf_counter()
    model, report = integrate(
        teacher.eval(), config["method"], seed=config["seed"], calibration=calibration, **config["options"]
    )
    seconds = time.perf_counter() - made
    return model, {"gathering_seconds": seconds, "integration": report.table().to_dict("records")}


def _train(
    config: Config, place: Workplace, task: Task, model: nn.Module, teacher: nn.Module | None, progress: Progress | None
) -> tuple[nn.Module, pd.DataFrame]:
    taught = "distillation" in config
    same_weights(model_tensors(model.to(default_device())).values())
    return fit(
        model,
        task,
        Training(**config["training"]),
        seed=config["seed"],
        teacher=teacher if taught else None,
        distillation=Distillation(**config["distillation"]) if taught else None,
        teacher_logits=place.teacher_logits / config_hash(config["teacher"]) if taught else None,
        checkpoint=place.records.partial(config) / "checkpoint.safetensors",
        device_batch=place.execution.device_batch,
        shard=place.execution.shard,
        progress=progress,
    )
