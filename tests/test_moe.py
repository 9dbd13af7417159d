"""Router, balance loss, capacity and dispatch against plain formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import equal_bank, random_bank

from ones_lib import dispatch as fast
from ones_lib.dispatch import dispatch
from ones_lib.moe import MoEFeedForward, Router, Routing, SoftMoEFeedForward, dispatch_plain


def routing_of(experts, gates, num_experts, capacity=None):
    experts, gates = torch.tensor(experts), torch.tensor(gates)
    return Routing(experts, gates, torch.full((len(experts), num_experts), 1 / num_experts), capacity)


def random_routing(tokens, num_experts, top_k, capacity=None, seed=0, skew=0.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, num_experts, generator=generator)
    logits[:, 0] += skew
    probabilities = logits.softmax(dim=-1)
    gates, experts = probabilities.topk(top_k, dim=-1)
    return Routing(experts, gates.to(dtype), probabilities, capacity)


WAYS = {"all experts": (2**40, 2**40), "grouped": (0, 2**40), "expert by expert": (0, 0)}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Each of the fast dispatch's ways in turn, whatever the sizes."""
    small, large = WAYS[request.param]
    monkeypatch.setattr(fast, "SMALL", small)
    monkeypatch.setattr(fast, "LARGE", large)
    return request.param


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize(
    ("tokens", "capacity", "skew"),
    [
        (40, None, 0.0),
        (40, None, 8.0),
        (40, 5, 0.0),
        (40, 5, 8.0),
        (40, 1, 8.0),
        (40, 1000, 8.0),
        (1, None, 0.0),
        (1, 1, 8.0),
    ],
)
@pytest.mark.parametrize("form", [{}, {"gated": True}, {"biases": False}], ids=["plain", "gated", "no-bias"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, {}), (torch.float32, {"atol": 2e-4, "rtol": 2e-4})])
def test_fast_dispatch_equals_the_plain_one(way, dtype, tolerance, form, top_k, capacity, skew, tokens):
    """Outputs and gradients; skewed leaves experts empty and drops tokens where there is a capacity. In double precision nothing
    is grouped."""
    routing = random_routing(tokens, 6, top_k, capacity, skew=skew)
    results = []
    for function in (dispatch_plain, dispatch):
        bank = random_bank(6, dtype=dtype, **form).map(lambda t: t.requires_grad_())
        x = torch.randn(tokens, 8, dtype=dtype, generator=torch.Generator().manual_seed(3)).requires_grad_()
        gates = routing.gates.to(dtype, copy=True).requires_grad_()
        given = Routing(routing.experts, gates, routing.probabilities, capacity)
        y = function(bank, x, given, F.gelu)
        y.square().sum().backward()
        with torch.no_grad():
            unwatched = function(bank, x, given, F.gelu)
        results.append([y, unwatched, x.grad, gates.grad, *(t.grad for _, t in bank.tensors())])
    for plain, quick in zip(*results, strict=True):
        torch.testing.assert_close(quick, plain, **tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, {}), (torch.float32, {"atol": 2e-4, "rtol": 2e-4})])
@pytest.mark.parametrize("d_ff", [12, 13])
def test_fast_dispatch_where_nothing_is_grouped(dtype, tolerance, d_ff, monkeypatch):
    """In double precision, or in rows that are not of whole 16 bytes."""
    monkeypatch.setattr(fast, "SMALL", 0)
    bank, routing = random_bank(6, d_ff=d_ff, dtype=dtype), random_routing(40, 6, 2, capacity=9)
    x = torch.randn(40, 8, dtype=dtype)
    plain = dispatch_plain(bank, x, routing, F.gelu)
    torch.testing.assert_close(dispatch(bank, x, routing, F.gelu), plain, **tolerance)


def test_fast_dispatch_in_bfloat16(way):
    """Within 2% of what float64 gives on the same rounded numbers: bfloat16 has 8 bits, and hidden values and sums are rounded."""
    bank = random_bank(6, d_ff=16).map(lambda t: t.bfloat16())
    routing, x = random_routing(40, 6, 2), torch.randn(40, 8).bfloat16()
    given = Routing(routing.experts, routing.gates.bfloat16(), routing.probabilities)
    exact = Routing(routing.experts, given.gates.double(), routing.probabilities)
    expected = dispatch_plain(bank.map(lambda t: t.double()), x.double(), exact, F.gelu)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            found = dispatch(bank, x, given, F.gelu)
        assert found.dtype == torch.bfloat16
        assert (found.double() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_dispatch_can_be_compiled(way, dtype):
    """By all of torch.compile but its code generation, for which not every machine has a compiler."""
    bank, routing = random_bank(6, d_ff=16).map(lambda t: t.to(dtype)), random_routing(40, 6, 2, dtype=dtype)
    x = torch.randn(40, 8, dtype=dtype)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: dispatch(bank, x, routing, F.gelu), backend="eager")
    torch.testing.assert_close(compiled(x), dispatch(bank, x, routing, F.gelu))


def test_dispatch_by_hand():
    """Three tokens, two experts that multiply by 2 and by 10 (identity activation)."""
    bank = random_bank(2, d_ff=1, d_model=1, biases=False)
    bank.up[:], bank.down[0], bank.down[1] = 1.0, 2.0, 10.0
    routing = routing_of([[0, 1], [1, 0], [0, 1]], [[0.75, 0.25], [0.5, 0.25], [1.0, 0.0]], 2)
    x = torch.tensor([[1.0], [2.0], [3.0]])
    expected = torch.tensor([[0.75 * 2 + 0.25 * 10], [0.5 * 20 + 0.25 * 4], [6.0]])
    for function in (dispatch_plain, dispatch):
        torch.testing.assert_close(function(bank, x, routing, lambda h: h), expected)


def test_capacity_serves_first_choices_first_and_drops_the_rest_by_hand():
    """Expert 0 is everyone's: with two places the first choices of tokens 1 and 2 come before token 0's second."""
    bank = random_bank(2, d_ff=1, d_model=1, biases=False)
    bank.up[:], bank.down[0], bank.down[1] = 1.0, 2.0, 10.0
    routing = routing_of([[1, 0], [0, 1], [0, 1]], [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]], 2, capacity=2)
    x = torch.ones(3, 1)
    # Expert 1: token 0's first choice, then token 1's second; token 2's second finds no place.
    expected = torch.tensor([[0.5 * 10], [0.5 * 2 + 0.5 * 10], [0.5 * 2]])
    for function in (dispatch_plain, dispatch):
        torch.testing.assert_close(function(bank, x, routing, lambda h: h), expected)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_equal_experts_equal_their_dense_twin_with_renormalised_gates(top_k):
    layer = MoEFeedForward(8, 12, num_experts=3, top_k=top_k, renormalize=True).eval()
    dense = MoEFeedForward(8, 12, num_experts=1).eval()
    bank = equal_bank(3)
    with torch.no_grad():
        for name, tensor in bank.tensors():
            getattr(layer, name).copy_(tensor)
            getattr(dense, name).copy_(tensor[:1])
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(layer(x), dense(x), atol=1e-4, rtol=1e-4)


def test_one_expert_is_the_plain_feed_forward_network():
    layer = MoEFeedForward(8, 12, num_experts=1)
    assert layer.router is None
    x = torch.randn(2, 5, 8)
    expected = F.gelu(x @ layer.up[0].T + layer.up_bias[0]) @ layer.down[0].T + layer.down_bias[0]
    torch.testing.assert_close(layer(x), expected)


def test_router_gates():
    router, x = Router(8, 5, top_k=2).eval(), torch.randn(30, 8)
    probabilities = (x @ router.weight.T).softmax(dim=-1)
    routing = router(x)
    torch.testing.assert_close(routing.probabilities, probabilities)
    torch.testing.assert_close(routing.gates, probabilities.sort(dim=-1, descending=True).values[:, :2])
    assert routing.capacity is None
    router.renormalize = True
    torch.testing.assert_close(router(x).gates.sum(dim=-1), torch.ones(30))


def test_router_noise_has_standard_deviation_one_over_e_in_training_only():
    router = Router(8, 4, top_k=1)
    x = torch.zeros(50_000, 8)
    noise = router(x).probabilities.log()
    noise = noise - noise.mean(dim=-1, keepdim=True)  # the softmax hides a common shift
    # Centring takes away one of four degrees of freedom.
    assert noise.std().item() == pytest.approx(0.25 * math.sqrt(3 / 4), rel=0.02)
    torch.testing.assert_close(router.eval()(x).probabilities, torch.full((50_000, 4), 0.25))


def test_router_capacity_in_training():
    assert Router(8, 4, top_k=2, capacity_factor=1.2)(torch.randn(101, 8)).capacity == math.ceil(1.2 * 2 * 101 / 4)
    assert Router(8, 4, top_k=2, capacity_factor=None)(torch.randn(101, 8)).capacity is None


def test_balance_loss_by_hand():
    """E = 2, k = 1; expert 0 gets 3 of 4 tokens at mean probability 0.6: 2 * (0.75 * 0.6 + 0.25 * 0.4)."""
    probabilities = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7]])
    gates, experts = probabilities.topk(1, dim=-1)
    assert Routing(experts, gates, probabilities).balance_loss().item() == pytest.approx(1.1)
    balanced = torch.full((6, 3), 1 / 3)
    experts = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1], [1, 2], [2, 0]])
    assert Routing(experts, balanced[:, :2], balanced).balance_loss().item() == pytest.approx(1.0)


def test_balance_loss_teaches_the_router_to_spread():
    torch.manual_seed(0)
    router = Router(8, 4, top_k=1)
    with torch.no_grad():
        router.weight[0] += 1.0
    x = torch.rand(512, 8)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    before = router(x).balance_loss().item()
    for _ in range(100):
        optimizer.zero_grad()
        router(x).balance_loss().backward()
        optimizer.step()
    assert before > 2
    assert router(x).balance_loss().item() < 1.2


def test_autocast_and_bfloat16_run_and_agree():
    torch.manual_seed(0)
    layer, x = MoEFeedForward(8, 12, num_experts=4).eval(), torch.randn(20, 8)
    full = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), full, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 5}, "top_k: expected an integer from 1 to num_experts=4, found 5"),
        ({"top_k": 0}, "top_k: .*found 0"),
        ({"capacity_factor": -1.0}, "capacity_factor: expected a positive number or None, found -1.0"),
        ({"num_experts": 0}, "num_experts: expected an integer of at least 1, found 0"),
        ({"d_ff": 0}, "d_ff: expected"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoEFeedForward(**{"d_model": 8, "d_ff": 12, **arguments})


def test_token_gates_are_the_routing_written_out():
    layer, x = MoEFeedForward(8, 12, num_experts=5).eval(), torch.randn(2, 6, 8)
    gates, routing = layer.token_gates(x), layer.router(x.flatten(0, 1))
    for n in range(12):
        for e in range(5):
            place = (routing.experts[n] == e).nonzero()
            expected = routing.gates[n, place[0, 0]] if len(place) else torch.tensor(0.0)
            torch.testing.assert_close(gates.flatten(0, 1)[n, e], expected)
    mask = torch.arange(6).expand(2, 6) < 4
    assert torch.equal(layer.token_gates(x, mask), gates * mask[..., None])


def test_sampling_draws_experts_by_their_probabilities_without_replacement():
    torch.manual_seed(0)
    router = Router(8, 4, top_k=1).eval()
    x = (20 * torch.randn(1, 8)).expand(20_000, 8)
    probabilities = router(x).probabilities[0]
    router.sampling = True
    drawn = torch.bincount(router(x).experts.flatten(), minlength=4) / 20_000
    torch.testing.assert_close(drawn, probabilities, atol=0.015, rtol=0)
    router.top_k = 3
    routing = router(x)
    assert (routing.experts.sort(dim=1).values.diff(dim=1) > 0).all()  # three different ones
    torch.testing.assert_close(routing.gates, routing.probabilities.gather(1, routing.experts))


# --- Soft MoE ---------------------------------------------------------------------------------------------------------


def soft_layer(num_experts=3, slots=2):
    torch.manual_seed(0)
    layer = SoftMoEFeedForward(8, 12, num_experts, slots).double()
    with torch.no_grad():
        layer.router.scale.fill_(4.0)
        for bias in (layer.up_bias, layer.down_bias):
            bias.normal_()
    return layer


@pytest.mark.parametrize("masked", [False, True])
def test_soft_moe_equals_a_plain_loop(masked):
    """Over sequences, slots and tokens, as the paper's equations read (section 2.1), with cosines as logits (2.3)."""
    layer, x = soft_layer(), torch.randn(2, 5, 8, dtype=torch.float64)
    lengths = [5, 3] if masked else [5, 5]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None] if masked else None
    y = layer(x, mask)
    for b, length in enumerate(lengths):
        tokens = x[b, :length]
        phi = layer.router.weight
        logits = 4.0 * F.normalize(tokens, dim=1) @ F.normalize(phi, dim=1).T  # [L, 6]
        into = logits.exp() / logits.exp().sum(dim=0)  # over tokens
        out = logits.exp() / logits.exp().sum(dim=1, keepdim=True)  # over slots
        expected = torch.zeros(length, 8, dtype=torch.float64)
        for slot in range(6):
            mixture = sum(into[t, slot] * tokens[t] for t in range(length))
            result = layer.bank().expert(slot // 2).apply(mixture)
            for t in range(length):
                expected[t] += out[t, slot] * result
        torch.testing.assert_close(y[b, :length], expected)
        assert (y[b, length:] == 0).all()


def test_soft_moes_weights_sum_to_one_where_they_must():
    layer, x = soft_layer(), torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 3])[:, None]
    spread, combine = layer.router(x, mask)
    torch.testing.assert_close(spread.sum(dim=1), torch.ones(2, 6, dtype=torch.float64))
    torch.testing.assert_close(combine.sum(dim=2), torch.ones(2, 5, dtype=torch.float64))
    assert (spread[1, 3:] == 0).all()
    gates = layer.token_gates(x)
    torch.testing.assert_close(gates.sum(dim=2), torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(gates[..., 1], layer.router(x)[1][..., 2:4].sum(dim=2))


def test_soft_moe_drops_nothing_and_teaches_all_its_weights():
    layer = soft_layer()
    layer.train()(torch.randn(2, 5, 8, dtype=torch.float64)).square().sum().backward()
    assert layer.balance_losses == []
    for name, parameter in layer.named_parameters():
        assert parameter.grad.flatten(1).abs().sum(dim=1).all() if parameter.ndim > 1 else parameter.grad != 0, name


def test_soft_moe_needs_slots():
    with pytest.raises(ValueError, match="slots_per_expert: expected an integer of at least 1, found 0"):
        SoftMoEFeedForward(8, 12, 3, 0)
