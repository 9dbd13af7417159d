"""WideNet for images and its dense student, built on timm's vision transformer and registered with timm.

After ``import ones_lib, timm``, ``timm.create_model("widenet_large_patch16_224")`` makes the MoE with 4 experts and
``"ones_large_patch16_224"`` the dense model. Sizes are those of WideNet (arXiv 2107.11817, table of ImageNet results) and
OneS (arXiv 2201.10890); ``tiny`` is ours.
"""

from __future__ import annotations

import math

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ones_lib.moe import MoEFeedForward, MoEModel, SoftMoEFeedForward


class WideNet(MoEModel, VisionTransformer):
    """Vision transformer with an MoE feed-forward layer. Blocks share their weights across depth, but not their norms.

    Args:
        d_ff: hidden units of one expert.
        num_experts: E; 1 makes the dense model (OneS's architecture), without router.
        top_k, capacity_factor, renormalize: see :class:`ones_lib.moe.Router`.
        share_depth: False gives each depth its own attention and experts.
        slots_per_expert: above 0, Soft MoE layers with this many slots, which ignore top_k, capacity and renormalize.
        embed_dim, num_heads, kwargs: of timm's ``VisionTransformer``.

    Raises:
        ValueError: a size is out of bounds, or ``embed_dim`` no multiple of ``num_heads``.
    """

    def __init__(
        self,
        d_ff: int = 4096,
        num_experts: int = 4,
        top_k: int = 2,
        capacity_factor: float | None = 1.2,
        renormalize: bool = False,
        share_depth: bool = True,
        slots_per_expert: int = 0,
        embed_dim: int = 768,
        num_heads: int = 12,
        **kwargs,
    ) -> None:
        if embed_dim % num_heads:  # timm asserts it, which Python can leave out
            raise ValueError(f"num_heads: expected a divisor of embed_dim={embed_dim}, found {num_heads}")
        kwargs |= {"embed_dim": embed_dim, "num_heads": num_heads}
        moe = {
            "d_ff": d_ff,
            "num_experts": num_experts,
            "top_k": top_k,
            "capacity_factor": capacity_factor,
            "renormalize": renormalize,
        }

        def expert_layer(in_features: int, hidden_features: int, norm_layer=None, **rest) -> nn.Module:
            # d_ff replaces hidden_features, timm's ratio of widths.
            if slots_per_expert and num_experts > 1:
                return SoftMoEFeedForward(in_features, d_ff, num_experts, slots_per_expert, **rest)
            return MoEFeedForward(in_features, **moe, **rest)

        super().__init__(**kwargs, mlp_layer=expert_layer)
        self._timm_arguments = kwargs
        self._arguments = {**moe, "share_depth": share_depth, "slots_per_expert": slots_per_expert, **kwargs}
        if share_depth:
            for block in self.blocks[1:]:
                block.attn, block.mlp = self.blocks[0].attn, self.blocks[0].mlp

    def dense_twin(self, d_ff: int | None = None) -> WideNet:
        """A freshly initialised dense model (one expert, no router) of this architecture, ``d_ff`` wide if given."""
        arguments = {**self._arguments, "num_experts": 1}
        return WideNet(**(arguments if d_ff is None else {**arguments, "d_ff": d_ff}))

    def unrolled(self) -> tuple[dict, dict[str, Tensor]]:
        """Arguments and weights that make timm's own ``VisionTransformer`` this dense model.

        What depths share, each has by a name of its own; the tensors are this model's, not copies.

        Raises:
            ValueError: this model is an MoE.
        """
        layer = self.blocks[0].mlp
        if layer.num_experts > 1:
            raise ValueError(f"model: expected a dense WideNet, found one with {layer.num_experts} experts")
        _, d_ff, width = layer.up.shape
        ratio = d_ff / width
        if int(width * ratio) < d_ff:  # timm rounds down
            ratio = math.nextafter(ratio, math.inf)
        names = {"up": "fc1.weight", "up_bias": "fc1.bias", "down": "fc2.weight", "down_bias": "fc2.bias"}
        weights = {}
        for name, tensor in self.state_dict().items():
            block, mlp, part = name.partition(".mlp.")
            weights[f"{block}{mlp}{names[part]}" if mlp else name] = tensor[0] if mlp else tensor
        return {**self._timm_arguments, "mlp_ratio": ratio}, weights

    def hidden_state_readers(self) -> list[nn.Module]:
        return [*(block.norm1 for block in self.blocks[1:]), self.norm]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        self.clear_balance_losses()
        return super().forward(x, attn_mask)


SIZES = {  # size and patch -> width, depth, heads, d_ff
    "tiny_patch16": (192, 12, 3, 768),
    "base_patch16": (768, 12, 12, 4096),
    "large_patch16": (1024, 24, 16, 4096),
    "huge_patch14": (1280, 32, 16, 5120),
    "huge_patch16": (1280, 32, 16, 5120),
}
FAMILIES = {"widenet": 4, "ones": 1}  # family -> experts

default_cfgs = generate_default_cfgs(
    {
        f"{family}_{size}_224": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": None,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.5, 0.5, 0.5),  # Inception's, as in the authors' input pipeline
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for family in FAMILIES
        for size in SIZES
    }
)


def _register(family: str, size: str) -> None:
    embed_dim, depth, num_heads, d_ff = SIZES[size]
    arguments = {
        "patch_size": int(size.partition("patch")[2]),
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "d_ff": d_ff,
        "num_experts": FAMILIES[family],
        "class_token": False,
        "global_pool": "avg",
        "weight_init": "jax",  # Xavier-uniform attention and FFN, zero head, as in the code of ViT and WideNet
    }

    def create(pretrained: bool = False, **kwargs) -> WideNet:
        return build_model_with_cfg(
            WideNet, create.__name__, pretrained, feature_cfg={"feature_cls": "getter"}, **{**arguments, **kwargs}
        )

    create.__name__ = f"{family}_{size}_224"
    create.__doc__ = f"{family}, {size.replace('_', ', ')}, 224 px, {FAMILIES[family]} expert(s); see WideNet."
    register_model(create)


for _family in FAMILIES:
    for _size in SIZES:
        _register(_family, _size)
