"""Knowledge integration: the dense student of a trained MoE (arXiv 2201.10890).

Every expert layer is gathered into one FFN, its router is dropped, and all other weights are copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

from ones_lib.calibration import Calibration
from ones_lib.ffn import FeedForwardWeights
from ones_lib.gathering.registry import (
    checked_experts,
    gather,
    gathering_methods,
    gives_widths,
    needs_calibration,
    uses_calibration,
)
from ones_lib.gathering.scale import Scale
from ones_lib.joint_fit import fit_jointly
from ones_lib.moe import MoEFeedForward

Layers = dict[str, MoEFeedForward]  # by name in the teacher

#: ``fit`` layer by layer, then :func:`ones_lib.joint_fit.fit_jointly`.
JOINT_FIT = "joint_fit"

#: Baselines for a gathering: (a layer's experts, a freshly initialised FFN, generator) -> the student's FFN.
CONTROLS: dict[str, Callable[[FeedForwardWeights, FeedForwardWeights, torch.Generator], FeedForwardWeights]] = {
    # Only the weights outside the experts come from the teacher, as in Switch Transformers (arXiv 2101.03961, section 4.2).
    "shared_kd": lambda bank, fresh, generator: fresh,
    # The FFN's output is zero: what the teacher does without its experts. Only down is zero, so gradients still flow.
    "zero_ffn": lambda bank, fresh, generator: FeedForwardWeights(
        **{name: torch.zeros_like(t) if name.startswith("down") else t for name, t in fresh.tensors()}
    ),
    "one_expert": lambda bank, fresh, generator: bank.expert(
        int(torch.randint(bank.num_experts, (), generator=generator))
    ),
}
FRESH = ("shared_kd", "zero_ffn")  # controls that start from a new FFN, which may have any width


def integration_methods() -> list[str]:
    """The methods of :func:`integrate`: the gathering methods, :data:`JOINT_FIT` and the controls."""
    return [*gathering_methods(), JOINT_FIT, *CONTROLS]


def widening_methods() -> list[str]:
    """Those of :func:`integration_methods` that make students of other widths than an expert's, by their option ``d_ff``."""
    return [*filter(gives_widths, gathering_methods()), JOINT_FIT, *FRESH]


def calibrated(method: str, scale: Scale | str = 1.0) -> bool:
    """Whether the result of :func:`integrate` with a method at a scale depends on the calibration, if there is one."""
    return method == JOINT_FIT or (method not in CONTROLS and uses_calibration(method, scale))


@dataclass(frozen=True)
class IntegrationReport:
    """What :func:`integrate` did, one row per parameter of the teacher: ``parameter, action, shape, source_shape``.

    ``action`` is ``copied``, ``gathered``, ``replaced`` (by a control) or ``dropped`` (then ``shape`` is None).
    """

    method: str
    rows: list[dict]

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=["parameter", "action", "shape", "source_shape"])

    def weights(self) -> pd.Series:
        """The teacher's weights by action."""
        table = self.table()
        return table["source_shape"].map(math.prod).groupby(table["action"], sort=False).sum()

    def __str__(self) -> str:
        parts = []
        for action, group in self.table().groupby("action", sort=False):
            sizes = [torch.Size(shape).numel() for shape in group["source_shape"]]
            parts.append(f"{len(group)} tensors ({sum(sizes):,} weights) {action}")
        return f"{self.method}: {', '.join(parts)}"


def integrate(
    teacher: nn.Module, method: str = "svd", *, seed: int = 0, calibration: Calibration | None = None, **options
) -> tuple[nn.Module, IntegrationReport]:
    """The dense student of an MoE teacher before distillation, and a report of where each weight came from.

    Args:
        teacher: a model in eval mode with :class:`MoEFeedForward` layers and a method ``dense_twin(d_ff)``, such as ``WideNet``.
        method: a gathering method; ``joint_fit``, which is ``fit`` and then ``steps`` (default 600) steps of
            :func:`ones_lib.joint_fit.fit_jointly`; or a control: ``shared_kd``, ``zero_ffn``, ``one_expert``.
        seed: of the controls' random draws and of the joint fit's.
        calibration: data, for the methods that use data.
        options: the gathering method's options, see :func:`ones_lib.gather`; but ``seed`` is the one above. Of them,
            ``joint_fit``, ``shared_kd`` and ``zero_ffn`` take ``d_ff``, the student's hidden units in a layer.

    Raises:
        ValueError: no MoE layer in the teacher, an unknown method, a missing calibration, or an error of
            :func:`ones_lib.gather`.
        TypeError: an option that the method does not have.
    """
    layers = {name: m for name, m in teacher.named_modules() if isinstance(m, MoEFeedForward) and m.num_experts > 1}
    _check(teacher, layers, method, calibration, options)
    like = next(iter(layers.values())).up  # for dtype and device
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        if method in CONTROLS:
            student = teacher.dense_twin(**options).to(like)
            ffns = _control_ffns(student, layers, method, seed)
        else:
            ffns = _gathered_ffns(teacher, layers, method, calibration, options)
            student = teacher.dense_twin(d_ff=next(iter(ffns.values())).d_ff).to(like)
        rows = _copy_weights(teacher, student, ffns, "replaced" if method in CONTROLS else "gathered")
    if method == JOINT_FIT:
        fit_jointly(student, teacher, calibration, seed=seed, **{k: v for k, v in options.items() if k != "d_ff"})
    return student, IntegrationReport(method, rows)


def _check(teacher: nn.Module, layers: Layers, method: str, calibration: Calibration | None, options: dict) -> None:
    """Raises the errors of :func:`integrate` that are known before anything is computed."""
    if method not in integration_methods():
        raise ValueError(f"method: expected one of {integration_methods()}, found {method!r}")
    if not layers:
        raise ValueError(
            f"teacher: expected at least one MoE layer with 2 experts or more, found none in {type(teacher).__name__}"
        )
    if method in CONTROLS:
        if unknown := set(options) - ({"d_ff"} if method in FRESH else set()):
            raise TypeError(f"{unknown.pop()}: control {method!r} takes no option{' but d_ff' * (method in FRESH)}")
        return
    if method == JOINT_FIT:
        if unknown := set(options) - {"steps", "d_ff"}:
            raise TypeError(f"{unknown.pop()}: method {method!r} takes no option but steps and d_ff")
        if not options.get("steps", 1) >= 1:
            raise ValueError(f"steps: expected a positive number, found {options['steps']}")
        needed = True
    else:
        scale = options.get("scale", 1.0)
        # Gates that are not renormalised have a sum that only data can tell.
        open_sum = scale == "router" and not all(getattr(m.router, "renormalize", True) for m in layers.values())
        needed = open_sum or needs_calibration(method, scale)
    if needed and calibration is None:
        raise ValueError(f"calibration: expected data, which {method!r} needs here, found None")


def _control_ffns(student: nn.Module, layers: Layers, method: str, seed: int) -> dict[str, FeedForwardWeights]:
    """A control's FFN for each layer; ``student`` has the freshly initialised ones."""
    generator, ffns = torch.Generator().manual_seed(seed), {}
    for name, layer in layers.items():
        checked_experts(layer.bank())
        ffns[name] = CONTROLS[method](layer.bank(), student.get_submodule(name).bank().expert(0), generator)
    return ffns


def _gathered_ffns(
    teacher: nn.Module, layers: Layers, method: str, calibration: Calibration | None, options: dict
) -> dict[str, FeedForwardWeights]:
    """The gathered FFN for each layer."""
    activations = {}
    if calibration is not None and calibrated(method, options.get("scale", 1.0)):
        activations = calibration.activations(teacher)
    by_layer = method
    if method == JOINT_FIT:  # its steps are of what follows
        by_layer, options = "fit", {name: v for name, v in options.items() if name == "d_ff"}
    return {n: gather(m.bank(), by_layer, calibration=activations.get(n), **options) for n, m in layers.items()}


def _copy_weights(
    teacher: nn.Module, student: nn.Module, ffns: dict[str, FeedForwardWeights], action: str
) -> list[dict]:
    """Copies ``ffns`` and all weights outside the experts into the student; returns the report's rows."""
    source = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
    target = dict(student.named_parameters()) | dict(student.named_buffers())
    rows = []
    for name, tensor in source.items():
        layer, _, part = name.rpartition(".")
        row = {"parameter": name, "action": "copied", "shape": None, "source_shape": tuple(tensor.shape)}
        rows.append(row)
        if layer in ffns:
            row["action"] = action
            tensor = getattr(ffns[layer], part)[None]
        elif layer.removesuffix(".router") in ffns:
            row["action"] = "dropped"
            continue
        target[name].copy_(tensor)
        row["shape"] = tuple(target[name].shape)
    return rows
