"""Runs an MoE and dense models made of it side by side, block by block, and says how far their predictions are apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ones_lib.checkpoints.evaluation import evaluate
from ones_lib.checkpoints.plan import Block, TwinPlan
from ones_lib.checkpoints.stored import StoredModel
from ones_lib.checkpoints.stream import BlockStream, replaced, run_blocks, watched
from ones_lib.checkpoints.text import BLOCK
from ones_lib.ffn import FeedForwardWeights
from ones_lib.models.causal import text_config


class SideBySide:
    """An MoE and dense models, which are the MoE with networks in place of its routed experts. All else stays as it is: shared
    experts, and what a layer multiplies its experts' output by.

    Memory holds one block, its networks, and what stands outside of the blocks. Hidden states are on disk.

    Args:
        plan: of the MoE, which has to stream.
        ids: the text that they run on, token ids [n, L], L at least 2.
        count: number of dense models.
        folder: for the hidden states.

    Raises:
        ValueError: the model does not predict the text's tokens, such as one without an output layer.
    """

    def __init__(self, plan: TwinPlan, ids: Tensor, count: int, folder: Path) -> None:
        self.plan, self.count, self.folder = plan, count, folder
        self.ids = ids.long().split(max(1, BLOCK // ids.shape[1]))
        # Each model has slices of its own of the stream, the MoE the first ones.
        self.stream = BlockStream(plan.stored, self.ids * (1 + count))
        self._places = {self.stream.name(i): i for i in range(len(self.stream.blocks))}
        self._check_logits()

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Here, since else it would fail at the end."""
        name = type(self.stream.model).__name__
        try:
            found = self.stream.logits(0, self.stream.embedded(0)).shape[-1]
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{name}: expected logits for token ids, found {error}") from error
        if found <= (largest := max(int(ids.max()) for ids in self.ids)):
            raise ValueError(f"{name}: expected logits of the tokens, up to {largest}, found {found}")

    @staticmethod
    def bytes(stored: StoredModel, tokens: int, count: int) -> int:
        """What the hidden states of so many tokens take on the disk, before and behind a block."""
        return 2 * (1 + count) * tokens * text_config(stored.model.config).hidden_size * stored.model.dtype.itemsize

    def run(self, block: Block, networks: Sequence[FeedForwardWeights]) -> None:
        """Run all models from where they are through a block with an MoE layer, with a network of each dense model's in place of
        its experts. Blocks are run in their order.

        Raises:
            ValueError: hidden states are not finite, as where a network's numbers are too large for float16.
        """
        placed = [network.map(lambda t: t.to(self.stream.device, self.stream.dtype)) for network in networks]

        def see(module: nn.Module, name: str, number: int) -> AbstractContextManager[None]:
            model = number // len(self.ids)
            return self._replaced(block, placed[model - 1]) if model and name == block.name else nullcontext()

        run_blocks(self.stream, self.folder, self._places[block.name] + 1, "", see)

    @contextmanager
    def _replaced(self, block: Block, network: FeedForwardWeights) -> Iterator[None]:
        experts, activation = self.stream.model.get_submodule(block.experts), self.plan.activation(block)
        gated = self.plan.architecture.input_gates  # then experts get a copy each of the tokens, times its gates
        router = f"{block.experts.removesuffix('experts')}router"

        def output(x: Tensor) -> Tensor:
            found = network.apply(routed["inputs"] if gated else x, activation)
            return F.pad(found, (0, 0, 0, len(x) - len(found)))  # outputs of the copies are added up

        watching = watched(self.stream.model.get_submodule(router)) if gated else nullcontext({})
        with watching as routed, replaced(experts, output):
            yield

    def compare(self) -> tuple[list[float], list[float]]:
        """Perplexities, of the MoE and of each dense model, and the KL of each dense model to the MoE, in nats a token: see
        :func:`ones_lib.checkpoints.evaluation.evaluate`.

        Raises:
            ValueError: hidden states are not finite.
        """
        hidden = run_blocks(self.stream, self.folder, len(self.stream.blocks), "")

        def logits(model: int, part: int) -> Tensor:
            number = model * len(self.ids) + part
            return self.stream.logits(number, hidden.read(number)["hidden"])

        dense = {str(model): partial(logits, model) for model in range(1, 1 + self.count)}
        found = evaluate(self.ids, partial(logits, 0), dense)
        return list(found["perplexity"].values()), list(found["kl"].values())
