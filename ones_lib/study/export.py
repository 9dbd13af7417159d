"""A student to take away: a record's dense model as a folder that timm or transformers loads, with a model card.

An image model becomes timm's own ``VisionTransformer``, a causal model is a plain class of transformers: both load without
this library. The text models load by transformers' Auto classes after ``import ones_lib``.

``python -m ones_lib.study.export RECORD FOLDER`` does the same from the shell. With ``--onnx``, the folder also has the model in
ONNX, for ONNX Runtime and others.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import timm
from huggingface_hub import ModelCardData
from tokenizers import decoders, processors
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ones_lib import __version__
from ones_lib.checkpoints.terminal import add_version, exit_status, one_line, path
from ones_lib.data.files import allow_as_usual, is_free, left_behind, this_process
from ones_lib.data.images import ImageData
from ones_lib.data.rows import task_spec
from ones_lib.data.text import Corpus
from ones_lib.models.causal import without_bars
from ones_lib.models.images import WideNet
from ones_lib.models.upcycling import Upcycled
from ones_lib.study.inputs import located
from ones_lib.study.listing import find_record, record_roots
from ones_lib.study.naming import data_name
from ones_lib.study.onnx_file import check_packages, write_onnx
from ones_lib.study.records import Record, Records, project_root
from ones_lib.study.running import Config, data_of, label, load_record

DENSE = ("student", "dense", "dense_kd")  # kinds of records
ONNX_CARD = """
## ONNX

`model.onnx` gives {found}. Batches can be of any size, and texts of any length up to `max_length`. The file says what it takes:

```python
import onnxruntime
session = onnxruntime.InferenceSession("PATH/model.onnx")
print(session.get_modelmeta().custom_metadata_map)  # image_size, mean, std, label_names, max_length, ..., as JSON
print([(x.name, x.shape, x.type) for x in session.get_inputs()])
```
"""
TIMM_NAME = "vit_base_patch16_224"  # any plain vision transformer of timm's registry: every argument is given


@dataclass(frozen=True)
class Usage:
    """How an exported model is used, for its card: the library, the hub's name of the task, Python lines, a note on them."""

    library: str
    task: str
    lines: str
    note: str


def export(record: Record, folder: str | Path, cache_dir: str | Path = "runs/cache", *, onnx: bool = False) -> Path:
    """Write a record's trained dense model, with a model card, to a folder that appears when it is whole; its path.

    - Images: ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens it, without this library. Weights that depths
      share are copied to each.
    - Text: the Auto class of its task, such as ``AutoModelForMaskedLM``, opens it after ``import ones_lib``.
    - Causal models: ``AutoModelForCausalLM.from_pretrained(FOLDER)`` opens it, without this library.

    The weights are the record's, in float32, so the predictions are the record's too, to rounding on another machine.

    Args:
        folder: one that does not exist, or is empty.
        cache_dir: where the record's data are kept; they give class names, tokenizer, and the data's size for the card.
        onnx: also write ``model.onnx``, and check it on the validation data; see :func:`ones_lib.study.onnx_file.write_onnx`.

    Raises:
        ImportError: with ``onnx``, a package of that extra is missing.
        FileExistsError: the folder is there and not empty.
        ValueError: the record is of an MoE or of no model, an image model is no WideNet, a file of the record is damaged, or
            ``model.onnx`` predicts something else.
        FileNotFoundError: the record is not finished, or its data are gone.
    """
    folder = Path(folder).expanduser().resolve()
    if not is_free(folder):
        raise FileExistsError(f"folder: expected one that is not there or empty, found {folder}")
    if onnx:
        check_packages()
    config = record.config
    kind = _pretrained(config)["kind"]
    if kind not in DENSE:
        why = "; an MoE's products by groups of tokens have no operator in ONNX" if onnx and kind == "moe" else ""
        raise ValueError(
            f"record: expected a dense model's ({', '.join(DENSE)}), found of kind {kind!r}: {record.folder}{why}"
        )
    (model, task), data = load_record(record, Path(cache_dir)), data_of(config, Path(cache_dir))
    write = {"image": _write_image, "text": _write_text, "language": _write_language}[config["domain"]]
    with _whole(folder) as beside, without_bars():
        card = model_card(record, data, write(model, data, config, beside), _size(beside))
        if onnx:
            card += ONNX_CARD.format(found=write_onnx(model, task, record, beside))
        (beside / "README.md").write_text(card, encoding="utf-8")
    return folder


def _pretrained(config: Config) -> Config:
    """The config itself, or of a fine-tuned model that of the model it started from."""
    return _pretrained(config["start"]) if config["kind"] == "finetuned" else config


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Gives a hidden folder beside ``folder`` that becomes it at the end, or is removed on errors."""
    prefix = f".{folder.name}."
    for left in left_behind(folder.parent, prefix):
        shutil.rmtree(left)
    beside = folder.with_name(f"{prefix}{this_process()}")
    beside.mkdir(parents=True)
    try:
        yield beside
        allow_as_usual(beside)
        if folder.exists():
            folder.rmdir()
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# --- models ------------------------------------------------------------------------------------------------------------


def _write_image(model: nn.Module, data: ImageData, config: Config, folder: Path) -> Usage:
    model = model.model if isinstance(model, Upcycled) else model
    if not isinstance(model, WideNet):
        raise ValueError(f"record: expected a WideNet, found {type(model).__name__}, which timm alone does not know")
    arguments, weights = model.unrolled()
    size = (data.in_chans, data.image_size, data.image_size)
    known = {"num_classes": data.num_classes, "input_size": size, "fixed_input_size": True, **data.preparation}
    layers = {"first_conv": "patch_embed.proj", "classifier": "head"}
    plain = timm.create_model(TIMM_NAME, pretrained_cfg={"architecture": TIMM_NAME, **known, **layers}, **arguments)
    plain.load_state_dict(weights)
    timm.models.save_for_hf(
        plain, folder, model_config={"label_names": data.classes}, model_args=arguments, safe_serialization=True
    )
    lines = """import timm
model = timm.create_model("local-dir:PATH", pretrained=True).eval()  # or hf-hub:OWNER/NAME
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(picture)[None])  # classes: model.pretrained_cfg["label_names"]"""
    mode = "L (grey)" if data.in_chans == 1 else "RGB"
    note = f"`picture` is a PIL picture of mode {mode}. timm alone loads the model."
    return Usage("timm", "image-classification", lines, note)


def _write_text(model: nn.Module, data: Corpus, config: Config, folder: Path) -> Usage:
    model.save_pretrained(folder)
    _tokenizer(data, model.config.max_position_embeddings).save_pretrained(folder)
    if config["kind"] != "finetuned":
        auto, task, texts = "MaskedLM", "fill-mask", ("text",)
    else:
        spec = task_spec(config["task"], config["task_data"].get("own"))
        texts = (
            spec.texts if spec.label is None else ("text", "other")[: len(spec.texts)]
        )  # a column may be no Python name
        answers = ("QuestionAnswering", "question-answering")
        auto, task = answers if spec.labels is None else ("SequenceClassification", "text-classification")
    lines = f"""import ones_lib  # registers the model's class
from transformers import AutoModelFor{auto}, AutoTokenizer
model, tokenizer = (auto.from_pretrained("PATH") for auto in (AutoModelFor{auto}, AutoTokenizer))
output = model(**tokenizer({", ".join(texts)}, return_tensors="pt"))"""
    return Usage("transformers", task, lines, "The model's class is in the Python package `ones-lib`.")


def _write_language(model: nn.Module, data: Corpus, config: Config, folder: Path) -> Usage:
    model.model.save_pretrained(folder)
    given = config["data"].get("tokenizer")  # the checkpoint's own
    tokenizer = data.tokenizer if given else _causal(_tokenizer(data, data.train.shape[1]))
    tokenizer.save_pretrained(folder)
    lines = """from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (auto.from_pretrained("PATH") for auto in (AutoModelForCausalLM, AutoTokenizer))
ids = model.generate(**tokenizer("A text", return_tensors="pt"), max_new_tokens=20)
print(tokenizer.decode(ids[0], skip_special_tokens=True))"""
    return Usage("transformers", "text-generation", lines, "transformers alone loads the model.")


def _tokenizer(data: Corpus, length: int) -> PreTrainedTokenizerBase:
    """A copy of the corpus's tokenizer that cuts texts to ``length`` tokens where asked to, and joins word pieces again."""
    tokenizer = copy.deepcopy(data.tokenizer)
    tokenizer.model_max_length = length
    if tokenizer.backend_tokenizer.decoder is None:
        tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _causal(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with [CLS] and [SEP] as a causal model's, which begins a text and leaves its end open."""
    first, backend = tokenizer.cls_token, tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, tokenizer.cls_token_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=tokenizer.model_max_length,
        padding_side="left",
        bos_token=first,
        eos_token=tokenizer.sep_token,
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
    )


# --- card --------------------------------------------------------------------------------------------------------------


def _size(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def model_card(record: Record, data: ImageData | Corpus, usage: Usage, size: int) -> str:
    """README.md of an exported model, with the metadata of the Hugging Face hub. ``size`` is that of its weights, bytes."""
    config, result, records = record.config, record.result, Records(record.folder.parent)
    made = _pretrained(config)["kind"] == "student"
    distilled = any("distillation" in c for c in (config, _pretrained(config)))
    tags = ["ones", *(["knowledge-gathering"] if made else []), *(["knowledge-distillation"] if distilled else [])]
    teacher = records.find(config["teacher"]) if "teacher" in config else None
    of_teacher = f" Its teacher's: {_scores(teacher)}." if teacher else ""
    source, name = located(config["data"].get("data_dir") or config["data"]["name"]), data_name(config["data"])
    facts = [
        *_origin(config, records),
        f"Data: {data.report.replace(source, name, 1)}.",
        f"Validation: {_scores(record)}.{of_teacher}",
        f"{result['parameters']:,} parameters, where weights that depths share count once; {size:,} bytes of weights.",
        f"Record `{records.folder(config).name}` of {result['finished']}, {_versions(result)}, code {result['code']}.",
    ]
    metadata = ModelCardData(
        library_name=usage.library,
        pipeline_tag=usage.task,
        tags=[*tags, "dense"],
        base_model=_hub_name(_pretrained(config).get("teacher", {}).get("model", {})),
        datasets=[name.partition(":")[0]] if name.count("/") == 1 and not Path(name).exists() else None,
    )
    return f"""---
{metadata.to_yaml()}
---
# A dense model of {name} ({label(config)})

{"A dense student, made of a mixture of experts (MoE)" if made else "A dense baseline, not made of an MoE"}, after \
"One Student Knows All Experts Know: From Sparse to Dense" (Xue et al., arXiv 2201.10890).

```python
{usage.lines}
```

{usage.note}

{"".join(f"- {fact}{chr(10)}" for fact in facts)}
Exported with ones_lib {__version__}, {usage.library} {version(usage.library)}.
"""


def _origin(config: Config, records: Records) -> list[str]:
    """How a model came about, a sentence for each step, the first one first."""
    facts = _origin(config["start"], records) if "start" in config else []
    if config["kind"] == "student" and not facts:
        options, seen = config["options"], config.get("calibration_examples")
        how = f"`{config['method']}`{f' with {_listed(options)}' if options else ''}"
        how += f", on {seen:,} training examples" if seen else ""
        facts.append(
            f"Made from {_teacher(config['teacher'], records)} by {how}: it replaced the experts, all else is copied."
        )
    if config["training"]:
        facts.append(f"{_training(config)}, {_teaching(config, records)}.")
    return facts


def _training(config: Config) -> str:
    """The training of a config's model in words."""
    verb = {"student": "Trained", "finetuned": "Fine-tuned"}.get(config["kind"], "Trained from scratch")
    task = f" on `{config['task']}` ({config['task_data']['name']})" if "task" in config else ""
    recipe = "{steps:,} steps of {batch_size} examples, {optimizer}, learning rate {learning_rate}"
    return f"{verb}{task} for {recipe.format(**config['training'])}"


def _teaching(config: Config, records: Records) -> str:
    """The distillation in a config's training in words."""
    if "distillation" not in config:
        return "without a teacher"
    teacher = "that MoE" if config["kind"] == "student" else _teacher(config["teacher"], records)
    loss = {name: value for name, value in config["distillation"].items() if value}
    return f"with distillation from {teacher}: {_listed(loss)}"


def _teacher(config: Config, records: Records) -> str:
    """A teacher in words, with its record's name."""
    name = f"`{records.folder(config).name}`"
    if config["kind"] == "finetuned":
        return f"{_teacher(config['start'], records)}, fine-tuned on `{config['task']}` ({name})"
    made = config.get("upcycling") or config["model"]
    if "checkpoint" in made:
        return f"the MoE {_hub_name(made) or Path(made['checkpoint']).name} ({name})"
    experts = f" of {made['num_experts']} experts" if "num_experts" in made else ""
    trained = f", trained for {config['training']['steps']:,} steps" if config["training"] else ""
    return f"an MoE{experts}{', upcycled from a dense model' if 'upcycling' in config else ''}{trained} ({name})"


def _hub_name(model: Mapping) -> str | None:
    """The name on the hub of the checkpoint that a model is; None of a folder's, or of a new model."""
    source = model.get("checkpoint")
    return None if source is None or model.get("files") or Path(source).exists() else source


def _listed(values: Mapping) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items())


def _scores(record: Record) -> str:
    return _listed({name: f"{value:.4g}" for name, value in record.result["metrics"].items()})


def _versions(result: Mapping) -> str:
    return ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "timm", "transformers"))


# --- command -----------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Export as the command line says; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ones_lib.study.export",
        description="Write a record's dense model to a folder that timm or transformers loads, with a model card.",
    )
    parser.add_argument(
        "record", help="folder of a record, or the start of its name or hash; python -m ones_lib.records lists them"
    )
    parser.add_argument("folder", type=path, help="folder to make")
    parser.add_argument(
        "--records", type=path, action="append", help="where names are looked for (runs/records and runs/*/records)"
    )
    parser.add_argument(
        "--onnx",
        action="store_true",
        help="also write model.onnx, and check it in ONNX Runtime on the record's validation data (needs the extra onnx)",
    )
    cache = project_root() / "runs" / "cache"
    parser.add_argument("--cache-dir", type=path, default=cache, help="where drawn data are kept (runs/cache)")
    add_version(parser)
    options = parser.parse_args(arguments)

    def work() -> None:
        record = find_record(options.record, options.records or record_roots())
        print(f"wrote {export(record, options.folder, options.cache_dir, onnx=options.onnx)}")

    return exit_status(work, lambda error: f"export: {one_line(error)}")


if __name__ == "__main__":
    sys.exit(main())
