"""One training loop, for every model and task of the study, on Hugging Face Accelerate.

What a step does is a function of (seed, step) and of the weights before it: the batch, its augmentation, mixup, dropout and
the router's noise. So a run that goes on from a checkpoint ends with the weights of one that was never interrupted.

Under torchrun every process takes its part of each batch; what a step minimises is the mean over the whole batch, as in one
process. Batches and masks are the same ones; dropout, the router's noise and mixup's pairs are drawn by each process for its
part, and an expert's capacity is counted in it.
"""

from __future__ import annotations

import difflib
import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ones_lib.data.files import model_tensors, opened, save_tensors
from ones_lib.data.keys import WHOLE, Share
from ones_lib.distillation import Distillation, HiddenStates, adapt_routers, routers, sampled_experts
from ones_lib.study.processes import in_pieces_like, is_main, rank, shard_model, whole_tensors, world_size
from ones_lib.study.teacher_logits import TeacherLogits

#: (step, steps, loss, accuracy): called now and then during training.
Progress = Callable[[int, int, float, float], None]
REPORT_EVERY = 25  # steps between looks at the loss, each of which waits for the device


@dataclass(frozen=True)
class Training:
    """A training recipe: AdamW (or another of timm's optimizers), linear warm-up, cosine decay to zero, clipping.

    Args:
        steps: optimizer steps.
        batch_size: examples a step, over all processes.
        learning_rate: after warm-up.
        warmup: part of the steps, 0 to 1.
        weight_decay: of matrices; not of biases and norms.
        optimizer: timm's name, such as ``adamw`` or ``lamb``.
        clip_norm: largest gradient norm.
        label_smoothing: 0 to 1.
        mixup: alpha of the Beta distribution; 0 is none.
        ema_decay: of the weights' moving average, which is then what is evaluated and kept; 0 is none.
        balance_weight: of the MoE's balance loss.
        mixed_precision: ``no``, ``bf16`` or ``fp16``.
        evaluations: how often validation metrics are taken over the run, the end included; 0 is never.
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
        positive = ("steps", "batch_size", "learning_rate", "clip_norm")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, found {getattr(self, name)}")
        for name in ("weight_decay", "mixup", "balance_weight", "evaluations"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number of at least 0, found {getattr(self, name)}")
        for name in ("warmup", "label_smoothing", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number from 0 to below 1, found {getattr(self, name)}")
        if self.optimizer not in list_optimizers():
            close = difflib.get_close_matches(self.optimizer, list_optimizers(), n=3)
            raise ValueError(
                f"optimizer: expected one of timm's, such as {close or ['adamw', 'lamb']}, found {self.optimizer!r}"
            )
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision: expected 'no', 'bf16' or 'fp16', found {self.mixed_precision!r}")


class Task(Protocol):
    """What the loop needs to know of a task. A batch is whatever ``batches`` yields, already on the device.

    ``metrics`` are names, the main one first.
    """

    metrics: tuple[str, ...]

    def batches(
        self, training: Training, seed: int, start: int, device: torch.device, share: Share = WHOLE
    ) -> Iterable:
        """Batches of the steps from ``start`` on: of each the parts of this process's ``share``."""

    def count(self, batch) -> int:
        """How many predictions ``loss`` is the mean of."""

    def forward(self, model: nn.Module, batch) -> Tensor:
        """Logits."""

    def loss(self, logits: Tensor, batch) -> Tensor:
        """Mean loss against the labels."""

    def accuracy(self, logits: Tensor, batch) -> Tensor:
        """Part of the batch that is right."""

    def predict(self, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Scores of every validation example by metric, [n] each, and what else is worth keeping of the predictions."""


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


class Diverged(RuntimeError):
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
    """Train ``model`` on ``task``, with KD from ``teacher`` if there is one (frozen, in eval mode, on the same batches).

    Args:
        seed: of everything that is drawn during training.
        teacher_logits: folder for this teacher's logits, see :class:`ones_lib.study.teacher_logits.TeacherLogits`; None keeps none.
        checkpoint: file to save to every ``checkpoint_every`` steps, and to go on from if it exists.
        device_batch: examples that one process takes at a time; the gradients of as many as its part of a batch needs are
            added up (gradient accumulation). 0: all of its part at once.
        shard: spread weights, gradients and optimizer state of model and teacher over the processes,
            :func:`ones_lib.study.processes.shard_model`.
        progress: called every few steps.

    Returns:
        The trained model (its moving average, if asked for), on the device, in eval mode, and the history: one row a
        report with ``step, loss, train_accuracy, seconds`` and, where it was evaluated, ``val_<metric>``.

    Raises:
        Diverged: the loss of a step is not finite; the step is named, and the last checkpoint remains.
    """
    if (teacher is None) != (distillation is None):
        raise ValueError("teacher, distillation: expected both or neither")
    AcceleratorState._reset_state()  # else the first precision used in a process would be the only one
    accelerator = Accelerator(mixed_precision=training.mixed_precision, cpu=not torch.accelerator.is_available())
    device = accelerator.device
    share = _share(training.batch_size, device_batch)
    model.to(device)
    if shard:
        refused = {"ema_decay": training.ema_decay, "router_rate": distillation.router_rate if distillation else 0}
        for name, value in refused.items():
            if value:
                raise ValueError(
                    f"{name}: expected 0 with a model that is spread over processes (shard), found {value}"
                )
        shard_model(model)  # before the optimizer, which then holds the pieces
    fused = {"fused": True} if training.optimizer == "adamw" else {}
    optimizer = create_optimizer_v2(
        model, training.optimizer, lr=training.learning_rate, weight_decay=training.weight_decay, **fused
    )
    warmup_steps = round(training.warmup * training.steps)
    scheduler = CosineLRScheduler(optimizer, training.steps, warmup_t=warmup_steps, t_in_epochs=False)
    ema = ModelEmaV3(model, decay=training.ema_decay) if training.ema_decay else None
    if teacher is not None:
        teacher.to(device).eval().requires_grad_(False)
        if shard:
            shard_model(teacher)
        kept = None
        if teacher_logits is not None and not shard:
            kept = TeacherLogits(teacher_logits, teacher, training.steps * share.parts)
        lessons = _Lessons(model, teacher, task, distillation, kept)

    start, rows = 0, []
    modules = {"model": model} | ({"ema": ema.module} if ema is not None else {})
    if teacher is not None and distillation.router_rate:
        modules["teacher"] = teacher  # its routers move
    if checkpoint is not None and checkpoint.exists():
        start, rows = _load_checkpoint(checkpoint, modules, optimizer)
    wrapped = model if shard else accelerator.prepare(model)
    optimizer = accelerator.prepare(optimizer)
    batches = iter(task.batches(training, seed, start, device, share))
    evaluation_steps = {round(training.steps * (i + 1) / training.evaluations) for i in range(training.evaluations)}

    def report(step: int) -> None:
        """Add a row for the steps since the last report; raise if one of their losses is not finite."""
        losses, accuracies = accelerator.reduce(torch.stack(recent).T.contiguous(), "mean").cpu()
        if not losses.isfinite().all():
            bad = int((~losses.isfinite()).nonzero()[0])
            raise Diverged(
                f"the loss became {losses[bad]:.3g} at step {step - len(recent) + bad + 1} of {training.steps} (seed {seed},"
                f" learning rate {optimizer.param_groups[0]['lr']:.2g}); a lower learning_rate or clip_norm may help"
            )
        row = {"step": step, "loss": losses.mean().item()}
        row["train_accuracy"] = accuracies.mean().item()
        if step in evaluation_steps:
            predictions = task.predict(_kept(model, ema), device)
            row |= {f"val_{metric}": predictions[metric].double().mean().item() for metric in task.metrics}
            model.train()
        row["seconds"] = seconds_before + time.perf_counter() - started
        rows.append(row)
        recent.clear()
        if progress is not None:
            progress(step, training.steps, row["loss"], row["train_accuracy"])

    started, seconds_before = time.perf_counter(), rows[-1]["seconds"] if rows else 0.0
    recent: list[Tensor] = []  # loss and accuracy of a step, [2]
    parameters = list(model.parameters())
    model.train()
    for step in range(start + 1, training.steps + 1):
        step_seed = (seed * 1_000_003 + step * 97) % 2**32
        set_seed(step_seed)
        parts = [next(batches) for _ in range(share.parts)]  # after the seed: masks and mixup are drawn by it
        if share.world_size > 1:
            set_seed((step_seed + 1 + share.rank) % 2**32)
        scheduler.step_update(step)
        scores = 0
        for number, (batch, weight) in enumerate(zip(parts, _weights(parts, task, share, accelerator), strict=True), 1):
            # Gradients of all but the last part stay in the process that has them.
            with wrapped.no_sync() if hasattr(wrapped, "no_sync") and number < share.parts else nullcontext():
                with accelerator.autocast():
                    logits = task.forward(wrapped, batch)
                    loss = task.loss(logits, batch)
                    if teacher is not None:
                        loss = lessons.loss(loss, logits, batch)
                    total = loss + training.balance_weight * model.balance_loss()
                accelerator.backward(weight * total)
            accuracy = task.accuracy(logits.detach(), batch)
            scores = scores + weight * torch.stack([loss.detach().float(), accuracy])
        accelerator.clip_grad_norm_(parameters, training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update(model)
        recent.append(scores)
        saving = checkpoint is not None and step % checkpoint_every == 0 and step < training.steps
        if step % REPORT_EVERY == 0 or step in evaluation_steps or saving or step == training.steps:
            report(step)
        if saving:
            _save_checkpoint(checkpoint, modules, optimizer, step, rows)
    if teacher is not None:
        lessons.close()
    return _kept(model, ema).eval(), pd.DataFrame(rows)


def _share(batch_size: int, device_batch: int) -> Share:
    """This process's part of every batch, in as few equal pieces of at most ``device_batch`` as there can be."""
    if batch_size % world_size():
        raise ValueError(f"batch_size: expected a multiple of {world_size()} processes, found {batch_size}")
    if device_batch < 0:
        raise ValueError(f"device_batch: expected a number of at least 0, found {device_batch}")
    own = batch_size // world_size()
    size = next(n for n in range(min(device_batch or own, own), 0, -1) if own % n == 0)
    return Share(rank(), world_size(), own // size)


def _weights(parts: list, task: Task, share: Share, accelerator: Accelerator) -> list[Tensor | float]:
    """What each part's mean loss has to count, so that the mean over processes of their sum is that over the whole batch."""
    if share.world_size == share.parts == 1:
        return [1.0]
    counts = torch.tensor([task.count(part) for part in parts], dtype=torch.float32, device=accelerator.device)
    total = accelerator.reduce(counts.sum(), "sum")
    return list(counts * share.world_size / total)


def _kept(model: nn.Module, ema: ModelEmaV3 | None) -> nn.Module:
    return model if ema is None else ema.module


class _Lessons:
    """What a student learns from its teacher in a step, as a :class:`Distillation` asks for it."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        task: Task,
        distillation: Distillation,
        kept: TeacherLogits | None,
    ) -> None:
        self.teacher, self.task, self.distillation = teacher, task, distillation
        # Logits alone are kept, and those of a teacher that stays as it is.
        self.kept = None if distillation.hidden_weight or distillation.router_rate else kept
        self.watched = [HiddenStates(m) for m in (student, teacher)] if distillation.hidden_weight else []
        if distillation.augmentations or distillation.router_rate:
            routers(teacher)  # a teacher without any is found before training
        if distillation.router_rate:
            for router in routers(teacher):
                router.top_k = router.weight.shape[0]

    def loss(self, task_loss: Tensor, logits: Tensor, batch) -> Tensor:
        """The loss of the student, whose ``logits`` its last forward pass gave."""
        with torch.no_grad():
            passes, hidden = self._teach(logits.detach(), batch)
        loss = self.distillation.loss(task_loss, logits, *passes)
        return loss + self.distillation.hidden_loss(self.watched[0].last, hidden) if self.watched else loss

    def _teach(self, student_logits: Tensor, batch) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's logits, pass by pass, and its hidden states."""
        teacher, distillation = self.teacher, self.distillation
        if distillation.router_rate:

            def loss() -> Tensor:
                logits = self.task.forward(teacher, batch)
                return distillation.loss(self.task.loss(logits, batch), logits, student_logits)

            adapt_routers(teacher, loss, distillation.router_rate)
        if self.kept is None:
            passes = [self.task.forward(teacher, batch)]
        else:
            passes = [self.kept.of(batch, lambda: self.task.forward(teacher, batch))]
        hidden = self.watched[1].last if self.watched else []
        if distillation.augmentations:
            with sampled_experts(teacher):
                passes += [self.task.forward(teacher, batch) for _ in range(distillation.augmentations)]
        return passes, hidden

    def close(self) -> None:
        for states in self.watched:
            states.close()


def _save_checkpoint(
    path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, step: int, rows: list[dict]
) -> None:
    tensors = {}
    for prefix, module in modules.items():
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in model_tensors(module).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    tensors = whole_tensors(tensors)
    if is_main():
        save_tensors(path, tensors, {"step": str(step), "history": json.dumps(rows)})


def _load_checkpoint(
    path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict]]:
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with opened(path) as file, torch.no_grad():
        for prefix, module in modules.items():
            for name, tensor in model_tensors(module).items():
                tensor.copy_(in_pieces_like(file.get_tensor(f"{prefix}.{name}"), tensor))
        for key in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = in_pieces_like(file.get_tensor(key), parameters[int(index)])
        metadata = file.metadata()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"]), json.loads(metadata["history"])
