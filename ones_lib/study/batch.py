"""Notebooks in batch, through papermill, from the project's root: ``python ones_lib/study/batch.py``; ``run_all.sh`` calls it.

It imports nothing else of the library, so that it starts at once.

Each notebook is executed to ``runs/<profile>/<notebook>.ipynb``. One that has been executed with the same cells, parameters
and library, and whose figures are still there, is not executed again. What a second run of the same notebook finds under way
it waits for.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from filelock import FileLock
from nbclient import NotebookClient
from papermill.exceptions import PapermillExecutionError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from tqdm import tqdm

PROFILES = ("smoke", "demo", "paper")
HOW = ("allow_training", "processes", "redo_before")  # parameters that decide how work is done, not what comes of it


class BatchError(ValueError):
    """What was asked for cannot be run; the message is for the person who asked."""


@cache
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
    """Notebooks ``NN_name.ipynb`` in order; ``only`` names some by number or by name, others among them."""
    notebooks = sorted(folder.glob("*.ipynb"))
    names = {n: {n.stem, n.name, n.stem[:2]} if n.stem[:2].isdigit() else {n.stem, n.name} for n in notebooks}
    for wanted in only:
        if not any(wanted in name for name in names.values()):
            raise BatchError(f"--only: no notebook {wanted!r}, expected of {[n.stem for n in notebooks]}")
    return [n for n in notebooks if (names[n] & set(only) if only else n.stem[:2].isdigit())]


def check_parameters(given: Mapping[str, Any], declared: Mapping[str, Any], source: str) -> None:
    """Raise BatchError for a name that no notebook declares, or a value whose type is not the default's."""
    for name, value in given.items():
        if name not in declared:
            raise BatchError(f"{source}: no chosen notebook has a parameter {name!r}{_hint(name, declared)}")
        default = declared[name]
        if default is None or value is None:
            continue
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise BatchError(f"{source}: {name}: expected {type(default).__name__} like {default!r}, found {value!r}")


def _hint(name: str, known: Collection[str]) -> str:
    """What may have been meant by a name that is not known."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f", expected one of {sorted(known)}"


def check_values(given: Sequence[tuple[str, Path, Mapping[str, Any]]]) -> None:
    """Raise BatchError for the first thing that ``ones_lib/checks.py`` finds wrong with parameters of notebooks, each with a name
    for people, before any of them runs."""
    if not given:
        return
    declared = {notebook: declared_parameters(notebook) for notebook in {notebook for _, notebook, _ in given}}
    parameters = json.dumps([(name, declared[notebook] | dict(values)) for name, notebook, values in given])
    command = [sys.executable, "-m", "ones_lib.study.checks"]
    checked = subprocess.run(command, input=parameters, capture_output=True, text=True, check=False)
    if checked.returncode:
        raise BatchError(checked.stdout.strip() or checked.stderr.strip().splitlines()[-1])


def parse_value(text: str) -> Any:
    """A command-line value as YAML reads it; numbers such as 8e-3, which YAML takes for text, as Python does."""
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise BatchError(f"-p: expected a value in YAML, found {text!r}") from error
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
    for source in sorted(Path(__file__).parents[1].rglob("*.py")):
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


def settings(
    root: Path, profile: str, only: Sequence[str], overrides: Mapping[str, Any], source: str = "-p"
) -> dict[Path, dict[str, Any]]:
    """The parameters of the chosen notebooks, in order: the profile's and the overrides, which come from ``source``, checked."""
    notebooks = choose_notebooks(root / "notebooks", only)
    every = {n: declared_parameters(n) for n in sorted((root / "notebooks").glob("*.ipynb"))}
    profile_file = root / "notebooks" / "profiles" / f"{profile}.yaml"
    values = read_yaml(profile_file)
    check_parameters(values, {k: v for d in every.values() for k, v in d.items()}, profile_file.name)
    check_parameters(overrides, {k: v for n in notebooks for k, v in every[n].items()}, source)
    values = {**values, **overrides}
    return {n: {name: values[name] for name in every[n] if name in values} for n in notebooks}


def read_yaml(file: Path) -> dict[str, Any]:
    """A file's names and values."""
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise BatchError(f"{file}: expected YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise BatchError(f"{file}: expected names with values, found {type(values).__name__}")
    return values


def run(
    profile: str, only: Sequence[str], overrides: Mapping[str, Any], force: bool, figures: bool, to: str = ""
) -> None:
    """Execute the chosen notebooks in order, with the profile's parameters and the overrides, to ``runs/<to or profile>``.

    With ``figures`` all are executed, several at a time, and nothing is trained.
    """
    root = Path.cwd()
    chosen = settings(root, profile, only, overrides)
    folder = root / "runs" / (to or profile)
    there = next(f for f in (folder, *folder.parents) if f.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise BatchError(f"{folder}: expected a folder that can be written to, found none: {there}")

    if not to:  # a sweep has had all of its cells checked
        open_ones = {n: p for n, p in chosen.items() if not finished(folder / n.name, fingerprint(n, p))}
        check_values([(n.name, n, given) for n, given in open_ones.items()])

    def execute_one(number: int, notebook: Path) -> None:
        parameters = dict(chosen[notebook])
        if force:
            parameters["redo_before"] = datetime.now(UTC).isoformat(timespec="seconds")
        if figures:
            parameters["allow_training"] = False
        output = folder / notebook.name
        head = f"[{number}/{len(chosen)}] {notebook.name}"
        shown = output.relative_to(root)
        locks = folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{notebook.stem}.lock"):
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
        for number, notebook in enumerate(chosen, start=1):
            execute_one(number, notebook)
        return
    # Training fills the cores from inside a notebook; drawing does not, so notebooks share them, a thread each.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = [pool.submit(execute_one, number, notebook) for number, notebook in enumerate(chosen, start=1)]
        try:
            for done in as_completed(work):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# --- before anyone pays for it ---------------------------------------------------------------------------------------


WITHOUT_RESULTS = ("AttributeError", "TypeError")  # errors of what works with results, when they are None


def dry_run(profile: str, only: Sequence[str], overrides: Mapping[str, Any], execution: Mapping[str, str]) -> int:
    """Ask the chosen notebooks what they would train, and try each of it by one step; see ``ones_lib/dry_run.py``.

    A notebook is executed with a plan in the place of its records: what a cell asks for is written down, nothing is trained,
    and cells that would read a result have none.
    """
    root, plan = Path.cwd(), Path.cwd() / "runs" / f"plan-{os.getpid()}.json"
    plan.parent.mkdir(exist_ok=True)
    environment = os.environ | dict(execution) | {"ONES_PLAN": str(plan)}
    try:
        chosen = settings(root, profile, only, overrides)
        check_values([(n.name, n, given) for n, given in chosen.items()])
        for notebook, parameters in chosen.items():
            cells = load_notebook_node(str(notebook))
            if not any(".run(" in cell.source for cell in cells.cells):
                print(f"{notebook.name}: trains nothing", flush=True)
                continue
            print(f"{notebook.name}: what it would train", flush=True)
            given = parameterize_notebook(cells, parameters)
            resources = {"metadata": {"path": str(root)}}
            client = NotebookClient(given, kernel_name="python3", allow_errors=True, resources=resources)
            executed = client.execute(env=environment).cells
            asking = [i for i, cell in enumerate(executed) if ".run(" in cell.source]
            for cell in [*executed[: asking[0]], *(executed[i] for i in asking)]:  # the others only work with results
                for error in (output for output in cell.get("outputs", []) if output.output_type == "error"):
                    if error.ename not in WITHOUT_RESULTS:
                        raise BatchError(f"{notebook.name}: {error.ename}: {error.evalue}")
        if not plan.exists():
            print("nothing to train", flush=True)
            return 0
        command = [sys.executable, "-m", "ones_lib.study.dry_run", str(plan)]
        code = subprocess.run(command, env=environment, check=False).returncode
        if code < 0:
            raise BatchError(f"--dry-run: ended by signal {-code}; 9 is what a system sends that has no more memory")
        return code
    finally:
        plan.unlink(missing_ok=True)


# --- sweeps ----------------------------------------------------------------------------------------------------------

SWEEP_KEYS = {"notebook", "profile", "parameters", "grid", "table", "retries", "slurm"}


def sweep_cells(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cells of a sweep: all combinations of a grid's lists, grid by grid if there are several, each once."""
    grids = sweep["grid"] if isinstance(sweep["grid"], list) else [sweep["grid"]]
    cells = []
    for grid in grids:
        if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
            raise BatchError(f"grid: expected names with lists of values, found {grid!r}")
        cells += [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [cell for i, cell in enumerate(cells) if cell not in cells[:i]]


def cell_name(cell: Mapping[str, Any]) -> str:
    """A folder's name for a cell, for people, and unlike any other's."""
    text = "-".join(f"{name}={value}" for name, value in cell.items())
    digest = hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9=.-]+', '_', text)[:80]}-{digest}"


def run_cell(
    command: Sequence[str], environment: Mapping[str, str], cwd: str, log: str, attempts: int
) -> dict[str, Any]:
    """Run a cell's command, again if it fails; what comes of it goes to a log. Sent to where it is to run, so it stands alone."""
    import subprocess
    import time
    from pathlib import Path

    started = time.monotonic()
    attempt = 0
    code = 1
    while code and attempt < attempts:
        attempt += 1
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as out:
            code = subprocess.run(command, env=environment, cwd=cwd, stdout=out, stderr=out, check=False).returncode
    said = Path(log).read_text()
    status = "failed" if code else "found" if "finished before" in said else "done"
    lines = [line for line in said.splitlines() if line.startswith("run_all.sh: ")] or said.splitlines()[-1:]
    error = lines[-1].removeprefix("run_all.sh: ") if code and lines else ""
    return {"status": status, "attempts": attempt, "seconds": round(time.monotonic() - started, 1), "error": error}


@contextmanager
def executor(on: str, jobs: int, slurm: Mapping[str, Any]) -> Iterator[Executor]:
    """What runs cells: threads on this machine, the workers of a Dask scheduler by its address, or Slurm jobs by dask-jobqueue."""
    if on == "local":
        with ThreadPoolExecutor(jobs) as pool:
            yield pool
        return
    try:
        from distributed import Client

        if on == "slurm":
            from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise BatchError(f"--on {on}: expected the packages distributed and dask-jobqueue ({error})") from error
    if on == "slurm":
        try:
            cluster = SLURMCluster(**slurm)
        except (TypeError, ValueError) as error:
            raise BatchError(f"slurm: {error}") from error
        with cluster, Client(cluster) as client:
            cluster.scale(jobs=jobs)
            yield client.get_executor(pure=False)
        return
    try:
        client = Client(on, timeout=4)
    except (OSError, ValueError) as error:
        raise BatchError(
            f"--on: expected local, slurm or the address of a Dask scheduler, found {on!r} ({error})"
        ) from error
    with client:
        yield client.get_executor(pure=False)


def run_sweep(file: Path, jobs: int, on: str, execution: Mapping[str, str]) -> int:
    """Execute a notebook once a cell of a grid, each to ``runs/sweeps/<file's name>/<cell>``, and write ``summary.csv`` there
    after each: a row a cell, or as many as its ``table`` has.

    A cell that fails, also when tried again, is left, and the others go on; the exit status is then 1. Cells that are finished
    are not run again.
    """
    import pandas as pd  # not for what needs no tables

    sweep, root = read_yaml(file), Path.cwd()
    if unknown := set(sweep) - SWEEP_KEYS:
        odd = sorted(unknown)[0]
        raise BatchError(f"{file}: found {odd!r}{_hint(odd, SWEEP_KEYS)}")
    if missing := {"notebook", "grid"} - set(sweep):
        raise BatchError(f"{file}: expected {sorted(missing)}, found {sorted(sweep)}")
    if jobs < 1:
        raise BatchError(f"--jobs: expected a number of at least 1, found {jobs}")
    profile, fixed, cells = sweep.get("profile", "demo"), sweep.get("parameters", {}), sweep_cells(sweep)
    given: list[tuple[str, Path, Mapping[str, Any]]] = []
    if profile not in PROFILES:
        raise BatchError(f"{file}: profile: expected of {PROFILES}, found {profile!r}")
    for cell in cells:  # all of them before the first is run
        chosen = settings(root, profile, [sweep["notebook"]], {**fixed, **cell}, file.name)
        given += [(cell_name(cell), notebook, values) for notebook, values in chosen.items()]
    check_values(given)
    declared = declared_parameters(next(iter(chosen)))
    folder = Path("runs") / "sweeps" / file.stem
    cores = max(1, (os.cpu_count() or 1) // jobs) if on == "local" else 0
    devices = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    tables: dict[int, pd.DataFrame] = {}

    def submit(pool: Executor, number: int, cell: Mapping[str, Any]) -> Future:
        to = folder / cell_name(cell)
        parameters = {**fixed, **cell, "figures_dir": str(to / "figures")}
        if cores and "processes" in declared:
            parameters["processes"] = cores
        command = [sys.executable, "-P", str(Path(__file__)), "--profile", profile, "--only", sweep["notebook"]]
        command += ["--to", str(to.relative_to("runs"))]
        for name, value in parameters.items():
            command += ["-p", name, json.dumps(value)]
        environment = {**os.environ, **execution, **({"OMP_NUM_THREADS": str(cores)} if cores else {})}
        if devices and on == "local":  # those that the user has named, in turns
            environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
        log = str(root / to / "log.txt")
        return pool.submit(run_cell, command, environment, str(root), log, 1 + sweep.get("retries", 0))

    def note(number: int, outcome: Mapping[str, Any]) -> None:
        to = root / folder / cell_name(cells[number])
        row = pd.DataFrame([{"cell": to.name, **{k: str(v) for k, v in cells[number].items()}, **outcome}])
        table = to / "figures" / f"{sweep.get('table')}.csv"
        if outcome["status"] != "failed" and sweep.get("table") and table.exists():
            found = pd.read_csv(table)
            row = row.merge(found.drop(columns=[c for c in found if c in row]), how="cross")
        tables[number] = row
        beside = root / folder / "summary.csv.tmp"
        pd.concat([tables[n] for n in sorted(tables)]).to_csv(beside, index=False)
        os.replace(beside, beside.with_suffix(""))

    (root / folder / "locks").mkdir(parents=True, exist_ok=True)
    slurm = {"log_directory": str(root / folder / "slurm"), **sweep.get("slurm", {})}
    with FileLock(root / folder / "locks" / "sweep.lock"), executor(on, jobs, slurm) as pool:
        work = {submit(pool, number, cell): number for number, cell in enumerate(cells)}
        try:
            for done in tqdm(as_completed(work), total=len(work), desc=file.stem, unit="cell"):
                try:
                    outcome = done.result()
                except Exception as error:  # not of the cell, but of where it ran, such as a worker that is gone
                    outcome = {
                        "status": "failed",
                        "attempts": 1,
                        "seconds": 0.0,
                        "error": f"{type(error).__name__}: {error}",
                    }
                note(work[done], outcome)
        except BaseException:
            for left in work:
                left.cancel()
            raise
    outcomes = pd.concat([t.head(1) for t in tables.values()])["status"].value_counts().to_dict()
    counted = ", ".join(f"{count} {status}" for status, count in outcomes.items())
    print(f"{file.stem}: {len(cells)} cells: {counted}; see {folder / 'summary.csv'}", flush=True)
    return int("failed" in outcomes)


# --- the command -----------------------------------------------------------------------------------------------------


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
    again.add_argument(
        "--dry-run", action="store_true", help="try each training by one step, and say what all of it would cost"
    )
    again.add_argument("--sweep", type=Path, metavar="FILE", help="execute a notebook for every cell of a grid")
    parser.add_argument("--jobs", type=int, default=1, help="cells of a sweep at a time (1)")
    parser.add_argument("--on", default="local", help="where a sweep runs: local, slurm, or a Dask scheduler's address")
    parser.add_argument("--launch", default="", help="what starts the processes of a training: 'torchrun ...'")
    parser.add_argument("--device-batch", type=int, default=0, help="examples that a process takes at a time (all)")
    parser.add_argument("--shard", action="store_true", help="spread models over the processes (FSDP)")
    parser.add_argument("--deterministic", action="store_true", help="deterministic algorithms alone")
    parser.add_argument("--to", default="", help=argparse.SUPPRESS)  # of a sweep's cell
    options = parser.parse_args(arguments)
    try:
        overrides = {name: parse_value(value) for name, value in options.p}
        execution = {
            "ONES_LAUNCH": options.launch,
            "ONES_DEVICE_BATCH": str(options.device_batch),
            "ONES_SHARD": str(int(options.shard)),
            "ONES_DETERMINISTIC": str(int(options.deterministic)),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8" if options.deterministic else "",
        }
        execution = {name: value for name, value in execution.items() if value not in ("", "0")}
        if options.device_batch < 0:
            raise BatchError(f"--device-batch: expected a number of at least 0, found {options.device_batch}")
        if options.shard and not options.launch:
            raise BatchError("--shard: expected --launch 'torchrun ...', found none")
        if options.launch and not shutil.which(shlex.split(options.launch)[0], path=_path()):
            raise BatchError(f"--launch: expected a command, found none called {shlex.split(options.launch)[0]!r}")
        if options.sweep is not None:
            if options.only or options.p or options.profile != "demo":
                raise BatchError("--sweep: expected notebook, profile and parameters in its file, not beside it")
            return run_sweep(options.sweep, options.jobs, options.on, execution)
        if options.dry_run:
            return dry_run(options.profile, options.only, overrides, execution)
        os.environ.update(execution)
        run(options.profile, options.only, overrides, options.force, options.figures, options.to)
    except BatchError as error:
        print(f"run_all.sh: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # no room, no permission: the file is in it
        print(f"run_all.sh: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("run_all.sh: interrupted; run it again to go on where it stopped", file=sys.stderr)
        return 130
    return 0


def _path() -> str:
    """Where commands are looked for: beside this Python first, as torchrun is."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


if __name__ == "__main__":
    sys.exit(main())
