"""The experts of an MoE by layer: of a model in memory, or of safetensors files, of which only what is asked for
is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ones_lib.ffn import FeedForwardWeights

# How the tensors of an expert layer are named: by this library ("up" [E, h, d], "down" [E, d, h], ...), by transformers in
# memory (all experts in one tensor, gate above up; with biases they are GPT-OSS's: transposed, gate and up by turns), by
# Granite's files (the same), and in the files of most others (a tensor an expert).
_OURS = re.compile(r"(?P<layer>.+)\.(?P<part>(?:up|gate|down)(?:_bias)?)")
_STACKED = re.compile(r"(?P<layer>.+\.experts)\.(?P<part>gate_up_proj|down_proj)(?P<bias>_bias)?")
_GRANITE = re.compile(r"(?P<layer>.+\.block_sparse_moe)\.(?P<part>input_linear|output_linear)\.weight")
_SEPARATE = re.compile(r"(?P<layer>.+\.experts)\.(?:expert_)?(?P<expert>\d+)\.(?P<part>\w+)\.(?P<kind>weight|bias)")
_PARTS = {"up_proj": "up", "gate_proj": "gate", "down_proj": "down", "w3": "up", "w1": "gate", "w2": "down"}
_PARTS |= {"wi": "up", "wo": "down"}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class ExpertBanks(Mapping[str, FeedForwardWeights]):
    """Expert layers by name, each read when it is asked for. Made by :func:`open_experts`."""

    def __init__(self, source: str, shapes: Mapping[str, list[int]], read: Callable[[str], Tensor]) -> None:
        self.source, self._shapes, self._read = source, shapes, read
        self._tensors: dict[str, dict] = {}  # layer -> part -> name, or part -> expert -> name
        for name, shape in shapes.items():
            self._place(name, shape)
        self._tensors = {layer: parts for layer, parts in self._tensors.items() if {"up", "down"} <= set(parts)}
        if not self._tensors:
            raise ValueError(
                f"{source}: expected layers of 2 experts or more, with tensors named like <layer>.up [E, h, d],"
                " <layer>.experts.0.up_proj.weight, <layer>.experts.0.w3.weight or <layer>.experts.gate_up_proj,"
                f" found none among {len(shapes)} tensors, such as {list(shapes)[:3]}"
            )

    def _place(self, name: str, shape: list[int]) -> None:
        if (found := _OURS.fullmatch(name)) and shape[0] > 1 and len(shape) == (2 if "bias" in found["part"] else 3):
            self._tensors.setdefault(found["layer"], {})[found["part"]] = name
        elif (found := _STACKED.fullmatch(name)) and len(shape) == (2 if found["bias"] else 3):
            parts = ("gate", "up") if found["part"] == "gate_up_proj" else ("down",)
            names = {part + (found["bias"] or ""): name for part in parts}
            self._tensors.setdefault(found["layer"], {}).update(names)
        elif (found := _GRANITE.fullmatch(name)) and len(shape) == 3:
            parts = ("gate", "up") if found["part"] == "input_linear" else ("down",)
            self._tensors.setdefault(f"{found['layer']}.experts", {}).update(dict.fromkeys(parts, name))
        elif (found := _SEPARATE.fullmatch(name)) and found["part"] in _PARTS:
            part = _PARTS[found["part"]] + ("_bias" if found["kind"] == "bias" else "")
            self._tensors.setdefault(found["layer"], {}).setdefault(part, {})[int(found["expert"])] = name

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, layer: str) -> FeedForwardWeights:
        parts = self._tensors[layer]
        if all(isinstance(at, str) for at in parts.values()):
            return FeedForwardWeights(**{part: self._part(part, at) for part, at in parts.items()})
        return FeedForwardWeights.stack(self.experts(layer))

    def names(self, layer: str) -> list[str]:
        """The tensors that a layer's experts are stored in."""
        found = (at.values() if isinstance(at, dict) else [at] for at in self._tensors[layer].values())
        return list(dict.fromkeys(name for names in found for name in names))

    def experts(self, layer: str) -> list[FeedForwardWeights]:
        """A layer's experts one by one, as they are stored: of a file they are in memory only when they are looked at."""
        parts = self._tensors[layer]
        if all(isinstance(at, str) for at in parts.values()):
            return self[layer].experts()
        count = max(e for experts in parts.values() for e in experts) + 1
        for part, at in parts.items():
            if missing := sorted(set(range(count)) - set(at)):
                raise ValueError(
                    f"{self.source}: {layer}: expected {part} of experts 0 to {count - 1}, found none of {missing[:5]}"
                    " (of a model in several files, give the folder)"
                )
        return [FeedForwardWeights(**{part: self._tensor(at[e]) for part, at in parts.items()}) for e in range(count)]

    def _part(self, part: str, name: str) -> Tensor:
        tensor, which = self._tensor(name), ("gate", "up", "down").index(part.removesuffix("_bias"))
        if not ((found := _STACKED.fullmatch(name)) or _GRANITE.fullmatch(name)):
            return tensor
        joined = part.startswith(("gate", "up"))
        if found and (found["bias"] or f"{name}_bias" in self._shapes):
            tensor = tensor[..., which::2] if joined else tensor
            return tensor if found["bias"] else tensor.mT
        return tensor.chunk(2, dim=1)[which] if joined else tensor

    def _tensor(self, name: str) -> Tensor:
        tensor = self._read(name)
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{self.source}: {name}: expected weights that are not quantised, found {tensor.dtype}")
        return tensor


def open_experts(source: nn.Module | str | Path) -> ExpertBanks:
    """The expert layers of a model in memory, a safetensors file, or a folder of them (one model in several files).

    Layers are named as in the model. Of files only the names and shapes are read here, and a layer's experts when it is
    asked for; a model's are its own tensors, detached.

    Raises:
        FileNotFoundError: no such file, or no safetensors file in the folder.
        ValueError: not a safetensors file, no layer of experts in it; later, a layer of which experts are missing, or
            weights that are quantised.
    """
    if isinstance(source, nn.Module):
        tensors = dict(source.named_parameters())
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        return ExpertBanks(type(source).__name__, shapes, lambda name: tensors[name].detach())

    path = Path(source).expanduser()
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{path}: expected a safetensors file or a folder of them, found none")
    shapes, where = {}, {}
    for file in files:
        try:
            tensors = safe_open(file, "pt")
        except SafetensorError as error:
            raise ValueError(f"{file}: expected a safetensors file, found something else ({error})") from error
        for name in tensors.keys():  # noqa: SIM118  it is no dictionary
            shapes[name], where[name] = tensors.get_slice(name).get_shape(), tensors
    return ExpertBanks(str(path), shapes, lambda name: where[name].get_tensor(name))
