"""How the commands end, and what they say: errors and warnings in one line each, with arguments named as they are typed."""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError

from ones_lib import __version__


class RunError(RuntimeError):
    """What went wrong while a command worked, for the person who runs it."""


#: What a user can mend: a file, a value, memory, a package that is missing. Any other error is a fault of ours.
MENDABLE = (OSError, ValueError, TypeError, MemoryError, torch.OutOfMemoryError, ImportError, SafetensorError, RunError)
NO_MEMORY = "can't allocate memory"  # torch's RuntimeError on a CPU
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK")  # set by a launcher for each process
MEETING = ("MASTER_ADDR", "MASTER_PORT")  # and where they meet


def exit_status(
    work: Callable[[], int | None],
    said: Callable[[object], str] | None = None,
    *,
    failed: int = 1,
    interrupted: str = "interrupted",
    launched: bool = False,
) -> int:
    """Do the work of a command; its exit status. What a user can mend is told in one line; a fault of ours is raised.

    Args:
        work: returns an exit status; None is 0.
        said: the line for an error. None: its message alone.
        failed: the exit status of an error.
        interrupted: the line for an interrupt, whose exit status is 130.
        launched: a launcher may start the command in several processes.
    """
    try:
        check_environment(launched)
        status = work() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # nobody reads on, as after "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return failed
    except KeyboardInterrupt:
        print((said or one_line)(interrupted), file=sys.stderr)
        return 130
    except Exception as error:
        if not isinstance(error, MENDABLE) and NO_MEMORY not in str(error):
            raise
        print((said or one_line)(str(error) or type(error).__name__), file=sys.stderr)
        return failed


def one_line(message: object) -> str:
    """A message without its ends of lines."""
    return re.sub(r"\s*\n\s*", " ", str(message).strip())


def check_environment(launched: bool) -> None:
    """Raise ValueError if the environment says that this is one of several processes, and it is not.

    Args:
        launched: a launcher may have started it, which sets all that such a process needs.
    """
    found = {name: os.environ[name] for name in LAUNCHED if os.environ.get(name)}
    if not found or found == {"WORLD_SIZE": "1"}:
        return
    given, unset = ", ".join(f"{name}={value}" for name, value in found.items()), f"unset {' '.join(found)}"
    needed = [*LAUNCHED[:2], *MEETING]
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise ValueError(
            f"{given}: expected {', '.join(missing)} too, which a launcher such as torchrun sets, found none; where none starts"
            f" this command, {unset}"
        )
    if odd := [name for name, value in found.items() if not value.isdecimal()]:
        raise ValueError(
            f"{odd[0]}: expected a whole number, found {found[odd[0]]!r}; where no launcher sets it, {unset}"
        )
    if not launched and found["WORLD_SIZE"] != "1":
        raise ValueError(f"{given}: expected one process of this command, found several; where they are not, {unset}")


def path(text: str) -> Path:
    """A path of the command line; ``~`` is the user's home."""
    return Path(text).expanduser()


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add ``--version``."""
    parser.add_argument("--version", action="version", version=f"ones_lib {__version__}")


class Typed:
    """How arguments of a Python function are typed on a command line.

    Args:
        options: names of the arguments that are options, such as ``d_ff`` for ``--d-ff``.
        places: what the usage calls the others, by name.
        method_options: names of those that are typed as ``--option NAME=VALUE``.
    """

    def __init__(self, options: Iterable[str], places: Mapping[str, str], method_options: Iterable[str] = ()) -> None:
        self._names = {name: f"--option {name}" for name in method_options}
        self._names |= {name: f"--{name.replace('_', '-')}" for name in options} | dict(places)

    def said(self, message: object) -> str:
        """A message in one line. Arguments are renamed where it begins with them, and those of several words everywhere."""
        text = one_line(message).replace("force=True", "--force")
        names, colon, rest = text.partition(": ")
        if colon and all(name in self._names for name in names.split(", ")):
            text = f"{', '.join(self._names[name] for name in names.split(', '))}: {rest}"
        return re.sub(r"\b[a-z]+_[a-z_]+\b", lambda found: self._names.get(found[0], found[0]), text)

    @contextmanager
    def warnings(self, hidden: bool = False) -> Iterator[None]:
        """While it is open, warnings are printed so, without the place in the code; or they are ``hidden``."""
        before = warnings.formatwarning
        warnings.formatwarning = lambda message, *_, **__: f"warning: {self.said(message)}\n"
        try:
            with warnings.catch_warnings() if hidden else nullcontext():
                if hidden:
                    warnings.simplefilter("ignore")
                yield
        finally:
            warnings.formatwarning = before
