"""One training in several processes, as torchrun starts them: who does what, and models sharded over the processes.

All processes run the same code, each on its own part of every batch (data parallelism by PyTorch's DistributedDataParallel,
through Accelerate). Without torchrun there is one process, and nothing here has an effect.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ones_lib.checkpoints.terminal import RunError

TIMEOUT = timedelta(days=1)  # others wait while the first process gathers or converts

_ALONE = False


def join() -> PartialState:
    """Join the processes that torchrun has started.

    Raises:
        RunError: the launcher did not set WORLD_SIZE, or another number of processes is there.
    """
    expected = os.environ.get("WORLD_SIZE")
    if expected is None:
        raise RunError(
            "launch: expected a launcher that sets WORLD_SIZE and RANK for each process, as torchrun does, found neither;"
            " accelerate launch --cpu, for one, starts a single process whatever it is told"
        )
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=TIMEOUT)
    if state.num_processes != int(expected):
        raise RunError(f"launch: expected {expected} processes (WORLD_SIZE), found {state.num_processes}")
    return state


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _ALONE else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() and not _ALONE else 0


def is_main() -> bool:
    return rank() == 0


def wait_for_all() -> None:
    if world_size() > 1:
        PartialState().wait_for_everyone()


@contextmanager
def main_first() -> Iterator[None]:
    """The first process runs this block before the others, for instance to fill a cache."""
    if not is_main():
        wait_for_all()
    yield
    if is_main():
        wait_for_all()


@contextmanager
def alone() -> Iterator[None]:
    """One process runs this block while the others wait elsewhere: inside, the world size is 1."""
    global _ALONE
    _ALONE = True
    try:
        yield
    finally:
        _ALONE = False


def said_by_main(value):
    """The first process's value, in all processes."""
    if world_size() == 1:
        return value
    box = [value]
    broadcast_object_list(box)
    return box[0]


def same_weights(tensors: Iterable[Tensor]) -> None:
    """Copy the first process's tensors to all processes, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def own_share(items: Sequence) -> list:
    """This process's items: rank, rank + world size, and so on.

    The last item is repeated until all processes have the same number, since a sharded model must be called by all at once.
    """
    count = -(-len(items) // world_size())
    own = list(items[rank() :: world_size()])
    return own + list(items[-1:]) * (count - len(own))


def merged(results: list, count: int) -> list:
    """Undo :func:`own_share`: the results of all ``count`` items in their order, in every process."""
    if world_size() == 1:
        return results
    every = gather_object(results)
    return [every[i % world_size() * len(results) + i // world_size()] for i in range(count)]


def shard_model(model: nn.Module) -> None:
    """Shard a model over the processes, in place (FSDP2, PyTorch's ``fully_shard``).

    Each process holds a part of the weights, their gradients and the optimizer's state. A block is whole only while it is
    computed. Blocks that share weights are sharded together, as one unit with the rest of the model.

    Raises:
        RuntimeError: there is no process group.
    """
    if not dist.is_initialized():
        raise RuntimeError("shard: expected several processes, started by torchrun, found one")
    for block in _blocks(model):
        fully_shard(block)
    fully_shard(model)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: the first list of modules of one class. Empty if they share weights."""
    for blocks in (module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))):
        if len(blocks) > 1 and len({type(block) for block in blocks}) == 1:
            parameters = [parameter for block in blocks for parameter in block.parameters()]
            return list(blocks) if len(parameters) == len(set(parameters)) else []
    return []


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with sharded ones put together on the CPU. All processes must call it; only the first gets the result."""
    result = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if is_main():
            result[name] = full
    return result


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as ``like`` is; unchanged if ``like`` is whole or of another shape (a step counter)."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
