"""Quantised checkpoints read in bfloat16: against transformers' own dequantisation, bit for bit, and loops."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from math import ceil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_moes import moe, perplexity
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ones_lib.checkpoints import convert, open_experts, quantised
from ones_lib.checkpoints.quantised import Dequantised, readable, without_quantization
from ones_lib.checkpoints.shards import Shards
from ones_lib.checkpoints.stream import load_checkpoint
from ones_lib.models.causal import model_config

FP8, EXPONENT = torch.float8_e4m3fn, torch.float8_e8m0fnu


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def stored(tmp_path):
    """Saves tensors and opens them."""

    def save(tensors, **quantization):
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        return Dequantised(Shards(tmp_path), {"quant_method": "fp8"} | quantization)

    return save


def numbers(*shape, dtype=FP8, seed=0):
    """Every finite code there is."""
    codes = torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    if dtype in (torch.uint8, torch.int8):
        return codes.view(dtype)
    finite = codes.view(dtype).to(torch.float32).isfinite()
    return torch.where(finite, codes, torch.ones_like(codes)).view(dtype)


def scales(*shape, dtype=torch.float32):
    if dtype in (torch.uint8, EXPONENT):
        return numbers(*shape, dtype=torch.uint8, seed=1).clamp(max=250).view(dtype)
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)).add(0.01).to(dtype)


def equal(found, expected):
    """Bit for bit, signs of zeros too."""
    assert found.dtype == expected.dtype == torch.bfloat16
    assert found.shape == expected.shape
    assert torch.equal(found.contiguous().view(torch.int16), expected.contiguous().view(torch.int16))


def transformers_fp8(weight, scale):
    return Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)


# --- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "scale", "block"),
    [
        (numbers(256, 384), scales(2, 3), [128, 128]),
        (numbers(48, 32), scales(3, 2), [16, 16]),
        (numbers(48, 32), scales(3, 2, dtype=torch.bfloat16), [16, 16]),
        (numbers(48, 32), scales(3, 2, dtype=torch.float16), [16, 16]),
        (numbers(48, 32), scales(3, 2, dtype=EXPONENT), [16, 16]),
        (numbers(48, 32, dtype=torch.float8_e5m2), scales(3, 2), [16, 16]),
        (numbers(48, 64), scales(48, 2, dtype=torch.uint8), [1, 32]),
        (numbers(48, 64), scales(48, 2, dtype=EXPONENT), [128, 128]),
        (numbers(48, 32), scales(1), None),
        (numbers(48, 32), scales(1, 1), None),
        (numbers(48, 32), scales(48, 1), None),
        (numbers(48, 32, dtype=torch.int8), scales(48, 2, dtype=EXPONENT), [128, 128]),
        (numbers(3, 32, 48), scales(3, 2, 3), [16, 16]),
        (numbers(3, 32, 48), scales(3, 32, 1), None),
        (numbers(3, 32, 48), scales(3, 1, 1), None),
        (numbers(3, 32, 48, dtype=torch.int8), scales(3, 32, 3, dtype=torch.uint8), [128, 128]),
        (numbers(2300, 2048), scales(2300, 64, dtype=torch.uint8), [1, 32]),  # in several pieces
        (numbers(2304, 2048), scales(18, 16), [128, 128]),
    ],
    ids=lambda x: f"{x.dtype} {list(x.shape)}" if torch.is_tensor(x) else str(x),
)
def test_fp8_is_dequantised_as_transformers_does(weight, scale, block, stored):
    checkpoint = stored({"a.weight": weight, "a.weight_scale_inv": scale}, weight_block_size=block)
    expected = transformers_fp8(weight, scale.view(1, 1) if scale.numel() == 1 else scale)
    equal(checkpoint.read("a.weight"), expected)
    assert checkpoint.shapes == {"a.weight": list(expected.shape)}


def test_mxfp4_is_dequantised_as_transformers_does(stored):
    blocks, exponents = numbers(3, 40, 4, 16, dtype=torch.uint8), scales(3, 40, 4, dtype=torch.uint8)
    checkpoint = stored({"a.down_proj_blocks": blocks, "a.down_proj_scales": exponents}, quant_method="mxfp4")
    equal(checkpoint.read("a.down_proj"), convert_moe_packed_tensors(blocks, exponents))
    assert checkpoint.shapes == {"a.down_proj": [3, 128, 40]}
    assert checkpoint.files == {"a.down_proj": "model.safetensors"}


def test_fp4_numbers_with_a_dtype_of_their_own(tmp_path, monkeypatch):
    """F4, which files have with the shape before packing."""
    packed, exponents = numbers(48, 32, dtype=torch.int8), scales(48, 2, dtype=torch.uint8)
    entries = {"a.weight": ("F4", [48, 64], [0, 1536]), "a.weight_scale_inv": ("U8", [48, 2], [1536, 1632])}
    keys = ("dtype", "shape", "data_offsets")
    header = json.dumps({name: dict(zip(keys, entry, strict=True)) for name, entry in entries.items()}).encode()
    data = packed.numpy().tobytes() + exponents.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    monkeypatch.setattr(Shards, "raw", lambda _, name: packed.view(torch.uint8) if name == "a.weight" else exponents)
    checkpoint = Dequantised(Shards(tmp_path), {"quant_method": "fp8", "expert_dtype": "fp4"})
    equal(checkpoint.read("a.weight"), transformers_fp8(packed, exponents))
    assert checkpoint.shapes == {"a.weight": [48, 64]}


COMMON = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "dtype": "bfloat16"}
COMMON |= {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 32, "pad_token_id": 0}
MODELS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "deepseek_v3": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2}
    | {"topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16}
    | {"qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4, "head_dim": 16},
    "deepseek_v4": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}
    | {"q_lora_rank": 32, "o_lora_rank": 32, "o_groups": 2, "num_key_value_heads": 1, "index_n_heads": 2}
    | {"index_head_dim": 32, "qk_rope_head_dim": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def saved(kind, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON | MODELS[kind]), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def same_model(plain, quantised_folder, tensors, config, quantization, loading):
    """A folder's tensors as transformers dequantises them and as they are read here, each in its place of the model."""
    save_file(tensors, quantised_folder / "model.safetensors", {"format": "pt"})
    (quantised_folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    checkpoint = readable(Shards(quantised_folder), AutoConfig.from_pretrained(quantised_folder))
    read = {name: checkpoint.read(name).contiguous() for name in checkpoint.shapes}
    assert {name: list(tensor.shape) for name, tensor in read.items()} == checkpoint.shapes
    save_file(read, plain / "model.safetensors", {"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(quantised_folder, quantization_config=loading, dtype=torch.bfloat16)
    found = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    expected, found = expected.state_dict(), found.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_an_fp8_model_is_read_as_transformers_loads_it(kind, tmp_path):
    plain, folder = tmp_path / "plain", tmp_path / "fp8"
    folder.mkdir()
    tensors, config = saved(kind, plain)
    chosen = [n for n in tensors if re.search(r"(_proj|_proj_with_mqa|_[ab]_proj|experts\.\d+\.w\d)\.weight$", n)]
    assert len([name for name in chosen if ".experts." in name]) == 3 * 4 * (1 if kind == "deepseek_v3" else 2)
    for name in chosen:
        weight = tensors[name].float()
        tiles = weight.unfold(0, 16, 16).unfold(1, 16, 16)
        scale = tiles.abs().amax((2, 3)) / 448
        tensors[name] = (weight / scale.repeat_interleave(16, 0).repeat_interleave(16, 1)).to(FP8)
        tensors[f"{name}_scale_inv"] = scale
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    same_model(plain, folder, tensors, config, quantization, FineGrainedFP8Config(dequantize=True))


def test_a_model_with_experts_in_fp4_is_read_as_transformers_loads_it(tmp_path):
    """DeepSeek-V4, with tables of integers and exponents called "scale"."""
    plain, folder = tmp_path / "plain", tmp_path / "fp4"
    folder.mkdir()
    tensors, config = saved("deepseek_v4", plain)
    for name in [name for name in tensors if re.search(r"\.(w\d|w[qo]_[ab])\.weight$", name)]:
        rows, columns = tensors[name].shape
        four = ".experts." in name
        tensors[name] = numbers(rows, columns // 2, dtype=torch.int8) if four else numbers(rows, columns)
        grid = (rows, columns // 32) if four else (rows // 16, columns // 16)
        exponents = torch.randint(110, 120, grid, dtype=torch.uint8)
        tensors[name.removesuffix("weight") + "scale"] = exponents.view(EXPONENT)
    assert sum(tensor.dtype == torch.int8 for tensor in tensors.values()) == 2 * 4 * 3
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16], "scale_fmt": "ue8m0", "expert_dtype": "fp4"}
    same_model(plain, folder, tensors, config, quantization, FineGrainedFP8Config(dequantize=True))


def test_an_mxfp4_model_is_read_as_transformers_loads_it(tmp_path):
    plain, folder = tmp_path / "plain", tmp_path / "mxfp4"
    folder.mkdir()
    tensors, config = saved("gpt_oss", plain)
    for name in [name for name in tensors if re.search(r"experts\.(gate_up|down)_proj$", name)]:
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = numbers(experts, rows, columns // 32, 16, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(110, 130, (experts, rows, columns // 32), dtype=torch.uint8)
    assert sum(name.endswith("_blocks") for name in tensors) == 4
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}
    same_model(plain, folder, tensors, config, quantization, Mxfp4Config(dequantize=True))


# --- what transformers does not dequantise ----------------------------------------------------------------------------


def by_element(weight, scale, height, width):
    """In exact arithmetic, rounded once."""
    made = torch.empty(weight.shape, dtype=torch.float64)
    weight, scale = weight.double(), scale.double()
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            made[i, j] = weight[i, j] * scale[i // height, j // width]
    return made.to(torch.bfloat16)


@pytest.mark.parametrize(("rows", "columns"), [(40, 25), (33, 32), (16, 17), (5, 3), (96, 64)])
def test_the_last_blocks_are_smaller(rows, columns, stored):
    weight = numbers(rows, columns)
    scale = scales(ceil(rows / 16), ceil(columns / 8), dtype=torch.bfloat16)  # products with few digits: one rounding
    checkpoint = stored({"a.weight": weight, "a.weight_scale_inv": scale}, weight_block_size=[16, 8])
    equal(checkpoint.read("a.weight"), by_element(weight, scale, 16, 8))


@pytest.mark.parametrize("groups", [{}, {"group_0": {"weights": {}}}])
def test_a_last_block_of_deepseek(groups, stored):
    weight, scale = numbers(576, 256), scales(5, 2)
    read = stored({"a.weight": weight, "a.weight_scale_inv": scale}, config_groups=groups).read("a.weight")
    for i in range(5):
        for j in range(2):
            rows, columns = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            equal(read[rows, columns], (weight[rows, columns].float() * scale[i, j]).bfloat16())


def scheme(**weights):
    """A compressed-tensors config."""
    weights = {"type": "float", "num_bits": 8, "symmetric": True} | weights
    groups = {"group_0": {"weights": weights, "targets": ["Linear"]}, "group_1": {"weights": None}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


PLAIN = {"weight_block_size": None}
FBGEMM = {"quant_method": "fbgemm_fp8"}
DROPPED = ("a.input_scale", "a.activation_scale", "a.input_zero_point", "a.input_scale_ub", "b.self_attn.k_scale")
DROPPED += ("b.self_attn.kv_scale", "b.k_proj.output_scale", "a.qscale_act", "experts.down_proj_input_scale")


@pytest.mark.parametrize(
    ("weight", "scale", "stored_as", "grid", "block", "quantization"),
    [
        ("a.weight", "a.weight_scale", [], (1, 1), (48, 32), PLAIN),
        ("a.weight", "a.weight_scale", [48], (48, 1), (1, 32), {"quant_method": "modelopt", "quant_algo": "FP8"}),
        (
            "a.weight",
            "a.weight_scale",
            [3, 1, 2, 1],
            (3, 2),
            (16, 16),
            {"quant_method": "modelopt", "quant_algo": "fp8_pb_wo", "weight_block_size": [16, 16]},
        ),
        ("a.weight", "a.weight_scale", [48, 1], (48, 1), (1, 32), FBGEMM),
        ("a.weight", "a.weight_scale", [3, 2], (3, 2), (16, 18), scheme(strategy="block", block_structure=[16, 18])),
        ("a.weight", "a.weight_scale", [48, 4], (48, 4), (1, 10), scheme(strategy="group", group_size=10)),
        ("a.weight", "a.weight_scale", [48, 1], (48, 1), (1, 32), scheme(strategy="channel")),
        ("a.weight", "a.scale", [1, 1], (1, 1), (128, 128), {}),
        ("a.weight", "a.qscale_weight", [], (1, 1), (48, 32), PLAIN),
        ("experts.down_proj", "experts.down_proj_weight_scale", [3], (3, 1, 1), (48, 32), PLAIN),
        ("experts.gate_up_proj", "experts.gate_up_proj_scale_inv", [3, 2, 1], (3, 2, 1), (24, 32), PLAIN),
        (
            "experts.gate_up_proj",
            "experts.gate_up_proj_scale_inv",
            [3, 2, 2],
            (3, 2, 2),
            (24, 16),
            {"weight_block_size": [128, 16]},
        ),
        ("experts.gate_up_proj", "experts.gate_up_proj_scale", [3, 1, 32], (3, 1, 32), (48, 1), FBGEMM),
        ("experts.down_proj", "experts.down_proj_scale", [3, 32, 1], (3, 1, 32), (48, 1), FBGEMM),
    ],
)
def test_other_names_and_shapes_of_scales(weight, scale, stored_as, grid, block, quantization, stored):
    """What belongs to activations is dropped, and what is not quantised read as it is."""
    values, factors = numbers(*grid[:-2], 48, 32), scales(*grid)
    plain = {"b.norm.weight": torch.ones(5, dtype=torch.float16), "c.scale": torch.ones(3)}
    tensors = {weight: values, scale: factors.view(stored_as)} | plain | dict.fromkeys(DROPPED, torch.ones(()))
    checkpoint = stored(tensors, **quantization)
    spread = factors.repeat_interleave(block[0], -2)[..., :48, :].repeat_interleave(block[1], -1)[..., :32]
    equal(checkpoint.read(weight), (values.float() * spread).to(torch.bfloat16))
    assert checkpoint.shapes == {weight: list(values.shape), "b.norm.weight": [5], "c.scale": [3]}
    assert checkpoint.files == dict.fromkeys(checkpoint.shapes, "model.safetensors")
    for name, tensor in plain.items():
        assert_close(checkpoint.read(name), tensor, rtol=0, atol=0)
    assert [path.name for path in checkpoint.paths()] == ["model.safetensors"]


def test_readable(tmp_path):
    save_file({"a.weight": numbers(4, 4), "a.weight_scale": torch.ones(())}, tmp_path / "model.safetensors")
    shards, config = Shards(tmp_path), AutoConfig.for_model("mixtral")
    assert readable(shards, config) is shards
    config.quantization_config = {"quant_method": "fp8"}
    assert readable(shards, config).shapes == {"a.weight": [4, 4]}
    config = AutoConfig.for_model("llava")
    config.text_config.quantization_config = {"quant_method": "fp8"}
    assert readable(shards, config).shapes == {"a.weight": [4, 4]}


# --- memory -----------------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from pathlib import Path
import torch
from ones_lib.checkpoints.quantised import Dequantised
from ones_lib.checkpoints.shards import Shards

torch.set_num_threads(1)
status = lambda key: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
folder, method, limit = sys.argv[1:]
checkpoint = Dequantised(Shards(Path(folder)), {"quant_method": method})
checkpoint.read("small")
resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + int(limit), resource.RLIM_INFINITY))
for checkpoint.scratch in (Path(folder), None):
    before = status("RssAnon")
    read = checkpoint.read("big")
    print(status("RssAnon") - before, read[..., -1, :].double().sum().item())
    del read
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from /proc")
@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_a_tensor_is_dequantised_in_pieces(method, tmp_path):
    """In an address space with room for the quantised and the bfloat16 tensor, but for no float32 copy."""
    rows = 24 * 1024
    if method == "fp8":
        tensors = {"big": torch.ones(rows, 2048).to(FP8), "big_scale_inv": torch.full((rows // 128, 16), 0.5)}
    else:
        blocks = torch.full((1, rows, 64, 16), 0x22, dtype=torch.uint8)  # ones
        tensors = {"big_blocks": blocks, "big_scales": torch.full(blocks.shape[:3], 126, dtype=torch.uint8)}
    small = {"small": torch.ones(64, 64).to(FP8), "small_scale": torch.ones(())}
    save_file(tensors | small, tmp_path / "model.safetensors")
    size, quantised_bytes = rows * 2048, sum(t.nbytes for t in tensors.values())
    limit = 2 * size + quantised_bytes + 72 * 2**20
    assert limit < 4 * size + quantised_bytes
    command = [sys.executable, "-c", LIMITED, str(tmp_path), method, str(limit)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "100000"}
    done = subprocess.run(command, capture_output=True, env=environment, text=True)
    assert done.returncode == 0, done.stderr
    (in_scratch, total), (in_memory, again) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert total == again == 0.5 * (2048 if method == "fp8" else rows)
    assert in_scratch < 0.2 * in_memory
    assert in_memory > 1.9 * size
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_scratch_holds_large_tensors_only_and_no_names(stored, tmp_path, monkeypatch):
    weight = numbers(64, 96)
    checkpoint = stored({"a": weight, "a_scale": torch.ones(())})
    expected = checkpoint.read("a")
    checkpoint.scratch = tmp_path / "missing"
    equal(checkpoint.read("a"), expected)  # small: in memory
    checkpoint.scratch = tmp_path
    monkeypatch.setattr(quantised, "LARGE", 1000)
    equal(checkpoint.read("a"), expected)
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    equal(checkpoint.read("a"), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve room")
def test_a_full_disk_is_an_error_that_leaves_nothing(stored, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint = stored({"a": numbers(64, 96), "a_scale": torch.ones(())})
    checkpoint.scratch = tmp_path
    monkeypatch.setattr(quantised, "LARGE", 1000)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.read("a")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


# --- refusals ---------------------------------------------------------------------------------------------------------

INT4 = {"type": "int", "num_bits": 4, "symmetric": True}
FLOAT8 = {"type": "float", "num_bits": 8, "symmetric": True}
RELEASE = "; take the release in bfloat16 that it was made of"
LOAD = "; load it with transformers, dequantised, and save that, or take the release in bfloat16 that it was made of"


def compressed(*weights, **other):
    groups = {f"group_{i}": {"weights": w, "format": "pack-quantized"} for i, w in enumerate(weights)}
    return {"quant_method": "compressed-tensors", "config_groups": groups} | other


@pytest.mark.parametrize(
    ("quantization", "found"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq' of 4 bits" + RELEASE),
        ({"quant_method": "awq", "bits": 4}, "'awq' of 4 bits" + RELEASE),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes' of 4 bits" + LOAD),
        ({"load_in_8bit": True}, "'bitsandbytes' of 8 bits" + LOAD),
        *(
            ({"quant_method": name}, f"'{name}'" + RELEASE)
            for name in (
                "torchao",
                "hqq",
                "aqlm",
                "quanto",
                "auto-round",
                "fp_quant",
                "nvfp4",
                "quark",
                "gguf",
                "newer",
            )
        ),
        ({}, "None" + RELEASE),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'modelopt' with quant_algo 'NVFP4'" + RELEASE),
        ({"quant_method": "modelopt"}, "'modelopt' with quant_algo None" + RELEASE),
        (
            compressed(INT4),
            "with group_0 of format 'pack-quantized', whose weights are int of 4 bits, symmetric: True" + LOAD,
        ),
        (compressed(FLOAT8, INT4), "with group_1 of format 'pack-quantized', whose weights are int of 4 bits"),
        (compressed(FLOAT8 | {"symmetric": False}), "whose weights are float of 8 bits, symmetric: False"),
        (
            compressed(FLOAT8, sparsity_config={"format": "sparse-24-bitmask"}),
            "with sparsity 'sparse-24-bitmask'" + LOAD,
        ),
        (compressed(FLOAT8, transform_config={"config_groups": {}}), "with a transform_config" + LOAD),
        (compressed(config_groups={"W4A16": ["Linear"]}, format="int"), "with W4A16 of format 'int'"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(quantization, found, tmp_path):
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    message = f"{tmp_path}: expected weights in full precision, FP8, MXFP8 or MXFP4 by one of"
    with pytest.raises(ValueError, match=f"{re.escape(message)}.* found .*{re.escape(found)}"):
        Dequantised(Shards(tmp_path), quantization)


W, S = numbers(48, 32), scales(3, 2)
B, X = numbers(2, 4, 3, 16, dtype=torch.uint8), scales(2, 4, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.weight": W}, r"a\.weight: expected one tensor of scales for this one of F8_E4M3, .*found none"),
        (
            {"a.weight": W, "a.weight_scale": S, "a.weight_scale_inv": S},
            r"a\.weight: expected one tensor of scales .*found \{",
        ),
        ({"a.weight": W, "a.weight_scale": S.to(FP8)}, r"a\.weight: expected one tensor of scales .* 'F8_E4M3'"),
        (
            {"a.weight": W.to(torch.bfloat16), "a.weight_scale_inv": S},
            r"a\.weight_scale_inv: expected the quantised tensor",
        ),
        (
            {"a.weight_scale": S},
            r"a\.weight_scale: expected the quantised tensor that it belongs to, found F32 \[3, 2\] alone",
        ),
        (
            {"a.weight": W, "a.weight_scale": S, "a.weight_scale_2": S},
            r"a\.weight_scale_2: expected the quantised tensor",
        ),
        (
            {"a.weight": W.view(torch.uint8), "a.weight_scale": S},
            r"a\.weight: expected the quantised tensor .*found U8 \[48, 32\] alone",
        ),
        ({"a.weight": W, "a.weight_scale": scales(3, 3)}, r"a\.weight_scale: expected .*\[3, 2\].*, found \[3, 3\]"),
        ({"a.weight": W, "a.weight_scale": scales(32)}, r"a\.weight_scale: expected .*found \[32\]"),
        ({"a": numbers(2, 3, 4), "a_scale": scales(3)}, r"a_scale: expected .*found \[3\]"),
        (
            {"a.weight": W.view(torch.int8), "a.scale": S},
            r"a\.scale: expected .*so \{\(1, 32\): \[48, 2\]\} by block, found \[3, 2\]$",
        ),
        ({"a.weight": W[0], "a.scale": S}, r"a\.weight: expected a matrix or a stack of them, found \[32\]"),
        (
            {"a.weight": W[:0], "a.scale": S},
            r"a\.weight: expected a matrix or a stack of them, found \[0, 32\]",
        ),
        ({"a_blocks": B}, r"a_blocks: expected one tensor of scales for this one of U8, of \['a_scales'\].*found none"),
        ({"a_scales": X}, r"a_scales: expected the quantised tensor that it belongs to, found U8 \[2, 4, 3\] alone"),
        (
            {"a_blocks": B[0], "a_scales": X[0]},
            r"a_blocks: expected blocks \[E, rows, groups, 16\], found \[4, 3, 16\]",
        ),
        ({"a_blocks": B, "a_scales": X[:, :3]}, r"a_scales: expected .*\[2, 4, 3\].*found \[2, 3, 3\]"),
        ({"a_blocks": B, "a_scales": X, "a": S}, r"a: expected the quantised tensor .*found F32 \[3, 2\] alone"),
    ],
)
def test_tensors_that_do_not_belong_together(tensors, message, stored, tmp_path):
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / 'model.safetensors'))}: {message}"):
        stored(tensors, weight_block_size=[16, 16])


def test_scales_of_which_blocks_is_not_known(stored):
    """Of a gate and a projection of 20 rows each, or of blocks of 32 and 8 rows."""
    tensors = {"experts.gate_up_proj": numbers(3, 40, 16), "experts.gate_up_proj_scale_inv": scales(3, 2, 1)}
    with pytest.raises(ValueError, match=r"found \[3, 2, 1\], which fits blocks of \[\(20, 16\), \(32, 16\)\]"):
        stored(tensors, weight_block_size=[32, 32])


@pytest.mark.parametrize("block", [[16], [16, 0], "16x16", [16, "16"], 16])
def test_bad_blocks(block, stored, tmp_path):
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: expected blocks of two positive sizes"):
        stored({"a.weight": W, "a.weight_scale": S}, weight_block_size=block)


@pytest.mark.parametrize(
    ("scale", "count"),
    [
        (torch.tensor([[1, torch.nan], [torch.inf, 2], [3, 4]]), 2),
        (torch.tensor([[255, 0], [1, 2], [3, 4]], dtype=torch.uint8), 1),
        (torch.tensor([[255, 0], [1, 255], [3, 4]], dtype=torch.uint8).view(EXPONENT), 2),
    ],
)
def test_scales_that_are_not_finite(scale, count, stored):
    checkpoint = stored({"a.weight": W, "a.weight_scale": scale}, weight_block_size=[16, 16])
    with pytest.raises(
        ValueError, match=rf"model\.safetensors: a\.weight_scale: expected finite scales, found {count} NaN"
    ):
        checkpoint.read("a.weight")


def fp8_moe(folder):
    """A DeepSeek-V3 whose files are FP8, and whose weights in memory are what these say. Its blocks do not divide the rows, which
    transformers' own dequantisation refuses."""
    model = moe("deepseek_v3").to(torch.bfloat16)
    model.save_pretrained(folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors, generator = load_file(file), torch.Generator().manual_seed(2)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        scales = 0.5 + torch.rand(-(-rows // 16), -(-columns // 16), generator=generator)
        numbers = tensors[name].float().to(torch.float8_e4m3fn)
        spread = scales.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
        with torch.no_grad():
            _parameter_of(model, name).copy_(numbers.float() * spread)
        tensors |= {name: numbers, f"{name}_scale_inv": scales}
    save_file(tensors, file, {"format": "pt"})
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": quantization}))
    return model


def test_the_perplexity_is_that_of_the_dequantised_model(tmp_path):
    model = fp8_moe(tmp_path / "moe")
    ids = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(2))
    table = convert(tmp_path / "moe", tmp_path / "dense", "topk", check=ids)
    expected = pytest.approx(perplexity(model, ids), rel=2e-2)  # in bfloat16
    assert table.attrs["perplexity"]["MoE"] == expected
    assert perplexity(load_checkpoint(tmp_path / "moe"), ids) == expected


def _parameter_of(model, name):
    """What a tensor of the files is in memory: a parameter, or a part of that of all experts."""
    if not (found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)):
        return model.get_parameter(name)
    experts, part = model.get_submodule(found[1]), found[3]
    stacked = experts.down_proj if part == "down" else experts.gate_up_proj.chunk(2, dim=1)[part == "up"]
    return stacked[int(found[2])]


def test_a_config_says_it_in_a_part_of_it(tmp_path):
    """What is read dequantised has a config without; the given one stays as it is."""
    config = moe("qwen3_vl_moe").config
    config.text_config.quantization_config = {"quant_method": "fp8"}
    save_file({"a.weight": numbers(4, 4), "a.weight_scale_inv": torch.ones(1, 1)}, tmp_path / "model.safetensors")
    assert isinstance(readable(Shards(tmp_path), config), Dequantised)
    found = without_quantization(config)
    assert not hasattr(found.text_config, "quantization_config")
    assert isinstance(readable(Shards(tmp_path), found), Shards)
    assert config.text_config.quantization_config == {"quant_method": "fp8"}


MODELOPT = {"producer": {"name": "modelopt", "version": "0.33"}, "quantization": {"quant_algo": "FP8"}}


@pytest.mark.parametrize(
    ("file", "declared", "message"),
    [
        ("hf_quant_config.json", MODELOPT, ""),
        (
            "hf_quant_config.json",
            {"quantization": {"quant_algo": "NVFP4"}},
            "found quant_method 'modelopt' with quant_algo 'NVFP4'",
        ),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "found quant_method None of 4 bits"),
        ("quant_config.json", {"quant_method": "awq", "bits": 4}, "found quant_method 'awq' of 4 bits"),
    ],
)
def test_quantisation_that_only_another_file_declares_is_read_or_refused_by_its_name(file, declared, message, tmp_path):
    """As ModelOpt writes it; and config.json says nothing."""
    moe("qwen3_moe").to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    path, plain = tmp_path / "moe" / "model.safetensors", tmp_path / "plain"
    tensors = load_file(path)
    (tmp_path / "moe" / file).write_text(json.dumps(declared))
    convert(tmp_path / "moe", tmp_path / "whole", "average")  # of weights in full precision the file says nothing
    shutil.copytree(tmp_path / "moe", plain, ignore=shutil.ignore_patterns(file))
    for name in [name for name in tensors if ".experts." in name]:
        numbers, scale = tensors[name].float().to(FP8), torch.tensor(0.5)
        tensors |= {name: numbers, f"{name}_scale": scale, name.replace("weight", "input_scale"): scale.clone()}
    save_file(tensors, path, {"format": "pt"})
    if message:
        with pytest.raises(ValueError, match=re.escape(file) + f": .*{message}"):
            convert(tmp_path / "moe", tmp_path / "dense", "average")
        return
    tensors = {
        n: t.float().mul(0.5).bfloat16() if t.dtype == FP8 else t for n, t in tensors.items() if "scale" not in n
    }
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    ids = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(2))
    found, expected = (convert(tmp_path / n, tmp_path / f"{n}-dense", "average", check=ids) for n in ("moe", "plain"))
    assert_close(*(load_file(tmp_path / f"{n}-dense" / "model.safetensors") for n in ("moe", "plain")), atol=0, rtol=0)
    assert found.attrs["perplexity"]["MoE"] == pytest.approx(expected.attrs["perplexity"]["MoE"], rel=1e-3)
    assert not (tmp_path / "moe-dense" / file).exists()
    assert (open_experts(tmp_path / "moe")["model.layers.1.mlp.experts"].up.dtype) == torch.bfloat16


def test_a_config_calls_quantisation_by_its_older_name(tmp_path):
    config = moe("mixtral").config
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {
        "compression_config": {"quant_method": "compressed-tensors"}
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert model_config(tmp_path).quantization_config == {"quant_method": "compressed-tensors"}
