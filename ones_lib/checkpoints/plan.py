"""Plans the dense twin of a checkpoint from names and shapes, before any tensor is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils.logging import tqdm

from ones_lib.calibration import Activation, LayerActivations
from ones_lib.checkpoints.architectures import ONE_EXPERT, Architecture
from ones_lib.checkpoints.experts import ExpertBanks, Layout
from ones_lib.checkpoints.layers import ffn_parts
from ones_lib.checkpoints.shards import Shards
from ones_lib.checkpoints.stored import StoredModel, in_files
from ones_lib.ffn import FeedForwardWeights, count_non_finite
from ones_lib.gathering.registry import Sizes, check_values, checked_experts
from ones_lib.models.causal import activation_of, block_of, if_float16

ACTIVE = "active"  # the width that a token passes through


@dataclass
class Block:
    """What one shard of the twin is made of: a transformer block, or what stands outside of the blocks.

    Args:
        name: such as ``model.layers.3``; empty outside of the blocks.
        copies: by name in the twin, names in the MoE of the tensors that are copied.
        experts: module of the routed experts that are gathered; empty: there are none.
        ffn: module in the MoE of the network that is rewritten: an MoE layer, or a dense network that gets wider.
        target: the module in the twin that takes its place; in a twin with one expert, its experts.
        shared: module of the shared experts that are joined to the gathered network.
    """

    name: str
    copies: dict[str, str] = field(default_factory=dict)
    experts: str = ""
    ffn: str = ""
    target: str = ""
    shared: str = ""

    @property
    def sparse(self) -> bool:
        """Whether it has an MoE layer that is gathered."""
        return bool(self.experts)


class TwinPlan:
    """The dense twin of a checkpoint: its ``config``, its ``blocks``, and ``dropped``, names of tensors that are left out.

    ``d_ff``, the gathered width: a number, ``"active"`` (k experts'), or None for one expert's. ``options`` are the method's.

    Raises:
        ValueError: ``d_ff`` is not a width of the method, an option is out of range, or the checkpoint's tensors do not make the
            twin.
    """

    def __init__(
        self,
        shards: Shards | Shapes,
        architecture: Architecture,
        method: str,
        d_ff: int | str | None,
        options: Mapping | None = None,
    ) -> None:
        self.shards, self.architecture, self.source_config = shards, architecture, architecture.config
        self.stored = StoredModel(shards, architecture.model, architecture.experts)
        self.stored.check()
        layouts = {name: Layout.of(module) for name, module in architecture.experts.items()}
        self.banks = ExpertBanks(str(shards.path), self._expert_shapes(), self.stored.read, layouts)
        self.names = [name for name in architecture.experts if name in self.banks]  # others are tied to these
        first = ExpertBanks(str(shards.path), self._expert_shapes(), self._empty, layouts).experts(self.names[0])
        self.num_experts, self.expert_width, self.d_model = len(first), first[0].d_ff, first[0].d_model
        if isinstance(d_ff, str):
            d_ff = round(active_multiple(d_ff) * self.experts_a_token * self.expert_width)
        options = options or {}
        check_values(method, options, Sizes(self.num_experts, self.expert_width, self.d_model, d_ff))
        k = options.get("k")
        self.d_ff, self.routed_width = d_ff, self.num_experts * k if k else d_ff or self.expert_width
        self.width = self._full_width()
        self.twin = architecture.twin(self.width)
        self.config, self.dropped = self.twin.config, self.stored.dropped
        self.blocks = self._find_blocks()

    def _expert_shapes(self) -> dict[str, list[int]]:
        layers = tuple(f"{name}." for name in self.architecture.experts)
        return {name: shape for name, shape in self.stored.shapes.items() if name.startswith(layers)}

    def _empty(self, name: str) -> Tensor:
        """A tensor without data."""
        return torch.empty(self.stored.shapes[name], device="meta")

    def _full_width(self) -> int:
        """Of the twin's layers: the gathered networks with shared experts, and not less than layers that are dense already."""
        architecture = self.architecture
        if architecture.kind == ONE_EXPERT:
            count, each = architecture.spread(self.routed_width)
            return count * each
        shared = [architecture.shared(name) for name in architecture.experts]
        widths = [self.routed_width + self._width(module) for module in shared]
        sites = {architecture.site(name).rpartition(".")[2] for name in architecture.experts}
        stacks = {block_of(name).rpartition(".")[0] for name in architecture.experts}
        for name, module in architecture.model.named_modules():
            stack, _, last = block_of(name).rpartition(".")[0], *name.rpartition(".")[1:]
            if last in sites and stack in stacks and ffn_parts(module):
                widths.append(self._width(name))
        return max(widths)

    def _width(self, module: str) -> int:
        """Hidden units of a dense network of the MoE; 0 for no module."""
        return self.ffn_of(module, meta=True).d_ff if module else 0

    def _find_blocks(self) -> list[Block]:
        """Everything that the twin has, and where it comes from."""
        blocks: dict[str, Block] = {}
        targets = {self.architecture.target(name): name for name in self.names}
        dense = self._dense_networks(targets)
        routers = {n for name in targets.values() for n in self.architecture.router(self.twin, name)}
        for target, experts in targets.items():
            block = blocks.setdefault(block_of(target), Block(block_of(target)))
            block.experts, block.target, block.ffn = experts, target, self.architecture.site(experts)
            if self.architecture.kind != ONE_EXPERT:
                block.shared = self.architecture.shared(experts)
        made = {f"{target}.{name}" for target in targets for name in self._made_in(target)}
        missing = []
        for name, tensor in self.twin.state_dict().items():
            block = blocks.setdefault(block_of(name), Block(block_of(name)))
            source = self.architecture.source_name(name)
            if (module := name.rpartition(".")[0].rpartition(".")[0]) in dense:
                block.target, block.ffn = module, self.architecture.source_name(module)
            elif name in routers or name in made:
                continue
            elif source in self.stored.shapes:
                block.copies[name] = source
                if self.stored.shapes[source] != list(tensor.shape):
                    missing.append(f"{name} {list(tensor.shape)}")
            elif name not in self._tied:
                missing.append(name)
        self._check_all(missing, blocks)
        return [blocks[name] for name in sorted(blocks, key=_natural)]

    def _made_in(self, target: str) -> list[str]:
        """Names of the tensors in a module of the twin that hold a gathered network: all but norms."""
        names = [name for name, _ in self.twin.get_submodule(target).named_parameters()]
        return [name for name in names if "norm" not in name]

    def _dense_networks(self, targets: Mapping[str, str]) -> set[str]:
        """Networks that are dense already and get wider."""
        if self.architecture.kind == ONE_EXPERT:
            return set()
        found, shapes = set(), self.stored.shapes
        for name, module in self.twin.named_modules():
            if name in targets or not ffn_parts(module):
                continue
            source = self.architecture.source_name(name)
            parts = {f"{source}.{part}": list(t.shape) for part, t in module.named_parameters()}
            if parts.keys() <= shapes.keys() and any(shapes[part] != shape for part, shape in parts.items()):
                found.add(name)
        return found

    @property
    def _tied(self) -> set[str]:
        return set(self.twin.all_tied_weights_keys)

    def _check_all(self, missing: list[str], blocks: Mapping[str, Block]) -> None:
        """Raise ValueError unless every tensor of the twin is there, and every tensor of the MoE is used or in an MoE layer."""
        self.bytes = sum(t.numel() * (self.config.dtype or torch.float32).itemsize for t in self.twin.parameters())
        used = {name for block in blocks.values() for name in block.copies.values()}
        rewritten = [module for block in blocks.values() for module in (block.ffn, block.shared) if module]
        inside = tuple(f"{module}." for module in rewritten)
        lost = [name for name in self.stored.shapes if name not in used and not name.startswith(inside)]
        lost = [name for name in lost if name not in self.architecture.model.all_tied_weights_keys]
        if missing or lost:
            raise ValueError(
                f"{self.shards.path}: expected the tensors of {self.config.architectures[0]}, missing: {missing[:5]},"
                f" without a place: {lost[:5]}"
            )

    # --- reading ------------------------------------------------------------------------------------------------------

    @property
    def experts_a_token(self) -> int:
        return self.architecture.experts_a_token

    def activation(self, block: Block) -> Activation:
        """Of a block's routed experts."""
        return activation_of(self.architecture.experts[block.experts])

    def probabilities(self, block: Block, inputs: Tensor) -> Tensor:
        """The router's probabilities of all experts [N, E], of the experts' inputs [N, d]."""
        weight, bias = (None if t is None else t.float() for t in self._router(block))
        logits = F.linear(inputs, weight, bias)
        return (
            logits.sigmoid() if self.architecture.gates[block.experts].scores == "sigmoid" else logits.softmax(dim=-1)
        )

    def check_router(self) -> None:
        """Raise ValueError unless :meth:`probabilities` are known."""
        for block in self.blocks:
            if block.sparse and not self.architecture.gates[block.experts].scores:
                raise ValueError(
                    f"method: expected a linear router with gates by softmax or sigmoid, of two experts a token or more, found"
                    f" another in {block.ffn} of {self.source_config.model_type}"
                )

    def _router(self, block: Block) -> tuple[Tensor, Tensor | None]:
        """Weight [E, d] and bias [E] of a sparse block's router."""
        shapes, wanted = self.stored.shapes, [self.num_experts, self.d_model]
        names = [n for n in shapes if n.startswith(f"{block.ffn}.") and not n.startswith(f"{block.experts}.")]
        weight = next(n for n in names if shapes[n] == wanted)
        bias = weight.removesuffix("weight") + "bias"
        return self.read(weight), self.read(bias) if bias in names else None

    def check_weights(self) -> None:
        """Read everything once; ValueError: a weight is NaN or infinite, or experts of a layer are of several dtypes."""
        inside = tuple(f"{name}." for name in self.names)
        rest = [name for name in self.stored.shapes if not name.startswith(inside)]
        sparse = [block for block in self.blocks if block.sparse]
        with tqdm(total=len(rest) + len(sparse), desc="looking for NaN", unit="tensor") as bar:
            for name in rest:
                self.read(name)
                bar.update()
            for block in sparse:
                try:
                    checked_experts(self.experts(block))
                except ValueError as error:
                    raise ValueError(f"{self.shards.path}: {block.ffn}: {error}") from error
                bar.update()

    def experts(self, block: Block) -> list[FeedForwardWeights]:
        """The routed experts of a sparse block."""
        try:
            return self.banks.experts(block.experts)
        except ValueError as error:  # mixed dtypes
            raise ValueError(f"{self.shards.path}: {block.ffn}: {error}") from error

    def with_mean_gates(
        self, experts: list[FeedForwardWeights], seen: LayerActivations | None
    ) -> tuple[list[FeedForwardWeights], LayerActivations | None]:
        """Where gates multiply the experts' inputs: experts that have the mean gate in their weights, so that they add up, and
        what they see, with gates of 1. Else both as they are."""
        if not self.architecture.input_gates:
            return experts, seen
        mean = seen.gate_sum() / self.experts_a_token
        experts = [expert.times(dict.fromkeys(("up", "gate"), mean)) for expert in experts]
        return experts, replace(seen, gates=(seen.gates > 0).to(seen.gates))

    def read(self, name: str) -> Tensor:
        """A tensor of the MoE that is not an expert's; ValueError: it has NaN or infinity."""
        return self.stored.read_finite(name)

    def ffn_of(self, module: str, meta: bool = False) -> FeedForwardWeights:
        """A dense network of the MoE. ``meta``: without its data."""
        parts: dict[str, Tensor] = {}
        for name, held in ffn_parts(self.architecture.model.get_submodule(module)).items():
            name = f"{module}.{name}"
            tensor = self._empty(name) if meta else self.read(name)
            parts |= dict(zip(held, tensor.chunk(len(held)), strict=True))
        return FeedForwardWeights(**parts)

    # --- writing ------------------------------------------------------------------------------------------------------

    def factor(self, block: Block) -> float:
        """What the output of a block's gathered network is multiplied by, besides the sum of its gates."""
        return self.architecture.factor(self.twin, block.experts)

    def ffn_tensors(self, block: Block, ffn: FeedForwardWeights) -> dict[str, Tensor]:
        """The tensors of a network by their names in the twin; of a twin with one expert its router's too.

        Raises:
            ValueError: a tensor has numbers beyond those of its dtype.
        """
        if block.sparse and self.architecture.kind == ONE_EXPERT:
            made = self.architecture.router(self.twin, block.experts)
            made = {name: tensor.to(self.stored.read(name).dtype) for name, tensor in made.items()}
            made |= self._one_expert(block, ffn)
        else:
            parts, made = dict(ffn.tensors()), {}
            for name, held in ffn_parts(self.twin.get_submodule(block.target)).items():
                made[f"{block.target}.{name}"] = torch.cat([parts[part] for part in held])
        for name, tensor in made.items():
            if count := count_non_finite(tensor):
                raise ValueError(
                    f"{self.shards.path}: {name}: expected numbers that {tensor.dtype} can hold, found {count} of the network for"
                    f" {block.ffn} that it can't{if_float16(tensor.dtype)}"
                )
        return made

    def _one_expert(self, block: Block, ffn: FeedForwardWeights) -> dict[str, Tensor]:
        target, bank = block.target, self._spread(ffn, self.architecture.one_gate(self.twin, block.experts))
        layout = Layout.of(self.twin.get_submodule(target))
        return {f"{target}.{name}": tensor for name, tensor in layout.joined(bank).items()}

    @staticmethod
    def _spread(ffn: FeedForwardWeights, gates: Sequence[float]) -> FeedForwardWeights:
        """A network as a bank of one expert, or of a few with a part of the hidden units each, that have these gates."""
        parts = [ffn.with_neurons(part) for part in torch.arange(ffn.d_ff).chunk(len(gates))]
        pairs = zip(parts, gates, strict=True)
        return FeedForwardWeights.stack(
            [part.times({"down": 1 / gate, "down_bias": 1 / gate / len(gates)}) for part, gate in pairs]
        )

    def in_files(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the twin as its files hold them."""
        return in_files(self.twin, tensors)


class Shapes:
    """What a model's checkpoint would hold, without the tensors; for a plan."""

    def __init__(self, architecture: Architecture) -> None:
        self.path, self.absent = Path(architecture.config.model_type), {}
        self.shapes = {name: list(tensor.shape) for name, tensor in architecture.model.state_dict().items()}

    def read(self, name: str) -> Tensor:
        """The tensor on the device ``meta``."""
        return torch.empty(self.shapes[name], device="meta")


def dense_config(config: PreTrainedConfig, d_ff: int | str | None) -> PreTrainedConfig:
    """The config of an MoE's dense twin with its routed experts gathered to ``d_ff``, as in :class:`TwinPlan`."""
    architecture = Architecture(config, config.model_type)
    return TwinPlan(Shapes(architecture), architecture, "topk", d_ff).config


def active_multiple(width: str) -> float:
    """How many times the active width a text means: 1 for ``"active"``, 4 for ``"4x"``; ValueError for another one."""
    found = re.fullmatch(r"([0-9]+(?:[.][0-9]+)?)x", width)
    if width != ACTIVE and not (found and float(found[1]) > 0):
        raise ValueError(
            f"d_ff: expected a number, {ACTIVE!r}, a multiple of it such as '4x', or None, found {width!r}"
        )
    return float(found[1]) if found else 1.0


def _natural(text: str) -> list:
    """Sort key by which layer 10 comes after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
