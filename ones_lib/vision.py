"""WideNet for images and its dense student, from timm's vision transformer, registered with timm.

``import ones_lib, timm; timm.create_model("widenet_large_patch16_224")`` is the MoE with 4 experts and
``"ones_large_patch16_224"`` the dense model of the same definition. Sizes as in WideNet (arXiv 2107.11817, table of
ImageNet results) and OneS (arXiv 2201.10890); ``tiny`` is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ones_lib.data import ImageData, Share, evaluation_keys, training_keys
from ones_lib.data.images import worker_count
from ones_lib.data.keys import WHOLE
from ones_lib.moe import MoEFeedForward, MoEModel, SoftMoEFeedForward
from ones_lib.processes import merged, own_share
from ones_lib.training import Training


class WideNet(MoEModel, VisionTransformer):
    """Vision transformer with an MoE feed-forward layer and block weights shared across depth; norms are each depth's own.

    Args:
        d_ff: hidden neurons of one expert.
        num_experts: E; 1 makes the dense model (OneS's architecture), without router.
        top_k: experts a token.
        capacity_factor: see :class:`ones_lib.moe.Router`.
        renormalize: gates of the chosen experts sum to 1.
        share_depth: False gives every depth its own attention and experts.
        slots_per_expert: more than 0 makes the layers Soft MoE's, with this many slots; top_k and capacity then mean nothing.
        kwargs: timm's ``VisionTransformer``'s.
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
        **kwargs,
    ) -> None:
        moe = {
            "d_ff": d_ff,
            "num_experts": num_experts,
            "top_k": top_k,
            "capacity_factor": capacity_factor,
            "renormalize": renormalize,
        }

        def expert_layer(in_features: int, hidden_features: int, norm_layer=None, **rest) -> nn.Module:
            # d_ff replaces timm's ratio of widths, hidden_features.
            if slots_per_expert and num_experts > 1:
                return SoftMoEFeedForward(in_features, d_ff, num_experts, slots_per_expert, **rest)
            return MoEFeedForward(in_features, **moe, **rest)

        super().__init__(**kwargs, mlp_layer=expert_layer)
        self._arguments = {**moe, "share_depth": share_depth, "slots_per_expert": slots_per_expert, **kwargs}
        if share_depth:
            for block in self.blocks[1:]:
                block.attn, block.mlp = self.blocks[0].attn, self.blocks[0].mlp

    def dense_twin(self, d_ff: int | None = None) -> WideNet:
        """A freshly initialised dense model (one expert, no router) of this architecture, ``d_ff`` wide if given."""
        arguments = {**self._arguments, "num_experts": 1}
        return WideNet(**(arguments if d_ff is None else {**arguments, "d_ff": d_ff}))

    def hidden_state_readers(self) -> list[nn.Module]:
        return [*(block.norm1 for block in self.blocks[1:]), self.norm]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        self.clear_balance_losses()
        return super().forward(x, attn_mask)


#: size and patch -> width, depth, heads, d_ff
SIZES = {
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
            "mean": (0.5, 0.5, 0.5),  # Inception's, as the authors' input pipeline
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
        "weight_init": "jax",  # Xavier-uniform attention and FFN, zero head, as the ViT and WideNet papers' code
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


def classification_model(model: dict, data: ImageData, seed: int) -> nn.Module:
    """A freshly initialised model for a data set; ``model`` holds timm's ``name`` and arguments."""
    arguments = {"num_classes": data.num_classes, "img_size": data.image_size, "in_chans": data.in_chans} | model
    with torch.random.fork_rng():
        set_seed(seed)
        return timm.create_model(arguments.pop("name"), **arguments)


class ImageBatch(NamedTuple):
    """``images`` [B, C, H, W]; ``labels`` [B]; ``targets`` [B, classes], the mixed labels, or None without mixup."""

    images: Tensor
    labels: Tensor
    targets: Tensor | None


class ImageClassification:
    """Image classification as a task of :func:`ones_lib.training.fit`."""

    metrics = ("accuracy",)

    def __init__(self, data: ImageData) -> None:
        self.data = data
        self.label_smoothing = 0.0

    def batches(
        self, training: Training, seed: int, start: int, device: torch.device, share: Share = WHOLE
    ) -> Iterator[ImageBatch]:
        """Training batches of the steps from ``start`` on. Mixup pairs the images of one process's part of a batch."""
        self.label_smoothing = training.label_smoothing
        mixup = None
        if training.mixup:
            mixup = Mixup(training.mixup, label_smoothing=training.label_smoothing, num_classes=self.data.num_classes)
        keys = training_keys(len(self.data.train), training.batch_size, seed, start, training.steps, share)
        for images, labels in self._loader(self.data.train, keys):
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            mixed, targets = (images, None) if mixup is None else mixup(images, labels)
            yield ImageBatch(mixed, labels, targets)

    def count(self, batch: ImageBatch) -> int:
        return len(batch.labels)

    def forward(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        return model(batch.images)

    def loss(self, logits: Tensor, batch: ImageBatch) -> Tensor:
        if batch.targets is None:
            return F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        return F.cross_entropy(logits, batch.targets)  # timm's mixup has smoothed them

    def accuracy(self, logits: Tensor, batch: ImageBatch) -> Tensor:
        return (logits.argmax(dim=-1) == batch.labels).float().mean()

    def predict(self, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Of every validation image whether it is right, the class predicted, and its label, [n] each."""
        model.eval()
        parts, keys = [], evaluation_keys(len(self.data.val), batch_size=250)
        with torch.inference_mode():
            for images, labels in self._loader(self.data.val, own_share(keys)):
                parts.append(torch.stack([model(images.to(device)).argmax(dim=-1).cpu(), labels]))
        predicted, label = torch.cat(merged(parts, len(keys)), dim=1)
        return {"accuracy": (predicted == label).float(), "predicted": predicted, "label": label}

    def _loader(self, split, keys) -> DataLoader:
        own = torch.Generator()  # else the loader's start would draw from the generator that seeds the step
        return DataLoader(
            split, batch_sampler=keys, collate_fn=split.collate, num_workers=worker_count(split), generator=own
        )
