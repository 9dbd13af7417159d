"""Plans the dense twin of a checkpoint from names and shapes, before any tensor is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ones_lib.checkpoints.architectures import Architecture, architecture_of, twin_config
from ones_lib.checkpoints.experts import ExpertBanks
from ones_lib.checkpoints.shards import Shards
from ones_lib.ffn import FeedForwardWeights, count_non_finite
from ones_lib.gathering.registry import check_width
from ones_lib.models.causal import language_class, model_class

ACTIVE = "active"  # the width that a token passes through
_ROUTER = ("gate.", "router.", "moe_statics.")


@dataclass
class Block:
    """What one shard of the twin is made of: a transformer block, or what stands outside of the blocks.

    Args:
        name: such as ``model.layers.3``; empty outside of the blocks.
        copies: names of the tensors that are copied.
        ffn: module of the feed-forward network that is rewritten; empty: there is none.
        sparse: whether that is an MoE layer.
        parts: names of the tensors of the dense network, or of an MoE layer's shared experts, by part.
    """

    name: str
    copies: list[str] = field(default_factory=list)
    ffn: str = ""
    sparse: bool = False
    parts: dict[str, str] = field(default_factory=dict)


def block_of(name: str) -> str:
    """The transformer block of a tensor or module, such as ``model.layers.3``; empty for embeddings and the like."""
    found = re.match(r".*?\.(?:layers|block)\.\d+", name)
    return found[0] if found else ""


class TwinPlan:
    """The dense twin of a checkpoint: its ``config`` and its ``blocks``.

    ``d_ff`` is the width to gather to: a number, or None for one expert's.

    Raises:
        ValueError: ``d_ff`` is not a width of the method, or the checkpoint's tensors do not make the twin.
    """

    def __init__(
        self,
        shards: Shards | Shapes,
        config: PreTrainedConfig,
        architecture: Architecture,
        method: str,
        d_ff: int | str | None,
        k: int | None,
    ) -> None:
        self.shards, self.source_config, self.architecture = shards, config, architecture
        self.banks = ExpertBanks(str(shards.path), shards.shapes, shards.read)
        self.blocks = self._find_blocks()
        experts = self.experts(next(block for block in self.blocks if block.sparse))
        self.num_experts, self.expert_width, self.d_model = len(experts), experts[0].d_ff, experts[0].d_model
        if isinstance(d_ff, str):
            if d_ff != ACTIVE:
                raise ValueError(f"d_ff: expected a number, {ACTIVE!r} or None, found {d_ff!r}")
            d_ff = self.experts_a_token * self.expert_width
        check_width(d_ff, method, self.num_experts, self.expert_width)
        self.d_ff, self.routed_width = d_ff, self.num_experts * k if k else d_ff or self.expert_width
        self.width = max(self.routed_width * b.sparse + self._width(b.parts) for b in self.blocks)
        self.config = twin_config(config, architecture, self.width)
        self.config.architectures = [language_class(self.config).__name__]
        self._check_tensors()

    def _find_blocks(self) -> list[Block]:
        unused = getattr(language_class(self.source_config), "_keys_to_ignore_on_load_unexpected", None) or []
        blocks: dict[str, Block] = {}

        def block_with(name: str) -> Block:
            return blocks.setdefault(block_of(name), Block(block_of(name)))

        def loaded(name: str) -> bool:
            """Whether transformers loads it. Layers beyond the last, which predict further tokens, it does not."""
            if number := re.search(r"\.layers\.(\d+)\.", name):
                beyond = int(number[1]) >= self.source_config.num_hidden_layers
                return not beyond and not name.endswith("rotary_emb.inv_freq")
            return not any(re.search(pattern, name) for pattern in unused)

        for layer in filter(loaded, self.banks):
            block = block_with(layer)
            block.ffn, block.sparse = layer.removesuffix(".experts"), True
        for name in filter(loaded, self.shards.shapes):
            if name not in self.banks.names:
                self._place(name, block_with(name))
        return [blocks[name] for name in sorted(blocks, key=_natural)]

    def _place(self, name: str, block: Block) -> None:
        """Decide what becomes of a tensor that is not a routed expert's."""
        architecture, where = self.architecture, f"{block.ffn}."
        modules = {module: part for part, module in architecture.names.items()}
        module, part = "", ""
        if found := re.fullmatch(rf"(.+)\.({'|'.join(modules)})\.(weight|bias)", name):
            module, part = found[1], modules[found[2]] + ("_bias" if found[3] == "bias" else "")
        if block.sparse and name.startswith(where):
            rest, shared = name.removeprefix(where), architecture.shared
            if shared and module == where + shared:
                block.parts[part] = name
            elif rest.startswith(tuple(f"{kept}." for kept in architecture.kept)):
                block.copies.append(name)
            elif not rest.startswith((*_ROUTER, f"{shared}_gate.") if architecture.mean_gated else _ROUTER):
                raise ValueError(f"{self.shards.path}: expected a router and experts in {block.ffn}, found {rest} too")
        elif module.endswith(".mlp") and not block.sparse and not architecture.one_expert:
            block.ffn, block.parts[part] = module, name
        else:
            block.copies.append(name)

    def _width(self, parts: Mapping[str, str]) -> int:
        return self.shards.shapes[parts["up"]][0] if "up" in parts else 0

    @property
    def experts_a_token(self) -> int:
        """k, the number of experts that a token is sent to."""
        return getattr(self.source_config, "num_experts_per_tok", None) or 1

    def router(self, block: Block) -> tuple[Tensor, Tensor | None]:
        """Weight [E, d] and bias [E] of a sparse block's router."""
        names = [n for n in self.shards.shapes if n.startswith(tuple(f"{block.ffn}.{part}" for part in _ROUTER))]
        sizes = {1: [self.num_experts], 2: [self.num_experts, self.d_model]}
        weight = next(n for n in names if self.shards.shapes[n] == sizes[2])
        bias = weight.removesuffix("weight") + "bias"
        return self.read(weight), self.read(bias) if bias in names else None

    def experts(self, block: Block) -> list[FeedForwardWeights]:
        """The routed experts of a sparse block."""
        return self.banks.experts(f"{block.ffn}.experts")

    def ffn(self, block: Block) -> FeedForwardWeights:
        """The dense network of a block, or the shared experts of a sparse one."""
        return FeedForwardWeights(**{part: self.read(name) for part, name in block.parts.items()})

    def read(self, name: str) -> Tensor:
        """A tensor that is not an expert's; ValueError: it has NaN or infinity."""
        tensor = self.shards.read(name)
        if count := count_non_finite(tensor):
            raise ValueError(f"{self.shards.path}: {name}: expected finite weights, found {count} NaN or infinite")
        return tensor

    def _name(self, module: str, part: str) -> str:
        """Name in the twin of a part of the feed-forward network in ``module``."""
        old, new = self.architecture.rename
        module = f"{module.removesuffix(old)}{new}" if module.endswith(old) else module
        kind = "bias" if part.endswith("_bias") else "weight"
        return f"{module}.{self.architecture.names[part.removesuffix('_bias')]}.{kind}"

    def dense_tensors(self, module: str, ffn: FeedForwardWeights) -> dict[str, Tensor]:
        """The tensors of a feed-forward network by their names in the twin."""
        return {self._name(module, part): tensor for part, tensor in ffn.tensors()}

    def gathered_tensors(self, module: str, ffn: FeedForwardWeights) -> dict[str, Tensor]:
        """The tensors of a gathered network by their names in the twin, with a router of zeros if the twin has one expert."""
        if not self.architecture.one_expert:
            return self.dense_tensors(module, ffn)
        sizes = {"weight": (1, self.d_model), "bias": (1,)}
        router = {f"{module}.{n}": ffn.up.new_zeros(sizes[n.split(".")[-1]]) for n in self.architecture.one_expert}
        if not self.architecture.gpt_oss:
            return router | self.dense_tensors(f"{module}.experts.0", ffn)
        both = torch.stack([ffn.gate, ffn.up], dim=1).flatten(0, 1)  # gate and up interleaved, [2h, d]
        stacked = {"gate_up_proj": both.T, "down_proj": ffn.down.T, "down_proj_bias": ffn.down_bias}
        stacked["gate_up_proj_bias"] = torch.stack([ffn.gate_bias, ffn.up_bias], dim=1).flatten()
        return router | {f"{module}.experts.{name}": tensor[None].contiguous() for name, tensor in stacked.items()}

    def _check_tensors(self) -> None:
        """Raise ValueError unless the tensors to be written are the twin's, with their shapes; set ``bytes``, their size."""
        with torch.device("meta"):
            twin = model_class(self.config).from_config(self.config)
        self.bytes = sum(t.numel() * (self.config.dtype or torch.float32).itemsize for t in twin.parameters())
        expected = {name: list(tensor.shape) for name, tensor in twin.state_dict().items()}
        tied = set(twin.all_tied_weights_keys) if self.config.tie_word_embeddings else set()
        made = {name: self.shards.shapes[name] for block in self.blocks for name in block.copies}
        for block in self.blocks:
            if block.ffn and self.architecture.one_expert:  # in memory these have other names than in files
                expected = {n: s for n, s in expected.items() if not n.startswith(f"{block.ffn}.") or n in made}
            elif block.ffn:
                made |= self._ffn_shapes(block)
        missing = sorted(set(expected) - set(made) - tied)
        wrong = [f"{n} {made[n]}" for n in made if expected.get(n, made[n] if n in tied else None) != made[n]]
        if missing or wrong:
            raise ValueError(
                f"{self.shards.path}: expected the tensors of {self.config.architectures[0]}, missing: {missing[:5]},"
                f" unknown or of another shape: {wrong[:5]}"
            )

    def _ffn_shapes(self, block: Block) -> dict[str, list[int]]:
        h, d = self.width, self.d_model
        shapes = {"up": [h, d], "gate": [h, d], "down": [d, h], "up_bias": [h], "gate_bias": [h], "down_bias": [d]}
        parts = [*(self.architecture.names if block.sparse else []), *block.parts]
        return {self._name(block.ffn, part): shapes[part] for part in parts}


class Shapes:
    """What a model's checkpoint would hold, without the tensors; for a plan."""

    def __init__(self, config: PreTrainedConfig) -> None:
        with torch.device("meta"):
            model = model_class(config).from_config(config)
        self.path = config.model_type
        self.shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}

    def read(self, name: str) -> Tensor:
        """The tensor on the device ``meta``."""
        return torch.empty(self.shapes[name], device="meta")


def dense_config(config: PreTrainedConfig, d_ff: int | str | None) -> PreTrainedConfig:
    """The config of an MoE's dense twin with its routed experts gathered to ``d_ff``, as in :class:`TwinPlan`."""
    architecture = architecture_of(config, config.model_type)
    return TwinPlan(Shapes(config), config, architecture, "topk", d_ff, None).config


def _natural(text: str) -> list:
    """Sort key by which layer 10 comes after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
