"""The joint fit: all feed-forward layers of a student regressed together onto the teacher's residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ones_lib.calibration import Calibration
from ones_lib.distillation import HiddenStates, hidden_error
from ones_lib.gathering.regression import relative_adam
from ones_lib.moe import MoEFeedForward

CHECKED = 16  # the first batches, on which the fit is compared with its start


def fit_jointly(
    student: nn.Module,
    teacher: nn.Module,
    calibration: Calibration,
    steps: int = 600,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> None:
    """Minimises :func:`ones_lib.distillation.hidden_error` over the weights of all feed-forward layers, in place.

    A layer-wise fit sees the teacher's inputs at every layer. In the student, a layer's inputs contain the errors of the
    layers before it, and it can correct some of them. Only the feed-forward layers change; labels and logits are not used.
    Each step of Adam uses one random batch, with ``learning_rate`` relative to the weights
    (:func:`ones_lib.gathering.regression.relative_adam`). The start is restored unless the error on the first batches falls.
    """
    ffns = [module for module in student.modules() if isinstance(module, MoEFeedForward)]
    weights = [weight for ffn in ffns for weight in ffn.parameters()]
    training = student.training
    student.eval()
    states, targets = HiddenStates(student), HiddenStates(teacher)

    def error(batch) -> Tensor:
        with torch.no_grad():
            calibration.forward(teacher, batch)
        calibration.forward(student, batch)
        return hidden_error(states.last, targets.last)

    def checked_error() -> float:
        with torch.no_grad():
            return sum(error(batch).item() for batch in calibration.batches[:CHECKED])

    try:
        before, start = checked_error(), [weight.detach().clone() for weight in weights]
        optimizers = [relative_adam(ffn.bank(), steps, learning_rate) for ffn in ffns]
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            batch = calibration.batches[int(torch.randint(len(calibration.batches), (), generator=generator))]
            with torch.enable_grad():
                error(batch).backward(inputs=weights)
            for optimizer, schedule in optimizers:
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        if not checked_error() < before:
            with torch.no_grad():
                for weight, was in zip(weights, start, strict=True):
                    weight.copy_(was)
    finally:
        states.close()
        targets.close()
        student.train(training)
