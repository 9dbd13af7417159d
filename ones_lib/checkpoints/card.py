"""The model card of a checkpoint made dense."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

import pandas as pd

from ones_lib import __version__
from ones_lib.checkpoints.architectures import ONE_EXPERT
from ones_lib.checkpoints.beside import left_behind, no_tokenizer
from ones_lib.checkpoints.evaluation import GUIDE
from ones_lib.checkpoints.plan import TwinPlan
from ones_lib.checkpoints.text import TOKEN_IDS, tokenizer_code


def model_card(plan: TwinPlan, arguments: Mapping, layers: pd.DataFrame, evaluation: Mapping[str, Mapping]) -> str:
    """README.md of the twin.

    Args:
        arguments: of the conversion.
        layers: the table of :func:`ones_lib.checkpoints.convert`.
        evaluation: ``perplexity`` of ``MoE`` and ``dense``, and ``kl`` of ``dense``; or empty.
    """
    name, kind = arguments["source"], plan.source_config.model_type
    if "revision" in arguments:
        kind = f"{kind}, revision {arguments['revision']}"
    options = ({} if arguments["d_ff"] is None else {"d_ff": arguments["d_ff"]}) | arguments["options"]
    given = "".join(f", {option} = {value}" for option, value in options.items())
    facts = [*_widths(plan, layers), *_approximations(plan, arguments), *_measured(arguments, layers, evaluation)]
    return f"""---
library_name: transformers
base_model: {name}
tags: [ones, knowledge-gathering, dense]
---
# {name}, made dense

A {plan.config.architectures[0]}. Its feed-forward networks were gathered from the {plan.num_experts} experts of each MoE layer \
of {name} ({kind}) by `{arguments["method"]}`{given}; everything else is a copy. After "One Student Knows All Experts Know: From \
Sparse to Dense" (Xue et al., arXiv 2201.10890). That paper's second step, distillation from the MoE, has not been done: this \
model is a start for it.

{"".join(f"- {fact}{chr(10)}" for fact in facts)}
Made with ones_lib {__version__}, transformers {version("transformers")}; the arguments are in conversion.json.
"""


def _widths(plan: TwinPlan, layers: pd.DataFrame) -> list[str]:
    used, sums = layers["d_ff"] + layers["shared"], layers["gate_sum"]
    shared = f" and {layers['shared'].max()} of shared experts, joined to them" if layers["shared"].any() else ""
    wide = f", in layers of {plan.width}" if plan.width > used.max() else ""
    facts = [
        f"Hidden units: {layers['d_ff'].max()} gathered{shared}{wide}; an expert has {plan.expert_width}.",
        f"The gathered networks' outputs are multiplied by the sum of a token's gates: {sums.min():.4g} to {sums.max():.4g}"
        f" (from: {', '.join(layers['gates'].unique())}).",
    ]
    if unused := plan.width - used.min():
        facts.append(
            f"Up to {unused} hidden units of a gathered layer have output weights of zero, because the class has one width for"
            " all layers. A conversion with a d_ff larger by that number would use them."
        )
    return facts


def _approximations(plan: TwinPlan, arguments: Mapping) -> list[str]:
    facts = []
    if plan.architecture.kind == ONE_EXPERT:
        reason = (
            f"{plan.architecture.for_engine} refuses this class without any MoE layer"
            if plan.architecture.for_engine
            else "Transformers has no dense class with the attention and norms of this MoE"
        )
        facts.append(
            f"{reason}. This is the same class with one expert, or"
            " a few that are always chosen, whose gates are constant: dense in function."
        )
    if plan.architecture.special.mean_gated:
        data = "random tokens" if arguments["calibration"] is None else "the calibration"
        facts.append(
            f"Approximate: the gate of the shared expert, which depends on the token, is now its mean over {data}."
        )
    if code := tokenizer_code(plan.shards.path):
        facts.append(f"About text: {no_tokenizer(code)}.")
    if left := left_behind(plan.shards.path):
        more = f" and {len(left) - 12} more" if len(left) > 12 else ""
        facts.append(f"Left behind of the MoE's folder: {', '.join(left[:12])}{more}.")
    if plan.dropped:
        facts.append(
            f"Left out, since transformers does not load them either: {len(plan.dropped)} tensors, such as {plan.dropped[0]}"
            " (mostly of layers that predict further tokens)."
        )
    return facts


def _measured(arguments: Mapping, layers: pd.DataFrame, evaluation: Mapping[str, Mapping]) -> list[str]:
    facts = []
    if arguments["calibration"]:
        fact = f"The MoE was run on {_tokens(arguments['calibration'])}: router_statistics.csv says how much each expert is used."
        if "output_error" in layers:
            fact += (
                f" Relative error of the routed experts' output after gathering, on held-out ones, by layer:"
                f" {_range(layers['output_error'])}, see conversion.csv."
            )
        facts.append(fact)
    if arguments["reconstruct"]:
        own = "the MoE's residual stream behind each block, from the student's own inputs"
        targets = own if arguments["student_inputs"] else "each MoE layer's outputs, from the MoE's inputs"
        facts.append(
            f"Then every network was regressed, on {_tokens(arguments['reconstruct'])}, onto {targets}. Relative error on held-out"
            f" ones, by layer, before {_range(layers['start_error'])} and after {_range(layers['reconstruction_error'])}, see"
            " reconstruction.csv."
        )
    if evaluation:
        found = evaluation["perplexity"]
        facts.append(
            f"Perplexity on {_tokens(arguments['check'])}: MoE {found['MoE']:.4g}, this model {found['dense']:.4g}."
            f" KL to the MoE: {evaluation['kl']['dense']:.3f}. {' '.join(GUIDE.split())}"
        )
    return facts


def _tokens(text: Mapping) -> str:
    return f"{text['tokens']:,} tokens of {text['text']}" if text["text"] != TOKEN_IDS else f"{text['tokens']:,} tokens"


def _range(errors: pd.Series) -> str:
    return f"{errors.min():.3f} to {errors.max():.3f}"
