"""Selection of whole experts, as Kim et al. prune MoEs to dense models of the active width (arXiv 2605.28207)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ones_lib.calibration import LayerActivations
from ones_lib.ffn import FeedForwardWeights, concatenate
from ones_lib.gathering.paper import check_range
from ones_lib.gathering.registry import Sizes, register
from ones_lib.gathering.scale import scaled_output

SCORES = ("sf", "pp", "cp", "acp", "do_acp")
GATES = ("uniform", "marginal", "conditional")


def _check_selection(sizes: Sizes, score: str, select: int | None, gate: str) -> None:
    for name, value, allowed in (("score", score, SCORES), ("gate", gate, GATES)):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {list(allowed)}, found {value!r}")
    count = (sizes.d_ff or sizes.h) // sizes.h
    if sizes.d_ff is not None and sizes.d_ff % sizes.h:
        raise ValueError(f"d_ff: expected a multiple of the experts' {sizes.h} hidden units, found {sizes.d_ff}")
    if select is not None and check_range("select", select, sizes.num_experts) < count:
        raise ValueError(f"select: expected at least the {count} experts that are put side by side, found {select}")


@register("expert_selection", check=_check_selection)
def expert_selection(
    bank: FeedForwardWeights,
    *,
    calibration: LayerActivations,
    score: str = "do_acp",
    select: int | None = None,
    gate: str = "uniform",
    d_ff: int | None = None,
) -> FeedForwardWeights:
    """The best experts by a score, side by side in one FFN (Kim et al., arXiv 2605.28207).

    With ``g_e(t)`` the gate of expert e at token t and ``f_e(t)`` its output, both for all tokens, an expert's score is

    - ``sf``, selection frequency: the part of the tokens that choose it;
    - ``pp``, pre-selection probability: its mean router probability before the top k;
    - ``cp``, conditional probability: its mean gate where it is chosen;
    - ``acp``: CP times the root mean square of its output, ``sqrt(mean_t |f_e(t)|^2)``;
    - ``do_acp``: experts are added one by one so that ``log det(K_S + r 1)`` rises most, with
      ``K_ij = sqrt(ACP_i ACP_j) mean_t <f_i(t), f_j(t)>`` and r the mean of K's diagonal divided by their number. They are
      important and differ from those already taken.

    With more experts selected than fit side by side, the first ones found each start a group. Every other expert joins the group
    whose start its outputs are most alike (cosine), and a group is averaged by its experts' scores. (The paper finds that
    grouping hardly matters; this rule is ours.)

    Args:
        bank: experts, up [E, h, d].
        calibration: activations of the layer; PP needs their ``probabilities``.
        score: one of :data:`SCORES`.
        select: number of experts to select, at least m; None: m.
        gate: what a network's output is multiplied by in place of the gates: ``uniform`` (s/m), ``marginal`` (the mean gate over
            all tokens, added up in a group) or ``conditional`` (CP, averaged in a group).
        d_ff: m*h hidden units, for m networks side by side; default h.
    """
    count = 1 if d_ff is None else d_ff // bank.d_ff
    select = count if select is None else select
    products = _output_products(bank, calibration) if score in ("acp", "do_acp") or select > count else None
    scores = _scores(calibration, score, products)
    if score == "do_acp":
        kernel = (scores[:, None] * scores).sqrt() * products
        order = _greedy(kernel, select, ridge=kernel.diagonal().mean().item() / count)
    else:
        order = scores.argsort(descending=True, stable=True)[:select].tolist()
    return concatenate([_merged(bank, g, scores, calibration, gate, count) for g in _groups(order, count, products)])


def conditional_gates(calibration: LayerActivations) -> Tensor:
    """CP: the mean gate of every expert where it is chosen [E]; 0 for one that never is."""
    chosen = (calibration.gates != 0).sum(dim=0)
    return calibration.gates.double().sum(dim=0) / chosen.clamp(min=1)


def _scores(calibration: LayerActivations, score: str, products: Tensor | None) -> Tensor:
    """The experts' scores [E]; for DO-ACP, ACP."""
    if score == "pp" and calibration.probabilities is None:
        raise ValueError("calibration: expected router probabilities for score 'pp', found none")
    by_name: dict[str, Callable[[], Tensor]] = {
        "sf": lambda: (calibration.gates != 0).double().mean(dim=0),
        "pp": lambda: calibration.probabilities.double().mean(dim=0),
        "cp": lambda: conditional_gates(calibration),
        "acp": lambda: conditional_gates(calibration) * products.diagonal().sqrt(),
    }
    return by_name[score.removeprefix("do_")]()


def _output_products(bank: FeedForwardWeights, calibration: LayerActivations) -> Tensor:
    """``mean_t <f_i(t), f_j(t)>`` of the experts' outputs on all tokens, [E, E]."""
    total = torch.zeros(bank.num_experts, bank.num_experts, dtype=torch.float64, device=bank.up.device)
    size = max(1, 2**26 // (bank.num_experts * bank.d_model))  # tokens at a time: a quarter of a GB of outputs
    for inputs in calibration.inputs.split(size):
        outputs = torch.stack([expert.apply(inputs, calibration.activation).flatten() for expert in bank.experts()])
        total += (outputs @ outputs.T).double()
    return total / len(calibration.inputs)


def _greedy(kernel: Tensor, count: int, ridge: float) -> list[int]:
    """``count`` indices, each the one that raises ``log det(K_S + ridge 1)`` most; of equal ones the first."""
    kernel = kernel + ridge * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    chosen: list[int] = []
    for _ in range(count):
        # A new index multiplies the determinant by its Schur complement.
        if chosen:
            block = kernel[chosen]  # [n, E]
            gains = kernel.diagonal() - (block * torch.linalg.solve(block[:, chosen], block)).sum(dim=0)
        else:
            gains = kernel.diagonal().clone()
        gains[chosen] = -float("inf")
        chosen.append(int(gains.argmax()))
    return chosen


def _groups(order: list[int], count: int, products: Tensor | None) -> list[list[int]]:
    """The selected experts in ``count`` groups."""
    groups = [[e] for e in order[:count]]
    for e in order[count:]:
        sizes = products.diagonal()[order[:count]].sqrt().clamp(min=1e-30)
        groups[int((products[e, order[:count]] / sizes).argmax())].append(e)
    return groups


def _merged(
    bank: FeedForwardWeights, group: list[int], scores: Tensor, calibration: LayerActivations, gate: str, count: int
) -> FeedForwardWeights:
    """A group's average by score, with its output multiplied by what stands for the gates."""
    weights = scores[group].clamp(min=1e-30)  # also where nothing of the group was ever chosen
    weights = weights / weights.sum()
    factors = {
        "uniform": lambda: calibration.gate_sum() / count,
        "marginal": lambda: calibration.gates[:, group].sum(dim=1).mean().item(),
        "conditional": lambda: (weights * conditional_gates(calibration)[group]).sum().item(),
    }
    mean = bank.map(lambda t: torch.tensordot(weights.to(t), t[group], dims=1))
    return scaled_output(mean, factors[gate]())
