"""What user's own files add to a config: their place in the project, and a hash of what they hold.

So changed pictures, texts or weights get new records, and a project that is moved keeps its own. Data that the library makes
add nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ones_lib.data.files import content_hash
from ones_lib.data.images import folder_files
from ones_lib.data.rows import task_spec
from ones_lib.data.sources import find_split, text_files, visible_files
from ones_lib.data.text import EMBEDDED
from ones_lib.study.records import project_root

PLACES = ("data_dir", "name", "text_dir", "tokenizer", "checkpoint")  # what holds a place in data and models
HASHES = ("files", "tokenizer_files")
_WORDS = (*EMBEDDED, "glyphs", "folder", "tasks", "local", "hub")  # names that are no places
_TOKENIZERS = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens")  # how a tokenizer's files begin


def located(name: str) -> str:
    """The absolute path of a file or folder that a config calls ``name``; ``name`` itself if there is none, as of a hub name."""
    path = project_root() / Path(name).expanduser()
    return str(path) if name and path.exists() else name


def place_in_project(name: str) -> str:
    """What a config calls a file or folder: relative to the project's root if it lies below it."""
    path, root = Path(os.path.normpath(located(name))), project_root()
    if not path.is_absolute():
        return name
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def arguments_of(data: Mapping) -> dict:
    """A config's data as arguments of the function that opens it: with absolute paths, without hashes."""
    found = {key: value for key, value in data.items() if key not in HASHES}
    found |= {key: located(value) for key, value in found.items() if _is_place(key, value)}
    return found | ({"of_tasks": arguments_of(found["of_tasks"])} if found.get("of_tasks") else {})


def with_files(domain: str, data: Mapping, cache_dir: Path) -> dict:
    """Data of a config, with the hashes of what is read of the user's own files.

    Raises:
        FileNotFoundError, ValueError: they are not there, or not as they should be.
    """
    data = _placed(data)
    if data.get("name") == "folder" and domain == "image":
        counts = ("val_fraction", "num_classes", "train_per_class", "val_per_class")
        root = located(data.get("data_dir", ""))
        files = folder_files(root, **{name: data[name] for name in counts if name in data})
        return data | {"files": content_hash(files, Path(root), cache_dir)}
    if data.get("of_tasks"):
        of = _placed(data["of_tasks"])
        if of["name"] == "local":
            of["files"] = task_files(of, of.get("tasks", ()), cache_dir, splits=("train",))
        data["of_tasks"] = of
    path = Path(located(data["name"]) if _is_place("name", data.get("name")) else "")
    if path.is_absolute():
        splits = {"all": visible_files(path)} if domain == "image" else text_files(path)
        files = [file for part in splits.values() for file in part]
        data["files"] = content_hash(files, path.parent if path.is_file() else path, cache_dir)
    if (path := Path(located(data.get("tokenizer", "")))).is_absolute() and path.is_dir():
        names = [
            file
            for file in path.iterdir()
            if file.name.startswith(_TOKENIZERS) or file.suffix in (".model", ".tiktoken")
        ]
        data["tokenizer_files"] = content_hash(sorted(names), path, cache_dir)
    return data


def task_files(data: Mapping, tasks: Iterable[str], cache_dir: Path, splits: Iterable[str] = ()) -> dict[str, str]:
    """By task the hash of its files in ``text_dir``, of all splits that are read or of some ``splits``."""
    root, hashes = Path(located(data["text_dir"])), {}
    for task in tasks:
        files = []
        for split in splits or ("train", *task_spec(task, data.get("own")).validation):
            try:
                files.append(find_split(root / task, split))
            except FileNotFoundError:
                if split == "train":  # of the others some need not be there, and the reader of rows knows which
                    raise
        hashes[task] = content_hash(files, root / task, cache_dir)
    return hashes


def with_task_files(data: Mapping, tasks: Iterable[str], cache_dir: Path) -> dict:
    """A text study's ``task_data`` with :func:`task_files`."""
    data = _placed(data)
    return data | ({"files": task_files(data, tasks, cache_dir)} if data.get("name") == "local" else {})


def with_checkpoint(model: Mapping, cache_dir: Path) -> dict:
    """A model of a config; a checkpoint in a folder with the hash of its configuration and weights."""
    path = Path(located(model.get("checkpoint", "")))
    if not (path.is_absolute() and path.is_dir()):
        return dict(model)
    files = [file for file in path.iterdir() if file.name.endswith((".safetensors", "config.json", "index.json"))]
    known = {"checkpoint": place_in_project(str(path)), "files": content_hash(sorted(files), path, cache_dir)}
    return {**model, **known}


def check_unchanged(config: Mapping, cache_dir: Path) -> None:
    """Raise ValueError if files are no longer those that a config has hashes of."""
    now = {"data": with_files(config["domain"], config["data"], cache_dir)} if _hashes(config.get("data", {})) else {}
    if _hashes(config.get("task_data", {})):
        now["task_data"] = with_task_files(config["task_data"], [config["task"]], cache_dir)
    if _hashes(config.get("model", {})):
        now["model"] = with_checkpoint(config["model"], cache_dir)
    for part, found in now.items():
        if _hashes(found) != _hashes(config[part]):
            place = next(v for k, v in {**found.get("of_tasks", {}), **found}.items() if _is_place(k, v))
            raise ValueError(
                f"{place}: expected the files that this run began with, found changed ones; start the run again"
            )


def _hashes(data: Mapping) -> list:
    return [found for part in (data, data.get("of_tasks") or {}) for name in HASHES if (found := part.get(name))]


def _placed(data: Mapping) -> dict:
    """The data without hashes, and with their places as the project calls them."""
    kept = {key: value for key, value in data.items() if key not in HASHES}
    return kept | {key: place_in_project(str(value)) for key, value in kept.items() if _is_place(key, value)}


def _is_place(key: str, value: object) -> bool:
    return key in PLACES and bool(value) and not (key == "name" and value in _WORDS)
