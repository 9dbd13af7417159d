"""Docstrings, and text data in files: what comes out, how windows map back to the text, how bad data is refused."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ones_lib.data import docstrings
from ones_lib.data.bag_of_words import bag_of_words
from ones_lib.data.docstrings import PACKAGES, STATEMENT_CLASSES, Document, Parameter, answer_or_none_examples, parse
from ones_lib.data.rows import EMBEDDED_TASKS, HUB_TASKS, TASKS
from ones_lib.data.text import read_texts, text_corpus, text_tasks
from ones_lib.data.tokens import pack, train_tokenizer

REAL = Path(__file__).parents[2] / "shared" / "data" / "text"
SMALL_CORPUS = {"vocab_size": 200, "sequence_length": 16}
SMALL_TASKS = {"task_length": 24, "stride": 6}


@pytest.fixture(scope="module")
def embedded(text_cache):
    return text_tasks(tokenizer=text_corpus(cache_dir=text_cache).tokenizer, cache_dir=text_cache)


# --- docstrings ------------------------------------------------------------------------------------------------------


def test_a_docstring_by_hand():
    document = parse(
        """Compute the thing along an axis.

        It is a *very* :func:`useful <numpy.useful>` operation. See ``other`` for more
        of it, with numbers.

        .. note:: This paragraph is a directive and is left out.

        Parameters
        ----------
        axis, out : int or None, default 0
            The axis. It goes on. A third sentence.

            A second paragraph.
        mode : {'full', 'valid'}, optional
            How it is done.
        *args : tuple (a, b), optional
        broken line without a type
            Not an entry.

        Returns
        -------
        result : ndarray
            Not a parameter.

        Notes
        -----
        The algorithm is that of everyone else.

        - A list is no prose and is left out here.
        """
    )
    assert document.sentences == [
        "Compute the thing along an axis.",
        "It is a very useful operation.",
        "See other for more of it, with numbers.",
        "The algorithm is that of everyone else.",
    ]
    assert document.parameters == [
        Parameter("axis", "int or None, default 0", "The axis. It goes on."),
        Parameter("mode", "{'full', 'valid'}, optional", "How it is done."),
        Parameter("args", "tuple (a, b), optional", ""),
    ]
    spans = [
        [p.span(what) and p.header[slice(*p.span(what))] for p in document.parameters] for what in ("type", "default")
    ]
    assert spans == [["int or None", "{'full', 'valid'}", "tuple (a, b)"], ["0", None, None]]


@pytest.mark.parametrize(
    ("text", "default"),
    [
        ("float, default: 1e-3", "1e-3"),
        ("bool, default=True", "True"),
        ("str, default is 'mean'", "mean"),
        ("int (default 5)", "5"),
        ("int, defaults to 100, positive", "100"),
        ("array_like", None),
    ],
)
def test_defaults(text, default):
    parameter = Parameter("x", text, "")
    span = parameter.span("default")
    assert (span and parameter.header[slice(*span)]) == default


def test_no_text_and_no_module_is_in_two_splits(embedded, text_cache):
    (folder,) = text_cache.glob("docstrings-*")
    for name in ("corpus", *EMBEDDED_TASKS):
        rows = [
            [json.loads(line) for line in (folder / name / f"{split}.jsonl").open()]
            for split in ("train", "validation")
        ]
        assert min(len(part) for part in rows) > 500, name
        columns = [c for c in rows[0][0] if c in ("text", "sentence", "context", "premise")]
        for column in columns:
            train, validation = ({row[column] for row in part} for part in rows)
            shared = {text for text in train & validation if len(text.split()) > 6}
            assert len(shared) <= 0.01 * len(validation), (name, column, list(shared)[:3])


def test_documents_hold_every_sentence_once_and_give_the_same_files_again(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "PACKAGES", {"networkx": "networkx"})
    documents = docstrings.read_documents()
    sentences = [sentence.lower() for document in documents for sentence in document.sentences]
    assert len(sentences) == len(set(sentences)) > 1000
    assert {d.split for d in documents} == {"train", "validation"}
    assert len({(d.module, d.split) for d in documents}) == len({d.module for d in documents})
    docstrings.write_docstrings(tmp_path / "a", documents)
    docstrings.write_docstrings(tmp_path / "b")  # read again
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.jsonl"))
    assert len(files) == 10
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_package_sentences_name_no_package_and_are_balanced(embedded):
    for split, rows in embedded.rows("package").items():
        names = re.compile(rf"\b({'|'.join([*PACKAGES, 'scikit', 'pytorch'])})\b", re.IGNORECASE)
        assert not [s for s in rows["sentence"] if names.search(s)]
        counts = Counter(rows["label"])
        assert len(counts) == len(PACKAGES), split
        assert len(set(counts.values())) == 1


def test_statements_are_balanced_and_true_to_their_label(embedded):
    rows = embedded.rows("statement")["train"]
    counts = Counter(rows["label"])
    assert max(counts.values()) - min(counts.values()) <= 1
    for row in rows:
        name, stated = re.fullmatch(r"The type of (.*?) is (.*)\.", row["hypothesis"]).groups()
        assert stated in row["premise"]
        header = re.search(rf"(?:^|\. |\w ){re.escape(name)} : (.*)", row["premise"])
        label = STATEMENT_CLASSES[row["label"]]
        if label == "neutral":
            assert not re.search(rf"\b{re.escape(name)}\b", row["premise"])
        elif header:
            begins = header[1].startswith(stated) and not header[1][len(stated) :].startswith((" or", "-", "_"))
            assert begins or label == "contradiction", row


def test_answers_stand_in_their_context_and_silence_is_right(embedded):
    for task in ("answer", "answer_or_none"):
        for rows in embedded.rows(task).values():
            for row in rows:
                for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
                    assert row["context"][start : start + len(text)] == text
                    assert text == text.strip() != ""
    rows = embedded.rows("answer_or_none")["validation"]
    silent = [row for row in rows if not row["answers"]["text"]]
    assert len(silent) == len(rows) / 3
    absent = 0
    for row in silent:
        what, name = re.fullmatch(
            r"(?:What is the|Which) (\w+) (?:of|does) (.*?)(?: have)?\?", row["question"]
        ).groups()
        header = re.search(rf"(?:^|\W){re.escape(name)} : (.*?)\. ", row["context"] + " ")
        absent += header is None
        assert header is None or (what == "default" and "default" not in header[1])
    assert 0.5 < absent / len(silent) < 0.99  # both kinds occur


def test_questions_without_an_answer_by_hand():
    parameters = [Parameter("a", "int, default 3", "The first."), Parameter("b", "float", "The second.")]
    far = Document("numpy", "far.py", [], [Parameter("zeta", "str", "Elsewhere."), Parameter("eta", "str", "Too.")])
    documents = [Document("numpy", "near.py", [], parameters), far]
    rows = list(answer_or_none_examples(documents, documents, random.Random(0)))
    assert len(rows) == 6
    for row in rows[:3]:
        assert row["context"] == "a : int, default 3. The first. b : float. The second."
    said = {(row["question"], *row["answers"]["text"]) for row in (rows[0], rows[2])}
    types = {(f"{form.format('a')}", "int") for form in ("What is the type of {}?", "Which type does {} have?")}
    types |= {(question.replace(" a", " b"), "float") for question, _ in types}
    defaults = {("What is the default of a?", "3"), ("Which default does a have?", "3")}
    assert said <= types | defaults
    for row in (rows[1], rows[4]):
        assert row["answers"] == {"text": [], "answer_start": []}


def test_bag_of_words_does_not_solve_the_tasks(embedded):
    """Limits above what was measured (51, 36, 53, 52%), below what a model that reads can reach."""
    for task, most in {"package": 0.6, "statement": 0.45, "answer": 0.65, "answer_or_none": 0.6}.items():
        scores = bag_of_words(task, embedded)
        assert 0 < scores["constant"] < most, task
        assert scores["constant"] - 0.02 < scores["bag_of_words"] < most, task


# --- files -----------------------------------------------------------------------------------------------------------


def write(folder: Path, task: str, **splits):
    (folder / task).mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / task / f"{split}.jsonl").write_text(text)


def sentences(count, seed=0, telling=True):
    """Label 1 exactly where the word "good" stands, or anywhere."""
    rng = random.Random(seed)
    for i in range(count):
        words = rng.choices(["the", "a", "film", "plot", "actor", "scene", "music", "was", "had", "with"], k=8)
        label = i % 2
        words[rng.randrange(8)] = ("bad", "good")[label if telling else rng.randrange(2)]
        yield {"sentence": " ".join(words), "label": label, "idx": i}


def questions(count, silent=0):
    rng = random.Random(count)
    for i in range(count):
        names, colours = rng.sample(["Ann", "Bob", "Cleo", "Dan"], 3), rng.sample(["red", "blue", "dark green"], 3)
        context = " ".join(f"The house of {n} is {c}." for n, c in zip(names, colours, strict=True))
        row = {"id": str(i), "title": "houses", "context": context, "question": f"Which colour has {names[1]}'s house?"}
        start = context.index(colours[1])
        row["answers"] = {"text": [colours[1]], "answer_start": [start]}
        if i < silent:
            row |= {"question": "Which colour has Eve's house?", "answers": {"text": [], "answer_start": []}}
        yield row


@pytest.fixture
def local(tmp_path):
    """A folder with the four tasks, small."""
    folder = tmp_path / "data"
    write(folder, "sst2", train=sentences(80), validation=sentences(40, seed=1))
    words = ["one", "two", "three", "four", "five", "six"]
    pairs = [
        {"premise": f"{words[i % 6]} dogs run", "hypothesis": f"{words[i // 6]} dogs sleep", "label": i % 3}
        for i in range(30)
    ]
    write(folder, "mnli", train=pairs, validation_matched=pairs[:12], validation_mismatched=pairs[12:20])
    write(folder, "squad", train=questions(60), validation=questions(20))
    write(folder, "squad_v2", train=questions(60, 20), validation=questions(20, 8))
    return folder


def local_corpus(folder, name="tasks", **options):
    """Of the texts of the folder's tasks."""
    of_tasks = {"name": "local", "text_dir": folder, "tasks": HUB_TASKS}
    cache = folder.parent / "cache"
    return text_corpus(name, **{"of_tasks": of_tasks, "cache_dir": cache, **SMALL_CORPUS, **options})


def local_rows(folder, **options):
    """Tasks without a tokenizer, to read rows only."""
    return text_tasks("local", **{"text_dir": folder, "tokenizer": None, **SMALL_TASKS, **options})


def local_tasks(folder, **options):
    """Tasks with the tokenizer of their own texts."""
    return local_rows(folder, tokenizer=local_corpus(folder).tokenizer, **options)


def test_local_tasks_with_the_hubs_columns(local):
    corpus, data = local_corpus(local), local_tasks(local)
    assert {task: {split: len(rows) for split, rows in data.rows(task).items()} for task in HUB_TASKS} == {
        "sst2": {"train": 80, "validation": 40},
        "mnli": {"train": 30, "validation_matched": 12, "validation_mismatched": 8},
        "squad": {"train": 60, "validation": 20},
        "squad_v2": {"train": 60, "validation": 20},
    }
    assert corpus.train.shape[1] == corpus.validation.shape[1] == 16
    encoded = data.encoded("mnli", "train")
    for i, row in enumerate(data.rows("mnli")["train"]):
        length = int(encoded.lengths[i])
        ids, types = encoded.ids[i, :length], encoded.types[i, :length]
        assert data.tokenizer.decode(ids[types == 0]) == f"[CLS] {row['premise']} [SEP]"
        assert data.tokenizer.decode(ids[types == 1]) == f"{row['hypothesis']} [SEP]"
        assert (encoded.ids[i, length:] == data.tokenizer.pad_token_id).all()
    assert encoded.targets.tolist() == list(data.rows("mnli")["train"]["label"])


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_other_files(local, ending):
    rows = pd.read_json(local / "sst2" / "train.jsonl", lines=True)
    (local / "sst2" / "train.jsonl").unlink()
    getattr(rows, f"to_{ending}")(local / "sst2" / f"train.{ending}", index=False)
    assert local_rows(local).rows("sst2")["train"].to_pandas().equals(rows)


def test_only_the_first_rows(local):
    data = local_rows(local, max_train=10, max_validation=8)
    assert [len(rows) for rows in data.rows("squad").values()] == [10, 8]


def test_a_changed_file_is_read_again(local):
    assert len(local_rows(local).rows("sst2")["train"]) == 80
    write(local, "sst2", train=sentences(50))
    assert len(local_rows(local).rows("sst2")["train"]) == 50


@pytest.mark.parametrize("task_length", [20, 24, 60])
def test_windows_cover_the_context_and_overlap_by_the_stride(local, task_length):
    data = local_tasks(local, task_length=task_length, stride=4)
    rows, encoded = data.rows("squad_v2")["train"], data.encoded("squad_v2", "train")
    windows: dict[int, list[int]] = {}
    for window, question in enumerate(encoded.example.tolist()):
        windows.setdefault(question, []).append(window)
    assert set(windows) == set(range(len(rows)))
    for question, its in windows.items():
        row = rows[question]
        covered, before = set(), None
        for window in its:
            offsets = [tuple(pair) for pair in encoded.offsets[window].tolist() if pair[0] >= 0]
            if before is not None:
                assert offsets[:4] == before[-4:]  # the stride
            covered |= {place for first, last in offsets for place in range(first, last)}
            before = offsets
        assert covered == {i for i, character in enumerate(row["context"]) if not character.isspace()}
    assert (len(encoded) > len(rows)) == (task_length < 60)


def assert_answers_map_back(data, task):
    for split, rows in data.rows(task).items():
        encoded, found = data.encoded(task, split), {}
        for window, (first, last) in enumerate(encoded.targets.tolist()):
            question = int(encoded.example[window])
            if (first, last) != (0, 0):
                start, end = encoded.offsets[window, first, 0], encoded.offsets[window, last, 1]
                found.setdefault(question, set()).add(rows[question]["context"][start:end])
        for question, row in enumerate(rows):
            assert found.get(question, set()) == set(row["answers"]["text"][:1]), row


def test_targets_map_back_to_the_answers(local):
    data = local_tasks(local, task_length=22)
    for task in ("squad", "squad_v2"):
        assert_answers_map_back(data, task)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL}")
@pytest.mark.parametrize("task", ["squad", "squad_v2"])
def test_every_answer_of_the_real_slice_maps_back_to_its_characters(task, tmp_path):
    of_tasks = {"name": "local", "text_dir": REAL, "tasks": [task]}
    tokenizer = text_corpus("tasks", of_tasks=of_tasks, cache_dir=tmp_path).tokenizer
    data = text_tasks("local", tokenizer=tokenizer, text_dir=REAL, task_length=192, stride=64)
    assert len(data.encoded(task, "train")) > len(data.rows(task)["train"])  # some contexts take several windows
    assert_answers_map_back(data, task)


def test_corpus_from_files_keeps_its_validation_split_or_holds_one_out(tmp_path, local):
    texts = [{"text": f"number {i} of many short texts"} for i in range(200)]
    write(tmp_path, "own", train=texts)
    whole, file = (local_corpus(local, str(path)) for path in (tmp_path / "own", tmp_path / "own" / "train.jsonl"))
    assert torch.equal(whole.train, file.train)
    assert "180 texts" in whole.report  # every tenth is for validation
    write(tmp_path, "own", validation=texts[:20])
    assert "200 texts" in local_corpus(local, str(tmp_path / "own")).report
    (tmp_path / "own" / "train.csv").write_text("text\nother\n")  # the file that was named is read, not its neighbour
    assert torch.equal(local_corpus(local, str(tmp_path / "own" / "train.jsonl")).train, file.train)
    with pytest.raises(ValueError, match="corpus: expected at least 14 tokens, found 0"):
        local_corpus(local, str(tmp_path / "own" / "train.csv"))


def test_packed_texts_are_the_texts():
    texts = ["One text of 12 words.", "Another, longer text; it goes on.", "End"] * 5
    tokenizer = train_tokenizer(texts, 100)
    packed = pack(texts, tokenizer, 12)
    assert (packed[:, 0] == tokenizer.cls_token_id).all()
    assert (packed[:, -1] == tokenizer.sep_token_id).all()
    stream = [
        i for text in texts for i in (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id)
    ]
    body = packed[:, 1:-1].flatten().tolist()
    assert body == stream[: len(body)]
    assert len(stream) - len(body) < 10


@pytest.mark.parametrize("marks", [{"bos_token": "<s>", "eos_token": "</s>"}, {"eos_token": "</s>"}, {}])
def test_packed_texts_with_the_tokenizer_of_a_causal_model(marks):
    letters = {token: i for i, token in enumerate(["<s>", "</s>", *"abc"])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    packed = pack(["abc", "ab"] * 3, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks), 4)
    body = ([2, 3, 4] + [1] * bool(marks) + [2, 3] + [1] * bool(marks)) * 3
    first = [0] if "bos_token" in marks else []
    room = 4 - len(first)
    assert packed.tolist() == [[*first, *body[i : i + room]] for i in range(0, len(body) - room + 1, room)]


def test_texts_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(20)))
    assert read_texts(tmp_path / "a.txt", "train") == ["one\ntwo"]
    assert sorted(map(int, read_texts(tmp_path / "b.jsonl", "validation"))) == list(range(20))


def test_tokenizer_lower_cases_and_splits_numbers():
    tokenizer = train_tokenizer(["The year 1989 was not 2024."] * 3, 60)
    assert tokenizer.tokenize("THE 1989.")[-5:] == ["1", "9", "8", "9", "."]
    assert tokenizer.decode(tokenizer("The Year")["input_ids"]) == "[CLS] the year [SEP]"


def test_a_tokenizer_trained_again_elsewhere_is_the_same(text_cache):
    """Equally frequent tokens come in another order in every process; a record's weights must not depend on that."""
    (folder,) = text_cache.glob("docstrings-*")
    file = folder / "corpus" / "train.jsonl"
    program = (
        "import json, sys; from ones_lib.data.tokens import train_tokenizer;"
        "texts = [json.loads(line)['text'] for line in open(sys.argv[1])][:3000];"
        "print(train_tokenizer(texts, 800).backend_tokenizer.to_str())"
    )
    there = subprocess.run([sys.executable, "-c", program, str(file)], stdout=subprocess.PIPE, text=True, check=True)
    texts = [json.loads(line)["text"] for line in file.open()][:3000]
    assert there.stdout.strip() == train_tokenizer(texts, 800).backend_tokenizer.to_str()


def test_bag_of_words_finds_a_telling_word_and_nothing_in_noise(local):
    assert bag_of_words("sst2", local_rows(local)) == {"constant": 0.5, "bag_of_words": 1.0}
    write(local, "sst2", train=sentences(80, telling=False), validation=sentences(400, seed=1, telling=False))
    assert bag_of_words("sst2", local_rows(local))["bag_of_words"] == pytest.approx(0.5, abs=0.1)
    scores = bag_of_words("squad_v2", local_rows(local))
    assert 0 < scores["bag_of_words"] < 1


def change(task, split="train", row=0, **columns):
    def apply(folder):
        rows = [json.loads(line) for line in (folder / task / f"{split}.jsonl").open()]
        for name, value in columns.items():
            targets = rows if value is None else [rows[row]]
            for target in targets:
                target.pop(name) if value is None else target.update({name: value})
        write(folder, task, **{split: rows})

    return apply


NO_ANSWER = {"text": [], "answer_start": []}
BAD_ROWS = [
    (
        "sst2",
        change("sst2", label=None),
        r"sst2, split train: expected columns \['sentence', 'label'\].*missing: \['label'\]",
    ),
    ("mnli", change("mnli", hypothesis=None), r"mnli, split train: .*missing: \['hypothesis'\]"),
    ("squad", change("squad", "validation", answers=None), r"squad, split validation: .*missing: \['answers'\]"),
    (
        "sst2",
        change("sst2", row=3, label=2),
        "sst2, split train: row 3: column 'label': expected 0 negative, 1 positive, found 2",
    ),
    ("mnli", change("mnli", row=5, label=-1), "split train: row 5: column 'label': expected 0 entailment.*found -1"),
    (
        "squad",
        change("squad", row=2, answers={"text": ["purple"], "answer_start": [0]}),
        "row 2: column 'answers': expected 'purple' at 0, found 'The ho'",
    ),
    ("squad", change("squad", row=1, answers=NO_ANSWER), "row 1: column 'answers': expected an answer, found none"),
    (
        "squad",
        change("squad", row=1, answers={"text": ["red", "red"], "answer_start": [0]}),
        "row 1: column 'answers': expected as many texts as answer_start",
    ),
    ("sst2", lambda folder: write(folder, "sst2", train=[]), "sst2/train.jsonl: expected at least one row"),
    (
        "squad",
        lambda folder: (folder / "squad" / "train.jsonl").unlink(),
        "text_dir: expected .*squad/train with one of",
    ),
    (
        "sst2",
        lambda folder: (folder / "sst2" / "train.jsonl").write_text('{"a'),
        "sst2/train.jsonl: could not be read",
    ),
]


@pytest.mark.parametrize(("task", "prepare", "message"), BAD_ROWS)
def test_bad_rows_are_refused_naming_file_row_and_column(local, task, prepare, message):
    prepare(local)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        local_rows(local).rows(task)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"vocab_size": 3}, ValueError, "vocab_size: expected an integer of at least 8, found 3"),
        ({"mask_rate": 1.0}, ValueError, "mask_rate: expected a number between 0 and 1, found 1.0"),
        ({"versions": {"numpy": "1.0"}}, ValueError, "versions: expected those installed, .*found {'numpy': '1.0'}"),
        ({"of_tasks": None}, ValueError, "tasks: expected at least one for a corpus of 'tasks'"),
        ({"of_tasks": {"name": "glue", "tasks": ["sst2"]}}, ValueError, "data: expected 'docstrings'.*found 'glue'"),
        ({"name": "no such file"}, FileNotFoundError, "corpus: expected 'docstrings', 'tasks', a file"),
        ({"name": __file__}, ValueError, r"test_text_data.py: expected one of the endings .jsonl.*found '.py'"),
        ({"name": "nobody/nothing"}, ConnectionError, "could not open 'nobody/nothing'"),
        ({"tokenizer": "nobody/nothing"}, ValueError, "tokenizer: could not open 'nobody/nothing'"),
    ],
)
def test_bad_options_of_a_corpus_are_refused(local, options, error, message):
    with pytest.raises(error, match=message):
        local_corpus(local, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "glue"}, ValueError, "data: expected 'docstrings', 'local' or 'hub', found 'glue'"),
        ({"max_train": 3}, ValueError, "max_train: expected an integer of at least 8, found 3"),
        ({"stride": 12}, ValueError, "stride: expected an integer from 0 to below task_length / 2 = 12, found 12"),
        ({"versions": {"numpy": "1.0"}}, ValueError, "versions: expected those installed, .*found {'numpy': '1.0'}"),
        ({"task": "package"}, ValueError, r"tasks: expected some of \['sst2', .*found 'package'"),
        ({"name": "hub"}, ConnectionError, "data: could not open 'nyu-mll/glue' on the Hugging Face hub.*data='local'"),
    ],
)
def test_bad_options_of_tasks_are_refused(local, options, error, message):
    task = options.pop("task", "sst2")
    with pytest.raises(error, match=message):
        text_tasks(**{"name": "local", "text_dir": local, "tokenizer": None, **SMALL_TASKS, **options}).rows(task)


def test_an_interrupted_cache_is_not_taken_for_whole(local, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ones_lib.data.tokens.pack", interrupt)
        with pytest.raises(KeyboardInterrupt):
            local_corpus(local)
    assert [p.name for p in (local.parent / "cache").iterdir()] == ["locks"]
    assert local_corpus(local).train.shape[1] == 16


def test_versions_and_tasks_of_embedded_text():
    assert set(docstrings.versions()) == set(PACKAGES)
    assert all(TASKS[task].hub is None for task in EMBEDDED_TASKS)
