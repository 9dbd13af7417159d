"""Bad inputs and their errors: each names the file or parameter, what was found and what was expected; and nothing is lost.

The table is :data:`CASES`. Tests of gatherings, checkpoints, text data and notebooks have more.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from PIL import Image
from safetensors.torch import save_file

from ones_lib import Distillation, FeedForwardWeights
from ones_lib.checkpoints.convert import convert
from ones_lib.checkpoints.experts import open_experts
from ones_lib.checkpoints.shards import Shards
from ones_lib.data import image_data
from ones_lib.data.files import save_tensors, write_text
from ones_lib.data.text import text_corpus, text_tasks
from ones_lib.gathering.registry import gather
from ones_lib.study import command as run_all
from ones_lib.study.checks import check
from ones_lib.study.notebooks import CommandError, groups_of
from ones_lib.study.parameters import ParameterError, read_parameters
from ones_lib.study.records import Record, Records, compare
from ones_lib.study.running import Execution
from ones_lib.study.training import Training

ROOT = Path(__file__).parents[1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A project to run in: notebooks and nothing else."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copy(ROOT / "run_all.sh", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


# --- how cases are made ----------------------------------------------------------------------------------------------


def command(*arguments: str, **files: str) -> Callable:
    """``run_all.sh`` with arguments, after files have been written (``__`` for a slash, ``_yaml`` for the ending)."""

    def case(here: Path) -> None:
        for name, text in files.items():
            path = here / name.replace("__", "/").replace("_yaml", ".yaml")
            path.write_text(text)
        if run_all.main(list(arguments)):
            raise CommandError("told")

    return case


def parameter(name: str, value, notebook: str = "01_imagenet", **others) -> Callable:
    """A notebook's parameters with another value in them, checked as before anything runs."""

    def case(here: Path) -> None:
        groups = groups_of(ROOT / "notebooks" / f"{notebook}.ipynb")
        check(read_parameters("demo", {name: value, **others}, groups))

    return case


def injected(notebook: str = "student", **given) -> Callable:
    """A notebook's parameters where papermill's own command has given values to names, read as the notebook reads them."""

    def case(here: Path) -> None:
        cells = parameterize_notebook(load_notebook_node(str(ROOT / "notebooks" / f"{notebook}.ipynb")), given).cells
        sources = [cell.source for cell in cells if "parameters" in " ".join(cell.metadata.get("tags", []))]
        names: dict = {}
        exec("\n".join(sources), names)
        with patch("IPython.get_ipython", lambda: SimpleNamespace(user_ns={"In": ["", *sources]})):
            read_parameters(*(names[name] for name in ("profile", "overrides", "groups")))

    return case


def folder(change: Callable[[Path], object], read: bool = False) -> Callable:
    """An image folder of two classes with something changed, opened, and a picture read."""

    def case(here: Path) -> None:
        root = here / "images"
        for split in ("train", "val"):
            for name in ("ant", "bee"):
                (root / split / name).mkdir(parents=True)
                Image.new("RGB", (8, 8)).save(root / split / name / "0.png")
        change(root)
        data = image_data("folder", data_dir=root, image_size=8)
        if read:
            data.train[torch.tensor([0, -1])]

    return case


def record(change: Callable[[Path], object], look: Callable[[Record], object]) -> Callable:
    """A record with something changed, looked at."""

    def case(here: Path) -> None:
        found = make_record(here)
        change(found.folder)
        look(Record(found.folder))

    return case


def make_record(root: Path, seed: int = 0) -> Record:
    records, config = Records(root / "records"), {"kind": "moe", "seed": seed, "training": None}
    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.zero_()
    import pandas as pd

    history = pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0], "seconds": [0.1, 0.2]})
    return records.finish(config, dict(layer.named_parameters()), history, {"accuracy": torch.ones(3)}, {"metrics": {}})


def checkpoint(change: Callable[[Path], object], look: Callable[[Path], object] = Shards) -> Callable:
    """A checkpoint's folder of two files with an index, something changed, looked at."""

    def case(here: Path) -> None:
        root = here / "model"
        root.mkdir()
        save_file({"a": torch.ones(3)}, root / "one.safetensors")
        save_file({"b": torch.ones(3)}, root / "two.safetensors")
        write_index(root, {"a": "one.safetensors", "b": "two.safetensors"})
        change(root)
        look(root)

    return case


def write_index(root: Path, files: dict) -> None:
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def remote_code(root: Path) -> None:
    """A model that brings code of its own, which leaves a file if it is run."""
    code = f"open({str(root / 'ran')!r}, 'w')\n"
    (root / "evil.py").write_text(code)
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (root / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """The last byte, a weight's: the file is whole and well-formed."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def bomb(path: Path) -> None:
    """A picture that says that it is of 182 megapixels."""
    Image.new("1", (13500, 13500)).save(path)


def corpus(name: str, **files: str) -> Callable:
    """A corpus, after files have been written (``__`` for a dot)."""

    def case(here: Path) -> None:
        for file, text in files.items():
            (here / file.replace("__", ".")).write_text(text)
        text_corpus(name, vocab_size=300, sequence_length=8, cache_dir=here / "cache")

    return case


def text_files(*rows: dict, task: str = "sst2") -> Callable:
    def case(here: Path) -> None:
        (here / task).mkdir()
        for split in ("train", "validation"):
            (here / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        of_tasks = {"name": "local", "text_dir": str(here), "tasks": [task], "max_train": None}
        text_corpus("tasks", of_tasks=of_tasks, vocab_size=300, cache_dir=here / "cache")

    return case


def weights(linear: torch.nn.Module) -> Callable:
    return lambda found: found.load_weights(linear)


def bank(value: float = 1.0) -> FeedForwardWeights:
    return FeedForwardWeights(torch.ones(2, 4, 3), torch.full((2, 3, 4), value))


LINEAR = torch.nn.Linear(2, 2)
SWEEP = "notebook: student\nprofile: smoke\n"
QUESTION = {"id": "0", "context": "a b c", "question": "which?"}

#: What is wrong, how it is asked for, the error, and what it says (a regular expression).
CASES: dict[str, tuple[Callable, type[Exception], str]] = {
    # the command
    "parameter misspelt": (command("-p", "teacher_step", "5"), CommandError, "did you mean 'teacher_steps'"),
    "parameter of another notebook": (
        command("--only", "01", "-p", "budgets", "[5]"),
        CommandError,
        "no chosen notebook has a parameter 'budgets'",
    ),
    "text for a number": (
        command("-p", "num_experts", "eight"),
        CommandError,
        "-p: num_experts: expected int, found 'eight'",
    ),
    "number for a list": (
        command("-p", "seeds", "3"),
        CommandError,
        r"-p: seeds: expected list\[int\], found 3",
    ),
    "fraction for a whole": (command("-p", "depth", "2.5"), CommandError, "-p: depth: expected int or null, found 2.5"),
    "value that is no YAML": (
        command("-p", "seeds", "[0,"),
        CommandError,
        r"-p: expected a value in YAML, found '\[0,'",
    ),
    "notebook that is not there": (
        command("--only", "77"),
        CommandError,
        r"--only: no notebook '77', expected of \[",
    ),
    "profile that is no YAML": (
        command("--profile", "smoke", notebooks__profiles__smoke_yaml="seeds: ["),
        CommandError,
        r"smoke\.yaml: expected YAML",
    ),
    "profile of a list": (
        command("--profile", "smoke", notebooks__profiles__smoke_yaml="- seeds"),
        CommandError,
        r"smoke\.yaml: expected names with values, found list",
    ),
    "profile with a misspelt name": (
        command("--profile", "smoke", notebooks__profiles__smoke_yaml="image: {sedes: [0]}"),
        CommandError,
        r"smoke\.yaml: image: no parameter 'sedes'; did you mean 'seeds'",
    ),
    "negative device batch": (command("--device-batch", "-1"), CommandError, "--device-batch: expected .*found -1"),
    "shards without processes": (
        command("--shard"),
        CommandError,
        "--shard: expected a launch command, such as 'torchrun",
    ),
    "launcher that is not there": (
        command("--launch", "torchrum -n 2"),
        CommandError,
        "--launch: expected a command, found none called 'torchrum'",
    ),
    "launcher that is no command": (
        command("--launch", "torchrun 'a"),
        CommandError,
        '--launch: expected a command, found "torchrun \'a" .No closing quotation',
    ),
    "launcher of spaces": (
        command("--launch", " "),
        CommandError,
        "--launch: expected a command, found none called ''",
    ),
    "profile that is no text": (
        lambda here: (
            (here / "notebooks/profiles/smoke.yaml").write_bytes(b"\xff\xfe"),
            read_parameters("smoke", {}, ["image"]),
        ),
        ParameterError,
        r"smoke\.yaml: expected YAML",
    ),
    "profiles that are each other's base": (
        command(
            "--profile", "smoke", notebooks__profiles__smoke_yaml="base: b", notebooks__profiles__b_yaml="base: smoke"
        ),
        CommandError,
        r"run_all.sh: b\.yaml: base: expected another profile, found 'smoke'",
    ),
    "a base that is no name": (
        command("--profile", "smoke", notebooks__profiles__smoke_yaml="base: 5"),
        CommandError,
        r"smoke\.yaml: base: expected a profile's name, found 5",
    ),
    # papermill's own command
    "parameter beside the overrides": (
        injected(profile="smoke", method="topk"),
        ParameterError,
        r"papermill: expected one of profile, overrides, groups, found 'method', .*-y '\{overrides: \{method: \.\.\.\}\}'",
    ),
    "parameter of another group": (
        injected(profile="smoke", text_seeds=[1]),
        ParameterError,
        "papermill: no parameter 'text_seeds'; did you mean 'seeds'",
    ),
    "profile misspelt": (
        injected(profil="smoke"),
        ParameterError,
        "papermill: no parameter 'profil'; did you mean 'profile'",
    ),
    "overrides that are a text": (
        injected(overrides="{method: topk}"),
        ParameterError,
        r"overrides: expected names with values, such as .*found '\{method: topk\}'",
    ),
    "override misspelt": (injected(overrides={"metod": "topk"}), ParameterError, "did you mean 'method'"),
    "profile of a number": (injected(profile=5), ParameterError, "profile: expected a name, or the path .*found 5"),
    "groups of a text": (injected(groups="image"), ParameterError, "groups: expected a list of .*found 'image'"),
    "file in the place of runs": (
        command("--only", "01", runs=""),
        CommandError,
        "runs/demo: expected a folder that can be written to, found none: .*/runs",
    ),
    # sweeps
    "sweep that is not there": (
        command("--sweep", "none.yaml"),
        CommandError,
        "none.yaml: expected YAML .*No such file",
    ),
    "sweep without a grid": (
        command("--sweep", "s.yaml", s_yaml=SWEEP),
        CommandError,
        r"expected \['grid'\], found",
    ),
    "sweep with a misspelt key": (
        command("--sweep", "s.yaml", s_yaml=SWEEP + "gird: {seed: [0]}"),
        CommandError,
        "unknown key 'gird'; did you mean 'grid'",
    ),
    "grid of single values": (
        command("--sweep", "s.yaml", s_yaml=SWEEP + "grid: {seed: 0}"),
        CommandError,
        "grid: expected names with lists of values, found {'seed': 0}",
    ),
    "grid of a misspelt parameter": (
        command("--sweep", "s.yaml", s_yaml=SWEEP + "grid: {sede: [0]}"),
        CommandError,
        "s.yaml: no chosen notebook has a parameter 'sede'; did you mean 'seed'",
    ),
    "sweep with a value of another type": (
        command("--sweep", "s.yaml", s_yaml=SWEEP + "grid: {seed: [0]}\nretries: often"),
        CommandError,
        "s.yaml: retries: expected int, found 'often'",
    ),
    "sweep with a grid of nothing": (
        command("--sweep", "s.yaml", s_yaml=SWEEP + "grid: all"),
        CommandError,
        r"s.yaml: grid: expected dict \| list, found 'all'",
    ),
    "sweep of no jobs": (
        command("--sweep", "s.yaml", "--jobs", "0", s_yaml=SWEEP + "grid: {seed: [0]}"),
        CommandError,
        "--jobs: expected a number of at least 1, found 0",
    ),
    "sweep with parameters beside it": (
        command("--sweep", "s.yaml", "--only", "01", s_yaml=SWEEP + "grid: {seed: [0]}"),
        CommandError,
        "--sweep: expected notebook, profile and parameters in its file",
    ),
    # values of parameters, before a notebook runs
    "no steps": (parameter("teacher_steps", 0), ValueError, "teacher_steps: expected a number at least 1, found 0"),
    "negative rate": (
        parameter("kd_learning_rate", -1.0),
        ValueError,
        "kd_learning_rate: expected a number above 0, found -1.0",
    ),
    "no batch": (
        parameter("text_batch_size", 0, "03_nlp"),
        ValueError,
        "text_batch_size: expected a number at least 1, found 0",
    ),
    "warm-up beyond the end": (
        parameter("warmup", 1.5),
        ValueError,
        "warmup: expected a number at least 0 and below 1, found 1.5",
    ),
    "optimizer of no library": (
        parameter("optimizer", "adamww"),
        ValueError,
        "optimizer: found 'adamww'; did you mean 'adamw'",
    ),
    "precision of no library": (
        parameter("mixed_precision", "fp8"),
        ValueError,
        "mixed_precision: found 'fp8', expected one of .*bf16",
    ),
    "alpha above one": (
        parameter("alpha", 2.0),
        ValueError,
        "alpha: expected a number at least 0 and at most 1, found 2.0",
    ),
    "temperature of zero": (
        parameter("temperature", 0.0),
        ValueError,
        "temperature: expected a number above 0, found 0.0",
    ),
    "a student of no known method": (
        parameter("language_students", {"mine": ["one_expert", {}]}, "06_published_moe"),
        ParameterError,
        r"language_students: mine: expected \[method, \{options\}\] or .* with a method of .*'shared_kd', 'zero_ffn'\]",
    ),
    "a width of no known form": (
        parameter("language_widths", ["active", "wide"], "06_published_moe"),
        ParameterError,
        "language_widths: expected a list of widths, each 'expert', 'active' or a multiple .*, found 'wide'",
    ),
    "a student of no known width": (
        parameter("language_students", {"mine": ["topk", {}, {"0x": 4}]}, "06_published_moe"),
        ParameterError,
        "language_students: mine: expected a list of widths.*found '0x'",
    ),
    "rates of no student": (
        parameter("language_rates", {"nobody": {"4x": {5: 0.1}}}, "06_published_moe"),
        ParameterError,
        r"language_rates: expected by width, rates of one of \[.*\], found 'nobody'",
    ),
    "rates of no width": (
        parameter("language_rates", {"topk": {5: 0.1}}, "06_published_moe"),
        ParameterError,
        "language_rates: topk: expected a list of widths.*found 5",
    ),
    "a width without a largest budget": (
        parameter("language_students", {"mine": ["topk", {}, {"4x": "all"}]}, "06_published_moe"),
        ParameterError,
        "language_students: mine: 4x: expected its largest budget, steps of KD, found 'all'",
    ),
    "a budget without a rate": (
        parameter("language_budgets", {5: 0}, "06_published_moe"),
        ParameterError,
        "language_budgets: expected numbers of steps above 0, each with a learning rate above 0, found 5: 0",
    ),
    "no seeds": (parameter("seeds", []), ValueError, "seeds: expected at least one"),
    "a seed twice": (parameter("seeds", [1, 1]), ValueError, r"seeds: expected .*all different.*found \[1, 1\]"),
    "more choices than experts": (
        parameter("top_k", 9),
        ValueError,
        "top_k: expected an integer from 1 to num_experts=8",
    ),
    "no experts": (parameter("num_experts", 0), ValueError, "num_experts: expected a number at least 2, found 0"),
    "an MoE of one expert": (
        parameter("expert_counts", [1, 8], "02_retention_curves"),
        ValueError,
        "expert_counts: expected a number at least 2, found 1",
    ),
    "heads that do not divide": (
        parameter("num_heads", 5),
        ValueError,
        "num_heads: expected a divisor of d_model=24, found 5",
    ),
    "heads of the text model that do not divide": (
        parameter("text_num_heads", 5, "03_nlp"),
        ValueError,
        "text_d_model: expected a multiple of text_num_heads=5, found 24",
    ),
    "odd batches with mixup": (
        parameter("batch_size", 15, mixup=0.2),
        ValueError,
        "batch_size: expected an even number with mixup, found 15",
    ),
    "model without experts": (
        parameter("model", "vit_tiny_patch16_224"),
        ValueError,
        r"model: .*vit_tiny_patch16_224.*cannot be built \(.*'d_ff'",
    ),
    "infinite rate": (
        parameter("learning_rate", float("inf")),
        ValueError,
        "learning_rate: expected a number above 0, found inf",
    ),
    "seed beyond numpy's": (
        parameter("seeds", [2**32]),
        ValueError,
        "seeds: expected a number at least 0 and at most 4294967295, found 4294967296",
    ),
    "optimizer of second order": (parameter("optimizer", "adahessian"), ValueError, "optimizer: found 'adahessian'"),
    "no MoEs": (
        parameter("language_moes", {}, "06_published_moe"),
        ParameterError,
        "language_moes: expected an MoE or more, or a language_source, found none",
    ),
    "an MoE of no type": (
        parameter("language_moes", {"mine": {"hidden_size": 8}}, "06_published_moe"),
        ParameterError,
        "language_moes: mine: expected a model_type of transformers, .*found {'hidden_size': 8}",
    ),
    "a layer without sizes": (
        parameter("speed_layers", {"mine": {"d_model": 8, "batch_sizes": [1]}}, "05_inference_speed"),
        ParameterError,
        "speed_layers: mine: expected numbers above 0 for d_model, d_ff, .*found {'d_model': 8",
    ),
    "model of no library": (
        parameter("model", "widenet_xl"),
        ValueError,
        r"cannot be built \(Unknown model \(widenet_xl\)\)",
    ),
    "picture of no glyph": (
        parameter("image_size", 15),
        ValueError,
        "image_size: expected a divisor of 64 for glyphs, found 15",
    ),
    "pictures of no whole number of patches": (
        parameter("image_size", 32, patch_size=5),
        ValueError,
        "image_size: expected a multiple of patch_size=5, found 32",
    ),
    "more classes than there are": (
        parameter("data", "folder", data_dir="notebooks", num_classes=3),
        ValueError,
        "num_classes: expected at most 2, the classes of .*, or null for all, found 3",
    ),
    "pictures without a folder for their class": (
        lambda here: image_data("folder", data_dir=here / "notebooks" / "sweeps", image_size=8),
        FileNotFoundError,
        r"expected a folder .*train, found in .*\['gatherings.yaml'\]; without train and val, a folder for each class",
    ),
    "data set of no kind": (parameter("data", "cifar"), ValueError, "data: expected 'glyphs', 'folder' or a hub name"),
    "method of no kind": (parameter("methods", ["sun"]), ValueError, r"methods: found 'sun'; did you mean 'sum'"),
    "budget below nothing": (
        parameter("budgets", [100, -1], "02_retention_curves"),
        ValueError,
        "budgets: expected a number at least 0, found -1",
    ),
    "rank beyond the matrix": (
        parameter("ranks", [25], "07_gathering_ablation"),
        ValueError,
        "ranks: expected a number from 1 to 24, found 25",
    ),
    "scale of no kind": (
        parameter("scales", ["routers"], "07_gathering_ablation"),
        ValueError,
        r"scales: found 'routers'; did you mean 'router'",
    ),
    "task of no kind": (
        parameter("tasks", ["sst3"], "03_nlp"),
        ValueError,
        r"tasks: found 'sst3'; did you mean 'sst2'",
    ),
    "task of one's own without its columns": (
        parameter("tasks", ["reviews"], "03_nlp", text_data="local"),
        ParameterError,
        r"tasks: found 'reviews', expected one of .*; for one of your own: {reviews: {kind: classification, text: ",
    ),
    "task of one's own of no kind": (
        parameter("tasks", {"reviews": {"kind": "opinion"}}, "03_nlp", text_data="local"),
        ParameterError,
        "overrides: tasks: reviews: expected {kind: classification, text: a column, .*found {'kind': 'opinion'}",
    ),
    "task of one's own made from names": (
        parameter("tasks", {"reviews": {"kind": "answers"}}, "03_nlp"),
        ParameterError,
        "tasks: expected text_data='local' for 'reviews', found 'names'",
    ),
    "task of one's own that is not there": (
        parameter("tasks", {"reviews": {"kind": "answers"}}, "03_nlp", text_data="local", text_dir="texts"),
        FileNotFoundError,
        "text_dir: expected texts/reviews/train with one of the endings .*no such folder",
    ),
    "texts of no task": (
        parameter("text_data", "local", "03_nlp"),
        FileNotFoundError,
        "text_dir: expected a folder with some of sst2, mnli, .*, found '': .*for tasks of your own, say what they are: -p tasks",
    ),
    "nothing held out": (
        parameter("val_fraction", 0.0),
        ValueError,
        "val_fraction: expected a number above 0 and below 1, found 0.0",
    ),
    "time without a zone": (
        parameter("redo_before", "2026-01-01"),
        ValueError,
        "redo_before: expected a time with its zone.*found '2026-01-01'",
    ),
    "time that is none": (parameter("redo_before", "yesterday"), ValueError, "redo_before: expected a time such as"),
    "windows that overlap too much": (
        parameter("stride", 40, "03_nlp"),
        ParameterError,
        "overrides: stride: expected below half of task_length=64, found 40",
    ),
    "folder of no data": (
        parameter("data", "folder", data_dir="no"),
        FileNotFoundError,
        "data_dir: expected a folder .*train, found in .*no: no such folder",
    ),
    # image folders
    "no folder given": (
        lambda here: image_data("folder", image_size=8),
        ValueError,
        "data_dir: expected a folder with train",
    ),
    "no validation split": (
        folder(lambda r: shutil.rmtree(r / "val")),
        FileNotFoundError,
        r"expected a folder .*val, found",
    ),
    "split misnamed": (
        folder(lambda r: (r / "val").rename(r / "valid")),
        FileNotFoundError,
        r"found in .*\['train', 'valid'\]",
    ),
    "empty class": (
        folder(lambda r: (r / "val/ant/0.png").unlink()),
        ValueError,
        r"val/ant: expected images .*found none",
    ),
    "empty split": (
        folder(lambda r: [shutil.rmtree(r / "train" / c) for c in ("ant", "bee")]),
        ValueError,
        "train: expected a folder for each class, found none",
    ),
    "class in one split only": (
        folder(lambda r: (r / "val/bee").rename(r / "val/bees")),
        ValueError,
        r"expected the 2 classes of .*in one of the two only: \['bee', 'bees'\]",
    ),
    "corrupt picture": (
        folder(lambda r: (r / "train/ant/0.png").write_bytes(b"no picture"), read=True),
        ValueError,
        r"train/ant/0\.png: expected a readable image, found: cannot identify",
    ),
    "half a picture": (
        folder(lambda r: halve(r / "train/ant/0.png"), read=True),
        ValueError,
        r"train/ant/0\.png: expected a readable image, found: ",
    ),
    "one class": (
        folder(lambda r: [shutil.rmtree(r / split / "bee") for split in ("train", "val")]),
        ValueError,
        r"images: expected two classes or more, found \['ant'\]",
    ),
    "one class of several": (
        parameter("data", "folder", data_dir="notebooks", num_classes=1),
        ValueError,
        r"notebooks: expected two classes or more, found \['profiles'\]",
    ),
    "classes without pictures": (
        parameter("data", "folder", data_dir="notebooks", num_classes=None),
        ValueError,
        r"notebooks/profiles: expected images \(\.png, .*\), found others, such as profiles/demo.yaml",
    ),
    "pictures that Pillow refuses": (
        folder(lambda r: bomb(r / "train/ant/0.png"), read=True),
        ValueError,
        r"train/ant/0\.png: expected a readable image, found: Image size \(182250000 pixels\) exceeds limit",
    ),
    "pictures of floats": (
        folder(lambda r: Image.new("F", (8, 8)).save(r / "train/ant/0.tif"), read=True),
        ValueError,
        r"train/ant/0\.tif: expected a readable image, found: whole numbers of 8 or 16 bits are expected",
    ),
    "data set in a folder that is not there": (
        parameter("data", "~/no/such/folder"),
        FileNotFoundError,
        "data: no such folder, '.*/no/such/folder'; expected 'glyphs', 'folder' or a hub name",
    ),
    "pictures at home that are not there": (
        parameter("data", "folder", data_dir="~/no such folder"),
        FileNotFoundError,
        r"data_dir: expected a folder /[^~]*/no such folder/train, found .*no such folder",
    ),
    "hub without a network": (
        lambda here: image_data("owner/no-such-data", image_size=8),
        ConnectionError,
        "could not open 'owner/no-such-data' on the Hugging Face hub",
    ),
    # text
    "column that is missing": (text_files({"text": "good", "label": 1}), ValueError, r"missing: \['sentence'\]"),
    "label out of range": (
        text_files({"sentence": "good", "label": 7}),
        ValueError,
        "row 0: column 'label': expected .*found 7",
    ),
    "answer elsewhere": (
        text_files(QUESTION | {"answers": {"text": ["c"], "answer_start": [0]}}, task="squad"),
        ValueError,
        "row 0: column 'answers': expected 'c' at 0, found 'a'",
    ),
    "text folder of nothing": (
        lambda here: text_corpus(
            "tasks", of_tasks={"name": "local", "text_dir": str(here / "no"), "tasks": ["sst2"], "max_train": None}
        ),
        FileNotFoundError,
        "text_dir: expected .*no such folder",
    ),
    "texts of a folder that is not there": (corpus("./texts"), FileNotFoundError, "no such file or folder, './texts'"),
    "texts of a misspelt file": (corpus("data/tetx.txt"), FileNotFoundError, "no such file or folder, 'data/tetx.txt'"),
    "texts that are numbers": (
        corpus("a.jsonl", a__jsonl='{"text": "a"}\n{"text": 3}\n'),
        ValueError,
        "a.jsonl: row 1: column 'text': expected text, found 3",
    ),
    "texts cut": (
        corpus("a.jsonl", a__jsonl='{"text": "a"}\n{"te'),
        ValueError,
        "a.jsonl: could not be read: line 2 is no",
    ),
    "texts with commas, without quotes": (
        corpus("a.csv", a__csv="text\none, two\nthree, four\n"),
        ValueError,
        "a.csv: expected 1 cells a row, as in the first line, found more",
    ),
    "one text alone": (
        corpus("a.txt", a__txt="a b c"),
        ValueError,
        "a.txt: expected two texts at least, of which every tenth",
    ),
    "columns shifted": (
        lambda here: (
            (here / "sst2").mkdir(),
            (here / "sst2" / "train.csv").write_text("sentence,label\ngood, very good,1\nbad, bad,0\n"),
            text_tasks("local", tokenizer=None, text_dir=here).rows("sst2"),
        ),
        ValueError,
        "sst2/train.csv: expected 2 cells a row, as in the first line, found more",
    ),
    # records
    "weights cut": (
        record(lambda f: cut(f / "weights.safetensors"), weights(LINEAR)),
        ValueError,
        r"weights\.safetensors: expected the file as it was written, SHA-256 \w{64}, found \w{64} of \d+ bytes",
    ),
    "a weight changed": (
        record(lambda f: flip(f / "weights.safetensors"), weights(LINEAR)),
        ValueError,
        "expected the file as it was written",
    ),
    "predictions changed": (
        record(lambda f: flip(f / "predictions.safetensors"), lambda r: r.predictions),
        ValueError,
        r"predictions\.safetensors: expected the file as it was written",
    ),
    "weights gone": (
        record(lambda f: (f / "weights.safetensors").unlink(), weights(LINEAR)),
        FileNotFoundError,
        r"weights\.safetensors: expected this file of a finished record, found none",
    ),
    "weights of another model": (
        record(lambda f: None, weights(torch.nn.Linear(3, 2))),
        ValueError,
        r"weight: expected shape \[2, 3\], found \[2, 2\]",
    ),
    "result that is no JSON": (
        record(lambda f: (f / "result.json").write_text("{"), lambda r: r.result),
        ValueError,
        r"result\.json: expected JSON",
    ),
    "record without a result": (
        record(lambda f: (f / "result.json").unlink(), lambda r: compare(r, r)),
        FileNotFoundError,
        r"result\.json: expected a record's result\.json, found none",
    ),
    "kind that is a path": (
        lambda here: Records(here).find({"kind": "../../elsewhere"}),
        ValueError,
        "kind: expected a word, found '../../elsewhere'",
    ),
    # checkpoints
    "index of files elsewhere": (
        checkpoint(lambda r: write_index(r, {"a": "../../secret.safetensors", "b": "two.safetensors"})),
        ValueError,
        r"expected an index that names files of this folder, found '\.\./\.\./secret\.safetensors'",
    ),
    "index of an absolute path": (
        checkpoint(lambda r: write_index(r, {"a": "/etc/passwd"})),
        ValueError,
        "expected an index that names files of this folder, found '/etc/passwd'",
    ),
    "index of a file that is gone": (
        checkpoint(lambda r: (r / "two.safetensors").unlink()),
        FileNotFoundError,
        r"two\.safetensors: expected this file, which the index names",
    ),
    "shard cut": (checkpoint(lambda r: cut(r / "one.safetensors")), ValueError, "expected a whole safetensors file"),
    "pickle": (
        lambda here: (torch.save({}, here / "pytorch_model.bin"), Shards(here)),
        FileNotFoundError,
        r"expected a safetensors file or a folder of them, found .*pytorch_model\.bin",
    ),
    "pickle named safetensors": (
        lambda here: (torch.save({}, here / "x.safetensors"), open_experts(here / "x.safetensors")),
        ValueError,
        r"x\.safetensors: expected a whole safetensors file, found .* of something else",
    ),
    "file without experts": (
        lambda here: (save_file({"a": torch.ones(2)}, here / "x.safetensors"), open_experts(here)),
        ValueError,
        "expert",
    ),
    "model with code of its own": (
        checkpoint(remote_code, lambda r: convert(r, r.parent / "dense", "average")),
        ValueError,
        "expected a model type that transformers .* has, found 'evil'",
    ),
    "hub name that is a path": (
        lambda here: convert("../../etc", here / "dense", "average"),
        FileNotFoundError,
        "source: expected a folder or a hub name like owner/name, found '../../etc'",
    ),
    "NaN weights": (
        lambda here: gather(bank(float("nan")), "sum"),
        ValueError,
        "down of expert 0: expected finite weights",
    ),
    # writing
    "no folder to write to": (
        lambda here: save_tensors(here / "no" / "x.safetensors", {"a": torch.ones(2)}),
        OSError,
        r"could not be written, with .* MB free there: .*no/x\.safetensors",
    ),
    "folder in the file's place": (
        lambda here: ((here / "x.txt").mkdir(), write_text(here / "x.txt", "a")),
        OSError,
        "could not be written",
    ),
    # execution
    "shards of one process": (lambda here: Execution(shard=True), ValueError, "shard: expected a launch command"),
    "device batch below nothing": (
        lambda here: Execution(device_batch=-1),
        ValueError,
        "device_batch: expected .*found -1",
    ),
    "precision of no kind": (
        lambda here: Training(1, mixed_precision="int8"),
        ValueError,
        "mixed_precision: expected 'no'",
    ),
    "weights of depths below nothing": (
        lambda here: Distillation(depth_weights=[-1.0]),
        ValueError,
        "depth_weights: expected numbers of at least 0",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_told(name, here, capsys):
    case, error, message = CASES[name]
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    with pytest.raises(error) as caught:
        case(here)
    said = capsys.readouterr().err if str(caught.value) == "told" else str(caught.value)
    assert re.search(message, said, re.DOTALL), said
    assert not (here / "model" / "ran").exists()
    assert not list(here.rglob("*.tmp*"))
    assert all(path.exists() for path in before)  # nothing is lost


def test_data_of_a_domain_that_is_not_asked_for_are_not_looked_for(here):
    """The profile of real data needs a folder of pictures for the images, and none of texts."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (here / "pictures" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(here / "pictures" / split / name / "0.png")
    overrides = {"data_dir": "pictures"}
    groups = groups_of(here / "notebooks" / "07_gathering_ablation.ipynb")
    check(read_parameters("real", overrides, groups))
    with pytest.raises(FileNotFoundError, match="text_dir"):
        check(read_parameters("real", overrides | {"ablation_domains": ["image", "text"]}, groups))
