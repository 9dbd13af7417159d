"""The command behind ``run_all.sh``: executes notebooks, makes a dry run, or runs a sweep."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import ones_lib
from ones_lib.checkpoints.terminal import exit_status, one_line, path
from ones_lib.study.notebooks import CommandError, dry_run, run
from ones_lib.study.parameters import load_yaml
from ones_lib.study.running import Execution
from ones_lib.study.sweeps import run_sweep


def parse_value(text: str) -> Any:
    """A value of the command line, in YAML."""
    try:
        return load_yaml(text) if text else ""
    except yaml.YAMLError as error:
        raise CommandError(f"-p: expected a value in YAML, found {text!r}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_all.sh", description="Execute the study's notebooks and write their figures.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--version", action="version", version=f"ones_lib {ones_lib.__version__}")
    add("--profile", default="demo", help="file in notebooks/profiles, or the path of another (demo)")
    add("--only", nargs="+", default=[], metavar="NN", help="notebooks by number or name, such as 01 02")
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--force", action="store_true", help="do finished work again, trainings included")
    again.add_argument("--figures", action="store_true", help="draw every figure again from the records")
    again.add_argument(
        "--dry-run", action="store_true", help="try each training by one step, and say what all would cost"
    )
    again.add_argument("--sweep", type=path, metavar="FILE", help="execute a notebook for every cell of a grid")
    add("--jobs", type=int, default=1, help="cells of a sweep at a time (1)")
    add("--on", default="local", help="where a sweep runs: local, slurm, or a Dask scheduler's address")
    add("--launch", default="", help="command that starts the processes of a training: 'torchrun ...'")
    add("--device-batch", type=int, default=0, help="examples that a process takes at a time (all)")
    add("--shard", action="store_true", help="spread models over the processes (FSDP)")
    add("--deterministic", action="store_true", help="deterministic algorithms alone")
    add("--to", default="", help=argparse.SUPPRESS)  # the folder of a sweep's cell
    return parser


def _execution(options: argparse.Namespace) -> dict[str, str]:
    """Environment variables that tell the notebooks how to work."""
    places = (
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # torchrun lies beside this Python
    )
    try:
        program = next(iter(shlex.split(options.launch)), "")
    except ValueError as error:
        raise CommandError(f"--launch: expected a command, found {options.launch!r} ({error})") from error
    if options.launch and not shutil.which(program, path=places):
        raise CommandError(f"--launch: expected a command, found none called {program!r}")
    try:
        execution = Execution(options.launch, options.device_batch, options.shard, options.deterministic)
    except ValueError as error:
        raise CommandError(f"--{str(error).replace('_', '-', 1)}") from error
    return execution.environment()


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; the exit status."""
    options = _parser().parse_args(arguments)

    def work() -> int | None:
        overrides = {name: parse_value(value) for name, value in options.p}
        execution = _execution(options)
        if options.sweep is not None:
            if options.only or options.p or options.profile != "demo":
                raise CommandError("--sweep: expected notebook, profile and parameters in its file, not beside it")
            return run_sweep(options.sweep, options.jobs, options.on, execution)
        if options.dry_run:
            return dry_run(options.profile, options.only, overrides, execution)
        os.environ.update(execution)
        return run(options.profile, options.only, overrides, options.force, options.figures, options.to)

    again = "interrupted; run it again to go on where it stopped"
    return exit_status(work, lambda error: f"run_all.sh: {one_line(error)}", interrupted=again)
