"""Notebooks in batch, through papermill, from the project's root: ``python ones_lib/batch.py``; ``run_all.sh`` calls it.

It imports nothing else of the library, so that it starts at once.

Each notebook is executed to ``runs/<profile>/<notebook>.ipynb``. One that has been executed with the same cells, parameters
and library, and whose figures are still there, is not executed again.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from papermill.exceptions import PapermillExecutionError

PROFILES = ("smoke", "demo", "paper")
HOW = ("allow_training", "processes", "redo_before")  # parameters that decide how work is done, not what comes of it


class BatchError(ValueError):
    """What was asked for cannot be run; the message is for the person who asked."""


def declared_parameters(notebook: Path) -> dict[str, Any]:
    """Parameters of a notebook's tagged cell with their defaults (None where a default is no plain value)."""
    result = {}
    for name, parameter in papermill.inspect_notebook(str(notebook)).items():
        try:
            result[name] = ast.literal_eval(parameter["default"])
        except (ValueError, SyntaxError):
            result[name] = None
    return result


def choose_notebooks(folder: Path, only: Sequence[str]) -> list[Path]:
    """Notebooks ``NN_name.ipynb`` in order; ``only`` names some by number or by name."""
    notebooks = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    chosen = [n for n in notebooks if not only or {n.stem, n.name, n.stem[:2]} & set(only)]
    for wanted in only:
        if not any(wanted in (n.stem, n.name, n.stem[:2]) for n in notebooks):
            raise BatchError(f"--only: no notebook {wanted!r}, expected of {[n.stem for n in notebooks]}")
    return chosen


def check_parameters(given: Mapping[str, Any], declared: Mapping[str, Any], source: str) -> None:
    """Raise BatchError for a name that no notebook declares, or a value whose type is not the default's."""
    for name, value in given.items():
        if name not in declared:
            close = difflib.get_close_matches(name, declared, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f", expected one of {sorted(declared)}"
            raise BatchError(f"{source}: no chosen notebook has a parameter {name!r}{hint}")
        default = declared[name]
        if default is None or value is None:
            continue
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise BatchError(f"{source}: {name}: expected {type(default).__name__} like {default!r}, found {value!r}")


def parse_value(text: str) -> Any:
    """A command-line value as YAML reads it; numbers such as 8e-3, which YAML takes for text, as Python does."""
    value = yaml.safe_load(text) if text else ""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def fingerprint(notebook: Path, parameters: Mapping[str, Any]) -> str:
    """Hash of what decides a notebook's outcome: its cells, its parameters, the library's sources."""
    parameters = {name: value for name, value in parameters.items() if name not in HOW}
    cells = [(cell.cell_type, cell.source) for cell in nbformat.read(notebook, as_version=4).cells]
    digest = hashlib.sha256(json.dumps([cells, parameters], sort_keys=True).encode())
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def finished(output: Path, print_of_inputs: str) -> bool:
    """Whether ``output`` is this notebook with these inputs, executed to its end, and its files are still there."""
    if not output.exists():
        return False
    note = nbformat.read(output, as_version=4).metadata.get("ones_lib", {})
    return note.get("fingerprint") == print_of_inputs and all(Path(f).exists() for f in note.get("files", []))


def execute(notebook: Path, output: Path, parameters: Mapping[str, Any], root: Path) -> None:
    """Execute one notebook, its output streaming to the terminal; what fails is kept as ``<name>.failed.ipynb``."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(".failed.ipynb")
    started = time.time()
    papermill.execute_notebook(
        str(notebook),
        str(unfinished),
        parameters=dict(parameters),
        kernel_name="python3",
        cwd=str(root),
        progress_bar=False,
        stdout_file=sys.stdout,
        stderr_file=sys.stderr,
    )
    executed = nbformat.read(unfinished, as_version=4)
    figures = root / parameters.get("figures_dir", "figures")
    files = [str(f) for f in sorted(figures.glob("*")) if f.stat().st_mtime >= started]
    executed.metadata["ones_lib"] = {"fingerprint": fingerprint(notebook, parameters), "files": files}
    nbformat.write(executed, unfinished)
    os.replace(unfinished, output)


def run(profile: str, only: Sequence[str], overrides: Mapping[str, Any], force: bool, figures: bool) -> None:
    """Execute the chosen notebooks in order, with the profile's parameters and the overrides.

    With ``figures`` all are executed, several at a time, and nothing is trained.
    """
    root = Path.cwd()
    notebooks = choose_notebooks(root / "notebooks", only)
    every = {n: declared_parameters(n) for n in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))}
    profile_file = root / "notebooks" / "profiles" / f"{profile}.yaml"
    values = yaml.safe_load(profile_file.read_text())
    check_parameters(values, {k: v for d in every.values() for k, v in d.items()}, profile_file.name)
    check_parameters(overrides, {k: v for n in notebooks for k, v in every[n].items()}, "-p")
    values = {**values, **overrides}
    if force:
        values["redo_before"] = datetime.now(UTC).isoformat(timespec="seconds")
    if figures:
        values["allow_training"] = False

    def execute_one(number: int, notebook: Path) -> None:
        parameters = {name: values[name] for name in every[notebook] if name in values}
        output = root / "runs" / profile / notebook.name
        head = f"[{number}/{len(notebooks)}] {notebook.name}"
        shown = output.relative_to(root)
        if not force and not figures and finished(output, fingerprint(notebook, parameters)):
            print(f"{head}: finished before, see {shown} (--force makes it again)", flush=True)
            return
        print(f"{head}: profile {profile}", flush=True)
        started = time.monotonic()
        try:
            execute(notebook, output, parameters, root)
        except PapermillExecutionError as error:
            failed = output.with_suffix(".failed.ipynb").relative_to(root)
            raise BatchError(
                f"{notebook.name} failed in cell {error.cell_index + 1} (code cell [{error.exec_count}]):"
                f" {error.ename}: {error.evalue}\n  the notebook up to there: {failed}"
            ) from error
        print(f"{head}: done in {time.monotonic() - started:.0f} s, see {shown}", flush=True)

    if not figures:  # in this thread, where an interrupt ends the notebook at once
        for number, notebook in enumerate(notebooks, start=1):
            execute_one(number, notebook)
        return
    # Training fills the cores from inside a notebook; drawing does not, so notebooks share them, a thread each.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = [pool.submit(execute_one, number, notebook) for number, notebook in enumerate(notebooks, start=1)]
        try:
            for done in as_completed(work):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="run_all.sh", description="Execute the study's notebooks and write their figures.", allow_abbrev=False
    )
    parser.add_argument(
        "--profile", choices=PROFILES, default="demo", help="parameter file in notebooks/profiles (demo)"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NN", help="notebooks by number or name, such as 01 02"
    )
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a notebook parameter"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--force", action="store_true", help="do finished work again, trainings included")
    again.add_argument(
        "--figures", action="store_true", help="draw every figure again from the records, without training"
    )
    options = parser.parse_args(arguments)
    try:
        overrides = {name: parse_value(value) for name, value in options.p}
        run(options.profile, options.only, overrides, options.force, options.figures)
    except BatchError as error:
        print(f"run_all.sh: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("run_all.sh: interrupted; run it again to go on where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
