"""WideNet and OneS: sizes from the papers, sharing across depth, one definition for MoE and dense."""

import pytest
import timm
import torch
import torch.nn.functional as F

import ones_lib  # noqa: F401  registers the models
from ones_lib.models.images import WideNet

TINY = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 12,
    "depth": 3,
    "num_heads": 2,
    "d_ff": 10,
    "num_classes": 7,
    "class_token": False,
    "global_pool": "avg",
}


def count(model) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("widenet_base_patch16_224", 29.0),  # WideNet, arXiv 2107.11817
        ("widenet_large_patch16_224", 40.0),
        ("widenet_huge_patch14_224", 61.5),  # 63M there, with a d x d layer before the head
        ("ones_large_patch16_224", 15.0),  # OneS, arXiv 2201.10890
    ],
)
def test_parameter_counts_are_the_papers(name, millions):
    with torch.device("meta"):  # no memory, no initialisation
        model = timm.create_model(name)
    assert count(model) == pytest.approx(millions, abs=0.5)


def test_every_size_is_registered_as_moe_and_dense():
    names = set(timm.list_models("widenet_*")) | set(timm.list_models("ones_*"))
    for size in ("tiny_patch16", "base_patch16", "large_patch16", "huge_patch14"):
        assert {f"widenet_{size}_224", f"ones_{size}_224"} <= names


def test_timm_arguments_and_configuration():
    model = timm.create_model("widenet_tiny_patch16_224", num_classes=5, img_size=32, num_experts=3, in_chans=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert model.moe_layers()[0].num_experts == 3
    assert timm.data.resolve_data_config(model=timm.create_model("ones_tiny_patch16_224"))["mean"] == (0.5, 0.5, 0.5)


def test_block_weights_are_shared_and_norms_are_not():
    model = WideNet(**TINY)
    names = [name for name, _ in model.named_parameters()]
    assert {name.split(".")[1] for name in names if ".attn." in name or ".mlp." in name} == {"0"}
    assert {name.split(".")[1] for name in names if ".norm" in name} == {"0", "1", "2"}
    assert len(model.moe_layers()) == 1
    unshared = WideNet(**TINY, share_depth=False)
    assert len(unshared.moe_layers()) == 3
    assert {name.split(".")[1] for name, _ in unshared.named_parameters() if ".mlp." in name} == {"0", "1", "2"}


def test_forward_against_a_plain_transformer():
    """Pre-norm blocks written out, with the same attention and FFN at every depth."""
    model = WideNet(**TINY, num_experts=1).eval()
    images = torch.randn(3, 3, 16, 16)
    patches = F.unfold(images, 4, stride=4).mT  # [B, 16, 3*4*4]
    x = patches @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias + model.pos_embed
    attention, ffn = model.blocks[0].attn, model.blocks[0].mlp
    for block in model.blocks:
        y = F.layer_norm(x, (12,), block.norm1.weight, block.norm1.bias, block.norm1.eps)
        q, k, v = (attention.qkv(y)).view(3, 16, 3, 2, 6).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / 6**0.5).softmax(dim=-1)
        x = x + attention.proj((weights @ v).transpose(1, 2).reshape(3, 16, 12))
        y = F.layer_norm(x, (12,), block.norm2.weight, block.norm2.bias, block.norm2.eps)
        x = x + F.gelu(y @ ffn.up[0].T + ffn.up_bias[0]) @ ffn.down[0].T + ffn.down_bias[0]
    x = F.layer_norm(x.mean(dim=1), (12,), model.fc_norm.weight, model.fc_norm.bias, model.fc_norm.eps)
    torch.testing.assert_close(model(images), model.head(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("d_ff", [10, 4095, 4096, 4097])
def test_d_ff_is_exact(d_ff):
    assert WideNet(**{**TINY, "d_ff": d_ff, "num_experts": 2}).moe_layers()[0].up.shape == (2, d_ff, 12)


def test_balance_loss_is_the_mean_over_depth_of_the_last_pass():
    model = WideNet(**TINY).train()
    for _ in range(2):
        model(torch.randn(2, 3, 16, 16))
    losses = model.moe_layers()[0].balance_losses
    assert len(losses) == 3
    torch.testing.assert_close(model.balance_loss(), torch.stack(losses).mean())
    model.eval()(torch.randn(2, 3, 16, 16))
    assert model.balance_loss() == 0.0
    assert WideNet(**TINY, num_experts=1).train().balance_loss() == 0.0


def test_biases_get_no_weight_decay():
    model = WideNet(**TINY)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert {"blocks.0.mlp.up", "blocks.0.mlp.down", "blocks.0.attn.qkv.weight", "head.weight"} <= names
    assert not any("bias" in name or "norm" in name or "pos_embed" in name for name in names)
