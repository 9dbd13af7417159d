"""The scale of a gathered FFN.

An MoE layer's output is weighted by the router's gates, but a gathered matrix contains no gates. Every method of the paper
therefore takes ``scale``; 1 is the paper's form. A number multiplies the gathered matrices, and the biases that are gathered
in the same way. A pair of numbers ``(into, out)`` multiplies the weights into the hidden neurons (up, gate) and out of them
(down). A word stands for factors that follow from the router, or from data:

- ``"router"``. The layer computes ``y = sum_i g_i(x) FFN_i(x)`` over the chosen experts. Let s be the mean sum of a token's
  gates: 1 if gates are renormalised; if they are the k largest of E probabilities, between k/E (a uniform router) and 1 (a
  certain one); less if a capacity limit drops assignments in evaluation too. A balanced router gives every expert the mean
  gate s/E. With gates that do not depend on the token, the layer is the mean field ``s/E sum_i FFN_i(x)``. These factors make
  each method equal the mean field in the cases where it can:

  - Top-KG keeps neurons as they are, and their outputs add up as in the mean field: up times 1, down times s/E.
  - Averaging keeps the size of weights that the experts share: up times 1, down times s.
  - Summation and SVD-KG add E matrices, into the hidden neurons and out of them: up times 1/E, down times s/E. (If the
    experts had nothing in common, a sum of E independent rows would be sqrt(E) times as long as one row, and 1/sqrt(E) would
    keep the size of the hidden neurons' inputs. But then no single matrix represents the experts.)

  Output biases are the experts' mean times s. So E equal experts give the layer's function: exactly with summation and
  averaging, with SVD-KG at full rank, with Top-KG of all neurons. s is measured on ``calibration``; without it, s = 1
  (:func:`ones_lib.integrate` asks for a calibration where the gates are not renormalised).
- ``"scalar"``: as ``"router"``, with the output multiplied by the best single number on ``calibration`` (least squares)
  instead of s.
- ``"vector"``: the same, with one number for each of the d outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ones_lib.calibration import LayerActivations
from ones_lib.ffn import FeedForwardWeights

Scale = float | tuple[float, float]

#: By method: E -> the router's factors (into, out) without s, as derived above.
ROUTER_SCALES: dict[str, Callable[[int], tuple[float, float]]] = {
    "sum": lambda num_experts: (1 / num_experts, 1 / num_experts),
    "average": lambda num_experts: (1.0, 1.0),
    "topk": lambda num_experts: (1.0, 1 / num_experts),
    "svd": lambda num_experts: (1 / num_experts, 1 / num_experts),
}
#: The words for ``scale``, and whether each needs a calibration.
SCALE_WORDS = {"router": False, "scalar": True, "vector": True}


def check_scale(scale: Scale | str, method: str) -> None:
    """Raises ValueError unless ``scale`` is finite, or a word that the method knows."""
    if isinstance(scale, str):
        if scale not in SCALE_WORDS or method not in ROUTER_SCALES:
            raise ValueError(
                f"scale: expected a number, a pair of numbers, or for {list(ROUTER_SCALES)} one of {list(SCALE_WORDS)},"
                f" found {scale!r} for {method!r}"
            )
    elif not all(isinstance(number, (int, float)) and math.isfinite(number) for number in _pair(scale)):
        raise ValueError(f"scale: expected a finite number, found {scale!r}")


def _pair(scale: Scale) -> tuple[float, float]:
    """Factors (into, out) of the weights into the hidden neurons and out of them."""
    if not isinstance(scale, Sequence):
        return scale, scale
    if len(scale) != 2:
        raise ValueError(f"scale: expected a number or a pair of numbers, found {scale!r}")
    return tuple(scale)


def scaled(ffn: FeedForwardWeights, scale: Scale, keep: Collection[str] = ()) -> FeedForwardWeights:
    """Multiplies all tensors by ``scale`` but those named in ``keep``."""
    into, out = _pair(scale)
    names = [name for name, _ in ffn.tensors() if name not in keep]
    return ffn.times({name: out if name.startswith("down") else into for name in names})


def scaled_output(ffn: FeedForwardWeights, factor: float | Tensor) -> FeedForwardWeights:
    """The FFN with its output multiplied by ``factor``: a number, or one for each of the d outputs [d]."""
    rows = factor[:, None] if torch.is_tensor(factor) and factor.ndim else factor
    return ffn.times({"down": rows, "down_bias": factor})


def output_factor(ffn: FeedForwardWeights, scale: str, calibration: LayerActivations | None) -> float | Tensor:
    """The factor for the output that the word ``scale`` stands for: s, or the solution [] or [d] of the least squares."""
    if scale == "router":
        return 1.0 if calibration is None else calibration.gate_sum()
    products = squares = 0.0
    for chunk in calibration.chunks():
        output, weights = ffn.apply(chunk.inputs, chunk.activation).double(), chunk.token_weights().double()[:, None]
        products = products + (weights * output * chunk.outputs.double()).sum(dim=0)  # [d]
        squares = squares + (weights * output.square()).sum(dim=0)
    if scale == "scalar":
        products, squares = products.sum(), squares.sum()
    return torch.where(squares > 0, products / squares, 1.0).to(ffn.up)
