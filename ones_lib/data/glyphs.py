"""Glyphs: an image classification data set of characters, drawn with the fonts that matplotlib ships.

The number of classes and ``distortion`` set its difficulty. The same versions of matplotlib and Pillow draw the same images.
"""

from __future__ import annotations

import sys
import unicodedata
from functools import reduce
from pathlib import Path

import matplotlib
import numpy as np
import PIL
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Families that share many characters; matplotlib's other families are symbol fonts.
FONTS = [
    f"{family}{style}.ttf"
    for family, styles in {
        "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
        "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
    }.items()
    for style in styles
]
CATEGORIES = ("Lu", "Ll", "Lo", "Nd", "No", "Sm", "Sc", "So")  # Unicode's letters, digits and symbols
CANVAS = 64  # px; glyphs are drawn at this size, then distorted and shrunk
FONT_SIZE = 44  # px
LOOK_ALIKE = 0.92  # bitmaps with a higher cosine count as one character (Latin A and Greek A; o and O)


def versions() -> dict[str, str]:
    """Versions that the drawing depends on; part of the cache's name."""
    return {"matplotlib": matplotlib.__version__, "pillow": PIL.__version__, "python": sys.version.split()[0]}


def font_paths() -> list[str]:
    return [str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)) for name in FONTS]


def draw(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One character, white on black, centred in a CANVAS x CANVAS greyscale picture."""
    left, top, right, bottom = font.getbbox(character)
    picture = Image.new("L", (CANVAS, CANVAS))
    origin = ((CANVAS - right - left) / 2, (CANVAS - bottom - top) / 2)
    ImageDraw.Draw(picture).text(origin, character, font=font, fill=255)
    return picture


def choose_characters(count: int | None = None) -> list[str]:
    """The first ``count`` (None: all) characters that every font has and of which no two look alike.

    Their shuffled order is fixed, so fewer classes are a subset of more.
    """
    charmaps = [set(FT2Font(path).get_charmap()) for path in font_paths()]
    shared = sorted(reduce(set.intersection, charmaps))
    candidates = [chr(code) for code in shared if unicodedata.category(chr(code)) in CATEGORIES]
    order = np.random.default_rng(0).permutation(len(candidates))
    font = ImageFont.truetype(font_paths()[0], FONT_SIZE)
    chosen: list[str] = []
    bitmaps = np.empty((len(candidates), 24 * 24), dtype=np.float32)
    for character in (candidates[i] for i in order):
        bitmap = _bitmap(character, font)
        if bitmap is None or (chosen and (bitmaps[: len(chosen)] @ bitmap).max() >= LOOK_ALIKE):
            continue
        bitmaps[len(chosen)] = bitmap
        chosen.append(character)
        if len(chosen) == count:
            return chosen
    if count is not None:
        raise ValueError(
            f"num_classes: expected at most {len(chosen)}, the distinct characters of the fonts, found {count}"
        )
    return chosen


def _bitmap(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray | None:
    """The character's pixels [24 * 24], of norm 1 and independent of its size; None for a blank."""
    picture = draw(character, font)
    box = picture.getbbox()
    if box is None:
        return None
    side = max(box[2] - box[0], box[3] - box[1])  # a square, so that a hyphen keeps its form
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    cut = picture.crop([round(m + sign * side / 2) for sign in (-1, 1) for m in middle]).resize((24, 24))
    bitmap = np.asarray(cut, dtype=np.float32).ravel()
    return bitmap / np.linalg.norm(bitmap)


def make_glyphs(
    num_classes: int, train_per_class: int, val_per_class: int, image_size: int, distortion: float, seed: int = 0
) -> tuple[dict[str, Tensor], list[str]]:
    """Draw the data set.

    Args:
        num_classes: characters.
        train_per_class, val_per_class: images of each, drawn independently from the same distribution.
        image_size: px, a divisor of 64.
        distortion: 1 is mild: rotations of +-12 degrees, scales of 0.8 to 1.1, shears of +-0.15, shifts of 5% of the
            width; these ranges grow in proportion.
        seed: of the distortions and fonts.

    Returns:
        Tensors ``{train,val}_images`` uint8 [n, 1, size, size], ``{train,val}_labels`` int64 [n]; the characters.
    """
    if image_size < 1 or CANVAS % image_size:
        raise ValueError(f"image_size: expected a divisor of {CANVAS}, found {image_size}")
    characters = choose_characters(num_classes)
    fonts = [ImageFont.truetype(path, FONT_SIZE) for path in font_paths()]
    drawn = torch.from_numpy(np.stack([[np.asarray(draw(c, font)) for font in fonts] for c in characters]))

    generator = torch.Generator().manual_seed(seed)
    result = {}
    for split, per_class in {"train": train_per_class, "val": val_per_class}.items():
        labels = torch.arange(num_classes).repeat_interleave(per_class)
        font = torch.randint(len(fonts), labels.shape, generator=generator)
        matrices = _affine(len(labels), distortion, generator)
        chunks = [
            _distort(drawn[c, f].float()[:, None], m, image_size)
            for c, f, m in zip(labels.split(512), font.split(512), matrices.split(512), strict=True)
        ]
        result |= {f"{split}_images": torch.cat(chunks), f"{split}_labels": labels}
    return result, characters


def _affine(count: int, distortion: float, generator: torch.Generator) -> Tensor:
    """Random matrices [count, 2, 3] from output to input coordinates, in units of half the picture."""
    angle, shear, x, y, size = (torch.rand(5, count, generator=generator) * 2 - 1) * distortion  # each in +-distortion
    angle, shear, size = angle * 12 * torch.pi / 180, shear * 0.15, 0.95 + 0.15 * size
    cos, sin = angle.cos() / size, angle.sin() / size
    rows = [torch.stack([cos, -sin + shear, 0.1 * x], dim=1), torch.stack([sin, cos, 0.1 * y], dim=1)]
    return torch.stack(rows, dim=1)


def _distort(pictures: Tensor, matrices: Tensor, image_size: int) -> Tensor:
    grid = F.affine_grid(matrices, list(pictures.shape), align_corners=False)
    sampled = F.grid_sample(pictures, grid, align_corners=False)
    return F.adaptive_avg_pool2d(sampled, image_size).round().to(torch.uint8)
