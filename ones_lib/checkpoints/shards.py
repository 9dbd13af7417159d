"""The safetensors files of a checkpoint of transformers, read a tensor at a time.

The library's own reader maps whole files, of which a checkpoint's may be larger than the memory that there is; this one maps
the bytes of one tensor. The format: eight bytes with the length of a JSON header, the header with every tensor's dtype, shape
and place in what follows, and that (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LONGEST_HEADER = 100_000_000  # bytes, as in the library


class Shards:
    """The tensors of a checkpoint's folder, checked against its index.

    Raises:
        FileNotFoundError: no safetensors file, or one that the index names is missing.
        ValueError: a file is damaged, does not hold what the index says, or lies elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}  # of every tensor, by its name: the file,
        self.shapes: dict[str, list[int]] = {}
        self._dtypes: dict[str, str] = {}
        self._places: dict[str, tuple[int, int]] = {}  # and the first byte in it and the one after the last
        index = folder / "model.safetensors.index.json"
        if not index.exists() and not (folder / "model.safetensors").exists():
            found = sorted(p.name for p in folder.iterdir())[:8]
            raise FileNotFoundError(
                f"{folder}: expected model.safetensors or model.safetensors.index.json, found {found}"
            )
        indexed = None
        if index.exists():
            try:
                indexed = dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index}: expected JSON with a weight_map of files by tensor ({error!r})") from error
        for file in ["model.safetensors"] if indexed is None else sorted(set(indexed.values())):
            self._read_header(file)
        if indexed is not None and indexed != self.files:
            odd = sorted(name for name, _ in indexed.items() ^ self.files.items())
            raise ValueError(f"{index}: expected the tensors of its files, each in its own, not so: {odd[:5]}")

    def _read_header(self, name: str) -> None:
        if Path(name).name != name:
            raise ValueError(f"{self.folder}: expected an index that names files of this folder, found {name!r}")
        if not (path := self.folder / name).exists():
            raise FileNotFoundError(f"{path}: expected this file, which the index names, found none")
        size = path.stat().st_size
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length <= min(size - 8, _LONGEST_HEADER) else {}
            tensors = {key: value for key, value in header.items() if key != "__metadata__"}
            places = {key: [8 + length + at for at in value["data_offsets"]] for key, value in tensors.items()}
            whole = max((end for _, end in places.values()), default=0) == size
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise ValueError(f"{path}: expected a whole safetensors file, found {size} bytes that are none")
        for key, value in tensors.items():
            self.files[key], self.shapes[key], self._dtypes[key] = name, list(value["shape"]), value["dtype"]
            self._places[key] = tuple(places[key])

    def paths(self) -> list[Path]:
        return [self.folder / name for name in sorted(set(self.files.values()))]

    def read(self, name: str) -> Tensor:
        """A tensor, mapped from its file: in memory only where it is looked at.

        Raises:
            ValueError: it is not floating point, so quantised, or its place in the file is not of its size.
        """
        path, shape, (start, stop) = self.folder / self.files[name], self.shapes[name], self._places[name]
        if self._dtypes[name] not in _DTYPES:
            raise ValueError(f"{path}: {name}: expected weights that are not quantised, found {self._dtypes[name]}")
        dtype, count = _DTYPES[self._dtypes[name]], int(np.prod(shape))
        if not 0 <= start <= stop <= path.stat().st_size or stop - start != count * dtype.itemsize:
            raise ValueError(f"{path}: {name}: expected {count} numbers for {shape}, found {stop - start} bytes")
        if not count:
            return torch.empty(shape, dtype=dtype)
        # Private to this process: what is written to it, if anything, stays out of the file.
        mapped = np.memmap(path, np.uint8, "c", start, (stop - start,))
        return torch.frombuffer(mapped, dtype=dtype).view(shape)
