"""The training loop for every model and task of the study, on Hugging Face Accelerate.

A step depends only on (seed, step) and on the weights before it: so do its batch, augmentation, mixup, dropout and router
noise. A run resumed from a checkpoint therefore ends with exactly the weights of an uninterrupted one.

Under torchrun each process takes its part of every batch, and a step minimises the mean over the whole batch, as with one
process. Batches and masks are the same as with one process. Dropout, router noise and mixup pairs are drawn per process, and
an expert's capacity is counted per process.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ones_lib.checkpoints.terminal import RunError
from ones_lib.data.files import model_tensors, opened, save_tensors
from ones_lib.data.keys import WHOLE, Share
from ones_lib.distillation import Distillation
from ones_lib.study.processes import is_main, rank, shard_like, shard_model, whole_tensors, world_size
from ones_lib.study.teaching import Guard, TeacherLogits, Teaching

#: Called every few steps with (step, steps, loss, accuracy).
Progress = Callable[[int, int, float, float], None]
REPORT_EVERY = 25  # steps; a report waits for the device


@cache
def optimizers() -> list[str]:
    """timm's optimizers that :func:`fit` can use: without those of second order, and those of libraries that are not ours."""
    return list_optimizers(exclude_filters=["adahessian", "bnb*", "fused*"])


@dataclass(frozen=True)
class Training:
    """A training recipe: an optimizer of timm's with linear warm-up, cosine decay to zero and gradient clipping.

    Args:
        steps: optimizer steps.
        batch_size: examples per step, over all processes.
        learning_rate: peak, after warm-up.
        warmup: fraction of the steps.
        weight_decay: of matrices only, not of biases and norms.
        optimizer: one of :func:`optimizers`, such as ``adamw`` or ``lamb``.
        clip_norm: largest gradient norm.
        label_smoothing: 0 to below 1.
        mixup: alpha of the Beta distribution; 0 is none.
        ema_decay: of the weights' moving average, which is then evaluated and returned; 0 is none.
        balance_weight: weight of the MoE's balance loss.
        mixed_precision: ``no``, ``bf16`` or ``fp16``.
        evaluations: how many times to evaluate on the validation data, evenly spread, the last at the end; 0 is never.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    optimizer: str = "adamw"
    clip_norm: float = 1.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    ema_decay: float = 0.0
    balance_weight: float = 0.01
    mixed_precision: str = "no"
    evaluations: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, found {getattr(self, name)}")
        for name in ("weight_decay", "mixup", "balance_weight", "evaluations"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number of at least 0, found {getattr(self, name)}")
        for name in ("warmup", "label_smoothing", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number from 0 to below 1, found {getattr(self, name)}")
        if self.optimizer not in optimizers():
            raise ValueError(f"optimizer: expected one of timm's, such as 'adamw', found {self.optimizer!r}")
        if self.mixup and self.batch_size % 2:  # timm asserts it, which Python can leave out
            raise ValueError(f"batch_size: expected an even number with mixup, found {self.batch_size}")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision: expected 'no', 'bf16' or 'fp16', found {self.mixed_precision!r}")


class Task(Protocol):
    """What a task does for the training loop. A batch is whatever ``batches`` yields, already on the device.

    ``metrics`` are names, the main one first.
    """

    metrics: tuple[str, ...]

    def batches(
        self, training: Training, seed: int, start: int, device: torch.device, share: Share = WHOLE
    ) -> Iterable:
        """Batches of the steps after ``start``: for each step the parts of this process's ``share``."""

    def count(self, batch) -> int:
        """Number of predictions that ``loss`` averages over."""

    def forward(self, model: nn.Module, batch) -> Tensor:
        """Logits."""

    def loss(self, logits: Tensor, batch) -> Tensor:
        """Mean loss against the labels, a scalar."""

    def accuracy(self, logits: Tensor, batch) -> Tensor:
        """Fraction of the batch predicted correctly, a scalar."""

    def predict(self, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Validation scores by metric, one per example, [n] each; more entries are stored with the record."""


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


class Diverged(RunError):
    """The loss became NaN or infinite."""


def fit(
    model: nn.Module,
    task: Task,
    training: Training,
    *,
    seed: int,
    teacher: nn.Module | None = None,
    distillation: Distillation | None = None,
    teacher_logits: Path | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 1000,
    device_batch: int = 0,
    shard: bool = False,
    progress: Progress | None = None,
) -> tuple[nn.Module, pd.DataFrame]:
    """Train ``model`` on ``task``, with KD if there is a ``teacher`` (frozen, in eval mode, on the same batches).

    Args:
        seed: of all random draws during training.
        teacher_logits: folder to cache the teacher's logits in, see :class:`ones_lib.study.teaching.TeacherLogits`.
        checkpoint: file to save to every ``checkpoint_every`` steps, and to resume from if it exists.
        device_batch: largest number of examples that a process takes at a time; if its part of the batch is larger,
            gradients are accumulated. 0: no limit.
        shard: spread model, gradients, optimizer state and teacher over the processes,
            :func:`ones_lib.study.processes.shard_model`.
        progress: called after every report.

    Returns:
        The trained model (its moving average if ``ema_decay``), on the device, in eval mode; and the history, one row
        per report: ``step, loss, train_accuracy, seconds`` and, where evaluated, ``val_<metric>``.

    Raises:
        Diverged: a step's loss is not finite. The error names the step; the last checkpoint stays.
        ValueError: the checkpoint is damaged, or of an earlier version.
    """
    if (teacher is None) != (distillation is None):
        raise ValueError("teacher, distillation: expected both or neither")
    guarded = copy.deepcopy(model) if distillation is not None and distillation.guard else None
    run = _Run(model, task, training, seed, device_batch, shard)
    if teacher is not None:
        run.add_teacher(teacher, distillation, teacher_logits, guarded)
    if checkpoint is not None and checkpoint.exists():
        run.load(checkpoint)
    run.prepare()
    while run.step < training.steps:
        run.take_step()
        last = run.step == training.steps
        saving = checkpoint is not None and run.step % checkpoint_every == 0 and not last
        if saving or last or run.step % REPORT_EVERY == 0 or run.step in run.evaluation_steps:
            run.report(progress)
        if saving:
            run.save(checkpoint)
    return run.close()


class _Run:
    """One training under way: model, optimizer and batches, the step it is at, and its history.

    Order of calls: :meth:`add_teacher` and :meth:`load` if needed, :meth:`prepare`, then steps and reports, :meth:`close`.
    """

    def __init__(
        self, model: nn.Module, task: Task, training: Training, seed: int, device_batch: int, shard: bool
    ) -> None:
        AcceleratorState._reset_state()  # else the precision of the process's first training would stay
        self.accelerator = Accelerator(
            mixed_precision=training.mixed_precision, cpu=not torch.accelerator.is_available()
        )
        self.device = self.accelerator.device
        self.model, self.task, self.training, self.seed, self.shard = model.to(self.device), task, training, seed, shard
        self.share = share_of(training.batch_size, device_batch, paired=training.mixup > 0)
        if shard:
            _refuse_sharded(ema_decay=training.ema_decay)
            shard_model(model)  # before the optimizer, which then holds the shards
        fused = {"fused": True} if training.optimizer == "adamw" else {}
        self.optimizer = create_optimizer_v2(
            model, training.optimizer, lr=training.learning_rate, weight_decay=training.weight_decay, **fused
        )
        self.warmup = round(training.warmup * training.steps)
        self.scheduler = CosineLRScheduler(self.optimizer, training.steps, warmup_t=self.warmup, t_in_epochs=False)
        self.ema = ModelEmaV3(model, decay=training.ema_decay) if training.ema_decay else None
        self.best = model if self.ema is None else self.ema.module  # evaluated and returned
        self.teaching: Teaching | None = None
        count = training.evaluations
        self.evaluation_steps = {round(training.steps * (i + 1) / count) for i in range(count)}
        self.saved = {"model": model} | ({} if self.ema is None else {"ema": self.ema.module})  # in checkpoints
        self.step, self.rows = 0, []
        self.recent: list[Tensor] = []  # loss and accuracy of each step since the last report, [2]

    def add_teacher(
        self, teacher: nn.Module, distillation: Distillation, folder: Path | None, start: nn.Module | None
    ) -> None:
        """``start``: a copy of the student, for the guard; None for no guard."""
        teacher.eval().requires_grad_(False)
        if distillation.router_rate:
            self.saved["teacher"] = teacher  # its routers are trained
        cache = None
        if self.shard:
            _refuse_sharded(router_rate=distillation.router_rate)
            shard_model(teacher)  # a block at a time gets to the device, which need not hold the whole
        else:
            teacher.to(self.device)
        if folder is not None and not self.shard:
            cache = TeacherLogits(folder, teacher, self.training.steps * self.share.parts)
        guard = None
        if start is not None:
            start.to(self.device)
            if self.shard:
                shard_model(start)
            guard = Guard(start)
        self.teaching = Teaching(self.model, teacher, self.task, distillation, cache, guard)

    @property
    def guard(self) -> Guard | None:
        """The guard over the student's start, until it ends."""
        return None if self.teaching is None else self.teaching.guard

    def prepare(self) -> None:
        self.wrapped = self.model if self.shard else self.accelerator.prepare(self.model)
        if self.accelerator.scaler is not None:
            # Else accelerate only looks, in every step, for optional packages: with small models a twentieth of the time.
            self.optimizer = self.accelerator.prepare(self.optimizer)
        self.batches = iter(self.task.batches(self.training, self.seed, self.step, self.device, self.share))
        self.parameters = list(self.model.parameters())
        self.started = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0.0)
        self.model.train()

    def take_step(self) -> None:
        """One optimizer step on one batch, taken in ``share.parts`` parts."""
        self.step += 1
        step_seed = (self.seed * 1_000_003 + self.step * 97) % 2**32
        _seed(step_seed)
        parts = [next(self.batches) for _ in range(self.share.parts)]  # seeded, since they draw masks and mixup
        if self.share.world_size > 1:
            _seed((step_seed + 1 + self.share.rank) % 2**32)
        self.scheduler.step_update(self.step)
        guard = self.guard
        if guard is not None:
            for group in self.optimizer.param_groups:
                group["lr"] *= guard.factor
        scores = 0
        for number, (part, weight) in enumerate(zip(parts, self._weights(parts), strict=True), 1):
            local = number < self.share.parts  # only with the last part do processes average their gradients
            with self.accelerator.no_sync(self.wrapped) if local else nullcontext():
                scores = scores + self._backward(part, weight)
        self.accelerator.clip_grad_norm_(self.parameters, self.training.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if guard is not None:
            mean = partial(self.accelerator.reduce, reduction="mean")
            guard.update(self.model, mean, warm=self.step >= self.warmup)
        if self.ema is not None:
            self.ema.update(self.model)
        self.recent.append(scores)

    def _backward(self, batch, weight: Tensor | float) -> Tensor:
        """Add the gradients of a part's weighted loss; returns weighted loss and accuracy, [2]."""
        if self.guard is not None:
            self.guard.note_draws()
        with self.accelerator.autocast():
            logits = self.task.forward(self.wrapped, batch)
            loss = self.task.loss(logits, batch)
            if self.teaching is not None:
                loss = self.teaching.loss(loss, logits, batch)
            total = loss + self.training.balance_weight * self.model.balance_loss()
        if self.accelerator.scaler is None:
            (weight * total).backward()
        else:
            self.accelerator.backward(weight * total)
        accuracy = self.task.accuracy(logits.detach(), batch)
        return weight * torch.stack([loss.detach().float(), accuracy])

    def _weights(self, parts: list) -> list[Tensor | float]:
        """Weights of the parts' mean losses: the weighted sum, averaged over processes, is the whole batch's mean."""
        if self.share.world_size == self.share.parts == 1:
            return [1.0]
        counts = torch.tensor([self.task.count(part) for part in parts], dtype=torch.float32, device=self.device)
        return list(counts * self.share.world_size / self.accelerator.reduce(counts.sum(), "sum").clamp(min=1))

    def report(self, progress: Progress | None) -> None:
        """Add a row to the history, for the steps since the last report."""
        losses, accuracies = self.accelerator.reduce(torch.stack(self.recent).T.contiguous(), "mean").cpu()
        if not losses.isfinite().all():
            bad = int((~losses.isfinite()).nonzero()[0])
            raise Diverged(
                f"the loss became {losses[bad]:.3g} at step {self.step - len(losses) + bad + 1} of {self.training.steps}"
                f" (seed {self.seed}, learning rate {self.optimizer.param_groups[0]['lr']:.2g});"
                " a lower learning_rate or clip_norm may help"
            )
        row = {"step": self.step, "loss": losses.mean().item(), "train_accuracy": accuracies.mean().item()}
        if self.step in self.evaluation_steps:
            predictions = self.task.predict(self.best, self.device)
            row |= {f"val_{metric}": predictions[metric].double().mean().item() for metric in self.task.metrics}
            self.model.train()
        self.rows.append(row | {"seconds": time.perf_counter() - self.started})
        self.recent.clear()
        if progress is not None:
            progress(self.step, self.training.steps, row["loss"], row["train_accuracy"])

    def save(self, path: Path) -> None:
        """Write a checkpoint: weights, all that the optimizer keeps, the scale of fp16's loss, step and history."""
        saved = self._saved()
        tensors = {f"{m}.{name}": t for m, module in saved.items() for name, t in model_tensors(module).items()}
        state = {"step": self.step, "history": self.rows}
        state["optimizer"] = _packed(self.optimizer.state_dict(), "optimizer", tensors)
        if self.guard is not None:
            state["guard"] = self.guard.state()
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        tensors = whole_tensors(tensors)
        if is_main():
            save_tensors(path, tensors, {name: json.dumps(value) for name, value in state.items()})

    def _saved(self) -> dict[str, nn.Module]:
        """The modules of a checkpoint: the guard's start too, until the guard ends."""
        return self.saved if self.guard is None else {**self.saved, "start": self.guard.start}

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        with opened(path) as file, torch.no_grad():
            state = {name: json.loads(value) for name, value in file.metadata().items()}
            if "optimizer" not in state:
                raise ValueError(f"{path}: expected a checkpoint of this version, found an older one; delete it")
            if self.guard is not None:
                self.guard.restore(state.get("guard"))
            for prefix, module in self._saved().items():
                for name, tensor in model_tensors(module).items():
                    tensor.copy_(shard_like(file.get_tensor(f"{prefix}.{name}"), tensor))

            def tensor_of(name: str) -> Tensor:
                _, part, index, *_ = name.split(".")
                tensor = file.get_tensor(name)
                return shard_like(tensor, parameters[int(index)]) if part == "state" else tensor

            optimizer = _unpacked(state["optimizer"], tensor_of)
        now = self.optimizer.state_dict()["param_groups"]  # with what is constant, such as dtypes
        groups = [old | new for old, new in zip(now, optimizer["param_groups"], strict=True)]
        self.optimizer.load_state_dict({**optimizer, "param_groups": groups})
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.rows = state["step"], state["history"]

    def close(self) -> tuple[nn.Module, pd.DataFrame]:
        """The trained model and its history."""
        if self.teaching is not None:
            self.teaching.close()
        return self.best.eval(), pd.DataFrame(self.rows)


def _seed(seed: int) -> None:
    """Seed all random draws, as accelerate's ``set_seed``. Without an accelerator that takes a millisecond: torch notes the
    call's stack, for the case that CUDA is there later."""
    if torch.accelerator.is_available():
        set_seed(seed)
    else:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A tree of plain values in the form that JSON keeps. Its tensors go to ``tensors``, by names that begin with ``name``; what
    is neither, such as a dtype or a function, is left out: an optimizer has it from its making."""
    if torch.is_tensor(value):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        known = {key: one for key, one in value.items() if one is None or isinstance(one, _KEPT)}
        return {"dict": [[key, _packed(one, f"{name}.{key}", tensors)] for key, one in known.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_packed(one, f"{name}.{i}", tensors) for i, one in enumerate(value)]}
    return value


_KEPT = (Tensor, dict, list, tuple, str, int, float)


def _unpacked(packed: Any, tensor_of: Callable[[str], Tensor]) -> Any:
    """Undo :func:`_packed`."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensor_of(content)
    if kind == "dict":
        return {key: _unpacked(one, tensor_of) for key, one in content}
    return {"list": list, "tuple": tuple}[kind](_unpacked(one, tensor_of) for one in content)


def share_of(batch_size: int, device_batch: int, paired: bool = False) -> Share:
    """This process's part of every batch, in the fewest equal parts of at most ``device_batch`` examples; ``paired``: of an even
    number of them, for mixup."""
    if batch_size % world_size():
        raise ValueError(f"batch_size: expected a multiple of {world_size()} processes, found {batch_size}")
    own = batch_size // world_size()
    even = 2 if paired else 1
    if own % even or 0 < device_batch < even:
        found = f"batch_size={batch_size} over {world_size()} processes, device_batch={device_batch}"
        raise ValueError(
            f"batch_size, device_batch: expected even numbers of examples, which mixup pairs, found {found}"
        )
    size = next(n for n in range(min(device_batch or own, own), 0, -1) if own % n == 0 and n % even == 0)
    return Share(rank(), world_size(), own // size)


def _refuse_sharded(**values: float) -> None:
    for name, value in values.items():
        if value:
            raise ValueError(f"{name}: expected 0 with a model that is sharded over processes (shard), found {value}")
