"""A study: one data set, one MoE, the recipes to train and distil it. It turns questions into configs and runs them.

A config ("the Top-KG student of seed 1 after 300 steps of KD") is a plain dictionary with everything that decides the result,
and nothing else. Its record is found by its hash.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from ones_lib.checkpoints.plan import ACTIVE
from ones_lib.data.images import is_split
from ones_lib.data.rows import EMBEDDED_TASKS, HUB_TASKS, OWN_FORM, own_task
from ones_lib.data.text import embedded_versions
from ones_lib.distillation import Distillation
from ones_lib.gathering.registry import gathering_methods
from ones_lib.gathering.source import source_hash
from ones_lib.integration import calibrated, integration_methods
from ones_lib.metrics import LOWER_IS_BETTER
from ones_lib.study.export import export
from ones_lib.study.inputs import located, with_checkpoint, with_files, with_task_files
from ones_lib.study.parallel import run_all, write_plan
from ones_lib.study.parameters import Group, Parameters
from ones_lib.study.progress import duration
from ones_lib.study.records import Record, Records, config_hash, project_root
from ones_lib.study.running import (
    Config,
    Data,
    Execution,
    build_model,
    data_of,
    label,
    load_record,
    needed,
    tasks_of,
)
from ones_lib.study.training import Training


@dataclass
class Study:
    """One data set, one MoE, the recipes to train and distil it, and where records are kept.

    Args:
        domain: ``"image"``, ``"text"`` (masked language models, fine-tuned on tasks) or ``"language"`` (causal models of
            transformers, whose students :func:`ones_lib.checkpoints.convert` makes).
        data: arguments of :func:`ones_lib.data.images.image_data` or :func:`ones_lib.data.text.text_corpus`.
        model: arguments of the model: for images timm's ``name`` and its arguments, for text those of
            :class:`ones_lib.models.text.WideNetTextConfig`, for causal models those of
            :func:`ones_lib.study.language_task.language_model`. None leaves a value to the model.
        teaching: recipe of the MoE teacher and of the dense baseline.
        dense_learning_rate: of the dense baseline, where it wants another one than the MoE. None: the recipe's.
        learning: recipe of the student's KD; its ``steps`` are the largest budget.
        distillation: the KD loss.
        calibration_examples: training examples for the gatherings that look at data.
        seeds: of initialisation and training. Teacher, baselines and students of one seed belong together.
        records: where records are kept, and found.
        cache_dir: where drawn data are kept.
        tasks: for text, those to fine-tune on.
        task_data: for text, arguments of :func:`ones_lib.data.text.text_tasks`.
        finetuning: recipe of the fine-tuning.
        finetune_kd: whether distilled models are fine-tuned with KD from the fine-tuned teacher.
        processes: trainings side by side; 0: one on a GPU, else one a core. No part of a config.
        allow_training: False makes a missing record an error.
        execution: how the work is done; by default as ``run_all.sh`` was told.
    """

    domain: str
    data: Mapping
    model: Mapping
    teaching: Training
    learning: Training
    distillation: Distillation
    calibration_examples: int = 4096
    seeds: Iterable[int] = (0, 1, 2)
    records: Records = field(default_factory=lambda: Records("runs/records"))
    cache_dir: Path = Path("runs/cache")
    tasks: Iterable[str] = ()
    task_data: Mapping = field(default_factory=dict)
    finetuning: Training | None = None
    finetune_kd: bool = True
    dense_learning_rate: float | None = None
    processes: int = 0
    allow_training: bool = True
    execution: Execution = field(default_factory=Execution.from_environment)
    _said: bool = field(default=False, init=False, repr=False)  # how many epochs its images are trained for

    def __post_init__(self) -> None:
        self.seeds = list(self.seeds)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: expected at least one, all different and not negative, found {self.seeds}")
        self.tasks, self.data = list(self.tasks), with_files(self.domain, self.data, self.cache_dir)
        self.model = with_checkpoint({k: v for k, v in self.model.items() if v is not None}, self.cache_dir)
        self.task_data = with_task_files(self.task_data, self.tasks, self.cache_dir)

    # --- configs -----------------------------------------------------------------------------------------------------

    def moe(self, seed: int, steps: int | None = None, **model) -> Config:
        """The MoE teacher. ``model`` overrides arguments of the model, such as ``num_experts``; ``steps`` the recipe's."""
        arguments = {**self.model, **model}
        recipe = self.teaching if steps is None else replace(self.teaching, steps=steps)
        training = None if "checkpoint" in arguments else asdict(recipe)
        return {"kind": "moe", **self._common(seed), "model": arguments, "training": training}

    def upcycled(self, seed: int, steps: int, **upcycling) -> Config:
        """An MoE that starts from the trained dense baseline, trained for ``steps`` more. ``upcycling`` are arguments of
        :func:`ones_lib.upcycle`."""
        training = asdict(replace(self.teaching, steps=steps)) if steps else None
        upcycling = {"num_experts": self.model["num_experts"], "top_k": self.model["top_k"], **upcycling}
        start = {"start": self.dense(seed), "upcycling": upcycling}
        return {"kind": "moe", **self._common(seed), **start, "training": training}

    def widths(self) -> tuple[int, int]:
        """Hidden units of one expert, and of the k experts that a token passes through: the active width. Opens the data."""
        data = self.open_data()
        with torch.device("meta"):  # a timm model has a width of its own where d_ff is None
            layer = build_model(self.moe(self.seeds[0]), data).moe_layers()[0]
        d_ff = layer.up.shape[1]
        return d_ff, layer.router.top_k * d_ff

    def dense(self, seed: int, extra_steps: int = 0, d_ff: int | str | None = None) -> Config:
        """The dense baseline: the MoE's definition with one expert, trained from scratch, without a teacher. ``d_ff`` is
        another number of hidden units than an expert's (of causal models: than ``dense_width``, in the same forms, or
        ``"expert"``)."""
        rate = self.dense_learning_rate or self.teaching.learning_rate
        training = replace(self.teaching, steps=self.teaching.steps + extra_steps, learning_rate=rate)
        arguments = self.model if self.domain == "language" else {**self.model, "num_experts": 1}
        if d_ff is not None:
            arguments = {**arguments, _WIDTHS[self.domain]: None if d_ff == "expert" else d_ff}
        return {"kind": "dense", **self._common(seed), "model": arguments, "training": asdict(training)}

    def dense_kd(self, seed: int) -> Config:
        """The dense model from scratch, with KD for as many steps as the teacher was trained: no gathering."""
        return {**self.dense(seed), "kind": "dense_kd", **self._taught_by(self.moe(seed))}

    def student(
        self,
        method: str,
        seed: int,
        budget: int | None = None,
        teacher: Config | None = None,
        distillation: Distillation | None = None,
        learning_rate: float | None = None,
        **options,
    ) -> Config:
        """The student that a gathering method or control makes, distilled for ``budget`` steps.

        Args:
            method: one of :func:`ones_lib.integration.integration_methods`.
            budget: steps of KD; 0 is the student right after gathering; None the largest budget.
            teacher: config of another teacher than ``moe(seed)``.
            distillation: another KD loss than the study's.
            learning_rate: another one of KD than the study's.
            options: the gathering method's.
        """
        if method not in integration_methods():
            raise ValueError(f"method: expected one of {integration_methods()}, found {method!r}")
        teacher = self.moe(seed) if teacher is None else teacher
        config = {"kind": "student", **self._common(seed), "method": method, "options": options}
        if method in gathering_methods() and (code := source_hash(method)):
            config["method_source"] = code
        # A converted model's layers are compared with the MoE's, whatever the method.
        on_data = calibrated(method, options.get("scale", 1.0)) or self.domain == "language"
        if budget == 0:
            data = {"calibration_examples": self.calibration_examples} if on_data else {}
            return {**config, **data, "teacher": teacher, "training": None}
        if on_data:  # gathered once for all budgets: a fit takes seconds
            config["start"] = self.student(method, seed, 0, teacher, **options)
        training = self.learning if budget is None else replace(self.learning, steps=budget)
        if learning_rate is not None:
            training = replace(training, learning_rate=learning_rate)
        return {**config, "training": asdict(training), **self._taught_by(teacher, distillation)}

    def finetuned(self, task: str, start: Config, teacher: Config | None = None) -> Config:
        """The pre-trained or distilled model ``start`` fine-tuned on a task, with KD from ``teacher`` if there is one."""
        of_task = {  # what is known of other tasks is no part of it
            part: {name: known for name, known in self.task_data[part].items() if name == task}
            for part in ("own", "files")
            if part in self.task_data
        }
        config = {"kind": "finetuned", **self._common(start["seed"]), "task": task}
        config["task_data"] = {
            name: value for name, value in {**self.task_data, **of_task}.items() if value or name not in of_task
        }
        config |= {"start": start, "training": asdict(self.finetuning)}
        return config if teacher is None else {**config, **self._taught_by(teacher)}

    def _common(self, seed: int) -> Config:
        return {"domain": self.domain, "seed": seed, "data": self.data}

    def _taught_by(self, teacher: Config, distillation: Distillation | None = None) -> Config:
        return {"teacher": teacher, "distillation": asdict(distillation or self.distillation)}

    # --- work --------------------------------------------------------------------------------------------------------

    def open_data(self) -> Data:
        """The data, checked; of text the corpus. The tasks are checked too."""
        data = data_of(self.moe(self.seeds[0]), self.cache_dir)
        for task in self.tasks:
            self.open_tasks().rows(task)
        return data

    def open_tasks(self):
        """Of text, the tasks: :class:`ones_lib.data.text.TextTasks`."""
        return tasks_of({"data": self.data, "task_data": self.task_data}, self.cache_dir)

    def run(self, configs: Iterable[Config], description: str = "") -> list[Record]:
        """Records of all configs, in their order. Missing ones are computed, each after the teacher it needs.

        Prints how many were found and made. ``description`` is of the bar and of that line.
        """
        started, configs = time.monotonic(), list(configs)
        wanted = {config_hash(c): c for config in configs for c in (*needed(config), config)}
        missing = {key: config for key, config in wanted.items() if self.records.find(config) is None}
        if self.execution.plan:
            self.open_data()
            write_plan(Path(self.execution.plan), missing, self.cache_dir)
            return [self.records.find(config) for config in configs]
        if missing and not self.allow_training:
            first = label(next(iter(missing.values())))
            raise ValueError(
                f"records: expected all {len(wanted)} in {self.records.root}, found {len(wanted) - len(missing)}; the first"
                f" missing one: {first}. allow_training is false: a run without --figures trains them"
            )
        if missing:
            data = self.open_data()  # bad data is found, and data are drawn once, before any process starts
            if self.domain == "image" and not self._said:
                self._said = True
                print(epochs_text(self.teaching, self.learning, len(data.train)), flush=True)
            run_all(missing, self.records, self.cache_dir, self.execution, self.processes, description)
        made = f", {len(missing)} made in {duration(time.monotonic() - started)}" if missing else ""
        print(f"{description or 'study'}: {len(wanted) - len(missing)} models found{made}", flush=True)
        return [self.records.find(config) for config in configs]

    def load_model(self, record: Record) -> nn.Module:
        """The trained model of a record, in eval mode."""
        return load_record(record, self.cache_dir)[0]

    def export(self, record: Record, folder: str | Path) -> Path:
        """A record's dense model as a folder to take away, see :func:`ones_lib.study.export.export`."""
        return export(record, folder, self.cache_dir)

    def histories(self, groups: Mapping[str, Iterable[Config]], metric: str = "accuracy") -> pd.DataFrame:
        """A validation metric over training: ``model, seed, step, value``, in per cent but for losses; ``groups`` by model."""
        parts = []
        for model, configs in groups.items():
            for config in configs:
                history = self.records.find(config).history.dropna(subset=f"val_{metric}")
                scale = 1 if metric in LOWER_IS_BETTER else 100
                values = {"step": history["step"], "value": scale * history[f"val_{metric}"]}
                parts.append(pd.DataFrame({"model": model, "seed": config["seed"], **values}))
        return pd.concat(parts, ignore_index=True)


MANY_EPOCHS = 300  # as many as the papers train on ImageNet


def epochs_text(teaching: Training, learning: Training, images: int) -> str:
    """How often a training sees each of its images, for people; with advice beyond :data:`MANY_EPOCHS`."""
    epochs = [recipe.steps * recipe.batch_size / images for recipe in (teaching, learning)]
    shown = " and ".join(f"{number:,.3g}" if number < 1000 else f"{number:,.0f}" for number in epochs)
    text = (
        f"{images:,} training images, {teaching.batch_size} a step: teacher_steps={teaching.steps:,} and"
        f" kd_steps={learning.steps:,} are {shown} epochs"
    )
    if max(epochs) > MANY_EPOCHS:
        text += f". More than {MANY_EPOCHS} are seldom of use: lower teacher_steps, kd_steps or batch_size"
    return text


_SEEDS = {"image": "seeds", "text": "text_seeds", "language": "language_seeds"}
_WIDTHS = {
    "image": "d_ff",
    "text": "intermediate_size",
    "language": "dense_width",
}  # what models call their hidden units


def make_study(domain: str, parameters: Parameters, seeds: Iterable[int] | None = None, moe: str = "") -> Study:
    """The study of a domain (``image``, ``text`` or ``language``) with a notebook's parameters; of ``language``, that of one of
    :func:`language_moes`.

    The KD recipe is the teacher's with its own steps and learning rate, and no evaluation during training.
    """
    root, group = project_root(), parameters.groups[domain]
    teaching = Training(**group.part("teaching"), mixed_precision=parameters.mixed_precision, evaluations=5)
    finetuning, (tasks, own) = group.part("finetuning"), _tasks(group) if domain == "text" else ([], {})
    calibration = parameters.language_calibration if domain == "language" else parameters.calibration_examples
    return Study(
        domain=domain,
        data=_data(domain, group, tasks, own),
        model=_language_model(group, moe) if domain == "language" else group.part("model"),
        teaching=teaching,
        learning=replace(teaching, **group.part("learning"), evaluations=0),
        # Converted language models have learning rates by width and budget instead of a guard.
        distillation=Distillation(**group.part("distillation"), guard=domain != "language"),
        calibration_examples=calibration,
        seeds=getattr(group, _SEEDS[domain]) if seeds is None else seeds,
        records=Records(root / parameters.records_dir, parameters.redo_before),
        cache_dir=root / "runs" / "cache",
        tasks=tasks,
        task_data=_task_data(group, own) if domain == "text" else {},
        finetuning=replace(teaching, **finetuning, evaluations=0) if finetuning else None,
        finetune_kd=getattr(group, "finetune_kd", True),
        dense_learning_rate=getattr(group, "language_dense_learning_rate", None),
        processes=parameters.processes,
        allow_training=parameters.allow_training,
    )


def _tasks(group: Group) -> tuple[list[str], dict[str, dict]]:
    """Names of the tasks to fine-tune on, and of the user's own what :func:`ones_lib.data.rows.own_task` gives."""
    folder = Path(located(group.text_dir))
    if isinstance(group.tasks, dict) and group.tasks:
        return list(group.tasks), {task: own_task(task, given, folder) for task, given in group.tasks.items() if given}
    if group.tasks or group.text_data != "local":
        return list(group.tasks or (EMBEDDED_TASKS if group.text_data == "names" else HUB_TASKS)), {}
    there = [task for task in HUB_TASKS if (folder / task).is_dir()]
    if not (group.text_dir and there):
        found = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"text_dir: expected a folder with some of {', '.join(HUB_TASKS)}, found {group.text_dir!r}: {found}; for tasks of your"
            f" own, say what they are: -p tasks '{OWN_FORM}'"
        )
    return there, {}


def _data(domain: str, group: Group, tasks: list[str], own: dict[str, dict]) -> dict:
    data = group.part("data")
    if domain == "image":
        held_out = data["name"] == "folder" and not is_split(located(data["data_dir"]))
        return data | ({"val_fraction": group.val_fraction} if held_out else {})
    if domain == "language":
        data["tokenizer"] = group.language_source
    elif data["name"] == "tasks":
        of = {"name": group.text_data, "text_dir": group.text_dir}
        data["of_tasks"] = of | {"tasks": list(tasks), "max_train": group.max_train} | ({"own": own} if own else {})
    return data | {"versions": embedded_versions(data["name"], data.get("of_tasks", {}).get("name"))}


def _task_data(group: Group, own: dict[str, dict]) -> dict:
    data = group.part("tasks") | ({"own": own} if own else {})
    return data | {"versions": embedded_versions(data["name"])}


def language_moes(parameters: Parameters) -> list[str]:
    """Names of the MoEs that the language study is about: the source's, or those to train."""
    group = parameters.groups["language"]
    return [Path(group.language_source).name] if group.language_source else list(group.language_moes)


def _language_model(group: Group, moe: str) -> dict:
    """An MoE to train, or a checkpoint."""
    width = {"dense_width": ACTIVE if group.language_width == ACTIVE else None}
    if not group.language_source:
        return group.language_moes[moe or next(iter(group.language_moes))] | width
    return {"checkpoint": group.language_source} | width
