"""Records listed, found by name, and compared: the command ``python -m ones_lib.records``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from ones_lib.checkpoints.terminal import add_version, exit_status, one_line, path
from ones_lib.metrics import LOWER_IS_BETTER
from ones_lib.study.naming import describe, record_name
from ones_lib.study.records import Record, Records, compare, project_root

MAIN_METRICS = ("f1", "loss", "accuracy")  # the first that a record has is the one to judge it by
SHORT = 6  # digits of a hash in a listing
FILTERS = ("kind", "data", "method")
SAME = ["data", "task", "kind", "model", "metric"]  # of these only the best is kept, if asked


def record_roots() -> list[Path]:
    """The project's folders of records: ``runs/records`` and ``runs/*/records``."""
    runs = project_root() / "runs"
    return [folder for folder in (runs / "records", *sorted(runs.glob("*/records"))) if folder.is_dir()]


def find_record(name: str, roots: Iterable[Path]) -> Record:
    """The record in the folder ``name``, or the one in ``roots`` whose folder's name, hash, or name in a listing starts so.

    Raises:
        FileNotFoundError, ValueError: there is none, or more than one.
    """
    if (folder := Path(name).expanduser()).is_dir():
        return Record(folder.resolve())
    roots = list(roots)
    every = {_digest(record): record for root in reversed(roots) for record in Records(root).all("*")}
    found = [r for digest, r in every.items() if r.folder.name.startswith(name) or digest.startswith(name)]
    found = found or [record for record in every.values() if _named(record).startswith(name)]
    where = ", ".join(str(root) for root in roots) or "runs/records and runs/*/records"
    if not found:
        expected = f"a record's folder, or the start of the name or hash of one of the {len(every)} in {where}"
        raise FileNotFoundError(
            f"record: expected {expected}, found {name!r}; python -m ones_lib.records [--records FOLDER] lists them"
        )
    if len(found) > 1:
        names = ", ".join(_short(record) for record in found[:5])
        raise ValueError(f"record: expected the start of one name in {where}, found {name!r} of {len(found)}: {names}")
    return found[0]


def _digest(record: Record) -> str:
    return record.folder.name.rpartition("-")[2]


def _named(record: Record, digits: int | None = None) -> str:
    return record_name(record.config, _digest(record)[:digits])


def _short(record: Record) -> str:
    """A record's readable name with the start of its hash, also where its folder has the hash alone."""
    return _named(record, SHORT)


def overview(records: Iterable[Record]) -> tuple[pd.DataFrame, list[str]]:
    """One row a record: ``record, kind, data, task, model, method, seed, steps, metric, score, finished, folder``; and the
    errors of records that cannot be read.

    Columns as in :func:`ones_lib.study.naming.describe`; ``score`` is the main metric, in per cent, a loss in nats. Tables,
    such as of timings, have none.
    """
    rows, errors = [], []
    for record in records:
        try:
            about, result = describe(record.config), record.result
            metrics = result.get("metrics", {})
            metric = next((name for name in MAIN_METRICS if name in metrics), None)
            score = None if metric is None else metrics[metric] * (1 if metric in LOWER_IS_BETTER else 100)
            made = {"metric": metric, "score": score, "finished": result["finished"][:16].replace("T", " ")}
            rows.append({"record": _short(record), **about, **made, "folder": str(record.folder.parent)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            errors.append(f"{record.folder}: left out, cannot be read: {type(error).__name__}: {error}")
    columns = ["record", "kind", "data", "task", "model", "method", "seed", "steps", "metric", "score", "finished"]
    table = pd.DataFrame(rows, columns=[*columns, "folder"])
    order = ["folder", "data", "kind", "task", "model", "method", "steps", "seed"]
    return table.astype({"seed": "Int64", "steps": "Int64"}).sort_values(order, ignore_index=True), errors


def best(table: pd.DataFrame) -> pd.DataFrame:
    """The record with the best score of each data, task, kind and model in an :func:`overview`."""
    sign = table["metric"].isin(LOWER_IS_BETTER).map({True: -1, False: 1})
    scored = table.assign(rank=table["score"] * sign).dropna(subset="rank")
    kept = scored.loc[scored.groupby(SAME, dropna=False, sort=False)["rank"].idxmax()]
    return kept.drop(columns="rank").reset_index(drop=True)


# --- command -----------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """List or compare records as the command line says; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in ("list", "compare", "-h", "--help", "--version"):
        two = len(given) == 2 and not any(word.startswith("-") for word in given)
        given = ["compare" if two else "list", *given]
    parser = argparse.ArgumentParser(
        prog="python -m ones_lib.records",
        description="List the records (the default), or compare two of them.",
    )
    add_version(parser)
    commands = parser.add_subparsers(dest="command")
    shared = argparse.ArgumentParser(add_help=False)
    where = "a folder of records; may be repeated (runs/records and runs/*/records)"
    shared.add_argument("--records", type=path, action="append", metavar="FOLDER", help=where)
    listed = commands.add_parser("list", parents=[shared], help="a line for each record", allow_abbrev=False)
    for name in FILTERS:
        listed.add_argument(f"--{name}", default="", help=f"only of this {name}")
    listed.add_argument("--best", action="store_true", help="only the best of each data, task, kind and model")
    compared = commands.add_parser(
        "compare", parents=[shared], help="what differs between two records; exits with 1 if anything does"
    )
    for name in ("record", "other"):
        compared.add_argument(name, help="folder of a record, or the start of its name or hash")
    options = parser.parse_args(given)
    options.records = options.records or record_roots()
    work = _compare if options.command == "compare" else _list
    return exit_status(lambda: work(options), lambda error: f"records: {one_line(error)}", failed=2)


def _list(options: argparse.Namespace) -> int:
    if odd := next((root for root in options.records if not root.is_dir()), None):
        raise FileNotFoundError(f"--records: expected a folder, found none: {odd}")
    table, errors = overview(record for root in options.records for record in Records(root).all("*"))
    for error in errors:
        print(f"records: {error}", file=sys.stderr)
    if table.empty:
        raise FileNotFoundError(
            "expected records in runs/records or runs/*/records, or in --records FOLDER, found none"
        )
    for name in FILTERS:
        wanted, there = getattr(options, name), sorted(table[name].dropna().unique())
        if wanted and wanted not in there:
            raise ValueError(f"--{name}: expected one of {', '.join(there)}, found {wanted!r}")
        table = table[table[name] == wanted] if wanted else table
    table = best(table) if options.best else table
    table["folder"] = [_shown(Path(folder)) for folder in table["folder"]]
    table["score"] = table["score"].map("{:.2f}".format, na_action="ignore")
    table = table.dropna(axis="columns", how="all").astype(object)
    print(table.where(table.notna(), "").to_string(index=False))
    return 0


def _shown(folder: Path) -> str:
    """A path from the project's root, if it is in there."""
    folder, root = folder.resolve(), project_root().resolve()
    return str(folder.relative_to(root) if folder.is_relative_to(root) else folder)


def _compare(options: argparse.Namespace) -> int:
    pair = [
        Record(Path(name).expanduser()) if Path(name).parent != Path() else find_record(name, options.records)
        for name in (options.record, options.other)
    ]
    table = compare(*pair)
    if table.empty:
        print("no difference except in times")
        return 0
    with pd.option_context("display.max_colwidth", 60, "display.width", 200):
        print(table.to_string(index=False))
    return 1
