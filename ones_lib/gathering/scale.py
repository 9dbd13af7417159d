"""TODO."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ones_lib.ffn import FeedForwardWeights

if TYPE_CHECKING:
    from ones_lib.calibration import LayerActivations

Scale = float | tuple[float, float]

#: What follows from a balanced router for a method's matrices, E -> factors of (up and gate, down), up to the gates' sum.
ROUTER_SCALES: dict[str, Callable[[int], tuple[float, float]]] = {
    "sum": lambda num_experts: (1 / num_experts, 1 / num_experts),
    "average": lambda num_experts: (1.0, 1.0),
    "topk": lambda num_experts: (1.0, 1 / num_experts),
    "svd": lambda num_experts: (1 / num_experts, 1 / num_experts),
}
#: Words for ``scale``, and whether they need a calibration.
SCALE_WORDS = {"router": False, "scalar": True, "vector": True}


def _numbers(scale: Scale | str, method: str, num_experts: int) -> dict:
    """The option ``scale`` as numbers, where it is a word."""
    return {"scale": ROUTER_SCALES[method](num_experts)} if isinstance(scale, str) else {}


def _check_scale(scale: Scale | str, method: str) -> None:
    if isinstance(scale, str):
        if scale not in SCALE_WORDS or method not in ROUTER_SCALES:
            raise ValueError(
                f"scale: expected a number, a pair of numbers, or for {list(ROUTER_SCALES)} one of {list(SCALE_WORDS)},"
                f" found {scale!r} for {method!r}"
            )
    elif not all(math.isfinite(number) for number in _pair(scale)):
        raise ValueError(f"scale: expected a finite number, found {scale!r}")


def _pair(scale: Scale) -> tuple[float, float]:
    """Factors of what leads into the hidden neurons, and out of them."""
    if not isinstance(scale, Sequence):
        return scale, scale
    if len(scale) != 2:
        raise ValueError(f"scale: expected a number or a pair of numbers, found {scale!r}")
    return tuple(scale)


def _scale_output(ffn: FeedForwardWeights, scale: str, calibration: LayerActivations | None) -> FeedForwardWeights:
    """The FFN with its output multiplied by the gates' sum, or by what is best in least squares."""
    if scale == "router":
        return scaled_output(ffn, 1.0 if calibration is None else calibration.gate_sum())
    products = squares = 0.0
    for chunk in calibration.chunks():
        output, weights = ffn.apply(chunk.inputs, chunk.activation).double(), chunk.token_weights().double()[:, None]
        products = products + (weights * output * chunk.outputs.double()).sum(dim=0)  # [d]
        squares = squares + (weights * output.square()).sum(dim=0)
    if scale == "scalar":
        products, squares = products.sum(), squares.sum()
    return scaled_output(ffn, torch.where(squares > 0, products / squares, 1.0).to(ffn.up))


def scaled_output(ffn: FeedForwardWeights, factor: float | Tensor) -> FeedForwardWeights:
    """The FFN whose output is multiplied by a number, or by one for each of its d elements."""
    rows = factor[:, None] if torch.is_tensor(factor) and factor.ndim else factor
    parts = {"down": lambda t: rows * t, "down_bias": lambda t: factor * t}
    return FeedForwardWeights(**{name: parts.get(name, lambda t: t)(tensor) for name, tensor in ffn.tensors()})


def _scaled(name: str, tensor: Tensor, scale: Scale) -> Tensor:
    into, out = _pair(scale)
    return (out if name.startswith("down") else into) * tensor


def _scaled_all(ffn: FeedForwardWeights, scale: Scale) -> FeedForwardWeights:
    return FeedForwardWeights(**{name: _scaled(name, tensor, scale) for name, tensor in ffn.tensors()})
