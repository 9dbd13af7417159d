"""Studies from the notebooks' flat parameters, which papermill sets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ones_lib.data import docstrings
from ones_lib.data.files import file_stamps
from ones_lib.data.text import EMBEDDED_TASKS, HUB_TASKS
from ones_lib.distillation import Distillation
from ones_lib.study.records import Records, project_root
from ones_lib.study.study import Study
from ones_lib.study.training import Training


def call_with(function: Callable, namespace: Mapping):
    """Call ``function`` with those of a namespace's variables that it has parameters for (a notebook's ``globals()``)."""
    return function(**{name: namespace[name] for name in inspect.signature(function).parameters})


_PREFIXED = ("steps", "batch_size", "learning_rate", "warmup", "weight_decay", "optimizer", "temperature", "alpha")


@contextmanager
def _named(prefix: str, **names: str) -> Iterator[None]:
    """Errors inside name the notebook's parameter: a recipe's field with the prefix, or another name by the field."""
    try:
        yield
    except ValueError as error:
        field, colon, rest = str(error).partition(":")
        parameter = names.get(field, f"{prefix}{field}" if field in _PREFIXED else field)
        raise ValueError(f"{parameter}{colon}{rest}") from error


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
    calibration_examples: int,
    records_dir: str,
    redo_before: str,
    processes: int,
    allow_training: bool,
) -> Study:
    """The :class:`Study` of the image notebooks' flat parameters; paths are relative to the project's root.

    The KD recipe is the teacher's but for steps, learning rate and, since only what it ends with is looked at, evaluations.
    """
    root = project_root()
    with _named("", steps="teacher_steps"):
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
    with _named("kd_"):
        learning = replace(teaching, steps=kd_steps, learning_rate=kd_learning_rate, evaluations=0)
    return Study(
        domain="image",
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
        learning=learning,
        distillation=Distillation(temperature, alpha),
        calibration_examples=calibration_examples,
        seeds=seeds,
        records=Records(root / records_dir, redo_before),
        cache_dir=root / "runs" / "cache",
        processes=processes,
        allow_training=allow_training,
    )


def text_study(
    *,
    text_data: str,
    text_dir: str,
    tasks: list[str],
    corpus: str,
    tokenizer: str,
    vocab_size: int,
    sequence_length: int,
    task_length: int,
    stride: int,
    mask_rate: float,
    max_corpus: int | None,
    max_train: int | None,
    max_validation: int | None,
    embedding_size: int,
    text_d_model: int,
    text_depth: int,
    text_num_heads: int,
    text_d_ff: int,
    text_num_experts: int,
    text_top_k: int,
    text_renormalize: bool,
    text_drop_rate: float,
    relative_positions: int,
    initializer_range: float,
    text_seeds: list[int],
    text_teacher_steps: int,
    text_batch_size: int,
    text_learning_rate: float,
    text_warmup: float,
    text_weight_decay: float,
    text_optimizer: str,
    mixed_precision: str,
    text_kd_steps: int,
    text_kd_learning_rate: float,
    text_temperature: float,
    text_alpha: float,
    calibration_examples: int,
    finetune_steps: int,
    finetune_batch_size: int,
    finetune_learning_rate: float,
    finetune_kd: bool,
    records_dir: str,
    redo_before: str,
    processes: int,
    allow_training: bool,
) -> Study:
    """The :class:`Study` of the text notebook's flat parameters; paths are relative to the project's root."""
    root = project_root()
    with _named("text_", steps="text_teacher_steps"):
        pretraining = Training(
            steps=text_teacher_steps,
            batch_size=text_batch_size,
            learning_rate=text_learning_rate,
            warmup=text_warmup,
            weight_decay=text_weight_decay,
            optimizer=text_optimizer,
            mixed_precision=mixed_precision,
            evaluations=5,
        )
    tasks = tasks or list(EMBEDDED_TASKS if text_data == "docstrings" else HUB_TASKS)
    with _named("text_kd_"):
        learning = replace(pretraining, steps=text_kd_steps, learning_rate=text_kd_learning_rate, evaluations=0)
    with _named("finetune_"):
        finetuning = replace(
            pretraining,
            steps=finetune_steps,
            batch_size=finetune_batch_size,
            learning_rate=finetune_learning_rate,
            evaluations=0,
        )
    with _named("text_"):
        distillation = Distillation(text_temperature, text_alpha)
    return Study(
        domain="text",
        data={
            "name": text_data,
            "text_dir": str(root / text_dir) if text_dir else "",
            "tasks": tuple(tasks) if corpus == "tasks" else (),
            "corpus": _in_project(root, corpus),
            "tokenizer": tokenizer,
            "vocab_size": vocab_size,
            "sequence_length": sequence_length,
            "task_length": task_length,
            "stride": stride,
            "mask_rate": mask_rate,
            "max_corpus": max_corpus,
            "max_train": max_train,
            "max_validation": max_validation,
            "versions": docstrings.versions() if "docstrings" in (text_data, corpus) else None,
        },
        model={
            "embedding_size": embedding_size,
            "hidden_size": text_d_model,
            "num_hidden_layers": text_depth,
            "num_attention_heads": text_num_heads,
            "intermediate_size": text_d_ff,
            "num_experts": text_num_experts,
            "num_experts_per_tok": text_top_k,
            "renormalize": text_renormalize,
            "hidden_dropout_prob": text_drop_rate,
            "relative_positions": relative_positions,
            "initializer_range": initializer_range,
        },
        teaching=pretraining,
        learning=learning,
        distillation=distillation,
        calibration_examples=calibration_examples,
        seeds=text_seeds,
        records=Records(root / records_dir, redo_before),
        cache_dir=root / "runs" / "cache",
        tasks=tasks,
        finetuning=finetuning,
        finetune_kd=finetune_kd,
        processes=processes,
        allow_training=allow_training,
    )


def language_study(
    *,
    language_source: str,
    language_moe: dict,
    language_corpus: str,
    language_vocab_size: int,
    language_sequence_length: int,
    language_max_corpus: int | None,
    language_validation: int,
    language_seeds: list[int],
    language_teacher_steps: int,
    language_batch_size: int,
    language_learning_rate: float,
    mixed_precision: str,
    language_kd_steps: int,
    language_kd_learning_rate: float,
    language_temperature: float,
    language_alpha: float,
    language_calibration: int,
    records_dir: str,
    redo_before: str,
    processes: int,
    allow_training: bool,
) -> Study:
    """The :class:`Study` of the notebook on published MoEs; paths are relative to the project's root."""
    root = project_root()
    source = _in_project(root, language_source)
    with _named("language_", steps="language_teacher_steps"):
        training = Training(
            steps=language_teacher_steps,
            batch_size=language_batch_size,
            learning_rate=language_learning_rate,
            mixed_precision=mixed_precision,
            evaluations=5,
        )
    corpus = _in_project(root, language_corpus)
    embedded = corpus == "docstrings"
    with _named("language_kd_"):
        learning = replace(training, steps=language_kd_steps, learning_rate=language_kd_learning_rate, evaluations=0)
    with _named("language_"):
        distillation = Distillation(language_temperature, language_alpha)
    return Study(
        domain="language",
        data={
            "name": "docstrings" if embedded else "local",
            "corpus": corpus,
            "tokenizer": source,
            "vocab_size": language_vocab_size,
            "sequence_length": language_sequence_length,
            "max_corpus": language_max_corpus,
            "validation_sequences": language_validation,
            "versions": docstrings.versions() if embedded else None,
        },
        model={"checkpoint": source, "files": _files_of(source)} if source else language_moe,
        teaching=training,
        learning=learning,
        distillation=distillation,
        calibration_examples=language_calibration,
        seeds=language_seeds,
        records=Records(root / records_dir, redo_before),
        cache_dir=root / "runs" / "cache",
        processes=processes,
        allow_training=allow_training,
    )


def _in_project(root: Path, name: str) -> str:
    """The path of what the project's root holds by that name, else the name: of the hub, or a word."""
    return str(root / name) if name and (root / name).exists() else name


def _files_of(source: str) -> list:
    """What tells a checkpoint that was changed from what records were made of; of a hub name nothing."""
    files = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []
    return file_stamps(files)
