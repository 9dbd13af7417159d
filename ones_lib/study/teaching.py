"""KD's part of a training step: the teacher's forward passes, a cache of their logits, and a guard over the student's start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ones_lib.data.files import model_tensors, save_tensors
from ones_lib.distillation import Distillation, HiddenStates, adapt_routers, routers, sampled_experts

if TYPE_CHECKING:
    from ones_lib.study.training import Task

LARGEST_CACHE = 2**30  # bytes of logits cached for one training


class Teaching:
    """Distillation of one student from its frozen teacher, step by step.

    Args:
        cache: the teacher's cached logits, if any. Not used if the loss needs more than logits or moves the routers.
        guard: told how the student compares with its start, if there is one.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        task: Task,
        distillation: Distillation,
        cache: TeacherLogits | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.teacher, self.task, self.distillation, self._guard = teacher, task, distillation, guard
        self.cache = None if distillation.hidden_weight or distillation.router_rate else cache
        watched = [student, teacher] if guard is None else [student, teacher, guard.start]
        self.watched = [HiddenStates(model) for model in watched] if distillation.hidden_weight else []
        if distillation.augmentations or distillation.router_rate:
            routers(teacher)  # raises before training if there are none
        if distillation.router_rate:
            for router in routers(teacher):
                router.top_k = router.weight.shape[0]

    @property
    def guard(self) -> Guard | None:
        """The guard, until it ends."""
        return None if self._guard is None or self._guard.start is None else self._guard

    def loss(self, task_loss: Tensor, logits: Tensor, batch) -> Tensor:
        """The student's whole loss; ``logits`` are from its latest forward pass, on the same batch."""
        with torch.no_grad():
            passes, hidden = self._teach(logits.detach(), batch)
        loss = self._whole(task_loss, logits, passes, 0, hidden)
        if self.guard is not None:
            with torch.no_grad(), self.guard.same_draws():
                before = self.task.forward(self.guard.start, batch)
                before = self._whole(self.task.loss(before, batch), before, passes, 2, hidden)
                self.guard.compare(loss - before, self.task.count(batch))
        return loss

    def _whole(
        self, task_loss: Tensor, logits: Tensor, passes: list[Tensor], watched: int, hidden: list[Tensor]
    ) -> Tensor:
        """The loss of the model whose hidden states ``watched[watched]`` has."""
        loss = self.distillation.loss(task_loss, logits, *passes)
        return loss + self.distillation.hidden_loss(self.watched[watched].last, hidden) if self.watched else loss

    def _teach(self, student_logits: Tensor, batch) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's logits, one tensor per pass, and its hidden states."""
        distillation = self.distillation
        if distillation.router_rate:
            adapt_routers(self.teacher, lambda: self._router_loss(student_logits, batch), distillation.router_rate)
        if self.cache is None:
            passes = [self._logits(batch)]
        else:
            passes = [self.cache.of(batch, lambda: self._logits(batch))]
        hidden = self.watched[1].last if self.watched else []
        if distillation.augmentations:
            with sampled_experts(self.teacher):
                passes += [self._logits(batch) for _ in range(distillation.augmentations)]
        return passes, hidden

    def _logits(self, batch) -> Tensor:
        return self.task.forward(self.teacher, batch)

    def _router_loss(self, student_logits: Tensor, batch) -> Tensor:
        """The teacher's loss with the student as its teacher."""
        logits = self._logits(batch)
        return self.distillation.loss(self.task.loss(logits, batch), logits, student_logits)

    def close(self) -> None:
        for states in self.watched:
            states.close()


class Guard:
    """Keeps KD from undoing a good start. A student that gets worse than its start goes back to it, at half the learning rate.

    Student and start are compared on the same batches, by the running mean of the difference of their KD losses. The rate's
    factor grows again, step by step, up to 1; once it is 1 and the schedule's warm-up is over, the guard ends. A student that
    is never worse than its start is trained as without a guard.

    Args:
        start: the student as it starts; frozen. None once the guard has ended: until then a step has one more forward pass.
    """

    CUT, GROWTH, MEMORY = 0.5, 1.1, 0.7  # of the factor, and the decay of the running mean
    ROUNDING = 1e-6  # a smaller difference of two losses means nothing

    def __init__(self, start: nn.Module) -> None:
        self.start: nn.Module | None = start.train().requires_grad_(False)
        self.factor, self.excess = 1.0, 0.0
        self._parts: list[Tensor] = []
        self._draws: list[Tensor] = []

    def note_draws(self) -> None:
        """To be called right before the student's forward pass."""
        self._draws = [module.get_rng_state() for module in _generators()]

    @contextmanager
    def same_draws(self) -> Iterator[None]:
        """Context in which random draws, such as dropout's, are those of the student's forward pass."""
        now = [module.get_rng_state() for module in _generators()]
        for module, state in zip(_generators(), self._draws, strict=True):
            module.set_rng_state(state)
        yield
        for module, state in zip(_generators(), now, strict=True):
            module.set_rng_state(state)

    def compare(self, difference: Tensor, count: int) -> None:
        """Take in one part of a step's batch: the student's loss minus its start's, mean over ``count`` predictions."""
        self._parts.append(torch.stack([difference * count, torch.full_like(difference, count)]))

    def update(self, student: nn.Module, mean: Callable[[Tensor], Tensor], warm: bool) -> None:
        """End a step. ``mean`` averages over processes; ``warm``: the schedule's warm-up is over."""
        total, count = mean(sum(self._parts)).tolist()
        self._parts.clear()
        self.excess = self.MEMORY * self.excess + (1 - self.MEMORY) * total / (count or 1)
        if self.excess > self.ROUNDING:
            self.factor, self.excess = self.CUT * self.factor, 0.0
            with torch.no_grad():
                for weight, first in zip(student.parameters(), self.start.parameters(), strict=True):
                    weight.copy_(first)
            return
        self.factor = min(1.0, self.GROWTH * self.factor)
        if warm and self.factor == 1:
            self.start = None

    def state(self) -> dict[str, float]:
        return {"factor": self.factor, "excess": self.excess}

    def restore(self, state: dict[str, float] | None) -> None:
        """Go on from :meth:`state`, or None: the guard had ended."""
        if state is None:
            self.start = None
        else:
            self.factor, self.excess = state["factor"], state["excess"]


def _generators() -> list:
    """The modules that hold a random generator: of the CPU, and of the accelerator if there is one."""
    return [torch, torch.get_device_module()] if torch.accelerator.is_available() else [torch]


class TeacherLogits:
    """Cache of a frozen teacher's logits, one file per batch. Students of one seed see the same batches and share it.

    Cached logits are bit for bit the computed ones. Files are named by a hash of batch, teacher's weights and precision.

    Args:
        folder: created when needed; may be deleted at any time.
        passes: teacher passes of one training; if their logits exceed :data:`LARGEST_CACHE`, nothing is cached.
    """

    def __init__(self, folder: Path, teacher: nn.Module, passes: int) -> None:
        self.folder, self.teacher, self.passes, self.enabled = folder, teacher, passes, True

    @cached_property
    def _weights(self) -> str:
        return _digest(model_tensors(self.teacher).values())

    def of(self, batch: Tensor | tuple, compute: Callable[[], Tensor]) -> Tensor:
        """Logits of a batch, from the cache or else from ``compute``."""
        if not self.enabled:
            return compute()
        tensors = [batch] if torch.is_tensor(batch) else [part for part in batch if part is not None]
        device = tensors[0].device
        precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        path = self.folder / f"{_digest(tensors, self._weights, str(precision))}.safetensors"
        if path.exists():
            return load_file(path)["logits"].to(device)
        logits = compute()
        self.enabled = logits.nbytes * self.passes <= LARGEST_CACHE
        if self.enabled:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(path, {"logits": logits})
        return logits


def _digest(tensors: Iterable[Tensor], *texts: str) -> str:
    """Hash of tensors and texts, 32 hexadecimal digits."""
    digest = blake2b(repr(texts).encode(), digest_size=16)
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
