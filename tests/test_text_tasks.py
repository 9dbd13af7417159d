"""The text study: masks, answers and their scores, fine-tuning, and the records and tables of a small one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_text_data import REAL, SMALL_CORPUS, SMALL_TASKS, STARS, local, local_corpus, local_tasks, reviews, write  # noqa: F401

from ones_lib import Distillation
from ones_lib.data.files import model_tensors
from ones_lib.data.rows import HUB_TASKS, TASKS
from ones_lib.data.squad import LONGEST_ANSWER, best_spans, span_texts
from ones_lib.data.text import text_corpus, text_tasks
from ones_lib.data.tokens import EncodedText
from ones_lib.study import entries as compare
from ones_lib.study.parameters import read_parameters
from ones_lib.study.records import Records, config_hash
from ones_lib.study.running import build_model
from ones_lib.study.study import Study, make_study
from ones_lib.study.tables import AVERAGE, main_metrics, results_table, retention_table, with_average
from ones_lib.study.text_tasks import (
    Classification,
    MaskedLanguageModelling,
    QuestionAnswering,
    finetuning_model,
    pretraining_model,
)
from ones_lib.study.training import Training, fit

CPU = torch.device("cpu")
MODEL = {
    "embedding_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "relative_positions": 2,
}


@pytest.fixture
def data(local):  # noqa: F811
    return local_corpus(local)


@pytest.fixture
def tasks(local):  # noqa: F811
    return local_tasks(local)


# --- masked language modelling ---------------------------------------------------------------------------------------


def test_masks_are_berts(data):
    """15% are chosen; of them 80% are masked, 10% random, 10% left; special tokens never."""
    task, mask_id = MaskedLanguageModelling(data), data.tokenizer.mask_token_id
    ordinary = [i for i in range(data.vocab_size) if i not in data.tokenizer.all_special_ids]
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor(ordinary)[torch.randint(len(ordinary), (4000, 100), generator=generator)]
    ids[:, 0], ids[:, -1] = data.tokenizer.cls_token_id, data.tokenizer.sep_token_id
    batch = task._batch(*task.mask(ids, generator), torch.device("cpu"))
    assert not batch.predicted[:, [0, -1]].any()
    assert batch.predicted[:, 1:-1].float().mean().item() == pytest.approx(0.15, abs=0.002)
    assert torch.equal(batch.labels, ids[batch.predicted])
    assert torch.equal(batch.ids[~batch.predicted], ids[~batch.predicted])
    given, truth = batch.ids[batch.predicted], batch.labels
    masked, kept = given == mask_id, given == truth
    assert masked.float().mean().item() == pytest.approx(0.8, abs=0.005)
    # A random token may be the right one by chance.
    assert kept.float().mean().item() == pytest.approx(0.1 + 0.1 / data.vocab_size, abs=0.005)
    other = given[~masked & ~kept]
    assert len(other) / len(given) == pytest.approx(0.1, abs=0.005)
    assert len(other.unique()) > 0.9 * len(ordinary)


def test_training_masks_are_new_at_every_step_and_those_of_the_validation_never(data):
    task, training = MaskedLanguageModelling(data), Training(steps=3, batch_size=8)

    def drawn(seed):
        torch.manual_seed(seed)
        return [batch.predicted for batch in task.batches(training, 0, 0, CPU)]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])
    model = pretraining_model(MODEL, data, 0)
    torch.manual_seed(5)
    before = task.predict(model, CPU)
    torch.manual_seed(6)
    after = task.predict(model, CPU)
    assert torch.equal(before["loss"], after["loss"])
    assert before["loss"].shape == before["accuracy"].shape
    assert before["loss"].mean().item() == pytest.approx(np.log(data.vocab_size), rel=0.2)


def test_a_language_model_learns_what_comes_next(data):
    """The corpus is of few words in fixed phrases."""
    task = MaskedLanguageModelling(data)
    torch.manual_seed(0)
    model = pretraining_model({**MODEL, "hidden_size": 16, "initializer_range": 0.3}, data, 0)
    before = task.predict(model, CPU)["loss"].mean()
    model, history = fit(model, task, Training(steps=150, batch_size=16, learning_rate=1e-2, evaluations=2), seed=0)
    assert task.predict(model, CPU)["loss"].mean() < before - 1
    assert list(history["val_loss"].dropna().index) == list(history["val_accuracy"].dropna().index)
    assert len(history["val_loss"].dropna()) == 2


@pytest.mark.parametrize("guard", [True, False])
def test_parts_with_nothing_to_predict_change_nothing(data, guard):
    """One sequence at a time, of which most have no mask; with and without a teacher. A whole batch without one is a step too."""
    task, recipe = MaskedLanguageModelling(replace(data, mask_rate=0.03)), Training(6, 8, 1e-2, balance_weight=0.0)
    assert 0 in [task.count(batch) for batch in task.batches(replace(recipe, batch_size=1), 0, 0, CPU)]

    def model(seed):
        return pretraining_model(
            MODEL | {"num_experts": 1}, data, seed
        )  # routers have noise and count capacity by part

    def fitted(batch_size=8, **how):
        return fit(model(0), task, replace(recipe, batch_size=batch_size), seed=0, **how)

    def kd():
        return {"teacher": model(1), "distillation": Distillation(guard=guard)}

    for how in (dict, kd):
        (whole, history), (parts, split) = fitted(**how()), fitted(device_batch=1, **how())
        np.testing.assert_allclose(split["loss"], history["loss"], rtol=1e-4)
        for name, tensor in model_tensors(whole).items():
            torch.testing.assert_close(model_tensors(parts)[name], tensor, rtol=1e-3, atol=1e-3)
        assert fitted(batch_size=1, **how())[1]["loss"].notna().all()


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [6, LONGEST_ANSWER + 12])
def test_best_span_is_the_best_of_all_spans(length):
    logits = torch.randn(5, 2, length, generator=torch.Generator().manual_seed(length))
    score, first, last, null = best_spans(logits)
    for row, (start, end) in enumerate(logits.tolist()):
        spans = {(i, j): start[i] + end[j] for i in range(1, length) for j in range(i, min(length, i + LONGEST_ANSWER))}
        best = max(spans, key=spans.get)
        assert (first[row].item(), last[row].item()) == best
        assert score[row].item() == pytest.approx(spans[best])
        assert null[row].item() == pytest.approx(start[0] + end[0])


def test_the_best_window_answers_and_the_least_likely_silence_counts():
    """Two questions, the first in two windows."""
    contexts = ["red and blue", "green"]
    offsets = torch.tensor([[[-1, -1], [0, 3], [4, 7]], [[-1, -1], [4, 7], [8, 12]], [[-1, -1], [0, 5], [-1, -1]]])
    encoded = EncodedText(*torch.zeros(4, 3, 3).long(), example=torch.tensor([0, 0, 1]), offsets=offsets)
    score, null = torch.tensor([1.0, 4.0, 2.0]), torch.tensor([6.0, 3.0, 5.0])
    first, last = torch.tensor([1, 1, 1]), torch.tensor([2, 2, 1])
    texts, odds = span_texts(contexts, encoded, score, first, last, null)
    assert texts == ["and blue", "green"]
    assert odds.tolist() == [-1.0, 3.0]


def knowing(task, monkeypatch):
    """Predictions of a model that knows the targets."""

    def forward(model, batch):
        if isinstance(task, Classification):
            return torch.nn.functional.one_hot(batch.targets, len(task.spec.labels)).float()
        return torch.nn.functional.one_hot(batch.targets, batch.ids.shape[1]).float()

    monkeypatch.setattr(task, "forward", forward)
    return task.predict(torch.nn.Module(), CPU)


@pytest.mark.parametrize("task_length", [22, 60])
def test_a_model_that_knows_scores_full_marks(local, monkeypatch, task_length):  # noqa: F811
    tasks = local_tasks(local, task_length=task_length)
    for name in ("squad", "squad_v2"):
        task = QuestionAnswering(tasks, name)
        scores = knowing(task, monkeypatch)
        assert set(task.metrics) <= set(scores)
        for metric in task.metrics:
            assert scores[metric].shape == (20,)
            assert scores[metric].mean() == 1.0, (name, metric)
    for name in ("sst2", "mnli"):
        scores = knowing(Classification(tasks, name), monkeypatch)
        assert all(scores[metric].mean() == 1.0 for metric in Classification(tasks, name).metrics)


def test_rows_with_an_answer_that_no_window_holds_whole_are_evaluated_too(local, monkeypatch):  # noqa: F811
    """In a task that knows no silence, and with windows that do not overlap."""
    task = QuestionAnswering(local_tasks(local, task_length=24, stride=0), "squad")
    lost = task.tasks.encoded("squad", "validation").lost
    scores = knowing(task, monkeypatch)["exact_match"]
    assert scores.shape == (20,)
    assert scores.logical_not().nonzero()[:, 0].tolist() == lost.tolist() != []


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL}")
def test_a_model_that_knows_scores_full_marks_on_real_data(monkeypatch, tmp_path):
    of_tasks = {"name": "local", "text_dir": REAL, "tasks": HUB_TASKS}
    tokenizer = text_corpus("tasks", of_tasks=of_tasks, cache_dir=tmp_path).tokenizer
    tasks = text_tasks("local", text_dir=REAL, tokenizer=tokenizer, task_length=192, stride=64)
    for name in HUB_TASKS:
        task = (QuestionAnswering if TASKS[name].labels is None else Classification)(tasks, name)
        scores = knowing(task, monkeypatch)
        long = 0  # an answer longer than any that a model may give
        if TASKS[name].labels is None:
            encoded = tasks.encoded(name, "validation")
            long = (encoded.targets[:, 1] - encoded.targets[:, 0] >= LONGEST_ANSWER).sum().item()
        assert scores[task.metrics[0]].mean() >= 1 - long / len(scores[task.metrics[0]])


def test_only_the_context_and_silence_can_be_answered(data, tasks):
    task = QuestionAnswering(tasks, "squad_v2")
    model = finetuning_model(pretraining_model(MODEL, data, 0), "squad_v2", 0).eval()
    batch = next(task.batches(Training(steps=1, batch_size=8), 0, 0, CPU))
    logits = task.forward(model, batch)
    possible = (batch.types == 1) & (batch.mask == 1)
    possible[:, 0] = True
    probabilities = logits.softmax(dim=-1)
    assert probabilities.masked_select(~possible[:, None]).max() == 0
    assert torch.isfinite(logits).all()
    assert torch.isfinite(task.loss(logits, batch))


def test_mnli_is_measured_matched_and_mismatched(data, tasks):
    task = Classification(tasks, "mnli")
    assert task.metrics == ("accuracy", "accuracy_mismatched")
    model = finetuning_model(pretraining_model(MODEL, data, 0), "mnli", 0)
    scores = task.predict(model, CPU)
    assert [len(scores[metric]) for metric in task.metrics] == [12, 8]
    assert model.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}


# --- the study -------------------------------------------------------------------------------------------------------


def test_fine_tuning_starts_from_the_encoder(data):
    pretrained = pretraining_model(MODEL, data, 0)
    for task in HUB_TASKS:
        model = finetuning_model(pretrained, task, 1)
        for name, tensor in model_tensors(pretrained.encoder).items():
            assert torch.equal(model_tensors(model.encoder)[name], tensor)
            assert model_tensors(model.encoder)[name].data_ptr() != tensor.data_ptr()
    with torch.no_grad():
        head = [finetuning_model(pretrained, "sst2", seed).classifier.weight for seed in (0, 0, 1)]
    assert torch.equal(head[0], head[1])
    assert not torch.equal(head[0], head[2])


def test_fine_tuning_on_longer_examples_adds_positions(data):
    """What the encoder computes for short ones stays the same."""
    pretrained = pretraining_model({**MODEL, "max_position_embeddings": 16}, data, 0).eval()
    longer = finetuning_model(pretrained, "sst2", 1, length=24).eval()
    ids = torch.randint(5, data.vocab_size, (2, 16))
    assert torch.equal(longer.encoder(ids).last_hidden_state, pretrained.encoder(ids).last_hidden_state)
    assert longer(torch.randint(5, data.vocab_size, (2, 24))).logits.shape == (2, 2)


@pytest.mark.parametrize("kind", [MaskedLanguageModelling, QuestionAnswering])
def test_resume_after_an_interrupt_gives_the_same_weights(data, tasks, kind, tmp_path):
    task = kind(data) if kind is MaskedLanguageModelling else kind(tasks, "squad_v2")
    training = Training(steps=9, batch_size=8, learning_rate=5e-3)

    def start():
        model = pretraining_model({**MODEL, "hidden_dropout_prob": 0.1}, data, 0)
        return model if isinstance(task, MaskedLanguageModelling) else finetuning_model(model, task.name, 0)

    whole, _ = fit(start(), task, training, seed=3)
    path = tmp_path / "checkpoint.safetensors"

    def interrupt(step, *_):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(start(), task, training, seed=3, checkpoint=path, checkpoint_every=2, progress=interrupt)
    resumed, _ = fit(start(), task, training, seed=3, checkpoint=path, checkpoint_every=2)
    for name, tensor in model_tensors(whole).items():
        assert torch.equal(model_tensors(resumed)[name], tensor), name


@pytest.fixture
def study(local, tmp_path):  # noqa: F811
    recipe = Training(steps=6, batch_size=8, learning_rate=5e-3, evaluations=2)
    return Study(
        domain="text",
        data={
            "name": "tasks",
            "of_tasks": {"name": "local", "text_dir": str(local), "tasks": HUB_TASKS},
            **SMALL_CORPUS,
        },
        model=MODEL,
        teaching=recipe,
        learning=replace(recipe, steps=4, evaluations=1),
        distillation=Distillation(),
        seeds=[0, 1],
        records=Records(tmp_path / "records"),
        cache_dir=tmp_path / "cache",
        tasks=["sst2", "squad_v2"],
        task_data={"name": "local", "text_dir": str(local), **SMALL_TASKS},
        finetuning=replace(recipe, steps=3, evaluations=1),
        processes=1,
    )


def test_tables_of_a_small_study(study):
    entries = compare.main(study, ["topk", "zero_ffn"])
    task_entries = compare.by_task(study, ["topk", "zero_ffn"])
    study.run([entry.config for entry in (*entries, *task_entries)])
    masked, tasks = (results_table(e, study.records) for e in (entries, task_entries))
    assert set(masked["metric"]) == {"loss", "accuracy"}
    columns = ["data", "task", "model", "stage", "seed", "metric", "value", "retention", "record"]
    assert list(tasks.columns) == columns
    models = {("moe", "trained"), ("dense", "trained"), ("dense_long", "trained"), ("dense_kd", "distilled")}
    models |= {(m, stage) for m in ("topk", "zero_ffn") for stage in ("gathered", "distilled")}
    metrics = {task: TASKS[task].metric for task in study.tasks}
    table = main_metrics(with_average(tasks, metrics), {**metrics, AVERAGE: AVERAGE})
    assert set(table["task"]) == {"sst2", "squad_v2", AVERAGE}
    for _, part in table.groupby(["task", "seed"]):
        assert set(zip(part["model"], part["stage"], strict=True)) == models
        assert len(part) == len(models)

    # The average, and retention by hand: of every row, and of losses with their sign turned.
    wide = table.pivot(index=["model", "stage", "seed"], columns="task", values="value")
    np.testing.assert_allclose(wide[AVERAGE], (wide["sst2"] + wide["squad_v2"]) / 2)
    for rows, sign in ((table, 1), (masked[masked["metric"] == "loss"].assign(task="masked_lm"), -1)):
        value = rows.set_index(["task", "model", "stage", "seed"])["value"]
        for _, row in rows.iterrows():
            dense, moe = (sign * value[row["task"], m, "trained", row["seed"]] for m in ("dense", "moe"))
            expected = (sign * row["value"] - dense) / (moe - dense) if moe > dense else np.nan
            np.testing.assert_allclose(row["retention"], expected)

    # The summary's estimate is the retention of the mean over seeds and tasks, as far as it is defined.
    summary = retention_table(table[table["task"] != AVERAGE], study.records).set_index(["model", "stage", "reference"])
    mean = wide[AVERAGE].groupby(["model", "stage"]).mean()
    for (model, stage, reference), row in summary.iterrows():
        assert row["value"] == pytest.approx(mean[model, stage])
        benefit = mean["moe", "trained"] - mean[reference, "trained"]
        if benefit > 1e-6:
            expected = (mean[model, stage] - mean[reference, "trained"]) / benefit
            assert row["retention"] == pytest.approx(expected, abs=1e-4)
        elif benefit < -1e-6:
            assert np.isnan(row["retention"])


def test_who_teaches_whom(study):
    """Distilled models learn a task again from the fine-tuned MoE; baselines and, if asked, all learn alone."""
    entries = compare.by_task(study, ["average"])
    by_model = {(e.model, e.stage): e.config for e in entries if e.axes["task"] == "sst2" and e.config["seed"] == 1}
    teacher = study.finetuned("sst2", study.moe(1))
    assert by_model["moe", "trained"] == teacher
    for model in ("moe", "dense", "dense_long"):
        assert "teacher" not in by_model[model, "trained"]
    for model in ("dense_kd", "average"):
        assert by_model[model, "distilled"]["teacher"] == teacher
    assert by_model["average", "gathered"]["teacher"] == teacher
    assert by_model["average", "gathered"]["training"] is None
    assert by_model["average", "distilled"]["start"] == study.student("average", 1)
    assert by_model["dense_long", "trained"]["start"]["training"]["steps"] == 10
    study.finetune_kd = False
    alone = {e.model: e.config for e in compare.by_task(study, ["average"]) if e.stage == "distilled"}
    assert not any("teacher" in config for config in alone.values())


def test_budgets_of_the_tasks(study):
    entries = compare.by_task_and_budget(study, ["topk"], [0, 2])
    assert {(e.model, e.axes.get("budget")) for e in entries} == {
        *((m, None) for m in ("moe", "dense", "dense_long")),
        *(("topk", budget) for budget in (0, 2)),
    }
    starts = {e.axes["budget"]: e.config["start"]["training"] for e in entries if e.model == "topk"}
    assert starts[0] is None
    assert starts[2]["steps"] == 2


def test_models_of_records(study):
    """Built from a configuration alone: a fine-tuned student is dense and has its task's head."""
    data = study.open_data()
    config = study.finetuned("squad_v2", study.student("topk", 0))
    model = build_model(config, data)
    assert type(model).__name__ == "WideNetForQuestionAnswering"
    assert model.config.num_experts == 1
    (record,) = study.run([config])
    loaded = study.load_model(record)
    scores = QuestionAnswering(study.open_tasks(), "squad_v2").predict(loaded, CPU)
    assert torch.equal(scores["f1"], record.predictions["f1"])


def test_a_teacher_does_not_depend_on_what_it_is_fine_tuned_on(study):
    """Another window, or fewer rows of the tasks, leave every pre-trained and distilled model as it is."""
    other = replace(
        study, task_data={**study.task_data, "task_length": 30, "stride": 4, "max_train": 20, "max_validation": 10}
    )
    for make in (lambda s: s.moe(0), lambda s: s.dense(0, 2), lambda s: s.dense_kd(0), lambda s: s.student("topk", 0)):
        assert config_hash(make(other)) == config_hash(make(study))
    assert config_hash(other.finetuned("sst2", other.moe(0))) != config_hash(study.finetuned("sst2", study.moe(0)))


# --- tasks of one's own ----------------------------------------------------------------------------------------------


def study_of(folder, tasks, profile="real"):
    """The study of a notebook with a folder of texts."""
    return make_study("text", read_parameters(profile, {"text_dir": str(folder), "tasks": tasks}, ["text"]))


def test_of_a_folder_the_known_tasks_that_are_there_are_taken(local):  # noqa: F811
    """All of them as if they were named; and some."""
    assert study_of(local, []).tasks == list(HUB_TASKS)
    assert study_of(local, []).moe(0) == study_of(local, list(HUB_TASKS)).moe(0)
    for name in ("mnli", "squad"):
        (local / name).rename(local / f"no_{name}")
    study = study_of(local, [])
    assert study.tasks == ["sst2", "squad_v2"]
    assert "own" not in study.data["of_tasks"]
    assert "own" not in study.finetuned("sst2", study.moe(0))["task_data"]
    for name in study.tasks:
        (local / name).rename(local / f"no_{name}")
    with pytest.raises(
        FileNotFoundError, match="text_dir: expected a folder with some of sst2, .*no_sst2.*'{reviews: {kind"
    ):
        study_of(local, [])


def test_a_task_of_ones_own_is_part_of_its_records_alone(local):  # noqa: F811
    """What is said of one task does not change the records of another."""
    write(local, "reviews", train=reviews("b", "a"))
    write(local, "other", train=reviews(1, 2, 3))
    every = {"reviews": STARS, "sst2": {}, "other": STARS}
    study = study_of(local, every)
    assert study.tasks == ["reviews", "sst2", "other"]
    moe, alone = study.moe(0), study_of(local, ["sst2"]).task_data
    own = {task: study.finetuned(task, moe)["task_data"].get("own") for task in study.tasks}
    assert own == {
        "reviews": {"reviews": {"texts": ["review"], "label": "stars", "labels": ["a", "b"]}},
        "sst2": None,
        "other": {"other": {"texts": ["review"], "label": "stars", "labels": ["1", "2", "3"]}},
    }
    assert study.finetuned("sst2", moe)["task_data"] == alone


def test_a_small_study_of_own_tasks(study, local, tmp_path):  # noqa: F811
    """Trained, measured, and exported with its classes' names."""
    from transformers import AutoConfig

    words = {"good": "fine music", "bad": "dull plot"}
    rows = [{"text with blanks": f"{words[k]} {i}", "verdict": k} for i in range(30) for k in ("good", "bad")]
    write(local, "reviews", train=rows, validation=rows[:10])
    given = {"reviews": {"kind": "classification", "text": "text with blanks", "label": "verdict"}}
    of = study_of(local, given | {"squad": {}})
    own = {"own": of.task_data["own"]}
    study = replace(
        study,
        data=study.data | {"of_tasks": study.data["of_tasks"] | {"tasks": of.tasks} | own},
        tasks=of.tasks,
        task_data=study.task_data | own,
    )
    entries = compare.by_task(study, ["average"])
    study.run([entry.config for entry in entries])
    table = results_table(entries, study.records)
    scores = table[(table["task"] == "reviews") & (table["metric"] == "accuracy")]
    assert len(scores) == 12
    assert scores["value"].between(0, 100).all()
    record = next(study.records.find(e.config) for e in entries if e.model == "average" and e.stage == "distilled")
    assert record.folder.name.startswith("finetuned-data-reviews-average-s0-")
    folder = study.export(record, tmp_path / "mine")
    import ones_lib  # noqa: F401  registers the model's class

    assert AutoConfig.from_pretrained(folder).id2label == {0: "bad", 1: "good"}
    assert "tokenizer(text, return_tensors" in (folder / "README.md").read_text()
