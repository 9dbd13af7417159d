"""Gatherings that look at data, and scales that follow from router and data: properties, plain loops, numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import equal_bank, random_bank
from test_gathering import METHODS, assert_equal, permuted

from ones_lib import FeedForwardWeights, LayerActivations, collect_activations, gather, gathering_methods
from ones_lib.calibration import _Draw
from ones_lib.gathering import regression
from ones_lib.gathering.calibrated import _whitened_factors
from ones_lib.gathering.registry import needs_calibration, uses_calibration
from ones_lib.moe import MoEFeedForward

CALIBRATED = ["matched_average", "frequency_average", "contribution_topk", "whitened_svd", "readout", "fit"]
CALIBRATED += ["expert_selection"]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixture(bank, x, gates, activation=F.gelu):
    """What a layer with these gates [N, E] computes, as the equation reads."""
    return sum(gates[:, e, None] * bank.expert(e).apply(x, activation) for e in range(bank.num_experts))


def calibration_of(bank, tokens=300, gate_sum=1.0, top_k=2, seed=0, weights=None, activation=F.gelu):
    """Tokens through the bank with top-k gates that sum to ``gate_sum``."""
    x = draw(tokens, bank.d_model, seed=seed).to(bank.up)
    values, chosen = draw(tokens, bank.num_experts, seed=seed + 1).softmax(dim=1).topk(top_k)
    gates = torch.zeros(tokens, bank.num_experts, dtype=torch.float64).scatter_(1, chosen, values)
    gates = (gate_sum * gates / gates.sum(dim=1, keepdim=True)).to(bank.up)
    return LayerActivations(x, gates, mixture(bank, x, gates, activation), activation, weights)


def error(ffn, calibration):
    return calibration.squared_error(ffn) ** 0.5


def double_bank(num_experts=4, **kwargs):
    return random_bank(num_experts, dtype=torch.float64, **kwargs)


def test_the_calibrated_methods_are_listed_and_say_what_they_need():
    assert gathering_methods() == [*METHODS, *CALIBRATED]
    assert [m for m in gathering_methods() if uses_calibration(m)] == CALIBRATED
    assert [m for m in gathering_methods() if needs_calibration(m)] == CALIBRATED[1:]
    assert [needs_calibration("sum", scale) for scale in (0.5, "router", "scalar", "vector")] == [0, 0, 1, 1]
    assert uses_calibration("sum", "router")


# --- what must hold for each ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate_sum", [1.0, 0.6])
@pytest.mark.parametrize("method", CALIBRATED)
def test_equal_experts_give_the_layer_back(method, form, gate_sum):
    """On the calibration and on other tokens."""
    bank = equal_bank(4, **form)
    gathered = gather(bank, method, calibration=calibration_of(bank, gate_sum=gate_sum))
    for seed in (0, 7):
        assert error(gathered, calibration_of(bank, gate_sum=gate_sum, seed=seed)) < 1e-4
    assert gathered.d_ff == 12


@pytest.mark.parametrize("method", CALIBRATED)
def test_one_expert_comes_back(method):
    bank = random_bank(1)
    assert (
        error(gather(bank, method, calibration=calibration_of(bank, top_k=1)), calibration_of(bank, top_k=1, seed=5))
        < 1e-4
    )


@pytest.mark.parametrize("method", CALIBRATED)
def test_statistics_of_a_stream_are_those_of_the_whole_batch(method, monkeypatch, form):
    bank = double_bank(3, **form)
    calibration = calibration_of(bank, tokens=100, weights=draw(100).exp())
    options = {"steps": 5} if method == "fit" else {}
    whole = gather(bank, method, calibration=calibration, **options)
    pieces = LayerActivations.chunks
    monkeypatch.setattr(LayerActivations, "chunks", lambda self: pieces(self, size=7))
    assert sum(len(c.inputs) for c in calibration.chunks()) == 100
    assert_equal(gather(bank, method, calibration=calibration, **options), whole, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("method", CALIBRATED)
def test_result_is_like_the_bank_and_leaves_it_alone(method):
    bank = random_bank(4, dtype=torch.bfloat16).map(lambda t: t.requires_grad_())
    calibration = calibration_of(bank.map(torch.detach))
    before, state = bank.map(lambda t: t.detach().clone()), torch.get_rng_state()
    gathered = gather(bank, method, calibration=calibration)
    assert all(t.dtype == torch.bfloat16 and not t.requires_grad for _, t in gathered.tensors())
    assert_equal(bank.map(torch.detach), before, atol=0, rtol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(gather(bank, method, calibration=calibration), gathered, atol=0, rtol=0)  # again the same


def test_each_step_of_knowing_more_of_the_function_is_nearer_to_it():
    """Fit < read-out < what it started from < raw summation."""
    bank = double_bank(4)
    calibration = calibration_of(bank, tokens=2000)
    errors = [
        error(gather(bank, m, calibration=calibration), calibration)
        for m in ("fit", "readout", "contribution_topk", "sum")
    ]
    assert errors == sorted(set(errors))


# --- one by one -------------------------------------------------------------------------------------------------------


def test_matching_recovers_a_planted_permutation_exactly(form):
    bank = equal_bank(3, dtype=torch.float64, **form)
    moved, _ = permuted(bank, expert=0, seed=1)
    moved, _ = permuted(moved, expert=2, seed=2)
    calibration = calibration_of(moved)
    reference = int(calibration.expert_weights().argmax())
    gathered = gather(moved, "matched_average", calibration=calibration)
    assert_equal(gathered, moved.expert(reference), atol=1e-12, rtol=0)
    plain = gather(moved, "average")
    assert error(plain, calibration) > 0.1


def test_matched_average_weighs_experts_by_their_use():
    """Neurons in order already; gates by hand: expert 1 has three quarters of them, and they sum to 0.8."""
    base = double_bank(1)
    bank = FeedForwardWeights.stack([base.expert(0), base.expert(0).map(lambda t: 1.5 * t)])
    x = draw(10, 8)
    gates = torch.tensor([[0.2, 0.6]], dtype=torch.float64).expand(10, 2)
    calibration = LayerActivations(x, gates, mixture(bank, x, gates), F.gelu)
    gathered = gather(bank, "matched_average", calibration=calibration)
    torch.testing.assert_close(gathered.up, (0.25 + 0.75 * 1.5) * base.up[0])
    torch.testing.assert_close(gathered.down, 0.8 * (0.25 + 0.75 * 1.5) * base.down[0])
    torch.testing.assert_close(
        gather(bank, "matched_average").down, 1.25 * base.down[0]
    )  # without data they weigh alike


def test_contribution_is_that_of_a_plain_loop(form):
    bank = double_bank(3, **form)
    calibration = calibration_of(bank, tokens=50, gate_sum=0.7)
    gathered = gather(bank, "contribution_topk", calibration=calibration, k=2)
    importance = {}
    for e in range(3):
        hidden = bank.expert(e).hidden(calibration.inputs)
        for j in range(12):
            added = calibration.gates[:, e, None] * hidden[:, j, None] * bank.down[e, :, j]
            importance[e, j] = added.norm(dim=1).mean().item()
    chosen = sorted(sorted(importance, key=lambda n: -importance[n])[:6])
    mean = calibration.gates.mean(dim=0)
    torch.testing.assert_close(gathered.up, torch.stack([bank.up[n] for n in chosen]))
    torch.testing.assert_close(gathered.down, torch.stack([mean[e] * bank.down[e, :, j] for e, j in chosen], dim=1))
    if bank.down_bias is not None:
        torch.testing.assert_close(gathered.down_bias, sum(mean[e] * bank.down_bias[e] for e in range(3)))


def test_an_expert_that_is_not_used_gives_nothing():
    bank = double_bank(3)
    loud = FeedForwardWeights(**{n: torch.cat([t[:2], 100 * t[2:]]) for n, t in bank.tensors()})
    x, gates = draw(60, 8), torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).expand(60, 3)
    calibration = LayerActivations(x, gates, mixture(loud, x, gates), F.gelu)
    for method in ("matched_average", "contribution_topk", "whitened_svd"):
        with_it = gather(loud, method, calibration=calibration)
        two = LayerActivations(x, gates[:, :2], calibration.outputs, F.gelu)
        options = {"rank": 4} if method == "whitened_svd" else {}
        with_it = gather(loud, method, calibration=calibration, **options)
        assert_equal(with_it, gather(loud.map(lambda t: t[:2]), method, calibration=two, **options))


def test_whitening_with_identity_is_plain_svd():
    matrix = draw(5, 8)
    left, right = _whitened_factors(matrix, torch.eye(8, dtype=torch.float64))
    u, s, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    for k in (1, 3, 5):
        np.testing.assert_allclose((left[:, :k] @ right[:k]).numpy(), (u[:, :k] * s[:k]) @ vh[:k], atol=1e-12)


def test_whitened_svd_on_white_inputs_is_svd_kg_on_the_way_in():
    """Every expert sees each axis equally often: its inputs' second moment is the identity."""
    bank = double_bank(4)
    x = torch.cat([np.sqrt(8) * torch.eye(8, dtype=torch.float64)] * 4)
    gates = F.one_hot(torch.arange(4).repeat_interleave(8), 4).double()
    calibration = LayerActivations(x, gates, mixture(bank, x, gates), F.gelu)
    for rank in (1, 2, 5):
        found, plain = (
            gather(bank, method, calibration=calibration, rank=rank, **options)
            for method, options in (("whitened_svd", {}), ("svd", {"scale": 1 / 4}))
        )
        torch.testing.assert_close(found.up, plain.up)
        torch.testing.assert_close(found.up_bias, bank.up_bias.mean(dim=0))
        assert not torch.allclose(found.down, plain.down)  # the hidden activations are not white


def test_whitened_truncation_is_the_best_of_its_rank_on_data():
    """Its error is the tail of the spectrum of W X^T (Eckart-Young), below plain truncation's."""
    x = draw(100, 8) @ torch.diag(torch.logspace(0, -2, 8, dtype=torch.float64)) @ draw(8, 8, seed=3)
    matrix = draw(5, 8, seed=1)
    left, right = _whitened_factors(matrix, x.T @ x / 100)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    tail = torch.linalg.svdvals(matrix @ x.T)
    for k in (1, 2, 4):
        best = ((left[:, :k] @ right[:k] - matrix) @ x.T).norm()
        torch.testing.assert_close(best, tail[k:].norm(), rtol=1e-4, atol=1e-6)
        assert best < ((u[:, :k] * s[:k]) @ vh[:k] @ x.T - matrix @ x.T).norm()


def test_whitened_svd_takes_the_rank_of_the_least_error():
    bank = double_bank(4)
    calibration = calibration_of(bank)
    errors = {k: error(gather(bank, "whitened_svd", calibration=calibration, rank=k), calibration) for k in (2, 4, 8)}
    assert error(gather(bank, "whitened_svd", calibration=calibration), calibration) == pytest.approx(
        min(errors.values())
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("hidden", ["average", "topk", "svd", "matched_average"])
def test_readout_is_numpys_least_squares(hidden, weighted, form):
    bank = double_bank(4, **form)
    weights = draw(300).exp() if weighted else None
    calibration = calibration_of(bank, weights=weights)
    gathered = gather(bank, "readout", calibration=calibration, hidden=hidden, ridge=0)
    units = gathered.hidden(calibration.inputs)
    if bank.down_bias is not None:
        units = torch.cat([units, torch.ones(300, 1)], dim=1)
    root = (weights if weighted else torch.ones(300, dtype=torch.float64)).sqrt()[:, None]
    expected, *_ = np.linalg.lstsq((root * units).numpy(), (root * calibration.outputs).numpy(), rcond=None)
    np.testing.assert_allclose(gathered.down.T.numpy(), expected[:12], atol=1e-7)
    if bank.down_bias is not None:
        np.testing.assert_allclose(gathered.down_bias.numpy(), expected[12], atol=1e-7)
    own = gather(bank, hidden, calibration=calibration, **({} if hidden == "matched_average" else {"scale": "router"}))
    torch.testing.assert_close(gathered.up, own.up)


def test_ridge_pulls_to_the_weights_that_came_with_the_units():
    bank = double_bank(4)
    calibration, start = calibration_of(bank), gather(bank, "average")
    much, little = (gather(bank, "readout", calibration=calibration, hidden=start, ridge=r) for r in (1e9, 1e-9))
    assert_equal(much, start, atol=1e-6, rtol=1e-6)
    assert error(little, calibration) < error(start, calibration)
    # Fewer tokens than units: the weights change in the directions of these tokens' activations alone.
    few = calibration_of(bank, tokens=5)
    found = gather(bank, "readout", calibration=few, hidden=start)
    change = torch.cat([found.down - start.down, (found.down_bias - start.down_bias)[:, None]], dim=1)  # [d, h + 1]
    units = torch.cat([start.hidden(few.inputs), torch.ones(5, 1)], dim=1)
    _, _, vh = torch.linalg.svd(units)
    assert (change @ vh[5:].T).norm() < 1e-6 * change.norm()


def test_fit_goes_on_from_its_start_and_never_ends_behind_it(form):
    bank = double_bank(4, **form)
    calibration = calibration_of(bank, tokens=500)
    start = gather(bank, "readout", calibration=calibration, hidden="average")
    short, long = (gather(bank, "fit", calibration=calibration, start="average", steps=steps) for steps in (50, 500))
    assert error(long, calibration) < error(short, calibration) < error(start, calibration)
    useless = gather(bank, "fit", calibration=calibration, start="average", steps=1, learning_rate=100.0)
    assert error(useless, calibration) <= error(start, calibration)
    best = gather(bank, "fit", calibration=calibration, steps=1, learning_rate=1e-9)
    assert error(best, calibration) <= error(start, calibration) + 1e-9  # it tried average too


def test_a_rate_relative_to_the_weights_does_not_see_their_size():
    """Inputs a thousand times smaller and weights as much larger: the same function, fitted alike."""
    bank = double_bank(4, biases=False)
    calibration = calibration_of(bank)
    large = FeedForwardWeights(1000 * bank.up, bank.down)
    small = LayerActivations(calibration.inputs / 1000, calibration.gates, calibration.outputs, F.gelu)
    one = gather(bank, "fit", calibration=calibration, start="average", steps=100)
    two = gather(large, "fit", calibration=small, start="average", steps=100)
    assert error(two, small) == pytest.approx(error(one, calibration), rel=1e-3)


# --- scale ------------------------------------------------------------------------------------------------------------


def test_scale_by_the_router_gives_the_layer_of_equal_experts_back(form):
    bank = equal_bank(4, dtype=torch.float64, **form)
    calibration = calibration_of(bank, gate_sum=0.6)
    for method, options in {"sum": {}, "average": {}, "svd": {"rank": 8}, "topk": {"k": 12}}.items():
        gathered = gather(bank, method, calibration=calibration, scale="router", **options)
        assert error(gathered, calibration) < 1e-9, method
    renormalised = gather(bank, "sum", scale="router")  # without data: gates that sum to 1
    assert_equal(renormalised, bank.expert(0))


def test_top_kg_of_all_neurons_is_the_mean_field(form):
    """With gates that are the same for every token the layer is what all neurons together compute."""
    bank = double_bank(4, **form)
    x, gates = draw(30, 8), torch.full((30, 4), 0.2, dtype=torch.float64)
    calibration = LayerActivations(x, gates, mixture(bank, x, gates), F.gelu)
    assert error(gather(bank, "topk", calibration=calibration, k=12, scale="router"), calibration) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_scales_by_data_are_numpys_least_squares(method):
    bank = double_bank(4)
    weights = draw(300).exp()
    calibration = calibration_of(bank, weights=weights)
    base, root, target = (
        gather(bank, method, scale="router"),
        weights.sqrt().numpy()[:, None],
        calibration.outputs.numpy(),
    )
    output = base.apply(calibration.inputs).numpy()
    number, *_ = np.linalg.lstsq((root * output).reshape(-1, 1), (root * target).ravel(), rcond=None)
    scaled = gather(bank, method, calibration=calibration, scale="scalar")
    np.testing.assert_allclose(scaled.apply(calibration.inputs).numpy(), number * output)
    vector = gather(bank, method, calibration=calibration, scale="vector").apply(calibration.inputs).numpy()
    for i in range(8):
        one, *_ = np.linalg.lstsq(root * output[:, i : i + 1], root[:, 0] * target[:, i], rcond=None)
        np.testing.assert_allclose(vector[:, i], one * output[:, i])


def test_a_pair_of_scales_is_for_the_ways_in_and_out(form):
    bank = double_bank(3, **form)
    for method in METHODS:
        plain, pair = gather(bank, method), gather(bank, method, scale=(0.5, 0.25))
        for name, tensor in plain.tensors():
            if name.endswith("bias") and (method == "svd" or (name, method) == ("down_bias", "topk")):
                factor = 1
            else:
                factor = 0.25 if name.startswith("down") else 0.5
            torch.testing.assert_close(getattr(pair, name), factor * tensor)


# --- what passes through a layer --------------------------------------------------------------------------------------


def passing(layer, batches, **kwargs):
    model = torch.nn.ModuleDict({"ffn": layer}).eval()
    return collect_activations(model, lambda m, x: m["ffn"](m["ffn"](x)), batches, **kwargs)["ffn"]


def moe_layer():
    torch.manual_seed(0)
    return MoEFeedForward(8, 12, 4).double()


def test_batches_in_a_stream_are_one_batch():
    x = draw(60, 8)
    whole, parts = (passing(moe_layer(), batches) for batches in ([x], x.split(20)))
    order = torch.cat([torch.arange(60).view(3, 20), 60 + torch.arange(60).view(3, 20)], dim=1).flatten()
    for name in ("inputs", "gates", "outputs", "weights"):  # batch by batch instead of depth by depth
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name)[order])


def test_a_bounded_draw_is_uniform_over_the_stream():
    x = torch.arange(4000, dtype=torch.float64)[:, None].expand(-1, 8) / 4000
    layer = moe_layer()
    model = torch.nn.ModuleDict({"ffn": layer}).eval()
    kept = collect_activations(model, lambda m, x: m["ffn"](x), x.split(50), max_tokens=400)["ffn"].inputs[:, 0]
    assert len(kept) == 400
    assert (kept.diff() > 0).all()  # each once, in their order
    assert kept.mean().item() == pytest.approx(0.5, abs=0.05)
    assert kept.quantile(0.25).item() == pytest.approx(0.25, abs=0.07)


def test_the_draw_keeps_the_least_numbers_and_little_else():
    draw_, generator, size = _Draw(100), torch.Generator().manual_seed(0), 100
    numbers = torch.cat([torch.rand(30, generator=generator, dtype=torch.float64) for _ in range(200)])
    for i in range(200):
        x = torch.arange(30 * i, 30 * (i + 1), dtype=torch.float64)[:, None]
        draw_.add(0, x, torch.ones(30, 2), x)
        assert sum(len(numbers) for numbers, *_ in draw_.kept) <= 2 * size
    kept = draw_.activations(F.gelu).inputs[:, 0].long()
    assert torch.equal(kept, numbers.argsort()[:size].sort().values)


def test_depths_weigh_by_their_relative_error():
    layer, x = moe_layer(), draw(50, 8)
    seen = passing(layer, [x])
    with torch.no_grad():
        first = layer(x)
        second = layer(first)
    sizes = torch.stack([first.square().sum(), second.square().sum()])
    expected = (1 / sizes).repeat_interleave(50)
    torch.testing.assert_close(seen.weights, expected / expected.mean())
    sums = [(seen.weights * seen.outputs.square().sum(dim=1))[part].sum() for part in (slice(50), slice(50, 100))]
    torch.testing.assert_close(*sums)


BAD = {
    "missing": ({"method": "fit"}, "calibration: expected activations of the layer .*'fit' needs, found None"),
    "missing for a scale": ({"method": "sum", "scale": "vector"}, "calibration: .*'sum' at scale 'vector' needs"),
    "another layer's": ({"experts": 3}, "calibration: expected activations of 4 experts and width 8.*found 3 and 8"),
    "NaN": ({"nan": True}, "calibration: expected finite activations"),
    "unknown scale": ({"method": "sum", "scale": "best"}, "scale: expected a number, a pair.*'router'.*found 'best'"),
    "three scales": ({"method": "sum", "scale": (1, 2, 3)}, "scale: expected a number or a pair"),
    "no scale": ({"method": "fit", "scale": 1.0}, "scale: gathering method 'fit' has no such option"),
    "hidden": ({"method": "readout", "hidden": "fit"}, "hidden: expected an FFN or one of .*found 'fit'"),
    "ridge": ({"method": "readout", "ridge": -1.0}, "ridge: expected a number of at least 0, found -1.0"),
    "steps": ({"method": "fit", "steps": 0}, "steps, learning_rate: expected positive numbers, found 0 and 0.2"),
    "rank": ({"method": "whitened_svd", "rank": 9}, "rank: expected an integer from 1 to 8, found 9"),
    "k": ({"method": "contribution_topk", "k": 13}, "k: expected an integer from 1 to 12, found 13"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, message = dict(BAD[case][0]), BAD[case][1]
    calibration = calibration_of(random_bank(arguments.pop("experts", 4)))
    if arguments.pop("nan", False):
        calibration.inputs[3, 2] = float("nan")
    if "missing" in case:
        calibration = None
    with pytest.raises((ValueError, TypeError), match=message):
        gather(random_bank(4), **{"method": "readout", **arguments}, calibration=calibration)


def test_activations_whose_parts_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"outputs: expected \[3, 2\] for 3 tokens, found \[3, 4\]"):
        LayerActivations(torch.ones(3, 2), torch.ones(3, 5), torch.ones(3, 4), F.gelu)
    with pytest.raises(ValueError, match="inputs: expected at least one token"):
        LayerActivations(torch.ones(0, 2), torch.ones(0, 5), torch.ones(0, 2), F.gelu)


# --- width, frequencies -----------------------------------------------------------------------------------------------


def test_frequency_average_is_the_mean_by_how_often_experts_are_chosen():
    bank = double_bank(gated=True)
    calibration = calibration_of(bank, gate_sum=0.7)
    counts = (calibration.gates > 0).sum(dim=0).double()
    weights = counts / (2 * 300)
    assert calibration.expert_frequencies().tolist() == pytest.approx(weights.tolist())
    gathered = gather(bank, "frequency_average", calibration=calibration)
    torch.testing.assert_close(gathered.up, (weights[:, None, None] * bank.up).sum(dim=0))
    torch.testing.assert_close(gathered.down, 0.7 * (weights[:, None, None] * bank.down).sum(dim=0))


@pytest.mark.parametrize("d_ff", [5, 12, 30, 48])
@pytest.mark.parametrize("method", ["contribution_topk", "readout", "fit"])
def test_methods_that_choose_neurons_give_any_width(method, d_ff):
    bank = double_bank()
    calibration = calibration_of(bank)
    options = {"steps": 50} if method == "fit" else {}
    assert gather(bank, method, calibration=calibration, d_ff=d_ff, **options).d_ff == d_ff


@pytest.mark.parametrize("d_ff", [12, 13, 30, 48])
@pytest.mark.parametrize("method", ["contribution_topk", "readout"])
def test_copies_give_all_units_too(method, d_ff, form):
    """Experts that are copies have 12 different units together; more would be of no use, but are asked for."""
    bank = equal_bank(4, **form, dtype=torch.float64)
    calibration = calibration_of(bank)
    gathered = gather(bank, method, calibration=calibration, d_ff=d_ff)
    assert gathered.d_ff == d_ff
    assert error(gathered, calibration) < 1e-4


def test_more_neurons_leave_less_error():
    bank = double_bank()
    calibration = calibration_of(bank)
    errors = [
        error(gather(bank, "readout", calibration=calibration, d_ff=d_ff), calibration) for d_ff in (6, 12, 24, 48)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("method", ["matched_average", "whitened_svd", "frequency_average"])
def test_methods_that_keep_the_experts_width(method):
    bank = double_bank()
    with pytest.raises(ValueError, match=f"d_ff: expected the experts' 12 for method '{method}', found 24"):
        gather(bank, method, calibration=calibration_of(bank), d_ff=24)


def test_a_large_readout_is_the_same_solved_the_quick_way(monkeypatch):
    for biases in (True, False):
        bank = double_bank(gated=True, biases=biases)
        calibration = calibration_of(bank)
        slow = gather(bank, "readout", calibration=calibration)
        monkeypatch.setattr(regression, "LARGE", 1)
        quick = gather(bank, "readout", calibration=calibration)
        monkeypatch.undo()
        assert_equal(quick, slow, atol=1e-8, rtol=1e-8)


def test_a_large_fit_tries_one_start(monkeypatch):
    bank = double_bank()
    monkeypatch.setattr(regression, "LARGE", 1)
    calibration = calibration_of(bank)
    found = gather(bank, "fit", calibration=calibration, steps=5)
    expected = gather(bank, "fit", calibration=calibration, steps=5, start="contribution_topk")
    assert_equal(found, expected)


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e200])
def test_a_readout_on_what_is_not_finite_is_refused(value, large, monkeypatch):
    """It would be solved for ever, or give NaN; 1e200 is finite, but its square is not."""
    monkeypatch.setattr(regression, "LARGE", 1 if large else 1000)
    bank, calibration = double_bank(), calibration_of(double_bank())
    calibration.outputs[3, 2] = value
    spoilt = bank.map(torch.clone)
    spoilt.up[0] *= value
    for ffn, seen in ((bank.expert(0), calibration), (spoilt.expert(0), calibration_of(bank))):
        if ffn.is_finite() and value == 1e200 and seen is calibration:
            continue  # products with outputs are not squared
        with pytest.raises(ValueError, match="calibration: expected finite hidden units and outputs on its tokens"):
            regression.readout_on(ffn, seen.chunks(), 1e-4)


def test_a_readout_of_units_that_are_never_active_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(regression, "LARGE", 1)
    bank = double_bank(biases=False)
    calibration = calibration_of(bank, activation=torch.zeros_like)
    assert_equal(regression.readout_on(bank.expert(1), calibration.chunks(), 1e-4), bank.expert(1))


@pytest.mark.parametrize("large", [True, False])
def test_a_fit_whose_steps_diverge_is_its_start(large, monkeypatch):
    bank = double_bank()
    calibration = calibration_of(bank)
    monkeypatch.setattr(regression, "LARGE", 1 if large else 1000)
    start = gather(bank, "readout", calibration=calibration)
    found = gather(bank, "fit", calibration=calibration, start="contribution_topk", steps=20, learning_rate=1e300)
    assert_equal(found, start)
