"""Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): a trained dense model becomes an MoE.

Its experts start as copies of the dense model's feed-forward network, so they share an ancestor.
"""

from __future__ import annotations

import copy

import torch
from timm.layers import Mlp
from torch import nn

from ones_lib.ffn import FeedForwardWeights
from ones_lib.moe import MoEFeedForward, MoEModel


class Upcycled(MoEModel, nn.Module):
    """A model whose feed-forward networks were replaced by MoE layers, made by :func:`upcycle`."""

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
        """The dense model (one expert, no router) of this architecture, with ``d_ff`` hidden units if given.

        Its feed-forward layers are freshly initialised; all else is a copy.
        """
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
    """Make an MoE from a copy of a trained dense model.

    Each feed-forward network becomes a bank of copies with a new router; a layer shared across depth stays shared. Before
    training, the MoE computes the same function as the dense model if its gates are renormalised and ``noise`` is 0.

    Args:
        dense: a model of this library with one expert, or a timm model with :class:`timm.layers.Mlp` in its blocks, such as
            a (pretrained) vision transformer.
        num_experts: E, at least 2.
        top_k, capacity_factor, renormalize: see :class:`ones_lib.moe.Router`.
        noise: standard deviation of the noise added to the copies' weights, relative to each matrix's root mean square.
        seed: of routers and noise.

    Raises:
        ValueError: the model has no such feed-forward network, or an argument is out of range.
    """
    if num_experts < 2:
        raise ValueError(f"num_experts: expected an integer of at least 2, found {num_experts}")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise: expected a number of at least 0, found {noise}")
    model = copy.deepcopy(dense)

    def expert_layer(ffn: Mlp | MoEFeedForward) -> MoEFeedForward:
        weights = _weights(ffn)
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
                "dense: expected feed-forward networks of timm.layers.Mlp or of this library,"
                f" found none in {type(dense).__name__}"
            )
    return Upcycled(model)


def _weights(ffn: Mlp | MoEFeedForward) -> FeedForwardWeights:
    """The weights of a dense feed-forward network."""
    if isinstance(ffn, MoEFeedForward):
        if ffn.num_experts > 1:
            raise ValueError(f"dense: expected a dense model, found one with {ffn.num_experts} experts")
        return ffn.bank().expert(0)
    if not (isinstance(ffn.fc1, nn.Linear) and isinstance(ffn.norm, nn.Identity)):
        raise ValueError("dense: expected feed-forward networks of two linear layers, found convolutions or a norm")
    return FeedForwardWeights(ffn.fc1.weight, ffn.fc2.weight, up_bias=ffn.fc1.bias, down_bias=ffn.fc2.bias)


def _layer(weights: FeedForwardWeights, like: nn.Module, d_ff: int, **kwargs) -> MoEFeedForward:
    """An expert layer as wide as ``weights``, with the activation, dropout and mode of the module it replaces."""
    own = isinstance(like, MoEFeedForward)
    activation, dropout = (like.activation, like.dropout) if own else (like.act, like.drop1)
    kwargs |= {"bias": weights.up_bias is not None, "drop": dropout.p, "act_layer": lambda: activation}
    layer = MoEFeedForward(weights.d_model, d_ff, **kwargs).to(weights.up)
    return layer.train(like.training)


def _replace(model: nn.Module, kinds: type | tuple, make) -> int:
    """Replace every module of these kinds by ``make(module)``, made once per module; returns how many were made."""
    found = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, kinds)]
    made: dict[int, nn.Module] = {}
    for name, module in found:
        parent, _, child = name.rpartition(".")
        if id(module) not in made:
            made[id(module)] = make(module)
        setattr(model.get_submodule(parent), child, made[id(module)])
    return len(made)
