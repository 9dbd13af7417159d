"""The training loop: resume, divergence, recipes; and the study's records around it."""

import copy
import json
import os
import socket
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open

from ones_lib import Distillation
from ones_lib.data import evaluation_keys, images
from ones_lib.data.files import load_tensors, model_tensors, save_tensors
from ones_lib.data.images import image_data
from ones_lib.distillation import HiddenStates, hidden_error, soft_kl
from ones_lib.models.images import WideNet
from ones_lib.models.upcycling import Upcycled
from ones_lib.study import entries, parallel, training
from ones_lib.study.image_task import ImageClassification
from ones_lib.study.records import Records, compare, config_hash
from ones_lib.study.running import carry_out, steps_of
from ones_lib.study.study import Study, epochs_text
from ones_lib.study.tables import (
    ablation_table,
    benefit_table,
    layer_error,
    results_table,
    retention_table,
    what_decides,
    width_table,
)
from ones_lib.study.teaching import Guard
from ones_lib.study.training import Diverged, Training, fit, optimizers
from ones_lib.views.explorer import moe_records
from ones_lib.views.speed import study_widths

DATA = {"name": "glyphs", "image_size": 16, "num_classes": 4, "train_per_class": 20, "val_per_class": 10}
MODEL = {
    "name": "widenet_tiny_patch16_224",
    "patch_size": 4,
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 2,
    "d_ff": 8,
    "num_experts": 2,
    "proj_drop_rate": 0.1,
}
RECIPE = Training(steps=12, batch_size=16, learning_rate=5e-3, ema_decay=0.9, mixup=0.2, label_smoothing=0.1)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return ImageClassification(image_data(**DATA, cache_dir=tmp_path_factory.mktemp("cache")))


@pytest.fixture
def study(tmp_path):
    recipe = Training(steps=6, batch_size=16, learning_rate=5e-3)
    return Study(
        domain="image",
        data=DATA,
        model=MODEL,
        teaching=recipe,
        learning=replace(recipe, steps=3),
        distillation=Distillation(),
        seeds=[0, 1],
        records=Records(tmp_path / "records"),
        cache_dir=tmp_path / "cache",
        processes=1,
    )


def small_model(num_experts=2, seed=0):
    torch.manual_seed(seed)
    arguments = {k: v for k, v in MODEL.items() if k != "name"} | {"num_experts": num_experts}
    return WideNet(**arguments, img_size=16, in_chans=1, num_classes=4, class_token=False, global_pool="avg")


def weights(model):
    return {name: tensor.clone() for name, tensor in model_tensors(model).items()}


class Stop(Exception):
    pass


EXPERT_AWARE = Distillation(hidden_weight=0.5, augmentations=1, router_rate=0.01, guard=True)


GUARDED = Distillation(guard=True)


@pytest.mark.parametrize(
    "loss", [None, Distillation(), GUARDED, EXPERT_AWARE], ids=["alone", "kd", "guarded", "expert-aware"]
)
def test_resume_gives_the_weights_of_an_uninterrupted_run(task, tmp_path, loss):
    """With mixup, dropout, router noise, EMA, optimizer state and a router that learns, stopped between two checkpoints."""

    def kd():
        return {} if loss is None else {"teacher": small_model(seed=5), "distillation": loss}

    whole, whole_history = fit(small_model(), task, RECIPE, seed=3, **kd())
    checkpoint = tmp_path / "checkpoint.safetensors"

    def stop(step, *_):
        if step >= 8:
            raise Stop

    with pytest.raises(Stop):
        fit(small_model(), task, RECIPE, seed=3, checkpoint=checkpoint, checkpoint_every=4, progress=stop, **kd())
    steps = []
    resumed, history = fit(
        small_model(seed=9),  # its weights do not matter: they come from the checkpoint
        task,
        RECIPE,
        seed=3,
        checkpoint=checkpoint,
        checkpoint_every=4,
        progress=lambda step, *_: steps.append(step),
        **kd(),
    )
    assert min(steps) > 4  # it went on, and did not begin anew
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor), name
    assert history["step"].iloc[-1] == whole_history["step"].iloc[-1] == 12
    assert history["val_accuracy"].iloc[-1] == whole_history["val_accuracy"].iloc[-1]


def went_on_exactly(task, checkpoint, recipe):
    """Train, and train again from the checkpoint that was left on the way: weights and history must be the same."""

    def trained(seed):  # the second one's weights come from the checkpoint
        how = {"checkpoint": checkpoint, "checkpoint_every": 3}
        model, history = fit(small_model(num_experts=1, seed=seed), task, recipe, seed=3, **how)
        return weights(model), history.drop(columns="seconds")

    (whole, course), (resumed, course_again) = trained(seed=0), trained(seed=9)
    assert [name for name, tensor in whole.items() if not torch.equal(resumed[name], tensor)] == []
    pd.testing.assert_frame_equal(course, course_again)


@pytest.mark.parametrize("optimizer", optimizers())
def test_every_optimizer_goes_on_exactly(task, tmp_path, optimizer):
    recipe = replace(RECIPE, steps=5, batch_size=8, optimizer=optimizer)
    with torch.compiler.set_stance("force_eager"):  # kron would be compiled
        went_on_exactly(task, tmp_path / "checkpoint.safetensors", recipe)


def test_the_scale_of_fp16_goes_on(task, tmp_path, monkeypatch):
    """With a scale of the loss that grows every other step: accelerate has none on a CPU."""

    class Scaled(training.Accelerator):
        def __init__(self, **how):
            super().__init__(**how)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_factor=4.0, growth_interval=2)

    monkeypatch.setattr(training, "Accelerator", Scaled)
    recipe = replace(
        RECIPE, steps=5, batch_size=8, optimizer="sgd", clip_norm=1e-3
    )  # the clipping sees scaled gradients
    went_on_exactly(task, tmp_path / "checkpoint.safetensors", recipe)


def test_a_checkpoint_of_an_earlier_version_is_refused(task, tmp_path):
    save_tensors(tmp_path / "c.safetensors", {"a": torch.ones(1)}, {"step": "3", "history": "[]"})
    with pytest.raises(ValueError, match=r"c\.safetensors: expected a checkpoint of this version"):
        fit(small_model(), task, RECIPE, seed=3, checkpoint=tmp_path / "c.safetensors")


def test_optimizers_that_cannot_be_used_here_are_refused():
    for name in ("adahessian", "bnbadam", "fusedlamb"):
        with pytest.raises(ValueError, match=f"optimizer: expected one of timm's, such as 'adamw', found '{name}'"):
            replace(RECIPE, optimizer=name)


def test_seed_decides_the_result(task):
    runs = [weights(fit(small_model(), task, RECIPE, seed=seed)[0]) for seed in (1, 1, 2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["head.weight"], runs[2]["head.weight"])


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(task, tmp_path):
    class Poisoned(ImageClassification):
        calls = 0

        def loss(self, logits, batch):
            self.calls += 1
            return super().loss(logits, batch) * (float("nan") if self.calls == 7 else 1)

    checkpoint = tmp_path / "c.safetensors"
    recipe = replace(RECIPE, steps=40)
    with pytest.raises(Diverged, match=r"the loss became nan at step 7 of 40 \(seed 3"):
        fit(small_model(), Poisoned(task.data), recipe, seed=3, checkpoint=checkpoint, checkpoint_every=5)
    with safe_open(checkpoint, "pt") as file:
        assert file.metadata()["step"] == "5"
        assert all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118


def test_the_teacher_is_frozen_and_in_eval_mode(task):
    teacher = small_model(seed=5).train()
    before = weights(teacher)
    fit(small_model(num_experts=1), task, RECIPE, seed=0, teacher=teacher, distillation=Distillation())
    assert not teacher.training
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(teacher).items())


@pytest.mark.parametrize("option", [{"hidden_weight": 1.0}, {"augmentations": 2}, {"router_rate": 0.01}], ids=str)
def test_expert_aware_distillation_changes_what_is_learnt(task, option):
    """Of the teacher only what may: its routers, where they are student-aware. With evaluations on the way."""
    recipe = replace(RECIPE, ema_decay=0.0, evaluations=3)
    results = []
    for distillation in (Distillation(), Distillation(**option)):
        teacher = small_model(seed=5)
        before = weights(teacher)
        student, _ = fit(small_model(num_experts=1), task, recipe, seed=0, teacher=teacher, distillation=distillation)
        results.append(weights(student))
        moved = {name for name, tensor in weights(teacher).items() if not torch.equal(tensor, before[name])}
        assert moved == ({"blocks.0.mlp.router.weight"} if distillation.router_rate else set())
        assert not any(m._forward_pre_hooks for model in (student, teacher) for m in model.modules())
    assert not torch.equal(results[0]["head.weight"], results[1]["head.weight"])


def test_matching_hidden_states_brings_them_together(task):
    errors = []
    for weight in (0.0, 30.0):
        teacher = small_model(seed=5).eval()
        distillation = Distillation(alpha=0.5, hidden_weight=weight)
        recipe = Training(steps=40, batch_size=16, learning_rate=5e-3)
        student, _ = fit(small_model(num_experts=1), task, recipe, seed=0, teacher=teacher, distillation=distillation)
        states = [HiddenStates(model) for model in (student, teacher)]
        images = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            student(images), teacher(images)
        errors.append(hidden_error(states[0].last, states[1].last).item())
    assert errors[1] < 0.7 * errors[0]


def test_distillation_pulls_the_student_to_its_teacher(task):
    """A teacher that is sure of class 2, whatever it sees: the student becomes so too."""
    teacher = small_model(seed=5)
    with torch.no_grad():
        teacher.head.weight.zero_()
        teacher.head.bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]))
    recipe = Training(steps=60, batch_size=16, learning_rate=1e-2)
    student, _ = fit(
        small_model(num_experts=1), task, recipe, seed=0, teacher=teacher, distillation=Distillation(1.0, 1.0)
    )
    assert (task.predict(student, torch.device("cpu"))["predicted"] == 2).all()


def divergence(student, teacher, data):
    """Mean KL of the student to its teacher, on validation images."""
    images, _ = data.val.__getitems__(evaluation_keys(len(data.val), len(data.val))[0])
    with torch.inference_mode():
        return soft_kl(student.eval()(images), teacher.eval()(images), 1.0).item()


def test_a_good_start_is_not_undone(task):
    """A student that starts as its teacher, distilled at a rate that would wreck it."""
    recipe = replace(RECIPE, steps=30, learning_rate=0.05, mixup=0.0, ema_decay=0.0, label_smoothing=0.0)
    teacher = small_model(num_experts=1, seed=5)
    teacher, _ = fit(teacher, task, replace(recipe, steps=100, learning_rate=0.01), seed=0)
    found, students = {}, {guard: copy.deepcopy(teacher) for guard in (True, False)}
    for guard, student in students.items():
        kd = {"teacher": teacher, "distillation": Distillation(1.0, 1.0, guard=guard)}
        found[guard] = divergence(fit(student, task, recipe, seed=0, **kd)[0], teacher, task.data)
    assert found[True] < 0.1 * found[False]


def test_a_student_that_only_gets_better_is_trained_as_without_a_guard(task):
    teacher = small_model(seed=5)
    with torch.no_grad():  # a teacher that every step comes closer to
        teacher.head.bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]))
    found = []
    for distillation in (Distillation(1.0, 1.0, guard=True), Distillation(1.0, 1.0)):
        kd = {"teacher": teacher, "distillation": distillation}
        found.append(weights(fit(small_model(num_experts=1), task, RECIPE, seed=0, **kd)[0]))
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


def test_the_guard_goes_back_at_half_the_rate_and_ends_when_it_is_not_needed():
    start, student = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    guard = Guard(copy.deepcopy(start))

    def step(*parts, warm=True):
        for difference, count in parts:
            guard.compare(torch.tensor(difference), count)
        guard.update(student, lambda sums: sums, warm)

    step((0.5, 1), (-0.1, 9), warm=False)  # the mean over all ten predictions is below 0
    assert guard.factor == 1
    assert not torch.equal(student.weight, start.weight)
    step((3.0, 1), warm=False)
    assert guard.factor == 0.5
    assert torch.equal(student.weight, start.weight)
    assert torch.equal(student.bias, start.bias)
    for _ in range(7):  # 0.5 * 1.1**7 = 0.97
        step((-1.0, 1))
    assert guard.start is not None
    step((-1.0, 1))
    assert guard.start is None
    assert guard.factor == 1


def test_training_learns(task):
    model, history = fit(small_model(), task, Training(300, 16, 1e-2, evaluations=3), seed=0)
    assert history["val_accuracy"].dropna().iloc[-1] > 0.7
    assert len(history["val_accuracy"].dropna()) == 3
    assert not model.training


def test_mixup_in_parts(task):
    """Of at most 5 examples: of 4, which it can pair."""
    _, history = fit(small_model(), task, RECIPE, seed=0, device_batch=5)
    assert history["loss"].notna().all()


def test_mixed_precision_runs(task):
    _, history = fit(small_model(), task, replace(RECIPE, mixed_precision="bf16"), seed=0)
    assert history["loss"].notna().all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps: expected a positive number, found 0"),
        ({"learning_rate": -1.0}, "learning_rate: expected a positive number"),
        ({"warmup": 1.0}, "warmup: expected a number from 0 to below 1, found 1.0"),
        ({"mixup": float("nan")}, "mixup: expected a number of at least 0, found nan"),
        ({"mixed_precision": "fp8"}, "mixed_precision: expected 'no', 'bf16' or 'fp16', found 'fp8'"),
    ],
)
def test_bad_recipes(values, message):
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **values)


# --- records and the study -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "options"), [("topk", {"d_ff": 11}), ("topk", {"k": 3}), ("average", {"d_ff": 16})])
def test_students_of_other_widths_are_loaded_again(study, method, options):
    for budget in (0, 2):
        (record,) = study.run([study.student(method, 0, budget, **options)])
        model = study.load_model(record)
        assert model.blocks[0].mlp.up.shape[1] == options.get("d_ff", 2 * options.get("k", 0))


def test_hash_is_of_what_is_asked_for():
    assert config_hash({"a": 1, "b": [2]}) == config_hash({"b": [2], "a": 1})
    assert config_hash({"a": 1, "b": [2]}) != config_hash({"a": 1, "b": [3]})


def test_a_finished_step_is_found_again(study):
    config = study.student("topk", seed=0)
    (record,) = study.run([config])
    stamp = (record.folder / "weights.safetensors").stat().st_mtime_ns
    assert study.records.find(study.moe(0)) is not None  # its teacher was made on the way
    (again,) = study.run([config])
    assert (again.folder / "weights.safetensors").stat().st_mtime_ns == stamp
    assert {p.name for p in record.folder.iterdir()} == {
        "config.json",
        "history.csv",
        "predictions.safetensors",
        "result.json",
        "weights.safetensors",
    }
    assert record.config == json.loads(json.dumps(config))
    predictions = record.predictions
    right = (predictions["predicted"] == predictions["label"]).double().mean().item()
    assert record.result["metrics"] == {"accuracy": pytest.approx(right)}


def test_records_can_be_asked_to_be_made_again(study):
    (record,) = study.run([study.dense(0)])
    later = datetime.now(UTC) + timedelta(seconds=5)
    assert Records(study.records.root, later.isoformat()).find(study.dense(0)) is None
    assert Records(study.records.root, "2020-01-01T00:00:00+00:00").find(study.dense(0)) == record


def test_what_is_made_again_does_not_go_on_from_an_old_checkpoint(study):
    config, now = study.dense(0), datetime.now(UTC)
    checkpoint = study.records.begin(config) / "checkpoint.safetensors"
    checkpoint.touch()
    for redo_before, stays in ((now - timedelta(minutes=1), True), (now + timedelta(minutes=1), False)):
        Records(study.records.root, redo_before.isoformat()).begin(config)
        assert checkpoint.exists() == stays


def test_loaded_model_predicts_what_the_record_says(study):
    for config in (study.moe(0), study.student("topk", 0, budget=0, k=3)):
        (record,) = study.run([config])
        task = ImageClassification(study.open_data())
        predicted = task.predict(study.load_model(record), torch.device("cpu"))["predicted"]
        assert torch.equal(predicted, record.predictions["predicted"])


def test_processes_side_by_side_make_the_same_records_and_an_error_in_one_ends_all(study, tmp_path):
    configs = [study.moe(0), study.moe(1), study.student("fit", 0, budget=0)]
    alone = {record.folder.name: record for record in study.run(configs)}
    study.records, study.processes = Records(tmp_path / "parallel"), 2
    study.learning = replace(study.learning, learning_rate=1e30, clip_norm=1e30, warmup=0.0)
    bad = study.student("fit", 0)  # starts from the gathered student, and that from its teacher
    with pytest.raises(Diverged, match="the loss became"):
        study.run([*configs, bad])
    assert study.records.find(bad) is None
    found = [record for config in configs if (record := study.records.find(config))]
    assert {config_hash(configs[0]), config_hash(configs[2])} <= {config_hash(record.config) for record in found}
    for record in found:
        assert set(compare(record, alone[record.folder.name])["what"]) <= {"threads", "code"}


def test_tables(study):
    methods = ["average", "zero_ffn"]
    rows = entries.main(study, methods)
    study.run([entry.config for entry in rows])
    table = results_table(rows, study.records)
    assert list(table.columns) == ["data", "model", "stage", "seed", "metric", "value", "retention", "record"]
    assert len(table) == 2 * (4 + 2 * len(methods))
    for seed in (0, 1):
        values = table[table["seed"] == seed].set_index(["model", "stage"])["value"]
        dense, moe, student = values["dense", "trained"], values["moe", "trained"], values["average", "distilled"]
        found = table.query(f"model == 'average' and stage == 'distilled' and seed == {seed}")["retention"].item()
        if moe > dense:
            assert found == pytest.approx((student - dense) / (moe - dense))
        else:
            assert pd.isna(found)
    summary = retention_table(table, study.records)
    assert set(summary["reference"]) == {"dense", "dense_long"}
    average = summary.query("model == 'average' and stage == 'distilled' and reference == 'dense'").iloc[0]
    assert average["value"] == pytest.approx(table.query("model == 'average' and stage == 'distilled'")["value"].mean())


def test_students_of_active_width_stand_beside_those_of_one_experts(study, monkeypatch):
    monkeypatch.setattr("ones_lib.views.speed.WIDTHS_SECONDS", 0.0)
    assert study.widths() == (8, 16)
    methods = ["average", "readout"]
    rows, usual = entries.by_width(study, methods), entries.main(study, methods)
    known = {config_hash(entry.config) for entry in usual}
    wide = [entry for entry in rows if config_hash(entry.config) not in known]  # the others are the main table's
    assert [(e.model, e.axes["d_ff"]) for e in wide] == 2 * [("dense_active", 16), ("average", 16), ("readout", 16)]
    study.run([entry.config for entry in rows])
    for entry in rows:
        layer = study.load_model(study.records.find(entry.config)).moe_layers()[0]
        assert layer.up.shape[:2] == ((2, 8) if entry.model == "moe" else (1, entry.axes["d_ff"]))
    results, (speeds, name) = results_table(rows, study.records), study_widths(study)
    table = width_table(results, speeds, study.records)
    assert set(table["reference"]) == {"dense"}
    assert len(table) == 1 + 2 * 3
    by_model = table.set_index(["model", "d_ff"])
    assert by_model["speedup"].notna().all()
    moe = by_model.loc["moe"].iloc[0]
    assert moe["speedup"] == 1
    row = by_model.loc[("readout", 16)]
    assert row["median_ms"] == by_model.loc[("dense_active", 16), "median_ms"]
    assert row["examples_per_second"] / moe["examples_per_second"] == pytest.approx(row["speedup"])
    study.allow_training = False
    assert study_widths(study)[1] == name  # found
    assert entries.by_width(study, []) == []
    study.model |= {"top_k": 1}
    assert entries.by_width(study, ["average"]) == []


def test_curves_refer_to_the_teacher_with_the_same_number_of_experts(study):
    rows = entries.by_experts(study, ["average"], [2, 3], budget=3)
    study.run([entry.config for entry in rows])
    table = results_table(rows, study.records)
    teachers = table[table["model"] == "moe"]
    assert sorted(teachers["num_experts"]) == [2, 2, 3, 3]
    assert set(teachers["retention"].dropna()) <= {1.0}
    budgets = entries.by_budget(study, ["average"], [2, 3])
    assert {entry.axes.get("budget") for entry in budgets} == {None, 2, 3}
    assert sum(steps_of(entry.config) for entry in budgets) == 2 * (6 + 9 + 6 + 2 + 3)


def test_benefit_and_number_of_experts_are_told_apart(study):
    rows = entries.by_experts(study, ["average"], [2, 3], budget=3, steps=[4, 6])
    study.run([entry.config for entry in rows])
    results = results_table(rows, study.records)
    benefits = benefit_table(results)
    assert len(benefits) == 2 * 2 * 2  # experts, steps, seeds
    row = benefits.query("num_experts == 3 and teacher_steps == 4 and seed == 1").iloc[0]
    by_model = results[(results["seed"] == 1) & (results["num_experts"].isna() | (results["num_experts"] == 3))]
    by_model = by_model[by_model["teacher_steps"].isna() | (by_model["teacher_steps"] == 4)].set_index("model")["value"]
    assert row["benefit"] == pytest.approx(by_model["moe"] - by_model["dense"])
    assert row["kept"] == pytest.approx(by_model["average"] - by_model["dense"])


def test_what_decides_recovers_a_known_law():
    grid = [(count, benefit, seed) for count in (4, 8, 16) for benefit in (5.0, 12.0) for seed in (0, 1)]
    table = pd.DataFrame(grid, columns=["num_experts", "benefit", "seed"]).assign(model="fit")
    slope = 0.7 + 0.1 * table["seed"]  # 0.7 points a point of benefit in one seed, 0.8 in the other
    table["kept"] = 3 + slope * table["benefit"] - 1.5 * np.log2(table["num_experts"])
    found = what_decides(table).loc["fit"]
    assert found["per point of benefit", "mean"] == pytest.approx(0.75)
    assert found["per point of benefit", "std"] == pytest.approx(0.1 / 2**0.5)
    assert found["per doubling of experts", "mean"] == pytest.approx(-1.5)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    model = small_model()
    save_tensors(tmp_path / "w.safetensors", {**model_tensors(model), "extra": torch.ones(1)})
    with pytest.raises(ValueError, match=r"w.safetensors: expected the tensors of WideNet.*\['extra'\]"):
        load_tensors(tmp_path / "w.safetensors", model)
    save_tensors(tmp_path / "w.safetensors", {**model_tensors(model), "head.bias": torch.ones(9)})
    with pytest.raises(ValueError, match=r"head.bias: expected shape \[4\], found \[9\]"):
        load_tensors(tmp_path / "w.safetensors", model)


def test_bad_studies(study):
    with pytest.raises(ValueError, match=r"seeds: expected at least one, all different.*\[1, 1\]"):
        replace(study, seeds=[1, 1])
    with pytest.raises(ValueError, match="method: expected one of .*found 'median'"):
        study.student("median", 0)


def test_students_that_look_at_data_are_gathered_once_for_all_budgets(study):
    """Their gathered student is a record of its own, from which those of every budget start."""
    gathered = study.student("fit", 0, budget=0, steps=20)
    distilled = [study.student("fit", 0, budget=budget, steps=20) for budget in (1, 3)]
    assert all(config["start"] == gathered for config in distilled)
    assert gathered["calibration_examples"] == study.calibration_examples
    study.calibration_examples = 32
    records = study.run([study.student("fit", 0, budget=budget, steps=20) for budget in (0, 1, 3)])
    assert [len(list(study.records.root.glob(f"{kind}-*"))) for kind in ("moe", "student")] == [1, 3]
    assert records[0].result["gathering_seconds"] > 0
    assert "gathering_seconds" not in records[1].result
    loaded = [weights(study.load_model(record)) for record in records]
    assert not torch.equal(loaded[0]["head.weight"], loaded[2]["head.weight"])


def test_calibration_does_not_depend_on_the_budget_or_the_caller(study):
    torch.manual_seed(1)
    study.calibration_examples = 32
    (one,) = study.run([study.student("readout", 0, budget=0)])
    study.records = Records(study.records.root.parent / "again")
    torch.manual_seed(2)
    (two,) = study.run([study.student("readout", 0, budget=0)])
    assert all(torch.equal(weights(study.load_model(one))[n], t) for n, t in weights(study.load_model(two)).items())


def test_ablation_table(study):
    study.calibration_examples = 32
    variants = [("svd", {}), ("svd", {"scale": "router", "rank": 2}), ("readout", {}), ("zero_ffn", {})]
    rows = entries.by_variant(study, variants, [0, 2])
    study.run([entry.config for entry in rows])
    table = ablation_table(rows, study)
    assert len(table) == 2 * 2 * 4
    assert table["loss"].isna().all()
    assert table["scale"].tolist()[:2] == [1.0, 1.0]
    zero = table[table["method"] == "zero_ffn"]
    assert zero["layer_error"].tolist() == pytest.approx([1.0] * 4)  # of the budget 2 too: right after gathering
    start = table[(table["budget"] == 0) & (table["seed"] == 0)].set_index(["method", "scale"])
    record = study.records.find(study.student("svd", 0, 0, scale="router", rank=2))
    assert start.loc[("svd", "router"), "accuracy"] == pytest.approx(100 * record.result["metrics"]["accuracy"])
    assert start.loc[("svd", "router"), "layer_error"] == pytest.approx(layer_error(record, study))
    assert start["layer_error"].nunique() == 4


def test_ablation_table_without_ranks(study):
    rows = entries.by_variant(study, [("average", {})], [0, 2])
    study.run([entry.config for entry in rows])
    table = ablation_table(rows, study)
    assert table["rank"].isna().all()
    seconds = table.groupby("budget")["seconds"].mean()
    assert 0 < seconds[0] < seconds[2]
    assert table["layer_error"].notna().all()


def test_upcycled_teachers_and_their_students(study):
    study.model |= {"top_k": 1, "renormalize": True}

    def teachers(seed):
        return {
            "moe": study.moe(seed),
            "upcycled": study.upcycled(seed, 2),
            "soft": study.moe(seed, slots_per_expert=1),
        }

    before = study.upcycled(0, 0)
    rows = entries.by_teacher(study, teachers, ["average"], [0, 1])
    average = study.student("average", 0, 0, before)
    study.run([before, average, *(entry.config for entry in rows)])
    table = results_table(rows, study.records)
    assert set(table["teacher"]) == {"moe", "upcycled", "soft"}
    assert len(table) == 2 * 3 * (3 + 2)
    # Before training the upcycled MoE is the dense baseline, and so is its average.
    accuracy = [study.records.find(c).result["metrics"] for c in (before, study.dense(0), average)]
    assert accuracy[0] == accuracy[1] == accuracy[2]
    # As long as teacher and KD: 6 steps of the MoE and 1; 6 of the dense model, 2 of the upcycled and 1.
    long = {e.axes["teacher"]: e.config["training"]["steps"] for e in rows if e.model == "dense_long"}
    assert long == {"moe": 7, "upcycled": 9, "soft": 7}
    record = study.records.find(study.upcycled(0, 2))
    assert isinstance(study.load_model(record), Upcycled)
    assert sum("upcycled, 2 experts" in name for name in moe_records(study.records)) == 3


def test_losses_are_compared_from_the_same_start(study):
    losses = {"KD": study.distillation, "more": replace(study.distillation, hidden_weight=1.0)}
    rows = entries.by_loss(study, losses, ["average"], 2)
    study.run([entry.config for entry in rows])
    table = results_table(rows, study.records)
    assert table.groupby("loss").size().to_dict() == {"KD": 2, "more": 2}
    assert table["record"].nunique() == len(table)


@pytest.mark.parametrize("loss", [Distillation(), Distillation(augmentations=1)], ids=["kd", "augmented"])
def test_logits_that_were_kept_are_those_that_would_be_computed(task, tmp_path, loss, monkeypatch):
    """The second student of a seed learns the same without its teacher's pass; another teacher or seed shares nothing."""
    passes = []

    def distilled(folder, seed=3, teacher_seed=5, student_seed=1):
        teacher = small_model(seed=teacher_seed)
        teacher.register_forward_hook(lambda *_: passes.append(teacher_seed))
        passes.clear()
        kd = {"teacher": teacher, "distillation": loss, "teacher_logits": folder}
        return weights(fit(small_model(num_experts=1, seed=student_seed), task, RECIPE, seed=seed, **kd)[0])

    steps, each = RECIPE.steps, 1 + loss.augmentations
    distilled(tmp_path / "a", student_seed=2)  # another student fills it
    assert len(passes) == steps * each
    read = distilled(tmp_path / "a")
    assert len(passes) == steps * (each - 1)
    computed = distilled(None)
    assert len(passes) == steps * each
    assert all(torch.equal(read[name], tensor) for name, tensor in computed.items())
    for other in ({"seed": 4}, {"teacher_seed": 6}):
        distilled(tmp_path / "a", **other)
        assert len(passes) == steps * each
    monkeypatch.setattr("ones_lib.study.teaching.LARGEST_CACHE", 100)
    distilled(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_kept_logits_go_when_the_students_are_done(study):
    """And those of a process that was killed go with them."""
    root = study.cache_dir / "teacher_logits"
    host, other = socket.gethostname(), f"other-host-{2**22 + 1}"
    running = f"{host}-{os.getppid()}"
    for name in (f"{host}-{2**22 + 1}", running, other):  # no process here has the first one's number
        (root / name).mkdir(parents=True)
    seen = []

    def watched(config, place, progress):
        record = carry_out(config, place, progress)
        seen.extend(place.teacher_logits.glob("*/*"))
        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "carry_out", watched)
        study.processes = 1
        study.run([study.student("average", 0)])
    assert len(seen) == study.learning.steps
    assert {folder.name for folder in root.iterdir()} == {running, other}


def test_what_moves_or_watches_the_teacher_keeps_no_logits(task, tmp_path):
    for loss in (Distillation(hidden_weight=0.5), Distillation(router_rate=0.01)):
        kd = {"teacher": small_model(seed=5), "distillation": loss, "teacher_logits": tmp_path / "kept"}
        fit(small_model(num_experts=1), task, RECIPE, seed=3, **kd)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(("cores", "processes"), [(2, 2), (2, 1), (64, 64), (64, 3), (64, 1)])
def test_trainings_side_by_side_share_the_cores(cores, processes, monkeypatch):
    """Threads and loader processes of all of them together are not more than the cores (but one loader each at least)."""
    set_to = []
    for module in (images, parallel):
        monkeypatch.setattr(module, "available_cores", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(images, "SIDE_BY_SIDE", 1)
    monkeypatch.setattr(parallel.threading.Thread, "start", lambda self: None)
    monkeypatch.setattr(parallel.gc, "freeze", lambda: None)
    parallel._start_worker(processes, None, None)
    assert set_to == [cores // processes]
    loaders = images.worker_count([])
    assert loaders >= 1
    assert loaders == 1 or processes * (loaders + 1) <= cores


def test_epochs_are_said_and_many_are_warned_of():
    few = epochs_text(Training(steps=1400, batch_size=128), Training(steps=600, batch_size=128), 45_000)
    assert few == "45,000 training images, 128 a step: teacher_steps=1,400 and kd_steps=600 are 3.98 and 1.71 epochs"
    many = epochs_text(Training(steps=15_000, batch_size=128), Training(steps=15_000, batch_size=128), 120)
    assert "are 16,000 and 16,000 epochs. More than 300 are seldom of use" in many
    assert "lower teacher_steps, kd_steps or batch_size" in many
