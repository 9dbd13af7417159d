"""Keys (index, seed) of the examples of each batch, as tensors [batch, 2]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """What one of ``world_size`` processes takes of every batch, in so many ``parts``, one after another."""

    rank: int = 0
    world_size: int = 1
    parts: int = 1

    def of(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Rows of a whole batch [B, ...], part by part."""
        return batch[self.rank :: self.world_size].chunk(self.parts)


WHOLE = Share()


def training_keys(
    num_examples: int, batch_size: int, seed: int, start: int, stop: int, share: Share = WHOLE
) -> Iterator[Tensor]:
    """Keys of the batches of steps ``start`` to ``stop`` - 1: epoch after epoch of shuffled indices, none left out.

    ``batch_size`` is over all processes; each process gets its own equal part of every batch, ``share.parts`` tensors a step.
    """
    permutation, epoch_held = None, -1
    for step in range(start, stop):
        parts, position = [], step * batch_size
        while position < (step + 1) * batch_size:
            epoch, offset = divmod(position, num_examples)
            if epoch != epoch_held:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                permutation = torch.stack(
                    [
                        torch.randperm(num_examples, generator=generator),
                        torch.randint(2**62, (num_examples,), generator=generator),
                    ],
                    dim=1,
                )
                epoch_held = epoch
            part = permutation[offset : offset + (step + 1) * batch_size - position]
            parts.append(part)
            position += len(part)
        yield from share.of(torch.cat(parts))


def evaluation_keys(num_examples: int, batch_size: int) -> list[Tensor]:
    """Keys of every example once, in order, without augmentation."""
    indices = torch.arange(num_examples)
    return list(torch.stack([indices, torch.full_like(indices, -1)], dim=1).split(batch_size))
