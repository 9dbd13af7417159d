"""Ways of dispatch against the plain one, and the tables of measurements."""

import math
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import random_bank
from test_moe import random_routing

from ones_lib.models.images import WideNet
from ones_lib.moe import Routing, dispatch_plain
from ones_lib.views.speed import (
    _peak_bytes,
    available_modes,
    dispatch_one_hot,
    measure_dispatch,
    measure_speed,
    transformers_dispatch,
)


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr("ones_lib.views.speed.BLOCK_SECONDS", 0.001)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("skew", [0.0, 5.0])
@pytest.mark.parametrize("group_size", [10, 30])
@pytest.mark.parametrize("biases", [True, False])
def test_one_hot_dispatch_is_the_plain_one_group_by_group(biases, top_k, skew, group_size):
    bank = random_bank(5, dtype=torch.float64, biases=biases)
    routing = random_routing(30, 5, top_k, skew=skew)
    x = torch.randn(30, 8, dtype=torch.float64)
    gates = routing.gates.double()
    found = dispatch_one_hot(
        bank, x, Routing(routing.experts, gates, routing.probabilities), F.gelu, group_size=group_size
    )
    capacity = math.ceil(1.2 * top_k * group_size / 5)
    for first in range(0, 30, group_size):
        part = slice(first, first + group_size)
        one = Routing(routing.experts[part], gates[part], routing.probabilities[part], capacity)
        torch.testing.assert_close(found[part], dispatch_plain(bank, x[part], one, F.gelu))


def test_groups_must_divide_the_tokens():
    with pytest.raises(ValueError, match="group_size: expected a divisor of the 30 tokens, found 7"):
        dispatch_one_hot(random_bank(4), torch.randn(30, 8), random_routing(30, 4, 2), F.gelu, group_size=7)


def test_transformers_ways_compute_what_the_plain_one_does():
    bank = random_bank(5, d_ff=16, biases=False).map(torch.nn.Parameter)
    x, routing = torch.randn(30, 8), random_routing(30, 5, 2)
    expected = dispatch_plain(bank, x, routing, F.gelu)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        found = transformers_dispatch(implementation, bank)(bank, x, routing, F.gelu)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_every_way_of_dispatch_is_timed_in_both_directions(monkeypatch):
    layer = {"d_model": 8, "d_ff": 16, "num_experts": 4, "top_k": 2, "tokens": 6}
    table = measure_dispatch("small", layer, [1, 2], ["float32", "bfloat16"], seconds=0.0)
    assert len(table) == 2 * 2 * 2 * 6
    assert (table.groupby(["precision", "direction", "batch_size"])["variant"].nunique() == 6).all()
    assert (table["measured"] >= 5).all()
    assert (table["low_ms"] > 0).all()
    monkeypatch.setattr("ones_lib.views.speed.LARGEST_COPY", 2 * 6 * 2 * 8 * 16 * 4)  # of one example in float32
    table = measure_dispatch("small", layer, [1, 2], ["float32"], seconds=0.0)
    assert set(table.loc[table["variant"] == "batched_mm", "batch_size"]) == {1}


SIZES = {"embed_dim": 8, "depth": 3, "num_heads": 2, "d_ff": 12, "num_experts": 4, "top_k": 2, "patch_size": 4}


def tiny(**arguments):
    model = timm.create_model(
        "widenet_tiny_patch16_224", img_size=16, in_chans=1, num_classes=5, **{**SIZES, **arguments}
    )
    assert isinstance(model, WideNet)
    return model


@pytest.mark.parametrize("share_depth", [True, False])
def test_a_measurement_has_every_variant_and_counts_what_must_be_done(share_depth):
    table = measure_speed("tiny", tiny(share_depth=share_depth), [1, 2], seconds=0.0)
    assert list(table["variant"]) == ["dense", "moe", "moe_plain", "moe_gshard"] * 2
    assert (table["low_ms"] <= table["median_ms"]).all()
    assert (table["median_ms"] <= table["high_ms"]).all()
    rows = table.set_index(["variant", "batch_size"])
    # By hand: 16 tokens of 8, each depth with attention's four products, its two of tokens with tokens, and the FFN.
    block = 16 * (2 * 4 * 8 * 8 + 2 * 2 * 16 * 8 + 2 * 2 * 8 * 12)
    around = 16 * 2 * 16 * 8 + 2 * 8 * 5  # patches, head
    assert rows.loc[("dense", 1), "flops"] == 3 * block + around
    assert rows.loc[("moe", 2), "flops"] == 2 * (3 * block + around + 3 * 16 * (2 * 2 * 8 * 12 + 2 * 4 * 8))
    assert rows.loc[("moe", 1), "parameters"] > rows.loc[("dense", 1), "parameters"]
    np.testing.assert_allclose(rows["images_per_second"], 1000 * rows.index.get_level_values(1) / rows["median_ms"])
    # Weights read, in float32: matrices and biases of attention and one FFN, two norms, at each of 3 depths; and around them.
    ffn = 2 * 8 * 12 + 12 + 8
    block = 4 * 8 * 8 + 4 * 8 + ffn + 2 * 2 * 8
    around = 16 * 8 + 8 + 16 * 8 + 2 * 8 + 8 * 5 + 5  # patches, positions, last norm, head
    assert rows.loc[("dense", 1), "weight_bytes"] == 4 * (3 * block + around)


def test_of_experts_the_weights_of_those_that_got_a_token_are_read():
    model = tiny(depth=1)
    with torch.no_grad():
        model.moe_layers()[0].router.weight.zero_()  # all tie: every token goes to the same two experts
    rows = measure_speed("tiny", model, [2], seconds=0.0).set_index("variant")
    ffn, router = 2 * 8 * 12 + 12 + 8, 4 * 8
    assert rows.loc["moe", "weight_bytes"] - rows.loc["dense", "weight_bytes"] == 4 * (ffn + router)


def test_peak_memory_is_what_a_pass_holds_at_once():
    def run():
        first = torch.zeros(1000)
        second = first + 1  # both: 8,000 bytes
        del first
        return second.sum()

    assert 8000 <= _peak_bytes(run, torch.device("cpu")) < 9000


@pytest.mark.processes
def test_compiled_and_low_precision_are_measured_where_they_run(monkeypatch):
    """The MoE by all of torch.compile, and two other models by all but its code generation, which takes ten seconds for each."""
    whole = torch.compile
    backends = iter(["inductor", "aot_eager", "inductor", "aot_eager"])  # of the trial, dense, MoE, GShard's
    monkeypatch.setattr(torch, "compile", lambda f, **options: whole(f, backend=next(backends), **options))
    modes = available_modes(["eager", "compiled"])
    table = measure_speed("tiny", tiny(depth=1), [1], 0.0, ["bfloat16"], modes)
    counts = table.groupby("mode")["variant"].nunique()
    assert counts.to_dict() == {"eager": 4} | ({"compiled": 3} if "compiled" in modes else {})
    assert available_modes(["eager"]) == ["eager"]


def test_without_a_compiler_there_is_no_compiled_mode(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler")

    compiled = partial(torch.compile, backend=broken)
    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.warns(UserWarning, match="(?s)modes: torch.compile does not run here.*no compiler"):
        assert available_modes(["eager", "compiled"]) == ["eager"]


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"modes: expected of .*found \['fast'\]"):
        measure_speed("tiny", tiny(), [1], 0.0, modes=["fast"])
