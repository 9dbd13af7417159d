"""Reads the tensors of quantised checkpoints in bfloat16, one at a time.

Supported are tensors of 8 or 4 bit floats with a tensor of scales that multiplies them: FP8 and MXFP8 by
block, row or tensor, experts in FP4, and MXFP4 as GPT-OSS has it. Formats: https://arxiv.org/abs/2209.05433 (FP8),
https://arxiv.org/abs/2310.10537 (MX).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import mkstemp

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ones_lib.checkpoints.shards import Shards
from ones_lib.models.causal import read_json, text_config

LARGE = 64 * 2**20  # bytes of bfloat16 above which a tensor goes to a file
_PIECE = 2**21  # numbers that are dequantised at a time
_FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_FP4 = ("F4", "I8")  # as bytes, both have two numbers in each
_EXPONENTS = ("F8_E8M0", "U8")
_MX = (1, 32)  # the block of the MX formats
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Scales of activations and of the cache of keys and values, which matter for quantised computing only.
_DROPPED = re.compile(
    r"(^|[._])(input|activation)_(scale|zero_point)(_inv|_ub)?$"
    r"|\.([kvq]|kv|prob)_scale$|_proj\.output_scale$|\.qscale_act$"
)
# What belongs to a quantised tensor.
_BELONGS = re.compile(
    r"(^|[._])(pre_quant_scale|weight_(scale(_inv|_2)?|global_scale|zero_point))$|_scale_inv$|\.qscale_weight$"
)
_METHODS = ("fp8", "mxfp8", "mxfp4", "fbgemm_fp8", "compressed-tensors", "modelopt")
_UNDONE = ("bitsandbytes", "compressed-tensors", "higgs", "metal")  # transformers dequantises these


def readable(shards: Shards, config: PreTrainedConfig) -> Shards | Dequantised:
    """A checkpoint's tensors, dequantised if its config, or a file beside it, says that they are quantised.

    See :class:`Dequantised`. A file beside the config counts if there are tensors that are no weights in full precision.
    """
    found = getattr(config, "quantization_config", None)
    found = found or getattr(config.get_text_config(decoder=True), "quantization_config", None)  # as transformers looks
    return Dequantised(shards, found) if found else declared_beside(shards)


def declared_beside(shards: Shards) -> Shards | Dequantised:
    """Tensors of which a file such as ModelOpt's hf_quant_config.json may say that they are quantised."""
    if shards.path.is_dir() and not {*shards.dtypes.values()} <= {"F64", "F32", "F16", "BF16"}:
        for file in quantisation_files(shards.path):
            found = read_json(file)
            if isinstance(own := found.get("quantization"), Mapping):
                found = {"quant_method": "modelopt", **own}
            return Dequantised(shards, found, file)
    return shards


def quantisation_files(folder: Path) -> list[Path]:
    """Files beside the config that say how weights are quantised: hf_quant_config.json, quantize_config.json and the like."""
    return sorted(file for file in folder.glob("*.json") if re.match(r"(.*[_.-])?quant", file.name.lower()))


def without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config for what is dequantised."""
    config = deepcopy(config)
    for part in {id(part): part for part in (config, text_config(config))}.values():
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


@dataclass(frozen=True)
class _Pair:
    """A quantised tensor: numbers, as matrices [..., rows, columns], and scales, one a block of a matrix."""

    numbers: str  # names in the files
    scales: str
    matrices: list[int]
    grid: list[int]  # [E, R, C], or [1, R, C] if the matrices have the same
    block: tuple[int, int]
    transposed: bool  # MXFP4: the model's matrices are these, transposed

    @property
    def name(self) -> str:
        return self.numbers.removesuffix("_blocks") if self.transposed else self.numbers

    @property
    def shape(self) -> list[int]:
        *lead, rows, columns = self.matrices
        return [*lead, columns, rows] if self.transposed else self.matrices


class Dequantised:
    """A quantised checkpoint's tensors as bfloat16, dequantised one by one when they are read.

    Used like ``Shards``. ``shapes`` and ``files`` have the tensors without their scales, in the shapes they get. What
    is not quantised is read as it is.

    Args:
        shards: the files.
        quantization: config.json's ``quantization_config``.
        declared: the file that has it in its place.

    Attributes:
        scratch: a folder for large tensors. Each is a file without a name there, mapped, that goes away with the
            tensor. None: they are in memory.

    Raises:
        ValueError: the checkpoint is quantised in a way that is not supported; a tensor lacks its scales, or scales
            their tensor; shapes do not fit.
    """

    scratch: Path | None = None

    def __init__(self, shards: Shards, quantization: Mapping, declared: Path | None = None) -> None:
        self.path, self._shards, self.absent = shards.path, shards, shards.absent
        self._method = _supported_method(declared or shards.path, quantization, declared is None)
        self._blocks = [*_configured_blocks(declared or shards.path, quantization), _MX]
        self._dtypes = shards.dtypes
        pairs = [self._pair(name) for name in self._dtypes if self._is_quantised(name)]
        self._pairs = {pair.name: pair for pair in pairs}
        parts = {part for pair in pairs for part in (pair.numbers, pair.scales)}
        plain = [name for name in shards.shapes if name not in parts and not _DROPPED.search(name)]
        odd = (n for n in plain if self._dtypes[n] in _EXPONENTS or _BELONGS.search(n) or n in self._pairs)
        if name := min(odd, default=""):
            found = f"{self._dtypes[name]} {shards.shapes[name]}"
            raise ValueError(
                f"{self._place(name)}: expected the quantised tensor that it belongs to, found {found} alone"
            )
        self.shapes = {name: shards.shapes[name] for name in plain} | {name: p.shape for name, p in self._pairs.items()}
        self.files = {name: shards.files[name] for name in plain}
        self.files |= {name: shards.files[pair.numbers] for name, pair in self._pairs.items()}

    def paths(self) -> list[Path]:
        return self._shards.paths()

    def read(self, name: str) -> Tensor:
        """A tensor in bfloat16, or mapped from its file if it is not quantised.

        Raises:
            ValueError: its scales are not finite, or its bytes do not fit its shape.
            OSError: there is no room for it in ``scratch``.
        """
        if name not in self._pairs:
            return self._shards.read(name)
        pair = self._pairs[name]
        scales = self._shards.raw(pair.scales).reshape(pair.grid)
        if count := sum(int((~_scales_of(part).isfinite()).sum()) for part in scales):
            raise ValueError(f"{self._place(pair.scales)}: expected finite scales, found {count} NaN or infinite")
        made = _new_tensor(pair.shape, self.scratch)
        matrices = (made.mT if pair.transposed else made).view(-1, *pair.matrices[-2:])
        numbers = self._shards.raw(pair.numbers).view(len(matrices), matrices.shape[1], -1)
        for e, matrix in enumerate(matrices):
            _dequantise(matrix, numbers[e], _scales_of(scales[e if len(scales) > 1 else 0]), pair.block)
        return made

    def _place(self, name: str) -> str:
        return f"{self.path / self._shards.files[name] if self.path.is_dir() else self.path}: {name}"

    def _is_quantised(self, name: str) -> bool:
        return self._dtypes[name] in (*_FP8, *_FP4) or (self._dtypes[name] == "U8" and name.endswith("_blocks"))

    def _pair(self, name: str) -> _Pair:
        """A tensor of numbers and its scales."""
        dtype, shape = self._dtypes[name], self._shards.shapes[name]
        blocks = dtype == "U8"
        if not all(shape) or not (len(shape) == 4 and shape[-1] == 16 if blocks else len(shape) > 1):
            expected = "blocks [E, rows, groups, 16]" if blocks else "a matrix or a stack of them"
            raise ValueError(f"{self._place(name)}: expected {expected}, found {shape}")
        if blocks:
            candidates = [name.removesuffix("blocks") + "scales"]
            matrices = [*shape[:2], 2 * prod(shape[2:])]
        else:
            candidates = [name + end for end in ("_scale_inv", "_scale", "_weight_scale")]
            matrices = [*shape[:-1], 2 * shape[-1]] if dtype == "I8" else shape
        if name.endswith(".weight"):
            candidates += [name.removesuffix("weight") + end for end in ("scale", "qscale_weight")]
        found = {candidate: self._dtypes[candidate] for candidate in candidates if candidate in self._dtypes}
        if len(found) != 1 or not {*found.values()} < {*_EXPONENTS, "F32", "F16", "BF16"}:
            raise ValueError(
                f"{self._place(name)}: expected one tensor of scales for this one of {dtype}, of {candidates},"
                f" in float or exponents, found {found or 'none'}"
            )
        scales = next(iter(found))
        grid, block = self._grid(name, matrices, scales)
        return _Pair(name, scales, matrices, grid, block, transposed=blocks)

    def _grid(self, name: str, matrices: list[int], scales: str) -> tuple[list[int], tuple[int, int]]:
        """The shape [E or 1, R, C] to give to scales, and the block that each is of."""
        *lead, rows, columns = matrices
        found = stored = self._shards.shapes[scales]
        if self._dtypes[name] not in _FP8:
            blocks = [_MX]
        elif prod(stored) == 1:
            return [1, 1, 1], (rows, columns)
        elif self._method == "fbgemm_fp8" and lead:  # one a column; which of the other dimensions is 1 differs
            blocks = [(rows, 1)]
            found = [*lead, 1, columns] if stored in ([*lead, 1, columns], [*lead, columns, 1]) else stored
        else:
            blocks = [*self._blocks, (1, columns), (rows, columns)]
            if name.endswith("gate_up_proj") and not rows % 2:  # gate and up have their own
                blocks += [(rows // 2, width) for height, width in blocks if height >= rows]
            if stored == (lead or [rows]):  # one a matrix of a stack, or one a row
                found = [*stored, 1, 1] if lead else [rows, 1]
            elif not lead and len(stored) == 4 and stored[1] == stored[3] == 1:  # ModelOpt's [R, 1, C, 1]
                found = stored[::2]
        shapes = {block: [*lead, -(-rows // block[0]), -(-columns // block[1])] for block in blocks}
        fitting = {(min(block[0], rows), min(block[1], columns)) for block, shape in shapes.items() if shape == found}
        if len(fitting) != 1:
            raise ValueError(
                f"{self._place(scales)}: expected scales for {name} {matrices}, one a block, so {shapes} by block,"
                f" found {stored}" + (f", which fits blocks of {sorted(fitting)}" if fitting else "")
            )
        return [prod(lead), *found[-2:]], fitting.pop()


def _supported_method(path: Path, quantization: Mapping, in_config: bool) -> str:
    """Its name; ValueError: it is none that is supported."""
    method = quantization.get("quant_method")
    bits = quantization.get("bits")
    if loaded := [n for n in (4, 8) if quantization.get(f"load_in_{n}bit")]:  # may be all that there is
        method, bits = "bitsandbytes", loaded[0]
    found = f"{method!r}" + (f" of {bits} bits" if bits else "")
    supported = method in _METHODS
    if method == "compressed-tensors":
        odd = _unsupported_scheme(quantization)
        supported, found = not odd, f"{found} with {odd}"
    elif method == "modelopt":
        algorithm = quantization.get("quant_algo")
        supported = str(algorithm).upper().startswith(("FP8", "MXFP8"))
        found += f" with quant_algo {algorithm!r}"
    if not supported:
        place = "quantization_config's " if in_config else ""
        advice = "take the release in bfloat16 that it was made of"
        if method in _UNDONE:
            advice = f"load it with transformers, dequantised, and save that, or {advice}"
        raise ValueError(
            f"{path}: expected weights in full precision, FP8, MXFP8 or MXFP4 by one of {list(_METHODS)},"
            f" found {place}quant_method {found}; {advice}"
        )
    return method


def _unsupported_scheme(quantization: Mapping) -> str:
    """What of a compressed-tensors config is more than FP8 numbers times scales; empty: nothing."""
    sparsity = quantization.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        return f"sparsity {sparsity['format']!r}"
    if quantization.get("transform_config"):
        return "a transform_config"
    for name, group in _groups(quantization).items():
        weights = group.get("weights") if isinstance(group, Mapping) else {}
        if weights is None:
            continue
        kind = weights.get("type"), weights.get("num_bits"), weights.get("symmetric", True)
        if kind != ("float", 8, True):
            form = (group.get("format") if isinstance(group, Mapping) else None) or quantization.get("format")
            return f"{name} of format {form!r}, whose weights are {kind[0]} of {kind[1]} bits, symmetric: {kind[2]}"
    return ""


def _groups(quantization: Mapping) -> Mapping:
    return quantization.get("config_groups") or {}


def _configured_blocks(path: Path, quantization: Mapping) -> list[tuple[int, int]]:
    """Rows and columns of the blocks that have a scale each, of which a config tells."""
    found = [quantization.get("weight_block_size")]
    for group in _groups(quantization).values():
        weights = (group.get("weights") if isinstance(group, Mapping) else None) or {}
        found.append(weights.get("block_structure"))
        if size := weights.get("group_size"):
            found.append([1, size])
    if not any(found) and "weight_block_size" not in quantization:
        found = [[128, 128]]  # transformers' default
    blocks = [tuple(block) if isinstance(block, (list, tuple)) else block for block in found if block is not None]
    for block in blocks:
        if not (isinstance(block, tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
            raise ValueError(f"{path}: expected blocks of two positive sizes in quantization_config, found {block!r}")
    return blocks


def _new_tensor(shape: list[int], scratch: Path | None) -> Tensor:
    """An empty bfloat16 tensor; if it is large, mapped from a file in ``scratch`` that has no name any more."""
    size = prod(shape)
    if scratch is None or size * torch.bfloat16.itemsize <= LARGE:
        return torch.empty(shape, dtype=torch.bfloat16)
    handle, file = mkstemp(dir=scratch)
    try:
        # A write to a mapped page that the disk has no room for ends the process.
        reserve = getattr(os, "posix_fallocate", lambda handle, start, size: os.truncate(handle, size))
        reserve(handle, 0, size * torch.bfloat16.itemsize)
        return torch.from_file(file, shared=True, size=size, dtype=torch.bfloat16).view(shape)
    finally:
        os.close(handle)
        os.unlink(file)


def _scales_of(stored: Tensor) -> Tensor:
    """Scales in float32. Bytes are exponents of two, 255 is NaN."""
    return (stored.view(torch.float8_e8m0fnu) if stored.dtype == torch.uint8 else stored).to(torch.float32)


def _dequantise(matrix: Tensor, numbers: Tensor, scales: Tensor, block: tuple[int, int]) -> None:
    """Fill a matrix [rows, columns] with ``numbers``, as many or two a byte, times ``scales`` [R, C], one a block."""
    rows, columns = matrix.shape
    height, width = block
    step = max(1, _PIECE // columns)
    for start in range(0, rows, step):
        piece = _numbers_of(numbers[start : start + step])
        factors = scales[torch.arange(start, start + len(piece)) // height]
        if factors.shape[1] > 1:
            factors = factors.repeat_interleave(width, 1)[:, :columns]
        matrix[start : start + step] = piece.mul_(factors)


def _numbers_of(stored: Tensor) -> Tensor:
    """Numbers in float32. A byte is two FP4 numbers, the lower half first."""
    if stored.dtype in _FP8.values():
        return stored.to(torch.float32)
    values = torch.tensor(_FP4_VALUES)
    byte = torch.arange(256)
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], dim=1)
    return pairs.index_select(0, stored.view(torch.uint8).reshape(-1).int()).view(len(stored), -1)
