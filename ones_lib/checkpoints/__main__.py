"""The commands ``convert``, of :func:`ones_lib.checkpoints.convert`, and ``inspect``, of :mod:`ones_lib.checkpoints.inspection`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from ones_lib.checkpoints import inspection
from ones_lib.checkpoints.architectures import ENGINES
from ones_lib.checkpoints.convert import convert
from ones_lib.checkpoints.evaluation import GUIDE
from ones_lib.checkpoints.place import CONVERSION
from ones_lib.checkpoints.plan import ACTIVE, active_multiple
from ones_lib.checkpoints.terminal import Typed, add_version, exit_status
from ones_lib.checkpoints.text import token_count
from ones_lib.data.files import is_free
from ones_lib.gathering.registry import gathering_methods, gives_widths

ERRORS = {"output_error": "error", "start_error": "error before", "reconstruction_error": "error after"}


def _option(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ones_lib.checkpoints",
        description="Make MoE checkpoints dense.",
        epilog="Nearly every MoE type of transformers can be converted: ones_lib/README.md has the table. Without a command's name"
        " it is convert.",
    )
    commands = parser.add_subparsers(title="commands, each with --help")
    commands.add_parser("inspect", help="what the router of an MoE does, and what a dense model of each width is like")
    commands.add_parser("convert", help="make an MoE dense: gather the experts of every layer, copy the rest")
    add_version(parser)
    return parser


def _convert_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ones_lib.checkpoints convert",
        description="Make an MoE checkpoint dense: gather the experts of every layer, copy the rest. The same command goes on with"
        " unfinished work.",
    )
    add = parser.add_argument
    add("source", metavar="MOE", help="folder or Hugging Face hub name of the MoE")
    add("destination", metavar="DENSE", help="folder to make")
    add(
        "--method",
        choices=gathering_methods(),
        help="gathering (default: readout before a reconstruction, else fit with a calibration, else topk)",
    )
    add(
        "--d-ff",
        type=_width,
        default=argparse.SUPPRESS,
        metavar="N",
        help="hidden units of the gathered network: a number, 'active' (what a token passes through; the default where the method"
        " can), a multiple of it such as '4x', or 'expert' (one expert's, as in the paper)",
    )
    text = "file, folder, hub name, or 'docstrings' or 'names' (embedded text)"
    add(
        "--calibration",
        metavar="TEXT",
        help=f"run the MoE on this text, for methods that use data and statistics: {text}",
    )
    add("--calibration-tokens", type=token_count, metavar="N", help="tokens of it (default: 4096)")
    add(
        "--reconstruct",
        metavar="TEXT",
        help="regress every layer's network onto its MoE layer on this text; minutes to hours",
    )
    add(
        "--reconstruct-tokens",
        type=token_count,
        metavar="N",
        help="tokens of it, as 200k or 2M (default: 1M)",
    )
    add(
        "--student-inputs",
        action=argparse.BooleanOptionalAction,
        help="regress on what the layers before make of the text, so that errors do not add up (default: where the type can)",
    )
    add("--approximate", action="store_true", help="make a plain dense class where the exact twin is none")
    add(
        "--for",
        dest="engine",
        choices=ENGINES,
        default="",
        help="make a twin that this engine starts, at some speed elsewhere",
    )
    add(
        "--check",
        metavar="TEXT",
        help="measure both models' perplexity on this text, and the dense one's KL to the MoE",
    )
    add("--option", action="append", type=_option, default=[], metavar="NAME=VALUE", help="of the method; repeatable")
    add(
        "--force",
        action="store_true",
        help="replace what another call has made at DENSE, when the new one is whole, or has begun",
    )
    add_version(parser)
    return parser


def _width(text: str) -> int | str | None:
    if text == "expert":
        return None
    try:
        if text.isdigit():
            return int(text)
        active_multiple(text)
        return text
    except ValueError as error:
        expected = "a number, 'active', a multiple of it such as '4x', or 'expert'"
        raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}") from error


def _best_method(given: dict) -> str:
    """The gathering that starts best with the text that there is."""
    if given["reconstruct"]:
        return "readout"
    return "fit" if given["calibration"] else "topk"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["inspect"]:
        inspection.main(arguments[1:])
    elif set(arguments[:1]) <= {"-h", "--help", "--version"}:
        parser = _parser()
        parser.parse_args(arguments)
        parser.error("expected a command, inspect or convert")
    else:
        _convert(arguments[1:] if arguments[0] == "convert" else arguments)


def _convert(arguments: Sequence[str]) -> None:
    parser = _convert_parser()
    given = vars(parser.parse_args(arguments))
    options = dict(given.pop("option"))
    given["method"] = given["method"] or _best_method(given)
    narrow = not gives_widths(given["method"])
    if "d_ff" not in given:
        given["d_ff"] = None if narrow or options.get("k") is not None else ACTIVE  # k of every expert is a width, too
        if narrow:
            print(f"{given['method']} gathers to one expert's width: --d-ff expert", file=sys.stderr)
    typed = Typed(given, {"source": "MOE", "destination": "DENSE"}, options)

    def said(error: object) -> str:
        return typed.said(error) + ("; take --d-ff expert" if narrow and str(error).startswith("d_ff: ") else "")

    def work() -> None:
        place = Path(given["destination"]).expanduser()
        fresh = given["force"] or is_free(place)
        with typed.warnings(hidden=not fresh):
            table = convert(**given, **options)
        if not fresh:
            print(f"already done with these arguments: {given['destination']}")
            return
        print(_report(table, json.loads((place / CONVERSION).read_text())))
        print(f"wrote {given['destination']}")

    status = exit_status(work, said, interrupted="interrupted; the same command goes on where it stopped")
    if status:
        sys.exit(status)


def _report(table: pd.DataFrame, facts: Mapping) -> str:
    """The table of layers, what was taken of the texts, and what the check found."""
    shown = ["layer", "experts", "d_ff", "shared", "width", "gate_sum", *ERRORS]
    shown = table[[column for column in shown if column in table and table[column].notna().any()]]
    lines = [shown.rename(columns=ERRORS).to_string(index=False, float_format="%.4g")]
    if "start_error" in shown:
        lines.append("error: of what a network is regressed onto, on held-out tokens; 1 is an output of zeros")
    elif "output_error" in shown:
        lines.append("error: of the routed experts' output, on held-out tokens; 1 is an output of zeros")
    for name in ("calibration", "reconstruct", "check"):
        if text := facts[name]:
            lines.append(f"{name}: {text['tokens']:,} tokens of {text['text']}")
    if found := facts["perplexity"]:
        lines.append(f"perplexity: MoE {found['MoE']:.4g}, dense {found['dense']:.4g}")
        lines.append(f"KL to the MoE: {facts['kl']['dense']:.3f}\n{GUIDE}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
