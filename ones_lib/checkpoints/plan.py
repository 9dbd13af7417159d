"""What the shards of a checkpoint's dense twin are made of, decided from names and shapes before any tensor is read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from ones_lib.checkpoints.architectures import Architecture, Config, twin_config
from ones_lib.checkpoints.experts import ExpertBanks
from ones_lib.checkpoints.shards import Shards
from ones_lib.ffn import FeedForwardWeights, count_non_finite
from ones_lib.gathering.registry import check_width
from ones_lib.models.causal import language_class, model_class

_ROUTER = ("gate.", "router.", "moe_statics.")


def _module_of(layer: str) -> str:
    """The module that holds a layer's router and experts."""
    return layer.removesuffix(".experts")


def block_of(name: str) -> str:
    """The transformer block that a tensor or module belongs to; empty for embeddings and the like."""
    found = re.match(r".*?\.(?:layers|block)\.\d+", name)
    # In T5's blocks the feed-forward network is one of several numbered layers.
    return found[0] if found else ""


def _natural(text: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


class TwinPlan:
    """What each shard of the twin is made of, and the twin's configuration."""

    def __init__(
        self, shards: Shards, config: Config, architecture: Architecture, method: str, d_ff: int | None, k: int | None
    ) -> None:
        self.shards, self.architecture = shards, architecture
        self.ignored = getattr(language_class(config), "_keys_to_ignore_on_load_unexpected", [])
        self.num_blocks = config.num_hidden_layers
        self.banks = ExpertBanks(str(shards.folder), shards.shapes, shards.read)
        self.modules = {_module_of(layer): layer for layer in self.banks if not self._dropped(layer)}
        stored = {name for layer in self.banks for name in self.banks.names(layer)}
        self.copies: dict[str, list[str]] = defaultdict(list)  # block -> names
        self.dense: dict[str, dict[str, str]] = defaultdict(dict)  # module -> part of its FFN -> name
        self.shared: dict[str, dict[str, str]] = defaultdict(dict)  # MoE module -> part of its shared experts -> name
        for name in shards.shapes:
            if name not in stored and not self._dropped(name):
                self._place(name)
        experts = self.experts(next(iter(self.modules)))
        self.num_experts, self.expert_width, self.d_model = len(experts), experts[0].d_ff, experts[0].d_model
        check_width(d_ff, method, self.num_experts, self.expert_width)
        self.routed_width = self.num_experts * k if k else d_ff or self.expert_width
        self.width = self.routed_width
        if not architecture.one_expert:
            joined = [self._width(parts) for parts in self.shared.values()] or [0]
            self.width = max(self.routed_width + max(joined), *map(self._width, self.dense.values()), 0)
        self.config = twin_config(config, architecture, self.width)
        self.config.architectures = [language_class(self.config).__name__]
        self._check_names()

    def _dropped(self, name: str) -> bool:
        """Layers beyond the last, for the prediction of more than one token, and what else transformers does not load."""
        if number := re.search(r"\.layers\.(\d+)\.", name):
            return int(number[1]) >= self.num_blocks or name.endswith("rotary_emb.inv_freq")
        return any(re.search(pattern, name) for pattern in self.ignored or [])

    def _place(self, name: str) -> None:
        names = {module: part for part, module in self.architecture.names.items()}
        found = re.fullmatch(rf"(?P<module>.+)\.(?P<part>{'|'.join(names)})\.(?P<kind>weight|bias)", name)
        part = names[found["part"]] + ("_bias" if found["kind"] == "bias" else "") if found else ""
        prefixes = (name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1))
        module = next((prefix for prefix in prefixes if prefix in self.modules), None)
        if module is None:
            if part and found["module"].endswith(".mlp") and not self.architecture.one_expert:
                self.dense[found["module"]][part] = name
            else:
                self.copies[block_of(name)].append(name)
            return
        rest, architecture = name[len(module) + 1 :], self.architecture
        joined = architecture.shared or architecture.mean_gated
        if joined and part and found["module"] == f"{module}.{joined}":
            self.shared[module][part] = name
        elif rest.startswith(tuple(f"{kept}." for kept in architecture.kept)):
            self.copies[block_of(name)].append(name)
        elif not rest.startswith((*_ROUTER, f"{architecture.mean_gated}_gate.")):
            raise ValueError(f"{self.shards.folder}: expected a router and experts in {module}, found {rest} too")

    def _width(self, parts: Mapping[str, str]) -> int:
        return self.shards.shapes[parts["up"]][0]

    def experts(self, module: str) -> list[FeedForwardWeights]:
        return self.banks.experts(self.modules[module])

    def ffn(self, parts: Mapping[str, str]) -> FeedForwardWeights:
        return FeedForwardWeights(**{part: self.read(name) for part, name in parts.items()})

    def read(self, name: str) -> Tensor:
        """A tensor that is not an expert's."""
        tensor = self.shards.read(name)
        if count := count_non_finite(tensor):
            raise ValueError(f"{self.shards.folder}: {name}: expected finite weights, found {count} NaN or infinite")
        return tensor

    def blocks(self) -> list[str]:
        found = {*self.copies, *map(block_of, self.modules), *map(block_of, self.dense)}
        return sorted(found, key=_natural)

    def twin_module(self, module: str) -> str:
        old, new = self.architecture.rename
        return f"{module.removesuffix(old)}{new}" if old and module.endswith(old) else module

    def dense_tensors(self, module: str, ffn: FeedForwardWeights) -> dict[str, Tensor]:
        """A feed-forward network's tensors by their names in the twin."""
        names = self.architecture.names
        return {
            f"{self.twin_module(module)}.{names[part.removesuffix('_bias')]}"
            f".{'bias' if part.endswith('_bias') else 'weight'}": tensor
            for part, tensor in ffn.tensors()
        }

    def moe_tensors(self, module: str, ffn: FeedForwardWeights) -> dict[str, Tensor]:
        """The same of what was gathered, with the router of one expert where the twin has that."""
        if not self.architecture.one_expert:
            return self.dense_tensors(module, ffn)
        sizes = {"weight": (1, self.d_model), "bias": (1,)}
        router = {f"{module}.{n}": ffn.up.new_zeros(sizes[n.split(".")[-1]]) for n in self.architecture.one_expert}
        if not self.architecture.interleaved:
            return router | self.dense_tensors(f"{module}.experts.0", ffn)
        both = torch.stack([ffn.gate, ffn.up], dim=1).flatten(0, 1)  # gate and up by turns, [2h, d]
        stacked = {"gate_up_proj": both.T, "down_proj": ffn.down.T, "down_proj_bias": ffn.down_bias}
        stacked["gate_up_proj_bias"] = torch.stack([ffn.gate_bias, ffn.up_bias], dim=1).flatten()
        return router | {f"{module}.experts.{name}": tensor[None].contiguous() for name, tensor in stacked.items()}

    def _check_names(self) -> None:
        """Raise ValueError unless the twin has the tensors that will be written, all of their shapes."""
        with torch.device("meta"):
            twin = model_class(self.config).from_config(self.config)
        state = {name: list(tensor.shape) for name, tensor in twin.state_dict().items()}
        tied = set(twin.all_tied_weights_keys) if self.config.tie_word_embeddings else set()
        self.bytes = sum(t.numel() * self.config.dtype.itemsize for t in twin.parameters())
        made = {name: self.shards.shapes[name] for names in self.copies.values() for name in names}
        for module, parts in self.dense.items():
            made |= self._dense_shapes(module, "up_bias" in parts, "down_bias" in parts)
        for module in self.modules:
            parts = self.shared.get(module, {})
            if not self.architecture.one_expert:
                made |= self._dense_shapes(module, "up_bias" in parts, "down_bias" in parts)
            else:
                state = {n: s for n, s in state.items() if not n.startswith(f"{module}.") or n in made}
        missing = sorted(set(state) - set(made) - tied)
        wrong = [f"{n} {made[n]}" for n in made if state.get(n, made[n] if n in tied else None) != made[n]]
        if missing or wrong:
            raise ValueError(
                f"{self.shards.folder}: expected the tensors of {self.config.architectures[0]}, missing: {missing[:5]}, of"
                f" another shape or not known to it: {wrong[:5]}"
            )

    def _dense_shapes(self, module: str, bias: bool, down_bias: bool) -> dict[str, list[int]]:
        """Names and shapes of a feed-forward network in the twin."""

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device="meta")

        gated, width, d_model = "gate" in self.architecture.names, self.width, self.d_model
        ffn = FeedForwardWeights(
            up=empty(width, d_model),
            down=empty(d_model, width),
            gate=empty(width, d_model) if gated else None,
            up_bias=empty(width) if bias else None,
            gate_bias=empty(width) if bias and gated else None,
            down_bias=empty(d_model) if down_bias else None,
        )
        return {name: list(tensor.shape) for name, tensor in self.dense_tensors(module, ffn).items()}
