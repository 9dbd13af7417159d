"""Runs an MoE once and stores on disk what passes through its experts."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.logging import tqdm

from ones_lib.calibration import Activation, LayerActivations
from ones_lib.checkpoints.plan import block_of
from ones_lib.data.files import save_tensors
from ones_lib.models.causal import load_language_model, model_inputs, watched_experts

TOKENS_A_PASS = 4096  # tokens that go through the MoE at a time


def store_activations(source: Path, ids: Tensor, folder: Path) -> None:
    """Run the MoE in ``source`` on ``ids`` [n, L] and store the inputs, gates and outputs of every MoE layer in
    ``folder``, which appears only when all is done. If it exists, nothing is run."""
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an interrupted run
    model = load_language_model(source, device_map="auto", offload_folder=unfinished / "offload")
    passes = Counter()

    def see(name: str, found: LayerActivations) -> None:
        block = block_of(name)
        tensors = {"inputs": found.inputs, "gates": found.gates.float(), "outputs": found.outputs}
        (unfinished / block).mkdir(parents=True, exist_ok=True)
        save_tensors(unfinished / block / f"{passes[block]:05d}.safetensors", tensors)
        passes[block] += 1

    # A causal model runs without its output layer, whose logits of all tokens at once might not fit.
    run = model if model.config.is_encoder_decoder else model.base_model
    batches = ids.split(max(1, TOKENS_A_PASS // ids.shape[1]))
    with torch.inference_mode(), watched_experts(model, see):
        for batch in tqdm(batches, desc="calibration", unit="batch"):
            run(**model_inputs(model.config, batch.to(model.device)), use_cache=False)
    shutil.rmtree(unfinished / "offload", ignore_errors=True)
    os.replace(unfinished, folder)


def stored_activations(folder: Path, block: str, activation: Activation) -> LayerActivations | None:
    """What :func:`store_activations` has stored for a block, in float32; None if it has not run."""
    if not folder.exists():
        return None
    passes = [load_file(path) for path in sorted((folder / block).iterdir())]
    tensors = (torch.cat([found[name] for found in passes]).float() for name in ("inputs", "gates", "outputs"))
    return LayerActivations(*tensors, activation)


def split_tokens(activations: LayerActivations) -> tuple[LayerActivations, LayerActivations]:
    """A random three quarters of the tokens, and the rest."""
    count = len(activations.inputs)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    parts = order.split(max(1, 3 * count // 4))[:2]
    return tuple(activations.map(lambda t, part=part: t[part]) for part in parts)
