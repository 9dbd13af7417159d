"""TODO."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ones_lib.calibration import LayerActivations, squared_error
from ones_lib.ffn import FeedForwardWeights
from ones_lib.gathering.registry import gather, gathering_methods, register
from ones_lib.gathering.scale import ROUTER_SCALES

# Whose hidden units a fit tries.
_STARTS = ("average", "topk", "svd", "matched_average", "contribution_topk", "whitened_svd")
_BATCH = 2048  # tokens a step of the fit
LARGE = 1024  # hidden units from which on a fit tries one start, and a read-out is solved the quick way


@register("readout")
def readout(
    bank: FeedForwardWeights,
    *,
    calibration: LayerActivations,
    hidden: str | FeedForwardWeights = "contribution_topk",
    d_ff: int | None = None,
    ridge: float = 1e-4,
) -> FeedForwardWeights:
    """Hidden units of any gathering, and the output weights that are best for them on data, in closed form.

    With the hidden activations H of the units, output weights ``W_0`` that came with them and the layer's outputs Y,
    ``W = W_0 + (H^T H + r I)^-1 H^T (Y - H W_0)``: ridge regression of what ``W_0`` leaves, so that directions of which the
    data say nothing keep the gathered weights. The output bias, where there is one, is the weight of a unit that is always 1.

    Args:
        bank: experts, up [E, h, d].
        calibration: activations of the layer.
        hidden: where the units come from: a gathering method's name (at scale "router" where it has a scale), or an FFN that
            was gathered already.
        d_ff: how many units, for a method that can give them.
        ridge: r in units of the mean squared activation of a unit, summed over the tokens.
    """
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge: expected a number of at least 0, found {ridge}")
    if isinstance(hidden, str):
        if hidden not in gathering_methods() or hidden in ("readout", "fit"):
            expected = [m for m in gathering_methods() if m not in ("readout", "fit")]
            raise ValueError(f"hidden: expected an FFN or one of {expected}, found {hidden!r}")
        scale = {"scale": "router"} if hidden in ROUTER_SCALES else {}
        hidden = gather(bank, hidden, calibration=calibration, d_ff=d_ff, **scale)
    return fit_readout(hidden.map(lambda t: t.to(bank.up)), calibration, ridge)


def fit_readout(ffn: FeedForwardWeights, calibration: LayerActivations, ridge: float) -> FeedForwardWeights:
    """The FFN with the output weights of :func:`readout`."""
    grams = products = 0.0
    for chunk in calibration.chunks():
        features = ffn.hidden(chunk.inputs, chunk.activation)
        left = (chunk.outputs - F.linear(features, ffn.down, ffn.down_bias)).double()
        if ffn.down_bias is not None:
            features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
        weighted = (chunk.token_weights()[:, None] * features).double()
        grams = grams + weighted.T @ features.double()  # [h (+1), h (+1)]
        products = products + weighted.T @ left  # [h (+1), d]
    grams.diagonal().add_(ridge * grams.diagonal().mean())
    if ridge > 0 and len(grams) >= LARGE:  # thirty times as fast as what also stands matrices without a ridge
        change = torch.cholesky_solve(products, torch.linalg.cholesky(grams))
    else:
        change = torch.linalg.lstsq(grams, products, driver="gelsd" if grams.device.type == "cpu" else None).solution
    change = change.to(ffn.down)
    parts = dict(ffn.tensors()) | {"down": ffn.down + change[: ffn.d_ff].T}
    if ffn.down_bias is not None:
        parts["down_bias"] = ffn.down_bias + change[-1]
    return FeedForwardWeights(**parts)


@register("fit")
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
    """Layer-wise fit: regression of the whole FFN onto the MoE layer's outputs, from the best closed-form start.

    Adam on the squared error of a random draw of tokens a step, cosine decay, and the closed-form read-out at the end; the
    start is kept where that is no better. A matrix and its bias move by about ``learning_rate`` times the root mean square of
    the matrix's entries a step at first, so that the rate does not depend on the size of the weights.

    Args:
        bank: experts, up [E, h, d].
        calibration: activations of the layer.
        start: whose hidden units to start from, as ``hidden`` of :func:`readout`; None tries several and takes what has the
            least error after the read-out.
        d_ff: hidden neurons; if not h, or h is large, it starts from ``contribution_topk`` unless told otherwise.
        steps: of Adam.
        learning_rate: relative to the weights.
        seed: of the draw.
    """
    if not steps >= 1 or not 0 < learning_rate < float("inf"):
        raise ValueError(f"steps, learning_rate: expected positive numbers, found {steps} and {learning_rate}")
    if start is None:
        starts = _STARTS if d_ff in (None, bank.d_ff) and bank.d_ff < LARGE else ["contribution_topk"]
    else:
        starts = [start]
    ffns = [readout(bank, calibration=calibration, hidden=hidden, d_ff=d_ff) for hidden in starts]
    best = min(ffns, key=lambda ffn: squared_error(ffn, calibration))

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
    fitted = fit_readout(moving.map(torch.detach), calibration, ridge=1e-6)
    return min(best, fitted, key=lambda ffn: squared_error(ffn, calibration))


def relative_adam(
    ffn: FeedForwardWeights, steps: int, learning_rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam with cosine decay whose rate is ``learning_rate`` times the root mean square of each matrix (and for its bias)."""
    sizes = {name: tensor.detach().square().mean().sqrt().item() or 1.0 for name, tensor in ffn.tensors()}
    groups = [
        {"params": [tensor], "lr": learning_rate * sizes[name.removesuffix("_bias")]} for name, tensor in ffn.tensors()
    ]
    optimizer = torch.optim.Adam(groups, fused=True)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
