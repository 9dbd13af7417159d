"""What the commands say: errors and warnings in one line each, with arguments named as they are typed."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

from ones_lib import __version__


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
        text = re.sub(r"\s*\n\s*", " ", str(message)).replace("force=True", "--force")
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
