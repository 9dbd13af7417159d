"""The parameters of all notebooks: meaning, unit and bounds of each. Their values stand in ``notebooks/profiles/*.yaml`` alone.

A profile has a section for each group below. A notebook names the groups that it reads. Names are unique over all groups, so
that ``./run_all.sh -p num_experts 16`` needs no section.
"""

from __future__ import annotations

import ast
import difflib
import html
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ones_lib.checkpoints.plan import active_multiple
from ones_lib.data.rows import OWN_FORM, TASKS, check_definition
from ones_lib.gathering import gathering_methods
from ones_lib.gathering.scale import SCALE_WORDS
from ones_lib.integration import FRESH, integration_methods, widening_methods
from ones_lib.study.records import project_root
from ones_lib.study.training import optimizers


class ParameterError(ValueError):
    """A name or value that cannot be used. The message is for the person who gave it."""


def value(
    meaning: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    of: Collection | Callable[[], Collection] = (),
    distinct: bool = False,
    to: str = "",
) -> Any:
    """A field of a group.

    Args:
        meaning: for people, with the unit.
        least, above, most, below: bounds; of a list, those of each element.
        of: allowed values, for a list those of each element; or a function that returns them.
        distinct: a list has at least one element, and all are different.
        to: the part of a study's config that receives the value, and the name there, such as ``model.embed_dim``.
    """
    return field(
        metadata={"meaning": meaning, "bounds": (least, above, most, below), "of": of, "distinct": distinct, "to": to}
    )


@dataclass(frozen=True, kw_only=True)
class Group:
    """A section of a profile. Making one checks every value; ParameterError names the parameter."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for declared in fields(self):
            given = getattr(self, declared.name)
            if not _fits(given, hints[declared.name]):
                expected = str(declared.type).replace(" | None", " or null")
                raise ParameterError(f"{declared.name}: expected {expected}, found {given!r}")
            if "float" in str(declared.type):  # 1 and 1.0 are one config
                object.__setattr__(self, declared.name, _floats(given))
            _check_bounds(declared.name, given, declared.metadata)

    def part(self, name: str) -> dict[str, Any]:
        """The values that go to a part of a study's config, by their names there."""
        targets = {f.name: f.metadata["to"].partition(".") for f in fields(self)}
        return {target: getattr(self, own) for own, (part, _, target) in targets.items() if part == name}


def _fits(given: Any, hint: Any) -> bool:
    """Whether a value is of a type such as ``int | None`` or ``list[str]``. A whole number passes for a fraction."""
    if isinstance(hint, types.UnionType):
        return any(_fits(given, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(given, list) and all(_fits(one, typing.get_args(hint)[0]) for one in given)
    if isinstance(given, bool) or hint is bool:
        return isinstance(given, bool) and hint is bool
    return isinstance(given, (int, float) if hint is float else hint)


def _floats(given: Any) -> Any:
    if isinstance(given, list):
        return [_floats(one) for one in given]
    return float(given) if isinstance(given, int) else given


def _check_bounds(name: str, given: Any, about: Mapping[str, Any]) -> None:
    least, above, most, below = about["bounds"]
    limits = [("at least", least), ("above", above), ("at most", most), ("below", below)]
    expected = " and ".join(f"{word} {limit:.10g}" for word, limit in limits if math.isfinite(limit))
    allowed = about["of"]() if callable(about["of"]) else about["of"]
    for one in given if isinstance(given, list) else [given]:
        if isinstance(one, (int, float)) and not (math.isfinite(one) and least <= one <= most and above < one < below):
            raise ParameterError(f"{name}: expected a number {expected or 'that is finite'}, found {one!r}")
        if allowed and isinstance(one, str) and one not in allowed:
            raise ParameterError(f"{name}: found {one!r}{hint(one, allowed)}")
    if about["distinct"] and (not given or len(set(given)) < len(given)):
        raise ParameterError(f"{name}: expected at least one, all different, found {given}")


_TEXT = ("names", "local", "hub")
SEEDS = 2**32 - 1  # the largest that numpy takes
SPEED_MODES = ("eager", "compiled", "onnx")  # of running a model whose speed is measured

# --- the groups --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Common(Group):
    """What several studies share, and where work goes; paths are relative to the project's root."""

    methods: list[str] = value("gatherings and controls of the studies of images and text", of=integration_methods)
    calibration_examples: int = value("training examples for gatherings that look at data", least=1)
    mixed_precision: str = value("'no', 'bf16' or 'fp16'", of=("no", "bf16", "fp16"))
    figures_dir: str = value("folder of figures and their CSVs")
    records_dir: str = value("folder of finished trainings")
    processes: int = value("parallel trainings; 0: one with a GPU, else one per CPU core", least=0)
    allow_training: bool = value("false: take everything from the records, and fail where one is missing")
    redo_before: str = value("an ISO time with its zone: records older than it are made again; empty: none")


@dataclass(frozen=True, kw_only=True)
class Image(Group):
    """The image study: data, MoE, training of teacher and baselines, distillation."""

    data: str = value("'glyphs' (drawn here), 'folder' (data_dir), or a hub name", to="data.name")
    data_dir: str = value(
        "folder with {train,val}/<class>/* or <class>/*, relative to the project's root", to="data.data_dir"
    )
    val_fraction: float = value(
        "part of each class's images that is held out where data_dir has no train and val; chosen by the files' names",
        above=0,
        below=1,
    )
    image_size: int = value("px", least=1, to="data.image_size")
    num_classes: int | None = value("classes; null: all", least=1, to="data.num_classes")
    train_per_class: int | None = value("training images of a class; null: all", least=1, to="data.train_per_class")
    val_per_class: int | None = value("validation images of a class; null: all", least=1, to="data.val_per_class")
    distortion: float = value("strength of the glyphs' distortions; 1 is mild", least=0, to="data.distortion")
    color_jitter: float = value("strength, of other data than glyphs", least=0, to="data.color_jitter")
    min_crop: float = value("least area of a random crop; not of glyphs", above=0, most=1, to="data.min_crop")
    model: str = value("a timm model; null below leaves a value to it", to="model.name")
    patch_size: int | None = value("px", least=1, to="model.patch_size")
    d_model: int | None = value("width", least=1, to="model.embed_dim")
    depth: int | None = value("blocks", least=1, to="model.depth")
    num_heads: int | None = value("attention heads", least=1, to="model.num_heads")
    d_ff: int | None = value("hidden units of an expert", least=1, to="model.d_ff")
    num_experts: int = value("experts of the MoE", least=2, to="model.num_experts")
    top_k: int = value("experts a token is sent to", least=1, to="model.top_k")
    renormalize: bool = value("gates of the chosen experts sum to 1", to="model.renormalize")
    share_depth: bool = value("all blocks share attention and experts", to="model.share_depth")
    drop_rate: float = value("dropout", least=0, below=1, to="model.proj_drop_rate")
    seeds: list[int] = value(
        "teacher, baselines and students of a seed belong together", least=0, most=SEEDS, distinct=True
    )
    teacher_steps: int = value("optimizer steps of teacher and dense baseline", least=1, to="teaching.steps")
    batch_size: int = value("examples a step", least=1, to="teaching.batch_size")
    learning_rate: float = value("after warm-up", above=0, to="teaching.learning_rate")
    warmup: float = value("part of the steps", least=0, below=1, to="teaching.warmup")
    weight_decay: float = value("of matrices", least=0, to="teaching.weight_decay")
    optimizer: str = value("a timm optimizer", of=optimizers, to="teaching.optimizer")
    label_smoothing: float = value("part of the label", least=0, below=1, to="teaching.label_smoothing")
    mixup: float = value("alpha of the Beta distribution; 0: none", least=0, to="teaching.mixup")
    ema_decay: float = value("of the weights' moving average; 0: none", least=0, below=1, to="teaching.ema_decay")
    kd_steps: int = value("optimizer steps of distillation, the largest budget", least=1, to="learning.steps")
    kd_learning_rate: float = value("of distillation, after warm-up", above=0, to="learning.learning_rate")
    temperature: float = value("T of the KD loss", above=0, to="distillation.temperature")
    alpha: float = value("weight of the KL in the loss", least=0, most=1, to="distillation.alpha")
    calibrated_methods: list[str] = value("gatherings that look at data, beside `methods`", of=integration_methods)
    active_methods: list[str] = value(
        "gatherings and controls of students of k experts' hidden units; empty: no such students", of=widening_methods
    )


@dataclass(frozen=True, kw_only=True)
class Curves(Group):
    """Retention against the distillation budget and the number of experts (images)."""

    budgets: list[int] = value("steps of KD, beside kd_steps", least=0)
    expert_counts: list[int] = value("numbers of experts; empty: no comparison", least=2)
    expert_budget: int = value("steps of KD in the comparison by number of experts", least=0)
    expert_methods: list[str] = value("gatherings and controls in that comparison", of=integration_methods)
    benefit_steps: list[int] = value("the teachers' steps, beside teacher_steps, at each number of experts", least=1)
    benefit_methods: list[str] = value("gatherings of their students", of=integration_methods)


@dataclass(frozen=True, kw_only=True)
class Text(Group):
    """The text study: corpus, MoE, pre-training, distillation, and fine-tuning on tasks."""

    text_data: str = value("'names' (made here), 'local' (text_dir) or 'hub'", of=_TEXT, to="tasks.name")
    text_dir: str = value("folder with <task>/<split>.jsonl, .parquet or .csv", to="tasks.text_dir")
    tasks: list[str] | dict = value(
        "tasks to fine-tune on; empty: those of text_data, of a folder those that are there. With tasks of your own: by name the"
        " kind (classification, pair, answers) and columns of each, as {reviews: {kind: classification, text: sentence, label:"
        " stars}, mnli: {}}; without a validation split every tenth row of a class is held out"
    )
    corpus: str = value("'names', 'docstrings', 'tasks' (the tasks' texts), a file, folder or hub name", to="data.name")
    tokenizer: str = value("hub name or folder; empty: WordPiece, trained on the corpus", to="data.tokenizer")
    vocab_size: int = value("of the trained tokenizer", least=8, to="data.vocab_size")
    sequence_length: int = value("tokens of a pre-training sequence", least=8, to="data.sequence_length")
    mask_rate: float = value("part of the tokens that is predicted", above=0, below=1, to="data.mask_rate")
    max_corpus: int | None = value("texts of the corpus; null: all", least=8, to="data.max_corpus")
    task_length: int = value("tokens of an example; longer contexts are cut", least=8, to="tasks.task_length")
    stride: int = value("tokens by which windows overlap", least=0, to="tasks.stride")
    max_train: int | None = value("rows of a task's training split; null: all", least=8, to="tasks.max_train")
    max_validation: int | None = value("rows of a validation split; null: all", least=8, to="tasks.max_validation")
    max_positions: int = value(
        "position embeddings; fine-tuning adds what it needs", least=8, to="model.max_position_embeddings"
    )
    embedding_size: int = value("width of the factorised token embeddings", least=1, to="model.embedding_size")
    text_d_model: int = value("width", least=1, to="model.hidden_size")
    text_depth: int = value("blocks", least=1, to="model.num_hidden_layers")
    text_num_heads: int = value("attention heads", least=1, to="model.num_attention_heads")
    text_d_ff: int = value("hidden units of an expert", least=1, to="model.intermediate_size")
    text_num_experts: int = value("experts of the MoE", least=2, to="model.num_experts")
    text_top_k: int = value("experts a token is sent to", least=1, to="model.num_experts_per_tok")
    text_renormalize: bool = value("gates of the chosen experts sum to 1", to="model.renormalize")
    text_drop_rate: float = value("dropout", least=0, below=1, to="model.hidden_dropout_prob")
    relative_positions: int = value(
        "reach of learned attention biases; 0: none", least=0, to="model.relative_positions"
    )
    initializer_range: float = value("initial SD of the embeddings", above=0, to="model.initializer_range")
    text_seeds: list[int] = value("seeds", least=0, most=SEEDS, distinct=True)
    text_teacher_steps: int = value("optimizer steps of pre-training", least=1, to="teaching.steps")
    text_batch_size: int = value("sequences a step", least=1, to="teaching.batch_size")
    text_learning_rate: float = value("after warm-up", above=0, to="teaching.learning_rate")
    text_warmup: float = value("part of the steps", least=0, below=1, to="teaching.warmup")
    text_weight_decay: float = value("of matrices", least=0, to="teaching.weight_decay")
    text_optimizer: str = value("a timm optimizer", of=optimizers, to="teaching.optimizer")
    text_kd_steps: int = value("optimizer steps of distillation, the largest budget", least=1, to="learning.steps")
    text_kd_learning_rate: float = value("of distillation, after warm-up", above=0, to="learning.learning_rate")
    text_temperature: float = value("T of the KD loss", above=0, to="distillation.temperature")
    text_alpha: float = value("weight of the KL in the loss", least=0, most=1, to="distillation.alpha")
    finetune_steps: int = value("optimizer steps of fine-tuning", least=1, to="finetuning.steps")
    finetune_batch_size: int = value("examples a step", least=1, to="finetuning.batch_size")
    finetune_learning_rate: float = value("after warm-up", above=0, to="finetuning.learning_rate")
    finetune_kd: bool = value("fine-tune distilled models with KD from the fine-tuned teacher")
    text_calibrated_methods: list[str] = value("gatherings that look at data, beside `methods`", of=integration_methods)
    text_active_methods: list[str] = value(
        "gatherings and controls of students of k experts' hidden units; empty: no such students", of=widening_methods
    )
    text_budgets: list[int] = value("steps of KD, beside text_kd_steps", least=0)
    task_budgets: list[int] = value("steps of KD whose students are fine-tuned too; 0: right after gathering", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_length > self.max_positions:
            found = f"max_positions={self.max_positions}, found {self.sequence_length}"
            raise ParameterError(f"sequence_length: expected at most {found}")
        if self.stride >= self.task_length // 2:
            raise ParameterError(f"stride: expected below half of task_length={self.task_length}, found {self.stride}")
        for task, given in (self.tasks if isinstance(self.tasks, dict) else dict.fromkeys(self.tasks)).items():
            if not given and task not in TASKS:
                raise ParameterError(f"tasks: found {task!r}{hint(task, TASKS)}; for one of your own: {OWN_FORM}")
            if given and self.text_data != "local":
                raise ParameterError(f"tasks: expected text_data='local' for {task!r}, found {self.text_data!r}")
            if given:
                try:
                    check_definition(task, given)
                except ValueError as error:
                    raise ParameterError(f"tasks: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Language(Group):
    """The study of a published MoE of transformers: conversion and distillation."""

    language_source: str = value("folder or hub name of an MoE; empty: train those of language_moes")
    language_moes: dict = value("by name, model_type and configuration of an MoE to train")
    language_width: str = value("hidden units of the dense baselines: 'active' or 'expert'", of=("active", "expert"))
    language_widths: list[str] = value(
        "of students: 'expert', 'active', or multiples of it such as '4x'", distinct=True
    )
    language_dense_widths: list[str] = value("of more dense baselines, in the same forms")
    language_corpus: str = value("'docstrings', 'names', a file, a folder or a hub name", to="data.name")
    language_vocab_size: int = value("of the tokenizer trained where there is no source", least=8, to="data.vocab_size")
    language_sequence_length: int = value("tokens", least=8, to="data.sequence_length")
    language_max_corpus: int | None = value("texts; null: all", least=8, to="data.max_corpus")
    language_validation: int = value("validation sequences", least=1, to="data.validation_sequences")
    language_seeds: list[int] = value("seeds", least=0, most=SEEDS, distinct=True)
    language_teacher_steps: int = value("optimizer steps of MoE and dense baselines", least=1, to="teaching.steps")
    language_batch_size: int = value("sequences a step", least=1, to="teaching.batch_size")
    language_learning_rate: float = value("after warm-up", above=0, to="teaching.learning_rate")
    language_dense_learning_rate: float = value("of the dense baselines", above=0)
    language_students: dict = value("by name, a gathering or control, options, also convert's; own widths, if any")
    language_calibration: int = value("sequences for gatherings that look at data and for output errors", least=1)
    language_kd_steps: int = value("optimizer steps of distillation, the largest budget", least=1, to="learning.steps")
    language_kd_learning_rate: float = value("of distillation, after warm-up", above=0, to="learning.learning_rate")
    language_temperature: float = value("T of the KD loss", above=0, to="distillation.temperature")
    language_alpha: float = value("weight of the KL in the loss", least=0, most=1, to="distillation.alpha")
    language_budgets: dict = value("steps of KD, beside 0 and language_kd_steps, and the learning rate of each")
    language_rates: dict = value("by student and width, other learning rates of some budgets")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.language_moes and not self.language_source:
            raise ParameterError("language_moes: expected an MoE or more, or a language_source, found none")
        for name, moe in self.language_moes.items():
            if not isinstance(moe, dict) or not isinstance(moe.get("model_type"), str):
                expected = "a model_type of transformers, and what its configuration takes"
                raise ParameterError(f"language_moes: {name}: expected {expected}, found {moe!r}")
        _check_widths("language_widths", self.language_widths)
        _check_widths("language_dense_widths", self.language_dense_widths)
        for name, student in self.language_students.items():
            method, options, *widths = student if isinstance(student, list) and len(student) in (2, 3) else (None, None)
            known = [*gathering_methods(), *FRESH]
            if method not in known or not isinstance(options, dict):
                expected = f"[method, {{options}}] or [method, {{options}}, [widths]] with a method of {known}"
                raise ParameterError(f"language_students: {name}: expected {expected}, found {student!r}")
            for some in widths:
                _check_widths(f"language_students: {name}", some)
                for width, largest in some.items() if isinstance(some, dict) else ():
                    if not isinstance(largest, int) or largest < 0:
                        where = f"language_students: {name}: {width}"
                        raise ParameterError(f"{where}: expected its largest budget, steps of KD, found {largest!r}")
        _check_rates("language_budgets", self.language_budgets)
        for name, widths in self.language_rates.items():
            if name not in self.language_students or not isinstance(widths, dict):
                expected = f"by width, rates of one of {list(self.language_students)}"
                raise ParameterError(f"language_rates: expected {expected}, found {name!r}: {widths!r}")
            _check_widths(f"language_rates: {name}", widths)
            for width, rates in widths.items():
                if not isinstance(rates, dict):
                    expected = "budgets with their learning rates"
                    raise ParameterError(f"language_rates: {name}: {width}: expected {expected}, found {rates!r}")
                _check_rates(f"language_rates: {name}: {width}", rates)


def _check_rates(name: str, rates: Mapping) -> None:
    """Raise ParameterError unless these are budgets of KD with their learning rates."""
    for steps, rate in rates.items():
        whole = isinstance(steps, int) and steps > 0
        if not whole or not isinstance(rate, (int, float)) or not rate > 0:
            expected = "numbers of steps above 0, each with a learning rate above 0"
            raise ParameterError(f"{name}: expected {expected}, found {steps!r}: {rate!r}")


def _check_widths(name: str, widths: Any) -> None:
    """Raise ParameterError unless these are widths of causal students."""
    for width in widths if isinstance(widths, (list, dict)) else [widths]:
        try:
            width == "expert" or active_multiple(width)
        except (ValueError, TypeError) as error:
            expected = "'expert', 'active' or a multiple of it such as '4x'"
            raise ParameterError(f"{name}: expected a list of widths, each {expected}, found {width!r}") from error


@dataclass(frozen=True, kw_only=True)
class Spectra(Group):
    """Spectra of the experts."""

    domains: list[str] = value("whose MoEs: 'image', 'text' or both", of=("image", "text"))
    source: str = value("a safetensors file or a folder of them, in place of the studies' MoEs; empty: none")
    max_layers: int = value("layers of an MoE whose layers differ, evenly spread", least=1)
    spectra_methods: list[str] = value("gatherings to compare with the experts", of=integration_methods)


@dataclass(frozen=True, kw_only=True)
class Speed(Group):
    """Measurements of speed."""

    speed_layers: dict = value("by name, sizes and batch_sizes of one MoE layer")
    speed_batch_sizes: list[int] = value("batch sizes of the image study's MoE", least=1)
    speed_modes: list[str] = value("of that MoE: 'eager', 'compiled', 'onnx' (needs the extra onnx)", of=SPEED_MODES)
    large_models: list[str] = value("timm names of other MoEs")
    large_batch_sizes: list[int] = value("their batch sizes", least=1)
    large_modes: list[str] = value("their modes", of=SPEED_MODES)
    speed_precisions: list[str] = value("torch dtypes", of=("float32", "bfloat16", "float16"))
    seconds: float = value("least time of each number, s", above=0)
    engine_python: str = value("a Python that has vLLM, to measure in; empty: that part is left out")
    engine_stacks: dict = value("by name, model_type of an MoE of transformers, and what its configuration takes")
    engine_batch_sizes: list[int] = value("sequences", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("d_model", "d_ff", "num_experts", "top_k", "tokens")
        for name, layer in self.speed_layers.items():
            given = layer if isinstance(layer, dict) else {}
            counts = [given.get(size) for size in sizes]
            counts += batches if isinstance(batches := given.get("batch_sizes"), list) and batches else [None]
            if not all(_fits(count, int) and count > 0 for count in counts) or given["top_k"] > given["num_experts"]:
                expected = f"numbers above 0 for {', '.join(sizes)}, and a list of batch_sizes"
                raise ParameterError(f"speed_layers: {name}: expected {expected}, found {layer!r}")


@dataclass(frozen=True, kw_only=True)
class Ablation(Group):
    """The ablation of gatherings: scale, rank, data."""

    ablation_domains: list[str] = value("studies: 'image', 'text' or both", of=("image", "text"))
    ablation_methods: list[str] = value("gatherings at every budget", of=integration_methods)
    controls: list[str] = value("controls at every budget", of=integration_methods)
    variant_methods: list[str] = value(
        "more gatherings: on images at variant_budget, on text before KD", of=integration_methods
    )
    scales: list[float | str] = value(
        "of the paper's methods, beside 1; compared as variant_methods", of=tuple(SCALE_WORDS)
    )
    ranks: list[int] = value("K of SVD-KG (router's scale) and of whitened SVD-KG; as variant_methods", least=1)
    ablation_budgets: list[int] = value("steps of KD on images", least=0)
    variant_budget: int = value("steps of KD of the variants on images", least=0)
    ablation_text_seeds: list[int] = value("seeds on text", least=0, most=SEEDS, distinct=True)
    ablation_text_budgets: list[int] = value("steps of KD on text", least=0)


@dataclass(frozen=True, kw_only=True)
class Teachers(Group):
    """Other teachers and other distillation losses (images)."""

    upcycling_steps: int = value("steps of the upcycled MoE, after the dense baseline's", least=0)
    upcycling_noise: float = value("standard deviation added to the copies, relative to the weights", least=0)
    soft_slots: int = value("slots of each expert in Soft MoE", least=1)
    teacher_methods: list[str] = value("gatherings and controls of each teacher", of=integration_methods)
    teacher_budget: int = value("steps of KD of their students", least=0)
    distilled_methods: list[str] = value("gatherings to start from in the comparison of losses", of=integration_methods)
    distillation_budget: int = value("steps of KD in it", least=0)
    hidden_weight: float = value("weight of the hidden states' error", least=0)
    hidden_depths: list[float] = value("weights of the depths in it, beside equal ones", least=0)
    augmentations: int = value("passes with sampled experts (knowledge augmentation)", least=0)
    router_rate: float = value("step of the student-aware router, relative to its weights", least=0)


@dataclass(frozen=True, kw_only=True)
class Student(Group):
    """One student, the cell of a sweep (images)."""

    method: str = value("a gathering or control", of=integration_methods)
    scale: float | str | None = value("null: the method's own", of=tuple(SCALE_WORDS))
    rank: int | None = value("K; null: the method's own", least=1)
    budget: int = value("steps of KD; 0: right after gathering", least=0)
    seed: int = value("seed of teacher, baseline and student", least=0, most=SEEDS)


GROUPS: dict[str, type[Group]] = {
    group.__name__.lower(): group
    for group in (Common, Image, Curves, Text, Language, Spectra, Speed, Ablation, Teachers, Student)
}
#: Parameters that decide how work is done, not what comes of it.
EXECUTION = ("processes", "allow_training", "redo_before")
#: Parameters that decide where it goes.
PLACES = ("figures_dir", "records_dir")


@cache
def group_of() -> dict[str, str]:
    """The group of every parameter, by its name."""
    return {declared.name: name for name, group in GROUPS.items() for declared in fields(group)}


# --- values ------------------------------------------------------------------------------------------------------------


class Parameters:
    """The values of some groups, by name: ``parameters.num_experts``. ``groups`` has each group by its name."""

    def __init__(self, profile: str, groups: Mapping[str, Group], overrides: Mapping[str, Any]) -> None:
        self.profile, self.groups, self.overrides = profile, dict(groups), dict(overrides)

    def __getattr__(self, name: str) -> Any:
        group = self.__dict__.get("groups", {}).get(group_of().get(name))
        if group is None:
            raise AttributeError(f"{name}: no parameter of the groups {list(self.__dict__.get('groups', ()))}")
        return getattr(group, name)

    def values(self) -> dict[str, Any]:
        """All values by name."""
        return {f.name: getattr(group, f.name) for group in self.groups.values() for f in fields(group)}

    def _repr_html_(self) -> str:
        """What a notebook runs with: the overrides, and all values with their meaning to fold out."""
        changed = ", ".join(f"{name} = {given!r}" for name, given in self.overrides.items()) or "nothing"
        rows = [
            f"<tr><td>{f.name}</td><td>{html.escape(repr(getattr(group, f.name)))}</td>"
            f"<td style='text-align:left'>{html.escape(f.metadata['meaning'])}</td></tr>"
            for group in self.groups.values()
            for f in fields(group)
        ]
        places = f"changed: {html.escape(changed)}; figures to {html.escape(self.figures_dir)}"
        head = f"Profile <b>{html.escape(self.profile)}</b>; {places}."
        return f"{head}<details><summary>all {len(rows)} values</summary><table>{''.join(rows)}</table></details>"

    def __repr__(self) -> str:
        return f"Parameters(profile={self.profile!r}, overrides={self.overrides!r}, groups={list(self.groups)})"


def read_parameters(
    profile: str, overrides: Mapping[str, Any], groups: Iterable[str], source: str = "overrides"
) -> Parameters:
    """The values of groups in a profile, some of them overridden.

    In a notebook it also looks at the cell that papermill added, if it did: a name in it that is none of the parameters cell would
    have no effect, and is refused.

    A profile's ``figures_dir`` holds figures of its own values alone: with others, or in a profile that has it from its
    ``base``, figures go to ``runs/<profile>/figures``, unless ``figures_dir`` is overridden too.

    Args:
        profile: a name in ``notebooks/profiles``, or the path of a YAML file of that form.
        overrides: values by name; only those of ``groups``.
        groups: names of :data:`GROUPS`. ``common`` is always among them.
        source: where the overrides come from, for errors.

    Raises:
        ParameterError: no such profile or name, or a value of another type or out of bounds.
    """
    _check_given(profile, overrides, groups)
    wanted = list(dict.fromkeys(["common", *groups]))
    if unknown := [name for name in wanted if name not in GROUPS]:
        raise ParameterError(f"groups: expected one of {list(GROUPS)}, found {unknown[0]!r}")
    known = [name for name, group in group_of().items() if group in wanted]
    _check_injected(known)
    check_names(overrides, known, source)
    file, given = _read_profile(profile)
    if _other_values(overrides, given) or "figures_dir" not in (read_yaml(file).get("common") or {}):
        given["common"]["figures_dir"] = f"runs/{file.stem}/figures"
    made = {}
    for name in wanted:
        names = [declared.name for declared in fields(GROUPS[name])]
        values = {n: _home(overrides.get(n, given.get(name, {}).get(n, ...))) for n in names}
        if missing := [n for n, v in values.items() if v is ...]:
            raise ParameterError(f"{file.name}: {name}: expected a value for {missing[0]!r}, found none")
        try:
            made[name] = GROUPS[name](**values)
        except ParameterError as error:
            culprit = str(error).partition(":")[0]
            raise ParameterError(f"{source if culprit in overrides else file.name}: {error}") from error
    return Parameters(Path(profile).stem, made, overrides)


CELL = ("profile", "overrides", "groups")  # the names of a notebook's parameters cell
ADDED = "# Parameters\n"  # how the cell begins that papermill adds after it


def _check_given(profile: Any, overrides: Any, groups: Any) -> None:
    """Raise ParameterError for what a parameters cell can't hold, such as overrides that papermill's -p took for a text."""
    if not isinstance(profile, str):
        raise ParameterError(f"profile: expected a name, or the path of a YAML file, found {profile!r}")
    if not isinstance(overrides, Mapping):
        expected = "names with values, such as {'num_experts': 16} (for papermill: -y '{overrides: {num_experts: 16}}')"
        raise ParameterError(f"overrides: expected {expected}, found {overrides!r}")
    if isinstance(groups, str) or not isinstance(groups, Iterable):
        raise ParameterError(f"groups: expected a list of {list(GROUPS)}, found {groups!r}")


def _check_injected(known: Collection[str]) -> None:
    """Raise ParameterError if papermill added a name that is none of the parameters cell. ``known``: the notebook's parameters."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    executed = [] if shell is None else shell.user_ns.get("In", [])
    added = next((cell for cell in reversed(executed) if cell.startswith(ADDED)), "")
    assigned = (target for line in ast.parse(added).body if isinstance(line, ast.Assign) for target in line.targets)
    for name in (ast.unparse(target) for target in assigned):
        if name in known:
            found = f"{name!r}, which is one of the profile's: give it as -y '{{overrides: {{{name}: ...}}}}'"
            raise ParameterError(f"papermill: expected one of {', '.join(CELL)}, found {found}")
        if name not in CELL and not name.startswith("PAPERMILL_"):  # what papermill itself can add
            raise ParameterError(f"papermill: no parameter {name!r}{hint(name, [*CELL, *known])}")


def _home(value: Any) -> Any:
    """The value; a path that begins with ``~`` from the home folder on."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def _other_values(overrides: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether overrides give something that decides results another value than a profile's sections."""
    deciding = [name for name in overrides if name not in (*EXECUTION, *PLACES)]
    return any(overrides[name] != given[group_of()[name]].get(name, ...) for name in deciding)


def check_names(given: Iterable[str], known: Collection[str], source: str) -> None:
    """Raise ParameterError for a name that is not known, with a hint."""
    for name in given:
        if name not in known:
            raise ParameterError(f"{source}: no chosen notebook has a parameter {name!r}{hint(name, known)}")


def hint(name: str, known: Collection[str]) -> str:
    """The known name that was probably meant, for an error."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f", expected one of {sorted(known)}"


def _read_profile(profile: str, above: Collection[Path] = ()) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A profile's file and its sections, those of its ``base`` filled in. ``above``: the profiles whose base it is."""
    file = (
        Path(profile).expanduser()
        if profile.endswith((".yaml", ".yml"))
        else project_root() / "notebooks/profiles" / f"{profile}.yaml"
    )
    if not file.exists():
        known = sorted(path.stem for path in (project_root() / "notebooks/profiles").glob("*.yaml"))
        raise ParameterError(f"profile: expected one of {known} or the path of a YAML file, found {profile!r}")
    if file.resolve() in above:
        raise ParameterError(f"{Path(above[-1]).name}: base: expected another profile, found {profile!r}")
    sections = read_yaml(file)
    base, above = sections.pop("base", None), (*above, file.resolve())
    if base is not None and not isinstance(base, str):
        raise ParameterError(f"{file.name}: base: expected a profile's name, found {base!r}")
    inherited = {} if base is None else _read_profile(base, above)[1]
    for section, values in sections.items():
        if section not in GROUPS:
            raise ParameterError(f"{file.name}: no group {section!r}{hint(section, GROUPS)}")
        if not isinstance(values, dict):
            raise ParameterError(f"{file.name}: {section}: expected names with values, found {values!r}")
        names = [declared.name for declared in fields(GROUPS[section])]
        if unknown := [name for name in values if name not in names]:
            raise ParameterError(f"{file.name}: {section}: no parameter {unknown[0]!r}{hint(unknown[0], names)}")
    return file, {name: {**inherited.get(name, {}), **sections.get(name, {})} for name in GROUPS}


class _Loader(yaml.SafeLoader):
    """Reads 8e-3 as a number too: YAML 1.1 takes it for text."""


_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def load_yaml(text: str) -> Any:
    """What a YAML text says, in plain values."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file of names with values."""
    try:
        values = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ParameterError(f"{file}: expected YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ParameterError(f"{file}: expected names with values, found {type(values).__name__}")
    return values
