"""Records: a finished piece of work is a folder, found again by the hash of its configuration.

::

    <root>/<kind>-<hash>/
        config.json          what was asked for: everything that decides the result, and nothing else
        weights.safetensors  the model
        predictions.safetensors   score of every validation example by metric, and what was predicted
        history.csv          the course of the training
        result.json          numbers, wall time, how it was carried out, versions, hardware, state of the code, checksums

Work in progress lives in ``<kind>-<hash>.partial`` with its checkpoint, and is moved into place when whole. Whoever works on
it holds the lock ``<root>/locks/<kind>-<hash>.lock``, which the system takes back from a process that is killed.

``python -m ones_lib.study.records RECORD OTHER`` says in what two records differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
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

import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor, nn

from ones_lib.data.files import checksum, load_tensors, remove_unfinished, save_tensors, write_text

FORMAT = 1  # raised when what a configuration means has changed


def config_hash(config: Mapping) -> str:
    """16 hexadecimal digits that stand for a configuration of plain values; the order of keys does not matter."""
    text = json.dumps({"format": FORMAT, **config}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Record:
    """A finished record in ``folder``. What is read from it is checked: ValueError if a file is not as it was written."""

    folder: Path

    @cached_property
    def config(self) -> dict:
        return self._json("config.json")

    @cached_property
    def result(self) -> dict:
        return self._json("result.json")

    @cached_property
    def history(self) -> pd.DataFrame:
        return pd.read_csv(self.folder / "history.csv")

    @cached_property
    def predictions(self) -> dict[str, Tensor]:
        """Scores by metric, [n] each, and what else the task's ``predict`` gives."""
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
            return json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON, found something else ({error})") from error

    def _checked(self, name: str) -> Path:
        """The path of a file whose checksum is that which was written with it (records of before there were any have none)."""
        path, expected = self.folder / name, self.result.get("sha256", {}).get(name)
        if not path.exists():
            raise FileNotFoundError(f"{path}: expected this file of a finished record, found none; delete the record")
        if expected is not None and (found := checksum(path)) != expected:
            raise ValueError(
                f"{path}: expected the file as it was written, SHA-256 {expected}, found {found} of {path.stat().st_size}"
                " bytes; delete the record, and it is made again"
            )
        return path


class Records:
    """The records below ``root``. Those finished before ``redo_before`` (an ISO time) count as absent."""

    def __init__(self, root: str | Path, redo_before: str = "") -> None:
        self.root = Path(root)
        try:
            self.redo_before = datetime.fromisoformat(redo_before) if redo_before else None
        except ValueError as error:
            raise ValueError(f"redo_before: expected a time such as 2026-01-31T12:00:00+00:00 ({error})") from error
        if self.redo_before is not None and self.redo_before.tzinfo is None:
            raise ValueError(f"redo_before: expected a time with its zone, such as +00:00, found {redo_before!r}")

    def folder(self, config: Mapping) -> Path:
        if not re.fullmatch(r"\w+", config["kind"]):
            raise ValueError(f"kind: expected a word, found {config['kind']!r}")
        return self.root / f"{config['kind']}-{config_hash(config)}"

    def find(self, config: Mapping) -> Record | None:
        """The finished record of this configuration, if there is one."""
        record = Record(self.folder(config))
        if not (record.folder / "result.json").exists():
            return None
        if self.redo_before and datetime.fromisoformat(record.result["finished"]) < self.redo_before:
            return None
        return record

    def all(self, kind: str) -> list[Record]:
        """Every finished record of a kind, such as ``moe``."""
        return [Record(result.parent) for result in sorted(self.root.glob(f"{kind}-*/result.json")) if _final(result)]

    @contextmanager
    def lock(self, config: Mapping) -> Iterator[None]:
        """Held by the one who works on a record; another one waits, and finds it finished then."""
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{self.folder(config).name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{self.folder(config).name}: another run is at it, waiting for that", file=sys.stderr, flush=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def table(self, config: Mapping, compute: Callable[[], pd.DataFrame] | None) -> tuple[pd.DataFrame, str]:
        """A table that is made once, such as of timings, and then found, and its record's name. None: it must be there."""
        record = self.find(config)
        if record is None and compute is None:
            raise ValueError(f"records: expected {self.folder(config)}, found none; it is made by a run that may train")
        if record is None:
            with self.lock(config):
                record = self.find(config)
                if record is None:
                    history, partial = compute(), self.begin(config)
                    write_text(partial / "history.csv", history.to_csv(index=False))
                    record = self._put(partial, self.folder(config), {})
        return record.history, record.folder.name

    def partial(self, config: Mapping) -> Path:
        """The folder of work in progress."""
        return self.folder(config).with_suffix(".partial")

    def begin(self, config: Mapping) -> Path:
        """The folder to work in; what an interrupted run left there is still there, but for files that it left half-written."""
        partial = self.partial(config)
        partial.mkdir(parents=True, exist_ok=True)
        remove_unfinished(partial)
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
        """Write what is missing into the folder of work in progress and move it into place."""
        partial, final = self.begin(config), self.folder(config)
        tensors = {"weights.safetensors": weights, "predictions.safetensors": predictions}
        for name, content in tensors.items():
            save_tensors(partial / name, content)
        write_text(partial / "history.csv", history.to_csv(index=False))
        return self._put(partial, final, {**result, "sha256": {name: checksum(partial / name) for name in tensors}})

    @staticmethod
    def _put(partial: Path, final: Path, result: Mapping) -> Record:
        """Write the result, with where and when, and move what is whole into its place."""
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        write_text(partial / "result.json", json.dumps({**result, **provenance(), "finished": finished}, indent=1))
        (partial / "checkpoint.safetensors").unlink(missing_ok=True)
        if final.exists():  # asked to be made again
            shutil.rmtree(final)
        os.replace(partial, final)
        return Record(final)


def _final(result: Path) -> bool:
    """Whether a result is in its place: a process can be killed after it is written, and before it is moved."""
    return not result.parent.name.endswith(".partial")


def project_root() -> Path:
    """The folder that holds ``run_all.sh``, upwards from here; else the working directory."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "run_all.sh").exists()), here)


PACKAGES = (
    *("torch", "torchvision", "timm", "transformers", "tokenizers", "datasets", "accelerate", "safetensors"),
    *("numpy", "scipy", "scikit-learn", "pandas", "matplotlib"),
)


def provenance() -> dict:
    """Versions, hardware and the state of the code, for the record."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "code": code_state(),
    }


@cache
def processor() -> str:
    """The CPU's name, if the system tells."""
    told = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", told.read_text()) if told.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


@cache
def code_state() -> str:
    """The commit of this library's repository, with ``-dirty`` where files differ from it; ``unknown`` outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def compare(record: Record, other: Record) -> pd.DataFrame:
    """In what two records differ, a row each: ``part, what, record, other``; no rows: in nothing but when and how fast.

    Parts are ``config``, ``result`` (metrics, versions, hardware, code), ``history`` (the first report that differs), ``weights``
    and ``predictions`` (tensors that differ, with the largest difference).
    """
    rows = []
    for part in ("config", "result"):
        found = [dict(_leaves(getattr(r, part))) for r in (record, other)]
        for what in sorted({*found[0], *found[1]}):
            values = [leaves.get(what, "(none)") for leaves in found]
            if values[0] != values[1] and not _ignored(what):
                rows.append((part, what, *values))
    rows += _history_differences(record, other)
    for part in ("weights", "predictions"):
        ours, theirs = (r.weights() if part == "weights" else r.predictions for r in (record, other))
        for name in sorted({*ours, *theirs}):
            pair = [tensors.get(name) for tensors in (ours, theirs)]
            if any(t is None for t in pair) or pair[0].shape != pair[1].shape:
                rows.append((part, name, *("(none)" if t is None else f"shape {list(t.shape)}" for t in pair)))
            elif not torch.equal(*pair):
                most = (pair[0].double() - pair[1].double()).abs().max().item()
                rows.append((part, name, f"differs by up to {most:.3g}", ""))
    return pd.DataFrame(rows, columns=["part", "what", "record", "other"])


def _leaves(value, name: str = "") -> Iterator[tuple[str, object]]:
    """Names such as ``teacher.seed`` with the plain values there."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _ignored(what: str) -> bool:
    """Times, and the checksums of what is compared itself."""
    return what in ("finished", "wall_seconds", "gathering_seconds") or what.startswith("sha256.")


def _history_differences(record: Record, other: Record) -> list[tuple]:
    histories = [r.folder / "history.csv" for r in (record, other)]
    texts = [path.read_text().strip() for path in histories]
    if not all(texts):  # not trained
        return [] if texts[0] == texts[1] else [("history", "reports", *(text.count("\n") for text in texts))]
    a, b = (r.history.drop(columns="seconds", errors="ignore") for r in (record, other))
    if list(a) != list(b) or len(a) != len(b):
        return [("history", "reports", f"{len(a)} of {list(a)}", f"{len(b)} of {list(b)}")]
    for (_, ours), (_, theirs) in zip(a.iterrows(), b.iterrows(), strict=True):
        for what in a:
            both_none = all(isinstance(v, float) and math.isnan(v) for v in (ours[what], theirs[what]))
            if ours[what] != theirs[what] and not both_none:
                return [("history", f"{what} at step {ours['step']:g}", ours[what], theirs[what])]
    return []


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ones_lib.study.records", description=compare.__doc__.partition("\n")[0]
    )
    parser.add_argument("record", type=Path, help="folder of a record")
    parser.add_argument("other", type=Path, help="folder of another")
    options = parser.parse_args(arguments)
    try:
        table = compare(Record(options.record), Record(options.other))
    except (OSError, ValueError) as error:
        print(f"records: {error}", file=sys.stderr)
        return 2
    if table.empty:
        print("the same, but for times")
        return 0
    with pd.option_context("display.max_colwidth", 60, "display.width", 200):
        print(table.to_string(index=False))
    return 1


if __name__ == "__main__":
    sys.exit(main())
