"""The dry run: counts against arithmetic, and what it prints."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import random_bank
from test_bad_input import here  # noqa: F401
from test_moe import random_routing
from test_processes import tiny_study
from torch.utils.flop_counter import FlopCounterMode

from ones_lib.moe import dispatch, dispatch_plain
from ones_lib.study import command, dry_run, notebooks
from ones_lib.study.dry_run import CARDS, EXAMPLES, UTILISATION, costs, grouped_flops, hours_by_card, kind_of, name_of
from ones_lib.study.running import Execution

TOKENS, DEPTH, D, HEADS = 16, 2, 8, 2  # of the tiny study: 16 px in patches of 4


def counted(run):
    mapping = {torch.ops.aten._grouped_mm: grouped_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return counter.get_total_flops()


def test_grouped_products_count_as_those_of_a_loop(monkeypatch):
    """Forward and backward, sizes of experts as they come."""
    monkeypatch.setattr("ones_lib.dispatch.SMALL", 0)
    bank, routing = random_bank(4, d_ff=16), random_routing(40, 4, 2, skew=2.0)
    for part in (bank.up, bank.down):
        part.requires_grad_(True)
    x = torch.randn(40, 8, requires_grad=True)

    def operations(way):
        return counted(lambda: way(bank, x, routing, F.gelu).square().sum().backward())

    loop, grouped = operations(dispatch_plain), operations(dispatch)
    assert grouped == loop > 0


def arithmetic(d_ff, num_classes=4):
    """Multiplications and additions of a forward pass of one glyph by a dense model, of matrix products alone."""
    attention = 4 * D * D + 2 * TOKENS * D
    return 2 * (TOKENS * (16 * D + DEPTH * (attention + 2 * D * d_ff)) + D * num_classes)


def test_costs_are_those_of_arithmetic(tmp_path):
    study = tiny_study(tmp_path)
    configs = [study.moe(0), study.moe(1), study.dense(0), study.dense(0, 3), study.student("average", 0)]
    configs += [study.student("sum", 1), study.student("average", 0, budget=0)]
    table, failed = costs({str(i): c for i, c in enumerate(configs)}, tmp_path / "cache")
    assert failed == []
    table = table.set_index("training")
    assert table["trainings"].to_dict() == {
        "image: moe of 4 experts": 2,
        "image: dense": 2,
        "image: student, KD from moe of 4 experts": 2,
    }
    assert table["steps"].tolist() == [12, 6 + 9, 6]
    dense, student = table.loc["image: dense"], table.loc["image: student, KD from moe of 4 experts"]
    # The backward pass takes twice the forward pass's products, but for the pictures' gradient, which nobody needs.
    forward = arithmetic(d_ff=12)
    assert dense["flops"] == 3 * forward - 2 * TOKENS * 16 * D
    # All experts' work on all tokens in a layer so small, and the router.
    teacher = forward + 2 * TOKENS * DEPTH * (3 * 2 * D * 12 + 4 * D)
    assert student["flops"] - dense["flops"] == pytest.approx(teacher)
    weights = study.run([study.dense(0)])[0].result["parameters"]
    assert dense["parameters"] == student["parameters"] == weights
    assert 16 * weights <= dense["fixed_bytes"] < 17 * weights + 1000
    assert student["fixed_bytes"] >= dense["fixed_bytes"] + 4 * student["teacher_parameters"] - 1
    # At least the hidden layers of both depths, before and after the activation.
    assert dense["activation_bytes"] > 2 * DEPTH * TOKENS * 12 * 4


def test_hours_are_operations_over_what_a_card_does():
    table = pd.DataFrame({"flops": [1e9, 2e9], "batch_size": [100, 10], "steps": [1000, 500]})
    table = table.assign(fixed_bytes=[1e9, 0.0], activation_bytes=[1e8, 1e6])
    found = hours_by_card(table).set_index("card")
    peak, memory = CARDS["A100 80GB"]
    assert found.loc["A100 80GB", "GPU hours"] == pytest.approx((1e14 + 1e13) / (peak * 1e12 * UTILISATION) / 3600)
    assert found.loc["A100 80GB", "examples at a time"] == int((0.9 * memory * 1e9 - 1e9) / 1e8)
    assert list(found.index) == list(CARDS)


def test_kinds_differ_by_what_a_step_costs(tmp_path):
    study = tiny_study(tmp_path)
    same = [study.student("average", 0), study.student("svd", 3, budget=2, rank=1)]
    assert kind_of(same[0]) == kind_of(same[1])
    others = [study.student("topk", 0, k=1), study.student("average", 0, teacher=study.moe(0, num_experts=2))]
    others += [study.dense_kd(0), study.moe(0, slots_per_expert=2), study.upcycled(0, 3)]
    assert len({json.dumps(kind_of(config), sort_keys=True) for config in [same[0], *others]}) == 6
    assert [name_of(config) for config in others[:4]] == [
        "image: student, k 1, KD from moe of 4 experts",
        "image: student, KD from moe of 2 experts",
        "image: dense, KD from moe of 4 experts",
        "image: moe of 4 experts, Soft MoE",
    ]


def test_what_cannot_be_tried_is_named_and_the_rest_is_tried(tmp_path, capsys):
    study = tiny_study(tmp_path)
    bad = study.moe(0) | {"model": study.moe(0)["model"] | {"num_heads": 3}}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"configs": {"a": bad, "b": study.dense(0)}, "cache_dir": str(tmp_path / "cache")}))
    assert dry_run.main(str(plan)) == 1
    said = capsys.readouterr()
    error = "ValueError: num_heads: expected a divisor of embed_dim=8, found 3"
    assert f"could not be tried: image: moe of 4 experts: {error}" in said.err
    assert "image: dense" in said.out


def test_the_command_asks_the_notebook_and_trains_nothing(here, capfd, monkeypatch):  # noqa: F811
    def run(words, **_):
        assert words[:3] == [sys.executable, "-m", dry_run.__name__]
        return SimpleNamespace(returncode=dry_run.main(words[3]))

    monkeypatch.setattr(notebooks.subprocess, "run", run)  # in this process, which has imported what it takes
    few = ["--profile", "smoke", "--only", "student", "05", "-p", "seed", "3"]
    assert command.main([*few, "--dry-run"]) == 0
    said = capfd.readouterr().out
    assert "student.ipynb: what it would train" in said
    assert "05_inference_speed.ipynb: trains nothing" in said
    assert "3 models: 3 to train, 0 gathered or read" in said
    assert "Glyphs: 10 characters" in said
    assert "All 3 trainings:" in said
    assert not list((here / "runs").rglob("weights.safetensors"))
    assert not list((here / "runs").glob("plan*"))


def test_a_plan_is_no_part_of_what_is_asked_for(tmp_path, monkeypatch):
    """With a plan to write to, what is there is found, what is not is None and stands in the plan, each once."""
    study = tiny_study(tmp_path)
    (dense,) = study.run([study.dense(0)])
    planned = replace(study, execution=Execution(plan=str(tmp_path / "plan.json")))
    found = planned.run([study.dense(0), study.student("average", 0)])
    assert [record and record.folder for record in found] == [dense.folder, None]
    planned.run([study.moe(0)])
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert sorted(config["kind"] for config in plan["configs"].values()) == ["moe", "student"]
    assert EXAMPLES % 2 == 0  # mixup pairs them
    monkeypatch.setenv("ONES_PLAN", "plan.json")
    monkeypatch.setenv("ONES_SHARD", "0")
    assert Execution.from_environment() == Execution(plan="plan.json")
