"""The steps of a study that notebooks call: configurations of models to train, carried out once and then found.

A :class:`Study` turns questions ("the Top-KG student of seed 1 after 300 steps of KD") into configurations, plain
dictionaries that hold everything that decides the result; :meth:`Study.run` carries out those that have no record yet, in
parallel processes where that is faster, each after the teacher it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd
from torch import nn

from ones_lib.distillation import Distillation
from ones_lib.gathering.scale import ROUTER_SCALES
from ones_lib.integration import calibrated, integration_methods
from ones_lib.metrics import LOWER_IS_BETTER
from ones_lib.study.parallel import run_all, write_plan
from ones_lib.study.records import Record, Records, config_hash
from ones_lib.study.running import Config, Data, Execution, frozen, label, load_record, needed, open_data, steps_of
from ones_lib.study.training import Training


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
        domain: ``"image"``, ``"text"`` (models are pre-trained as masked language models) or ``"language"`` (causal models of
            transformers, whose students are made by :func:`ones_lib.checkpoints.convert.convert`).
        data: arguments of :func:`ones_lib.data.image_data` or :func:`ones_lib.data.text.text_data`.
        model: for images ``name`` of a timm model and arguments for it, for text arguments of
            :class:`ones_lib.models.text.WideNetTextConfig`, for causal models of :func:`ones_lib.study.language_task.language_model`;
            those that are None are left to the model. Number of classes, image size, channels and vocabulary follow from the
            data.
        teaching: recipe of the MoE teacher and of the dense baseline.
        learning: recipe of the student's KD; its ``steps`` are the largest budget.
        distillation: the KD loss.
        calibration_examples: of the training data, for the gatherings that look at data.
        seeds: of initialisation and training; teacher, baselines and students of one seed belong together.
        records: where records are kept, and found.
        cache_dir: where drawn data are kept.
        tasks: for text, those to fine-tune on.
        finetuning: recipe of the fine-tuning.
        finetune_kd: fine-tune what was distilled with KD again, from the fine-tuned teacher.
        processes: trainings side by side; 0 chooses: one on a GPU, else one a core. Not part of any configuration.
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
    finetuning: Training | None = None
    finetune_kd: bool = True
    processes: int = 0
    allow_training: bool = True
    execution: Execution = field(default_factory=Execution.from_environment)

    def __post_init__(self) -> None:
        self.seeds = list(self.seeds)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: expected at least one, all different and not negative, found {self.seeds}")
        self.data, self.model = dict(self.data), {k: v for k, v in self.model.items() if v is not None}

    # --- what to train -----------------------------------------------------------------------------------------------

    def moe(self, seed: int, **model) -> Config:
        """The MoE teacher; ``model`` overrides its arguments, such as ``num_experts``."""
        arguments = {**self.model, **model}
        training = None if "checkpoint" in arguments else asdict(self.teaching)
        return {"kind": "moe", **self._common(seed), "model": arguments, "training": training}

    def upcycled(self, seed: int, steps: int, **upcycling) -> Config:
        """An MoE that starts from the trained dense baseline, trained for ``steps`` more; ``upcycling`` are arguments of
        :func:`ones_lib.models.upcycling.upcycle`."""
        training = asdict(replace(self.teaching, steps=steps)) if steps else None
        upcycling = {"num_experts": self.model["num_experts"], "top_k": self.model["top_k"], **upcycling}
        return {
            "kind": "moe",
            **self._common(seed),
            "start": self.dense(seed),
            "upcycling": upcycling,
            "training": training,
        }

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
        self,
        method: str,
        seed: int,
        budget: int | None = None,
        teacher: Config | None = None,
        distillation: Distillation | None = None,
        **options,
    ) -> Config:
        """The student made by a gathering method or control and distilled for ``budget`` steps.

        Args:
            method: one of :func:`ones_lib.integration.integration_methods`.
            budget: steps of KD; 0 is the student right after gathering; None the largest budget.
            teacher: configuration of another teacher than ``moe(seed)``.
            distillation: another KD loss than the study's.
            options: the gathering method's.
        """
        if method not in integration_methods():
            raise ValueError(f"method: expected one of {integration_methods()}, found {method!r}")
        teacher = self.moe(seed) if teacher is None else teacher
        config = {"kind": "student", **self._common(seed), "method": method, "options": options}
        # A converted model's layers are compared with the MoE's, whatever the method.
        on_data = calibrated(method, options.get("scale", 1.0)) or self.domain == "language"
        if budget == 0:
            data = {"calibration_examples": self.calibration_examples} if on_data else {}
            return {**config, **data, "teacher": teacher, "training": None}
        if on_data:  # gathered once for all budgets: a fit takes seconds
            config["start"] = self.student(method, seed, 0, teacher, **options)
        training = self.learning if budget is None else replace(self.learning, steps=budget)
        return {**config, "training": asdict(training), **self._taught_by(teacher, distillation)}

    def finetuned(self, task: str, start: Config, teacher: Config | None = None) -> Config:
        """The pre-trained or distilled model ``start`` fine-tuned on a task, with KD from ``teacher`` if there is one."""
        config = {"kind": "finetuned", **self._common(start["seed"]), "task": task, "start": start}
        config["training"] = asdict(self.finetuning)
        return config if teacher is None else {**config, **self._taught_by(teacher)}

    def task_entries(self, methods: Iterable[str], budget: int | None = None, gathered: bool = True) -> list[Entry]:
        """The same models on the tasks (column ``task``): fine-tuned; the students after ``budget`` steps of KD.

        A student right after gathering is the fine-tuned MoE gathered, with no training at all.
        """
        result = []
        for seed in self.seeds:
            moe, long = self.moe(seed), self.dense(seed, self.learning.steps)
            for task in self.tasks:
                axis, teacher = {"task": task}, self.finetuned(task, moe)
                learnt_from = teacher if self.finetune_kd else None
                result.append(Entry("moe", "trained", teacher, axis))
                result.append(Entry("dense", "trained", self.finetuned(task, self.dense(seed)), axis))
                result.append(Entry("dense_long", "trained", self.finetuned(task, long), axis))
                distilled = {"dense_kd": self.dense_kd(seed)}
                for method in methods:
                    if gathered:
                        right_after = self.student(method, seed, budget=0, teacher=teacher)
                        result.append(Entry(method, "gathered", right_after, axis))
                    distilled[method] = self.student(method, seed, budget)
                for model, start in distilled.items():
                    result.append(Entry(model, "distilled", self.finetuned(task, start, learnt_from), axis))
        return result

    def task_budget_entries(self, methods: Iterable[str], budgets: Iterable[int]) -> list[Entry]:
        """Students of all ``methods`` after each budget of KD steps (columns ``task, budget``), fine-tuned, and what they are
        measured by. A budget of 0 is the student fine-tuned right after gathering."""
        methods = list(methods)
        result = [e for e in self.task_entries([], gathered=False) if e.stage == "trained"]
        for budget in budgets:
            entries = self.task_entries(methods, budget, gathered=False)
            result += [replace(e, axes={**e.axes, "budget": budget}) for e in entries if e.model in methods]
        return result

    def _common(self, seed: int) -> Config:
        return {"domain": self.domain, "seed": seed, "data": self.data}

    def _taught_by(self, teacher: Config, distillation: Distillation | None = None) -> Config:
        loss = asdict(distillation or self.distillation)
        # What a loss does not use is no part of its configuration, which is then that of records made before there was more.
        used = {k: v for k, v in loss.items() if k in ("temperature", "alpha") or v != getattr(Distillation, k)}
        return {"teacher": teacher, "distillation": used}

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

    def variant_entries(self, variants: Iterable[tuple[str, Mapping]], budgets: Iterable[int]) -> list[Entry]:
        """Students by variants of methods (columns ``scale, rank``) and budgets of KD (``budget``), and what they are measured by.

        ``variants`` are methods with options; those without a scale have none in the table, and the paper's have 1 if not told.
        """
        variants, budgets, result = list(variants), list(budgets), []
        for seed in self.seeds:
            result.append(Entry("moe", "trained", self.moe(seed)))
            result.append(Entry("dense", "trained", self.dense(seed)))
            for method, options in variants:
                for budget in budgets:
                    scale = options.get("scale", 1.0 if method in ROUTER_SCALES else None)
                    axes = {"scale": scale, "rank": options.get("rank"), "budget": budget}
                    stage = "distilled" if budget else "gathered"
                    result.append(Entry(method, stage, self.student(method, seed, budget, **options), axes))
        return result

    def named_entries(self, students: Mapping[str, tuple[str, Mapping]], budgets: Iterable[int]) -> list[Entry]:
        """Teacher, dense baselines, and students by a name of one's own for a method with options, after each budget of KD
        (column ``budget``; 0: right after gathering)."""
        result, budgets = self._references(), list(budgets)
        for seed in self.seeds:
            result.append(Entry("moe", "trained", self.moe(seed)))
            result.append(Entry("dense_kd", "distilled", self.dense_kd(seed)))
            for name, (method, options) in students.items():
                for budget in budgets:
                    config = self.student(method, seed, budget, **options)
                    result.append(Entry(name, "distilled" if budget else "gathered", config, {"budget": budget}))
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

    def teacher_entries(
        self, teachers: Callable[[int], Mapping[str, Config]], methods: Iterable[str], budgets: Iterable[int]
    ) -> list[Entry]:
        """Other teachers (column ``teacher``; ``teachers(seed)`` gives their configurations by name), their students by methods
        and budgets of KD (``budget``), and beside each the dense baseline and ``dense_long``, which is trained as long as the
        teacher, with what it starts from, and the largest budget together."""
        methods, budgets, result = list(methods), list(budgets), []
        for seed in self.seeds:
            for name, teacher in teachers(seed).items():
                axis = {"teacher": name}
                result.append(Entry("moe", "trained", teacher, axis))
                result.append(Entry("dense", "trained", self.dense(seed), axis))
                more = steps_of(teacher) + steps_of(teacher.get("start", {})) - self.teaching.steps + max(budgets)
                result.append(Entry("dense_long", "trained", self.dense(seed, more), axis))
                for method in methods:
                    for budget in budgets:
                        stage = "distilled" if budget else "gathered"
                        student = self.student(method, seed, budget, teacher)
                        result.append(Entry(method, stage, student, {**axis, "budget": budget}))
        return result

    def distillation_entries(
        self, losses: Mapping[str, Distillation], methods: Iterable[str], budget: int
    ) -> list[Entry]:
        """Students of methods after ``budget`` steps by each of several losses (column ``loss``), and what they are measured by."""
        methods, result = list(methods), []
        for seed in self.seeds:
            result.append(Entry("moe", "trained", self.moe(seed)))
            result.append(Entry("dense", "trained", self.dense(seed)))
            for method in methods:
                for name, loss in losses.items():
                    student = self.student(method, seed, budget, distillation=loss)
                    result.append(Entry(method, "distilled", student, {"loss": name}))
        return result

    def _references(self) -> list[Entry]:
        """The dense baselines, the second trained as long as the teacher and the largest budget together."""
        result = []
        for seed in self.seeds:
            result.append(Entry("dense", "trained", self.dense(seed)))
            result.append(Entry("dense_long", "trained", self.dense(seed, self.learning.steps)))
        return result

    # --- doing it ----------------------------------------------------------------------------------------------------

    def open_data(self) -> Data:
        """The data, of all tasks, checked."""
        data = open_data(self.domain, frozen(self.data), self.cache_dir)
        for task in self.tasks:
            data.rows(task)
        return data

    def run(self, configs: Iterable[Config], description: str = "") -> list[Record]:
        """Records of all configurations, in their order; those not yet there are computed, each with its teacher."""
        configs = list(configs)
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
                f" that is missing: {first}. They are made by a run that may train"
            )
        if missing:
            self.open_data()  # drawn once, and bad data is found, before any process starts
            run_all(missing, self.records, self.cache_dir, self.execution, self.processes, description)
        return [self.records.find(config) for config in configs]

    def load_model(self, record: Record) -> nn.Module:
        """The trained model of a record, in eval mode."""
        return load_record(record, self.cache_dir)[0]

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
