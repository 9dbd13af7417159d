"""Executes notebooks in batch, through papermill.

Each notebook is executed to ``runs/<profile>/<notebook>.ipynb``. It is not executed again while its cells, its parameters and
the library stay the same and its figures are still there. A second run waits for a notebook that another run executes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import papermill
from filelock import FileLock
from jupyter_client import KernelManager
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

import ones_lib
from ones_lib.checkpoints.shards import Shards
from ones_lib.checkpoints.terminal import MENDABLE
from ones_lib.data.files import UNFINISHED, file_stamps
from ones_lib.study.checks import check, studies
from ones_lib.study.parallel import WHY_KILLED
from ones_lib.study.parameters import EXECUTION, Parameters, check_names, group_of, read_parameters
from ones_lib.study.progress import BAR
from ones_lib.study.records import project_root

# A kernel logs that it talks to us, on this machine, without encryption; and, when an interrupt ends it, a traceback.
QUIET = ["--IPKernelApp.log_level=CRITICAL"]


class CommandError(ValueError):
    """A request that cannot be carried out. The message is for the person who made it."""


@cache
def groups_of(notebook: Path) -> list[str]:
    """The groups of parameters that a notebook reads, from the line ``groups = [...]`` of its parameters cell."""
    found = papermill.inspect_notebook(str(notebook)).get("groups")
    if found is None:
        raise CommandError(f"{notebook.name}: expected a line groups = [...] in its parameters cell, found none")
    return ["common", *ast.literal_eval(found["default"])]


def choose_notebooks(only: Sequence[str]) -> list[Path]:
    """The project's notebooks ``NN_name.ipynb``, in order; or those that ``only`` names, by number or name."""
    notebooks = sorted((project_root() / "notebooks").glob("*.ipynb"))
    names = {n: {n.stem, n.name, n.stem[:2]} if n.stem[:2].isdigit() else {n.stem, n.name} for n in notebooks}
    for wanted in only:
        if not any(wanted in name for name in names.values()):
            raise CommandError(f"--only: no notebook {wanted!r}, expected of {[n.stem for n in notebooks]}")
    return [n for n in notebooks if (names[n] & set(only) if only else n.stem[:2].isdigit())]


def settings(
    profile: str, only: Sequence[str], overrides: Mapping[str, Any], source: str = "-p"
) -> dict[Path, Parameters]:
    """The parameters of the chosen notebooks, in order. Each notebook takes the overrides that belong to its groups."""
    notebooks = choose_notebooks(only)
    groups = {notebook: groups_of(notebook) for notebook in notebooks}
    known = [name for name, group in group_of().items() if any(group in found for found in groups.values())]
    check_names(overrides, known, source)
    return {
        notebook: read_parameters(
            profile, {k: v for k, v in overrides.items() if group_of()[k] in found}, found, source
        )
        for notebook, found in groups.items()
    }


def check_values(chosen: Mapping[str, Parameters]) -> None:
    """Raise CommandError for the first notebook, by a name for people, whose parameters cannot be."""
    for name, parameters in chosen.items():
        try:
            check(parameters)
        except MENDABLE as error:
            raise CommandError(f"{name}: {error}") from error


def fingerprint(notebook: Path, parameters: Parameters) -> str:
    """Hash of what decides a notebook's outcome: its cells, its parameters, the files that these name, the library's sources."""
    values = {name: value for name, value in parameters.values().items() if name not in EXECUTION}
    cells = [(cell.cell_type, cell.source) for cell in nbformat.read(notebook, as_version=4).cells]
    digest = hashlib.sha256(json.dumps([cells, values, _files(parameters)], sort_keys=True).encode())
    digest.update(_library().encode())
    return digest.hexdigest()


def _files(parameters: Parameters) -> list:
    """Data with hashes of the user's files, and stamps of a checkpoint's."""
    try:
        stamps = (
            file_stamps(Shards(parameters.source).paths())
            if "spectra" in parameters.groups and parameters.source
            else []
        )
        return [stamps, *([study.data, study.model, study.task_data] for study in studies(parameters))]
    except (OSError, ValueError, TypeError) as error:
        return [str(error)]  # it is told when the values are checked


@cache
def _library() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(ones_lib.__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def finished(output: Path, print_of_inputs: str) -> bool:
    """Whether ``output`` is this notebook with these inputs, executed to its end, and its files are still there."""
    if not output.exists():
        return False
    note = nbformat.read(output, as_version=4).metadata.get("ones_lib", {})
    return note.get("fingerprint") == print_of_inputs and all(Path(f).exists() for f in note.get("files", []))


class _OwnPython(NotebookClient):
    """Executes cells in a kernel of the Python that runs, whatever kernels are installed."""

    def create_kernel_manager(self) -> KernelManager:
        """The kernel's; what it is called elsewhere, such as on JUPYTER_PATH, is not looked at."""
        manager = super().create_kernel_manager()
        manager.kernel_spec_manager = KernelSpecManager(kernel_dirs=[])
        return manager


class _Client(_OwnPython, PapermillNotebookClient):
    """Executes cells. Bars and standard error, such as other libraries' notices, go to the terminal and not into the notebook."""

    _drawn = ""

    def execute(self, **kwargs) -> nbformat.NotebookNode:
        try:
            return super().execute(**kwargs)
        finally:
            self._draw("")

    def process_message(self, msg: dict, cell: nbformat.NotebookNode, cell_index: int) -> nbformat.NotebookNode | None:
        """Put a message of the kernel where it belongs; the output that it added to the cell, if any."""
        content = msg["content"]
        if (content.get("transient") or {}).get("display_id", "").startswith(BAR):
            self._draw(content["data"].get("text/plain", "")[: shutil.get_terminal_size().columns - 1])
        elif msg["msg_type"] == "stream" and content["name"] == "stderr":
            self._draw("")
            sys.stderr.write(content["text"])
        else:
            return super().process_message(msg, cell, cell_index)
        return None

    def _draw(self, line: str) -> None:
        """Draw a line over the one before; an empty one leaves nothing."""
        if line or self._drawn:
            sys.stderr.write(f"\r{line.ljust(len(self._drawn))}" + ("" if line else "\r"))
            sys.stderr.flush()
        self._drawn = line


class _Engine(NBClientEngine):
    """Papermill's, with our client."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name: str, **_) -> nbformat.NotebookNode:
        log = logging.getLogger(__name__)
        log.setLevel(logging.CRITICAL)  # its errors are raised, too
        own = {"log": log, "extra_arguments": QUIET, "stdout_file": sys.stdout}
        return _Client(nb_man, kernel_name=kernel_name, **own).execute()


papermill_engines.register("ones", _Engine)


def execute(notebook: Path, output: Path, profile: str, parameters: Parameters) -> None:
    """Execute one notebook; its output streams to the terminal. What is not executed to its end is kept as
    ``<name>.failed.ipynb`` or ``<name>.interrupted.ipynb``."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished, interrupted = (output.with_suffix(f".{how}.ipynb") for how in ("failed", "interrupted"))
    interrupted.unlink(missing_ok=True)
    started, inputs = time.time(), fingerprint(notebook, parameters)
    try:
        papermill.execute_notebook(
            str(notebook),
            str(unfinished),
            parameters={"profile": profile, "overrides": parameters.overrides},
            kernel_name=NATIVE_KERNEL_NAME,
            cwd=str(project_root()),
            progress_bar=False,
            engine_name="ones",
        )
    except KeyboardInterrupt:
        logging.getLogger("asyncio").disabled = True  # it reports the cell that nobody waits for any more
        if unfinished.exists():
            os.replace(unfinished, interrupted)
        raise
    executed = nbformat.read(unfinished, as_version=4)
    figures = project_root() / parameters.figures_dir
    whole = [f for f in sorted(figures.glob("*")) if f.suffix != UNFINISHED]  # another notebook may be writing there
    files = [str(f) for f in whole if f.stat().st_mtime >= started]
    executed.metadata["ones_lib"] = {"fingerprint": inputs, "files": files}
    nbformat.write(executed, unfinished)
    os.replace(unfinished, output)


def run(
    profile: str, only: Sequence[str], overrides: Mapping[str, Any], force: bool, figures: bool, to: str = ""
) -> None:
    """Execute the chosen notebooks in order to ``runs/<to or profile>``.

    With ``figures`` all are executed, several at a time, and nothing is trained.
    """
    if force:
        overrides = {**overrides, "redo_before": datetime.now(UTC).isoformat(timespec="seconds")}
    if figures:
        overrides = {**overrides, "allow_training": False}
    root, chosen = project_root(), settings(profile, only, overrides)
    folder = root / "runs" / (to or Path(profile).stem)
    there = next(f for f in (folder, *folder.parents) if f.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise CommandError(f"{folder}: expected a folder that can be written to, found none: {there}")
    if not to:  # all cells of a sweep have been checked before
        check_values({n.name: p for n, p in chosen.items() if not finished(folder / n.name, fingerprint(n, p))})

    def execute_one(number: int, notebook: Path) -> None:
        parameters, output = chosen[notebook], folder / notebook.name
        head, shown = f"[{number}/{len(chosen)}] {notebook.name}", output.relative_to(root)
        locks = folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{notebook.stem}.lock"):
            if not force and not figures and finished(output, fingerprint(notebook, parameters)):
                print(f"{head}: finished before, see {shown} (--force makes it again)", flush=True)
                return
            print(f"{head}: profile {profile}, figures to {parameters.figures_dir}", flush=True)
            started = time.monotonic()
            try:
                execute(notebook, output, profile, parameters)
            except PapermillExecutionError as error:
                failed = output.with_suffix(".failed.ipynb").relative_to(root)
                raise CommandError(
                    f"{notebook.name} failed in cell {error.cell_index + 1} (code cell [{error.exec_count}]):"
                    f" {_short(f'{error.ename}: {error.evalue}')}; the notebook up to there: {failed}"
                ) from error
            except DeadKernelError as error:
                raise CommandError(f"{notebook.name}: its kernel died, {WHY_KILLED}") from error
        print(f"{head}: done in {time.monotonic() - started:.0f} s, see {shown}", flush=True)

    if not figures:  # in this thread, where an interrupt ends the notebook at once
        for number, notebook in enumerate(chosen, start=1):
            execute_one(number, notebook)
        return
    # Training fills the cores from inside a notebook. Drawing does not, so notebooks share them, one thread each.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = [pool.submit(execute_one, number, notebook) for number, notebook in enumerate(chosen, start=1)]
        try:
            for done in as_completed(work):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _short(message: str) -> str:
    """An error of a notebook in a line. What a launcher's processes have printed is long; the notebook has all of it."""
    return textwrap.shorten(message, 1000, placeholder=" ...")


# --- dry run -----------------------------------------------------------------------------------------------------------

WITHOUT_RESULTS = ("AttributeError", "TypeError")  # what a cell raises that works with a record, when that is None


def dry_run(profile: str, only: Sequence[str], overrides: Mapping[str, Any], execution: Mapping[str, str]) -> int:
    """Collect what the chosen notebooks would train, and try each kind by one step; see :mod:`ones_lib.study.dry_run`.

    Notebooks are executed with a plan file instead of records: ``study.run`` writes down the configs it is asked for and
    trains nothing.
    """
    plan = project_root() / "runs" / f"plan-{os.getpid()}.json"
    plan.parent.mkdir(exist_ok=True)
    environment = os.environ | dict(execution) | {"ONES_PLAN": str(plan)}
    try:
        chosen = settings(profile, only, overrides)
        check_values({notebook.name: parameters for notebook, parameters in chosen.items()})
        for notebook, parameters in chosen.items():
            _plan_notebook(notebook, profile, parameters, environment)
        if not plan.exists():
            print("nothing to train", flush=True)
            return 0
        command = [sys.executable, "-m", "ones_lib.study.dry_run", str(plan)]
        code = subprocess.run(command, env=environment, check=False).returncode
        if code < 0:
            raise CommandError(f"--dry-run: ended by signal {-code}; the system sends 9 when it runs out of memory")
        return code
    finally:
        plan.unlink(missing_ok=True)


def _plan_notebook(notebook: Path, profile: str, parameters: Parameters, environment: Mapping[str, str]) -> None:
    cells = load_notebook_node(str(notebook))
    if not any(".run(" in cell.source for cell in cells.cells):
        print(f"{notebook.name}: trains nothing", flush=True)
        return
    print(f"{notebook.name}: what it would train", flush=True)
    given = parameterize_notebook(cells, {"profile": profile, "overrides": parameters.overrides})
    resources = {"metadata": {"path": str(project_root())}}
    how = {"kernel_name": NATIVE_KERNEL_NAME, "allow_errors": True, "extra_arguments": QUIET}
    try:
        executed = _OwnPython(given, resources=resources, **how).execute(env=environment).cells
    except DeadKernelError as error:
        raise CommandError(f"{notebook.name}: its kernel died, {WHY_KILLED}") from error
    asking = [i for i, cell in enumerate(executed) if ".run(" in cell.source]
    for i in [*range(asking[0]), *asking]:  # the other cells only work with results
        for error in (output for output in executed[i].get("outputs", []) if output.output_type == "error"):
            if i < asking[0] or error.ename not in WITHOUT_RESULTS:
                raise CommandError(f"{notebook.name}: {_short(f'{error.ename}: {error.evalue}')}")
