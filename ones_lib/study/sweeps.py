"""Sweeps: a notebook is executed once for each cell of a grid, on this machine, on Slurm or on a Dask cluster."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock
from tqdm import tqdm

from ones_lib.data.files import write_text
from ones_lib.study.notebooks import CommandError, check_values, settings
from ones_lib.study.parallel import WHY_KILLED
from ones_lib.study.parameters import hint, read_yaml
from ones_lib.study.records import project_root

SWEEP_KEYS = {
    **{"notebook": str, "profile": str, "parameters": dict, "grid": dict | list},
    **{"table": str, "retries": int, "slurm": dict},
}


def sweep_cells(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cells of a sweep: all combinations of a grid's lists; of several grids one after another, each cell once."""
    grids = sweep["grid"] if isinstance(sweep["grid"], list) else [sweep["grid"]]
    cells = []
    for grid in grids:
        if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
            raise CommandError(f"grid: expected names with lists of values, found {grid!r}")
        cells += [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [cell for i, cell in enumerate(cells) if cell not in cells[:i]]


def cell_name(cell: Mapping[str, Any]) -> str:
    """A cell's folder: readable, and unique."""
    text = "-".join(f"{name}={value}" for name, value in cell.items())
    digest = hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9=.-]+', '_', text)[:80]}-{digest}"


def run_cell(
    command: Sequence[str], environment: Mapping[str, str], cwd: str, log: str, attempts: int
) -> dict[str, Any]:
    """Run a cell's command, again if it fails. Its output goes to a log."""
    started, attempt, code = time.monotonic(), 0, 1
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    while code and attempt < attempts:
        attempt += 1
        with open(log, "w") as out:
            code = subprocess.run(command, env=environment, cwd=cwd, stdout=out, stderr=out, check=False).returncode
    said = Path(log).read_text()
    status = "failed" if code else "found" if "finished before" in said else "done"
    lines = [line for line in said.splitlines() if line.startswith("run_all.sh: ")] or said.splitlines()[-1:]
    error = lines[-1].removeprefix("run_all.sh: ") if code and lines else ""
    error = f"signal {-code}: it died, {WHY_KILLED}" if code < 0 else error
    return {"status": status, "attempts": attempt, "seconds": round(time.monotonic() - started, 1), "error": error}


@contextmanager
def executor(on: str, jobs: int, slurm: Mapping[str, Any]) -> Iterator[Executor]:
    """Where cells run: ``local`` (threads of this process), ``slurm`` (jobs, by dask-jobqueue), or a Dask scheduler's address."""
    if on == "local":
        with ThreadPoolExecutor(jobs) as pool:
            yield pool
        return
    try:
        from distributed import Client

        if on == "slurm":
            from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise CommandError(f"--on {on}: expected the packages distributed and dask-jobqueue ({error})") from error
    if on == "slurm":
        try:
            cluster = SLURMCluster(**slurm)
        except (TypeError, ValueError) as error:
            raise CommandError(f"slurm: {error}") from error
        with cluster, Client(cluster) as client:
            cluster.scale(jobs=jobs)
            yield client.get_executor(pure=False)
        return
    try:
        client = Client(on, timeout=4)
    except (OSError, ValueError) as error:
        expected = "local, slurm or the address of a Dask scheduler"
        raise CommandError(f"--on: expected {expected}, found {on!r} ({error})") from error
    with client:
        yield client.get_executor(pure=False)


def run_sweep(file: Path, jobs: int, on: str, execution: Mapping[str, str]) -> int:
    """Execute a notebook for every cell of a grid, each to ``runs/sweeps/<file's name>/<cell>``.

    ``summary.csv`` there is written after each cell: a row a cell, or as many as its ``table`` has, the CSV among its figures
    (without one, that of the notebook's name). A cell that fails, also when tried again, is left, and the others go on; the
    exit status is then 1. Finished cells are not run again.
    """
    sweep, root = read_yaml(file), project_root()
    if unknown := [name for name in sweep if name not in SWEEP_KEYS]:
        odd = unknown[0]
        raise CommandError(f"{file}: unknown key {odd!r}{hint(odd, SWEEP_KEYS)}")
    if missing := {"notebook", "grid"} - set(sweep):
        raise CommandError(f"{file}: expected {sorted(missing)}, found {sorted(sweep)}")
    for name, value in sweep.items():
        if not isinstance(value, kind := SWEEP_KEYS[name]):
            raise CommandError(f"{file}: {name}: expected {getattr(kind, '__name__', kind)}, found {value!r}")
    if jobs < 1:
        raise CommandError(f"--jobs: expected a number of at least 1, found {jobs}")
    profile, fixed, cells = sweep.get("profile", "demo"), sweep.get("parameters", {}), sweep_cells(sweep)
    for cell in cells:  # all are checked before the first is run
        chosen = settings(profile, [sweep["notebook"]], {**fixed, **cell}, file.name)
        check_values({cell_name(cell): parameters for parameters in chosen.values()})
    folder, table = Path("runs") / "sweeps" / file.stem, sweep.get("table", Path(sweep["notebook"]).stem)
    cores = max(1, (os.cpu_count() or 1) // jobs) if on == "local" else 0
    devices = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]

    def submit(pool: Executor, number: int, cell: Mapping[str, Any]) -> Future:
        to = folder / cell_name(cell)
        parameters = {**fixed, **cell, "figures_dir": str(to / "figures")}
        if cores:
            parameters.setdefault("processes", cores)
        command = [sys.executable, "-m", "ones_lib.study", "--profile", profile, "--only", sweep["notebook"]]
        command += ["--to", str(to.relative_to("runs"))]
        for name, value in parameters.items():
            command += ["-p", name, json.dumps(value)]
        environment = {**os.environ, **execution, **({"OMP_NUM_THREADS": str(cores)} if cores else {})}
        if devices and on == "local":  # those that the user has named, in turns
            environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
        log = str(root / to / "log.txt")
        return pool.submit(run_cell, command, environment, str(root), log, 1 + sweep.get("retries", 0))

    tables: dict[int, pd.DataFrame] = {}
    (root / folder / "locks").mkdir(parents=True, exist_ok=True)
    slurm = {"log_directory": str(root / folder / "slurm"), **sweep.get("slurm", {})}
    with FileLock(root / folder / "locks" / "sweep.lock"), executor(on, jobs, slurm) as pool:
        work = {submit(pool, number, cell): number for number, cell in enumerate(cells)}
        try:
            for done in tqdm(as_completed(work), total=len(work), desc=file.stem, unit="cell"):
                number = work[done]
                tables[number] = _rows(root / folder, cells[number], _outcome(done), table)
                summary = pd.concat([tables[n] for n in sorted(tables)])
                write_text(root / folder / "summary.csv", summary.to_csv(index=False))
        except BaseException:
            for left in work:
                left.cancel()
            raise
    outcomes = pd.concat([t.head(1) for t in tables.values()])["status"].value_counts().to_dict()
    counted = ", ".join(f"{count} {status}" for status, count in outcomes.items())
    print(f"{file.stem}: {len(cells)} cells: {counted}; see {folder / 'summary.csv'}", flush=True)
    made = [root / folder / t["cell"].iloc[0] / "figures" for t in tables.values() if t["status"].iloc[0] != "failed"]
    if made and not (made[0] / f"{table}.csv").exists():
        there = sorted(path.stem for path in made[0].glob("*.csv"))
        print(f"{file.stem}: no scores in it: table: expected one of {there}, found {table!r}", flush=True)
    return int("failed" in outcomes)


def _outcome(done: Future) -> dict[str, Any]:
    try:
        return done.result()
    except Exception as error:  # not the cell's, but of where it ran, such as a worker that is gone
        return {"status": "failed", "attempts": 1, "seconds": 0.0, "error": f"{type(error).__name__}: {error}"}


def _rows(folder: Path, cell: Mapping[str, Any], outcome: Mapping[str, Any], table: str) -> pd.DataFrame:
    """A finished cell's rows of the summary."""
    to = folder / cell_name(cell)
    row = pd.DataFrame([{"cell": to.name, **{k: str(v) for k, v in cell.items()}, **outcome}])
    made = to / "figures" / f"{table}.csv"
    if outcome["status"] != "failed" and made.exists():
        found = pd.read_csv(made)
        row = row.merge(found.drop(columns=[c for c in found if c in row]), how="cross")
    return row
