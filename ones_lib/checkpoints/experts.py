"""The experts of an MoE by layer, from a model in memory or from safetensors files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from ones_lib.checkpoints.layers import LINEAR
from ones_lib.checkpoints.quantised import Dequantised, declared_beside
from ones_lib.checkpoints.shards import Shards
from ones_lib.checkpoints.stored import spare_tensors
from ones_lib.ffn import FeedForwardWeights
from ones_lib.models.causal import empty_model, experts_modules, model_config, read_json

# Names of expert tensors:
# - this library's: all experts in one tensor a part, "up" [E, h, d], "down" [E, d, h], ...;
# - transformers' in memory, and Granite's files: all experts in one tensor, see :class:`Layout`;
# - most files: a tensor an expert.
_OURS = re.compile(r"(?P<layer>.+)\.(?P<part>(?:up|gate|down)(?P<bias>_bias)?)")
_STACKED = re.compile(
    r"(?P<module>.+)\.(?:(?:experts\.)(?P<name>gate_up_proj|up_proj|down_proj)|(?P<linear>input|output)_linear\.weight)"
    r"(?P<bias>_bias)?"
)
_SEPARATE = re.compile(r"(?P<layer>.+\.experts)\.(?:expert_)?(?P<expert>\d+)\.(?P<part>\w+)\.(?P<kind>weight|bias)")
_PARTS = {name: parts[0] for name, parts in LINEAR.items() if len(parts) == 1}


@dataclass(frozen=True)
class Layout:
    """How transformers stacks a layer's experts: ``gate_up_proj`` [E, 2h, d], or ``up_proj`` [E, h, d] without a gate, and
    ``down_proj`` [E, d, h], each perhaps with a ``..._bias``.

    Args:
        transposed: matrices are [E, d, 2h] and [E, h, d].
        interleaved: units of gate and up take turns; else gate is above up.
    """

    transposed: bool = False
    interleaved: bool = False

    @classmethod
    def of(cls, experts: nn.Module) -> Layout:
        """That of a module of experts."""
        transposed = getattr(experts, "is_transposed", None)
        if transposed is None and hasattr(experts, "gate_up_proj"):
            transposed = experts.gate_up_proj.shape[2] == 2 * experts.down_proj.shape[1]
        return cls(bool(transposed), not getattr(experts, "is_concatenated", True))

    def part(self, name: str, stored: Tensor) -> Tensor:
        """``gate`` or ``up``, or its bias, out of the tensor that holds both; of ``down`` all of it."""
        bias = name.endswith("_bias")
        stored = stored.mT if self.transposed and not bias else stored
        half = {"gate": 0, "up": 1}.get(name.removesuffix("_bias"))
        if half is None:
            return stored
        return stored[:, half::2] if self.interleaved else stored.chunk(2, dim=1)[half]

    def joined(self, bank: FeedForwardWeights) -> dict[str, Tensor]:
        """A bank's tensors as they are stacked."""
        parts, stacked = dict(bank.tensors()), {}
        for bias in ("", "_bias"):
            if f"gate{bias}" in parts:
                both = parts.pop(f"gate{bias}"), parts.pop(f"up{bias}")
                joined = torch.stack(both, dim=2).flatten(1, 2) if self.interleaved else torch.cat(both, dim=1)
                parts[f"gate_up{bias}"] = joined
            for name in [name for name in parts if name.endswith("_bias") == bool(bias)]:
                tensor = parts[name].mT if self.transposed and not bias else parts[name]
                stacked[f"{name.removesuffix('_bias')}_proj{bias}"] = tensor.contiguous()
        return stacked


GPT_OSS = Layout(transposed=True, interleaved=True)


class ExpertBanks(Mapping[str, FeedForwardWeights]):
    """Banks of experts by layer, each read when it is asked for. :func:`open_experts` makes one.

    Args:
        source: its name in errors.
        shapes: of all tensors, by name.
        read: returns a tensor by name.
        layouts: of stacked layers. Of one that is not there: with biases it is GPT-OSS's, else the usual one.
    """

    def __init__(
        self,
        source: str,
        shapes: Mapping[str, list[int]],
        read: Callable[[str], Tensor],
        layouts: Mapping[str, Layout] | None = None,
    ) -> None:
        self.source, self._shapes, self._read, self._layouts = source, shapes, read, layouts or {}
        # layer -> part -> name of the tensor with all experts, or names by expert
        self._layers: dict[str, dict[str, str | dict[int, str]]] = {}
        self.names: set[str] = set()  # of the tensors that hold experts
        for name, shape in shapes.items():
            self._place(name, shape)
        self._layers = {layer: parts for layer, parts in self._layers.items() if {"up", "down"} <= set(parts)}
        if not self._layers:
            raise ValueError(
                f"{source}: expected layers of 2 experts or more, with tensors named like <layer>.up [E, h, d],"
                " <layer>.experts.0.up_proj.weight, <layer>.experts.0.w3.weight or <layer>.experts.gate_up_proj,"
                f" found none among {len(shapes)} tensors, such as {list(shapes)[:3]}"
            )

    def _place(self, name: str, shape: list[int]) -> None:
        if (found := _SEPARATE.fullmatch(name)) and found["part"] in _PARTS:
            part = _PARTS[found["part"]] + ("_bias" if found["kind"] == "bias" else "")
            self._layers.setdefault(found["layer"], {}).setdefault(part, {})[int(found["expert"])] = name
        elif (found := _STACKED.fullmatch(name)) and len(shape) == (2 if found["bias"] else 3):
            matrix = found["name"] or {"input": "gate_up_proj", "output": "down_proj"}[found["linear"]]
            names = {f"{part}{found['bias'] or ''}": name for part in matrix.removesuffix("_proj").split("_")}
            self._layers.setdefault(f"{found['module']}.experts", {}).update(names)
        elif (found := _OURS.fullmatch(name)) and len(shape) == (2 if found["bias"] else 3) and shape[0] > 1:
            self._layers.setdefault(found["layer"], {})[found["part"]] = name
        else:
            return
        self.names.add(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __contains__(self, layer: object) -> bool:
        return layer in self._layers  # a mapping's own would read the bank

    def __getitem__(self, layer: str) -> FeedForwardWeights:
        """The bank of a layer."""
        parts = self._layers[layer]
        if any(isinstance(stored, dict) for stored in parts.values()):
            return FeedForwardWeights.stack(self.experts(layer))
        return FeedForwardWeights(**{part: self._stacked(layer, part, name) for part, name in parts.items()})

    def experts(self, layer: str) -> list[FeedForwardWeights]:
        """The experts of a layer one by one, without a copy: those of files are mapped.

        Raises:
            ValueError: an expert is missing, or weights are quantised.
        """
        parts = self._layers[layer]
        if all(isinstance(stored, str) for stored in parts.values()):
            return self[layer].experts()
        count = max(e for stored in parts.values() for e in stored) + 1
        for part, stored in parts.items():
            if missing := sorted(set(range(count)) - set(stored)):
                raise ValueError(
                    f"{self.source}: {layer}: expected {part} of experts 0 to {count - 1}, found none of {missing[:5]}"
                    " (of a model in several files, give the folder)"
                )
        return [FeedForwardWeights(**{part: self._read(parts[part][e]) for part in parts}) for e in range(count)]

    def _stacked(self, layer: str, part: str, name: str) -> Tensor:
        """A part of all experts, cut out of the tensor that holds it."""
        tensor, found, parts = self._read(name), _STACKED.fullmatch(name), self._layers[layer]
        if not found:
            return tensor
        layout = self._layouts.get(layer, GPT_OSS if "up_bias" in parts else Layout())
        if part.startswith("up") and "gate" not in parts:  # alone in its tensor
            return tensor.mT if layout.transposed and not found["bias"] else tensor
        return layout.part(part, tensor)


def open_experts(source: nn.Module | str | Path) -> ExpertBanks:
    """The banks of experts of a model in memory, a safetensors file, or a folder of them, by layer.

    Layers are named as in the model. Of files only headers are read here, and a layer's experts when they are asked
    for. A model's banks are its own parameters, detached.

    Raises:
        FileNotFoundError: there is no such file, or no safetensors file in the folder.
        ValueError: not a safetensors file, or no layer of experts in it; later, when a layer is read, see
            :meth:`ExpertBanks.experts`.
    """
    if isinstance(source, nn.Module):
        tensors = {name: parameter.detach() for name, parameter in source.named_parameters()}
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        layouts = {name: Layout.of(module) for name, module in experts_modules(source).items()}
        return ExpertBanks(type(source).__name__, shapes, tensors.__getitem__, layouts)
    path = Path(source).expanduser()
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    known = str(config.get("model_type")) in CONFIG_MAPPING
    shards = Shards(path, _spare(path) if known else lambda name: False)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    found = [part["quantization_config"] for part in parts if part.get("quantization_config")]
    shards = Dequantised(shards, found[0]) if found else declared_beside(shards)
    return ExpertBanks(str(shards.path), shards.shapes, shards.read)


def _spare(folder: Path) -> Callable[[str], bool]:
    """:func:`spare_tensors` of a checkpoint; its model is made when it is first asked for, which is rare."""
    model = cache(lambda: spare_tensors(empty_model(model_config(folder))))
    return lambda name: model()(name)
