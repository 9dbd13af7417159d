"""Knowledge gathering: pure functions from a bank of E experts to one feed-forward network.

The four methods of "One Student Knows All Experts Know" (Xue et al., arXiv 2201.10890, section on knowledge
gathering): ``sum``, ``average``, ``topk`` (Top-KG) and ``svd`` (SVD-KG), in the paper's form by default. Those that look at
data are in :mod:`ones_lib.calibrated_gathering`.

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
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ones_lib.ffn import FeedForwardWeights, check_alike, concatenate

if TYPE_CHECKING:
    from ones_lib.calibration import LayerActivations

GatheringMethod = Callable[..., FeedForwardWeights]
Scale = float | tuple[float, float]
Factors = tuple[Tensor, Tensor, Tensor]  # U [m, r], S [r], V^T [r, n] of a matrix [m, n], r = min(m, n)
_METHODS: dict[str, GatheringMethod] = {}
_PIECEWISE: set[str] = set()
_CHUNK = 2**20  # elements to look at in one piece: they stay in the cache

#: What follows from a balanced router for a method's matrices, E -> factors of (up and gate, down), up to the gates' sum.
ROUTER_SCALES: dict[str, Callable[[int], tuple[float, float]]] = {
    "sum": lambda num_experts: (1 / num_experts, 1 / num_experts),
    "average": lambda num_experts: (1.0, 1.0),
    "topk": lambda num_experts: (1.0, 1 / num_experts),
    "svd": lambda num_experts: (1 / num_experts, 1 / num_experts),
}
#: Words for ``scale``, and whether they need a calibration.
SCALE_WORDS = {"router": False, "scalar": True, "vector": True}


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
    device, compute_dtype = first.up.device, _compute_dtype(first.up)
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
        calibration = calibration.map(lambda t: t.detach().to(device, compute_dtype))
        if not all(torch.isfinite(t).all() for t in (calibration.inputs, calibration.gates, calibration.outputs)):
            raise ValueError("calibration: expected finite activations, found NaN or infinity")
    if "calibration" in options_of(method):
        options["calibration"] = calibration
    with torch.no_grad():
        experts = [expert.map(torch.detach) for expert in experts]
        if "d_ff" in options_of(method):
            options["d_ff"] = d_ff
        if method not in _PIECEWISE:
            stacked = FeedForwardWeights.stack(experts).map(lambda t: t.to(compute_dtype))
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


def _numbers(scale: Scale | str, method: str, num_experts: int) -> dict:
    """The option ``scale`` as numbers, where it is a word."""
    return {"scale": ROUTER_SCALES[method](num_experts)} if isinstance(scale, str) else {}


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


def count_non_finite(tensor: Tensor) -> int:
    """How many elements are NaN or infinite."""
    # A sum is finite only if its terms are, and quicker than looking at each.
    sums = torch.stack([part.to(_compute_dtype(tensor)).sum() for part in _pieces(tensor)])
    return 0 if torch.isfinite(sums).all() else int((~torch.isfinite(tensor)).sum())


def experts_of(bank: FeedForwardWeights | Sequence[FeedForwardWeights]) -> Sequence[FeedForwardWeights]:
    """The experts of a bank one by one (views)."""
    return bank.experts() if isinstance(bank, FeedForwardWeights) else bank


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Rows of a tensor, so many at a time that they stay in the cache."""
    return tensor.split(max(1, _CHUNK * len(tensor) // max(1, tensor.numel())))


def _stacked_pieces(experts: Sequence[FeedForwardWeights], name: str) -> Iterator[Tensor]:
    """The experts' tensors [E, n, ...], a few rows at a time, in the precision to compute in."""
    tensors = [getattr(expert, name) for expert in experts]
    rows = max(1, _CHUNK * len(tensors[0]) // (len(tensors) * tensors[0].numel()))
    for pieces in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
        yield torch.stack(pieces).to(_compute_dtype(pieces[0]))


def _scaled(name: str, tensor: Tensor, scale: Scale) -> Tensor:
    into, out = _pair(scale)
    return (out if name.startswith("down") else into) * tensor


def combined(
    bank: FeedForwardWeights | Sequence[FeedForwardWeights], combine: Callable[[Tensor], Tensor]
) -> FeedForwardWeights:
    """The FFN of the tensors ``combine(stacked [E, n, ...])``, a few rows at a time."""
    experts = experts_of(bank)
    names = [name for name, _ in experts[0].tensors()]
    return FeedForwardWeights(**{n: torch.cat([combine(t) for t in _stacked_pieces(experts, n)]) for n in names})


def _scaled_all(ffn: FeedForwardWeights, scale: Scale) -> FeedForwardWeights:
    return FeedForwardWeights(**{name: _scaled(name, tensor, scale) for name, tensor in ffn.tensors()})


@register("sum", piecewise=True)
def summation(
    bank: FeedForwardWeights | Sequence[FeedForwardWeights], *, scale: Scale | str = 1.0
) -> FeedForwardWeights:
    """Summation: ``W = scale * sum_i W_i``, biases likewise."""
    return _scaled_all(combined(bank, lambda tensors: tensors.sum(dim=0)), scale)


@register("average", piecewise=True)
def averaging(
    bank: FeedForwardWeights | Sequence[FeedForwardWeights], *, scale: Scale | str = 1.0
) -> FeedForwardWeights:
    """Averaging: ``W = scale * (1/E) sum_i W_i``, biases likewise."""
    return _scaled_all(combined(bank, lambda tensors: tensors.mean(dim=0)), scale)


def _in_norm(experts: Sequence[FeedForwardWeights]) -> Tensor:
    """[E, h]: L2 norm of each hidden neuron's input weights (up, and gate where there is one)."""
    names = ("up",) if experts[0].gate is None else ("up", "gate")
    return sum(_row_squares(experts, name) for name in names).sqrt()


def _row_squares(experts: Sequence[FeedForwardWeights], name: str) -> Tensor:
    return torch.cat([tensors.square().sum(dim=2) for tensors in _stacked_pieces(experts, name)], dim=1)


def _out_norm(experts: Sequence[FeedForwardWeights]) -> Tensor:
    """[E, h]: L2 norm of each hidden neuron's output weights."""
    return sum(tensors.square().sum(dim=1) for tensors in _stacked_pieces(experts, "down")).sqrt()


#: Importance of hidden neurons by name, experts -> [E, h].
IMPORTANCES: dict[str, Callable[[Sequence[FeedForwardWeights]], Tensor]] = {
    "l2": lambda experts: torch.hypot(_in_norm(experts), _out_norm(experts)),
    "product": lambda experts: _in_norm(experts) * _out_norm(experts),
}


@register("topk", piecewise=True)
def top_kg(
    bank: FeedForwardWeights | Sequence[FeedForwardWeights],
    *,
    k: int | None = None,
    d_ff: int | None = None,
    importance: str | Tensor = "l2",
    scale: Scale | str = 1.0,
) -> FeedForwardWeights:
    """Top-KG: the K most important hidden neurons of every expert, concatenated; a neuron's weights stay together.

    With ``k`` left out the gathered FFN has ``d_ff`` neurons, by default the experts' own ``h``: K = d_ff // E of every expert,
    and where E does not divide d_ff the remaining ``d_ff - E*K`` places go to the most important neurons not yet chosen, of
    whichever expert (ties: the lower expert, then the lower neuron). Within the result neurons stand in the experts' order, then in
    their order inside the expert, so one expert comes back exactly.

    The output bias is the experts' mean, not scaled: it belongs to no neuron.

    Args:
        bank: experts, up [E, h, d].
        k: neurons of every expert, 1 to h; the gathered FFN then has d_ff = E*k.
        d_ff: neurons of the result, 1 to E*h, instead of ``k``.
        importance: ``"l2"`` (norm of a neuron's in- and out-weights together), ``"product"`` (norm of the in-weights
            times norm of the out-weights), or a tensor [E, h] of one's own.
        scale: multiplies up, gate and down, and the biases of the neurons.
    """
    experts = experts_of(bank)
    num_experts, h = len(experts), experts[0].d_ff
    width = chosen_width(k, d_ff, num_experts, h)
    if isinstance(importance, str):
        if importance not in IMPORTANCES:
            raise ValueError(f"importance: expected one of {list(IMPORTANCES)} or a tensor, found {importance!r}")
        scores = IMPORTANCES[importance](experts)
    else:
        scores = importance.to(experts[0].up)
        if scores.shape != (num_experts, h) or not torch.isfinite(scores).all():
            raise ValueError(
                f"importance: expected finite values of shape {[num_experts, h]}, found {list(scores.shape)}"
                + ("" if torch.isfinite(scores).all() else " with NaN or infinity")
            )
    share, rest = divmod(width, num_experts)

    # Stable sorts, so that ties are the same on every device.
    order = scores.argsort(dim=1, descending=True, stable=True)  # [E, h]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :share], True)
    left_over = scores.masked_fill(chosen, -torch.inf).flatten()
    chosen.view(-1)[left_over.argsort(descending=True, stable=True)[:rest]] = True

    expert, neuron = chosen.nonzero(as_tuple=True)
    ffn = take_neurons(experts, expert, neuron)
    return FeedForwardWeights(**{n: t if n == "down_bias" else _scaled(n, t, scale) for n, t in ffn.tensors()})


def chosen_width(k: int | None, d_ff: int | None, num_experts: int, h: int) -> int:
    """Hidden neurons of an FFN of chosen neurons: E*k, or d_ff, or h."""
    if k is not None and d_ff is not None:
        raise ValueError(f"k, d_ff: expected one of the two, found {k} and {d_ff}")
    if k is not None:
        return num_experts * integer_in_range("k", k, default=h, high=h)
    return integer_in_range("d_ff", d_ff, default=h, high=num_experts * h)


def take_neurons(experts: Sequence[FeedForwardWeights], expert: Tensor, neuron: Tensor) -> FeedForwardWeights:
    """The FFN of hidden neurons ``neuron`` [n] of experts ``expert`` [n], in ascending order, all with their weights; output
    bias: the mean."""
    counts = torch.bincount(expert, minlength=len(experts)).tolist()
    chosen = [e.with_neurons(n) for e, n in zip(experts, neuron.split(counts), strict=True) if len(n)]
    parts = dict(concatenate(chosen).map(lambda t: t.to(_compute_dtype(t))).tensors())
    if "down_bias" in parts:
        parts["down_bias"] = torch.stack([e.down_bias.to(parts["down"]) for e in experts]).mean(dim=0)
    return FeedForwardWeights(**parts)


@register("svd", piecewise=True)
def svd_kg(
    bank: FeedForwardWeights | Sequence[FeedForwardWeights],
    *,
    rank: int | None = None,
    scale: Scale | str = 1.0,
    exact: bool | None = None,
    factors: Mapping[str, Iterable[Factors]] | None = None,
) -> FeedForwardWeights:
    """SVD-KG: ``W = scale * sum_i trunc_K(W_i)``, each expert's matrix cut to its K leading singular triplets.

    That sum is the product of the concatenated factors, ``[U_1..U_E] diag(S_1..S_E) [V_1..V_E]^T``, so its rank is at
    most E*K. Up, gate and down are treated each on its own. Biases are averaged and not scaled: the paper's text leaves
    them open, and E equal experts then keep their bias.

    Args:
        bank: experts, up [E, h, d].
        rank: K, triplets kept of every expert, 1 to min(h, d); default min(h, d) // E, but at least 1.
        scale: multiplies the matrices. E equal experts give E times their truncated matrix at scale 1.
        exact: False cuts the matrices by :func:`truncated`'s fast way, True by their whole decomposition; None takes the fast
            way for large matrices of which little is kept.
        factors: by matrix, the experts' ``(U, S, V^T)``, where they are known already.
    """
    experts = experts_of(bank)
    full_rank = min(experts[0].d_ff, experts[0].d_model)
    rank = integer_in_range("rank", rank, default=max(1, full_rank // len(experts)), high=full_rank)

    def gathered(name: str, ndim: int) -> Tensor:
        tensors = (getattr(e, name) for e in experts)
        if ndim == 1:
            return torch.stack([t.to(_compute_dtype(t)) for t in tensors]).mean(dim=0)
        # One expert at a time: what is made of a large bank need not fit at once.
        if factors is None:
            cut = (truncated(w, rank, exact) for w in tensors)
        else:
            cut = ((u[:, :rank] * s[:rank]) @ vh[:rank] for u, s, vh in factors[name])
        return _scaled(name, sum(cut), scale)

    return FeedForwardWeights(**{name: gathered(name, tensor.ndim) for name, tensor in experts[0].tensors()})


def truncated(matrix: Tensor, rank: int, exact: bool | None = None) -> Tensor:
    """The matrix [m, n] cut to its ``rank`` leading singular triplets, in float32 at least.

    The fast way projects it on a subspace of some more directions than ``rank``, always from the same draw, which it looks for
    by one round of randomised subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4) and two with the
    Chebyshev polynomial that is small on the singular values to be left out (Zhou, Saad, Tiago and Chelikowsky, 2006). What it
    leaves out, in the Frobenius norm, was less than 1% above the least possible for every spectrum that the tests try, flat
    ones included. A matrix whose singular values, squared, span more than :data:`STEEP` within the directions is decomposed
    whole after all. The rounds of a matrix in bfloat16 are computed in that where the machine multiplies it quickly and the
    span is below :data:`ROUGH`: they only look for the subspace, on which the matrix is then projected in float32.

    Args:
        exact: whether by the whole decomposition; None: unless the smaller side is at least 512 and 4 times the directions.
    """
    small, directions = min(matrix.shape), rank + max(32, rank // 16)
    precise = matrix.to(_compute_dtype(matrix))

    def whole() -> Tensor:
        u, s, vh = torch.linalg.svd(precise, full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ vh[:rank]

    if exact or directions > small or (exact is None and (small < 512 or 4 * directions > small)):
        return whole()
    wide = matrix.shape[0] < matrix.shape[1]
    tall = precise.T if wide else precise
    rough = (matrix.T if wide else matrix) if _multiplies_quickly(matrix) else tall

    drawn = torch.randn(small, directions, generator=torch.Generator().manual_seed(0), dtype=tall.dtype)
    start = torch.linalg.qr(_product(rough.T, _product(rough, drawn.to(matrix.device))).to(tall.dtype)).Q
    image = _product(rough, start)
    seen = image.to(tall.dtype)
    squares = torch.linalg.eigvalsh((seen.T @ seen).double())
    if squares[-1] > STEEP * squares[0]:
        return whole()
    if rough is not tall and squares[-1] > ROUGH * squares[0]:
        rough, image = tall, _product(tall, start)
    # T_2 of 2 A^T A / c - 1, which maps the squares that are to be left out, up to c, to [-1, 1].
    twice = 2 / squares[0].item()
    once = twice * _product(rough.T, image).to(tall.dtype) - start
    filtered = 2 * (twice * _product(rough.T, _product(rough, once)).to(tall.dtype) - once) - start
    basis = torch.linalg.qr(filtered).Q
    image = _product(tall, basis)
    rotation = torch.linalg.eigh((image.T @ image).double()).eigenvectors[:, -rank:].to(tall.dtype)
    cut = _product(image @ rotation, (basis @ rotation).T)
    return cut.T if wide else cut


#: Largest over smallest squared singular value of the directions above which float32 loses the smallest in the filter, ...
STEEP = 1e5
#: ... and bfloat16 does.
ROUGH = 50


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, [m, k] and [k, n], in the dtype of ``a``. In float32 on a CPU as a convolution with kernels of one place, which
    goes to oneDNN: on AMD's CPUs twice as fast as ``@`` of the MKL that PyTorch comes with."""
    b = b.to(a.dtype)
    if a.device.type != "cpu" or a.dtype != torch.float32:
        return a @ b
    m, k = a.shape
    places = a.reshape(1, m, 1, k).permute(0, 3, 1, 2)  # channels last, as it lies in memory: nothing is copied
    return F.conv2d(places, b.T.contiguous()[..., None, None]).permute(0, 2, 3, 1).reshape(m, -1)


def _multiplies_quickly(matrix: Tensor) -> bool:
    """Whether products in the matrix's own precision, if that is low, are quicker than in float32."""
    if matrix.dtype != torch.bfloat16:
        return False
    able = getattr(torch.cpu, "get_capabilities", dict)()  # of torch 2.14; before it, not known
    return matrix.device.type != "cpu" or able.get("avx512_bf16", False) or able.get("amx_bf16", False)


def integer_in_range(name: str, value: int | None, *, default: int, high: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise ValueError(f"{name}: expected an integer from 1 to {high}, found {value!r}")
    return value
