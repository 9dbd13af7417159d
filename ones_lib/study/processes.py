"""One training in several processes, as torchrun starts them: who does what, and a model whose weights are in pieces.

All processes run the same code on their own part of every batch (data parallelism; PyTorch's DistributedDataParallel by way of
Accelerate). Outside torchrun there is one process, and nothing here does anything.
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

PATIENCE = timedelta(days=1)  # of processes that wait while the first gathers or converts

_ALONE = False


def join() -> PartialState:
    """Join the processes that torchrun has started.

    Raises:
        RuntimeError: the launcher has not said how many there are, or others than it said are there.
    """
    expected = os.environ.get("WORLD_SIZE")
    if expected is None:
        raise RuntimeError(
            "launch: expected a launcher that sets WORLD_SIZE and RANK for each process, as torchrun does, found neither;"
            " accelerate launch --cpu, for one, starts a single process whatever it is told"
        )
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    if state.num_processes != int(expected):
        raise RuntimeError(f"launch: expected {expected} processes (WORLD_SIZE), found {state.num_processes}")
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
    """Code that the first process runs before the others do, such as what fills a cache."""
    if not is_main():
        wait_for_all()
    yield
    if is_main():
        wait_for_all()


@contextmanager
def alone() -> Iterator[None]:
    """Code that one process runs by itself while the others wait: in it, there is one."""
    global _ALONE
    _ALONE = True
    try:
        yield
    finally:
        _ALONE = False


def said_by_main(value):
    """The first process's value, in all of them."""
    if world_size() == 1:
        return value
    box = [value]
    broadcast_object_list(box)
    return box[0]


def own_share(items: Sequence) -> list:
    """Every so-manieth of ``items``: this process's. The last are repeated until all processes have as many, since those of a
    model in pieces have to call it together."""
    count = -(-len(items) // world_size())
    own = list(items[rank() :: world_size()])
    return own + list(items[-1:]) * (count - len(own))


def merged(results: list, count: int) -> list:
    """The results for all ``count`` items, in their order, in every process, out of those for each one's own share."""
    if world_size() == 1:
        return results
    every = gather_object(results)
    return [every[i % world_size() * len(results) + i // world_size()] for i in range(count)]


def same_weights(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's tensors, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def shard_model(model: nn.Module) -> None:
    """Spread a model's parameters over the processes (FSDP2, PyTorch's ``fully_shard``), block by block where blocks have
    weights of their own: each process holds its part of them, of their gradients and of the optimizer's state, and the whole
    of a block only while it is computed. In place; without processes of one job it is an error.

    Raises:
        RuntimeError: there is no process group.
    """
    from torch.distributed.fsdp import fully_shard  # half a second to import, which all that starts would pay

    if not dist.is_initialized():
        raise RuntimeError("shard: expected several processes, started by torchrun, found one")
    for block in _blocks(model):
        fully_shard(block)
    fully_shard(model)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer's blocks: the first list of modules that are all of one class. None if they share weights."""
    for blocks in (module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))):
        if len(blocks) > 1 and len({type(block) for block in blocks}) == 1:
            parameters = [parameter for block in blocks for parameter in block.parameters()]
            return list(blocks) if len(parameters) == len(set(parameters)) else []
    return []


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that may be in pieces, whole, those on the CPU; all processes have to ask for them, and the first gets them."""
    result = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor
        if is_main():
            result[name] = full
    return result


def in_pieces_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, spread over the processes as ``like`` is; as it is, if that is whole too or of another shape."""
    if not hasattr(like, "placements") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
