"""The folder that a conversion or distillation makes: whether it is free, has the same work already, or is replaced."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from ones_lib.data.files import allow_as_usual, is_free, write_text

CONVERSION, DISTILLATION = "conversion.json", "distillation.json"


class Place:
    """Where finished work is put, in one move.

    Args:
        folder: to make.
        name: of the argument, for errors.
        record: :data:`CONVERSION` or :data:`DISTILLATION`, the file there with facts: of which arguments it was made, what came
            out, and its ``files``. (A distillation's folder has a copy of its conversion's record, too.)
        force: replace finished work of the same kind. It stays until the new one is whole.

    Raises:
        FileExistsError: something else is there.
    """

    def __init__(self, folder: str | Path, name: str, record: str, force: bool) -> None:
        self.folder, self.name, self.record, self.force = Path(folder).expanduser().resolve(), name, record, force
        self.found()

    def found(self) -> dict | None:
        """The facts of the finished work there; None: nothing is there.

        Raises:
            FileExistsError: something else is.
        """
        if is_free(self.folder):
            return None
        kind = DISTILLATION if (self.folder / DISTILLATION).exists() else CONVERSION
        try:
            found = json.loads((self.folder / kind).read_text())
        except (OSError, ValueError):
            found = None
        if kind != self.record or not isinstance(found, dict):
            raise FileExistsError(
                f"{self.name}: expected a folder that is not there or empty, or {self.record} of an earlier call in it, found"
                f" {self.folder}"
            )
        return found

    def done(self, facts: Mapping) -> bool:
        """Whether work with these ``facts`` is finished, and is not to be replaced.

        Raises:
            FileExistsError: the work there has other facts or lacks files, and is not to be replaced; or it is, and there are files
                of others.
        """
        found = self.found()
        if found is None:
            return False
        if self.force:
            self._check_own(found)
            return False
        if odd := list(differences(found, json.loads(json.dumps(facts)))):
            raise FileExistsError(
                f"{self.name}: {self.folder} was made with other arguments: {'; '.join(odd[:5])}; force=True replaces it"
            )
        if lost := [file for file in found.get("files", []) if not (self.folder / file).exists()]:
            raise FileExistsError(f"{self.name}: {self.folder} lacks its {lost[0]}; force=True makes it again")
        return True

    def _check_own(self, found: Mapping) -> None:
        if foreign := sorted({path.name for path in self.folder.iterdir()} - set(found.get("files", []))):
            raise FileExistsError(
                f"{self.name}: expected only files of an earlier call, which are replaced, found others in {self.folder}:"
                f" {', '.join(foreign[:5])}"
            )

    def tried(self) -> None:
        """Make the folder that this one lies in, and see whether a folder can be moved here.

        Raises:
            OSError: it can't, as on a read-only disk or to a mount point.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            parent, prefix = self.folder.parent, f".{self.folder.name}."
            with TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as trial:
                if self.folder.exists() and is_free(self.folder):
                    os.replace(self.folder, trial)
                    os.replace(trial, self.folder)
            if self.folder.is_mount():
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        except OSError as error:
            hint = "; it is a mount point: take a folder in it" if error.errno in (errno.EBUSY, errno.EXDEV) else ""
            raise type(error)(
                f"{self.name}: expected a place that a folder can be moved to, found {self.folder}: {error.strerror}{hint}"
            ) from error

    def put(self, made: Path, facts: Mapping) -> None:
        """Write the record to a whole folder and move that here. What it replaces is removed then."""
        allow_as_usual(made)
        files = sorted({path.name for path in made.iterdir()} | {self.record})
        write_text(made / self.record, json.dumps({**facts, "files": files}, indent=1))
        old = self.folder.with_name(f".{self.folder.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)  # of a killed process
        if found := self.found():
            self._check_own(found)
        if self.folder.exists():
            os.replace(self.folder, old)
        os.replace(made, self.folder)
        shutil.rmtree(old, ignore_errors=True)


def differences(found: Mapping, facts: Mapping, prefix: str = "") -> Iterator[str]:
    """What of ``facts`` is another in those that were found."""
    for key, new in facts.items():
        old, name = found.get(key), f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{name}.")
        elif old != new:
            yield name if key.endswith(("sha256", "stamp")) else f"{name} {_short(old)}, now {_short(new)}"


def _short(value: object) -> str:
    text = json.dumps(value["text"] if isinstance(value, dict) and "text" in value else value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
