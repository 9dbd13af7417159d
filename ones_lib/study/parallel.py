"""Runs many configs: here, side by side in processes, or each training under a launcher such as torchrun.

``python -m ones_lib.study.parallel PLAN`` is what a launcher starts, in every process.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import platform
import queue
import shlex
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar, tqdm

from ones_lib.checkpoints.terminal import RunError, check_environment
from ones_lib.data import images
from ones_lib.data.files import left_behind, this_process, write_text
from ones_lib.data.images import available_cores
from ones_lib.study.processes import is_main, join
from ones_lib.study.records import Records, config_hash
from ones_lib.study.running import Config, Execution, Workplace, carry_out, label, needed, steps_of
from ones_lib.study.training import Progress

#: What to say of a process that has ended without a word.
WHY_KILLED = (
    "most often since memory ran out (the system then kills the largest process); set fewer -p processes or a smaller"
    " --device-batch, and run it again to go on where it stopped"
)

# --- processes -------------------------------------------------------------------------------------------------------


def run_all(
    missing: Mapping[str, Config],
    records: Records,
    cache_dir: Path,
    execution: Execution,
    processes: int = 0,
    description: str = "",
) -> None:
    """Carry out all configurations, by their hashes, teachers before their students; with a progress bar.

    Args:
        processes: trainings side by side; 0: one on a GPU, else one a core. With a launch command they are one after another.
    """
    check_environment(launched=False)  # a notebook may have been opened without run_all.sh
    steps = sum(steps_of(config) for config in missing.values())
    bar = tqdm(total=steps, desc=description, unit="step", mininterval=2, dynamic_ncols=True)
    with bar, _teacher_logits(cache_dir) as logits:
        place = Workplace(records, cache_dir, logits, execution)
        processes = min(processes or _default_processes(), len(missing))
        if execution.launch:
            _run_launched(missing, place, bar)
        elif processes == 1:
            for config in missing.values():  # teachers stand before their students
                carry_out(config, place, _bar_progress(bar, label(config)))
        else:
            _run_parallel(missing, place, processes, bar)


def write_plan(path: Path, configs: Mapping[str, Config], cache_dir: Path) -> None:
    """Add configurations to a plan, in the place of carrying them out."""
    plan = json.loads(path.read_text()) if path.exists() else {"configs": {}}
    write_text(path, json.dumps({"configs": plan["configs"] | dict(configs), "cache_dir": str(cache_dir)}))


@contextmanager
def _teacher_logits(cache_dir: Path) -> Iterator[Path]:
    """A folder for the logits that students share, while this process trains them: they are gigabytes, and made in seconds."""
    root = cache_dir / "teacher_logits"
    for left in left_behind(root):
        shutil.rmtree(left, ignore_errors=True)
    folder = root / this_process()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _default_processes() -> int:
    return 1 if torch.accelerator.is_available() else available_cores()


def _bar_progress(bar: tqdm, name: str) -> Progress:
    seen = 0

    def progress(step: int, steps: int, loss: float, accuracy: float) -> None:
        nonlocal seen
        bar.set_postfix_str(f"{name}: loss {loss:.3f}, accuracy {accuracy:.1%}", refresh=False)
        bar.update(step - seen)
        seen = step

    return progress


def _run_parallel(missing: Mapping[str, Config], place: Workplace, processes: int, bar: tqdm) -> None:
    """Carry out configurations in processes of their own, each as soon as those it needs are there; the longest first, but
    before them what others need."""
    context = _context()
    reports, stop = context.Queue(), context.Event()
    waiting, running = dict(missing), {}  # key -> configuration; future -> key
    workers = {}  # by number of the process
    progress = {key: _bar_progress(bar, label(config)) for key, config in missing.items()}
    needs = {key: {config_hash(other) for other in needed(config)} for key, config in missing.items()}

    def drain() -> None:
        while True:
            try:
                key, *report = reports.get_nowait()
            except queue.Empty:
                return
            progress[key](*report)

    with ProcessPoolExecutor(processes, context, _start_worker, (processes, reports, stop)) as pool:
        try:
            while waiting or running:
                unfinished = {*waiting, *running.values()}
                candidates = [key for key in waiting if unfinished.isdisjoint(needs[key])]
                wanted = set().union(*(needs[key] for key in waiting))
                candidates.sort(key=lambda key: (key not in wanted, -steps_of(waiting[key])))
                for key in candidates[: processes - len(running)]:
                    running[pool.submit(_work, key, waiting.pop(key), place)] = key
                done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                drain()
                workers |= {worker.pid: worker for worker in multiprocessing.active_children()}
                if any(worker.exitcode for worker in workers.values()):  # the pool may see it only when another is done
                    raise BrokenProcessPool
                for future in done:
                    key = running.pop(future)
                    future.result()
            drain()
        except BaseException as error:
            stop.set()  # the workers end at their next report
            if isinstance(error, BrokenProcessPool):
                raise RunError(f"a process that trains died, {WHY_KILLED}") from error
            raise


def _context() -> multiprocessing.context.BaseContext:
    """How workers start: as forks of a server that has imported what they need, since importing takes seconds. Systems without
    such servers import it in each."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ones_lib.study.parallel"])
    return context


def _start_worker(processes: int, reports: multiprocessing.Queue, stop) -> None:
    global _REPORTS, _STOP
    _REPORTS, _STOP = reports, stop
    images.SIDE_BY_SIDE = processes
    torch.set_num_threads(max(1, available_cores() // processes))
    disable_progress_bar()  # the parent's counts all workers' steps
    gc.freeze()  # what is imported stays: the collections after each training need not look at it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed notebook must not leave its workers behind; what they had done is in their checkpoints."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(key: str, config: Config, place: Workplace) -> None:
    def progress(*report) -> None:
        if _STOP.is_set():
            raise KeyboardInterrupt("another training failed or the study was interrupted")
        _REPORTS.put((key, *report))

    carry_out(config, place, progress)
    _release_memory()


def _release_memory() -> None:
    """Left alone, a worker grows with every training: models and optimizers hold one another in cycles, and glibc keeps what
    batches of many lengths have left in pieces."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


# --- several processes of one training ---------------------------------------------------------------------------------


def _run_launched(missing: Mapping[str, Config], place: Workplace, bar: tqdm) -> None:
    """Carry out configurations, one after another, in the processes that the launch command starts."""
    records = place.records
    records.root.mkdir(parents=True, exist_ok=True)
    for left in left_behind(records.root, ".plan-"):
        left.unlink(missing_ok=True)
    plan = records.root / f".plan-{this_process()}.json"  # where every node finds it
    where = {
        "root": str(records.root.resolve()),
        "redo_before": records.redo_before and records.redo_before.isoformat(),
    }
    paths = {"cache_dir": str(place.cache_dir.resolve()), "teacher_logits": str(place.teacher_logits.resolve())}
    write_text(plan, json.dumps({"configs": missing, **where, **paths, "execution": asdict(place.execution)}))
    command = [*shlex.split(place.execution.launch), "-m", "ones_lib.study.parallel", str(plan)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    progress = {key: _bar_progress(bar, label(config)) for key, config in missing.items()}
    said, error = deque(maxlen=30), None
    try:
        try:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
            )
        except OSError as failure:
            raise RunError(f"launch: could not start {command[0]!r}: {failure}") from failure
        with process:
            try:
                for line in process.stdout:
                    message = _heard(line)
                    if "progress" in message:
                        progress[message["key"]](*message["progress"])
                    elif line.strip():
                        error = error or message.get("error")
                        said.append(line)
            except BaseException:
                process.terminate()  # torchrun ends its processes
                raise
    finally:
        plan.unlink(missing_ok=True)
    left = [label(config) for config in missing.values() if records.find(config) is None]
    if process.returncode or left:
        why = error or f"exit status {process.returncode}, and {len(left)} of {len(missing)} left to do"
        raise RunError(f"launch: {why}; from {shlex.join(command)}:\n{''.join(said)}")


def main(plan_file: str) -> None:
    """Carry out a plan as one of the processes that a launcher has started."""
    try:
        state = join()
        plan = json.loads(Path(plan_file).read_text())
        execution = Execution(**plan["execution"])
        images.SIDE_BY_SIDE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        records = Records(plan["root"], plan["redo_before"] or "")
        place = Workplace(records, Path(plan["cache_dir"]), Path(plan["teacher_logits"]), execution)
        for key, config in plan["configs"].items():

            def report(*progress, key: str = key) -> None:
                _say({"key": key, "progress": progress})

            carry_out(config, place, report if is_main() else None)
        state.destroy_process_group()
    except Exception as error:
        _say({"error": f"{type(error).__name__}: {error}"})
        raise


def _say(message: dict) -> None:
    """To the process that launched this one, on a line of its own."""
    sys.stdout.write(f"\n{_MARK}{json.dumps(message)}\n")
    sys.stdout.flush()


def _heard(line: str) -> dict:
    """What :func:`_say` said on a line; nothing if it is another's."""
    if line.startswith(_MARK):
        with suppress(ValueError):  # two processes' lines in one
            return json.loads(line.removeprefix(_MARK))
    return {}


_MARK = "ones_lib.study.parallel: "


if __name__ == "__main__":
    main(sys.argv[1])
