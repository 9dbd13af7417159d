"""Text tasks: their columns, classes and metrics, and reading and checking their rows.

Rows of the known tasks (:data:`TASKS`) have the same columns whatever their source: those of the hub's data set of that kind.
A task of the user's own is a folder of files whose columns the user names, see :func:`check_definition`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ones_lib.data import names
from ones_lib.data.sources import read_hub, read_split

if TYPE_CHECKING:  # a third of a second to import
    from datasets import Dataset

ANSWER_COLUMNS = ("id", "context", "question", "answers")


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
        label: in files of the user's own, the column with the names of classes; it becomes ``label``, with their numbers.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...] | None
    metric: str
    hub: tuple[str, str | None] | None = None
    validation: tuple[str, ...] = ("validation",)
    unanswerable: bool = False
    label: str | None = None

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


def task_spec(task: str, own: Mapping[str, Mapping] | None = None) -> TextTask:
    """What is known of a task: one of ``own``, by name what :func:`own_task` gives, or of :data:`TASKS`."""
    if not own or task not in own:
        return TASKS[task]
    known = own[task]
    if "labels" not in known:
        return TextTask(_QUESTION, None, "f1", unanswerable=known["unanswerable"])
    return TextTask(tuple(known["texts"]), tuple(known["labels"]), "accuracy", label=known["label"])


def task_rows(
    task: str, spec: TextTask, folder: Path | None, max_train: int | None, max_validation: int | None
) -> dict[str, Dataset]:
    """A task's checked rows by split, from ``folder/<task>`` or, without a folder, from the hub.

    Only the training split and the first validation split are required. A classification of the user's own needs no validation
    split: without one, every tenth row of each class is held out.
    """
    first, *more = spec.validation
    found, limits = {}, {"train": max_train}
    for split in ("train", *spec.validation):
        if folder is None:
            rows = read_hub(*spec.hub, split)
        else:
            optional = split in more or (split == first and spec.label is not None)
            rows = read_split(folder / task, split, optional, spec.texts)
        if rows is not None:
            found[split] = rows
    if whole := first not in found:
        where = place_of(task, folder, "train")
        found = _held_out(_checked(found["train"], spec, where), where)
    result = {}
    for split, rows in found.items():
        limit, where = limits.get(split, max_validation), place_of(task, folder, split)
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        result[split] = rows if whole else _checked(rows, spec, where)
        if spec.label is not None and len(set(result[split]["label"])) < 2:
            found_class = spec.labels[result[split]["label"][0]]
            raise ValueError(
                f"{where}: column {spec.label!r}: expected two classes at least in the {len(rows)} rows that are taken, found"
                f" {found_class!r} alone; are the rows sorted by class?"
            )
    return result


def _held_out(rows: Dataset, where: str) -> dict[str, Dataset]:
    """Checked rows in two: every tenth of each class, from its fifth on, is for validation."""
    seen, parts = Counter(), {"train": [], "validation": []}
    for i, label in enumerate(rows["label"]):
        parts["validation" if seen[label] % 10 == 4 else "train"].append(i)
        seen[label] += 1
    if not parts["validation"]:
        raise ValueError(
            f"{where}: expected a validation split beside it or at least 5 rows of a class, found {len(rows)} rows"
        )
    return {split: rows.select(chosen) for split, chosen in parts.items()}


def place_of(task: str, folder: Path | None, split: str) -> str:
    """Where rows are, for errors."""
    return f"{task if folder is None else folder / task}, split {split}"


# --- tasks of the user's own -------------------------------------------------------------------------------------------

OWN_FORM = "{reviews: {kind: classification, text: sentence, label: label}}"
_TEXTS = {"classification": 1, "pair": 2}  # kind -> number of text columns; the third kind is "answers"


def check_definition(task: str, given: object) -> None:
    """Check what a user says of a task of their own, in the folder of that name.

    ``{kind: classification, text: COLUMN, label: COLUMN}``, ``{kind: pair, text: [COLUMN, COLUMN], label: COLUMN}``, or
    ``{kind: answers}``, with SQuAD's columns. A label is a class: text, or a whole number.

    Raises:
        ValueError: something else. It names the task.
    """
    expected = (
        "expected {kind: classification, text: a column, label: a column}, {kind: pair, text: [two columns], label: a column} or"
        " {kind: answers}"
    )
    given = given if isinstance(given, dict) else {"kind": given}
    kind = given.get("kind")
    keys = {"kind"} if kind == "answers" else {"kind", "text", "label"}
    right = kind in (*_TEXTS, "answers") and set(given) == keys
    if right and kind in _TEXTS:
        columns = [*_listed(given["text"]), given["label"]]
        right = all(isinstance(c, str) and c for c in columns) and len(set(columns)) == len(columns) == _TEXTS[kind] + 1
    if not right:
        raise ValueError(f"{task}: {expected}, found {given}")
    if not re.fullmatch(r"\w[\w.-]*", task) or task in ("average", "masked_lm"):  # what tables call other things
        raise ValueError(
            f"{task!r}: expected a folder's name of letters, digits, '.', '-' and '_', and another than this"
        )


def own_task(task: str, given: Mapping, folder: Path) -> dict:
    """What a config holds of a task of the user's own: its columns, and what its training split says of it.

    Args:
        given: see :func:`check_definition`.
        folder: the folder that holds the task's.

    Returns:
        ``texts, label, labels``: the columns, and the names of the classes in their order, that of the numbers they are, or of
        the alphabet. Of question answering ``unanswerable``: whether some questions have no answer.

    Raises:
        FileNotFoundError, ValueError: the training split or a column is missing, or its labels are no classes.
    """
    texts = _listed(given.get("text", []))
    rows, where = read_split(folder / task, "train", texts=texts), place_of(task, folder, "train")
    if given["kind"] == "answers":
        _check_columns(rows, ANSWER_COLUMNS, where)
        return {"unanswerable": any(isinstance(a, Mapping) and not a.get("text") for a in rows["answers"])}
    label = given["label"]
    _check_columns(rows, (*texts, label), where)
    names = set(_class_names(rows, label, where))
    if len(names) < 2 or 2 * len(names) > len(rows):
        expected = "at least two classes, with two rows each on average"
        raise ValueError(f"{where}: column {label!r}: expected {expected}, found {len(names)} in {len(rows)} rows")
    numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    order = sorted(names, key=lambda name: (int(name) if numbers else 0, name))
    return {"texts": texts, "label": label, "labels": order}


def _listed(columns: object) -> list:
    return columns if isinstance(columns, list) else [columns]


# --- checks ----------------------------------------------------------------------------------------------------------


def _checked(rows: Dataset, spec: TextTask, where: str) -> Dataset:
    """The rows with labels as integers (a column with gaps is often stored as 1.0) and answers without white space around them.

    Raises:
        ValueError: a missing column, a non-text, a label out of range or an answer in the wrong place.
    """
    _check_columns(rows, spec.columns if spec.label is None else (*spec.texts, spec.label), where)
    for column in spec.texts:
        odd = [(i, value) for i, value in enumerate(rows[column]) if not isinstance(value, str)]
        if odd:
            like_it = f", and no text in {len(odd) - 1:,} more rows" if len(odd) > 1 else ""
            raise ValueError(
                f"{where}: row {odd[0][0]}: column {column!r}: expected text, found {odd[0][1]!r}{like_it}"
            )
    if spec.labels is None:
        every = zip(rows["answers"], rows["context"], strict=True)
        answers = [
            _checked_answers(found, context, spec, f"{where}: row {i}: column 'answers'")
            for i, (found, context) in enumerate(every)
        ]
        return rows.remove_columns("answers").add_column("answers", answers)
    if spec.label is not None:
        numbers = [spec.labels.index(name) for name in _class_names(rows, spec.label, where, spec.labels)]
        return rows.select_columns(list(spec.texts)).add_column("label", numbers)
    meaning = ", ".join(f"{i} {label}" for i, label in enumerate(spec.labels))
    # A column of a CSV file is text throughout if one of its cells is.
    labels = [int(v) if isinstance(v, str) and re.fullmatch(r"-?\d+", v) else v for v in rows["label"]]
    for i, label in enumerate(labels):
        if label not in range(len(spec.labels)) or isinstance(label, bool):
            raise ValueError(f"{where}: row {i}: column 'label': expected {meaning}, found {label!r}")
    return rows.remove_columns("label").add_column("label", [int(label) for label in labels])


def _check_columns(rows: Dataset, columns: Sequence[str], where: str) -> None:
    missing = [c for c in columns if c not in rows.column_names]
    if missing:
        raise ValueError(f"{where}: expected columns {list(columns)}, found {rows.column_names}; missing: {missing}")
    if not len(rows):
        raise ValueError(f"{where}: expected at least one row, found none")


def _class_names(rows: Dataset, column: str, where: str, known: Sequence[str] = ()) -> list[str]:
    """The class of each row by its name: text, or a number (which a column with gaps stores as 1.0), or True or False.

    Raises:
        ValueError: it is something else, or not one of the classes ``known``, if there are any; it names the row.
    """
    result, allowed = [], set(known)
    for i, found in enumerate(rows[column]):
        whole = isinstance(found, float) and found.is_integer()
        name = str(int(found) if whole else found)
        if not (whole or isinstance(found, int | str)) or not name:
            expected = "a class, which is text or a whole number"
        elif known and name not in allowed:
            expected = f"a class of the training split, {', '.join(known)}"
        else:
            result.append(name)
            continue
        raise ValueError(f"{where}: row {i}: column {column!r}: expected {expected}, found {found!r}")
    return result


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
