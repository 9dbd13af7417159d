"""A checkpoint's tensors by the names that transformers gives them in memory.

Files have names and layouts of their own: a tensor per expert, other module names, matrices joined or split. Transformers has
renamings and converters for every type (``transformers.conversion_mapping``). Here they run lazily: nothing is read until it is
asked for, and the experts of a layer stay apart where they are stored one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from ones_lib.checkpoints.quantised import Dequantised, readable
from ones_lib.checkpoints.shards import Shards
from ones_lib.ffn import count_non_finite

# Parts of names of tensors that transformers does not load: of layers that predict further tokens, and what it computes itself.
_DROPPED = re.compile(
    r"(^|\.)mtp(\.|_)|\.(rotary_emb\.)?(original_)?inv_freq$|\.eh_proj\.|\.enorm\.|\.hnorm\.|\.shared_head\."
)


def spare_tensors(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether a tensor in the files, by its name there, is one that transformers does not load into ``model``: of layers that
    predict further tokens, or what it computes itself."""
    transforms = get_model_conversion_mapping(model)
    renamings, converters = (
        [t for t in transforms if isinstance(t, kind)] for kind in (WeightRenaming, WeightConverter)
    )
    expected, ignored = model.state_dict(), model._keys_to_ignore_on_load_unexpected or []
    last = max((int(n) for name in expected for n in re.findall(r"layers\.(\d+)\.", name)), default=-1)

    def spare(name: str) -> bool:
        known, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if known in expected or name in expected:
            return False
        beyond = (found := re.search(r"layers\.(\d+)\.", name)) and int(found[1]) > last
        return bool(beyond or _DROPPED.search(name) or any(re.search(pattern, name) for pattern in ignored))

    return spare


def open_checkpoint(folder: Path, config: PreTrainedConfig, model: PreTrainedModel) -> Shards | Dequantised:
    """The tensors of a checkpoint with this config, and the empty ``model`` that it is of. All that converts or runs a checkpoint
    reads it so: the same files as transformers, quantised or not.

    Raises:
        FileNotFoundError: there are no files, or one is missing that the model needs.
        ValueError: see :class:`Shards` and :class:`Dequantised`.
    """
    return readable(Shards(folder, spare_tensors(model)), config)


class StoredModel:
    """The tensors of a checkpoint as ``model``, which may be empty, has them.

    Names are those of the model's state dict. Only the experts of the modules ``apart``, if they are stored one by one, are named
    ``<module>.<e>.gate_proj.weight`` and so on, as most files do. ``shapes`` has all names, ``dropped`` the names in the files, or
    in the index of files that are not there, of what transformers does not load either.

    Raises:
        ValueError: there are tensors that the model hasn't.
    """

    def __init__(self, shards: Shards, model: PreTrainedModel, apart: Collection[str]) -> None:
        self.path, self.shards, self.model, self._apart = shards.path, shards, model, apart
        self.shapes: dict[str, list[int]] = {}
        self.dropped: list[str] = []
        self._files: dict[str, str] = {}  # name in the files of what is only renamed
        self._converted: dict[str, tuple[WeightConverter, list[tuple[str, str]]]] = {}  # what is computed of others
        self._sources: dict[str, str] = {}  # by name: of which entry there it is computed
        self._stacks: dict[
            str, dict[int, list[str]]
        ] = {}  # of experts stored one by one: by expert, gate and up or down
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._parameters = {name for name, _ in model.named_parameters()}
        self._expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        unknown = [name for name in sorted(shards.shapes, key=dot_natural_key) if not self._place(name)]
        self._check(unknown)

    def _place(self, name: str) -> bool:
        """Find out what a tensor of the files is in memory; whether the model has it."""
        found, pattern = self._in_memory(name, self._renamings, self._converters)
        if found not in self._expected and name in self._expected:  # a file with the names in memory
            found, pattern = self._in_memory(name, [], [])
        if found not in self._expected:
            return False
        if pattern is None:
            self._files[found], self.shapes[found] = name, self.shards.shapes[name]
            return True
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        if found.rpartition(".")[0] in self._apart and (part := self._expert_part(found, converter, pattern)):
            expert = re.findall(r"\.(\d+)\.", name)[-1]
            single = f"{found.rpartition('.')[0]}.{expert}.{part}.weight"
            self._files[single], self.shapes[single] = name, self.shards.shapes[name]
            self._stacks.setdefault(found, {}).setdefault(int(expert), []).append(single)
        else:
            self._converted.setdefault(found, (converter, []))[1].append((pattern, name))
        return True

    def _in_memory(self, name: str, renamings: list, converters: list) -> tuple[str, str | None]:
        return rename_source_key(name, renamings, converters, self.model.base_model_prefix, self._expected)

    @staticmethod
    def _expert_part(name: str, converter: WeightConverter, pattern: str) -> str:
        """Which matrix of an expert a pattern stands for, if the converter does no more than stack experts."""
        kinds = [type(operation) for operation in converter.operations]
        parts = {"gate_up_proj": ["gate_proj", "up_proj"], "up_proj": ["up_proj"], "down_proj": ["down_proj"]}
        parts = parts.get(name.rpartition(".")[2], [])
        if kinds != [MergeModulelist, Concatenate][: len(parts)] or len(converter.source_patterns) != len(parts):
            return ""
        return parts[converter.source_patterns.index(pattern)]

    def _check(self, unknown: list[str]) -> None:
        left_out = spare_tensors(self.model)
        self.dropped = [*filter(left_out, unknown), *self.shards.absent]
        if odd := [f"{name} {self.shards.shapes[name]}" for name in unknown if not left_out(name)]:
            raise ValueError(
                f"{self.path}: expected the tensors of {type(self.model).__name__}, found others: {odd[:5]}"
            )
        for source in self._converted:
            made = self._convert(source, lambda file: torch.empty(self.shards.shapes[file], device="meta"))
            self.shapes |= {name: list(tensor.shape) for name, tensor in made.items()}
            self._sources |= dict.fromkeys(made, source)

    def check(self) -> None:
        """Raise ValueError unless all that the model has is there, in its shape. What it ties to others need not be."""
        tied, found = set(self.model.all_tied_weights_keys), dict(self.shapes)
        for name, experts in self._stacks.items():
            found[name] = self._stacked_shape(experts)
        wrong = [f"{n} {found[n]}, not {shape}" for n, shape in self._expected.items() if found.get(n, shape) != shape]
        missing = [name for name in self._expected if name not in found and name not in tied]
        if missing or wrong:
            raise ValueError(
                f"{self.path}: expected the tensors of {type(self.model).__name__}, missing: {missing[:5]}, of another shape:"
                f" {wrong[:5]} (of a model in several files, give the folder)"
            )

    def _stacked_shape(self, experts: Mapping[int, list[str]]) -> list[int]:
        """The stack's shape; just [E] if experts are missing or differ."""
        shapes = [[self.shapes[single] for single in singles] for singles in experts.values()]
        if max(experts) + 1 != len(experts) or any(shape != shapes[0] for shape in shapes):
            return [len(experts)]  # there are gaps
        rows = sum(self.shapes[single][0] for single in experts[0])
        return [len(experts), rows, *self.shapes[experts[0][0]][1:]]

    def _convert(self, name: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """What a converter makes of its tensors."""
        converter, sources = self._converted[name]
        converter = deepcopy(converter)
        for pattern, file in sources:
            converter.add_tensor(name, file, pattern, lambda file=file: read(file))
        made = converter.convert(name, model=self.model, config=self.model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.shapes or name in self._stacks

    def read(self, name: str) -> Tensor:
        """A tensor, mapped from its file where it is only renamed. Experts stored one by one can be read stacked."""
        if name in self._files:
            return self.shards.read(self._files[name])
        if name in self._stacks:
            return self._stack(name)
        return self._convert(self._sources[name], self.shards.read)[name]

    def _stack(self, name: str) -> Tensor:
        """Copied expert by expert, so that no more than the stack is in memory."""
        experts, stacked = self._stacks[name], None
        for expert, singles in experts.items():
            parts = [self.read(single) for single in sorted(singles, key=lambda n: ".up_proj." in n)]
            if stacked is None:
                stacked = torch.empty(self._expected[name], dtype=parts[0].dtype)
            for part, place in zip(parts, stacked[expert].chunk(len(parts)), strict=True):
                place.copy_(part)
        return stacked

    def read_finite(self, name: str) -> Tensor:
        """A tensor; ValueError: it is a parameter that has NaN or infinity. A buffer may: limits of a range, for example."""
        tensor = self.read(name)
        if name in self._parameters and (count := count_non_finite(tensor)):
            raise ValueError(f"{self.path}: {name}: expected finite weights, found {count} NaN or infinite")
        return tensor


def in_files(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ``model``, which may be empty, by the names and in the layout that its files have."""
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, dict(tensors)).items()}
