"""Mixture-of-experts (MoE) feed-forward layers: router, balance loss, capacity, dispatch; and Soft MoE.

The layer computes ``y = sum_{i in top-k} g_i(x) FFN_i(x)``, with the router's probabilities as gates ``g_i``. It follows
WideNet ("Go Wider Instead of Deeper", Xue et al., AAAI 2022, arXiv 2107.11817) and the routers of GShard and V-MoE.

N is the number of tokens, E of experts, k of experts per token, h = d_ff, d = d_model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ones_lib.dispatch import batched_linear, dispatch
from ones_lib.ffn import FeedForwardWeights, compute_dtype


@dataclass(frozen=True)
class Routing:
    """The experts of N tokens.

    Args:
        experts: indices [N, k], best expert first.
        gates: their weights [N, k] in the output.
        probabilities: of all experts, [N, E].
        capacity: how many assignments each expert takes; None for no limit. First choices of all tokens come first, in token
            order, then all second choices, and so on (GShard).
    """

    experts: Tensor
    gates: Tensor
    probabilities: Tensor
    capacity: int | None = None

    def all_gates(self) -> Tensor:
        """Gates of all experts [N, E]: zero where not chosen."""
        return self.gates.new_zeros(self.probabilities.shape).scatter_(1, self.experts, self.gates)

    def balance_loss(self) -> Tensor:
        """``E * sum_i fraction_i * mean_probability_i``, with expert i's fraction of all assignments; 1 when balanced.

        With several training processes, fractions are those of all processes. The mean of the loss over processes is then
        the loss of the whole batch (Qiu et al., arXiv 2501.11873).
        """
        num_experts = self.probabilities.shape[-1]
        counts = torch.bincount(self.experts.flatten(), minlength=num_experts)
        processes = dist.get_world_size() if dist.is_initialized() else 1
        if processes == 1:
            return num_experts * (counts / self.experts.numel() * self.probabilities.mean(dim=0)).sum()
        dist.all_reduce(counts)
        mean_tokens = counts.sum() / self.experts.shape[1] / processes  # tokens per process
        return num_experts * (counts / counts.sum() * self.probabilities.sum(dim=0) / mean_tokens).sum()


class Router(nn.Module):
    """Noisy top-k router: the gates are the k largest of the E probabilities ``softmax(W_r x)``.

    In training, the router logits get Gaussian noise of standard deviation 1/E, and each expert takes at most
    ``ceil(capacity_factor * k * N / E)`` assignments (None: no limit). In evaluation there is no noise and no limit. As in
    WideNet, the k gates keep the size of the probabilities; with ``renormalize`` they are divided by their sum. While
    ``sampling`` is set, a token's k experts are drawn by their probabilities, without replacement.
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
        """Routes tokens ``x`` [N, d]. Probabilities are computed in float32 at least."""
        num_experts = self.weight.shape[0]
        with torch.autocast(x.device.type, enabled=False):
            dtype = compute_dtype(self.weight)
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
    """``y = sum_{i in top-k} gate_i * FFN_i(x)`` for tokens ``x`` [N, d] -> [N, d], expert by expert.

    Assignments beyond an expert's capacity are dropped: they add nothing. This is the reference for
    :func:`ones_lib.dispatch.dispatch`.
    """
    y = torch.zeros_like(x)
    for e in range(bank.num_experts):
        choice, token = (e == routing.experts.T).nonzero(as_tuple=True)  # all first choices come first
        choice, token = choice[: routing.capacity], token[: routing.capacity]
        output = bank.expert(e).apply(x[token], activation)
        y = y.index_add(0, token, (routing.gates[token, choice, None] * output).to(y.dtype))
    return y


class MoEFeedForward(nn.Module):
    """Feed-forward layer of E experts; with ``num_experts=1`` the same layer without a router, the dense baseline's.

    Replaces ``timm.layers.Mlp`` in a transformer block. Parameters have the names and shapes of
    :class:`FeedForwardWeights`, also for one expert ([1, h, d]). In training, each forward pass appends a scalar to
    ``balance_losses``. A layer shared across depth appends once per depth; :class:`MoEModel` clears the list.
    """

    dispatch = staticmethod(dispatch)  # may be replaced by dispatch_plain

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
        """Xavier-uniform matrices, expert by expert, and zero biases, as in ViT. Called by timm too."""
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
        """The experts' weights: the parameters themselves, no copy."""
        return FeedForwardWeights(self.up, self.down, up_bias=self.up_bias, down_bias=self.down_bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[..., d] -> [..., d]. Tokens where ``mask`` [...] is False (padding) give zero and use no capacity."""
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
        """Gates of all experts [..., E] for tokens ``x`` [..., d]: zero where not chosen or where ``mask`` [...] is False."""
        gates = self.router(x.reshape(-1, x.shape[-1])).all_gates().view(*x.shape[:-1], -1)
        return gates if mask is None else gates * mask[..., None]

    def _activate(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.activation(hidden))


class MoEModel:
    """What models with :class:`MoEFeedForward` layers share; a mixin beside ``nn.Module``."""

    def hidden_state_readers(self) -> list[nn.Module]:
        """One module per depth: the one that reads the residual stream after that depth's block as its first argument."""
        raise NotImplementedError

    def moe_layers(self) -> list[MoEFeedForward]:
        """The distinct feed-forward layers; a single one if it is shared across depth."""
        return [module for module in self.modules() if isinstance(module, MoEFeedForward)]

    def clear_balance_losses(self) -> None:
        """Call this at the start of a forward pass."""
        for layer in self.moe_layers():
            layer.balance_losses.clear()

    def balance_loss(self) -> Tensor | float:
        """Mean over depth of the balance loss in the last training forward pass; 0.0 for a dense model."""
        losses = [loss for layer in self.moe_layers() for loss in layer.balance_losses]
        return sum(losses) / len(losses) if losses else 0.0

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: the parent class's, and the experts' biases.

        timm recognises biases by their one axis; the experts' biases have two, [E, h].
        """
        inherited = getattr(super(), "no_weight_decay", set)()
        return inherited | {n for n, _ in self.named_parameters() if n.endswith(("up_bias", "down_bias"))}


# --- Soft MoE, another teacher ------------------------------------------------------------------------------------------


class SoftRouter(nn.Module):
    """Soft MoE's router (Puigcerver et al., arXiv 2308.00951, sections 2.1 and 2.3), with p slots per expert.

    Each of the E*p slots is a weighted mean of a sequence's tokens, and each output is a weighted mean of the slots'
    outputs. Logits are the cosines of tokens and slots, times a learned scale.
    """

    def __init__(self, d_model: int, num_experts: int, slots_per_expert: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts * slots_per_expert, d_model))
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Dispatch and combine weights for sequences ``x`` [B, L, d], both [B, L, E*p].

        Dispatch weights sum to 1 over tokens, combine weights over slots. Tokens where ``mask`` [B, L] is False enter no slot.
        """
        logits = F.linear(F.normalize(x, dim=-1), self.scale * F.normalize(self.weight, dim=-1))
        combine = logits.softmax(dim=2)
        if mask is not None:
            logits = logits.masked_fill(~mask[..., None], torch.finfo(logits.dtype).min)
        return logits.softmax(dim=1), combine


class SoftMoEFeedForward(MoEFeedForward):
    """Soft MoE layer (Puigcerver et al., arXiv 2308.00951): every expert processes ``slots_per_expert`` mixtures of a
    sequence's tokens. No token is dropped and no load needs balancing.

    Input [B, L, d]; parameters as in :class:`MoEFeedForward`.
    """

    def __init__(self, d_model: int, d_ff: int, num_experts: int, slots_per_expert: int, **kwargs) -> None:
        if slots_per_expert < 1:
            raise ValueError(f"slots_per_expert: expected an integer of at least 1, found {slots_per_expert}")
        super().__init__(d_model, d_ff, num_experts, top_k=1, **kwargs)
        self.router = SoftRouter(d_model, num_experts, slots_per_expert).to(self.up)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        weights, combine = self.router(x, mask)
        slots = weights.mT @ x  # [B, E*p, d]
        buffer = slots.unflatten(1, (self.num_experts, -1)).transpose(0, 1)  # [E, B, p, d]
        hidden = self._activate(batched_linear(buffer.flatten(1, 2), self.up, self.up_bias))
        output = batched_linear(hidden, self.down, self.down_bias).view(buffer.shape).transpose(0, 1).flatten(1, 2)
        y = self.dropout(combine @ output)
        return y if mask is None else y * mask[..., None]

    def token_gates(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weight of each expert's slots in a token's output, [B, L, E]; they sum to 1."""
        _, combine = self.router(x, mask)
        gates = combine.unflatten(2, (self.num_experts, -1)).sum(dim=3)
        return gates if mask is None else gates * mask[..., None]
