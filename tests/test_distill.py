"""Distillation of a converted checkpoint: the loss by hand, an interruption, the folder in plain transformers, refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_checkpoints import quiet, with_tokenizer  # noqa: F401  quiet is a fixture
from tiny_moes import moe
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

import ones_lib
from ones_lib.checkpoints import convert
from ones_lib.checkpoints.text import text_blocks, token_count
from ones_lib.models.causal import load_language_model, without_bars
from ones_lib.study import distill as module
from ones_lib.study.distill import distill, main

PHRASES = [
    "the quick brown fox jumps over the lazy dog.",
    "one student knows all that the experts know,",
    "a b c d e f g",
]
BRIEF = {"length": 16, "batch_size": 4, "learning_rate": 2e-3, "alpha": 1.0}
STEP = 16 * 4  # tokens


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with ``moe``, ``dense``, and a text in one file and in a folder of splits."""
    folder = tmp_path_factory.mktemp("distill")
    with without_bars():
        with_tokenizer(folder / "moe", "qwen3_moe")
        convert(folder / "moe", folder / "dense", "average")
    rows = [json.dumps({"text": f"{PHRASES[i % 3]} {PHRASES[i * i % 3]}"}) for i in range(24)]
    (folder / "text.jsonl").write_text("\n".join(rows))
    (folder / "splits").mkdir()
    (folder / "splits" / "train.jsonl").write_text("\n".join(rows[:18]))
    (folder / "splits" / "validation.jsonl").write_text("\n".join(rows[18:]))
    return folder


def run(place, out, tokens=12 * STEP, text="splits", **options):
    return distill(place / "moe", place / "dense", out, place / text, tokens, **{**BRIEF, **options})


@pytest.fixture(scope="module")
def whole(place):
    """What a distillation in one go returns, and its folder."""
    with without_bars():
        return run(place, place / "whole", checkpoint_every=5), place / "whole"


def logits(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model.eval()(ids.long()).logits


def kl(teacher, student):
    """KL divergence of the next tokens' distributions, mean over all tokens of blocks but the last."""
    teacher, student = (log_softmax(z[:, :-1].double(), dim=-1) for z in (teacher, student))
    return (teacher.exp() * (teacher - student)).sum(dim=-1).mean().item()


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(one, two, **tolerance):
    one, two = weights(one), weights(two)
    torch.testing.assert_close(one, two, **tolerance or {"atol": 0, "rtol": 0})


def test_the_loss_of_the_first_step_is_the_divergence_of_the_models_logits(place, tmp_path):
    ids = text_blocks(place / "splits", place / "moe", split="train", length=16)
    teacher, student = (logits(place / name, ids) for name in ("moe", "dense"))
    found = {}
    for temperature in (1.0, 2.0):  # a batch of the whole text
        out = tmp_path / str(temperature)
        run(place, out, ids.numel(), batch_size=len(ids), temperature=temperature)
        found[temperature] = pd.read_csv(out / "history.csv")["loss"].tolist()
    assert found[1.0] == [pytest.approx(kl(teacher, student), rel=1e-4)]
    assert found[2.0] == [pytest.approx(4 * kl(teacher / 2, student / 2), rel=1e-4)]
    run(place, tmp_path / "alpha", ids.numel(), batch_size=len(ids), alpha=0.25)
    own = cross_entropy(student[:, :-1].flatten(0, 1), ids[:, 1:].long().flatten()).item()
    expected = 0.25 * kl(teacher, student) + 0.75 * own
    assert pd.read_csv(tmp_path / "alpha" / "history.csv")["loss"].tolist() == [pytest.approx(expected, rel=1e-4)]


def test_the_student_comes_nearer_to_its_moe(place, whole):
    ids = text_blocks(place / "splits", place / "moe", length=16)
    teacher = logits(place / "moe", ids)
    assert kl(teacher, logits(whole[1], ids)) < 0.7 * kl(teacher, logits(place / "dense", ids))


def test_a_rate_that_makes_the_student_worse_is_named(place, tmp_path):
    with pytest.warns(UserWarning, match=r"learning_rate: 2 was too large for 12 steps: the perplexity went from"):
        run(place, tmp_path / "out", learning_rate=2)


def test_perplexities_and_kl_are_those_of_the_folders(place, whole):
    about, out = whole
    ids = text_blocks(place / "splits", place / "moe", length=16)
    for name, folder in {"MoE": place / "moe", "start": place / "dense", "result": out}.items():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            losses = [model(input_ids=row[None].long(), labels=row[None].long()).loss.item() for row in ids]
        expected = torch.tensor(losses).mean().exp().item()
        assert about["perplexity"][name] == pytest.approx(expected, rel=1e-4)
    teacher = logits(place / "moe", ids)
    assert about["kl"] == {
        name: pytest.approx(kl(teacher, logits(folder, ids)), rel=1e-3)
        for name, folder in {"start": place / "dense", "result": out}.items()
    }
    assert about["held_out_tokens"] == ids.numel()
    history = pd.read_csv(out / "history.csv")
    assert history["step"].tolist()[-1] == about["steps"] == 12
    assert history["val_perplexity"].iloc[-1] == pytest.approx(about["perplexity"]["result"], rel=1e-4)


def test_the_folder_is_one_of_plain_transformers(place, whole):
    about, out = whole
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert isinstance(model, Qwen3ForCausalLM)
    assert model.dtype == torch.float32
    written = model.generate(**tokenizer("the", return_tensors="pt", return_token_type_ids=False), max_new_tokens=5)
    assert written.shape[1] > 3
    assert json.loads((out / "conversion.json").read_text()) == json.loads(
        (place / "dense" / "conversion.json").read_text()
    )
    assert json.loads((out / "distillation.json").read_text()) == about
    card = (out / "README.md").read_text()
    facts = ["base_model: moe\n", "by `average`", "768 tokens of splits", "temperature 1.", "learning rate 0.002 "]
    facts += [f"start {about['perplexity']['start']:.4g}, this model {about['perplexity']['result']:.4g}"]
    facts += [f"KL to the MoE: start {about['kl']['start']:.3f}, this model {about['kl']['result']:.3f}. KL is how far"]
    assert [fact for fact in facts if fact not in card] == []
    assert [path.name for path in out.parent.glob(".*")] == []


def test_an_interrupted_distillation_goes_on_to_the_same_weights(place, whole, tmp_path, monkeypatch):
    class Interrupted(module.tqdm):
        def set_postfix_str(self, *args, **kwargs):
            if self.n >= 7:
                raise KeyboardInterrupt

    out, hidden = tmp_path / "out", tmp_path / ".out.distilling"
    with monkeypatch.context() as patch:
        patch.setattr(module, "tqdm", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(place, out, checkpoint_every=5)
    assert not out.exists()
    assert (hidden / "checkpoint.safetensors").exists()
    with pytest.raises(
        FileExistsError, match=r"\.out\.distilling: expected .* the same arguments, .*: learning_rate; force=True"
    ):
        run(place, out, checkpoint_every=5, learning_rate=1e-3)
    seen = []
    real = module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda parts, moe, dense: seen.extend(dense) or real(parts, moe, dense))
    run(place, out, checkpoint_every=5)
    assert seen == ["result"]  # the start was measured before
    same(out, whole[1])
    one, two = (pd.read_csv(folder / "history.csv").drop(columns="seconds") for folder in (out, whole[1]))
    pd.testing.assert_frame_equal(one, two)
    assert not hidden.exists()


def test_a_teacher_that_does_not_fit_is_placed_elsewhere(place, whole, tmp_path, monkeypatch):
    loaded, real = [], module.load_checkpoint
    monkeypatch.setattr(module, "get_max_memory", lambda: {"cpu": 60_000, "disk": 10**9})
    monkeypatch.setattr(module, "load_checkpoint", lambda *a, **o: loaded.append(real(*a, **o)) or loaded[-1])
    run(place, tmp_path / "out", device_batch=2)
    assert any(parameter.is_meta for parameter in loaded[0].parameters())
    same(tmp_path / "out", whole[1], atol=1e-4, rtol=1e-3)


def test_a_distilled_model_is_distilled_on(place, whole, tmp_path):
    again = distill(place / "moe", whole[1], tmp_path / "again", place / "splits", STEP, **BRIEF)
    assert again["perplexity"]["start"] == whole[0]["perplexity"]["result"]
    assert again["earlier"] == whole[0]
    assert (tmp_path / "again" / "conversion.json").exists()


def test_a_file_is_held_out_in_part_and_a_short_text_is_repeated(place, tmp_path):
    blocks = text_blocks(place / "text.jsonl", place / "moe", length=16)
    kept = len(blocks) - len(blocks[::10])
    with pytest.warns(UserWarning, match=rf"text: expected {kept * 32:,} tokens .* found {kept * 16:,}, .* 2.0 times"):
        about = run(place, tmp_path / "out", kept * 32, "text.jsonl", batch_size=kept)
    assert about["held_out_tokens"] == len(blocks[::10]) * 16
    assert (about["steps"], about["epochs"]) == (2, 2.0)
    checked = run(place, tmp_path / "checked", STEP, "text.jsonl", check=place / "splits")
    assert checked["held_out_tokens"] == text_blocks(place / "splits", place / "moe", length=16).numel()


@pytest.mark.processes
def test_two_processes_give_the_weights_of_one(place, whole, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [
        "-m",
        "ones_lib.study.distill",
        *(str(place / name) for name in ("moe", "dense")),
        str(tmp_path / "out"),
    ]
    command += ["--text", str(place / "splits"), "--tokens", str(12 * STEP), "--length", "16", "--batch-size", "4"]
    command += ["--learning-rate", "2e-3", "--alpha", "1", "--shard", "--device-batch", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(module.__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote ") == 1
    same(tmp_path / "out", whole[1], atol=1e-4, rtol=1e-3)


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": STEP - 1}, "tokens: expected at least 64, a step of 4 blocks of 16, found 63"),
        ({"length": 65}, "length: expected 8 to 64 tokens, found 65"),
        ({"alpha": 1.5}, "alpha: expected a number from 0 to 1, found 1.5"),
        ({"temperature": 0}, "temperature: expected a positive number, found 0"),
        ({"learning_rate": -1.0}, "learning_rate: expected a positive number, found -1.0"),
        ({"batch_size": 0}, "batch_size: expected a positive number, found 0"),
        ({"device_batch": -1}, "device_batch: expected a number of at least 0, found -1"),
        ({"checkpoint_every": 0}, "checkpoint_every: expected a number of at least 1, found 0"),
        ({"shard": True}, "shard: expected several processes, started by torchrun, found one"),
        ({"mixed_precision": "int8"}, "mixed_precision: expected 'no', 'bf16' or 'fp16', found 'int8'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_numbers_are_refused(place, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(place, tmp_path / "out", **options)
    assert [*tmp_path.iterdir()] == []


def test_models_that_do_not_belong_together_are_refused(place, tmp_path):
    def refused(message, source=place / "moe", dense=place / "dense", out=tmp_path / "out"):
        with pytest.raises(ValueError, match=message):
            distill(source, dense, out, place / "splits", STEP, **BRIEF)
        assert not list(tmp_path.glob(".*"))

    refused(
        "moe: expected conversion.json of a conversion, found none: its FFNs were never gathered", dense=place / "moe"
    )
    for out in ("dense", "moe"):
        with pytest.raises(
            FileExistsError, match=f"out: expected a folder that is not there or empty, .* found .*{out}"
        ):
            distill(place / "moe", place / "dense", place / out, place / "splits", STEP, **BRIEF, force=True)
    moe("qwen3_moe", num_hidden_layers=4).save_pretrained(tmp_path / "deep")
    refused("deep: expected the MoE that .*dense was made of, with num_hidden_layers 3, found 4", tmp_path / "deep")
    moe("qwen3_moe", vocab_size=65).save_pretrained(tmp_path / "wide")
    refused("wide: expected the MoE that .*dense was made of, with vocab_size 64, found 65", tmp_path / "wide")
    moe("switch_transformers").save_pretrained(tmp_path / "switch")
    refused("switch: expected a causal model, found switch_transformers, an encoder-decoder", tmp_path / "switch")
    shutil.copytree(place / "moe", tmp_path / "letters")
    tokenizer = (place / "moe" / "tokenizer.json").read_text()
    (tmp_path / "letters" / "tokenizer.json").write_text(tokenizer.replace('"q"', '"Q"'))
    refused(
        r"dense.tokenizer.json: expected the tokens of .*letters.tokenizer.json, found .* as 'Q'", tmp_path / "letters"
    )
    shutil.copytree(place / "dense", tmp_path / "other")
    conversion = json.loads((place / "dense" / "conversion.json").read_text())
    (tmp_path / "other" / "conversion.json").write_text(json.dumps(conversion | {"model_type": "mixtral"}))
    refused("with model_type mixtral, found qwen3_moe", dense=tmp_path / "other")
    (tmp_path / "other" / "conversion.json").write_text("{")
    refused("other.conversion.json: expected a JSON object", dense=tmp_path / "other")
    (tmp_path / "other" / "conversion.json").write_text(
        json.dumps({k: v for k, v in conversion.items() if k != "method"})
    )
    refused("other.conversion.json: expected what a conversion writes, found no 'method'", dense=tmp_path / "other")
    shutil.copy(place / "dense" / "conversion.json", tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    refused(r"other.tokenizer.json: expected a tokenizer \(", dense=tmp_path / "other")


def test_another_name_is_only_a_warning(place, tmp_path):
    shutil.copytree(place / "moe", tmp_path / "copy")
    with pytest.warns(
        UserWarning, match="dense: expected a model made of copy, found one made of moe, of the same form"
    ):
        distill(tmp_path / "copy", place / "dense", tmp_path / "out", place / "splits", STEP, **BRIEF)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_numbers_of_tokens(capsys):
    texts = {"10M": 10_000_000, "200k": 200_000, "1_000_000": 1_000_000, "1.5B": 1_500_000_000, "64": 64}
    assert {text: token_count(text) for text in texts} == texts
    for text in ("ten", "-5", "10MB", ""):
        with pytest.raises(SystemExit):
            main(["moe", "dense", "out", "--text", "docstrings", f"--tokens={text}"])
        assert "expected a number such as 10M" in capsys.readouterr().err


def test_the_command_says_what_is_wrong_in_a_line_and_as_it_was_typed(place, tmp_path, capsys):
    paths, text = [str(place / "moe"), str(place / "dense"), str(tmp_path / "out")], ["--text", str(place / "splits")]
    tokens, gone = ["--tokens", "1k"], str(tmp_path / "gone.jsonl")
    for arguments, said in (
        ([paths[0], paths[0], paths[2], *text, *tokens], f"{paths[0]}: expected conversion.json of a conversion"),
        ([gone, *paths[1:], *text, *tokens], "MOE: expected a folder or a hub name"),
        ([paths[0], gone, paths[2], *text, *tokens], "DENSE: no such folder"),
        ([*paths[:2], paths[0], *text, *tokens], "OUT: expected a folder that is not there or empty"),
        ([*paths, "--text", gone, *tokens], "--text: no such file or folder"),
        ([*paths, "--text", "~/gone", *tokens], "--text: no such file or folder, '~/gone'"),
        ([*paths, *text, *tokens, "--check", gone], "--check: no such file or folder"),
        ([*paths, *text, "--tokens", "5"], "--tokens: expected at least 4,096, a step of 64 blocks of 64, found 5"),
        ([*paths, *text, *tokens, "--learning-rate", "0"], "--learning-rate: expected a positive number, found 0"),
        ([*paths, *text, *tokens, "--length", "4"], "--length: expected 8 to 64 tokens, found 4"),
    ):
        assert main(arguments) == 1
        message = capsys.readouterr().err
        assert message.startswith(said)
        assert message.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert ones_lib.__version__ in capsys.readouterr().out


def test_the_same_call_again_returns_what_is_there(place, tmp_path, capsys):
    paths = [str(place / "moe"), str(place / "dense"), str(tmp_path / "out")]
    command = [*paths, "--text", str(place / "splits"), "--tokens", "100", "--length", "16", "--batch-size", "4"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "trained on 64 tokens, of 100 asked for: 1 steps of 4 x 16\n" in printed
    about = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert main(command) == 0
    assert capsys.readouterr().out == f"already done with these arguments: {tmp_path / 'out'}\n"
    options = {"length": 16, "batch_size": 4}
    assert distill(*paths, place / "splits", 100, **options) == about
    assert main([*command, "--learning-rate", "1e-3"]) == 1
    said = capsys.readouterr().err
    assert (
        said
        == f"OUT: {paths[2]} was made with other arguments: --learning-rate 0.0002, now 0.001; --force replaces it\n"
    )
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FileExistsError, match="out: expected only files of an earlier call, .*: mine"):
        distill(*paths, place / "splits", 100, **options, force=True)
    (tmp_path / "out" / "mine").unlink()
    assert main([*command, "--learning-rate", "1e-3", "--force"]) == 0
    assert json.loads((tmp_path / "out" / "distillation.json").read_text())["learning_rate"] == 1e-3
    with pytest.raises(ValueError, match="out: expected another folder than dense"):
        distill(paths[0], paths[2], paths[2], place / "splits", 100, **options, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_perplexity_is_shown_before_it_is_measured(place, tmp_path, monkeypatch):
    shown = []

    class Watched(module.tqdm):
        def set_postfix_str(self, text, **options):
            shown.append(text)

    monkeypatch.setattr(module, "tqdm", Watched)
    monkeypatch.setattr(module, "EVALUATIONS", 2)
    run(place, tmp_path / "out")
    assert not any("nan" in text for text in shown)
    assert "perplexity" in shown[-1]


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "gemma4"])
def test_the_language_model_in_a_composite_one_is_distilled(kind, tmp_path):
    """Sizes are in a part of its config. The second's blocks hand on more than hidden states."""
    text = with_tokenizer(tmp_path / "moe", kind)
    texts = {"calibration": text, "calibration_tokens": 512, "check": text}
    found = convert(tmp_path / "moe", tmp_path / "dense", "readout", "active", **texts).attrs["perplexity"]
    made = distill(tmp_path / "moe", tmp_path / "dense", tmp_path / "out", text, 512, length=32, batch_size=8)
    assert 0 < made["perplexity"]["result"] < 2 * found["MoE"]
    one, two = (load_language_model(tmp_path / name) for name in ("moe", "out"))
    assert type(one) is type(two)
