"""Every input is in a record's key, and nothing else is: pictures, texts, tokenizers, weights and methods' code; not the place."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_training import study as glyphs  # noqa: F401  a fixture

from ones_lib.gathering import gathering_methods, registry
from ones_lib.gathering.source import OWN, source_hash
from ones_lib.study.notebooks import fingerprint
from ones_lib.study.parameters import read_parameters
from ones_lib.study.records import Records, config_hash
from ones_lib.study.running import Workplace, carry_out, data_of, tasks_of
from ones_lib.study.study import make_study

ROOT = Path(__file__).parents[1]
IMAGES = {"data": "folder", "data_dir": "data/pics", "num_classes": 2, "train_per_class": 2, "val_fraction": 0.25}
TEXTS = {"text_data": "local", "text_dir": "tasks", "tasks": ["sst2", "squad"], "corpus": "texts"}
OWN_TEXTS = TEXTS | {"corpus": "tasks", "tokenizer": "moe"}
LANGUAGE = {"language_source": "moe", "language_corpus": "texts/train.jsonl"}


def picture(path: Path, colour: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(path.with_suffix(".bmp"))


def rows(path: Path, *values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def answer(start: int) -> dict:
    return {"id": "0", "context": "a b a", "question": "which?", "answers": {"text": ["a"], "answer_start": [start]}}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with pictures, texts, tasks and a checkpoint, which is the working directory."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    (root / "run_all.sh").touch()
    for i, name in enumerate(("ant", "bee", "cat")):
        for j in range(4):
            picture(root / "data" / "pics" / name / str(j), 50 * i + j)
    for split in ("train", "validation"):
        rows(root / "texts" / f"{split}.jsonl", *({"text": f"{split} text {i}"} for i in range(20)))
        rows(root / "tasks" / "sst2" / f"{split}.jsonl", *({"sentence": f"{i}", "label": i % 2} for i in range(20)))
        rows(root / "tasks" / "squad" / f"{split}.jsonl", *[answer(0)] * 9)
    (root / "moe").mkdir()
    (root / "moe" / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_experts_per_tok": 2}))
    (root / "moe" / "tokenizer.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, root / "moe" / "model.safetensors")
    monkeypatch.chdir(root)
    return root


def keys() -> dict[str, str]:
    """Keys of records, by what they are of."""
    image, text, own, language = (
        make_study(domain, read_parameters("smoke", values, [domain]))
        for domain, values in (("image", IMAGES), ("text", TEXTS), ("text", OWN_TEXTS), ("language", LANGUAGE))
    )
    configs = {"image": image.student("average", 0), "corpus": text.moe(0), "own": own.moe(0)}
    configs |= {task: text.finetuned(task, text.moe(0)) for task in text.tasks}
    configs |= {
        "language": language.student("average", 0),
        "glyphs": make_study("image", read_parameters("smoke", {}, ["image"])).moe(0),
    }
    return {name: config_hash(config) for name, config in configs.items()}


def rewritten(path: Path, old: str, new: str) -> None:
    """Change a file in place. Its size and modification time stay."""
    stat, content = path.stat(), path.read_bytes()
    assert len(old) == len(new)
    assert old.encode() in content
    path.write_bytes(content.replace(old.encode(), new.encode(), 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


#: What is changed in the project, and the keys that change with it.
CHANGES = {
    "a picture": (lambda r: picture(r / "data/pics/ant/0", 9), {"image"}),
    "a picture's name": (lambda r: (r / "data/pics/ant/0.bmp").rename(r / "data/pics/ant/00.bmp"), {"image"}),
    "a class's name": (lambda r: (r / "data/pics/ant").rename(r / "data/pics/aunt"), {"image"}),
    "a picture of a class that is not taken": (lambda r: picture(r / "data/pics/cat/0", 9), set()),
    "a picture that is not taken": (lambda r: picture(r / "data/pics/bee/9", 9), set()),
    "a note beside pictures": (lambda r: (r / "data/pics/ant/note.txt").touch(), set()),
    "a hidden picture": (lambda r: picture(r / "data/pics/ant/.thumbnails/0", 9), set()),
    "a training text": (lambda r: rewritten(r / "texts/train.jsonl", "text 3", "text 4"), {"corpus", "sst2", "squad", "language"}),
    "a text to validate on": (lambda r: rewritten(r / "texts/validation.jsonl", "text 3", "text 4"), {"corpus", "sst2", "squad"}),
    "a task's training row": (lambda r: rewritten(r / "tasks/sst2/train.jsonl", '"label": 1', '"label": 0'), {"sst2", "own"}),
    "a task's row to validate on": (lambda r: rewritten(r / "tasks/squad/validation.jsonl", "which", "whose"), {"squad"}),
    "a task that is not taken": (lambda r: rows(r / "tasks/mnli/train.jsonl", {}), set()),
    "a weight": (lambda r: save_file({"a": torch.ones(2)}, r / "moe/model.safetensors"), {"language"}),
    "a checkpoint's configuration": (lambda r: rewritten(r / "moe/config.json", ": 2", ": 1"), {"language"}),
    "a tokenizer": (lambda r: (r / "moe/tokenizer.json").write_text("{ }"), {"language", "own"}),
    "a card": (lambda r: (r / "moe/README.md").write_text("a"), set()),
    "when files were touched": (lambda r: [os.utime(p, (1, 1)) for p in r.rglob("*") if p.is_file()], set()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*are left out")
@pytest.mark.parametrize("what", CHANGES)
def test_what_is_changed_changes_the_keys_of_what_depends_on_it(what, project):
    before, (change, expected) = keys(), CHANGES[what]
    change(project)
    after = keys()
    assert {name for name in before if before[name] != after[name]} == expected


def test_the_place_of_a_project_is_in_no_key_and_its_records_open_there(project, tmp_path, monkeypatch):
    before = keys()
    shutil.copytree(project, tmp_path / "elsewhere", copy_function=shutil.copy)  # with new times
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert keys() == before
    shutil.rmtree(project)
    config = make_study("image", read_parameters("smoke", IMAGES, ["image"])).moe(0)
    assert config["data"]["data_dir"] == "data/pics"
    monkeypatch.chdir(tmp_path / "elsewhere" / "data")  # anywhere in it
    assert len(data_of(config, tmp_path / "cache").train) == 4
    study = make_study("text", read_parameters("smoke", TEXTS, ["text"]))
    assert tasks_of(study.finetuned("sst2", study.moe(0)), tmp_path / "cache").rows("sst2")["train"].num_rows == 20


def test_how_a_place_is_written_is_in_no_key(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project / "data"))
    places = ("data/pics", "./data/../data/pics", str(project / "data/pics"), "~/pics")
    studies = [
        make_study("image", read_parameters("smoke", IMAGES | {"data_dir": place}, ["image"])) for place in places
    ]
    assert len({config_hash(study.moe(0)) for study in studies}) == 1


def test_a_notebook_is_not_finished_before_where_its_pictures_are_others(project):
    notebook, parameters = project / "notebooks" / "01_imagenet.ipynb", read_parameters("smoke", IMAGES, ["image"])
    before = fingerprint(notebook, parameters)
    assert fingerprint(notebook, parameters) == before
    picture(project / "data/pics/ant/0", 9)
    changed = fingerprint(notebook, parameters)
    assert changed != before
    shutil.rmtree(project / "data")
    assert fingerprint(notebook, parameters) not in (before, changed)  # the error is told later


def test_files_that_are_changed_while_a_run_is_planned_are_noticed(project, tmp_path):
    place = Workplace(Records(tmp_path / "records"), tmp_path / "cache", tmp_path / "logits")
    text = make_study("text", read_parameters("smoke", OWN_TEXTS, ["text"]))
    language = make_study("language", read_parameters("smoke", LANGUAGE, ["language"]))
    configs = {"tasks": text.moe(0), "moe": language.moe(0)}
    rewritten(project / "tasks/sst2/train.jsonl", '"label": 1', '"label": 0')
    rewritten(project / "moe/config.json", ": 2", ": 1")
    for name, config in configs.items():
        with pytest.raises(
            ValueError, match=f"{name}: expected the files that this run began with, found changed ones"
        ):
            carry_out(config, place)


# --- methods ---------------------------------------------------------------------------------------------------------

METHOD = '''
from helpers import scaled, unused
import helpers as more

POWER = 1

def helper(tensor):
    """The median."""
    return tensor.median(dim=0).values ** POWER

def other(tensor):
    return tensor

def median(bank, *, scale=1.0):
    """Element-wise median of the experts."""
    return bank.map(lambda tensor: more.same(scaled(helper(tensor), scale)))
'''
HELPERS = "def scaled(tensor, scale):\n    return scale * tensor\ndef unused():\n    pass\ndef same(tensor):\n    return tensor\n"


def test_the_librarys_own_methods_add_nothing_to_a_key(glyphs):  # noqa: F811
    assert set(gathering_methods()) == OWN
    assert all(source_hash(method) is None for method in gathering_methods())
    assert "method_source" not in glyphs.student("average", 0)


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("median(dim", "amedian(dim", True),
        ("POWER = 1", "POWER = 2", True),
        ("scale=1.0", "scale=0.5", True),
        ("return scale * tensor", "return tensor * scale", True),
        ("same(tensor):\n    return tensor", "same(tensor):\n    return -tensor", True),
        ("def other(tensor):\n    return tensor", "def other(tensor):\n    return 0", False),
        ("unused():\n    pass", "unused():\n    return 1", False),
        ("POWER = 1", "POWER  =  1  # a comment", False),
        ("def helper", "\n\ndef helper", False),
    ],
)
def test_an_edited_method_gets_new_records(tmp_path, monkeypatch, glyphs, old, new, changed):  # noqa: F811
    """Its own code and that of what it uses count, in its module and in others of the user's; nothing else does."""
    found = []
    for name, edit in (("before", lambda text: text), ("after", lambda text: text.replace(old, new))):
        (tmp_path / name).mkdir()
        for module, text in (("helpers", HELPERS), ("mine", METHOD)):
            (tmp_path / name / f"{module}.py").write_text(edit(text))
            spec = importlib.util.spec_from_file_location(module, tmp_path / name / f"{module}.py")
            monkeypatch.setitem(sys.modules, module, importlib.util.module_from_spec(spec))
            spec.loader.exec_module(sys.modules[module])
        monkeypatch.setitem(registry._METHODS, "median", sys.modules["mine"].median)
        found.append((config_hash(glyphs.student("median", 0)), config_hash(glyphs.student("average", 0))))
        # Modules of the first are gone from the table of modules when the second is looked at.
    (before, average), (after, again) = found
    assert (before != after) == changed
    assert average == again


def test_a_method_without_a_file_has_a_key_too(monkeypatch):
    hashes = set()
    for body in (
        "bank.expert(0)",
        "bank.expert(1)",
        "bank.expert(0).map(lambda t: 2 * t)",
        "bank.expert(0).map(lambda t: 3 * t)",
    ):
        method = eval(f"lambda bank: {body}")
        monkeypatch.setitem(registry._METHODS, "mine", method)
        assert source_hash("mine") == source_hash("mine")
        hashes.add(source_hash("mine"))
    assert len(hashes) == 4


def test_an_edited_method_is_gathered_again(glyphs, monkeypatch):  # noqa: F811
    def first(bank):
        return bank.expert(0)

    def second(bank):
        return bank.expert(1)

    records = []
    for method in (first, second, first):
        monkeypatch.setitem(registry._METHODS, "mine", method)
        records += glyphs.run([glyphs.student("mine", 0, 0)])
    assert records[0].folder == records[2].folder
    up = [record.weights()["blocks.0.mlp.up"] for record in records]
    assert torch.equal(up[0], up[2])
    assert not torch.equal(up[0], up[1])
