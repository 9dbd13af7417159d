"""Carrying out configurations: their models, data and tasks, training and gathering, here, side by side, or under torchrun.

``python -m ones_lib.execution PLAN`` is what a launcher such as torchrun starts, in every process.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import multiprocessing
import os
import platform
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Self

import pandas as pd
import torch
from accelerate.utils import set_seed
from torch import nn
from tqdm import tqdm

from ones_lib.calibration import Calibration, LayerActivations, collect_activations
from ones_lib.data import ImageData, image_data, images
from ones_lib.data.images import available_cores
from ones_lib.data.text import TextData, text_data
from ones_lib.distillation import Distillation
from ones_lib.files import left_behind, model_tensors, this_process, write_text
from ones_lib.integration import integrate
from ones_lib.language_models import LanguageModelling, language_model
from ones_lib.language_students import gathered_model
from ones_lib.processes import (
    alone,
    is_main,
    join,
    main_first,
    said_by_main,
    same_weights,
    wait_for_all,
    whole_tensors,
    world_size,
)
from ones_lib.records import Record, Records, config_hash
from ones_lib.text_tasks import finetuning_model, pretraining_model, text_task
from ones_lib.training import Progress, Task, Training, default_device, fit
from ones_lib.upcycling import upcycle
from ones_lib.vision import ImageClassification, classification_model

CALIBRATION_BATCH = 64  # examples: with their tokens at every depth enough for a measure, and small for a large model
Config = dict
Data = ImageData | TextData


@dataclass(frozen=True)
class Execution:
    """How work is done, which is no part of what is asked for: any way leads to the same record, but for rounding and, under
    several processes, what :mod:`ones_lib.training` says of them.

    Args:
        launch: command that starts several processes of a training and sets WORLD_SIZE for each, such as
            ``torchrun --nproc_per_node 8``. Empty: none, trainings run in this process or side by side.
        device_batch: examples that a process takes at a time, see :func:`ones_lib.training.fit`.
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


# --- processes -------------------------------------------------------------------------------------------------------


def run_all(
    missing: Mapping[str, Config],
    records: Records,
    cache_dir: Path,
    execution: Execution,
    processes: int = 0,
    description: str = "",
) -> None:
    """Carry out all configurations, by their hashes, teachers before their students; with a progress bar.

    Args:
        processes: trainings side by side; 0: one on a GPU, else one a core. With a launch command they are one after another.
    """
    steps = sum(steps_of(config) for config in missing.values())
    bar = tqdm(total=steps, desc=description, unit="step", mininterval=2, dynamic_ncols=True)
    with bar, _teacher_logits(cache_dir) as logits:
        place = Workplace(records, cache_dir, logits, execution)
        processes = min(processes or _default_processes(), len(missing))
        if execution.launch:
            _run_launched(missing, place, bar)
        elif processes == 1:
            for config in missing.values():  # teachers stand before their students
                carry_out(config, place, _bar_progress(bar, label(config)))
        else:
            _run_parallel(missing, place, processes, bar)


def write_plan(path: Path, configs: Mapping[str, Config], cache_dir: Path) -> None:
    """Add configurations to a plan, in the place of carrying them out."""
    plan = json.loads(path.read_text()) if path.exists() else {"configs": {}}
    write_text(path, json.dumps({"configs": plan["configs"] | dict(configs), "cache_dir": str(cache_dir)}))


@contextmanager
def _teacher_logits(cache_dir: Path) -> Iterator[Path]:
    """A folder for the logits that students share, while this process trains them: they are gigabytes, and made in seconds."""
    root = cache_dir / "teacher_logits"
    for left in left_behind(root):
        shutil.rmtree(left, ignore_errors=True)
    folder = root / this_process()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _default_processes() -> int:
    return 1 if torch.accelerator.is_available() else available_cores()


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


def _bar_progress(bar: tqdm, name: str) -> Progress:
    seen = 0

    def progress(step: int, steps: int, loss: float, accuracy: float) -> None:
        nonlocal seen
        bar.set_postfix_str(f"{name}: loss {loss:.3f}, accuracy {accuracy:.1%}", refresh=False)
        bar.update(step - seen)
        seen = step

    return progress


def _run_parallel(missing: Mapping[str, Config], place: Workplace, processes: int, bar: tqdm) -> None:
    """Carry out configurations in processes of their own, each as soon as those it needs are there; the longest first, but
    before them what others need."""
    context = multiprocessing.get_context("spawn")
    reports, stop = context.Queue(), context.Event()
    waiting, running = dict(missing), {}  # key -> configuration; future -> key
    progress = {key: _bar_progress(bar, label(config)) for key, config in missing.items()}
    needs = {key: {config_hash(other) for other in needed(config)} for key, config in missing.items()}

    def drain() -> None:
        while True:
            try:
                key, *report = reports.get_nowait()
            except queue.Empty:
                return
            progress[key](*report)

    with ProcessPoolExecutor(processes, context, _start_worker, (processes, reports, stop)) as pool:
        try:
            while waiting or running:
                unfinished = {*waiting, *running.values()}
                candidates = [key for key in waiting if unfinished.isdisjoint(needs[key])]
                wanted = set().union(*(needs[key] for key in waiting))
                candidates.sort(key=lambda key: (key not in wanted, -steps_of(waiting[key])))
                for key in candidates[: processes - len(running)]:
                    running[pool.submit(_work, key, waiting.pop(key), place)] = key
                done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                drain()
                for future in done:
                    key = running.pop(future)
                    future.result()
            drain()
        except BaseException:
            stop.set()  # the workers end at their next report
            raise


def _start_worker(processes: int, reports: multiprocessing.Queue, stop) -> None:
    global _REPORTS, _STOP
    _REPORTS, _STOP = reports, stop
    images.SIDE_BY_SIDE = processes
    torch.set_num_threads(max(1, available_cores() // processes))
    gc.freeze()  # what is imported stays: the collections after each training need not look at it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed notebook must not leave its workers behind; what they had done is in their checkpoints."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(key: str, config: Config, place: Workplace) -> None:
    def progress(*report) -> None:
        if _STOP.is_set():
            raise KeyboardInterrupt("another training failed or the study was interrupted")
        _REPORTS.put((key, *report))

    carry_out(config, place, progress)
    _release_memory()


def _release_memory() -> None:
    """Left alone, a worker grows with every training: models and optimizers hold one another in cycles, and glibc keeps what
    batches of many lengths have left in pieces."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


# --- several processes of one training ---------------------------------------------------------------------------------


def _run_launched(missing: Mapping[str, Config], place: Workplace, bar: tqdm) -> None:
    """Carry out configurations, one after another, in the processes that the launch command starts."""
    records = place.records
    records.root.mkdir(parents=True, exist_ok=True)
    for left in left_behind(records.root, ".plan-"):
        left.unlink(missing_ok=True)
    plan = records.root / f".plan-{this_process()}.json"  # where every node finds it
    where = {
        "root": str(records.root.resolve()),
        "redo_before": records.redo_before and records.redo_before.isoformat(),
    }
    paths = {"cache_dir": str(place.cache_dir.resolve()), "teacher_logits": str(place.teacher_logits.resolve())}
    write_text(plan, json.dumps({"configs": missing, **where, **paths, "execution": asdict(place.execution)}))
    command = [*shlex.split(place.execution.launch), "-m", "ones_lib.execution", str(plan)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    progress = {key: _bar_progress(bar, label(config)) for key, config in missing.items()}
    said, error = deque(maxlen=30), None
    try:
        try:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
            )
        except OSError as failure:
            raise RuntimeError(f"launch: could not start {command[0]!r}: {failure}") from failure
        with process:
            try:
                for line in process.stdout:
                    message = _heard(line)
                    if "progress" in message:
                        progress[message["key"]](*message["progress"])
                    elif line.strip():
                        error = error or message.get("error")
                        said.append(line)
            except BaseException:
                process.terminate()  # torchrun ends its processes
                raise
    finally:
        plan.unlink(missing_ok=True)
    left = [label(config) for config in missing.values() if records.find(config) is None]
    if process.returncode or left:
        why = error or f"exit status {process.returncode}, and {len(left)} of {len(missing)} left to do"
        raise RuntimeError(f"launch: {why}; from {shlex.join(command)}:\n{''.join(said)}")


def main(plan_file: str) -> None:
    """Carry out a plan as one of the processes that a launcher has started."""
    try:
        state = join()
        plan = json.loads(Path(plan_file).read_text())
        execution = Execution(**plan["execution"])
        images.SIDE_BY_SIDE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        records = Records(plan["root"], plan["redo_before"] or "")
        place = Workplace(records, Path(plan["cache_dir"]), Path(plan["teacher_logits"]), execution)
        for key, config in plan["configs"].items():

            def report(*progress, key: str = key) -> None:
                _say({"key": key, "progress": progress})

            carry_out(config, place, report if is_main() else None)
        state.destroy_process_group()
    except Exception as error:
        _say({"error": f"{type(error).__name__}: {error}"})
        raise


def _say(message: dict) -> None:
    """To the process that launched this one, on a line of its own."""
    sys.stdout.write(f"\n{_MARK}{json.dumps(message)}\n")
    sys.stdout.flush()


def _heard(line: str) -> dict:
    """What :func:`_say` said on a line; nothing if it is another's."""
    if line.startswith(_MARK):
        with suppress(ValueError):  # two processes' lines in one
            return json.loads(line.removeprefix(_MARK))
    return {}


_MARK = "ones_lib.execution: "


if __name__ == "__main__":
    main(sys.argv[1])
