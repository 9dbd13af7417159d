"""Exported students: opened in a process of their own, they predict what their records say; cards; refusals."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from test_language_models import MOE, TEXT
from test_processes import tiny_study
from test_text_tasks import MODEL
from transformers import AutoTokenizer

from ones_lib import Distillation
from ones_lib.data.files import save_tensors
from ones_lib.data.text import text_corpus
from ones_lib.models.causal import without_bars
from ones_lib.models.images import WideNet
from ones_lib.study import export as export_module
from ones_lib.study import onnx_file
from ones_lib.study.export import export
from ones_lib.study.language_task import language_model
from ones_lib.study.listing import find_record
from ones_lib.study.records import Record, Records, config_hash
from ones_lib.study.running import load_record
from ones_lib.study.study import Study
from ones_lib.study.training import Training

ROOT = Path(__file__).parents[1]
RECIPE = Training(steps=4, batch_size=8, learning_rate=5e-3)
KD = Distillation(temperature=3.0, alpha=0.25)

# Logits of the pictures in <model>.pictures, by timm alone.
BY_TIMM = """
import sys, timm, torch
from pathlib import Path
from PIL import Image
from safetensors.torch import save_file
for folder in sys.argv[1:]:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    pictures = sorted(Path(f"{folder}.pictures").iterdir())
    with torch.inference_mode():
        logits = model(torch.stack([transform(Image.open(path)) for path in pictures]))
    names = "".join(model.pretrained_cfg["label_names"])
    save_file({"logits": logits}, f"{folder}.found", {"names": names, "class": type(model).__module__})
assert "ones_lib" not in sys.modules
"""

# Loss and hits of every token of the sequences in <model>.ids, and a greedy continuation, by transformers alone.
BY_TRANSFORMERS = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ids = load_file(f"{folder}.ids")["ids"].long()
with torch.inference_mode():
    logits, labels = model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
inputs = tokenizer(prompt, return_tensors="pt")
text = model.generate(**inputs, max_new_tokens=3, do_sample=False)
found = {"loss": loss, "accuracy": (logits.argmax(dim=-1) == labels).float(), "prompt": inputs["input_ids"], "text": text}
save_file(found, f"{folder}.found")
assert "ones_lib" not in sys.modules
"""

# What a task predicts with a model that an Auto class opened.
BY_AUTO_CLASS = """
import sys, torch, transformers
from pathlib import Path
import ones_lib
from ones_lib.data.files import save_tensors
from ones_lib.study.records import Record
from ones_lib.study.running import task_of
torch.set_num_threads(1)
cache, *rest = sys.argv[1:]
for auto, record, folder in zip(rest[::3], rest[1::3], rest[2::3]):
    model = getattr(transformers, auto).from_pretrained(folder)
    task = task_of(Record(Path(record)).config, Path(cache))
    save_tensors(Path(f"{folder}.found"), task.predict(model, torch.device("cpu")))
"""


def in_its_own_process(code: str, *arguments, path: str = "") -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def card(folder: Path) -> tuple[dict, str]:
    """A card's metadata and its text; no file of the folder names a place of this machine."""
    for path in folder.iterdir():
        assert str(folder.parent).encode() not in path.read_bytes(), path
    text = (folder / "README.md").read_text()
    _, metadata, body = text.split("---\n", maxsplit=2)
    return yaml.safe_load(metadata), body


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A study of glyphs and one of photographs of several sizes, which are resized and cropped."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee")):
            (root / "insects" / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = random.integers(0, 256, (70 + 5 * i, 90, 3)) * (0.4 + 0.6 * label)
                Image.fromarray(pixels.astype(np.uint8)).save(root / "insects" / split / name / f"{i}.png")
    glyphs = tiny_study(root)
    insects = replace(
        glyphs,
        data={"name": "folder", "data_dir": str(root / "insects"), "image_size": 64},
        model={**glyphs.model, "patch_size": 16, "share_depth": False},
        teaching=replace(glyphs.teaching, batch_size=8),
    )
    return root, replace(glyphs, distillation=KD), insects


def test_timm_alone_opens_an_image_student(images):
    """Distilled; of an upcycled teacher, with narrower FFNs; of depths that share no weights."""
    root, glyphs, insects = images
    asked = {
        "distilled": (glyphs, glyphs.student("average", 0)),
        "upcycled": (glyphs, glyphs.student("topk", 0, 0, teacher=glyphs.upcycled(0, 2), k=2)),
        "dense": (insects, insects.dense(0)),
    }
    records = {name: study.run([config])[0] for name, (study, config) in asked.items()}
    for name, (study, _) in asked.items():
        assert study.export(records[name], root / name) == root / name
        pictures = root / f"{name}.pictures"
        pictures.mkdir()
        if study is glyphs:
            for i, picture in enumerate(glyphs.open_data().val.images[:, 0].numpy()):
                Image.fromarray(picture).save(pictures / f"{i:02}.png")
        else:
            for path in (root / "insects" / "val").rglob("*.png"):
                (pictures / f"{path.parent.name}-{path.name}").symlink_to(path)
    in_its_own_process(BY_TIMM, *(root / name for name in asked))
    for name, (study, _) in asked.items():
        found, record = load_file(root / f"{name}.found")["logits"], records[name]
        assert torch.equal(found.argmax(dim=1), record.predictions["predicted"]), name
        val, keys = study.open_data().val, torch.tensor([[i, -1] for i in range(len(found))])
        pixels = val.__getitems__(keys)[0] if study is glyphs else torch.stack([val[key][0] for key in keys])
        with torch.inference_mode():
            torch.testing.assert_close(found, study.load_model(record)(pixels), atol=1e-5, rtol=1e-5)
        assert found.std(dim=0).max() > 1e-3  # the pictures matter
        config = json.loads((root / name / "config.json").read_text())
        assert config["label_names"] == study.open_data().classes


def test_the_card_says_how_a_student_was_made(images):
    root, glyphs, _ = images
    (record,) = glyphs.run([glyphs.student("svd", 0, rank=3)])
    metadata, text = card(glyphs.export(record, root / "svd"))
    assert metadata["library_name"] == "timm"
    assert metadata["pipeline_tag"] == "image-classification"
    assert metadata["tags"] == ["ones", "knowledge-gathering", "knowledge-distillation", "dense"]
    assert not {"base_model", "datasets"} & set(metadata)
    teacher = glyphs.records.find(glyphs.moe(0))
    expected = [
        f"Made from an MoE of 4 experts, trained for 6 steps (`{teacher.folder.name}`) by `svd` with rank = 3",
        "Trained for 3 steps of 16 examples, adamw, learning rate 0.005, with distillation from that MoE",
        "alpha = 0.25",
        "temperature = 3.0",
        "4 characters in 16 fonts, 80 images for training, 20 for validation, 16 px",
        f"accuracy = {record.predictions['accuracy'].mean():.4g}",
        f"Its teacher's: accuracy = {teacher.predictions['accuracy'].mean():.4g}",
        f"{sum(p.numel() for p in glyphs.load_model(record).parameters()):,} parameters",
        f"`{record.folder.name}`",
        f"torch {torch.__version__.partition('+')[0]}",
    ]
    assert [fact for fact in expected if fact not in text] == []


def test_the_card_of_a_baseline_has_no_teacher_and_no_path(images):
    root, _, insects = images
    (record,) = insects.run([insects.dense(0)])
    metadata, text = card(insects.export(record, root / "baseline"))
    assert metadata["tags"] == ["ones", "dense"]
    assert "A dense baseline, not made of an MoE" in text
    assert "Trained from scratch for 6 steps of 8 examples" in text
    assert "- Data: insects: 2 classes, 16 images for training" in text


def test_a_width_that_timm_would_round_down_is_kept():
    """49 times the nearest number to 1 / 49 is below 1."""
    sizes = {"img_size": 14, "patch_size": 7, "depth": 1, "num_heads": 1, "num_classes": 2, "embed_dim": 49}
    model = WideNet(**sizes, d_ff=1, num_experts=1)
    arguments, weights = model.unrolled()
    assert int(49 * (1 / 49)) == 0
    assert int(49 * arguments["mlp_ratio"]) == len(weights["blocks.0.mlp.fc1.bias"]) == 1
    with pytest.raises(ValueError, match="expected a dense WideNet, found one with 2 experts"):
        WideNet(**sizes, d_ff=8, num_experts=2).unrolled()


# --- text ------------------------------------------------------------------------------------------------------------


def study_of_names(tmp_path, cache_dir, data=None, **arguments):
    """A small study of one seed."""
    return Study(
        data={"name": "names", **TEXT, **(data or {})},
        teaching=RECIPE,
        learning=RECIPE,
        distillation=KD,
        seeds=[0],
        records=Records(tmp_path / "records"),
        cache_dir=cache_dir,
        processes=1,
        **arguments,
    )


def test_auto_classes_open_text_models(tmp_path, text_cache):
    """A masked language model with FFNs wider than its teacher's, and two fine-tuned models."""
    task_data = {"name": "names", "task_length": 32, "stride": 6, "max_train": 40, "max_validation": 20}
    tasks = {"tasks": ["language", "answer_or_none"], "task_data": task_data, "finetuning": RECIPE}
    study = study_of_names(tmp_path, text_cache, domain="text", model=MODEL, **tasks)
    student = study.student("topk", 0)
    teacher = study.finetuned("language", study.moe(0))
    asked = {
        "MaskedLM": study.student("topk", 0, 0, k=5),
        "SequenceClassification": study.finetuned("language", student, teacher),
        "QuestionAnswering": study.finetuned("answer_or_none", student),
    }
    records = dict(zip(asked, study.run(asked.values()), strict=True))
    arguments = []
    for name, record in records.items():
        study.export(record, tmp_path / name)
        arguments += [f"AutoModelFor{name}", record.folder, tmp_path / name]
    in_its_own_process(BY_AUTO_CLASS, text_cache, *arguments, path=str(ROOT))
    for name, record in records.items():
        found = load_file(tmp_path / f"{name}.found")
        assert set(found) == set(record.predictions)
        assert all(torch.equal(found[key], tensor) for key, tensor in record.predictions.items()), name
        ours, theirs = study.open_data().tokenizer, AutoTokenizer.from_pretrained(tmp_path / name)
        assert theirs("Berlin", "Rom").data == ours("Berlin", "Rom").data
        assert len(theirs("Berlin " * 500, truncation=True)["input_ids"]) <= 512
    metadata, text = card(tmp_path / "SequenceClassification")
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "text-classification")
    moe, taught = (study.records.folder(config).name for config in (study.moe(0), teacher))
    assert "Trained for 4 steps of 8 examples, adamw, learning rate 0.005, with distillation from that MoE" in text
    assert (
        f"with distillation from an MoE of 2 experts, trained for 4 steps (`{moe}`), fine-tuned on `language` (`{taught}`)"
        in text
    )
    assert (
        f"Made from an MoE of 2 experts, trained for 4 steps (`{moe}`) by `topk` with k = 5"
        in card(tmp_path / "MaskedLM")[1]
    )
    assert (
        "on `answer_or_none` (names) for 4 steps of 8 examples, adamw, learning rate 0.005, without a teacher"
        in (card(tmp_path / "QuestionAnswering")[1])
    )
    with pytest.raises(
        ValueError, match="expected a dense model's .*, found of kind 'moe'"
    ):  # fine-tuned, still an MoE
        study.export(study.records.find(teacher), tmp_path / "moe")


# --- causal models ---------------------------------------------------------------------------------------------------


def test_transformers_alone_opens_a_causal_student(tmp_path, text_cache):
    study = study_of_names(tmp_path, text_cache, domain="language", model=MOE, calibration_examples=8)
    (record,) = study.run([study.student("topk", 0, d_ff=20)])
    folder, data = study.export(record, tmp_path / "student"), study.open_data()
    save_tensors(tmp_path / "student.ids", {"ids": data.validation})
    in_its_own_process(BY_TRANSFORMERS, folder, "berlin")
    found = load_file(tmp_path / "student.found")
    assert all(torch.equal(found[name], record.predictions[name]) for name in ("loss", "accuracy"))
    ids = data.tokenizer("berlin")["input_ids"]  # [CLS] ... [SEP]
    assert found["prompt"].tolist() == [ids[:-1]]
    assert data.tokenizer("berlin")["input_ids"] == ids  # the study's own is as it was
    assert AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True) == "berlin"  # not "ber ##lin"
    text, model = found["text"], study.load_model(record)
    assert text.shape[1] > len(ids) - 1
    for i in range(len(ids) - 1, text.shape[1]):  # each token is the likeliest one
        assert model(text[:, : i + 1])[0, -1].argmax() == text[0, i]
    metadata, text = card(folder)
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "text-generation")
    assert "by `topk` with d_ff = 20, on 8 training examples" in text
    assert "temperature = 3.0" in text


def test_a_checkpoints_own_tokenizer_stays_and_its_place_is_not_told(tmp_path, text_cache):
    data = text_corpus("names", **TEXT, cache_dir=text_cache)
    place = tmp_path / "mine"
    with without_bars():
        language_model(MOE, data, seed=0).model.save_pretrained(place)
    data.tokenizer.save_pretrained(place)
    model, own = {"checkpoint": str(place)}, {"tokenizer": str(place)}
    study = study_of_names(tmp_path, text_cache, own, domain="language", model=model, calibration_examples=8)
    (record,) = study.run([study.student("average", 0, 0)])
    folder = study.export(record, tmp_path / "student")
    ours, theirs = AutoTokenizer.from_pretrained(place), AutoTokenizer.from_pretrained(folder)
    assert theirs("Berlin").data == ours("Berlin").data
    metadata, text = card(folder)
    assert "base_model" not in metadata
    assert "Made from the MoE mine (`moe-" in text
    with pytest.raises(ValueError, match="found of kind 'moe'"):
        study.export(study.records.find(study.moe(0)), tmp_path / "moe")


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ({"checkpoint": "someone/mixtral"}, "someone/mixtral"),
        ({"checkpoint": "/home/me/mixtral", "files": [["a.safetensors", 1, 2]]}, None),
        ({"model_type": "mixtral"}, None),
    ],
)
def test_the_base_model_is_a_name_of_the_hub(model, base):
    assert export_module._hub_name(model) == base


# --- ONNX ------------------------------------------------------------------------------------------------------------


def onnx_logits(folder: Path, **inputs: torch.Tensor) -> list[torch.Tensor]:
    session = pytest.importorskip("onnxruntime").InferenceSession(folder / "model.onnx")
    assert [one.name for one in session.get_inputs()] == list(inputs)
    return [torch.from_numpy(y) for y in session.run(None, {name: x.numpy() for name, x in inputs.items()})]


def onnx_facts(folder: Path) -> dict:
    import onnx

    return {one.key: json.loads(one.value) for one in onnx.load(folder / "model.onnx").metadata_props}


@pytest.mark.parametrize("batch", [1, 5])
def test_an_image_student_in_onnx_gives_its_logits(batch, images, tmp_path):
    pytest.importorskip("onnxruntime")
    _, glyphs, _ = images
    (record,) = glyphs.run([glyphs.student("average", 0)])
    folder, data = export(record, tmp_path / "mine", glyphs.cache_dir, onnx=True), glyphs.open_data()
    pixels = torch.randn(batch, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(onnx_logits(folder, images=pixels)[0], glyphs.load_model(record)(pixels))
    facts = onnx_facts(folder)
    assert (facts["image_size"], facts["in_chans"], facts["label_names"]) == (16, 1, data.classes)
    assert facts["mean"] == list(data.preparation["mean"])
    assert "`model.onnx` gives 20 of the record's 20 validation predictions" in (folder / "README.md").read_text()


def test_text_students_in_onnx_give_their_logits(tmp_path, text_cache):
    """Of padded texts of another length than the one that was traced."""
    pytest.importorskip("onnxruntime")
    task_data = {"name": "names", "task_length": 32, "stride": 6, "max_train": 40, "max_validation": 20}
    tasks = {"tasks": ["language", "answer_or_none"], "task_data": task_data, "finetuning": RECIPE}
    study = study_of_names(tmp_path, text_cache, domain="text", model=MODEL, **tasks)
    student = study.student("topk", 0)
    asked = [student, study.finetuned("language", student), study.finetuned("answer_or_none", student)]
    ids, types = torch.randint(5, 200, (3, 13)), torch.zeros(3, 13, dtype=torch.int64)
    mask, types[:, 6:] = torch.ones_like(ids), 1
    mask[1, 9:] = 0
    for record in study.run(asked):
        folder = export(record, tmp_path / record.folder.name, text_cache, onnx=True)
        found = onnx_logits(folder, input_ids=ids, attention_mask=mask, token_type_ids=types)
        with torch.no_grad():
            expected = list(study.load_model(record)(ids, mask, types).values())
        for one, other in zip(found, expected, strict=True):
            kept = mask.bool() if one.shape[:2] == mask.shape else slice(None)  # nothing reads the others
            torch.testing.assert_close(one[kept], other[kept], atol=1e-5, rtol=1e-4)
        if record.config.get("task") == "language":
            assert onnx_facts(folder)["label_names"] == list(study.load_model(record).config.id2label.values())


def test_a_causal_student_in_onnx_gives_its_logits(tmp_path, text_cache):
    pytest.importorskip("onnxruntime")
    study = study_of_names(tmp_path, text_cache, domain="language", model=MOE, calibration_examples=8)
    (record,) = study.run([study.student("topk", 0, d_ff=20)])
    folder, ids = export(record, tmp_path / "mine", text_cache, onnx=True), torch.randint(5, 200, (3, 13))
    with torch.no_grad():
        expected = study.load_model(record).model(ids).logits
    torch.testing.assert_close(onnx_logits(folder, input_ids=ids)[0], expected, atol=1e-5, rtol=1e-4)


def test_what_predicts_something_else_in_onnx_is_not_exported(images, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    _, glyphs, _ = images
    (record,) = glyphs.run([glyphs.student("average", 0)])

    def another(record, cache_dir):
        model, task = load_record(record, cache_dir)
        with torch.no_grad():
            model.head.weight.neg_()
            model.head.bias.neg_()
        return model, task

    monkeypatch.setattr(export_module, "load_record", another)
    with pytest.raises(ValueError, match=r"model\.onnx: expected the record's predictions .*, found \d+ others of 20"):
        export(record, tmp_path / "mine", glyphs.cache_dir, onnx=True)
    assert not list(tmp_path.iterdir())


def test_without_its_packages_or_of_an_moe_there_is_no_onnx(tiny_record, tmp_path, monkeypatch, capsys):
    record, cache = tiny_record
    arguments = [str(record.folder), str(tmp_path / "mine"), "--cache-dir", str(cache), "--onnx"]
    for spec, said in ((object(), "found of kind 'moe': .*no operator in ONNX"), (None, "found no onnx: pip install")):
        monkeypatch.setattr(onnx_file, "find_spec", lambda name, spec=spec: spec)
        assert export_module.main(arguments) == 1
        found = capsys.readouterr().err
        assert re.search(said, found)
        assert found.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(tiny_record, tmp_path):
    record, cache = tiny_record
    with pytest.raises(ValueError, match=rf"expected a dense model's .*, found of kind 'moe': .*{record.folder.name}"):
        export(record, tmp_path / "moe", cache)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match=r"folder: expected one that is not there or empty, found .*full"):
        export(record, tmp_path / "full", cache)
    with pytest.raises(FileNotFoundError, match=r"config\.json: expected a record's config\.json"):
        export(Record(tmp_path / "none"), tmp_path / "x", cache)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "mine.txt"]


def test_a_model_that_timm_does_not_know_is_refused(images, tmp_path, monkeypatch):
    _, glyphs, _ = images
    (record,) = glyphs.run([glyphs.student("average", 0)])
    monkeypatch.setattr(export_module, "load_record", lambda *_: (torch.nn.Linear(2, 2), None))
    with pytest.raises(ValueError, match="record: expected a WideNet, found Linear, which timm alone does not know"):
        glyphs.export(record, tmp_path / "mine")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(images, tmp_path, monkeypatch):
    """Where a card cannot be made; an empty folder stays, and takes the next export."""
    _, glyphs, _ = images
    (record,) = glyphs.run([glyphs.student("average", 0)])
    (tmp_path / "mine").mkdir()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "model_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
        glyphs.export(record, tmp_path / "mine")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    killed = tmp_path / f".mine.{os.uname().nodename}-{2**22 + 1}"  # no process has such a number
    killed.mkdir()
    glyphs.export(record, tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_takes_a_folder_or_the_start_of_a_name(images, tmp_path, capsys):
    _, glyphs, _ = images
    (record,) = glyphs.run([glyphs.student("average", 0)])
    root, name = glyphs.records.root, record.folder.name
    for given in (name, name[:-9], name.rpartition("-")[2][:6]):
        assert find_record(given, [tmp_path / "none", root]).folder == record.folder
    old = record.folder.rename(root / f"student-{name.rpartition('-')[2]}")  # as records were called before
    for given in (name, name[:-9], name.rpartition("-")[2][:6]):
        assert find_record(given, [root]).folder == old
    old.rename(record.folder)
    options = ["--records", str(root), "--cache-dir", str(glyphs.cache_dir)]
    assert export_module.main([str(record.folder), str(tmp_path / "mine"), *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {tmp_path / 'mine'}"
    glyphs.run([glyphs.student("average", 0, 0)])
    errors = {
        "student": r"found 'student' of \d+: student-glyphs-",
        "0x0": r"found '0x0'; python -m ones_lib\.records \[--records FOLDER\] lists them",
        config_hash(glyphs.moe(0)): "expected a dense model's .student, dense, dense_kd., found of kind 'moe': ",
        name: "that is not there or empty",
    }
    for given, message in errors.items():
        folder = tmp_path / ("mine" if given == name else "other")
        assert export_module.main([given, str(folder), *options]) == 1
        assert re.search(message, capsys.readouterr().err)


def test_the_command_looks_through_the_records_of_all_profiles(images, tmp_path, monkeypatch, capsys):
    _, glyphs, _ = images
    (record,) = glyphs.run([glyphs.student("average", 0)])
    shutil.copytree(record.folder, tmp_path / "runs" / "smoke" / "records" / record.folder.name)
    (tmp_path / "run_all.sh").touch()  # a project
    monkeypatch.chdir(tmp_path)
    assert export_module.main([record.folder.name, "mine", "--cache-dir", str(glyphs.cache_dir)]) == 0
    assert (tmp_path / "mine" / "model.safetensors").exists()
    with pytest.raises(SystemExit) as ended:
        export_module.main(["--version"])
    assert ended.value.code == 0
    assert "ones_lib 0." in capsys.readouterr().out
