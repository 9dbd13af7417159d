"""Sweeps: a notebook once a cell of a grid, here, on Dask, on a stand-in for Slurm; and the dry run."""

import json
import os
import stat
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from distributed import LocalCluster
from nbformat.v4 import new_code_cell, new_notebook
from test_bad_input import here  # noqa: F401

from ones_lib.study import command, sweeps

SWEEP = """
notebook: tiny
profile: smoke
table: squares
parameters: {budget: 10}
grid:
  - {rank: [1, 2], seed: [3]}
  - {rank: [13]}
  - {rank: [1], seed: [3]}
"""
CODE = """
import csv
from pathlib import Path

rank, figures = overrides["rank"], Path(overrides["figures_dir"])
assert rank != 13, f"{rank} brings bad luck"
figures.mkdir(parents=True, exist_ok=True)
Path("runs/executed").open("a").write("x")
with open(figures / "squares.csv", "w") as file:
    csv.writer(file).writerows([["square", "seed"], [rank**2 + overrides["budget"], overrides["seed"]]])
"""


@pytest.fixture
def sweep(here):  # noqa: F811
    """A sweep of a notebook that takes no time, in three cells of which one fails; one stands twice in the grids."""
    parameters = 'profile = "demo"\noverrides = {}\ngroups = ["student"]'
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), new_code_cell(CODE)]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), here / "notebooks" / "tiny.ipynb")
    (here / "squares.yaml").write_text(SWEEP)
    return here


@pytest.fixture
def at_hand(monkeypatch):
    """The commands of cells are carried out one after another in this process, which has imported what they take."""
    turn = threading.Lock()

    def run(words, *, env, stdout, **_):
        assert words[:3] == [sys.executable, "-m", "ones_lib.study"]
        assert env["PYTHONPATH"] == os.environ["PYTHONPATH"]
        with turn, redirect_stdout(stdout), redirect_stderr(stdout):
            return SimpleNamespace(returncode=command.main(words[3:]))

    monkeypatch.setattr(sweeps, "subprocess", SimpleNamespace(run=run))


def executed(root):
    return len((root / "runs" / "executed").read_text())


@pytest.mark.processes
def test_a_failing_cell_is_left_the_others_go_on_and_finished_ones_are_not_run_again(sweep, at_hand, capsys):
    (sweep / "squares.yaml").write_text(SWEEP + "retries: 1\n")
    assert command.main(["--sweep", "squares.yaml", "--jobs", "2"]) == 1
    assert "squares: 3 cells: 2 done, 1 failed; see runs/sweeps/squares/summary.csv" in capsys.readouterr().out
    table = pd.read_csv(sweep / "runs/sweeps/squares/summary.csv")
    assert table["status"].tolist() == ["done", "done", "failed"]
    assert table["square"].tolist()[:2] == [11, 14]
    assert table["attempts"].tolist() == [1, 1, 2]
    assert "AssertionError: 13 brings bad luck" in table["error"].iloc[2]
    assert executed(sweep) == 2

    # Again, with a further cell: the finished ones are found.
    (sweep / "squares.yaml").write_text(SWEEP.replace("[1, 2]", "[1, 2, 3]"))
    assert command.main(["--sweep", "squares.yaml", "--jobs", "2"]) == 1
    table = pd.read_csv(sweep / "runs/sweeps/squares/summary.csv")
    assert table["status"].value_counts().to_dict() == {"found": 2, "done": 1, "failed": 1}
    assert executed(sweep) == 3


def test_without_a_table_the_summary_has_that_of_the_notebooks_name(sweep, at_hand, capsys):
    one = SWEEP.replace("table: squares\n", "").replace("  - {rank: [13]}\n", "")
    (sweep / "squares.yaml").write_text(one)
    assert command.main(["--sweep", "squares.yaml"]) == 0
    assert "squares: no scores in it: table: expected one of ['squares'], found 'tiny'" in capsys.readouterr().out
    assert "square" not in pd.read_csv(sweep / "runs/sweeps/squares/summary.csv")
    (sweep / "notebooks" / "tiny.ipynb").rename(sweep / "notebooks" / "squares.ipynb")
    (sweep / "squares.yaml").write_text(one.replace("notebook: tiny", "notebook: squares.ipynb"))
    assert command.main(["--sweep", "squares.yaml"]) == 0
    assert "no scores" not in capsys.readouterr().out
    assert pd.read_csv(sweep / "runs/sweeps/squares/summary.csv")["square"].tolist() == [11, 14]


def test_cells_on_a_dask_scheduler(sweep, at_hand):
    (sweep / "squares.yaml").write_text(SWEEP.replace("  - {rank: [13]}\n", ""))
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster:
        assert command.main(["--sweep", "squares.yaml", "--on", cluster.scheduler_address]) == 0
    assert pd.read_csv(sweep / "runs/sweeps/squares/summary.csv")["square"].tolist() == [11, 14]


@pytest.mark.processes
def test_cells_as_slurm_jobs(sweep, monkeypatch):
    """With a stand-in for Slurm's commands, which runs a job's script at once."""
    (sweep / "bin").mkdir()
    for name, text in {
        "sbatch": f'cp "$1" {sweep}/job.sh\nbash {sweep}/job.sh >{sweep}/job.log 2>&1 &\necho "Submitted batch job $!"',
        "scancel": 'kill "$@"',
    }.items():
        path = sweep / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{sweep / 'bin'}{os.pathsep}{os.environ['PATH']}")
    slurm = json.dumps({"cores": 1, "memory": "4GB", "walltime": "00:10:00", "interface": "lo", "queue": "short"})
    (sweep / "squares.yaml").write_text(
        SWEEP.partition("  - {rank: [13]}\n")[0].replace("[1, 2]", "[2]") + f"slurm: {slurm}"
    )
    assert command.main(["--sweep", "squares.yaml", "--on", "slurm"]) == 0
    assert pd.read_csv(sweep / "runs/sweeps/squares/summary.csv")["square"].tolist() == [14]
    job = (sweep / "job.sh").read_text()
    assert "#SBATCH -p short" in job
    assert "#SBATCH -t 00:10:00" in job


def test_gpus_that_are_named_are_taken_in_turns(sweep, monkeypatch):
    given = []
    done = {"status": "done", "attempts": 1, "seconds": 0, "error": ""}
    monkeypatch.setattr(sweeps, "run_cell", lambda command, environment, *_: given.append(environment) or done)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert command.main(["--sweep", "squares.yaml", "--jobs", "2", "--launch", "true"]) == 0
    assert [e["CUDA_VISIBLE_DEVICES"] for e in given] == ["2", "5", "2"]
    assert {e["ONES_LAUNCH"] for e in given} == {"true"}


def test_names_of_cells_are_folders_of_their_own():
    cells = [{"a": "../../x"}, {"a": "..//..x"}, {"a": [0, 1], "b": None}, {"a": "y" * 300}]
    names = [sweeps.cell_name(cell) for cell in cells]
    assert len(set(names)) == 4
    assert all("/" not in name and len(name) < 100 and not name.startswith(".") for name in names)
