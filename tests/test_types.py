"""Every MoE type of transformers made dense, against transformers' own models, on tiny random ones with all their features."""

import json
from inspect import signature
from math import prod

import moe_images
import moe_table
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_moes import CONFIGS, moe
from transformers import AutoConfig
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from ones_lib.checkpoints import activations, convert, open_experts
from ones_lib.checkpoints.activations import store_activations, stored_activations
from ones_lib.checkpoints.architectures import REFUSED, SPECIAL, Architecture, moe_types
from ones_lib.checkpoints.plan import TwinPlan
from ones_lib.checkpoints.shards import Shards
from ones_lib.gathering.registry import gather
from ones_lib.models.causal import (
    activation_of,
    experts_modules,
    load_language_model,
    model_class,
    model_inputs,
    watched_experts,
)

IDS = torch.randint(11, 55, (2, 24), generator=torch.Generator().manual_seed(1))  # no special tokens of any type


@pytest.fixture(autouse=True)
def llama4_runs(monkeypatch):
    """In transformers 5.24, its forward pass reads an attribute that its text model's output does not have."""
    monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@torch.no_grad()
def outputs(model, inputs=None):
    """Logits, or the last hidden states of a type that has no head."""
    model = getattr(model, "thinker", model)  # Qwen-Omni as a whole has no forward pass
    found = model(**(model_inputs(model, IDS) if inputs is None else inputs))
    return (found.last_hidden_state if getattr(found, "logits", None) is None else found.logits).float()


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_every_type_is_converted_or_refused():
    """Fails for a type of a new release of transformers: add a tiny config, or a reason."""
    parts, kinds = set(), set(moe_types())
    for kind in kinds:
        try:
            model_class(transformers.CONFIG_MAPPING[kind]())
        except ValueError as error:
            if "a part of other models" in str(error):
                parts.add(kind)
        except transformers.utils.import_utils.OptionalDependencyNotAvailable:
            pass
    known = {*CONFIGS, *REFUSED, *parts}
    assert sorted(kinds - known - {"widenet_text"}) == []  # that one is this library's own
    assert sorted({*CONFIGS, *REFUSED} - kinds) == []
    assert len(CONFIGS) >= 60


@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_experts_give_the_same_logits_text_and_bytes(kind, tmp_path):
    """From one tensor an expert and from stacked ones; with an image, where the type takes one; in bfloat16."""
    gates = Architecture(moe(kind).config, kind).gates.values()
    model = moe(kind, equal=True, same_gates=any(found.total is None for found in gates))
    model.save_pretrained(tmp_path / "hub")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    for layout in ("hub", "stacked"):
        convert(tmp_path / layout, tmp_path / f"{layout}_dense", "average")
    assert weights(tmp_path / "hub_dense") == weights(tmp_path / "stacked_dense")

    twin = load_language_model(tmp_path / "hub_dense")
    atol = 2e-5 if kind == "inkling2_loop_text" else 1e-5  # its layers run several times
    torch.testing.assert_close(outputs(twin), outputs(model), atol=atol, rtol=0)
    if kind in moe_images.KINDS:
        inputs = moe_images.image_inputs(kind, model.config)
        torch.testing.assert_close(outputs(twin, inputs), outputs(model, inputs), atol=1e-5, rtol=0)
    if model.can_generate() and not hasattr(model, "thinker"):
        made = [m.generate(IDS[:1], max_new_tokens=6, do_sample=False) for m in (model, twin)]
        assert kind == "diffusion_gemma" or torch.equal(*made)  # that one starts from noise

    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    stored = {t.dtype for path in (tmp_path / "half").glob("*.safetensors") for t in load_file(path).values()}
    convert(tmp_path / "half", tmp_path / "half_dense", "topk", d_ff="active")
    dtypes = {t.dtype for path in (tmp_path / "half_dense").glob("*.safetensors") for t in load_file(path).values()}
    assert torch.bfloat16 in dtypes
    assert dtypes <= stored
    assert outputs(load_language_model(tmp_path / "half_dense")).isfinite().all()


@pytest.mark.parametrize("kind", CONFIGS)
def test_block_by_block_the_experts_see_what_they_see_in_the_model(kind, tmp_path, monkeypatch):
    """Different experts; the model runs from its files, with one block in memory, on two batches of tokens."""
    monkeypatch.setattr(activations, "TOKENS_A_PASS", 24)
    model, seen = moe(kind), {}
    model.save_pretrained(tmp_path / "moe")
    with watched_experts(model, lambda name, found: seen.update({name: found})):
        outputs(model)
    architecture = Architecture(model.config, kind)
    plan = TwinPlan(Shards(tmp_path / "moe"), architecture, "topk", None)
    store_activations(plan.stored, IDS, tmp_path / "activations", architecture.streams)
    for block in plan.blocks:
        if block.sparse:
            activation = plan.activation(block)
            found, expected = (
                stored_activations(tmp_path / "activations", block.experts, activation),
                seen[block.experts],
            )
            for name in ("inputs", "gates", "outputs"):
                torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-4, rtol=1e-4)
            if architecture.gates[
                block.experts
            ].scores:  # the router's probabilities are what the gates are in the ratio of
                scores = plan.probabilities(block, found.inputs) * (found.gates > 0)
                one, two = (t / t.sum(dim=1, keepdim=True) for t in (scores, found.gates))
                torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


def test_a_plan_reads_no_tensor(tmp_path, monkeypatch):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    monkeypatch.setattr(Shards, "raw", None)
    plan = TwinPlan(Shards(tmp_path / "moe"), Architecture(moe("mixtral").config, "here"), "topk", "active")
    assert (plan.num_experts, plan.expert_width, plan.d_model, plan.width) == (4, 24, 32, 48)


def with_one_expert(config):
    """The same tiny config with one expert, which every token is sent to."""
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_group", "topk_group")
    ones = {*counts, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"}
    changed = {name: 1 if name in ones else value for name, value in config.items()}
    parts = ("text_config", "thinker_config")
    return changed | {name: with_one_expert(config[name]) for name in parts if name in config}


# Their routers add up the best two of each group, so that the classes can't have one expert.
TWO_AT_LEAST = """axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 dots1 dots3_note dots3_note_text exaone_moe glm4_moe
glm4_moe_lite glm4v_moe glm4v_moe_text glm5_next glm5_next_text glm_moe_dsa hy_v4 hy_v4_vl hy_v4_vl_text kimi_k25 kimi_linear
mimo_v2_flash mistral4 mistral_large4 mistral_large4_text nemo_speechlm nemotron_h nemotron_h_omni phimoe sarvam_mla sarvam_moe
solar_open"""


@pytest.mark.parametrize(
    "kind", [k for k in CONFIGS if k not in TWO_AT_LEAST.split() and k != "jamba"]
)  # Jamba's is dense then
def test_one_expert_comes_back(kind, tmp_path):
    changes = with_one_expert(CONFIGS[kind])
    gates = Architecture(moe(kind, **changes).config, kind).gates.values()
    model = moe(kind, same_gates=any(found.total is None for found in gates), **changes)
    model.save_pretrained(tmp_path / "moe")
    convert(tmp_path / "moe", tmp_path / "dense", "topk")
    # Lfm2's sigmoids are divided by a little more than their sum.
    atol = 1e-4 if kind == "lfm2_moe" else 2e-5
    torch.testing.assert_close(outputs(load_language_model(tmp_path / "dense")), outputs(model), atol=atol, rtol=0)


def test_a_value_that_the_dense_class_does_not_keep_is_an_error(monkeypatch):
    config = AutoConfig.for_model("qwen3_moe", **CONFIGS["qwen3_moe"])
    architecture, dense = Architecture(config, "here"), transformers.CONFIG_MAPPING["qwen3"]
    architecture.twin(24)
    kept = dense.to_dict
    monkeypatch.setattr(dense, "to_dict", lambda self: kept(self) | {"attention_bias": "another"})
    with pytest.raises(ValueError, match=r"here: expected values that qwen3 keeps, lost: \['attention_bias True'\]"):
        architecture.twin(24)


def test_the_table_in_the_readme_is_up_to_date():
    """``python tests/moe_table.py`` writes it."""
    assert moe_table.written(moe_table.README.read_text()).strip() == moe_table.table().strip()


def test_engines_were_tried_with_every_type():
    """``python tests/engines.py`` tries them, in environments that have them."""
    assert list(moe_table.SERVES) == list(CONFIGS)


@pytest.mark.parametrize("kind", [kind for kind, special in SPECIAL.items() if special.with_experts])
def test_a_twin_for_an_engine_has_experts_and_the_same_logits(kind, tmp_path):
    model = moe(kind, equal=True)
    model.save_pretrained(tmp_path / "moe")
    convert(tmp_path / "moe", tmp_path / "dense", "average", engine="vllm")
    twin = load_language_model(tmp_path / "dense")
    assert type(twin) is type(model)
    assert experts_modules(twin).keys() == experts_modules(model).keys()
    torch.testing.assert_close(outputs(twin), outputs(model), atol=1e-5, rtol=0)
    assert "vllm refuses" in (tmp_path / "dense" / "README.md").read_text()
    convert(tmp_path / "moe", tmp_path / "plain", "average")
    assert not experts_modules(load_language_model(tmp_path / "plain"))


def test_an_engine_changes_no_twin_that_it_serves(tmp_path):
    """Nor the record of its conversion: the call without it says that all is done."""
    moe("mixtral").save_pretrained(tmp_path / "moe")
    convert(tmp_path / "moe", tmp_path / "dense", "average", engine="vllm")
    assert type(load_language_model(tmp_path / "dense")) is transformers.MistralForCausalLM
    convert(tmp_path / "moe", tmp_path / "dense", "average")


def layer_output(model, name, x):
    """Of an MoE layer or the dense network in its place, on tokens [N, d]; some layers want to know the tokens."""
    module = model.get_submodule(name)
    ids = {"input_ids": IDS.flatten()[None, : len(x)]} if "input_ids" in signature(module.forward).parameters else {}
    found = module(x[None], **ids)
    return (found[0] if isinstance(found, tuple) else found).view_as(x)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", ["deepseek_v4", "solar_open", "phimoe", "laguna", "lfm2_moe", "step3p7", "gpt_oss", "minimax_m3_vl_text"]
)
@pytest.mark.parametrize("d_ff", ["active", 13, 96])
def test_different_experts_are_gathered_as_by_the_library(kind, d_ff, tmp_path):
    """With tables of experts by token, several experts with unequal gates, as many as the MoE has, factors behind the experts,
    activations of gate and up together, which differ between layers."""
    model = moe(kind)
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):
            table.copy_(torch.randint(4, table.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path / "moe")
    rows = convert(tmp_path / "moe", tmp_path / "dense", "topk", d_ff=d_ff)
    twin, banks, x = load_language_model(tmp_path / "dense"), open_experts(model), torch.randn(20, 32)
    gates = Architecture(model.config, kind).gates
    for row in rows.itertuples():
        name = f"{row.layer}.experts"
        ffn = gather(banks[name], "topk", d_ff=row.d_ff, scale="router")
        expected = row.gate_sum * gates[name].factor * ffn.apply(x, activation_of(model.get_submodule(name)))
        for child, shared in model.get_submodule(row.layer).named_children():
            expected = expected + (shared(x) if "shared" in child else 0)
        torch.testing.assert_close(layer_output(twin, row.layer, x), expected, atol=1e-4, rtol=1e-4)
    assert outputs(twin).isfinite().all()


@pytest.mark.parametrize(
    "kind", ["llama4_text", "openai_privacy_filter", "laguna", "phimoe", "gemma4_text", "zaya", "gpt_oss"]
)
def test_equal_experts_are_solved_for_exactly(kind, tmp_path):
    """By what the block-by-block run sees: with gates at the inputs, factors, unequal gates, clamps."""
    gates = Architecture(moe(kind).config, kind).gates.values()
    model = moe(kind, equal=True, same_gates=any(found.total is None for found in gates))
    model.save_pretrained(tmp_path / "moe")
    ids = torch.randint(11, 55, (24, 24), generator=torch.Generator().manual_seed(3))
    table = convert(tmp_path / "moe", tmp_path / "dense", "readout", "active", calibration=ids)
    assert (table["output_error"] < 1e-4).all()
    torch.testing.assert_close(outputs(load_language_model(tmp_path / "dense")), outputs(model), atol=1e-3, rtol=0)


def test_hidden_units_are_spread_over_few_experts():
    def spread(kind, width, **changes):
        return Architecture(moe(kind, **changes).config, kind).spread(width)

    assert spread("olmoe", 18) == (1, 24)  # rows of 16 bytes
    assert spread("nemotron_h", 48) == (2, 24)
    assert spread("solar_open", 96) == (2, 48)  # shared experts of 48 may be two of 24, or one of 48
    assert spread("solar_open", 25) == (2, 16)
    assert spread("deepseek_v4", 80 * 24) == (80, 24)  # shared experts of 24 can only be one


@pytest.mark.parametrize("kind", ["olmoe", "nemotron_h", "solar_open", "deepseek_v4", "aria"])
def test_a_spread_width_is_spread_as_it_is(kind):
    """So that a plan, which knows the product alone, and its twin agree."""
    architecture = Architecture(moe(kind).config, kind)
    for width in range(1, 300):
        product = prod(architecture.spread(width))
        assert width <= product == prod(architecture.spread(product))


def test_a_width_between_experts_widths_can_be_computed(tmp_path):
    moe("olmoe").to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    convert(tmp_path / "moe", tmp_path / "dense", "topk", d_ff=18)
    assert outputs(load_language_model(tmp_path / "dense")).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "missing", "message"),
    [
        ("qwen3_moe", "layers.2.mlp.experts.3.", r"of another shape: \['model.layers.2.mlp.experts.gate_up_proj"),
        ("deepseek_v3", "layers.2.mlp.experts.3.up", r"of another shape: \['model.layers.2.mlp.experts.gate_up_proj"),
        ("deepseek_v3", "layers.1.mlp.gate.weight", r"missing: \['model.layers.1.mlp.gate.weight"),
        ("olmoe", "layers.1.mlp.gate.", r"missing: \['model.layers.1.mlp.gate.weight"),
        ("deepseek_v3", "shared_experts.up", r"missing: \['model.layers.1.mlp.shared_experts.up_proj.weight"),
    ],
)
def test_missing_parts_of_an_moe_layer_are_told_first(kind, missing, message, tmp_path):
    moe(kind).save_pretrained(tmp_path / "moe")
    path = tmp_path / "moe" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if missing not in name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"moe: expected the tensors of .*{message}"):
        convert(tmp_path / "moe", tmp_path / "dense", "readout", calibration=IDS)
    assert [p.name for p in tmp_path.iterdir()] == ["moe"]


def test_a_router_of_another_size_is_told_first(tmp_path):
    moe("olmoe").save_pretrained(tmp_path / "moe")
    path = tmp_path / "moe" / "model.safetensors"
    cut = {name: t[:3].clone() if "mlp.gate." in name else t for name, t in load_file(path).items()}
    save_file(cut, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"of another shape: \['model.layers.0.mlp.gate.weight \[3, 32\], not \[4, 32\]"
    ):
        convert(tmp_path / "moe", tmp_path / "dense", "topk")


def test_a_config_as_it_is_published(tmp_path):
    """The dtype stands in a part of it, and it names code of its own."""
    moe("qwen3_vl_moe").to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    path = tmp_path / "moe" / "config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "code.Config"}}
    del config["dtype"]
    path.write_text(json.dumps(config))
    convert(tmp_path / "moe", tmp_path / "dense", "topk")
    twin = AutoConfig.from_pretrained(tmp_path / "dense")
    assert (twin.dtype, hasattr(twin, "auto_map")) == (torch.bfloat16, False)
    assert {t.dtype for p in (tmp_path / "dense").glob("*.safetensors") for t in load_file(p).values()} == {
        torch.bfloat16
    }


def test_a_model_without_a_head(tmp_path):
    transformers.MixtralModel(moe("mixtral").config).save_pretrained(tmp_path / "moe")
    convert(tmp_path / "moe", tmp_path / "dense", "topk")
    assert type(load_language_model(tmp_path / "dense")) is transformers.MistralModel


@pytest.mark.filterwarnings("ignore:calibration_tokens")
def test_the_global_random_state_stays_as_it_is(tmp_path):
    moe("nemotron_h").save_pretrained(tmp_path / "moe")
    torch.manual_seed(5)
    convert(tmp_path / "moe", tmp_path / "dense", "readout", calibration=IDS)
    found = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(found, torch.rand(3))
