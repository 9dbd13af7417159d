"""Runs an MoE once and stores on disk what passes through its experts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from ones_lib.calibration import Activation, LayerActivations
from ones_lib.checkpoints.stored import StoredModel
from ones_lib.checkpoints.stream import BlockStream, LazyModel, check_finite, run_blocks
from ones_lib.data.files import save_tensors
from ones_lib.models.causal import experts_modules, model_inputs, text_config, watched_experts

TOKENS_A_PASS = 4096  # tokens that go through the MoE at a time


def store_activations(stored: StoredModel, ids: Tensor, folder: Path, streams: bool) -> None:
    """Run the MoE on ``ids`` [n, L] and store the inputs, gates and outputs of every MoE layer in ``folder``, which appears only
    when all is done. If it exists, nothing is run.

    If the model ``streams``, it runs block by block from its files, with one block in memory, and an interrupted run goes on at
    the block where it stopped. Else it runs batch by batch, and reads every block for every batch.
    """
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    batches = ids.long().split(max(1, TOKENS_A_PASS // ids.shape[1]))
    if streams:
        _run_by_block(BlockStream(stored, batches), unfinished)
    else:
        _run_at_once(stored, batches, unfinished)
    os.replace(unfinished, folder)


def activations_bytes(stored: StoredModel, tokens: int) -> int:
    """What :func:`store_activations` takes on the disk: activations, and hidden states before and behind a block."""
    width, size = text_config(stored.model.config).hidden_size, stored.model.dtype.itemsize
    layers = experts_modules(stored.model).values()
    return tokens * (2 * width * size + sum(2 * width * size + 4 * layer.num_experts for layer in layers))


def _run_at_once(stored: StoredModel, batches: Sequence[Tensor], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
    lazy = LazyModel(stored)
    for number, batch in enumerate(tqdm(batches, desc="calibration", unit="batch")):
        with torch.inference_mode(), lazy.whole() as model, watched_experts(model, _writer(folder, number)):
            model(**model_inputs(model, batch.to(lazy.device)), use_cache=False)


def _run_by_block(stream: BlockStream, folder: Path) -> None:
    last = max(i for i in range(len(stream.blocks)) if experts_modules(stream.blocks[i]))

    def see(block: nn.Module, name: str, number: int) -> AbstractContextManager:
        return watched_experts(block, _writer(folder, number, name))

    shutil.rmtree(run_blocks(stream, folder, last + 1, "calibration", see).folder)


def _writer(folder: Path, number: int, block: str = "") -> Callable[[str, LayerActivations], None]:
    """What writes a batch's activations of a module of experts."""

    def see(experts: str, found: LayerActivations) -> None:
        check_finite(found.outputs, f"{block}.{experts}".lstrip("."))
        tensors = {"inputs": found.inputs, "gates": found.gates.float(), "outputs": found.outputs}
        path = folder / f"{block}.{experts}".lstrip(".")
        path.mkdir(parents=True, exist_ok=True)
        save_tensors(path / f"{number:05d}.safetensors", tensors)

    return see


def stored_activations(folder: Path, experts: str, activation: Activation) -> LayerActivations | None:
    """What :func:`store_activations` has stored for a module of experts, in float32; None if it has not run."""
    if not folder.exists():
        return None
    paths = sorted((folder / experts).iterdir())
    made: dict[str, Tensor] = {}
    for name in ("inputs", "gates", "outputs"):
        parts = [load_file(path)[name] for path in paths]  # mapped: in memory is what has been copied
        made[name] = torch.empty(sum(map(len, parts)), parts[0].shape[1])
        torch.cat(parts, out=made[name])
    return LayerActivations(**made, activation=activation)


def split_tokens(activations: LayerActivations, blocks: int | None = None) -> tuple[LayerActivations, LayerActivations]:
    """A random three quarters of the tokens, and the rest; of so many ``blocks`` of text, each whole, as
    :func:`split_blocks` splits them."""
    count = len(activations.inputs)
    if blocks is None:
        parts = _shuffled(count).split(max(1, 3 * count // 4))[:2]
    else:
        size = torch.arange(count // blocks)
        parts = [(part[:, None] * len(size) + size).flatten() for part in split_blocks(blocks)]
    return tuple(activations.map(lambda t, part=part: t[part]) for part in parts)


def split_blocks(count: int) -> tuple[Tensor, Tensor]:
    """Numbers of a random three quarters of so many blocks, or a few more, and of the rest."""
    return _shuffled(count).split([count - count // 4, count // 4])


def _shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))
