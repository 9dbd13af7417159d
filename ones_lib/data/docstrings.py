"""Docstrings: a corpus in English, made from the docstrings of installed scientific packages, for pre-training.

It is written as JSON lines. All texts of a module are in one split, and a repeated text (an inherited docstring) is kept only
once, so no text is in two splits. The same versions of the packages give the same texts.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.util
import json
import random
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from inspect import cleandoc
from pathlib import Path

PACKAGES = {  # import name -> distribution
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numpy": "numpy",
    "pandas": "pandas",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "torch": "torch",
}
VALIDATION_PART = 0.2  # of the modules

_SKIPPED_FOLDERS = {"tests", "test", "testing", "externals", "_vendor", "extern"}
_SECTION = re.compile(r"^(?P<title>[A-Z][A-Za-z ]+)\n(?:-{3,}|={3,})\s*$", re.MULTILINE)
_ENTRY = re.compile(r"^(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*) ?: (?P<type>\S.*)$")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


@dataclass(frozen=True)
class Parameter:
    """An entry of a numpydoc Parameters section, such as ``axis : int, default 0``, with its description."""

    name: str
    type: str
    description: str

    @property
    def header(self) -> str:
        return f"{self.name} : {self.type}"


@dataclass
class Document:
    """One docstring: the sentences of its prose, and its parameters."""

    package: str
    module: str
    sentences: list[str]
    parameters: list[Parameter] = field(default_factory=list)

    @property
    def split(self) -> str:
        digest = hashlib.sha256(self.module.encode()).digest()
        return "validation" if digest[0] < 256 * VALIDATION_PART else "train"

    @property
    def text(self) -> str:
        entries = [f"{p.header}. {p.description}".strip() for p in self.parameters]
        return " ".join([*self.sentences, *(["Parameters."] if entries else []), *entries])


def versions() -> dict[str, str]:
    """Versions of the packages that the texts come from."""
    return {name: version(distribution) for name, distribution in PACKAGES.items()}


def read_documents() -> list[Document]:
    """The packages' docstrings in a fixed order, cleaned, without repeated sentences and descriptions."""
    seen: set[str] = set()

    def new(text: str) -> bool:
        key = re.sub(r"\W+", " ", text.lower()).strip()
        return not (key in seen or seen.add(key))

    result = []
    for package in PACKAGES:
        for module, docstring in _docstrings(package):
            document = parse(docstring, package, module)
            document.sentences = [s for s in document.sentences if new(s)]
            document.parameters = [p for p in document.parameters if new(p.description or p.header)]
            if document.sentences or document.parameters:
                result.append(document)
    return result


def _docstrings(package: str) -> Iterator[tuple[str, str]]:
    """(module, docstring) of a package's public modules, classes and functions, parsed from its sources."""
    root = Path(importlib.util.find_spec(package).origin).parent
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root.parent)
        folders = module.parts[:-1]
        if _SKIPPED_FOLDERS & set(folders) or any(f.startswith("_") and f != "_core" for f in folders):
            continue
        nodes = [_parsed(path)]
        while nodes:  # not ast.walk: visiting every expression takes as long as parsing
            node = nodes.pop()
            nodes += [n for n in reversed(node.body) if isinstance(n, ast.ClassDef | ast.FunctionDef)]
            if found := ast.get_docstring(node):
                yield module.as_posix(), found


def _parsed(path: Path) -> ast.Module:
    collecting = gc.isenabled()
    gc.disable()  # syntax trees are many objects without cycles; the collector takes longer than the parser
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    finally:
        if collecting:
            gc.enable()


def parse(docstring: str, package: str = "", module: str = "") -> Document:
    """Parse a docstring in numpydoc's form; of other forms, only the prose before the arguments is used."""
    docstring = cleandoc(docstring)
    heads = list(_SECTION.finditer(docstring))
    starts = [head.start() for head in heads] + [len(docstring)]
    sections = {head["title"]: docstring[head.end() : end] for head, end in zip(heads, starts[1:], strict=True)}
    prose = docstring[: heads[0].start()] if heads else docstring
    prose = re.split(r"^\s*(?:Args|Arguments|Returns|Example|Examples|Keyword args|Shape)s?:", prose, flags=re.M)[0]
    sentences = [s for part in (prose, sections.get("Notes", "")) for s in _sentences(part)]
    return Document(package, module, sentences, list(_parameters(sections.get("Parameters", ""))))


def _clean(text: str) -> str:
    """Plain text of reStructuredText, without roles, links, emphasis and extra white space."""
    text = re.sub(r":[\w:+.-]+:`~?\.?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", text)
    text = re.sub(r"`+([^`<]*?)(?:\s*<[^`]*>)?`+_*", r"\1", text)
    text = re.sub(r"\[\d+\]_|[`*~]|https?://\S+", "", text)
    return " ".join(text.split())


def _sentences(text: str) -> Iterator[str]:
    """Sentences of plain paragraphs; examples, directives, lists, tables and formulas are skipped."""
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if re.match(r"\s+\S|\.\.|>>>|[-*+=|] ?|\d+\.", paragraph) or "::" in paragraph or "\\" in paragraph:
            continue
        for sentence in _SENTENCE_END.split(_clean(paragraph)):
            if sentence.endswith(".") and len(sentence.split()) >= 4:
                letters = sum(map(str.isalpha, sentence)) + sentence.count(" ")
                if letters > 0.8 * len(sentence):
                    yield sentence


def _parameters(section: str) -> Iterator[Parameter]:
    """Parameters of a numpydoc section; of an entry with several names, the first."""
    entries: list[tuple[str, str, list[str]]] = []
    for line in section.splitlines():
        if line and not line[0].isspace():
            match = _ENTRY.match(line)
            entries.append((match["names"], match["type"], []) if match else ("", "", []))
        elif entries:
            entries[-1][2].append(line)
    for names, kind, lines in entries:
        kind = _clean(kind).rstrip(".")
        if not names or not 2 <= len(kind) <= 60:
            continue
        paragraphs = re.split(r"\n\s*\n", "\n".join(lines).strip())
        description = " ".join(_SENTENCE_END.split(_clean(paragraphs[0]))[:2])
        yield Parameter(names.replace("*", "").split(", ")[0], kind, description)


def write_docstrings(folder: Path, documents: Iterable[Document] | None = None) -> None:
    """Write ``corpus/train.jsonl`` and ``corpus/validation.jsonl``, with a column ``text``."""
    documents = read_documents() if documents is None else list(documents)
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        texts = [d.text for d in documents if d.split == split and len(d.text) >= 40]
        random.Random(f"corpus {split}").shuffle(texts)
        with open(folder / "corpus" / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
