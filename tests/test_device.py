"""Exactness on the accelerator, if there is one: the same numbers as on the CPU. On a machine without one, the CPU's own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from ones_lib.data.held import HeldImages, TensorImages
from ones_lib.ffn import FeedForwardWeights
from ones_lib.moe import MoEFeedForward, Routing, dispatch, dispatch_plain
from ones_lib.study.training import default_device

ROOT = Path(__file__).parents[1]
DEVICE = default_device()


def layer_of(dtype, top_k=2, tokens=300, num_experts=8, d_model=64, d_ff=96):
    torch.manual_seed(0)
    bank = FeedForwardWeights(
        torch.randn(num_experts, d_ff, d_model, dtype=torch.float64) * d_model**-0.5,
        torch.randn(num_experts, d_model, d_ff, dtype=torch.float64) * d_ff**-0.5,
    )
    probabilities = torch.randn(tokens, num_experts, dtype=torch.float64).softmax(dim=-1)
    gates, experts = probabilities.topk(top_k, dim=-1)
    x = torch.randn(tokens, d_model, dtype=torch.float64)
    return bank, x, Routing(experts, gates, probabilities), bank.map(lambda t: t.to(DEVICE, dtype))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str
)
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_dispatch_is_what_the_equations_give_in_float64(dtype, tolerance, top_k):
    bank, x, routing, on_device = layer_of(dtype, top_k)
    expected = dispatch_plain(bank, x, routing, F.gelu)
    there = Routing(
        routing.experts.to(DEVICE), routing.gates.to(DEVICE, dtype), routing.probabilities.to(DEVICE, dtype)
    )
    for way in (dispatch, dispatch_plain):
        found = way(on_device, x.to(DEVICE, dtype), there, F.gelu)
        assert (found.cpu().double() - expected).norm() <= tolerance * expected.norm()


def test_gradients_of_an_moe_layer_are_the_cpus():
    torch.manual_seed(0)
    layer = MoEFeedForward(32, d_ff=48, num_experts=4, top_k=2).double().eval()
    x = torch.randn(50, 32, dtype=torch.float64)
    found = []
    for device in ("cpu", DEVICE):
        layer.to(device).zero_grad()
        layer(x.to(device)).square().sum().backward()
        found.append({name: p.grad.cpu().clone() for name, p in layer.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_augmented_pictures_are_the_cpus(jitter):
    pictures = torch.randint(256, (64, 3, 20, 20), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    keys = torch.stack([torch.arange(64), torch.arange(64) * 7919 - 1], dim=1)
    batches = []
    for device in (torch.device("cpu"), DEVICE):
        split = HeldImages(pictures, torch.arange(64), 16, min_crop=0.3, color_jitter=jitter)
        split.to(device)
        images, labels = split.__getitems__(keys)
        assert images.device.type == device.type
        assert labels.tolist() == list(range(64))
        batches.append(images.cpu())
    difference = (batches[0] - batches[1]).abs() * 127.5  # levels of 255: a sum may round the other way
    assert difference.max() <= 2
    assert difference.mean() < 0.01


def test_shifted_glyphs_are_the_cpus():
    pictures = torch.randint(256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    keys = torch.stack([torch.arange(20), torch.arange(20) - 1], dim=1)
    here, there = (TensorImages(pictures, torch.arange(20), 100.0, 50.0) for _ in range(2))
    there.to(DEVICE)
    torch.testing.assert_close(there.__getitems__(keys)[0].cpu(), here.__getitems__(keys)[0])


@pytest.mark.processes
def test_the_script_for_a_gpu_runs_at_smoke_size(tmp_path):
    """All but pytest's own run of this file."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "notebooks" / "profiles", project / "notebooks" / "profiles")
    for file in ("run_all.sh", "tests/on_gpu.sh", "tests/on_gpu.py"):
        (project / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, project / file)
    (project / "tests" / "test_device.py").write_text("def test_nothing():\n    pass\n")
    (project / "ones_lib").symlink_to(ROOT / "ones_lib")
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [project / "tests" / "on_gpu.sh", tmp_path / "out", "", "smoke"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    for name in ("dispatch", "inference", "images"):
        assert f"gpu_{name}.csv: " in ran.stdout
        assert pd.read_csv(tmp_path / "out" / f"gpu_{name}.csv")["device"].notna().all()
    images = pd.read_csv(tmp_path / "out" / "gpu_images.csv")
    assert {"moe", "dense", "dense_long", "average"} <= set(images["model"])
    assert (images["seconds"] > 0).all()
