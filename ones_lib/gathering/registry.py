"""The table of gathering methods, and :func:`gather`, which checks its arguments and calls one of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ones_lib.calibration import LayerActivations
from ones_lib.ffn import FeedForwardWeights, check_alike, compute_dtype, concatenate, count_non_finite
from ones_lib.gathering.scale import ROUTER_SCALES, SCALE_WORDS, Scale, check_scale, output_factor, scaled_output

GatheringMethod = Callable[..., FeedForwardWeights]
_METHODS: dict[str, GatheringMethod] = {}
_PIECEWISE: set[str] = set()
_CHECKS: dict[str, Callable[..., None]] = {}


@dataclass(frozen=True)
class Sizes:
    """What a gathering is made of and to: E experts of h hidden neurons on d inputs, to ``d_ff`` neurons; None: to h."""

    num_experts: int
    h: int
    d_model: int
    d_ff: int | None = None


def register(
    name: str, piecewise: bool = False, check: Callable[..., None] | None = None
) -> Callable[[GatheringMethod], GatheringMethod]:
    """Decorator: adds a function ``(bank, *, **options) -> FeedForwardWeights`` to the gathering methods.

    The method gets the experts stacked, in float32 at least. If it has an option ``calibration``, it gets the activations
    passed to :func:`gather`; it requires them if the option has no default. If it has an option ``d_ff``, it gets that too.

    A ``piecewise`` method ``(experts, *, **options)`` gets the experts as a list of single FFNs, in their stored dtype and
    possibly mapped from disk. It loads only the parts that it needs.

    ``check(sizes, **options)`` gets :class:`Sizes` and the options' values, and raises ValueError for one that is out of range. So
    it is told before long work, too.
    """

    def decorate(method: GatheringMethod) -> GatheringMethod:
        if name in _METHODS:
            raise ValueError(f"name: a gathering method {name!r} is registered already ({_METHODS[name].__name__})")
        _METHODS[name] = method
        if piecewise:
            _PIECEWISE.add(name)
        if check is not None:
            _CHECKS[name] = check
        return method

    return decorate


def gathering_methods() -> list[str]:
    """Names of the registered gathering methods, in the order of registration."""
    return list(_METHODS)


def method_function(method: str) -> GatheringMethod:
    """The registered function."""
    return _METHODS[method]


def uses_calibration(method: str, scale: Scale | str = 1.0) -> bool:
    """Whether the result of a method at a scale depends on activations, if there are any."""
    return "calibration" in options_of(method) or isinstance(scale, str)


def needs_calibration(method: str, scale: Scale | str = 1.0) -> bool:
    """Whether a method at a scale requires activations."""
    option = options_of(method).get("calibration")
    required = option is not None and option.default is option.empty
    return required or (isinstance(scale, str) and SCALE_WORDS.get(scale, False))


def gives_widths(method: str) -> bool:
    """Whether a method can gather to other widths than an expert's."""
    return "d_ff" in options_of(method) or method in ROUTER_SCALES


def options_of(method: str) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a method, by name."""
    parameters = inspect.signature(_METHODS[method]).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def gather(
    bank: FeedForwardWeights | Sequence[FeedForwardWeights],
    method: str = "svd",
    calibration: LayerActivations | None = None,
    d_ff: int | None = None,
    **options,
) -> FeedForwardWeights:
    """Gathers a bank of E experts into one FFN.

    Args:
        bank: experts stacked on axis 0, or a sequence of single FFNs of equal shape.
        method: one of :func:`gathering_methods`; by default SVD-KG, the paper's main one.
        calibration: the layer's activations, see :func:`ones_lib.collect_activations`. The paper's methods use them only for
            a ``scale`` that is a word.
        d_ff: hidden neurons of the result; None for the experts' own h, as in the paper. Methods that choose neurons
            (``topk``, ``contribution_topk``, and ``readout`` and ``fit``, which start from these) give any number from 1 to
            E*h. ``sum``, ``average`` and ``svd`` give multiples m*h up to E*h: they gather the experts in m groups of
            neighbours and put the groups' FFNs side by side. Where the method is a mean, each group's weight is its share of
            the experts. With m = E it computes ``s/E sum_i FFN_i(x)`` exactly, see :mod:`.scale`. The other methods give h only.
        options: the method's own options, see its docstring.

    Returns:
        One FFN in the bank's dtype, on its device, without gradient. It is computed in float32 (float64 for float64).

    Raises:
        ValueError: unknown method, no experts, experts of different shapes, NaN or infinity, an option out of range, a
            calibration that is missing or belongs to another layer.
        TypeError: an option that the method does not have.
    """
    ffn = gather_precisely(bank, method, calibration, d_ff, **options)
    dtype = (bank if isinstance(bank, FeedForwardWeights) else bank[0]).up.dtype
    return ffn.map(lambda t: t.to(dtype))


def gather_precisely(
    bank: FeedForwardWeights | Sequence[FeedForwardWeights],
    method: str,
    calibration: LayerActivations | None = None,
    d_ff: int | None = None,
    **options,
) -> FeedForwardWeights:
    """:func:`gather`, with the result in the dtype in which it was computed."""
    check_options(method, options)
    scale = options.get("scale", 1.0)
    experts = checked_experts(bank)
    check_values(method, options, Sizes(len(experts), experts[0].d_ff, experts[0].d_model, d_ff))
    calibration = _checked_calibration(calibration, method, scale, experts)
    device = experts[0].up.device
    if device.type == "mps":  # Apple's GPUs have no float64
        experts = [expert.map(torch.Tensor.cpu) for expert in experts]
        calibration = calibration and calibration.map(torch.Tensor.cpu)
    if "calibration" in options_of(method):
        options["calibration"] = calibration
    if "d_ff" in options_of(method):
        options["d_ff"] = d_ff
    groups = 1 if d_ff is None or "d_ff" in options else d_ff // experts[0].d_ff
    with torch.no_grad():
        experts = [expert.map(torch.detach) for expert in experts]
        ffn = _call(method, experts, options) if groups == 1 else _gather_groups(groups, method, experts, options)
        ffn = scaled_output(ffn, output_factor(ffn, scale, calibration)) if isinstance(scale, str) else ffn
        return ffn.map(lambda t: t.to(device))


def _call(method: str, experts: list[FeedForwardWeights], options: dict) -> FeedForwardWeights:
    """Calls the method with the form of experts that it takes. A scale that is a word becomes the router's factors."""
    if isinstance(options.get("scale"), str):
        options = options | {"scale": ROUTER_SCALES[method](len(experts))}
    if method in _PIECEWISE:
        return _METHODS[method](experts, **options)
    bank = FeedForwardWeights.stack(experts)
    return _METHODS[method](bank.map(lambda t: t.to(compute_dtype(t))), **options)


def _gather_groups(count: int, method: str, experts: list[FeedForwardWeights], options: dict) -> FeedForwardWeights:
    """Gathers the experts in ``count`` groups of neighbours and puts the groups' FFNs side by side."""
    is_mean = method == "average" or isinstance(options.get("scale"), str)
    bounds = [round(i * len(experts) / count) for i in range(count + 1)]
    parts = []
    for start, stop in pairwise(bounds):
        share = (stop - start) / len(experts)
        # Sums add up as they are, but SVD-KG's bias is always a mean.
        factors = {"down": share if is_mean else 1.0, "down_bias": share if is_mean or method == "svd" else 1.0}
        parts.append(_call(method, experts[start:stop], options).times(factors))
    return concatenate(parts)


def check_options(method: str, options: Iterable[str]) -> None:
    """Raises ValueError for an unknown method, TypeError for options that it does not have."""
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {gathering_methods()}, found {method!r}")
    known = [name for name in options_of(method) if name not in ("calibration", "d_ff")]
    for name in options:
        if name not in known:
            raise TypeError(f"{name}: gathering method {method!r} has no such option, expected one of {known}")


def check_values(method: str, options: Mapping, sizes: Sizes) -> None:
    """Raises ValueError for a value of a method's options, or a width, that is out of range."""
    check_scale(options.get("scale", 1.0), method)
    check_width(sizes.d_ff, method, sizes.num_experts, sizes.h)
    if method in _CHECKS:
        own = {
            name: p.default for name, p in options_of(method).items() if name not in ("calibration", "d_ff", "scale")
        }
        _CHECKS[method](sizes, **own | {name: value for name, value in options.items() if name in own})


def checked_experts(bank: FeedForwardWeights | Sequence[FeedForwardWeights]) -> list[FeedForwardWeights]:
    """The experts of a bank or a sequence, one by one (views).

    Raises:
        ValueError: no experts, experts of different shapes, or NaN or infinity in their weights.
    """
    if isinstance(bank, FeedForwardWeights):
        if not bank.is_bank:
            raise ValueError(
                f"bank: expected experts stacked as up [E, h, d], found one FFN with up {list(bank.up.shape)}"
            )
        if 0 in bank.up.shape:
            raise ValueError(f"bank: expected E, h and d of at least 1 in up [E, h, d], found {list(bank.up.shape)}")
        experts = bank.experts()
    else:
        experts = list(bank)
        check_alike(experts)
    for i, expert in enumerate(experts):
        for name, tensor in expert.tensors():
            if count := count_non_finite(tensor.detach()):
                raise ValueError(f"{name} of expert {i}: expected finite weights, found {count} NaN or infinite")
    return experts


def check_width(d_ff: int | None, method: str, num_experts: int, h: int) -> None:
    """Raises ValueError unless the method can gather ``num_experts`` experts of h hidden neurons into ``d_ff``."""
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


def _checked_calibration(
    calibration: LayerActivations | None, method: str, scale: Scale | str, experts: list[FeedForwardWeights]
) -> LayerActivations | None:
    """The activations in the experts' dtype (float32 at least) and on their device; raises ValueError if they do not fit."""
    up = experts[0].up
    if calibration is None:
        if needs_calibration(method, scale):
            at_scale = f" at scale {scale!r}" if isinstance(scale, str) else ""
            raise ValueError(
                "calibration: expected activations of the layer (ones_lib.collect_activations), which"
                f" {method!r}{at_scale} needs, found None"
            )
        return None
    expected = (len(experts), up.shape[1])
    found = (calibration.gates.shape[1], calibration.inputs.shape[1])
    if found != expected:
        raise ValueError(
            f"calibration: expected activations of {expected[0]} experts and width {expected[1]} like the bank's,"
            f" found {found[0]} and {found[1]}"
        )
    calibration = calibration.map(lambda t: t.detach().to(up.device, compute_dtype(up)))
    if not all(torch.isfinite(t).all() for t in (calibration.inputs, calibration.gates, calibration.outputs)):
        raise ValueError("calibration: expected finite activations, found NaN or infinity")
    return calibration
