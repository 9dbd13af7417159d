"""Knowledge distillation from the whole MoE (Hinton et al., arXiv 1503.02531; OneS, arXiv 2201.10890)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


def soft_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(softmax(z_teacher / T) || softmax(z_student / T))``, mean over all leading axes; logits [..., classes]."""
    student = F.log_softmax(student_logits.float() / temperature, dim=-1).flatten(0, -2)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1).flatten(0, -2)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class Distillation:
    """Soft KD: ``(1 - alpha) * task_loss + alpha * soft_kl``.

    Args:
        temperature: T, positive.
        alpha: weight of the teacher, 0 (no KD) to 1 (teacher only).
    """

    temperature: float = 2.0
    alpha: float = 0.7

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number, found {self.temperature}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a number from 0 to 1, found {self.alpha}")

    def loss(self, task_loss: Tensor, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The combined loss of one batch; gradients flow into ``task_loss`` and ``student_logits`` alone."""
        kl = soft_kl(student_logits, teacher_logits.detach(), self.temperature)
        return (1 - self.alpha) * task_loss + self.alpha * kl
