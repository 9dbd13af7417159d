"""What a router does and what error to expect of each width: by hand, and of tiny checkpoints."""

import itertools
import math
import re
import warnings

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import equal_bank, random_bank
from test_checkpoints import TOKENS, logits, quiet, with_tokenizer  # noqa: F401  quiet is a fixture
from test_quantised import fp8_moe
from tiny_moes import moe, perplexity
from torch.nn.functional import silu

from ones_lib.calibration import LayerActivations
from ones_lib.checkpoints import convert, inspection, work
from ones_lib.checkpoints.activations import split_tokens
from ones_lib.checkpoints.inspection import (
    Inspection,
    _advice,
    _report,
    expert_pairs,
    inspect,
    main,
    output_correlation,
    readouts,
    router_statistics,
    weight_cosine,
)
from ones_lib.checkpoints.stream import load_checkpoint
from ones_lib.checkpoints.text import text_blocks
from ones_lib.gathering.registry import gather_precisely
from ones_lib.views import figures

IDS = torch.randint(3, 64, (32, 48), generator=torch.Generator().manual_seed(1))
HELD_OUT = IDS[torch.randperm(32, generator=torch.Generator().manual_seed(0))[24:]]


def chosen(*sets, count=4, gate=0.5):
    """Tokens that choose these sets of experts."""
    gates = torch.zeros(len(sets), count)
    for row, experts in zip(gates, sets, strict=True):
        row[list(experts)] = gate
    return LayerActivations(torch.zeros(len(sets), 2), gates, torch.ones(len(sets), 2), silu)


def outputs_of(bank, gates, d_model=8):
    """Tokens at a layer of these experts."""
    inputs = torch.randn(len(gates), d_model, generator=torch.Generator().manual_seed(1))
    each = torch.stack([expert.apply(inputs, silu) for expert in bank.experts()], dim=1)
    return LayerActivations(inputs, gates, (gates[..., None] * each).sum(dim=1), silu)


# --- the router, by hand ----------------------------------------------------------------------------------------------


def test_a_router_that_uses_all_alike():
    found = router_statistics(chosen((0, 1), (2, 3), (0, 2), (1, 3)))
    assert found["experts"] == 4
    assert found["chosen"] == 2
    assert found["effective_experts"] == pytest.approx(4)
    assert found["gini"] == pytest.approx(0, abs=1e-7)
    assert (found["gate_sum"], found["gate_sum_sd"]) == (1, 0)


def test_a_router_that_uses_one_expert():
    found = router_statistics(chosen((2,), (2,), (2,)))
    assert found["effective_experts"] == pytest.approx(1)
    assert found["gini"] == pytest.approx(3 / 4)


def test_a_router_between_the_two():
    """Shares 1/2, 1/4, 1/4, 0: entropy 1.5 bits; differences of pairs 1/4 1/4 1/2 0 1/4 1/4, so Gini 2 * 1.5 / (2 * 4)."""
    tokens = chosen((0,), (0, 1), (2,), gate=0.3)
    found = router_statistics(tokens)
    assert found["effective_experts"] == pytest.approx(2**1.5)
    assert found["gini"] == pytest.approx(3 / 8)
    assert found["chosen"] == pytest.approx(4 / 3)
    assert found["gate_sum"] == pytest.approx(0.4)
    assert found["gate_sum_sd"] == pytest.approx(math.sqrt((2 * 0.1**2 + 0.2**2) / 3))


def test_experts_that_fire_together_only():
    """Two pairs, each in half of the tokens: two of four drawn without regard make a pair in 1 of 6."""
    table = expert_pairs(chosen(*[(0, 1), (2, 3)] * 30))
    assert table[["expert", "other", "count"]].to_numpy().tolist() == [[0, 1, 30], [2, 3, 30]]
    assert table["expected"].to_list() == pytest.approx([10, 10])
    assert table["lift"].to_list() == pytest.approx([3, 3])


def test_triples_that_fire_together_only():
    """Two triples: three of six drawn without regard make a pair in 1 of 5, and these pairs are in half of the tokens."""
    table = expert_pairs(chosen(*[(0, 1, 2), (3, 4, 5)] * 30, *[()] * 7, count=6))
    pairs = set(map(tuple, table[["expert", "other"]].to_numpy()))
    assert pairs < {*itertools.combinations(range(3), 2), *itertools.combinations(range(3, 6), 2)}
    assert table["expected"].to_list() == pytest.approx([12] * 5)
    assert table["lift"].to_list() == pytest.approx([2.5] * 5)


def test_an_expert_that_is_used_more_is_not_beyond_chance():
    """Pairs drawn with probabilities in proportion to u_i u_j. P(i, j) / (P(i) P(j)) itself differs between them."""
    u = np.array([8, 4, 2, 1, 1])
    pairs = [pair for pair in itertools.combinations(range(5), 2) for _ in range(5 * u[pair[0]] * u[pair[1]])]
    seen = chosen(*pairs, count=5)
    table = expert_pairs(seen)
    assert table.empty or table["lift"].max() < 1 + 1e-6
    # The same with one pair twice as often.
    table = expert_pairs(chosen(*pairs, *[(1, 2)] * 40, count=5))
    assert table.iloc[0][["expert", "other", "count"]].to_list() == [1, 2, 80]


def test_pairs_that_are_too_rare_to_tell_and_lone_experts_are_not_listed():
    assert expert_pairs(chosen((0, 1), (2, 3))).empty
    assert expert_pairs(chosen((0,), (1,), (2,))).empty
    rare = expert_pairs(chosen(*[(0, 1), (0, 2), (1, 2)] * 30, (3, 0), (3, 0)))
    assert 3 not in rare[["expert", "other"]].to_numpy()


# --- likeness and errors, by hand -------------------------------------------------------------------------------------


def test_likeness_of_equal_opposite_and_different_experts():
    equal, gates = equal_bank(3, gated=True), torch.full((300, 3), 0.5)
    assert weight_cosine(equal.experts()) == pytest.approx(1, abs=1e-6)
    assert output_correlation(equal.experts(), outputs_of(equal, gates)) == pytest.approx(1, abs=1e-6)
    one = random_bank(1, gated=True).expert(0)
    assert weight_cosine([one, one.map(torch.neg)]) == pytest.approx(-1, abs=1e-6)
    flipped = one.times({"down": -1.0, "down_bias": -1.0})
    assert output_correlation([one, flipped], outputs_of(equal, gates)) == pytest.approx(-1, abs=1e-6)
    assert math.isnan(weight_cosine([one]))


def test_likeness_is_the_mean_over_pairs(form):
    """Against numpy, pair by pair; 256 tokens are all that are looked at."""
    bank = random_bank(4, **form)
    seen = outputs_of(bank, torch.full((256, 4), 0.25))
    flat = np.stack([np.concatenate([t.numpy().ravel() for _, t in e.tensors()]) for e in bank.experts()])
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    pairs = np.triu_indices(4, 1)
    assert weight_cosine(bank.experts()) == pytest.approx((flat @ flat.T)[pairs].mean(), abs=1e-6)
    outputs = np.stack([(o := e.apply(seen.inputs, silu).numpy()) - o.mean(axis=0) for e in bank.experts()])
    expected = np.corrcoef(outputs.reshape(4, -1))[pairs].mean()
    assert output_correlation(bank.experts(), seen) == pytest.approx(expected, abs=1e-6)


def test_the_error_falls_with_the_width_and_is_none_at_all_experts():
    """Where gates do not depend on the token, all experts side by side are the layer."""
    bank = random_bank(4, gated=True)
    seen = outputs_of(bank, torch.tensor([[0.4, 0.3, 0.2, 0.1]]).repeat(2000, 1))
    errors = [error for _, error in readouts(bank.experts(), seen, [12, 24, 48])]
    assert 1 > errors[0] > 1.1 * errors[1] > 0
    assert errors[2] < 1e-5


def test_errors_are_of_tokens_that_were_not_solved_for():
    """Outputs that are noise: what was solved for would be met nearly, the rest is not."""
    bank, noise = random_bank(4, gated=True), torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
    seen = outputs_of(bank, torch.full((64, 4), 0.25))
    seen = LayerActivations(seen.inputs, seen.gates, noise, silu)
    ((_, error),) = readouts(bank.experts(), seen, [48])
    assert error > 1


def test_blocks_are_held_out_whole():
    """Of 5 blocks of 3 tokens, one."""
    numbers = torch.arange(15.0)[:, None]
    parts = split_tokens(LayerActivations(numbers, numbers, numbers, silu), 5)
    given, held_out = (sorted(part.inputs.flatten().int().tolist()) for part in parts)
    assert len(held_out) == 3
    assert held_out[0] % 3 == 0
    assert held_out[-1] == held_out[0] + 2
    assert sorted(given + held_out) == list(range(15))


# --- checkpoints --------------------------------------------------------------------------------------------------------


def split_as_inspected(monkeypatch):
    """Conversions spare the same blocks."""
    monkeypatch.setattr(work, "split_tokens", lambda seen: split_tokens(seen, len(IDS)))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3", "switch_transformers"])
def test_a_checkpoint_as_its_model_says(kind, tmp_path, monkeypatch):
    """Shares and gates against those of transformers' routers; names of layers as in a conversion."""
    model = moe(kind)
    model.save_pretrained(tmp_path / "moe")
    found = inspect(tmp_path / "moe", IDS)
    assert isinstance(found, Inspection)
    if kind != "switch_transformers":
        split_as_inspected(monkeypatch)
    table = convert(tmp_path / "moe", tmp_path / "dense", "readout", calibration=IDS)
    assert found.router["layer"].to_list() == table["layer"].to_list()
    k = {"switch_transformers": 1}.get(kind, 2)
    count = 8 if kind == "deepseek_v3" else 4
    assert (found.router["experts"] == count).all()
    assert found.router["effective_experts"].between(1, count).all()
    assert found.errors["multiple"].unique().tolist() == sorted({m for m in (1, k, 2 * k, 4 * k) if m <= count})
    assert (found.errors["d_ff"] == 24 * found.errors["multiple"]).all()
    # An expert's width is what a conversion measures.
    ones = found.errors[found.errors["multiple"] == 1]["output_error"]
    assert ones.to_list() == pytest.approx(table["output_error"].to_list(), rel=1e-4)
    widest = found.errors.groupby("layer", sort=False)["output_error"].last()
    assert (widest.to_numpy() < ones.to_numpy()).all()
    if kind != "switch_transformers":
        assert found.router["chosen"].to_list() == [2] * len(table)
    if kind in ("mixtral", "qwen3_moe"):
        assert found.router["gate_sum"].to_list() == pytest.approx([1] * len(table), abs=1e-5)
        assert found.router["gate_sum_sd"].max() < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


def test_equal_experts_of_a_checkpoint(tmp_path):
    moe("qwen3_moe", equal=True).save_pretrained(tmp_path / "moe")
    found = inspect(str(tmp_path / "moe"), IDS)
    assert found.router["weight_cosine"].to_list() == pytest.approx([1, 1], abs=1e-5)
    assert found.router["output_correlation"].to_list() == pytest.approx([1, 1], abs=1e-5)
    assert found.errors["output_error"].max() < 1e-2
    assert found.models["kl"].between(-1e-5, 1e-4).all()
    assert found.models["perplexity"].to_list() == pytest.approx([found.models.attrs["MoE"]] * 3, rel=1e-3)


def close_to_a_conversion(folder, model, models, tolerance):
    """The whole model of the active width against a conversion's, which transformers runs, on the blocks that are held out."""
    row, twin = models.iloc[1], folder.with_name("dense")
    assert models.attrs["MoE"] == pytest.approx(perplexity(model, HELD_OUT), rel=tolerance)
    assert models.attrs["tokens"] == 8 * 47
    convert(folder, twin, "readout", "active", calibration=IDS)
    twin = load_checkpoint(twin)
    p, q = (logits(one, HELD_OUT)[:, :-1].double().log_softmax(dim=-1) for one in (model, twin))
    assert row["kl"] == pytest.approx((p.exp() * (p - q)).sum(dim=-1).mean().item(), rel=tolerance)
    assert row["perplexity"] == pytest.approx(perplexity(twin, HELD_OUT), rel=tolerance)


@pytest.mark.parametrize("kind", ["mixtral", "glm4_moe", "qwen2_moe", "llama4_text"])
def test_whole_models_are_what_conversions_give(kind, tmp_path, monkeypatch):
    """Plain; with a shared expert and a factor; with one expert, beside a shared one with a gate; with gates at the inputs."""
    split_as_inspected(monkeypatch)
    model = moe(kind)
    model.save_pretrained(tmp_path / "moe")
    models = inspect(tmp_path / "moe", IDS).models
    assert models["multiple"].to_list() == [1, 2, 4]
    assert models["d_ff"].to_list() == [24, 48, 96]
    assert models["kl"].min() > 0.01
    close_to_a_conversion(tmp_path / "moe", model, models, 1e-4)


def test_whole_models_of_fp8(tmp_path, monkeypatch):
    split_as_inspected(monkeypatch)
    model = fp8_moe(tmp_path / "moe")
    models = inspect(tmp_path / "moe", IDS).models
    close_to_a_conversion(tmp_path / "moe", model, models, 3e-2)  # in bfloat16


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gemma4_text", "gemma4_text can't be run block by block, since its blocks hand on more states"),
        ("switch_transformers", "switch_transformers can't be run block by block, since it has an encoder"),
        ("muse_spark_text", "muse_spark_text norms each expert's output"),
        ("qwen3_vl_moe_text", "Qwen3VLMoeTextModel: expected logits for token ids, found"),
        ("openai_privacy_filter", "expected logits of the tokens, up to 63, found 5"),
    ],
)
def test_types_without_whole_models_keep_the_other_tables(kind, reason, tmp_path):
    moe(kind).save_pretrained(tmp_path / "moe")
    found = inspect(tmp_path / "moe", IDS)
    assert reason in found.models.attrs["missing"]
    assert found.models.columns.to_list() == ["multiple", "d_ff", "perplexity", "kl"]
    assert found.models.empty
    assert found.errors["output_error"].notna().all()
    assert _report(found).startswith(
        f"What the whole model would be like is not known: {found.models.attrs['missing']}."
    )


def test_numbers_that_are_too_large_leave_the_other_tables(tmp_path, monkeypatch):
    moe("mixtral").save_pretrained(tmp_path / "moe")

    def huge(*arguments, **options):
        return gather_precisely(*arguments, **options).times({"down": torch.inf})

    monkeypatch.setattr(inspection, "gather_precisely", huge)
    found = inspect(tmp_path / "moe", IDS)
    assert "model.layers.0: expected finite numbers on the text" in found.models.attrs["missing"]
    assert len(found.router) == 3


def test_a_width_that_memory_is_too_small_for_is_in_no_table(tmp_path, monkeypatch):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    monkeypatch.setattr(inspection, "_solver_bytes", lambda width: 10**18 if width > 48 else 0)
    with pytest.warns(UserWarning, match=r"no errors of widths \[96\]"):
        found = inspect(tmp_path / "moe", IDS)
    assert found.models["d_ff"].to_list() == found.errors["d_ff"].unique().tolist() == [24, 48]


def test_a_text_of_three_blocks_has_none_to_spare(tmp_path):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    with pytest.warns(UserWarning, match="calibration_tokens: expected 512"):
        found = inspect(tmp_path / "moe", IDS[:3])
    assert found.models.attrs["missing"] == "it takes 4 blocks of text or more, found 3 of 48 tokens"
    assert found.errors["output_error"].notna().all()


def test_experts_with_clamps_are_inspected_as_they_compute(tmp_path):
    """All experts' units together solve a layer of equal experts."""
    moe("gpt_oss", equal=True).save_pretrained(tmp_path / "moe")
    found = inspect(tmp_path / "moe", IDS)
    assert found.router["chosen"].to_list() == [2, 2, 2]
    assert (found.router["output_correlation"] - 1).abs().max() < 1e-4
    assert found.errors.groupby("layer")["output_error"].first().max() < 1e-2


def test_the_command_line(tmp_path, capsys):
    text = with_tokenizer(tmp_path / "moe")
    main([str(tmp_path / "moe"), "--calibration", str(text), "--calibration-tokens", "1024"])
    printed = capsys.readouterr().out
    found = inspect(tmp_path / "moe", text_blocks(text, tmp_path / "moe", 1024, "train"))
    for layer, error in found.errors.groupby("layer")["output_error"].first().items():
        assert re.search(rf"{layer} +{error:.3f}", printed)
    assert re.search(r"1 x expert \(24\) +2 x expert \(48\) +4 x expert \(96\)", printed)
    assert re.search(r"The best for its size is --d-ff (24|48|96) \(\d x an expert's width\)", printed)
    assert f"{found.router['effective_experts'][0]:.1f}" in printed
    assert printed.startswith("The whole model with read-outs in all layers")
    for row in found.models.itertuples():
        assert re.search(rf"{row.multiple} x expert \({row.d_ff}\) +{row.perplexity:.4g} +{row.kl:.3f}\n", printed)
    assert re.search(rf"MoE +{found.models.attrs['MoE']:.4g} ", printed)
    assert "above 0.5 it is another model" in printed
    assert "These are read-outs" in printed
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "gone")])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("MOE: expected a folder or a hub name")


def test_the_command_line_says_what_is_not_known(tmp_path, capsys, monkeypatch):
    with_tokenizer(tmp_path / "mixtral")
    text = ["--calibration", str(tmp_path / "text.txt"), "--calibration-tokens", "64"]
    monkeypatch.setattr(inspection, "_solver_bytes", lambda width: width * 10**15)
    with pytest.warns(
        UserWarning, match=r"memory: expected 24000000\.0 GB to solve for 24 hidden units.*widths \[24, 48, 96\]"
    ):
        main([str(tmp_path / "mixtral"), *text])
    printed = capsys.readouterr().out
    assert printed.startswith("What the whole model would be like is not known: ")
    assert "\nNo error to expect is known: memory is too small for every width" in printed


def test_which_width_to_take():
    def said(*errors):
        index = pd.MultiIndex.from_tuples([(1, 24), (2, 48), (8, 192)][: len(errors)], names=["multiple", "d_ff"])
        return _advice(pd.Series(errors, index))

    assert said(0.9, 0.85, 0.1).startswith("The best for its size is --d-ff 24 (1 x")
    # Two doublings that leave 0.81 of the error are worth it, with 0.82 they are not.
    assert said(0.9, 0.5, 0.4).startswith("The best for its size is --d-ff 192 (8 x")
    assert said(0.9, 0.5, 0.41).startswith("The best for its size is --d-ff 48 (2 x")
    assert said(0.9).startswith("The best for its size is --d-ff 24 (1 x")


def test_a_width_with_too_few_tokens_is_marked_and_not_recommended(tmp_path, capsys):
    """With 192 tokens, 144 are solved on: 24 units have 4 each and more, 48 and 96 have not."""
    text = with_tokenizer(tmp_path / "moe")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        main([str(tmp_path / "moe"), "--calibration", str(text), "--calibration-tokens", "200"])
    printed = capsys.readouterr().out
    assert re.search(r"1 x expert \(24\) +2 x expert \(48\) \* +4 x expert \(96\) \*", printed)
    assert "The best for its size is --d-ff 24 (1 x an expert's width)" in printed
    assert "--calibration-tokens 512 are enough" in printed


def test_few_tokens_are_said_once_and_only_if_they_were_asked_for(tmp_path, monkeypatch):
    text = with_tokenizer(tmp_path / "moe")
    monkeypatch.setattr(inspection, "TOKENS", {"calibration": 192})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inspect(tmp_path / "moe", text)
    for given in ((text, 192), (text_blocks(text, tmp_path / "moe", 192), None)):
        message = "calibration_tokens: expected 512 for a read-out of 96 hidden units, found 192"
        with pytest.warns(UserWarning, match=message) as said:
            inspect(tmp_path / "moe", *given)
        assert len(said) == 1  # of three layers
    monkeypatch.setattr(inspection, "_solver_bytes", lambda width: width * 10**15)
    with pytest.warns(UserWarning, match="memory: expected 24000000") as said:
        inspect(tmp_path / "moe", text)
    assert len(said) == 1


def test_a_shorter_text_than_asked_for_is_said(tmp_path):
    text = with_tokenizer(tmp_path / "moe")
    there = text_blocks(text, tmp_path / "moe").numel()
    with pytest.warns(
        UserWarning, match=f"calibration_tokens: asked for 10,000,000, takes the {there:,} that text.txt has"
    ):
        inspect(tmp_path / "moe", text, 10**7)


# --- figure -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_the_figure_shows_the_tables(count):
    layers = [f"model.layers.{i}.mlp" for i in (9, 10, 11)][:count]
    router = pd.DataFrame({"layer": layers, "experts": 8, "effective_experts": [6.0, 5.0, 7.0][:count], "gini": 0.3})
    errors = pd.DataFrame(
        [
            {"layer": name, "multiple": m, "output_error": i + 0.5 / m}
            for i, name in enumerate(layers)
            for m in (1, 2, 4)
        ]
    )
    figures.set_style()
    fig = figures.router_by_layer(router, errors)
    used, uneven, wide, _ = fig.axes
    np.testing.assert_array_equal(used.lines[1].get_xydata(), [*enumerate([6.0, 5.0, 7.0][:count], start=1)])
    np.testing.assert_array_equal(uneven.lines[0].get_ydata(), [0.3] * count)
    for i in range(count):
        np.testing.assert_array_equal(wide.lines[i].get_xydata(), [(m, i + 0.5 / m) for m in (1, 2, 4)])
    np.testing.assert_allclose(wide.lines[count].get_ydata(), [(count - 1) / 2 + 0.5 / m for m in (1, 2, 4)])
    fig.draw_without_rendering()
    assert fig.get_size_inches()[0] == figures.TWO_COLUMNS
    texts = [text for text in fig.findobj(mpl.text.Text) if text.get_text() and text.get_visible()]
    assert min(text.get_fontsize() for text in texts) >= 6


def test_the_figure_of_unknown_errors():
    router = pd.DataFrame({"layer": ["a"], "experts": 8, "effective_experts": 6.0, "gini": 0.3})
    errors = pd.DataFrame({"layer": ["a"], "multiple": 1, "output_error": np.nan})
    figures.router_by_layer(router, errors).draw_without_rendering()


# --- bad input ----------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_before_the_model_runs(tmp_path, monkeypatch):
    moe("mixtral").save_pretrained(tmp_path / "moe")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(inspection, "store_activations", None)
    cases = [
        (tmp_path / "gone", TOKENS, FileNotFoundError, "source: expected a folder or a hub name"),
        (tmp_path / "empty", TOKENS, FileNotFoundError, r"empty: expected config\.json"),
        (tmp_path / "moe", "docstrings", ValueError, "moe: expected a tokenizer beside the model"),
        (tmp_path / "moe", None, TypeError, "calibration: expected a text or token ids .*, found NoneType"),
        (
            tmp_path / "moe",
            TOKENS[0],
            ValueError,
            r"calibration: expected token ids \[n, L\], found torch.int64 \[24\]",
        ),
        (tmp_path / "moe", TOKENS[:1, :9], ValueError, "calibration: expected 16 tokens or more, found 9"),
        (tmp_path / "moe", TOKENS.float(), ValueError, r"expected token ids .*found torch.float32"),
        (tmp_path / "moe", TOKENS + 60, ValueError, "calibration: expected token ids from 0 to 63, found 63 to 123"),
    ]
    for source, calibration, error, message in cases:
        with pytest.raises(error, match=message):
            inspect(source, calibration)
    with pytest.raises(ValueError, match="calibration_tokens: expected an integer of at least 1, found 0"):
        inspect(tmp_path / "moe", TOKENS, calibration_tokens=0)


def test_weights_that_are_not_numbers_are_named(tmp_path):
    model = moe("mixtral")
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[1, 0, 0] = torch.inf
    model.save_pretrained(tmp_path / "moe")
    with pytest.raises(
        ValueError, match=r"moe: model\.layers\.2.*: down of expert 1: expected finite weights, found 1"
    ):
        inspect(tmp_path / "moe", IDS)
