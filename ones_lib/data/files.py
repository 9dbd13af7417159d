"""Files that are whole or missing: atomic writes, caches, safetensors."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

UNFINISHED = ".tmp"


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Write a file atomically: gives a temporary file beside ``path`` that replaces it at the end, or is removed on errors.

    Raises:
        OSError: the file could not be written, as on a full disk; the error names it and the free space.
    """
    for left in left_behind(path.parent, f"{path.name}."):
        left.unlink(missing_ok=True)
    beside = path.with_name(f"{path.name}.{this_process()}{UNFINISHED}")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # by the user's umask; some libraries write files that nobody else may read
        yield beside
        beside.chmod(mode)
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        room = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(
            number, f"could not be written, with {room / 1e6:,.1f} MB free there: {error}", str(path)
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def allow_as_usual(folder: Path) -> None:
    """Give all files in a folder the permissions that new files have there, by the user's umask."""
    probe = folder / f"{this_process()}{UNFINISHED}"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in filter(Path.is_file, folder.rglob("*")):
        file.chmod(mode)


def this_process() -> str:
    """A name for this process, unique over all machines."""
    return f"{socket.gethostname()}-{os.getpid()}"


def left_behind(folder: Path, prefix: str = "") -> list[Path]:
    """Paths named ``prefix``, then :func:`this_process` of a process of this machine that no longer runs."""
    start = f"{prefix}{socket.gethostname()}-"
    found = {path: path.name.removeprefix(start).partition(".")[0] for path in folder.glob(f"{glob.escape(start)}*")}
    return [path for path, number in found.items() if number.isdecimal() and not psutil.pid_exists(int(number))]


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of killed processes in ``folder`` and below; no other process may be writing there."""
    for left in folder.rglob(f"*{UNFINISHED}"):
        left.unlink()


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, filled by ``make`` if it is missing. It appears only when whole; processes wait for each other."""
    if folder.exists():
        return folder
    locks = folder.parent / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{folder.name}.lock"):
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
            partial.mkdir()
            try:
                make(partial)
                os.replace(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def is_free(folder: Path) -> bool:
    """Whether a folder can be made in this place: nothing is there, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def check_room(folder: Path, needed: int, taken_by: str) -> None:
    """Raise OSError unless the disk of a folder has ``needed`` bytes free; it says what they are for."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder}: expected {needed / 1e9:.1f} GB of free disk space, found {free / 1e9:.1f} GB; {taken_by}"
        )


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, in UTF-8. What has no letter there, such as a byte of an odd file name, is written as an escape."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    with written_beside(path) as beside:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside, metadata)


def load_tensors(path: Path, model: nn.Module) -> None:
    """Copy a file's tensors into a model; ValueError if names or shapes differ."""
    target = model_tensors(model)
    with opened(path) as file, torch.no_grad():
        if odd := sorted(set(file.keys()) ^ set(target)):
            raise ValueError(
                f"{path}: expected the tensors of {type(model).__name__}, in one of the two only: {odd[:5]}"
            )
        for name, tensor in target.items():
            stored = file.get_tensor(name)
            if stored.shape != tensor.shape:
                raise ValueError(f"{path}: {name}: expected shape {list(tensor.shape)}, found {list(stored.shape)}")
            tensor.copy_(stored)


@contextmanager
def opened(path: Path) -> Iterator:
    """Open a safetensors file; FileNotFoundError if it is missing, ValueError if it is damaged."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a safetensors file, found none")
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        found = f"{path.stat().st_size} bytes that are none ({error})"
        raise ValueError(f"{path}: expected a whole safetensors file, found {found}") from error
    with file:
        yield file


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name. A shared one appears once: safetensors refuses tensors that share memory."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(files: Sequence[Path], folder: Path, cache_dir: Path) -> str:
    """SHA-256 of the places in ``folder`` and the contents of files. They are read once: the result is kept in ``cache_dir`` and
    holds until a file's size or times change."""
    from transformers.utils.logging import tqdm  # notebooks show its bars

    stats = [file.stat() for file in files]
    places = [file.relative_to(folder).as_posix() for file in files]
    looks = [[place, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for place, s in zip(places, stats, strict=True)]
    stamp = hashlib.sha256(json.dumps([str(folder.resolve()), looks]).encode()).hexdigest()
    known = cache_dir / "contents" / stamp
    if known.exists():
        return known.read_text()
    pairs = zip(places, tqdm(files, desc="reading files, once", unit="file", delay=2, leave=False), strict=True)
    found = hashlib.sha256(json.dumps([[place, checksum(file)] for place, file in pairs]).encode()).hexdigest()
    # A file that is changed again within a tick of the clock would keep its times.
    if time.time_ns() - max((s.st_ctime_ns for s in stats), default=0) > 2e9:
        known.parent.mkdir(parents=True, exist_ok=True)
        write_text(known, found)
    return found


def file_stamps(files: Iterable[Path]) -> list[list]:
    """Name, size and modification time of each file: they differ if a file was changed."""
    stats = ((file.name, file.stat()) for file in files)
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
