"""Spectra and what follows from them against numpy, scipy and cases worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import equal_bank, random_bank
from scipy.linalg import subspace_angles

from ones_lib import FeedForwardWeights, gather
from ones_lib.calibration import LayerActivations, collect_activations
from ones_lib.ffn import match_neurons
from ones_lib.moe import MoEFeedForward
from ones_lib.spectra import (
    MEAN,
    FactoredBank,
    gathered_distances,
    layer_tables,
    output_error,
    output_errors,
    overlap,
    overlap_summary,
    rank_grid,
    rank_measures,
    similarity,
    spectrum,
)


def bank_of(*matrices):
    """A bank whose up and down matrices are the given ones [h, d] and their transposes."""
    up = torch.stack([torch.as_tensor(m, dtype=torch.float64) for m in matrices])
    return FeedForwardWeights(up=up, down=up.mT.contiguous())


def measures_of(matrix):
    return rank_measures(spectrum(FactoredBank(bank_of(matrix, matrix)), ["up"])).iloc[0]


def orthonormal(n, k, seed=0):
    return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_spectrum_is_numpys(form, dtype):
    bank = random_bank(3, d_ff=12, d_model=8, dtype=dtype, **form)
    table = spectrum(FactoredBank(bank))
    assert list(dict.fromkeys(table["matrix"])) == ["up", "gate", "down"] if form["gated"] else ["up", "down"]
    for (matrix, expert), part in table.groupby(["matrix", "expert"]):
        s = np.linalg.svd(getattr(bank, matrix)[expert].double().numpy(), compute_uv=False)
        np.testing.assert_allclose(part["singular_value"], s, rtol=1e-12)
        np.testing.assert_allclose(part["energy"], np.cumsum(s**2) / np.sum(s**2), rtol=1e-12)
        assert list(part["rank"]) == list(range(1, 9))
        np.testing.assert_allclose((part["gaussian"] ** 2).sum(), (s**2).sum())  # the same norm


def test_a_large_bank_is_factored_in_its_own_precision():
    bank = random_bank(2, d_ff=1100, d_model=1000)
    factored = FactoredBank(bank)
    assert factored.bank.up.dtype == torch.float32
    table = spectrum(factored, ["up"])
    expected = np.linalg.svd(bank.up[1].double().numpy(), compute_uv=False)
    np.testing.assert_allclose(table[table["expert"] == 1]["singular_value"], expected, rtol=1e-4, atol=1e-3)


def test_ranks_of_known_matrices():
    identity = measures_of(torch.eye(6))
    assert identity[["stable_rank", "effective_rank", "rank_90"]].tolist() == pytest.approx([6, 6, 6])
    one = measures_of(torch.outer(torch.arange(1.0, 7.0), torch.ones(4)))
    assert one[["stable_rank", "effective_rank", "rank_90", "elbow"]].tolist() == pytest.approx([1, 1, 1, 2])
    # Singular values 4, 2, 1, 1: squares 16 + 4 + 1 + 1 = 22, of which 16 are below 90% and 20 above; parts 1/2, 1/4, 1/8, 1/8.
    known = measures_of(torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0])))
    entropy = 1 / 2 * math.log(2) + 1 / 4 * math.log(4) + 2 / 8 * math.log(8)
    assert known["stable_rank"] == pytest.approx(22 / 16)
    assert known["effective_rank"] == pytest.approx(math.exp(entropy))
    assert known["rank_90"] == 2
    assert known["frobenius"] == pytest.approx(math.sqrt(22))
    # The line from (1, 4) to (4, 1) is above the spectrum by 0, 1, 1, 0: the first of the furthest.
    assert known["elbow"] == 2
    zero = measures_of(torch.zeros(4, 4))
    assert zero[["frobenius", "elbow", "rank_90"]].tolist() == [0, 0, 0]
    assert zero[["stable_rank", "effective_rank"]].isna().all()


def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles():
    bank = random_bank(3, d_ff=12, d_model=8, dtype=torch.float64)
    for matrix in ("up", "down"):
        table = overlap(FactoredBank(bank), matrix, rank=3)
        factors = [np.linalg.svd(w.numpy(), full_matrices=False) for w in getattr(bank, matrix)]
        bases = {"in": [vh[:3].T for _, _, vh in factors], "out": [u[:, :3] for u, _, _ in factors]}
        for row in table.itertuples():
            angles = subspace_angles(bases[row.side][row.expert], bases[row.side][row.other])
            assert row.overlap == pytest.approx(np.mean(np.cos(angles) ** 2), abs=1e-12)
            assert row.chance == pytest.approx(3 / len(bases[row.side][0]))


def test_overlap_of_equal_and_of_orthogonal_subspaces():
    left, right = orthonormal(8, 8), orthonormal(6, 6, seed=1)

    def matrix(columns):  # the given columns of both bases, with singular values 3, 2 and a tail of small ones
        rest = [i for i in range(6) if i not in columns]
        values = torch.tensor([3.0, 2.0, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
        order = [*columns, *rest]
        return left[:, order] * values @ right[:, order].T

    table = overlap(FactoredBank(bank_of(matrix([0, 1]), matrix([1, 0]), matrix([2, 3]))), "up", rank=2)
    value = table.set_index(["side", "expert", "other"])["overlap"]
    for side in ("in", "out"):
        assert value[side, 0, 1] == pytest.approx(1, abs=1e-12)
        assert value[side, 0, 2] == pytest.approx(0, abs=1e-12)


def test_overlap_of_random_matrices_is_chance():
    table = overlap(FactoredBank(random_bank(12, d_ff=20, d_model=16)), "up", rank=4)
    pairs = table[table["expert"] < table["other"]].groupby("side")
    assert (pairs["overlap"].mean() - pairs["chance"].first()).abs().max() < 0.03


def test_overlap_summary_leaves_experts_themselves_out():
    rows = [(e, o, 1.0 if e == o else 0.2 * (e + o)) for e in range(3) for o in range(3)]
    table = pd.DataFrame(rows, columns=["expert", "other", "overlap"])
    table = table.assign(data="d", matrix="up", side="in", rank=2, chance=0.25)
    (row,) = overlap_summary(table).itertuples()  # pairs 01, 02, 12: 0.2, 0.4, 0.6
    assert (row.pairs, row.chance) == (3, 0.25)
    assert (row.overlap, row.low, row.high) == pytest.approx((0.4, 0.22, 0.58))


def test_matching_recovers_a_planted_permutation(form):
    ffn = random_bank(1, **form).expert(0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    shuffled = ffn.with_neurons(order)
    x = torch.randn(7, 8)
    torch.testing.assert_close(shuffled.apply(x), ffn.apply(x), atol=1e-4, rtol=1e-4)  # the same function
    assert not torch.equal(shuffled.up, ffn.up)
    found = match_neurons(ffn, shuffled)
    assert torch.equal(order[found], torch.arange(12))
    for name, tensor in shuffled.with_neurons(found).tensors():
        assert torch.equal(tensor, getattr(ffn, name))


def test_matching_finds_the_best_of_all_orders():
    from itertools import permutations

    one, two = (random_bank(1, d_ff=4, d_model=3, seed=s).expert(0) for s in (0, 1))

    def alike(order):
        return (one.neurons() * two.with_neurons(torch.tensor(order)).neurons()).sum().item()

    best = max(permutations(range(4)), key=alike)
    assert match_neurons(one, two).tolist() == list(best)


def test_matching_wants_ffns_of_one_size():
    with pytest.raises(ValueError, match=r"expected two single FFNs of equal shape, found up \[12, 8\] and \[5, 8\]"):
        match_neurons(random_bank(1).expert(0), random_bank(1, d_ff=5).expert(0))


def test_similarity_before_and_after_matching():
    one = random_bank(1, d_ff=24, d_model=16).expert(0)
    shuffled = one.with_neurons(torch.randperm(24, generator=torch.Generator().manual_seed(1)))
    other = random_bank(1, d_ff=24, d_model=16, seed=9).expert(0)
    table = similarity(FactoredBank(FeedForwardWeights.stack([one, shuffled, other]))).set_index(["expert", "other"])
    assert table.index.tolist() == [(0, 1), (0, 2), (1, 2)]
    assert table.loc[(0, 1), "matched"] == pytest.approx(1)
    assert abs(table.loc[(0, 1), "cosine"]) < 0.5
    flat = [ffn.neurons().double().flatten() for ffn in (one, other)]
    assert table.loc[(0, 2), "cosine"] == pytest.approx(F.cosine_similarity(*flat, dim=0).item())
    # Unrelated experts match about as well as noise does.
    assert table.loc[(0, 2), "matched"] == pytest.approx(table.loc[(0, 2), "chance"], abs=0.05)
    assert table.loc[(0, 2), "chance"] > 0.1


@pytest.mark.parametrize("rank", [None, 1, 3, 8])
def test_cutting_the_factors_gives_the_gathering(form, rank):
    bank = random_bank(3, dtype=torch.float64, **form)
    factored = FactoredBank(bank)
    for method in ("sum", "average", "topk", "svd"):
        options = {"svd": {"rank": rank}, "topk": {"k": rank}}.get(method, {})
        expected = gather(bank, method, **options)
        found = factored.gather(method, rank)
        for name, tensor in expected.tensors():
            torch.testing.assert_close(getattr(found, name), tensor)


def test_distances_by_hand():
    bank = equal_bank(4, dtype=torch.float64)
    factored = FactoredBank(bank)
    for method, distance in (("average", 0.0), ("sum", 3.0)):
        table = gathered_distances(factored, gather(bank, method), torch.tensor([0.1, 0.2, 0.3, 0.4]))
        assert list(dict.fromkeys(table["target"])) == ["expert 0", "expert 1", "expert 2", "expert 3", MEAN]
        np.testing.assert_allclose(table["distance"], distance, atol=1e-12)
        np.testing.assert_allclose(table["cosine"], 1)

    bank = random_bank(3, dtype=torch.float64)
    weights = torch.tensor([2.0, 1.0, 1.0])  # need not sum to 1
    mean = bank.map(lambda t: 0.5 * t[0] + 0.25 * t[1] + 0.25 * t[2])
    table = gathered_distances(FactoredBank(bank), mean, weights).set_index(["target", "matrix"])
    np.testing.assert_allclose(table.loc[MEAN, "distance"], 0, atol=1e-12)
    # Another order of the hidden neurons is no distance, nor is being Top-KG's concatenation of one expert.
    shuffled = bank.expert(1).with_neurons(torch.arange(11, -1, -1))
    table = gathered_distances(FactoredBank(bank), shuffled).set_index(["target", "matrix"])
    np.testing.assert_allclose(table.loc["expert 1", "distance"], 0, atol=1e-12)
    zero = gathered_distances(FactoredBank(bank), mean.map(torch.zeros_like))
    np.testing.assert_allclose(zero["distance"], 1)
    assert zero["cosine"].isna().all()


def activations_of(layer, tokens=200, seed=0):
    x = torch.randn(tokens, layer.up.shape[2], generator=torch.Generator().manual_seed(seed), dtype=layer.up.dtype)
    return collect_activations(torch.nn.ModuleDict({"ffn": layer}).eval(), lambda model, x: layer(x), [x])["ffn"], x


def moe_layer(bank=None, renormalize=True, **kwargs):
    torch.manual_seed(0)
    layer = MoEFeedForward(8, 12, 4, renormalize=renormalize, **kwargs).double()
    if bank is not None:
        with torch.no_grad():
            for name, tensor in bank.tensors():
                getattr(layer, name).copy_(tensor)
    return layer


def test_activations_are_what_the_layer_computes():
    layer = moe_layer(random_bank(4, dtype=torch.float64))
    seen, x = activations_of(layer)
    torch.testing.assert_close(seen.inputs, x)
    torch.testing.assert_close(seen.outputs, layer(x))
    torch.testing.assert_close(seen.gates.sum(dim=1), torch.ones(200, dtype=torch.float64))
    assert ((seen.gates > 0).sum(dim=1) == 2).all()
    torch.testing.assert_close(seen.expert_weights(), seen.gates.mean(dim=0))


def test_activations_of_a_layer_passed_twice_of_few_tokens_and_of_a_model_in_training():
    layer = moe_layer()
    model, x = torch.nn.ModuleDict({"ffn": layer}).eval(), torch.randn(30, 8, dtype=torch.float64)
    seen = collect_activations(model, lambda _, x: layer(layer(x)), [x])["ffn"]
    assert len(seen.inputs) == 60
    few = collect_activations(model, lambda _, x: layer(layer(x)), [x], max_tokens=10)["ffn"]
    assert all((row == seen.inputs).all(dim=1).any() for row in few.inputs)
    assert len(few.inputs) == 10
    masked = collect_activations(model, lambda _, x: layer(x[None], torch.arange(30)[None] < 7), [x])["ffn"]
    torch.testing.assert_close(masked.inputs, x[:7])  # padding is no token
    torch.testing.assert_close(masked.outputs, layer(x[:7]))
    assert not layer._forward_hooks
    with pytest.raises(ValueError, match="model: expected eval mode"):
        collect_activations(model.train(), lambda _, x: layer(x), [x])
    with pytest.raises(ValueError, match="batches: expected at least one token"):
        collect_activations(model.eval(), lambda _, x: layer(x), [])


def test_output_error_by_hand():
    bank = equal_bank(4, dtype=torch.float64)
    seen, _ = activations_of(moe_layer(bank))
    exact = output_error(gather(bank, "average"), seen)
    assert exact == pytest.approx({"error": 0, "rescaled": 0, "scale": 1}, abs=1e-12)
    expert = bank.expert(0)
    twice = FeedForwardWeights(expert.up, 2 * expert.down, up_bias=expert.up_bias, down_bias=2 * expert.down_bias)
    assert output_error(twice, seen) == pytest.approx({"error": 1, "rescaled": 0, "scale": 0.5}, abs=1e-12)
    zero = output_error(expert.map(torch.zeros_like), seen)
    assert zero == {"error": 1, "rescaled": 1, "scale": 0}


def test_the_best_number_is_the_best():
    bank = random_bank(4, dtype=torch.float64)
    seen, _ = activations_of(moe_layer(bank))
    found = output_error(gather(bank, "sum"), seen)
    outputs, target = gather(bank, "sum").apply(seen.inputs).numpy(), seen.outputs.numpy()
    scale, *_ = np.linalg.lstsq(outputs.reshape(-1, 1), target.ravel(), rcond=None)
    assert found["scale"] == pytest.approx(scale[0])
    assert found["rescaled"] == pytest.approx(np.linalg.norm(scale * outputs - target) / np.linalg.norm(target))


def test_errors_over_ranks():
    """Top-KG that keeps all neurons is all experts at once; methods without a rank are level; one expert is the mean."""
    bank = random_bank(4, biases=False, dtype=torch.float64)
    x = torch.randn(50, 8, dtype=torch.float64)
    both = sum(bank.expert(e).apply(x) for e in range(4))
    seen = LayerActivations(x, torch.full((50, 4), 0.25), both, F.gelu)
    table = output_errors(FactoredBank(bank), seen, ["one_expert", "sum", "topk", "svd"], [1, 8])
    table = table.set_index(["method", "rank"])
    assert table.loc[("sum", 1), "error"] == table.loc[("sum", 8), "error"]
    assert table.loc[("svd", 8), "error"] == pytest.approx(table.loc[("sum", 1), "error"])  # nothing cut, no biases
    each = [output_error(bank.expert(e), seen)["error"] for e in range(4)]
    assert table.loc[("one_expert", 1), "error"] == pytest.approx(np.mean(each))
    whole = output_errors(FactoredBank(bank), seen, ["topk"], [12])
    assert whole["error"].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("gated", [False, True])
def test_tables_of_a_layer_are_whole(gated):
    bank = random_bank(4, gated=gated)
    weights = torch.full((20, 4), 0.25)
    seen = LayerActivations(torch.randn(20, 8), weights, torch.randn(20, 8), F.gelu)
    tables = layer_tables(FactoredBank(bank), seen, ["average", "topk", "svd"])
    assert set(tables) == {"spectra", "ranks", "overlap", "similarity", "distance", "output_error"}
    assert not any(table.drop(columns="rank", errors="ignore").isna().any(axis=None) for table in tables.values())
    distance = tables["distance"]
    assert distance.loc[distance["method"] != "svd", "rank"].isna().all()
    assert sorted(distance.loc[distance["method"] == "svd", "rank"].unique()) == rank_grid(8)
    assert "output_error" not in layer_tables(FactoredBank(bank), None, ["average"])


def test_rank_grid():
    assert rank_grid(1) == [1]
    assert rank_grid(5) == [1, 2, 3, 4, 5]
    grid = rank_grid(1024)
    assert grid[0] == 1
    assert grid[-1] == 1024
    assert len(grid) == 12


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda f: f.factors("gate"), r"matrix: expected one of \['up', 'down'\], found 'gate'"),
        (lambda f: f.gather("svd", 9), "rank: expected an integer from 1 to 8, found 9"),
        (lambda f: overlap(f, "up", 0), "rank: expected an integer from 1 to 8, found 0"),
        (lambda f: FactoredBank(random_bank(1).expert(0)), "bank: expected experts stacked"),
        (
            lambda f: FactoredBank(f.bank.map(lambda t: t * math.nan)),
            "up of expert 0: expected finite weights, found 96 NaN",
        ),
    ],
)
def test_bad_input(action, message):
    with pytest.raises(ValueError, match=message):
        action(FactoredBank(random_bank(4)))
