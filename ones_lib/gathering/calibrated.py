"""Gatherings that look at data: they match what the MoE layer computes, where the paper's look at matrices alone.

All take ``calibration``, the :class:`ones_lib.calibration.LayerActivations` of a few thousand tokens, which they go through
piece by piece, adding up sums of products: memory does not grow with the number of tokens. Their result has the size of the
layer's output as it is, so they have no scale. E equal experts give the expert's function back by every one of them.

Notation as in :mod:`ones_lib.gathering.registry`: ``g_i(x)`` is expert i's gate, zero where it is not chosen, ``p_i`` its mean over
tokens, s the sum of all ``p_i``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ones_lib.calibration import LayerActivations, squared_error
from ones_lib.ffn import FeedForwardWeights, best_order, match_neurons
from ones_lib.gathering.paper import chosen_width, combined, integer_in_range, take_neurons
from ones_lib.gathering.registry import experts_of, register
from ones_lib.gathering.scale import scaled_output


@register("matched_average")
def matched_average(
    bank: FeedForwardWeights, *, calibration: LayerActivations | None = None, by: str = "weights"
) -> FeedForwardWeights:
    """Averaging of experts whose hidden neurons were put in a common order, weighted by how much the router uses them.

    The order of hidden neurons is arbitrary, so the mean of two experts means nothing unless neurons that do the same stand
    in the same place. Every expert's are put in the order most like the most used expert's, by linear assignment (Git
    Re-Basin, Ainsworth et al., arXiv 2209.04836; weighting by use as in M-SMoE, Li et al., arXiv 2310.01334). The output is
    multiplied by s.

    Args:
        bank: experts, up [E, h, d].
        calibration: gives the use and s; without it experts weigh alike and s is 1.
        by: what is likened: ``"weights"``, or ``"activations"``, by the correlation of the neurons' hidden activations.
    """
    if by not in ("weights", "activations"):
        raise ValueError(f"by: expected 'weights' or 'activations', found {by!r}")
    if calibration is None:
        if by == "activations":
            raise ValueError("calibration: expected activations of the layer to match neurons by, found None")
        use, gate_sum = bank.up.new_full((bank.num_experts,), 1 / bank.num_experts), 1.0
    else:
        use, gate_sum = calibration.expert_weights(), calibration.gate_sum()
    reference = int(use.argmax())
    experts = []
    for e in range(bank.num_experts):
        expert, order = bank.expert(e), None
        if e != reference and by == "weights":
            order = match_neurons(bank.expert(reference), expert)
        elif e != reference:
            order = best_order(_correlation(bank.expert(reference), expert, calibration))
        experts.append(expert if order is None else expert.with_neurons(order))
    mean = FeedForwardWeights.stack(experts).map(lambda t: torch.tensordot(use, t, dims=1))
    return scaled_output(mean, gate_sum)


@register("frequency_average", piecewise=True)
def frequency_average(bank: Sequence[FeedForwardWeights], *, calibration: LayerActivations) -> FeedForwardWeights:
    """Averaging with how often the router chooses each expert as its weight (as M-SMoE merges, Li et al., arXiv 2310.01334); the
    output is multiplied by s."""
    frequencies = calibration.expert_frequencies()
    mean = combined(bank, lambda tensors: torch.tensordot(frequencies.to(tensors), tensors, dims=1))
    return scaled_output(mean, calibration.gate_sum())


def _correlation(one: FeedForwardWeights, two: FeedForwardWeights, calibration: LayerActivations) -> Tensor:
    """[h, h]: correlation over tokens of the hidden activations of two experts; 0 for a neuron that never changes."""
    h = one.d_ff
    moments = torch.zeros(2 * h + 1, 2 * h + 1, dtype=torch.float64, device=one.up.device)
    for chunk in calibration.chunks():
        both = [expert.hidden(chunk.inputs, chunk.activation) for expert in (one, two)]
        features = torch.cat([*both, torch.ones_like(both[0][:, :1])], dim=1).double()
        moments += features.T @ features
    moments /= moments[-1, -1].clone()
    covariance = moments[:-1, :-1] - moments[:-1, -1:] * moments[-1:, :-1]
    deviation = covariance.diag().clamp(min=0).sqrt()
    scale = torch.where(deviation > 0, 1 / deviation, 0.0)
    return (scale[:, None] * covariance * scale)[:h, h:]


@register("contribution_topk")
def contribution_topk(
    bank: FeedForwardWeights, *, calibration: LayerActivations, k: int | None = None, d_ff: int | None = None
) -> FeedForwardWeights:
    """Top-KG by contribution: the hidden neurons that add most to the layer's output on data, of whichever expert.

    A neuron's importance is the mean over tokens of ``g_i(x) |a(x)| |v|``, with its activation a and output weights v: the
    gate-weighted norm of what it adds (the idea of REAP's saliency, Lasby et al., arXiv 2510.13999, there for whole
    experts). The neurons with the greatest are taken over all experts together, so that an expert's share grows with its use,
    where Top-KG gives every expert the same. Neurons keep the weights that lead to them; their output weights are multiplied
    by their expert's mean gate ``p_i``, the mean field of :mod:`ones_lib.gathering.registry`. Neurons with equal weights leading to
    them, as experts that were one have, count as one with the sum of their importances and outputs.

    Args:
        bank: experts, up [E, h, d].
        calibration: activations of the layer.
        k, d_ff: hidden neurons of the gathered FFN for each expert, or all in all; default d_ff = h.
    """
    num_experts, h = bank.num_experts, bank.d_ff
    wanted = chosen_width(k, d_ff, num_experts, h)
    mean_gates = calibration.gates.mean(dim=0)
    importance = bank.up.new_zeros(num_experts, h, dtype=torch.float64)
    for chunk in calibration.chunks():
        for e in range(num_experts):
            chosen = chunk.gates[:, e] != 0
            hidden = bank.expert(e).hidden(chunk.inputs[chosen], chunk.activation)
            importance[e] += (chunk.gates[chosen, e, None] * hidden.abs()).double().sum(dim=0)
    importance *= bank.down.norm(dim=1) / len(calibration.inputs)

    outputs = (mean_gates[:, None, None] * bank.down.mT).flatten(0, 1)  # [E*h, d]
    leading = [getattr(bank, n) for n in ("up", "gate", "up_bias", "gate_bias") if getattr(bank, n) is not None]
    rows = torch.cat([t.reshape(num_experts * h, -1) for t in leading], dim=1)
    _, same = torch.unique(rows, dim=0, return_inverse=True)  # [E*h]: neurons of one number are one
    count = int(same.max()) + 1
    first = torch.full((count,), len(same), device=same.device).scatter_reduce_(
        0, same, torch.arange(len(same), device=same.device), "amin"
    )
    total = importance.new_zeros(count).index_add_(0, same, importance.flatten())
    outputs = torch.zeros_like(outputs[:count]).index_add_(0, same, outputs)
    # In the experts' order, so that ties and the result are the same on every device.
    by_place = first.argsort()
    chosen = by_place[total[by_place].argsort(descending=True, stable=True)[:wanted].sort().values]
    ffn = take_neurons(experts_of(bank), first[chosen] // h, first[chosen] % h)
    parts = dict(ffn.tensors()) | {"down": outputs[chosen].T}
    if bank.down_bias is not None:
        parts["down_bias"] = mean_gates @ bank.down_bias
    return FeedForwardWeights(**parts)


@register("whitened_svd")
def whitened_svd(
    bank: FeedForwardWeights, *, calibration: LayerActivations, rank: int | None = None
) -> FeedForwardWeights:
    """Activation-aware SVD-KG: each expert's matrix cut to the K triplets that matter most for its output on data.

    Of all matrices of rank K, ``trunc_K(W S) S^-1`` with ``S S = mean x x^T`` changes the outputs ``W x`` least: the singular
    triplets in the metric of the inputs' second moment (SVD-LLM, Wang et al., arXiv 2403.07378; ASVD, Yuan et al., arXiv
    2312.05821). Means are over the tokens that the router sends to the expert, weighted by the squared gate, as its errors
    are in the layer's output; the inputs of down are the expert's hidden activations. Experts are averaged with their use as
    weights, biases too, and the output is multiplied by s.

    Args:
        bank: experts, up [E, h, d].
        calibration: activations of the layer.
        rank: K, 1 to min(h, d). None tries SVD-KG's min(h, d) // E, twice that, and so on up to full rank, and takes what has
            the least output error on the calibration.
    """
    full_rank = min(bank.d_ff, bank.d_model)
    share = max(1, full_rank // bank.num_experts)
    ranks = [share * 2**i for i in range(full_rank.bit_length()) if share * 2**i < full_rank] + [full_rank]
    if rank is not None:
        ranks = [integer_in_range("rank", rank, default=share, high=full_rank)]
    use, gate_sum = calibration.expert_weights(), calibration.gate_sum()
    gathered = [{name: torch.zeros_like(t[0]) for name, t in bank.tensors()} for _ in ranks]
    for e in range(bank.num_experts):
        if use[e] == 0:
            continue
        inputs, hidden = _second_moments(bank.expert(e), calibration, e)
        for name, tensor in bank.expert(e).tensors():
            if tensor.ndim == 2:
                left, right = _whitened_factors(tensor, hidden if name == "down" else inputs)
            for parts, k in zip(gathered, ranks, strict=True):
                parts[name] += use[e] * (tensor if tensor.ndim == 1 else (left[:, :k] @ right[:k]).to(tensor))
    found = [scaled_output(FeedForwardWeights(**parts), gate_sum) for parts in gathered]
    return found[0] if len(found) == 1 else min(found, key=lambda ffn: squared_error(ffn, calibration))


def _second_moments(expert: FeedForwardWeights, calibration: LayerActivations, e: int) -> tuple[Tensor, Tensor]:
    """``mean x x^T`` [d, d] of expert e's inputs and [h, h] of its hidden activations, weighted by the squared gate."""
    sums, total = None, 0.0
    for chunk in calibration.chunks():
        chosen = chunk.gates[:, e] != 0
        x, weights = chunk.inputs[chosen], (chunk.gates[chosen, e].square() * chunk.token_weights()[chosen]).double()
        parts = [x.double(), expert.hidden(x, chunk.activation).double()]
        products = [part.T @ (weights[:, None] * part) for part in parts]
        sums = products if sums is None else [a + b for a, b in zip(sums, products, strict=True)]
        total = total + weights.sum()
    return sums[0] / total, sums[1] / total


def _whitened_factors(matrix: Tensor, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """``left [m, r], right [r, n]`` whose first K columns and rows give the matrix of rank K nearest on inputs with that
    second moment [n, n]. Directions that the inputs hardly have (below 1e-6 of the mean) count as if they had that much."""
    values, vectors = torch.linalg.eigh(second_moment)
    roots = values.clamp(min=1e-6 * values.mean().item()).sqrt()
    u, s, vh = torch.linalg.svd((matrix.double() @ vectors) * roots, full_matrices=False)
    return u * s, (vh / roots) @ vectors.T
