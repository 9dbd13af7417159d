"""What an empty model of transformers says about its MoE layers: what experts compute, and what their gates sum to.

Nothing is written down by type. Small copies of the layers are run instead, with random weights.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from inspect import signature
from math import isclose
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ones_lib.calibration import Activation
from ones_lib.ffn import FeedForwardWeights
from ones_lib.models.causal import gates_by_expert, text_config

TOKENS, UNITS = 64, 6  # of the copies
#: Linear layers of a feed-forward network, and the parts that each holds, in order.
LINEAR = {
    **dict.fromkeys(("gate_up_proj", "input_linear"), ("gate", "up")),
    **dict.fromkeys(("gate_proj", "w1"), ("gate",)),
    **dict.fromkeys(("up_proj", "w3", "fc1", "wi"), ("up",)),
    **dict.fromkeys(("down_proj", "output_linear", "w2", "fc2", "wo"), ("down",)),
}


def ffn_parts(module: nn.Module) -> dict[str, list[str]]:
    """The parts that each tensor of a dense feed-forward network holds, by its name, such as ``{"gate_proj.weight": ["gate"]}``.

    Empty if the module is none, or has tensors of other kinds too.
    """
    found: dict[str, list[str]] = {}
    for name, _ in module.named_parameters():
        layer, _, kind = name.rpartition(".")
        if layer not in LINEAR or kind not in ("weight", "bias"):
            return {}
        found[name] = [part + ("_bias" if kind == "bias" else "") for part in LINEAR[layer]]
    return found if {"up", "down"} <= {part for parts in found.values() for part in parts} else {}


@torch.no_grad()
def computes(module: nn.Module, activation: Activation) -> bool:
    """Whether a dense network computes what experts with this activation do, if it has their weights."""
    parts = ffn_parts(module)
    if not parts:
        return False
    small = deepcopy(module)
    for name in dict.fromkeys(name.rpartition(".")[0] for name in parts):
        held, old = LINEAR[name], module.get_submodule(name)
        sizes = (UNITS, TOKENS) if held == ("down",) else (TOKENS, UNITS * len(held))
        setattr(small, name, nn.utils.skip_init(nn.Linear, *sizes, bias=old.bias is not None))
    tensors = dict(small.named_parameters())
    pieces = {
        part: t for name, held in parts.items() for part, t in zip(held, tensors[name].chunk(len(held)), strict=True)
    }
    for name, tensor in tensors.items():
        tensor.copy_(torch.randn(tensor.shape, generator=_generator(name, 0)) / 4)
    x = 4 * torch.randn(TOKENS, TOKENS, generator=_generator("inputs", 0))  # large enough for clamps
    return torch.allclose(small.eval()(x), FeedForwardWeights(**pieces).apply(x, activation), atol=1e-4, rtol=1e-4)


@dataclass(frozen=True)
class Gates:
    """What is known of a layer's gates without its weights.

    Args:
        total: sum of a token's gates at the call of the experts; None: it differs between tokens, or depends on the weights.
        each: each expert's gate, if it is the same for every token; else empty.
        chosen: number of experts a token.
        factor: mean size of the layer's output where its experts' is one. Without norms or projections around them, it is what
            their output is multiplied by.
        scores: ``"softmax"`` or ``"sigmoid"``, if gates are proportional to that function of a linear router's logits; else
            empty.
    """

    total: float | None
    each: tuple[float, ...]
    chosen: int
    factor: float
    scores: str


class _Stub(nn.Module):
    """Stands for the routed experts: returns ones, and notes each token's gates."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.num_experts, self.weights, self.gates = experts.num_experts, torch.empty(0), torch.empty(0)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor, *_: object) -> Tensor:
        self.d_model = x.shape[-1]
        self.weights, self.gates = weights, gates_by_expert(chosen, weights, self.num_experts).float()
        return torch.ones_like(x)


class _Zero(nn.Module):
    """Stands for shared experts."""

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        return torch.zeros_like(x)


def gates_of(model: nn.Module, experts: str, blank: bool = False) -> Gates:
    """The gates of the layer whose routed experts are the module ``experts``, by running its router on random tokens.

    It is run twice, with different weights: what depends on them is not known without them.

    Args:
        blank: with router weights of zero, as a twin with one expert has them; else with random ones.

    Raises:
        RuntimeError, TypeError, ...: as the layer's code does, if it can't be run by itself.
    """
    one, two = (_gates(model, experts, blank, seed) for seed in range(2))
    total = one.total if None not in (one.total, two.total) and isclose(one.total, two.total, rel_tol=1e-5) else None
    alike = len(one.each) == len(two.each) and all(
        isclose(*gates, rel_tol=1e-5) for gates in zip(one.each, two.each, strict=True)
    )
    return replace(one, total=total, each=one.each if alike else ())


@torch.no_grad()
def _gates(model: nn.Module, experts: str, blank: bool, seed: int) -> Gates:
    """What one run shows."""
    site, _, name = experts.rpartition(".")
    layer, stub = deepcopy(model.get_submodule(site)), _Stub(model.get_submodule(experts))
    count = stub.num_experts
    setattr(layer, name, stub)
    for child, _ in list(layer.named_children()):
        if "shared" in child and not child.endswith("gate"):
            setattr(layer, child, _Zero())
    layer = layer.to_empty(device="cpu").float().eval()
    for n, t in [*layer.named_parameters(), *layer.named_buffers()]:
        if not t.is_floating_point() or "bias" in n or (blank and has_row_per_expert(t, count)):
            t.copy_(router_fill(n, t))
        else:  # the same for the same name, so that a model and its twin can be compared
            noise = torch.randn(t.shape, generator=_generator(n, seed))
            t.copy_(noise / t.shape[-1] ** 0.5 if t.shape else 1 + noise.abs())
    logits: list[Tensor] = []
    for child in layer.children():
        child.register_forward_hook(lambda module, x, y: logits.append(y[0]) if isinstance(y, tuple) else None)
    x = torch.randn(1, TOKENS, _d_model(model, experts), generator=_generator("inputs", seed))
    outputs = _run(layer, x, stub)
    sums = stub.gates.sum(dim=1)
    return Gates(
        total=sums.mean().item() if _same(sums) else None,
        each=tuple(stub.gates[0].tolist()) if _same(stub.gates) else (),
        chosen=stub.weights.shape[-1],
        factor=outputs.abs().mean().item(),
        scores=_scores(layer, x[0], logits[0], stub.gates) if logits and stub.d_model == x.shape[-1] else "",
    )


def _same(gates: Tensor) -> bool:
    """Whether all tokens have the same."""
    return bool((gates - gates[:1]).abs().max() <= 1e-5 * gates.abs().max())


def _scores(layer: nn.Module, x: Tensor, logits: Tensor, gates: Tensor) -> str:
    """The function of a linear router's logits that the gates of the chosen experts are in the ratio of, or nothing.

    One chosen expert shows none.
    """
    weights = [p for p in layer.parameters() if list(p.shape) == [gates.shape[1], x.shape[1]]]
    if len(weights) != 1 or (gates > 0).sum(dim=1).max() < 2 or logits.numel() != gates.numel():
        return ""
    logits = logits.view_as(gates).float()
    if not torch.allclose(logits, F.linear(x, weights[0]), atol=1e-4):
        return ""
    for name, scores in {"softmax": logits.softmax(dim=1), "sigmoid": logits.sigmoid()}.items():
        chosen = scores * (gates > 0)
        one, two = (t / t.sum(dim=1, keepdim=True) for t in (chosen, gates))
        if torch.allclose(one, two, atol=1e-4):
            return name
    return ""


def _run(layer: nn.Module, x: Tensor, stub: _Stub) -> Tensor:
    """The output of a layer, of which some need to know the tokens; of a whole block, its router and experts alone."""
    if hasattr(layer, "self_attn"):
        _, weights, chosen = layer.router(x[0])
        return stub(x[0], chosen, weights)
    ids = (
        {"input_ids": torch.zeros(x.shape[:2], dtype=torch.long)}
        if "input_ids" in signature(layer.forward).parameters
        else {}
    )
    outputs = layer(x, **ids)
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(crc32(f"{name} {seed}".encode()))


def _d_model(model: nn.Module, experts: str) -> int:
    """Width of the tokens that an MoE layer gets."""
    layer = model.get_submodule(experts.rpartition(".")[0])
    count = model.get_submodule(experts).num_experts
    shapes = [p.shape for n, p in layer.named_parameters() if not n.startswith("experts.")]
    return next((s[1] for s in shapes if len(s) == 2 and s[0] == count), text_config(model.config).hidden_size)


def has_row_per_expert(tensor: Tensor, count: int) -> bool:
    """Whether a router's tensor has a row for each of ``count`` experts, or one more."""
    return bool(tensor.shape) and tensor.shape[0] in (count, count + 1)


def router_fill(name: str, like: Tensor) -> Tensor:
    """A router's tensor in a twin with one expert: zeros; ones for what multiplies; a table [N, k] names each expert once."""
    if not like.is_floating_point() and like.ndim == 2:
        return torch.arange(like.shape[1]).expand_as(like).contiguous()
    return torch.ones_like(like) if "scale" in name or "norm" in name else torch.zeros_like(like)
