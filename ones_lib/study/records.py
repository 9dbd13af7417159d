"""Records: each finished piece of work is a folder, found again by the hash of its configuration.

::

    <root>/<kind>-<what it is>-<hash>/      such as student-glyphs-average-s0-2dd34c07a1b7e0f5
        config.json          all values that decide the result, and nothing else
        weights.safetensors  the model
        predictions.safetensors   scores of the validation examples by metric, and predictions
        history.csv          the course of the training
        result.json          metrics, wall time, execution, versions, hardware, commit, checksums

What stands between kind and hash is for people; a folder without it is found too. Unfinished work lies in
``<kind>-<hash>.partial`` with its checkpoint, and is moved into place when complete. The process that works on it holds the
lock ``<root>/locks/<kind>-<hash>.lock``; the system releases it if the process is killed.

``python -m ones_lib.records`` lists records, see :mod:`ones_lib.study.listing`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor, nn

from ones_lib.data.files import checksum, load_tensors, remove_unfinished, save_tensors, write_text
from ones_lib.study.naming import record_name

FORMAT = 2  # to be raised when configurations change their form or meaning


def config_hash(config: Mapping) -> str:
    """Hash of a configuration of plain values, 16 hexadecimal digits; the order of keys does not matter."""
    text = json.dumps({"format": FORMAT, **config}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Record:
    """A finished record in ``folder``. Reading it raises FileNotFoundError or ValueError if a file is missing or damaged."""

    folder: Path

    @cached_property
    def config(self) -> dict:
        return self._json("config.json")

    @cached_property
    def result(self) -> dict:
        return self._json("result.json")

    @cached_property
    def history(self) -> pd.DataFrame:
        """One row per report, see :func:`ones_lib.study.training.fit`; empty if nothing was trained."""
        try:
            return pd.read_csv(self.folder / "history.csv")
        except pd.errors.EmptyDataError:
            return pd.DataFrame()

    @cached_property
    def predictions(self) -> dict[str, Tensor]:
        """Validation scores by metric, [n] each, and the task's other predictions."""
        return load_file(self._checked("predictions.safetensors"))

    @property
    def weights_file(self) -> Path:
        return self.folder / "weights.safetensors"

    def load_weights(self, model: nn.Module) -> nn.Module:
        load_tensors(self._checked("weights.safetensors"), model)
        return model

    def weights(self) -> dict[str, Tensor]:
        return load_file(self._checked("weights.safetensors"))

    def _json(self, name: str) -> dict:
        path = self.folder / name
        if not path.exists():
            raise FileNotFoundError(f"{path}: expected a record's {name}, found none")
        try:
            return dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: expected JSON, names with values, found something else ({error})") from error

    def _checked(self, name: str) -> Path:
        """Path of a file, if its checksum is the one in the result."""
        path, expected = self.folder / name, self.result.get("sha256", {}).get(name)
        if not path.exists():
            raise FileNotFoundError(f"{path}: expected this file of a finished record, found none; delete the record")
        if (found := checksum(path)) != expected:
            raise ValueError(
                f"{path}: expected the file as it was written, SHA-256 {expected}, found {found} of {path.stat().st_size}"
                " bytes; delete the record, and it is made again"
            )
        return path


class Records:
    """The records in ``root``. Those finished before ``redo_before`` (an ISO time with zone) count as absent."""

    def __init__(self, root: str | Path, redo_before: str = "") -> None:
        self.root = Path(root)
        try:
            self.redo_before = datetime.fromisoformat(redo_before) if redo_before else None
        except ValueError as error:
            raise ValueError(f"redo_before: expected a time such as 2026-01-31T12:00:00+00:00 ({error})") from error
        if self.redo_before is not None and self.redo_before.tzinfo is None:
            raise ValueError(f"redo_before: expected a time with its zone, such as +00:00, found {redo_before!r}")

    def folder(self, config: Mapping) -> Path:
        """The folder of a configuration's finished record, or where it will be."""
        digest = self._key(config).rpartition("-")[2]
        named = self.root / record_name(config, digest)
        # The words of a name may be others than today's, or missing: the hash decides.
        return named if named.exists() else next(self.root.glob(f"{config['kind']}-*{digest}"), named)

    def _key(self, config: Mapping) -> str:
        """The name of a configuration for work in progress."""
        if not re.fullmatch(r"\w+", config["kind"]):
            raise ValueError(f"kind: expected a word, found {config['kind']!r}")
        return f"{config['kind']}-{config_hash(config)}"

    def find(self, config: Mapping) -> Record | None:
        """The finished record of a configuration, or None."""
        record = Record(self.folder(config))
        if not (record.folder / "result.json").exists():
            return None
        if self.redo_before and datetime.fromisoformat(record.result["finished"]) < self.redo_before:
            return None
        return record

    def all(self, kind: str) -> list[Record]:
        """All finished records of a kind, such as ``moe``."""
        folders = sorted(result.parent for result in self.root.glob(f"{kind}-*/result.json"))
        # A process may be killed after it wrote the result and before it moved the folder.
        return [Record(folder) for folder in folders if folder.suffix != ".partial"]

    @contextmanager
    def lock(self, config: Mapping) -> Iterator[None]:
        """Only one process at a time works on a record; others wait."""
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{self._key(config)}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{self.folder(config).name}: another run works on it, waiting", file=sys.stderr, flush=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def table(self, config: Mapping, compute: Callable[[], pd.DataFrame] | None) -> tuple[pd.DataFrame, str]:
        """A table, such as of timings, and its record's name: found, or else computed. ``compute`` None: it must exist."""
        record = self.find(config)
        if record is None and compute is None:
            raise ValueError(f"records: expected {self.folder(config)}, found none; a run that may train makes it")
        if record is None:
            with self.lock(config):
                record = self.find(config) or self.finish(config, {}, compute(), {}, {})
        return record.history, record.folder.name

    def partial(self, config: Mapping) -> Path:
        """The folder of work in progress."""
        return self.root / f"{self._key(config)}.partial"

    def begin(self, config: Mapping) -> Path:
        """The folder of work in progress, created if needed. A checkpoint of an interrupted run stays in it, unless it is older
        than ``redo_before``."""
        partial = self.partial(config)
        partial.mkdir(parents=True, exist_ok=True)
        remove_unfinished(partial)
        checkpoint = partial / "checkpoint.safetensors"
        if self.redo_before and checkpoint.exists() and checkpoint.stat().st_mtime < self.redo_before.timestamp():
            checkpoint.unlink()
        write_text(partial / "config.json", json.dumps(config, indent=1, sort_keys=True))
        return partial

    def finish(
        self,
        config: Mapping,
        weights: Mapping[str, Tensor],
        history: pd.DataFrame,
        predictions: Mapping[str, Tensor],
        result: Mapping,
    ) -> Record:
        """Write the record's files, with provenance, into the folder of work in progress, and move it into place."""
        partial, final = self.begin(config), self.folder(config)
        tensors = {"weights.safetensors": weights, "predictions.safetensors": predictions}
        for name, content in tensors.items():
            save_tensors(partial / name, content)
        write_text(partial / "history.csv", history.to_csv(index=False))
        finished = {"sha256": {name: checksum(partial / name) for name in tensors}, **provenance()}
        finished["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        write_text(partial / "result.json", json.dumps({**result, **finished}, indent=1))
        (partial / "checkpoint.safetensors").unlink(missing_ok=True)
        if final.exists():  # older than redo_before
            shutil.rmtree(final)
        os.replace(partial, final)
        return Record(final)


def project_root() -> Path:
    """The closest folder with ``run_all.sh``, from the working directory upwards or else from this library; if there is none,
    the working directory."""
    here = Path.cwd()
    folders = (here, *here.parents, *Path(__file__).parents)
    return next((folder for folder in folders if (folder / "run_all.sh").exists()), here)


PACKAGES = (
    *("torch", "torchvision", "timm", "transformers", "tokenizers", "datasets", "accelerate", "safetensors"),
    *("numpy", "scipy", "scikit-learn", "pandas", "matplotlib"),
)


def provenance() -> dict:
    """Versions, hardware and commit, for the record."""
    return {
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "code": code_state(),
    }


@cache
def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on; each is read from a file, so once a process."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


@cache
def processor() -> str:
    """The CPU's name where Linux gives it, else its architecture."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    return name[1] if name else platform.processor() or platform.machine()


@cache
def code_state() -> str:
    """The commit of this library's repository, with ``-dirty`` if files were changed; ``unknown`` outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


TIMES = ("finished", "wall_seconds", "gathering_seconds")  # of a result


def compare(record: Record, other: Record) -> pd.DataFrame:
    """What differs between two records, a row each: ``part, what, record, other``. Times are not compared.

    Parts are ``config``, ``result`` (metrics, versions, hardware, commit), ``history`` (the first report that differs),
    ``weights`` and ``predictions`` (each tensor that differs, with the largest difference).
    """
    pair, ignored = (record, other), (*TIMES, "sha256")
    results = ({name: value for name, value in r.result.items() if name not in ignored} for r in pair)
    rows = _value_differences("config", *(r.config for r in pair))
    rows += _value_differences("result", *results)
    rows += _history_differences(*(r.history.drop(columns="seconds", errors="ignore") for r in pair))
    rows += _tensor_differences("weights", *(r.weights() for r in pair))
    rows += _tensor_differences("predictions", *(r.predictions for r in pair))
    return pd.DataFrame(rows, columns=["part", "what", "record", "other"])


def _value_differences(part: str, *pair: Mapping) -> list[tuple]:
    ours, theirs = (pd.json_normalize(values).to_dict("records")[0] for values in pair)  # names such as teacher.seed
    names = sorted({*ours, *theirs})
    found = [(part, name, ours.get(name, "(none)"), theirs.get(name, "(none)")) for name in names]
    return [row for row in found if row[2] != row[3]]


def _history_differences(ours: pd.DataFrame, theirs: pd.DataFrame) -> list[tuple]:
    if list(ours) != list(theirs) or len(ours) != len(theirs):
        return [("history", "reports", *(f"{len(table)} of {list(table)}" for table in (ours, theirs)))]
    rows, columns = np.nonzero(ours.ne(theirs) & ~(ours.isna() & theirs.isna()))
    if not len(rows):
        return []
    row, column = rows[0], columns[0]
    what = f"{ours.columns[column]} at step {ours.get('step', ours.index)[row]}"  # tables of timings have no steps
    return [("history", what, ours.iloc[row, column], theirs.iloc[row, column])]


def _tensor_differences(part: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[tuple]:
    rows = []
    for name in sorted({*ours, *theirs}):
        pair = [tensors.get(name) for tensors in (ours, theirs)]
        if any(t is None for t in pair) or pair[0].shape != pair[1].shape:
            rows.append((part, name, *("(none)" if t is None else f"shape {list(t.shape)}" for t in pair)))
        elif not torch.equal(*pair):
            largest = (pair[0].double() - pair[1].double()).abs().max().item()
            rows.append((part, name, f"differs by up to {largest:.3g}", ""))
    return rows
