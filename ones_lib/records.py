"""Records: a finished piece of work is a folder, found again by the hash of its configuration.

::

    <root>/<kind>-<hash>/
        config.json          what was asked for: everything that decides the result, and nothing else
        weights.safetensors  the model
        predictions.safetensors   score of every validation example by metric, and what was predicted
        history.csv          the course of the training
        result.json          numbers, wall time, versions, hardware, when it was finished

Work in progress lives in ``<kind>-<hash>.partial`` with its checkpoint, and is moved into place when whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT = 1  # raised when what a configuration means has changed


def config_hash(config: Mapping) -> str:
    """16 hexadecimal digits that stand for a configuration of plain values; the order of keys does not matter."""
    text = json.dumps({"format": FORMAT, **config}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Record:
    """A finished record in ``folder``."""

    folder: Path

    @cached_property
    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    @cached_property
    def result(self) -> dict:
        return json.loads((self.folder / "result.json").read_text())

    @cached_property
    def history(self) -> pd.DataFrame:
        return pd.read_csv(self.folder / "history.csv")

    @cached_property
    def predictions(self) -> dict[str, Tensor]:
        """Scores by metric, [n] each, and what else the task's ``predict`` gives."""
        return load_file(self.folder / "predictions.safetensors")

    def load_weights(self, model: nn.Module) -> nn.Module:
        load_tensors(self.folder / "weights.safetensors", model)
        return model


class Records:
    """The records below ``root``. Those finished before ``redo_before`` (an ISO time) count as absent."""

    def __init__(self, root: str | Path, redo_before: str = "") -> None:
        self.root = Path(root)
        self.redo_before = datetime.fromisoformat(redo_before) if redo_before else None

    def folder(self, config: Mapping) -> Path:
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
        return [Record(result.parent) for result in sorted(self.root.glob(f"{kind}-*/result.json"))]

    def table(self, config: Mapping, compute: Callable[[], pd.DataFrame] | None) -> tuple[pd.DataFrame, str]:
        """A table that is made once, such as of timings, and then found, and its record's name. None: it must be there."""
        record = self.find(config)
        if record is None and compute is None:
            raise ValueError(f"records: expected {self.folder(config)}, found none; it is made by a run that may train")
        if record is None:
            history, partial, final = compute(), self.begin(config), self.folder(config)
            history.to_csv(partial / "history.csv", index=False)
            record = self._put(partial, final, {})
        return record.history, record.folder.name

    def begin(self, config: Mapping) -> Path:
        """The folder to work in; what an interrupted run left there is still there."""
        partial = self.folder(config).with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        write_text(partial / "config.json", json.dumps(config, indent=1, sort_keys=True))
        return partial

    def finish(
        self,
        config: Mapping,
        model: nn.Module,
        history: pd.DataFrame,
        predictions: Mapping[str, Tensor],
        result: Mapping,
    ) -> Record:
        """Write what is missing into the folder of work in progress and move it into place."""
        partial, final = self.begin(config), self.folder(config)
        save_tensors(partial / "weights.safetensors", model_tensors(model))
        save_tensors(partial / "predictions.safetensors", predictions)
        history.to_csv(partial / "history.csv", index=False)
        return self._put(partial, final, result)

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


def project_root() -> Path:
    """The folder that holds ``run_all.sh``, upwards from here; else the working directory."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "run_all.sh").exists()), here)


def provenance() -> dict:
    """Versions and hardware, for the record."""
    packages = ("torch", "timm", "transformers", "accelerate", "numpy", "matplotlib")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "device": device,
        "threads": torch.get_num_threads(),
    }


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, a shared one once (safetensors refuses tensors that share memory)."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def write_text(path: Path, text: str) -> None:
    """Write beside and move into place."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(text)
    os.replace(beside, path)


def file_stamps(files: Iterable[Path]) -> list[list]:
    """Name, size and time of change of files: what tells those that were changed."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors beside and move into place."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside, metadata)
    os.replace(beside, path)


def load_tensors(path: Path, model: nn.Module) -> None:
    """Copy a file's tensors into a model of the same parameters; ValueError names the first that does not fit."""
    target = model_tensors(model)
    with safe_open(path, "pt") as file, torch.no_grad():
        if odd := sorted(set(file.keys()) ^ set(target)):
            raise ValueError(
                f"{path}: expected the tensors of {type(model).__name__}, in one of the two only: {odd[:5]}"
            )
        for name, tensor in target.items():
            stored = file.get_tensor(name)
            if stored.shape != tensor.shape:
                raise ValueError(f"{path}: {name}: expected shape {list(tensor.shape)}, found {list(stored.shape)}")
            tensor.copy_(stored)
