"""The command line of :func:`ones_lib.checkpoints.convert`, and of :mod:`ones_lib.checkpoints.inspection`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ones_lib.checkpoints import inspection
from ones_lib.checkpoints.convert import convert
from ones_lib.checkpoints.plan import ACTIVE
from ones_lib.checkpoints.text import token_count
from ones_lib.gathering.registry import gathering_methods


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
        description="Make an MoE checkpoint dense: gather the experts of every layer, copy the rest.",
        epilog="Nearly every MoE type of transformers can be converted: ones_lib/README.md has the table. 'python -m"
        " ones_lib.checkpoints inspect MOE --calibration TEXT' says what the router does, and what to expect of each width.",
    )
    add = parser.add_argument
    add("source", help="folder or Hugging Face hub name of the MoE")
    add("destination", help="folder to make")
    add(
        "--method",
        choices=gathering_methods(),
        help="gathering (default: readout before a reconstruction, else fit with a calibration, else topk)",
    )
    add(
        "--d-ff",
        type=_width,
        default=ACTIVE,
        metavar="N",
        help="hidden units of the gathered network: a number, 'active' (what a token passes through; the default), or 'expert'"
        " (one expert's, as in the paper)",
    )
    text = "file, folder, hub name, or 'docstrings' or 'names' (embedded text)"
    add(
        "--calibration",
        metavar="TEXT",
        help=f"run the MoE on this text, for methods that use data and statistics: {text}",
    )
    add("--calibration-tokens", type=token_count, default=4096, metavar="N", help="tokens of it (default: 4096)")
    add(
        "--reconstruct",
        metavar="TEXT",
        help="regress every layer's network onto its MoE layer on this text; minutes to hours",
    )
    add(
        "--reconstruct-tokens",
        type=token_count,
        default=2**20,
        metavar="N",
        help="tokens of it, as 200k or 2M (default: 1M)",
    )
    add(
        "--student-inputs",
        action="store_true",
        help="regress on what the layers before make of the text, so that errors do not add up",
    )
    add("--approximate", action="store_true", help="make a plain dense class where the exact twin is none")
    add("--check", metavar="TEXT", help="measure the perplexity of both models on this text")
    add("--option", action="append", type=_option, default=[], metavar="NAME=VALUE", help="of the method; repeatable")
    return parser


def _width(text: str) -> int | str | None:
    if text in (ACTIVE, "expert"):
        return ACTIVE if text == ACTIVE else None
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, 'active' or 'expert', found {text!r}") from error


def _best_method(given: dict) -> str:
    """The gathering that starts best with the text that there is."""
    if given["reconstruct"]:
        return "readout"
    return "fit" if given["calibration"] else "topk"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run :func:`ones_lib.checkpoints.convert` as the command line says."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["inspect"]:
        inspection.main(arguments[1:])
        return
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    options = dict(given.pop("option"))
    given["method"] = given["method"] or _best_method(given)
    try:
        table = convert(**given, **options)
    except (OSError, ValueError, TypeError) as error:
        parser.exit(1, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; the same command goes on where it stopped\n")
    columns = ["layer", "experts", "d_ff", "shared", "width", "gate_sum", "output_error", "reconstruction_error"]
    print(
        table[[c for c in columns if c in table and table[c].notna().any()]].to_string(index=False, float_format="%.4g")
    )
    if found := table.attrs["perplexity"]:
        print(f"perplexity: MoE {found['MoE']:.4g}, dense {found['dense']:.4g}")
    print(f"wrote {given['destination']}")


if __name__ == "__main__":
    main()
