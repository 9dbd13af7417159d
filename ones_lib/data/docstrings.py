"""Docstrings: a corpus and four tasks in English, made from the docstrings of installed scientific packages.

The corpus is for masked-language pre-training. The tasks are of the same kinds as the paper's (arXiv 2201.10890):

=================  ==========================================================================================
``package``        one sentence, one class of :data:`PACKAGES`: the package it comes from (like SST-2)
``statement``      a pair, some parameters and a statement on the type of one; three classes: the statement follows,
                   the parameters say nothing on it, or they contradict it (like MNLI)
``answer``         a question on the type or default of a parameter; the answer is a span of the context (like SQuAD 1.1)
``answer_or_none`` the same, but a third of the questions have no answer, as in SQuAD 2.0's training split: the context
                   lacks the parameter or (more rarely) its default
=================  ==========================================================================================

Rows are written as JSON lines with the columns of the hub's data sets of that kind, so the same code reads both. All texts of
a module are in one split, and a repeated text (an inherited docstring) is kept only once, so no text is in two splits.
The same versions of the packages give the same texts.
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
from collections import Counter, defaultdict
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
STATEMENT_CLASSES = ("entailment", "neutral", "contradiction")

_SKIPPED_FOLDERS = {"tests", "test", "testing", "externals", "_vendor", "extern"}
# Names and aliases of the packages, which would give a sentence's package away.
_NAMES = {*PACKAGES, "scikit", "learn", "pytorch", "np", "pd", "plt", "mpl", "nx", "sp", "aten", "pyplot", "cuda"}
_SECTION = re.compile(r"^(?P<title>[A-Z][A-Za-z ]+)\n(?:-{3,}|={3,})\s*$", re.MULTILINE)
_ENTRY = re.compile(r"^(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*) ?: (?P<type>\S.*)$")
_DEFAULT = re.compile(r"default(?:s to|\s+is)?\s*[:=]?\s*['\"]?(?P<value>[^\s,;:=()'\"]+)", re.IGNORECASE)
_TYPE = re.compile(r"(?:\{[^}]*\}|\([^)]*\)|(?!,| \(?(?:optional|default)).)+")  # up to a comma outside brackets
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

    @property
    def entry(self) -> str:
        """The parameter in a task's context: its header and the first words of its description."""
        return f"{self.header}. {' '.join(self.description.split()[:5])}"

    @property
    def stated_type(self) -> str:
        return self.header[slice(*self.span("type"))]

    def span(self, what: str) -> tuple[int, int] | None:
        """Start and end of the ``type`` (without remarks such as "optional") or the ``default`` in the header, or None."""
        before = len(self.header) - len(self.type)
        if what == "type":
            return before, before + len(_TYPE.match(self.type)[0].rstrip())
        match = _DEFAULT.search(self.type)
        return match and (before + match.start("value"), before + match.end("value"))


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
            letters = sum(c.isalpha() or c == " " for c in sentence)
            if sentence.endswith(".") and len(sentence.split()) >= 4 and letters > 0.8 * len(sentence):
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


# --- corpus and tasks ------------------------------------------------------------------------------------------------


def write_docstrings(folder: Path, documents: Iterable[Document] | None = None) -> None:
    """Write the folders ``corpus`` and of each task, with ``train.jsonl`` and ``validation.jsonl``."""
    documents = read_documents() if documents is None else list(documents)
    makers = {
        "corpus": lambda part, train, rng: ({"text": d.text} for d in part if len(d.text) >= 40),
        "package": package_examples,
        "statement": statement_examples,
        "answer": answer_examples,
        "answer_or_none": answer_or_none_examples,
    }
    train = [d for d in documents if d.split == "train"]
    for name, make in makers.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split in ("train", "validation"):
            rng = random.Random(f"{name} {split}")  # no split depends on another
            rows = list(make([d for d in documents if d.split == split], train, rng))
            rng.shuffle(rows)
            with open(folder / name / f"{split}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def package_examples(documents: list[Document], train: list[Document], rng: random.Random) -> Iterator[dict]:
    """Columns ``sentence, label``, equally many rows per package.

    Sentences are skipped if one word gives the label away: a package's name, or a word that comes nearly always from one
    package in the training split ("DataFrame").
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    for document in train:
        for sentence in document.sentences:
            for word in _words(sentence):
                counts[word][document.package] += 1
    telling = {w for w, c in counts.items() if c.total() >= 10 and c.most_common(1)[0][1] > 0.7 * c.total()} | _NAMES
    by_package: dict[str, list[str]] = defaultdict(list)
    for document in documents:
        for sentence in document.sentences:
            if 6 <= len(sentence.split()) <= 25 and not _words(sentence) & telling:
                by_package[document.package].append(sentence)
    fewest = min(len(by_package[package]) for package in PACKAGES)
    for label, package in enumerate(PACKAGES):
        for sentence in rng.sample(by_package[package], fewest):
            yield {"sentence": sentence, "label": label}


def statement_examples(documents: list[Document], train: list[Document], rng: random.Random) -> Iterator[dict]:
    """Columns ``premise, hypothesis, label``, the labels of :data:`STATEMENT_CLASSES` in turn.

    For every label the stated type occurs in the premise, and names come from the whole split. So neither premise nor
    hypothesis alone gives the label away.
    """
    names = [p.name for d in documents for p in d.parameters]
    label = 0
    for pair, context, _ in _pairs(documents):
        types = list(dict.fromkeys(p.stated_type for p in pair))
        if len(types) < 2:
            continue
        stated = types[rng.randrange(len(types))]
        having, others = ([p for p in pair if (p.stated_type == stated) == same] for same in (True, False))
        # All three are drawn whatever the label: the draws that follow depend on it.
        name = (rng.choice(having).name, _absent(context, names, rng), rng.choice(others).name)[label]
        yield {"premise": context, "hypothesis": f"The type of {name} is {stated}.", "label": label}
        label = (label + 1) % len(STATEMENT_CLASSES)


def answer_examples(documents: list[Document], train: list[Document], rng: random.Random) -> Iterator[dict]:
    """SQuAD's columns: two questions on the types and defaults of each pair of parameters."""
    return (row for row, _ in _questions(documents, rng))


def answer_or_none_examples(documents: list[Document], train: list[Document], rng: random.Random) -> Iterator[dict]:
    """SQuAD 2.0's columns: the questions of :func:`answer_examples`, and after every second one a question without answer."""
    names = [p.name for d in documents for p in d.parameters]
    for number, (row, pair) in enumerate(_questions(documents, rng)):
        yield row
        if number % 2:
            continue
        what = row["id"].rpartition("-")[2]
        silent = [p.name for p in pair if what == "default" and "default" not in p.entry.lower()]
        if silent and rng.random() < 0.5:
            name = rng.choice(silent)
        else:
            name = _absent(row["context"], names, rng)
        answers = {"text": [], "answer_start": []}
        yield {**row, "id": f"{row['id']}-none", "question": _question(what, name, rng), "answers": answers}


def _questions(documents: list[Document], rng: random.Random) -> Iterator[tuple[dict, list[Parameter]]]:
    """Two questions on each pair of parameters, each with its pair."""
    for number, (pair, context, starts) in enumerate(_pairs(documents)):
        possible = [(i, what) for i, p in enumerate(pair) for what in ("type", "default") if p.span(what)]
        for i, what in rng.sample(possible, 2):
            start, end = (starts[i] + offset for offset in pair[i].span(what))
            row = {
                "id": f"{number}-{i}-{what}",
                "context": context,
                "question": _question(what, pair[i].name, rng),
                "answers": {"text": [context[start:end]], "answer_start": [start]},
            }
            yield row, pair


def _pairs(documents: list[Document]) -> Iterator[tuple[list[Parameter], str, list[int]]]:
    """Pairs of neighbouring parameters of a docstring, their text, and the position in it where each begins."""
    for document in documents:
        named = list({p.name: p for p in document.parameters}.values())
        for first in range(0, len(named) - 1, 2):
            pair, context, starts = named[first : first + 2], "", []
            for parameter in pair:
                starts.append(len(context))
                context += f"{parameter.entry} "
            yield pair, context.rstrip(), starts


def _absent(context: str, names: list[str], rng: random.Random) -> str:
    """A random name that does not occur in the context."""
    words = set(re.findall(r"\w+", context))
    while (name := rng.choice(names)) in words:
        pass
    return name


def _question(what: str, name: str, rng: random.Random) -> str:
    return rng.choice(("What is the {} of {}?", "Which {} does {} have?")).format(what, name)
