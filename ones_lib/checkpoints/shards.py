"""Reads and joins safetensors files one tensor at a time.

The safetensors library maps whole files, and a checkpoint's files may be larger than memory. This reader maps the bytes
of one tensor; and the library writes a file of tensors that are all in memory. File format
(https://huggingface.co/docs/safetensors): the length of the header in 8 bytes; the header, JSON with dtype, shape and byte
offsets of every tensor; the data.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ones_lib.data.files import written_beside
from ones_lib.models.causal import read_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32}  # tables
_QUANTISED = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
_QUANTISED |= {"U8": torch.uint8, "I8": torch.int8}
_LONGEST_HEADER = 100_000_000  # bytes, the library's limit


class Shards:
    """The tensors of a safetensors file or of a folder of them.

    A folder's files are those that transformers reads, see :func:`weight_files`; where it reads none, all safetensors files.
    ``shapes`` and ``dtypes`` have the shape and the dtype, as safetensors calls it, of every tensor by name, ``absent`` the files,
    by tensor, that the index names and that are not there. ``plain`` is whether transformers opens such a folder. ``scratch`` is a
    folder for what is made of tensors, by a reader that makes some.

    Args:
        path: of a file or folder.
        spare: whether a tensor of this name may be absent.

    Raises:
        FileNotFoundError: there is no safetensors file, or one that the index names is missing.
        ValueError: a file is damaged, a tensor is in two, or the index does not fit the files or names files outside the folder.
    """

    scratch: Path | None = None

    def __init__(self, path: Path, spare: Callable[[str], bool] = lambda name: False) -> None:
        self.path = path
        files, index = weight_files(path)
        indexed = {} if index is None else _read_index(index)
        missing = {file.name for file in files if not file.exists()}
        self.absent = {name: file for name, file in indexed.items() if file in missing}
        self.plain = path.is_dir() and not missing and _first(path) is not None
        if lost := sorted({file for name, file in self.absent.items() if not spare(name)}):
            others = f", nor {', '.join(lost[1:5])}" if lost[1:] else ""
            raise FileNotFoundError(f"{path / lost[0]}: expected this file, which the index names, found none{others}")
        # By tensor: its file, dtype, shape, and the bytes from start to stop.
        self._stored: dict[str, tuple[Path, str, list[int], int, int]] = {}
        for file in files:
            for name, rest in _read_header(file).items() if file.name not in missing else ():
                if name in self._stored:
                    both = f"{self._stored[name][0].name} and {file.name}"
                    raise ValueError(f"{path}: expected every tensor in one file, found {name} in {both}")
                self._stored[name] = (file, *rest)
        self.files = {name: file.name for name, (file, *_) in self._stored.items()}
        self.dtypes = {name: dtype for name, (_, dtype, *_) in self._stored.items()}
        self.shapes = {name: shape for name, (_, _, shape, *_) in self._stored.items()}
        if index is not None and indexed != (found := self.files | self.absent):
            odd = sorted(name for name, _ in indexed.items() ^ found.items())
            raise ValueError(f"{index}: expected the tensors of its files, each in its own, found others: {odd[:5]}")

    def paths(self) -> list[Path]:
        return sorted({file for file, *_ in self._stored.values()})

    @property
    def dtype(self) -> torch.dtype:
        """The most common one that is not quantised; of a quantised checkpoint bfloat16."""
        kinds = Counter(dtype for dtype in self.dtypes.values() if dtype in _DTYPES)
        quantised = any(dtype in _QUANTISED for dtype in self.dtypes.values())
        return torch.bfloat16 if quantised or not kinds else _DTYPES[kinds.most_common(1)[0][0]]

    def read(self, name: str) -> Tensor:
        """A tensor, mapped from its file: only the pages that are used get into memory.

        Raises:
            ValueError: it is not floating point, so quantised, or its bytes do not fit its shape.
        """
        file, stored, *_ = self._stored[name]
        if stored not in _DTYPES:
            raise ValueError(f"{file}: {name}: expected weights that are not quantised, found {stored}")
        return self.raw(name)

    def raw(self, name: str) -> Tensor:
        """A tensor as it is stored, quantised ones too, mapped.

        Raises:
            ValueError: it has a dtype that torch does not have, or its bytes do not fit its shape.
        """
        file, stored, shape, start, stop = self._stored[name]
        if stored == "F4":  # two in a byte
            stored, shape = "U8", [*shape[:-1], shape[-1] // 2]
        if (dtype := (_DTYPES | _QUANTISED).get(stored)) is None:
            raise ValueError(f"{file}: {name}: expected a dtype that torch has, found {stored}")
        size = stop - start
        if not 0 <= start <= stop <= file.stat().st_size or size != prod(shape) * dtype.itemsize:
            raise ValueError(f"{file}: {name}: expected {stored} of shape {shape}, found {size} bytes")
        if not size:
            return torch.empty(shape, dtype=dtype)
        mapped = np.memmap(file, np.uint8, "c", start, (size,))  # a write does not reach the file
        return torch.frombuffer(mapped, dtype=dtype).view(shape)

    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor, file by file."""
        return {name: stop - start for name, (*_, start, stop) in self._stored.items()}

    def join(self, names: Iterable[str], path: Path) -> None:
        """Write these tensors, bytes as they are, to one file; atomically."""
        # As the library: larger dtypes first, so that each tensor starts at a multiple of its dtype's size.
        dtypes = _DTYPES | _QUANTISED
        order = sorted(names, key=lambda name: (-dtypes[self.dtypes[name]].itemsize, name))
        header, sizes, stop = {"__metadata__": {"format": "pt"}}, self.sizes(), 0
        for name in order:
            start, stop = stop, stop + sizes[name]
            header[name] = {"dtype": self.dtypes[name], "shape": self.shapes[name], "data_offsets": [start, stop]}
        packed = json.dumps(header, separators=(",", ":")).encode()
        packed += b" " * (-len(packed) % 8)
        with written_beside(path) as beside, beside.open("wb") as file:
            file.write(len(packed).to_bytes(8, "little") + packed)
            for name in order:
                file.write(self.raw(name).flatten().view(torch.uint8).numpy())


@cache  # once a folder: a command opens it several times
def _warn_of_others(path: Path, taken: str, others: str) -> None:
    warnings.warn(f"{path}: takes {taken}, as transformers does, and not {others}, which {INDEX} names", stacklevel=3)


def weight_files(path: Path) -> tuple[list[Path], Path | None]:
    """The files of the weights at a path, and the index that names them, if one does.

    They are those that transformers takes, in its order: what config.json names as ``transformers_weights``; ``model.safetensors``;
    those that the index names. Where there is none of these, which transformers does not open, all safetensors files but an
    adapter's.

    Raises:
        FileNotFoundError: there are none.
        ValueError: config.json or the index names files outside the folder, or the files hold parts of tensors.
    """
    if path.is_file():
        return [path], None
    files = sorted(path.glob("*.safetensors"))
    if parts := [file.name for file in files if re.match(r"shard-\d{5}-model-\d{5}-of-\d{5}\.", file.name)]:
        raise ValueError(f"{path}: expected whole tensors, found a checkpoint of several processes, {parts[0]}")
    first, index = _first(path), path / INDEX
    if first is not None and not first.exists():
        raise FileNotFoundError(f"{first}: expected this file, which config.json names, found none")
    if first is not None and first.suffix == ".json":
        return [path / name for name in sorted({*_read_index(first).values()})], first
    if first is not None:
        if index.exists() and (others := {*_read_index(index).values()} - {first.name}):
            _warn_of_others(path, first.name, ", ".join(sorted(others)[:3]))
        return [first], None
    files = [file for file in files if not file.name.startswith((".", "adapter_"))]
    if path.is_dir() and not files and any(path.glob("*.gguf")):
        raise FileNotFoundError(f"{path}: expected safetensors files, found GGUF; take the release in safetensors")
    if not files:
        found = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else "none"
        raise FileNotFoundError(f"{path}: expected a safetensors file or a folder of them, found {found}")
    return files, None


def weights_to_fetch(folder: Path) -> list[str]:
    """Names or patterns of the files of weights that a hub name's folder asks for and that are not there."""
    if (first := _first(folder)) is None:
        return ["model*.safetensors"]
    names = {first.name, *(_read_index(first).values() if first.suffix == ".json" and first.exists() else ())}
    return sorted(name for name in names if not (folder / name).exists())


def _first(path: Path) -> Path | None:
    """The file of weights or the index that transformers opens first, which config.json may name; None: there is none."""
    config = path / "config.json"
    name = read_json(config).get("transformers_weights") if config.is_file() else None
    if name is None:
        return next((file for file in (path / WHOLE, path / INDEX) if file.exists()), None)
    if not str(name).endswith((".safetensors", ".safetensors.index.json")) or Path(name).name != name:
        raise ValueError(f"{config}: transformers_weights: expected a safetensors file of this folder, found {name!r}")
    return path / name


def _read_index(index: Path) -> dict[str, str]:
    """The file of every tensor."""
    try:
        files = {name: str(file) for name, file in read_json(index)["weight_map"].items()}
    except (KeyError, AttributeError) as error:
        raise ValueError(f"{index}: expected JSON with a weight_map of files by tensor ({error!r})") from error
    if outside := [file for file in files.values() if Path(file).name != file]:
        raise ValueError(f"{index}: expected an index that names files of this folder, found {outside[0]!r}")
    return files


def _read_header(file: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """Dtype, shape, and first byte and end of every tensor."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(start - 8)) if start <= min(size, _LONGEST_HEADER) else None
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        places = {name: [start + at for at in tensor["data_offsets"]] for name, tensor in tensors.items()}
        found = {name: (t["dtype"], list(t["shape"]), *places[name]) for name, t in tensors.items()}
        whole = max((stop for *_, stop in found.values()), default=start) == size
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{file}: expected a whole safetensors file, found {size} bytes of something else")
    return found
