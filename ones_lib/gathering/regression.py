"""Gathering methods that regress onto the MoE layer's outputs: of the output weights (read-out), or of the whole FFN (fit).

Both minimise the mean of ``|f(x) - y(x)|^2`` over the calibration's tokens, with f the gathered FFN and y the MoE layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F

from ones_lib.calibration import LayerActivations
from ones_lib.ffn import FeedForwardWeights
from ones_lib.gathering.registry import Sizes, check_values, gather, gathering_methods, register
from ones_lib.gathering.scale import ROUTER_SCALES

LARGE = 1024  # from this many hidden units on, a fit tries one start only, and a read-out is solved by Cholesky
_STARTS = ("average", "topk", "svd", "matched_average", "contribution_topk", "whitened_svd")
NARROW = 64  # inputs
_BATCH = 2048  # tokens per step of the fit


def _check_readout(sizes: Sizes, hidden: str | FeedForwardWeights, ridge: float) -> None:
    if not isinstance(ridge, (int, float)) or not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge: expected a number of at least 0, found {ridge!r}")
    _check_hidden("hidden", sizes, hidden)


def _check_hidden(name: str, sizes: Sizes, hidden: str | FeedForwardWeights) -> None:
    allowed = [method for method in gathering_methods() if method not in ("readout", "fit")]
    if isinstance(hidden, FeedForwardWeights):
        return
    if hidden not in allowed:
        raise ValueError(f"{name}: expected an FFN or one of {allowed}, found {hidden!r}")
    check_values(hidden, {}, sizes)


@register("readout", check=_check_readout)
def readout(
    bank: FeedForwardWeights,
    *,
    calibration: LayerActivations,
    hidden: str | FeedForwardWeights = "contribution_topk",
    d_ff: int | None = None,
    ridge: float = 1e-4,
) -> FeedForwardWeights:
    """Read-out: the hidden units of another gathering, with the best output weights for them on data, in closed form.

    With the units' activations H, their gathered output weights ``W_0`` and the layer's outputs Y, this is the ridge
    regression ``W = W_0 + (H^T H + r I)^-1 H^T (Y - H W_0)``. In directions that the data do not determine, it keeps ``W_0``.
    An output bias is the weight of a unit that is always 1.

    Args:
        bank: experts, up [E, h, d].
        calibration: activations of the layer.
        hidden: source of the units: a gathering method (at scale "router" if it has a scale), or a gathered FFN.
        d_ff: number of units, for a method that allows it.
        ridge: r as a multiple of the mean diagonal element of ``H^T H``.
    """
    if isinstance(hidden, str):
        scale = {"scale": "router"} if hidden in ROUTER_SCALES else {}
        hidden = gather(bank, hidden, calibration=calibration, d_ff=d_ff, **scale)
    return readout_on(hidden.map(lambda t: t.to(bank.up)), calibration.chunks(), ridge)


def readout_on(ffn: FeedForwardWeights, chunks: Iterable[LayerActivations], ridge: float) -> FeedForwardWeights:
    """The FFN with the output weights of :func:`readout`, from tokens that come chunk by chunk.

    Raises:
        ValueError: the hidden units or the layer's outputs are not finite on them.
    """
    grams = products = 0.0
    large = ridge > 0 and ffn.d_ff >= LARGE
    for chunk in chunks:
        features = ffn.hidden(chunk.inputs, chunk.activation)
        left = chunk.outputs - F.linear(features, ffn.down, ffn.down_bias)
        if ffn.down_bias is not None:
            features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
        weighted = chunk.token_weights()[:, None] * features
        if not large:  # else it would take most of the time, and only the sum over chunks is in float64
            features, weighted, left = features.double(), weighted.double(), left.double()
        grams = grams + (weighted.T @ features).double()  # [h (+1), h (+1)]
        products = products + (weighted.T @ left).double()  # [h (+1), d]
    if not (grams.isfinite().all() and products.isfinite().all()):
        raise ValueError("calibration: expected finite hidden units and outputs on its tokens, found NaN or infinity")
    if not grams.any():  # no unit is ever active
        return ffn
    grams.diagonal().add_(ridge * grams.diagonal().mean())
    if large:  # thirty times as fast, but only for positive definite matrices
        factor, failed = torch.linalg.cholesky_ex(grams)
        while failed:  # by rounding
            grams.diagonal().add_(ridge * grams.diagonal().mean())
            factor, failed = torch.linalg.cholesky_ex(grams)
            ridge *= 10
        change = torch.cholesky_solve(products, factor)
    else:
        change = torch.linalg.lstsq(grams, products, driver="gelsd" if grams.device.type == "cpu" else None).solution
    change = change.to(ffn.down)
    down_bias = None if ffn.down_bias is None else ffn.down_bias + change[-1]
    return replace(ffn, down=ffn.down + change[: ffn.d_ff].T, down_bias=down_bias)


def _check_fit(
    sizes: Sizes, start: str | FeedForwardWeights | None, steps: int, learning_rate: float, seed: int
) -> None:
    whole = isinstance(steps, int) and isinstance(learning_rate, (int, float))
    if not whole or not steps >= 1 or not 0 < learning_rate < float("inf"):
        raise ValueError(f"steps, learning_rate: expected positive numbers, found {steps!r} and {learning_rate!r}")
    if not isinstance(seed, int):
        raise ValueError(f"seed: expected an integer, found {seed!r}")
    if start is not None:
        _check_hidden("start", sizes, start)


@register("fit", check=_check_fit)
def fit(
    bank: FeedForwardWeights,
    *,
    calibration: LayerActivations,
    start: str | FeedForwardWeights | None = None,
    d_ff: int | None = None,
    steps: int = 1000,
    learning_rate: float = 0.2,
    seed: int = 0,
) -> FeedForwardWeights:
    """Layer-wise fit: regression of the whole FFN onto the MoE layer's outputs, by Adam from a closed-form start.

    Each step uses a random draw of tokens; the learning rate has cosine decay and is relative to the weights (see
    :func:`relative_adam`). At the end, the read-out is solved again. The start is returned if it has the smaller error.

    Args:
        bank: experts, up [E, h, d].
        calibration: activations of the layer.
        start: source of the first hidden units, as ``hidden`` of :func:`readout`. None tries several methods and starts from
            the one with the smallest error after the read-out; for ``d_ff`` other than h, and for large h, it is
            ``contribution_topk``.
        d_ff: number of hidden units, default h.
        steps: number of Adam steps.
        learning_rate: relative to the size of the weights.
        seed: of the random draws.
    """
    if start is None:
        starts = _STARTS if d_ff in (None, bank.d_ff) and bank.d_ff < LARGE else ["contribution_topk"]
    else:
        starts = [start]
    ffns = [readout(bank, calibration=calibration, hidden=hidden, d_ff=d_ff) for hidden in starts]
    best = min(ffns, key=calibration.squared_error)

    generator = torch.Generator().manual_seed(seed)
    tokens = calibration.inputs, calibration.outputs, calibration.token_weights()
    with torch.enable_grad():
        moving = best.map(lambda t: t.clone().requires_grad_())
        optimizer, schedule = relative_adam(moving, steps, learning_rate)
        for _ in range(steps):
            drawn = torch.randint(len(tokens[0]), (_BATCH,), generator=generator).to(bank.up.device)
            inputs, outputs, weights = (t.index_select(0, drawn) for t in tokens)
            errors = (moving.apply(inputs, calibration.activation) - outputs).square().sum(dim=1)
            optimizer.zero_grad()
            (weights * errors).mean().backward()
            optimizer.step()
            schedule.step()
    moved = moving.map(torch.detach)
    if not moved.is_finite():  # the steps have diverged
        return best
    fitted = readout_on(moved, calibration.chunks(), ridge=1e-6)
    return min(best, fitted, key=calibration.squared_error)


def relative_adam(
    ffn: FeedForwardWeights, steps: int, learning_rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam with cosine decay over ``steps``, for the FFN's tensors.

    A matrix and its bias have a learning rate of ``learning_rate`` times the root mean square of the matrix, so that the
    same value suits weights of any size. Of matrices with more than :data:`NARROW` inputs it is smaller, by the root of that
    ratio: their steps, which go the same way for all inputs, would else change the outputs by more than the outputs' size.
    """
    sizes = {name: tensor.detach().square().mean().sqrt().item() or 1.0 for name, tensor in ffn.tensors()}
    for name, tensor in ffn.tensors():
        sizes[name] *= min(1.0, (NARROW / tensor.shape[-1]) ** 0.5)
    groups = [
        {"params": [tensor], "lr": learning_rate * sizes[name.removesuffix("_bias")]} for name, tensor in ffn.tensors()
    ]
    optimizer = torch.optim.Adam(groups, fused=True)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
