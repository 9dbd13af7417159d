"""Inspects an MoE checkpoint before it is converted: what its router does, and what a dense model of each width would be like."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
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
    split_blocks,
    split_tokens,
    store_activations,
    stored_activations,
)
from ones_lib.checkpoints.architectures import Architecture
from ones_lib.checkpoints.convert import TOKENS, check_ids, local_folder, read_config
from ones_lib.checkpoints.evaluation import GUIDE
from ones_lib.checkpoints.plan import Block, TwinPlan
from ones_lib.checkpoints.side_by_side import SideBySide
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
LEAST_BLOCKS = 4  # of which a quarter, whole ones, can be held out
WORTH = 0.9  # a width is worth it if each doubling leaves at most this part of the error
READOUTS = "These are read-outs, each layer's in closed form. A reconstruction (convert --reconstruct) starts nearer to the MoE."


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` finds, as tables.

    Args:
        router: one row an MoE layer: ``layer``, the columns of :func:`router_statistics`, and :func:`weight_cosine` and
            :func:`output_correlation`.
        pairs: the strongest pairs of each layer: ``layer``, and the columns of :func:`expert_pairs`.
        errors: one row a layer and width: ``layer``; ``multiple``, the width in experts' widths (1, k, 2k, 4k, up to E);
            ``d_ff``, its hidden units; ``tokens``; and ``output_error``, see :func:`readouts`. Without rows of widths
            that memory is too small for.
        models: one row a width, of the whole model with the read-outs of this width in all layers together, on blocks of
            the calibration that they were not solved on: ``multiple`` and ``d_ff``, as in ``errors``; ``perplexity``; and
            ``kl``, to the MoE, in nats a token, see :meth:`ones_lib.checkpoints.side_by_side.SideBySide.compare`.
            ``attrs["MoE"]`` is the MoE's own perplexity on them, and ``attrs["tokens"]`` the number of tokens that were
            predicted. Without rows where that can't be measured; ``attrs["missing"]`` says why.
    """

    router: pd.DataFrame
    pairs: pd.DataFrame
    errors: pd.DataFrame
    models: pd.DataFrame


def inspect(source: str | Path, calibration: str | Path | Tensor, calibration_tokens: int | None = None) -> Inspection:
    """Run an MoE on a text and measure what its router does, what a read-out of each width would lose in each layer, and what
    the whole model would be like with these read-outs.

    Nothing is converted. What passes through the layers lies in the system's temporary folder meanwhile (``TMPDIR`` is
    another); one layer's experts, activations and read-outs are in memory at a time. Everything is of the routed experts:
    shared ones are kept by a conversion as they are.

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
    with TemporaryDirectory(prefix="ones-inspect-") as work:
        plan.shards.scratch = Path(work)
        activations, memory = Path(work) / "activations", psutil.virtual_memory().available
        widths = _widths(plan)
        fitting = [width for width in widths if _solver_bytes(width) <= memory]
        models = _Models(plan, calibration, fitting, Path(work) / "models")
        check_room(
            Path(work),
            activations_bytes(plan.stored, calibration.numel()) + models.bytes,
            "calibration_tokens sets their number, TMPDIR another folder",
        )
        plan.check_weights()
        store_activations(plan.stored, calibration, activations, plan.architecture.streams)
        for block in tqdm([block for block in plan.blocks if block.sparse], desc=folder.name, unit="layer"):
            seen = stored_activations(activations, block.experts, plan.activation(block))
            tables, networks = _inspect_layer(plan, block, seen, fitting, models.blocks)
            models.run(block, networks)
            del networks  # those of one layer are in memory
            for name, table in tables.items():
                table.insert(0, "layer", block.ffn)
                found[name].append(table)
        whole = models.table()
    if left_out := [width for width in widths if width not in fitting]:
        warnings.warn(
            f"memory: expected {_solver_bytes(min(left_out)) / 1e9:.1f} GB to solve for {min(left_out)} hidden units, found"
            f" {memory / 1e9:.1f} GB free; no errors of widths {left_out}",
            stacklevel=3,
        )
    return Inspection(**{name: pd.concat(parts, ignore_index=True) for name, parts in found.items()}, models=whole)


def _inspect_layer(
    plan: TwinPlan, block: Block, seen: LayerActivations, widths: Sequence[int], blocks: int | None
) -> tuple[dict[str, pd.DataFrame], list[FeedForwardWeights]]:
    """A layer's part of each table of an :class:`Inspection`, and its read-outs as a twin would have them."""
    experts, statistics = plan.experts(block), router_statistics(seen)
    errors, networks = [], []
    try:
        checked_experts(experts)
        correlation = output_correlation(experts, seen)
        for network, error in readouts(*plan.with_mean_gates(experts, seen), widths, blocks):
            errors.append(error)
            networks.append(network.map(lambda t: t.to(plan.config.dtype)))
    except ValueError as error:
        raise ValueError(f"{plan.shards.path}: {block.ffn}: {error}") from error
    alike = {"weight_cosine": weight_cosine(experts), "output_correlation": correlation}
    multiples = [width // plan.expert_width for width in widths]
    table = {"multiple": multiples, "d_ff": widths, "tokens": len(seen.inputs), "output_error": errors}
    tables = {
        "router": pd.DataFrame([{**statistics, **alike}]),
        "pairs": expert_pairs(seen),
        "errors": pd.DataFrame(table),
    }
    return tables, networks


def _widths(plan: TwinPlan) -> list[int]:
    """1, k, 2k and 4k experts' hidden units, up to all experts'."""
    k = plan.experts_a_token
    return [m * plan.expert_width for m in sorted({1, k, 2 * k, 4 * k}) if m <= plan.num_experts]


class _Models:
    """The table ``models`` of an :class:`Inspection` under way, and why it is ``missing``, if it is.

    ``blocks`` is the number of blocks of the calibration, of which the read-outs are to spare whole ones; None: tokens will do.
    """

    def __init__(self, plan: TwinPlan, calibration: Tensor, widths: Sequence[int], folder: Path) -> None:
        self.plan, self.widths, self.folder = plan, widths, folder
        self.ids = calibration[split_blocks(len(calibration))[1]]
        self.missing = self._obstacle(calibration)
        self.blocks = None if self.missing else len(calibration)

    def _obstacle(self, calibration: Tensor) -> str:
        architecture, kind = self.plan.architecture, self.plan.source_config.model_type
        if not architecture.streams:
            reason = (
                "it has an encoder" if self.plan.source_config.is_encoder_decoder else "its blocks hand on more states"
            )
            return f"{kind} can't be run block by block, since {reason}"
        if architecture.normed:
            return f"{kind} norms each expert's output, which a read-out of a dense model can't replace"
        if len(calibration) < LEAST_BLOCKS or calibration.shape[1] < 2:
            return f"it takes {LEAST_BLOCKS} blocks of text or more, found {len(calibration)} of {calibration.shape[1]} tokens"
        return "" if self.widths else "memory is too small for every width"

    @property
    def bytes(self) -> int:
        """What they take on the disk."""
        return 0 if self.missing else SideBySide.bytes(self.plan.stored, self.ids.numel(), len(self.widths))

    @cached_property
    def _side_by_side(self) -> SideBySide:
        return SideBySide(self.plan, self.ids, len(self.widths), self.folder)

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """What goes wrong with whole models, such as numbers beyond those of float16, leaves the other tables as they are."""
        try:
            yield
        except ValueError as error:
            self.missing = str(error)

    def run(self, block: Block, networks: Sequence[FeedForwardWeights]) -> None:
        """Run them through a block, with these read-outs."""
        if not self.missing:
            with self._noted():
                self._side_by_side.run(block, networks)

    def table(self) -> pd.DataFrame:
        """The table, when all layers have been run."""
        perplexities: list[float] = []
        kls: list[float] = []
        if not self.missing:
            with self._noted():
                perplexities, kls = self._side_by_side.compare()
        widths = self.widths[: len(kls)]
        multiples = [width // self.plan.expert_width for width in widths]
        table = pd.DataFrame({"multiple": multiples, "d_ff": widths, "perplexity": perplexities[1:], "kl": kls})
        known = {"MoE": perplexities[0], "tokens": self.ids[:, 1:].numel()} if kls else {"missing": self.missing}
        table.attrs.update(known)
        return table


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


def readouts(
    experts: Sequence[FeedForwardWeights], seen: LayerActivations, widths: Sequence[int], blocks: int | None = None
) -> Iterator[tuple[FeedForwardWeights, float]]:
    """Read-outs with these numbers of hidden units, and their relative output errors; an output of zeros has the error 1.

    Each is solved on three quarters of the tokens and measured on the rest. Of tokens of so many ``blocks`` of text, whole
    blocks are held out.
    """
    given, held_out = split_tokens(seen, blocks)
    for width in widths:
        ffn = gather_precisely(experts, "readout", given, d_ff=width)
        yield ffn, held_out.squared_error(ffn) ** 0.5


# --- command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Run :func:`inspect` as the command line says, and print what it found."""
    parser = argparse.ArgumentParser(
        prog="python -m ones_lib.checkpoints inspect",
        description="What an MoE's router does, and what a dense student of each width would be like. Converts nothing.",
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
    """The tables of whole models, of routers and of errors, and which width to take, as text."""
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
    router_text = f"What the router does\n{_text(shown)}"
    return "\n\n".join([_models_text(found.models, found.errors), router_text, _errors_text(found.errors, k)])


def _models_text(models: pd.DataFrame, errors: pd.DataFrame) -> str:
    if models.empty:
        return f"What the whole model would be like is not known: {models.attrs['missing']}."
    shown = pd.DataFrame(
        {"perplexity": models["perplexity"].map("{:.4g}".format), "KL": models["kl"].map("{:.3f}".format)}
    )
    shown.index = [_width_name(m, d_ff, errors) for m, d_ff in zip(models["multiple"], models["d_ff"], strict=True)]
    shown.loc["MoE"] = [f"{models.attrs['MoE']:.4g}", "-"]
    return (
        "The whole model with read-outs in all layers, by width (hidden units), on"
        f" {models.attrs['tokens']:,} tokens of held-out text\n{_text(shown)}\n\n{GUIDE}\n{READOUTS}"
    )


def _width_name(multiple: int, d_ff: int, errors: pd.DataFrame) -> str:
    """Of a width; with a star if tokens were too few for it in a layer."""
    enough = _enough(errors.loc[errors["d_ff"] == d_ff, "tokens"].min(), d_ff)
    return f"{multiple} x expert ({d_ff}){'' if enough else ' *'}"


def _errors_text(errors: pd.DataFrame, k: int) -> str:
    if errors.empty:
        return "No error to expect is known: memory is too small for every width."
    errors = errors.assign(enough=_enough(errors["tokens"], errors["d_ff"]))
    grid = errors.pivot(index="layer", columns=["multiple", "d_ff"], values="output_error")
    grid = grid.loc[errors["layer"].unique()]
    grid.loc["mean"] = means = grid.mean()
    enough = errors.groupby(["multiple", "d_ff"])["enough"].all()
    grid = grid.map("{:.3f}".format).set_axis([_width_name(*width, errors) for width in grid.columns], axis=1)
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
