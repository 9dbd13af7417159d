"""Where texts and rows are: files, folders, names on the hub; and reading them.

A path is a path: ``~`` is the home folder, brackets are no patterns, and hidden files and folders are passed over.
"""

from __future__ import annotations

import glob
import json
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a third of a second to import
    from datasets import Dataset

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}  # ending -> reader of datasets
TEXT_ENDINGS = (".txt", *READERS)
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
#: Endings of files, which no name on the hub has.
_FILES = {
    *TEXT_ENDINGS,
    *(
        ".text",
        ".md",
        ".tsv",
        ".gz",
        ".xz",
        ".bz2",
        ".zst",
        ".zip",
        ".tar",
        ".arrow",
        ".html",
        ".xml",
        ".yaml",
        ".yml",
        ".pdf",
    ),
}
_SPLITS = re.compile(r"(train|training|val|valid|validation|dev|test|testing)([-_.].*)?", re.IGNORECASE)
PIECE = 2**14  # characters of a text file that are read at a time


def is_hub_name(name: str | Path) -> bool:
    """Whether this can be a name on the hub, ``owner/name`` or ``owner/name:configuration``, and no file's."""
    name = str(name).partition(":")[0]
    return bool(HUB_NAME.fullmatch(name)) and Path(name).suffix.lower() not in _FILES


def ending(path: Path) -> str:
    """A file's ending in small letters, such as ``.txt``."""
    return path.suffix.lower()


def visible_files(folder: Path) -> list[Path]:
    """The files in a folder and below it, sorted; without hidden ones and those of hidden folders."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(found)


def some_of(paths: Sequence[Path], folder: Path) -> str:
    """Three of the paths for a message, as places in ``folder``."""
    return ", ".join(path.relative_to(folder).as_posix() for path in paths[:3])


# --- files of texts --------------------------------------------------------------------------------------------------


def has_splits(folder: Path) -> bool:
    """Whether a folder of texts has, or should have, a training split: one of its files or folders is named as a split, or it
    has no files of texts at all."""
    files = [path.relative_to(folder).with_suffix("") for path in _all_texts(folder)]
    return not files or any(_SPLITS.fullmatch(part) for path in files for part in path.parts)


def find_split(folder: Path, split: str, endings: Iterable[str] = tuple(READERS)) -> Path:
    """The file of a split.

    Raises:
        FileNotFoundError, ValueError: the file is missing or empty.
    """
    for path in (folder / f"{split}{ending}" for ending in endings):
        if path.exists():
            if not path.stat().st_size:
                raise ValueError(f"{path}: expected at least one row, found an empty file")
            return path
    found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
    raise FileNotFoundError(
        f"text_dir: expected {folder / split} with one of the endings {', '.join(endings)}, found in {folder}: {found}"
    )


def text_files(path: Path) -> dict[str, list[Path]]:
    """The files of a corpus by split: ``train`` and, where there is one, ``validation``.

    A folder has ``<split>.txt``, ``.jsonl``, ``.json``, ``.parquet`` or ``.csv``, or such files in ``<split>/``. A file, or a
    folder without splits (:func:`has_splits`), is all ``train``. A warning counts the files that are left out.

    Raises:
        FileNotFoundError, ValueError: the training split is missing or empty.
    """
    if path.is_file():
        if ending(path) not in TEXT_ENDINGS:
            raise ValueError(f"{path}: expected one of the endings {', '.join(TEXT_ENDINGS)}, found {path.suffix!r}")
        return {"train": [path]}
    if not has_splits(path):
        splits = {"train": _all_texts(path)}
        _say_left_out(path, splits["train"])
        return splits
    splits = {}
    for split in ("train", "validation"):
        try:
            splits[split] = _all_texts(path / split) or [find_split(path, split, (*READERS, ".txt"))]
        except FileNotFoundError:
            if split == "train":
                raise
    _say_left_out(path, {file for files in splits.values() for file in files})
    return splits


def _all_texts(folder: Path) -> list[Path]:
    return [path for path in visible_files(folder) if ending(path) in TEXT_ENDINGS]


def _say_left_out(folder: Path, taken: Collection[Path]) -> None:
    """Warn of files that are not taken, but for those of a test split."""
    files = visible_files(folder)
    left = [path for path in files if path not in taken and not path.relative_to(folder).parts[0].startswith("test")]
    if left:
        warnings.warn(
            f"{folder}: takes {len(taken):,} of {len(files):,} files, and leaves out {some_of(left, folder)}"
            f"{' and others' if len(left) > 3 else ''}",
            stacklevel=2,
        )


def texts_in(files: Iterable[Path]) -> Iterator[str | Iterator[str]]:
    """The texts of files, read as they are asked for: a ``.txt`` file is one, in pieces of about :data:`PIECE` characters;
    of other files each row's column ``text`` is one.

    Raises:
        ValueError: a file can't be read, or has no column ``text`` or something else in it. It names the file and the row.
    """
    for path in files:
        if ending(path) == ".txt":
            yield _pieces(path)
        else:
            yield from texts_of(_values(path), str(path))


def texts_of(values: Iterable, where: str) -> Iterator[str]:
    """The texts of a column. Rows without one (null) are left out, and a warning counts them.

    Raises:
        ValueError: something else than text; it names the row of ``where``.
    """
    missing, row = [], -1
    for row, value in enumerate(values):
        if isinstance(value, str):
            yield value
        elif value is None:
            missing.append(row)
        else:
            raise ValueError(f"{where}: row {row}: column 'text': expected text, found {value!r}")
    if missing:
        warnings.warn(
            f"{where}: {len(missing):,} of {row + 1:,} rows are left out, whose column 'text' is null, such as row {missing[0]}",
            stacklevel=2,
        )


def _pieces(path: Path) -> Iterator[str]:
    """A text file, cut at ends of lines where it is longer than :data:`PIECE`."""
    with path.open(encoding="utf-8-sig") as file:
        held = file.read(PIECE)
        while more := file.read(PIECE):
            # Between two lines of text: a tokenizer may join several line breaks into one token.
            ends = [m.end() for m in re.finditer(r"(?<=\S)\n(?=\S)", held)] or [
                m.end() for m in re.finditer(r"\s(?=\S)", held)
            ]
            end = ends[-1] if ends else len(held)
            yield held[:end]
            held = held[end:] + more
        yield held


def _values(path: Path) -> Iterator:
    """The values of a file's column ``text``, row by row."""
    read = {".parquet": _parquet_values, ".csv": _csv_values}.get(ending(path), _json_values)
    with _named(path):
        yield from read(path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the file's name to an error of reading it."""
    try:
        yield
    except (OSError, ValueError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: could not be read: {text}") from error


def _parquet_values(path: Path) -> Iterator:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        _check_text_column(file.schema_arrow.names, path)
        for batch in file.iter_batches(columns=["text"]):
            yield from batch.column(0).to_pylist()


def _csv_values(path: Path) -> Iterator:
    with _opened_csv(path, ["text"], chunksize=10_000) as chunks:
        for chunk in chunks:
            _check_csv(chunk, path)
            _check_text_column(list(chunk.columns), path)
            yield from (value if isinstance(value, str) else None for value in chunk["text"])


def _json_values(path: Path) -> Iterator:
    for row, value in enumerate(_json_rows(path)):
        if not isinstance(value, dict):
            raise ValueError(f"{path}: row {row}: expected an object with 'text', found {value!r}")
        if not row:
            _check_text_column(list(value), path)
        yield value.get("text")


def _json_rows(path: Path) -> Iterator:
    """The objects of JSON lines, or of a list of objects or of texts."""
    with path.open(encoding="utf-8-sig") as file:
        listed = file.read(1) == "["
        file.seek(0)
        if listed:
            yield from ({"text": row} if isinstance(row, str) else row for row in json.load(file))
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number} is no JSON: {error}") from error


def _check_text_column(columns: list[str], path: Path) -> None:
    if "text" not in columns:
        raise ValueError(f"{path}: expected a column 'text', found {columns}")


# --- rows ------------------------------------------------------------------------------------------------------------


def read_file(path: Path, texts: Sequence[str] = ()) -> Dataset:
    """The rows of a JSON, JSON lines, Parquet or CSV file; ValueError names it where it is none.

    In CSV the columns ``texts`` hold texts, whatever is in them (``NA`` and ``12`` are texts), and only an empty cell is none.
    """
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetGenerationError

    if ending(path) not in READERS:
        raise ValueError(f"{path}: expected one of the endings {', '.join(READERS)}, found {path.suffix!r}")
    if ending(path) == ".csv":
        with _named(path):
            frame = _opened_csv(path, texts)
            _check_csv(frame, path)
            return Dataset.from_pandas(frame, preserve_index=False)
    pattern = glob.escape(str(path.absolute()))  # else brackets would stand for other files
    try:
        return load_dataset(READERS[ending(path)], data_files=pattern, split="train", keep_in_memory=True)
    except DatasetGenerationError as error:
        raise ValueError(f"{path}: could not be read: {error.__cause__ or error}") from error


def _opened_csv(path: Path, texts: Sequence[str], chunksize: int | None = None):
    """A CSV file as pandas' table, or as an iterator over tables of ``chunksize`` rows."""
    import pandas as pd

    options = {"keep_default_na": False, "na_values": [""], "low_memory": False, "chunksize": chunksize}
    return pd.read_csv(path, dtype=dict.fromkeys(texts, str), **options)


def _check_csv(frame, path: Path) -> None:
    """pandas takes the first cells for names of the rows if there are more cells than names of columns."""
    import pandas as pd

    if not isinstance(frame.index, pd.RangeIndex):
        raise ValueError(f"{path}: expected {len(frame.columns)} cells a row, as in the first line, found more")


def read_split(folder: Path, split: str, optional: bool = False, texts: Sequence[str] = ()) -> Dataset | None:
    """The rows of ``folder/<split>.*``, see :func:`read_file`; None if there is no such file and it is optional."""
    try:
        return read_file(find_split(folder, split), texts)
    except FileNotFoundError:
        if optional:
            return None
        raise


def read_hub(name: str, configuration: str | None, split: str, optional: bool = False) -> Dataset | None:
    """The rows of a split of a data set on the Hugging Face hub; None if it has no such split and that is optional."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(name, configuration, split=split)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise ConnectionError(
            f"data: could not open {name!r} on the Hugging Face hub ({error}). Offline, use data='local' with text_dir="
            "<a folder with <task>/<split>.jsonl or .parquet>"
        ) from error
    except ValueError as error:
        if optional and "Unknown split" in str(error):
            return None
        raise ValueError(f"{name} on the Hugging Face hub: {error}") from error
