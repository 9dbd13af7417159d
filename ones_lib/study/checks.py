"""What can be known to be wrong with notebooks' parameters before the first of them is run: ``run_all.sh`` asks for it.

Studies are made of the parameters, models are built without memory for their weights, and folders are looked into; nothing is
read or drawn.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch

from ones_lib.checkpoints.experts import open_experts
from ones_lib.data.glyphs import CANVAS
from ones_lib.data.images import folder_classes
from ones_lib.data.text import TASKS, find_split
from ones_lib.gathering.scale import SCALE_WORDS
from ones_lib.integration import integration_methods
from ones_lib.study.image_task import classification_model
from ones_lib.study.language_task import CONTROL
from ones_lib.study.records import project_root
from ones_lib.study.studies import call_with, image_study, language_study, text_study
from ones_lib.study.study import Study
from ones_lib.study.text_tasks import pretraining_model

METHODS = (
    *("methods", "calibrated_methods", "expert_methods", "ablation_methods", "variant_methods", "controls"),
    *("teacher_methods", "distilled_methods"),
)
BUDGETS = (
    *("budgets", "text_budgets", "task_budgets", "ablation_budgets", "ablation_text_budgets", "language_budgets"),
    *("expert_budget", "variant_budget", "teacher_budget", "distillation_budget", "budget", "upcycling_steps"),
)


def check(parameters: Mapping) -> None:
    """Raise ValueError, FileNotFoundError or another that names the parameter, for one notebook's parameters."""
    for name in (n for n in METHODS if n in parameters):
        for method in parameters[name]:
            if method not in integration_methods():
                raise ValueError(f"{name}: expected of {integration_methods()}, found {method!r}")
    for name, (method, _) in parameters.get("language_students", {}).items():
        if method not in (*integration_methods(), CONTROL):
            raise ValueError(f"language_students: {name}: expected of {integration_methods()}, found {method!r}")
    for name in (n for n in BUDGETS if n in parameters):
        for steps in parameters[name] if isinstance(parameters[name], list) else [parameters[name]]:
            if not isinstance(steps, int) or steps < 0:
                raise ValueError(f"{name}: expected whole numbers of steps, at least 0, found {steps!r}")
    for scale in parameters.get("scales", []):
        if isinstance(scale, str) and scale not in SCALE_WORDS:
            raise ValueError(f"scales: expected numbers or of {list(SCALE_WORDS)}, found {scale!r}")
    for name in ("figures_dir", "records_dir"):
        folder = project_root() / parameters.get(name, "")
        if not next(f for f in (folder, *folder.parents) if f.exists()).is_dir():
            raise NotADirectoryError(f"{name}: expected a folder, found a file in its path: {folder}")
    if parameters.get("source"):
        open_experts(parameters["source"])
    for make, look in {image_study: _check_images, text_study: _check_text, language_study: None}.items():
        if set(inspect.signature(make).parameters) <= set(parameters):
            study = call_with(make, parameters)
            if look is not None:
                look(study, parameters)


def _check_images(study: Study, parameters: Mapping) -> None:
    name, classes = study.data["name"], study.data["num_classes"] or 1000
    if name == "folder":
        classes = len(folder_classes(study.data["data_dir"])[: study.data["num_classes"]])
    elif name != "glyphs" and "/" not in name:
        raise ValueError(
            f"data: expected 'glyphs', 'folder' or a hub name such as 'ILSVRC/imagenet-1k', found {name!r}"
        )
    size = study.data["image_size"]
    if size < 1 or (name == "glyphs" and CANVAS % size):
        raise ValueError(f"image_size: expected at least 1 px, for glyphs a divisor of {CANVAS}, found {size}")
    data = SimpleNamespace(num_classes=classes, image_size=size, in_chans=1 if name == "glyphs" else 3)
    for count in parameters.get("expert_counts", []):
        if count < 2:
            raise ValueError(f"expert_counts: expected numbers of at least 2, found {count}")
        _build(classification_model, study.moe(0, num_experts=count)["model"], data)
    for config in (study.moe(0), study.dense(0)):
        _build(classification_model, config["model"], data)
    layer = _build(classification_model, study.moe(0)["model"], data).moe_layers()[0]
    for rank in [*parameters.get("ranks", []), *([parameters["rank"]] if parameters.get("rank") is not None else [])]:
        if not 1 <= rank <= min(layer.up.shape[1:]):
            raise ValueError(f"rank: expected an integer from 1 to {min(layer.up.shape[1:])}, found {rank}")


def _check_text(study: Study, parameters: Mapping) -> None:
    name, folder = study.data["name"], study.data["text_dir"]
    if name not in ("docstrings", "local", "hub"):
        raise ValueError(f"text_data: expected 'docstrings', 'local' or 'hub', found {name!r}")
    for task in study.tasks:
        if task not in TASKS:
            raise ValueError(f"tasks: expected of {list(TASKS)}, found {task!r}")
        if name == "local":
            find_split(Path(folder) / task, "train")
    for option in ("vocab_size", "sequence_length", "task_length"):
        if study.data[option] < 8:
            raise ValueError(f"{option}: expected at least 8, found {study.data[option]}")
    shape = SimpleNamespace(shape=(1, study.data["sequence_length"]))
    tokenizer = SimpleNamespace(pad_token_id=0)
    data = SimpleNamespace(
        vocab_size=study.data["vocab_size"],
        tokenizer=tokenizer,
        task_length=study.data["task_length"],
        corpus={"train": shape},
    )
    for config in (study.moe(0), study.dense(0)):
        _build(pretraining_model, config["model"], data)


def _build(make, model: Mapping, data: SimpleNamespace):
    """A model without memory for its weights. What a library asserts of the sizes names none of our parameters: say which."""
    try:
        with torch.device("meta"):
            return make(model, data, 0)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"model: {dict(model)}: cannot be built ({error})") from error


def main() -> int:
    """Reads pairs of a notebook's name and parameters as JSON from standard input; writes the first thing that is wrong."""
    for notebook, parameters in json.load(sys.stdin):
        try:
            check(parameters)
        except (ValueError, OSError, TypeError) as error:
            print(f"{notebook}: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
