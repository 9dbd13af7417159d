"""The command line of :func:`ones_lib.checkpoints.convert`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from ones_lib.checkpoints.architectures import ARCHITECTURES
from ones_lib.checkpoints.convert import convert
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
        epilog=f"Architectures: {', '.join(ARCHITECTURES)}.",
    )
    add = parser.add_argument
    add("source", help="folder or Hugging Face hub name of the MoE")
    add("destination", help="folder to make")
    add("--method", default="svd", choices=gathering_methods(), help="gathering (default: svd)")
    add("--d-ff", type=int, help="hidden units of the gathered network (default: an expert's)")
    text = "file, folder, hub name, or 'docstrings' (the embedded text)"
    add(
        "--calibration",
        metavar="TEXT",
        help=f"run the MoE on this text, for methods that use data and statistics: {text}",
    )
    add("--calibration-tokens", type=int, default=4096, metavar="N", help="tokens of it (default: 4096)")
    add("--approximate", action="store_true", help="make a plain dense class where the exact twin is none")
    add("--check", metavar="TEXT", help="measure the perplexity of both models on this text")
    add("--option", action="append", type=_option, default=[], metavar="NAME=VALUE", help="of the method; repeatable")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run :func:`ones_lib.checkpoints.convert` as the command line says."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    options = dict(given.pop("option"))
    try:
        table = convert(**given, **options)
    except (OSError, ValueError, TypeError) as error:
        parser.exit(1, f"{error}\n")
    columns = ["layer", "experts", "d_ff", "shared", "width", "gate_sum", "output_error"]
    print(table[columns].to_string(index=False, float_format="%.4g"))
    print(f"wrote {given['destination']}")


if __name__ == "__main__":
    main()
