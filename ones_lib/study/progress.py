"""Progress and warnings in a notebook, which is to read like a paper when it is done: a bar is an output while its work lasts,
and nothing afterwards; a warning of this library is a line of text.

All bars of this library are made by ``transformers.utils.logging.tqdm``. Here is what it makes in a notebook's kernel; elsewhere
it is tqdm's own, on standard error. Who executes a notebook knows a bar by :data:`BAR`, and may draw it elsewhere.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from uuid import uuid4

import datasets
from tqdm import tqdm
from transformers.utils import logging

#: How the display identifier of a bar begins.
BAR = "ones-progress-"
SOON = 0.5  # seconds: what is done in that time has no bar


def show_in_outputs() -> None:
    """In a notebook's kernel, make bars and warnings outputs of the cell that works; elsewhere do nothing."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if hasattr(shell, "kernel"):
        logging.set_tqdm_hook(_bar)
        datasets.disable_progress_bars()
        warnings.showwarning = partial(_show_warning, warnings.showwarning)


def duration(seconds: float) -> str:
    """Such as ``4 min 10 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _bar(make: Callable, arguments: Sequence, options: Mapping) -> tqdm:
    if not logging.is_progress_bar_enabled():
        return make(*arguments, **options)
    own = {"file": _Output(), "leave": False, "position": 0, "ascii": False}
    return tqdm(*arguments, **{**options, **own})


def _show_warning(others: Callable, message: Warning | str, category: type[Warning], *where) -> None:
    frame = sys._getframe(1)
    while frame.f_globals["__name__"] == "warnings":
        frame = frame.f_back
    if frame.f_globals["__name__"].startswith("ones_lib."):
        print(f"warning: {message}", flush=True)
    else:
        others(message, category, *where)


class _Output:
    """The file that tqdm writes its line to: an output, changed in place, without data once the line is cleared."""

    def __init__(self) -> None:
        self._shown, self._handle, self._created = "", None, time.monotonic()

    def write(self, text: str) -> None:
        from IPython.display import display  # there in a kernel

        text = text.strip()
        if text == self._shown or (self._handle is None and time.monotonic() < self._created + SOON):
            return
        self._shown, data = text, {"text/plain": text} if text else {}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=f"{BAR}{uuid4().hex}")
        else:
            self._handle.update(data, raw=True)

    def flush(self) -> None:
        """For tqdm."""
