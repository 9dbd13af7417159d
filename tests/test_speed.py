"""Ways of dispatch against the plain one, and the tables of measurements."""

import math
import sys
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import random_bank
from test_moe import random_routing
from transformers import AutoConfig

from ones_lib.checkpoints.plan import dense_config
from ones_lib.checkpoints.terminal import RunError
from ones_lib.models.images import WideNet
from ones_lib.moe import Routing, dispatch_plain
from ones_lib.views import engines
from ones_lib.views.speed import (
    _onnx_pass,
    _peak_bytes,
    _variants,
    available_modes,
    dispatch_one_hot,
    measure_dispatch,
    measure_speed,
    transformers_dispatch,
)


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr("ones_lib.views.speed.BLOCK_SECONDS", 0.001)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("skew", [0.0, 5.0])
@pytest.mark.parametrize("group_size", [10, 30])
@pytest.mark.parametrize("biases", [True, False])
def test_one_hot_dispatch_is_the_plain_one_group_by_group(biases, top_k, skew, group_size):
    bank = random_bank(5, dtype=torch.float64, biases=biases)
    routing = random_routing(30, 5, top_k, skew=skew)
    x = torch.randn(30, 8, dtype=torch.float64)
    gates = routing.gates.double()
    found = dispatch_one_hot(
        bank, x, Routing(routing.experts, gates, routing.probabilities), F.gelu, group_size=group_size
    )
    capacity = math.ceil(1.2 * top_k * group_size / 5)
    for first in range(0, 30, group_size):
        part = slice(first, first + group_size)
        one = Routing(routing.experts[part], gates[part], routing.probabilities[part], capacity)
        torch.testing.assert_close(found[part], dispatch_plain(bank, x[part], one, F.gelu))


def test_groups_must_divide_the_tokens():
    with pytest.raises(ValueError, match="group_size: expected a divisor of the 30 tokens, found 7"):
        dispatch_one_hot(random_bank(4), torch.randn(30, 8), random_routing(30, 4, 2), F.gelu, group_size=7)


def test_transformers_ways_compute_what_the_plain_one_does():
    bank = random_bank(5, d_ff=16, biases=False).map(torch.nn.Parameter)
    x, routing = torch.randn(30, 8), random_routing(30, 5, 2)
    expected = dispatch_plain(bank, x, routing, F.gelu)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        found = transformers_dispatch(implementation, bank)(bank, x, routing, F.gelu)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_every_way_of_dispatch_is_timed_in_both_directions(monkeypatch):
    layer = {"d_model": 8, "d_ff": 16, "num_experts": 4, "top_k": 2, "tokens": 6}
    table = measure_dispatch("small", layer, [1, 2], ["float32", "bfloat16"], seconds=0.0)
    assert len(table) == 2 * 2 * 2 * 6
    assert (table.groupby(["precision", "direction", "batch_size"])["variant"].nunique() == 6).all()
    assert (table["measured"] >= 5).all()
    assert (table["low_ms"] > 0).all()
    monkeypatch.setattr("ones_lib.views.speed.LARGEST_COPY", 2 * 6 * 2 * 8 * 16 * 4)  # of one example in float32
    table = measure_dispatch("small", layer, [1, 2], ["float32"], seconds=0.0)
    assert set(table.loc[table["variant"] == "batched_mm", "batch_size"]) == {1}


SIZES = {"embed_dim": 8, "depth": 3, "num_heads": 2, "d_ff": 12, "num_experts": 4, "top_k": 2, "patch_size": 4}


def tiny(**arguments):
    model = timm.create_model(
        "widenet_tiny_patch16_224", img_size=16, in_chans=1, num_classes=5, **{**SIZES, **arguments}
    )
    assert isinstance(model, WideNet)
    return model


@pytest.mark.parametrize("share_depth", [True, False])
def test_a_measurement_has_every_variant_and_counts_what_must_be_done(share_depth):
    table = measure_speed("tiny", tiny(share_depth=share_depth), [1, 2], seconds=0.0)
    assert list(table["variant"]) == ["dense", "moe", "moe_plain", "moe_gshard"] * 2
    assert (table["low_ms"] <= table["median_ms"]).all()
    assert (table["median_ms"] <= table["high_ms"]).all()
    rows = table.set_index(["variant", "batch_size"])
    # By hand: 16 tokens of 8, each depth with attention's four products, its two of tokens with tokens, and the FFN.
    block = 16 * (2 * 4 * 8 * 8 + 2 * 2 * 16 * 8 + 2 * 2 * 8 * 12)
    around = 16 * 2 * 16 * 8 + 2 * 8 * 5  # patches, head
    assert rows.loc[("dense", 1), "flops"] == 3 * block + around
    assert rows.loc[("moe", 2), "flops"] == 2 * (3 * block + around + 3 * 16 * (2 * 2 * 8 * 12 + 2 * 4 * 8))
    assert rows.loc[("moe", 1), "parameters"] > rows.loc[("dense", 1), "parameters"]
    np.testing.assert_allclose(rows["images_per_second"], 1000 * rows.index.get_level_values(1) / rows["median_ms"])
    # Weights read, in float32: matrices and biases of attention and one FFN, two norms, at each of 3 depths; and around them.
    ffn = 2 * 8 * 12 + 12 + 8
    block = 4 * 8 * 8 + 4 * 8 + ffn + 2 * 2 * 8
    around = 16 * 8 + 8 + 16 * 8 + 2 * 8 + 8 * 5 + 5  # patches, positions, last norm, head
    assert rows.loc[("dense", 1), "weight_bytes"] == 4 * (3 * block + around)


def test_of_experts_the_weights_of_those_that_got_a_token_are_read():
    model = tiny(depth=1)
    with torch.no_grad():
        model.moe_layers()[0].router.weight.zero_()  # all tie: every token goes to the same two experts
    rows = measure_speed("tiny", model, [2], seconds=0.0).set_index("variant")
    ffn, router = 2 * 8 * 12 + 12 + 8, 4 * 8
    assert rows.loc["moe", "weight_bytes"] - rows.loc["dense", "weight_bytes"] == 4 * (ffn + router)


def test_peak_memory_is_what_a_pass_holds_at_once():
    def run():
        first = torch.zeros(1000)
        second = first + 1  # both: 8,000 bytes
        del first
        return second.sum()

    assert 8000 <= _peak_bytes(run, torch.device("cpu")) < 9000


@pytest.mark.processes
def test_compiled_and_low_precision_are_measured_where_they_run(monkeypatch):
    """The MoE by all of torch.compile, and two other models by all but its code generation, which takes ten seconds for each."""
    whole = torch.compile
    backends = iter(["inductor", "aot_eager", "inductor", "aot_eager"])  # of the trial, dense, MoE, GShard's
    monkeypatch.setattr(torch, "compile", lambda f, **options: whole(f, backend=next(backends), **options))
    modes = available_modes(["eager", "compiled"])
    table = measure_speed("tiny", tiny(depth=1), [1], 0.0, ["bfloat16"], modes)
    counts = table.groupby("mode")["variant"].nunique()
    assert counts.to_dict() == {"eager": 4} | ({"compiled": 3} if "compiled" in modes else {})
    assert available_modes(["eager"]) == ["eager"]


def test_onnx_runtime_is_timed_in_float32():
    pytest.importorskip("onnxruntime")
    table = measure_speed("tiny", tiny(depth=1), [1, 3], 0.0, ["bfloat16", "float32"], available_modes(["onnx"]))
    assert set(table["precision"]) == {"float32"}
    assert table.groupby("batch_size")["variant"].unique().map(list).to_list() == [["dense", "moe_plain"]] * 2


def test_what_onnx_runtime_times_is_the_models_output():
    pytest.importorskip("onnxruntime")
    model, x = tiny(depth=1).eval(), torch.randn(3, 1, 16, 16)
    torch.nn.init.normal_(model.head.weight)
    for variant, one in _variants(model, model.dense_twin().eval()).items():
        if variant in ("dense", "moe_plain"):
            torch.nn.init.normal_(one.head.weight)
            with torch.no_grad():
                torch.testing.assert_close(torch.from_numpy(_onnx_pass(one, x)()[0]), one(x), atol=1e-5, rtol=1e-4)


def test_without_onnx_runtime_that_mode_is_left_out(monkeypatch):
    monkeypatch.setattr("ones_lib.study.onnx_file.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="'onnx' is left out: .*found no onnx: pip install"):
        assert available_modes(["eager", "onnx"]) == ["eager"]


# --- engines ---------------------------------------------------------------------------------------------------------

STACK = {"model_type": "mixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50}
STACK |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}
#: An engine with a clock of its own, on which a call of an MoE takes twice as long.
VLLM = """
import json, time
__version__, now = "0.0", 0.0
time.perf_counter = lambda: now
class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos, detokenize):
        assert temperature > 0 and ignore_eos
        self.drawn = max_tokens
class LLM:
    def __init__(self, model, max_model_len, **options):
        assert options["load_format"] == "dummy" and not options["enable_prefix_caching"]
        self.seconds = 2.0 if "num_local_experts" in json.load(open(model + "/config.json")) else 1.0
        self.longest = max_model_len
    def generate(self, prompts, sampling, use_tqdm):
        for prompt in prompts:
            assert max(prompt["prompt_token_ids"]) < 50
            assert len(prompt["prompt_token_ids"]) + sampling.drawn <= self.longest
        global now
        now += self.seconds
"""


@pytest.fixture
def engine(tmp_path):
    """A Python that has an engine."""
    (tmp_path / "vllm.py").write_text(VLLM)
    python = tmp_path / "python"
    start = f"import sys; sys.path.insert(0, '{tmp_path}'); sys.argv = sys.argv[1:]; import runpy"
    run = "runpy.run_path(sys.argv[0], run_name='__main__')"
    python.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -c "{start}; {run}" "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_an_engine_is_measured_beside_transformers_and_the_machine(engine, monkeypatch):
    monkeypatch.setattr(engines, "machine_speed", lambda seconds: (1e9, 1e12))
    monkeypatch.setattr(engines, "PROMPT", 16)
    monkeypatch.setattr(engines, "DECODED", 4)
    table = engines.measure_engines("small", STACK, [1, 3], engine, seconds=0.0)
    assert table.groupby("engine").size().to_dict() == {e: 8 for e in table["engine"].unique()}
    assert [e.split()[0] for e in table["engine"].unique()] == ["vLLM", "transformers", "limit"]
    assert table.loc[table["model"] == "moe", "speedup"].eq(1).all()
    rows = table.set_index(["engine", "model", "phase", "batch_size"])
    assert (rows.loc["vLLM 0.0"]["measured"] == engines.REPEATS).all()
    dense = rows.loc[("vLLM 0.0", "dense", "decoding", 3)]
    assert (dense["median_ms"], dense["speedup"], dense["tokens_per_second"]) == (1000, 2, 3 * 4)


def test_the_limits_are_bytes_and_products_by_hand():
    config = AutoConfig.for_model(**STACK)
    table = engines.limits({"moe": config, "dense": dense_config(config, "active")}, [1], 1e6, 1e30)
    rows = table.set_index(["model", "phase"])["median_ms"]
    around = 2 * (4 * 16 * 16 + 2 * 16) + 16 + 50 * 16  # attention and norms of two layers, last norm, head
    expert, router = 3 * 16 * 24, 8 * 16
    step = 2 * (around + 2 * 2 * expert)  # bytes; two layers of the active width
    assert rows["dense", "decoding"] == pytest.approx(step * engines.DECODED / 1e3)
    needed = 8 * (1 - (3 / 4) ** 8)  # experts of the prompt's eight tokens
    first = 2 * (around + 2 * (router + needed * expert))
    step += 2 * 2 * router
    assert rows["moe", "decoding"] == pytest.approx((first + (engines.DECODED - 1) * step) / 1e3)
    table = engines.limits({"moe": config}, [2], 1e30, 1e6).set_index("phase")["median_ms"]
    products = 2 * 2 * engines.PROMPT * (around + 2 * (router + 2 * expert))
    assert table["prefill"] == pytest.approx(products / 1e3)


@pytest.mark.parametrize("python", ["missing", "failing"])
def test_a_python_without_the_engine_is_refused_in_one_line(python, tmp_path):
    place = tmp_path / python
    if python == "failing":
        place.write_text("#!/bin/sh\necho 'first' >&2\necho 'no module vllm' >&2\nexit 1\n")
        place.chmod(0o755)
    said = "no module vllm" if python == "failing" else "No such file"
    with pytest.raises(RunError, match=rf"^engine_python: .*{python}.*{said}") as error:
        engines.measure_engines("small", STACK, [1], str(place), seconds=0.0)
    assert "\n" not in str(error.value)


def test_without_a_compiler_there_is_no_compiled_mode(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler")

    compiled = partial(torch.compile, backend=broken)
    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.warns(UserWarning, match="(?s)modes: torch.compile does not run here.*no compiler"):
        assert available_modes(["eager", "compiled"]) == ["eager"]


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"modes: expected of .*found \['fast'\]"):
        measure_speed("tiny", tiny(), [1], 0.0, modes=["fast"])
