"""Pictures held in memory: what timm and Pillow make of them one by one, a batch at a time."""

import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp, kstest
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import functional as tv

from ones_lib.data import evaluation_keys, image_data
from ones_lib.data import images as module
from ones_lib.data.held import ATTEMPTS, HeldImages, jittered, random_crops, resized, uniforms
from ones_lib.data.images import ReaderImages

SEEDS = torch.randint(2**62, (4000,), generator=torch.Generator().manual_seed(0))


def pictures(count=1, height=16, width=20, seed=0):
    """Smooth coloured noise, uint8 [count, 3, height, width]."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    grown = [np.array(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)) for one in noise]
    return torch.from_numpy(np.stack(grown)).permute(0, 3, 1, 2).contiguous()


def as_pillow(picture):
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def folder_of(root, images):
    """The images as a class of training and validation data in ImageNet's layout, and the first one as another class."""
    for split in ("train", "val"):
        for name, part in (("thing", images), ("things", images[:1])):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i, picture in enumerate(part):
                as_pillow(picture).save(root / split / name / f"{i:03}.png")
    return root


def held(**options):
    given = pictures(**options.pop("pictures", {}))
    return HeldImages(given, torch.zeros(len(given), dtype=torch.int64), **{"image_size": 16, **options})


def keys(split, count, offset=0):
    """Keys of the first picture with different seeds."""
    return torch.stack([torch.zeros(count, dtype=torch.int64), SEEDS[offset : offset + count]], dim=1)


@pytest.mark.parametrize("size", [12, 16, 32])
def test_a_crop_has_the_pixels_that_pillow_gives_it(size):
    images = pictures(count=200)
    boxes = random_crops(uniforms(SEEDS[:200], 4 * ATTEMPTS), 16, 20, min_crop=0.08)
    ours = resized(images.float(), boxes, boxes, size)
    difference = []
    for picture, (top, left, high, wide), crop in zip(images, boxes.tolist(), ours, strict=True):
        one = (
            as_pillow(picture).crop((left, top, left + wide, top + high)).resize((size, size), Image.Resampling.BICUBIC)
        )
        difference.append((crop - torch.from_numpy(np.array(one)).permute(2, 0, 1)).abs())
    difference = torch.stack(difference)
    assert difference.max() <= 2
    assert difference.mean() < 0.03


@pytest.mark.parametrize("size", [8, 16, 24])
@pytest.mark.parametrize("crop_pct", [1.0, 0.9])
def test_an_evaluated_picture_is_what_timm_makes_of_it(size, crop_pct):
    split = held(pictures={"count": 20}, image_size=size, crop_pct=crop_pct)
    ours, _ = split.__getitems__(evaluation_keys(20, 20)[0])
    mean = (0.5, 0.5, 0.5)
    transform = create_transform((3, size, size), interpolation="bicubic", crop_pct=crop_pct, mean=mean, std=mean)
    timm = torch.stack([transform(as_pillow(picture)) for picture in split.images])
    levels = (ours - timm).abs() * 127.5
    assert levels.max() <= 3
    assert levels.mean() < 0.1


@pytest.mark.parametrize(("height", "width", "min_crop"), [(32, 32, 0.5), (32, 32, 0.08), (16, 40, 0.3), (40, 16, 0.9)])
def test_crops_are_distributed_as_timms(height, width, min_crop):
    ours = random_crops(uniforms(SEEDS, 4 * ATTEMPTS), height, width, min_crop)
    random.seed(0)
    picture = Image.new("RGB", (width, height))
    draw = RandomResizedCropAndInterpolation(8, scale=(min_crop, 1.0)).get_params
    timm = torch.tensor([draw(picture, (min_crop, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])[:, :4].float()
    for top, left, high, wide in (ours.T, timm.T):
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + high <= height).all()
        assert (left + wide <= width).all()
    for column in range(4):
        assert ks_2samp(ours[:, column], timm[:, column]).pvalue > 1e-4
    assert ks_2samp(ours[:, 2] * ours[:, 3], timm[:, 2] * timm[:, 3]).pvalue > 1e-4


@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_augmented_pictures_are_distributed_as_those_read_one_by_one(tmp_path, jitter, monkeypatch):
    """The mean picture, the spread of every pixel, and the distribution of brightness over 1,500 augmentations."""
    folder = folder_of(tmp_path, pictures())
    options = {
        "data_dir": folder,
        "image_size": 16,
        "min_crop": 0.3,
        "color_jitter": jitter,
        "cache_dir": tmp_path / "c",
    }
    split = image_data("folder", **options).train
    monkeypatch.setattr(module, "LARGEST_HELD", 0)
    reader = image_data("folder", **options).train
    assert isinstance(split, HeldImages)
    assert isinstance(reader, ReaderImages)
    ours = split.__getitems__(keys(split, 1500))[0]
    timm = torch.stack([reader[key][0] for key in keys(reader, 1500, offset=1500)])
    spread = timm.std(dim=0) / 1500**0.5
    assert ((ours.mean(dim=0) - timm.mean(dim=0)).abs() < 6 * spread + 1 / 127.5).all()
    assert (ours.std(dim=0) / timm.std(dim=0) - 1).abs().max() < 0.2
    for statistic in (
        lambda x: x.mean(dim=(1, 2, 3)),
        lambda x: x.std(dim=(1, 2, 3)),
        lambda x: (x[:, 0] - x[:, 2]).mean(dim=(1, 2)),
    ):
        assert ks_2samp(statistic(ours), statistic(timm)).pvalue > 1e-4


def test_half_of_the_pictures_are_flipped():
    split = held(min_crop=1.0, pictures={"height": 16, "width": 16})
    images = split.__getitems__(keys(split, 1000))[0]
    plain = split.__getitems__(evaluation_keys(1, 1)[0])[0]
    same, flipped = ((images - other).abs().amax(dim=(1, 2, 3)) < 1e-6 for other in (plain, plain.flip(-1)))
    assert (same ^ flipped).all()
    assert 430 < flipped.sum() < 570


def test_jitter_is_torchvisions():
    """For factors and an order that are given, one picture."""
    picture = pictures()
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        draws = torch.tensor([[0.5, 0.1, 0.95, 0.7, *np.argsort(order) / 3.0]])
        factors = [0.6 + 0.8 * draw for draw in (0.1, 0.95, 0.7)]
        expected = as_pillow(picture[0])
        for which in order:
            expected = adjust[which](expected, factors[which])
        difference = (jittered(picture.float(), draws, 0.4)[0] - tv.pil_to_tensor(expected)).abs()
        assert difference.max() <= 4
        assert difference.mean() < 0.3


def test_draws_are_of_the_key_alone():
    split = held(pictures={"count": 40}, color_jitter=0.3)
    batch = torch.stack([torch.arange(40), SEEDS[:40]], dim=1)
    whole = split.__getitems__(batch)[0]
    assert torch.equal(whole, torch.cat([split.__getitems__(part)[0] for part in batch.split(7)]))
    mixed = batch.clone()
    mixed[::2, 1] = -1
    assert torch.equal(split.__getitems__(mixed)[0][1::2], whole[1::2])
    assert torch.equal(split.__getitems__(mixed)[0][::2], split.__getitems__(evaluation_keys(40, 40)[0])[0][::2])


def test_uniforms_are_uniform_and_independent():
    for seeds in (SEEDS, torch.arange(4000)):
        draws = uniforms(seeds, 8)
        assert draws.min() >= 0
        assert draws.max() < 1
        assert all(kstest(column, "uniform").pvalue > 1e-4 for column in draws.T.numpy())
        assert np.abs(np.corrcoef(draws.T) - np.eye(8)).max() < 0.08


def test_pictures_are_decoded_once_and_again_when_one_changes(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "data", pictures(count=3))

    def opened():
        return image_data("folder", data_dir=folder, image_size=16, cache_dir=tmp_path / "cache")

    first = opened().train.images
    with monkeypatch.context() as patch:
        patch.setattr(ReaderImages, "picture", lambda self, index: as_pillow(pictures()[0]) if index == 0 else 1 / 0)
        assert torch.equal(opened().train.images, first)  # only the first picture's size is looked at
    as_pillow(pictures(seed=9)[0]).save(folder / "train" / "thing" / "001.png")
    os.utime(folder / "train" / "thing" / "001.png", ns=(1, 1))
    changed = opened().train.images
    assert torch.equal(changed[0], first[0])
    assert not torch.equal(changed[1], first[1])


def test_pictures_of_several_sizes_are_read_one_by_one(tmp_path):
    folder = folder_of(tmp_path / "data", pictures(count=3))
    as_pillow(pictures(height=30)[0]).save(folder / "val" / "thing" / "001.png")
    for _ in range(2):  # the second time from the cache
        assert isinstance(
            image_data("folder", data_dir=folder, image_size=16, cache_dir=tmp_path / "cache").train, ReaderImages
        )
