"""Names: a corpus and four tasks in some sixty languages, made from the Unicode CLDR that the package babel ships.

CLDR (https://cldr.unicode.org) gives territories, languages and currencies a name in every language: Danish says "Tyskland",
Turkish "Almanya". Used are short names in languages of Latin script and of the families in :data:`FAMILIES`. The corpus is for
masked-language pre-training. The tasks are of the same kinds as the paper's (arXiv 2201.10890):

=================  ==========================================================================================
``language``       a name, one class per language: the one that it is from (like SST-2: one text)
``family``         two names and a family; three classes: both names are from the family, one is, or none
                   (like MNLI: a premise and a statement that follows, may follow or does not)
``answer``         the question is a family, the context two names of two families; the answer is the
                   name from that family (like SQuAD 1.1)
``answer_or_none`` the same, but a third of the questions are on another family: no answer (like SQuAD 2.0)
=================  ==========================================================================================

Spelling alone says where a name is from: which ending, which doubled letter, which article. That has to be stored in weights,
so it asks for capacity; nothing can be looked up in the text.

Rows are written as JSON lines with the columns of the hub's data sets of that kind, so the same code reads both. A spelling
(without case and accents, as the tokenizer sees it) is in one split only. The same version of babel gives the same texts.
"""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

FAMILIES = {  # family -> languages, by their CLDR codes
    "Germanic": ("af", "da", "de", "en", "fo", "frr", "fy", "gsw", "is", "ksh", "lb", "nds", "nl", "no", "sv"),
    "Romance": ("ast", "ca", "es", "fr", "gl", "it", "lij", "pt", "rm", "ro", "sc", "scn", "vec"),
    "Slavic": ("bs", "cs", "dsb", "hr", "hsb", "pl", "sk", "sl", "szl"),
    "Celtic": ("br", "cy", "ga", "gd"),
    "Turkic": ("az", "tk", "tr", "uz"),
    "Uralic": ("et", "fi", "hu", "smn"),
    "Austronesian": ("bew", "fil", "id", "jv", "mi", "ms"),
    "Niger-Congo": ("ee", "ig", "sw", "yo", "zu"),
}
LANGUAGES = tuple(sorted(code for codes in FAMILIES.values() for code in codes))
FAMILY_CLASSES = ("entailment", "neutral", "contradiction")
LENGTH = range(3, 10)  # characters of a name: short ones make short, cheap examples
VALIDATION_PART = 0.2  # of the spellings
ROWS = {"train": 24_000, "validation": 2_000}  # of a task whose rows are drawn
NAMES_IN_TEXT, NAMES_IN_CONTEXT = 5, 2
CORPUS_ROUNDS = 4  # every name stands in so many texts of the corpus

_FAMILY_OF = {code: family for family, codes in FAMILIES.items() for code in codes}


def versions() -> dict[str, str]:
    """Versions of the packages that the texts come from."""
    return {"babel": version("babel")}


def spelling(name: str) -> str:
    """A name without case and accents."""
    return "".join(c for c in unicodedata.normalize("NFD", name.lower()) if not unicodedata.combining(c))


def read_names() -> dict[str, list[str]]:
    """The names of territories, languages and currencies in each of :data:`LANGUAGES`, sorted, each spelling once."""
    from babel import Locale  # a quarter of a second to import

    result = {}
    for code in LANGUAGES:
        locale = Locale.parse(code)
        every = [*locale.territories.values(), *locale.languages.values(), *locale.currencies.values()]
        result[code] = sorted({spelling(name): name for name in every if _usable(name)}.values())
    return result


def _usable(name: str) -> bool:
    """Whether a name is short and a word or words, not a code such as "EUR"."""
    letters = all(c.isalpha() or unicodedata.combining(c) or c in " '’ʻ-" for c in name)
    return len(name) in LENGTH and not name.isupper() and letters


@dataclass(frozen=True)
class Split:
    """The names of one split, from which rows are drawn.

    Args:
        names: by language.
        languages: of each spelling, in both splits together.
    """

    names: dict[str, list[str]]
    languages: dict[str, set[str]]

    @cached_property
    def of_language(self) -> dict[str, list[str]]:
        """Names that only this language has."""
        return {
            code: [name for name in names if len(self.languages[spelling(name)]) == 1]
            for code, names in self.names.items()
        }

    @cached_property
    def of_family(self) -> dict[str, list[str]]:
        """Names that only languages of this family have."""
        found = defaultdict(set)
        for code, names in self.names.items():
            for name in names:
                if len({_FAMILY_OF[other] for other in self.languages[spelling(name)]}) == 1:
                    found[_FAMILY_OF[code]].add(name)
        return {family: sorted(found[family]) for family in FAMILIES}


def write_names(folder: Path, names: dict[str, list[str]] | None = None) -> None:
    """Write the folders ``corpus`` and of each task, with ``train.jsonl`` and ``validation.jsonl``."""
    names = read_names() if names is None else names
    languages = defaultdict(set)
    for code, own in names.items():
        for name in own:
            languages[spelling(name)].add(code)
    makers = {
        "corpus": corpus_texts,
        "language": language_examples,
        "family": family_examples,
        "answer": answer_examples,
        "answer_or_none": answer_or_none_examples,
    }
    for name, make in makers.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, count in ROWS.items():
            part = {code: [n for n in own if _split(n) == split] for code, own in names.items()}
            rng = random.Random(f"{name} {split}")  # no split depends on another
            rows = list(make(Split(part, languages), count, rng))
            rng.shuffle(rows)
            with open(folder / name / f"{split}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _split(name: str) -> str:
    digest = hashlib.sha256(spelling(name).encode()).digest()
    return "validation" if digest[0] < 256 * VALIDATION_PART else "train"


def corpus_texts(split: Split, count: int, rng: random.Random) -> Iterator[dict]:
    """Column ``text``: some names of a language, after the English name of the language or of its family."""
    from babel import Locale

    english = Locale.parse("en").languages
    for code, names in split.names.items():
        for _ in range(CORPUS_ROUNDS):
            order = rng.sample(names, len(names))
            for start in range(0, len(order), NAMES_IN_TEXT):
                head = rng.choice((english[code], _FAMILY_OF[code]))
                yield {"text": f"{head}: {', '.join(order[start : start + NAMES_IN_TEXT])}"}


def language_examples(split: Split, count: int, rng: random.Random) -> Iterator[dict]:
    """Columns ``sentence, label``, all names that one language alone has; classes as in :data:`LANGUAGES`."""
    for code, names in split.of_language.items():
        for name in names:
            yield {"sentence": name, "label": LANGUAGES.index(code)}


def family_examples(split: Split, count: int, rng: random.Random) -> Iterator[dict]:
    """Columns ``premise, hypothesis, label``: two names, a family, and in turn the :data:`FAMILY_CLASSES`: both are from it,
    one, none."""
    for number in range(count):
        label, (family, *others) = number % 3, rng.sample(list(FAMILIES), 3)
        families = ((family, family), (family, others[0]), others)[label]
        pair = [rng.choice(split.of_family[f]) for f in rng.sample(families, 2)]
        yield {"premise": ", ".join(pair), "hypothesis": family, "label": label}


def answer_examples(split: Split, count: int, rng: random.Random) -> Iterator[dict]:
    """SQuAD's columns: a family, and two names of two families, one of which it is."""
    return _questions(split, count, rng, silent=0)


def answer_or_none_examples(split: Split, count: int, rng: random.Random) -> Iterator[dict]:
    """SQuAD 2.0's columns: as :func:`answer_examples`, but every third question has no answer."""
    return _questions(split, count, rng, silent=3)


def _questions(split: Split, count: int, rng: random.Random, silent: int) -> Iterator[dict]:
    """Questions; of every ``silent`` the first has no answer (0: all have one)."""
    for number in range(count):
        *families, absent = rng.sample(list(FAMILIES), NAMES_IN_CONTEXT + 1)
        names = [rng.choice(split.of_family[family]) for family in families]
        asked = rng.randrange(NAMES_IN_CONTEXT)
        start = len("".join(f"{name}, " for name in names[:asked]))
        row = {"id": str(number), "question": families[asked], "context": ", ".join(names)}
        if silent and number % silent == 0:
            yield row | {"question": absent, "answers": {"text": [], "answer_start": []}}
        else:
            yield row | {"answers": {"text": [names[asked]], "answer_start": [start]}}
