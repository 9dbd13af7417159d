"""How the commands end: a line for what a user can mend, a traceback for faults of ours; and the kernels of notebooks."""

import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from nbclient.exceptions import DeadKernelError

from ones_lib.checkpoints import inspection
from ones_lib.checkpoints.__main__ import main as convert
from ones_lib.checkpoints.terminal import LAUNCHED, MEETING, RunError, exit_status
from ones_lib.study import command, distill, dry_run, export, listing, notebooks, parallel, sweeps

COMMANDS = {
    "convert": (convert, ["moe", "dense"]),
    "inspect": (inspection.main, ["moe"]),
    "distill": (distill.main, ["moe", "dense", "out", "--text", "names", "--tokens", "1k"]),
    "run_all": (command.main, ["--profile", "smoke"]),
    "dry run": (dry_run.main, "plan.json"),
    "export": (export.main, ["record", "out"]),
    "records": (listing.main, []),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (*LAUNCHED, *MEETING):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def status(name):
    """A command's exit status: some return it, some leave by it."""
    main, arguments = COMMANDS[name]
    try:
        return main(arguments) or 0
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("name", COMMANDS)
def test_a_left_over_launch_is_refused_by_every_command_in_one_line(name, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert status(name) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "WORLD_SIZE=2: expected RANK, MASTER_ADDR, MASTER_PORT too" in line
    assert line.endswith("unset WORLD_SIZE")


@pytest.mark.parametrize(
    ("environment", "launched", "message"),
    [
        ("", False, None),
        ("WORLD_SIZE=1", False, None),
        ("RANK=1 LOCAL_RANK=1", True, "RANK=1, LOCAL_RANK=1: expected WORLD_SIZE, MASTER_ADDR, MASTER_PORT too"),
        ("LOCAL_RANK=0", False, "LOCAL_RANK=0: expected WORLD_SIZE, RANK, "),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=a MASTER_PORT=1", True, None),
        ("WORLD_SIZE=1 RANK=0 MASTER_ADDR=a MASTER_PORT=1", False, None),
        (
            "WORLD_SIZE=2 RANK=0 MASTER_ADDR=a MASTER_PORT=1",
            False,
            "WORLD_SIZE=2, RANK=0: expected one process of this",
        ),
        ("WORLD_SIZE=two RANK=0 MASTER_ADDR=a MASTER_PORT=1", True, "WORLD_SIZE: expected a whole number, found 'two'"),
        ("MASTER_ADDR=a MASTER_PORT=1", False, None),  # clusters set these everywhere
    ],
)
def test_environments_of_launchers(environment, launched, message, monkeypatch, capsys):
    for name, value in (one.split("=") for one in environment.split()):
        monkeypatch.setenv(name, value)
    assert exit_status(lambda: None, launched=launched) == (0 if message is None else 1)
    assert (message or "") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "[Errno 2] No such file or directory: 'a.txt'"),
        (ValueError("seeds: expected one,\n  found none"), "seeds: expected one, found none"),
        (TypeError("rank: no such option"), "rank: no such option"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 4 TB"), "[enforce fail] Def"),
        (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory."),
        (ImportError("needs sentencepiece"), "needs sentencepiece"),
        (RunError("the loss became nan"), "the loss became nan"),
        (KeyboardInterrupt(), "interrupted"),
        *((fault, None) for fault in (KeyError("a"), AttributeError("a"), RuntimeError("a"), ZeroDivisionError("a"))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_mend_is_one_line_and_a_fault_of_ours_is_raised(error, line, capsys):
    def work():
        raise error

    if line is None:
        with pytest.raises(type(error)):
            exit_status(work)
        return
    assert exit_status(work, failed=3) == (130 if isinstance(error, KeyboardInterrupt) else 3)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


# --- kernels -----------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_kernel_that_dies_is_one_line(arguments, here, monkeypatch, capsys):
    def die(*_, **__):
        raise DeadKernelError("Kernel died")

    (here / "run_all.sh").touch()
    (here / "notebooks").symlink_to(ROOT / "notebooks")
    monkeypatch.setattr(notebooks.papermill, "execute_notebook", die)
    monkeypatch.setattr(notebooks._OwnPython, "execute", die)
    assert command.main(["--profile", "smoke", "--only", "01", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("run_all.sh: 01_imagenet.ipynb: its kernel died, most often since memory ran out")
    assert line.endswith("run it again to go on where it stopped")


@pytest.mark.parametrize("seen", ["by the pool", "by us"])
def test_a_process_that_trains_and_dies_is_one_line(seen, here, monkeypatch):
    class Pool:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, *_):
            future = Future()
            if seen == "by the pool":
                future.set_exception(BrokenProcessPool("terminated abruptly"))
            return future

    killed = [SimpleNamespace(pid=7, exitcode=-9)] if seen == "by us" else []
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(parallel.multiprocessing, "active_children", lambda: killed)
    config = {"kind": "moe", "seed": 0, "training": None}
    with pytest.raises(RunError, match="a process that trains died, most often since memory ran out"):
        parallel._run_parallel({"key": config}, SimpleNamespace(), 1, SimpleNamespace())


def test_a_cell_of_a_sweep_that_is_killed_says_so(here):
    found = sweeps.run_cell(["sh", "-c", "echo 50%; kill -9 $$"], {}, str(here), str(here / "log.txt"), attempts=1)
    assert found["status"] == "failed"
    assert found["error"].startswith("signal 9: it died, most often since memory ran out")


def test_the_kernel_is_of_the_python_that_runs(here, monkeypatch):
    """Whatever kernel of this name stands on JUPYTER_PATH."""
    (here / "kernels" / "python3").mkdir(parents=True)
    other = '{"argv": ["/no/python", "-f", "{connection_file}"], "display_name": "Python 3", "language": "python"}'
    (here / "kernels" / "python3" / "kernel.json").write_text(other)
    monkeypatch.setenv("JUPYTER_PATH", str(here))
    manager = notebooks._OwnPython(nbformat.v4.new_notebook(), kernel_name="python3").create_kernel_manager()
    assert manager.kernel_spec.argv[0] == sys.executable
