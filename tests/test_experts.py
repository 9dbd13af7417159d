"""Experts out of models, records and files, in every layout; and that no more is read than asked for."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import random_bank
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)

from ones_lib import FeedForwardWeights
from ones_lib.checkpoints import open_experts
from ones_lib.checkpoints.shards import Shards
from ones_lib.data.files import model_tensors
from ones_lib.models.causal import new_model
from ones_lib.study.running import load_record, record_activations

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def assert_same(found, expected):
    assert dict(found.tensors()).keys() == dict(expected.tensors()).keys()
    for name, tensor in expected.tensors():
        assert torch.equal(getattr(found, name), tensor), name


def test_a_records_experts_are_those_of_its_model(tiny_record, tmp_path):
    record, cache_dir = tiny_record
    model, _ = load_record(record, cache_dir)
    save_file({n: t.clone() for n, t in model_tensors(model).items()}, tmp_path / "copy.safetensors")
    for source in (model, str(record.weights_file), tmp_path):
        banks = open_experts(source)
        assert list(banks) == ["blocks.0.mlp"]  # shared across depth
        assert_same(banks["blocks.0.mlp"], model.blocks[0].mlp.bank().map(torch.Tensor.detach))


def test_a_records_activations_are_the_same_every_time(tiny_record):
    record, cache_dir = tiny_record
    first, again = (record_activations(record, cache_dir, max_tokens=50)["blocks.0.mlp"] for _ in range(2))
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.outputs, again.outputs)
    assert first.inputs.shape == (50, 8)
    assert first.inputs.dtype == torch.float64


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**SMALL, intermediate_size=24, num_local_experts=3),
        Qwen3MoeConfig(**SMALL, head_dim=8, moe_intermediate_size=24, num_experts=3, num_experts_per_tok=2),
    ],
    ids=["mixtral", "qwen3_moe"],
)
def test_transformers_models_in_memory_and_in_files(config, tmp_path):
    """One tensor for all experts in memory, one an expert on disk, in several files; and they compute what the model does."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    in_memory, in_files = open_experts(model), open_experts(tmp_path)
    assert len(in_memory) == len(in_files) == 2
    for one, two in zip(in_memory.values(), in_files.values(), strict=True):
        assert one.up.shape == (3, 24, 16)
        assert_same(two, one)

    layer = model.model.layers[1].mlp
    x = torch.randn(5, 16)
    bank = list(in_files.values())[1]
    for e in range(3):  # the model's own experts, each token sent to expert e alone
        chosen, gates = torch.full((5, 1), e), torch.ones(5, 1)
        expected = layer.experts(x, chosen, gates)
        torch.testing.assert_close(bank.expert(e).apply(x, torch.nn.functional.silu), expected)


def test_only_the_layer_asked_for_is_read(tmp_path, monkeypatch):
    bank = random_bank(3, gated=True)
    tensors = {"embedding": torch.randn(5, 8)}
    for layer in range(3):
        for e in range(3):
            for part, name in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
                bias = bank.down_bias if part == "down" else getattr(bank, f"{part}_bias")
                for kind, tensor in (("weight", getattr(bank, part)), ("bias", bias)):
                    tensors[f"layers.{layer}.mlp.experts.{e}.{name}.{kind}"] = tensor[e].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    read = []
    whole = Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, name: read.append(name) or whole(self, name))
    banks = open_experts(tmp_path / "model.safetensors")
    assert read == []
    assert list(banks) == [f"layers.{i}.mlp.experts" for i in range(3)]
    assert_same(banks["layers.1.mlp.experts"], bank)
    assert read
    assert all(name.startswith("layers.1.") for name in read)


def test_which_files_of_a_folder_are_read(tmp_path):
    """As transformers does: model.safetensors; without it, those that the index names; without that, all."""
    for name, value in {"model": 1.0, "a": 2.0, "b": 3.0}.items():
        save_file({name: torch.full((2,), value)}, tmp_path / f"{name}.safetensors")
    assert list(Shards(tmp_path).shapes) == ["model"]
    assert list(Shards(tmp_path / "a.safetensors").shapes) == ["a"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    with pytest.warns(UserWarning, match="takes model.safetensors, as transformers does, and not a.safetensors, which"):
        assert list(Shards(tmp_path).shapes) == ["model"]
    (tmp_path / "model.safetensors").unlink()
    assert list(Shards(tmp_path).shapes) == ["a"]
    index.unlink()
    shards = Shards(tmp_path)
    assert shards.shapes == {"a": [2], "b": [2]}
    assert shards.read("b").tolist() == [3.0, 3.0]
    shards.read("b").zero_()  # stays out of the file
    assert shards.read("b").tolist() == [3.0, 3.0]


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a safetensors file or a folder of them, found \[\]"):
        open_experts(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors: expected"):
        open_experts(tmp_path / "gone.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(ValueError, match=r"text\.safetensors: expected a whole safetensors file, found 15 bytes of"):
        open_experts(tmp_path / "text.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match=r"empty\.safetensors: expected layers of 2 experts or more.*among 0 tensors"):
        open_experts(tmp_path / "empty.safetensors")
    save_file({"dense.up": torch.ones(1, 4, 2), "dense.down": torch.ones(1, 2, 4)}, tmp_path / "dense.safetensors")
    with pytest.raises(
        ValueError, match=r"dense\.safetensors: expected layers of 2 experts or more.*found none among 2"
    ):
        open_experts(tmp_path / "dense.safetensors")


def test_a_layer_that_lacks_an_expert_or_is_quantised_is_refused(tmp_path):
    names = [f"l.experts.{e}.{part}.weight" for e in range(3) for part in ("w1", "w2", "w3")]
    tensors = {n: torch.ones(2, 4) if "w2" in n else torch.ones(4, 2) for n in names}
    save_file({n: t for n, t in tensors.items() if n != "l.experts.1.w3.weight"}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"l\.experts: expected up of experts 0 to 2, found none of \[1\]"):
        open_experts(tmp_path / "a.safetensors")["l.experts"]
    save_file({n: t.to(torch.int8) for n, t in tensors.items()}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"w1\.weight: expected weights that are not quantised, found I8"):
        open_experts(tmp_path / "b.safetensors")["l.experts"]


@pytest.mark.parametrize(
    "config",
    [
        GptOssConfig(**SMALL, head_dim=8, intermediate_size=24, num_local_experts=3, num_experts_per_tok=1),
        GraniteMoeConfig(**SMALL, intermediate_size=24, num_local_experts=3, num_experts_per_tok=1),
        SwitchTransformersConfig(
            vocab_size=32,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            num_experts=3,
            num_sparse_encoder_layers=1,
        ),
    ],
    ids=["gpt_oss", "granitemoe", "switch_transformers"],
)
def test_other_layouts_in_memory_and_in_files(config, tmp_path):
    """GPT-OSS's transposed matrices, with gate and up by turns and biases; Granite's names; Switch's own numbering."""
    torch.manual_seed(0)
    model = new_model(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    model.save_pretrained(tmp_path)
    in_memory, in_files = open_experts(model), open_experts(tmp_path)
    assert len(in_memory) == len(in_files) > 0
    for layer in in_files:
        assert_same(in_files[layer], in_memory[layer])
        assert_same(FeedForwardWeights.stack(in_files.experts(layer)), in_files[layer])
        assert in_files[layer].up.shape == (3, 24, 16)
    layer, x = list(in_memory)[-1], torch.randn(5, 16)
    experts, expert = model.get_submodule(layer), in_memory[layer].expert(1)
    if config.model_type == "gpt_oss":  # gate * sigmoid(alpha * gate) * (up + 1), clamped
        gate, up = F.linear(x, expert.gate, expert.gate_bias), F.linear(x, expert.up, expert.up_bias)
        gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
        expected = F.linear(gate * (experts.alpha * gate).sigmoid() * (up + 1), expert.down, expert.down_bias)
    else:
        expected = expert.apply(x, F.silu if config.model_type == "granitemoe" else F.relu)
    if config.model_type == "switch_transformers":
        found = experts["expert_1"](x)
    else:
        found = experts(x, torch.full((5, 1), 1), torch.ones(5, 1))
    torch.testing.assert_close(found, expected)
