"""Keys of training and evaluation batches: tensors [batch, 2] of (index, seed).

The index chooses an example; the seed decides its random augmentation, and -1 means none. Training keys are a function of
(seed, step) alone, so a run can resume at any step, with any number of loader workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """The rows of each batch that process ``rank`` of ``world_size`` takes, in ``parts`` for gradient accumulation."""

    rank: int = 0
    world_size: int = 1
    parts: int = 1

    def of(self, batch: Tensor) -> tuple[Tensor, ...]:
        """This process's rows of a whole batch [B, ...], part by part."""
        return batch[self.rank :: self.world_size].chunk(self.parts)


WHOLE = Share()


def training_keys(
    num_examples: int, batch_size: int, seed: int, start: int, stop: int, share: Share = WHOLE
) -> Iterator[Tensor]:
    """Keys of the batches of steps ``start`` to ``stop`` - 1, ``share.parts`` tensors per step.

    Every epoch visits each example once, in a new random order; batches cross the ends of epochs.
    ``batch_size`` counts the examples of all processes together.
    """
    epoch_keys, epoch_held = None, -1
    for step in range(start, stop):
        parts, position, end = [], step * batch_size, (step + 1) * batch_size
        while position < end:
            epoch, offset = divmod(position, num_examples)
            if epoch != epoch_held:
                epoch_keys, epoch_held = _epoch_keys(num_examples, seed * 1_000_003 + epoch), epoch
            part = epoch_keys[offset : offset + end - position]
            parts.append(part)
            position += len(part)
        yield from share.of(torch.cat(parts))


def _epoch_keys(num_examples: int, seed: int) -> Tensor:
    """All indices in random order, each with a random seed, [num_examples, 2]."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(num_examples, generator=generator)
    return torch.stack([indices, torch.randint(2**62, (num_examples,), generator=generator)], dim=1)


def evaluation_keys(num_examples: int, batch_size: int) -> list[Tensor]:
    """Keys of every example once, in order, without augmentation."""
    indices = torch.arange(num_examples)
    return list(torch.stack([indices, torch.full_like(indices, -1)], dim=1).split(batch_size))
