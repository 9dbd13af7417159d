"""Gathering methods that use data. The paper's methods see only the weights; these see what the MoE layer computes.

All take ``calibration``, the :class:`ones_lib.LayerActivations` of a few thousand tokens, and go through it in chunks, so
memory does not grow with the number of tokens. Their output has the size of the layer's output, so they have no ``scale``.
Of E equal experts each gives the layer's function, s times the expert's (whitened SVD-KG at full rank). Notation as in
:mod:`ones_lib.gathering`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ones_lib.calibration import LayerActivations
from ones_lib.ffn import CHUNK, FeedForwardWeights, match_neurons
from ones_lib.gathering.paper import check_rank, chosen_width, combined, take_neurons
from ones_lib.gathering.registry import Sizes, register
from ones_lib.gathering.scale import scaled_output


@register("matched_average")
def matched_average(bank: FeedForwardWeights, *, calibration: LayerActivations | None = None) -> FeedForwardWeights:
    """Averaging after the experts' hidden neurons are put in a common order, weighted by each expert's share of the gates.

    The order of hidden neurons is arbitrary, so the mean of two experts is meaningful only if similar neurons stand in the
    same place. Each expert's neurons are put in the order most similar to the most used expert's, by linear assignment (Git
    Re-Basin, Ainsworth et al., arXiv 2209.04836; weights as in M-SMoE, Li et al., arXiv 2310.01334). The output is
    multiplied by s.

    Args:
        bank: experts, up [E, h, d].
        calibration: for the shares and s; without it the weights are equal and s = 1.
    """
    if calibration is None:
        shares, gate_sum = bank.up.new_full((bank.num_experts,), 1 / bank.num_experts), 1.0
    else:
        shares, gate_sum = calibration.expert_weights(), calibration.gate_sum()
    experts, most_used = bank.experts(), int(shares.argmax())
    for e, expert in enumerate(experts):
        if e != most_used:
            experts[e] = expert.with_neurons(match_neurons(experts[most_used], expert))
    mean = FeedForwardWeights.stack(experts).map(lambda t: torch.tensordot(shares, t, dims=1))
    return scaled_output(mean, gate_sum)


@register("frequency_average", piecewise=True)
def frequency_average(experts: Sequence[FeedForwardWeights], *, calibration: LayerActivations) -> FeedForwardWeights:
    """Averaging weighted by each expert's share of the assignments, as in M-SMoE (Li et al., arXiv 2310.01334).

    The output is multiplied by s.
    """
    frequencies = calibration.expert_frequencies()
    mean = combined(experts, lambda stacked: torch.tensordot(frequencies.to(stacked), stacked, dims=1))
    return scaled_output(mean, calibration.gate_sum())


def _check_contribution_topk(sizes: Sizes, k: int | None) -> None:
    chosen_width(k, sizes.d_ff, sizes.num_experts, sizes.h)


@register("contribution_topk", check=_check_contribution_topk)
def contribution_topk(
    bank: FeedForwardWeights, *, calibration: LayerActivations, k: int | None = None, d_ff: int | None = None
) -> FeedForwardWeights:
    """Top-KG by contribution: the hidden neurons that add most to the layer's output on data, of any expert.

    A neuron with activation a and output weights v has the importance ``mean over tokens of g_i(x) |a(x)| |v|``, the norm of
    what it adds (as in REAP, Lasby et al., arXiv 2510.13999, there for whole experts). The most important neurons of all
    experts together are chosen, so more come from an expert that is used more; Top-KG takes equally many of each.

    Neurons keep their input weights. Their output weights are multiplied by their expert's mean gate ``p_i``, as in the mean
    field (:mod:`ones_lib.gathering.scale`). Neurons with equal input weights, as in experts that started as copies, count as
    one neuron, with the sum of their importances and output weights. Where fewer than were asked for are different, the first
    ones are there again, with output weights of zero.

    Args:
        bank: experts, up [E, h, d].
        calibration: activations of the layer.
        k, d_ff: the gathered FFN has E*k or d_ff hidden neurons; default h.
    """
    num_experts, h = bank.num_experts, bank.d_ff
    wanted = chosen_width(k, d_ff, num_experts, h)
    mean_gates = calibration.gates.mean(dim=0)
    first, group = _equal_neurons(bank)
    importance = _contributions(bank, calibration).flatten()
    importance = importance.new_zeros(len(first)).index_add_(0, group, importance)
    outputs = (mean_gates[:, None, None] * bank.down.mT).flatten(0, 1)  # [E*h, d]
    outputs = torch.zeros_like(outputs[: len(first)]).index_add_(0, group, outputs)

    # Ordered by the experts' order, so that ties and the result are the same on every device.
    by_place = first.argsort()
    chosen = by_place[importance[by_place].argsort(descending=True, stable=True)[:wanted].sort().values]
    ffn = take_neurons(bank.experts(), first[chosen] // h, first[chosen] % h)
    down_bias = None if bank.down_bias is None else mean_gates @ bank.down_bias
    return replace(ffn, down=outputs[chosen].T, down_bias=down_bias).widened(wanted)


def _contributions(bank: FeedForwardWeights, calibration: LayerActivations) -> Tensor:
    """``mean over tokens of g_i(x) |a(x)| |v|`` for every hidden neuron, [E, h]."""
    total = bank.up.new_zeros(bank.num_experts, bank.d_ff, dtype=torch.float64)
    for chunk in calibration.chunks():
        for e, expert in enumerate(bank.experts()):
            chosen = chunk.gates[:, e] != 0
            hidden = expert.hidden(chunk.inputs[chosen], chunk.activation)
            total[e] += (chunk.gates[chosen, e, None] * hidden.abs()).double().sum(dim=0)
    return total * (bank.down.norm(dim=1) / len(calibration.inputs))


def _equal_neurons(bank: FeedForwardWeights) -> tuple[Tensor, Tensor]:
    """Groups of hidden neurons with equal input weights: each group's first neuron [groups], each neuron's group [E*h].

    Neuron j of expert e has the index e*h + j.
    """
    inputs = [getattr(bank, n) for n in ("up", "gate", "up_bias", "gate_bias") if getattr(bank, n) is not None]
    rows = [t.reshape(bank.num_experts * bank.d_ff, -1) for t in inputs]
    _, group = torch.unique(_hashes(rows), return_inverse=True)  # of rows as they are it takes minutes for a large bank
    index = torch.arange(len(group), device=group.device)
    first = torch.full((int(group.max()) + 1,), len(group), device=group.device)
    return first.scatter_reduce_(0, group, index, "amin"), group


def _hashes(parts: list[Tensor]) -> Tensor:
    """64 bits for each row of all ``parts`` [n, p] together, by their bits: equal rows have equal ones, and others almost surely
    others."""
    generator, total = torch.Generator().manual_seed(0), 0
    for rows in parts:
        odd = 2 * torch.randint(2**62, rows.shape[1:], generator=generator).to(rows.device) + 1
        bits = torch.int64 if rows.dtype == torch.float64 else torch.int32
        size = max(1, CHUNK // rows.shape[1])
        total = total + torch.cat([((part + 0.0).view(bits) * odd).sum(dim=1) for part in rows.split(size)])
    return total


@register("whitened_svd", check=check_rank)
def whitened_svd(
    bank: FeedForwardWeights, *, calibration: LayerActivations, rank: int | None = None
) -> FeedForwardWeights:
    """SVD-KG that keeps, of each expert's matrices, the K triplets that matter most for their outputs on data.

    Of all matrices of rank K, ``trunc_K(W S) S^-1`` with ``S S = mean x x^T`` changes the outputs ``W x`` least (SVD-LLM,
    Wang et al., arXiv 2403.07378; ASVD, Yuan et al., arXiv 2312.05821). The mean is over the tokens that the router sends to
    the expert, weighted by the squared gate, because that is the weight of the expert's errors in the layer's output. For
    down, x is the expert's hidden activation. Matrices and biases are averaged by the experts' shares of the gates, and the
    output is multiplied by s.

    Args:
        bank: experts, up [E, h, d].
        calibration: activations of the layer.
        rank: K, 1 to min(h, d). None tries SVD-KG's min(h, d) // E and its doublings up to full rank, and takes the one with
            the smallest output error on the calibration.
    """
    full_rank = min(bank.d_ff, bank.d_model)
    if rank is None:
        least = max(1, full_rank // bank.num_experts)
        ranks = [least * 2**i for i in range(full_rank.bit_length()) if least * 2**i < full_rank] + [full_rank]
    else:
        ranks = [rank]
    shares, gate_sum = calibration.expert_weights(), calibration.gate_sum()
    gathered = [{name: torch.zeros_like(t[0]) for name, t in bank.tensors()} for _ in ranks]
    for e, expert in enumerate(bank.experts()):
        if shares[e] == 0:
            continue
        inputs, hidden = _second_moments(expert, calibration, e)
        for name, tensor in expert.tensors():
            if tensor.ndim == 2:
                left, right = _whitened_factors(tensor, hidden if name == "down" else inputs)
            for parts, k in zip(gathered, ranks, strict=True):
                parts[name] += shares[e] * (tensor if tensor.ndim == 1 else (left[:, :k] @ right[:k]).to(tensor))
    found = [scaled_output(FeedForwardWeights(**parts), gate_sum) for parts in gathered]
    return found[0] if len(found) == 1 else min(found, key=calibration.squared_error)


def _second_moments(expert: FeedForwardWeights, calibration: LayerActivations, e: int) -> tuple[Tensor, Tensor]:
    """``mean x x^T`` of expert e's inputs [d, d] and of its hidden activations [h, h], weighted by the squared gate."""
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
    """``left [m, r], right [r, n]``: their first K columns and rows give the best matrix of rank K on the inputs.

    ``second_moment`` [n, n] is the inputs' ``mean x x^T``. Its eigenvalues count as at least 1e-6 of their mean.
    """
    values, vectors = torch.linalg.eigh(second_moment)
    roots = values.clamp(min=1e-6 * values.mean().item()).sqrt()
    u, s, vh = torch.linalg.svd((matrix.double() @ vectors) * roots, full_matrices=False)
    return u * s, (vh / roots) @ vectors.T
