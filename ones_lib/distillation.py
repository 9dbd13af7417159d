"""Knowledge distillation from the MoE teacher (Hinton et al., arXiv 1503.02531; OneS, arXiv 2201.10890).

Extensions: hidden states as a further target, and two methods that use more of the experts than the MoE's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ones_lib.moe import Router


def soft_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(softmax(z_teacher / T) || softmax(z_student / T))``, mean over all leading axes; logits [..., classes]. Without
    any, 0: a part of a batch may have nothing to predict."""
    if not student_logits.numel():
        return student_logits.float().sum()
    student = F.log_softmax(student_logits.float() / temperature, dim=-1).flatten(0, -2)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1).flatten(0, -2)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class Distillation:
    """Soft distillation: ``(1 - alpha) * task_loss + alpha * soft_kl``, and extensions that are off by default.

    Args:
        temperature: T, positive.
        alpha: weight of the teacher, from 0 (no distillation) to 1 (teacher only).
        hidden_weight: weight of :func:`hidden_error`, added to the loss; 0 for none.
        depth_weights: weight of each depth's hidden states in that error; None for equal weights.
        augmentations: knowledge augmentation (Kim et al., "Every Expert Matters", arXiv 2502.12947): the KL is the mean over
            the MoE's own forward pass and this many more, in which each token's experts are drawn by the router's
            probabilities.
        router_rate: above 0, the router is student-aware (same paper). All experts are active, and before each step of the
            student, the teacher's routers take a gradient step that lowers the teacher's task loss plus its KL to the
            student. The step is ``router_rate`` times as long as the routers' weights. The idea is the paper's; loss and
            step size are ours.
        guard: whether a student that gets worse than its start goes back, see :class:`ones_lib.study.teaching.Guard`. It helps
            where KD is short and its learning rate too large. It harms a student that starts close to its teacher: a good
            rate first makes such a student worse, until the rate has decayed.
    """

    temperature: float = 2.0
    alpha: float = 0.7
    hidden_weight: float = 0.0
    depth_weights: Sequence[float] | None = None
    augmentations: int = 0
    router_rate: float = 0.0
    guard: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number, found {self.temperature}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a number from 0 to 1, found {self.alpha}")
        for name in ("hidden_weight", "augmentations", "router_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a number of at least 0, found {getattr(self, name)}")
        if self.depth_weights is not None and (not self.depth_weights or min(self.depth_weights) < 0):
            raise ValueError(f"depth_weights: expected numbers of at least 0, found {self.depth_weights}")

    def loss(self, task_loss: Tensor, student_logits: Tensor, *teacher_logits: Tensor) -> Tensor:
        """The loss of one batch, with the mean KL over the teacher's passes.

        Gradients flow into ``task_loss`` and ``student_logits`` only.
        """
        kl = sum(soft_kl(student_logits, z.detach(), self.temperature) for z in teacher_logits) / len(teacher_logits)
        return (1 - self.alpha) * task_loss + self.alpha * kl

    def hidden_loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The weighted :func:`hidden_error`, to be added to the loss."""
        return self.hidden_weight * hidden_error(student, teacher, self.depth_weights)


def hidden_error(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Sequence[float] | None = None
) -> Tensor:
    """Mean over depths of ``weight * |s - t|^2 / |t|^2``, with hidden states s of the student and t of the teacher.

    Hidden states of one depth have equal shape. ``weights`` has one number per depth; None for 1 each.
    """
    weights = [1.0] * len(teacher) if weights is None else weights
    if not len(student) == len(teacher) == len(weights):
        found = f"{len(student)}, {len(teacher)} and {len(weights)}"
        raise ValueError(
            f"depth_weights: expected student, teacher and weights of the same number of depths, found {found}"
        )
    pairs = [(s, t.detach()) for s, t in zip(student, teacher, strict=True)]
    errors = [(s - t).square().sum() / t.square().sum() for s, t in pairs]
    return sum(w * error for w, error in zip(weights, errors, strict=True)) / len(errors)


class HiddenStates:
    """Records a model's residual stream: ``last`` has the hidden states after each depth in the last forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.last: list[Tensor] = []
        readers = model.hidden_state_readers()
        self._first = readers[0]
        self._hooks = [module.register_forward_pre_hook(self._record) for module in readers]

    def _record(self, module: nn.Module, inputs: tuple) -> None:
        if module is self._first:
            self.last = []
        self.last.append(inputs[0])

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def routers(teacher: nn.Module) -> list[Router]:
    """The teacher's top-k routers.

    Raises:
        ValueError: it has none, as Soft MoE.
    """
    found = [module for module in teacher.modules() if isinstance(module, Router)]
    if not found:
        raise ValueError("augmentations, router_rate: expected a teacher whose experts are chosen by a top-k router")
    return found


@contextmanager
def sampled_experts(teacher: nn.Module) -> Iterator[None]:
    """Context in which every token's experts are drawn by the router's probabilities."""
    chosen = routers(teacher)
    for router in chosen:
        router.sampling = True
    try:
        yield
    finally:
        for router in chosen:
            router.sampling = False


def adapt_routers(teacher: nn.Module, loss: Callable[[], Tensor], rate: float) -> None:
    """Moves the teacher's routers one step against the gradient of ``loss()``, by ``rate`` times the norm of their weights."""
    weights = [router.weight for router in routers(teacher)]
    for weight in weights:
        weight.requires_grad_(True)
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(), weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.requires_grad_(False)
        if dist.is_initialized():  # the teacher must stay the same in all processes
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        norm = gradient.norm()
        if norm > 0:
            weight.sub_(rate * weight.norm() * gradient / norm)
