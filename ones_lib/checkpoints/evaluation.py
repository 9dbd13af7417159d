"""How far dense models are from the MoE that they were made of, on a text: perplexities, and the KL between predictions."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ones_lib.checkpoints.plan import TwinPlan
from ones_lib.checkpoints.shards import Shards
from ones_lib.checkpoints.stream import BlockStream, LazyModel, load_checkpoint, run_blocks
from ones_lib.distillation import soft_kl
from ones_lib.models.causal import model_inputs, token_losses

GUIDE = """\
KL is how far the predictions are from the MoE's, in nats a token. Below 0.05 a model can hardly be told apart from the MoE,
at 0.1 to 0.3 it differs but is of use, above 0.5 it is another model (a rough guide, from PEFT's example of MoeToDenseConfig)."""
ROWS = 4  # blocks that go through a model at a time
Logits = Callable[[int], Tensor]  # a model's logits [B, L, vocabulary], given the number of a part of the text


def parts_of(ids: Tensor) -> tuple[Tensor, ...]:
    """Blocks [n, L] in parts of :data:`ROWS`."""
    return ids.long().split(ROWS)


@torch.inference_mode()
def evaluate(parts: Sequence[Tensor], moe: Logits, dense: Mapping[str, Logits]) -> dict[str, dict[str, float]]:
    """Of the tokens that the models predict, all but the first of a block:

    - ``perplexity``: exp of the mean negative log-likelihood, of ``MoE`` and of each dense model.
    - ``kl``: of each dense model, the mean of ``sum p_MoE log(p_MoE / p_dense)``, in nats a token.

    Memory holds two models' logits of a part at a time.

    Args:
        parts: token ids [B, L]; an encoder-decoder predicts the second half of a block.
        moe, dense: what gives logits of these parts.
    """
    losses, kls, tokens = dict.fromkeys(["MoE", *dense], 0.0), dict.fromkeys(dense, 0.0), 0
    for number, part in enumerate(tqdm(parts, desc="predictions", unit="batch")):
        of_moe = moe(number)
        ids = part[:, -of_moe.shape[1] :].to(of_moe.device)
        tokens += ids[:, 1:].numel()
        losses["MoE"] += token_losses(of_moe, ids).double().sum().item()
        for name, logits in dense.items():
            found = logits(number).to(of_moe.device)
            losses[name] += token_losses(found, ids).double().sum().item()
            # Row by row: with a large vocabulary, the probabilities of a whole part are gigabytes.
            rows = zip(found[:, :-1], of_moe[:, :-1], strict=True)
            kls[name] += sum(len(z) * soft_kl(z, z_moe, 1.0).item() for z, z_moe in rows)
    means = torch.tensor(list(losses.values()), dtype=torch.float64) / tokens
    perplexities = dict(zip(losses, means.exp().tolist(), strict=True))  # tensors: math.exp of a large loss is an error
    return {"perplexity": perplexities, "kl": {name: kl / tokens for name, kl in kls.items()}}


@contextmanager
def loaded(folder: Path, parts: Sequence[Tensor], offload: Path) -> Iterator[Logits]:
    """Logits of the model in ``folder``, in memory while it is open. ``offload`` is a folder for what memory can't hold."""
    shutil.rmtree(offload, ignore_errors=True)  # of an interrupted call
    yield partial(_logits, load_checkpoint(folder, device_map="auto", offload_folder=offload), parts)
    shutil.rmtree(offload, ignore_errors=True)


@contextmanager
def by_block(plan: TwinPlan, parts: Sequence[Tensor], folder: Path) -> Iterator[Logits]:
    """Logits of an MoE that runs block by block from its files, with one block in memory. Hidden states are in ``folder``, which
    stays if the work is interrupted: the next call goes on with it."""
    if not plan.architecture.streams:
        with LazyModel(plan.stored).whole() as model:
            yield partial(_logits, model, parts)
        return
    stream = BlockStream(plan.stored, parts)
    hidden = run_blocks(stream, folder, len(stream.blocks), "perplexity")
    yield lambda number: stream.logits(number, hidden.read(number)["hidden"])
    shutil.rmtree(folder)


def fits_memory(shards: Shards) -> bool:
    """Whether a checkpoint's tensors, dequantised, would fit into half of the free memory."""
    size = 2 * sum(prod(shape) for shape in shards.shapes.values())
    return size < psutil.virtual_memory().available / 2


def _logits(model: PreTrainedModel, parts: Sequence[Tensor], number: int) -> Tensor:
    return model(**model_inputs(model, parts[number].to(model.device)), use_cache=False).logits
