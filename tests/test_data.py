"""Glyphs, image folders, keys: what comes out, and how bad data is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from ones_lib.data import Share, evaluation_keys, image_data, training_keys
from ones_lib.data.glyphs import LOOK_ALIKE, choose_characters, make_glyphs
from ones_lib.data.held import TensorImages, shift


def glyphs(tmp_path, **kwargs):
    small = {"image_size": 16, "num_classes": 5, "train_per_class": 6, "val_per_class": 3, "cache_dir": tmp_path}
    return image_data("glyphs", **{**small, **kwargs})


def make_folder(root, classes=("ant", "bee", "cat"), images=3):
    """ImageNet's layout; every image of class i has the colour (60 * i, index, 0)."""
    for split in ("train", "val"):
        for i, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for j in range(images):
                Image.new("RGB", (20, 16), (60 * i, j, 0)).save(root / split / name / f"{j}.png")
    return root


def load(split, keys):
    return next(iter(DataLoader(split, batch_sampler=[keys], collate_fn=split.collate)))


def test_glyphs_shapes_classes_and_cache(tmp_path):
    data = glyphs(tmp_path)
    assert (data.num_classes, len(data.train), len(data.val), data.in_chans) == (5, 30, 15, 1)
    images, labels = load(data.val, evaluation_keys(15, 15)[0])
    assert images.shape == (15, 1, 16, 16)
    assert labels.tolist() == sorted([0, 1, 2, 3, 4] * 3)
    assert "5 characters" in data.report
    (file,) = tmp_path.glob("glyphs-*/*.safetensors")
    stamp = file.stat().st_mtime_ns
    assert torch.equal(glyphs(tmp_path).train.images, data.train.images)
    assert file.stat().st_mtime_ns == stamp  # found, not drawn again
    glyphs(tmp_path, distortion=0.5)
    assert len(list(tmp_path.glob("glyphs-*"))) == 2


def test_glyphs_are_deterministic_and_standardised(tmp_path):
    first, second = (make_glyphs(4, 3, 2, 16, 1.0)[0] for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])
    data = glyphs(tmp_path)
    images, _ = load(data.train, evaluation_keys(30, 30)[0])
    assert images.mean().item() == pytest.approx(0, abs=1e-4)
    assert images.std().item() == pytest.approx(1, abs=1e-3)


def test_glyph_splits_are_different_images():
    tensors, _ = make_glyphs(3, 5, 5, 16, 1.0)
    train = {image.numpy().tobytes() for image in tensors["train_images"]}
    assert not any(image.numpy().tobytes() in train for image in tensors["val_images"])


def test_characters_are_distinct_and_nested():
    many = choose_characters(60)
    assert choose_characters(20) == many[:20]
    assert len(set(many)) == 60
    everything = set(choose_characters())
    for pair in ("AΑ", "oO", "cC", "xX"):  # Latin and Greek A; letters that differ in size alone
        assert len(everything & set(pair)) <= 1, (pair, LOOK_ALIKE)


def test_undistorted_glyphs_of_one_font_are_what_was_drawn():
    """With no distortion each class has at most one image a font (its scale is the mean one)."""
    tensors, _ = make_glyphs(2, 60, 1, 32, 0.0)
    kinds = {image.numpy().tobytes() for image in tensors["train_images"][:60]}
    assert 2 <= len(kinds) <= 16


def test_shift_moves_by_one_pixel():
    image = torch.arange(16.0).view(1, 1, 4, 4).repeat(9, 1, 1, 1)
    moved = shift(image, torch.arange(9))
    padded = np.pad(image[0, 0].numpy(), 1, mode="edge")
    for which in range(9):
        down, right = which // 3 - 1, which % 3 - 1
        expected = padded[1 - down : 5 - down, 1 - right : 5 - right]
        np.testing.assert_array_equal(moved[which, 0].numpy(), expected)


def test_augmentation_is_decided_by_the_key(tmp_path):
    data = glyphs(tmp_path)
    keys = torch.stack([torch.arange(10), torch.arange(10) * 7919], dim=1)
    together, _ = load(data.train, keys)
    apart = torch.cat([load(data.train, keys[i : i + 1])[0] for i in range(10)])
    assert torch.equal(together, apart)
    plain, _ = load(data.train, torch.stack([torch.arange(10), torch.full((10,), -1)], dim=1))
    assert not torch.equal(together, plain)


def test_training_keys_cover_every_epoch_and_go_on_from_any_step():
    keys = list(training_keys(10, 4, seed=3, start=0, stop=10))
    stream = torch.cat(keys)[:, 0]
    for epoch in range(4):
        assert sorted(stream[10 * epoch : 10 * epoch + 10].tolist()) == list(range(10))
    assert stream[:10].tolist() != stream[10:20].tolist()
    for start in (1, 4, 7):
        for left, right in zip(keys[start:], training_keys(10, 4, 3, start, 10), strict=True):
            assert torch.equal(left, right)
    assert not torch.equal(keys[0], next(training_keys(10, 4, 4, 0, 1)))


def test_processes_share_out_each_batch():
    whole = list(training_keys(10, 4, 3, 0, 5))
    parts = zip(*(training_keys(10, 4, 3, 0, 5, Share(rank, 2)) for rank in (0, 1)), strict=True)
    for batch, (a, b) in zip(whole, parts, strict=True):
        assert {tuple(k) for k in batch.tolist()} == {tuple(k) for k in torch.cat([a, b]).tolist()}


def test_folder_labels_are_the_folders(tmp_path):
    make_folder(tmp_path)
    data = image_data("folder", data_dir=tmp_path, image_size=16, cache_dir=tmp_path / "cache")
    assert data.classes == ["ant", "bee", "cat"]
    images, labels = load(data.val, evaluation_keys(9, 9)[0])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    red = ((images[:, 0, 8, 8] + 1) / 2 * 255).round()
    assert red.tolist() == [60.0 * c for c in labels.tolist()]


def test_folder_subsets_and_workers(tmp_path, monkeypatch):
    make_folder(tmp_path)
    monkeypatch.setattr("ones_lib.data.images.LARGEST_HELD", 100)  # so that pictures are read one by one
    data = image_data("folder", data_dir=tmp_path, image_size=8, num_classes=2, train_per_class=1)
    assert (len(data.train), len(data.val), data.classes) == (2, 6, ["ant", "bee"])
    keys = [torch.tensor([[0, 5], [1, 6]]), torch.tensor([[1, 7], [0, 8]])]
    streams = [list(DataLoader(data.train, batch_sampler=keys, num_workers=n)) for n in (0, 2)]
    for (a, _), (b, _) in zip(*streams, strict=True):
        assert torch.equal(a, b)


def test_corrupt_image_is_named(tmp_path, monkeypatch):
    make_folder(tmp_path)
    bad = tmp_path / "train" / "bee" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    message = r"train/bee/1\.png: expected a readable image"
    with pytest.raises(ValueError, match=message):  # when the pictures are decoded
        image_data("folder", data_dir=tmp_path, image_size=16, cache_dir=tmp_path / "cache")
    monkeypatch.setattr("ones_lib.data.images.LARGEST_HELD", 100)
    data = image_data("folder", data_dir=tmp_path, image_size=16)
    with pytest.raises(ValueError, match=message):  # when it is its turn
        load(data.train, evaluation_keys(9, 9)[0])


def test_pictures_of_all_kinds_are_read_hidden_ones_are_not_and_others_are_counted(tmp_path):
    """Also those in folders inside a class; a folder may be called as a picture is."""
    make_folder(tmp_path, classes=("ant", "bee"), images=0)
    picture = Image.new("RGB", (20, 16), (60, 120, 180))
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            folder = tmp_path / split / name
            for kind in ("webp", "bmp", "tif", "gif", "PNG", "jpeg"):
                picture.save(folder / f"a.{kind}")
            for inner in (".ipynb_checkpoints", ".thumbnails", "more", "folder.png"):
                (folder / inner).mkdir()
                picture.save(folder / inner / "b.png")
            picture.save(folder / "._a.png")
    (tmp_path / "train" / "ant" / "notes.txt").touch()
    picture.save(tmp_path / "train" / "lost.png")
    with pytest.warns(
        UserWarning, match=r"train: 2 of 18 files are left out, .* such as lost.png, ant/notes.txt"
    ) as said:
        data = image_data("folder", data_dir=tmp_path, image_size=16, cache_dir=tmp_path / "cache")
    assert len(said) == 1
    assert (len(data.train), len(data.val)) == (16, 16)
    images, labels = load(data.train, evaluation_keys(16, 16)[0])
    assert labels.tolist() == [0] * 8 + [1] * 8
    assert (images - torch.tensor([60, 120, 180])[:, None, None] / 127.5 + 1).abs().max() < 0.1


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_of_16_bits_the_upper_8_are_taken(tmp_path, ending):
    make_folder(tmp_path, classes=("ant", "bee"), images=0)
    values = np.arange(20 * 16, dtype=np.uint16).reshape(16, 20) * 200
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            Image.fromarray(values).save(tmp_path / split / name / f"a.{ending}")
    data = image_data("folder", data_dir=tmp_path, image_size=16, cache_dir=tmp_path / "cache")
    assert data.train.images[0].tolist() == np.stack([values >> 8] * 3).tolist()


def test_home_is_where_the_tilde_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_folder(tmp_path / "pics")
    data = image_data("folder", data_dir="~/pics", image_size=16, cache_dir=tmp_path / "cache")
    assert len(data.train) == 9


def test_hub_data_set_in_a_local_folder(tmp_path):
    """The hub's reader, on a data set saved as Parquet with the hub's columns."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    for split in ("train", "validation"):
        rows = {"image": [Image.new("RGB", (9, 9), (i, 0, 0)) for i in range(4)], "label": [1, 0, 1, 0]}
        (tmp_path / "hub").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "hub" / f"{split}-0.parquet")
    data = image_data(
        str(tmp_path / "hub"), data_dir=str(tmp_path / "cache"), image_size=8, cache_dir=tmp_path / "held"
    )
    assert data.classes == ["no", "yes"]
    assert load(data.train, evaluation_keys(4, 4)[0])[1].tolist() == [1, 0, 1, 0]


def whole_folder(root, counts=(30, 4, 2)):
    """A folder for each class, without splits; every image of class i has the colour (60 * i, index, 0)."""
    for i, (name, count) in enumerate(zip(("ant", "bee", "cat"), counts, strict=True)):
        (root / name).mkdir(parents=True)
        for j in range(count):
            Image.new("RGB", (20, 16), (60 * i, j, 0)).save(root / name / f"{j}.png")
    return root


def test_a_folder_without_splits_is_split_by_class_and_file_name(tmp_path, monkeypatch):
    """The same in every run; held in memory or read one by one; another picture moves no other one."""
    root = whole_folder(tmp_path / "mine")
    data = image_data("folder", data_dir=root, image_size=16, val_fraction=0.1, cache_dir=tmp_path / "cache")
    assert data.classes == ["ant", "bee", "cat"]
    assert data.report == (
        f"{root}: 3 classes, 31 images for training, 5 for validation (10% of each class, held out by file name), 16 px"
    )
    (train, seen), (val, labels) = (load(split, evaluation_keys(len(split), 40)[0]) for split in (data.train, data.val))
    assert labels.tolist() == [0, 0, 0, 1, 2]
    assert torch.bincount(seen).tolist() == [27, 3, 1]
    colours = [{tuple(c.tolist()) for c in images[:, :2, 8, 8]} for images in (train, val)]
    assert len(colours[0]) == 31
    assert not colours[0] & colours[1]
    monkeypatch.setattr("ones_lib.data.images.LARGEST_HELD", 100)
    again = image_data("folder", data_dir=root, image_size=16, val_fraction=0.1)
    torch.testing.assert_close(load(again.val, evaluation_keys(5, 5)[0])[0], val)
    names = set(again.val.reader.samples)
    Image.new("RGB", (20, 16)).save(root / "ant" / "more.png")
    more = image_data("folder", data_dir=root, image_size=16, val_fraction=0.1)
    assert len(names - set(more.val.reader.samples)) <= 1


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (
            lambda root: whole_folder(root),
            {},
            "val_fraction: expected a part of the images, between 0 and 1, .*found None",
        ),
        (lambda root: whole_folder(root, (3, 1, 3)), {"val_fraction": 0.1}, "bee: expected at least 2 images.*found 1"),
        (lambda root: whole_folder(root, (3, 0, 3)), {"val_fraction": 0.1}, "bee: expected images .*found none"),
        (
            lambda root: whole_folder(root / "photos"),
            {"val_fraction": 0.1},
            r"train and val or a folder for .* in .*\['photos'\]",
        ),
        (
            lambda root: (root / "Training").mkdir(),
            {"val_fraction": 0.1},
            r"expected a folder .*/train, found in .*\['Training'\]",
        ),
    ],
)
def test_bad_folders_without_splits_are_refused(tmp_path, prepare, options, message):
    prepare(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        image_data("folder", data_dir=tmp_path, image_size=16, cache_dir=tmp_path / "cache", **options)


def empty_class(root):
    for file in (make_folder(root) / "val" / "bee").iterdir():
        file.unlink()


def missing_class(root):
    empty_class(root)
    (root / "val" / "bee").rmdir()


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda root: None, FileNotFoundError, "data_dir: expected a folder .*/train, found in "),
        (lambda root: (root / "train").mkdir(), ValueError, "train: expected a folder for each class, found none"),
        (empty_class, ValueError, "val/bee: expected images .*found none"),
        (missing_class, ValueError, r"expected the 3 classes of .*/train, found 2; in one of the two only: \['bee'\]"),
    ],
)
def test_bad_folders_are_refused(tmp_path, prepare, error, message):
    prepare(tmp_path)
    with pytest.raises(error, match=message):
        image_data("folder", data_dir=tmp_path, image_size=16, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("mnist", {}, ValueError, "data: expected 'glyphs', 'folder' or a hub name.*found 'mnist'"),
        ("folder", {}, ValueError, "data_dir: expected a folder with train/.*found none given"),
        ("no/such-data-set", {}, ConnectionError, "could not open 'no/such-data-set'.*data='folder'"),
        ("glyphs", {"num_classes": 5000}, ValueError, "num_classes: expected at most .*found 5000"),
        ("glyphs", {"num_classes": 0}, ValueError, "num_classes: expected an integer of at least 1"),
        ("glyphs", {"image_size": 17}, ValueError, "image_size: expected a divisor of 64, found 17"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, name, options, error, message):
    with pytest.raises(error, match=message):
        image_data(name, **{"image_size": 16, "cache_dir": tmp_path, **options})


def test_an_interrupted_cache_is_not_taken_for_whole(tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        save_file(tensors, path)
        raise KeyboardInterrupt

    monkeypatch.setattr("ones_lib.data.files.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        glyphs(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["locks"]


def test_tensor_images_are_a_split():
    assert len(TensorImages(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.zeros(3), 0.0, 1.0)) == 3
