"""What experts contain, how much of it they share, and what a gathering keeps of it, as tables.

In weight space: singular values and ranks, overlap of the experts' leading subspaces, similarity of experts before and after
matching of their hidden neurons, distance of a gathered matrix from the experts. On activations: the error of the gathered
FFN's output against the MoE layer's.

Tables are tidy, one row per value, with columns ``matrix`` ("up", "gate", "down") and ``expert`` where they apply. Banks of
fewer than 2^22 weights are computed in float64, so that figures are reproducible; larger ones in their own precision, float32
at least. All on the device of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ones_lib.calibration import LayerActivations
from ones_lib.ffn import FeedForwardWeights, compute_dtype, match_neurons
from ones_lib.gathering.paper import svd_kg
from ones_lib.gathering.registry import Sizes, check_values, checked_experts, gather
from ones_lib.gathering.truncation import Factors

MATRICES = ("up", "gate", "down")
SIDES = ("in", "out")  # a matrix reads from the span of its right singular vectors and writes to that of its left ones
MEAN = "router-weighted mean"  # of the experts, as a target of distances
#: Methods whose result depends on K, the number of triplets or neurons kept of every expert.
RANKED = ("topk", "svd")


def rank_grid(full_rank: int) -> list[int]:
    """At most 12 ranks for curves, from 1 to ``full_rank`` in about equal ratios."""
    return sorted({round(r) for r in np.geomspace(1, full_rank, 12)})


class FactoredBank:
    """A bank of experts and the singular value decompositions of its matrices.

    Each matrix is decomposed once, when it is first needed; all ranks use the same factors.

    Raises:
        ValueError: not a bank, or NaN or infinity in it.
    """

    def __init__(self, bank: FeedForwardWeights) -> None:
        checked_experts(bank)
        dtype = torch.float64 if bank.neurons().numel() < 2**22 else compute_dtype(bank.up)
        self.bank = bank.map(lambda t: t.detach().to(dtype))
        self.matrices = [name for name in MATRICES if getattr(bank, name) is not None]
        self.full_rank = min(bank.d_ff, bank.d_model)
        self._factors: dict[str, list[Factors]] = {}

    def factors(self, matrix: str) -> list[Factors]:
        """``U [m, r], S [r], V^T [r, n]`` of each expert's matrix, r = min(m, n)."""
        if matrix not in self.matrices:
            raise ValueError(f"matrix: expected one of {self.matrices}, found {matrix!r}")
        if matrix not in self._factors:
            self._factors[matrix] = [torch.linalg.svd(w, full_matrices=False) for w in getattr(self.bank, matrix)]
        return self._factors[matrix]

    def gather(self, method: str, rank: int | None = None) -> FeedForwardWeights:
        """:func:`ones_lib.gather` at scale 1.

        ``rank`` is K, SVD-KG's triplets or Top-KG's neurons of every expert (then the gathered FFN has E*K); None is the
        method's default. Other methods ignore it.
        """
        if method == "svd":
            check_values(method, {"rank": rank}, Sizes(self.bank.num_experts, self.bank.d_ff, self.bank.d_model))
            return svd_kg(self.bank.experts(), rank=rank, factors={name: self.factors(name) for name in self.matrices})
        return gather(self.bank, method, **({"k": rank} if method == "topk" else {}))

    def mean(self, weights: Tensor) -> FeedForwardWeights:
        """The experts' mean with ``weights`` [E], normalised to sum 1."""
        weights = weights.to(self.bank.up)
        return self.bank.map(lambda t: torch.tensordot(weights / weights.sum(), t, dims=1))


def spectrum(factored: FactoredBank, matrices: Iterable[str] | None = None) -> pd.DataFrame:
    """Singular values of every expert's matrices: ``matrix, expert, rank, singular_value, energy, gaussian``.

    ``rank`` is the index of the singular value, from 1. ``energy`` is the fraction of the squared Frobenius norm that this
    many leading triplets keep. ``gaussian`` is the singular value of a matrix of independent Gaussian entries with the same
    size and norm: leading values above it show structure.
    """
    parts = []
    for matrix in factored.matrices if matrices is None else matrices:
        factors = factored.factors(matrix)
        noise = _gaussian_spectrum(*getattr(factored.bank, matrix).shape[1:])
        for expert, (_, s, _) in enumerate(factors):
            squares = s.double().square().cpu()
            table = {
                "matrix": matrix,
                "expert": expert,
                "rank": np.arange(1, len(s) + 1),
                "singular_value": s.double().cpu().numpy(),
                "energy": (squares.cumsum(0) / squares.sum()).numpy(),
                "gaussian": noise * squares.sum().sqrt().item(),
            }
            parts.append(pd.DataFrame(table))
    return pd.concat(parts, ignore_index=True)


def _gaussian_spectrum(rows: int, columns: int) -> np.ndarray:
    """Singular values of a Gaussian matrix of norm 1, from a fixed random draw."""
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).double()
    return torch.linalg.svdvals(matrix / matrix.norm()).numpy()


def rank_measures(table: pd.DataFrame) -> pd.DataFrame:
    """Several measures of the rank of each matrix of a :func:`spectrum`.

    Columns ``matrix, expert, frobenius`` and:

    - ``stable_rank``: squared Frobenius norm over squared largest singular value.
    - ``effective_rank``: exp of the entropy of the singular values divided by their sum (Roy and Vetterli, 2007).
    - ``elbow``: the index where the spectrum is furthest below the straight line from its first to its last value, both axes
      scaled to 1 (Kneedle, Satopaa et al., 2011).
    - ``rank_90``: the smallest rank that keeps 90% of the squared norm.

    For a matrix of zeros, stable and effective rank are NaN, the others 0.
    """
    rows = []
    keys = [c for c in table.columns if c not in ("rank", "singular_value", "energy", "gaussian")]
    for values, part in table.groupby(keys, sort=False):
        s = part["singular_value"].to_numpy()
        row = dict(zip(keys, values, strict=True)) | {"frobenius": np.sqrt((s**2).sum())}
        rows.append(row)
        if s[0] == 0:
            row |= {"stable_rank": math.nan, "effective_rank": math.nan, "elbow": 0, "rank_90": 0}
            continue
        p = s[s > 0] / s.sum()
        line = np.linspace(s[0], s[-1], len(s))
        row |= {
            "stable_rank": (s**2).sum() / s[0] ** 2,
            "effective_rank": np.exp(-(p * np.log(p)).sum()),
            "elbow": int(np.argmax(line - s)) + 1,
            "rank_90": int(np.argmax(np.cumsum(s**2) >= 0.9 * (s**2).sum())) + 1,
        }
    return pd.DataFrame(rows)


def overlap(factored: FactoredBank, matrix: str, rank: int) -> pd.DataFrame:
    """Overlap of the experts' leading subspaces of dimension ``rank``: ``matrix, side, rank, expert, other, overlap, chance``.

    ``overlap`` is the mean squared cosine of the principal angles: 1 for equal subspaces, 0 for orthogonal ones. ``chance``
    is its expectation for random subspaces of n dimensions, ``rank / n``.
    """
    factors, parts = factored.factors(matrix), []
    if not 1 <= rank <= factored.full_rank:
        raise ValueError(f"rank: expected an integer from 1 to {factored.full_rank}, found {rank}")
    for side in SIDES:
        bases = torch.stack([vh[:rank].T if side == "in" else u[:, :rank] for u, _, vh in factors])  # [E, n, rank]
        every = bases.transpose(0, 1).flatten(1)  # [n, E*rank]
        # One expert at a time: [rank, E*rank] is small.
        values = [(basis.T @ every).square().view(rank, -1, rank).sum(dim=(0, 2)) / rank for basis in bases]
        values = torch.stack(values)  # [E, E]
        expert, other = np.indices(values.shape)
        table = {"matrix": matrix, "side": side, "rank": rank, "expert": expert.ravel(), "other": other.ravel()}
        table |= {"overlap": values.double().cpu().numpy().ravel(), "chance": rank / bases.shape[1]}
        parts.append(pd.DataFrame(table))
    return pd.concat(parts, ignore_index=True)


def overlap_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Overlaps summarised for each ``data, matrix, side, rank``: ``pairs, overlap, low, high, chance``.

    ``overlap`` is the mean over all ``pairs`` of different experts (of all layers and seeds in the table), ``low`` and
    ``high`` are the 5th and 95th percentile.
    """
    keys = ["data", "matrix", "side", "rank"]
    values = table[table["expert"] < table["other"]].groupby(keys, sort=False)
    summary = values["overlap"].agg(
        pairs="size", overlap="mean", low=lambda v: v.quantile(0.05), high=lambda v: v.quantile(0.95)
    )
    return summary.assign(chance=values["chance"].first()).reset_index()


def similarity(factored: FactoredBank) -> pd.DataFrame:
    """Similarity of every pair of experts in weight space: ``expert, other, cosine, matched, chance``.

    ``cosine`` is the cosine of all their weights but the output bias. ``matched`` is the cosine after
    :func:`ones_lib.ffn.match_neurons` has reordered the other expert's hidden neurons. Matching raises the cosine of
    unrelated weights too: ``chance`` is the matched cosine of the expert and Gaussian weights.
    """
    bank, rows = factored.bank, []
    generator = torch.Generator().manual_seed(0)
    for i in range(bank.num_experts):
        one = bank.expert(i)
        # Drawn on the CPU, so that it is the same on every device.
        noise = one.map(lambda t: torch.randn(t.shape, generator=generator).to(t))
        chance = _cosine(one.neurons(), noise.with_neurons(match_neurons(one, noise)).neurons())
        for j in range(i + 1, bank.num_experts):
            two = bank.expert(j)
            matched = two.with_neurons(match_neurons(one, two))
            cosines = (_cosine(one.neurons(), ffn.neurons()) for ffn in (two, matched))
            rows.append((i, j, *cosines, chance))
    return pd.DataFrame(rows, columns=["expert", "other", "cosine", "matched", "chance"])


def _cosine(a: Tensor, b: Tensor) -> float:
    norms = a.double().norm() * b.double().norm()
    return ((a.double() * b.double()).sum() / norms).item() if norms > 0 else math.nan


def gathered_distances(
    factored: FactoredBank, gathered: FeedForwardWeights, expert_weights: Tensor | None = None
) -> pd.DataFrame:
    """Distance of a gathered FFN's matrices from the experts' matrices: ``matrix, target, distance, cosine``.

    ``distance`` is the Frobenius norm of the difference over the target's norm: 0 for the target itself, 1 for zeros. Targets
    are ``expert 0``, ``expert 1``, ... and, with ``expert_weights`` [E] (such as
    :meth:`ones_lib.LayerActivations.expert_weights`), the experts' mean with these weights. The gathered FFN's hidden neurons
    are first matched to the target's, because Top-KG's neurons come from several experts.
    """
    bank = factored.bank
    targets = {f"expert {e}": bank.expert(e) for e in range(bank.num_experts)}
    if expert_weights is not None:
        targets[MEAN] = factored.mean(expert_weights)
    parts = [matched_distances(gathered, target).assign(target=name) for name, target in targets.items()]
    return pd.concat(parts, ignore_index=True)[["matrix", "target", "distance", "cosine"]]


def matched_distances(gathered: FeedForwardWeights, target: FeedForwardWeights) -> pd.DataFrame:
    """:func:`gathered_distances` from a single FFN: ``matrix, distance, cosine``."""
    matched, rows = gathered.with_neurons(match_neurons(target, gathered)), []
    for matrix in MATRICES:
        if getattr(target, matrix) is not None:
            w, t = getattr(matched, matrix).double(), getattr(target, matrix).double()
            rows.append((matrix, ((w - t).norm() / t.norm()).item(), _cosine(w, t)))
    return pd.DataFrame(rows, columns=["matrix", "distance", "cosine"])


def output_error(gathered: FeedForwardWeights, activations: LayerActivations) -> dict[str, float]:
    """Relative error of a gathered FFN's output against the MoE layer's, in the Frobenius norm; an output of zero has error 1.

    ``error`` is the error as it is. ``rescaled`` is the error after the output is multiplied by its best single number,
    ``scale``: the part that is not a matter of size.
    """
    with torch.no_grad():
        output = gathered.apply(activations.inputs.to(gathered.up), activations.activation).double()
    target = activations.outputs.to(output)
    size = output.square().sum()
    scale = ((output * target).sum() / size).item() if size > 0 else 0.0
    norm = target.norm()
    return {
        "error": ((output - target).norm() / norm).item(),
        "rescaled": ((scale * output - target).norm() / norm).item(),
        "scale": scale,
    }


def output_errors(
    factored: FactoredBank, activations: LayerActivations, methods: Sequence[str], ranks: Sequence[int]
) -> pd.DataFrame:
    """:func:`output_error` of gathering methods at several ranks: ``method, rank, error, rescaled, scale``.

    Methods without a rank have the same values at each. ``one_expert`` is the mean over the experts.
    """
    rows = []
    for method in methods:
        if method == "one_expert":
            each = [output_error(factored.bank.expert(e), activations) for e in range(factored.bank.num_experts)]
            errors = [pd.DataFrame(each).mean().to_dict()] * len(ranks)
        elif method in RANKED:
            errors = [output_error(factored.gather(method, rank), activations) for rank in ranks]
        else:
            errors = [output_error(factored.gather(method), activations)] * len(ranks)
        rows += [{"method": method, "rank": rank, **error} for rank, error in zip(ranks, errors, strict=True)]
    return pd.DataFrame(rows)


def layer_tables(
    factored: FactoredBank, activations: LayerActivations | None, methods: Sequence[str]
) -> dict[str, pd.DataFrame]:
    """All tables of one layer: ``spectra, ranks, overlap, similarity, distance`` and, with activations, ``output_error``.

    Ranks are those of :func:`rank_grid`. ``distance`` has the columns ``method`` and ``rank``, with ranks for SVD-KG only
    (else NaN): at another K than its default, Top-KG has not the size of an expert.
    """
    ranks = rank_grid(factored.full_rank)
    weights = None if activations is None else activations.expert_weights()
    table = spectrum(factored)
    distances = []
    for method in methods:
        for rank in ranks if method == "svd" else [None]:
            found = gathered_distances(factored, factored.gather(method, rank), weights)
            distances.append(found.assign(method=method, rank=rank or math.nan))
    result = {
        "spectra": table,
        "ranks": rank_measures(table),
        "overlap": pd.concat([overlap(factored, matrix, rank) for matrix in factored.matrices for rank in ranks]),
        "similarity": similarity(factored),
        "distance": pd.concat(distances),
    }
    if activations is not None:
        result["output_error"] = output_errors(factored, activations, ["one_expert", *methods], ranks)
    return result
