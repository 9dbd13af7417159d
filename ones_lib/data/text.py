"""Text: a corpus to pre-train on and tasks to fine-tune on, from installed packages, local files or the hub.

:func:`text_corpus` opens a corpus and its tokenizer; :func:`text_tasks` opens tasks for that tokenizer.
:data:`ones_lib.data.rows.TASKS` lists the tasks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ones_lib.data import docstrings, names, tokens
from ones_lib.data.files import made_once, save_tensors
from ones_lib.data.rows import (
    EMBEDDED_TASKS,
    HUB_TASKS,
    TextTask,
    place_of,
    task_rows,
    task_spec,
)
from ones_lib.data.sources import has_splits, is_hub_name, read_hub, text_files, texts_in, texts_of
from ones_lib.data.tokens import EncodedText

if TYPE_CHECKING:  # a third of a second to import
    from datasets import Dataset

EMBEDDED = {"names": (names, names.write_names), "docstrings": (docstrings, docstrings.write_docstrings)}


def embedded_versions(*sources: str) -> dict[str, str] | None:
    """Versions of the packages that embedded text comes from; None if none of the sources is embedded."""
    found = [EMBEDDED[source][0].versions() for source in sources if source in EMBEDDED]
    return {name: version for versions in found for name, version in versions.items()} or None


@dataclass
class Corpus:
    """Packed token ids for pre-training and their tokenizer, made by :func:`text_corpus`.

    Args:
        name: what the corpus was made from.
        train, validation: token ids [n, L], int32.
        mask_rate: fraction of the tokens that masked-language pre-training selects.
        report: numbers of texts and tokens, for people to read.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    train: Tensor
    validation: Tensor
    mask_rate: float
    report: str

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    @cached_property
    def special_ids(self) -> Tensor:
        return torch.tensor(self.tokenizer.all_special_ids)


def text_corpus(
    name: str = "names",
    *,
    tokenizer: str = "",
    vocab_size: int = 1500,
    sequence_length: int = 32,
    mask_rate: float = 0.15,
    validation_sequences: int = 800,
    max_corpus: int | None = None,
    versions: Mapping[str, str] | None = None,
    of_tasks: Mapping | None = None,
    cache_dir: str | Path = "runs/cache",
) -> Corpus:
    """Read the texts of a corpus, open or train its tokenizer, and pack its tokens; tokenizer and tokens are cached.

    Args:
        name: ``"names"`` or ``"docstrings"`` (made from installed packages), ``"tasks"`` (texts of ``of_tasks``), a file or
            folder as :func:`ones_lib.data.sources.text_files` finds them, or a hub name (``owner/name`` or
            ``owner/name:configuration``) of a data set with a column ``text``. Without a validation split, every tenth text is
            held out.
        tokenizer: a hub name or folder; empty: WordPiece, trained on the corpus, with ``vocab_size`` entries.
        sequence_length: tokens of a pre-training sequence.
        mask_rate: fraction of the tokens that masked-language pre-training selects.
        validation_sequences: number of validation sequences kept, evenly spaced.
        max_corpus: use only the first so many texts of each split; None: all.
        versions: versions of the packages that embedded text is made from; an error if others are installed.
        of_tasks: ``name``, ``text_dir``, ``max_train`` and ``own`` as for :func:`text_tasks`, and ``tasks``, a list of names.
        cache_dir: where embedded text and tokens are kept.

    Raises:
        FileNotFoundError, ValueError: a file, column, label or option is missing or wrong.
        ConnectionError: the hub cannot be reached.
    """
    _check_sizes(vocab_size=vocab_size, sequence_length=sequence_length, max_corpus=max_corpus)
    if not 0 < mask_rate < 1:
        raise ValueError(f"mask_rate: expected a number between 0 and 1, found {mask_rate}")
    _check_versions(versions, name, (of_tasks or {}).get("name"))
    texts = _task_texts(of_tasks or {}, cache_dir) if name == "tasks" else _corpus_texts(name, cache_dir)
    texts = {split: list(islice(part.whole(), max_corpus)) for split, part in _with_validation(texts).items()}
    if not texts["train"]:
        raise ValueError(
            f"corpus {name}: expected two texts at least, of which every tenth is held out, or a validation split"
        )
    folder = _tokenized(texts, tokenizer, vocab_size, sequence_length, Path(cache_dir))
    packed = load_file(folder / "tokens.safetensors")
    train, validation = packed["train"], packed["validation"]
    report = f"{name}: {len(texts['train']):,} texts, {train.numel():,} tokens for training, {validation.numel():,} for validation"
    validation = validation[:: max(1, len(validation) // validation_sequences)][:validation_sequences]
    return Corpus(name, tokens.open_tokenizer(str(folder)), train, validation, mask_rate, report)


@dataclass
class TextTasks:
    """Tasks to fine-tune on, made by :func:`text_tasks`. A task is read, checked and encoded when first asked for.

    Rows with an answer that no window holds whole have no target. Training leaves them out; evaluation counts them as any other.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    task_length: int
    stride: int
    folder: Path | None  # None: the hub
    max_train: int | None
    max_validation: int | None
    own: Mapping[str, Mapping] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rows, self._encoded = {}, {}

    def spec(self, task: str) -> TextTask:
        """A task's columns, classes and metric."""
        allowed = [*(EMBEDDED_TASKS if self.name == "names" else HUB_TASKS), *self.own]
        if task not in allowed:
            raise ValueError(f"tasks: expected some of {allowed} for data {self.name!r}, found {task!r}")
        return task_spec(task, self.own)

    def rows(self, task: str) -> dict[str, Dataset]:
        """A task's rows by split."""
        if task not in self._rows:
            self._rows[task] = task_rows(task, self.spec(task), self.folder, self.max_train, self.max_validation)
        return self._rows[task]

    def report(self, task: str) -> str:
        """Numbers of rows and, of a classification, classes, for people to read."""
        counts = ", ".join(f"{len(rows):,} rows in {split}" for split, rows in self.rows(task).items())
        labels = self.spec(task).labels
        return counts if labels is None else f"{len(labels)} classes, {counts}"

    def encoded(self, task: str, split: str) -> EncodedText:
        """A split of a task as tokens."""
        if (task, split) not in self._encoded:
            rows, spec = self.rows(task)[split], self.spec(task)
            if spec.labels is None:
                where = place_of(task, self.folder, split)
                encoded = tokens.encode_questions(rows, self.tokenizer, self.task_length, self.stride, where)
                if split == "train":  # as they are they would teach that there is no answer
                    encoded = encoded.without(encoded.lost)
                    if not len(encoded):
                        raise ValueError(
                            f"{where}: task_length={self.task_length}: no window holds a whole answer; expected more tokens"
                        )
            else:
                encoded = tokens.encode_classification(rows, spec.texts, self.tokenizer, self.task_length)
            self._encoded[task, split] = encoded
        return self._encoded[task, split]

    def count_lost(self, task: str) -> dict[str, int]:
        """Number of rows of each split with an answer that no window holds whole; a longer ``task_length`` makes them fewer."""
        return {split: len(self.encoded(task, split).lost) for split in self.rows(task)}


def text_tasks(
    name: str = "names",
    *,
    tokenizer: PreTrainedTokenizerBase,
    text_dir: str | Path = "",
    task_length: int = 96,
    stride: int = 24,
    max_train: int | None = None,
    max_validation: int | None = None,
    own: Mapping[str, Mapping] | None = None,
    versions: Mapping[str, str] | None = None,
    cache_dir: str | Path = "runs/cache",
) -> TextTasks:
    """Open tasks, to be encoded by ``tokenizer``.

    Args:
        name: ``"names"`` (made from an installed package), ``"local"`` (``text_dir/<task>/<split>.jsonl``, ``.parquet``
            or ``.csv`` with the hub's columns, or as ``own`` says) or ``"hub"``.
        text_dir: the folder, for ``"local"``.
        task_length: the most tokens of an example; a longer context is cut into windows that overlap by ``stride``.
        max_train, max_validation: use only the first so many rows of a split; None: all.
        own: tasks beside the known ones, for ``"local"``: by name what :func:`ones_lib.data.rows.own_task` gives.
        versions, cache_dir: see :func:`text_corpus`.

    Raises:
        ValueError: an option is wrong. Missing or wrong files and rows raise when their task is first read.
    """
    _check_sizes(task_length=task_length, max_train=max_train, max_validation=max_validation)
    if not 0 <= stride < task_length // 2:
        raise ValueError(
            f"stride: expected an integer from 0 to below task_length / 2 = {task_length // 2}, found {stride}"
        )
    if name not in ("names", "local", "hub"):
        raise ValueError(f"data: expected 'names', 'local' or 'hub', found {name!r}")
    if own and name != "local":
        raise ValueError(f"data: expected 'local' for the tasks {list(own)}, found {name!r}")
    _check_versions(versions, name)
    folder = (
        _embedded_folder(name, cache_dir)
        if name == "names"
        else Path(text_dir).expanduser()
        if name == "local"
        else None
    )
    return TextTasks(name, tokenizer, task_length, stride, folder, max_train, max_validation, dict(own or {}))


@dataclass(frozen=True)
class Texts:
    """Texts that are read as they are asked for, each a string or, of a ``.txt`` file, its pieces.

    ``size`` is that of their files in bytes: about as many characters.
    """

    size: int
    read: Callable[[], Iterable[str | Iterable[str]]]

    def __iter__(self) -> Iterator[str | Iterable[str]]:
        return iter(self.read())

    def whole(self) -> Iterator[str]:
        """The texts, each as one string."""
        return (text if isinstance(text, str) else "".join(text) for text in self)


def read_texts(corpus: str | Path, split: str, cache_dir: str | Path = "runs/cache") -> Texts:
    """Texts of a split of embedded text, a folder or a hub data set; of a file, or a folder without splits, all texts."""
    splits = _corpus_texts(str(corpus), cache_dir)
    return splits["train"] if is_whole(corpus) else _with_validation(splits)[split]


def is_whole(corpus: str | Path) -> bool:
    """Whether a text has no splits: a file, or a folder that :func:`ones_lib.data.sources.has_splits` says has none."""
    path = Path(corpus).expanduser()
    return str(corpus) not in EMBEDDED and (path.is_file() or (path.is_dir() and not has_splits(path)))


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_sizes(**sizes: int | None) -> None:
    for option, value in sizes.items():
        if value is not None and value < 8:
            raise ValueError(f"{option}: expected an integer of at least 8, found {value}")


def _check_versions(versions: Mapping[str, str] | None, *sources: str | None) -> None:
    installed = embedded_versions(*sources)
    if versions is not None and dict(versions) != installed:
        raise ValueError(f"versions: expected those installed, {installed}, found {dict(versions)}")


# --- reading ---------------------------------------------------------------------------------------------------------


def _task_texts(of_tasks: Mapping, cache_dir: str | Path) -> dict[str, Texts]:
    """The texts of the tasks' training splits, each once: a context is repeated for every question."""
    if not of_tasks.get("tasks"):
        raise ValueError("tasks: expected at least one for a corpus of 'tasks', found none")
    options = {option: value for option, value in of_tasks.items() if option != "tasks"}
    tasks = text_tasks(**options, tokenizer=None, cache_dir=cache_dir)
    train = {task: tasks.rows(task)["train"] for task in of_tasks["tasks"]}
    texts = [text for task, rows in train.items() for column in tasks.spec(task).texts for text in rows[column]]
    texts = list(dict.fromkeys(texts))
    return {"train": Texts(sum(map(len, texts)), lambda: texts)}


def _corpus_texts(corpus: str, cache_dir: str | Path) -> dict[str, Texts]:
    """Texts of a corpus by split, ``train`` and, where there is one, ``validation``."""
    path = Path(corpus).expanduser()
    if corpus in EMBEDDED:
        path = _embedded_folder(corpus, cache_dir) / "corpus"
    elif not path.exists() and is_hub_name(corpus):
        return _hub_texts(corpus)
    elif not path.exists():
        raise FileNotFoundError(
            f"corpus: expected 'names', 'docstrings', 'tasks', a file, a folder or a hub name like owner/name, found no such file"
            f" or folder, {corpus!r}"
        )
    splits = text_files(path)
    return {s: Texts(sum(f.stat().st_size for f in files), partial(texts_in, files)) for s, files in splits.items()}


def _hub_texts(corpus: str) -> dict[str, Texts]:
    name, _, configuration = corpus.partition(":")
    splits = {}
    for split in ("train", "validation"):
        rows = read_hub(name, configuration or None, split, optional=split == "validation")
        if rows is not None:
            if "text" not in rows.column_names:
                raise ValueError(f"corpus {corpus}: expected a column 'text', found {rows.column_names}")
            splits[split] = Texts(rows.data.nbytes, partial(texts_of, rows["text"], f"{corpus}, split {split}"))
    return splits


def _with_validation(splits: Mapping[str, Texts]) -> Mapping[str, Texts]:
    """The splits; where ``validation`` is missing, every tenth training text is of it."""
    if "validation" in splits:
        return splits
    train = splits["train"]

    def part(held_out: bool) -> Iterator:
        return (text for i, text in enumerate(train) if (i % 10 == 0) == held_out)

    return {
        "train": Texts(train.size, partial(part, False)),
        "validation": Texts(train.size // 10, partial(part, True)),
    }


# --- caches ----------------------------------------------------------------------------------------------------------


def _embedded_folder(name: str, cache_dir: str | Path) -> Path:
    """The folder with an embedded text as JSON lines, made if missing. Its name changes with their code and versions."""
    module, write = EMBEDDED[name]
    digest = hashlib.sha256(Path(module.__file__).read_bytes())
    digest.update(json.dumps(module.versions(), sort_keys=True).encode())
    return made_once(Path(cache_dir) / f"{name}-{digest.hexdigest()[:16]}", write)


def _tokenized(texts: Mapping[str, list[str]], tokenizer: str, vocab_size: int, length: int, cache_dir: Path) -> Path:
    """The folder with tokenizer and packed token ids, made if missing. Its name changes with texts, options and code."""
    digest = hashlib.sha256(json.dumps([tokenizer, vocab_size, length]).encode() + Path(tokens.__file__).read_bytes())
    for split in texts.values():
        for text in split:
            digest.update(text.encode())

    def make(folder: Path) -> None:
        made = tokens.open_tokenizer(tokenizer) if tokenizer else tokens.train_tokenizer(texts["train"], vocab_size)
        made.save_pretrained(folder)
        packed = {split: tokens.pack(part, made, length) for split, part in texts.items()}
        save_tensors(folder / "tokens.safetensors", packed)

    return made_once(cache_dir / f"tokens-{digest.hexdigest()[:16]}", make)
