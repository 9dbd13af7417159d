"""WideNet for text: against a plain version of itself, saved and loaded, gathered."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import equal_bank
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from ones_lib import gather, integrate
from ones_lib.models.text import (
    WideNetForMaskedLM,
    WideNetForQuestionAnswering,
    WideNetForSequenceClassification,
    WideNetTextConfig,
    WideNetTextModel,
)
from ones_lib.moe import dispatch_plain

TINY = {
    "vocab_size": 40,
    "embedding_size": 6,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 10,
    "num_experts": 4,
    "max_position_embeddings": 24,
    "relative_positions": 3,
    "initializer_range": 0.5,
}
HEADS = {
    AutoModel: WideNetTextModel,
    AutoModelForMaskedLM: WideNetForMaskedLM,
    AutoModelForSequenceClassification: WideNetForSequenceClassification,
    AutoModelForQuestionAnswering: WideNetForQuestionAnswering,
}


def make(kind=WideNetForMaskedLM, **changes):
    torch.manual_seed(0)
    model = kind(WideNetTextConfig(**{**TINY, **changes})).eval()
    with torch.no_grad():  # else biases and norms are at their trivial start, and an error there would not show
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def tokens(batch=3, length=10, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (batch, length), generator=generator)
    types = (torch.arange(length) >= length // 2).long().expand(batch, length)
    return ids, types


@pytest.mark.parametrize("share_depth", [True, False])
@pytest.mark.parametrize("num_experts", [1, 4])
def test_encoder_computes_what_a_plain_version_computes(share_depth, num_experts):
    """Every sequence on its own, heads and pairs of positions in loops, experts by the reference dispatch."""
    model = make(WideNetTextModel, share_depth=share_depth, num_experts=num_experts)
    batch, types = tokens(batch=2, length=9)
    expected = torch.stack([plain_encoder(model, ids, kinds) for ids, kinds in zip(batch, types, strict=True)])
    found = model(batch, token_type_ids=types).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def plain_encoder(model, ids, kinds):
    d, heads, reach = 12, 2, 3
    embedded = [
        model.word_embeddings.weight[i] + model.token_type_embeddings.weight[t] + model.position_embeddings.weight[p]
        for p, (i, t) in enumerate(zip(ids, kinds, strict=True))
    ]
    x = model.embedding_projection(model.embedding_norm(torch.stack(embedded)))
    for depth in range(3):
        which = 0 if model.config.share_depth else depth
        attention, layer = model.attention[which], model.feed_forward[which]
        query, key, value = attention.qkv(model.attention_norms[depth](x)).split(d, dim=-1)
        mixed = torch.zeros_like(x)
        for head in range(heads):
            part = slice(head * d // heads, (head + 1) * d // heads)
            for i in range(len(ids)):
                scores = torch.stack([query[i, part] @ key[j, part] for j in range(len(ids))]) / (d / heads) ** 0.5
                offsets = [max(-reach, min(reach, j - i)) + reach for j in range(len(ids))]
                weights = (scores + model.position_bias[depth, head, offsets]).softmax(dim=0)
                mixed[i, part] = sum(w * value[j, part] for j, w in enumerate(weights))
        x = x + attention.proj(mixed)
        normed = model.feed_forward_norms[depth](x)
        if layer.router is None:
            x = x + layer.bank().expert(0).apply(normed, F.gelu)
        else:
            x = x + dispatch_plain(layer.bank(), normed, layer.router(normed), F.gelu)
    return model.final_norm(x)


@pytest.mark.parametrize("kind", HEADS.values(), ids=lambda k: k.__name__)
def test_padding_changes_nothing(kind):
    model = make(kind)
    ids, types = tokens()
    padded = [F.pad(t, (0, 5)) for t in (ids, types)]
    mask = F.pad(torch.ones_like(ids), (0, 5))
    plain, masked = model(ids, token_type_ids=types), model(padded[0], mask, padded[1])
    for name, expected in plain.items():
        found = masked[name]
        if found.shape != expected.shape:
            found = found[:, : expected.shape[1]]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_padding_takes_no_experts_place():
    """In training experts have a capacity: padding must not use it, and does not count in the balance."""
    model = make(WideNetTextModel, num_experts=4, capacity_factor=0.6).train()
    ids, types = tokens(batch=6)
    torch.manual_seed(3)
    plain = model(ids, token_type_ids=types).last_hidden_state
    balance = model.balance_loss()
    mask = F.pad(torch.ones_like(ids), (0, 8))
    torch.manual_seed(3)  # the router's noise
    padded = model(F.pad(ids, (0, 8)), mask, F.pad(types, (0, 8))).last_hidden_state
    torch.testing.assert_close(padded[:, :10], plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.balance_loss(), balance)
    padded[:, :10].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("auto", "kind"), HEADS.items(), ids=lambda k: k.__name__)
@pytest.mark.parametrize("num_experts", [1, 4])
def test_saved_and_loaded_through_the_auto_classes(tmp_path, auto, kind, num_experts):
    model = make(kind, num_experts=num_experts, num_labels=5)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {"config.json", "model.safetensors", "generation_config.json"}
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())  # loading runs no code from the folder
    loaded = auto.from_pretrained(tmp_path).eval()
    assert type(loaded) is kind
    read = AutoConfig.from_pretrained(tmp_path).to_dict()
    changed = {name for name, value in model.config.to_dict().items() if read[name] != value}
    assert changed <= {"_name_or_path", "transformers_version"}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), parameter, rtol=0, atol=0)
    ids, types = tokens()
    for name, expected in model(ids, token_type_ids=types).items():
        torch.testing.assert_close(loaded(ids, token_type_ids=types)[name], expected, rtol=0, atol=0)


def test_a_task_model_starts_from_a_saved_language_model(tmp_path):
    """As users fine-tune: the encoder comes from the folder, only the head is new."""
    model = make()
    model.save_pretrained(tmp_path)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {f"{p}.{w}" for p in ("pooler", "classifier") for w in ("weight", "bias")}
    for name, parameter in model.encoder.named_parameters():
        torch.testing.assert_close(classifier.encoder.get_parameter(name), parameter, rtol=0, atol=0)
    assert classifier(tokens()[0]).logits.shape == (3, 3)


def test_dense_of_one_expert_and_moe_of_equal_experts_are_the_same_function():
    moe = make(renormalize=True)
    bank = equal_bank(4, d_ff=10, d_model=12)
    with torch.no_grad():
        for name, tensor in bank.tensors():
            getattr(moe.moe_layers()[0], name).copy_(tensor)
    dense, report = integrate(moe, "average")
    ids, types = tokens()
    torch.testing.assert_close(
        dense.eval()(ids, None, types).logits, moe(ids, None, types).logits, atol=1e-5, rtol=1e-4
    )
    assert not any("router" in name for name, _ in dense.named_parameters())
    assert set(report.table().query("action == 'dropped'")["parameter"]) == {"encoder.feed_forward.0.router.weight"}


@pytest.mark.parametrize("share_depth", [True, False])
@pytest.mark.parametrize("kind", HEADS.values(), ids=lambda k: k.__name__)
def test_integration_copies_all_but_the_experts(kind, share_depth):
    moe = make(kind, share_depth=share_depth)
    student, report = integrate(moe, "topk")
    table = report.table().set_index("parameter")["action"]
    gathered = {name for name in table.index if ".feed_forward." in f".{name}" and "router" not in name}
    assert set(table.index[table == "gathered"]) == gathered
    assert len(gathered) == (4 if share_depth else 12)
    assert table.value_counts().to_dict() == {
        "copied": len(table) - len(gathered) - (1 if share_depth else 3),
        "gathered": len(gathered),
        "dropped": 1 if share_depth else 3,
    }
    for layer, ffn in zip(moe.moe_layers(), student.moe_layers(), strict=True):
        torch.testing.assert_close(ffn.up[0], gather(layer.bank(), "topk").up)


def test_number_of_parameters():
    """Counted by hand: everything is shared across depth but the norms and the position biases."""
    v, e, d, h, n, experts, depth = 40, 6, 12, 10, 24, 4, 3
    embeddings = (v + n + 2) * e + 2 * e + e * d + d
    attention = d * 3 * d + 3 * d + d * d + d
    moe = experts * (2 * d * h + h + d) + experts * d
    norms = depth * 2 * 2 * d + 2 * d
    position_bias = depth * 2 * 7
    head = d * e + e + 2 * e + v  # its output embedding is the input embedding
    found = sum(p.numel() for p in make().parameters())
    assert found == embeddings + attention + moe + norms + position_bias + head


def test_output_embedding_is_the_input_embedding():
    """Changing the embedding of a token that is in no input changes that token's logit alone."""
    model, (ids, _) = make(), tokens()
    ids = ids.clamp(max=38)
    before = model(ids).logits
    with torch.no_grad():
        model.encoder.word_embeddings.weight[39] += 1.0
    difference = (model(ids).logits - before).abs().amax(dim=(0, 1))
    assert difference[39] > 0
    assert difference[:39].max() == 0


def test_chosen_positions_have_the_logits_and_loss_that_all_have():
    model = make()
    ids, types = tokens()
    predicted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    labels = torch.where(predicted, ids, -100)
    every, chosen = model(ids, None, types, labels), model(ids, None, types, labels, predicted)
    torch.testing.assert_close(chosen.logits, every.logits[predicted])
    torch.testing.assert_close(chosen.loss, every.loss)
    by_hand = -every.logits.log_softmax(dim=-1)[predicted].gather(1, ids[predicted][:, None]).mean()
    torch.testing.assert_close(every.loss, by_hand)


def test_losses_of_the_heads_by_hand():
    ids, types = tokens()
    labels = torch.tensor([2, 0, 1])
    output = make(WideNetForSequenceClassification, num_labels=3)(ids, None, types, labels)
    torch.testing.assert_close(output.loss, -output.logits.log_softmax(dim=-1)[range(3), labels].mean())
    output = make(WideNetForQuestionAnswering)(ids, None, types, start_positions=labels, end_positions=labels + 3)
    start = -output.start_logits.log_softmax(dim=-1)[range(3), labels].mean()
    end = -output.end_logits.log_softmax(dim=-1)[range(3), labels + 3].mean()
    torch.testing.assert_close(output.loss, (start + end) / 2)


def uneven():
    """Three pairs of 4 + 6, 3 + 5 and 7 + 1 tokens, padded to 10: ids, mask, types."""
    ids, _ = tokens()
    first, second = torch.tensor([4, 3, 7]), torch.tensor([6, 5, 1])
    place = torch.arange(10)
    mask = (place < (first + second)[:, None]).long()
    return ids, mask, (place >= first[:, None]).long()


def test_the_classifier_compares_the_means_of_two_texts_by_hand():
    model = make(WideNetForSequenceClassification, num_labels=5)
    ids, mask, types = uneven()
    hidden = model.encoder(ids, mask, types).last_hidden_state
    of_u, of_v, of_difference, of_product = model.pooler.weight.split(12, dim=1)
    found = model(ids, mask, types).logits
    for row, (first, second) in enumerate([(4, 6), (3, 5), (7, 1)]):
        u, v = hidden[row, :first].mean(dim=0), hidden[row, first : first + second].mean(dim=0)
        pooled = of_u @ u + of_v @ v + of_difference @ (u - v).abs() + of_product @ (u * v) + model.pooler.bias
        torch.testing.assert_close(found[row], model.classifier(F.gelu(pooled)))


@pytest.mark.parametrize("types", [None, torch.zeros(3, 10, dtype=torch.long)], ids=["no types", "types of 0"])
def test_the_second_text_of_a_single_text_is_zero(types):
    model, (ids, mask, _) = make(WideNetForSequenceClassification), uneven()
    hidden = model.encoder(ids, mask, types).last_hidden_state
    u = torch.stack([part[: int(kept.sum())].mean(dim=0) for part, kept in zip(hidden, mask, strict=True)])
    of_u, _, of_difference, _ = model.pooler.weight.split(12, dim=1)
    expected = model.classifier(F.gelu(u @ of_u.T + u.abs() @ of_difference.T + model.pooler.bias))
    torch.testing.assert_close(model(ids, mask, types).logits, expected)


def test_an_answers_token_is_compared_with_the_questions_mean_by_hand():
    """ "No answer", the first place, has the best of the context's tokens, number by number."""
    model = make(WideNetForQuestionAnswering)
    ids, mask, types = uneven()
    hidden = model.encoder(ids, mask, types).last_hidden_state
    of_token, of_question, of_product = model.matching.weight.split(12, dim=1)
    found = model(ids, mask, types)
    for row, (first, second) in enumerate([(4, 6), (3, 5), (7, 1)]):
        q = hidden[row, :first].mean(dim=0)
        matched = [
            F.gelu(of_token @ h + of_question @ q + of_product @ (h * q) + model.matching.bias)
            for h in hidden[row, : first + second]
        ]
        best = torch.stack([max(numbers) for numbers in zip(*matched[first:], strict=True)])
        expected = [model.no_answer(best), *map(model.qa_outputs, matched[1:])]
        for place, (start, end) in enumerate(expected):
            torch.testing.assert_close(found.start_logits[row, place], start)
            torch.testing.assert_close(found.end_logits[row, place], end)


def test_without_a_context_the_head_for_answers_is_finite():
    ids, mask, types = uneven()
    found = make(WideNetForQuestionAnswering)(ids, mask, torch.zeros_like(types))
    assert found.start_logits.isfinite().all()
    assert found.end_logits.isfinite().all()


def test_heads_start_looking_ahead_or_back_each_pair_farther_than_the_one_before():
    """By hand, for distances -2 to 2; the other direction costs 2 a token, the token itself 1."""
    model = WideNetTextModel(WideNetTextConfig(**{**TINY, "num_attention_heads": 4, "relative_positions": 2}))
    ahead = torch.tensor([[-6.0, -3.0, -1, -1.0, -2.0], [-4.5, -2.25, -1, -0.25, -0.5]])
    expected = torch.stack([ahead[0], ahead[0].flip(0), ahead[1], ahead[1].flip(0)])
    for bias in model.position_bias:
        torch.testing.assert_close(bias, expected)


def test_balance_loss_is_of_the_last_forward_pass():
    model = make().train()
    ids, _ = tokens()
    model(ids)
    model(ids)
    assert len(model.moe_layers()[0].balance_losses) == 3  # one a depth
    assert model.balance_loss() > 0.9
    assert make(num_experts=1).train().balance_loss() == 0.0


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: WideNetTextConfig(hidden_size=10, num_attention_heads=4), "hidden_size: expected a multiple of"),
        (lambda: make(num_experts_per_tok=9), "top_k: expected an integer from 1 to num_experts=4, found 9"),
        (lambda: make()(torch.zeros(1, 25, dtype=torch.long)), "input_ids: expected at most 24 tokens, found 25"),
    ],
)
def test_bad_input(action, message):
    with pytest.raises(ValueError, match=message):
        action()
