"""Inspects an MoE checkpoint before it is converted: what its router does, and what error to expect of each width."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import psutil
import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from ones_lib.calibration import LayerActivations
from ones_lib.checkpoints.activations import (
    activations_bytes,
    split_tokens,
    store_activations,
    stored_activations,
)
from ones_lib.checkpoints.architectures import Architecture
from ones_lib.checkpoints.convert import TOKENS, check_ids, local_folder, read_config
from ones_lib.checkpoints.plan import Block, TwinPlan
from ones_lib.checkpoints.stored import open_checkpoint
from ones_lib.checkpoints.terminal import Typed, add_version, exit_status
from ones_lib.checkpoints.text import BLOCK, asked_for, check_tokens, found_text, text_blocks, token_count
from ones_lib.data.files import check_room
from ones_lib.ffn import FeedForwardWeights, compute_dtype
from ones_lib.gathering.registry import checked_experts, gather_precisely
from ones_lib.models.causal import text_config

SAMPLE = 256  # tokens on which all experts of a layer are run
PAIRS = 5  # pairs of experts listed of a layer
EXPECTED = 5  # tokens that a listed pair would share by chance: of fewer, the count says little
TOKENS_A_UNIT = 4  # to solve a read-out on
LEAST = 16  # tokens to inspect
WORTH = 0.9  # a width is worth it if each doubling leaves at most this part of the error


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` finds, as tables.

    Args:
        router: one row an MoE layer: ``layer``, the columns of :func:`router_statistics`, and :func:`weight_cosine` and
            :func:`output_correlation`.
        pairs: the strongest pairs of each layer: ``layer``, and the columns of :func:`expert_pairs`.
        errors: one row a layer and width: ``layer``; ``multiple``, the width in experts' widths (1, k, 2k, 4k, up to E);
            ``d_ff``, its hidden units; ``tokens``; and ``output_error``, see :func:`width_errors`. Without rows of widths
            that memory is too small for.
    """

    router: pd.DataFrame
    pairs: pd.DataFrame
    errors: pd.DataFrame


def inspect(source: str | Path, calibration: str | Path | Tensor, calibration_tokens: int | None = None) -> Inspection:
    """Run an MoE on a text and measure, layer by layer, what its router does and what a read-out of each width would lose.

    Nothing is converted. What passes through the layers lies in the system's temporary folder meanwhile (``TMPDIR`` is
    another); one layer's experts and activations are in memory at a time. Everything is of the routed experts: shared ones
    are kept by a conversion as they are.

    Args:
        source: as in :func:`ones_lib.checkpoints.convert`.
        calibration: a text (see :func:`ones_lib.checkpoints.text.text_blocks`) or token ids [n, L].
        calibration_tokens: number of tokens of the text. None: 4,096, or what a shorter text has. A warning says if those asked
            for are few for a width: its error is too high then.

    Raises:
        FileNotFoundError, ValueError, TypeError, ConnectionError: before long work starts, except for NaN, which is found
            when the tensor is read.
    """
    found = _inspect(source, calibration, calibration_tokens)
    few = found.errors[~_enough(found.errors["tokens"], found.errors["d_ff"])]
    if len(few) and (calibration_tokens is not None or torch.is_tensor(calibration)):
        width = few["d_ff"].max()
        warnings.warn(
            f"calibration_tokens: expected {_tokens_for(width)} for a read-out of {width} hidden units, found"
            f" {few['tokens'].iloc[0]}; its error is too high with so few",
            stacklevel=2,
        )
    return found


def _inspect(source: str | Path, calibration: str | Path | Tensor, calibration_tokens: int | None) -> Inspection:
    check_tokens("calibration_tokens", calibration_tokens)
    calibration = found_text("calibration", calibration)
    folder = local_folder(source)
    config = read_config(folder)
    architecture = Architecture(config, folder)
    plan = TwinPlan(open_checkpoint(folder, config, architecture.model), architecture, "readout", d_ff=None)
    if isinstance(calibration, (str, Path)):
        most = calibration_tokens or TOKENS["calibration"]
        blocks = text_blocks(calibration, folder, split="train", name="calibration", most=most)
        calibration = asked_for("calibration_tokens", blocks, calibration_tokens, TOKENS["calibration"], calibration)
    check_ids("calibration", calibration, text_config(config).vocab_size)
    if calibration.numel() < LEAST:
        raise ValueError(f"calibration: expected {LEAST} tokens or more, found {calibration.numel()}")
    found: dict[str, list[pd.DataFrame]] = {"router": [], "pairs": [], "errors": []}
    left_out: set[int] = set()
    with TemporaryDirectory(prefix="ones-inspect-") as work:
        plan.shards.scratch = Path(work)
        activations, memory = Path(work) / "activations", psutil.virtual_memory().available
        check_room(
            Path(work),
            activations_bytes(plan.stored, calibration.numel()),
            "calibration_tokens sets their number, TMPDIR another folder",
        )
        plan.check_weights()
        store_activations(plan.stored, calibration, activations, plan.architecture.streams)
        for block in tqdm([block for block in plan.blocks if block.sparse], desc=folder.name, unit="layer"):
            seen = stored_activations(activations, block.experts, plan.activation(block))
            statistics = router_statistics(seen)
            widths = _widths(statistics["chosen"], plan)
            fitting = [width for width in widths if _solver_bytes(width) <= memory]
            left_out |= set(widths) - set(fitting)
            for name, table in _layer_tables(plan, block, seen, statistics, fitting).items():
                table.insert(0, "layer", block.ffn)
                found[name].append(table)
    if left_out:
        warnings.warn(
            f"memory: expected {_solver_bytes(min(left_out)) / 1e9:.1f} GB to solve for {min(left_out)} hidden units, found"
            f" {memory / 1e9:.1f} GB free; no errors of widths {sorted(left_out)}",
            stacklevel=3,
        )
    return Inspection(**{name: pd.concat(parts, ignore_index=True) for name, parts in found.items()})


def _layer_tables(
    plan: TwinPlan, block: Block, seen: LayerActivations, statistics: Mapping[str, float], widths: Sequence[int]
) -> dict[str, pd.DataFrame]:
    """A layer's part of each table of an :class:`Inspection`."""
    experts = plan.experts(block)
    try:
        checked_experts(experts)
        correlation, errors = output_correlation(experts, seen), width_errors(experts, seen, widths)
    except ValueError as error:
        raise ValueError(f"{plan.shards.path}: {block.ffn}: {error}") from error
    alike = {"weight_cosine": weight_cosine(experts), "output_correlation": correlation}
    multiples = [width // plan.expert_width for width in widths]
    table = {"multiple": multiples, "d_ff": widths, "tokens": len(seen.inputs), "output_error": errors}
    return {
        "router": pd.DataFrame([{**statistics, **alike}]),
        "pairs": expert_pairs(seen),
        "errors": pd.DataFrame(table),
    }


def _widths(chosen: float, plan: TwinPlan) -> list[int]:
    """1, k, 2k and 4k experts' hidden units, up to all experts'."""
    k = max(1, round(chosen))
    return [m * plan.expert_width for m in sorted({1, k, 2 * k, 4 * k}) if m <= plan.num_experts]


def _enough(tokens: int, width: int) -> bool:
    """Whether three quarters of the tokens can settle a read-out of ``width`` units. Its error says little of the width
    otherwise: it is largest where there are as many tokens as units."""
    return 3 * tokens >= 4 * TOKENS_A_UNIT * width


def _tokens_for(width: int) -> int:
    """Tokens that are enough, in whole blocks."""
    return BLOCK * math.ceil(4 * TOKENS_A_UNIT * width / (3 * BLOCK))


def _solver_bytes(width: int) -> int:
    """Memory that a read-out of ``width`` units is solved in: its equations in float64, and two copies of them."""
    return 3 * 8 * width**2


# --- measures of one layer -------------------------------------------------------------------------------------------


def router_statistics(seen: LayerActivations) -> dict[str, float]:
    """How a router spreads tokens over a layer's E experts.

    Returns:
        ``experts``, their number E; ``chosen``, the mean number of experts a token (k); ``effective_experts``, exp of the
        entropy of the experts' shares of all assignments, 1 to E; ``gini``, the Gini coefficient of these shares, 0 (equal)
        to (E-1)/E (one expert has all); ``gate_sum`` and ``gate_sum_sd``, mean and standard deviation over tokens of the sum
        of a token's gates.
    """
    shares, sums = seen.expert_frequencies().double(), seen.gates.double().sum(dim=1)
    return {
        "experts": len(shares),
        "chosen": (seen.gates != 0).sum(dim=1).double().mean().item(),
        "effective_experts": torch.special.entr(shares).sum().exp().item(),
        "gini": (shares[:, None] - shares).abs().sum().item() / (2 * len(shares)),
        "gate_sum": sums.mean().item(),
        "gate_sum_sd": sums.std(correction=0).item(),
    }


def expert_pairs(seen: LayerActivations) -> pd.DataFrame:
    """The pairs of experts that tokens choose together most beyond chance: ``expert, other, count, expected, lift``.

    ``count`` is the number of tokens that chose both, and ``lift`` is ``count / expected``. Since a token chooses k
    different experts, ``P(i) P(j)`` is not the chance of a pair. Here it is ``u_i u_j``, with u such that every expert is
    in as many pairs as it was seen in (quasi-independence). Of experts that are used equally, that is
    ``P(i) P(j) (k-1) E / (k (E-1))``, and a lift of 1 is what k draws without replacement give.

    At most :data:`PAIRS` pairs with a lift above 1, the largest first, of those expected :data:`EXPECTED` times or more.
    """
    chosen = (seen.gates != 0).double()
    together = (chosen.T @ chosen).fill_diagonal_(0)
    seen_in = together.sum(dim=1)
    u = seen_in / seen_in.sum().clamp(min=1).sqrt()
    for _ in range(1000):
        u = (u * seen_in / (u.sum() - u)).sqrt()  # at its fixed point u_i (sum of the other u) is seen_in_i
    expert, other = torch.triu_indices(len(u), len(u), 1)
    count, expected = together[expert, other], u[expert] * u[other]
    columns = {"expert": expert, "other": other, "count": count.long(), "expected": expected, "lift": count / expected}
    table = pd.DataFrame({name: tensor.numpy() for name, tensor in columns.items()})
    table = table[(table["expected"] >= EXPECTED) & (table["lift"] > 1)]
    return table.sort_values("lift", ascending=False, kind="stable").head(PAIRS)


def weight_cosine(experts: Iterable[FeedForwardWeights]) -> float:
    """Mean cosine of two experts, each the vector of all its weights as they are stored. NaN for a single expert."""
    return _mean_cosine(torch.cat([t.flatten() for _, t in expert.tensors()]) for expert in experts)


def output_correlation(experts: Iterable[FeedForwardWeights], seen: LayerActivations) -> float:
    """Mean correlation of two experts' outputs on the same tokens, :data:`SAMPLE` of them, whatever the router chose.

    An expert's outputs are one vector, with each dimension's mean over the tokens subtracted. NaN for a single expert.
    """
    order = torch.randperm(len(seen.inputs), generator=torch.Generator().manual_seed(0))
    inputs = seen.inputs[order[:SAMPLE]]

    def output(expert: FeedForwardWeights) -> Tensor:
        expert = expert.map(lambda t: t.to(compute_dtype(t)))
        found = expert.apply(inputs.to(expert.up), seen.activation)
        return (found - found.mean(dim=0)).flatten()

    return _mean_cosine(output(expert) for expert in experts)


def _mean_cosine(vectors: Iterable[Tensor]) -> float:
    """Mean cosine of two of the vectors, which are read once: the squared norm of a sum of unit vectors is the sum of all
    pairs' cosines."""
    total, count = torch.zeros(()), 0
    for vector in vectors:
        vector = vector.to(compute_dtype(vector))
        total, count = total + vector / vector.norm(), count + 1
    pairs = count * (count - 1)
    return (total.norm().item() ** 2 - count) / pairs if pairs else math.nan


def width_errors(experts: Sequence[FeedForwardWeights], seen: LayerActivations, widths: Sequence[int]) -> list[float]:
    """Relative output errors of read-outs with these numbers of hidden units; an output of zeros has the error 1.

    Each is solved on three quarters of the tokens and measured on the rest.
    """
    given, held_out = split_tokens(seen)
    readouts = (gather_precisely(experts, "readout", given, d_ff=width) for width in widths)
    return [held_out.squared_error(ffn) ** 0.5 for ffn in readouts]


# --- command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Run :func:`inspect` as the command line says, and print what it found."""
    parser = argparse.ArgumentParser(
        prog="python -m ones_lib.checkpoints inspect",
        description="What an MoE's router does, and what error to expect of a dense student, by width. Converts nothing.",
    )
    add = parser.add_argument
    add("source", metavar="MOE", help="folder or Hugging Face hub name of the MoE")
    text = "file, folder, hub name, or 'docstrings' (default) or 'names' (embedded text)"
    add("--calibration", metavar="TEXT", default="docstrings", help=f"run the MoE on this text: {text}")
    add("--calibration-tokens", type=token_count, metavar="N", help="tokens of it (default: 4096)")
    add_version(parser)
    given = vars(parser.parse_args(arguments))
    typed = Typed(given, {"source": "MOE"})

    def work() -> None:
        with typed.warnings():
            print(_report(_inspect(**given)))

    if status := exit_status(work, typed.said):
        sys.exit(status)


def _report(found: Inspection) -> str:
    """The tables of routers and of errors, and which width to take, as text."""
    router = found.router.set_index("layer")
    shown = pd.DataFrame(
        {
            "experts": router["experts"],
            "a token": router["chosen"].map("{:.3g}".format),
            "effective": router["effective_experts"].map("{:.1f}".format),
            "Gini": router["gini"].map("{:.2f}".format),
            "sum of gates": [
                f"{m:.2f} ± {sd:.2f}" for m, sd in zip(router["gate_sum"], router["gate_sum_sd"], strict=True)
            ],
            "weights alike": router["weight_cosine"].map("{:.2f}".format),
            "outputs alike": router["output_correlation"].map("{:.2f}".format),
        }
    )
    first = found.pairs.drop_duplicates("layer").set_index("layer")
    pairs = first.apply(lambda row: f"{row['expert']:.0f} & {row['other']:.0f}: {row['lift']:.1f} x chance", axis=1)
    shown["together"] = pairs.reindex(shown.index).fillna("-") if len(first) else "-"
    k = max(1, round(router["chosen"].mean()))
    return f"What the router does\n{_text(shown)}\n\n{_errors_text(found.errors, k)}"


def _errors_text(errors: pd.DataFrame, k: int) -> str:
    if errors.empty:
        return "No error to expect is known: memory is too small for every width."
    errors = errors.assign(enough=_enough(errors["tokens"], errors["d_ff"]))
    grid = errors.pivot(index="layer", columns=["multiple", "d_ff"], values="output_error")
    grid = grid.loc[errors["layer"].unique()]
    grid.loc["mean"] = means = grid.mean()
    enough = errors.groupby(["multiple", "d_ff"])["enough"].all()
    names = [f"{m} x expert ({d_ff}){'' if enough[m, d_ff] else ' *'}" for m, d_ff in grid.columns]
    grid = grid.map("{:.3f}".format).set_axis(names, axis=1)
    parts = [
        "Error of a read-out on held-out tokens, by width (hidden units); 1 is an output of zeros",
        f"{_text(grid)}\n",
        *(
            f"Active width, what a token passes through, is {d_ff}: error {means[m, d_ff]:.2f}."
            for m, d_ff in means.index
            if m == k
        ),
        _advice(means[enough]),
    ]
    if not enough.all():
        parts.append(
            f"* fewer than {TOKENS_A_UNIT} tokens a hidden unit were solved on, so the error is too high;"
            f" --calibration-tokens {_tokens_for(errors['d_ff'].max())} are enough"
        )
    return "\n".join(parts)


def _text(table: pd.DataFrame) -> str:
    return table.rename_axis(None).rename_axis(None, axis=1).to_string()


def _advice(errors: pd.Series) -> str:
    """A sentence on the width to take: the first after which a doubling leaves more than :data:`WORTH` of the error.

    ``errors`` are of widths that tokens were enough for, indexed by multiple and width, in ascending order.
    """
    if errors.empty:
        return "Which width to take can't be said with so few tokens."
    for (width, error), (wider, less) in pairwise(errors.items()):
        (multiple, d_ff), doublings = width, math.log2(wider[0] / width[0])
        if less > WORTH**doublings * error:
            gain = f"{wider[1]} would have {less:.2f}, less than a tenth off for each doubling"
            return (
                f"The best for its size is --d-ff {d_ff} ({multiple} x an expert's width): error {error:.2f}; {gain}."
            )
    (multiple, d_ff), error = errors.index[-1], errors.iloc[-1]
    return (
        f"The best for its size is --d-ff {d_ff} ({multiple} x an expert's width), the widest tried: error {error:.2f}."
    )
