"""What a config is, for people: the columns of a listing, and the name of its record's folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def data_name(data: Mapping) -> str:
    """Short name of a config's data; a folder's own, also where the texts are those of a folder's tasks."""
    of_tasks = data.get("of_tasks") or {}
    if data["name"] == "tasks" and of_tasks.get("text_dir"):
        return Path(of_tasks["text_dir"]).name
    name = data["data_dir"] if data["name"] == "folder" else data["name"]
    return Path(name).name if data["name"] == "folder" or "files" in data or Path(name).is_absolute() else name


def describe(config: Mapping) -> dict[str, Any]:
    """A config in a few words: ``kind, data, task, model, method, seed, steps``; None for what it does not have.

    ``model`` is the architecture, of a student that of its teacher. ``method`` is the gathering or control; of a fine-tuned
    model that of the model it started from or, if it was not gathered, that model's kind. ``steps`` are those of its
    training, of a student those of KD, 0 right after gathering; of a fine-tuned model those of the model it started from.
    """
    start = describe(config["start"]) if config["kind"] == "finetuned" else {}
    teacher = config.get("teacher", {})
    steps = config["training"]["steps"] if config.get("training") else 0 if config["kind"] == "student" else None
    return {
        "kind": config["kind"],
        "data": data_name(config["data"]) if "data" in config else None,
        "task": config.get("task") or (teacher.get("task") if config["kind"] == "student" else None),
        "model": _model(config),
        "method": (start["method"] or start["kind"]) if start else config.get("method"),
        "seed": config.get("seed"),
        "steps": start["steps"] if start else steps,
    }


def _model(config: Mapping) -> str | None:
    """The name of an architecture, with an MoE's number of experts where its config has it under that name."""
    if config["kind"] in ("student", "finetuned"):
        return _model(config["teacher" if config["kind"] == "student" else "start"])
    model = config.get("model") or config.get("start", {}).get("model")
    if not isinstance(model, Mapping):
        return None
    checkpoint = model.get("checkpoint")
    name = Path(checkpoint).name if checkpoint else model.get("name") or model.get("model_type") or "widenet"
    experts = config.get("upcycling", model).get("num_experts") if config["kind"] == "moe" else None
    return f"{name}, {experts} experts" if experts else name


def record_name(config: Mapping, digest: str) -> str:
    """A readable name for a config's record, such as ``student-glyphs-average-s0-2dd34c07a1b7e0f5``; ``digest`` ends it."""
    about = describe(config)
    of_language = about["model"] if config.get("domain") == "language" else None
    parts = [about["data"], of_language and of_language.partition(",")[0], about["task"], about["method"]]
    words = [re.sub(r"[^\w.]+", "_", part).strip("_.")[:32] for part in parts if part]
    seed = [] if about["seed"] is None else [f"s{about['seed']}"]
    return "-".join([about["kind"], *filter(None, words), *seed, digest])
