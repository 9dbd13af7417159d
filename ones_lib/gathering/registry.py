"""Knowledge gathering: pure functions from a bank of E experts to one feed-forward network.

The four methods of "One Student Knows All Experts Know" (Xue et al., arXiv 2201.10890, section on knowledge
gathering): ``sum``, ``average``, ``topk`` (Top-KG) and ``svd`` (SVD-KG), in the paper's form by default. Those that look at
data are in :mod:`ones_lib.gathering.calibrated`.

**Scale.** An MoE's output is weighted by its router's gates, of which a gathered matrix knows nothing. Every method takes
``scale``; 1 is the paper's form. A number multiplies the gathered matrices and those biases that are gathered the same way; a
pair of numbers is one for what leads into the hidden neurons (up, gate) and one for what leads out (down). Words stand for
numbers that follow from the router, and from data:

- ``"router"``. The layer computes ``y = sum_i g_i(x) FFN_i(x)`` over the chosen experts. Let s be what a token's gates sum to
  on average: 1 where they are renormalised; between k/E (a router that does not care) and 1 (one that is sure) where they are
  the k largest of E probabilities; less by the part that is dropped where there is a capacity in evaluation too. A balanced
  router gives every expert the mean gate s/E, and with gates that do not depend on the token the layer is the mean field
  ``s/E sum_i FFN_i(x)``. What each method must be multiplied with to be that mean field where it can be:

  - Top-KG keeps neurons as they are, and their outputs add up as in the mean field: up times 1, down times s/E.
  - Averaging keeps the size of a weight that the experts share: up times 1, down times s.
  - Summation and SVD-KG add up E matrices, both times into the hidden neurons and out of them: up times 1/E, down times s/E.
    (Had the experts nothing in common, a sum of E independent rows would be sqrt(E) times as long as one, not E times, so
    1/sqrt(E) would keep the hidden neurons' inputs in size; but then no single matrix stands for the experts.)

  Biases of the output are the experts' mean times s. So E equal experts give the layer's function back: by summation and
  averaging exactly, by SVD-KG at full rank, by Top-KG with all neurons. s is measured on ``calibration``; without it, it is 1.
- ``"scalar"``: as ``"router"``, but the output is multiplied by the one number that is best on ``calibration`` in least
  squares, instead of s.
- ``"vector"``: the same with one number for each of the d outputs.

A new method is a function under :func:`register`::

    @register("first")
    def first_expert(bank, *, scale=1.0):
        return bank.expert(0).map(lambda tensor: scale * tensor)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from ones_lib.ffn import FeedForwardWeights, check_alike, compute_dtype, concatenate, count_non_finite
from ones_lib.gathering.scale import ROUTER_SCALES, SCALE_WORDS, Scale, _check_scale, _numbers, _scale_output

if TYPE_CHECKING:
    from ones_lib.calibration import LayerActivations

GatheringMethod = Callable[..., FeedForwardWeights]
_METHODS: dict[str, GatheringMethod] = {}
_PIECEWISE: set[str] = set()


def register(name: str, piecewise: bool = False) -> Callable[[GatheringMethod], GatheringMethod]:
    """Decorator: make a function ``(bank, *, **options) -> FeedForwardWeights`` known to :func:`gather` by ``name``.

    If it has an option ``calibration``, it is given the activations that :func:`gather` gets; without a default it needs them.
    The bank comes stacked, in float32 at least. A ``piecewise`` method gets the experts as a list, in the dtype in which they
    are stored and maybe on disk, and takes what it needs of them into memory.
    """

    def decorate(method: GatheringMethod) -> GatheringMethod:
        if name in _METHODS:
            raise ValueError(f"name: a gathering method {name!r} is registered already ({_METHODS[name].__name__})")
        _METHODS[name] = method
        if piecewise:
            _PIECEWISE.add(name)
        return method

    return decorate


def gathering_methods() -> list[str]:
    """Names of the registered gathering methods, in the order of their registration."""
    return list(_METHODS)


def uses_calibration(method: str, scale: Scale | str = 1.0) -> bool:
    """Whether activations make a difference to a method at a scale."""
    return "calibration" in options_of(method) or isinstance(scale, str)


def needs_calibration(method: str, scale: Scale | str = 1.0) -> bool:
    """Whether a method at a scale cannot do without activations."""
    option = options_of(method).get("calibration")
    return (option is not None and option.default is option.empty) or SCALE_WORDS.get(scale, False)


def options_of(method: str) -> dict[str, inspect.Parameter]:
    """A method's options and their defaults."""
    parameters = inspect.signature(_METHODS[method]).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def gather(
    bank: FeedForwardWeights | Sequence[FeedForwardWeights],
    method: str = "svd",
    calibration: LayerActivations | None = None,
    d_ff: int | None = None,
    **options,
) -> FeedForwardWeights:
    """Gather a bank of E experts into one FFN.

    Args:
        bank: experts stacked on axis 0, or a sequence of single FFNs of equal shape.
        method: a name from :func:`gathering_methods`.
        calibration: what passed through the layer on data, see :func:`ones_lib.calibration.collect_activations`; the paper's
            methods use it for the words that stand for a scale alone.
        d_ff: hidden neurons of the result; None is the experts' own h, the paper's. Methods that choose neurons (``topk``,
            ``contribution_topk``, and those that start from these: ``readout``, ``fit``) give any number from 1 to E*h. With
            ``sum``, ``average`` and ``svd`` it is a multiple m*h, m up to E: the experts are gathered in m groups of
            neighbours, whose FFNs stand side by side, each weighted by its part of the experts where the method is a mean
            (``average``, and all at a scale that follows from the router). With m = E that is the mean field itself. The
            other methods give h.
        options: the method's own, see its docstring (``scale`` for the paper's, ``rank`` for svd, ``k`` and ``importance``
            for topk).

    Returns:
        One FFN in the bank's dtype, on its device. Computed in float32 (float64 stays float64), without gradient.

    Raises:
        ValueError: unknown method, no experts, experts of different shapes, NaN or infinity, an option out of range, a
            calibration that is missing or of another layer.
        TypeError: an option that the method does not have.
    """
    ffn = gather_precisely(bank, method, calibration, d_ff, **options)
    return ffn.map(lambda t: t.to((bank if isinstance(bank, FeedForwardWeights) else bank[0]).up.dtype))


def gather_precisely(
    bank: FeedForwardWeights | Sequence[FeedForwardWeights],
    method: str,
    calibration: LayerActivations | None = None,
    d_ff: int | None = None,
    **options,
) -> FeedForwardWeights:
    """:func:`gather` with the result in the precision that it was computed in."""
    check_options(method, options)
    scale = options.get("scale", 1.0)
    _check_scale(scale, method)
    if isinstance(bank, FeedForwardWeights):
        check_bank(bank)
        experts = experts_of(bank)
    else:
        experts = list(bank)
        check_alike(experts)
        _check_finite(experts)
    num_experts, (first, *_) = len(experts), experts
    check_width(d_ff, method, num_experts, first.d_ff)
    device, dtype = first.up.device, compute_dtype(first.up)
    if calibration is None:
        if needs_calibration(method, scale):
            raise ValueError(
                f"calibration: expected activations of the layer (ones_lib.collect_activations), which {method!r}"
                f"{f' at scale {scale!r}' if isinstance(scale, str) else ''} needs, found None"
            )
    else:
        found = (calibration.gates.shape[1], calibration.inputs.shape[1])
        if found != (num_experts, first.d_model):
            raise ValueError(
                f"calibration: expected activations of {num_experts} experts and width {first.d_model} like the bank's,"
                f" found {found[0]} and {found[1]}"
            )
        calibration = calibration.map(lambda t: t.detach().to(device, dtype))
        if not all(torch.isfinite(t).all() for t in (calibration.inputs, calibration.gates, calibration.outputs)):
            raise ValueError("calibration: expected finite activations, found NaN or infinity")
    if "calibration" in options_of(method):
        options["calibration"] = calibration
    with torch.no_grad():
        experts = [expert.map(torch.detach) for expert in experts]
        if "d_ff" in options_of(method):
            options["d_ff"] = d_ff
        if method not in _PIECEWISE:
            stacked = FeedForwardWeights.stack(experts).map(lambda t: t.to(dtype))
            ffn = _METHODS[method](stacked, **options)
        elif d_ff in (None, first.d_ff) or "d_ff" in options_of(method):
            ffn = _METHODS[method](experts, **options | _numbers(scale, method, num_experts))
        else:
            ffn = _gather_groups(experts, method, d_ff // first.d_ff, scale, options)
        return _scale_output(ffn, scale, calibration) if isinstance(scale, str) else ffn


def check_options(method: str, options: Iterable[str]) -> None:
    """Raise ValueError unless there is such a method, TypeError unless it has options of these names."""
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {gathering_methods()}, found {method!r}")
    known = [name for name in options_of(method) if name not in ("calibration", "d_ff")]
    for name in options:
        if name not in known:
            raise TypeError(f"{name}: gathering method {method!r} has no such option, expected one of {known}")


def check_width(d_ff: int | None, method: str, num_experts: int, h: int) -> None:
    """Raise ValueError unless a method can gather ``num_experts`` of h hidden neurons into an FFN of ``d_ff``."""
    if d_ff is None:
        return
    whole = isinstance(d_ff, int) and not isinstance(d_ff, bool)
    if "d_ff" in options_of(method):
        fits, expected = whole and 1 <= d_ff <= num_experts * h, f"an integer from 1 to {num_experts * h}"
    elif method in ROUTER_SCALES:
        fits = whole and d_ff % h == 0 and 1 <= d_ff // h <= num_experts
        expected = f"a multiple of the experts' {h}, up to {num_experts * h},"
    else:
        fits, expected = d_ff == h, f"the experts' {h}"
    if not fits:
        raise ValueError(f"d_ff: expected {expected} for method {method!r}, found {d_ff!r}")


def _gather_groups(
    experts: list[FeedForwardWeights], method: str, count: int, scale: Scale | str, options: dict
) -> FeedForwardWeights:
    """Neighbours gathered in ``count`` groups, side by side."""
    bounds = [round(i * len(experts) / count) for i in range(count + 1)]
    parts = []
    for start, stop in pairwise(bounds):
        ffn = _METHODS[method](experts[start:stop], **options | _numbers(scale, method, stop - start))
        share, adds_up = (stop - start) / len(experts), not isinstance(scale, str) and method != "average"
        out, bias = 1.0 if adds_up else share, 1.0 if adds_up and method == "sum" else share
        factors = {"down": out, "down_bias": bias}
        parts.append(FeedForwardWeights(**{name: factors.get(name, 1.0) * t for name, t in ffn.tensors()}))
    return concatenate(parts)


def check_bank(bank: FeedForwardWeights) -> None:
    """Raise ValueError unless ``bank`` is a bank of at least one expert with finite weights."""
    if not bank.is_bank:
        raise ValueError(f"bank: expected experts stacked as up [E, h, d], found one FFN with up {list(bank.up.shape)}")
    if 0 in bank.up.shape:
        raise ValueError(f"bank: expected E, h and d of at least 1 in up [E, h, d], found {list(bank.up.shape)}")
    _check_finite(experts_of(bank))


def _check_finite(experts: Sequence[FeedForwardWeights]) -> None:
    for i, expert in enumerate(experts):
        for name, tensor in expert.tensors():
            if count := count_non_finite(tensor.detach()):
                raise ValueError(f"{name} of expert {i}: expected finite weights, found {count} NaN or infinite")


def experts_of(bank: FeedForwardWeights | Sequence[FeedForwardWeights]) -> Sequence[FeedForwardWeights]:
    """The experts of a bank one by one (views)."""
    return bank.experts() if isinstance(bank, FeedForwardWeights) else bank
