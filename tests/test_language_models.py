"""Causal language models in the study: the task against transformers' own loss, and students made by conversion."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import MistralForCausalLM, MixtralForCausalLM

from ones_lib import Distillation, gather
from ones_lib.checkpoints import open_experts
from ones_lib.data.text import text_corpus
from ones_lib.models.causal import without_bars
from ones_lib.study.entries import by_name
from ones_lib.study.language_task import BIAS_STEP, LanguageModelling, _spaced, language_model
from ones_lib.study.records import Records
from ones_lib.study.running import build_model
from ones_lib.study.study import Study
from ones_lib.study.tables import published_table, retention_table
from ones_lib.study.training import Training
from ones_lib.views.speed import DECODED, study_language_speed

MOE = {"model_type": "mixtral", "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
MOE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 3, "num_experts_per_tok": 2}
TEXT = {"vocab_size": 200, "sequence_length": 16, "max_corpus": 300, "validation_sequences": 12}


@pytest.fixture(scope="module")
def study(tmp_path_factory, text_cache):
    recipe = Training(steps=6, batch_size=8)
    return Study(
        domain="language",
        data={"name": "names", **TEXT},
        model=MOE,
        teaching=recipe,
        learning=replace(recipe, steps=3, evaluations=0),
        distillation=Distillation(1.0, 0.5),
        calibration_examples=8,
        seeds=[0],
        records=Records(tmp_path_factory.mktemp("language") / "records"),
        cache_dir=text_cache,
        processes=1,
    )


def test_the_task_is_transformers_own_loss(text_cache):
    data = text_corpus(**TEXT, cache_dir=text_cache)
    model, task = language_model(MOE, data, seed=0), LanguageModelling(data)
    batch = next(iter(task.batches(Training(steps=1, batch_size=4), 0, 0, torch.device("cpu"))))
    assert batch.shape == (4, 16)
    expected = model.model(input_ids=batch, labels=batch).loss
    torch.testing.assert_close(task.loss(task.forward(model.eval(), batch), batch), expected)
    scores = task.predict(model, torch.device("cpu"))
    assert scores["loss"].shape == (12 * 15,)
    rows = data.validation.long()
    losses = [model.model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    assert scores["loss"].mean().item() == pytest.approx(sum(losses) / 12, rel=1e-5)


def test_the_balance_loss_reaches_the_routers_in_training_alone(text_cache):
    data = text_corpus(**TEXT, cache_dir=text_cache)
    model = language_model(MOE, data, seed=0)
    ids = data.train[:4].long()
    model.train()(ids)
    model.balance_loss().backward()
    assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in model.model.model.layers)
    model.eval()(ids)
    assert model.balance_loss() == 0
    dense = language_model(MOE, data, seed=0, dense=True)
    assert isinstance(dense.model, MistralForCausalLM)
    assert dense.model.config.intermediate_size == 8
    dense.train()(ids)
    assert dense.balance_loss() == 0


GLM = {
    "model_type": "glm4_moe",
    "moe_intermediate_size": 8,
    "intermediate_size": 40,
    "n_routed_experts": 3,
    "head_dim": 8,
}
GLM |= {"n_shared_experts": 1, "n_group": 1, "topk_group": 1}


def test_a_correction_bias_moves_towards_an_even_use_of_the_experts(text_cache):
    """In training alone: experts with fewer tokens than the mean are raised, the others lowered."""
    data = text_corpus(**TEXT, cache_dir=text_cache)
    model = language_model(MOE | GLM | {"first_k_dense_replace": 0}, data, seed=0)
    routers = [layer.mlp.gate for layer in model.model.model.layers]
    loads = []
    for router in routers:
        router.register_forward_hook(
            lambda router, inputs, output: loads.append(output[2].flatten().bincount(minlength=3))
        )
    ids = data.train[:4].long()
    model.eval()(ids)
    assert all((router.e_score_correction_bias == 0).all() for router in routers)
    loads.clear()
    model.train()(ids)
    for router, load in zip(routers, loads, strict=True):
        torch.testing.assert_close(router.e_score_correction_bias, BIAS_STEP * (load.float().mean() - load).sign())
        assert load.float().std() > 0


def test_a_students_divergence_is_that_of_the_models_predictions(study):
    moe, student = study.run([study.moe(0), study.student("average", 0, 3)])
    ids = study.open_data().validation.long()
    with torch.no_grad():
        its, own = (study.load_model(r).model(ids).logits[:, :-1].double().log_softmax(-1) for r in (moe, student))
    expected = (its.exp() * (its - own)).sum(dim=-1).mean().item()
    assert student.result["metrics"]["kl"] == pytest.approx(expected, rel=0.01)  # nearly 0, in float32
    assert "kl" not in moe.result["metrics"]


def test_students_of_several_widths(study):
    """Own widths in the place of the common ones, each with its largest budget; rates of one's own."""
    students = {"mine": ("average", {}), "other": ("topk", {}, {"expert": 3, "1.5x": 0})}
    rates = {"other": {"expert": {3: 0.5}}, "mine": {"1.5x": {3: 0.25}}}
    entries = by_name(study, students, {0: None, 3: 0.002}, ["active", "1.5x"], ["1.5x"], rates, teacher="M")
    made = {(e.model, e.axes.get("width"), e.axes.get("budget")): e.config for e in entries}
    assert set(made) == {
        *((model, None, None) for model in ("dense", "dense_long", "moe")),
        *((model, "1.5x", None) for model in ("dense_width", "dense_width_long")),
        *(("mine", width, budget) for width in ("active", "1.5x") for budget in (0, 3)),
        *(("other", "expert", 0), ("other", "expert", 3), ("other", "1.5x", 0)),
    }
    assert made["mine", "active", 3]["training"]["learning_rate"] == 0.002
    assert made["mine", "1.5x", 3]["training"]["learning_rate"] == 0.25
    assert made["other", "expert", 3]["training"]["learning_rate"] == 0.5
    steps = {model: made[model, "1.5x", None]["training"]["steps"] for model in ("dense_width", "dense_width_long")}
    assert steps["dense_width_long"] - steps["dense_width"] == study.learning.steps
    study.run(made.values())
    loaded = {key: study.load_model(study.records.find(config)).model.config for key, config in made.items()}
    widths = {(model, width): c.intermediate_size for (model, width, _), c in loaded.items() if model != "moe"}
    assert widths == {
        **{("dense", None): 8, ("dense_long", None): 8, ("dense_width", "1.5x"): 24, ("dense_width_long", "1.5x"): 24},
        **{("mine", "active"): 16, ("mine", "1.5x"): 24, ("other", "expert"): 8, ("other", "1.5x"): 24},
    }
    table = published_table(entries, study.records)
    assert table["kl"].notna().tolist() == table["budget"].notna().tolist()
    kept = retention_table(table, study.records, by=("teacher", "width", "budget"))
    assert set(kept["reference"]) == {"dense", "dense_long"}


def test_a_dense_baseline_of_one_experts_width_where_they_have_the_active_one(study):
    study = replace(study, model={**MOE, "dense_width": "active"})
    made = [build_model(study.dense(0, d_ff=d_ff), study.open_data()) for d_ff in (None, "active", "1.5x", "expert")]
    assert [dense.model.config.intermediate_size for dense in made] == [16, 16, 24, 8]


def test_the_speed_of_every_width(study):
    """With the 12 sequences that there are in place of 16."""
    study.run([study.moe(0)])
    table, _ = study_language_speed(study, ["expert", "1.5x"])
    assert list(table["width"].unique()) == ["moe", "expert", "1.5x"]
    assert set(zip(table["phase"], table["batch_size"], strict=True)) == {
        (p, b) for p in ("prefill", "decoding") for b in (1, 12)
    }
    assert (table.loc[table["width"] == "moe", "speedup"] == 1).all()
    tokens = {"prefill": 16, "decoding": DECODED}
    of_a_pass = table["tokens_per_second"] * table["median_ms"] / 1000
    assert of_a_pass.tolist() == pytest.approx((table["phase"].map(tokens) * table["batch_size"]).tolist())


def test_students_are_made_by_way_of_files(study):
    students = {"mine": ("average", {}), "wide": ("topk", {"d_ff": 20})}
    students |= {"zero_ffn": ("zero_ffn", {}), "shared_kd": ("shared_kd", {})}
    entries = by_name(study, students, {0: None, 3: 0.002}, ["expert"], teacher="M")
    study.run([entry.config for entry in entries])
    rates = {e.config["training"]["learning_rate"] for e in entries if e.axes.get("budget") == 3}
    assert rates == {0.002}
    moe = study.load_model(study.records.find(study.moe(0)))
    assert isinstance(moe.model, MixtralForCausalLM)
    made = {e.model: study.load_model(study.records.find(e.config)).model for e in entries if e.axes.get("budget") == 0}
    widths = {name: m.config.intermediate_size for name, m in made.items()}
    assert widths == {"mine": 8, "wide": 20, "zero_ffn": 8, "shared_kd": 8}
    for i, bank in enumerate(open_experts(moe.model).values()):
        mlp = made["mine"].model.layers[i].mlp
        torch.testing.assert_close(mlp.down_proj.weight, gather(bank, "average").down)
        assert (made["zero_ffn"].model.layers[i].mlp.down_proj.weight == 0).all()
        assert (made["zero_ffn"].model.layers[i].mlp.up_proj.weight != 0).any()
        assert (made["shared_kd"].model.layers[i].mlp.down_proj.weight != 0).any()
    for name in ("mine", "wide"):
        torch.testing.assert_close(made[name].model.embed_tokens.weight, moe.model.model.embed_tokens.weight)
    table = published_table(entries, study.records)
    assert table["teacher"].eq("M").all()
    loss = {(row.model, row.budget): row.value for row in table.itertuples()}
    assert table["perplexity"].tolist() == pytest.approx(table["value"].map(math.exp).tolist())
    assert (table["ratio"] * math.exp(next(v for (m, _), v in loss.items() if m == "moe"))).tolist() == pytest.approx(
        table["perplexity"].tolist()
    )
    assert (table.dropna(subset="budget").groupby("model")["seconds"].diff().dropna() > 0).all()  # KD takes time
    with pytest.raises(ValueError, match=r"method: expected one of .*zero_ffn.*, found 'one_expert'"):
        study.run([study.student("one_expert", 0, 0)])


@pytest.mark.parametrize("kind", ["mixtral", "glm4_moe"])
def test_students_of_active_width_have_the_form_of_the_dense_baseline(kind, study, tmp_path):
    """Shared experts and dense first layers included; reconstructed on so many tokens of the corpus."""
    model = {**MOE, "dense_width": "active"} | (GLM | {"first_k_dense_replace": 1} if kind == "glm4_moe" else {})
    records = Records(tmp_path / "records")
    study = replace(study, model=model, records=records)
    options = {"reconstruct": 640, "student_inputs": True}
    configs = [study.moe(0), study.dense(0), study.student("readout", 0, 0), study.student("readout", 0, 3, **options)]
    _, dense, start, student = study.run(configs)
    shapes = [{n: t.shape for n, t in study.load_model(r).state_dict().items()} for r in (dense, start, student)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert {m.up_proj.weight.shape[0] for m in study.load_model(student).modules() if hasattr(m, "up_proj")} == (
        {16} if kind == "mixtral" else {40}
    )
    gathered = study.records.find(study.student("readout", 0, 0, **options))
    assert all(layer["reconstruction_error"] < 1 for layer in gathered.result["layers"])


def test_a_published_model_is_read_where_it_lies(study, tmp_path):
    (record,) = study.run([study.moe(0)])
    model = study.load_model(record)
    with without_bars():
        model.model.save_pretrained(tmp_path / "moe")
    study.open_data().tokenizer.save_pretrained(tmp_path / "moe")
    data = {**study.data, "tokenizer": str(tmp_path / "moe")}
    records = Records(tmp_path / "records")
    published = replace(study, data=data, model={"checkpoint": str(tmp_path / "moe")}, records=records)
    teacher, student = published.run([published.moe(0), published.student("average", 0, 0)])
    assert teacher.weights_file.stat().st_size < 100  # no copy of it is kept
    loaded = published.load_model(teacher)
    ids = study.open_data().validation[:2].long()
    torch.testing.assert_close(loaded(ids), model(ids))
    assert isinstance(published.load_model(student).model, MistralForCausalLM)
    dense = published.load_model(*published.run([published.dense(0)]))
    assert isinstance(dense.model, MistralForCausalLM)


@pytest.mark.parametrize(("count", "there"), [(512, 23467), (1024, 23467), (1000, 1999), (20000, 23467), (9, 4)])
def test_sequences_for_a_gathering_are_spread_over_the_corpus(count, there):
    """Few of many as in all records: every 45th of 23,467 for the demo's calibration, every 22nd for its reconstruction."""
    taken = _spaced(torch.arange(there)[:, None].expand(-1, 8), 8 * count)[:, 0]
    assert len(taken) == min(count, there)
    if there // count >= 16:
        assert taken.tolist() == list(range(0, there, there // count))[:count]
    assert taken[-1] >= 0.95 * there - max(1, there / count)
