"""Knowledge gathering: pure functions from a bank of E experts to one feed-forward network.

The four methods of "One Student Knows All Experts Know" (Xue et al., arXiv 2201.10890, section on knowledge
gathering): ``sum``, ``average``, ``topk`` (Top-KG) and ``svd`` (SVD-KG). Every method takes ``scale``, which multiplies
the gathered matrices and those biases that are gathered the same way as the matrices; 1 is the paper's form. It matters
because an MoE's output is weighted by router gates that sum to at most 1, which a gathered matrix knows nothing of.

A new method is a function under :func:`register`::

    @register("first")
    def first_expert(bank, *, scale=1.0):
        return bank.expert(0).map(lambda tensor: scale * tensor)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ones_lib.ffn import FeedForwardWeights

GatheringMethod = Callable[..., FeedForwardWeights]
Factors = tuple[Tensor, Tensor, Tensor]  # U [m, r], S [r], V^T [r, n] of a matrix [m, n], r = min(m, n)
_METHODS: dict[str, GatheringMethod] = {}


def register(name: str) -> Callable[[GatheringMethod], GatheringMethod]:
    """Decorator: make a function ``(bank, *, **options) -> FeedForwardWeights`` known to :func:`gather` by ``name``."""

    def decorate(method: GatheringMethod) -> GatheringMethod:
        if name in _METHODS:
            raise ValueError(f"name: a gathering method {name!r} is registered already ({_METHODS[name].__name__})")
        _METHODS[name] = method
        return method

    return decorate


def gathering_methods() -> list[str]:
    """Names of the registered gathering methods, in the order of their registration."""
    return list(_METHODS)


def gather(
    bank: FeedForwardWeights | Sequence[FeedForwardWeights], method: str = "svd", **options
) -> FeedForwardWeights:
    """Gather a bank of E experts into one FFN.

    Args:
        bank: experts stacked on axis 0, or a sequence of single FFNs of equal shape.
        method: a name from :func:`gathering_methods`.
        options: the method's own, see its docstring (``scale`` for all, ``rank`` for svd, ``k`` and ``importance``
            for topk).

    Returns:
        One FFN in the bank's dtype, on its device. Computed in float32 (float64 stays float64), without gradient.

    Raises:
        ValueError: unknown method, no experts, experts of different shapes, NaN or infinity, an option out of range.
        TypeError: an option that the method does not have.
    """
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {gathering_methods()}, found {method!r}")
    function = _METHODS[method]
    known = [name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise TypeError(f"{name}: gathering method {method!r} has no such option, expected one of {known}")
    if not math.isfinite(options.get("scale", 1.0)):
        raise ValueError(f"scale: expected a finite number, found {options['scale']!r}")
    if not isinstance(bank, FeedForwardWeights):
        bank = FeedForwardWeights.stack(bank)
    check_bank(bank)
    dtype = bank.up.dtype
    compute_dtype = torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        return function(bank.map(lambda t: t.detach().to(compute_dtype)), **options).map(lambda t: t.to(dtype))


def check_bank(bank: FeedForwardWeights) -> None:
    """Raise ValueError unless ``bank`` is a bank of at least one expert with finite weights."""
    if not bank.is_bank:
        raise ValueError(f"bank: expected experts stacked as up [E, h, d], found one FFN with up {list(bank.up.shape)}")
    if 0 in bank.up.shape:
        raise ValueError(f"bank: expected E, h and d of at least 1 in up [E, h, d], found {list(bank.up.shape)}")
    for name, tensor in bank.tensors():
        finite = torch.isfinite(tensor).flatten(1).all(dim=1)
        if not finite.all():
            expert = int((~finite).nonzero()[0, 0])
            count = int((~torch.isfinite(tensor[expert])).sum())
            raise ValueError(f"{name} of expert {expert}: expected finite weights, found {count} NaN or infinite")


@register("sum")
def summation(bank: FeedForwardWeights, *, scale: float = 1.0) -> FeedForwardWeights:
    """Summation: ``W = scale * sum_i W_i``, biases likewise."""
    return bank.map(lambda tensor: scale * tensor.sum(dim=0))


@register("average")
def averaging(bank: FeedForwardWeights, *, scale: float = 1.0) -> FeedForwardWeights:
    """Averaging: ``W = scale * (1/E) sum_i W_i``, biases likewise."""
    return bank.map(lambda tensor: scale * tensor.mean(dim=0))


def _in_norm(bank: FeedForwardWeights) -> Tensor:
    """[E, h]: L2 norm of each hidden neuron's input weights (up, and gate where there is one)."""
    squares = bank.up.square().sum(dim=2)
    if bank.gate is not None:
        squares = squares + bank.gate.square().sum(dim=2)
    return squares.sqrt()


def _out_norm(bank: FeedForwardWeights) -> Tensor:
    """[E, h]: L2 norm of each hidden neuron's output weights."""
    return bank.down.norm(dim=1)


#: Importance of hidden neurons by name, bank -> [E, h].
IMPORTANCES: dict[str, Callable[[FeedForwardWeights], Tensor]] = {
    "l2": lambda bank: torch.hypot(_in_norm(bank), _out_norm(bank)),
    "product": lambda bank: _in_norm(bank) * _out_norm(bank),
}


@register("topk")
def top_kg(
    bank: FeedForwardWeights, *, k: int | None = None, importance: str | Tensor = "l2", scale: float = 1.0
) -> FeedForwardWeights:
    """Top-KG: the K most important hidden neurons of every expert, concatenated; a neuron's weights stay together.

    With ``k`` left out the gathered FFN has the experts' own d_ff ``h``: K = h // E neurons of every expert, and where
    E does not divide h the remaining ``h - E*K`` places go to the most important neurons not yet chosen, of whichever
    expert (ties: the lower expert, then the lower neuron). Within the result neurons stand in the experts' order, then in
    their order inside the expert, so one expert comes back exactly.

    The output bias is the experts' mean, not scaled: it belongs to no neuron.

    Args:
        bank: experts, up [E, h, d].
        k: neurons of every expert, 1 to h; the gathered FFN then has d_ff = E*k.
        importance: ``"l2"`` (norm of a neuron's in- and out-weights together), ``"product"`` (norm of the in-weights
            times norm of the out-weights), or a tensor [E, h] of one's own.
        scale: multiplies up, gate and down, and the biases of the neurons.
    """
    num_experts, h = bank.num_experts, bank.d_ff
    if isinstance(importance, str):
        if importance not in IMPORTANCES:
            raise ValueError(f"importance: expected one of {list(IMPORTANCES)} or a tensor, found {importance!r}")
        scores = IMPORTANCES[importance](bank)
    else:
        scores = importance.to(bank.up)
        if scores.shape != (num_experts, h) or not torch.isfinite(scores).all():
            raise ValueError(
                f"importance: expected finite values of shape {[num_experts, h]}, found {list(scores.shape)}"
                + ("" if torch.isfinite(scores).all() else " with NaN or infinity")
            )
    share = h // num_experts if k is None else _in_range("k", k, default=h, high=h)
    rest = h - num_experts * share if k is None else 0

    # Stable sorts, so that ties are the same on every device.
    order = scores.argsort(dim=1, descending=True, stable=True)  # [E, h]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :share], True)
    left_over = scores.masked_fill(chosen, -torch.inf).flatten()
    chosen.view(-1)[left_over.argsort(descending=True, stable=True)[:rest]] = True

    expert, neuron = chosen.nonzero(as_tuple=True)
    return FeedForwardWeights(
        up=scale * bank.up[expert, neuron],
        down=scale * bank.down[expert, :, neuron].T,
        gate=None if bank.gate is None else scale * bank.gate[expert, neuron],
        up_bias=None if bank.up_bias is None else scale * bank.up_bias[expert, neuron],
        gate_bias=None if bank.gate_bias is None else scale * bank.gate_bias[expert, neuron],
        down_bias=None if bank.down_bias is None else bank.down_bias.mean(dim=0),
    )


@register("svd")
def svd_kg(
    bank: FeedForwardWeights,
    *,
    rank: int | None = None,
    scale: float = 1.0,
    factors: Mapping[str, Iterable[Factors]] | None = None,
) -> FeedForwardWeights:
    """SVD-KG: ``W = scale * sum_i trunc_K(W_i)``, each expert's matrix cut to its K leading singular triplets.

    That sum is the product of the concatenated factors, ``[U_1..U_E] diag(S_1..S_E) [V_1..V_E]^T``, so its rank is at
    most E*K. Up, gate and down are treated each on its own. Biases are averaged and not scaled: the paper's text leaves
    them open, and E equal experts then keep their bias.

    Args:
        bank: experts, up [E, h, d].
        rank: K, triplets kept of every expert, 1 to min(h, d); default min(h, d) // E, but at least 1.
        scale: multiplies the matrices. E equal experts give E times their truncated matrix at scale 1.
        factors: by matrix, the experts' ``(U, S, V^T)``, where they are known already.
    """
    full_rank = min(bank.d_ff, bank.d_model)
    rank = _in_range("rank", rank, default=max(1, full_rank // bank.num_experts), high=full_rank)

    def gathered(name: str, tensor: Tensor) -> Tensor:
        if tensor.ndim == 2:
            return tensor.mean(dim=0)
        # One expert at a time: the factors of a large bank need not fit at once.
        found = (torch.linalg.svd(w, full_matrices=False) for w in tensor) if factors is None else factors[name]
        return scale * sum((u[:, :rank] * s[:rank]) @ vh[:rank] for u, s, vh in found)

    return FeedForwardWeights(**{name: gathered(name, tensor) for name, tensor in bank.tensors()})


def _in_range(name: str, value: int | None, *, default: int, high: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise ValueError(f"{name}: expected an integer from 1 to {high}, found {value!r}")
    return value
