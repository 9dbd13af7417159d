"""Folders of checkpoints: which files are read, by all commands the same; and what lies beside the weights of a twin."""

import json
import os
import re
import shutil
import sys
from contextlib import contextmanager

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_moes import moe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ones_lib.checkpoints import convert, open_experts
from ones_lib.checkpoints.__main__ import main
from ones_lib.checkpoints.beside import check_whole
from ones_lib.checkpoints.convert import files_stamp, only_one
from ones_lib.checkpoints.inspection import inspect
from ones_lib.checkpoints.stream import load_checkpoint
from ones_lib.data.files import save_tensors, write_text
from ones_lib.models.causal import load_language_model
from ones_lib.study.distill import distill

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts"
TOKENS = torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Saves a tiny MoE of a type once, in parts if asked for, with a tokenizer of bytes."""
    root, alphabet = tmp_path_factory.mktemp("kinds"), pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template="{{ messages }}")

    def saved(kind="qwen3_moe", seed=0, parts=False):
        folder = root / f"{kind}-{seed}-{parts}"
        if not folder.exists():
            size = {"max_shard_size": "40KB"} if parts else {}
            moe(kind, seed=seed, vocab_size=320).save_pretrained(folder, **size)
            wrapped.save_pretrained(folder)
        return folder

    return saved


@pytest.fixture(scope="module")
def averaged(kinds, tmp_path_factory):
    """The twin of such an MoE, made once."""
    root = tmp_path_factory.mktemp("averaged")

    def twin(kind="qwen3_moe", seed=0):
        folder = root / f"{kind}-{seed}"
        if not folder.exists():
            convert(kinds(kind, seed), folder, "average")
        return folder

    return twin


@pytest.fixture
def here(kinds, tmp_path):
    """A fresh copy of such an MoE, in ``moe``."""

    def copied(kind="qwen3_moe", seed=0, parts=False):
        shutil.copytree(kinds(kind, seed, parts), tmp_path / "moe")
        return tmp_path / "moe"

    return copied


def edit(folder, name="config.json", **changes):
    values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(values | changes))


def weights(folder):
    return (folder / WHOLE).read_bytes()


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


# --- which files are read ---------------------------------------------------------------------------------------------


def whole_beside_an_older_index(folder, kinds):
    shutil.copy(kinds(seed=1) / WHOLE, folder)


def index_that_names_one_file(folder, kinds):
    shutil.copy(kinds(seed=1) / WHOLE, folder / "weights.safetensors")
    files = dict.fromkeys(load_file(folder / "weights.safetensors"), "weights.safetensors")
    write_index(folder, files)


def file_that_the_config_names(folder, kinds):
    shutil.copy(kinds(seed=1) / WHOLE, folder / "other.safetensors")
    edit(folder, transformers_weights="other.safetensors")


def index_that_the_config_names(folder, kinds):
    whole_beside_an_older_index(folder, kinds)
    index_that_names_one_file(folder, kinds)
    (folder / INDEX).rename(folder / "other.safetensors.index.json")
    (folder / "weights.safetensors").rename(folder / "others.safetensors")
    edit(
        folder,
        "other.safetensors.index.json",
        weight_map=dict.fromkeys(load_file(folder / WHOLE), "others.safetensors"),
    )
    shutil.copy(kinds(seed=2) / WHOLE, folder)
    edit(folder, transformers_weights="other.safetensors.index.json")


def write_index(folder, files):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize(
    "change",
    [whole_beside_an_older_index, index_that_names_one_file, file_that_the_config_names, index_that_the_config_names],
)
@pytest.mark.filterwarnings("ignore:.*as transformers does")
def test_all_commands_read_what_transformers_reads(change, here, kinds, averaged, tmp_path):
    folder = here(parts=True)
    change(folder, kinds)
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    down = f"{EXPERT}.down_proj"
    assert torch.equal(expected[down], AutoModelForCausalLM.from_pretrained(kinds(seed=1)).state_dict()[down])
    assert torch.equal(load_checkpoint(folder).state_dict()[down], expected[down])
    assert torch.equal(open_experts(folder)[EXPERT].down, expected[down])
    convert(folder, tmp_path / "dense", "average")
    assert weights(tmp_path / "dense") == weights(averaged(seed=1))


def test_shards_without_an_index_are_read_by_all_commands(here, averaged, tmp_path):
    folder = here(parts=True)
    (folder / INDEX).unlink()
    (folder / "adapter_model.safetensors").touch()
    (folder / "._model-00001-of-00007.safetensors").touch()
    convert(folder, tmp_path / "dense", "average")
    assert weights(tmp_path / "dense") == weights(averaged())
    down = open_experts(folder)[EXPERT].down
    assert torch.equal(load_checkpoint(folder).state_dict()[f"{EXPERT}.down_proj"], down)


def test_what_is_not_read_is_said(here, kinds):
    folder = here(parts=True)
    whole_beside_an_older_index(folder, kinds)
    with pytest.warns(UserWarning, match=r"moe: takes model.safetensors, as transformers does, and not model-00001"):
        open_experts(folder)


def shards_of_two_saves(folder, kinds):
    (folder / INDEX).unlink()
    shutil.copy(kinds(seed=1) / WHOLE, folder / "newer.safetensors")


def tensor_in_two_files_of_an_index(folder, kinds):
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    one, two = sorted({*files.values()})[:2]
    tensors = load_file(folder / one) | {"lm_head.weight": torch.ones(1)}
    save_file(tensors, folder / one, {"format": "pt"})
    if "lm_head.weight" not in load_file(folder / two):
        save_file(load_file(folder / two) | {"lm_head.weight": torch.ones(1)}, folder / two, {"format": "pt"})


def parts_of_several_processes(folder, kinds):
    (folder / "shard-00000-model-00001-of-00001.safetensors").touch()


def missing_file(folder, kinds):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def named_file_that_is_not_there(folder, kinds):
    edit(folder, transformers_weights="gone.safetensors")


def named_file_elsewhere(folder, kinds):
    edit(folder, transformers_weights="../secret.safetensors")


def config_that_is_a_list(folder, kinds):
    (folder / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            shards_of_two_saves,
            r"moe: expected every tensor in one file, found \S+ in model-00001\S+ and newer.safetens",
        ),
        (tensor_in_two_files_of_an_index, r"expected every tensor in one file, found \S+ in model-\S+ and model-"),
        (
            parts_of_several_processes,
            "found a checkpoint of several processes, shard-00000-model-00001-of-00001.safeten",
        ),
        (missing_file, r"model-00002-of-\d+.safetensors: expected this file, which the index names, found none"),
        (named_file_that_is_not_there, "gone.safetensors: expected this file, which config.json names, found none"),
        (named_file_elsewhere, r"config.json: transformers_weights: expected .* of this folder, found '../secret.safe"),
        (config_that_is_a_list, "config.json: expected a JSON object, found list"),
    ],
)
def test_all_commands_refuse_the_same_files_by_name(change, message, here, kinds, averaged, tmp_path):
    folder = here(parts=True)
    change(folder, kinds)
    commands = {
        "convert": lambda: convert(folder, tmp_path / "twin", "average"),
        "inspect": lambda: inspect(folder, TOKENS),
        "distil": lambda: distill(folder, averaged(), tmp_path / "out", "names", 64 * 64),
        "explore": lambda: open_experts(folder),
        "check": lambda: load_checkpoint(folder),
    }
    for command in commands.values():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            command()
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def with_further_layers(folder, beside=True):
    """GLM-4-MoE's layer for further tokens, in a file of its own that the index names, or among the others."""
    tensors = load_file(folder / WHOLE)
    last = max(int(name.split(".")[2]) for name in tensors if ".layers." in name)
    further = {
        name.replace(f".{last}.", f".{last + 1}.", 1): t.clone()
        for name, t in tensors.items()
        if f"layers.{last}." in name
    }
    further |= {f"model.layers.{last + 1}.{part}.weight": torch.ones(2, 2) for part in ("eh_proj", "enorm", "hnorm")}
    if not beside:
        save_file(tensors | further, folder / WHOLE, {"format": "pt"})
        return
    (folder / WHOLE).rename(folder / "model-00001-of-00001.safetensors")
    save_file(further, folder / "mtp.safetensors", {"format": "pt"})
    files = dict.fromkeys(tensors, "model-00001-of-00001.safetensors") | dict.fromkeys(further, "mtp.safetensors")
    write_index(folder, files)


def in_the_cache(folder, root, monkeypatch):
    """The hub's form of a folder, offline; its name."""
    revision = "0123456789012345678901234567890123456789"
    place = root / "hub" / "models--owner--moe"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(revision)
    shutil.copytree(folder, place / "snapshots" / revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root / "hub"))
    return "owner/moe"


@pytest.mark.parametrize("there", [True, False])
def test_a_file_of_what_the_twin_drops_may_be_missing(there, here, averaged, tmp_path, monkeypatch):
    """GLM-4.6's index names mtp.safetensors, which a download of model*.safetensors leaves out."""
    folder = here("glm4_moe")
    with_further_layers(folder)
    if not there:
        (folder / "mtp.safetensors").unlink()
    name = in_the_cache(folder, tmp_path, monkeypatch)
    table = convert(name, tmp_path / "dense", "average", check=TOKENS)
    assert table.attrs["perplexity"]["MoE"] > 0
    assert weights(tmp_path / "dense") == weights(averaged("glm4_moe"))
    assert config_of(tmp_path / "dense")["num_nextn_predict_layers"] == 0
    assert "model.layers.3." in (tmp_path / "dense" / "README.md").read_text()
    assert EXPERT in open_experts(folder)
    (folder / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="model-00001-of-00001.safetensors: expected this file, which the index"
    ):
        open_experts(folder)


def test_every_file_that_the_index_names_is_fetched(here, tmp_path, monkeypatch):
    """By a hub that has more than was fetched first, and no model.safetensors."""
    folder, cache, asked = here("glm4_moe"), tmp_path / "0123", []
    with_further_layers(folder)
    cache.mkdir()

    def download(name, revision, allow_patterns):
        asked.append((revision, allow_patterns))
        for path in folder.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, cache)
        return str(cache)

    module = sys.modules[convert.__module__]
    monkeypatch.setattr(module, "snapshot_download", download)
    assert module.local_folder("owner/moe") == cache
    assert asked[1] == ("0123", ["model-00001-of-00001.safetensors", "mtp.safetensors"])
    assert {path.name for path in cache.iterdir()} == {path.name for path in folder.iterdir()}


def test_a_changed_file_is_noticed_only_if_it_is_read(here, kinds):
    folder = here(parts=True)
    before = files_stamp(folder)
    (folder / "notes.safetensors").write_bytes(b"")
    assert files_stamp(folder) == before
    shutil.copy(kinds(seed=1) / WHOLE, folder)
    with pytest.warns(UserWarning, match="as transformers does"):
        assert files_stamp(folder) != before


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "flash_attention_3"},
        {"experts_implementation": "deepgemm"},
        {"torch_dtype": "torch.float32", "dtype": None},
        {"torch_dtype": "auto", "dtype": None},
        {"dtype": "torch.float32"},
        {"dtype": "auto"},
    ],
    ids=str,
)
def test_a_config_is_read_without_what_the_machine_decides(changes, here, averaged, tmp_path):
    folder = here()
    edit(folder, **changes)
    convert(folder, tmp_path / "dense", "average")
    for made in (folder, tmp_path / "dense"):
        load_checkpoint(made)
    assert not changes.keys() - {"dtype"} & config_of(tmp_path / "dense").keys()
    assert config_of(tmp_path / "dense")["dtype"] == "float32"
    assert weights(tmp_path / "dense") == weights(averaged())


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"model_type": ["a"]}', "{}"])
def test_a_config_that_is_none_is_told_by_its_name(text, here, tmp_path, capsys):
    folder = here()
    (folder / "config.json").write_text(text)
    for command in (["convert", str(folder), str(tmp_path / "dense")], ["inspect", str(folder)]):
        with pytest.raises(SystemExit):
            main(command)
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert re.match(rf"{folder}(/config.json: expected .*JSON|: expected a model type)", said), said


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"torch_dtype": "bf16", "dtype": None}, "torch_dtype"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers"),
        ({"num_experts": None}, "num_experts"),
        ({"hidden_act": "swoosh"}, "hidden_act"),
        ({"rope_parameters": 3}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters"),
        ({"num_attention_heads": 0, "head_dim": None}, ""),
        ({"vocab_size": -1}, "vocab_size"),
    ],
    ids=str,
)
def test_a_config_that_transformers_refuses_is_told_by_file_and_key(changes, key, here, tmp_path, capsys):
    folder = here()
    edit(folder, **changes)
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(folder), str(tmp_path / "dense")])
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert said.count("\n") == 1
    assert said.startswith(f"{folder}/config.json: {key}"), said
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


# --- what lies beside the weights -------------------------------------------------------------------------------------

TRAVELLING = {
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "",
    "preprocessor_config.json": '{"do_resize": true}',
    "processor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "LICENSE": "MIT",
    "LICENSE.md": "MIT",
    "MODEL_LICENSE": "MIT",
    "NOTICE.txt": "",
    "USE_POLICY.md": "",
}
STAYING = {
    "hf_quant_config.json": "{}",
    "quantize_config.json": "{}",
    "quantization_config.json": "{}",
    "quant_config.json": "{}",
    "recipe.yaml": "",
    "modeling_own.py": "",
    "configuration_own.py": "",
    "adapter_config.json": "{}",
    "adapter_model.safetensors": "",
    "mtp.safetensors": "",
    "eagle_config.json": "{}",
    "trainer_state.json": "{}",
    "training_args.bin": "",
    "requirements.txt": "",
    "notes.model": "",
    "consolidated.safetensors.index.json": "{}",
}


@pytest.mark.filterwarnings("ignore:.*an adapter beside the MoE")
def test_what_goes_along_is_a_list_and_the_card_says_what_does_not(here, tmp_path):
    folder = here()
    own = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    for name, text in (TRAVELLING | STAYING).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    edit(folder, "generation_config.json", temperature=0.5, use_mtp=True)
    edit(folder, "preprocessor_config.json", auto_map={"AutoImageProcessor": "own.Processor"})
    convert(folder, tmp_path / "dense", "average")
    made = {
        path.relative_to(tmp_path / "dense").as_posix() for path in (tmp_path / "dense").rglob("*") if path.is_file()
    }
    ours = {"config.json", "conversion.json", "conversion.csv", WHOLE, "README.md"}
    assert made == ours | own | set(TRAVELLING)
    for name in set(TRAVELLING) | own - {"generation_config.json", "preprocessor_config.json"}:
        if name not in ("generation_config.json", "preprocessor_config.json"):
            assert (tmp_path / "dense" / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((tmp_path / "dense" / "preprocessor_config.json").read_text()) == {"do_resize": True}
    generation = json.loads((tmp_path / "dense" / "generation_config.json").read_text())
    assert generation["temperature"] == 0.5
    assert "use_mtp" not in generation
    card = (tmp_path / "dense" / "README.md").read_text()
    assert (
        "Left behind of the MoE's folder: adapter_config.json, adapter_model.safetensors, configuration_own.py" in card
    )
    assert "and 4 more" in card
    assert AutoTokenizer.from_pretrained(tmp_path / "dense").chat_template == {
        "default": "{{ messages }}",
        "tools": "{{ tools }}",
    }


def test_an_adapter_is_no_part_of_the_moe(here, tmp_path, monkeypatch):
    folder = here()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for command in (lambda: convert(folder, tmp_path / "dense", "average"), lambda: inspect(folder, TOKENS)):
        with pytest.warns(UserWarning, match="adapter_config.json: an adapter beside the MoE is not part of it"):
            command()
    monkeypatch.setattr("transformers.integrations.peft.is_peft_available", lambda: True)
    load_language_model(folder)  # with peft, transformers would open the adapter
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense")


def test_config_and_tensors_agree_that_no_layer_predicts_further_tokens(here, tmp_path):
    folder = here("glm4_moe")
    with_further_layers(folder, beside=False)
    edit(folder, num_nextn_predict_layers=1)
    convert(folder, tmp_path / "dense", "average")
    assert config_of(tmp_path / "dense")["num_nextn_predict_layers"] == 0
    assert AutoConfig.from_pretrained(tmp_path / "dense").num_nextn_predict_layers == 0


def test_the_name_of_the_weights_stays_with_the_moe(here, tmp_path):
    folder = here("glm4_moe")
    (folder / WHOLE).rename(folder / "other.safetensors")
    edit(folder, transformers_weights="other.safetensors", auto_map={"AutoConfig": "own.Config"})
    convert(folder, tmp_path / "dense", "average")
    assert not {"transformers_weights", "auto_map"} & config_of(tmp_path / "dense").keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense")


def test_a_number_of_such_layers_on_which_others_depend_stays(here, tmp_path):
    """The vision tower's last norm is there if it is not zero."""
    moe("nemotron_h_omni").save_pretrained(tmp_path / "moe")
    before = config_of(tmp_path / "moe")["text_config"].get("num_nextn_predict_layers")
    convert(tmp_path / "moe", tmp_path / "dense", "average")
    assert config_of(tmp_path / "dense")["text_config"].get("num_nextn_predict_layers") == before


CODE = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}


def test_a_tokenizer_that_is_code_is_said(here, tmp_path, capsys):
    folder = here()
    (folder / "tokenizer.json").rename(folder / "own.tiktoken")
    (folder / "tokenization_own.py").write_text("raise SystemExit('ran')")
    edit(folder, "tokenizer_config.json", **CODE)
    with pytest.warns(
        UserWarning, match="tokenizer is code of its own .tokenization_own.OwnTokenizer. and no tokenizer.js"
    ):
        convert(folder, tmp_path / "dense", "average")
    assert (
        "tokenizer is code of its own (tokenization_own.OwnTokenizer)" in (tmp_path / "dense" / "README.md").read_text()
    )
    assert (tmp_path / "dense" / "own.tiktoken").exists()
    assert not list((tmp_path / "dense").glob("*.py"))
    with pytest.raises(SystemExit):
        main(["convert", str(folder), str(tmp_path / "no"), "--check", "names"])
    said = capsys.readouterr().err
    assert "no code of its own, which is never run, or tokenizer.json, found tokenization_own.OwnTokenizer" in said
    assert "trust_remote_code" not in said


def test_a_tokenizer_with_code_that_is_not_needed_is_opened_without(here, tmp_path):
    folder, text = here(), tmp_path / "text.txt"
    edit(folder, "tokenizer_config.json", **CODE)
    text.write_text("one, two, three, many. " * 40)
    convert(folder, tmp_path / "dense", "average", calibration=text, check=text)
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("one two")["input_ids"]
    assert "auto_map" not in json.loads((tmp_path / "dense" / "tokenizer_config.json").read_text())


@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer.json", "{"), ("tokenizer_config.json", "["), ("tokenizer.json", "{}")]
)
def test_a_tokenizer_that_does_not_open_is_an_error_before(name, text, here, tmp_path):
    folder = here()
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match="moe"):
        convert(folder, tmp_path / "dense", "average")
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_a_tokenizer_that_becomes_another_is_said(here, tmp_path):
    """Transformers opens any tokenizer beside a Qwen2 as Qwen2's, which the approximate twin of a Qwen2-MoE is."""
    folder = here("qwen2_moe")
    with pytest.warns(
        UserWarning, match="beside a qwen2 transformers opens this tokenizer as Qwen2Tokenizer, not as the MoE's"
    ):
        convert(folder, tmp_path / "dense", "average", approximate=True)


def without(name):
    return lambda tensors: {key: t for key, t in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.norm.weight"), r"missing: \['model.norm.weight'\]"),
        (lambda tensors: tensors | {"model.norm.weight": torch.ones(3)}, r"model.norm.weight \[3\], not"),
        (lambda tensors: tensors | {"model.extra": torch.ones(3)}, r"found others: \['model.extra \[3\]'\]"),
        (lambda tensors: tensors | {"mtp.norm.weight": torch.ones(3)}, r"found \['mtp.norm.weight'\]"),
        (lambda tensors: tensors | {"model.layers.9.norm": torch.ones(3)}, r"found \['model.layers.9.norm'\]"),
    ],
)
def test_a_finished_folder_is_opened_before_it_is_put_in_place(change, message, here, tmp_path):
    convert(here(), tmp_path / "dense", "average")
    check_whole(tmp_path / "dense")
    save_file(change(load_file(tmp_path / "dense" / WHOLE)), tmp_path / "dense" / WHOLE, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        check_whole(tmp_path / "dense")


def test_a_folder_has_its_real_name(here, tmp_path, monkeypatch):
    folder = here()
    (folder / "inner").mkdir()
    inner = folder / "inner"
    for number, (place, source) in enumerate(
        [(folder, "."), (inner, ".."), (folder, "../moe/./"), (folder, "inner/..")]
    ):
        monkeypatch.chdir(place)
        convert(source, tmp_path / f"dense{number}", "average")
        assert json.loads((tmp_path / f"dense{number}" / "conversion.json").read_text())["source"] == "moe"
        assert "base_model: moe\n" in (tmp_path / f"dense{number}" / "README.md").read_text()
    monkeypatch.chdir(folder)
    (tmp_path / "text.txt").write_text("one, two, three, many. " * 400)
    out = tmp_path / "out"
    about = distill(".", "../dense0", out, "../text.txt", 16 * 4, length=16, batch_size=4)
    assert about["moe"] == "moe"
    assert "base_model: moe\n" in (out / "README.md").read_text()
    assert (out / "tokenizer.json").exists()
    assert (out / "conversion.json").exists()


# --- permissions, locks -----------------------------------------------------------------------------------------------


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_files_have_the_permissions_that_the_umask_asks_for(mask, mode, here, tmp_path):
    folder = here()
    with umask(mask):
        convert(folder, tmp_path / "dense", "average")
        save_tensors(tmp_path / "one.safetensors", {"a": torch.ones(2)})
        write_text(tmp_path / "one.txt", "a")
    paths = [*(tmp_path / "dense").iterdir(), *tmp_path.glob("one.*")]
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in paths} == {path.name: oct(mode) for path in paths}


def test_two_nodes_cannot_write_one_destination(tmp_path, monkeypatch):
    """The lock lies beside the destination, not on one of the machines; nothing of it is left."""
    place = tmp_path / "new" / "dense"
    with only_one(place):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        with (
            pytest.raises(FileExistsError, match="dense: another conversion or distillation to it is under way"),
            only_one(place),
        ):
            pass
        assert [path.name for path in place.parent.iterdir()] == [".dense.lock"]
    with pytest.raises(KeyboardInterrupt), only_one(place):
        raise KeyboardInterrupt
    assert list(place.parent.iterdir()) == []
