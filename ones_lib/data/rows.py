"""Text tasks: their columns, classes and metrics, and reading and checking their rows.

Rows have the same columns whatever their source: those of the hub's data set of that kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ones_lib.data import names

if TYPE_CHECKING:  # a third of a second to import
    from datasets import Dataset

ANSWER_COLUMNS = ("id", "context", "question", "answers")
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}  # ending -> reader of datasets


@dataclass(frozen=True)
class TextTask:
    """A task's columns, classes, metric and source.

    Args:
        texts: the one or two text columns; question and context for question answering.
        labels: class names, in the order of their numbers; None for question answering.
        metric: the metric that enters the average over tasks.
        hub: name and configuration of the hub's data set; None for an embedded task.
        validation: splits to evaluate on; the metrics of the second are named after it.
        unanswerable: whether questions may have no answer.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...] | None
    metric: str
    hub: tuple[str, str | None] | None = None
    validation: tuple[str, ...] = ("validation",)
    unanswerable: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return ANSWER_COLUMNS if self.labels is None else (*self.texts, "label")


_PAIR, _QUESTION = ("premise", "hypothesis"), ("question", "context")
TASKS = {
    "language": TextTask(("sentence",), names.LANGUAGES, "accuracy"),
    "family": TextTask(_PAIR, names.FAMILY_CLASSES, "accuracy"),
    "answer": TextTask(_QUESTION, None, "f1"),
    "answer_or_none": TextTask(_QUESTION, None, "f1", unanswerable=True),
    "sst2": TextTask(("sentence",), ("negative", "positive"), "accuracy", ("nyu-mll/glue", "sst2")),
    "mnli": TextTask(
        _PAIR,
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        ("nyu-mll/glue", "mnli"),
        ("validation_matched", "validation_mismatched"),
    ),
    "squad": TextTask(_QUESTION, None, "f1", ("rajpurkar/squad", None)),
    "squad_v2": TextTask(_QUESTION, None, "f1", ("rajpurkar/squad_v2", None), unanswerable=True),
}
EMBEDDED_TASKS = tuple(name for name, task in TASKS.items() if task.hub is None)
HUB_TASKS = tuple(name for name, task in TASKS.items() if task.hub is not None)


def task_rows(task: str, folder: Path | None, max_train: int | None, max_validation: int | None) -> dict[str, Dataset]:
    """A task's checked rows by split, from ``folder/<task>`` or, without a folder, from the hub.

    Only the training split and the first validation split are required.
    """
    spec, result = TASKS[task], {}
    for split in ("train", *spec.validation):
        if folder is None:
            rows = read_hub(*spec.hub, split)
        else:
            rows = read_split(folder / task, split, optional=split in spec.validation[1:])
        if rows is not None:
            limit = max_train if split == "train" else max_validation
            rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
            result[split] = _checked(rows, spec, place_of(task, folder, split))
    return result


def place_of(task: str, folder: Path | None, split: str) -> str:
    """Where rows are, for errors."""
    return f"{task if folder is None else folder / task}, split {split}"


# --- reading ---------------------------------------------------------------------------------------------------------


def find_split(folder: Path, split: str) -> Path:
    """The file of a split.

    Raises:
        FileNotFoundError, ValueError: the file is missing or empty.
    """
    for path in (folder / f"{split}{ending}" for ending in READERS):
        if path.exists():
            if not path.stat().st_size:
                raise ValueError(f"{path}: expected at least one row, found an empty file")
            return path
    found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
    raise FileNotFoundError(
        f"text_dir: expected {folder / split} with one of the endings {', '.join(READERS)}, found in {folder}: {found}"
    )


def read_file(path: Path) -> Dataset:
    """The rows of a JSON, JSON lines, Parquet or CSV file; ValueError names it where it is none."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if path.suffix not in READERS:
        raise ValueError(f"{path}: expected one of the endings {', '.join(READERS)}, found {path.suffix!r}")
    try:
        return load_dataset(READERS[path.suffix], data_files=str(path), split="train", keep_in_memory=True)
    except DatasetGenerationError as error:
        raise ValueError(f"{path}: could not be read: {error.__cause__ or error}") from error


def read_split(folder: Path, split: str, optional: bool = False) -> Dataset | None:
    """The rows of ``folder/<split>.*``; None if there is no such file and it is optional."""
    try:
        return read_file(find_split(folder, split))
    except FileNotFoundError:
        if optional:
            return None
        raise


def read_hub(name: str, configuration: str | None, split: str) -> Dataset:
    """The rows of a split of a data set on the Hugging Face hub."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(name, configuration, split=split)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise ConnectionError(
            f"data: could not open {name!r} on the Hugging Face hub ({error}). Offline, use data='local' with text_dir="
            "<a folder with <task>/<split>.jsonl or .parquet>"
        ) from error


# --- checks ----------------------------------------------------------------------------------------------------------


def _checked(rows: Dataset, spec: TextTask, where: str) -> Dataset:
    """The rows with labels as integers (a column with gaps is often stored as 1.0) and answers without white space around them.

    Raises:
        ValueError: a missing column, a non-text, a label out of range or an answer in the wrong place.
    """
    missing = [c for c in spec.columns if c not in rows.column_names]
    if missing:
        raise ValueError(
            f"{where}: expected columns {list(spec.columns)}, found {rows.column_names}; missing: {missing}"
        )
    if not len(rows):
        raise ValueError(f"{where}: expected at least one row, found none")
    for column in spec.texts:
        for i, value in enumerate(rows[column]):
            if not isinstance(value, str):
                raise ValueError(f"{where}: row {i}: column {column!r}: expected text, found {value!r}")
    if spec.labels is None:
        every = zip(rows["answers"], rows["context"], strict=True)
        answers = [
            _checked_answers(found, context, spec, f"{where}: row {i}: column 'answers'")
            for i, (found, context) in enumerate(every)
        ]
        return rows.remove_columns("answers").add_column("answers", answers)
    meaning = ", ".join(f"{i} {label}" for i, label in enumerate(spec.labels))
    labels = list(rows["label"])
    for i, label in enumerate(labels):
        if label not in range(len(spec.labels)) or isinstance(label, bool):
            raise ValueError(f"{where}: row {i}: column 'label': expected {meaning}, found {label!r}")
    return rows.remove_columns("label").add_column("label", [int(label) for label in labels])


def _checked_answers(answers: object, context: str, spec: TextTask, where: str) -> dict:
    if not isinstance(answers, Mapping) or not {"text", "answer_start"} <= set(answers):
        raise ValueError(f"{where}: expected text and answer_start, found {answers!r}")
    if not answers["text"] and not spec.unanswerable:
        raise ValueError(f"{where}: expected an answer, found none (SQuAD 2.0's form?)")
    if len(answers["text"]) != len(answers["answer_start"]):
        raise ValueError(f"{where}: expected as many texts as answer_start, found {answers}")
    trimmed = {"text": [], "answer_start": []}
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if not isinstance(text, str) or isinstance(start, bool) or start not in range(len(context) + 1):
            raise ValueError(
                f"{where}: expected text and its first character in the context, found {text!r} at {start!r}"
            )
        start = int(start)  # may be stored as 1.0
        if (found := context[start : start + len(text)]) != text:
            raise ValueError(f"{where}: expected {text!r} at {start}, found {found!r}")
        if not text.strip():
            raise ValueError(f"{where}: expected an answer, found only white space at {start}")
        trimmed["text"].append(text.strip())
        trimmed["answer_start"].append(start + len(text) - len(text.lstrip()))
    return trimmed
