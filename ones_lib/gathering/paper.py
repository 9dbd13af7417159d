"""The paper's four gathering methods: summation, averaging, Top-KG and SVD-KG (arXiv 2201.10890, knowledge gathering).

They take the experts as a sequence and load only a part of them at a time, because all experts of a published checkpoint may
not fit in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ones_lib.ffn import CHUNK, FeedForwardWeights, compute_dtype, concatenate
from ones_lib.gathering.registry import Sizes, register
from ones_lib.gathering.scale import Scale, scaled
from ones_lib.gathering.truncation import Factors, truncated


@register("sum", piecewise=True)
def summation(experts: Sequence[FeedForwardWeights], *, scale: Scale = 1.0) -> FeedForwardWeights:
    """Summation: ``W = scale * sum_i W_i``, and likewise for biases."""
    return scaled(combined(experts, lambda stacked: stacked.sum(dim=0)), scale)


@register("average", piecewise=True)
def averaging(experts: Sequence[FeedForwardWeights], *, scale: Scale = 1.0) -> FeedForwardWeights:
    """Averaging: ``W = scale * (1/E) sum_i W_i``, and likewise for biases."""
    return scaled(combined(experts, lambda stacked: stacked.mean(dim=0)), scale)


def combined(experts: Sequence[FeedForwardWeights], combine: Callable[[Tensor], Tensor]) -> FeedForwardWeights:
    """The FFN of the tensors ``combine(stacked)``, with the experts' tensors stacked as [E, n, ...], n rows at a time."""
    names = [name for name, _ in experts[0].tensors()]
    return FeedForwardWeights(**{n: torch.cat([combine(rows) for rows in _stacked_rows(experts, n)]) for n in names})


def _stacked_rows(experts: Sequence[FeedForwardWeights], name: str) -> Iterator[Tensor]:
    """The experts' tensors of that name as [E, n, ...], n rows at a time, in the dtype to compute in."""
    tensors = [getattr(expert, name) for expert in experts]
    count = max(1, CHUNK * len(tensors[0]) // (len(tensors) * tensors[0].numel()))
    for rows in zip(*(tensor.split(count) for tensor in tensors), strict=True):
        yield torch.stack(rows).to(compute_dtype(rows[0]))


#: By name: norms [E, h] of the neurons' input weights and of their output weights -> importances [E, h].
IMPORTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": torch.hypot, "product": torch.mul}


def _check_top_kg(sizes: Sizes, k: int | None, importance: str | Tensor) -> None:
    chosen_width(k, sizes.d_ff, sizes.num_experts, sizes.h)
    if not torch.is_tensor(importance) and importance not in list(IMPORTANCES):
        raise ValueError(f"importance: expected one of {list(IMPORTANCES)} or a tensor, found {importance!r}")


@register("topk", piecewise=True, check=_check_top_kg)
def top_kg(
    experts: Sequence[FeedForwardWeights],
    *,
    k: int | None = None,
    d_ff: int | None = None,
    importance: str | Tensor = "l2",
    scale: Scale = 1.0,
) -> FeedForwardWeights:
    """Top-KG: the K most important hidden neurons of every expert, side by side. A neuron's weights stay together.

    Without ``k``, the gathered FFN has ``d_ff`` neurons, by default the experts' own h. Then K = d_ff // E. If E does not
    divide d_ff, the remaining neurons are the most important ones left of any expert (ties: the lower expert, then the lower
    neuron). Neurons stand in the order of the experts, and within an expert in its own order, so a single expert is returned
    exactly.

    The output bias belongs to no neuron: it is the experts' mean, not multiplied by ``scale``.

    Args:
        experts: E single FFNs, up [h, d].
        k: neurons of every expert, 1 to h; the gathered FFN has E*k.
        d_ff: neurons of the gathered FFN, 1 to E*h; instead of ``k``.
        importance: ``"l2"``, the norm of a neuron's input and output weights together; ``"product"``, the norm of its input
            weights times the norm of its output weights; or a tensor [E, h].
        scale: factor of up, gate and down, and of the neurons' biases.
    """
    width = chosen_width(k, d_ff, len(experts), experts[0].d_ff)
    scores = _scores(experts, importance)
    share, rest = divmod(width, len(experts))

    # Stable sorts give the same order of ties on every device.
    order = scores.argsort(dim=1, descending=True, stable=True)  # [E, h]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :share], True)
    left_over = scores.masked_fill(chosen, -torch.inf).flatten()
    chosen.view(-1)[left_over.argsort(descending=True, stable=True)[:rest]] = True
    return scaled(take_neurons(experts, *chosen.nonzero(as_tuple=True)), scale, keep=("down_bias",))


def _scores(experts: Sequence[FeedForwardWeights], importance: str | Tensor) -> Tensor:
    """The importance [E, h] of every expert's hidden neurons."""
    if isinstance(importance, str):
        inputs = ["up"] if experts[0].gate is None else ["up", "gate"]
        into = sum(torch.cat([r.square().sum(dim=2) for r in _stacked_rows(experts, n)], dim=1) for n in inputs)
        out = sum(rows.square().sum(dim=1) for rows in _stacked_rows(experts, "down"))
        return IMPORTANCES[importance](into.sqrt(), out.sqrt())
    scores, shape = importance.to(experts[0].up), (len(experts), experts[0].d_ff)
    if scores.shape != shape or not torch.isfinite(scores).all():
        raise ValueError(
            f"importance: expected finite values of shape {list(shape)}, found {list(scores.shape)}"
            + ("" if torch.isfinite(scores).all() else " with NaN or infinity")
        )
    return scores


def chosen_width(k: int | None, d_ff: int | None, num_experts: int, h: int) -> int:
    """Number of neurons to choose: E*k, or d_ff (checked by :func:`ones_lib.gather`), or h."""
    if k is not None and d_ff is not None:
        raise ValueError(f"k, d_ff: expected one of the two, found {k} and {d_ff}")
    return (d_ff or h) if k is None else num_experts * check_range("k", k, h)


def take_neurons(experts: Sequence[FeedForwardWeights], expert: Tensor, neuron: Tensor) -> FeedForwardWeights:
    """The FFN of the hidden neurons ``neuron`` [n] of the experts ``expert`` [n], with ``expert`` in ascending order.

    Its output bias is the experts' mean.
    """
    counts = torch.bincount(expert, minlength=len(experts)).tolist()
    chosen = [e.with_neurons(n) for e, n in zip(experts, neuron.split(counts), strict=True) if len(n)]
    ffn = concatenate(chosen).map(lambda t: t.to(compute_dtype(t)))
    if ffn.down_bias is None:
        return ffn
    return replace(ffn, down_bias=torch.stack([e.down_bias.to(ffn.down) for e in experts]).mean(dim=0))


def check_rank(sizes: Sizes, rank: int | None, **_: object) -> None:
    """Raises ValueError unless ``rank`` is None or one of the experts' matrices'."""
    if rank is not None:
        check_range("rank", rank, min(sizes.h, sizes.d_model))


@register("svd", piecewise=True, check=check_rank)
def svd_kg(
    experts: Sequence[FeedForwardWeights],
    *,
    rank: int | None = None,
    scale: Scale = 1.0,
    factors: Mapping[str, Iterable[Factors]] | None = None,
) -> FeedForwardWeights:
    """SVD-KG: ``W = scale * sum_i trunc_K(W_i)``, with each expert's matrix cut to its K leading singular triplets.

    This sum is the product of the concatenated factors, ``[U_1..U_E] diag(S_1..S_E) [V_1..V_E]^T``: its rank is at most E*K.
    Up, gate and down are treated separately. The paper does not say how biases are gathered; here they are averaged and not
    scaled, so that E equal experts keep their bias.

    Args:
        experts: E single FFNs, up [h, d].
        rank: K, 1 to min(h, d); default min(h, d) // E, at least 1.
        scale: factor of the matrices. At scale 1, E equal experts give E times their truncated matrix.
        factors: the experts' ``(U, S, V^T)`` by matrix name, if they are known already.
    """
    full_rank = min(experts[0].d_ff, experts[0].d_model)
    rank = max(1, full_rank // len(experts)) if rank is None else rank

    def gathered(name: str, ndim: int) -> Tensor:
        tensors = (getattr(expert, name) for expert in experts)
        if ndim == 1:
            return torch.stack([t.to(compute_dtype(t)) for t in tensors]).mean(dim=0)
        if factors is None:
            cut = (truncated(matrix, rank) for matrix in tensors)
        else:
            cut = ((u[:, :rank] * s[:rank]) @ vh[:rank] for u, s, vh in factors[name])
        return sum(cut)  # generators: one expert at a time is in memory

    ffn = FeedForwardWeights(**{name: gathered(name, tensor.ndim) for name, tensor in experts[0].tensors()})
    return scaled(ffn, scale, keep=("up_bias", "gate_bias", "down_bias"))


def check_range(name: str, value: int, high: int) -> int:
    """``value``; raises ValueError unless it is an integer from 1 to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise ValueError(f"{name}: expected an integer from 1 to {high}, found {value!r}")
    return value
