"""Selection of whole experts: scores and sets by hand, and by numpy's determinants."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_bank
from test_calibrated_gathering import calibration_of, double_bank, draw, error, mixture
from test_gathering import assert_equal

from ones_lib import FeedForwardWeights, LayerActivations, collect_activations, gather
from ones_lib.ffn import concatenate
from ones_lib.gathering.selection import SCORES
from ones_lib.moe import MoEFeedForward

# Four tokens, three experts: expert 0 is chosen often with small gates, expert 1 once with a large one.
GATES = torch.tensor([[0.2, 0.8, 0.0], [0.4, 0.0, 0.6], [0.4, 0.0, 0.6], [0.2, 0.0, 0.0]], dtype=torch.float64)
PROBABILITIES = torch.tensor([[0.3, 0.4, 0.3], [0.1, 0.3, 0.6], [0.2, 0.2, 0.6], [0.3, 0.3, 0.4]], dtype=torch.float64)


def by_hand(bank=None, gates=GATES, probabilities=PROBABILITIES):
    bank = double_bank(gates.shape[1]) if bank is None else bank
    x = draw(len(gates), bank.d_model)
    return bank, LayerActivations(x, gates, mixture(bank, x, gates), F.gelu, probabilities=probabilities)


def selected(ffn, bank):
    """Which experts' up projections stand side by side in a gathered FFN."""
    parts = ffn.up.split(bank.d_ff)
    return [next(e for e in range(bank.num_experts) if torch.equal(part, bank.up[e])) for part in parts]


@pytest.mark.parametrize(("score", "expected"), [("sf", [0, 2, 1]), ("pp", [2, 1, 0]), ("cp", [1, 2, 0])])
def test_scores_of_the_router_by_hand(score, expected):
    """SF 1, 1/4, 1/2; PP 0.225, 0.3, 0.475; CP 0.3, 0.8, 0.6."""
    bank, calibration = by_hand()
    for count in (1, 2, 3):
        gathered = gather(bank, "expert_selection", calibration, count * 12, score=score)
        assert selected(gathered, bank) == expected[:count]


def test_acp_weighs_by_the_size_of_outputs():
    """CP 0.3, 0.8, 0.6: with outputs ten times as large, expert 0 comes first."""
    bank = double_bank(3)
    sizes = torch.tensor([10.0, 0.1, 1.0], dtype=torch.float64)
    bank = bank.times({"down": sizes[:, None, None], "down_bias": sizes[:, None]})
    bank, calibration = by_hand(bank)
    assert selected(gather(bank, "expert_selection", calibration, 24, score="acp"), bank) == [0, 2]


@pytest.mark.parametrize(
    ("gate", "factors"), [("uniform", [0.4, 0.4]), ("marginal", [0.3, 0.3]), ("conditional", [0.3, 0.6])]
)
def test_what_stands_for_the_gates_by_hand(gate, factors):
    """Experts 0 and 2 by SF: s = 0.8 over 2; mean gates 0.3 and 0.3; CP 0.3 and 0.6."""
    bank, calibration = by_hand()
    gathered = gather(bank, "expert_selection", calibration, 24, score="sf", gate=gate)
    parts = [bank.expert(e).times({"down": f, "down_bias": f}) for e, f in zip((0, 2), factors, strict=True)]
    assert_equal(gathered, concatenate(parts), atol=1e-12, rtol=0)


def test_of_duplicated_experts_do_acp_takes_one_and_sf_both():
    base = double_bank(3)
    bank = FeedForwardWeights.stack([base.expert(e) for e in (0, 0, 1, 2)])
    gates = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], dtype=torch.float64)
    bank, calibration = by_hand(bank, gates, None)
    assert selected(gather(bank, "expert_selection", calibration, 24, score="sf"), bank) == [0, 0]
    by_determinant = gather(bank, "expert_selection", calibration, 24, score="do_acp")
    assert len(set(selected(by_determinant, bank))) == 2


def test_do_acp_is_greedy_in_the_determinant():
    """By numpy, from the formula: every step takes the expert with the largest log det."""
    bank = double_bank(6)
    calibration = calibration_of(bank, tokens=200)
    outputs = np.stack([expert.apply(calibration.inputs).numpy() for expert in bank.experts()])
    products = np.einsum("itd,jtd->ij", outputs, outputs) / 200
    gates = calibration.gates.numpy()
    cp = gates.sum(axis=0) / (gates != 0).sum(axis=0)
    importance = cp * np.sqrt(np.diag(products))
    kernel = np.sqrt(np.outer(importance, importance)) * products
    ridge = np.diag(kernel).mean() / 3
    chosen = []
    for _ in range(3):
        left = [e for e in range(6) if e not in chosen]
        sets = [[*chosen, e] for e in left]
        values = [np.linalg.slogdet(kernel[np.ix_(s, s)] + ridge * np.eye(len(s)))[1] for s in sets]
        chosen = sets[int(np.argmax(values))]
    assert selected(gather(bank, "expert_selection", calibration, 36), bank) == chosen


def test_more_experts_than_networks_are_merged_by_score_with_those_they_are_like():
    """Experts 2 and 3 are copies of 0 and 1: each joins its copy's group, which is then that expert."""
    base = double_bank(2)
    bank = FeedForwardWeights.stack([base.expert(e) for e in (0, 1, 0, 1)])
    gates = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.5, 0.3, 0.1, 0.1]], dtype=torch.float64)
    bank, calibration = by_hand(bank, gates, None)
    arguments = {"score": "cp", "select": 4, "gate": "marginal"}
    gathered = gather(bank, "expert_selection", calibration, 24, **arguments)
    parts = [base.expert(e).times({"down": f, "down_bias": f}) for e, f in ((0, 0.6), (1, 0.4))]
    assert_equal(gathered, concatenate(parts), atol=1e-12, rtol=0)
    assert error(gathered, calibration) < 1e-12  # the gates do not depend on the token


def test_every_expert_side_by_side_is_the_layer_with_constant_gates(form):
    bank = random_bank(4, dtype=torch.float64, **form)
    gates = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).expand(50, 4)
    bank, calibration = by_hand(bank, gates, None)
    for score in set(SCORES) - {"pp"}:
        gathered = gather(bank, "expert_selection", calibration, 48, score=score, gate="marginal")
        assert error(gathered, calibration) < 1e-12


def test_probabilities_of_a_stream_are_the_routers_softmax():
    torch.manual_seed(0)
    layer = MoEFeedForward(8, 12, 4, top_k=2).eval()
    x = torch.randn(3, 5, 8)
    found = collect_activations(layer, lambda model, batch: model(batch), [x])[""]
    expected = (x @ layer.router.weight.T).softmax(dim=-1).flatten(0, 1)
    torch.testing.assert_close(found.probabilities, expected)
    assert torch.equal(found.probabilities.topk(2).indices.sort().values, found.gates.topk(2).indices.sort().values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "best"}, "score: expected one of"),
        ({"gate": "mean"}, "gate: expected one of"),
        ({"d_ff": 20}, "d_ff: expected a multiple of the experts' 12 hidden units, found 20"),
        ({"d_ff": 24, "select": 1}, "select: expected at least the 2 experts that are put side by side, found 1"),
        ({"select": 5}, "select: expected an integer from 1 to 4, found 5"),
        ({"score": "pp"}, "calibration: expected router probabilities for score 'pp', found none"),
    ],
)
def test_bad_arguments(arguments, message):
    bank = double_bank(4)
    with pytest.raises(ValueError, match=message):
        gather(bank, "expert_selection", calibration_of(bank), **arguments)
