"""Sparse upcycling: a trained dense model becomes an MoE whose experts start as copies of its feed-forward networks.

After Komatsuzaki et al., arXiv 2212.05055. The experts of such a teacher have an ancestor in common.
"""

from __future__ import annotations

import copy

import torch
from timm.layers import Mlp
from torch import nn

from ones_lib.ffn import FeedForwardWeights
from ones_lib.moe import MoEFeedForward, MoEModel


class Upcycled(MoEModel, nn.Module):
    """``model`` with MoE layers where its feed-forward networks were; made by :func:`upcycle`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        self.clear_balance_losses()
        return self.model(*args, **kwargs)

    def hidden_state_readers(self) -> list[nn.Module]:
        if isinstance(self.model, MoEModel):
            return self.model.hidden_state_readers()
        return [*(block.norm1 for block in self.model.blocks[1:]), self.model.norm]  # timm's vision transformers

    def dense_twin(self, d_ff: int | None = None) -> Upcycled:
        """The dense model (one expert, no router) of this architecture, ``d_ff`` wide if given; its feed-forward layers are
        freshly initialised, all else is a copy."""
        twin = copy.deepcopy(self)

        def dense(layer: MoEFeedForward) -> MoEFeedForward:
            return _layer(layer.bank().expert(0), layer, d_ff or layer.up.shape[1], num_experts=1)

        _replace(twin.model, MoEFeedForward, dense)
        return twin


def upcycle(
    dense: nn.Module,
    num_experts: int,
    *,
    top_k: int = 2,
    capacity_factor: float | None = 1.2,
    renormalize: bool = True,
    noise: float = 0.0,
    seed: int = 0,
) -> Upcycled:
    """The MoE that starts from a trained dense model, whose weights are copied.

    Every feed-forward network becomes a bank of copies with a new router; a layer shared across depth stays shared. Before
    training the MoE computes the dense model's function, if its gates are renormalised and there is no noise.

    Args:
        dense: a model of this library with one expert, or one of timm's with :class:`timm.layers.Mlp` in its blocks, such as
            its vision transformers, pretrained ones included.
        num_experts: E, at least 2.
        top_k, capacity_factor, renormalize: see :class:`ones_lib.moe.Router`.
        noise: standard deviation of what is added to the copies' weights, relative to each matrix's root mean square.
        seed: of routers and noise.

    Raises:
        ValueError: no such feed-forward network in the model, or an argument out of range.
    """
    if num_experts < 2:
        raise ValueError(f"num_experts: expected an integer of at least 2, found {num_experts}")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise: expected a number of at least 0, found {noise}")
    model = copy.deepcopy(dense)

    def expert_layer(ffn: Mlp | MoEFeedForward) -> MoEFeedForward:
        if isinstance(ffn, MoEFeedForward):
            if ffn.num_experts > 1:
                raise ValueError(f"dense: expected a dense model, found one with {ffn.num_experts} experts")
            weights = ffn.bank().expert(0)
        else:
            if not (isinstance(ffn.fc1, nn.Linear) and isinstance(ffn.norm, nn.Identity)):
                raise ValueError(
                    "dense: expected feed-forward networks of two linear layers, found convolutions or a norm"
                )
            biases = {"up_bias": ffn.fc1.bias, "down_bias": ffn.fc2.bias}
            weights = FeedForwardWeights(ffn.fc1.weight, ffn.fc2.weight, **biases)
        router = {"top_k": top_k, "capacity_factor": capacity_factor, "renormalize": renormalize}
        layer = _layer(weights, ffn, weights.d_ff, num_experts=num_experts, **router)
        with torch.no_grad():
            for name, tensor in weights.tensors():
                spread = noise * tensor.square().mean().sqrt()
                copies = getattr(layer, name)
                copies.copy_(tensor + spread * torch.randn_like(copies))
        return layer

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if not _replace(model, (Mlp, MoEFeedForward), expert_layer):
            raise ValueError(
                f"dense: expected feed-forward networks of timm.layers.Mlp or of this library, found none in {type(dense).__name__}"
            )
    return Upcycled(model)


def _layer(weights: FeedForwardWeights, like: nn.Module, d_ff: int, **kwargs) -> MoEFeedForward:
    """An expert layer for the weights' width, with the activation and dropout of the module in whose place it comes."""
    own = isinstance(like, MoEFeedForward)
    activation, dropout = (like.activation, like.dropout) if own else (like.act, like.drop1)
    kwargs |= {"bias": weights.up_bias is not None, "drop": dropout.p, "act_layer": lambda: activation}
    layer = MoEFeedForward(weights.d_model, d_ff, **kwargs).to(weights.up)
    return layer.train(like.training)


def _replace(model: nn.Module, kinds: type | tuple, make) -> int:
    """Put ``make(module)`` in the place of every module of these kinds, the same one where one is used in several places."""
    found = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, kinds)]
    made: dict[int, nn.Module] = {}
    for name, module in found:
        parent, _, child = name.rpartition(".")
        if id(module) not in made:
            made[id(module)] = make(module)
        setattr(model.get_submodule(parent), child, made[id(module)])
    return len(made)
