"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ones_lib.data.files import model_tensors, save_tensors


class TeacherLogits:
    """A frozen teacher's logits, kept in files by what is in the batch, so that students that see the same batches, as those
    of one seed do, have them computed once. What is read is bit for bit what was computed.

    Args:
        folder: of this teacher's configuration; made when needed, can be deleted at any time.
        teacher: its weights and the precision are part of what a batch's file is found by.
        steps: of the training: logits of which so many are larger than :data:`LARGEST_CACHE` are not kept.
    """

    def __init__(self, folder: Path, teacher: nn.Module, steps: int) -> None:
        self.folder, self.teacher, self.steps, self.keeping = folder, teacher, steps, True

    @cached_property
    def _weights(self) -> str:
        return _digest(model_tensors(self.teacher).values())

    def of(self, batch: Tensor | tuple, compute: Callable[[], Tensor]) -> Tensor:
        """Logits of a batch: read, or else computed and kept."""
        if not self.keeping:
            return compute()
        tensors = [batch] if torch.is_tensor(batch) else [part for part in batch if part is not None]
        device = tensors[0].device
        precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        path = self.folder / f"{_digest(tensors, self._weights, str(precision))}.safetensors"
        if path.exists():
            return load_file(path)["logits"].to(device)
        logits = compute()
        self.keeping = logits.nbytes * self.steps <= LARGEST_CACHE
        if self.keeping:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(path, {"logits": logits})
        return logits


#: Bytes of logits that are kept for one training.
LARGEST_CACHE = 2**30


def _digest(tensors: Iterable[Tensor], *texts: str) -> str:
    """32 hexadecimal digits that stand for tensors' contents, and for texts."""
    digest = blake2b(repr(texts).encode(), digest_size=16)
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
