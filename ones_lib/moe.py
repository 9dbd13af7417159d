"""Mixture-of-experts feed-forward layers: noisy top-k router, balance loss, capacity, two dispatch paths; and Soft MoE.

After WideNet ("Go Wider Instead of Deeper", Xue et al., AAAI 2022, arXiv 2107.11817) and the GShard/V-MoE routers that it
builds on. N is the number of tokens, E of experts, k of experts a token, h = d_ff, d = d_model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ones_lib.ffn import FeedForwardWeights


@dataclass(frozen=True)
class Routing:
    """Where N tokens go. ``experts`` and ``gates`` are [N, k], best expert first; ``probabilities`` [N, E].

    ``capacity`` is the most assignments that one expert takes, or None for no limit. Places go to all first choices in
    token order, then to all second choices, and so on (GShard's rule).
    """

    experts: Tensor
    gates: Tensor
    probabilities: Tensor
    capacity: int | None = None

    def balance_loss(self) -> Tensor:
        """``E * sum_i fraction_i * mean_prob_i``: 1 when balanced; fraction_i is expert i's share of all assignments, over all
        processes of a training, whose mean of this is then that of the whole batch (Qiu et al., arXiv 2501.11873)."""
        num_experts = self.probabilities.shape[-1]
        counts = torch.bincount(self.experts.flatten(), minlength=num_experts)
        if not dist.is_initialized():
            return num_experts * (counts / self.experts.numel() * self.probabilities.mean(dim=0)).sum()
        dist.all_reduce(counts)
        tokens = counts.sum() / self.experts.shape[1] / dist.get_world_size()  # of one process, on average
        return num_experts * (counts / counts.sum() * self.probabilities.sum(dim=0) / tokens).sum()


class Router(nn.Module):
    """Noisy top-k router: softmax over all experts of ``W_r x`` (no bias), then the k largest probabilities are the gates.

    In training, logits get Gaussian noise of standard deviation 1/E and experts a capacity of
    ``ceil(capacity_factor * k * N / E)`` assignments (None: no limit); in evaluation there is neither noise nor limit.
    Gates are not renormalised over the chosen k, as in WideNet, unless ``renormalize``. While ``sampling`` is set, the k
    experts of a token are drawn by their probabilities, without replacement, in the place of the k most probable.
    """

    sampling = False

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        capacity_factor: float | None = 1.2,
        renormalize: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k: expected an integer from 1 to num_experts={num_experts}, found {top_k}")
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(f"capacity_factor: expected a positive number or None, found {capacity_factor}")
        self.top_k, self.capacity_factor, self.renormalize = top_k, capacity_factor, renormalize
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Routing:
        """Tokens ``x`` [N, d] -> Routing. Probabilities are computed in float32 or better."""
        num_experts = self.weight.shape[0]
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            logits = F.linear(x.to(dtype), self.weight.to(dtype))  # [N, E]
        if self.training:
            logits = logits + torch.randn_like(logits) / num_experts
        probabilities = logits.softmax(dim=-1)
        if self.sampling:
            experts = torch.multinomial(probabilities.detach(), self.top_k)
            gates = probabilities.gather(1, experts)
        else:
            gates, experts = probabilities.topk(self.top_k, dim=-1)
        if self.renormalize:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        capacity = None
        if self.training and self.capacity_factor is not None:
            capacity = math.ceil(self.capacity_factor * self.top_k * len(x) / num_experts)
        return Routing(experts, gates.to(x.dtype), probabilities, capacity)


def dispatch_plain(
    bank: FeedForwardWeights, x: Tensor, routing: Routing, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """``y = sum_{i in top-k} gate_i * FFN_i(x)``, expert by expert as the equation reads; dropped assignments add nothing.

    Tokens ``x`` [N, d] -> [N, d]. The reference for :func:`dispatch`.
    """
    y = torch.zeros_like(x)
    for e in range(bank.num_experts):
        choice, token = (e == routing.experts.T).nonzero(as_tuple=True)  # choice-major: all first choices come first
        choice, token = choice[: routing.capacity], token[: routing.capacity]
        output = bank.expert(e).apply(x[token], activation)
        y = y.index_add(0, token, (routing.gates[token, choice, None] * output).to(y.dtype))
    return y


def dispatch(bank: FeedForwardWeights, x: Tensor, routing: Routing, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """The same as :func:`dispatch_plain`, fast. Four ways, by size and by what the device can do:

    - All of it small (N * E * h * d multiplications up to :data:`SMALL`): every expert on every token, in two batched products
      without any sorting, and the gates, most of them zero, choose.
    - Otherwise assignments are sorted by expert and each matrix of the bank is one grouped product,
      ``torch.nn.functional.grouped_mm``, whose work is that of the assignments alone.
    - Without gradients on a CPU, and with more than :data:`LARGE` hidden activations: expert by expert over the sorted rows, so
      that an expert's activations are still in the cache when they are read again.
    - So too where there is no grouped product for the dtype, the sizes or the device.
    """
    num_tokens, num_experts = len(x), bank.num_experts
    dropping = routing.capacity is not None and routing.capacity < num_tokens  # an expert gets a token but once
    if not dropping and num_tokens * bank.up.numel() <= SMALL:
        output = _products(bank, x.expand(num_experts, -1, -1), activation, batched_linear)  # [E, N, d]
        gates = routing.gates.new_zeros(num_tokens, num_experts).scatter(1, routing.experts, routing.gates)
        return (gates.T[..., None] * output).sum(dim=0).to(x.dtype)

    expert, order = routing.experts.T.flatten().sort(stable=True)  # of [k*N], choice-major
    ids = torch.arange(num_experts, device=x.device)
    if dropping:
        position = torch.arange(len(expert), device=x.device) - torch.searchsorted(expert, ids).index_select(0, expert)
        kept = position < routing.capacity
        expert, order = expert[kept], order[kept]
    ends = torch.searchsorted(expert, ids, right=True, out_int32=True)  # of each expert's rows
    token = order % num_tokens
    rows = x.index_select(0, token)  # whose gradient comes back much faster than that of x[token]

    cached = not torch.is_grad_enabled() and x.device.type == "cpu" and len(rows) * bank.d_ff > LARGE
    if cached or not _can_group(bank, x):
        parts = zip(bank.experts(), rows.tensor_split(ends[:-1].tolist()), strict=True)
        output = torch.cat([ffn.apply(part, activation) for ffn, part in parts])
    else:
        grouped = partial(_grouped_linear, expert=expert, ends=ends)
        output = _products(bank, rows, activation, grouped)
    gates = routing.gates.T.flatten().index_select(0, order)[:, None]
    return torch.zeros_like(x).index_add(0, token, (gates * output).to(x.dtype))


#: Multiplications below which :func:`dispatch` does all experts' work for all tokens; measured on two CPU cores, where sorting
#: and grouping cost as much.
SMALL = 2**21
#: Hidden activations above which they do not stay in a CPU's cache: 16 MB of float32.
LARGE = 2**22


def _products(bank: FeedForwardWeights, x: Tensor, activation: Callable, linear: Callable) -> Tensor:
    """A bank's experts on tokens, with ``linear(x, weight, bias)`` for each of its matrices."""
    hidden = linear(x, bank.up, bank.up_bias)
    hidden = activation(hidden) if bank.gate is None else activation(linear(x, bank.gate, bank.gate_bias)) * hidden
    return linear(hidden, bank.down, bank.down_bias)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product with ``x`` is taken: the grouped one knows nothing of autocast."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _can_group(bank: FeedForwardWeights, x: Tensor) -> bool:
    """Whether ``grouped_mm`` takes these: not double precision, rows of whole 16 bytes, a CPU or a GPU from Ampere on."""
    dtype = _product_dtype(x)
    aligned = all(width * dtype.itemsize % 16 == 0 for width in (bank.d_model, bank.d_ff))
    runs = x.device.type == "cpu" or (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0))
    return runs and aligned and dtype in (torch.float32, torch.bfloat16, torch.float16)


# torch.compile compiles it in bfloat16 alone.
_uncompiled_grouped_mm = torch.compiler.disable(F.grouped_mm)


def _grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, expert: Tensor, ends: Tensor) -> Tensor:
    """[n, in] -> [n, out], rows sorted by their ``expert`` [n], whose last ones end at ``ends`` [E]; weight [E, out, in]."""
    dtype = _product_dtype(x)
    grouped_mm = F.grouped_mm if dtype == torch.bfloat16 else _uncompiled_grouped_mm
    y = grouped_mm(x.to(dtype), weight.to(dtype).mT, offs=ends)
    return y if bias is None else y + bias.index_select(0, expert).to(dtype)


def batched_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[E, C, in] -> [E, C, out] with one weight [E, out, in] an expert."""
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)


class MoEFeedForward(nn.Module):
    """Feed-forward layer of E experts, or with ``num_experts=1`` the dense layer of the same definition, without router.

    Takes the place of ``timm.layers.Mlp`` in a transformer block. Weights are named and shaped as in
    :class:`FeedForwardWeights`, also for one expert ([1, h, d]). In training, ``balance_losses`` gathers one scalar a
    forward pass (a layer shared across depth is passed through several times); its owner empties it.
    """

    dispatch = staticmethod(
        dispatch
    )  # how tokens come to their experts; one of the same signature can be put in its place

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int = 4,
        top_k: int = 2,
        capacity_factor: float | None = 1.2,
        renormalize: bool = False,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        for name, value in {"d_model": d_model, "d_ff": d_ff, "num_experts": num_experts}.items():
            if value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, found {value}")
        dd = {"device": device, "dtype": dtype}
        self.router = (
            Router(d_model, num_experts, top_k, capacity_factor, renormalize, **dd) if num_experts > 1 else None
        )
        self.up = nn.Parameter(torch.empty(num_experts, d_ff, d_model, **dd))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, d_ff, **dd))
        self.up_bias = nn.Parameter(torch.empty(num_experts, d_ff, **dd)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, d_model, **dd)) if bias else None
        self.activation = act_layer()
        self.dropout = nn.Dropout(drop)
        self.balance_losses: list[Tensor] = []
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier-uniform matrices, expert by expert, and zero biases, as the ViT papers' FFNs start (timm calls this)."""
        for matrices in (self.up, self.down):
            for matrix in matrices:
                nn.init.xavier_uniform_(matrix)
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        if self.router is not None:
            self.router.reset_parameters()

    @property
    def num_experts(self) -> int:
        return self.up.shape[0]

    def bank(self) -> FeedForwardWeights:
        """The experts' weights (the parameters themselves, no copy)."""
        return FeedForwardWeights(self.up, self.down, up_bias=self.up_bias, down_bias=self.down_bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[..., d] -> [..., d]. Where ``mask`` [...] is False (padding) the output is zero and no expert's place is taken."""
        tokens = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]  # [N, d]
        if self.router is None:
            (ffn,) = self.bank().experts()
            y = ffn.apply(tokens, self._activate)
        else:
            routing = self.router(tokens)
            if self.training:
                self.balance_losses.append(routing.balance_loss())
            y = self.dispatch(self.bank(), tokens, routing, self._activate)
        y = self.dropout(y)
        return y.view_as(x) if mask is None else torch.zeros_like(x).masked_scatter(mask[..., None], y)

    def token_gates(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Every expert's gate [..., E] for tokens ``x`` [..., d]; zero for those not chosen, and where ``mask`` [...] is False."""
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router(tokens)
        gates = routing.gates.new_zeros(len(tokens), self.num_experts).scatter_(1, routing.experts, routing.gates)
        gates = gates.view(*x.shape[:-1], -1)
        return gates if mask is None else gates * mask[..., None]

    def _activate(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.activation(hidden))


class SoftRouter(nn.Module):
    """Soft MoE's router (Puigcerver et al., arXiv 2308.00951, sections 2.1 and 2.3): each of E*p slots is a mixture of the
    sequence's tokens, and each token's output one of the slots' outputs.

    Logits are the cosines of tokens and slots times a learned scale.
    """

    def __init__(self, d_model: int, num_experts: int, slots_per_expert: int, device=None, dtype=None) -> None:
        super().__init__()
        shape = (num_experts * slots_per_expert, d_model)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sequences ``x`` [B, L, d] -> dispatch weights [B, L, E*p], which sum to 1 over tokens, and combine weights of the same
        shape, which sum to 1 over slots. Where ``mask`` [B, L] is False, a token is part of no slot."""
        logits = F.linear(F.normalize(x, dim=-1), self.scale * F.normalize(self.weight, dim=-1))
        combine = logits.softmax(dim=2)
        if mask is not None:
            logits = logits.masked_fill(~mask[..., None], torch.finfo(logits.dtype).min)
        return logits.softmax(dim=1), combine


class SoftMoEFeedForward(MoEFeedForward):
    """Soft MoE (Puigcerver et al., arXiv 2308.00951): every expert works on ``slots_per_expert`` mixtures of all tokens of a
    sequence. Nothing is dropped and nothing has to be balanced. Input [B, L, d]; weights are those of :class:`MoEFeedForward`.
    """

    def __init__(self, d_model: int, d_ff: int, num_experts: int, slots_per_expert: int, **kwargs) -> None:
        if slots_per_expert < 1:
            raise ValueError(f"slots_per_expert: expected an integer of at least 1, found {slots_per_expert}")
        super().__init__(d_model, d_ff, num_experts, top_k=1, **kwargs)
        self.router = SoftRouter(d_model, num_experts, slots_per_expert).to(self.up)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        spread, combine = self.router(x, mask)
        slots = spread.mT @ x  # [B, E*p, d]
        buffer = slots.unflatten(1, (self.num_experts, -1)).transpose(0, 1)  # [E, B, p, d]
        hidden = self._activate(batched_linear(buffer.flatten(1, 2), self.up, self.up_bias))
        output = batched_linear(hidden, self.down, self.down_bias).view(buffer.shape).transpose(0, 1).flatten(1, 2)
        y = self.dropout(combine @ output)
        return y if mask is None else y * mask[..., None]

    def token_gates(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """How much of each expert's slots is in a token's output [B, L, E]; sums to 1."""
        _, combine = self.router(x, mask)
        gates = combine.unflatten(2, (self.num_experts, -1)).sum(dim=3)
        return gates if mask is None else gates * mask[..., None]


class MoEModel:
    """What models with :class:`MoEFeedForward` layers have in common, to be inherited beside ``nn.Module``."""

    def hidden_state_readers(self) -> list[nn.Module]:
        """By depth, the module whose first argument is the residual stream after that depth's block."""
        raise NotImplementedError

    def moe_layers(self) -> list[MoEFeedForward]:
        """The distinct feed-forward layers: one if shared across depth."""
        return [module for module in self.modules() if isinstance(module, MoEFeedForward)]

    def clear_balance_losses(self) -> None:
        """To be called at the start of a forward pass."""
        for layer in self.moe_layers():
            layer.balance_losses.clear()

    def balance_loss(self) -> Tensor | float:
        """Mean over depth of the router's balance loss in the last forward pass in training mode; 0.0 for a dense model."""
        losses = [loss for layer in self.moe_layers() for loss in layer.balance_losses]
        return sum(losses) / len(losses) if losses else 0.0

    def no_weight_decay(self) -> set[str]:
        """The parent's, and the experts' biases, which timm does not know for biases since they are matrices [E, h]."""
        inherited = getattr(super(), "no_weight_decay", set)()
        return inherited | {n for n, _ in self.named_parameters() if n.endswith(("up_bias", "down_bias"))}
