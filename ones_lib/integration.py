"""Knowledge integration: the dense student that a trained MoE becomes (arXiv 2201.10890).

Everything outside the expert layers is copied, every expert layer is gathered into one FFN, the router is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from ones_lib.calibration import Calibration
from ones_lib.distillation import HiddenStates, hidden_error
from ones_lib.ffn import FeedForwardWeights
from ones_lib.gathering.registry import check_bank, gather, gathering_methods, needs_calibration, uses_calibration
from ones_lib.gathering.regression import relative_adam
from ones_lib.gathering.scale import Scale
from ones_lib.moe import MoEFeedForward

#: Controls that a gathering must be worth more than: (experts, freshly initialised FFN, generator) -> the student's FFN.
CONTROLS: dict[str, Callable[[FeedForwardWeights, FeedForwardWeights, torch.Generator], FeedForwardWeights]] = {
    # Only the shared weights come from the teacher, as when Switch Transformers are distilled (arXiv 2101.03961, 4.2).
    "shared_kd": lambda bank, fresh, generator: fresh,
    # Output zero: what is left of the teacher without its experts. Only the read-out is zero, so that it can still learn.
    "zero_ffn": lambda bank, fresh, generator: FeedForwardWeights(
        **{name: torch.zeros_like(t) if name.startswith("down") else t for name, t in fresh.tensors()}
    ),
    "one_expert": lambda bank, fresh, generator: bank.expert(
        int(torch.randint(bank.num_experts, (), generator=generator))
    ),
}


#: The layer-wise fit, and then all layers fitted together.
JOINT_FIT = "joint_fit"
CHECKED = 16  # batches on which a joint fit is compared with its start


def integration_methods() -> list[str]:
    """What :func:`integrate` knows: the gathering methods, :data:`JOINT_FIT`, and the controls."""
    return [*gathering_methods(), JOINT_FIT, *CONTROLS]


def calibrated(method: str, scale: Scale | str = 1.0) -> bool:
    """Whether data make a difference to a method of :func:`integrate` at a scale."""
    return method == JOINT_FIT or (method not in CONTROLS and uses_calibration(method, scale))


@dataclass(frozen=True)
class IntegrationReport:
    """What :func:`integrate` did, one row a parameter: ``parameter, action, shape, source_shape``.

    ``action`` is ``copied``, ``gathered``, ``replaced`` (by a control, which gathers nothing) or ``dropped`` (``shape`` is
    None then).
    """

    method: str
    rows: list[dict]

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=["parameter", "action", "shape", "source_shape"])

    def __str__(self) -> str:
        parts = []
        for action, group in self.table().groupby("action", sort=False):
            sizes = [torch.Size(shape).numel() for shape in group["source_shape"]]
            parts.append(f"{len(group)} tensors ({sum(sizes):,} weights) {action}")
        return f"{self.method}: {', '.join(parts)}"


def integrate(
    teacher: nn.Module, method: str = "svd", *, seed: int = 0, calibration: Calibration | None = None, **options
) -> tuple[nn.Module, IntegrationReport]:
    """The dense student of an MoE teacher, before distillation, and a report of where each weight came from.

    Args:
        teacher: a model in eval mode with :class:`MoEFeedForward` layers and a method ``dense_twin(d_ff)``, such as ``WideNet``.
        method: a gathering method; ``joint_fit``, which is ``fit`` and then :func:`fit_jointly` for ``steps`` steps (default
            600); or one of the controls ``shared_kd``, ``zero_ffn``, ``one_expert``.
        seed: of the controls' random choices, and of what a fit draws.
        calibration: data for the methods that look at data.
        options: the gathering method's.

    Raises:
        ValueError: no MoE layer in the teacher, unknown method, a calibration that is missing, or what
            :func:`ones_lib.gathering.registry.gather` refuses.
        TypeError: an option that the method does not have.
    """
    if method not in integration_methods():
        raise ValueError(f"method: expected one of {integration_methods()}, found {method!r}")
    layers = {name: m for name, m in teacher.named_modules() if isinstance(m, MoEFeedForward) and m.num_experts > 1}
    if not layers:
        raise ValueError(
            f"teacher: expected at least one MoE layer with 2 experts or more, found none in {type(teacher).__name__}"
        )
    of_fit, options = (options, {}) if method == JOINT_FIT else ({}, options)
    if method in CONTROLS and options:
        raise TypeError(f"{next(iter(options))}: control {method!r} takes no options")
    if unknown := set(of_fit) - {"steps"}:
        raise TypeError(f"{unknown.pop()}: method {method!r} takes no option but steps")
    scale = options.get("scale", 1.0)
    # Gates that are not renormalised sum to a number that only data tell.
    open_sum = scale == "router" and not all(getattr(m.router, "renormalize", True) for m in layers.values())
    needs = open_sum or method == JOINT_FIT or (method not in CONTROLS and needs_calibration(method, scale))
    if calibration is None and needs:
        raise ValueError(f"calibration: expected data, which {method!r} needs here, found None")

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        like = next(iter(layers.values())).up  # for dtype and device
        if method in CONTROLS:
            student = teacher.dense_twin().to(like)
            gathered = {}
            for name, layer in layers.items():
                check_bank(layer.bank())
                fresh = student.get_submodule(name).bank().expert(0)
                gathered[name] = CONTROLS[method](layer.bank(), fresh, generator)
        else:
            found = {}
            if calibration is not None and calibrated(method, scale):
                found = calibration.activations(teacher)
            by_layer = "fit" if method == JOINT_FIT else method
            gathered = {n: gather(m.bank(), by_layer, calibration=found.get(n), **options) for n, m in layers.items()}
            student = teacher.dense_twin(d_ff=next(iter(gathered.values())).d_ff).to(like)

        rows, source = [], dict(teacher.named_parameters()) | dict(teacher.named_buffers())
        target = dict(student.named_parameters()) | dict(student.named_buffers())
        for name, tensor in source.items():
            layer_name, _, part = name.rpartition(".")
            if layer_name in gathered:
                target[name].copy_(getattr(gathered[layer_name], part)[None])
                action = "replaced" if method in CONTROLS else "gathered"
            elif layer_name.removesuffix(".router") in gathered:
                action = "dropped"
            else:
                target[name].copy_(tensor)
                action = "copied"
            shape = None if action == "dropped" else tuple(target[name].shape)
            rows.append({"parameter": name, "action": action, "shape": shape, "source_shape": tuple(tensor.shape)})
    if method == JOINT_FIT:
        fit_jointly(student, teacher, calibration, seed=seed, **of_fit)
    return student, IntegrationReport(method, rows)


def fit_jointly(
    student: nn.Module,
    teacher: nn.Module,
    calibration: Calibration,
    steps: int = 600,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> None:
    """Regress all feed-forward layers of a student together onto the teacher's residual stream, by :func:`hidden_error`, in place.

    A fit layer by layer looks at each with the teacher's inputs. In the student each gets what those before it made of
    them, and what a layer leaves wrong, a later one may mend. Nothing but the feed-forward layers moves; no labels and no
    logits are used. Adam, one batch of the calibration a step, ``learning_rate`` relative to the weights as in
    :func:`ones_lib.gathering.regression.fit`; the start is kept where that is no better on the first batches.
    """
    if not steps >= 1 or not learning_rate > 0:
        raise ValueError(f"steps, learning_rate: expected positive numbers, found {steps} and {learning_rate}")
    ffns = [module for module in student.modules() if isinstance(module, MoEFeedForward)]
    training = student.training
    trained = {parameter: parameter.requires_grad for parameter in student.parameters()}
    student.eval().requires_grad_(False)
    watched, target = HiddenStates(student), HiddenStates(teacher)

    def error(batch) -> Tensor:
        with torch.no_grad():
            calibration.forward(teacher, batch)
        calibration.forward(student, batch)
        return hidden_error(watched.last, target.last)

    def mean_error() -> float:
        with torch.no_grad():
            return sum(error(batch).item() for batch in calibration.batches[:CHECKED])

    try:
        for ffn in ffns:
            ffn.requires_grad_(True)
        before, start = mean_error(), [ffn.bank().map(lambda t: t.detach().clone()) for ffn in ffns]
        optimizers = [relative_adam(ffn.bank(), steps, learning_rate) for ffn in ffns]
        order = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            batch = calibration.batches[int(torch.randint(len(calibration.batches), (), generator=order))]
            with torch.enable_grad():
                error(batch).backward()
            for optimizer, schedule in optimizers:
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        if not mean_error() < before:
            for ffn, bank in zip(ffns, start, strict=True):
                for name, tensor in bank.tensors():
                    getattr(ffn, name).data.copy_(tensor)
    finally:
        watched.close()
        target.close()
        student.train(training)
        for parameter, was in trained.items():
            parameter.requires_grad_(was)
