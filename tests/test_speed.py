"""The one-hot dispatch against the plain one, and what a measurement holds."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import random_bank
from test_moe import random_routing

from ones_lib.moe import Routing, dispatch_plain
from ones_lib.speed import dispatch_one_hot, measure_speed
from ones_lib.vision import WideNet


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


@pytest.mark.parametrize("share_depth", [True, False])
def test_a_measurement_has_every_variant_and_counts_what_must_be_done(share_depth):
    sizes = {"embed_dim": 8, "depth": 3, "num_heads": 2, "d_ff": 12, "num_experts": 4, "top_k": 2, "patch_size": 4}
    moe = timm.create_model(
        "widenet_tiny_patch16_224", img_size=16, in_chans=1, num_classes=5, share_depth=share_depth, **sizes
    )
    assert isinstance(moe, WideNet)
    table = measure_speed("tiny", moe, [1, 2], seconds=0.01)
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
