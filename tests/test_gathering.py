"""The gathering methods against the mathematics and against numpy in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import equal_bank, random_bank

from ones_lib import FeedForwardWeights, gather, gathering_methods
from ones_lib.ffn import concatenate
from ones_lib.gathering import paper, register, registry, truncation
from ones_lib.gathering.truncation import truncated

METHODS = ["sum", "average", "topk", "svd"]


def assert_equal(left, right, **tolerance):
    left, right = dict(left.tensors()), dict(right.tensors())
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def permuted(bank, expert, seed=1):
    """The bank with the hidden neurons of one expert in another order: rows of up (and gate), columns of down."""
    order = torch.randperm(bank.d_ff, generator=torch.Generator().manual_seed(seed))

    def permute(name, tensor):
        tensor = tensor.clone()
        if name == "down":
            tensor[expert] = tensor[expert][:, order]
        elif name != "down_bias":
            tensor[expert] = tensor[expert][order]
        return tensor

    return FeedForwardWeights(**{name: permute(name, tensor) for name, tensor in bank.tensors()}), order


def test_the_four_methods_are_listed():
    assert gathering_methods()[:4] == METHODS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)], ids=["wide", "narrow"])
def test_one_expert_comes_back(method, form, shape):
    bank = random_bank(1, *shape, **form)
    assert_equal(gather(bank, method), bank.expert(0), atol=1e-4, rtol=1e-4)


def test_equal_experts(form):
    bank = equal_bank(4, **form)
    assert_equal(gather(bank, "average"), bank.expert(0))
    assert_equal(gather(bank, "sum"), bank.expert(0).map(lambda t: 4 * t))


def test_scale_turns_sum_into_average(form):
    bank = random_bank(4, **form)
    assert_equal(gather(bank, "sum", scale=1 / 4), gather(bank, "average"))


@pytest.mark.parametrize("rank", [None, 1, 3, 8])
def test_svd_equals_truncated_sums_in_numpy(form, rank):
    bank = random_bank(4, d_ff=12, d_model=8, **form)
    gathered = gather(bank, "svd", rank=rank)
    k = 8 // 4 if rank is None else rank
    for name, tensor in bank.tensors():
        if name.endswith("bias"):
            expected = tensor.double().mean(dim=0).numpy()
        else:
            expected = np.zeros(tensor.shape[1:])
            for matrix in tensor.double().numpy():
                u, s, vt = np.linalg.svd(matrix, full_matrices=False)
                s[k:] = 0
                expected += u @ np.diag(s) @ vt
            assert np.linalg.matrix_rank(getattr(gathered, name).double().numpy(), tol=1e-4) <= 4 * k
        np.testing.assert_allclose(getattr(gathered, name).numpy(), expected, atol=1e-4)


def test_svd_of_equal_experts_is_e_times_the_truncated_matrix():
    bank = equal_bank(3, biases=False)
    one = gather(random_bank(1, biases=False), "svd", rank=2)
    assert_equal(gather(bank, "svd", rank=2), one.map(lambda t: 3 * t), atol=1e-4, rtol=1e-4)
    assert_equal(gather(bank, "svd", rank=2, scale=1 / 3), one, atol=1e-4, rtol=1e-4)


def test_svd_default_rank_is_at_least_one():
    bank = random_bank(10, d_ff=6, d_model=4)
    assert_equal(gather(bank, "svd"), gather(bank, "svd", rank=1))


@pytest.mark.parametrize("importance", ["l2", "product"])
@pytest.mark.parametrize("num_experts", [3, 4, 5, 20])
def test_topk_function_is_the_sum_of_the_chosen_neurons(form, importance, num_experts):
    """A plain loop over experts and neurons, with the shares worked out by hand: 12 // E each, the rest by importance."""
    bank = random_bank(num_experts, d_ff=12, d_model=8, dtype=torch.float64, **form)
    gathered = gather(bank, "topk", importance=importance)
    assert gathered.d_ff == 12

    scores = {}
    for e in range(num_experts):
        for j in range(12):
            inward = np.concatenate([m[e, j].numpy() for m in (bank.up, bank.gate) if m is not None])
            into, out = np.linalg.norm(inward), np.linalg.norm(bank.down[e, :, j].numpy())
            scores[e, j] = into * out if importance == "product" else np.sqrt(into**2 + out**2)
    chosen = []
    for e in range(num_experts):
        chosen += sorted(((e, j) for j in range(12)), key=lambda n: -scores[n])[: 12 // num_experts]
    left_over = sorted(scores.keys() - set(chosen), key=lambda n: -scores[n])
    chosen += left_over[: 12 - len(chosen)]

    x = torch.randn(5, 8, dtype=torch.float64)
    expected = torch.zeros(5, 8, dtype=torch.float64)
    for e, j in chosen:
        hidden = x @ bank.up[e, j] + (0 if bank.up_bias is None else bank.up_bias[e, j])
        if bank.gate is None:
            hidden = F.gelu(hidden)
        else:
            hidden = hidden * F.gelu(x @ bank.gate[e, j] + (0 if bank.gate_bias is None else bank.gate_bias[e, j]))
        expected += hidden[:, None] * bank.down[e, :, j]
    if bank.down_bias is not None:
        expected += bank.down_bias.mean(dim=0)
    torch.testing.assert_close(gathered.apply(x), expected)


def test_topk_with_k_takes_k_of_every_expert():
    bank = random_bank(3, d_ff=12)
    assert gather(bank, "topk", k=5).d_ff == 15
    x = torch.randn(4, 8)
    expected = sum(bank.expert(e).apply(x) - bank.down_bias[e] for e in range(3)) + bank.down_bias.mean(dim=0)
    torch.testing.assert_close(gather(bank, "topk", k=12).apply(x), expected, atol=1e-4, rtol=1e-4)


def test_topk_takes_importance_of_ones_own():
    bank = random_bank(2, d_ff=4)
    importance = torch.tensor([[0.0, 1, 2, 3], [3, 2, 1, 0]])
    gathered = gather(bank, "topk", importance=importance)
    torch.testing.assert_close(gathered.up, torch.cat([bank.up[0, 2:], bank.up[1, :2]]))


def test_permuting_hidden_neurons(form):
    """It changes no expert's function; what it does to each gathering follows from the mathematics."""
    bank = random_bank(3, dtype=torch.float64, **form)
    moved, order = permuted(bank, expert=1)
    x = torch.randn(6, 8, dtype=torch.float64)
    torch.testing.assert_close(moved.expert(1).apply(x), bank.expert(1).apply(x))
    # Top-KG takes the same neurons: the same function.
    torch.testing.assert_close(gather(moved, "topk").apply(x), gather(bank, "topk").apply(x))
    # Summation and averaging add what does not belong together: another function.
    for method in ("sum", "average"):
        assert not torch.allclose(gather(moved, method).apply(x), gather(bank, method).apply(x), atol=0.1)
    # SVD-KG's part of the expert is permuted likewise: P trunc(W) instead of trunc(W).
    part = gather(bank.map(lambda t: t[1:2]), "svd", rank=2)
    before, after = gather(bank, "svd", rank=2), gather(moved, "svd", rank=2)
    torch.testing.assert_close(after.up - before.up, part.up[order] - part.up)
    torch.testing.assert_close(after.down - before.down, part.down[:, order] - part.down)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_computed_in_float32(method, dtype):
    bank = random_bank(4, dtype=dtype)
    gathered = gather(bank, method)
    assert all(t.dtype == dtype for _, t in gathered.tensors())
    reference = gather(bank.map(lambda t: t.double()), method).map(lambda t: t.to(dtype))
    assert_equal(gathered, reference, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_a_sum_in_half_precision_does_not_overflow_on_the_way():
    """60,000 four times is above float16's largest number, scaled by 1/4 it is not."""
    bank = equal_bank(4, dtype=torch.float16).map(lambda t: torch.full_like(t, 60_000.0))
    assert torch.isfinite(gather(bank, "average").up).all()
    assert torch.isfinite(gather(bank, "sum", scale=0.25).up).all()


@pytest.mark.parametrize("method", METHODS)
def test_bank_is_left_as_it_was_and_no_gradient_flows(method):
    bank = random_bank(4).map(lambda t: t.requires_grad_())
    before = bank.map(lambda t: t.detach().clone())
    gathered = gather(bank, method)
    assert_equal(bank.map(lambda t: t.detach()), before)
    assert not any(t.requires_grad for _, t in gathered.tensors())
    gathered.up.zero_()  # shares no memory with the bank, E=1 included
    assert_equal(bank.map(lambda t: t.detach()), before)


def test_a_sequence_of_experts_is_a_bank():
    bank = random_bank(3)
    assert_equal(gather([bank.expert(i) for i in range(3)], "svd"), gather(bank, "svd"))


SPECTRA = {
    "flat": torch.ones(200),
    "of noise": torch.linalg.svdvals(torch.randn(300, 200, generator=torch.Generator().manual_seed(1))),
    "slowly falling": 1 / torch.arange(1, 201).sqrt(),
    "fast falling": 0.9 ** torch.arange(200),
    "a step": torch.where(torch.arange(200) < 30, 10.0, 1.0),
    "steep": torch.arange(1, 201.0) ** -2,
    "a few large": torch.where(torch.arange(200) < 3, 300.0, 1.0) * torch.arange(1, 201.0) ** -0.3,
    "of low rank": torch.where(torch.arange(200) < 10, 1.0, 0.0),
}


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)], ids=["tall", "wide"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_fast_cut_leaves_out_hardly_more_than_the_best(spectrum, shape):
    """The least that any matrix of that rank leaves out is the norm of the other singular values (Eckart and Young)."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 200, generator=generator)).Q for n in shape)
    matrix = (u * SPECTRA[spectrum]) @ v.T
    for rank in (5, 30, 60):
        cut = truncated(matrix, rank, exact=False)
        assert torch.linalg.matrix_rank(cut, rtol=1e-4) <= rank
        least = SPECTRA[spectrum][rank:].norm()
        assert (matrix - cut).norm() <= 1.01 * least + 1e-5 * matrix.norm()
    torch.testing.assert_close(truncated(matrix, 30, exact=False), truncated(matrix, 30, exact=False))


@pytest.mark.parametrize("quickly", [True, False])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300)], ids=["tall", "wide"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_fast_cut_of_a_matrix_in_bfloat16_is_as_good(spectrum, shape, quickly, monkeypatch):
    """Whether or not the machine is one that multiplies it quickly, and however steep its spectrum is."""
    monkeypatch.setattr(truncation, "_multiplies_quickly", lambda matrix: quickly)
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 200, generator=generator)).Q for n in shape)
    matrix = ((u * SPECTRA[spectrum]) @ v.T).bfloat16()
    for rank in (5, 30, 60):
        cut = truncated(matrix, rank, exact=False)
        assert cut.dtype == torch.float32
        least = torch.linalg.svdvals(matrix.float())[rank:].norm()
        assert (matrix.float() - cut).norm() <= 1.01 * least


def test_large_matrices_of_which_little_is_kept_are_cut_the_fast_way(monkeypatch):
    bank = random_bank(2, 600, 520, biases=False)
    exact = bank.map(lambda t: sum(truncated(matrix, 20, exact=True) for matrix in t))
    calls, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or svd(*a, **k))
    fast = gather(bank, "svd", rank=20)
    assert not calls
    for name in ("up", "down"):
        left_out = [(getattr(bank, name).sum(dim=0) - getattr(f, name)).norm() for f in (fast, exact)]
        assert left_out[0] < 1.01 * left_out[1]
    gather(bank, "svd")  # half of the triplets: no less work the fast way
    gather(random_bank(2, biases=False), "svd", rank=1)  # small
    assert len(calls) == 8


@pytest.mark.parametrize("method", METHODS)
def test_experts_apart_in_memory_and_in_pieces_give_the_same(method, form, monkeypatch):
    bank = random_bank(4, **form)
    whole = gather(bank, method)
    monkeypatch.setattr(paper, "CHUNK", 70)  # two rows of four experts
    assert_equal(gather([bank.expert(e) for e in range(4)], method), whole, atol=1e-5, rtol=1e-5)


def test_a_bank_in_low_precision_is_not_copied_as_a_whole(monkeypatch):
    """The paper's methods look at a few rows, or one expert, at a time."""
    bank = random_bank(4, 64, 32, dtype=torch.bfloat16)
    monkeypatch.setattr(paper, "CHUNK", 512)
    largest, to = [], torch.Tensor.to

    def seen(tensor, *args, **kwargs):
        result = to(tensor, *args, **kwargs)
        if result.dtype == torch.float32:
            largest.append(result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "to", seen)
    for method in METHODS:
        gather(bank, method)
    assert max(largest) == 64 * 32


def outputs(bank, x):
    return torch.stack([bank.expert(e).apply(x) for e in range(bank.num_experts)])


@pytest.mark.parametrize("method", ["sum", "average", "topk", "svd"])
def test_the_widest_is_the_mean_field_itself(method, form):
    """All neurons of all experts, each expert with its gate of 1/E."""
    bank, x = random_bank(4, **form), torch.randn(5, 8)
    gathered = gather(bank, method, d_ff=48, scale="router")
    assert gathered.d_ff == 48
    torch.testing.assert_close(gathered.apply(x), outputs(bank, x).mean(dim=0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "scale"), [("sum", 1.0), ("average", 1.0), ("sum", "router"), ("average", "router")]
)
def test_wider_is_groups_side_by_side(method, scale, form):
    bank, x = random_bank(5, **form), torch.randn(5, 8)
    groups = [bank.map(lambda t: t[:2]), bank.map(lambda t: t[2:])]
    expected = 0
    for group in groups:
        share = 1 if (method, scale) == ("sum", 1.0) else group.num_experts / 5
        expected = expected + share * gather(group, method, scale=scale).apply(x)
    torch.testing.assert_close(gather(bank, method, d_ff=24, scale=scale).apply(x), expected, atol=1e-4, rtol=1e-4)


def test_equal_experts_at_any_width(form):
    bank, x = equal_bank(4, **form), torch.randn(5, 8)
    for method, d_ff in {"average": 24, "svd": 48, "sum": 36}.items():
        options = {"rank": 8} if method == "svd" else {}
        gathered = gather(bank, method, d_ff=d_ff, scale="router", **options)
        torch.testing.assert_close(gathered.apply(x), bank.expert(0).apply(x), atol=1e-4, rtol=1e-4)


def test_topk_of_any_width_takes_as_many_of_each():
    bank = random_bank(4)
    assert_equal(gather(bank, "topk", d_ff=20), gather(bank, "topk", k=5))
    wide = gather(bank, "topk", d_ff=21)
    assert wide.d_ff == 21
    with pytest.raises(ValueError, match="k, d_ff: expected one of the two, found 3 and 21"):
        gather(bank, "topk", k=3, d_ff=21)
    for method, found in (("average", 13), ("average", 60), ("topk", 0), ("svd", 24.0), ("topk", 49)):
        with pytest.raises(ValueError, match=f"d_ff: expected .* for method '{method}', found {found}"):
            gather(bank, method, d_ff=found)


def test_concatenated_networks_add_up(form):
    ffns = [random_bank(1, d_ff, seed=d_ff, **form | {"biases": b}).expert(0) for d_ff, b in ((5, True), (7, False))]
    x = torch.randn(6, 8)
    joined = concatenate(ffns)
    assert joined.d_ff == 12
    torch.testing.assert_close(joined.apply(x), sum(ffn.apply(x) for ffn in ffns), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="gate: expected all FFNs to be gated or none, found both"):
        concatenate([ffns[0], random_bank(1, gated=not form["gated"]).expert(0)])


def test_a_widened_network_computes_the_same_and_all_of_it_learns(form):
    ffn, x = random_bank(1, **form).expert(0), torch.randn(6, 8)
    wide = ffn.widened(29).map(lambda t: t.clone().requires_grad_())
    torch.testing.assert_close(wide.apply(x), ffn.apply(x), atol=1e-4, rtol=1e-4)
    wide.apply(x).square().sum().backward()
    assert wide.down.grad.abs().sum(dim=0).min() > 0
    with pytest.raises(ValueError, match="d_ff: expected at least the present 12 neurons, found 11"):
        ffn.widened(11)


def test_register_adds_a_method_once():
    @register("first")
    def first_expert(bank, *, scale=1.0):
        return bank.expert(0).map(lambda t: scale * t)

    try:
        bank = random_bank(3)
        assert "first" in gathering_methods()
        assert_equal(gather(bank, "first", scale=2.0), bank.expert(0).map(lambda t: 2 * t))
        with pytest.raises(ValueError, match="registered already"):
            register("first")(first_expert)
    finally:
        del registry._METHODS["first"]


def with_value(value):
    bank = random_bank(3)
    bank.down[1, 0, 0] = value
    return bank


BAD = {
    "unknown method": (lambda: gather(random_bank(), "median"), "expected one of .*'svd'.*found 'median'"),
    "unknown option": (lambda: gather(random_bank(), "sum", rank=2), "rank: .*no such option.*scale"),
    "no experts": (lambda: gather([], "sum"), "at least one expert, found none"),
    "zero experts": (lambda: gather(random_bank(4).map(lambda t: t[:0]), "sum"), r"at least 1.*\[0, 12, 8\]"),
    "one FFN": (lambda: gather(random_bank().expert(0), "sum"), r"expected experts stacked.*\[12, 8\]"),
    "NaN": (lambda: gather(with_value(float("nan")), "svd"), "down of expert 1: expected finite weights, found 1 NaN"),
    "infinity": (lambda: gather(with_value(float("inf")), "topk"), "down of expert 1: expected finite"),
    "different shapes": (
        lambda: gather([random_bank().expert(0), random_bank(d_ff=6).expert(0)], "sum"),
        r"expert 1: expected the shapes of expert 0.*\[12, 8\].*found.*\[6, 8\]",
    ),
    "different parts": (
        lambda: gather([random_bank().expert(0), random_bank(biases=False).expert(0)], "sum"),
        "expert 1: expected the shapes of expert 0",
    ),
    "rank too large": (lambda: gather(random_bank(), "svd", rank=9), "rank: expected an integer from 1 to 8, found 9"),
    "rank zero": (lambda: gather(random_bank(), "svd", rank=0), "rank: expected an integer from 1 to 8, found 0"),
    "rank no integer": (lambda: gather(random_bank(), "svd", rank=2.0), "rank: expected an integer.*found 2.0"),
    "k too large": (lambda: gather(random_bank(), "topk", k=13), "k: expected an integer from 1 to 12, found 13"),
    "unknown importance": (lambda: gather(random_bank(), "topk", importance="l1"), "importance: expected one of.*'l1'"),
    "importance's shape": (
        lambda: gather(random_bank(), "topk", importance=torch.ones(4, 3)),
        r"importance: expected .*\[4, 12\], found \[4, 3\]",
    ),
    "scale NaN": (lambda: gather(random_bank(), "sum", scale=float("nan")), "scale: expected a finite number"),
    "wrong down": (
        lambda: FeedForwardWeights(torch.ones(4, 12, 8), torch.ones(4, 12, 8)),
        r"down: expected \[4, 8, 12\].*found \[4, 12, 8\]",
    ),
    "integers": (
        lambda: FeedForwardWeights(torch.ones(12, 8).long(), torch.ones(8, 12).long()),
        "up: expected floating-point weights, found torch.int64",
    ),
    "dtypes mixed": (
        lambda: FeedForwardWeights(torch.ones(12, 8), torch.ones(8, 12).double()),
        "down: expected torch.float32.*found torch.float64",
    ),
    "gate bias alone": (
        lambda: FeedForwardWeights(torch.ones(12, 8), torch.ones(8, 12), gate_bias=torch.ones(12)),
        "gate_bias: .*gate is None",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_what_was_found_and_expected(case):
    action, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        action()
