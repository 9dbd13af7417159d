"""The safetensors files of a checkpoint of transformers, read a tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor


class Shards:
    """The safetensors files of a checkpoint, opened as they are needed, and checked against their index.

    Raises:
        FileNotFoundError: no safetensors file, or one that the index names is missing.
        ValueError: a file is damaged, or does not hold what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._open = folder, {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            indexed = json.loads(index.read_text())["weight_map"]
        elif (folder / "model.safetensors").exists():
            indexed = None
        else:
            found = sorted(p.name for p in folder.iterdir())[:8]
            raise FileNotFoundError(
                f"{folder}: expected model.safetensors or model.safetensors.index.json, found {found}"
            )
        self.shapes: dict[str, list[int]] = {}
        self.files: dict[str, str] = {}
        for file in ["model.safetensors"] if indexed is None else sorted(set(indexed.values())):
            self._read_header(file)
        if indexed is not None and indexed != self.files:
            odd = sorted(name for name, _ in indexed.items() ^ self.files.items())
            raise ValueError(f"{index}: expected the tensors of its files, each in its own, not so: {odd[:5]}")

    def _read_header(self, name: str) -> None:
        if not (path := self.folder / name).exists():
            raise FileNotFoundError(f"{path}: expected this file, which the index names, found none")
        try:
            with safe_open(path, "pt") as file:
                for tensor in file.keys():  # noqa: SIM118  it is no dictionary
                    self.shapes[tensor], self.files[tensor] = file.get_slice(tensor).get_shape(), name
        except SafetensorError as error:
            raise ValueError(f"{path}: expected a whole safetensors file ({error})") from error

    def paths(self) -> list[Path]:
        return [self.folder / name for name in sorted(set(self.files.values()))]

    def read(self, name: str) -> Tensor:
        """A tensor, mapped from its file."""
        file = self.files[name]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, "pt")
        return self._open[file].get_tensor(name)

    def close(self) -> None:
        """Unmap the files, when nothing refers to their tensors."""
        self._open.clear()
