"""Small pictures, held in memory and augmented by batch: no step waits for a decoder.

Photographs get timm's augmentation for training: a random resized crop, a flip, and jitter of brightness, contrast and
saturation, with the same meaning, and the same pixels for the same crop. A picture's draws depend on its own seed alone, so
a batch may be split over processes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

ATTEMPTS = 10  # at a crop inside the picture, before the whole picture is taken
RATIOS = (3 / 4, 4 / 3)  # width / height of a crop


class TensorImages(Dataset):
    """Images in memory, uint8 [n, C, H, W], augmented by shifts of at most one pixel; indexed by a batch of keys.

    ``labels`` are [n].
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: float, std: float) -> None:
        self.images, self.labels, self.mean, self.std = images, labels, mean, std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, 2] -> standardised images [B, C, H, W] and labels [B]."""
        index, seed = keys.to(self.labels.device).unbind(dim=1)
        images = self.images[index].float().sub_(self.mean).div_(self.std)
        if (seed >= 0).any():
            images = shift(images, torch.where(seed < 0, 4, seed % 9))  # 4 is no shift
        return images, self.labels[index]

    def to(self, device: torch.device) -> None:
        """Move all images to a device; batches are made there."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch


def shift(images: Tensor, which: Tensor) -> Tensor:
    """Shift images [B, C, H, W] down by ``which // 3 - 1`` and right by ``which % 3 - 1`` pixels; the border repeats."""
    batch, channels, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    rows = torch.arange(height, device=images.device) + 2 - (which // 3)[:, None]  # [B, H]
    columns = torch.arange(width, device=images.device) + 2 - (which % 3)[:, None]  # [B, W]
    pixels = (rows[:, :, None] * (width + 2) + columns[:, None, :]).view(batch, 1, -1)
    return padded.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view_as(images)


class HeldImages(TensorImages):
    """Photographs of one size in memory, uint8 [n, 3, H, W]; indexed by a batch of keys.

    Args:
        image_size: px, height and width of what is given out.
        crop_pct: part of the shorter side that an evaluated picture's central crop keeps.
        min_crop: least part of the area that a training crop keeps, as a fraction.
        color_jitter: brightness, contrast and saturation change by a factor from 1 - c to 1 + c; 0 for none.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        image_size: int,
        *,
        crop_pct: float = 1.0,
        min_crop: float = 0.08,
        color_jitter: float = 0.0,
    ) -> None:
        super().__init__(images, labels, mean=127.5, std=127.5)
        self.image_size, self.crop_pct, self.min_crop, self.color_jitter = image_size, crop_pct, min_crop, color_jitter

    def __getitems__(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, 2] -> images [B, 3, S, S] in [-1, 1] and labels [B]."""
        index, seed = keys.to(self.labels.device).unbind(dim=1)
        pictures = self.images[index].float()
        height, width = pictures.shape[2:]
        plain = (seed < 0)[:, None]
        augmenting = not plain.all()
        box, bounds = (side.to(seed.device) for side in central_crop(height, width, self.image_size, self.crop_pct))
        if augmenting:
            draws = uniforms(seed, 4 * ATTEMPTS + 8)
            crops = random_crops(draws[:, : 4 * ATTEMPTS], height, width, self.min_crop)
            box, bounds = torch.where(plain, box, crops), torch.where(plain, bounds, crops)
        pictures = resized(pictures, box.expand(len(keys), 4), bounds.expand(len(keys), 4), self.image_size)
        if augmenting:
            draws = draws[:, 4 * ATTEMPTS :]
            flipped = (draws[:, :1] < 0.5) & ~plain
            pictures = torch.where(flipped[..., None, None], pictures.flip(-1), pictures)
            if self.color_jitter:
                pictures = torch.where(plain[..., None, None], pictures, jittered(pictures, draws, self.color_jitter))
        return pictures.sub_(self.mean).div_(self.std), self.labels[index]


def uniforms(seeds: Tensor, count: int) -> Tensor:
    """Numbers from 0 to below 1, [B, count], from the seeds [B] alone (SplitMix64; Steele et al., OOPSLA 2014)."""
    state = seeds[:, None] + torch.arange(1, count + 1, device=seeds.device) * -0x61C8864680B583EB
    state = (state ^ _shifted(state, 30)) * -0x40A7B892E31B1A47
    state = (state ^ _shifted(state, 27)) * -0x6B2FB644ECCEEE15
    return _shifted(state ^ _shifted(state, 31), 40).float() * 2.0**-24


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift int64 to the right as if it had no sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def central_crop(height: int, width: int, size: int, crop_pct: float) -> tuple[Tensor, Tensor]:
    """Box and bounds, [1, 4] each, of an evaluated picture: the shorter side becomes size / crop_pct, its centre is kept."""
    short = math.floor(size / crop_pct)
    scale = short / min(height, width)
    sides = [short if side == min(height, width) else int(side * scale) for side in (height, width)]
    top, left = (round((side - size) / 2) * whole / side for side, whole in zip(sides, (height, width), strict=True))
    box = [top, left, size * height / sides[0], size * width / sides[1]]
    return torch.tensor([box]), torch.tensor([[0.0, 0.0, height, width]])


def random_crops(draws: Tensor, height: int, width: int, min_crop: float) -> Tensor:
    """Boxes of random crops (top, left, height, width; px), [B, 4], from draws [B, 4 * ATTEMPTS].

    The area is a uniform part, from ``min_crop`` to 1, of the picture's; the logarithm of width / height is uniform between
    those of :data:`RATIOS`. The first attempt that fits is taken.
    """
    part, ratio, down, right = draws.view(-1, ATTEMPTS, 4).unbind(dim=-1)
    area = (min_crop + (1 - min_crop) * part) * (height * width)
    low, high = (math.log(ratio) for ratio in RATIOS)
    ratio = torch.exp(low + (high - low) * ratio)
    tall, wide = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (tall <= height) & (wide <= width) & (tall > 0) & (wide > 0)
    top, left = (down * (height - tall + 1)).floor(), (right * (width - wide + 1)).floor()
    first = fits.int().argmax(dim=1, keepdim=True)
    boxes = torch.stack([side.gather(1, first)[:, 0] for side in (top, left, tall, wide)], dim=1)
    return torch.where(fits.any(dim=1, keepdim=True), boxes, _whole(height, width).to(boxes))


def _whole(height: int, width: int) -> Tensor:
    """The largest central box whose width / height is within :data:`RATIOS`, [1, 4]."""
    tall, wide = min(height, round(width / RATIOS[0])), min(width, round(height * RATIOS[1]))
    return torch.tensor([[(height - tall) // 2, (width - wide) // 2, tall, wide]])


def resized(pictures: Tensor, boxes: Tensor, bounds: Tensor, size: int) -> Tensor:
    """Boxes [B, 4] of pictures [B, 3, H, W], 0 to 255, resized to [B, 3, size, size] by Pillow's bicubic filter.

    ``bounds`` [B, 4] are the boxes within which pixels are looked at. Values are whole numbers, as Pillow's.
    """
    for axis in (1, 0):  # Pillow's order: rows are resampled along the width first
        weights = _bicubic(pictures.shape[axis - 2], boxes[:, axis::2], bounds[:, axis::2], size)[:, None]
        pictures = pictures @ weights.mT if axis else weights @ pictures
        pictures = pictures.round_().clamp_(0, 255)
    return pictures


def _bicubic(length: int, box: Tensor, bounds: Tensor, size: int) -> Tensor:
    """Weights [B, size, length] of a side's pixels in each resized pixel; box and bounds are (start, length), [B, 2]."""
    start, long = box.to(torch.float32)[:, :, None, None].unbind(dim=1)
    low, span = bounds.to(torch.float32)[:, :, None, None].unbind(dim=1)
    step = long / size  # pixels for each resized one
    wide = step.clamp(min=1)  # a shrunk picture is smoothed
    target = torch.arange(size, device=box.device)[:, None] + 0.5
    source = torch.arange(length, device=box.device) + 0.5
    x = ((source - start - target * step) / wide).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    weights = weights * ((source > low) & (source < low + span))
    return weights / weights.sum(dim=-1, keepdim=True)


def jittered(pictures: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Pictures [B, 3, H, W], 0 to 255, with brightness, contrast and saturation changed in random order.

    ``draws`` are [B, 7 or more]: the factors are of the second to fourth, the order of the next three.
    """
    low, high = max(0.0, 1 - strength), 1 + strength
    factors = (low + (high - low) * draws[:, 1:4])[..., None, None, None]
    order = draws[:, 4:7].argsort(dim=1)[..., None, None, None]
    luma = torch.tensor([0.299, 0.587, 0.114], device=pictures.device)[:, None, None]
    for turn in range(3):
        gray = (pictures * luma).sum(dim=1, keepdim=True).round()
        brightness, contrast = torch.zeros_like(gray), gray.mean(dim=(2, 3), keepdim=True).round().expand_as(gray)
        which, factor = order[:, turn], factors.take_along_dim(order[:, turn, None], dim=1)[:, 0]
        other = torch.where(which == 0, brightness, torch.where(which == 1, contrast, gray))
        pictures = (other + factor * (pictures - other)).clamp_(0, 255).floor_()
    return pictures
