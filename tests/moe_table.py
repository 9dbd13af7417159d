"""Writes the table of MoE types in ones_lib/README.md, from the code: ``python tests/moe_table.py``."""

import csv
from pathlib import Path

import transformers
from tiny_moes import CONFIGS, TYPES
from transformers import AutoConfig

from ones_lib.checkpoints.architectures import DENSE_CLASS, DENSE_LAYERS, REFUSED, Architecture

with Path(__file__).with_name("engines.csv").open(encoding="utf-8") as file:
    #: By type, what engines do with its twin, as ``tests/engines.py`` found.
    SERVES = {row["type"]: row for row in csv.DictReader(file)}
README = Path(__file__).parents[1] / "ones_lib" / "README.md"
MARKS = "<!-- types -->\n", "<!-- end of types -->"


def row(kind):
    """Models, twin, sum of gates, methods and engines of a type."""
    config = AutoConfig.for_model(kind, **CONFIGS[kind])
    architecture = Architecture(config, kind)
    twin = architecture.twin(48)
    count = (
        len(architecture.one_gate(twin, architecture.name))
        if architecture.kind not in (DENSE_CLASS, DENSE_LAYERS)
        else 0
    )
    becomes = {DENSE_CLASS: type(twin).__name__.split("For")[0], DENSE_LAYERS: "itself, all layers dense"}
    experts = "itself, one expert" if count == 1 else "itself, a few experts, all chosen"
    methods = "of weights alone" if architecture.normed else "all" if architecture.streams else "all, no reconstruction"
    total = gates(architecture, config)
    if architecture.input_gates:
        total = "measured, at the inputs"
    exact = "yes, unless measured" if " or measured" in total else "no: gates are averaged"
    exact = exact if "measured" in total else "yes"
    engines = SERVES[kind]["vllm"], SERVES[kind]["llama_cpp"]
    return TYPES[kind]["models"], becomes.get(architecture.kind, experts), total, exact, methods, *engines


def gates(architecture, config):
    """What a token's gates sum to, in words; of a router that may normalise them, both ways."""
    sums = {sum_of(architecture)}
    text = config.get_text_config()
    if sums != {"measured"} and getattr(text, "norm_topk_prob", None):
        text.norm_topk_prob = False
        sums.add(sum_of(Architecture(config, "")))
    return " or ".join(sorted(sums))


def sum_of(architecture):
    found = architecture.gates[architecture.name]
    if found.total is None:
        return "measured"
    return "1" if abs(found.total * found.factor - 1) < 1e-3 else "a factor"


def table():
    """The rows as Markdown. A type that is the text part of another, and alike, has no row of its own."""
    rows = {kind: row(kind) for kind in CONFIGS}
    lines = [
        "| type | models | becomes | sum of gates | exact | methods | vLLM | llama.cpp |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, cells in rows.items():
        whole = kind.removesuffix("_text")
        if whole != kind and rows.get(whole, ("",))[1:] == cells[1:]:
            continue
        both = f"{kind}_text" in rows and rows[f"{kind}_text"][1:] == cells[1:]
        lines.append(f"| `{kind}`{', `..._text`' if both else ''} | {' | '.join(cells)} |")
    refused = [f"- `{kind}` ({TYPES[kind]['models']}): {reason}" for kind, reason in sorted(REFUSED.items())]
    return "\n".join([*lines, "", "Refused, with the reason:", "", *refused, ""])


def written(text):
    """The table as the README has it."""
    start, end = MARKS
    return text.partition(start)[2].partition(end)[0]


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    before, start, rest = README.read_text().partition(MARKS[0])
    README.write_text(f"{before}{start}\n{table()}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
