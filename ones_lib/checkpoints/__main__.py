"""TODO."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from ones_lib.checkpoints.architectures import ARCHITECTURES
from ones_lib.checkpoints.convert import convert
from ones_lib.gathering.registry import gathering_methods

# --- command line ----------------------------------------------------------------------------------------------------


def _option(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of :func:`convert`."""
    twins = "\n".join(
        f"  {kind:20s} -> {a.twin}{' with one expert' if a.one_expert else ''}"
        f"{f' (--approximate: {a.approximation.twin})' if a.approximation else ''}"
        for kind, a in ARCHITECTURES.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m ones_lib.checkpoints.convert",
        description="Make an MoE checkpoint dense: gather the experts of every layer, copy the rest.",
        epilog=f"architectures:\n{twins}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="folder or Hugging Face hub name of the MoE")
    parser.add_argument("destination", help="folder to make")
    parser.add_argument("--method", default="svd", choices=gathering_methods(), help="gathering (default: svd)")
    parser.add_argument("--d-ff", type=int, help="hidden neurons of the gathered network (default: an expert's)")
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        help="file, folder, hub name, or 'docstrings' (the embedded text) to run the MoE on: for methods that look at data,"
        " router statistics and output errors",
    )
    parser.add_argument("--calibration-tokens", type=int, default=4096, metavar="N", help="(default: 4096)")
    parser.add_argument("--approximate", action="store_true", help="a plain dense class where the exact twin is none")
    parser.add_argument("--check", metavar="TEXT", help="text to measure the perplexity of both models on")
    parser.add_argument(
        "--option",
        action="append",
        type=_option,
        default=[],
        metavar="NAME=VALUE",
        help="an option of the method, such as scale=1.0 or rank=64; may be repeated",
    )
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
