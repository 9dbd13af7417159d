"""Runs a causal MoE block by block over a long text. What passes between two blocks is on disk, not in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ones_lib.data.files import opened, save_tensors

TOKENS_A_SLICE = 4096  # tokens that go through a block at a time
LEAST_SLICES = 8


class Slices:
    """Tensors of all tokens of a stream, a safetensors file for each slice of them; in memory one slice at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def read(self, number: int, *names: str) -> dict[str, Tensor]:
        """A slice's tensors of these names; without names, all."""
        with opened(self.path(number)) as file:
            return {name: file.get_tensor(name) for name in names or file.keys()}

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.path(number), tensors)


class BlockStream:
    """The blocks of a model, each with what it is called with beside the hidden states.

    Args:
        model: a causal language model, in eval mode, wherever its weights are.
        ids: token ids [n, L], n at least :data:`LEAST_SLICES`; they are cut into slices of equal size, and a rest that fills none
            is left out.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self.model, self.blocks = model, model.base_model.layers
        rows = max(1, min(TOKENS_A_SLICE // ids.shape[1], len(ids) // LEAST_SLICES))
        self.ids = ids[: len(ids) // rows * rows].long().split(rows)
        self._arguments = self._find_arguments()

    def __len__(self) -> int:
        """Number of slices."""
        return len(self.ids)

    @property
    def tokens(self) -> int:
        return sum(ids.numel() for ids in self.ids)

    @torch.no_grad()
    def _find_arguments(self) -> list[dict]:
        """What the model calls each block with: masks and position embeddings, the same for every slice."""
        found: list[dict] = []

        def see(block: nn.Module, inputs: tuple, arguments: dict) -> None:
            found.append({name: value for name, value in arguments.items() if name != "hidden_states"})

        hooks = [block.register_forward_pre_hook(see, with_kwargs=True) for block in self.blocks]
        try:
            self.model.base_model(self.ids[0].to(self.model.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @torch.no_grad()
    def embedded(self, number: int) -> Tensor:
        """What the first block gets for a slice, [rows, L, d]."""

        class Found(Exception):
            pass

        hidden: list[Tensor] = []

        def see(block: nn.Module, inputs: tuple, arguments: dict) -> None:
            hidden.append(inputs[0] if inputs else arguments["hidden_states"])
            raise Found

        hook = self.blocks[0].register_forward_pre_hook(see, with_kwargs=True)
        try:
            self.model.base_model(self.ids[number].to(self.model.device), use_cache=False)
        except Found:
            pass
        finally:
            hook.remove()
        return hidden[0]

    @torch.no_grad()
    def run(self, index: int, hidden: Tensor) -> Tensor:
        """A block's output for a slice."""
        output = self.blocks[index](hidden.to(self.model.device), **self._arguments[index])
        return output[0] if isinstance(output, tuple) else output


@contextmanager
def watched(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While it is open, the dictionary has ``inputs`` and ``outputs`` of the module's last call, [N, d]."""
    found: dict[str, Tensor] = {}

    def see(module: nn.Module, inputs: tuple, arguments: dict, output: Tensor) -> None:
        x = inputs[0] if inputs else arguments["hidden_states"]
        found.update(inputs=x.flatten(0, -2), outputs=output.flatten(0, -2))

    hook = module.register_forward_hook(see, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


@contextmanager
def replaced(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While it is open, the module computes ``function`` of its first argument."""
    own = module.__dict__.get("forward")  # an offloaded module has one
    module.forward = lambda x, *_, **__: function(x)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
