"""Several processes of one training, on the CPU over gloo: the same course as in one."""

import os
import subprocess
import sys
from dataclasses import replace

import fit_worker
import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from ones_lib import Distillation
from ones_lib.data.keys import Share
from ones_lib.models.images import WideNet
from ones_lib.moe import Routing
from ones_lib.study import parallel
from ones_lib.study.processes import _blocks, shard_model
from ones_lib.study.records import Records
from ones_lib.study.running import Execution
from ones_lib.study.study import Study
from ones_lib.study.training import Training, fit, share_of


@pytest.fixture(scope="module")
def courses(tmp_path_factory, text_cache):
    """A folder with the results of tests/fit_worker.py: in this process, whole and in parts, and in two processes."""
    out = tmp_path_factory.mktemp("courses")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [fit_worker.__file__, str(out), str(text_cache)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "processes-2").exists()
    fit_worker.train(out / "one", text_cache)
    fit_worker.train(out / "parts", text_cache, device_batch=4)
    return out


@pytest.mark.processes
@pytest.mark.parametrize("way", ["two", "parts", "shards"])
def test_the_course_is_that_of_one_process(courses, way):
    """Loss curve, weights and predictions, in two processes, with accumulated gradients, with both, shards and a restart."""
    for name in ("moe", "dense", "student", "masked_lm", "answers", "causal"):
        # A part of a batch has a balance loss of its own; accumulation takes their mean.
        routed_parts = way != "two" and name in ("moe", "masked_lm", "answers")
        tolerance = 3e-4 if routed_parts else 1e-5
        # By rounding, a router may send a few tokens to another expert: other losses, predictions, gradients of embeddings.
        expected, found = (pd.read_csv(courses / which / f"{name}.csv") for which in ("one", way))
        np.testing.assert_allclose(found, expected, atol=1e-3 if routed_parts else 3e-5, rtol=0, err_msg=name)
        for kind, exceptions in (("", 0.01 if routed_parts else 0.0), (".predictions", 0.03)):
            expected, found = (load_file(courses / which / f"{name}{kind}.safetensors") for which in ("one", way))
            assert list(found) == list(expected)
            for key, tensor in expected.items():
                same = torch.isclose(found[key], tensor, atol=tolerance, rtol=tolerance)
                assert same.double().mean() >= 1 - exceptions, f"{name}: {key}"


def test_a_batch_has_to_be_shared_out_evenly(monkeypatch):
    monkeypatch.setattr("ones_lib.study.training.world_size", lambda: 3)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 3 processes, found 16"):
        share_of(16, 0)


def test_shares_cover_a_batch_once():
    batch = torch.arange(48)
    for world_size, parts in [(1, 1), (2, 1), (3, 4), (4, 12)]:
        shares = [Share(rank, world_size, parts).of(batch) for rank in range(world_size)]
        assert {len(part) for share in shares for part in share} == {48 // world_size // parts}
        assert torch.equal(torch.cat([torch.cat(share) for share in shares]).sort().values, batch)


@pytest.mark.parametrize(("device_batch", "parts"), [(0, 1), (48, 1), (99, 1), (47, 2), (16, 3), (5, 12), (1, 48)])
def test_parts_are_as_few_as_there_can_be(device_batch, parts):
    assert share_of(48, device_batch).parts == parts


@pytest.mark.parametrize(("device_batch", "parts"), [(0, 1), (47, 2), (15, 4), (5, 12), (3, 24), (2, 24)])
def test_parts_that_mixup_pairs_are_even(device_batch, parts):
    assert share_of(48, device_batch, paired=True).parts == parts
    for batch, device_batch in ((47, 0), (48, 1)):
        with pytest.raises(ValueError, match=f"even numbers of .*, found batch_size={batch} over 1 .*={device_batch}"):
            share_of(batch, device_batch, paired=True)


def test_balance_loss_of_parts_is_that_of_the_whole(monkeypatch):
    """Its mean over two processes, of different size as padding makes them; each gets the counts of both."""
    torch.manual_seed(0)
    probabilities = torch.rand(12, 4).softmax(dim=-1)
    experts = probabilities.topk(2).indices
    whole = Routing(experts, torch.ones(12, 2), probabilities).balance_loss()
    every = torch.bincount(experts.flatten(), minlength=4)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda counts: counts.copy_(every))
    parts = [Routing(experts[s], torch.ones(1), probabilities[s]).balance_loss() for s in (slice(0, 4), slice(4, 12))]
    torch.testing.assert_close(sum(parts) / 2, whole)


# --- studies ---------------------------------------------------------------------------------------------------------


def tiny_study(folder, **execution):
    recipe = Training(steps=6, batch_size=16, learning_rate=5e-3)
    return Study(
        domain="image",
        data={"name": "glyphs", "image_size": 16, "num_classes": 4, "train_per_class": 20, "val_per_class": 5},
        model={"name": "widenet_tiny_patch16_224", "patch_size": 4, "num_experts": 4, "top_k": 2, "renormalize": True}
        | {"embed_dim": 8, "depth": 2, "num_heads": 2, "d_ff": 12},
        teaching=recipe,
        learning=replace(recipe, steps=3),
        distillation=Distillation(),
        seeds=[0],
        records=Records(folder / "records"),
        cache_dir=folder / "cache",
        processes=1,
        calibration_examples=16,
        execution=Execution(**execution),
    )


@pytest.mark.processes
def test_a_study_under_torchrun_is_found_by_one_without(tmp_path):
    """The same records; the dense baseline, in which nothing is drawn, has the same course."""
    launched = tiny_study(tmp_path, launch="torchrun --standalone --nproc_per_node 2", device_batch=4)
    configs = [launched.moe(0), launched.dense(0), launched.student("average", 0), launched.student("fit", 0)]
    found = launched.run(configs)
    how = {"processes": 2, "device_batch": 4, "shard": False, "deterministic": False}
    assert all(record.result["execution"] == how for record in found)
    gathered = launched.records.find(launched.student("fit", 0, budget=0))
    assert gathered.result["execution"]["processes"] == 1  # the first process's work
    here = tiny_study(tmp_path, launch="false")
    assert [record.folder for record in here.run(configs)] == [record.folder for record in found]
    assert sorted(p.name for p in (tmp_path / "records").glob(".*")) == []

    alone = tiny_study(tmp_path / "alone")
    (dense,) = alone.run([alone.dense(0)])
    np.testing.assert_allclose(dense.history["loss"], found[1].history["loss"], atol=1e-5)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ("no-such-launcher -n 2", "launch: could not start 'no-such-launcher'"),
        ("false", "launch: exit status 1, and 1 of 1 left to do; from false -m ones_lib.study"),
        ("true", "launch: exit status 0, and 1 of 1 left to do"),
    ],
)
def test_a_launch_that_fails_says_why(tmp_path, launch, message):
    study = tiny_study(tmp_path, launch=launch)
    with pytest.raises(RuntimeError, match=message):
        study.run([study.dense(0)])
    assert study.records.all("dense") == []


def test_an_error_in_a_launched_process_reaches_the_caller(tmp_path, monkeypatch, capsys):
    """Here of a launcher that sets no WORLD_SIZE: what a process of it prints is printed again by a script."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RuntimeError):
        parallel.main(str(tmp_path / "plan.json"))
    (tmp_path / "said.txt").write_text(capsys.readouterr().out)
    (tmp_path / "launcher.sh").write_text(f"cat '{tmp_path / 'said.txt'}'; exit 1")
    study = tiny_study(tmp_path, launch=f"sh {tmp_path / 'launcher.sh'}")
    with pytest.raises(RuntimeError, match="launch: RunError: launch: expected a launcher that sets WORLD_SIZE"):
        study.run([study.dense(0)])


def test_models_are_spread_block_by_block_where_blocks_have_weights_of_their_own():
    arguments = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 8,
        "depth": 3,
        "num_heads": 2,
        "d_ff": 8,
        "num_classes": 2,
    }
    own, shared = (WideNet(**arguments, num_experts=2, share_depth=share) for share in (False, True))
    assert _blocks(own) == list(own.blocks)
    assert _blocks(shared) == []
    sizes = {
        "vocab_size": 50,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    mixtral = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2))
    assert _blocks(mixtral) == list(mixtral.model.layers)


def test_shards_need_processes_and_refuse_what_cannot_be_in_pieces(tmp_path):
    with pytest.raises(ValueError, match="shard: expected a launch command, such as 'torchrun --nproc_per_node 8'"):
        Execution(shard=True)
    with pytest.raises(RuntimeError, match="shard: expected several processes, started by torchrun, found one"):
        shard_model(torch.nn.Linear(2, 2))
    study = tiny_study(tmp_path)
    with pytest.raises(ValueError, match=r"ema_decay: expected 0 with a model that is sharded.*found 0.9"):
        fit(torch.nn.Linear(2, 2), None, replace(study.teaching, ema_decay=0.9), seed=0, shard=True)
