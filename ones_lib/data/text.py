"""Text data: a corpus for masked-language pre-training and tasks to fine-tune on, embedded, in local files, or on the hub.

Whatever the source, a task's rows have the columns of the hub's data set of its kind; :data:`TASKS` lists them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ones_lib.data import docstrings
from ones_lib.data.files import save_tensors

if TYPE_CHECKING:  # a third of a second to import, which all that starts would pay
    from datasets import Dataset

ANSWER_COLUMNS = ("id", "context", "question", "answers")


@dataclass(frozen=True)
class TextTask:
    """What a task's rows look like, and where they are.

    Args:
        texts: columns with the text, one or two; for question answering question and context.
        labels: names of the classes, in the order of their numbers; None for question answering.
        metric: the one that goes into the average over tasks.
        hub: name and configuration of the hub's data set, or None for an embedded task.
        validation: splits to measure on; the metrics of the second are named after it.
        unanswerable: whether a question may have no answer.
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


_QUESTION = ("question", "context")
TASKS = {
    "package": TextTask(("sentence",), tuple(docstrings.PACKAGES), "accuracy"),
    "statement": TextTask(("premise", "hypothesis"), docstrings.STATEMENT_CLASSES, "accuracy"),
    "answer": TextTask(_QUESTION, None, "f1"),
    "answer_or_none": TextTask(_QUESTION, None, "f1", unanswerable=True),
    "sst2": TextTask(("sentence",), ("negative", "positive"), "accuracy", ("nyu-mll/glue", "sst2")),
    "mnli": TextTask(
        ("premise", "hypothesis"),
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


@dataclass(frozen=True)
class EncodedText:
    """Token ids [n, L], padded, with their lengths [n] and token types [n, L]; targets [n] (classes) or [n, 2] (the answer's
    first and last token, 0 and 0 where this window holds none).

    For question answering one row is one window of a context: ``example`` [n] is its question, and ``offsets`` [n, L, 2]
    where each token stands in the context, -1 for tokens of the question.
    """

    ids: Tensor
    types: Tensor
    lengths: Tensor
    targets: Tensor
    example: Tensor
    offsets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class TextData:
    """A corpus, its tokenizer, and tasks, opened by :func:`text_data`. ``report`` says what was found.

    ``corpus`` holds packed token ids [n, L], int32, by split. Tasks are read, checked and encoded when first asked for.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    corpus: Mapping[str, Tensor]
    task_length: int
    stride: int
    mask_rate: float
    report: str
    read_task: Callable[[str], dict[str, Dataset]]

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    @cached_property
    def special_ids(self) -> Tensor:
        return torch.tensor(self.tokenizer.all_special_ids)

    @cached_property
    def _encoded(self) -> dict[tuple[str, str], EncodedText]:
        return {}

    def rows(self, task: str) -> dict[str, Dataset]:
        """A task's rows by split."""
        return self.read_task(task)

    def encoded(self, task: str, split: str) -> EncodedText:
        """A task's split as tokens."""
        if (task, split) not in self._encoded:
            encode = encode_classification if TASKS[task].labels is not None else encode_questions
            rows = self.rows(task)[split]
            self._encoded[task, split] = encode(rows, TASKS[task], self.tokenizer, self.task_length, self.stride)
        return self._encoded[task, split]


def text_data(
    name: str = "docstrings",
    *,
    text_dir: str | Path = "",
    cache_dir: str | Path = "runs/cache",
    tasks: Sequence[str] = (),
    corpus: str = "docstrings",
    tokenizer: str = "",
    vocab_size: int = 1500,
    sequence_length: int = 32,
    task_length: int = 96,
    stride: int = 24,
    mask_rate: float = 0.15,
    validation_sequences: int = 800,
    max_corpus: int | None = None,
    max_train: int | None = None,
    max_validation: int | None = None,
    versions: Mapping[str, str] | None = None,
) -> TextData:
    """Open a corpus and tasks.

    Args:
        name: ``"docstrings"`` (made from installed packages, tasks :data:`EMBEDDED_TASKS`), ``"local"``
            (``text_dir/<task>/<split>.jsonl``, ``.parquet`` or ``.csv`` with the hub's columns) or ``"hub"``.
        text_dir: the folder, for ``"local"``.
        cache_dir: where embedded text and token ids are kept.
        tasks: names in :data:`TASKS`, needed only for a corpus of ``"tasks"``.
        corpus: what to pre-train on: ``"docstrings"``, ``"tasks"`` (the texts of the tasks' training splits), a file or folder
            of such files with a column ``text``, or a hub name (``name`` or ``name:configuration``).
        tokenizer: a hub name or folder; empty: WordPiece, trained on the corpus, with ``vocab_size`` entries.
        sequence_length: tokens of a pre-training sequence.
        task_length: the most tokens of a task's example; a longer context is cut into windows that overlap by ``stride``.
        mask_rate: part of the tokens that masked-language pre-training chooses.
        validation_sequences: how many of them, evenly spaced, the masked-language loss is measured on.
        max_corpus, max_train, max_validation: use only the first so many texts, or rows of a split; None: all.
        versions: those of the packages that embedded text was made from, to be refused if others are installed.

    Raises:
        FileNotFoundError, ValueError: a file, column or label is missing or wrong; named, with what was expected.
        ConnectionError: the hub cannot be reached, with what to do.
    """
    sizes = {"vocab_size": vocab_size, "sequence_length": sequence_length, "task_length": task_length}
    sizes |= {"max_corpus": max_corpus, "max_train": max_train, "max_validation": max_validation}
    for option, value in sizes.items():
        if value is not None and value < 8:
            raise ValueError(f"{option}: expected an integer of at least 8, found {value}")
    if not 0 < mask_rate < 1:
        raise ValueError(f"mask_rate: expected a number between 0 and 1, found {mask_rate}")
    if not 0 <= stride < task_length // 2:
        raise ValueError(
            f"stride: expected an integer from 0 to below task_length / 2 = {task_length // 2}, found {stride}"
        )
    if name not in ("docstrings", "local", "hub"):
        raise ValueError(f"data: expected 'docstrings', 'local' or 'hub', found {name!r}")
    if versions is not None and dict(versions) != docstrings.versions():
        raise ValueError(f"versions: expected those installed, {docstrings.versions()}, found {dict(versions)}")
    embedded = _embedded_folder(Path(cache_dir)) if "docstrings" in (name, corpus) else None
    folder = embedded if name == "docstrings" else Path(text_dir) if name == "local" else None

    @cache  # a corpus of the tasks' texts reads them before anybody asks for their rows
    def read_task(task: str) -> dict[str, Dataset]:
        allowed = EMBEDDED_TASKS if name == "docstrings" else HUB_TASKS
        if task not in allowed:
            raise ValueError(f"tasks: expected some of {list(allowed)} for data {name!r}, found {task!r}")
        return _task_rows(task, folder, max_train, max_validation)

    texts = _corpus_texts(corpus, embedded, {task: read_task(task) for task in tasks}, max_corpus)
    folder_of_tokens, report = _tokenized(texts, tokenizer, vocab_size, sequence_length, Path(cache_dir))
    packed = load_file(folder_of_tokens / "tokens.safetensors")
    packed["validation"] = packed["validation"][:: max(1, len(packed["validation"]) // validation_sequences)]
    return TextData(
        name,
        AutoTokenizer.from_pretrained(folder_of_tokens, trust_remote_code=False),
        {"train": packed["train"], "validation": packed["validation"][:validation_sequences]},
        task_length,
        stride,
        mask_rate,
        f"{corpus}: {report}",
        read_task,
    )


# --- rows ------------------------------------------------------------------------------------------------------------


def _embedded_folder(cache_dir: Path) -> Path:
    """The folder that holds the docstrings as JSON lines, made if it is not there."""
    digest = hashlib.sha256(Path(docstrings.__file__).read_bytes())
    digest.update(json.dumps(docstrings.versions(), sort_keys=True).encode())
    return _made_once(cache_dir / f"docstrings-{digest.hexdigest()[:16]}", docstrings.write_docstrings)


def _made_once(folder: Path, make) -> Path:
    """``folder``, filled by ``make`` if it is not there; it appears only when whole."""
    if folder.exists():
        return folder
    locks = folder.parent / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{folder.name}.lock"):  # another process may be at it, and is waited for
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
            partial.mkdir()
            try:
                make(partial)
                os.replace(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def _task_rows(task: str, folder: Path | None, max_train: int | None, max_validation: int | None) -> dict[str, Dataset]:
    """Checked rows of a task's splits. Only the first of the validation splits must be there."""
    spec, result = TASKS[task], {}
    for split in ("train", *spec.validation):
        where = f"{task}, split {split}" if folder is None else f"{folder / task}, split {split}"
        if folder is None:
            rows = _from_hub(*spec.hub, split)
        else:
            rows = _from_files(folder / task, split, optional=split in spec.validation[1:])
        if rows is None:
            continue
        most = max_train if split == "train" else max_validation
        rows = rows if most is None else rows.select(range(min(most, len(rows))))
        _check_rows(rows, spec, where)
        result[split] = rows
    return result


_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def find_split(folder: Path, split: str) -> Path:
    """The file of a task's split.

    Raises:
        FileNotFoundError, ValueError: there is none, or an empty one.
    """
    for path in (folder / f"{split}{ending}" for ending in _READERS):
        if path.exists():
            if not path.stat().st_size:
                raise ValueError(f"{path}: expected at least one row, found an empty file")
            return path
    found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
    raise FileNotFoundError(
        f"text_dir: expected {folder / split} with one of the endings {', '.join(_READERS)}, found in {folder}: {found}"
    )


def _from_files(folder: Path, split: str, optional: bool = False) -> Dataset | None:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        path = find_split(folder, split)
    except FileNotFoundError:
        if optional:
            return None
        raise
    try:
        return load_dataset(_READERS[path.suffix], data_files=str(path), split="train", keep_in_memory=True)
    except DatasetGenerationError as error:
        raise ValueError(f"{path}: could not be read: {error.__cause__ or error}") from error


def _from_hub(name: str, configuration: str | None, split: str) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(name, configuration, split=split)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise ConnectionError(
            f"data: could not open {name!r} on the Hugging Face hub ({error}). Offline, use data='local' with text_dir="
            "<a folder with <task>/<split>.jsonl or .parquet>"
        ) from error


def _check_rows(rows: Dataset, spec: TextTask, where: str) -> None:
    """Raise ValueError for a missing column, a label out of range, or an answer that does not stand where it should."""
    missing = [c for c in spec.columns if c not in rows.column_names]
    if missing:
        raise ValueError(
            f"{where}: expected columns {list(spec.columns)}, found {rows.column_names}; missing: {missing}"
        )
    if not len(rows):
        raise ValueError(f"{where}: expected at least one row, found none")
    for column in (c for c in spec.texts if c in rows.column_names):
        if (bad := next((i for i, v in enumerate(rows[column]) if not isinstance(v, str)), None)) is not None:
            raise ValueError(f"{where}: row {bad}: column {column!r}: expected text, found {rows[bad][column]!r}")
    if spec.labels is not None:
        numbers = range(len(spec.labels))
        bad = next((i for i, v in enumerate(rows["label"]) if v not in numbers or isinstance(v, bool)), None)
        if bad is not None:
            meaning = ", ".join(f"{i} {label}" for i, label in enumerate(spec.labels))
            raise ValueError(f"{where}: row {bad}: column 'label': expected {meaning}, found {rows[bad]['label']!r}")
        return
    for i, row in enumerate(rows):
        answers = row["answers"]
        if not isinstance(answers, Mapping) or not {"text", "answer_start"} <= set(answers):
            raise ValueError(f"{where}: row {i}: column 'answers': expected text and answer_start, found {answers!r}")
        if not answers["text"] and not spec.unanswerable:
            raise ValueError(f"{where}: row {i}: column 'answers': expected an answer, found none (SQuAD 2.0's form?)")
        if len(answers["text"]) != len(answers["answer_start"]):
            raise ValueError(
                f"{where}: row {i}: column 'answers': expected as many texts as answer_start, found {answers}"
            )
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            if row["context"][start : start + len(text)] != text:
                found = row["context"][start : start + len(text)]
                raise ValueError(f"{where}: row {i}: column 'answers': expected {text!r} at {start}, found {found!r}")


def _corpus_texts(
    corpus: str, embedded: Path | None, rows: Mapping[str, Mapping[str, Dataset]], most: int | None
) -> dict[str, list[str]]:
    """Texts of the corpus's splits; where it has no validation split, every tenth text is one."""
    if corpus == "tasks":
        if not rows:
            raise ValueError("tasks: expected at least one for a corpus of 'tasks', found none")
        train = [text for task, splits in rows.items() for c in TASKS[task].texts for text in splits["train"][c]]
        splits = {"train": list(dict.fromkeys(train))}  # a context stands there once for every question
    else:
        splits = {}
        for split in ("train", "validation"):
            if corpus == "docstrings":
                found = _from_files(embedded / "corpus", split)
            elif Path(corpus).is_file():
                path = Path(corpus)
                found = _from_files(path.parent, path.stem) if split == "train" else None
            elif Path(corpus).is_dir():
                found = _from_files(Path(corpus), split, optional=split == "validation")
            elif corpus.count("/") == 1:
                name, _, configuration = corpus.partition(":")
                found = _from_hub(name, configuration or None, split)
            else:
                raise FileNotFoundError(
                    f"corpus: expected 'docstrings', 'tasks', a file, a folder or a hub name, found {corpus!r}"
                )
            if found is not None:
                if "text" not in found.column_names:
                    raise ValueError(f"corpus {corpus}: expected a column 'text', found {found.column_names}")
                splits[split] = list(found["text"])
    if "validation" not in splits:
        every = splits["train"]
        splits = {"train": [t for i, t in enumerate(every) if i % 10], "validation": every[::10]}
    return {split: texts[:most] for split, texts in splits.items()}


def read_texts(corpus: str | Path, split: str, cache_dir: str | Path = "runs/cache") -> list[str]:
    """All texts of a file, a plain text file being one; of ``"docstrings"``, a folder or a name on the hub those of a split."""
    path = Path(corpus)
    if path.is_file() and path.suffix == ".txt":
        return [path.read_text(encoding="utf-8")]
    embedded = _embedded_folder(Path(cache_dir)) if corpus == "docstrings" else None
    splits = _corpus_texts(str(corpus), embedded, {}, None)
    return [text for texts in splits.values() for text in texts] if path.is_file() else splits[split]


# --- tokens ----------------------------------------------------------------------------------------------------------


def _tokenized(
    texts: Mapping[str, list[str]], tokenizer: str, vocab_size: int, length: int, cache_dir: Path
) -> tuple[Path, str]:
    """The folder with tokenizer and packed token ids, made if it is not there, and a line about it."""
    digest = hashlib.sha256(json.dumps([tokenizer, vocab_size, length]).encode() + Path(__file__).read_bytes())
    for split in texts.values():
        for text in split:
            digest.update(text.encode())

    def make(folder: Path) -> None:
        made = _open_tokenizer(tokenizer) if tokenizer else train_tokenizer(texts["train"], vocab_size)
        made.save_pretrained(folder)
        packed = {split: pack(part, made, length) for split, part in texts.items()}
        save_tensors(folder / "tokens.safetensors", packed)

    folder = _made_once(cache_dir / f"tokens-{digest.hexdigest()[:16]}", make)
    counts = {split: tensor.numel() for split, tensor in load_file(folder / "tokens.safetensors").items()}
    report = f"{len(texts['train']):,} texts, {counts['train']:,} tokens for training, {counts['validation']:,} for validation"
    return folder, report


def _open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer: could not open {name!r} as a folder or on the Hugging Face hub: {error}"
        ) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer with BERT's special tokens (arXiv 1810.04805), which splits numbers into digits: an
    answer that is a part of a number is then whole tokens."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["mask_token"] = "[MASK]"
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), digits])
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(special.values()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer numbers equally frequent tokens differently from run to run; what it splits a word into depends on their set
    # alone.
    tokens = [*special.values(), *sorted(set(tokenizer.get_vocab()) - set(special.values()))]
    tokenizer.model = models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]")
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **special
    )


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """What begins and what ends a text: [CLS] and [SEP], else the beginning and the end of text of causal models."""
    first = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
    last = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    return first, last


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """Token ids [n, length], int32: the texts one after the other, [SEP] after each, cut into pieces between [CLS] and [SEP].

    With a tokenizer that has no such tokens, as most of causal models, its end of text stands after each and its beginning
    of text, where it has one, before each piece."""
    first, end = end_tokens(tokenizer)
    before, after, between = ([] if i is None else [i] for i in (first, tokenizer.sep_token_id, end))
    parts = []
    for start in range(0, len(texts), 10_000):  # a large corpus as Python's integers would not fit into memory
        chunk = list(texts[start : start + 10_000])
        encoded = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        parts.append(torch.tensor([i for ids in encoded for i in (*ids, *between)], dtype=torch.int32))
    stream, room = torch.cat(parts), length - len(before) - len(after)
    count = len(stream) // room
    if not count:
        raise ValueError(f"corpus: expected at least {room} tokens, found {len(stream)}")
    body = stream[: count * room].view(count, room)
    before, after = (body.new_tensor(mark).expand(count, -1) for mark in (before, after))
    return torch.cat([before, body, after], dim=1)


def encode_classification(
    rows: Dataset, spec: TextTask, tokenizer: PreTrainedTokenizerBase, length: int, stride: int
) -> EncodedText:
    """One sentence or a pair a row; what is too long loses its end, the longer of a pair first."""
    encoded = tokenizer(
        *(list(rows[column]) for column in spec.texts),
        truncation=True,
        max_length=length,
        padding=True,
        return_token_type_ids=True,
        return_tensors="pt",
    )
    return EncodedText(
        encoded["input_ids"],
        encoded["token_type_ids"],
        encoded["attention_mask"].sum(dim=1),
        torch.tensor(list(rows["label"])),
        torch.arange(len(rows)),
    )


def encode_questions(
    rows: Dataset, spec: TextTask, tokenizer: PreTrainedTokenizerBase, length: int, stride: int
) -> EncodedText:
    """Windows of question and context. A window's target is the first answer, where the window holds the whole of it."""
    contexts = list(rows["context"])
    encoded = tokenizer(
        [question.strip() for question in rows["question"]],
        contexts,
        truncation="only_second",
        max_length=length,
        stride=stride,
        padding=True,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    example = torch.tensor(encoded["overflow_to_sample_mapping"])
    offsets = torch.tensor(encoded["offset_mapping"])  # [n, L, 2]
    in_context = torch.tensor(
        [[s == 1 for s in encoded.sequence_ids(i)] for i in range(len(example))], dtype=torch.bool
    )
    offsets[~in_context] = -1
    answers = list(rows["answers"])
    first = [a["answer_start"][0] if a["text"] else -1 for a in answers]
    last = [a["answer_start"][0] + len(a["text"][0]) if a["text"] else -1 for a in answers]
    start, end = torch.tensor(first)[example, None], torch.tensor(last)[example, None]
    # The tokens that hold the answer's first and last character.
    begins = in_context & (offsets[..., 0] <= start) & (start < offsets[..., 1])
    ends = in_context & (offsets[..., 0] < end) & (end <= offsets[..., 1])
    whole = begins.any(dim=1) & ends.any(dim=1)
    targets = torch.stack([begins.int().argmax(dim=1), ends.int().argmax(dim=1)], dim=1) * whole[:, None]
    ids = torch.tensor(encoded["input_ids"])
    lengths = torch.tensor(encoded["attention_mask"]).sum(dim=1)
    return EncodedText(ids, torch.tensor(encoded["token_type_ids"]), lengths, targets, example, offsets)
