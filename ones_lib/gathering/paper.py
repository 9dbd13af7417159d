"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ones_lib.ffn import _CHUNK, FeedForwardWeights, compute_dtype, concatenate
from ones_lib.gathering.registry import experts_of, register
from ones_lib.gathering.scale import Scale, _scaled, _scaled_all
from ones_lib.gathering.truncation import Factors, truncated

if TYPE_CHECKING:
    pass


def _stacked_pieces(experts: Sequence[FeedForwardWeights], name: str) -> Iterator[Tensor]:
    """The experts' tensors [E, n, ...], a few rows at a time, in the precision to compute in."""
    tensors = [getattr(expert, name) for expert in experts]
    rows = max(1, _CHUNK * len(tensors[0]) // (len(tensors) * tensors[0].numel()))
    for pieces in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
        yield torch.stack(pieces).to(compute_dtype(pieces[0]))


def combined(
    bank: FeedForwardWeights | Sequence[FeedForwardWeights], combine: Callable[[Tensor], Tensor]
) -> FeedForwardWeights:
    """The FFN of the tensors ``combine(stacked [E, n, ...])``, a few rows at a time."""
    experts = experts_of(bank)
    names = [name for name, _ in experts[0].tensors()]
    return FeedForwardWeights(**{n: torch.cat([combine(t) for t in _stacked_pieces(experts, n)]) for n in names})


@register("sum", piecewise=True)
def summation(
    bank: FeedForwardWeights | Sequence[FeedForwardWeights], *, scale: Scale | str = 1.0
) -> FeedForwardWeights:
    """Summation: ``W = scale * sum_i W_i``, biases likewise."""
    return _scaled_all(combined(bank, lambda tensors: tensors.sum(dim=0)), scale)


@register("average", piecewise=True)
def averaging(
    bank: FeedForwardWeights | Sequence[FeedForwardWeights], *, scale: Scale | str = 1.0
) -> FeedForwardWeights:
    """Averaging: ``W = scale * (1/E) sum_i W_i``, biases likewise."""
    return _scaled_all(combined(bank, lambda tensors: tensors.mean(dim=0)), scale)


def _in_norm(experts: Sequence[FeedForwardWeights]) -> Tensor:
    """[E, h]: L2 norm of each hidden neuron's input weights (up, and gate where there is one)."""
    names = ("up",) if experts[0].gate is None else ("up", "gate")
    return sum(_row_squares(experts, name) for name in names).sqrt()


def _row_squares(experts: Sequence[FeedForwardWeights], name: str) -> Tensor:
    return torch.cat([tensors.square().sum(dim=2) for tensors in _stacked_pieces(experts, name)], dim=1)


def _out_norm(experts: Sequence[FeedForwardWeights]) -> Tensor:
    """[E, h]: L2 norm of each hidden neuron's output weights."""
    return sum(tensors.square().sum(dim=1) for tensors in _stacked_pieces(experts, "down")).sqrt()


#: Importance of hidden neurons by name, experts -> [E, h].
IMPORTANCES: dict[str, Callable[[Sequence[FeedForwardWeights]], Tensor]] = {
    "l2": lambda experts: torch.hypot(_in_norm(experts), _out_norm(experts)),
    "product": lambda experts: _in_norm(experts) * _out_norm(experts),
}


@register("topk", piecewise=True)
def top_kg(
    bank: FeedForwardWeights | Sequence[FeedForwardWeights],
    *,
    k: int | None = None,
    d_ff: int | None = None,
    importance: str | Tensor = "l2",
    scale: Scale | str = 1.0,
) -> FeedForwardWeights:
    """Top-KG: the K most important hidden neurons of every expert, concatenated; a neuron's weights stay together.

    With ``k`` left out the gathered FFN has ``d_ff`` neurons, by default the experts' own ``h``: K = d_ff // E of every expert,
    and where E does not divide d_ff the remaining ``d_ff - E*K`` places go to the most important neurons not yet chosen, of
    whichever expert (ties: the lower expert, then the lower neuron). Within the result neurons stand in the experts' order, then in
    their order inside the expert, so one expert comes back exactly.

    The output bias is the experts' mean, not scaled: it belongs to no neuron.

    Args:
        bank: experts, up [E, h, d].
        k: neurons of every expert, 1 to h; the gathered FFN then has d_ff = E*k.
        d_ff: neurons of the result, 1 to E*h, instead of ``k``.
        importance: ``"l2"`` (norm of a neuron's in- and out-weights together), ``"product"`` (norm of the in-weights
            times norm of the out-weights), or a tensor [E, h] of one's own.
        scale: multiplies up, gate and down, and the biases of the neurons.
    """
    experts = experts_of(bank)
    num_experts, h = len(experts), experts[0].d_ff
    width = chosen_width(k, d_ff, num_experts, h)
    if isinstance(importance, str):
        if importance not in IMPORTANCES:
            raise ValueError(f"importance: expected one of {list(IMPORTANCES)} or a tensor, found {importance!r}")
        scores = IMPORTANCES[importance](experts)
    else:
        scores = importance.to(experts[0].up)
        if scores.shape != (num_experts, h) or not torch.isfinite(scores).all():
            raise ValueError(
                f"importance: expected finite values of shape {[num_experts, h]}, found {list(scores.shape)}"
                + ("" if torch.isfinite(scores).all() else " with NaN or infinity")
            )
    share, rest = divmod(width, num_experts)

    # Stable sorts, so that ties are the same on every device.
    order = scores.argsort(dim=1, descending=True, stable=True)  # [E, h]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :share], True)
    left_over = scores.masked_fill(chosen, -torch.inf).flatten()
    chosen.view(-1)[left_over.argsort(descending=True, stable=True)[:rest]] = True

    expert, neuron = chosen.nonzero(as_tuple=True)
    ffn = take_neurons(experts, expert, neuron)
    return FeedForwardWeights(**{n: t if n == "down_bias" else _scaled(n, t, scale) for n, t in ffn.tensors()})


def chosen_width(k: int | None, d_ff: int | None, num_experts: int, h: int) -> int:
    """Hidden neurons of an FFN of chosen neurons: E*k, or d_ff, or h."""
    if k is not None and d_ff is not None:
        raise ValueError(f"k, d_ff: expected one of the two, found {k} and {d_ff}")
    if k is not None:
        return num_experts * integer_in_range("k", k, default=h, high=h)
    return integer_in_range("d_ff", d_ff, default=h, high=num_experts * h)


def take_neurons(experts: Sequence[FeedForwardWeights], expert: Tensor, neuron: Tensor) -> FeedForwardWeights:
    """The FFN of hidden neurons ``neuron`` [n] of experts ``expert`` [n], in ascending order, all with their weights; output
    bias: the mean."""
    counts = torch.bincount(expert, minlength=len(experts)).tolist()
    chosen = [e.with_neurons(n) for e, n in zip(experts, neuron.split(counts), strict=True) if len(n)]
    parts = dict(concatenate(chosen).map(lambda t: t.to(compute_dtype(t))).tensors())
    if "down_bias" in parts:
        parts["down_bias"] = torch.stack([e.down_bias.to(parts["down"]) for e in experts]).mean(dim=0)
    return FeedForwardWeights(**parts)


@register("svd", piecewise=True)
def svd_kg(
    bank: FeedForwardWeights | Sequence[FeedForwardWeights],
    *,
    rank: int | None = None,
    scale: Scale | str = 1.0,
    exact: bool | None = None,
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
        exact: False cuts the matrices by :func:`truncated`'s fast way, True by their whole decomposition; None takes the fast
            way for large matrices of which little is kept.
        factors: by matrix, the experts' ``(U, S, V^T)``, where they are known already.
    """
    experts = experts_of(bank)
    full_rank = min(experts[0].d_ff, experts[0].d_model)
    rank = integer_in_range("rank", rank, default=max(1, full_rank // len(experts)), high=full_rank)

    def gathered(name: str, ndim: int) -> Tensor:
        tensors = (getattr(e, name) for e in experts)
        if ndim == 1:
            return torch.stack([t.to(compute_dtype(t)) for t in tensors]).mean(dim=0)
        # One expert at a time: what is made of a large bank need not fit at once.
        if factors is None:
            cut = (truncated(w, rank, exact) for w in tensors)
        else:
            cut = ((u[:, :rank] * s[:rank]) @ vh[:rank] for u, s, vh in factors[name])
        return _scaled(name, sum(cut), scale)

    return FeedForwardWeights(**{name: gathered(name, tensor.ndim) for name, tensor in experts[0].tensors()})


def integer_in_range(name: str, value: int | None, *, default: int, high: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise ValueError(f"{name}: expected an integer from 1 to {high}, found {value!r}")
    return value
