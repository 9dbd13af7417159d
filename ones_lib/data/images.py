"""Image classification data: Glyphs, folders with a folder for each class, and data sets of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform
from timm.data.readers import create_reader
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor
from transformers.utils.logging import tqdm

from ones_lib.data import glyphs
from ones_lib.data.files import content_hash, file_stamps, made_once, save_tensors
from ones_lib.data.held import HeldImages, TensorImages
from ones_lib.data.sources import ending, is_hub_name, some_of, visible_files

#: Endings of pictures in folders, all of which Pillow reads.
PICTURES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".webp", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".tga", ".ppm",
    ".pgm", ".pbm", ".pnm",
)  # fmt: skip
LARGEST_HELD = 2**31  # bytes of decoded pictures kept in memory
INCEPTION_MEAN_STD = 0.5  # pixels are scaled to [-1, 1], as in the authors' input pipeline


@dataclass(frozen=True)
class ImageData:
    """An image data set. Both splits are indexed by keys (index, seed), see :mod:`ones_lib.data.keys`.

    ``preparation`` says how a validation picture is prepared, in timm's terms: ``mean`` and ``std`` of each channel (pixels
    from 0 to 1), ``crop_pct``, ``interpolation``. ``report`` gives the numbers of classes and images, for people to read.
    """

    name: str
    classes: list[str]
    in_chans: int
    image_size: int
    train: Dataset
    val: Dataset
    preparation: dict
    report: str

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def image_data(
    name: str = "glyphs",
    *,
    image_size: int,
    data_dir: str | Path = "",
    cache_dir: str | Path = "runs/cache",
    num_classes: int | None = None,
    train_per_class: int | None = None,
    val_per_class: int | None = None,
    val_fraction: float | None = None,
    distortion: float = 1.0,
    color_jitter: float = 0.0,
    min_crop: float = 0.08,
) -> ImageData:
    """Open a data set by name.

    Args:
        name: ``"glyphs"`` (drawn here); ``"folder"`` (``data_dir/{train,val}/<class>/*``, ImageNet's layout, or
            ``data_dir/<class>/*``; :data:`PICTURES` are read, of several frames the first, hidden files and folders are not, and a
            warning counts the others); or a name on the Hugging Face hub, such as ``"ILSVRC/imagenet-1k"`` (columns image,
            label; splits train, validation).
        image_size: px, height and width.
        data_dir: the folder, for ``"folder"``; the download cache, for the hub (empty: the hub library's own).
        cache_dir: where drawn glyphs are kept.
        num_classes: for glyphs, the number of characters (default 300); otherwise the first so many classes by name.
        train_per_class, val_per_class: for glyphs, images drawn per class (default 300, 50); otherwise the first so many.
        val_fraction: of a folder without train and val, the part of each class's images that is held out for validation: those
            whose names have the lowest hashes, the same in every run.
        distortion: for glyphs, see :func:`ones_lib.data.glyphs.make_glyphs`.
        color_jitter, min_crop: for the others, timm's training transform: the strength of its colour jitter, and the least
            part of the picture's area that a random crop keeps (0.08: Inception-style crops).

    Raises:
        FileNotFoundError, ValueError: a folder or class is missing, empty or different between the splits.
        ConnectionError: the hub cannot be reached.
    """
    counts = {"num_classes": num_classes, "train_per_class": train_per_class, "val_per_class": val_per_class}
    for option, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{option}: expected an integer of at least 1 or None, found {value}")
    if name == "glyphs":
        defaults = {"num_classes": 300, "train_per_class": 300, "val_per_class": 50}
        counts = {option: value or defaults[option] for option, value in counts.items()}
        return _glyphs({**counts, "image_size": image_size, "distortion": distortion}, Path(cache_dir))
    check_name(name)
    if data_dir:
        data_dir = Path(data_dir).expanduser()
    if name == "folder":
        splits, classes = _folder_readers(data_dir, val_fraction, num_classes)
    else:
        splits, classes = _hub_readers(name, str(data_dir) or None)
        classes = _first_classes(classes, num_classes, name)
    center = (INCEPTION_MEAN_STD,) * 3
    crop_pct = 1.0 if image_size < 64 else 0.9  # small pictures have no border to spare
    preparation = {"mean": center, "std": center, "crop_pct": crop_pct, "interpolation": "bicubic"}
    augmented, plain = (
        create_transform(
            (3, image_size, image_size),
            is_training=is_training,
            color_jitter=color_jitter or None,
            scale=(min_crop, 1.0),
            **preparation,
        )
        for is_training in (True, False)
    )
    train = ReaderImages(splits["train"], len(classes), train_per_class, augmented, plain)
    val = ReaderImages(splits["val"], len(classes), val_per_class, plain, plain)
    if held := _held(train, val, Path(cache_dir)):
        arguments = {"crop_pct": crop_pct, "min_crop": min_crop, "color_jitter": color_jitter}
        train, val = (
            HeldImages(held[split], images.labels, image_size, **arguments)
            for split, images in (("train", train), ("val", val))
        )
    held_out = (
        "" if name != "folder" or is_split(data_dir) else f" ({val_fraction:.0%} of each class, held out by file name)"
    )
    report = (
        f"{data_dir or name}: {len(classes)} classes, {len(train):,} images for training, {len(val):,} for validation{held_out},"
        f" {image_size} px"
    )
    return ImageData(name, classes, 3, image_size, train, val, preparation, report)


def check_name(name: str) -> None:
    """Raise ValueError or FileNotFoundError unless :func:`image_data` knows data of this name."""
    if name in ("glyphs", "folder") or is_hub_name(name) or Path(name).is_dir():
        return
    expected = "expected 'glyphs', 'folder' or a hub name such as 'ILSVRC/imagenet-1k'"
    if "/" in name:
        raise FileNotFoundError(f"data: no such folder, {name!r}; {expected}")
    raise ValueError(f"data: {expected}, found {name!r}")


def _first_classes(classes: list[str], count: int | None, place: str | Path) -> list[str]:
    if count is not None and count > len(classes):
        raise ValueError(
            f"num_classes: expected at most {len(classes)}, the classes of {place}, or null for all, found {count}"
        )
    if len(classes[:count]) < 2:
        raise ValueError(f"{place}: expected two classes or more, found {classes[:count]}; one alone is always right")
    return classes[:count]


class ReaderImages(Dataset):
    """Images of a timm reader, read one by one and transformed by timm; indexed by single keys.

    A picture that cannot be decoded raises an error with its name: skipping it would change what the numbers mean.
    """

    collate = None  # the loader's default

    def __init__(
        self, reader, num_classes: int, per_class: int | None, train_transform: Callable, eval_transform: Callable
    ) -> None:
        self.reader, self.train_transform, self.eval_transform = reader, train_transform, eval_transform
        labels = list(reader.iter_targets())
        taken, chosen = Counter(), []
        for i, label in enumerate(labels):
            if not 0 <= label < num_classes:
                continue
            taken[label] += 1
            if per_class is None or taken[label] <= per_class:
                chosen.append(i)
        self.indices = torch.tensor(chosen, dtype=torch.int64)
        self.labels = torch.tensor(labels, dtype=torch.int64)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Key (index, seed) -> image [3, H, W] in [-1, 1] and its label."""
        index, seed = (int(value) for value in key)
        picture = self.picture(index)
        if seed < 0:
            return self.eval_transform(picture), self.labels[index]
        with _seeded(seed):
            return self.train_transform(picture), self.labels[index]

    def picture(self, index: int) -> Image.Image:
        """The decoded picture, in RGB."""
        source = int(self.indices[index])
        stream, _ = self.reader[source]
        try:
            with stream, Image.open(stream) as picture:
                return _in_rgb(picture)
        except Exception as error:  # of a damaged file there are many kinds
            raise ValueError(f"{self._where(source)}: expected a readable image, found: {error}") from error

    def stamps(self, cache_dir: Path) -> list:
        """What changes when a picture of the split does."""
        if isinstance(self.reader, _FolderReader):
            files = [path for path, _ in self.reader.samples]
            return [self.indices.tolist(), content_hash(files, self.reader.folder, cache_dir)]
        return [self.indices.tolist(), file_stamps(Path(f["filename"]) for f in self.reader.dataset.cache_files)]

    def _where(self, source: int) -> str:
        try:
            return self.reader.filename(source, absolute=True)
        except (KeyError, TypeError, NotImplementedError):
            return f"image {source} of the {getattr(self.reader, 'split', 'data')} split"


def _in_rgb(picture: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel. Of a grey one with 16, where Pillow would cut off whatever is above 255, the upper 8."""
    if picture.mode == "F":
        raise ValueError("whole numbers of 8 or 16 bits are expected, not floats")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        pixels = np.asarray(picture)
        if pixels.min() < 0 or pixels.max() >= 2**16:
            raise ValueError("8 or 16 bits a channel are expected, not 32")
        picture = Image.fromarray((pixels >> 8).astype(np.uint8))
    return picture.convert("RGB")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch, which timm's transforms draw from; restore them at the end."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _held(train: ReaderImages, val: ReaderImages, cache_dir: Path) -> dict[str, Tensor] | None:
    """The pictures of both splits by name, uint8 [n, 3, H, W], decoded if the cache lacks them.

    None if they do not all have the size of the first one, or would need more than :data:`LARGEST_HELD` bytes.
    """
    width, height = train.picture(0).size
    if 3 * height * width * (len(train) + len(val)) > LARGEST_HELD:
        return None
    digest = hashlib.sha256(json.dumps([images.stamps(cache_dir) for images in (train, val)]).encode())

    def make(folder: Path) -> None:
        decoded = {name: torch.empty(len(s), 3, height, width, dtype=torch.uint8) for name, s in splits.items()}
        with tqdm(total=len(train) + len(val), desc="decoding images, once", unit="image", mininterval=2) as bar:
            for name, images in splits.items():
                for i in range(len(images)):
                    picture = images.picture(i)
                    if picture.size != (width, height):
                        return  # the folder stays empty
                    decoded[name][i] = pil_to_tensor(picture)
                    bar.update()
        save_tensors(folder / "images.safetensors", decoded)

    splits = {"train": train, "val": val}
    file = made_once(cache_dir / f"images-{digest.hexdigest()[:16]}", make) / "images.safetensors"
    return load_file(file) if file.exists() else None


# --- glyphs ----------------------------------------------------------------------------------------------------------


def _glyphs(options: dict, cache_dir: Path) -> ImageData:
    """Glyphs, drawn if the cache lacks them. The cache's name changes with their options, code and versions."""
    digest = hashlib.sha256(Path(glyphs.__file__).read_bytes())
    digest.update(json.dumps([options, glyphs.versions()], sort_keys=True).encode())

    def make(folder: Path) -> None:
        save_tensors(folder / "images.safetensors", glyphs.make_glyphs(**options)[0])

    characters = glyphs.choose_characters(options["num_classes"])
    tensors = load_file(made_once(cache_dir / f"glyphs-{digest.hexdigest()[:16]}", make) / "images.safetensors")
    std, mean = (value.item() for value in torch.std_mean(tensors["train_images"].float()))
    train, val = (
        TensorImages(tensors[f"{split}_images"], tensors[f"{split}_labels"], mean, std) for split in ("train", "val")
    )
    report = (
        f"Glyphs: {len(characters)} characters in {len(glyphs.FONTS)} fonts, {len(train):,} images for training,"
        f" {len(val):,} for validation, {options['image_size']} px"
    )
    preparation = {"mean": (mean / 255,), "std": (std / 255,), "crop_pct": 1.0, "interpolation": "bicubic"}
    return ImageData("glyphs", characters, 1, options["image_size"], train, val, preparation, report)


# --- folders and the hub ---------------------------------------------------------------------------------------------


_OR_CLASSES = "; without train and val, a folder for each class"
#: Names of folders that are splits, not classes. Of these only train and val are read.
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


def is_split(data_dir: str | Path) -> bool:
    """Whether a folder has, or should have, the folders train and val: it has one that is named as a split, or none at all."""
    names = set(map(str.lower, _folders(Path(data_dir).expanduser())))
    return not names or bool(names & SPLITS)


def _folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def folder_classes(data_dir: str | Path, count: int | None = None) -> list[str]:
    """The first ``count`` classes (None: all) of a folder, ``train/<class>/*`` and ``val/<class>/*`` or ``<class>/*``, sorted by
    name; pictures are not looked for.

    Raises:
        FileNotFoundError, ValueError: a split is missing, there are fewer than two classes, or the splits' classes differ.
    """
    if not str(data_dir):
        raise ValueError(
            "data_dir: expected a folder with train/<class>/* and val/<class>/*, or <class>/*, found none given"
        )
    root, classes = Path(data_dir).expanduser(), None
    if not is_split(root):
        if len(classes := _folders(root)) < 2:
            raise ValueError(f"data_dir: expected train and val or a folder for each class in {root}, found {classes}")
        return _first_classes(classes, count, root)
    for split in ("train", "val"):
        folder = root / split
        if not folder.is_dir():
            found = sorted(p.name for p in root.iterdir())[:8] if root.is_dir() else "no such folder"
            raise FileNotFoundError(f"data_dir: expected a folder {folder}, found in {root}: {found}{_OR_CLASSES}")
        names = _folders(folder)
        if not names:
            raise ValueError(f"{folder}: expected a folder for each class, found none")
        if classes is None:
            classes = names
        elif names != classes:  # a split numbered by its own classes would get wrong labels
            odd = sorted(set(names) ^ set(classes))
            raise ValueError(
                f"{folder}: expected the {len(classes)} classes of {root / 'train'}, found {len(names)};"
                f" in one of the two only: {odd[:5]}"
            )
    return _first_classes(classes, count, root)


def folder_files(
    data_dir: str | Path,
    *,
    val_fraction: float | None = None,
    num_classes: int | None = None,
    train_per_class: int | None = None,
    val_per_class: int | None = None,
) -> list[Path]:
    """The pictures of a folder that :func:`image_data` takes, with these of its arguments and its errors."""
    readers, classes = _folder_readers(data_dir, val_fraction, num_classes)
    counts, files = {"train": train_per_class, "val": val_per_class}, []
    for split, reader in readers.items():
        taken = ReaderImages(reader, len(classes), counts[split], None, None)
        files += [reader.samples[i][0] for i in taken.indices.tolist()]
    return files


def _folder_readers(
    data_dir: str | Path, val_fraction: float | None, num_classes: int | None
) -> tuple[dict, list[str]]:
    root, classes = Path(data_dir).expanduser(), folder_classes(data_dir, num_classes)
    if is_split(root):
        return {
            split: _FolderReader(root / split, _samples(root / split, classes)) for split in ("train", "val")
        }, classes
    if val_fraction is None or not 0 < val_fraction < 1:
        expected = "a part of the images, between 0 and 1, to hold out where there is no folder train and val"
        raise ValueError(f"val_fraction: expected {expected}, found {val_fraction}")
    samples = _samples(root, classes)
    held = _held_out(root, samples, val_fraction)
    splits = {"train": [s for s in samples if s not in held], "val": [s for s in samples if s in held]}
    return {split: _FolderReader(root, part) for split, part in splits.items()}, classes


def _samples(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """The pictures of ``folder/<class>/**`` and the numbers of their classes. A warning counts what is left out."""
    samples, left = [], [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    for label, name in enumerate(classes):
        files = visible_files(folder / name)
        pictures = [path for path in files if ending(path) in PICTURES]
        if not pictures:
            found = f"found others, such as {some_of(files, folder)}" if files else "found none"
            raise ValueError(f"{folder / name}: expected images ({', '.join(PICTURES)}), {found}")
        samples += [(path, label) for path in pictures]
        left += [path for path in files if ending(path) not in PICTURES]
    if left:
        warnings.warn(
            f"{folder}: {len(left):,} of {len(samples) + len(left):,} files are left out, which are no pictures in a class's"
            f" folder, such as {some_of(left, folder)}",
            stacklevel=2,
        )
    return samples


def _held_out(root: Path, samples: list[tuple[Path, int]], part: float) -> set[tuple[Path, int]]:
    """A part of each class's pictures, at least one, chosen by their names: another picture changes little."""
    by_class: dict[int, list[tuple[Path, int]]] = {}
    for sample in samples:
        by_class.setdefault(sample[1], []).append(sample)
    held = set()
    for own in by_class.values():
        if len(own) < 2:
            raise ValueError(
                f"{own[0][0].parent}: expected at least 2 images, one to learn from and one to test on, found 1"
            )
        own.sort(key=lambda sample: hashlib.sha256(sample[0].relative_to(root).as_posix().encode()).digest())
        held.update(own[: min(max(1, round(part * len(own))), len(own) - 1)])
    return held


class _FolderReader:
    """Pictures below ``folder``, each with the number of its class, behind the interface of timm's readers."""

    def __init__(self, folder: Path, samples: list[tuple[Path, int]]) -> None:
        self.folder, self.samples = folder, samples

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        return open(path, "rb"), label

    def filename(self, index: int, absolute: bool = True) -> str:
        return str(self.samples[index][0])

    def iter_targets(self):
        return (label for _, label in self.samples)


def _hub_readers(name: str, cache_dir: str | None) -> tuple[dict, list[str]]:
    from datasets.exceptions import DatasetNotFoundError

    readers = {}
    for split, hub_split in {"train": "train", "val": "validation"}.items():
        try:
            readers[split] = create_reader(f"hfds/{name}", root=cache_dir, split=hub_split)
        except (ConnectionError, DatasetNotFoundError) as error:
            raise ConnectionError(
                f"data: could not open {name!r} on the Hugging Face hub ({error}). Offline, or before accepting the data"
                " set's terms and logging in (hf auth login), use data='folder' with data_dir=<a folder with train/ and val/>"
            ) from error
        except ValueError as error:
            raise ValueError(f"data: expected the splits train and validation in {name!r}: {error}") from error
    class_to_idx = readers["train"].class_to_idx
    if not class_to_idx or readers["val"].class_to_idx != class_to_idx:
        raise ValueError(f"data: expected a column 'label' with the same class names in both splits of {name!r}")
    return readers, sorted(class_to_idx, key=class_to_idx.get)


# --- workers ---------------------------------------------------------------------------------------------------------

SIDE_BY_SIDE = 1  # trainings that share this machine's cores; whoever starts them sets it


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(data: Sequence | Dataset) -> int:
    """Loader processes for a split: none for tensors in memory, otherwise this training's share of the cores, less one."""
    return 0 if isinstance(data, TensorImages) else max(1, available_cores() // SIDE_BY_SIDE - 1)
