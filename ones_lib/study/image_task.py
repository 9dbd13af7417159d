"""Image classification as a task of the training loop: the model for a data set, batches, loss, predictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ones_lib.data import ImageData, Share, evaluation_keys, training_keys
from ones_lib.data.held import TensorImages
from ones_lib.data.images import worker_count
from ones_lib.data.keys import WHOLE
from ones_lib.study.processes import merged, own_share
from ones_lib.study.training import Training


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
    """Image classification as a task of :func:`ones_lib.study.training.fit`."""

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
        for images, labels in self._loader(self.data.train, keys, device):
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
            for images, labels in self._loader(self.data.val, own_share(keys), device):
                parts.append(torch.stack([model(images.to(device)).argmax(dim=-1).cpu(), labels.cpu()]))
        predicted, label = torch.cat(merged(parts, len(keys)), dim=1)
        return {"accuracy": (predicted == label).float(), "predicted": predicted, "label": label}

    def _loader(self, split, keys, device: torch.device) -> DataLoader:
        if isinstance(split, TensorImages):
            split.to(device)
        own = torch.Generator()  # else the loader's start would draw from the generator that seeds the step
        return DataLoader(
            split, batch_sampler=keys, collate_fn=split.collate, num_workers=worker_count(split), generator=own
        )
