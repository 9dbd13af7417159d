"""MoE checkpoints made dense: gates, shared experts, calibration, interruptions, bad input, the command line."""

import errno
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_moes import moe, perplexity
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy, silu
from transformers import AutoConfig, MistralConfig, PreTrainedModel, PreTrainedTokenizerFast

import ones_lib
from ones_lib.checkpoints import activations, convert, evaluation, open_experts, work
from ones_lib.checkpoints.__main__ import main
from ones_lib.checkpoints.inspection import inspect as inspect_moe
from ones_lib.checkpoints.place import Place
from ones_lib.checkpoints.plan import TwinPlan
from ones_lib.checkpoints.shards import Shards
from ones_lib.checkpoints.text import text_blocks, thinned
from ones_lib.checkpoints.work import Work
from ones_lib.data.files import write_text
from ones_lib.gathering import registry
from ones_lib.gathering.registry import gather
from ones_lib.models.causal import (
    load_language_model,
    model_inputs,
    new_model,
    token_losses,
    watched_experts,
)
from ones_lib.study.language_task import LanguageModel

TOKENS = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def logits(model, ids=TOKENS):
    with torch.no_grad():
        return model(**model_inputs(model, ids)).logits.float()


def files(folder):
    """What transformers loads."""
    paths = [
        p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".json") and p.name != "conversion.json"
    ]
    return {path.name: path.read_bytes() for path in paths}


def close(one, two, atol=1e-5):
    torch.testing.assert_close(one, two, atol=atol, rtol=0)


# --- gates and layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "deepseek_v3", "glm4_moe"])
def test_gates_that_are_not_normalised_are_measured(kind, tmp_path):
    """A router that does not care gives each of the k chosen 1/E by softmax, and 1/2 by sigmoid."""
    model = moe(kind, equal=True, same_gates=True, norm_topk_prob=False)
    model.save_pretrained(tmp_path / "moe")
    table = convert(tmp_path / "moe", tmp_path / "dense", "average")
    expected = {"deepseek_v3": 2 * 0.5 * 2.5, "glm4_moe": 2 * 0.5 * 1.7}.get(kind, 2 / 4)
    assert table["gate_sum"].to_list() == pytest.approx([expected] * len(table))
    close(logits(load_language_model(tmp_path / "dense")), logits(model))


@pytest.mark.parametrize("kind", ["olmoe", "switch_transformers", "deepseek_v2"])
def test_the_measured_sum_is_the_mean_over_the_given_tokens(kind, tmp_path):
    model = moe(kind, **({"num_experts_per_tok": 2} if kind == "deepseek_v2" else {"norm_topk_prob": False}))
    model.save_pretrained(tmp_path / "moe")
    sums = []

    def see(block, found):
        sums.append(found.gates.sum(dim=1).mean().item())

    with watched_experts(model, see):
        logits(model)
    table = convert(tmp_path / "moe", tmp_path / "dense", "average", calibration=TOKENS)
    assert sorted(table["gate_sum"]) == pytest.approx(sorted(sums), rel=1e-4)
    assert len(set(sums)) > 1
    assert (table["gates"] == "calibration").all()


def test_different_experts_are_gathered_as_by_the_library(tmp_path):
    """The twin's network is what the gathering makes of the layer's experts, the shared ones beside it."""
    model = moe("deepseek_v3")
    model.save_pretrained(tmp_path / "moe")
    convert(tmp_path / "moe", tmp_path / "dense", "topk", d_ff=60)
    twin = load_language_model(tmp_path / "dense")
    assert twin.config.intermediate_size == 60 + 48
    x = torch.randn(5, 32)
    for i, (layer, bank) in enumerate(open_experts(model).items(), start=1):
        assert layer == f"model.layers.{i}.mlp.experts"
        routed = gather(bank, "topk", d_ff=60, scale="router").apply(x, silu)
        shared = model.model.layers[i].mlp.shared_experts(x)
        close(twin.model.layers[i].mlp(x), 2.5 * routed + shared)


def test_layers_that_were_dense_stay_as_they_are_and_padding_can_learn(tmp_path):
    model = moe("qwen3_moe")
    model.save_pretrained(tmp_path / "moe")
    table = convert(tmp_path / "moe", tmp_path / "dense", "average")
    assert table[["d_ff", "width"]].to_numpy().tolist() == [[24, 40], [24, 40]]
    twin, x = load_language_model(tmp_path / "dense"), torch.randn(5, 32)
    close(twin.model.layers[0].mlp(x), model.model.layers[0].mlp(x))
    mlp = twin.model.layers[1].mlp
    assert (mlp.down_proj.weight[:, 24:] == 0).all()
    mlp(x).square().sum().backward()
    assert (mlp.down_proj.weight.grad[:, 24:] != 0).all()


def test_the_gated_shared_expert_of_qwen2_is_kept_or_becomes_a_mean(tmp_path):
    model = moe("qwen2_moe")
    with torch.no_grad():  # where its gate does not depend on the token, the approximation is exact
        for layer in model.model.layers[1:]:
            layer.mlp.shared_expert_gate.weight.zero_()
            layer.mlp.experts.down_proj.copy_(layer.mlp.experts.down_proj[:1].expand(4, -1, -1))
            layer.mlp.experts.gate_up_proj.copy_(layer.mlp.experts.gate_up_proj[:1].expand(4, -1, -1))
    model.save_pretrained(tmp_path / "moe")
    kept = convert(tmp_path / "moe", tmp_path / "kept", "average")
    plain = convert(tmp_path / "moe", tmp_path / "plain", "average", approximate=True)
    assert kept["shared"].to_list() == [0, 0]
    assert plain["shared"].to_list() == [40, 40]
    for name, expected in {"kept": "Qwen2MoeForCausalLM", "plain": "Qwen2ForCausalLM"}.items():
        twin = load_language_model(tmp_path / name)
        assert type(twin).__name__ == expected
        close(logits(twin), logits(model))
    assert "with one expert" in (tmp_path / "kept" / "README.md").read_text().replace("\n", " ")
    assert "Approximate" in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize("layers", [3, 48])
def test_layers_for_further_tokens_are_left_out(layers, tmp_path):
    """GLM's and DeepSeek's files have one beyond the last, with experts of its own; transformers leaves out numbers 46 and 92,
    but not from a model that has them."""
    model = moe("glm4_moe", equal=True, num_hidden_layers=layers)
    model.save_pretrained(tmp_path / "moe")
    path = tmp_path / "moe" / "model.safetensors"
    tensors = load_file(path)
    last = {name: t for name, t in tensors.items() if f"layers.{layers - 1}." in name}
    beyond = {name.replace(f"layers.{layers - 1}.", f"layers.{layers}."): t.clone() for name, t in last.items()}
    save_file(tensors | beyond | {f"model.layers.{layers}.eh_proj.weight": torch.ones(2, 2)}, path, {"format": "pt"})
    table = convert(tmp_path / "moe", tmp_path / "dense", "average")
    assert len(table) == layers - 1
    close(logits(load_language_model(tmp_path / "dense")), logits(model), atol=1e-4 if layers > 3 else 1e-5)


# --- calibration, statistics, checks ----------------------------------------------------------------------------------


def with_tokenizer(folder, kind="mixtral"):
    """A random MoE with a tokenizer of letters, and text."""
    moe(kind).save_pretrained(folder)
    letters = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz ,."])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="a")
    wrapped.save_pretrained(folder)
    text = folder.parent / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, and the moral of it is that there is none. " * 40)
    return text


def test_calibration_gives_statistics_errors_and_data_for_methods(tmp_path):
    text = with_tokenizer(tmp_path / "moe")
    tables = {}
    for method in ("average", "frequency_average", "readout"):
        folder = tmp_path / method
        tables[method] = convert(tmp_path / "moe", folder, method, calibration=text, calibration_tokens=1024)
    assert (tables["readout"]["output_error"] < tables["average"]["output_error"]).all()
    statistics = pd.read_csv(tmp_path / "average" / "router_statistics.csv")
    assert statistics.groupby("layer")["frequency"].sum().to_list() == pytest.approx([1, 1, 1], rel=1e-5)
    assert statistics.groupby("layer")["mean_gate"].sum().to_list() == pytest.approx([1, 1, 1], rel=1e-5)

    seen = {}
    model = load_language_model(tmp_path / "moe")
    ids = text_blocks(text, tmp_path / "moe", 1024)
    assert ids.shape == (16, 64)
    with watched_experts(model, seen.__setitem__):
        logits(model, ids)
    block = seen["model.layers.2.mlp.experts"]
    found = statistics[statistics["layer"] == "model.layers.2.mlp"]
    chosen = (
        torch.bincount(model.model.layers[2].mlp.gate(block.inputs)[2].flatten(), minlength=4)
        / block.gates.count_nonzero()
    )
    assert found["frequency"].to_list() == pytest.approx(chosen.tolist(), abs=1e-5)
    twin = load_language_model(tmp_path / "average")
    error = (twin.model.layers[2].mlp(block.inputs) - block.outputs).norm() / block.outputs.norm()
    assert tables["average"]["output_error"].iloc[2] == pytest.approx(
        error.item(), rel=0.2
    )  # of a quarter of the tokens
    weighted = gather(open_experts(model)["model.layers.2.mlp.experts"], "frequency_average", calibration=block)
    down = load_language_model(tmp_path / "frequency_average").model.layers[2].mlp.down_proj.weight
    assert (down - weighted.down).abs().max() < 0.1 * down.abs().max()


@pytest.mark.parametrize(("count", "there"), [(1000, 1999), (1, 5), (3, 7), (7, 7), (9, 7), (512, 23467)])
def test_what_is_taken_of_a_text_is_spread_over_all_of_it(count, there):
    blocks = torch.arange(there)[:, None].expand(-1, 4)
    taken = thinned(blocks, 4 * count + 3)[:, 0]
    count = min(count, there)
    assert len(taken) == count
    between = torch.cat([taken, torch.tensor([there])]).diff()
    assert taken[0] == 0
    assert set(between.tolist()) <= {there // count, -(-there // count)}


def test_a_calibration_in_parts_is_the_whole(tmp_path, monkeypatch):
    text = with_tokenizer(tmp_path / "moe", "qwen2_moe")
    arguments = {"calibration": text, "calibration_tokens": 512, "approximate": True}
    whole = convert(tmp_path / "moe", tmp_path / "whole", "frequency_average", **arguments)
    monkeypatch.setattr(activations, "TOKENS_A_PASS", 128)
    parts = convert(tmp_path / "moe", tmp_path / "parts", "frequency_average", **arguments)
    pd.testing.assert_frame_equal(whole.drop(columns="seconds"), parts.drop(columns="seconds"), rtol=1e-5)
    close(logits(load_language_model(tmp_path / "whole")), logits(load_language_model(tmp_path / "parts")), atol=1e-4)


def test_too_few_tokens_to_solve_for_the_weights(tmp_path):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    with pytest.warns(
        UserWarning, match="expected at least 4 for each of the 24 hidden units that 'readout' solves for"
    ):
        convert(tmp_path / "moe", tmp_path / "dense", "readout", calibration=TOKENS)


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gpt_oss", "step3p7", "nemotron_h", "switch_transformers"])
def test_watched_experts_are_what_the_layer_computes(kind):
    """With clamps, biases and interleaved units, without gates, and with a module an expert."""
    model, seen = moe(kind), {}
    with watched_experts(model, seen.__setitem__):
        logits(model)
    banks = open_experts(model)
    assert set(seen) == set(banks)
    for name, bank in banks.items():
        found = seen[name]
        outputs = [bank.expert(e).apply(found.inputs, found.activation) for e in range(len(bank.up))]
        expected = sum(found.gates[:, e, None] * output for e, output in enumerate(outputs))
        close(found.outputs, expected, atol=1e-4)


def test_perplexity_is_transformers_own_loss(tmp_path):
    text = with_tokenizer(tmp_path / "moe")
    ids = text_blocks(text, tmp_path / "moe")
    assert ids[0, :4].tolist() == [1, 22, 10, 7]  # <s> t h e
    model = load_language_model(tmp_path / "moe")
    with torch.no_grad():
        expected = sum(model(input_ids=row[None].long(), labels=row[None].long()).loss.item() for row in ids) / len(ids)
    assert perplexity(model, ids) == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-4)
    table = convert(tmp_path / "moe", tmp_path / "dense", "average", check=text)
    assert len(table) == 3
    card = (tmp_path / "dense" / "README.md").read_text()
    assert f"Perplexity on {ids.numel():,} tokens of text.txt: MoE {perplexity(model, ids):.4g}" in card
    assert f"this model {perplexity(load_language_model(tmp_path / 'dense'), ids):.4g}" in card


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma4"])
def test_a_model_that_does_not_fit_is_compared_block_by_block(kind, tmp_path, monkeypatch):
    """The second's blocks hand on more than hidden states."""
    moe(kind).save_pretrained(tmp_path / "moe")
    for fits in (True, False):
        monkeypatch.setattr(work, "fits_memory", lambda shards, fits=fits: fits)
        found = convert(tmp_path / "moe", tmp_path / f"dense-{fits}", "topk", check=TOKENS).attrs
        one, two = (load_language_model(tmp_path / name).eval() for name in ("moe", f"dense-{fits}"))
        expected = {"MoE": perplexity(one, TOKENS), "dense": perplexity(two, TOKENS)}
        assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
        with torch.no_grad():
            p, q = (m(TOKENS.long()).logits[:, :-1].double().log_softmax(dim=-1) for m in (one, two))
        assert found["kl"] == {"dense": pytest.approx((p.exp() * (p - q)).sum(dim=-1).mean().item(), rel=1e-4)}


def test_a_conversion_of_equal_experts_has_no_kl_to_its_moe(tmp_path):
    moe("mixtral", equal=True).save_pretrained(tmp_path / "moe")
    found = convert(tmp_path / "moe", tmp_path / "dense", "average", check=TOKENS).attrs
    assert found["kl"]["dense"] == pytest.approx(0, abs=1e-6)
    facts = json.loads((tmp_path / "dense" / "conversion.json").read_text())
    assert {name: facts[name] for name in found} == found


def test_an_interrupted_check_is_not_taken_for_that_of_another_text(tmp_path, monkeypatch):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    monkeypatch.setattr(work, "fits_memory", lambda shards: False)
    others = TOKENS.flip(1)
    stop(monkeypatch, evaluation, "token_losses")
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "moe", tmp_path / "dense", "topk", check=TOKENS)
    monkeypatch.setattr(evaluation, "token_losses", token_losses)
    monkeypatch.setattr(Work, "convert_block", None)  # what is done is taken
    found = convert(tmp_path / "moe", tmp_path / "dense", "topk", check=others).attrs["perplexity"]["MoE"]
    assert found == pytest.approx(perplexity(load_language_model(tmp_path / "moe"), others), rel=1e-5)
    facts = json.loads((tmp_path / "dense" / "conversion.json").read_text())
    assert facts["check"]["tokens"] == others.numel()


def test_an_encoder_decoder_is_measured_on_the_second_half(tmp_path):
    model, ids = moe("switch_transformers"), TOKENS
    model.save_pretrained(tmp_path / "moe")
    out = model(input_ids=ids[:, :12], decoder_input_ids=ids[:, 12:]).logits
    expected = cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 13:].flatten())
    found = convert(tmp_path / "moe", tmp_path / "dense", "topk", check=ids).attrs["perplexity"]
    assert found["MoE"] == pytest.approx(expected.exp().item(), rel=1e-5)


# --- width ------------------------------------------------------------------------------------------------------------


def test_any_width_by_topk_and_multiples_by_the_others(tmp_path):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    for method, d_ff in {"topk": 31, "average": 48, "svd": 96, "sum": 72}.items():
        table = convert(tmp_path / "moe", tmp_path / method, method, d_ff=d_ff)
        assert (table["width"] == d_ff).all()
        assert load_language_model(tmp_path / method).config.intermediate_size == d_ff
    convert(tmp_path / "moe", tmp_path / "k", "topk", k=7)
    assert load_language_model(tmp_path / "k").config.intermediate_size == 28
    with pytest.raises(
        ValueError, match=r"d_ff: expected a multiple of the experts' 24, up to 96, for method 'average', found 30"
    ):
        convert(tmp_path / "moe", tmp_path / "no", "average", d_ff=30)
    with pytest.raises(ValueError, match="d_ff: expected an integer from 1 to 96 for method 'topk', found 97"):
        convert(tmp_path / "moe", tmp_path / "no", "topk", d_ff=97)
    assert not (tmp_path / "no").exists()


# --- interruptions and bad input --------------------------------------------------------------------------------------


def test_an_interrupted_conversion_goes_on_where_it_stopped(tmp_path, monkeypatch):
    text = with_tokenizer(tmp_path / "moe")
    arguments = {"method": "average", "calibration": text, "calibration_tokens": 256}
    convert(tmp_path / "moe", tmp_path / "whole", **arguments)
    real, seen = Work.convert_block, []

    def stop_at_the_third(work, block):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(block.name)
        return real(work, block)

    monkeypatch.setattr(Work, "convert_block", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "moe", tmp_path / "dense", **arguments)
    assert not (tmp_path / "dense").exists()
    # What a killed process was writing:
    (tmp_path / ".dense.converting" / "blocks" / "00002.safetensors.there-1.tmp").write_bytes(b"half")
    again = []
    monkeypatch.setattr(Work, "convert_block", lambda work, block: again.append(block.name) or real(work, block))
    monkeypatch.setattr(activations, "BlockStream", None)  # the MoE need not run again
    with pytest.raises(FileNotFoundError):  # a mistake does not cost what is done
        convert(tmp_path / "moe", tmp_path / "dense", **arguments | {"calibration": tmp_path / "gone.txt"})
    table = convert(tmp_path / "moe", tmp_path / "dense", **arguments)
    assert seen + again == ["", *(f"model.layers.{i}" for i in range(3))]
    assert files(tmp_path / "dense") == files(tmp_path / "whole")
    assert {p.name for p in (tmp_path / "dense").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    assert table["layer"].to_list() == [f"model.layers.{i}.mlp" for i in range(3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "moe", "text.txt", "whole"]


def test_unfinished_work_of_another_conversion_is_neither_taken_nor_deleted(tmp_path, monkeypatch):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    stop(monkeypatch, Work, "write_config")
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "moe", tmp_path / "dense", "average")
    monkeypatch.undo()
    found = {path: path.stat().st_mtime_ns for path in (tmp_path / ".dense.converting").rglob("*")}
    with pytest.raises(FileExistsError, match='found others: method "average", now "topk"; force=True starts over'):
        convert(tmp_path / "moe", tmp_path / "dense", "topk")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / ".dense.converting").rglob("*")} == found
    convert(tmp_path / "moe", tmp_path / "dense", "topk", force=True)
    convert(tmp_path / "moe", tmp_path / "other", "topk")
    assert files(tmp_path / "dense") == files(tmp_path / "other")


def stop(monkeypatch, owner, name, at=1, error=KeyboardInterrupt):
    """Let the n-th call of a function fail."""
    function, left = getattr(owner, name), [at]

    def stopping(*arguments, **options):
        left[0] -= 1
        if not left[0]:
            raise error
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, stopping)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, TypeError, RuntimeError, MemoryError, OSError])
def test_after_an_error_of_any_type_the_next_call_goes_on(error, tmp_path, monkeypatch):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    convert(tmp_path / "moe", tmp_path / "whole", "average", calibration=TOKENS)
    stop(monkeypatch, Work, "convert_block", at=3, error=error)
    with pytest.raises(error):
        convert(tmp_path / "moe", tmp_path / "dense", "average", calibration=TOKENS)
    monkeypatch.undo()
    stop(monkeypatch, Work, "convert_block", at=3)  # two are left
    monkeypatch.setattr(activations, "BlockStream", None)
    monkeypatch.setattr(TwinPlan, "check_weights", None)
    convert(tmp_path / "moe", tmp_path / "dense", "average", calibration=TOKENS)
    assert files(tmp_path / "dense") == files(tmp_path / "whole")


def test_what_fails_before_anything_is_done_leaves_nothing(tmp_path, monkeypatch):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    stop(monkeypatch, activations, "BlockStream", error=RuntimeError)
    with pytest.raises(RuntimeError):
        convert(tmp_path / "moe", tmp_path / "dense", "average", calibration=TOKENS)
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_a_call_that_was_killed_when_all_was_in_place_leaves_nothing_to_trip_over(tmp_path, monkeypatch):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    put = Place.put

    def killed(*arguments):
        put(*arguments)
        raise KeyboardInterrupt

    for force in (False, True):
        monkeypatch.setattr(Place, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "moe", tmp_path / "dense", "average", force=force)
        monkeypatch.setattr(Place, "put", put)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".dense.converting", "dense", "moe"]
        convert(tmp_path / "moe", tmp_path / "dense", "average", force=force)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


@pytest.mark.parametrize("how", ["NaN", "NaN expert"])
def test_weights_are_looked_through_before_the_moe_runs(how, tmp_path, monkeypatch):
    moe("mixtral").save_pretrained(tmp_path / "moe", max_shard_size="20KB")
    spoil(tmp_path / "moe", how)
    monkeypatch.setattr(activations, "BlockStream", None)
    with pytest.raises(ValueError, match="expected finite weights, found 1 NaN or infinite"):
        convert(tmp_path / "moe", tmp_path / "dense", "average", calibration=TOKENS)
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


# --- numbers that float16 can't hold ----------------------------------------------------------------------------------


def large_moe(folder, factor, size, dtype=torch.float16):
    """Its experts' output weights are finite in float16, their sums may be not."""
    model = moe("glm4_moe", equal=True, routed_scaling_factor=factor)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("experts.down_proj"):
                tensor.mul_(size / tensor.abs().max())
    model.to(dtype).save_pretrained(folder)


def test_a_sum_that_float16_can_not_hold_is_an_error(tmp_path):
    large_moe(tmp_path / "moe", 4.0, 40_000)
    said = (
        r"moe: model\.layers\.1\.mlp\.down_proj\.weight: expected numbers that torch\.float16 can hold, .*in bfloat16"
    )
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "moe", tmp_path / "dense", "average")
    assert not (tmp_path / "dense").exists()
    large_moe(tmp_path / "wide", 4.0, 40_000, torch.bfloat16)
    convert(tmp_path / "wide", tmp_path / "dense", "average", force=True)
    assert all(t.isfinite().all() for t in load_file(tmp_path / "dense" / "model.safetensors").values())


@pytest.mark.parametrize("option", ["calibration", "reconstruct", "check"])
def test_a_text_on_which_float16_overflows_is_an_error(option, tmp_path):
    large_moe(tmp_path / "moe", 1.0, 60_000)
    with pytest.raises(ValueError, match=r"expected finite (numbers|perplexities).* torch\.float16, .*in bfloat16"):
        convert(tmp_path / "moe", tmp_path / "dense", "average", **{option: TOKENS.repeat(5, 1)})
    assert not (tmp_path / "dense").exists()


# --- how a model is run is no part of it ------------------------------------------------------------------------------


SWITCHES = {"output_attentions": True, "return_dict": False, "use_cache": False, "output_hidden_states": True}
SWITCHES |= {"attn_implementation": "flash_attention_2", "experts_implementation": "deepgemm", "torchscript": True}


def edit(folder, part="", **values):
    """Change config.json, or the config of a part in it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config[part] if part else config).update(values)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(("kind", "part"), [("qwen3_moe", ""), ("qwen2_moe", ""), ("qwen3_vl_moe", "text_config")])
def test_switches_of_how_a_model_is_run_change_nothing(kind, part, tmp_path):
    moe(kind).save_pretrained(tmp_path / "moe")
    plain = convert(tmp_path / "moe", tmp_path / "plain", "average", check=TOKENS)
    unchanged = (tmp_path / "moe" / "config.json").read_bytes()
    for name, value in SWITCHES.items():
        (tmp_path / "moe" / "config.json").write_bytes(unchanged)
        edit(tmp_path / "moe", part, **{name: value})
        table = convert(tmp_path / "moe", tmp_path / "dense", "average", check=TOKENS, force=True)
        assert table.attrs == plain.attrs
        assert files(tmp_path / "dense") == files(tmp_path / "plain"), name
        convert(tmp_path / "moe", tmp_path / "plain", "average", check=TOKENS)  # done already: it is the same model
    edit(tmp_path / "moe", part, rms_norm_eps=0.1)
    with pytest.raises(FileExistsError, match="source_stamp"):
        convert(tmp_path / "moe", tmp_path / "plain", "average", check=TOKENS)


def test_a_config_that_can_not_be_written_is_told_before_the_moe_runs(tmp_path, monkeypatch):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    monkeypatch.setattr(activations, "BlockStream", None)
    stop(monkeypatch, MistralConfig, "save_pretrained", error=ValueError("no such thing"))
    with pytest.raises(
        ValueError, match=r"moe/config\.json: expected a config that transformers can write, .*: no such thing"
    ):
        convert(tmp_path / "moe", tmp_path / "dense", "average", calibration=TOKENS)
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_widths_that_torch_can_not_multiply_together(tmp_path):
    """36 and 25 in bfloat16 are rows of 72 and 50 bytes."""
    sizes = {"hidden_size": 36, "moe_intermediate_size": 25, "head_dim": 16}
    moe("qwen3_moe", **sizes).bfloat16().save_pretrained(tmp_path / "moe")
    ids = TOKENS.repeat(16, 1)
    table = convert(tmp_path / "moe", tmp_path / "dense", "topk", "active", calibration=ids, reconstruct=ids, check=ids)
    assert all(value < 1000 for value in table.attrs["perplexity"].values())
    assert inspect_moe(tmp_path / "moe", ids).errors["output_error"].lt(1.1).all()


# --- the place --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EROFS])
def test_a_place_that_nothing_can_be_moved_to_is_told_first(number, tmp_path, monkeypatch):
    """As an empty mount point."""
    moe("mixtral").save_pretrained(tmp_path / "moe")
    (tmp_path / "dense").mkdir()
    stop(monkeypatch, os, "replace", error=OSError(number, os.strerror(number)))
    monkeypatch.setattr(TwinPlan, "check_weights", None)
    with pytest.raises(OSError, match=f"destination: expected a place .*dense: {os.strerror(number)}") as found:
        convert(tmp_path / "moe", tmp_path / "dense", "average")
    assert ("take a folder in it" in str(found.value)) == (number != errno.EROFS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


def test_an_empty_place_stays_the_folder_that_it_is_until_the_end(tmp_path, monkeypatch):
    """Somebody may be in it."""
    moe("mixtral").save_pretrained(tmp_path / "moe")
    (tmp_path / "dense").mkdir()
    monkeypatch.chdir(tmp_path / "dense")
    convert("../moe", ".", "average")
    assert (tmp_path / "dense" / "config.json").exists()


def test_files_are_in_utf_8_with_any_name(tmp_path):
    write_text(tmp_path / "file", "模型 \udcff")
    assert (tmp_path / "file").read_bytes() == "模型 \\udcff".encode()
    moe("mixtral").save_pretrained(tmp_path / "模型 \udcff")
    convert(tmp_path / "模型 \udcff", tmp_path / "dense", "average")
    assert "# 模型 \\udcff, made dense" in (tmp_path / "dense" / "README.md").read_text(encoding="utf-8")


def test_room_for_what_passes_through_the_experts_is_asked_for_first(tmp_path, monkeypatch):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    usage, ids = shutil.disk_usage(tmp_path), TOKENS.repeat(200, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 * 10**6))
    monkeypatch.setattr(activations, "BlockStream", None)
    with pytest.raises(OSError, match=r"free disk space, found .*calibration_tokens 0\.0, reconstruct_tokens"):
        convert(tmp_path / "moe", tmp_path / "dense", "average", calibration=ids)
    with pytest.raises(OSError, match="calibration_tokens sets their number, TMPDIR another folder"):
        inspect_moe(tmp_path / "moe", ids)
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("topk", {"k": 7, "d_ff": "active"}, "k, d_ff: expected one of the two, found 7 and 48"),
        ("topk", {"k": 25}, "k: expected an integer from 1 to 24, found 25"),
        ("topk", {"k": "7"}, "k: expected an integer from 1 to 24, found '7'"),
        ("topk", {"k": 0}, "k: expected an integer from 1 to 24, found 0"),
        ("topk", {"importance": "l1"}, "importance: expected one of"),
        ("topk", {"scale": None}, "scale: expected a finite number, found None"),
        ("average", {"scale": "large"}, "scale: expected a number"),
        ("average", {"scale": [1.0, "a"]}, "scale: expected a finite number"),
        ("svd", {"rank": 25}, "rank: expected an integer from 1 to 24, found 25"),
        ("svd", {"rank": 2.5}, "rank: expected an integer"),
        ("whitened_svd", {"rank": 0}, "rank: expected an integer"),
        ("contribution_topk", {"k": 3, "d_ff": 48}, "k, d_ff: expected one of the two"),
        ("readout", {"ridge": -1}, "ridge: expected a number of at least 0, found -1"),
        ("readout", {"ridge": "a"}, "ridge: expected a number"),
        ("readout", {"hidden": "fit"}, "hidden: expected an FFN or one of"),
        ("readout", {"hidden": 3}, "hidden: expected an FFN or one of"),
        ("readout", {"hidden": "whitened_svd", "d_ff": 48}, "d_ff: expected the experts' 24 for method 'whitened_svd'"),
        ("fit", {"steps": 0}, "steps, learning_rate: expected positive numbers"),
        ("fit", {"steps": 1.5}, "steps, learning_rate: expected positive numbers"),
        ("fit", {"learning_rate": "a"}, "steps, learning_rate: expected positive numbers"),
        ("fit", {"seed": "a"}, "seed: expected an integer, found 'a'"),
        ("fit", {"start": "readout"}, "start: expected an FFN or one of"),
        ("expert_selection", {"score": "best"}, "score: expected one of"),
        ("expert_selection", {"gate": 1}, "gate: expected one of"),
        ("expert_selection", {"select": 5}, "select: expected an integer from 1 to 4, found 5"),
        ("expert_selection", {"select": 1, "d_ff": 48}, "select: expected at least the 2 experts"),
        ("expert_selection", {"d_ff": 30}, "d_ff: expected a multiple of the experts' 24"),
    ],
)
def test_values_of_options_are_checked_before_anything_is_read(method, options, message, tmp_path, monkeypatch):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    monkeypatch.setattr(Shards, "read", None)
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(tmp_path / "moe", tmp_path / "dense", method, calibration=TOKENS, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_k_is_a_width_too(tmp_path, capsys):
    """On the command line, where without it the width is the active one."""
    moe("mixtral").save_pretrained(tmp_path / "moe")
    main([str(tmp_path / "moe"), str(tmp_path / "dense"), "--method", "topk", "--option", "k=7"])
    assert load_language_model(tmp_path / "dense").config.intermediate_size == 28
    with pytest.raises(SystemExit):
        main([str(tmp_path / "moe"), str(tmp_path / "no"), "--d-ff", "48", "--option", "k=7"])
    assert "expected one of the two, found 7 and 48" in capsys.readouterr().err


def spoil(folder, how):
    shard = sorted(folder.glob("*.safetensors"))[1]
    index = folder / "model.safetensors.index.json"
    if how == "missing shard":
        shard.unlink()
    elif how == "cut shard":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif how == "index names another":
        content = json.loads(index.read_text())
        content["weight_map"]["model.layers.9.extra"] = shard.name
        index.write_text(json.dumps(content))
    elif how == "index of nothing":
        index.write_text("{}")
    elif how == "index lacks one":
        content = json.loads(index.read_text())
        content["weight_map"] = {k: v for k, v in content["weight_map"].items() if "norm.weight" not in k}
        index.write_text(json.dumps(content))
    elif how in ("NaN", "NaN expert", "int8", "expert lacks", "shape"):
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            for name in list(tensors):
                if how == "NaN" and name.endswith("layers.1.self_attn.q_proj.weight"):
                    tensors[name][3, 4] = torch.nan
                if how == "NaN expert" and "layers.2.block_sparse_moe.experts.1.w2" in name:
                    tensors[name][0, 0] = torch.inf
                if how == "int8" and "experts" in name:
                    tensors[name] = tensors[name].to(torch.int8)
                if how == "shape" and name == "model.norm.weight":
                    tensors[name] = tensors[name][:5].clone()
            save_file(tensors, path, {"format": "pt"})
    elif how == "quantised":
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (folder / "config.json").write_text(json.dumps(config))
    elif how in ("unknown", "jetmoe"):
        config = json.loads((folder / "config.json").read_text())
        config["model_type"] = "mistral" if how == "unknown" else "jetmoe"
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "pickle":
        for path in [*folder.glob("*.safetensors"), index]:
            path.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"never to be opened")


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (
            "missing shard",
            FileNotFoundError,
            r"model-00002-of-\d+\.safetensors: expected this file, which the index names",
        ),
        ("cut shard", ValueError, r"model-00002-of-\d+\.safetensors: expected a whole safetensors file"),
        ("index names another", ValueError, r"index\.json: expected the tensors of its files.*model\.layers\.9\.extra"),
        ("index lacks one", ValueError, r"index\.json: expected the tensors of its files, each in its own"),
        ("index of nothing", ValueError, r"index\.json: expected JSON with a weight_map of files by tensor"),
        ("NaN", ValueError, r"layers\.1\.self_attn\.q_proj\.weight: expected finite weights, found 1 NaN or infinite"),
        ("NaN expert", ValueError, r"layers\.2.*down of expert 1: expected finite weights, found 1 NaN or infinite"),
        ("int8", ValueError, r"experts\.0\..*: expected weights that are not quantised, found I8"),
        ("shape", ValueError, r"of another shape: \['model\.norm\.weight \[5\], not \[32\]'\]"),
        (
            "quantised",
            ValueError,
            "found quantization_config's quant_method 'gptq' of 4 bits; take the release in bfloat16",
        ),
        ("unknown", ValueError, "expected a model with experts, found MistralForCausalLM without"),
        ("jetmoe", ValueError, "jetmoe has no dense twin: its attention has experts too"),
        ("no config", FileNotFoundError, r"expected config\.json, found \["),
        (
            "pickle",
            FileNotFoundError,
            r"expected a safetensors file or a folder of them, found .*'pytorch_model",
        ),
    ],
)
def test_bad_checkpoints_are_refused_and_leave_nothing(how, error, message, tmp_path):
    moe("mixtral").save_pretrained(tmp_path / "moe", max_shard_size="20KB")
    spoil(tmp_path / "moe", how)
    with pytest.raises(error, match=message):
        convert(tmp_path / "moe", tmp_path / "dense", "average")
    assert [p.name for p in tmp_path.iterdir()] == ["moe"]


def test_bad_arguments(tmp_path, monkeypatch):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    dense = tmp_path / "dense"
    cases = [
        (
            (tmp_path / "moe", tmp_path / "full"),
            {},
            FileExistsError,
            "destination: expected a folder that is not there or empty",
        ),
        ((tmp_path / "moe", dense, "mean"), {}, ValueError, "method: expected one of .*, found 'mean'"),
        (
            (tmp_path / "moe", dense, "average"),
            {"rank": 3},
            TypeError,
            "rank: gathering method 'average' has no such option",
        ),
        (
            (tmp_path / "moe", dense, "topk"),
            {"importance": torch.ones(4, 24)},
            TypeError,
            "importance: expected a number, text",
        ),
        (
            (tmp_path / "moe", dense, "readout"),
            {},
            ValueError,
            "calibration: expected a text, which method 'readout' needs",
        ),
        ((tmp_path / "moe", dense), {"approximate": True}, ValueError, "approximate: expected False for mixtral"),
        ((tmp_path / "moe", dense), {"engine": "tgi"}, ValueError, r"engine: expected one of \['vllm'\], or none"),
        ((tmp_path / "gone", dense), {}, FileNotFoundError, "source: expected a folder or a hub name"),
        (
            (tmp_path / "moe", dense),
            {"check": TOKENS + 60},
            ValueError,
            "check: expected token ids from 0 to 63, found 63 to",
        ),
        (
            (tmp_path / "moe", dense),
            {"calibration": "docstrings"},
            ValueError,
            "moe: expected a tokenizer beside the model",
        ),
    ]
    for positional, named, error, message in cases:
        with pytest.raises(error, match=message):
            convert(*positional, **named)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match="found no folder 'owner/name', and the hub failed"):
        convert("owner/name", dense)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"expected .* GB of free disk space, found 0\.0 GB"):
        convert(tmp_path / "moe", dense, "average")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "moe"]


# --- called again -----------------------------------------------------------------------------------------------------


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_the_same_call_again_returns_what_is_there(tmp_path, capsys):
    text = with_tokenizer(tmp_path / "moe")
    arguments = {"calibration": text, "check": text, "importance": "product"}
    first = convert(tmp_path / "moe", tmp_path / "dense", "topk", **arguments)
    before = stamps(tmp_path / "dense")
    again = convert(str(tmp_path / "moe"), tmp_path / "dense", "topk", **arguments)
    pd.testing.assert_frame_equal(first, again)
    assert again.attrs == first.attrs
    command = ["convert", str(tmp_path / "moe"), str(tmp_path / "dense"), "--d-ff", "expert", "--method", "topk"]
    command += ["--calibration", str(text), "--check", str(text), "--option", "importance=product"]
    main(command)
    assert capsys.readouterr().out == f"already done with these arguments: {tmp_path / 'dense'}\n"
    assert stamps(tmp_path / "dense") == before


def test_another_call_says_what_differs_and_replaces_only_if_told(tmp_path, capsys, monkeypatch):
    text = with_tokenizer(tmp_path / "moe")
    command = [str(tmp_path / "moe"), str(tmp_path / "dense"), "--calibration", str(text)]
    main([*command, "--method", "average"])
    old = files(tmp_path / "dense")
    for more, said in (
        (["--method", "topk"], 'method "average", now "topk"'),
        (["--method", "average", "--d-ff", "96"], "--d-ff 48, now 96"),
        (["--method", "average", "--calibration-tokens", "512"], "--calibration-tokens 4096, now 512"),
        (["--method", "average", "--check", str(text)], 'check null, now "text.txt"'),
        (["--method", "average", "--option", "scale=1.0"], 'options.scale "router", now 1.0'),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*command, *more])
        assert stop.value.code == 1
        message = capsys.readouterr().err
        assert message.startswith("DENSE: ")
        assert said in message
        assert message.endswith("; --force replaces it\n")
    with pytest.raises(FileExistsError, match="destination: .*; force=True replaces it"):
        convert(tmp_path / "moe", tmp_path / "dense", "svd")

    with monkeypatch.context() as patch:
        patch.setattr(Work, "write_config", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            main([*command, "--method", "topk", "--force"])
    assert files(tmp_path / "dense") == old  # until the new one is whole
    main([*command, "--method", "topk", "--force"])
    convert(tmp_path / "moe", tmp_path / "other", "topk", "active", calibration=text)
    assert files(tmp_path / "dense") == files(tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "moe", "other", "text.txt"]


def test_a_changed_moe_is_noticed(tmp_path):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    convert(tmp_path / "moe", tmp_path / "dense", "average")
    moe("mixtral", seed=1).save_pretrained(tmp_path / "moe")
    with pytest.raises(FileExistsError, match="other arguments: source_stamp; force=True"):
        convert(tmp_path / "moe", tmp_path / "dense", "average")


def test_what_a_call_has_not_made_is_not_replaced(tmp_path):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    with pytest.raises(FileExistsError, match="destination: expected a folder that is not there or empty"):
        convert(tmp_path / "moe", tmp_path / "moe", "average", force=True)
    dense = tmp_path / "dense"
    convert(tmp_path / "moe", dense, "average")
    (dense / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"expected only files of an earlier call, .*dense: notes\.txt"):
        convert(tmp_path / "moe", dense, "topk", force=True)
    assert convert(tmp_path / "moe", dense, "average").shape[0] == 3
    (dense / "notes.txt").unlink()
    (dense / "model.safetensors").unlink()
    with pytest.raises(FileExistsError, match=r"dense lacks its model\.safetensors; force=True makes it again"):
        convert(tmp_path / "moe", dense, "average")
    convert(tmp_path / "moe", dense, "average", force=True)
    (dense / "distillation.json").write_text("{}")  # trained since, perhaps for days
    for force in (False, True):
        with pytest.raises(FileExistsError, match="destination: expected a folder that is not there"):
            convert(tmp_path / "moe", dense, "average", force=force)


@pytest.mark.parametrize("killed", [1, 2])
def test_a_replacement_that_is_killed_leaves_the_old_or_the_new_one(killed, tmp_path, monkeypatch):
    """At each of its two moves."""
    place = tmp_path / "out"
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.bin").touch()
    Place(place, "out", "conversion.json", False).put(tmp_path / "old", {})
    replace, left = os.replace, [killed]

    def stopping(one, two):
        if not str(one).endswith(".json") and ".tmp" not in str(one):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
        replace(one, two)

    with monkeypatch.context() as patch:
        patch.setattr("ones_lib.checkpoints.place.os.replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            Place(place, "out", "conversion.json", True).put(tmp_path / "new", {})
    Place(place, "out", "conversion.json", True).put(tmp_path / "new", {})
    assert sorted(p.name for p in place.iterdir()) == ["conversion.json", "new.bin"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# --- files ------------------------------------------------------------------------------------------------------------


def test_weights_are_in_files_of_the_size_that_transformers_writes(tmp_path, monkeypatch):
    assert inspect.signature(PreTrainedModel.save_pretrained).parameters["max_shard_size"].default == "50GB"
    assert work.FILE_SIZE == 50 * 10**9
    moe("mixtral").save_pretrained(tmp_path / "moe")
    convert(tmp_path / "moe", tmp_path / "one", "average")
    assert not list((tmp_path / "one").glob("model-*"))
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    twin = load_language_model(tmp_path / "one")
    twin.save_pretrained(tmp_path / "transformers")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "transformers"))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)

    monkeypatch.setattr(work, "FILE_SIZE", 20_000)
    convert(tmp_path / "moe", tmp_path / "many", "average")
    paths = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [p.name for p in paths] == [
        f"model-{i:05d}-of-{len(paths):05d}.safetensors" for i in range(1, len(paths) + 1)
    ]
    assert len(paths) > 4
    found = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert all(sum(t.nbytes for t in load_file(path).values()) <= 20_000 for path in paths)
    torch.testing.assert_close(found, ours, atol=0, rtol=0)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in ours.values())
    close(logits(load_language_model(tmp_path / "many")), logits(twin), atol=0)


def test_files_are_joined_after_a_kill(tmp_path, monkeypatch):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    monkeypatch.setattr(work, "FILE_SIZE", 20_000)
    convert(tmp_path / "moe", tmp_path / "whole", "average")
    join, left, stops = Shards.join, [0], 0

    def stopping(*arguments):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        join(*arguments)

    monkeypatch.setattr(Shards, "join", stopping)
    while not (tmp_path / "dense").exists():
        left[0] = 3
        try:
            convert(tmp_path / "moe", tmp_path / "dense", "average")
        except KeyboardInterrupt:
            stops += 1
            monkeypatch.setattr(Work, "convert_block", None)  # none is made again
    assert stops > 1
    assert files(tmp_path / "dense") == files(tmp_path / "whole")


def test_joined_tensors_are_what_they_were(tmp_path):
    """Of several dtypes, without dimensions, and empty."""
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7).bfloat16(), "n": torch.tensor(3), "none": torch.empty(0, 2)}
    save_file({name: tensors[name] for name in ("b", "n")}, tmp_path / "0.safetensors")
    save_file({name: tensors[name] for name in ("a", "none")}, tmp_path / "1.safetensors")
    Shards(tmp_path).join(tensors, tmp_path / "all")
    torch.testing.assert_close(load_file(tmp_path / "all"), tensors, atol=0, rtol=0)
    save_file(tensors, tmp_path / "library", {"format": "pt"})
    assert (tmp_path / "all").read_bytes()[-60:] == (tmp_path / "library").read_bytes()[-60:]


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_a_text_that_is_shorter_than_asked_for_is_said(tmp_path, capsys):
    text = with_tokenizer(tmp_path / "moe")
    there = text_blocks(text, tmp_path / "moe").numel()
    with pytest.warns(
        UserWarning, match=rf"calibration_tokens: asked for 1,000,000, takes the {there:,} that text.txt has"
    ):
        convert(tmp_path / "moe", tmp_path / "dense", "average", calibration=text, calibration_tokens=10**6)
    facts = json.loads((tmp_path / "dense" / "conversion.json").read_text())
    assert facts["calibration_tokens"] == 10**6
    assert {key: facts["calibration"][key] for key in ("text", "tokens")} == {"text": "text.txt", "tokens": there}
    assert f"run on {there:,} tokens of text.txt" in (tmp_path / "dense" / "README.md").read_text()
    with pytest.warns(UserWarning, match="calibration_tokens: asked for 10, takes 64, one block"):
        convert(tmp_path / "moe", tmp_path / "few", "average", calibration=text, calibration_tokens=10)
    with warnings.catch_warnings():  # a default that is more than there is, and a rest of less than a block
        warnings.simplefilter("error")
        convert(tmp_path / "moe", tmp_path / "default", "average", calibration=text)
        convert(tmp_path / "moe", tmp_path / "rest", "average", calibration=text, calibration_tokens=there + 60)
    source, dense = str(tmp_path / "moe"), str(tmp_path / "command")
    run = [sys.executable, "-m", "ones_lib.checkpoints", "convert", source, dense, "--calibration", str(text)]
    done = subprocess.run(
        [*run, "--calibration-tokens", "1M", "--method", "average"], capture_output=True, text=True, check=True
    )
    assert f"warning: --calibration-tokens: asked for 1,000,000, takes the {there:,} that text.txt has\n" in done.stderr
    assert f"calibration: {there:,} tokens of text.txt\n" in done.stdout
    with pytest.raises(ValueError, match="calibration_tokens: expected an integer of at least 1, found 0"):
        convert(tmp_path / "moe", tmp_path / "no", "average", calibration=text, calibration_tokens=0)


def test_a_method_of_one_width_gets_it(tmp_path, capsys, monkeypatch):
    """The example of ones_lib/README.md."""

    def median(bank, *, scale=1.0):
        return bank.map(lambda tensor: scale * tensor.median(dim=0).values)  # noqa: PD011  a tensor

    monkeypatch.setitem(registry._METHODS, "median", median)
    moe("mixtral").save_pretrained(tmp_path / "moe")
    main(["convert", str(tmp_path / "moe"), str(tmp_path / "dense"), "--method", "median"])
    assert load_language_model(tmp_path / "dense").config.intermediate_size == 24
    assert "median gathers to one expert's width: --d-ff expert\n" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "moe"), str(tmp_path / "no"), "--method", "median", "--d-ff", "active"])
    said = "--d-ff: expected the experts' 24 for method 'median', found 48; take --d-ff expert\n"
    assert capsys.readouterr().err == said


def test_a_text_is_a_folder_of_files_at_home_or_has_brackets_in_its_name(tmp_path, monkeypatch):
    with_tokenizer(tmp_path / "moe")
    monkeypatch.setenv("HOME", str(tmp_path))
    texts = [f"{name} has a text of its own, and the quick brown fox jumps over it" for name in "abc"]
    for folder in ("texts", "v[12]", "v1"):
        (tmp_path / folder).mkdir()
    for name, text in zip("abc", texts, strict=True):
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    (tmp_path / "v[12]" / "train.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [*texts, None])
    )
    (tmp_path / "v1" / "train.jsonl").write_text('{"text": "another file"}')
    with pytest.warns(UserWarning, match=r"v\[12\]/train.jsonl: 1 of 4 rows are left out"):
        named = text_blocks(tmp_path / "v[12]" / "train.jsonl", tmp_path / "moe", length=16)
    assert torch.equal(text_blocks("~/texts", tmp_path / "moe", length=16), named)
    assert torch.equal(text_blocks("~/texts", tmp_path / "moe", length=16, split="train"), named)


@pytest.mark.parametrize("option", ["calibration", "reconstruct", "check"])
def test_a_text_that_is_not_there_is_named_as_it_was_typed(option, tmp_path, capsys, monkeypatch):
    with_tokenizer(tmp_path / "moe")
    (tmp_path / "text.md").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "noted").mkdir()
    (tmp_path / "noted" / "train.jsonl").write_text('{"note": "a"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ones_lib.data.text.read_hub", None)  # never asked
    for text, message in {
        "texts/gone.txt": "no such file or folder, 'texts/gone.txt'",
        "gone/gone.jsonl": "no such file or folder",
        "./gone": "no such file or folder",
        "~/gone": "no such file or folder, '~/gone'",
        "/gone/gone": "no such file or folder",
        "a/b/c": "no such file or folder",
        "docstring": "no such file or folder, 'docstring'; expected one, a hub name like owner/name, or 'names' or 'docstrings'",
        "text.md": r"expected a file with one of the endings \.txt, .*, found 'text\.md'",
        "folder": r"expected folder/(train|validation) with one of the endings",
        "noted": r"expected a column 'text', found \['note'\]",
    }.items():
        with pytest.raises(SystemExit) as stop:
            main(["convert", "moe", "dense", f"--{option}", text])
        assert stop.value.code == 1
        said = re.split(r"examples/s\]\n?", capsys.readouterr().err)[-1]  # behind the reader's own bar
        assert re.match(rf"--{option}: (noted: expected a text of .*: )?{message}", said), said
        assert said.count("\n") == 1
        with pytest.raises((OSError, ValueError), match=f"^{option}: "):
            convert("moe", "dense", "average", **{option: text})
    assert not (tmp_path / "dense").exists()


def test_paths_are_expanded(tmp_path, monkeypatch):
    text = with_tokenizer(tmp_path / "moe")
    monkeypatch.setenv("HOME", str(tmp_path))
    main(["convert", "~/moe", "~/dense", "--calibration", f"~/{text.name}", "--check", f"~/{text.name}"])
    assert json.loads((tmp_path / "dense" / "conversion.json").read_text())["check"]["text"] == "text.txt"


def test_values_are_named_as_they_were_typed(tmp_path, capsys):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    moe_folder, dense = str(tmp_path / "moe"), str(tmp_path / "dense")
    for arguments, said in (
        ([str(tmp_path / "gone"), dense], "MOE: expected a folder or a hub name like owner/name, found"),
        ([str(tmp_path / "moe" / "model.safetensors"), dense], "MOE: expected a folder or a hub name"),
        ([moe_folder, moe_folder], "DENSE: expected a folder that is not there or empty"),
        ([moe_folder, dense, "--student-inputs"], "--student-inputs: expected a text to reconstruct on"),
        ([moe_folder, dense, "--approximate"], "--approximate: expected False for mixtral"),
        ([moe_folder, dense, "--option", "rank=3"], "--option rank: gathering method 'topk' has no such option"),
        ([moe_folder, dense, "--method", "readout"], "--calibration: expected a text, which method 'readout' needs"),
        ([moe_folder, dense, "--method", "average", "--d-ff", "30"], "--d-ff: expected a multiple of the experts' 24"),
        (
            [moe_folder, dense, "--calibration", "names", "--calibration-tokens", "0"],
            "--calibration-tokens: expected an integer",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["convert", *arguments])
        assert stop.value.code == 1
        assert capsys.readouterr().err.startswith(said)


# --- memory, command line ---------------------------------------------------------------------------------------------

LIMITED = """
import os, resource, sys
import torch
import pandas
from transformers import AutoConfig
from ones_lib.checkpoints import convert
AutoConfig.for_model("mixtral").save_pretrained(f"{sys.argv[1]}/config")  # both import more
pandas.DataFrame({"name": ["text"]})
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
for method in ("average", "frequency_average"):
    if not os.fork():  # each in a process of its own, which has imported what it takes
        resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), resource.RLIM_INFINITY))
        ids = torch.arange(512).view(4, 128) % 64 if method != "average" else None
        convert(f"{sys.argv[1]}/moe", f"{sys.argv[1]}/{method}", method, calibration=ids)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its address space from /proc")
def test_a_checkpoint_larger_than_the_memory(tmp_path):
    """Under a limit on new address space that is less than the checkpoint; under it the MoE too runs, for the second."""
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=64,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=20,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = new_model(config)
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    model.save_pretrained(tmp_path / "moe", max_shard_size="25MB")
    size = sum(f.stat().st_size for f in (tmp_path / "moe").iterdir())
    layer = 8 * 3 * 512 * 512 * 2
    limit = 2 * layer + 150 * 10**6  # threads, and what torch maps when it first computes
    assert size > 1.3 * limit
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(limit)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    for method in ("average", "frequency_average"):
        assert (tmp_path / method / "config.json").exists()


def test_a_hub_name_is_taken_from_the_cache(tmp_path, monkeypatch):
    """As downloaded: by its name, and the card says which revision."""
    moe("mixtral").save_pretrained(tmp_path / "snapshots" / "0123abc")
    asked = []
    module = sys.modules[convert.__module__]  # as an attribute of the package it is the function
    folder = str(tmp_path / "snapshots" / "0123abc")
    monkeypatch.setattr(module, "snapshot_download", lambda name, **_: asked.append(name) or folder)
    convert("owner/some-moe", tmp_path / "dense", "average")
    assert asked == ["owner/some-moe"]
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "base_model: owner/some-moe" in card
    assert "of owner/some-moe (mixtral, revision 0123abc) by" in card
    assert json.loads((tmp_path / "dense" / "conversion.json").read_text())["revision"] == "0123abc"


def test_the_command_line(tmp_path, capsys):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    source, destination = str(tmp_path / "moe"), str(tmp_path / "dense")
    main([source, destination, "--method", "svd", "--d-ff", "expert", "--option", "rank=3", "--option", "scale=0.5"])
    convert(source, tmp_path / "other", "svd", rank=3, scale=0.5)
    assert files(tmp_path / "dense") == files(tmp_path / "other")
    capsys.readouterr()
    main([source, str(tmp_path / "default")])
    convert(source, tmp_path / "active", "topk", d_ff=48)  # two experts of 24 a token
    assert files(tmp_path / "default") == files(tmp_path / "active")
    main([source, str(tmp_path / "wider"), "--d-ff", "1.5x"])
    convert(source, tmp_path / "of 72", "topk", d_ff=72)
    assert files(tmp_path / "wider") == files(tmp_path / "of 72")
    assert "model.layers.2.mlp" in capsys.readouterr().out
    for width, message in (
        ("wide", "expected a number, 'active', a multiple of it such as '4x', or 'expert', found 'wide'"),
        ("0x", "found '0x'"),
        ("0", "--d-ff: expected an"),
    ):
        with pytest.raises(SystemExit):
            main([source, str(tmp_path / "no"), "--d-ff", width])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([source, source])
    assert stop.value.code == 1
    assert "DENSE: expected a folder that is not there or empty" in capsys.readouterr().err
    main(["convert", source, str(tmp_path / "named")])
    assert files(tmp_path / "named") == files(tmp_path / "active")
    for arguments, said in (
        (["--help"], "Nearly every MoE type of transformers"),
        (["--version"], ones_lib.__version__),
        (["convert", "--version"], ones_lib.__version__),
        (["inspect", "--version"], ones_lib.__version__),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert said in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([])
    assert "expected a command, inspect or convert" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "olmoe", "nemotron_h", "qwen3_5_moe_text", "jamba"]
)
def test_a_twin_can_be_trained(kind, tmp_path):
    """By the study's loop: logits, a balance loss that is a number, gradients for every weight but one expert's router."""
    moe(kind).save_pretrained(tmp_path / "moe")
    convert(tmp_path / "moe", tmp_path / "dense", "topk")
    student = LanguageModel(load_language_model(tmp_path / "dense")).train()
    loss = cross_entropy(student(TOKENS).flatten(0, 1), TOKENS[:, 1:].flatten()) + student.balance_loss()
    loss.backward()
    without = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(re.search(r"mlp\.(gate|router)\.", name) for name in without), without


def test_the_command_says_both_perplexities_and_what_is_wrong_with_a_text(tmp_path, capsys):
    text = with_tokenizer(tmp_path / "moe")
    source = str(tmp_path / "moe")
    main([source, str(tmp_path / "dense"), "--check", str(text)])
    card = (tmp_path / "dense" / "README.md").read_text()
    printed = capsys.readouterr().out
    found = re.search(
        r"check: ([\d,]+) tokens of text.txt\nperplexity: MoE ([\d.]+), dense ([\d.]+)\nKL to the MoE: ([\d.]+)\n",
        printed,
    )
    assert f"Perplexity on {found[1]} tokens of text.txt: MoE {found[2]}, this model {found[3]}." in card
    assert f"KL to the MoE: {found[4]}." in card
    assert "Below 0.05 a model can hardly be told apart" in printed
    (tmp_path / "binary.txt").write_bytes(b"\x00\xdb\xff" * 100)
    (tmp_path / "short.txt").write_text("three short words")
    for name in ("binary.txt", "short.txt"):
        with pytest.raises(SystemExit):
            main([source, str(tmp_path / "no"), "--check", str(tmp_path / name)])
        said = capsys.readouterr().err
        assert re.search(rf"--check: .*{name}: expected a text of", said)
        assert said.count("\n") == 1


@pytest.mark.parametrize("kind", ["qwen3_moe", "glm4_moe"])
def test_experts_are_selected_by_the_routers_own_probabilities(kind, tmp_path):
    """PP, by the logits that transformers' router gives: their softmax, or their sigmoids."""
    model, seen = moe(kind), {}
    model.save_pretrained(tmp_path / "moe")
    ids = torch.randint(3, 64, (20, 24), generator=torch.Generator().manual_seed(3))
    for i, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate") and hasattr(layer.mlp, "experts"):
            layer.mlp.gate.register_forward_hook(lambda module, x, found, i=i: seen.update({i: found[0]}))
    with torch.no_grad():
        model(ids)
    options = {"calibration": ids, "calibration_tokens": ids.numel(), "score": "pp"}
    convert(tmp_path / "moe", tmp_path / "dense", "expert_selection", "active", **options)
    twin, banks = load_language_model(tmp_path / "dense"), open_experts(model)
    assert len(seen) == 2
    order = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(0))[: 3 * ids.numel() // 4]
    for i, logits in seen.items():
        probabilities = logits.sigmoid() if kind == "glm4_moe" else logits.softmax(dim=-1)
        best = probabilities.flatten(0, -2)[order].mean(dim=0).topk(2).indices
        expected = banks[f"model.layers.{i}.mlp.experts"].up[best].flatten(0, 1)
        close(twin.model.layers[i].mlp.up_proj.weight[: len(expected)], expected)
